"""`stformer-hf pretrain_neighborhood`, in this process."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import read_h5ad
from conftest import make_adata
from transformers import AutoModel, AutoModelForPreTraining

from stformer_hf import CellNeighborhoodConfig, CellNeighborhoodForMaskedCell, CellStore, CenterMaskSampler
from stformer_hf.cli import main
from stformer_hf.cli.pretrain_neighborhood import PretrainNeighborhoodArguments, _add_types, choose_held_out
from stformer_hf.models.cell_neighborhood.count_likelihoods import CountHead

SMALL = [
    *("--max_steps", "3", "--use_cpu", "true", "--disable_tqdm", "true", "--patch_size", "0.5", "--debug"),
    *("--model_config", "{encoder_layers: 1, decoder_layers: 1, hidden_size: 16, num_attention_heads: 2}"),
]


def section(folder, name="section", seed=0, n_cells=60, **obs) -> str:
    adata = make_adata(n_cells, seed=seed)
    adata.obs_names = [f"{name}-{cell}" for cell in adata.obs_names]
    adata.obsm["spatial"] = np.random.default_rng(seed).random((n_cells, 2)) * [1, 2]
    for column, values in obs.items():
        adata.obs[column] = values
    adata.write_h5ad(folder / f"{name}.h5ad")
    return str(folder / f"{name}.h5ad")


def pretrain(*argv) -> None:
    assert main(["pretrain_neighborhood", *map(str, argv), *SMALL]) == 0


def metrics_of(output) -> dict:
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return {name: value for entry in history for name, value in entry.items() if name.startswith("eval_")}


def test_files_in_model_out(tmp_path, capsys):
    file = section(tmp_path)
    pretrain("--data", file, "--output", tmp_path / "model", "--cell_type_key", "cell_type", "--baselines")
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "model")
    assert model.config.cell_types == ["B cell", "T cell"]
    assert model.config.gene_ids == [f"ENSG{i:011d}" for i in range(40)]
    assert model.config.neighborhood == {"patch_size": 0.5, "shape": "box"}
    assert AutoModel.from_pretrained(tmp_path / "model").config.hidden_size == 16
    assert {"eval_loss", "eval_pearson_r", "eval_type_mean_nll", "eval_neighbor_mean_pearson_r"} <= set(
        metrics_of(tmp_path / "model")
    )
    card = (tmp_path / "model" / "README.md").read_text()
    for told in ("size 0.5", "mean of the neighbours", "section.h5ad", "embed --kind neighborhood", "Pearson r"):
        assert told in card, told
    store = CellStore(tmp_path / "model" / "store")
    np.testing.assert_array_equal(store.obs["y"], np.random.default_rng(0).random((60, 2))[:, 1] * 2)
    # The store, given as such, is the same run.
    pretrain("--data", store.path, "--output", tmp_path / "again", "--cell_type_key", "cell_type", "--baselines")
    again, first = metrics_of(tmp_path / "again"), metrics_of(tmp_path / "model")
    assert {name: again[name] for name in again if "second" not in name and "time" not in name} == {
        name: first[name] for name in first if "second" not in name and "time" not in name
    }


def test_twins_of_held_out_cells_are_not_learnt_from(tmp_path, caplog):
    """A section of which some cells, by barcode and counts, are in another one too."""
    first, second = make_adata(60), make_adata(60, seed=1)
    counts = second.X.toarray()
    counts[10:20] = first.X[10:20].toarray()
    second.X = counts
    barcodes = ["".join("ACGT"[i // 4**k % 4] for k in range(8)) for i in range(120)]
    for part, cells in enumerate((first, second)):
        own = np.arange(60) + 60 * part
        own[10:20] = np.arange(10, 20)
        cells.obs_names = [f"{barcodes[i]}-{part}" for i in own]
        cells.obs[["x", "y"]] = np.random.default_rng(part).random((60, 2)) * [1, 2]
        cells.obs["section"] = f"s{part}"
    store = CellStore.build(tmp_path / "store", [first, second], obs=["x", "y", "section"], report=False)
    pretrain("--data", store.path, "--output", tmp_path / "model", "--held_out_sections", "s1")
    assert "10 training cells are held out too, and are left out of training" in caplog.text
    state = json.loads((tmp_path / "model" / "trainer_state.json").read_text())
    assert "49 of 108 cells" in json.dumps(state)  # of 60 and 60, each with a cell without counts


def test_files_are_sections_of_their_own(tmp_path):
    files = [section(tmp_path, "a", 1), section(tmp_path, "b", 2, section=["up"] * 30 + ["down"] * 30)]
    pretrain("--data", *files, "--output", tmp_path / "model", "--held_out_sections", "b:down")
    store = CellStore(tmp_path / "model" / "store")
    assert store.obs["section"].value_counts().to_dict() == {"a": 60, "b:up": 30, "b:down": 30}
    assert AutoModel.from_pretrained(tmp_path / "model").config.cell_types == ["cell"]


def arguments(**settings) -> PretrainNeighborhoodArguments:
    return PretrainNeighborhoodArguments(data=["x"], output="y", **settings)


def test_what_is_held_out():
    rng = np.random.default_rng(0)
    metadata = pd.DataFrame(rng.random((100, 2)) * [1, 5], columns=["x", "y"]).assign(section=["a"] * 60 + ["b"] * 40)
    metadata.loc[60:, "x"] *= 100  # the longer axis of b
    held_out = choose_held_out(arguments(held_out=0.2), metadata, seed=0)
    a, b = metadata[:60], metadata[60:]
    assert (held_out[:60] == (a["y"] > a["y"].sort_values().iloc[47])).all() and held_out[:60].sum() == 12
    assert (held_out[60:] == (b["x"] > b["x"].sort_values().iloc[31])).all() and held_out[60:].sum() == 8
    by_cell = arguments(held_out=0.2, held_out_by="cell")
    held_out = choose_held_out(by_cell, metadata, seed=0)
    assert held_out.sum() == 20 and (held_out != choose_held_out(by_cell, metadata, seed=1)).any()
    assert choose_held_out(arguments(held_out=0.1), metadata[56:64], seed=0).tolist().count(True) == 2  # of each one
    held_out = choose_held_out(arguments(held_out_sections=["b"]), metadata, seed=0)
    assert held_out.tolist() == [False] * 60 + [True] * 40
    assert not choose_held_out(arguments(held_out=0.0), metadata, seed=0).any()
    for message, settings in {
        "no section 'c'; sections are 'a', 'b'": {"held_out_sections": ["c"]},
        "none is left to train on": {"held_out_sections": ["a", "b"]},
        "at least 0 and below 1; got 1.0": {"held_out": 1.0},
    }.items():
        with pytest.raises(ValueError, match=message):
            choose_held_out(arguments(**settings), metadata, seed=0)


@pytest.fixture
def made(monkeypatch) -> list[CenterMaskSampler]:
    """The samplers that a run makes."""
    made, init = [], CenterMaskSampler.__init__

    def watch(self, *args, **kwargs):
        init(self, *args, **kwargs)
        made.append(self)

    monkeypatch.setattr(CenterMaskSampler, "__init__", watch)
    return made


def neighbors_of(sampler) -> set[tuple[int, int]]:
    """Pairs of rows of metadata."""
    indptr, found = sampler.neighbors(range(len(sampler)))
    return set(zip(np.repeat(sampler.indices, np.diff(indptr)).tolist(), found.tolist(), strict=True))


def test_training_does_not_see_what_is_held_out(tmp_path, made):
    pretrain("--data", section(tmp_path), "--output", tmp_path / "model", "--held_out", "0.3")
    train, held_out = made
    assert not set(train.indices) & set(held_out.indices) and len(train) + len(held_out) == 59  # one has no counts
    assert not {other for _, other in neighbors_of(train)} & set(held_out.indices)
    assert {other for _, other in neighbors_of(held_out)} & set(train.indices)
    pretrain(
        *("--data", section(tmp_path), "--output", tmp_path / "seen", "--held_out", "0.3", "--neighbors_from", "all"),
    )
    assert {other for _, other in neighbors_of(made[2])} & set(made[3].indices)


def test_the_flags_say_what_a_neighbourhood_is(tmp_path, made):
    file = section(tmp_path, slices=np.arange(60) % 2)
    flags = ["--max_num_cells", "3", "--seed", "5", "--shape", "disc", "--min_neighbors", "2", "--held_out", "0"]
    pretrain("--data", file, "--output", tmp_path / "model", "--section_key", "slices", *flags)
    (train,) = made
    rows = [i for i in range(60) if i != 3]  # which has no counts
    places = np.random.default_rng(0).random((60, 2)) * [1, 2]
    near = {
        (a, b)
        for a, i in enumerate(rows)
        for b, j in enumerate(rows)
        if i != j and (i - j) % 2 == 0 and np.linalg.norm(places[i] - places[j]) <= 0.25
    }
    sizes = {a: sum(pair[0] == a for pair in near) for a in range(59)}
    assert train.indices.tolist() == [a for a in range(59) if sizes[a] >= 2] and len(train) < 59
    found = neighbors_of(train)
    assert found <= near and len(found) == sum(min(sizes[a], 3) for a in train.indices)
    model = AutoModel.from_pretrained(tmp_path / "model")
    assert model.config.neighborhood == {"patch_size": 0.5, "shape": "disc", "max_num_cells": 3}
    pretrain("--data", file, "--output", tmp_path / "other", "--section_key", "slices", *flags, "--seed", "6")
    assert neighbors_of(made[1]) != found and len(neighbors_of(made[1])) == len(found)
    assert "0% of the cells" in (tmp_path / "model" / "README.md").read_text()


def test_three_dimensions_are_those_of_the_coordinates(tmp_path, made):
    flat = section(tmp_path, "flat", z=np.arange(60) * 100.0)
    pretrain("--data", flat, "--output", tmp_path / "a")
    assert neighbors_of(made[0]) and "z" not in CellStore(tmp_path / "a" / "store").obs
    deep = read_h5ad(section(tmp_path, "deep"))
    deep.obsm["spatial"] = np.column_stack([deep.obsm["spatial"], np.arange(60) * 100.0])
    deep.write_h5ad(tmp_path / "deep.h5ad")
    pretrain("--data", tmp_path / "deep.h5ad", "--output", tmp_path / "b")
    assert not neighbors_of(made[2])
    with pytest.raises(ValueError, match="Some files have 2 and others 3"):
        pretrain("--data", flat, tmp_path / "deep.h5ad", "--output", tmp_path / "c")


def test_files_of_one_name_with_the_same_barcodes_stay_apart(tmp_path, made):
    files = []
    for name in ("s1", "s2"):
        (tmp_path / name).mkdir()
        files.append(section(tmp_path / name, "adata", seed=1))
    pretrain("--data", *files, "--output", tmp_path / "model", "--held_out", "0")
    store = CellStore(tmp_path / "model" / "store")
    assert store.obs["section"].nunique() == 2 and store.obs.index.is_unique
    assert len(made[0]) == 118
    assert neighbors_of(made[0]) and all((a < 59) == (b < 59) for a, b in neighbors_of(made[0]))
    with pytest.raises(ValueError, match="a file is repeated"):
        pretrain("--data", files[0], files[0], "--output", tmp_path / "again")


def test_genes_that_a_file_does_not_measure_are_told(tmp_path, caplog):
    whole, part = section(tmp_path, "whole"), read_h5ad(section(tmp_path, "part"))
    part[:, :30].write_h5ad(tmp_path / "part.h5ad")
    pretrain("--data", whole, tmp_path / "part.h5ad", "--output", tmp_path / "model")
    assert "one only 30 of 40" in caplog.text


def test_what_cannot_be_judged_is_told(tmp_path, caplog):
    along = np.random.default_rng(0).random((60, 2))[:, 1]
    kinds = np.where(along > 0.97, "rare", "common")
    pretrain("--data", section(tmp_path, kind=kinds), "--output", tmp_path / "a", "--cell_type_key", "kind")
    assert "no training cell has their types, such as rare" in caplog.text
    alone = section(tmp_path, "alone", section=np.arange(60))
    pretrain("--data", alone, "--output", tmp_path / "b")
    assert "No cell is held out" in caplog.text


def test_a_run_is_not_resumed_on_other_neighbourhoods(tmp_path):
    command = ["--data", section(tmp_path), "--output", tmp_path / "model", "--save_steps", "1", "--save_strategy"]
    pretrain(*command, "steps")
    for changed in (["--k_nearest", "2"], ["--held_out", "0.4"], ["--held_out_by", "cell"]):
        with pytest.raises(ValueError, match="neighbourhoods was patch_size=0.5, .* and is patch_size=0.5"):
            pretrain(*command, "steps", "--resume_from_checkpoint", "true", *changed)


def test_a_model_without_neighbours_needs_no_patch_size(tmp_path, made):
    command = ["pretrain_neighborhood", "--data", section(tmp_path), "--output", tmp_path / "model", *SMALL]
    command = [part for part in map(str, command) if part not in ("--patch_size", "0.5")]
    assert main([*command, "--max_num_cells", "0"]) == 0
    assert not neighbors_of(made[0]) and set(made[0].lengths) == {1}


def test_the_model_begins_at_what_training_cells_express(tmp_path, monkeypatch):
    started = []
    start_at = CountHead.start_at
    monkeypatch.setattr(CountHead, "start_at", lambda self, *of: (started.append(of), start_at(self, *of))[1])
    pretrain("--data", section(tmp_path), "--output", tmp_path / "model", "--held_out", "0.5", "--max_steps", "1")
    store = CellStore(tmp_path / "model" / "store")
    along = store.obs["y"].to_numpy()
    rows = [i for i in np.argsort(along, kind="stable") if i != 3][:29]
    np.testing.assert_allclose(started[0][0], store.rows(rows).toarray().mean(0), rtol=1e-6)


def test_cells_without_a_type_are_left_out(tmp_path, caplog):
    types = np.array(["a", "b", None] * 20, dtype=object)
    pretrain("--data", section(tmp_path, kind=types), "--output", tmp_path / "model", "--cell_type_key", "kind")
    assert "21 of 60 cells have no counts or no type" in caplog.text
    assert AutoModel.from_pretrained(tmp_path / "model").config.cell_types == ["a", "b"]


@pytest.mark.parametrize("place", ["first", "last"])
def test_the_model_embeds_all_types_of_its_section(tmp_path, place, caplog):
    """Also one whose cells are all held out; it comes first or last among the names."""
    along = np.random.default_rng(0).random((60, 2))[:, 1]
    rare = "a rare one" if place == "first" else "rare"
    file = section(tmp_path, kind=pd.Categorical(np.where(along > 0.97, rare, np.where(along > 0.5, "b", "c"))))
    flags = ["--data", file, "--cell_type_key", "kind", "--debug"]
    assert main(["pretrain_neighborhood", "--output", str(tmp_path / "m"), *flags, *SMALL]) == 0
    model = AutoModel.from_pretrained(tmp_path / "m")
    assert model.config.cell_types == ["b", "c", rare]
    _, _, of_rare = weights = model.get_input_embeddings().weight
    assert len(weights) == 3 and of_rare.abs().max() > 0
    output = str(tmp_path / "out.h5ad")
    assert main(["embed", "--kind", "neighborhood", "--model", str(tmp_path / "m"), "--output", output, *flags]) == 0
    assert np.isfinite(read_h5ad(output).obsm["X_neighborhood"]).all()


def test_cells_without_a_place_are_named(tmp_path):
    adata = read_h5ad(section(tmp_path))
    adata.obsm["spatial"][[3, 5], 1] = np.nan  # cell 3 has no counts, and is left out
    adata.write_h5ad(tmp_path / "section.h5ad")
    with pytest.raises(
        ValueError, match=r"1 of 60 cells have no finite coordinates \(obsm\['spatial'\].*section-cell5: "
    ):
        pretrain("--data", tmp_path / "section.h5ad", "--output", tmp_path / "model")


@pytest.mark.parametrize(
    "message, argv",
    {
        "section.h5ad: There is no obs\\['kind'\\].* no types: --cell_type_key null": ["--cell_type_key", "kind"],
        "There is no obs\\['slice'\\]": ["--section_key", "slice"],
        "no obsm\\['places'\\]; obsm has 'spatial'": ["--spatial_key", "places"],
        "unknown name 'likelyhood'; the closest known one is likelihood": ["--model_config", "{likelyhood: nb}"],
        "size must be one of tiny, base, got 'huge'": ["--size", "huge"],
    }.items(),
)
def test_what_does_not_fit_is_told(tmp_path, message, argv):
    command = ["pretrain_neighborhood", "--data", section(tmp_path), "--output", str(tmp_path / "model")]
    with pytest.raises(ValueError, match=message):
        main([*command, *SMALL, *argv])
    with pytest.raises(ValueError, match="x.csv is not a file of cells with coordinates"):
        main([*command, *SMALL, "--data", "x.csv"])
    with pytest.raises(ValueError, match="Pass patch_size, or k_nearest"):
        main([*command, "--debug", "--use_cpu", "true", "--overwrite"])


def test_types_without_training_cells_begin_at_the_mean_of_the_others():
    config = CellNeighborhoodConfig.from_size("tiny", n_genes=5, n_cell_types=2, cell_types=["a", "b"])
    model = CellNeighborhoodForMaskedCell(config)
    known = model.get_input_embeddings().weight.detach().clone()
    _add_types(model, ["c", "d"])
    table = model.get_input_embeddings().weight
    torch.testing.assert_close(table[: len(known)], known)
    torch.testing.assert_close(table[len(known) :], known.mean(dim=0).repeat(2, 1))
    assert (config.n_cell_types, config.cell_types) == (4, ["a", "b", "c", "d"])
