"""MuData and SpatialData: which table their cells are in, through every door, as objects and as files."""

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData, read_h5ad
from scipy import sparse

from stformer_hf import (
    AnnDataset,
    CellNeighborhoodConfig,
    CellNeighborhoodModel,
    CellStore,
    CenterMaskSampler,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertModel,
    GeneTokenizer,
    IterableAnnDataset,
    SingleCellMemMapDataset,
    annotate,
    embed,
    embed_neighborhoods,
    estimate_gene_medians,
    spatial_neighbors,
)
from stformer_hf.cli import main
from stformer_hf.models.gene_bert.cell_tables import choose_table
from stformer_hf.sources.open_source import open_source
from stformer_hf.sources.read_anndata import read_anndata

pytestmark = [
    # Of the packages that SpatialData objects are made and written by.
    pytest.mark.filterwarnings("ignore:Call to deprecated class Scaler:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The index of the dataframe is not monotonic:UserWarning"),
]

GENES = [f"ENSG{i:011d}" for i in range(1, 6)]
COUNTS = np.array([[1, 5, 2, 0, 3], [0, 7, 4, 2, 0], [2, 0, 0, 1, 6], [4, 1, 0, 8, 2]], np.float32)
CELLS = list("wxyz")
PROTEINS = np.array([[30, 1], [4, 9]], np.float32)
PLACES = np.array([[0.0, 1.0], [4.0, 5.0], [8.0, 3.0], [2.0, 9.0]])


@pytest.fixture
def mudata():
    return pytest.importorskip("mudata", reason="MuData needs the package mudata")


@pytest.fixture
def spatialdata():
    return pytest.importorskip("spatialdata", reason="SpatialData needs the extra spatialdata")


@pytest.fixture
def scrna() -> AnnData:
    adata = AnnData(
        sparse.csr_matrix(np.log1p(COUNTS)),
        obs=pd.DataFrame({"state": ["a", "b", "a", "b"]}, index=CELLS),
        var=pd.DataFrame(index=GENES),
    )
    adata.layers["counts"] = sparse.csr_matrix(COUNTS)
    return adata


@pytest.fixture
def mdata(mudata, scrna):
    """CITE-seq: two of the cells, in another order, have antibodies; the donor is a column of all."""
    antibodies = AnnData(PROTEINS, obs=pd.DataFrame(index=["y", "w"]), var=pd.DataFrame(index=["CD3", "CD4"]))
    antibodies.layers["clr"] = np.log1p(PROTEINS)
    both = mudata.MuData({"prot": antibodies, "rna": scrna})
    both.obs["donor"] = pd.Categorical(both.obs_names.map({"w": "d1", "x": "d2", "y": "d1", "z": "d2"}))
    both.obs["rna:state"] = "not the modality's own"
    return both


@pytest.fixture
def sdata(spatialdata):
    """Two regions: circles, whose index is not in the order of the table, and labels, scaled by two."""
    from spatialdata.models import Labels2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Scale

    circles = ShapesModel.parse(PLACES[[1, 0, 2]], geometry=0, radius=1.0, index=np.array([7, 3, 11]))
    pixels = np.zeros((12, 12), int)
    pixels[0:2, 0:2], pixels[4:5, 0:2] = 1, 9  # around (1, 4.5): at (2, 9) after the scale
    labels = Labels2DModel.parse(
        pixels, dims=("y", "x"), transformations={"global": Scale([2.0, 2.0], axes=("x", "y"))}
    )
    obs = pd.DataFrame(
        {"tissue": pd.Categorical(["circles"] * 3 + ["labels"]), "number": [3, 7, 11, 9], "state": list("abab")},
        index=CELLS,
    )
    table = AnnData(sparse.csr_matrix(COUNTS), obs=obs, var=pd.DataFrame(index=GENES))
    table = TableModel.parse(table, region=["circles", "labels"], region_key="tissue", instance_key="number")
    return spatialdata.SpatialData(shapes={"circles": circles}, labels={"labels": labels}, tables={"table": table})


def mudata_in_memory(mdata, folder):
    return mdata


def h5mu(mdata, folder):
    mdata.write(folder / "cells.h5mu")
    return folder / "cells.h5mu"


def h5mu_backed(mdata, folder):
    import mudata

    return mudata.read_h5mu(h5mu(mdata, folder), backed="r")


def mudata_zarr(mdata, folder):
    mdata.write_zarr(folder / "cells.zarr")
    return folder / "cells.zarr"


def spatialdata_in_memory(sdata, folder):
    return sdata


def spatialdata_zarr(sdata, folder):
    sdata.write(folder / "tissue.zarr")
    return folder / "tissue.zarr"


KINDS = {
    "MuData": ("mdata", mudata_in_memory),
    "h5mu": ("mdata", h5mu),
    "MuData, backed": ("mdata", h5mu_backed),
    "MuData zarr": ("mdata", mudata_zarr),
    "SpatialData": ("sdata", spatialdata_in_memory),
    "SpatialData zarr": ("sdata", spatialdata_zarr),
}


@pytest.fixture(params=KINDS)
def cells(request, tmp_path):
    """The same four cells, in whatever holds them."""
    made, held = KINDS[request.param]
    return held(request.getfixturevalue(made), tmp_path)


OBJECTS = pytest.mark.parametrize("cells", ["MuData", "MuData, backed", "SpatialData"], indirect=True)
FILES = pytest.mark.parametrize("cells", ["h5mu", "MuData zarr", "SpatialData zarr"], indirect=True)


@pytest.fixture(scope="module")
def tokenizer() -> GeneTokenizer:
    return GeneTokenizer(GENES, bin_edges=[i + 0.5 for i in range(20)])


@pytest.fixture(scope="module")
def model(tokenizer) -> GeneBertModel:
    torch.manual_seed(0)
    return GeneBertModel(GeneBertConfig.from_tokenizer(tokenizer, size="tiny", num_hidden_layers=1)).eval()


@pytest.fixture(scope="module")
def classifier(tokenizer) -> GeneBertForClassification:
    torch.manual_seed(0)
    config = GeneBertConfig.from_tokenizer(tokenizer, size="tiny", num_hidden_layers=1, num_labels=2)
    return GeneBertForClassification(config).eval()


def table_of(cells) -> AnnData:
    return cells.mod["rna"] if hasattr(cells, "mod") else cells.tables["table"]


@pytest.fixture
def plain() -> AnnData:
    return AnnData(COUNTS, obs=pd.DataFrame(index=CELLS), var=pd.DataFrame(index=GENES))


# ---------------------------------------------------------------------- every door


def test_a_store_has_the_cells_and_their_obs(cells, tmp_path):
    store = CellStore.build(tmp_path / "store", cells, obs="all", report=False)
    assert store.gene_ids.tolist() == GENES
    np.testing.assert_array_equal(store.rows(slice(None)).toarray(), COUNTS)
    assert store.obs.index.tolist() == CELLS
    assert store.obs["state"].tolist() == ["a", "b", "a", "b"]
    if "donor" in store.obs:
        assert store.obs["donor"].tolist() == ["d1", "d2", "d1", "d2"]
        assert "rna:state" not in store.obs
    else:
        assert store.obs["tissue"].tolist() == ["circles"] * 3 + ["labels"]


def test_a_mudata_gives_its_own_obs_too(mdata, tmp_path):
    """What the modality has already keeps its values."""
    for number, source in enumerate([mdata, h5mu(mdata, tmp_path), mudata_zarr(mdata, tmp_path)]):
        store = CellStore.build(tmp_path / f"store{number}", source, obs="all", report=False)
        assert sorted(store.obs.columns) == ["donor", "state"]


def test_modalities_of_a_file_are_told_apart_by_an_interrupted_build(mudata, scrna, tmp_path):
    file = h5mu(mudata.MuData({"rna": scrna, "velocity": scrna.copy()}), tmp_path)
    assert open_source(file, "rna:counts").key == open_source(file, "rna:counts").key
    assert open_source(file, "rna:counts").key != open_source(file, "velocity:counts").key


def test_a_stream_and_its_medians(cells):
    stream = IterableAnnDataset(cells)
    found = np.zeros((4, 5))
    for cell in stream:
        found[cell["cell_id"], cell["genes"]] = cell["counts"]
    np.testing.assert_array_equal(found, COUNTS)
    plain = AnnData(COUNTS, var=pd.DataFrame(index=GENES))
    assert estimate_gene_medians(cells).medians == estimate_gene_medians(plain).medians


def test_a_dataset_of_dense_rows(cells):
    layer = "counts" if "cells" in str(cells) or hasattr(cells, "mod") else "X"
    data = AnnDataset(cells, layer=layer)
    np.testing.assert_array_equal(torch.stack([item["X"] for item in data]).numpy(), COUNTS)
    assert data[1]["obs_state"] == "b"


@FILES
def test_scdl(cells, tmp_path):
    data = SingleCellMemMapDataset(tmp_path / "scdl", cells)
    expected = COUNTS if cells.name == "tissue.zarr" else np.log1p(COUNTS)  # it reads raw or X, whatever is there
    np.testing.assert_array_equal([data.get_row_padded(i)[0] for i in range(4)], expected)


@OBJECTS
def test_the_tokenizer(cells, plain, tokenizer):
    assert tokenizer(cells)["input_ids"] == tokenizer(plain)["input_ids"]


def test_the_tokenizer_sees_phenotypes_of_the_whole(mdata, plain):
    phenotypes = {"phenotypes": {"donor": ["d1", "d2"]}, "included_phenotypes": ["donor"]}
    tokenizer = GeneTokenizer(GENES, bin_edges=[i + 0.5 for i in range(20)], **phenotypes)
    plain.obs["donor"] = ["d1", "d2", "d1", "d2"]
    assert tokenizer(mdata)["input_ids"] == tokenizer(plain)["input_ids"]


@OBJECTS
def test_embed_writes_into_the_table(cells, plain, model, tokenizer):
    embed(cells, model, tokenizer=tokenizer)
    embed(plain, model, tokenizer=tokenizer)
    np.testing.assert_array_equal(table_of(cells).obsm["X_stformer"], plain.obsm["X_stformer"])


@OBJECTS
def test_annotate_writes_into_the_table(cells, plain, classifier, tokenizer):
    annotate(cells, classifier, tokenizer=tokenizer)
    annotate(plain, classifier, tokenizer=tokenizer)
    assert table_of(cells).obs["stformer_label"].tolist() == plain.obs["stformer_label"].tolist()
    assert "rna:state" not in table_of(cells).obs


@FILES
def test_commands_write_the_table(cells, plain, classifier, tokenizer, tmp_path):
    classifier.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    embed(plain, classifier, tokenizer=tokenizer)
    for verb in ("embed", "annotate"):
        output = str(tmp_path / f"{verb}.h5ad")
        main([verb, "--data", str(cells), "--model", str(tmp_path / "model"), "--output", output])
    found = read_h5ad(tmp_path / "embed.h5ad")
    assert found.obs_names.tolist() == CELLS
    np.testing.assert_allclose(found.obsm["X_stformer"], plain.obsm["X_stformer"], atol=1e-6)
    assert "stformer_label" in read_h5ad(tmp_path / "annotate.h5ad").obs
    if cells.name == "tissue.zarr":
        np.testing.assert_allclose(found.obsm["spatial"], PLACES)
    else:
        assert found.obs["donor"].tolist() == ["d1", "d2", "d1", "d2"]
    main(["build", "--data", str(cells), "--output", str(tmp_path / "store")])
    np.testing.assert_array_equal(CellStore(tmp_path / "store").rows(slice(None)).toarray(), COUNTS)


# ---------------------------------------------------------------------- the choice


@pytest.mark.parametrize("held", [mudata_in_memory, h5mu, mudata_zarr])
def test_a_modality_and_its_layer_are_named(held, mdata, tokenizer, tmp_path):
    source = held(mdata, tmp_path)
    store = CellStore.build(tmp_path / "store", source, layer="prot", report=False)
    assert store.obs.index.tolist() == ["y", "w"]
    np.testing.assert_array_equal(store.rows(slice(None)).toarray(), PROTEINS)
    np.testing.assert_array_equal(AnnDataset(source, layer="prot")[0]["X"], PROTEINS[0])
    np.testing.assert_allclose(AnnDataset(source, layer="prot:clr")[0]["X"], np.log1p(PROTEINS[0]))
    assert open_source(source, "rna:counts").counts_in == open_source(source, "counts").counts_in == "counts"
    with pytest.raises(ValueError, match="modality 'rna' has no layer 'protein'; available: X, counts"):
        open_source(source, "protein")


@pytest.mark.parametrize("held", [mudata_in_memory, h5mu])
def test_several_modalities_of_genes_are_a_choice(held, mudata, scrna, tokenizer, tmp_path):
    scrna.var["feature_types"] = "Gene Expression"
    both = mudata.MuData({"nuclei": scrna, "whole": scrna[::-1].copy()})
    source = held(both, tmp_path)
    for door in (open_source, AnnDataset, lambda data: CellStore.build(tmp_path / "store", data)):
        with pytest.raises(ValueError, match="2 modalities to choose from: 'nuclei', 'whole'.*layer='nuclei'"):
            door(source)
    with pytest.raises(ValueError, match="'nuclei', 'whole'"):
        tokenizer(both)
    assert open_source(source, "whole").obs.index.tolist() == CELLS[::-1]
    assert len(tokenizer(both, layer="whole:counts")["input_ids"]) == 4


PLAIN = {"n_cells": [3, 3]}
EXPRESSION, ANTIBODIES = ({"feature_types": [kind] * 2} for kind in ("Gene Expression", "Antibody Capture"))
CHOICES = {
    "rna of several": ({"rna": EXPRESSION, "rna_nuclei": EXPRESSION}, "rna"),
    "what feature types tell": ({"ADT": ANTIBODIES, "cells": EXPRESSION, "other": PLAIN}, "cells"),
    "rna that is none": ({"rna": ANTIBODIES, "cells": EXPRESSION}, "cells"),
    "what names tell": ({"gex": PLAIN, "atac": PLAIN}, "gex"),
    "what others are not": ({"prot": PLAIN, "expressed": PLAIN}, "expressed"),
    "the only one": ({"cells": PLAIN}, "cells"),
    "two": ({"left": PLAIN, "right": PLAIN}, "'left', 'right'"),
    "none of genes": ({"prot": PLAIN, "hto": PLAIN}, "no modality whose features are genes; it has 'prot', 'hto'"),
    "nothing": ({}, "has no modality"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_the_modality_of_genes(case):
    modalities, expected = CHOICES[case]
    read = {name: (lambda columns=columns: pd.DataFrame(columns)) for name, columns in modalities.items()}
    if expected in modalities:
        assert choose_table(read, None, "cells.h5mu", "modality") == (expected, None)
    else:
        with pytest.raises(ValueError, match=f"cells.h5mu.*{expected}"):
            choose_table(read, None, "cells.h5mu", "modality")


def test_the_longest_name_that_fits_is_the_modality():
    read = dict.fromkeys(("rna", "rna:old"), pd.DataFrame)
    assert choose_table(read, "rna:old:counts", "", "modality") == ("rna:old", "counts")
    assert choose_table(read, "rna:counts", "", "modality") == ("rna", "counts")


@pytest.mark.parametrize("held", [spatialdata_in_memory, spatialdata_zarr])
def test_several_tables_are_a_choice(held, sdata, tokenizer, tmp_path):
    sdata.tables["fine"] = sdata.tables["table"][2:].copy()
    source = held(sdata, tmp_path)
    with pytest.raises(ValueError, match="2 tables to choose from: .*'fine'.*Name one: layer="):
        open_source(source)
    assert open_source(source, "fine").shape == (2, 5)
    with pytest.raises(ValueError, match="2 tables"):
        spatial_neighbors(sdata)
    spatial_neighbors(sdata, layer="table")
    assert "spatial_connectivities" in sdata.tables["table"].obsp


@pytest.mark.parametrize("held", [spatialdata_in_memory, spatialdata_zarr])
def test_no_table(held, sdata, tokenizer, tmp_path):
    del sdata.tables["table"]
    source = held(sdata, tmp_path)
    for door in (open_source, AnnDataset):
        with pytest.raises(ValueError, match="has no table.*sdata.aggregate"):
            door(source)
    with pytest.raises(ValueError, match="has no table"):
        tokenizer(sdata)


# ---------------------------------------------------------------------- coordinates


def test_coordinates_are_centroids_in_the_global_system(sdata, tmp_path):
    path = spatialdata_zarr(sdata, tmp_path)
    spatial_neighbors(sdata, "knn", n_neighbors=1)
    for table in (sdata.tables["table"], read_anndata(path)[0]):
        np.testing.assert_allclose(table.obsm["spatial"], PLACES)
    graph = sdata.tables["table"].obsp["spatial_connectivities"]
    assert graph[:3].nnz and not graph[3].nnz, "the region is the section"


def test_coordinates_that_are_there_stay(sdata, tmp_path):
    sdata.tables["table"].obsm["spatial"] = PLACES + 100
    path = spatialdata_zarr(sdata, tmp_path)
    spatial_neighbors(sdata)
    for table in (sdata.tables["table"], read_anndata(path)[0]):
        np.testing.assert_array_equal(table.obsm["spatial"], PLACES + 100)


def test_polygons_and_points(spatialdata):
    from shapely import Polygon
    from spatialdata.models import PointsModel, ShapesModel, TableModel

    geopandas = pytest.importorskip("geopandas", reason="polygons need geopandas, which comes with spatialdata")
    squares = [Polygon([(x, y), (x + 2, y), (x + 2, y + 2), (x, y + 2)]) for x, y in ((0, 0), (10, 4))]
    shapes = ShapesModel.parse(geopandas.GeoDataFrame(geometry=squares, index=["cell-b", "cell-a"]))
    spots = PointsModel.parse(pd.DataFrame({"x": [5.0, 6.0], "y": [7.0, 8.0]}, index=[20, 10]))
    for name, element, instances, expected in (
        ("cells", shapes, ["cell-a", "cell-b"], [[11, 5], [1, 1]]),
        ("spots", spots, [10, 20], [[6, 8], [5, 7]]),
    ):
        obs = pd.DataFrame({"region": pd.Categorical([name] * 2), "instance": instances}, index=["0", "1"])
        table = AnnData(COUNTS[:2], obs=obs, var=pd.DataFrame(index=GENES))
        table = TableModel.parse(table, region=name, region_key="region", instance_key="instance")
        sdata = spatialdata.SpatialData.init_from_elements({name: element, "table": table})
        spatial_neighbors(sdata)
        np.testing.assert_allclose(sdata.tables["table"].obsm["spatial"], expected)


@pytest.mark.filterwarnings("ignore")
def test_instances_that_do_not_match(sdata, tmp_path):
    sdata.tables["table"].obs["number"] = [3, 8, 11, 9]
    path = spatialdata_zarr(sdata, tmp_path)
    expected = "1 of 3 cells of the region 'circles' have no instance in it, such as 8"
    with pytest.raises(ValueError, match=expected):
        spatial_neighbors(sdata)
    with pytest.raises(ValueError, match=f"tissue.zarr.*{expected}"):
        read_anndata(path)
    assert open_source(path).shape == (4, 5), "counts need no coordinates"


@pytest.mark.filterwarnings("ignore")
def test_an_element_that_is_not_there_or_elsewhere(sdata):
    from spatialdata.transformations import Identity, set_transformation

    set_transformation(sdata["circles"], {"aligned": Identity()}, set_all=True)
    with pytest.raises(ValueError, match="'circles' is not in the coordinate system 'global', but in 'aligned'"):
        spatial_neighbors(sdata)
    del sdata.shapes["circles"]
    with pytest.raises(ValueError, match="annotates 'circles', which is missing; available: 'labels'"):
        spatial_neighbors(sdata)


def test_without_the_package_the_error_names_the_extra(sdata, tmp_path, monkeypatch):
    path = spatialdata_zarr(sdata, tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "spatialdata", None)
    with pytest.raises(ImportError, match=r"stformer_hf\[spatialdata\]"):
        read_anndata(path)
    np.testing.assert_array_equal(next(open_source(path).blocks(9)).toarray(), COUNTS)


def test_neighborhoods_of_a_tissue(sdata):
    torch.manual_seed(0)
    model = CellNeighborhoodModel(CellNeighborhoodConfig.from_size("tiny", n_genes=5, n_cell_types=1)).eval()
    sampler = CenterMaskSampler.from_anndata(sdata, None, k_nearest=2)
    assert sampler.lengths.tolist() == [3, 3, 3, 1], "the region is the section"
    embed_neighborhoods(sdata, model, k_nearest=2)
    table = sdata.tables["table"]
    plain = AnnData(COUNTS, obs=table.obs[["tissue"]], var=table.var, obsm={"spatial": PLACES})
    embed_neighborhoods(plain, model, k_nearest=2, section_key="tissue")
    np.testing.assert_allclose(table.obsm["X_neighborhood"], plain.obsm["X_neighborhood"], atol=1e-6)


def test_pretraining_on_a_tissue_takes_its_regions_for_sections(sdata, tmp_path):
    from transformers import TrainingArguments

    from stformer_hf.cli.pretrain_neighborhood import PretrainNeighborhoodArguments, open_sections

    path = spatialdata_zarr(sdata, tmp_path)
    arguments = PretrainNeighborhoodArguments(data=[str(path)], output=str(tmp_path / "out"))
    found = open_sections(arguments, TrainingArguments(str(tmp_path / "out")))
    np.testing.assert_allclose(found.metadata[["x", "y"]], PLACES)
    assert found.metadata["section"].tolist() == ["circles"] * 3 + ["labels"]


def test_training_with_neighbours_makes_the_graph_of_a_tissue(sdata, tmp_path):
    from transformers import TrainingArguments

    from stformer_hf.cli.runs import open_cells

    path = spatialdata_zarr(sdata, tmp_path)
    arguments = TrainingArguments(str(tmp_path / "out"))
    store = open_cells([str(path)], arguments, [], "table:X", False, neighbors="spatial_connectivities")
    assert np.diff(store.neighbors(slice(None)).indptr).tolist() == [2, 2, 2, 0]


# ---------------------------------------------------------------------- damage


def test_a_truncated_h5mu(mdata, tmp_path):
    path = h5mu(mdata, tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    for door in (open_source, AnnDataset, read_anndata, lambda data: CellStore.build(tmp_path / "store", data)):
        with pytest.raises(ValueError, match="cells.h5mu is not a readable HDF5 file, or is truncated"):
            door(path)


def test_a_modality_without_var(mdata, tmp_path):
    path = h5mu(mdata, tmp_path)
    with h5py.File(path, "r+") as file:
        del file["mod/rna/var"]
    for door in (open_source, read_anndata):
        with pytest.raises(ValueError, match="cells.h5mu is damaged: it has no mod/rna/var"):
            door(path)


def test_cells_that_the_whole_does_not_know(mdata, mudata, caplog):
    mdata.obs = mdata.obs.rename(index={"z": "other"})
    assert open_source(mdata).obs["donor"].tolist()[:3] == ["d1", "d2", "d1"]
    assert open_source(mdata).obs["donor"].isna().tolist() == [False, False, False, True]
    assert "1 of 4 cells of the modality 'rna' are not in the MuData's obs" in caplog.text


def test_a_folder_with_an_h5mu(mdata, tmp_path):
    h5mu(mdata, tmp_path)
    assert len(CellStore.build(tmp_path / "store", [tmp_path], report=False)) == 4
