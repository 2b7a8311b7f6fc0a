"""Genes of many sources: united by id, renamed where asked, and nothing silently lost."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from conftest import make_adata
from scipy import sparse

from stformer_hf import CellStore, GeneTable
from stformer_hf.genes.unite import unite


def table(**genes) -> GeneTable:
    """Symbol -> id, in this order."""
    return GeneTable(pd.DataFrame({"gene_id": list(genes.values()), "symbol": list(genes)}, dtype=object))


def ensembl(number: int, prefix: str = "ENSG") -> str:
    return f"{prefix}{number:011d}"


@pytest.mark.parametrize(
    ("prefix", "species"), [("ENSG", "human"), ("ENSMUSG", "mouse"), ("ENSDARG", "zebrafish"), ("ENSXYZG", "ENSXYZ")]
)
def test_the_species_is_told_by_the_prefix(prefix, species):
    assert table(A=ensembl(1, prefix), B=ensembl(2, prefix) + ".4", C="C").species == species
    assert table(A="A", B="MALAT1").species is None
    assert table(A=ensembl(1), B=ensembl(1, "ENSMUSG")).species is None  # a mixture


def test_species_must_agree():
    human, mouse, symbols = table(A=ensembl(1)), table(a=ensembl(1, "ENSMUSG")), table(A="A")
    with pytest.raises(ValueError, match="h.h5ad has human genes and m.h5ad has mouse genes"):
        unite([human, symbols, mouse], ["h.h5ad", "s.h5ad", "m.h5ad"])
    with pytest.raises(ValueError, match="m.h5ad has mouse genes.*but species='human'"):
        unite([mouse], ["m.h5ad"], species="human")
    mapped = unite([human, mouse], ["h", "m"], aliases={ensembl(1, "ENSMUSG"): ensembl(1)})
    assert mapped.genes.gene_ids.tolist() == [ensembl(1)]
    assert [fates.tolist() for fates in mapped.fates] == [[0], [1]]


def test_sources_that_share_a_table_have_the_rows_of_its_genes():
    shared, other = table(A=ensembl(1), B=ensembl(2)), table(C=ensembl(3), B=ensembl(2), A=ensembl(1))
    tables = [other, shared, shared, table(D=ensembl(4)), other]
    united = unite(tables, list("vwxyz"))
    assert united.genes.gene_ids.tolist() == [ensembl(i) for i in (3, 2, 1, 4)]
    for of, rows, fates in zip(tables, united.rows, united.fates, strict=True):
        assert united.genes.gene_ids[rows].tolist() == of.gene_ids.tolist() and not fates.any()


def test_versions_are_cut_and_other_dots_kept():
    var = pd.DataFrame(index=["ENSG00000000003.15", "ENSG00000000005.2", "RP11-34P13.7"])
    assert GeneTable.from_var(var).gene_ids.tolist() == ["ENSG00000000003", "ENSG00000000005", "RP11-34P13.7"]


def test_genes_of_one_symbol_under_other_ids_are_told_and_united(caplog):
    old = table(CCL5=ensembl(161570), ACTB=ensembl(5), XIST=ensembl(7))
    new = table(ACTB=ensembl(5), CCL5=ensembl(271503))
    apart = unite([old, new], ["old", "new"])
    assert len(apart.genes) == 4
    assert "1 genes have one symbol under different ids" in caplog.text and ensembl(271503) in caplog.text
    united = unite([old, new], ["old", "new"], unify="symbol")
    assert united.genes.gene_ids.tolist() == old.gene_ids.tolist()
    assert united.rows[1].tolist() == [1, 0]
    assert united.fates[1].tolist() == [0, 1]
    by_table = unite([old, new], ["old", "new"], aliases={ensembl(161570): ensembl(271503)})
    assert by_table.genes.gene_ids.tolist() == [ensembl(271503), ensembl(5), ensembl(7)]
    assert by_table.rows[1].tolist() == [1, 0]


def test_names_are_united_with_the_ids_of_another_source():
    names, ids = table(CCL5="CCL5", OTHER="OTHER"), table(ACTB=ensembl(5), CCL5=ensembl(1))
    united = unite([names, ids], ["names", "ids"], unify="symbol")
    assert united.genes.gene_ids.tolist() == [ensembl(1), "OTHER", ensembl(5)]
    assert united.fates[0].tolist() == [1, 2]


def test_what_may_be_two_genes_is_not_united():
    twice = GeneTable(pd.DataFrame({"gene_id": [ensembl(1), ensembl(2)], "symbol": ["PAR", "PAR"]}))
    assert len(unite([twice, table(PAR=ensembl(3))], ["a", "b"], unify="symbol").genes) == 3
    moved = table(NEW=ensembl(1), OLD=ensembl(2))  # the source has both ids: its symbol moved
    assert len(unite([moved, table(OLD=ensembl(1))], ["a", "b"], unify="symbol").genes) == 2


def test_an_unknown_way_to_unify_raises():
    with pytest.raises(ValueError, match="unify='name'"):
        unite([table(A="A")], ["a"], unify="name")


def test_a_store_reports_what_became_of_the_columns(tmp_path, capsys):
    counts = np.array([[1, 2, 4, 8], [16, 32, 0, 0]], np.float32)
    adata = AnnData(sparse.csr_matrix(counts))
    adata.var_names = [ensembl(1), ensembl(2), ensembl(1) + ".3", "LOST"]
    store = CellStore.build(tmp_path / "s", adata, aliases={ensembl(2): ensembl(3)})
    assert store.gene_ids.tolist() == [ensembl(1), ensembl(3), "LOST"]
    np.testing.assert_array_equal(store.rows(slice(None)).toarray(), [[5, 2, 8], [16, 32, 0]])
    row = store.coverage.loc["AnnData"]
    assert row[["columns", "genes", "kept", "mapped", "unmapped"]].tolist() == [4, 3, 2, 1, 1]
    shares = row[["counts kept", "counts mapped", "counts unmapped"]].to_numpy(float)
    np.testing.assert_allclose(shares, np.array([21, 34, 8]) / 63)
    printed = capsys.readouterr().out
    assert "54.0%" in printed and "1 (" in printed and "no Ensembl id in the file" in printed
    named = make_adata(5, 3)
    named.var_names = ["CD3D", "MS4A1", "NKG7"]
    CellStore.build(tmp_path / "named", named)  # which is no failure
    assert "AnnData: 5 cells, 3 genes, kept under their names: no Ensembl id in the file\n" in capsys.readouterr().out


def test_two_releases_of_real_tables(shared_data, tmp_path, caplog):
    files = [shared_data / "pbmc_ifnb.h5ad", shared_data / "visium_breast.h5ad"]
    apart = CellStore.build(tmp_path / "apart", files)
    united = CellStore.build(tmp_path / "united", files, unify="symbol")
    told = int(caplog.text.split(" genes have one symbol")[0].split()[-1])
    assert len(apart.genes) - len(united.genes) == told > 50
    tables = [read_h5ad(file, backed="r").var for file in files]
    symbols = [dict(zip(var["gene_symbol"], var["ensembl_id"], strict=True)) for var in tables]
    differ = {s for s in symbols[0].keys() & symbols[1].keys() if s and symbols[0][s] != symbols[1][s]}
    assert told <= len(differ) and "CCL5" in differ
    assert united.rows(slice(None)).sum() == apart.rows(slice(None)).sum()
    at = united.gene_ids.tolist().index("ENSG00000161570")
    expected = [read_h5ad(file)[:, "CCL5"].X.toarray().ravel() for file in files]
    np.testing.assert_array_equal(united.rows(slice(None))[:, [at]].toarray().ravel(), np.concatenate(expected))


def test_files_of_other_genes_orders_and_suffixes_equal_an_outer_join(tmp_path):
    rng = np.random.default_rng(0)
    frames = []
    for i in range(4):
        adata = make_adata(15, 12, seed=i)
        numbers = rng.permutation(30)[:12]
        adata.var_names = [ensembl(n) + ("" if rng.random() < 0.5 else f".{i}") for n in numbers]
        adata.obs_names = [f"{i}-{name}" for name in adata.obs_names]
        adata.write_h5ad(tmp_path / f"{i}.h5ad")
        frames.append(adata.to_df().rename(columns=lambda gene: gene.split(".")[0]))
    store = CellStore.build(tmp_path / "s", [tmp_path / f"{i}.h5ad" for i in range(4)], rows_per_batch=4)
    expected = pd.concat(frames, join="outer").fillna(0)
    assert sorted(store.gene_ids) == sorted(expected.columns)
    np.testing.assert_array_equal(store.rows(slice(None)).toarray(), expected[store.gene_ids].to_numpy())
    assert store.obs.index.tolist() == expected.index.tolist()
