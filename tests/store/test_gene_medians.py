"""Gene medians of stores, files and AnnData objects equal those of a plain loop over dense values."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from conftest import make_adata
from scipy import sparse

from stformer_hf import CellStore, GeneTokenizer, estimate_gene_medians
from stformer_hf.genes.statistics import GeneStatistics

BOUND = 0.0075


def slow(counts: np.ndarray, gene_ids, target_sum: float = 1e4) -> dict[str, float]:
    """Median of the non-zero values of each gene, one at a time."""
    counts = np.asarray(counts, np.float64)
    counts = counts[counts.sum(1) > 0]
    values = counts / counts.sum(1, keepdims=True) * target_sum
    return {
        gene: float(np.median(column[column > 0]))
        for gene, column in zip(gene_ids, values.T, strict=True)
        if (column > 0).any()
    }


def assert_close(found: dict[str, float], expected: dict[str, float], error: float = 0.0) -> None:
    assert sorted(found) == sorted(expected)
    np.testing.assert_allclose([found[gene] for gene in expected], list(expected.values()), rtol=error)


@pytest.fixture(scope="module")
def fetal(shared_data) -> AnnData:
    return read_h5ad(shared_data / "geact_fetal.h5ad")


@pytest.fixture(scope="module")
def fetal_medians(fetal) -> dict[str, float]:
    """Of a plain loop over the genes."""
    counts = fetal.X.tocsc()
    totals = np.asarray(fetal.X.sum(1, dtype=np.float64)).ravel()
    gene_ids = fetal.var["ensembl_id"].str.partition(".")[0].tolist()
    assert len(set(gene_ids)) == counts.shape[1]
    medians = {}
    for gene, start, stop in zip(gene_ids, counts.indptr, counts.indptr[1:], strict=False):
        values = counts.data[start:stop].astype(np.float64) / totals[counts.indices[start:stop]] * 1e4
        if len(values):
            medians[gene] = float(np.median(values))
    return medians


@pytest.fixture(scope="module")
def fetal_sketch(fetal) -> GeneStatistics:
    return estimate_gene_medians(fetal, method="sketch")


# ---------------------------------------------------------------------- real cells


def test_real_cells_exactly(fetal, fetal_medians, shared_data):
    statistics = estimate_gene_medians(shared_data / "geact_fetal.h5ad")
    assert (statistics.method, statistics.n_cells) == ("exact", fetal.n_obs)
    assert statistics.medians == fetal_medians
    table = statistics.table
    np.testing.assert_array_equal(table["total"], np.asarray(fetal.X.sum(0, dtype=np.float64)).ravel())
    np.testing.assert_array_equal(table["detection_rate"], fetal.X.getnnz(0) / fetal.n_obs)
    scale = 1e4 / np.asarray(fetal.X.sum(1, dtype=np.float64)).ravel()
    np.testing.assert_allclose(table["mean"], fetal.X.T.astype(np.float64) @ scale / fetal.n_obs, rtol=1e-12)
    repeated = fetal.var["gene_symbol"].duplicated(keep=False)
    assert table["symbol"].tolist() == fetal.var["gene_symbol"].where(~repeated, fetal.var_names).tolist()


def test_real_cells_sketched_whole_and_in_seven_parts(fetal, fetal_medians, fetal_sketch):
    whole = fetal_sketch
    assert_close(whole.medians, fetal_medians, BOUND)
    parts = [
        estimate_gene_medians(fetal[rows], method="sketch")
        for rows in np.array_split(np.random.default_rng(0).permutation(fetal.n_obs), 7)
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    assert merged.medians == whole.medians
    assert merged.n_cells == whole.n_cells
    np.testing.assert_allclose(merged.table["mean"], whole.table["mean"], rtol=1e-12)
    assert_close(merged.medians, fetal_medians, BOUND)


def test_real_cells_that_do_not_fit_into_the_memory_given(fetal, fetal_medians, fetal_sketch):
    statistics = estimate_gene_medians(fetal, max_memory=20_000_000)
    assert statistics.method == "sketch"
    assert statistics.medians == fetal_sketch.medians
    assert_close(statistics.medians, fetal_medians, BOUND)


def test_files_of_other_gene_tables(shared_data):
    files = [shared_data / "pbmc_ifnb.h5ad", shared_data / "xenium_breast.h5ad"]
    statistics = estimate_gene_medians(files, unify="symbol", method="sketch")
    both = [read_h5ad(file) for file in files]
    assert statistics.n_cells == sum(int((adata.X.sum(1) > 0).sum()) for adata in both)
    ids = [adata.var.set_index("gene_symbol")["ensembl_id"] for adata in both]
    symbol = next(name for name in ids[0].index if name in ids[1].index and ids[0][name] != ids[1][name])
    values = []
    for adata in both:
        column = adata.X[:, adata.var["gene_symbol"].tolist().index(symbol)].toarray().ravel().astype(np.float64)
        seen = column > 0
        values.append(column[seen] / np.asarray(adata.X.sum(1, dtype=np.float64)).ravel()[seen] * 1e4)
    assert ids[1][symbol] not in statistics.medians
    np.testing.assert_allclose(statistics.medians[ids[0][symbol]], np.median(np.concatenate(values)), rtol=BOUND)


# ---------------------------------------------------------------------- sources


def test_every_kind_of_source_gives_the_same(adata, tmp_path, caplog):
    expected = slow(adata.X.toarray(), adata.var_names)
    store = CellStore.build(tmp_path / "store", adata)
    (tmp_path / "files").mkdir()
    adata[:25].write_h5ad(tmp_path / "files" / "a.h5ad")
    rest = adata[25:].copy()
    rest.X = rest.X.tocsc()
    rest.write_h5ad(tmp_path / "files" / "b.h5ad")
    files = tmp_path / "files"
    for source in (
        adata,
        store,
        tmp_path / "store",
        str(tmp_path / "store"),
        files,
        f"{files}/*.h5ad",
        [files / "b.h5ad", files / "a.h5ad"],
        (store.select(range(25)), adata[25:]),
        (part for part in (store.select([3, *range(10)]), store.select(range(10, 60)))),
    ):
        caplog.clear()
        statistics = estimate_gene_medians(source)
        assert statistics.medians == expected
        if hasattr(source, "manifest"):
            assert statistics.n_cells == 59 and "1 of 60 cells have no counts" in caplog.text


@pytest.mark.parametrize(("method", "error"), [("exact", 0), ("sketch", BOUND)])
def test_files_of_other_genes_and_orders_equal_an_outer_join(tmp_path, method, error):
    rng = np.random.default_rng(0)
    frames = []
    for i in range(4):
        adata = make_adata(15, 12, seed=i)
        numbers = rng.permutation(30)[:12]
        adata.var_names = [f"ENSG{n:011d}" + ("" if rng.random() < 0.5 else f".{i}") for n in numbers]
        adata.write_h5ad(tmp_path / f"{i}.h5ad")
        frames.append(adata.to_df().rename(columns=lambda gene: gene.split(".")[0]))
    statistics = estimate_gene_medians(tmp_path, 1e6, method=method)
    joined = pd.concat(frames, join="outer").fillna(0)
    assert_close(statistics.medians, slow(joined.to_numpy(), joined.columns, 1e6), error)
    assert sorted(statistics.gene_ids) == sorted(joined.columns)


def test_columns_of_one_gene_are_summed_before_anything_else():
    counts = np.array([[1, 200, 100, 8], [16, 200, 0, 0]], np.uint8)
    adata = AnnData(sparse.csr_matrix(counts))
    adata.var_names = ["ENSG00000000001", "ENSG00000000002", "ENSG00000000002.3", "old"]
    statistics = estimate_gene_medians(adata, aliases={"old": "ENSG00000000003"})
    names = [f"ENSG{i:011d}" for i in (1, 2, 3)]
    assert statistics.medians == slow(np.array([[1, 300, 8], [16, 200, 0]]), names)
    assert statistics.table["total"].tolist() == [17, 500, 8]


def test_layers_and_fractions(adata):
    adata.layers["umi"] = adata.X.copy()
    adata.X = adata.X * 0.25
    with pytest.raises(ValueError, match="pass layer='umi'"):
        estimate_gene_medians(adata)
    expected = slow(adata.X.toarray(), adata.var_names)
    assert estimate_gene_medians(adata, layer="umi").medians == expected  # the scale of a cell does not count
    assert estimate_gene_medians(adata, fractional=True).medians == expected


# ---------------------------------------------------------------------- what they are for


def test_the_tokenizer_ranks_by_them(store, adata):
    statistics = estimate_gene_medians(store)
    tokenizer = GeneTokenizer.from_store(store, scheme="rank", medians=statistics.medians)
    assert tokenizer.target_sum == statistics.target_sum
    medians = slow(adata.X.toarray(), adata.var_names)
    tokens = tokenizer(adata[:3])["input_ids"]
    for row, ids in zip(adata.X[:3].toarray().astype(np.float64), tokens, strict=True):
        scores = {
            gene: count / row.sum() * 1e4 / medians[gene]
            for gene, count in zip(adata.var_names, row, strict=True)
            if count
        }
        found = [token for token in tokenizer.convert_ids_to_tokens(ids) if token in scores]
        assert len(found) == len(scores) > 3
        assert found == sorted(scores, key=lambda gene: -scores[gene])


# ---------------------------------------------------------------------- what cannot be


def test_nothing_to_estimate_from_is_told(adata, tmp_path):
    with pytest.raises(ValueError, match="No sources"):
        estimate_gene_medians([])
    with pytest.raises(ValueError, match="AnnData: no cells"):
        estimate_gene_medians(adata[:0])
    with pytest.raises(ValueError, match="AnnData: none of the 1 cells has counts"):
        estimate_gene_medians(adata[3:4])
    with pytest.raises(ValueError, match="none of the 2 cells has counts"):
        estimate_gene_medians(AnnData(np.zeros((2, 0), np.float32)))
    with pytest.raises(FileNotFoundError, match="No such file"):
        estimate_gene_medians(tmp_path / "none.h5ad")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_sum": 0}, "target_sum=0"),
        ({"target_sum": -1e4}, "positive"),
        ({"method": "median"}, "method='median': must be one of auto, exact, sketch"),
        ({"max_memory": -5}, "max_memory=-5"),
    ],
)
def test_wrong_settings_are_told_before_files_are_opened(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        estimate_gene_medians(tmp_path / "none.h5ad", **options)


def test_genes_of_two_species_are_refused(adata):
    mouse = adata.copy()
    mouse.var_names = [name.replace("ENSG", "ENSMUSG") for name in mouse.var_names]
    with pytest.raises(ValueError, match="human genes and .* mouse genes"):
        estimate_gene_medians([adata, mouse])
