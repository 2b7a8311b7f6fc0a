"""Bin edges, normalisation, truncation and the names of genes: settings of GeneTokenizer, against plain versions."""

import json
import pickle

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from datasets.fingerprint import Hasher
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse

from stformer_hf import CellStore, GeneTable, GeneTokenizer

GENES = ["a", "b", "c", "d", "e", "f"]
EDGES = {"a": [1], "b": [2, 3.5], "c": [0.5, 1, 200], "d": [7], "e": [0.1], "f": [1, 2, 3]}


def plain_bins(row, edges, normalize):
    """Bin of each gene of one cell."""
    total = float(np.sum(row, dtype=np.float64))
    values = [np.log1p(float(x) / total * 10_000) if normalize and total else float(x) for x in row]
    return [int(np.digitize(value, edges[gene])) for gene, value in zip(GENES, values, strict=True)]


@given(
    counts=hnp.arrays(
        st.sampled_from([np.uint8, np.uint16, np.int64, np.float32, np.float64]),
        st.tuples(st.integers(0, 8), st.just(len(GENES))),
        elements=st.sampled_from([0, 0, 0, 1, 2, 3, 200]),
    ),
    edges=st.sampled_from([EDGES, dict.fromkeys(GENES, [0.1]), dict.fromkeys(GENES, [1, 2, 6.5, 8, 9])]),
    normalize=st.sampled_from([None, "log1p_cp10k"]),
    truncation=st.sampled_from(["top", "head"]),
    max_length=st.integers(3, 9),
)
def test_edges_normalisation_and_truncation_give_the_plain_tokens(counts, edges, normalize, truncation, max_length):
    same = len({tuple(values) for values in edges.values()}) == 1
    tokenizer = GeneTokenizer(
        GENES,
        bin_edges=edges["a"] if same else edges,
        normalize=normalize,
        truncation=truncation,
        max_length=max_length,
    )
    tokens = tokenizer(sparse.csr_matrix(counts))
    for i, row in enumerate(counts):
        bins = plain_bins(row, edges, normalize)
        expressed = [j for j in range(len(GENES)) if bins[j]]
        if truncation == "top":
            expressed = sorted(sorted(expressed, key=lambda j: (-float(row[j]), j))[: max_length - 2])
        expressed = expressed[: max_length - 2]
        assert tokens["input_ids"][i] == [0, *(4 + bins[j] for j in expressed), 1]
        assert tokens["token_type_ids"][i] == [0, *(1 + j for j in expressed), 0]


def test_dropped_genes_are_those_that_are_not_tokens():
    counts = np.random.default_rng(0).integers(0, 5, (20, 6))
    for truncation in ("top", "head", "random"):
        tokenizer = GeneTokenizer(GENES, truncation=truncation, max_length=4)
        tokens = tokenizer.encode_cells(counts)
        for i, row in enumerate(counts):
            types = tokens.token_type_ids[tokens.indptr[i] : tokens.indptr[i + 1]]
            dropped = tokens.dropped_type_ids[tokens.dropped_cells == i]
            assert sorted([*types[types > 0], *dropped]) == (1 + np.flatnonzero(row)).tolist()


def test_random_truncation_keeps_the_order_of_the_genes_and_changes_with_the_epoch():
    tokenizer = GeneTokenizer([f"g{i}" for i in range(40)], truncation="random", max_length=12)
    counts = np.ones((1, 40), int)
    drawn = [tokenizer.encode_cells(counts, epoch=epoch).token_type_ids[1:-1].tolist() for epoch in range(5)]
    assert all(types == sorted(set(types)) and len(types) == 10 for types in drawn)
    assert len(set(map(tuple, drawn))) == 5
    assert tokenizer.encode_cells(counts, epoch=3).token_type_ids[1:-1].tolist() == drawn[3]


def test_edges_a_gene_are_saved_and_must_be_there_for_all(tmp_path):
    tokenizer = GeneTokenizer(GENES, bin_edges=EDGES, normalize="log1p_cp10k")
    tokenizer.save_pretrained(tmp_path)
    back = GeneTokenizer.from_pretrained(tmp_path)
    assert back.bin_edges == EDGES
    assert (back.n_bins, back.normalize, back.fingerprint) == (4, "log1p_cp10k", tokenizer.fingerprint)
    with pytest.raises(ValueError, match="no edges for 1 genes, such as f"):
        GeneTokenizer(GENES, bin_edges={gene: [1] for gene in "abcde"})
    with pytest.raises(ValueError, match="bin_edges of b must be positive"):
        GeneTokenizer(GENES, bin_edges={**EDGES, "b": [2, 1]})
    with pytest.raises(ValueError, match="normalize must be None or"):
        GeneTokenizer(GENES, normalize="cpm")


@pytest.mark.parametrize("normalize", [None, "log1p_cp10k"])
def test_edges_at_quantiles_of_a_store(store, normalize):
    dense = store.rows(slice(None)).toarray().astype(float)
    if normalize:
        totals = dense.sum(axis=1, keepdims=True)
        dense = np.log1p(dense / np.where(totals, totals, 1) * 1e4)
    together = np.sort(dense[dense > 0])
    tokenizer = GeneTokenizer.from_store(store, bin_edges="quantile", n_bins=4, normalize=normalize)
    wanted = sorted({together[i * len(together) // 4] for i in range(4)})
    # In place of the least value stands one below any count: other cells may have smaller values.
    np.testing.assert_allclose(tokenizer.bin_edges, [1e-9, *wanted[1:]], rtol=1e-12)
    by_gene = GeneTokenizer.from_store(store, bin_edges="gene_quantile", n_bins=3, normalize=normalize).bin_edges
    for j, gene in enumerate(store.gene_ids):
        values = np.sort(dense[:, j][dense[:, j] > 0])
        if len(values):
            wanted = sorted({values[i * len(values) // 3] for i in range(3)})
            np.testing.assert_allclose(by_gene[gene], [1e-9, *wanted[1:]], rtol=1e-12)
    # No expressed gene falls into bin 0, those of cells that the edges were not fitted on neither.
    for edges in ("quantile", "gene_quantile"):
        binned = GeneTokenizer.from_store(
            store.select(range(0, 60, 3)), bin_edges=edges, n_bins=3, normalize=normalize
        )
        lengths = np.diff(binned.encode_cells(store.__getitems__(range(len(store)))).indptr)
        assert lengths.tolist() == (store.lengths + 2).tolist()
    with pytest.raises(ValueError, match='"quantile" or "gene_quantile", got \'best\''):
        GeneTokenizer.from_store(store, bin_edges="best")


# ---------------------------------------------------------------------- names of genes

ENSEMBL = ["ENSG00000000001", "ENSG00000000002", "ENSG00000000003", "ENSG00000000004"]
SYMBOLS = ["CD3D", "MS4A1", "NKG7", "LYZ"]


@pytest.fixture
def by_symbol():
    return GeneTokenizer(ENSEMBL, symbols=dict(zip(SYMBOLS, ENSEMBL, strict=True)))


def test_columns_are_known_by_id_version_or_symbol(by_symbol, tmp_path):
    counts = np.array([[1, 2, 0, 4]])
    wanted = by_symbol(counts)
    by_symbol.save_pretrained(tmp_path)
    for tokenizer in (by_symbol, GeneTokenizer.from_pretrained(tmp_path)):
        assert tokenizer(counts, genes=SYMBOLS) == wanted
        assert tokenizer(counts, genes=[f"{gene}.7" for gene in ENSEMBL]) == wanted
        assert tokenizer(counts, genes=["CD3D", ENSEMBL[1], "NKG7", "LYZ"]) == wanted
        assert tokenizer(counts[:, ::-1], genes=SYMBOLS[::-1]) == wanted


def test_a_gene_table_gives_symbols_and_one_of_several_genes_is_not_used():
    table = GeneTable(
        pd.DataFrame({"gene_id": [*ENSEMBL, "ENSG00000000009"], "symbol": ["X", "X", "NKG7", "LYZ", "Z"]})
    )
    tokenizer = GeneTokenizer(ENSEMBL, symbols=table)
    assert tokenizer.symbols == {"NKG7": ENSEMBL[2], "LYZ": ENSEMBL[3]}
    tokens = tokenizer(np.array([[5, 3, 4]]), genes=["X", "NKG7", "LYZ"])
    assert tokens["token_type_ids"] == [[0, 3, 4, 0]]
    assert tokenizer.last_coverage == pytest.approx(
        {"genes": 2 / 3, "counts": 7 / 12, "vocabulary": 0.5, "weight": 0.5}
    )


def test_symbols_of_other_genes_are_told(caplog):
    mouse = {f"Gene{i}": f"ENSMUSG{i:011d}" for i in range(40)}
    GeneTokenizer(ENSEMBL, symbols=mouse)
    assert "0 of 40 symbols belong to genes of the tokenizer. They belong to genes like ENSMUSG" in caplog.text
    assert "the tokenizer has genes like ENSG00000000001" in caplog.text and "Pass {symbol" not in caplog.text
    caplog.clear()
    genes = [f"ENSG{i:011d}" for i in range(30)]
    GeneTokenizer(genes, symbols={**mouse, "CD3D": genes[1], "LYZ": genes[2]})
    assert "2 of 42 symbols belong to genes of the tokenizer" in caplog.text
    caplog.clear()
    tokenizer = GeneTokenizer(ENSEMBL, symbols=dict(zip(ENSEMBL, SYMBOLS, strict=True)))
    assert "0 of 4 symbols" in caplog.text and "Pass {symbol: gene}, not {gene: symbol}." in caplog.text
    assert tokenizer.symbols == {}
    caplog.clear()
    GeneTokenizer(ENSEMBL, symbols={**mouse, "CD3D": ENSEMBL[0]})  # of few genes, one in ten is enough
    GeneTokenizer(ENSEMBL, symbols={})
    GeneTokenizer(ENSEMBL)
    assert "symbols" not in caplog.text


@pytest.mark.parametrize(
    ("names", "guess"),
    [
        (SYMBOLS, "human symbols"),
        (["Cd3d", "Ms4a1", "Nkg7", "Lyz2"], "mouse symbols"),
        (["673", "100", "7157", "4609"], "row numbers or Entrez ids"),
    ],
)
def test_too_few_known_genes_name_what_was_seen_and_what_is_wanted(names, guess):
    tokenizer = GeneTokenizer(ENSEMBL)
    with pytest.raises(
        ValueError, match=rf"input has genes like.*{names[0]}.*{guess}.*needs.*ENSG00000000001.*Ensembl ids of human"
    ):
        tokenizer(np.array([[1, 2, 0, 4]]), genes=names)


@pytest.mark.parametrize("version", ["", ".4"])
def test_another_species_is_refused_unless_symbols_are_asked_for(by_symbol, version):
    mouse = AnnData(
        np.array([[1, 2, 0, 4]]),
        var=pd.DataFrame({"gene_ids": [f"ENSMUSG0000000000{i}{version}" for i in range(4)]}, index=SYMBOLS),
    )
    with pytest.raises(ValueError, match="genes of mouse .*of human.*match = 'symbol'"):
        by_symbol(mouse)
    by_symbol.match = "symbol"
    assert len(by_symbol(mouse)["input_ids"][0]) == 2 + 3
    with pytest.raises(ValueError, match='match must be "id" or "symbol"'):
        GeneTokenizer(ENSEMBL, match="name")


def test_row_numbers_are_no_names():
    with pytest.raises(ValueError, match="named 1, 2, 3, …: these are row numbers"):
        GeneTokenizer(ENSEMBL)(np.array([[1, 2, 0, 4]]), genes=["1", "2", "3", "4"])


def test_coverage_is_told_once_a_table(by_symbol, caplog):
    for _ in range(3):
        by_symbol(np.array([[1, 2, 1]]), genes=["CD3D", "LYZ", "unknown"])
    assert caplog.text.count("The tokenizer knows 2 of 3 genes of the input (75.0% of its counts)") == 1
    by_symbol(np.array([[1, 2, 1]]), genes=["CD3D", "NKG7", "unknown"])
    assert caplog.text.count("The tokenizer knows") == 2


def test_a_store_gives_its_symbols(shared_data, tmp_path):
    """Cells named by symbol are read by a tokenizer of Ensembl ids."""
    adata = read_h5ad(shared_data / "pbmc_ifnb.h5ad")[:50].copy()
    store = CellStore.build(tmp_path / "s", adata)
    tokenizer = GeneTokenizer.from_store(store)
    assert tokenizer.genes[0].startswith("ENSG")
    wanted = tokenizer(store.rows(range(50)))
    no_ids = AnnData(adata.X, var=pd.DataFrame(index=store.genes.symbols))
    assert tokenizer(no_ids) == wanted
    half = no_ids[:, ::2]
    kept = {tokenizer.symbols[symbol] for symbol in half.var_names}
    for types, some in zip(wanted["token_type_ids"], tokenizer(half)["token_type_ids"], strict=True):
        names = tokenizer.convert_token_types_to_names(types)
        assert [name for name in names if name is None or name in kept] == tokenizer.convert_token_types_to_names(some)


def test_columns_that_one_kind_of_name_does_not_know_are_known_by_another(by_symbol):
    tokenizer = GeneTokenizer(ENSEMBL)
    adata = AnnData(np.array([[1.0, 2.0, 3.0, 4.0]]))
    adata.var_names = ["x", "y", ENSEMBL[2], ENSEMBL[3]]
    adata.var["gene_ids"] = [ENSEMBL[0], ENSEMBL[1], "", ""]
    assert tokenizer(adata) == tokenizer(np.array([[1, 2, 3, 4]]))
    assert tokenizer.last_coverage["counts"] == 1


def test_coverage_of_a_store_is_of_all_batches_so_far(tmp_path):
    """The model's side is that of the store's genes, whatever its first cells express; the counts add up."""
    counts = np.zeros((40, 4), int)
    counts[:20, :2], counts[20:, 2:] = 5, 6
    store = CellStore.build(tmp_path / "s", AnnData(counts, var=pd.DataFrame(index=ENSEMBL)))
    unknown = [f"other{i}" for i in range(30)]
    for order in (range(40), range(39, -1, -1)):
        tokenizer = GeneTokenizer([*ENSEMBL[:2], *unknown])
        for row in order:  # in any order, and again
            with pytest.raises(ValueError, match="has 2 of the model's 32 genes"):
                tokenizer.encode_cells(store.__getitems__([row]))
    tokenizer = GeneTokenizer([*ENSEMBL[:2], *unknown], min_coverage=0.05, warn_coverage=0.06)
    for row in range(40):
        tokenizer.encode_cells(store.__getitems__([row]))
    assert tokenizer.last_coverage == pytest.approx(
        {"genes": 0.5, "counts": 5 / 11, "vocabulary": 1 / 16, "weight": 1 / 16}
    )
    tokenizer.save_pretrained(tmp_path / "t")
    saved = GeneTokenizer.from_pretrained(tmp_path / "t")
    assert (saved.min_coverage, saved.warn_coverage) == (0.05, 0.06)


def test_a_gene_counts_in_the_coverage_by_the_training_cells_that_express_it(tmp_path, caplog):
    """Half of the genes may be nearly nothing of what the model read, or nearly all of it."""
    genes = [f"ENSG{i:011d}" for i in range(20)]
    counts = np.zeros((100, 20), int)
    counts[:, :10], counts[:1, 10:] = 1, 900  # 1,000 entries, and 10 of large counts
    store = CellStore.build(tmp_path / "s", AnnData(counts, var=pd.DataFrame(index=genes)))
    medians = dict.fromkeys(reversed(genes), 1.0)
    for options in ({}, {"scheme": "rank", "medians": medians}):
        tokenizer = GeneTokenizer.from_store(store, **options)
        tokenizer.save_pretrained(tmp_path / "t")
        for some in (tokenizer, GeneTokenizer.from_pretrained(tmp_path / "t")):
            assert some.fingerprint == GeneTokenizer(tokenizer.genes, **options, symbols=store.genes).fingerprint
            caplog.clear()
            some(np.ones((1, 10), int), genes=genes[:10])
            assert some.last_coverage["weight"] == pytest.approx(1000 / 1010) and not caplog.records
            with pytest.raises(ValueError, match=r"10 of the model's 20 genes \(1.0% weighted by .* at least 10%"):
                some(np.ones((1, 10), int), genes=genes[10:])
            some(np.ones((1, 3), int), genes=genes[:3])
            said = "3 of the model's 20 genes (29.7% weighted by their expression in training; at"
            assert said in caplog.text and "100.0% of the input's counts are in known genes" in caplog.text


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, -1.0, 1.0, 1.0], [1.0, np.nan, 1.0, 1.0]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="gene_weights"):
        GeneTokenizer(ENSEMBL, gene_weights=weights)


def test_the_least_share_of_older_files_was_of_another_rule(tmp_path):
    """0.5 was the default, of the counts or of the genes; what was chosen by hand stays."""
    for saved, read in ((0.5, 0.1), (0.0, 0.0), (0.7, 0.7)):
        GeneTokenizer(ENSEMBL, min_coverage=saved).save_pretrained(tmp_path)
        path = tmp_path / "gene_vocabulary.json"
        old = json.loads(path.read_text())
        del old["warn_coverage"]
        path.write_text(json.dumps(old))
        tokenizer = GeneTokenizer.from_pretrained(tmp_path)
        assert (tokenizer.min_coverage, tokenizer.warn_coverage) == (read, 0.5)


def test_a_panels_model_reads_whole_transcriptomes():
    counts = np.array([[1, 2, 90, 70]])
    names = {"normalize": "log1p_cp10k", "values": True}
    tokenizer = GeneTokenizer(ENSEMBL[:2], **names)
    whole = tokenizer(counts, genes=ENSEMBL)["expression_values"]
    assert whole == tokenizer(counts[:, :2], genes=ENSEMBL[:2])["expression_values"]
    assert tokenizer.last_coverage["counts"] == 1 and tokenizer.last_coverage["vocabulary"] == 1


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.uint8])
def test_zeros_that_are_stored_are_no_tokens(dtype):
    zeros = sparse.csr_matrix((np.zeros(2, dtype), [0, 3], [0, 2]), shape=(1, 6))
    for edges in ([0.1], EDGES):
        for normalize in (None, "log1p_cp10k"):
            assert GeneTokenizer(GENES, bin_edges=edges, normalize=normalize)(zeros)["input_ids"] == [[0, 1]]


@pytest.mark.parametrize(
    "values",
    [
        pd.array(["1", pd.NA, "2"], dtype="string"),
        pd.array([1, pd.NA, 2], dtype="Int64"),
        np.array([1.0, np.nan, 2.0]),
        np.array([1, None, 2], dtype=object),
        np.array(["1", pd.NA, "2"], dtype=object),
    ],
)
def test_missing_phenotypes_of_any_kind_are_left_out(values):
    tokenizer = GeneTokenizer(GENES, phenotypes={"age": [1, 2]})
    tokens = tokenizer(np.ones((3, 6), int), obs=pd.DataFrame({"age": values}))
    assert [ids[1] for ids in tokens["input_ids"]] == [4, 7, 5]  # [1], bin_1, [2]
    assert list(map(len, tokens["input_ids"])) == [9, 8, 9]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"phenotypes": {"a": ["B"], "cat": ["cat=B", "B"]}}, r"become the token \[cat=B\]"),
        ({"phenotypes": {"x": "male"}}, "must be a list of values, got 'male'"),
        ({"scheme": "rank", "medians": [1.0] * 6, "target_sum": -1}, "target_sum must be a positive number, got -1"),
        ({"scheme": "rank", "medians": [1.0] * 6, "target_sum": np.nan}, "target_sum must be a positive"),
        ({"scheme": "rank", "medians": [1.0] * 6, "target_sum": 0}, "target_sum must be a positive number, got 0"),
        ({"scheme": "rank", "medians": [1e-300] * 6}, "not positive numbers"),
        ({"scheme": "rank", "medians": [1.0] * 6, "separator": "<s>"}, "separator needs neighborhood"),
    ],
)
def test_bad_settings_raise(arguments, words):
    with pytest.raises(ValueError, match=words):
        GeneTokenizer(GENES, **arguments)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_calls_do_not_change_the_hash_by_which_datasets_caches(by_symbol, dtype):
    before, dumped = Hasher.hash(by_symbol), pickle.dumps(by_symbol)
    tokens = by_symbol(np.array([[1, 2, 1]], dtype), genes=["CD3D", "LYZ", "unknown"])
    assert by_symbol.last_coverage["counts"] == 0.75
    assert Hasher.hash(by_symbol) == before and pickle.dumps(by_symbol) == dumped
    assert pickle.loads(dumped)(np.array([[1, 2, 1]]), genes=["CD3D", "LYZ", "unknown"]) == tokens


def test_what_tokens_mean_is_read_only(by_symbol):
    ranked = GeneTokenizer(ENSEMBL, scheme="rank", medians=[1.0] * 4)
    for tokenizer, name in ((by_symbol, "bin_edges"), (by_symbol, "genes"), (ranked, "medians"), (ranked, "add_eos")):
        with pytest.raises(AttributeError):
            setattr(tokenizer, name, [2.0])
    assert (by_symbol.medians, ranked.bin_edges) == (None, None)
