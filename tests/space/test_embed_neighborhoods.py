"""embed_neighborhoods against the model on one cell at a time, with neighbours found by looking at every cell."""

import logging

import numpy as np
import pytest
import torch
from anndata import AnnData, read_h5ad
from conftest import make_adata
from scipy import sparse

from stformer_hf import CellNeighborhoodConfig, CellNeighborhoodForMaskedCell, CellNeighborhoodModel, GeneBertModel
from stformer_hf.space import embed_neighborhoods as neighborhoods
from stformer_hf.space.center_mask_sampler import NeighborhoodMetadata
from stformer_hf.space.embed_neighborhoods import embed_neighborhoods
from stformer_hf.space.neighborhood_collator import collate

SIDE = 5.0
LOGGER = "stformer_hf.space.embed_neighborhoods"


@pytest.fixture
def section() -> AnnData:
    """Two sections of 30 cells at the same places, quarters apart; cell 7 is far from all."""
    adata = make_adata()
    rng = np.random.default_rng(1)
    adata.obsm["spatial"] = np.tile(rng.integers(0, 60, (30, 2)) / 4, (2, 1))
    adata.obsm["spatial"][7] = 1000
    adata.obs["slice"] = np.repeat(["s2", "s1"], 30)
    return adata


def make_model(adata, seed=0, **fields) -> CellNeighborhoodModel:
    torch.manual_seed(seed)
    config = CellNeighborhoodConfig(
        **{
            "n_genes": adata.n_vars,
            "n_cell_types": 2,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "initializer_range": 0.3,
            "gene_ids": adata.var_names.tolist(),
            "cell_types": ["T cell", "B cell"],
            "neighborhood": {"patch_size": SIDE, "shape": "box", "min_neighbors": 1, "neighbors_from": "indices"},
            **fields,
        }
    )
    return CellNeighborhoodModel(config).eval()


@torch.no_grad()
def one_by_one(adata, model, counts, sections, types, near, typed=False) -> np.ndarray:
    """Embed each cell by itself, with masks; `near` tells of two differences in place whether they are neighbours."""
    places, results = adata.obsm["spatial"], []
    for cell in range(adata.n_obs):
        around = [
            other
            for other in range(adata.n_obs)
            if other != cell and sections[other] == sections[cell] and near(places[other] - places[cell])
        ]
        item = NeighborhoodMetadata(counts[around], counts[[cell]], types[around], types[[cell]], len(around))
        outputs = model(**collate([item]))
        results.append(outputs.typed_neighborhood_embedding if typed else outputs.neighborhood_embedding)
    return torch.cat(results).numpy()


def in_box(apart) -> bool:
    return bool((np.abs(apart) <= SIDE / 2).all())


def expected_of(adata, model, **options) -> np.ndarray:
    types = (adata.obs["cell_type"] == "B cell").to_numpy().astype(np.int64)  # the model numbers T cells first
    counts = adata.X.toarray()
    return one_by_one(adata, model, counts, adata.obs["slice"].tolist(), types, **{"near": in_box, **options})


KEYS = {"section_key": "slice", "cell_type_key": "cell_type"}


@pytest.mark.parametrize("batch_size", [1, 7, 100])
@pytest.mark.parametrize("with_cell_type", [False, True])
def test_embeddings_are_those_of_each_cell_alone(section, batch_size, with_cell_type, caplog, monkeypatch):
    monkeypatch.setattr(neighborhoods, "_ROWS_PER_BLOCK", 23)
    model = make_model(section)
    with caplog.at_level(logging.WARNING, LOGGER):
        embed_neighborhoods(section, model, **KEYS, batch_size=batch_size, with_cell_type=with_cell_type)
    embedding = section.obsm["X_neighborhood"]
    assert embedding.dtype == np.float32 and embedding.shape == (60, 16)
    expected = expected_of(section, model, typed=with_cell_type)
    np.testing.assert_allclose(embedding, expected, atol=1e-5)
    assert np.ptp(expected, axis=0).max() > 0.1  # not by being all alike
    others = np.delete(section.obsm["spatial"][:30], 7, axis=0)
    n_lonely = sum(not any(in_box(a - b) for b in np.delete(others, i, axis=0)) for i, a in enumerate(others))
    there = section.obsm["spatial"][30:]
    n_lonely += 1 + sum(not any(in_box(a - b) for b in np.delete(there, i, axis=0)) for i, a in enumerate(there))
    assert f"{n_lonely} of 60 cells have no neighbours" in caplog.text


@pytest.mark.parametrize("use_expression", [True, False])
def test_embeddings_of_cells_are_read(section, use_expression):
    section.obsm["X_stformer"] = np.random.default_rng(0).normal(size=(60, 3))
    model = make_model(section, cell_embedding_size=3, use_expression=use_expression)
    embed_neighborhoods(section, model, **KEYS, cell_embedding_key="X_stformer", batch_size=9)
    places, slices = section.obsm["spatial"], section.obs["slice"].to_numpy()
    types = torch.from_numpy((section.obs["cell_type"] == "B cell").to_numpy().astype(np.int64))
    for cell in range(60):
        near = [i for i in range(60) if i != cell and slices[i] == slices[cell] and in_box(places[i] - places[cell])]
        with torch.no_grad():
            outputs = model(
                observed_expression=torch.from_numpy(section.X[near].toarray()),
                observed_cell_type=types[near],
                cell_embeds=torch.from_numpy(section.obsm["X_stformer"][near]).float(),
                cu_seq_lens=torch.tensor([0, len(near)], dtype=torch.int32),
            )
        found = section.obsm["X_neighborhood"][cell]
        np.testing.assert_allclose(found, outputs.neighborhood_embedding[0].numpy(), atol=1e-5)


def test_an_embedding_without_types_has_not_seen_the_cell(section):
    """Other counts and another type of a cell change its neighbours' embeddings, and not its own."""
    model = make_model(section, cell_types=["B cell", "T cell"])
    embed_neighborhoods(section, model, **KEYS)
    before = section.obsm["X_neighborhood"]
    places = section.obsm["spatial"]
    cell = 30 + int(np.argmax([sum(map(in_box, places[30:] - place)) for place in places[30:]]))
    counts = section.X.toarray()
    counts[cell] = 9
    section.X = sparse.csr_matrix(counts)
    types = section.obs["cell_type"].to_numpy(object)
    types[cell] = {"B cell": "T cell", "T cell": "B cell"}[types[cell]]
    section.obs["cell_type"] = types
    embed_neighborhoods(section, model, **KEYS)
    changed = np.abs(section.obsm["X_neighborhood"] - before).max(axis=1) > 1e-6
    around = [i >= 30 and i != cell and in_box(places[i] - places[cell]) for i in range(60)]
    assert changed.tolist() == around and any(around)


def test_options_are_the_models_and_those_given_go_over_them(section):
    model = make_model(section)
    embed_neighborhoods(section, model, **KEYS, patch_size=8.0, shape="disc", key_added="disc")
    expected = expected_of(section, model, near=lambda apart: (apart**2).sum() <= 16)
    np.testing.assert_allclose(section.obsm["disc"], expected, atol=1e-5)
    settings = section.uns["stformer_neighborhood"]
    assert (settings["patch_size"], settings["shape"], settings["section_key"]) == (8.0, "disc", "slice")
    assert "min_neighbors" not in settings and "k_nearest" not in settings
    embed_neighborhoods(section, model, **KEYS, patch_size=None, k_nearest=3)
    assert section.uns["stformer_neighborhood"]["k_nearest"] == 3
    bare = make_model(section, neighborhood=None)
    with pytest.raises(ValueError, match="pass patch_size, in the units of the coordinates, or k_nearest"):
        embed_neighborhoods(section, bare, **KEYS)
    embed_neighborhoods(section, bare, **KEYS, patch_size=(8.0, 2.0), key_added="flat")
    expected = expected_of(section, bare, near=lambda apart: abs(apart[0]) <= 4 and abs(apart[1]) <= 1)
    np.testing.assert_allclose(section.obsm["flat"], expected, atol=1e-5)


def test_a_random_part_of_the_neighbours_depends_on_the_seed_alone(section):
    model = make_model(section, neighborhood={"patch_size": 20.0, "max_num_cells": 3})
    found = {}
    for name, options in {"a": {"batch_size": 5}, "b": {"batch_size": 64}, "c": {"seed": 1}}.items():
        embed_neighborhoods(section, model, **KEYS, **options)
        found[name] = section.obsm["X_neighborhood"]
    np.testing.assert_allclose(found["a"], found["b"], atol=1e-5)
    assert np.abs(found["a"] - found["c"]).max() > 1e-3


def test_genes_in_another_order_or_under_other_names_are_the_same_genes(section, caplog):
    model = make_model(section)
    embed_neighborhoods(section, model, **KEYS)
    expected = section.obsm["X_neighborhood"]
    order = np.random.default_rng(0).permutation(section.n_vars)
    for dense in (False, True):
        shuffled = section[:, order].copy()
        shuffled.var["ensembl_id"] = shuffled.var_names + ".3"  # versions
        shuffled.var_names = [f"symbol{i}" for i in range(section.n_vars)]
        if dense:
            shuffled.X = shuffled.X.toarray()
        embed_neighborhoods(shuffled, model, **KEYS)
        np.testing.assert_allclose(shuffled.obsm["X_neighborhood"], expected, atol=1e-5)
    assert "genes" not in caplog.text
    of_another_release = make_model(section, gene_ids=[f"{gene}.2" for gene in section.var_names])
    embed_neighborhoods(shuffled, of_another_release, **KEYS)
    np.testing.assert_allclose(shuffled.obsm["X_neighborhood"], expected, atol=1e-5)
    by_symbol = make_model(shuffled, gene_ids=[f"symbol{i}" for i in np.argsort(order)])
    embed_neighborhoods(shuffled, by_symbol, **KEYS)
    np.testing.assert_allclose(shuffled.obsm["X_neighborhood"], expected, atol=1e-5)


def test_genes_that_are_missing_are_0_and_those_that_come_twice_are_summed(section, caplog):
    model = make_model(section)
    totals = np.asarray(section.X.sum(axis=0)).ravel()
    lost = np.argsort(totals)[:10]
    kept = np.setdiff1d(np.arange(section.n_vars), lost)
    cut = section[:, kept].copy()
    with caplog.at_level(logging.WARNING, LOGGER):
        embed_neighborhoods(cut, model, **KEYS)
    assert "10 of the model's 40 genes are not in the data" in caplog.text
    emptied = section.copy()
    emptied.X = sparse.csr_matrix(section.X.toarray() * np.isin(np.arange(section.n_vars), kept))
    np.testing.assert_allclose(cut.obsm["X_neighborhood"], expected_of(emptied, model), atol=1e-5)
    # Half of each count in a column of its own, and genes that the model does not know.
    halves = section.X.toarray() // 2
    strange = np.ones((60, 3), np.float32)
    twice = AnnData(
        sparse.csr_matrix(np.hstack([halves, strange, section.X.toarray() - halves])),
        obs=section.obs,
        obsm={"spatial": section.obsm["spatial"]},
    )
    twice.var_names = [f"c{i}" for i in range(83)]
    twice.var["gene_id"] = [*section.var_names, "ENSG99999999991", "ENSG99999999992", "other", *section.var_names]
    with caplog.at_level(logging.WARNING, LOGGER):
        embed_neighborhoods(twice, model, **KEYS)
    np.testing.assert_allclose(twice.obsm["X_neighborhood"], expected_of(section, model), atol=1e-5)
    assert (
        "The model knows 80 of 83 genes of the data" in caplog.text and "40 columns have the same gene" in caplog.text
    )


def test_too_few_known_genes_are_refused(section):
    strange = section.copy()
    strange.var_names = [f"Gene{i}" for i in range(section.n_vars)]
    with pytest.raises(ValueError, match=r"has 0 of the model's 40 genes .*like Gene0, Gene1, Gene2.*like ENSG0"):
        embed_neighborhoods(strange, make_model(section), **KEYS)
    nameless = make_model(section, gene_ids=None)
    embed_neighborhoods(strange, nameless, **KEYS)  # taken as they come
    np.testing.assert_allclose(strange.obsm["X_neighborhood"], expected_of(section, nameless), atol=1e-5)
    with pytest.raises(ValueError, match="X has 39 genes, but the model reads 40"):
        embed_neighborhoods(strange[:, :39].copy(), nameless, **KEYS)
    repeated = make_model(section, gene_ids=[*section.var_names[:39], section.var_names[0]])
    with pytest.raises(ValueError, match="multiple columns named ENSG00000000000"):
        embed_neighborhoods(section, repeated, **KEYS)


@pytest.mark.parametrize("where", ["layer", "raw", "dense", "csc", "backed", "backed_raw", "backed_layer", "view"])
def test_counts_are_found_where_they_are(section, where, tmp_path):
    model = make_model(section)
    expected = expected_of(section, model)
    counts = section.X.copy()
    adata = section
    if where.endswith(("layer", "raw")):
        if where.endswith("raw"):
            adata.raw = section.copy()
        else:
            adata.layers["counts"] = counts
        adata.X = np.log1p(counts.toarray()) + 0.1
    elif where == "dense":
        adata.X = counts.toarray()
    elif where == "csc":
        adata.X = sparse.csc_matrix(counts)
    elif where == "view":
        adata = section[np.arange(60)]
    if where.startswith("backed"):
        adata.write_h5ad(tmp_path / "cells.h5ad")
        adata = read_h5ad(tmp_path / "cells.h5ad", backed="r")
    embed_neighborhoods(adata, model, **KEYS)
    np.testing.assert_allclose(adata.obsm["X_neighborhood"], expected, atol=1e-5)
    found = {"layer": "counts", "raw": "raw"}.get(where.removeprefix("backed_"), "X")
    assert adata.uns["stformer_neighborhood"]["counts_in"] == found


def test_a_matrix_that_has_the_models_columns_is_not_copied(section):
    model = make_model(section)
    for adata, layer in ((section, None), (section, "counts")):
        if layer:
            adata.layers[layer] = section.X.copy()
        counts, source = neighborhoods._in_genes_of(adata, layer, False, model.config)
        own = adata.X if layer is None else adata.layers[layer]
        assert np.shares_memory(counts.X.data, own.data) and source.counts_in == (layer or "X")


def test_a_model_of_log1p_gets_log1p(section):
    model = make_model(section, apply_log1p=False)
    embed_neighborhoods(section, model, **KEYS)
    logs = section.copy()
    logs.X = section.X.log1p()
    np.testing.assert_allclose(section.obsm["X_neighborhood"], expected_of(logs, model), atol=1e-5)
    with pytest.raises(ValueError, match="no counts found"):
        embed_neighborhoods(logs, model, **KEYS)


def test_all_values_are_looked_at(section):
    section.X = section.X.toarray()
    section.X[50, 3] = 0.5
    with pytest.raises(ValueError, match="fractional values"):
        embed_neighborhoods(section, make_model(section), **KEYS, layer="X")


def test_a_checkpoint_serves_and_its_head_is_not_used(section, tmp_path):
    torch.manual_seed(3)
    whole = CellNeighborhoodForMaskedCell(make_model(section, hidden_dropout_prob=0.5).config)
    whole.save_pretrained(tmp_path / "m")
    embed_neighborhoods(section, str(tmp_path / "m"), **KEYS)
    expected = section.obsm["X_neighborhood"]
    assert section.uns["stformer_neighborhood"]["model"] == str(tmp_path / "m")
    embed_neighborhoods(section, whole.train(), **KEYS)
    np.testing.assert_allclose(section.obsm["X_neighborhood"], expected, atol=1e-6)
    assert all(module.training for module in whole.modules())  # as it was given
    np.testing.assert_allclose(expected, expected_of(section, whole.eval().cell_neighborhood), atol=1e-5)
    section.write_h5ad(tmp_path / "out.h5ad")
    back = read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(back.obsm["X_neighborhood"], section.obsm["X_neighborhood"])
    assert back.uns["stformer_neighborhood"]["patch_size"] == SIDE
    assert back.uns["stformer_neighborhood"]["embedding"] == "neighborhood_embedding"


def test_settings_with_sides_are_written(section, tmp_path):
    embed_neighborhoods(section, make_model(section), **KEYS, patch_size=(8.0, 2.0), discretize=True)
    section.write_h5ad(tmp_path / "out.h5ad")
    settings = read_h5ad(tmp_path / "out.h5ad").uns["stformer_neighborhood"]
    assert settings["patch_size"].tolist() == [8, 2] and settings["discretize"]


def test_types_are_known_by_name_or_by_number(section):
    model = make_model(section)
    embed_neighborhoods(section, model, **KEYS)
    expected = section.obsm["X_neighborhood"]
    nameless = make_model(section, cell_types=None)  # the same weights
    numbers = (section.obs["cell_type"] == "B cell").astype(int)
    section.obs["number"] = numbers
    section.obs["ordered"] = section.obs["cell_type"].cat.reorder_categories(["T cell", "B cell"])
    for key in ("number", "ordered"):
        embed_neighborhoods(section, nameless, section_key="slice", cell_type_key=key)
        np.testing.assert_allclose(section.obsm["X_neighborhood"], expected, atol=1e-6)
    section.obs["number"] = 1  # the only one that is there keeps its number
    embed_neighborhoods(section, nameless, section_key="slice", cell_type_key="number")
    ones = section.obsm["X_neighborhood"]
    section.obs["cell_type"] = "B cell"
    embed_neighborhoods(section, model, **KEYS)
    np.testing.assert_allclose(ones, section.obsm["X_neighborhood"], atol=1e-6)
    section.obs["number"] = 2
    with pytest.raises(ValueError, match="type number 2, but the model knows only 2"):
        embed_neighborhoods(section, nameless, section_key="slice", cell_type_key="number")
    single = make_model(section, n_cell_types=1, cell_types=["cell"])
    embed_neighborhoods(section, single, section_key="slice")
    alone = one_by_one(
        section, single, section.X.toarray(), section.obs["slice"].tolist(), np.zeros(60, np.int64), near=in_box
    )
    np.testing.assert_allclose(section.obsm["X_neighborhood"], alone, atol=1e-5)


def test_bad_input_is_refused_and_nothing_is_written(section, config):
    model = make_model(section)
    before = set(section.obs), set(section.obsm), set(section.uns)

    def refuses(words, adata=section, model=model, **options):
        with pytest.raises(ValueError, match=words):
            embed_neighborhoods(adata, model, **{**KEYS, **options})

    refuses("'patchsize' of neighbourhoods; the closest known one is patch_size", patchsize=3)
    refuses("No option 'indices'", indices=[1])
    refuses("is a gene_bert. .* embed --kind cells", model=GeneBertModel(config))
    refuses("cell_embedding_key=None, but the model reads .* size 4", model=make_model(section, cell_embedding_size=4))
    refuses("cell_embedding_key='spatial', but the model reads .* size 0", cell_embedding_key="spatial")
    refuses("no obsm\\['X_y'\\]", model=make_model(section, cell_embedding_size=4), cell_embedding_key="X_y")
    refuses("'new_option' .* a newer version", model=make_model(section, neighborhood={"new_option": 1}))
    refuses(r"knows 2 cell types \(T cell, B cell\): pass the column", cell_type_key=None)
    refuses(r"no obs\['fate'\]", cell_type_key="fate")
    refuses(r"no obs\['slices'\]", section_key="slices")
    refuses(r"no obsm\['places'\]; obsm has 'spatial'", spatial_key="places")
    refuses("batch_size=0", batch_size=0)
    refuses("no cells", adata=section[:0].copy())
    odd = section.copy()
    odd.obs["cell_type"] = odd.obs["cell_type"].cat.rename_categories({"B cell": "Plasma"})
    refuses(r"not know, such as Plasma\. Rename them to types that it knows \(T cell, B cell\), or", adata=odd)
    odd.obs["cell_type"] = section.obs["cell_type"].cat.add_categories("Plasma")  # of no cell
    embed_neighborhoods(odd, model, **KEYS)
    odd.obs.loc[odd.obs_names[:3], "cell_type"] = np.nan
    refuses(
        r"3 of 60 cells have no type .*: fill in one that the model knows \(T cell, B cell\), or remove", adata=odd
    )
    odd = section.copy()
    odd.obsm["spatial"][2, 0] = np.nan
    refuses(r"1 of 60 cells have no finite coordinates in obsm\['spatial'\], such as c", adata=odd)
    odd = section.copy()
    odd.obs.loc[odd.obs_names[2], "slice"] = None
    refuses(r"1 of 60 cells have no section in obs\['slice'\], such as c", adata=odd)
    odd = section.copy()
    odd.obs_names = ["a"] * 60
    refuses("obs_names_make_unique", adata=odd)
    assert (set(section.obs), set(section.obsm), set(section.uns)) == before


def test_a_real_section(shared_data):
    """Mouse symbols, in another order than the model's, and a gene that the data do not have."""
    adata = read_h5ad(shared_data / "starmap_cortex.h5ad")
    chosen = np.random.default_rng(0).choice(adata.n_obs, 12, replace=False)
    side = float(np.sqrt(np.ptp(adata.obsm["spatial"], axis=0).prod() * 20 / adata.n_obs))
    names = sorted(adata.obs["cell_type"].unique(), reverse=True)
    order = np.argsort(adata.var_names)
    model = make_model(
        adata,
        n_genes=adata.n_vars + 1,
        gene_ids=["NotThere", *adata.var_names[order]],
        n_cell_types=len(names),
        cell_types=names,
        neighborhood={"patch_size": side},
        initializer_range=0.05,
    )
    embed_neighborhoods(adata, model, cell_type_key="cell_type")
    counts = np.hstack([np.zeros((adata.n_obs, 1)), sparse.csr_matrix(adata.X).toarray()[:, order]]).astype(np.float32)
    types = np.array([names.index(name) for name in adata.obs["cell_type"]])
    places = adata.obsm["spatial"].astype(float)
    for cell in chosen:
        around = np.flatnonzero((np.abs(places - places[cell]) <= side / 2).all(axis=1))
        around = around[around != cell]
        item = NeighborhoodMetadata(counts[around], counts[[cell]], types[around], types[[cell]], len(around))
        with torch.no_grad():
            expected = model(**collate([item])).neighborhood_embedding[0]
        np.testing.assert_allclose(adata.obsm["X_neighborhood"][cell], expected, atol=1e-5)
