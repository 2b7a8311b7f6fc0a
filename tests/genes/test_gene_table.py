"""Which column of var is the id, and how tables unite."""

import numpy as np
import pandas as pd
import pytest

from stformer_hf import GeneTable

ENSEMBL = [f"ENSG{i:011d}" for i in range(3)]


def test_ensembl_index_is_the_id_and_loses_its_version():
    var = pd.DataFrame({"gene_symbol": ["A", "B", "C"]}, index=[f"{gene}.{i}" for i, gene in enumerate(ENSEMBL)])
    table = GeneTable.from_var(var)
    assert table.gene_ids.tolist() == ENSEMBL
    assert table.symbols.tolist() == ["A", "B", "C"]


def test_a_column_of_ensembl_ids_is_the_id_where_the_index_holds_symbols():
    var = pd.DataFrame({"ensembl_id": [ENSEMBL[0], "", ENSEMBL[2]]}, index=["A", "B", "C"])
    table = GeneTable.from_var(var)
    assert table.gene_ids.tolist() == [ENSEMBL[0], "B", ENSEMBL[2]]
    assert table.symbols.tolist() == ["A", "B", "C"]


def test_symbols_are_ids_where_there_is_nothing_better():
    table = GeneTable.from_var(pd.DataFrame({"gene_ids": ["1", "2"]}, index=["NKX2.5", "HLA-A"]))
    assert table.gene_ids.tolist() == ["NKX2.5", "HLA-A"]


def test_union_keeps_first_order_and_first_row():
    a = GeneTable(pd.DataFrame({"gene_id": ["x", "y"], "symbol": ["X", "Y"]}))
    b = GeneTable(pd.DataFrame({"gene_id": ["z", "y"], "symbol": ["Z", "other"]}))
    union = GeneTable.union([a, b])
    assert union.gene_ids.tolist() == ["x", "y", "z"]
    assert union.symbols.tolist() == ["X", "Y", "Z"]


def test_parquet_round_trip_keeps_var_columns(tmp_path):
    var = pd.DataFrame({"n": [1, 2, 3], "mixed": ["a", 1, None]}, index=ENSEMBL)
    table = GeneTable.from_var(var)
    table.to_parquet(tmp_path / "genes.parquet")
    back = GeneTable.from_parquet(tmp_path / "genes.parquet")
    assert back.gene_ids.tolist() == ENSEMBL
    assert back.frame["n"].tolist() == [1, 2, 3]
    assert isinstance(back.gene_ids, np.ndarray)


def test_a_table_needs_its_columns():
    with pytest.raises(ValueError, match="missing: symbol"):
        GeneTable(pd.DataFrame({"gene_id": ["x"]}))


def test_no_genes():
    assert len(GeneTable.from_var(pd.DataFrame(index=[]))) == 0
