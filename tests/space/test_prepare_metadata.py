"""Tables as an atlas gives them, made into what the sampler takes."""

import logging

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, read_h5ad
from conftest import with_genes
from scipy import sparse
from sklearn.preprocessing import LabelEncoder

from stformer_hf import CellStore
from stformer_hf.space.center_mask_sampler import CenterMaskSampler
from stformer_hf.space.prepare_metadata import prepare_metadata

NAMES = {"x": "x_mm", "y": "y_mm", "cell_type_colname": "class", "tissue_section_colname": "slide"}


def make_atlas(seed=0, n_cells=150) -> tuple[pd.DataFrame, AnnData]:
    """Cells 0 to 149 have metadata, cells 20 to 169 expression; names are numbers in one table only."""
    rng = np.random.default_rng(seed)
    metadata = pd.DataFrame(
        {
            "cell_label": np.arange(n_cells),
            "class": rng.choice(["Ex", "In", "As"], n_cells),
            "donor": "a",
            "slide": rng.choice(["s1", "s2"], n_cells),
            "x_mm": rng.random(n_cells) / 20,
            "y_mm": rng.random(n_cells) / 20,
            "depth": rng.random(n_cells) / 20,
        },
        index=rng.permutation(n_cells),
    )
    names = rng.permutation(np.arange(20, n_cells + 20))
    counts = rng.poisson(1, (n_cells, 6)) + 1.0
    return metadata, with_genes(AnnData(sparse.csr_matrix(counts), obs=pd.DataFrame(index=names.astype(str))))


def check(prepared, metadata, adata) -> None:
    """The cells of both tables, in the order of metadata."""
    kept = metadata[metadata["cell_label"].astype(str).isin(adata.obs_names).to_numpy()]
    table = pd.DataFrame({name: list(prepared.metadata[name]) for name in prepared.metadata.columns})
    assert set(table) == {"cell_label", "class", "slide", "cell_type", "x", "y"}
    assert table["cell_label"].tolist() == kept["cell_label"].astype(str).tolist()
    np.testing.assert_array_equal(table["x"], kept["x_mm"].to_numpy() * 1000)
    np.testing.assert_array_equal(table["y"], kept["y_mm"].to_numpy() * 1000)
    assert table["slide"].tolist() == kept["slide"].tolist()
    assert table["class"].tolist() == kept["class"].tolist()
    assert prepared.encoder.classes_[table["cell_type"]].tolist() == kept["class"].tolist()
    names = prepared.adata.obs.index if isinstance(prepared.adata, CellStore) else prepared.adata.obs_names
    assert list(names) == table["cell_label"].tolist()
    sampler = CenterMaskSampler(prepared.metadata, prepared.adata, (15, 15), tissue_section_colname="slide")
    assert len(sampler) == len(kept)
    for item in (0, 7, len(kept) - 1):
        expected = adata[str(kept["cell_label"].iloc[item])].X.toarray()
        np.testing.assert_array_equal(sampler[item].masked_expression, expected)


@pytest.mark.parametrize("kind", ["memory", "backed", "store"])
def test_cells_of_both_tables_are_kept(kind, tmp_path, caplog):
    metadata, adata = make_atlas()
    source = adata
    if kind == "backed":
        adata.write_h5ad(tmp_path / "cells.h5ad")
        source = read_h5ad(tmp_path / "cells.h5ad", backed="r")
    elif kind == "store":
        source = CellStore.build(tmp_path / "store", adata, report=False)
    before = metadata.copy()
    prepared = prepare_metadata(metadata, source, scale=1000, **NAMES)
    pd.testing.assert_frame_equal(metadata, before)
    check(prepared, metadata, adata)
    assert prepared.n_without_expression == prepared.n_without_metadata == 20
    assert "130 cells are kept; 20 without expression and 20 without metadata are left out" in caplog.text
    caplog.clear()
    prepare_metadata(metadata[20:], adata[[str(i) for i in range(20, 150)]], **NAMES)
    assert not caplog.records


def test_polars():
    polars = pytest.importorskip("polars", reason="polars is not installed")
    metadata, adata = make_atlas()
    prepared = prepare_metadata(polars.DataFrame(metadata.to_dict("list")), adata, scale=1000, **NAMES)
    assert isinstance(prepared.metadata, polars.DataFrame)
    check(prepared, metadata, adata)


def test_defaults_are_those_of_the_sampler():
    metadata, adata = make_atlas()
    metadata = metadata.rename(
        columns={"x_mm": "x", "y_mm": "y", "depth": "z", "class": "cell_type", "slide": "brain_section_label"}
    )
    prepared = prepare_metadata(metadata, adata, scale=1000)
    assert prepared.metadata["cell_type"].tolist() == [
        ["As", "Ex", "In"].index(name) for name in metadata["cell_type"][20:]
    ]
    assert list(prepared.metadata) == ["cell_label", "cell_type", "brain_section_label", "x", "y"]
    assert CenterMaskSampler(prepared.metadata, prepared.adata, 15).n_cell_types == 3
    deep = prepare_metadata(metadata, adata, z="z", scale=1000).metadata
    np.testing.assert_array_equal(deep["z"], metadata["z"].to_numpy()[20:] * 1000)
    one = prepare_metadata(metadata.drop(columns="brain_section_label"), adata, tissue_section_colname=None)
    assert list(one.metadata) == ["cell_label", "cell_type", "x", "y"]


def test_another_animal_gets_the_same_codes():
    metadata, adata = make_atlas()
    first = prepare_metadata(metadata, adata, **NAMES)
    other, other_adata = make_atlas(seed=1)
    other["class"] = np.where(other["class"] == "As", "In", other["class"])
    second = prepare_metadata(other, other_adata, encoder=first.encoder, **NAMES)
    assert second.encoder is first.encoder
    assert set(second.metadata["cell_type"]) == {1, 2}
    other["class"] = other["class"].replace("In", "OPC")
    with pytest.raises(ValueError, match="does not know 1 types of 'class', such as 'OPC'"):
        prepare_metadata(other, other_adata, encoder=first.encoder, **NAMES)
    numbers = metadata.assign(**{"class": np.arange(150) % 3 * 10})
    assert set(prepare_metadata(numbers, adata, **NAMES).metadata["cell_type"]) == {0, 1, 2}
    fitted = LabelEncoder().fit([0, 10, 20, 30])
    assert prepare_metadata(numbers, adata, encoder=fitted, **NAMES).metadata["cell_type"].max() == 2


@pytest.mark.parametrize(("scale", "message"), [(1.0, "nearly all cells"), (1000.0, None), (1e6, "no neighbour")])
def test_units_are_judged(scale, message, caplog):
    metadata, adata = make_atlas()
    with caplog.at_level(logging.WARNING):
        prepare_metadata(metadata, adata, scale=scale, patch_size=(17, 17), **NAMES)
    assert len(caplog.records) == (2 if message else 1)  # one tells of cells that are in one table only
    assert message is None or message in caplog.text


@pytest.mark.parametrize(
    ("renamed", "options", "message"),
    [
        ({"slide": "x"}, {"tissue_section_colname": "x"}, "tissue_section_colname='x'"),
        ({"slide": "y"}, {"tissue_section_colname": "y"}, "tissue_section_colname='y'"),
        ({"slide": "z"}, {"tissue_section_colname": "z", "z": "depth"}, "tissue_section_colname='z'.* 'y', 'z' of"),
        ({"slide": "cell_type"}, {"tissue_section_colname": "cell_type"}, "tissue_section_colname='cell_type'"),
        ({"cell_label": "x"}, {"cell_id_colname": "x"}, "cell_id_colname='x': the columns 'cell_type', 'x', 'y' of"),
        ({"cell_label": "cell_type"}, {"cell_id_colname": "cell_type"}, "cell_id_colname='cell_type'"),
        ({"class": "y"}, {"cell_type_colname": "y"}, "cell_type_colname='y'"),
        ({}, {"tissue_section_colname": "cell_label"}, "cell_id_colname and tissue_section_colname are both"),
        ({}, {"cell_type_colname": "cell_label"}, "cell_id_colname and cell_type_colname are both"),
    ],
)
def test_columns_of_one_name_raise(renamed, options, message):
    metadata, adata = make_atlas()
    with pytest.raises(ValueError, match=message):
        prepare_metadata(metadata.rename(columns=renamed), adata, **{**NAMES, **options})


def test_sections_by_a_z_that_is_no_coordinate_are_kept():
    metadata, adata = make_atlas()
    prepared = prepare_metadata(
        metadata.rename(columns={"slide": "z"}), adata, **{**NAMES, "tissue_section_colname": "z"}
    )
    assert prepared.metadata["z"].tolist() == metadata["slide"].tolist()[20:]


def test_tables_that_do_not_fit():
    metadata, adata = make_atlas()

    def raises(message, of=metadata, **options):
        with pytest.raises(ValueError, match=message):
            prepare_metadata(of, adata, **{**NAMES, **options})

    raises("no column 'x'; it has 'cell_label', 'class'", x="x")
    raises("no column 'brain_section_label' of tissue sections", tissue_section_colname="brain_section_label")
    raises("no column 'type'", cell_type_colname="type")
    raises(
        "No cell is in both tables, with names such as 'a' and '",
        of=metadata.assign(cell_label=list("a" * 1 + "b" * 0) + [f"c{i}" for i in range(149)]),
    )
    raises("'30' occurs twice", of=metadata.replace({"cell_label": {31: 30}}))
    raises("scale=0", scale=0)
    missing = metadata["cell_label"] == 40
    raises(
        "1 of 130 cells have no finite coordinates in 'x_mm', 'y_mm', such as 40",
        of=metadata.assign(x_mm=metadata["x_mm"].mask(missing)),
    )
    raises("1 of 130 cells have no type in 'class'", of=metadata.assign(**{"class": metadata["class"].mask(missing)}))
    raises(
        "1 of 130 cells have no section in 'slide', such as 40",
        of=metadata.assign(slide=metadata["slide"].mask(missing)),
    )
    # Cells that are left out may lack anything.
    holes = metadata.assign(x_mm=metadata["x_mm"].mask(metadata["cell_label"] < 20))
    assert prepare_metadata(holes, adata, **NAMES).n_without_expression == 20
