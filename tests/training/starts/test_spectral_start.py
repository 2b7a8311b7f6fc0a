"""A spectral start against dense principal components, however the cells come."""

import tracemalloc

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from stformer_hf import CellStore, GeneBertConfig, GeneBertForPhenotypicMLM, GeneBertModel, GeneTokenizer
from stformer_hf.batches.collate import pad
from stformer_hf.training.starts import spectral_views
from stformer_hf.training.starts.cell_features import _principal_scores
from stformer_hf.training.starts.spectral_start import initialise_from_store
from stformer_hf.training.starts.spectral_views import fit_spectral_views, pearson_residuals

N_GENES, N_VARIABLE = 60, 25


def make_counts(n_cells: int = 150, n_genes: int = N_GENES, seed: int = 0) -> np.ndarray:
    """Cells of four types and of very different sizes; some genes in few cells, one in none, two empty cells."""
    rng = np.random.default_rng(seed)
    of_types = rng.gamma(0.5, 2, (4, n_genes))
    types = rng.integers(0, 4, n_cells)
    counts = rng.poisson(of_types[types] * rng.lognormal(0, 0.5, (n_cells, 1)))
    counts[:, 5] = 0
    counts[:, 6] = 0
    counts[:2, 6] = 9  # of two cells: not variable
    counts[[4, 70]] = 0
    return counts


def blocks_of(counts: np.ndarray, size: int = 1000):
    return lambda: (sparse.csr_array(counts[i : i + size].astype(float)) for i in range(0, len(counts), size))


def dense_views(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares, log values and Pearson residuals of cells that have counts, float64."""
    counts = counts[counts.sum(1) > 0].astype(float)
    total, shares = counts.sum(1, keepdims=True), counts.sum(0) / counts.sum()
    mu = total * shares
    spread = np.sqrt(mu + mu**2 / 100)
    residuals = np.divide(counts - mu, spread, out=np.zeros_like(mu), where=spread > 0)
    bound = np.sqrt(len(counts))
    return shares, np.log1p(1e4 * counts / total), residuals.clip(-bound, bound)


def within(values: np.ndarray, batches: np.ndarray | None) -> np.ndarray:
    """Subtract the mean of each batch."""
    batches = np.zeros(len(values), int) if batches is None else batches
    return values - np.stack([values[batches == b].mean(0) for b in range(batches.max() + 1)])[batches]


@pytest.mark.parametrize("with_batches", [False, True])
@pytest.mark.parametrize("size", [1000, 37, 1])
def test_components_are_those_of_dense_views(monkeypatch, size, with_batches):
    monkeypatch.setattr(spectral_views, "_ENTRIES", 13 * N_GENES)  # dense blocks of 13 cells
    counts = make_counts()
    full = counts.sum(1) > 0
    batches = np.random.default_rng(1).integers(0, 3, len(counts)) if with_batches else None
    if with_batches:
        counts[full] = counts[full] + 4 * (batches[full, None] == np.arange(N_GENES) % 3)
    views = fit_spectral_views(blocks_of(counts, size), 5, batches=batches, n_variable=N_VARIABLE)
    shares, *dense = dense_views(counts)
    assert views.n_cells == full.sum() == 148
    np.testing.assert_allclose(views.shares, shares, atol=1e-12)
    often = (counts > 0).sum(0) >= 3
    for view, values in enumerate(dense):
        np.testing.assert_allclose(views.means[view], values.mean(0), atol=1e-5)
        chosen = np.flatnonzero(views.loadings[view].any(1))
        assert len(chosen) == N_VARIABLE
        assert often[chosen].all()
        centred = within(values[:, chosen], None if batches is None else batches[full])
        _, spread, axes = np.linalg.svd(centred, full_matrices=False)
        np.testing.assert_allclose(views.variances[view], spread[:5] ** 2 / len(values), rtol=1e-4)
        cosines = np.abs((views.loadings[view][chosen] * axes[:5].T).sum(0))
        np.testing.assert_allclose(cosines, 1, atol=1e-4)
    # Residuals of the largest variance.
    variances = np.where(often, dense[1].var(0), -1)
    assert set(np.argsort(-variances)[:N_VARIABLE]) == set(np.flatnonzero(views.loadings[1].any(1)))


def test_genes_of_the_log_view_are_those_of_scanpy():
    scanpy = pytest.importorskip("scanpy")
    counts = make_counts(300, 200)
    counts = counts[counts.sum(1) > 0][:, (counts > 0).sum(0) >= 3]
    views = fit_spectral_views(blocks_of(counts), 5, n_variable=50)
    adata = AnnData(sparse.csr_matrix(counts.astype(np.float64)))
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    scanpy.pp.highly_variable_genes(adata, flavor="seurat", n_top_genes=50)
    found = set(np.flatnonzero(views.loadings[0].any(1)))
    assert len(found & set(np.flatnonzero(adata.var["highly_variable"]))) >= 48


def test_the_same_twice_and_whatever_the_blocks():
    counts = make_counts()
    one, two, other = (
        fit_spectral_views(blocks_of(counts, size), 5, n_variable=N_VARIABLE) for size in (1000, 1000, 17)
    )
    for name in ("shares", "means"):
        assert np.array_equal(getattr(one, name), getattr(two, name))
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-6)
    for view in (0, 1):
        assert np.array_equal(one.loadings[view], two.loadings[view])
        np.testing.assert_allclose(one.loadings[view], other.loadings[view], atol=1e-4)  # signs too


def test_residuals_of_cells_without_counts_and_of_genes_without_share_are_0():
    counts = sparse.csr_array(np.array([[0, 0, 0], [2, 0, 3]]))
    found = pearson_residuals(counts, np.array([0.5, 0.5, 0.0]), 4)
    mu = 2.5
    expected = [(2 - mu) / np.sqrt(mu + mu**2 / 100), -mu / np.sqrt(mu + mu**2 / 100), 0]
    np.testing.assert_allclose(found, [[0, 0, 0], expected], atol=1e-6)
    assert found.dtype == np.float32


# ---------------------------------------------------------------------- the model


@pytest.fixture
def cells(tmp_path):
    counts = make_counts()
    obs = pd.DataFrame({"batch": np.array(["a", "b", "c"])[np.arange(150) % 3]}, index=[str(i) for i in range(150)])
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(N_GENES)])
    adata = AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)
    return adata, CellStore.build(tmp_path / "store", adata, obs=["batch"])


def make_model(tokenizer, model_class=GeneBertModel, **fields):
    torch.manual_seed(0)
    return model_class(GeneBertConfig.from_tokenizer(tokenizer, "tiny", **fields)).eval()


@pytest.mark.parametrize("model_class", [GeneBertModel, GeneBertForPhenotypicMLM])
def test_the_model_begins_at_the_components(cells, model_class):
    adata, store = cells
    tokenizer = GeneTokenizer.from_store(store, whole_cell=True, max_length=16)
    model = make_model(tokenizer, model_class)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    views = initialise_from_store(model, tokenizer, store, n_components=7)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("cell_embedding" not in name), name
    embedding = model.base_model.cell_embedding
    batch = pad(tokenizer.encode_cells(adata), tokenizer)
    with torch.no_grad():
        cell_values = model.base_model.read_cells(batch["cell_genes"], batch["cell_counts"])
        sums = embedding.view_sums(cell_values).numpy()
        state = model.base_model(**batch).last_hidden_state[:, 0].numpy()
    full = np.asarray(adata.X.sum(1)).ravel() > 0
    halves = state.reshape(len(state), 2, -1)
    for view, scores in enumerate(views.transform(sparse.csr_array(adata.X))):
        assert not sums[:, view, 7:].any()
        ratio = np.linalg.norm(sums[full, view, :7]) / np.linalg.norm(scores[full])
        np.testing.assert_allclose(
            sums[full, view, :7] / ratio, scores[full], atol=1e-4 * np.abs(scores[full]).max(), rtol=1e-4
        )
        # At step 0 the encoder gives [CLS] as it is: dot products of a half are cosines of the scores.
        units = scores[full] / np.linalg.norm(scores[full], axis=1, keepdims=True)
        own = halves[full, view]
        np.testing.assert_allclose(own @ own.T / own.shape[1], units @ units.T, atol=2e-3)


def test_a_store_an_anndata_and_other_columns_give_the_same_start(cells):
    adata, store = cells
    tokenizer = GeneTokenizer(list(reversed(store.gene_ids)), whole_cell=True)
    unknown = AnnData(
        sparse.hstack([adata.X, adata.X[:, :3]]).tocsr(),
        obs=adata.obs,
        var=pd.DataFrame(index=[*adata.var_names, "x", "y", "z"]),
    )
    weights = []
    for source in (store, adata, unknown):
        model = make_model(tokenizer)
        wrapped = torch.nn.DataParallel(model)
        initialise_from_store(wrapped, tokenizer, source, n_components=5, batch_key="batch")
        weights.append(model.cell_embedding.state_dict())
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(other[name], tensor, atol=1e-6, rtol=1e-4)


def test_components_are_no_more_than_what_varies_within_batches():
    """Others are axes of rounding errors, which cells are then scaled to."""
    counts = make_counts()[:40]
    counts = counts[counts.sum(1) > 0]
    n = len(counts)
    pairs = fit_spectral_views(blocks_of(counts, 7), 50, batches=np.arange(n) // 2)
    for loadings, variances in zip(pairs.loadings, pairs.variances, strict=True):
        assert loadings.shape[1] == n // 2
        assert variances[-1] > 1e-6 * variances[0]
    with pytest.raises(ValueError, match=f"Each of the {n} cells with counts is the only one of its batch"):
        fit_spectral_views(blocks_of(counts, 7), 50, batches=np.arange(n))


def test_cells_that_do_not_differ_have_a_start():
    """ARPACK fails on a matrix of zeros, whose eigenvectors are any."""
    views = fit_spectral_views(lambda: iter([sparse.csr_array(np.ones((40, 800)))]), 10)
    assert [of.shape for of in views.loadings] == [(800, 10)] * 2
    np.testing.assert_allclose(views.variances, 0, atol=1e-3)
    for scores in _principal_scores(np.ones((40, 40)), np.arange(32), np.arange(32, 40), 4):
        np.testing.assert_allclose(scores, 0, atol=1e-4)


def test_what_cannot_be_raises(cells):
    _, store = cells
    tokenizer = GeneTokenizer.from_store(store, whole_cell=True)
    plain = GeneTokenizer.from_store(store)
    model = make_model(tokenizer)
    with pytest.raises(ValueError, match="needs whole_cell=True and 60 genes, got whole_cell=False"):
        initialise_from_store(model, plain, store)
    with pytest.raises(ValueError, match="has no cell embedding"):
        initialise_from_store(make_model(plain), plain, store)
    with pytest.raises(ValueError, match="n_components must be 1 to 64"):
        initialise_from_store(model, tokenizer, store, n_components=65)
    with pytest.raises(ValueError, match=r"There is no obs\['donor'\]; obs has 'batch'"):
        initialise_from_store(model, tokenizer, store, batch_key="donor")
    with pytest.raises(ValueError, match="needs at least two cells with counts, got 1"):
        initialise_from_store(model, tokenizer, store.select([0, 4]))
    with pytest.raises(ValueError, match="knows none of the genes of the cells"):
        initialise_from_store(model, GeneTokenizer([f"g{i}" for i in range(60)], whole_cell=True), store)


def test_memory_is_that_of_a_block(monkeypatch):
    """Of four times the cells the peak is the same: nothing is kept but sums over cells."""
    monkeypatch.setattr(spectral_views, "_ENTRIES", 1 << 16)
    n_genes, peaks = 500, []
    rates = np.random.default_rng(0).gamma(0.3, 1, n_genes)

    def blocks(n_blocks):
        for i in range(n_blocks):
            yield sparse.csr_array(np.random.default_rng(i).poisson(rates, (500, n_genes)).astype(float))

    for n_blocks in (3, 12):
        tracemalloc.start()
        fit_spectral_views(lambda n=n_blocks: blocks(n), 10, n_variable=100)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]
