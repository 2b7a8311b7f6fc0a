"""Names of genes stay what they are: no reader makes dates, numbers or missing values of them."""

import json

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import io, sparse

from stformer_hf import CellStore, GeneBertConfig, GeneBertModel, GeneTable, GeneTokenizer, load_gene_embeddings
from stformer_hf.genes.aliases import read_aliases
from stformer_hf.sources.open_source import open_source
from stformer_hf.sources.tenx_files import _read_features

LIKE_OTHERS = (
    "MARCH1 SEPT2 DEC1 1-Mar 2-Sep 2001-03-01 inf -inf Infinity 1e5 1E10 2310009E13 TRUE false 007 1.0 0x10 1_000 +5 "
    "12345678901234567890"
).split()
LIKE_NOTHING = "NA nan NaN -nan null NULL None N/A n/a #N/A <NA> -".split()
GROUPS = {  # a column that holds nothing else is the one that readers make something of
    "all": LIKE_OTHERS + LIKE_NOTHING,
    "numbers": ["inf", "1e5", "1E10", "2310009E13", "007", "1.0", "+5", "nan"],
    "whole numbers": ["007", "12", "1"],
    "truth": ["TRUE", "false", "True"],
    "dates": ["2001-03-01", "2001-04-01"],
    "nothing": LIKE_NOTHING,
}
groups = pytest.mark.parametrize("names", GROUPS.values(), ids=GROUPS)


def ids_of(names: list[str]) -> list[str]:
    return [f"ENSG{i:011d}" for i in range(len(names))]


def write_table(path, frame: pd.DataFrame, header: bool = True):
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(frame.to_json(orient="records"))
    else:
        frame.to_csv(path, index=False, header=header, sep="," if path.suffix == ".csv" else "\t")
    return path


@groups
@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "json"])
def test_of_gene_tables(tmp_path, kind, names):
    names = [name for name in names if name != "NA"]  # in tables of genes it is R's missing value
    path = write_table(tmp_path / f"genes.{kind}", pd.DataFrame({"gene_id": ids_of(names), "symbol": names}))
    table = GeneTable.from_json(path) if kind == "json" else GeneTable.from_table(path)
    assert table.symbols.tolist() == names and table.gene_ids.tolist() == ids_of(names)
    table.to_parquet(tmp_path / "saved.parquet")
    assert GeneTable.from_parquet(tmp_path / "saved.parquet").symbols.tolist() == names


@groups
@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "json", "csv without header"])
def test_of_aliases(tmp_path, kind, names):
    for old, new in ((names, ids_of(names)), (ids_of(names), ["x" if name == "NA" else name for name in names])):
        path = tmp_path / f"a.{kind.split()[0]}"
        write_table(path, pd.DataFrame({"old": old, "new": new}), header=kind == path.suffix[1:])
        if kind == "json":
            path.write_text(json.dumps(dict(zip(old, new, strict=True))))
        assert list(read_aliases(path).items()) == list(zip(old, new, strict=True))


@groups
@pytest.mark.parametrize("with_ids", [False, True])
def test_of_tables_of_features(tmp_path, with_ids, names):
    ids = ids_of(names) if with_ids else names
    (tmp_path / "features.tsv").write_text("".join(f"{row[0]}\t{row[1]}\n" for row in zip(ids, names, strict=True)))
    genes = _read_features(tmp_path / "features.tsv")
    assert genes.index.tolist() == ids and genes["gene_symbol"].tolist() == names


@pytest.mark.parametrize("features", ["features.tsv", "genes.tsv"])
def test_of_mtx_folders(tmp_path, features):
    io.mmwrite(tmp_path / "matrix.mtx", sparse.coo_matrix(np.ones((len(LIKE_OTHERS), 2), int)))
    (tmp_path / features).write_text("".join(f"{gene}\t{gene}\n" for gene in LIKE_OTHERS))
    (tmp_path / "barcodes.tsv").write_text("1e5\nNA\n")
    store = CellStore.build(tmp_path / "store", tmp_path, report=False)
    assert store.gene_ids.tolist() == store.genes.symbols.tolist() == LIKE_OTHERS
    assert store.obs.index.tolist() == ["1e5", "NA"]


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_of_anndata_files(tmp_path, suffix):
    cells = AnnData(np.ones((2, len(LIKE_OTHERS)), np.float32), var=pd.DataFrame(index=LIKE_OTHERS))
    getattr(cells, f"write_{suffix}")(tmp_path / f"a.{suffix}")
    assert open_source(tmp_path / f"a.{suffix}").genes.gene_ids.tolist() == LIKE_OTHERS


@groups
def test_of_gene_embeddings(tmp_path, names):
    values = np.random.default_rng(0).normal(size=(len(names), 4))
    tokenizer = GeneTokenizer(names)
    sizes = {"hidden_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 8}
    model = GeneBertModel(GeneBertConfig.from_tokenizer(tokenizer, **sizes))
    for kind, separator in (("csv", ","), ("txt", " ")):
        pd.DataFrame(values, index=names).to_csv(tmp_path / f"e.{kind}", sep=separator, header=False)
        assert load_gene_embeddings(model, tokenizer, tmp_path / f"e.{kind}") == 1
