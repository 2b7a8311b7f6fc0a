"""Statistics of genes: exact ones equal plain numpy, sketches are within their bound, parts merge, files come back."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from stformer_hf import GeneStatistics

COLUMNS = ["median", "mean", "detection_rate", "total"]
BOUND = 0.0075


def names(n_genes: int) -> list[str]:
    return [f"ENSG{i:011d}" for i in range(n_genes)]


def slow(counts: np.ndarray, target_sum: float = 1e4) -> pd.DataFrame:
    """Statistics of dense counts, a gene at a time; cells without counts are left out."""
    counts = counts.astype(np.float64)
    counts = counts[counts.sum(1) > 0]
    values = counts / counts.sum(1, keepdims=True) * target_sum
    rows = np.zeros((values.shape[1], len(COLUMNS)))
    for gene, column in enumerate(values.T):
        seen = column[column > 0]
        median = np.median(seen) if len(seen) else np.nan
        n_cells = max(1, len(column))
        rows[gene] = median, column.sum() / n_cells, len(seen) / n_cells, counts[:, gene].sum()
    table = pd.DataFrame(rows, columns=COLUMNS)
    table.insert(0, "gene_id", names(len(rows)))
    return table


def gather(counts, method: str = "auto", rows_at_once: int = 1 << 30, **options) -> GeneStatistics:
    statistics = GeneStatistics(names(counts.shape[1]), method=method, **options)
    for start in range(0, counts.shape[0], rows_at_once):
        statistics.add(sparse.csr_array(counts[start : start + rows_at_once]))
    return statistics


def assert_equal(statistics: GeneStatistics, expected: pd.DataFrame, error: float = 0.0) -> None:
    table = statistics.table
    assert table["gene_id"].tolist() == expected["gene_id"].tolist()
    if error:
        np.testing.assert_allclose(table["median"], expected["median"], rtol=error)
    else:
        np.testing.assert_array_equal(table["median"], expected["median"])
    np.testing.assert_allclose(table["mean"], expected["mean"], rtol=1e-12)
    np.testing.assert_array_equal(table["detection_rate"], expected["detection_rate"])
    np.testing.assert_allclose(table["total"], expected["total"], rtol=1e-14)


def assert_same(one: GeneStatistics, other: GeneStatistics) -> None:
    """Same cells, same medians to the last bit; sums may be added up in another order."""
    assert (one.n_cells, one.method, one.target_sum) == (other.n_cells, other.method, other.target_sum)
    assert_equal(one, other.table)
    assert one.medians == other.medians


@pytest.fixture
def counts() -> np.ndarray:
    """Counts of 300 cells and 50 genes; the cells 3 and 7 have none, and the gene 5 is never seen."""
    rng = np.random.default_rng(0)
    found = rng.poisson(rng.gamma(0.3, 5, 50) * rng.gamma(2, 1, (300, 1)))
    found[[3, 7]] = 0
    found[:, 5] = 0
    return found


COUNTS = st.one_of(st.integers(1, 5), st.integers(1, 300), st.integers(1, 2**53))
FRACTIONS = st.floats(1e-30, 1e30)


@st.composite
def matrices(draw, values=COUNTS, dtypes=(np.uint8, np.int32, np.uint16, np.int64, np.float32, np.float64)):
    """CSR matrices of any shape: no cells, no genes, empty rows; tidy, or with entries unsorted, repeated and 0."""
    n_cells, n_genes = draw(st.integers(0, 7)), draw(st.integers(0, 5))
    n_entries = draw(st.integers(0, 40)) if n_cells and n_genes else 0
    dtype = np.dtype(draw(st.sampled_from(dtypes)))
    tidy = draw(st.booleans())
    places = st.tuples(st.integers(0, max(0, n_cells - 1)), st.integers(0, max(0, n_genes - 1)))
    places = draw(st.lists(places, min_size=0 if tidy else n_entries, max_size=n_entries, unique=tidy))
    places.sort(key=None if tidy else lambda place: place[0])
    values = values if tidy else st.one_of(st.just(0), values)
    data = draw(st.lists(values, min_size=len(places), max_size=len(places)))
    most = np.iinfo(dtype).max if dtype.kind in "iu" else np.inf
    data = np.array([min(value, most) for value in data], dtype)
    columns = np.array([column for _, column in places], np.int32)
    indptr = np.searchsorted([row for row, _ in places], np.arange(n_cells + 1))
    return sparse.csr_array((data, columns, indptr), shape=(n_cells, n_genes))


def dense(matrix: sparse.csr_array) -> np.ndarray:
    """Sum the entries in float64."""
    found = np.zeros(matrix.shape)
    cells = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    for cell, gene, value in zip(cells, matrix.indices, matrix.data.tolist(), strict=True):
        found[cell, gene] += value
    return found


# ---------------------------------------------------------------------- against plain numpy


@given(matrix=matrices(), target_sum=st.sampled_from([1.0, 1e4, 1e6]))
def test_any_counts_give_what_plain_numpy_gives(matrix, target_sum):
    before = matrix.copy()
    expected = slow(dense(matrix), target_sum)
    for method, error in [("exact", 1e-15), ("auto", 1e-15), ("sketch", BOUND)]:
        statistics = GeneStatistics(names(matrix.shape[1]), method=method, target_sum=target_sum)
        statistics.add(matrix)
        assert_equal(statistics, expected, error)
        assert statistics.n_cells == (dense(matrix).sum(1) > 0).sum()
        seen = expected.dropna()
        assert list(statistics.medians) == seen["gene_id"].tolist()
        np.testing.assert_array_equal(list(statistics.medians.values()), statistics.table["median"].dropna())
    for part, same in [(matrix.data, before.data), (matrix.indices, before.indices), (matrix.indptr, before.indptr)]:
        np.testing.assert_array_equal(part, same)


@given(matrix=matrices(FRACTIONS, dtypes=(np.float64,)))
def test_fractions_over_sixty_orders_of_magnitude(matrix):
    expected = slow(dense(matrix))
    for method, error in [("exact", 1e-13), ("sketch", BOUND)]:
        statistics = GeneStatistics(names(matrix.shape[1]), method=method)
        statistics.add(matrix)
        np.testing.assert_allclose(statistics.table["median"], expected["median"], rtol=error)
        np.testing.assert_allclose(statistics.table["mean"], expected["mean"], rtol=1e-12)


@pytest.mark.parametrize("rows_at_once", [1, 7, 300])
def test_exact_medians_equal_numpys_whatever_the_blocks(counts, rows_at_once):
    statistics = gather(counts, "exact", rows_at_once)
    assert_equal(statistics, slow(counts))
    assert (statistics.n_cells, statistics.method, statistics.relative_error) == (298, "exact", 0)
    assert names(50)[5] not in statistics.medians and len(statistics.medians) > 40


def test_the_values_of_a_gene_may_be_too_many_to_sort_with_those_of_others(counts, monkeypatch):
    expected = slow(counts)
    monkeypatch.setattr("stformer_hf.genes.gene_values._AT_ONCE", 500)
    assert_equal(gather(counts, "exact", 50), expected)
    monkeypatch.setattr("stformer_hf.genes.gene_values._SLICE", 20)
    assert_equal(gather(counts, "sketch", 50), expected, BOUND)


def test_the_bound_of_a_sketch_holds_for_every_value_and_is_used():
    """One value a gene, over many buckets: the worst error is just under the bound."""
    values = np.arange(1, 6_001)
    total = 10**10
    block = sparse.csr_array(np.concatenate([values, [total - values.sum()]])[None, :])
    statistics = GeneStatistics(names(len(values) + 1), method="sketch")
    statistics.add(block)
    error = statistics.table["median"].to_numpy()[:-1] / (values / total * 1e4) - 1
    assert statistics.relative_error == BOUND
    assert 0.0073 < np.abs(error).max() <= BOUND
    assert error.min() < -0.0073 and error.max() > 0.0073


def test_a_median_of_an_even_number_lies_between_the_two_in_the_middle():
    block = sparse.csr_array(np.array([[1, 99], [3, 97]]))
    for method, error in [("exact", 0), ("sketch", BOUND)]:
        statistics = GeneStatistics(["a", "b"], method=method)
        statistics.add(block)
        np.testing.assert_allclose(statistics.medians["a"], 200, rtol=error)


# ---------------------------------------------------------------------- columns


@given(matrix=matrices(), data=st.data())
def test_columns_are_the_genes_they_are_said_to_be(matrix, data):
    n_columns = matrix.shape[1]
    n_genes = data.draw(st.integers(min(n_columns, 1), 6))
    columns = data.draw(st.lists(st.integers(0, max(n_genes, 1) - 1), min_size=n_columns, max_size=n_columns))
    renamed = np.zeros((matrix.shape[0], n_genes))
    for column, gene in enumerate(columns):
        renamed[:, gene] += dense(matrix)[:, column]
    for method, error in [("exact", 1e-15), ("sketch", BOUND)]:
        statistics = GeneStatistics(names(n_genes), method=method)
        statistics.add(matrix, np.array(columns, int))
        assert_equal(statistics, slow(renamed), error)


def test_columns_that_do_not_fit_are_told():
    statistics = GeneStatistics(names(3))
    for columns in (None, [0, 1], [0, 1, 2, 3, 4], [0, 1, 2, 3], [0, 1, 2, -1]):
        with pytest.raises(ValueError, match="4 columns do not fit 3 genes"):
            statistics.add(sparse.csr_array(np.ones((2, 4))), columns)
    assert statistics.n_cells == 0


@pytest.mark.parametrize("value", [-1, np.nan, np.inf])
def test_values_that_are_no_counts_are_refused(value):
    statistics = GeneStatistics(names(2))
    with pytest.raises(ValueError, match="finite and not negative, got"):
        statistics.add(sparse.csr_array(np.array([[1.0, value]])))
    with pytest.raises(ValueError, match="type complex128"):
        statistics.add(sparse.csr_array(np.array([[1j, 1]])))
    with pytest.raises(ValueError, match="more than a float64 holds"):
        statistics.add(sparse.csr_array(np.array([[1e308, 1e308]])))
    assert statistics.n_cells == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_sum": 0}, "target_sum=0"),
        ({"target_sum": -1}, "positive"),
        ({"target_sum": np.nan}, "positive"),
        ({"target_sum": np.inf}, "positive"),
        ({"method": "tdigest"}, "method='tdigest': must be one of auto, exact, sketch"),
        ({"max_memory": -1}, "max_memory=-1"),
        ({"symbols": ["A"]}, "1 symbols for 3 genes"),
    ],
)
def test_wrong_settings_are_told(options, words):
    with pytest.raises(ValueError, match=words):
        GeneStatistics(names(3), **options)
    with pytest.raises(ValueError, match="1 gene ids are repeated, such as a"):
        GeneStatistics(["a", "b", "a"])


# ---------------------------------------------------------------------- auto


def test_auto_turns_into_the_sketch_it_would_have_been(counts):
    sketch = gather(counts, "sketch", 40)
    small = gather(counts, "auto", 40, max_memory=10_000)
    assert gather(counts[:40], "auto", max_memory=10_000).method == "exact"
    assert_same(small, sketch)
    assert gather(counts, "auto", 40).method == "exact"
    assert gather(counts, "exact", 40, max_memory=0).method == "exact"
    assert gather(counts[:1], "auto", max_memory=0).method == "sketch"


def test_results_follow_the_cells_that_are_added_later(counts):
    for method, error in [("exact", 0), ("sketch", BOUND)]:
        statistics = gather(counts[:100], method)
        assert_equal(statistics, slow(counts[:100]), error)
        table = statistics.table  # a copy
        table["median"] = 0
        assert_equal(statistics, slow(counts[:100]), error)
        block = sparse.csr_array(counts[100:])
        statistics.add(block)
        block.data[:] = 0
        assert_equal(statistics, slow(counts), error)


# ---------------------------------------------------------------------- merging


@given(
    parts=st.lists(matrices(), min_size=1, max_size=4),
    methods=st.lists(st.sampled_from(["exact", "sketch"]), min_size=4, max_size=4),
    data=st.data(),
)
def test_parts_of_other_genes_merge_to_the_whole(parts, methods, data):
    everything = names(6)
    whole, statistics, order = [], [], []
    for part, method in zip(parts, methods, strict=False):
        genes = data.draw(st.permutations(range(6)))[: part.shape[1]]
        statistics.append(GeneStatistics([everything[gene] for gene in genes], method=method))
        statistics[-1].add(part)
        order += [gene for gene in genes if gene not in order]
        wide = np.zeros((part.shape[0], 6))
        wide[:, genes] = dense(part)
        whole.append(wide)
    merged = statistics[0]
    for part in statistics[1:]:
        merged = merged.merge(part)
    expected = slow(np.concatenate(whole)).iloc[order]
    assert merged.method == ("exact" if set(methods[: len(parts)]) == {"exact"} else "sketch")
    assert_equal(merged, expected, 1e-15 if merged.method == "exact" else BOUND)
    assert merged.n_cells == sum(part.n_cells for part in statistics)


@pytest.mark.parametrize("method", ["exact", "sketch"])
def test_seven_parts_give_the_whole_exactly(counts, method):
    parts = [gather(rows, method) for rows in np.array_split(counts, 7)]
    tables = [part.table for part in parts]
    merged = parts[-1]
    for part in parts[:-1]:
        merged = merged.merge(part)
    assert_same(merged, gather(counts, method))
    for part, table in zip(parts, tables, strict=True):
        pd.testing.assert_frame_equal(part.table, table)


def test_merged_counts_that_are_too_many_become_a_sketch(counts):
    parts = [gather(rows, "auto", max_memory=40_000) for rows in np.array_split(counts, 2)]
    assert [part.method for part in parts] == ["exact", "exact"]
    assert_same(parts[0].merge(parts[1]), gather(counts, "sketch"))


def test_more_cells_than_32_bits_count():
    statistics = GeneStatistics(["a", "b", "c"], method="sketch")
    statistics.add(sparse.csr_array(np.array([[1, 9, 0], [5, 5, 0], [8, 2, 0]])))
    for _ in range(33):
        statistics = statistics.merge(statistics)
    assert statistics.n_cells == 3 * 2**33
    table = statistics.table
    np.testing.assert_allclose(table["median"], [5000, 5000, np.nan], rtol=BOUND)
    assert table["detection_rate"].tolist() == [1, 1, 0]
    assert table["total"].tolist() == [14 * 2**33, 16 * 2**33, 0]
    statistics.add(sparse.csr_array(np.array([[1, 9, 0]])))
    assert statistics.n_cells == 3 * 2**33 + 1


def test_symbols_are_united_and_the_first_one_is_kept():
    first, second = GeneStatistics(["a", "b"], ["A", "B"]), GeneStatistics(["c"])
    third = GeneStatistics(["d", "a"], ["D", "OLD"])
    assert first.merge(second).merge(third).table["symbol"].tolist() == ["A", "B", "c", "D"]
    assert "symbol" not in second.merge(second).table


def test_other_target_sums_do_not_merge():
    with pytest.raises(ValueError, match="target sums are 10000 and 1e.06"):
        GeneStatistics(["a"]).merge(GeneStatistics(["a"], target_sum=1e6))


# ---------------------------------------------------------------------- files


@given(matrix=matrices(), more=matrices(), method=st.sampled_from(["exact", "sketch"]))
def test_parts_come_back_from_files_and_go_on(matrix, more, method, tmp_path_factory):
    path = tmp_path_factory.mktemp("parts") / "a.npz"
    statistics = GeneStatistics(names(matrix.shape[1]), method=method, target_sum=1e6)
    statistics.add(matrix)
    statistics.save(path)
    back = GeneStatistics.load(path)
    assert_same(back, statistics)
    pd.testing.assert_frame_equal(back.table, statistics.table)
    for one in (statistics, back):
        one.add(sparse.csr_array((more.shape[0], matrix.shape[1]), dtype=np.uint8))
        if more.shape[1] == matrix.shape[1]:
            one.add(more)
    assert_same(back, statistics)
    assert_same(back.merge(statistics), statistics.merge(back))


def test_the_memory_of_auto_comes_back_too(counts, tmp_path):
    part = gather(counts[:40], "auto", max_memory=10_000)
    part.save(tmp_path / "a.npz")
    back = GeneStatistics.load(tmp_path / "a.npz")
    assert back.method == "exact"
    back.add(sparse.csr_array(counts[40:]))
    assert_same(back, gather(counts, "sketch"))


def test_a_file_that_cannot_be_written_leaves_the_old_one(counts, tmp_path):
    gather(counts).save(tmp_path / "a.json")
    before = (tmp_path / "a.json").read_bytes()
    huge = gather(np.array([[1e308], [1e308]]))  # their sum is infinite
    with pytest.raises(ValueError, match="not JSON compliant"):
        huge.save(tmp_path / "a.json")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.json", before)]


def test_results_are_written_for_people_and_programs(counts, tmp_path):
    symbols = [f"gène{i}" for i in range(50)]
    statistics = gather(counts, "sketch", symbols=symbols)
    statistics.save(tmp_path / "gene_medians.json")
    text = (tmp_path / "gene_medians.json").read_text(encoding="utf-8")
    found = json.loads(text)
    assert found["medians"] == statistics.medians
    assert (found["target_sum"], found["n_cells"], found["method"]) == (1e4, 298, "sketch")
    assert found["relative_error"] == BOUND and found["symbol"] == symbols and "gène3" in text
    assert found["detection_rate"] == statistics.table["detection_rate"].tolist()
    back = GeneStatistics.load(tmp_path / "gene_medians.json")
    pd.testing.assert_frame_equal(back.table, statistics.table)
    assert back.medians == statistics.medians
    assert (back.n_cells, back.method, back.relative_error) == (298, "sketch", BOUND)
    back.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == text
    for refused in (
        lambda: back.add(sparse.csr_array(counts)),
        lambda: back.merge(statistics),
        lambda: statistics.merge(back),
        lambda: back.save(tmp_path / "a.npz"),
    ):
        with pytest.raises(ValueError, match="a JSON file, which holds only results"):
            refused()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["again.json", "gene_medians.json"]


@pytest.mark.parametrize("name", ["a.json", "a.npz"])
def test_files_of_another_format_are_told(counts, tmp_path, name, monkeypatch):
    for version, remedy in [(2, "Update stformer_hf"), (0, "Estimate the statistics again")]:
        with monkeypatch.context() as patch:
            patch.setattr("stformer_hf.genes.statistics.FORMAT_VERSION", version)
            gather(counts).save(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} has format version {version}; this version reads 1. {remedy}"):
            GeneStatistics.load(tmp_path / name)


@pytest.mark.parametrize("method", ["exact", "sketch"])
@pytest.mark.parametrize("name", ["a.json", "a.npz"])
def test_damaged_files_are_told(counts, tmp_path, name, method):
    path = tmp_path / name
    gather(counts, method).save(path)
    whole = path.read_bytes()
    for damaged in (
        b"",
        whole[:100],
        whole[: len(whole) // 2],
        whole[:-30],
        b"PK\x03\x04",
        b"{}",
        b"[1]",
        b"\xff\xfe",
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} does not hold gene statistics, or is damaged"):
            GeneStatistics.load(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        GeneStatistics.load(path)


def test_parts_hold_no_pickles_and_no_cells_beyond_their_number(counts, tmp_path):
    path = tmp_path / "a.npz"
    gather(counts, "exact").save(path)
    with np.load(path, allow_pickle=False) as arrays:
        good = dict(arrays)
    for name, value in [
        ("gene_ids", np.array(names(50), object)),
        ("cells", np.full(len(good["cells"]), 1 << 20)),
        ("sums", good["sums"][:4]),
    ]:
        np.savez(path, **{**good, name: value})
        with pytest.raises(ValueError, match="or is damaged"):
            GeneStatistics.load(path)
    gather(counts, "sketch").save(path)
    with np.load(path) as arrays:
        good = dict(arrays)
    for name, value in [
        ("genes", good["genes"] + 1),
        ("lengths", good["lengths"] + 1),
        ("counts", good["counts"][1:]),
    ]:
        np.savez(path, **{**good, name: value})
        with pytest.raises(ValueError, match="or is damaged"):
            GeneStatistics.load(path)


def test_other_kinds_of_files_are_refused_before_anything_is_written(counts, tmp_path):
    statistics = gather(counts)
    for path in (tmp_path / "a.pkl", tmp_path / "a"):
        with pytest.raises(ValueError, match="must be .json .results only. or .npz"):
            statistics.save(path)
        with pytest.raises(ValueError, match="must be .json"):
            GeneStatistics.load(path)
    with pytest.raises(FileNotFoundError):
        statistics.save(tmp_path / "no_folder" / "a.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["exact", "sketch"])
def test_cells_added_as_one_part_are_a_merged_part_bit_for_bit(method):
    rng = np.random.default_rng(0)
    blocks = [sparse.csr_array(rng.poisson(1.0, (7, 30))) for _ in range(12)]
    genes = [f"g{i}" for i in range(30)]
    whole, merged, one_by_one = (GeneStatistics(genes, target_sum=1234.5, method=method) for _ in range(3))
    for first in range(0, 12, 3):
        part = GeneStatistics(genes, target_sum=1234.5, method=method)
        with whole.as_one_part():
            for block in blocks[first : first + 3]:
                whole.add(block)
                part.add(block)
                one_by_one.add(block)
        merged = merged.merge(part)
    pd.testing.assert_frame_equal(whole.table, merged.table, check_exact=True)
    assert (whole.table["mean"] != one_by_one.table["mean"]).any()  # the order of the additions shows
