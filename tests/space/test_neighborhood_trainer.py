"""NeighborhoodTrainer on neighbourhoods of cells, and what its figures are compared with."""

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from conftest import make_adata
from scipy import sparse, stats
from transformers import Trainer, TrainingArguments

from stformer_hf import (
    CellNeighborhoodConfig,
    CellNeighborhoodForMaskedCell,
    CenterMaskSampler,
    GeneBertConfig,
    GeneBertModel,
    GeneTokenizer,
    NeighborhoodTrainer,
    collate_neighborhoods,
)
from stformer_hf.space.neighborhood_baselines import (
    BASELINES,
    CountBaseline,
    MaskedCells,
    _read,
    gene_moments,
    neighborhood_baselines,
)

N_TYPES, N_GENES = 3, 12


def section(n_cells: int = 40, seed: int = 0) -> AnnData:
    """Cells of three types whose first gene is the mean of that of their neighbours."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(2, (n_cells, N_GENES))
    obs = pd.DataFrame({"type": pd.Categorical(rng.integers(0, N_TYPES, n_cells).astype(str))})
    adata = AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs.set_axis([f"c{i}" for i in range(n_cells)]))
    adata.obsm["spatial"] = rng.random((n_cells, 2))
    return adata


def sampler(adata: AnnData | None = None, **options) -> CenterMaskSampler:
    options = {"patch_size": 0.3, "cell_type_key": "type", **options}
    return CenterMaskSampler.from_anndata(section() if adata is None else adata, **options)


def make_model(**fields) -> CellNeighborhoodForMaskedCell:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "initializer_range": 0.2}
    return CellNeighborhoodForMaskedCell(
        CellNeighborhoodConfig(
            **{
                "n_genes": N_GENES,
                "n_cell_types": N_TYPES,
                "encoder_layers": 1,
                "decoder_layers": 1,
                **sizes,
                **fields,
            }
        )
    )


def make_trainer(folder, train, *, model=None, **settings) -> NeighborhoodTrainer:
    own = {name: settings.pop(name) for name in ("eval_dataset", "baselines") if name in settings}
    settings = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2, **settings}
    arguments = TrainingArguments(
        str(folder), logging_steps=1, report_to="none", disable_tqdm=True, use_cpu=True, **settings
    )
    return NeighborhoodTrainer(arguments, train, model=model or make_model(), **own)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_ddp_does_not_search_for_unused_parameters(tmp_path):
    """There are none: test_every_parameter_gets_a_gradient of the model."""
    assert make_trainer(tmp_path, sampler()).accelerator.ddp_handler.find_unused_parameters is False


def test_a_model_needs_no_configuration(tmp_path):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make_model()

        def forward(self, **inputs):
            return self.inner(**inputs)

    trainer = make_trainer(tmp_path, sampler(), model=Wrapped(), max_steps=1, save_strategy="no")
    trainer.train()
    assert np.isfinite(losses(trainer)).all()


def test_evaluation_is_the_mean_over_cells_whatever_the_batches(tmp_path):
    # The first batches are crowded, the last cells alone.
    adata = section(19)
    adata.obsm["spatial"][10:] = 10 * np.arange(9)[:, None] + 5
    adata.X[4] = 0  # of which there is no r
    data = sampler(adata)
    model = make_model()
    trainer = make_trainer(tmp_path, None, model=model, eval_dataset=data, per_device_eval_batch_size=4)
    found = trainer.evaluate()
    nll, r = [], []
    with torch.no_grad():
        for item in data:
            outputs = model.eval()(**collate_neighborhoods([item]))
            nll.append(outputs.loss.item())
            pair = (outputs.expected_counts[0].numpy(), item.masked_expression[0])
            if pair[1].any():
                r.append(np.corrcoef(*map(np.log1p, pair))[0, 1])
    assert found["eval_loss"] == pytest.approx(np.mean(nll), abs=1e-5)
    assert found["eval_pearson_r"] == pytest.approx(np.mean(r), abs=1e-5)
    assert {name for name in found if "mean" in name} == set()


def test_accumulated_batches_weigh_every_cell_alike(tmp_path):
    settings = {"num_train_epochs": 1, "learning_rate": 0.1, "optim": "sgd"}
    whole = make_trainer(tmp_path / "a", sampler(section(13)), per_device_train_batch_size=16, **settings)
    parts = make_trainer(
        tmp_path / "b",
        sampler(section(13)),
        per_device_train_batch_size=4,  # of 4, 4, 4 and 1 cells
        gradient_accumulation_steps=4,
        **settings,
    )
    whole.train(), parts.train()
    np.testing.assert_allclose(losses(parts), losses(whole), atol=1e-5)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("n_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_resumed_run_sees_the_same_neighbours(tmp_path, n_workers):
    options = {"max_num_cells": 2, "patch_size": 0.6}
    whole = make_trainer(tmp_path / "whole", sampler(**options), save_strategy="no", num_train_epochs=3)
    whole.train()
    settings = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3}
    for stop in (3, 10):
        cut = make_trainer(tmp_path / str(stop), sampler(**options), **settings)
        cut.add_callback(stop_after(stop))
        cut.train()
        assert cut.state.global_step == stop
        again = make_trainer(
            tmp_path / str(stop), sampler(**options), dataloader_num_workers=n_workers, model=make_model(), **settings
        )
        again.train(resume_from_checkpoint=True)
        assert losses(again) == losses(whole)


def test_counts_stay_whole_where_all_else_is_in_half_precision(tmp_path, monkeypatch):
    """DeepSpeed has Trainer cast every float; 257 and 1,001 are none in bfloat16."""
    adata = section()
    counts = adata.X.toarray()
    counts[:, 0], counts[:, 1] = 257, 1001
    adata.X = sparse.csr_matrix(counts)
    prepare, seen = Trainer._prepare_input, []

    def in_half(self, data):
        data = prepare(self, data)
        return data.bfloat16() if isinstance(data, torch.Tensor) and data.is_floating_point() else data

    monkeypatch.setattr(Trainer, "_prepare_input", in_half)
    model = make_model()
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: (seen.append(inputs), forward(**inputs))[1])
    make_trainer(tmp_path, sampler(adata), model=model, max_steps=1, save_strategy="no").train()
    values, genes = seen[0]["observed_values"].double(), seen[0]["observed_genes"]  # 257 would be compared in bfloat16
    assert (values[genes == 0] == 257).all() and (values[genes == 1] == 1001).all() and len(values)
    assert (seen[0]["masked_expression"][:, :2].double() == torch.tensor([257, 1001])).all()


@pytest.mark.parametrize("n_workers", [0, 1])
def test_sparse_expression_trains_as_dense_expression_does(tmp_path, n_workers):
    adata, found = section(), []
    for name, matrix in (("sparse", adata.X), ("dense", adata.X.toarray())):
        adata.X = matrix
        trainer = make_trainer(
            tmp_path / name,
            sampler(adata),
            eval_dataset=sampler(adata),
            dataloader_num_workers=n_workers,
            save_strategy="no",
            include_num_input_tokens_seen="all",
        )
        trainer.train()
        found.append((losses(trainer), trainer.evaluate(), trainer.state.num_input_tokens_seen))
    (one, scores, n_cells), (other, other_scores, _) = found
    np.testing.assert_allclose(one, other, rtol=1e-4)
    assert scores["eval_pearson_r"] == pytest.approx(other_scores["eval_pearson_r"], abs=1e-4)
    assert n_cells == 2 * (sampler(adata).lengths - 1).sum()


@pytest.mark.parametrize("name", ["dispatch_batches", "split_batches"])
def test_what_would_cut_a_batch_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} would split a packed batch"):
        make_trainer(tmp_path, sampler(), accelerator_config={name: True})


def stop_after(step: int):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= step

    return Stop()


@pytest.mark.parametrize("n_workers", [0, 1])
def test_subsets_are_drawn_anew_each_epoch(tmp_path, n_workers):
    data = sampler(max_num_cells=1, patch_size=0.6)
    trainer = make_trainer(
        tmp_path,
        data,
        num_train_epochs=3,
        learning_rate=0.0,
        per_device_train_batch_size=40,
        save_strategy="no",
        dataloader_num_workers=n_workers,
        dataloader_persistent_workers=n_workers > 0,
    )
    trainer.train()
    expected = []
    for epoch in range(3):
        data.set_epoch(epoch)
        with torch.no_grad():
            expected.append(trainer.model.eval()(**collate_neighborhoods(list(data))).loss.item())
    assert len(set(expected)) == 3
    np.testing.assert_allclose(losses(trainer), expected, atol=1e-5)


@pytest.mark.slow
def test_it_learns_from_neighbours_what_types_do_not_tell(tmp_path):
    rng = np.random.default_rng(0)
    adata = section(400)
    places = adata.obsm["spatial"]
    counts = rng.poisson(1 + 19 * (places[:, :1] < 0.5), (400, N_GENES))  # one half of the section expresses more
    adata.X = sparse.csr_matrix(counts.astype(np.float32))
    held_out = places[:, 1] > 0.8
    train = sampler(adata, indices=~held_out, neighbors_from="indices", patch_size=0.2)
    test = sampler(adata, indices=held_out, patch_size=0.2)
    trainer = make_trainer(
        tmp_path, train, eval_dataset=test, baselines=True, num_train_epochs=8, save_strategy="no", learning_rate=3e-3
    )
    trainer.train()
    found = trainer.evaluate()
    assert found["eval_neighbor_mean_nll"] < found["eval_type_mean_nll"] - 0.2
    assert found["eval_loss"] < found["eval_type_mean_nll"] - 0.2
    again = trainer.evaluate()
    assert again["eval_type_mean_nll"] == found["eval_type_mean_nll"]


def test_batches_by_budget_and_by_length(tmp_path):
    data = sampler(max_num_cells=5)
    sizes = [1 + item.num_cells_obs for item in data]
    assert data.lengths.tolist() == sizes and len(set(sizes)) > 2
    trainer = make_trainer(tmp_path, data, train_sampling_strategy="group_by_length")
    grouped = np.asarray(sizes)[list(trainer.get_train_sampler())]
    assert grouped[0] == max(sizes) and (np.diff(grouped.reshape(5, 8)) <= 0).all()
    arguments = trainer.args
    arguments.train_sampling_strategy = "random"
    trainer = NeighborhoodTrainer(arguments, data, model=make_model(), max_tokens_per_batch=20)
    batches = list(trainer.get_train_sampler())
    assert sorted(sum(batches, [])) == list(range(40))
    filled = [sum(sizes[cell] for cell in batch) for batch in batches]
    assert max(filled) <= 20 and np.median(filled) > 14
    padded = [max(sizes[cell] for cell in batch) * len(batch) for batch in batches]
    assert max(padded) > 20  # the budget is of a packed batch
    trainer.train()
    assert trainer.state.global_step == 2 * len(batches)


@pytest.mark.parametrize("n_workers", [0, 1])
def test_embeddings_of_cells_come_with_their_batches(tmp_path, n_workers):
    adata = section()
    adata.obsm["X_stformer"] = np.random.default_rng(1).normal(size=(40, 5)).astype(np.float32)
    data = sampler(adata, cell_embedding_key="X_stformer", max_num_cells=4)
    for items in ([3], [5, 0, 5, 39]):
        batch = collate_neighborhoods(data.__getitems__(items), packed=True)
        np.testing.assert_array_equal(batch["cell_embeds"], adata.obsm["X_stformer"][data.neighbors(items)[1]])
    model = make_model(cell_embedding_size=5, use_expression=False)
    before = model.cell_neighborhood.tokens.cell_embedding.weight.detach().clone()
    make_trainer(tmp_path, data, model=model, save_strategy="no", dataloader_num_workers=n_workers).train()
    assert (model.cell_neighborhood.tokens.cell_embedding.weight != before).any()
    for wrong, message in (
        (np.zeros((39, 5)), "39, 5.*40 rows"),
        (np.full((40, 5), np.nan), "40 of 40 cells have NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            CenterMaskSampler(metadata_of(adata), adata, 0.3, tissue_section_colname=None, cell_embeds=wrong)


def metadata_of(adata: AnnData) -> pd.DataFrame:
    places = pd.DataFrame(adata.obsm["spatial"], columns=["x", "y"])
    return places.assign(cell_label=adata.obs_names, cell_type=adata.obs["type"].cat.codes.to_numpy())


def test_a_gene_bert_that_embeds_the_cells_learns_too():
    """Not frozen: the embeddings come with the graph that made them."""
    adata = make_adata()
    adata.obsm["spatial"] = np.random.default_rng(0).random((60, 2))
    tokenizer = GeneTokenizer(adata.var_names, bin_edges=[0.5, 1.5])
    config = GeneBertConfig.from_tokenizer(
        tokenizer, num_hidden_layers=1, num_attention_heads=2, hidden_size=16, intermediate_size=32
    )
    cells = GeneBertModel(config)
    data = sampler(adata, cell_type_key=None)
    items = [1, 2, 5]
    batch = collate_neighborhoods(data.__getitems__(items), packed=True)
    tokens = tokenizer(adata[data.neighbors(items)[1]], padding=True, return_tensors="pt")
    model = make_model(n_genes=40, n_cell_types=1, cell_embedding_size=16)
    model(**batch, cell_embeds=cells(**tokens).last_hidden_state[:, 0]).loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in cells.layers[0].attention.parameters())


# ---------------------------------------------------------------------- baselines


def plain_nll(counts, mean, dispersion) -> float:
    """Of numpy arrays (n, G), (n, G), (G,)."""
    return -stats.nbinom.logpmf(counts, dispersion, dispersion / (dispersion + mean)).mean()


def test_baselines_are_those_of_a_plain_count():
    adata = section(60, seed=3)
    is_train = np.arange(60) < 40
    adata.obs["type"] = adata.obs["type"].astype(str)
    adata.obs.loc[adata.obs_names[50:53], "type"] = "9"  # a type that training cells do not have
    train = sampler(adata, indices=is_train, neighbors_from="indices")
    test = sampler(adata, indices=~is_train)
    found = neighborhood_baselines(train, test)
    cells = _read(train, np.arange(40), "training cells")

    counts, places = adata.X.toarray().astype(float), adata.obsm["spatial"]
    types = pd.Categorical(adata.obs["type"]).codes
    near = (np.abs(places[:, None] - places[None]) <= 0.15).all(-1) & ~np.eye(60, dtype=bool)
    everything = np.ones(60, bool)

    def group(kind, cell, seen):
        """Return which cells the mean is of; never the cell itself."""
        others = seen & (np.arange(60) != cell)
        if kind == "overall_mean":
            return others & is_train
        return others & (near[cell] if kind == "neighbor_mean" else is_train & (types == types[cell]))

    def means(kind, cells, seen, more):
        found = []
        for cell in cells:
            others = is_train & (np.arange(60) != cell)
            overall = (counts[others].sum(0) + 0.5) / (others.sum() + 1)
            own = counts[group(kind, cell, seen)]
            found.append(overall if kind == "overall_mean" else (own.sum(0) + more * overall) / (len(own) + more))
        return np.stack(found)

    grid = [0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 1000]
    a, b = np.flatnonzero(is_train), np.flatnonzero(~is_train)
    chosen = set()
    for kind in ("overall_mean", "type_mean", "neighbor_mean"):
        fits = []
        for more in (1.0, 3.0, 10.0, 30.0, 100.0):
            mean = means(kind, a, is_train, more)
            nll = [-stats.nbinom.logpmf(counts[a], value, value / (value + mean)).sum(0) for value in grid]
            fits.append((np.min(nll, axis=0).sum(), more, np.array(grid)[np.argmin(nll, axis=0)]))
        _, more, dispersion = min(fits, key=lambda fit: fit[0])
        chosen.add(more)
        baseline = CountBaseline(cells, kind)
        alone = baseline._means(cells, np.arange(40), more, own=counts[a])
        np.testing.assert_allclose(alone, means(kind, a, is_train, more), rtol=1e-9)
        mean = means(kind, b, everything, more)
        assert found[f"{kind}_nll"] == pytest.approx(plain_nll(counts[b], mean, dispersion), rel=1e-9)
        r = [np.corrcoef(np.log1p(one), np.log1p(other))[0, 1] for one, other in zip(mean, counts[b], strict=True)]
        assert found[f"{kind}_pearson_r"] == pytest.approx(np.mean(r), rel=1e-9)
    assert len(chosen) > 1


def test_types_that_tell_nothing_are_no_worse_than_none():
    """Where means are of few cells, a baseline that is fitted to cells it has seen would be."""
    rng = np.random.default_rng(0)
    adata = section(300)
    adata.X = sparse.csr_matrix(rng.poisson(rng.gamma(1, 1, N_GENES), (300, N_GENES)).astype(np.float32))
    adata.obs["type"] = pd.Categorical(rng.integers(0, 40, 300).astype(str))
    found = neighborhood_baselines(
        sampler(adata, indices=range(200), neighbors_from="indices"), sampler(adata, indices=range(200, 300))
    )
    assert found["type_mean_nll"] < found["overall_mean_nll"] + 0.005
    assert found["neighbor_mean_nll"] < found["overall_mean_nll"] + 0.005


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_a_head_starts_at_the_moments_of_the_genes(likelihood):
    adata = section(300)
    rng = np.random.default_rng(0)
    dispersed = rng.poisson(5 * rng.gamma(0.5, 2.0, (300, 1)), (300, N_GENES))  # variance 5 + 25 / 0.5
    dispersed[:, 1], dispersed[:, 2] = 0, rng.poisson(3, 300)
    adata.X = sparse.csr_matrix(dispersed.astype(np.float32))
    data = sampler(adata, indices=range(10, 300), patch_size=0.05)
    mean, variance = gene_moments(data)
    np.testing.assert_allclose(mean, dispersed[10:].mean(0))
    np.testing.assert_allclose(variance, dispersed[10:].var(0))
    assert (gene_moments(data, max_cells=20)[0] != mean).any()
    model = make_model(likelihood=likelihood)
    model.count_head.start_at(mean, variance)
    with torch.no_grad():
        outputs = model.eval()(**collate_neighborhoods(list(data)[:5]))
    share = 1.0 if likelihood == "nb" else 0.95
    expected = mean.clamp_min(1e-4).expand(5, -1)
    torch.testing.assert_close(outputs.mean, expected.float())
    torch.testing.assert_close(outputs.expected_counts, share * expected.float(), rtol=1e-5, atol=0)
    variances = outputs.mean + outputs.mean.square() / outputs.dispersion
    np.testing.assert_allclose(variances[0, 3:], variance[3:], rtol=1e-4)
    assert outputs.dispersion[0, 2] > 50  # as good as Poisson
    trained = make_trainer_loss_after(model, data)
    assert trained < plain_nll(dispersed[10:], np.maximum(dispersed[10:].mean(0), 1e-4), 1000.0)


def make_trainer_loss_after(model, data) -> float:
    """Learn on one batch: heads whose weights are 0 learn, and what is below them."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    batch = collate_neighborhoods(data.__getitems__(range(64)), packed=True)
    before = model.cell_neighborhood.tokens.expression[0].weight.detach().clone()
    for _ in range(5):
        loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (model.cell_neighborhood.tokens.expression[0].weight != before).any()
    return loss.item()


def test_baselines_of_odd_cells():
    empty = sparse.csr_array((4, 5))
    cells = MaskedCells(empty, empty, np.zeros(4, np.int64), np.array([0, 0, 2, 2]))
    for kind in BASELINES:
        nll, r = CountBaseline(cells, kind).evaluate(cells)
        assert 0 < nll < 0.2 and np.isnan(r)
    with pytest.raises(ValueError, match="0 training cells and 40 evaluated cells"):
        neighborhood_baselines(sampler(indices=[]), sampler())
    other = make_adata()
    other.obsm["spatial"] = np.random.default_rng(0).random((60, 2))
    with pytest.raises(ValueError, match="12 genes, but evaluated cells have 40"):
        neighborhood_baselines(sampler(), sampler(other, cell_type_key=None))


def test_only_so_many_training_cells_are_read():
    train, test = sampler(section(60)), sampler(section(30, seed=1))
    few = neighborhood_baselines(train, test, max_train_cells=10)
    assert few == neighborhood_baselines(train, test, max_train_cells=10) != neighborhood_baselines(train, test)


# ---------------------------------------------------------------------- what cannot be


def test_what_does_not_fit_raises(tmp_path):
    with pytest.raises(ValueError, match="log1p.* but the likelihood needs counts|fractional"):
        make_trainer(tmp_path, sampler(normalize="log1p"), model=make_model(apply_log1p=False)).train()
    with pytest.raises(ValueError, match="train_dataset has 12 genes and 3 cell types, but the model has 12 and 1"):
        make_trainer(tmp_path, sampler(), model=make_model(n_cell_types=1))
