"""Which gene a column is: the rule, case by case, and that order and what surrounds a name change nothing."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stformer_hf.models.gene_bert.gene_columns import (
    GENES,
    GeneMatcher,
    feature_types,
    guess_species,
    resolve_genes,
    strip_version,
)

IDS = [f"ENSG{i:011d}" for i in range(1, 5)]
SYMBOLS = ["CD4", "GAPDH", "ACTB", "CD8A"]
NUMBERS = list("0123")
PLACEHOLDERS = ["nan", "NA", "NaN", "None", "<NA>", "-", "", " ", "unknown", None, np.nan, pd.NA]


@pytest.mark.parametrize(
    "column",
    ["gene_ids", "gene_id", "feature_id", "ensembl_id", "ensembl", "ENSEMBL", "ensembl_gene_id", "ensemblid"]
    + ["Accession", "gene_ids-0", "Ensembl_ID", "ensembl_ids", "ensemble_id", "Gene stable ID", "ID"],
)
@pytest.mark.parametrize("index", [SYMBOLS, NUMBERS])
def test_ids_come_from_a_column_of_any_usual_name(column, index):
    found = resolve_genes(index, {column: IDS, "gene_symbol": SYMBOLS})
    assert found.gene_ids.tolist() == IDS
    assert found.symbols.tolist() == SYMBOLS and found.genomes is None


@pytest.mark.parametrize(
    "column", ["gene_name", "feature_name", "gene_symbols", "features", "hgnc_symbol", "Symbol", "gene_short_name"]
)
def test_row_numbers_give_way_to_a_column_of_names(column):
    assert resolve_genes(NUMBERS, {column: SYMBOLS}).gene_ids.tolist() == SYMBOLS
    assert resolve_genes(["1", "4", "7", "30000"], {column: SYMBOLS}).gene_ids.tolist() == SYMBOLS  # a selection


@pytest.mark.parametrize("index", [["0", "1", "2"], ["3", "1", "2"], ["5", "17", "30000"]])
def test_row_numbers_alone_are_refused_with_the_columns_there_are(index):
    with pytest.raises(ValueError, match="these are row numbers.*its columns: n_cells, highly_variable"):
        resolve_genes(index, {"n_cells": [1, 2, 3], "highly_variable": [True] * 3})


def test_entrez_ids_are_names():
    entrez = ["105369239", "107985288", "920"]
    assert resolve_genes(entrez).gene_ids.tolist() == entrez
    assert resolve_genes(entrez, {"symbol": SYMBOLS[:3]}).gene_ids.tolist() == entrez


@pytest.mark.parametrize("blank", PLACEHOLDERS)
def test_genes_without_an_id_go_by_their_symbols_each_alone(blank):
    found = resolve_genes(SYMBOLS, {"ensembl_id": [IDS[0], IDS[1], blank, blank]})
    assert found.gene_ids.tolist() == [IDS[0], IDS[1], "ACTB", "CD8A"]
    found = resolve_genes([*IDS[:3], "CD8A"], {"gene_symbol": ["CD4", blank, "ACTB", blank]})
    assert found.symbols.tolist() == ["CD4", IDS[1], "ACTB", "CD8A"]
    assert resolve_genes([blank], {"gene_symbol": [blank]}).gene_ids.tolist() == [""]


def test_what_a_column_is_its_values_say():
    """A column named after ids that holds symbols, or labels, is none of ids."""
    assert resolve_genes(SYMBOLS, {"gene_id": SYMBOLS, "id": ["a"] * 4}).gene_ids.tolist() == SYMBOLS
    assert resolve_genes(SYMBOLS, {"feature_name": IDS}).gene_ids.tolist() == SYMBOLS
    assert resolve_genes(SYMBOLS, {"gene_ids": IDS, "ensembl": SYMBOLS}).gene_ids.tolist() == IDS
    maize = [f"Zm00001d{i:06d}" for i in range(4)]
    assert resolve_genes(SYMBOLS, {"gene_ids": maize}).gene_ids.tolist() == maize
    flies = [f"FBgn{i:07d}" for i in range(4)]
    assert resolve_genes(SYMBOLS, {"gene_ids": flies}).gene_ids.tolist() == flies


def test_versions_and_both_copies_on_x_and_y_are_one_gene(caplog):
    index = ["ENSG00000000001.5", "ENSG00000000001.5_PAR_Y", "ENSG00000000002_PAR_Y", "AC000001.1", "HLA_PAR_Y"]
    found = resolve_genes(index, {"gene_name": ["A", "A", "B", "AC000001.1", "H"]})
    assert found.gene_ids.tolist() == [IDS[0], IDS[0], IDS[1], "AC000001.1", "HLA_PAR_Y"]
    assert "2 genes of the Y chromosome's" in caplog.text
    assert strip_version("ENSMUSG00000000001.12") == "ENSMUSG00000000001"
    both = resolve_genes(index, copies=True).gene_ids.tolist()
    assert both == [IDS[0], f"{IDS[0]}_PAR_Y", f"{IDS[1]}_PAR_Y", "AC000001.1", "HLA_PAR_Y"]
    assert GeneMatcher(IDS, {}).find(both).tolist() == [0, 0, 1, -1, -1]
    assert GeneMatcher([*IDS, both[1]], {}).find(both).tolist() == [0, 4, 1, -1, -1]


@pytest.mark.parametrize("prefix", ["GRCh38_", "GRCh38______", "mm10___", "hg19_", "GRCm39_"])
def test_prefixes_of_references_are_taken_off_and_kept(prefix):
    genome = prefix.rstrip("_")
    found = resolve_genes([prefix + name for name in SYMBOLS], {"gene_ids": [prefix + name for name in IDS]})
    assert found.gene_ids.tolist() == IDS and found.symbols.tolist() == SYMBOLS
    assert found.genomes.tolist() == [genome] * 4


def test_one_name_in_two_genomes_stays_two_genes(caplog):
    found = resolve_genes(["hg19_C3", "mm10_C3", "hg19_CD4", "mm10_Cd4"])
    assert found.gene_ids.tolist() == ["hg19_C3", "mm10_C3", "CD4", "Cd4"]
    assert "genes of two genomes, such as 'C3'" in caplog.text


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_order_and_what_surrounds_names_change_no_gene(data):
    """Random columns of ids and symbols, permuted, with versions, prefixes and placeholders."""
    n = data.draw(st.integers(3, 12))
    ids = [f"ENSG{i:011d}" for i in range(n)]
    symbols = [f"SYM{i}A" for i in range(n)]
    order = data.draw(st.permutations(range(n)))
    missing = data.draw(st.sets(st.integers(0, n - 1), max_size=(n - 1) // 2))
    prefix = data.draw(st.sampled_from(["", "GRCh38_", "hg38____"]))
    version = data.draw(st.sampled_from(["", ".3", ".12"]))
    blank = data.draw(st.sampled_from(PLACEHOLDERS))
    space = data.draw(st.sampled_from(["", " "]))
    column = data.draw(st.sampled_from(["gene_ids", "Ensembl", "feature_id", "gene_ids-1"]))
    written = [blank if i in missing else space + prefix + ids[i] + version for i in order]
    expected = [symbols[i] if i in missing else ids[i] for i in order]
    names = [prefix + symbols[i] for i in order]
    in_index = data.draw(st.booleans())
    if in_index and not missing:
        found = resolve_genes(written, {"gene_name": names})
    elif data.draw(st.booleans()):
        found = resolve_genes(names, pd.DataFrame({"n_cells": range(n), column: written}))
    else:
        found = resolve_genes([str(i) for i in range(n)], {column: written, "feature_name": names})
    assert found.gene_ids.tolist() == expected
    assert found.symbols.tolist() == [symbols[i] for i in order]


# ---------------------------------------------------------------------- feature types


@pytest.mark.parametrize("name", ["feature_types", "feature_type", "modality", "Feature Type"])
def test_known_feature_types_split_the_columns(name):
    types = ["Gene Expression", "Antibody Capture", "", "CRISPR Guide Capture"]
    assert feature_types({name: types}).tolist() == [GENES, "Antibody Capture", GENES, "CRISPR Guide Capture"]
    assert feature_types({name: ["gex", "ADT", "rna", "HTO"]}).tolist() == [GENES, "ADT", GENES, "HTO"]
    assert feature_types({name: ["Gene Expression"] * 2}) is None


def test_biotypes_and_blanks_are_no_feature_types(caplog):
    assert feature_types({"feature_type": ["protein_coding", "lncRNA", ""]}) is None
    assert "no known feature type (but , lncRNA, protein_coding)" in caplog.text
    assert feature_types({"feature_types": ["", None, np.nan]}) is None
    assert feature_types({"feature_type": ["protein_coding"] * 2, "modality": ["rna", "prot"]}).tolist() == [
        GENES,
        "prot",
    ]
    assert feature_types(None) is None and feature_types({"n_cells": [1]}) is None


# ---------------------------------------------------------------------- genes of a vocabulary


def test_a_symbol_does_not_take_the_place_of_an_id():
    matcher = GeneMatcher(IDS, dict(zip(SYMBOLS, IDS, strict=True)))
    ids = [IDS[1], "ENSG00000099999", "ENSG00000099998", IDS[3]]
    # The second column's symbol is that of a gene whose id another column has; the third's of one that none has.
    assert matcher.find_columns(ids, ["CD4", "GAPDH", "ACTB", "CD8A"]).tolist() == [1, -1, 2, 3]
    moved = matcher.find_columns([IDS[1], IDS[0]], ["CD4", "GAPDH"])
    assert moved.tolist() == [1, 0]


def test_species():
    mouse = [f"ENSMUSG{i:011d}" for i in range(4)]
    assert guess_species(IDS) == "human" and guess_species([*mouse, "Cd4"]) == "mouse"
    assert guess_species(["CD4"]) is None and guess_species([*IDS, *mouse]) is None
    matcher = GeneMatcher(IDS, dict(zip(SYMBOLS, IDS, strict=True)))
    with pytest.raises(ValueError, match="genes of mouse .*the tokenizer's are of human"):
        matcher.find_columns(mouse, SYMBOLS)
    assert matcher.find_columns(mouse, SYMBOLS, match="symbol").tolist() == [0, 1, 2, 3]
    assert matcher.find_columns([*IDS, mouse[0]], [*SYMBOLS, "Cd4"]).tolist() == [0, 1, 2, 3, -1]
