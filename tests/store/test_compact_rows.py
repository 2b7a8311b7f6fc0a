"""Compact rows: the same cells in fewer bytes, against a decoder that follows the description byte by byte."""

import json

import numpy as np
import pytest
from conftest import make_adata
from datasets import load_from_disk
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from torch.utils.data import DataLoader

from stformer_hf import CellStore, GeneTokenizer, collate_cells
from stformer_hf.store import writer
from stformer_hf.store.compact_rows import decode, encode
from stformer_hf.store.shards import write_piece


def read_plainly(codes: list[int], large: list[int]) -> tuple[list[int], list[int]]:
    genes, counts, at, large = [], [], -1, list(large)
    for code in codes:
        if code == 252:
            at += 63
            continue
        at += code // 4 + 1
        genes.append(at)
        counts.append(large.pop(0) if code % 4 == 3 else code % 4 + 1)
    assert not large
    return genes, counts


@st.composite
def cells(draw, n_genes: int):
    """Cells with genes close together and far apart, and small and large counts."""
    found = []
    for _ in range(draw(st.integers(1, 6))):
        genes = draw(
            st.one_of(
                st.sets(st.integers(0, n_genes - 1), max_size=5),
                st.integers(0, n_genes - 200).map(lambda first: set(range(first, first + 130))),
                st.sampled_from([{62}, {63}, {62, 125}, {63, 127}, {0, 64, 127}, {n_genes - 1}]),
            )
        )
        counts = draw(
            st.lists(
                st.one_of(st.integers(1, 5), st.integers(250, 70_000), st.just(2**32 - 1)),
                min_size=len(genes),
                max_size=len(genes),
            )
        )
        found.append((sorted(genes), counts))
    return found


@pytest.mark.parametrize(("n_genes", "gene_type"), [(65_536, "uint16"), (65_537, "uint32"), (300_000, "uint32")])
@given(data=st.data())
def test_cells_come_back_and_bytes_are_as_described(n_genes, gene_type, data):
    found = data.draw(cells(n_genes))
    indptr = np.cumsum([0, *(len(genes) for genes, _ in found)])
    genes = np.array([gene for each, _ in found for gene in each], gene_type)
    counts = np.array([count for _, each in found for count in each], np.uint32)
    bounds, codes, large_bounds, large = encode(indptr, genes, counts)
    for i, (its_genes, its_counts) in enumerate(found):
        its_codes = codes[bounds[i] : bounds[i + 1]].tolist()
        assert read_plainly(its_codes, large[large_bounds[i] : large_bounds[i + 1]].tolist()) == (
            its_genes,
            its_counts,
        )
    read_indptr, read_genes, read_counts = decode(bounds, codes, large, gene_type, "uint32")
    assert (read_indptr.dtype, read_genes.dtype, read_counts.dtype) == ("int64", gene_type, "uint32")
    np.testing.assert_array_equal(read_indptr, indptr)
    np.testing.assert_array_equal(read_genes, genes)
    np.testing.assert_array_equal(read_counts, counts)


def sparse_cells(largest: int, seed: int, n_cells: int = 40, n_genes: int = 900):
    adata = make_adata(n_cells, n_genes, seed=seed, density=0.1)
    adata.X.data[:] = np.random.default_rng(seed).geometric(0.5, adata.X.nnz)
    adata.X.data[0] = largest
    return adata


@pytest.mark.parametrize("largest", [[7, 7], [7, 300], [300, 7], [7, 70_000]])
def test_a_store_reads_as_one_of_plain_rows(tmp_path, largest):
    sources = [sparse_cells(value, seed) for seed, value in enumerate(largest)]
    for source in sources:
        source.obsp["graph"] = sparse.random(40, 40, 0.1, "csr", random_state=0, dtype=np.float32)
    how = {"obs": "all", "neighbors": "graph", "rows_per_batch": 7, "rows_per_shard": 30, "report": False}
    for shuffle in (False, True):
        plain = CellStore.build(tmp_path / f"plain{shuffle}", sources, shuffle=shuffle, **how)
        compact = CellStore.build(tmp_path / f"compact{shuffle}", sources, shuffle=shuffle, compact=True, **how)
        assert compact.is_compact and not plain.is_compact
        order = np.random.default_rng(1).integers(-80, 80, 200)
        for rows in (slice(None), order, [3], []):
            expected, read = plain.rows(rows), compact.rows(rows)
            assert (read.dtype, read.indices.dtype) == (expected.dtype, expected.indices.dtype)
            for part in ("indptr", "indices", "data"):
                np.testing.assert_array_equal(getattr(read, part), getattr(expected, part))
        np.testing.assert_array_equal(compact.lengths, plain.lengths)
        assert compact.lengths.dtype == plain.lengths.dtype and (compact.lengths == 0).any()
        assert compact.obs.equals(plain.obs)
        assert (compact.neighbors(order) != plain.neighbors(order)).nnz == 0
    batches = [next(iter(DataLoader(store, 16, collate_fn=collate_cells))) for store in (plain, compact)]
    for name, values in batches[0].items():
        if isinstance(values, np.ndarray):
            np.testing.assert_array_equal(batches[1][name], values)


def test_append_join_save_and_conversion_keep_the_cells(tmp_path):
    first, second = sparse_cells(9, 0), sparse_cells(70_000, 1)
    expected = np.vstack([first.X.toarray(), second.X.toarray()])
    store = CellStore.build(tmp_path / "s", first, compact=True, report=False)
    assert store.manifest["count_type"] == "uint8"
    store.append(second)
    joined = CellStore.join(
        tmp_path / "j",
        [
            CellStore.build(tmp_path / f"part{i}", [first, second], part=(i, 2), compact=True, report=False).path
            for i in range(2)
        ],
    )
    saved, plain = store.save(tmp_path / "saved"), CellStore.build(tmp_path / "plain", store, report=False)
    for other in (store, joined, saved, plain):
        np.testing.assert_array_equal(other.rows(slice(None)).toarray(), expected)
        other.verify()
    assert saved.is_compact and joined.is_compact and not plain.is_compact
    with pytest.raises(ValueError, match="has compact rows: merge them with CellStore.build"):
        CellStore.join(tmp_path / "k", [plain.path, saved.path])


@pytest.mark.parametrize("compact", [False, True])
def test_a_build_does_not_go_on_with_rows_of_the_other_kind(tmp_path, monkeypatch, compact):
    adata = sparse_cells(9, 0)
    adata.write_h5ad(tmp_path / "a.h5ad")
    how = {"rows_per_shard": 10, "report": False}
    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_piece", stop_at(30))
        with pytest.raises(KeyboardInterrupt):
            CellStore.build(tmp_path / "s", tmp_path / "a.h5ad", compact=not compact, **how)
    assert len(list((tmp_path / ".s.building").glob("source-*.json"))) == 3
    store = CellStore.build(tmp_path / "s", tmp_path / "a.h5ad", compact=compact, **how)
    assert store.is_compact is compact and (store.rows(slice(None)) != adata.X).nnz == 0


def stop_at(cell: int):
    def write(piece, *progress):
        if piece.start == cell:
            raise KeyboardInterrupt
        return write_piece(piece, *progress)

    return write


def test_only_compact_stores_use_the_names_of_their_columns(tmp_path):
    adata, other = sparse_cells(9, 0), sparse_cells(9, 1)
    for each in (adata, other):
        for name in ("cell_codes", "large_counts", "n_expressed"):
            each.obs[name] = np.arange(40)
    store = CellStore.build(tmp_path / "s", adata, obs="all", report=False)
    store.append(other)
    saved = store.select(range(40, 80)).save(tmp_path / "saved")
    assert saved.obs["n_expressed"].tolist() == saved.obs["cell_codes"].tolist() == list(range(40))
    assert (saved.rows(slice(None)) != other.X).nnz == 0
    with pytest.raises(ValueError, match="cell_codes, large_counts, n_expressed: the store uses this name"):
        CellStore.build(tmp_path / "c", store, obs=list(store.obs), compact=True)


def test_it_is_a_dataset_of_codes(tmp_path):
    adata = sparse_cells(300, 0)
    store = CellStore.build(tmp_path / "s", adata, compact=True, report=False)
    for row, counts in zip(load_from_disk(str(store.path)), adata.X.toarray(), strict=True):
        genes, values = read_plainly(row["cell_codes"], row["large_counts"])
        assert row["n_expressed"] == len(genes)
        np.testing.assert_array_equal(counts[genes], values)
        assert counts.sum() == sum(values)


def test_tokens_are_the_same(tmp_path):
    adata = sparse_cells(300, 0)
    plain = CellStore.build(tmp_path / "p", adata, report=False)
    compact = CellStore.build(tmp_path / "c", adata, compact=True, report=False)
    tokenizer = GeneTokenizer.from_store(plain, scheme="binned", bin_edges=[0.5, 1.5, 3.5])
    tokens = [store.tokenize(tokenizer, tmp_path / f"t{i}") for i, store in enumerate((plain, compact))]
    assert tokens[0]["input_ids"] == tokens[1]["input_ids"]


def test_it_takes_less_than_half_the_bytes(tmp_path):
    adata = make_adata(500, 3_000, density=0.2)
    adata.X.data[:] = np.minimum(np.random.default_rng(0).zipf(2.0, adata.X.nnz), 4_000)
    sizes = [
        sum(
            shard["bytes"]
            for shard in CellStore.build(tmp_path / name, adata, compact=compact, report=False).manifest["shards"]
        )
        for name, compact in (("plain", False), ("compact", True))
    ]
    assert 2 * sizes[1] < sizes[0]


def test_fractions_raise_and_nothing_is_left(tmp_path):
    adata = make_adata(20, 10)
    adata.X.data[3] += 0.5
    with pytest.raises(ValueError, match="holds fractions, which compact rows cannot hold"):
        CellStore.build(tmp_path / "s", adata, compact=True, fractional=True, report=False)
    assert not (tmp_path / "s").exists()


def test_older_versions_refuse_them(tmp_path):
    store = CellStore.build(tmp_path / "s", make_adata(20, 10), compact=True, report=False)
    assert json.loads((store.path / "manifest.json").read_text())["format_version"] == 3
    assert CellStore.build(tmp_path / "p", make_adata(20, 10), report=False).manifest["format_version"] == 2
