"""Two views of each cell: equal to a plain implementation, without a shared count, and blind to what they hide."""

import numpy as np
import pytest
import torch
from conftest import make_adata
from scipy import stats
from torch.utils.data import DataLoader

from stformer_hf import (
    CellStore,
    DataCollatorForPhenotypicMLM,
    GeneBertConfig,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
)
from stformer_hf.models.gene_bert.randomness import uniforms
from stformer_hf.training.objectives.views import ViewCollator, first_panel, sources_of
from stformer_hf.training.starts.spectral_start import initialise_from_store


@pytest.fixture
def whole_cells(store) -> GeneTokenizer:
    return GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5, 3.5], whole_cell=True, max_length=12)


def make_collator(tokenizer, view, mlm_probability=0.0, epoch=0, packing=False, **settings) -> ViewCollator:
    inner = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=mlm_probability, seed=5, packing=packing)
    collator = ViewCollator(inner, view, **settings)
    collator.set_epoch(epoch)
    return collator


def dense(batch, n_genes) -> np.ndarray:
    """Counts of the rows of a padded or packed batch."""
    genes, counts = batch["cell_genes"].numpy(), batch["cell_counts"].numpy()
    if "cell_indptr" in batch:
        cuts = batch["cell_indptr"].tolist()
        pairs = [(genes[0, a:b], counts[0, a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    else:
        pairs = list(zip(genes, counts, strict=True))
    rows = np.zeros((len(pairs), n_genes))
    for row, (of, values) in zip(rows, pairs, strict=True):
        np.add.at(row, of, values)
    return rows


def plain_views(counts, ids, view, seed, epoch):
    """Both views of dense counts (n, n_genes), an entry at a time."""
    first = np.zeros_like(counts)
    for row, cell in enumerate(ids):
        for gene in range(counts.shape[1]):
            if view == "disjoint":
                chosen = uniforms(seed, epoch, 9, np.array([0]), np.array([gene]))[0] < 0.5
                first[row, gene] = counts[row, gene] * chosen
            elif counts[row, gene]:
                u = uniforms(seed, epoch, 10, np.array([cell]), np.array([gene]))[0]
                first[row, gene] = stats.binom.ppf(u, counts[row, gene], 0.5)
    return first, counts - first


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("view", ["disjoint", "thinning"])
def test_views_are_those_of_a_plain_implementation(store, adata, whole_cells, view, packing):
    rows = np.array([7, 0, 21, 3, 40])  # cell 3 has no counts
    batch = make_collator(whole_cells, view, epoch=2, packing=packing)(store.__getitems__(rows))
    counts = adata.X[rows].toarray()
    expected = np.concatenate(plain_views(counts, rows, view, 5, 2))
    np.testing.assert_array_equal(dense(batch, 40), expected)
    np.testing.assert_array_equal(batch["view_totals"].numpy(), expected.sum(1))
    assert (expected[:5] + expected[5:] == counts).all() and (expected.sum(1) > 0).sum() == 8


def test_disjoint_views_share_no_gene_and_measure_their_own(store, whole_cells):
    batch = make_collator(whole_cells, "disjoint")(store.__getitems__(np.arange(20)))
    measured, counts = batch["measured_genes"].numpy(), dense(batch, 40)
    first = first_panel(5, 0, 40)
    assert 8 < first.sum() < 32
    assert (measured[:20] == first).all() and (measured[20:] == ~first).all()
    assert not ((counts[:20] > 0) & (counts[20:] > 0)).any()
    assert not counts[~measured].any()
    shown = batch["token_type_ids"].numpy() - whole_cells.gene_token_type_offset
    for row, of in enumerate(shown):
        assert measured[row, of[of >= 0]].all()


def test_swapped_in_genes_are_of_the_view(store, whole_cells):
    batch = make_collator(whole_cells, "disjoint", mlm_probability=1.0)(store.__getitems__(np.arange(60)))
    swapped = batch["labels"].numpy() == whole_cells.first_bin_id
    assert swapped.sum() > 20
    genes = batch["token_type_ids"].numpy() - whole_cells.gene_token_type_offset
    rows = np.nonzero(swapped)[0]
    assert batch["measured_genes"].numpy()[rows, genes[swapped]].all()


@pytest.mark.parametrize("view", ["disjoint", "thinning"])
def test_views_depend_on_seed_epoch_and_cell_and_on_nothing_else(store, whole_cells, view):
    def views(rows, epoch=0):
        return dense(make_collator(whole_cells, view, epoch=epoch)(store.__getitems__(np.array(rows))), 40)

    both, alone = views([4, 9]), views([9])
    np.testing.assert_array_equal(both[[1, 3]], alone)
    assert (views([4, 9], epoch=1) != both).any()
    collator = make_collator(whole_cells, view, epoch=3)
    np.testing.assert_array_equal(dense(collator.for_evaluation()(store.__getitems__(np.array([4, 9]))), 40), both)


@pytest.mark.parametrize("view", ["disjoint", "thinning"])
def test_without_an_epoch_each_batch_has_other_views(store, whole_cells, view):
    collator = make_collator(whole_cells, view, epoch=-1)
    one, two = (dense(collator(store.__getitems__(np.arange(60))), 40) for _ in range(2))
    for views in (one, two):
        np.testing.assert_array_equal(views[:60] + views[60:], store.rows(range(60)).toarray())
    assert (one != two).any()


def test_masks_of_the_two_views_are_independent(store, whole_cells):
    batch = make_collator(whole_cells, "thinning", mlm_probability=0.5)(store.__getitems__(np.arange(60)))
    hidden = dense(batch, 40) == -1
    first, second = hidden[:60], hidden[60:]
    shown = (dense(make_collator(whole_cells, "thinning")(store.__getitems__(np.arange(60))), 40) > 0).reshape(
        2, 60, 40
    )
    both = shown.all(0)
    assert 0.3 < (first == second)[both].mean() < 0.7


@pytest.mark.parametrize("view", ["disjoint", "thinning"])
def test_batches_are_the_same_on_workers(store, whole_cells, view):
    def batches(n_workers):
        collator = make_collator(whole_cells, view, mlm_probability=0.3, epoch=1)
        return list(DataLoader(store, batch_size=16, collate_fn=collator, num_workers=n_workers))

    for mine, theirs in zip(batches(0), batches(2), strict=True):
        assert mine.keys() == theirs.keys()
        for name, values in mine.items():
            assert torch.equal(values, theirs[name]), name


def test_counts_outside_a_view_change_nothing_in_it(tmp_path):
    """Of the first view, when the counts of the genes of the second are others."""
    adata = make_adata(30, 40)
    store = CellStore.build(tmp_path / "store", adata)
    panel = first_panel(5, 0, 40)
    other = adata.copy()
    changed = other.X.toarray()
    changed[:, ~panel] = np.random.default_rng(1).poisson(3, (30, int((~panel).sum())))
    other.X = type(adata.X)(changed)
    others = CellStore.build(tmp_path / "others", other)
    tokenizer = GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5, 3.5], whole_cell=True)
    torch.manual_seed(0)
    model = GeneBertForPhenotypicMLM(
        GeneBertConfig.from_tokenizer(tokenizer, size="tiny", residual_init="normal", cell_decoder=True)
    ).eval()
    initialise_from_store(model, tokenizer, store, n_components=5)
    collator = make_collator(tokenizer, "disjoint", mlm_probability=0.3)
    rows = np.array([0, 1, 2, 5])
    batches = [collator(of.__getitems__(rows)) for of in (store, others)]
    assert not torch.equal(batches[0]["cell_counts"], batches[1]["cell_counts"])
    own = ("input_ids", "token_type_ids", "attention_mask", "cell_genes", "cell_counts", "measured_genes")

    def states(batch):
        tokens = batch["attention_mask"][:4].sum(1).max()
        entries = (batch["cell_counts"][:4] != 0).sum(1).max()
        short = {name: batch[name][:4, : entries if name.startswith("cell") else tokens] for name in own[:5]}
        with torch.no_grad():
            return model.gene_bert(**short, measured_genes=batch["measured_genes"][:4]).last_hidden_state

    assert torch.equal(*map(states, batches))


def test_twins_and_sources(tmp_path):
    adata = make_adata(20, 40)
    doubled = adata.X.toarray()
    doubled[11] = doubled[2]
    adata.X = type(adata.X)(doubled)
    store = CellStore.build(tmp_path / "store", [adata[:12], adata[12:]], obs=["cell_type"])
    tokenizer = GeneTokenizer.from_store(store, whole_cell=True)
    rows = np.array([2, 15, 11, 0])
    batch = make_collator(tokenizer, "thinning")(store.__getitems__(rows))
    twins = batch["twins"].tolist()
    assert twins[0] == twins[2] and len(set(twins)) == 3
    assert batch["sources"].tolist() == [0, 1, 0, 0]
    assert sources_of(store.select(rows), None).tolist() == [0, 1, 0, 0]
    by_type = make_collator(tokenizer, "thinning", batch_key="cell_type")(store.__getitems__(rows))
    codes = adata.obs["cell_type"].cat.codes.to_numpy()[rows]
    assert by_type["sources"].tolist() == codes.tolist() == sources_of(store.select(rows), "cell_type").tolist()
    with pytest.raises(ValueError, match="'donor' is not a categorical obs column of the store; those are cell_type"):
        sources_of(store, "donor")


def test_what_cannot_be_divided_is_refused(store, whole_cells, tokenizer):
    with pytest.raises(ValueError, match="'disjoint' or 'thinning', got 'halves'"):
        make_collator(whole_cells, "halves")
    with pytest.raises(ValueError, match="whole_cell=True"):
        make_collator(tokenizer, "disjoint")
    with pytest.raises(ValueError, match="CellStore"):
        make_collator(whole_cells, "disjoint")([{"input_ids": [0, 1], "token_type_ids": [0, 0]}])


def test_files_whose_rows_are_shuffled_are_not_taken_for_sources(tmp_path):
    """Also after a store is joined of shuffled ones."""
    cells = [make_adata(30, seed=0), make_adata(30, seed=1)]
    mixed = CellStore.build(tmp_path / "mixed", cells, obs=["cell_type"], shuffle=True, report=False)
    plain = CellStore.build(tmp_path / "plain", cells, obs=["cell_type"], report=False, allow_duplicates=True)
    joined = CellStore.join(tmp_path / "joined", [mixed.path, plain.path])
    for store in (mixed, joined):
        with pytest.raises(ValueError, match="rows of the store were shuffled .* pass batch_key"):
            sources_of(store, None)
        assert set(sources_of(store, "cell_type")) == {0, 1}
    alone = CellStore.build(tmp_path / "alone", cells[:1], shuffle=True, report=False)
    assert not sources_of(alone, None).any()
