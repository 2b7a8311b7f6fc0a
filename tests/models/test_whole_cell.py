"""`[CLS]` as the whole cell, against a dense formula in float64 that is written out here."""

import numpy as np
import pytest
import torch
from conftest import of_epoch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from stformer_hf import (
    CellStore,
    DataCollatorForCellClassification,
    DataCollatorForGeneRankMLM,
    DataCollatorForPhenotypicMLM,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneBertModel,
    GeneTokenizer,
)
from stformer_hf.batches.collate import pack, pad
from stformer_hf.models.gene_bert.cell_counts import hide
from tests.conftest import make_adata

N_GENES = 40
GENES = [f"ENSG{i:011d}" for i in range(N_GENES)]
HIDDEN = -1
FORMS = {"padded": pad, "packed": pack}


# ---------------------------------------------------------------------- the formula, dense, in float64


def dense_views(model, counts: np.ndarray, absent: np.ndarray) -> np.ndarray:
    """Both views of cells, scaled: float64 (n, hidden), of counts (n, n_genes) and which of them are absent."""
    embedding = model.base_model.cell_embedding
    weight, shares, means = (
        tensor.detach().double().numpy()
        for tensor in (embedding.genes.weight, embedding.statistics.shares, embedding.statistics.means)
    )
    bound = np.sqrt(float(embedding.statistics.n_cells))
    half = weight.shape[1] // 2
    cells = []
    for x, gone in zip(counts.astype(float), absent, strict=True):
        present = ~gone & (shares > 0)
        depth = x[present].sum() / shares[present].sum() if x[present].sum() else 1.0
        mu = depth * shares[present]
        logs = np.log1p(1e4 * x[present] / depth)
        residuals = ((x[present] - mu) / np.sqrt(mu + mu**2 / 100)).clip(-bound, bound)
        views = [
            (logs - means[0, present]) @ weight[present, :half],
            (residuals - means[1, present]) @ weight[present, half:],
        ]
        cells.append(np.concatenate([view / np.sqrt(np.mean(view**2)) for view in views]))
    return np.stack(cells)


def dense_wide_logits(model, counts: np.ndarray, absent: np.ndarray) -> np.ndarray:
    """Logits of the wide head: float64 (n, num_labels)."""
    statistics = model.base_model.cell_embedding.statistics
    shares, means = statistics.shares.double().numpy(), statistics.means[0].double().numpy()
    weight, bias = (p.detach().double().numpy() for p in (model.wide_head.genes.weight, model.wide_head.bias))
    logits = []
    for x, gone in zip(counts.astype(float), absent, strict=True):
        present = ~gone & (shares > 0)
        depth = x[present].sum() / shares[present].sum() if x[present].sum() else 1.0
        logits.append((np.log1p(1e4 * x[present] / depth) - means[present]) @ weight[present] + bias)
    return np.stack(logits)


# ---------------------------------------------------------------------- cells and models


def make_counts(n_cells: int = 12, n_genes: int = N_GENES, seed: int = 0) -> np.ndarray:
    """Counts of cells of very different sizes, one without any."""
    rng = np.random.default_rng(seed)
    rates = rng.gamma(0.5, 2, n_genes) * rng.choice([0.3, 3, 30], (n_cells, 1))
    counts = rng.poisson(rates * rng.random((n_cells, n_genes)))
    counts[:, 0] += 1  # a cell is to show something, whatever else is hidden
    counts[3] = 0
    return counts


@pytest.fixture(scope="module")
def tokenizer():
    return GeneTokenizer(GENES, bin_edges=[0.5, 1.5, 3.5], whole_cell=True, max_length=20)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_no_size_has_attention_dropout_unless_asked_for(tokenizer, size):
    assert GeneBertConfig.from_tokenizer(tokenizer, size).attention_probs_dropout_prob == 0
    asked = GeneBertConfig.from_tokenizer(tokenizer, size, attention_probs_dropout_prob=0.2)
    assert asked.attention_probs_dropout_prob == 0.2


def make_model(tokenizer, model_class=GeneBertModel, *, n_training_cells=1000.0, seed=0, **fields):
    """Make a model whose statistics and zeros are random numbers, so that nothing cancels by chance."""
    torch.manual_seed(seed)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    fields = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "residual_init": "normal", **fields}
    model = model_class(GeneBertConfig.from_tokenizer(tokenizer, **{**sizes, **fields})).eval()
    randomise(model, n_training_cells)
    return model


@torch.no_grad()
def randomise(model, n_training_cells=1000.0) -> None:
    statistics = model.base_model.cell_embedding.statistics
    n_genes = statistics.shares.numel()
    shares = torch.distributions.Dirichlet(torch.full((n_genes,), 0.5)).sample() + 1e-5
    statistics.shares.copy_(shares / shares.sum())
    statistics.means[0].copy_(torch.rand(n_genes) * 3)
    statistics.means[1].copy_(torch.randn(n_genes) * 0.1)
    statistics.n_cells.fill_(n_training_cells)
    if hasattr(model, "wide_head"):
        model.wide_head.genes.weight.normal_()
        model.wide_head.bias.normal_()


def batch_of(tokenizer, counts, hidden=None, measured=None, form="padded", genes=None):
    """Make a batch of counts; hidden genes as a collator hides them, others left out as a file leaves them out."""
    if measured is not None:
        counts, genes = counts[:, measured], [tokenizer.genes[i] for i in np.flatnonzero(measured)]
    tokens = tokenizer.encode_cells(sparse.csr_array(counts), genes=genes)
    if hidden is not None:
        tokens = tokens._replace(cells=hide(tokens.cells, *np.nonzero(hidden), len(tokenizer.genes)))
    return FORMS[form](tokens, tokenizer)


def first_states(model, batch) -> np.ndarray:
    """What the encoder is given at `[CLS]`: (n_cells, hidden)."""
    with torch.no_grad():
        hidden = model.base_model(**batch, output_hidden_states=True).hidden_states[0]
    cuts = batch.get("cu_seq_lens_q")
    return (hidden[:, 0] if cuts is None else hidden[0, cuts[:-1].long()]).numpy()


def absences(case: str, n_cells: int, seed: int = 0) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Hidden genes (n, n_genes) and measured ones (n_genes,) of a case."""
    rng = np.random.default_rng(seed)
    hidden = rng.random((n_cells, N_GENES)) < 0.3
    hidden[:, 0] = False
    measured = rng.random(N_GENES) < 0.5
    measured[0] = True
    return hidden if "hidden" in case else None, measured if "panel" in case else None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n_training_cells", [4.0, 1000.0, float("inf")])
@pytest.mark.parametrize("never_seen", [False, True])
@pytest.mark.parametrize("case", ["all", "hidden", "panel", "panel, hidden"])
def test_equals_the_dense_formula(tokenizer, case, never_seen, n_training_cells, form):
    model = make_model(
        tokenizer, GeneBertForClassification, num_labels=3, wide_head=True, n_training_cells=n_training_cells
    )
    statistics = model.base_model.cell_embedding.statistics
    if never_seen:
        statistics.shares[1::4] = 0  # the others need not add up to 1 then
    counts = make_counts()
    hidden, measured = absences(case, len(counts))
    absent = np.zeros(counts.shape, bool)
    if hidden is not None:
        absent |= hidden
    if measured is not None:
        absent |= ~measured
    batch = batch_of(tokenizer, counts, hidden, measured, form)
    assert ("measured_genes" in batch) == (measured is not None)
    found, expected = first_states(model, batch), dense_views(model, counts, absent)
    np.testing.assert_allclose(np.sqrt(np.mean(expected.reshape(len(counts), 2, -1) ** 2, axis=2)), 1)
    assert np.abs(found - expected).max() < 1e-5
    if n_training_cells == 4:  # clipping does something
        statistics.n_cells.fill_(1e6)
        assert np.abs(first_states(model, batch) - expected).max() > 0.05
        statistics.n_cells.fill_(n_training_cells)
    names = ("cell_genes", "cell_counts", "cell_indptr", "measured_genes")
    with torch.no_grad():
        cells = model.base_model.read_cells(*(batch.get(name) for name in names))
        wide = model.wide_head(cells, statistics).numpy()
    expected = dense_wide_logits(model, counts, absent)
    assert np.abs(wide - expected).max() < 1e-5 * np.abs(expected).max()


def test_many_genes_and_counts_in_float32():
    """At the size of real cells, with embeddings as a model begins with."""
    rng = np.random.default_rng(0)
    genes = [f"g{i}" for i in range(5000)]
    tokenizer = GeneTokenizer(genes, whole_cell=True, max_length=16)
    model = make_model(tokenizer, hidden_size=32)
    rates = rng.gamma(0.3, 1, 5000)
    counts = rng.poisson(rates * np.array([[0.3], [2], [100], [3000]]))
    assert counts[3].sum() > 2**20
    found = first_states(model, batch_of(tokenizer, counts))
    assert np.abs(found - dense_views(model, counts, np.zeros(counts.shape, bool))).max() < 1e-5


def test_a_cell_without_counts_is_finite_and_a_cell_of_hidden_genes_is_like_it(tokenizer):
    model = make_model(tokenizer, GeneBertForPhenotypicMLM)
    counts = np.zeros((2, N_GENES), int)
    counts[1, 5] = 9
    hidden = np.zeros(counts.shape, bool)
    hidden[1, 5] = True
    for form in FORMS:
        states = first_states(model, batch_of(tokenizer, counts, hidden, form=form))
        assert np.isfinite(states).all()
        assert np.abs(states - dense_views(model, counts * ~hidden, hidden)).max() < 1e-5
    everything = np.ones(counts.shape, bool)
    states = first_states(model, batch_of(tokenizer, counts, everything))
    # All genes are absent: what rounding leaves of the sums, about 1e-8, is divided by 1e-6. Cells have about 1.
    assert np.abs(states).max() < 0.2


# ---------------------------------------------------------------------- the same cell, however it comes


@pytest.mark.parametrize("case", ["all", "hidden", "panel"])
def test_padded_packed_alone_and_in_any_order_are_the_same(tokenizer, case):
    model = make_model(tokenizer)
    counts = make_counts()
    hidden, measured = absences(case, len(counts))
    expected = first_states(model, batch_of(tokenizer, counts, hidden, measured))
    order = np.random.default_rng(0).permutation(len(counts))
    some = None if hidden is None else hidden[order]
    for form in FORMS:
        found = first_states(model, batch_of(tokenizer, counts[order], some, measured, form))
        np.testing.assert_allclose(found, expected[order], atol=1e-6)
        for i in range(len(counts)):
            own = None if hidden is None else hidden[i : i + 1]
            alone = first_states(model, batch_of(tokenizer, counts[i : i + 1], own, measured, form))
            np.testing.assert_allclose(alone[0], expected[i], atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_place_of_the_padding_changes_nothing(side):
    tokenizer = GeneTokenizer(GENES, whole_cell=True, max_length=20, padding_side=side)
    model = make_model(tokenizer)
    counts = make_counts()
    batch = batch_of(tokenizer, counts)
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states[0].numpy()
    first = batch["attention_mask"].argmax(1).numpy()
    assert (first.max() > 0) == (side == "left")
    expected = dense_views(model, counts, np.zeros(counts.shape, bool))
    assert np.abs(hidden[np.arange(len(counts)), first] - expected).max() < 1e-5


@given(data=st.data())
@settings(max_examples=10)
def test_columns_in_any_order_and_unknown_ones_change_no_bit(tokenizer, data):
    model = make_model(tokenizer)
    counts = make_counts(5)
    n_unknown = data.draw(st.integers(0, 5), label="unknown columns")
    order = np.array(data.draw(st.permutations(range(N_GENES + n_unknown)), label="order"))
    unknown = np.random.default_rng(n_unknown).poisson(1, (5, n_unknown))
    names = np.array([*GENES, *(f"unknown{i}" for i in range(n_unknown))])
    whole = batch_of(tokenizer, counts)
    other = batch_of(tokenizer, np.hstack([counts, unknown])[:, order], genes=names[order].tolist())
    assert whole.keys() == other.keys()
    for name, tensor in whole.items():
        assert torch.equal(other[name], tensor), name
    assert np.array_equal(first_states(model, other), first_states(model, whole))


@given(
    panel=st.sets(st.integers(0, N_GENES - 1), min_size=2).map(sorted),
    cuts=st.lists(st.integers(0, 12), max_size=4).map(sorted),
    form=st.sampled_from(sorted(FORMS)),
)
@settings(max_examples=15)
def test_a_panel_hides_what_it_does_not_measure_however_batches_are_cut(tokenizer, panel, cuts, form):
    model = make_model(tokenizer)
    counts = make_counts()
    measured = np.isin(np.arange(N_GENES), panel)
    tokenizer.min_coverage = 0.0
    cut = first_states(model, batch_of(tokenizer, counts, measured=measured, form=form))
    absent = np.tile(~measured, (len(counts), 1))
    expected = dense_views(model, counts, absent)
    # Few rare genes add up to little, and their share is what is left of 1: rounding counts for more there.
    share = float(model.cell_embedding.statistics.shares[panel].sum())
    np.testing.assert_allclose(cut, expected, atol=2e-5 + 2e-6 / share)
    hidden = first_states(model, batch_of(tokenizer, counts, hidden=absent, form=form))
    np.testing.assert_allclose(hidden, expected, atol=2e-5 + 2e-5 / share)
    parts = [
        first_states(model, batch_of(tokenizer, counts[a:b], measured=measured, form=form))
        for a, b in zip([0, *cuts], [*cuts, len(counts)], strict=True)
        if b > a
    ]
    np.testing.assert_allclose(np.concatenate(parts), cut, atol=2e-5)


def test_cells_of_files_that_measure_other_genes_in_one_batch(tokenizer):
    """`measured_genes` has a row per cell."""
    model = make_model(tokenizer)
    counts = make_counts()
    measured = np.random.default_rng(1).random(counts.shape) < 0.7
    measured[:, 0] = True
    for form in FORMS:
        batch = batch_of(tokenizer, counts * measured, form=form)
        batch["measured_genes"] = torch.from_numpy(measured)
        assert np.abs(first_states(model, batch) - dense_views(model, counts, ~measured)).max() < 1e-5
        batch["measured_genes"] = torch.from_numpy(measured[:1])  # one row for all cells
        batch.update(batch_of(tokenizer, counts * measured[:1], form=form))
        absent = np.tile(~measured[:1], (len(counts), 1))
        assert np.abs(first_states(model, batch) - dense_views(model, counts, absent)).max() < 1e-5


# ---------------------------------------------------------------------- masked genes


def distinct_counts(n_cells: int = 30, seed: int = 0) -> np.ndarray:
    """Counts that are multiples of 10, and differ within a cell: adding up to 9 changes no rank."""
    rng = np.random.default_rng(seed)
    counts = np.stack([rng.permutation(N_GENES) for _ in range(n_cells)]) * 10
    counts[rng.random(counts.shape) < 0.4] = 0
    counts[:, 0] = 1000  # so that no cell is without counts
    return counts


def store_of(counts: np.ndarray, path) -> CellStore:
    adata = make_adata(len(counts), N_GENES)
    adata.X = sparse.csr_matrix(counts.astype(np.float32))
    return CellStore.build(path, adata, obs=["cell_type"])


def shown_genes(batch, tokenizer) -> list[set[int]]:
    """Genes of each cell that stand among its tokens with their count or rank, and are not labelled."""
    ids, types = batch["input_ids"].numpy(), batch["token_type_ids"].numpy()
    shown = tokenizer.get_gene_tokens_mask(ids) & (batch["labels"].numpy() == -100)
    genes = tokenizer.genes_of(ids, types)
    if "cu_seq_lens_q" in batch:
        cuts = batch["cu_seq_lens_q"].tolist()
        parts = [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
        return [set(genes[0, part][shown[0, part]].tolist()) for part in parts]
    return [set(row[of].tolist()) for row, of in zip(genes, shown, strict=True)]


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("gene_dropout", [0.0, 0.3])
@pytest.mark.parametrize("scheme", ["binned", "rank"])
def test_other_counts_of_what_the_tokens_do_not_show_change_no_bit(tmp_path, scheme, gene_dropout, packing):
    phenotypes = {"cell_type": ["B cell", "T cell"]}
    if scheme == "binned":  # counts that differ by less than 10 have one bin
        tokenizer = GeneTokenizer(GENES, bin_edges=[5, 109.5, 209.5], whole_cell=True, phenotypes=phenotypes)
        collator_class = DataCollatorForPhenotypicMLM
    else:
        medians = np.ones(N_GENES)
        tokenizer = GeneTokenizer(GENES, scheme="rank", medians=medians, whole_cell=True, phenotypes=phenotypes)
        collator_class = DataCollatorForGeneRankMLM
    model = make_model(tokenizer, GeneBertForPhenotypicMLM, sparse_prediction=False)
    collator = of_epoch(collator_class(tokenizer, mlm_probability=0.4, gene_dropout=gene_dropout, packing=packing))
    counts = distinct_counts()
    cells = store_of(counts, tmp_path / "store").__getitems__(range(len(counts)))
    batch = collator(cells)
    other, n_changed = counts.copy(), 0
    for cell, shown in enumerate(shown_genes(batch, tokenizer)):
        gone = np.array([g for g in np.flatnonzero(counts[cell]) if g not in shown])
        other[cell, gone] += 1 + gone % 9
        n_changed += len(gone)
    assert n_changed > 100
    changed = collator(store_of(other, tmp_path / "other").__getitems__(range(len(counts))))
    assert batch.keys() == changed.keys()
    for name in batch:
        assert torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(changed[name])), name
    with torch.no_grad():
        one, two = model(**batch), model(**changed)
    assert torch.equal(one.loss, two.loss)
    assert torch.equal(one.logits, two.logits)
    # The test sees something: a gene that is shown counts.
    other = counts.copy()
    other[:, list(set.intersection(*shown_genes(batch, tokenizer)) or {0})] += 5
    changed = collator(store_of(other, tmp_path / "shown").__getitems__(range(len(counts))))
    with torch.no_grad():
        assert not torch.equal(model(**changed).logits, one.logits)


@pytest.mark.parametrize("from_examples", [False, True])
def test_a_masked_gene_is_hidden_whether_it_is_expressed_or_not(tmp_path, from_examples):
    """Genes that are swapped in, labelled bin_0, and those that they stand in for."""
    tokenizer = GeneTokenizer(GENES, bin_edges=[5, 105], whole_cell=True, max_length=60)
    counts = distinct_counts(50)
    cells = store_of(counts, tmp_path / "store").__getitems__(range(len(counts)))
    if from_examples:
        found = tokenizer(cells)
        names = ("input_ids", "token_type_ids", "cell_genes", "cell_counts")
        cells = [{**{name: found[name][i] for name in names}, "cell_id": i} for i in range(len(counts))]
    batch = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.4)(cells)
    n_swapped = 0
    for cell, shown in enumerate(shown_genes(batch, tokenizer)):
        labels = batch["labels"][cell]
        asked = batch["token_type_ids"][cell][labels != -100] - tokenizer.gene_token_type_offset
        genes, values = batch["cell_genes"][cell], batch["cell_counts"][cell]
        of = dict(zip(genes[values != 0].tolist(), values[values != 0].tolist(), strict=True))
        assert all(of[g] == HIDDEN for g in asked.tolist())
        assert {g for g, value in of.items() if value > 0} == shown
        swapped = asked[labels[labels != -100] == tokenizer.first_bin_id].tolist()
        assert not counts[cell, swapped].any()
        n_swapped += len(swapped)
    assert n_swapped > 100


def test_the_total_tells_of_masked_genes_no_more_than_the_genes_that_are_shown(tmp_path):
    """What [CLS] is scaled by is no way around the mask.

    A reader of the cell's depth, as the model has it, beside the total of the genes that are shown; fitted on half of
    the cells, and read on the other. A reader of the total of all counts gains, so that the test would see a leak.
    """
    rng = np.random.default_rng(0)
    n_cells, genes = 1500, [f"g{i}" for i in range(6)]
    tokenizer = GeneTokenizer(genes, bin_edges=[0.5, 4.5, 9.5], whole_cell=True)
    counts = rng.poisson(rng.gamma(3, 1, (n_cells, 1)) * np.array([1.0, 2, 2, 3, 3, 4]))
    adata = make_adata(n_cells, 6)
    adata.X = sparse.csr_matrix(counts.astype(np.float32))
    adata.var_names = genes
    store = CellStore.build(tmp_path / "store", adata)
    collate = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.3)
    batch = collate(store.__getitems__(range(n_cells)))
    model = make_model(tokenizer)
    shares = counts.sum(0) / counts.sum()
    model.cell_embedding.statistics.shares.copy_(torch.from_numpy(shares))
    cells = model.read_cells(batch["cell_genes"], batch["cell_counts"])
    depth = cells.depth.numpy()
    cell, position = np.nonzero(batch["labels"].numpy() != -100)
    gene = (batch["token_type_ids"].numpy() - tokenizer.gene_token_type_offset)[cell, position]
    labels = batch["labels"].numpy()[cell, position]
    values = batch["cell_counts"].numpy().clip(min=0)
    shown = values.sum(1)
    hidden_shares = np.zeros(n_cells)
    np.add.at(hidden_shares, cell, shares[gene])
    one_hot = np.eye(6)[gene]

    def nats(*totals: np.ndarray) -> float:
        logs = [np.log1p(total)[cell] for total in totals]
        features = np.column_stack([one_hot, *(x[:, None] * one_hot for x in logs), *(x[:, None] ** 2 for x in logs)])
        train = cell % 2 == 0
        reader = LogisticRegression(C=10, max_iter=2000).fit(features[train], labels[train])
        probabilities = reader.predict_proba(features[~train])
        at = np.searchsorted(reader.classes_, labels[~train])
        return -np.log(probabilities[np.arange(len(at)), at]).mean()

    visible = nats(shown, hidden_shares)
    assert visible - nats(shown, hidden_shares, depth) < 0.01
    assert visible - nats(shown, hidden_shares, counts.sum(1).astype(float)) > 0.05


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("packing", [False, True])
def test_after_steps_of_an_optimizer_the_formula_is_that_of_the_weights_as_they_are(tmp_path, tokenizer, packing):
    """No table of the embeddings is kept; the statistics of the genes are not trained."""
    counts = make_counts(24)
    store = store_of(counts, tmp_path / "store")
    model = make_model(tokenizer, GeneBertForClassification, num_labels=2, wide_head=True).train()
    collate = DataCollatorForCellClassification(tokenizer, "cell_type", packing=packing)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    absent = np.zeros(counts.shape, bool)
    old = dense_views(model, counts, absent)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(**collate(store.__getitems__(range(24)))).loss.backward()
        optimizer.step()
    model.eval()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".statistics." in name), name
    expected = dense_views(model, counts, absent)
    assert np.abs(expected - old).max() > 0.01
    assert np.abs(first_states(model, batch_of(tokenizer, counts)) - expected).max() < 1e-5
    copy = GeneBertForClassification.from_pretrained(save(model, tmp_path / "model"))
    assert np.array_equal(
        first_states(copy, batch_of(tokenizer, counts)), first_states(model, batch_of(tokenizer, counts))
    )


def save(model, path):
    model.save_pretrained(path)
    return path


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_dense_formula(tokenizer, form):
    """Of genes that are not expressed too: they count with a value of 0."""
    model = make_model(tokenizer, GeneBertForClassification, num_labels=2, wide_head=True)
    counts = make_counts()
    hidden, measured = absences("panel, hidden", len(counts))
    batch = batch_of(tokenizer, counts, hidden, measured, form)
    names = ("cell_genes", "cell_counts", "cell_indptr", "measured_genes")
    embedding = model.gene_bert.cell_embedding
    cells = model.gene_bert.read_cells(*(batch.get(name) for name in names))
    torch.manual_seed(0)
    sums, wide = embedding.view_sums(cells), model.wide_head(cells, embedding.statistics)
    of_sums, of_wide = torch.randn_like(sums), torch.randn_like(wide)
    ((sums * of_sums).sum() + (wide * of_wide).sum()).backward()

    # Both are linear in the weights: the gradient of a row is the sum of what its gene adds, value by value.
    absent = hidden | ~measured
    shares, means = (x.double().numpy() for x in (embedding.statistics.shares, embedding.statistics.means))
    bound = float(embedding.statistics.n_cells) ** 0.5
    gradient, of_genes = np.zeros((N_GENES, 2, 8)), np.zeros((N_GENES, 2))
    for i, x in enumerate(counts.astype(float)):
        present = ~absent[i]
        depth = x[present].sum() / shares[present].sum() if x[present].sum() else 1.0
        mu = depth * shares
        logs = (np.log1p(1e4 * x / depth) - means[0]) * present
        residuals = (((x - mu) / np.sqrt(mu + mu**2 / 100)).clip(-bound, bound) - means[1]) * present
        gradient += np.stack([logs, residuals], 1)[..., None] * of_sums[i].numpy()
        of_genes += logs[:, None] * of_wide[i].numpy()
    found = embedding.genes.weight.grad.view(N_GENES, 2, 8).numpy()
    assert np.abs(found - gradient).max() < 1e-5 * np.abs(gradient).max()
    assert np.abs(model.wide_head.genes.weight.grad.numpy() - of_genes).max() < 1e-5 * np.abs(of_genes).max()


def test_what_does_not_fit_raises(tokenizer):
    model = make_model(tokenizer)
    batch = batch_of(tokenizer, make_counts())
    tokens = {name: batch[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    with pytest.raises(ValueError, match="needs cell_genes and cell_counts: tokenize with whole_cell=True"):
        model(**tokens)
    without = GeneBertModel(GeneBertConfig.from_tokenizer(tokenizer, "tiny", cell_embedding=False))
    with pytest.raises(ValueError, match="does not read whole cells"):
        without(**batch)
    with pytest.raises(ValueError, match="needs num_genes and an even hidden_size, got 0"):
        GeneBertConfig(cell_embedding=True)
    with pytest.raises(ValueError, match="wide_head reads the whole cell"):
        GeneBertConfig(wide_head=True)
