"""The same cells through every door: store, tokenizer, embed, stream and SCDL take the same genes, or refuse alike."""

import logging

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse
from torch.utils.data import DataLoader

from stformer_hf import (
    CellStore,
    GeneBertConfig,
    GeneBertModel,
    GeneTokenizer,
    IterableAnnDataset,
    SingleCellMemMapDataset,
    embed,
)
from stformer_hf.sources.open_source import open_source

IDS = [f"ENSG{i:011d}" for i in range(1, 6)]
SYMBOLS = ["CD4", "GAPDH", "ACTB", "CD8A", "MS4A1"]
COUNTS = np.array([[1, 5, 2, 0, 3], [0, 7, 4, 2, 0]], np.float32)
NUMBERS = [str(i) for i in range(5)]


def cells(index, columns=None, counts=COUNTS, **layers) -> AnnData:
    return AnnData(
        np.asarray(counts, np.float32), var=pd.DataFrame(columns or {}, index=list(index)), layers=layers or None
    )


def versions(ids, suffix=".7"):
    return [name + suffix for name in ids]


def with_antibodies() -> AnnData:
    """As scanpy.read_10x_h5(gex_only=False) gives it: an antibody has the symbol of a gene."""
    types = ["Gene Expression"] * 5 + ["Antibody Capture"] * 2
    columns = {"gene_ids": [*IDS, "CD4_TotalSeqC", "isotype"], "feature_types": types}
    return cells([*SYMBOLS, "CD4", "IgG"], columns, np.hstack([COUNTS, [[80, 9], [70, 4]]]))


def antibodies_in_raw() -> AnnData:
    """Types of features that only the log values of X have."""
    adata = with_antibodies()
    adata.raw = AnnData(adata.X, var=adata.var[[]])
    adata.X = np.log1p(adata.X.toarray() if sparse.issparse(adata.X) else adata.X)
    return adata


def joined() -> AnnData:
    """As scanpy's concatenate left it: a column of ids a batch, with gaps."""
    first, second = list(IDS), list(IDS)
    first[3], second[0] = np.nan, np.nan
    return cells(SYMBOLS, {"gene_ids-0": first, "gene_ids-1": second})


def normalised(**where) -> AnnData:
    adata = cells(IDS, counts=np.log1p(COUNTS))
    if where.get("raw"):
        wide = cells([*IDS[::-1], "ENSG00000000009"], counts=np.hstack([COUNTS[:, ::-1], np.zeros((2, 1))]))
        adata.raw = wide
    if where.get("layer"):
        adata.layers["counts"] = COUNTS
    return adata


def twice() -> AnnData:
    """A gene in two columns, whose counts are summed: as symbols that were made unique, with one id."""
    half = np.hstack([COUNTS, COUNTS[:, :1]])
    half[:, 0], half[:, 5] = [1, 0], [0, 0]
    return cells([*SYMBOLS, "CD4-1"], {"gene_ids": [*IDS, IDS[0]]}, half)


def sparse_columns() -> AnnData:
    adata = cells(SYMBOLS, {"gene_ids": IDS})
    adata.X = sparse.csc_matrix(adata.X)
    return adata


# What writes var like this: the cells.
SAME = {
    "Cell Ranger 3 to 9, scanpy.read_10x_mtx": lambda: cells(
        SYMBOLS, {"gene_ids": IDS, "feature_types": ["Gene Expression"] * 5}
    ),
    "Cell Ranger 2, scanpy.read_10x_h5": lambda: cells(SYMBOLS, {"gene_ids": IDS}),
    "Cell Ranger, ids as var_names": lambda: cells(IDS, {"gene_symbols": SYMBOLS}),
    "STARsolo, GENCODE ids with versions": lambda: cells(versions(IDS), {"gene_name": SYMBOLS}),
    "versions in a column": lambda: cells(SYMBOLS, {"gene_ids": versions(IDS, ".12")}),
    "CELLxGENE": lambda: cells(
        IDS, {"feature_name": SYMBOLS, "feature_biotype": ["gene"] * 5, "feature_type": ["protein_coding"] * 5}
    ),
    "CELLxGENE Census": lambda: cells(NUMBERS, {"soma_joinid": range(5), "feature_id": IDS, "feature_name": SYMBOLS}),
    "Census, some genes": lambda: cells(
        ["3", "17", "90", "1000", "60663"], {"feature_id": IDS, "feature_name": SYMBOLS}
    ),
    "SeuratDisk": lambda: cells(SYMBOLS, {"features": SYMBOLS}),
    "SeuratDisk, row numbers": lambda: cells(NUMBERS, {"features": SYMBOLS}),
    "zellkonverter of SingleCellExperiment": lambda: cells(SYMBOLS, {"ID": IDS, "Symbol": SYMBOLS}),
    "sceasy": lambda: cells(SYMBOLS, {"name": SYMBOLS, "vst.mean": np.ones(5)}),
    "anndataR of rowData": lambda: cells(SYMBOLS, {"ensembl": IDS, "hgnc_symbol": SYMBOLS}),
    "scvi-tools": lambda: cells(IDS, {"n_counts": np.ones(5), "symbol": SYMBOLS}),
    "scanpy concatenate": joined,
    "biomaRt": lambda: cells(SYMBOLS, {"ensembl_gene_id": IDS, "external_gene_name": SYMBOLS}),
    "loom of velocyto": lambda: cells(SYMBOLS, {"Accession": IDS, "Chromosome": ["1"] * 5}),
    "monocle": lambda: cells(IDS, {"gene_short_name": SYMBOLS}),
    "Xenium, controls beside genes": lambda: cells(
        [*IDS, "NegControlProbe_1"],
        {"feature_types": ["Gene Expression"] * 5 + ["Negative Control Probe"]},
        np.hstack([COUNTS, [[2], [1]]]),
    ),
    "CITE-seq": with_antibodies,
    "muon, modality": lambda: cells(
        [*SYMBOLS, "CD4"], {"modality": ["rna"] * 5 + ["prot"]}, np.hstack([COUNTS, [[9], [9]]])
    ),
    "Visium HD, reference's prefix": lambda: cells(
        [f"GRCh38_{name}" for name in SYMBOLS], {"gene_ids": [f"GRCh38_{name}" for name in IDS]}
    ),
    "prefix of a mixed reference": lambda: cells([f"GRCh38______{name}" for name in IDS]),
    "Flex probes: a gene in two columns": twice,
    "R, NA for ids": lambda: cells(SYMBOLS, {"ensembl_id": [*IDS[:3], "NA", "nan"]}),
    "pseudoautosomal copies": lambda: cells(
        [*versions(IDS), f"{IDS[4]}.7_PAR_Y"], counts=np.hstack([COUNTS, np.zeros((2, 1))])
    ),
    "counts in raw, with more genes": lambda: normalised(raw=True),
    "counts in the layer counts": lambda: normalised(layer=True),
    "another order of genes": lambda: cells(SYMBOLS[::-1], {"gene_ids": IDS[::-1]}, COUNTS[:, ::-1]),
    "symbols alone": lambda: cells(SYMBOLS),
    "csc": sparse_columns,
    "Ensembl's names: symbols and ids": lambda: cells([*SYMBOLS[:2], *IDS[2:]], {"gene_id": IDS}),
    "more ids than symbols in the index": lambda: cells([*IDS[:4], SYMBOLS[4]], {"gene_ids": IDS}),
    "Census, in another order": lambda: cells(
        ["60663", "3", "1000", "17", "90"], {"feature_id": IDS, "feature_name": SYMBOLS}
    ),
    "row numbers of joined files": lambda: cells(["0-0", "1-0", "2-0", "0-1", "1-1"], {"feature_id": IDS}),
    "Seurat, dashes": lambda: cells([f"GRCh38-{name}" for name in IDS]),
    "10x 2020-A": lambda: cells([f"GRCh38_2020_A_{name}" for name in IDS]),
    "Flex, raw probes": lambda: cells(
        [f"{name}|{symbol}|{i:07x}" for i, (name, symbol) in enumerate(zip(IDS, SYMBOLS, strict=True))]
    ),
    "GENCODE up to 24": lambda: cells([*IDS[:4], f"ENSGR{IDS[4][5:]}.2"]),
    "biotypes of a GFF3": lambda: cells(
        IDS, {"feature_type": ["gene", "ncRNA_gene", "pseudogene", "gene", "gene"], "gene_name": SYMBOLS}
    ),
    "orthologs beside": lambda: cells(SYMBOLS, {"ensembl_id": ["ENSMUSG00000000001", *[None] * 4], "gene_ids": IDS}),
    "CITE-seq, raw without feature types": antibodies_in_raw,
}
REFUSED = {
    "row numbers alone": (lambda: cells(NUMBERS, {"n_cells": range(5)}), "row numbers.*n_cells"),
    "log values": (lambda: normalised(), "X holds fractional values"),
    "scaled values": (lambda: cells(IDS, counts=COUNTS - 1), "X holds negative values"),
    "counts in a layer of another name": (lambda: cells(IDS, counts=np.log1p(COUNTS), umi=COUNTS), "layer='umi'"),
}


@pytest.fixture(scope="module")
def tokenizer() -> GeneTokenizer:
    symbols = dict(zip(SYMBOLS, IDS, strict=True))
    return GeneTokenizer(IDS, bin_edges=[i + 0.5 for i in range(90)], symbols=symbols)


@pytest.fixture(scope="module")
def model(tokenizer) -> GeneBertModel:
    torch.manual_seed(0)
    return GeneBertModel(GeneBertConfig.from_tokenizer(tokenizer, size="tiny", num_hidden_layers=1)).eval()


def as_dicts(gene_ids, rows) -> list[dict[str, float]]:
    """The counts of cells by gene, without zeros."""
    return [{name: float(count) for name, count in zip(gene_ids, row, strict=True) if count} for row in rows]


def by_id(found: list[dict[str, float]]) -> list[dict[str, float]]:
    """Symbols of genes that have no id in the file, as ids."""
    ids = dict(zip(SYMBOLS, IDS, strict=True))
    return [{ids.get(name, name): count for name, count in cell.items()} for cell in found]


def through_the_store(adata, folder):
    store = CellStore.build(folder / "store", adata, report=False)
    return by_id(as_dicts(store.gene_ids, store.rows(slice(None)).toarray()))


def through_the_stream(adata, folder):
    stream = IterableAnnDataset(adata)
    found = []
    for cell in stream:
        found.append(dict(zip(stream.genes.gene_ids[cell["genes"]], map(float, cell["counts"]), strict=True)))
    return by_id(found)


def through_scdl(adata, folder):
    adata.write_h5ad(folder / "cells.h5ad")
    data = SingleCellMemMapDataset(folder / "scdl", folder / "cells.h5ad", use_X_not_raw=False)
    gene_ids = data.var_features()["gene_id"] if callable(data.var_features) else data.var_features["gene_id"]
    return by_id(as_dicts(gene_ids, [data.get_row_padded(i)[0] for i in range(len(data))]))


def tokens_of(tokenizer, encoded):
    """The counts that tokens tell, since each count has a bin of its own."""
    found = []
    for ids, types in zip(encoded["input_ids"], encoded["token_type_ids"], strict=True):
        genes = tokenizer.convert_token_types_to_names(types)
        names = tokenizer.convert_ids_to_tokens(ids)
        found.append({gene: float(name.removeprefix("bin_")) for gene, name in zip(genes, names, strict=True) if gene})
    return found


EXPECTED = as_dicts(IDS, COUNTS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("writer", SAME)
def test_every_door_takes_the_same_genes(writer, tokenizer, model, tmp_path):
    adata = SAME[writer]()
    assert tokens_of(tokenizer, tokenizer(adata)) == EXPECTED
    assert through_the_store(adata, tmp_path) == EXPECTED
    assert tokens_of(tokenizer, tokenizer(CellStore(tmp_path / "store").__getitems__([0, 1]))) == EXPECTED
    assert through_the_stream(adata, tmp_path) == EXPECTED
    if writer != "counts in the layer counts":  # SCDL reads raw or X, as BioNeMo's does
        assert through_scdl(adata, tmp_path) == EXPECTED
    embed(adata, model, tokenizer=tokenizer)
    plain = cells(IDS)
    embed(plain, model, tokenizer=tokenizer)
    np.testing.assert_array_equal(adata.obsm["X_stformer"], plain.obsm["X_stformer"])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", REFUSED)
def test_every_door_refuses_the_same_cells(what, tokenizer, model, tmp_path):
    make, words = REFUSED[what]
    doors = (
        tokenizer,
        lambda adata: through_the_store(adata, tmp_path),
        lambda adata: through_the_stream(adata, tmp_path),
        lambda adata: embed(adata, model, tokenizer=tokenizer),
        lambda adata: through_scdl(adata, tmp_path),
    )
    if what in ("log values", "counts in a layer of another name"):
        doors = doors[:-1]  # SCDL takes X with any values that are not negative
    for door in doors:
        with pytest.raises(ValueError, match=words):
            door(make())
    assert not (tmp_path / "store").exists() and not (tmp_path / "scdl").exists()


@pytest.mark.filterwarnings("ignore")
def test_estimated_counts_pass_every_door_that_is_asked(tokenizer, model, tmp_path):
    adata = cells(IDS, counts=COUNTS + 0.25 * (COUNTS > 0))
    with pytest.raises(ValueError, match="fractional=True"):
        tokenizer(adata)
    assert tokens_of(tokenizer, tokenizer(adata, fractional=True)) == EXPECTED
    embed(adata, model, tokenizer=tokenizer, fractional=True)
    plain = cells(IDS)
    embed(plain, model, tokenizer=tokenizer)
    np.testing.assert_array_equal(adata.obsm["X_stformer"], plain.obsm["X_stformer"])
    store = CellStore.build(tmp_path / "s", adata, fractional=True, report=False)
    assert tokens_of(tokenizer, tokenizer(store.__getitems__([0, 1]))) == EXPECTED


@pytest.mark.filterwarnings("ignore")
def test_logarithms_are_not_taken_for_estimated_counts(tokenizer, tmp_path):
    """A door that accepts fractions finds the counts where one finds them that does not."""
    adata = cells(IDS)
    adata.layers["counts"], adata.X = adata.X.copy(), np.log1p(adata.X)
    assert tokens_of(tokenizer, tokenizer(adata, fractional=True)) == EXPECTED
    store = CellStore.build(tmp_path / "s", adata, fractional=True, report=False)
    assert tokens_of(tokenizer, tokenizer(store.__getitems__([0, 1]))) == EXPECTED
    del adata.layers["counts"]
    assert open_source(adata, fractional=True).counts_in == "X", "if there is nothing better"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "values",
    ["logarithms", "estimates", "large estimates", "scaled", "shares", "largest alike", "logarithms of some genes"],
)
def test_logarithms_that_are_read_as_counts_are_named(values, tokenizer, model, tmp_path, caplog):
    counts = np.random.default_rng(0).poisson(3, (40, 5)) + [1.0, 0, 0, 0, 0]
    scaled = 1e4 * counts / counts.sum(axis=1, keepdims=True)
    of = {"logarithms": np.log1p(scaled), "estimates": counts + 0.25, "scaled": scaled}
    of["large estimates"] = of["estimates"] * np.where(np.arange(40) % 2, 1, 1000)[:, None]  # exp(x) is infinite
    of["shares"] = scaled / 1e8  # x is nearly exp(x) - 1
    of["largest alike"] = np.where(np.arange(5) == 2, 20, counts)  # the sum of exp(x) - 1 is that of the largest
    X = of.get(values, np.log1p(scaled) * [1, 1, 1, 1, 0]).astype(np.float32)
    words = "X holds logarithms, not counts: exp(x) - 1 sums to "
    words += "10,000 in every cell" if values == "logarithms" else ""
    for door in (
        lambda adata: tokenizer(adata, fractional=True),
        lambda adata: embed(adata, model, tokenizer=tokenizer, fractional=True),
        lambda adata: CellStore.build(tmp_path / "s", adata, fractional=True, report=False),
    ):
        caplog.clear()
        door(cells(IDS, counts=X))
        assert [words in record.getMessage() for record in caplog.records].count(True) == (values == "logarithms")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("n_workers", [0, 2])
def test_a_stream_names_logarithms_once(n_workers, tmp_path):
    """Per file, whatever the number of epochs and of workers, which read again in each."""
    for name in ("a", "b"):
        counts = np.random.default_rng(0).poisson(3, (40, 5)) + [1.0, 0, 0, 0, 0]
        logarithms = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)
        cells(IDS, counts=logarithms).write_h5ad(tmp_path / f"{name}.h5ad")
    stream = IterableAnnDataset(
        tmp_path / "*.h5ad", fractional=True, shuffle=True, buffer_size=16, allow_duplicates=True
    )
    handler = logging.FileHandler(tmp_path / "log")  # to which workers write too
    logging.getLogger("stformer_hf").addHandler(handler)
    how = {"num_workers": n_workers, "multiprocessing_context": "fork" if n_workers else None}
    for epoch in range(3):
        stream.set_epoch(epoch)
        assert sum(map(len, DataLoader(stream, 8, collate_fn=list, **how))) == 80
    logging.getLogger("stformer_hf").removeHandler(handler)
    said = (tmp_path / "log").read_text()
    assert said.count("holds logarithms") == 2 and "a.h5ad: X" in said and "b.h5ad: X" in said


@pytest.mark.filterwarnings("ignore")
def test_cells_that_cannot_tell_logarithms_leave_the_question_open(caplog):
    """As the first ones, which a trainer reads beforehand, if they are empty."""
    counts = np.random.default_rng(0).poisson(3, (40, 5)) + [1.0, 0, 0, 0, 0]
    logarithms = np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)
    logarithms[:8] = 0
    stream = IterableAnnDataset(cells(IDS, counts=logarithms), fractional=True)
    stream.first_cells(0, 8)
    stream._read([(0, 20, 40)])  # as another worker does
    assert "holds logarithms" not in caplog.text
    assert len(list(stream)) == len(list(stream)) == 40
    assert caplog.text.count("holds logarithms") == 1


@pytest.mark.filterwarnings("ignore")
def test_other_feature_types_are_layers_of_their_own(tokenizer, tmp_path):
    adata = with_antibodies()
    store = CellStore.build(tmp_path / "s", adata, layer="Antibody Capture", report=False)
    assert store.rows(slice(None)).toarray().tolist() == [[80, 9], [70, 4]]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    store = CellStore.build(tmp_path / "t", tmp_path / "cells.h5ad", layer="Antibody Capture", report=False)
    assert store.rows(slice(None)).toarray().tolist() == [[80, 9], [70, 4]]
    with pytest.raises(ValueError, match="has no layer 'Peaks'; available: X, Antibody Capture"):
        tokenizer(adata, layer="Peaks")
