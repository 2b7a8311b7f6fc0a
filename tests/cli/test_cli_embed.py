"""`stformer-hf embed --kind neighborhood`, as a user types it."""

import numpy as np
import pytest
import torch
from anndata import read_h5ad

from stformer_hf import CellNeighborhoodConfig, CellNeighborhoodForMaskedCell
from stformer_hf.cli import main
from stformer_hf.space.embed_neighborhoods import embed_neighborhoods


@pytest.fixture
def files(adata, tmp_path) -> dict[str, str]:
    """A file of two sections, and a model of neighbourhoods."""
    adata.obsm["spatial"] = np.random.default_rng(0).uniform(0, 20, (60, 2))
    adata.obs["slice"] = np.repeat(["a", "b"], 30)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    torch.manual_seed(0)
    config = CellNeighborhoodConfig(
        n_genes=adata.n_vars,
        n_cell_types=2,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        encoder_layers=1,
        decoder_layers=1,
        initializer_range=0.3,
        gene_ids=adata.var_names.tolist(),
        cell_types=["B cell", "T cell"],
        neighborhood={"patch_size": 8.0},
    )
    CellNeighborhoodForMaskedCell(config).save_pretrained(tmp_path / "model")
    return {"--data": str(tmp_path / "cells.h5ad"), "--model": str(tmp_path / "model")}


def command(files, output, *more) -> list[str]:
    given = [word for pair in files.items() for word in pair]
    flags = ["--kind", "neighborhood", "--section_key", "slice", "--cell_type_key", "cell_type"]
    return ["embed", *given, "--output", str(output), *flags, *map(str, more)]


def test_embeddings_domains_and_a_picture_of_a_file(files, tmp_path, capsys):
    pytest.importorskip("matplotlib").use("agg")
    output, plot = tmp_path / "out.h5ad", tmp_path / "pictures" / "domains.png"
    assert main(command(files, output, "--domains", 3, "--plot", plot)) == 0
    assert "obsm['X_neighborhood'] (60, 16)" in capsys.readouterr().out
    adata = read_h5ad(output)
    expected = read_h5ad(files["--data"])
    embed_neighborhoods(expected, files["--model"], section_key="slice", cell_type_key="cell_type")
    np.testing.assert_allclose(adata.obsm["X_neighborhood"], expected.obsm["X_neighborhood"], atol=1e-6)
    assert adata.obs["domain"].cat.categories.tolist() == ["0", "1", "2"]
    assert len(adata.uns["domain_colors"]) == 3
    assert plot.read_bytes().startswith(b"\x89PNG")
    # What is there is not replaced unless asked.
    assert main(command(files, tmp_path / "b.h5ad", "--domains", 3, "--plot", plot)) == 1
    assert f"{plot} exists" in capsys.readouterr().err and not (tmp_path / "b.h5ad").exists()


def test_flags_reach_the_neighbourhoods(files, tmp_path):
    more = ["--patch_size", 12, "--k_nearest", 4, "--max_num_cells", 3, "--with_cell_type", "--batch_size", 9]
    assert main(command(files, tmp_path / "out.h5ad", *more)) == 0
    adata, expected = read_h5ad(tmp_path / "out.h5ad"), read_h5ad(files["--data"])
    embed_neighborhoods(
        expected,
        files["--model"],
        section_key="slice",
        cell_type_key="cell_type",
        with_cell_type=True,
        patch_size=12.0,
        k_nearest=4,
        max_num_cells=3,
    )
    np.testing.assert_allclose(adata.obsm["X_neighborhood"], expected.obsm["X_neighborhood"], atol=1e-5)
    assert "domain" not in adata.obs


@pytest.mark.slow  # several seconds
def test_leiden_finds_domains(files, tmp_path):
    pytest.importorskip("scanpy")
    pytest.importorskip("igraph")
    assert main(command(files, tmp_path / "out.h5ad", "--domain_method", "leiden", "--resolution", 2)) == 0
    settings = read_h5ad(tmp_path / "out.h5ad").uns["domain"]
    assert settings["method"] == "leiden" and settings["resolution"] == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--pooling", "mean"], "--kind neighborhood does not read --pooling: pass --kind cells"),
        (
            ["--kind", "cells", "--domains", "3"],
            "--kind cells does not read --section_key, --cell_type_key, --domains: pass --kind neighborhood",
        ),
        (["--plot", "a.png"], "--plot draws domains"),
        (["--domains", "3", "--resolution", "2"], "--resolution needs --domain_method leiden"),
        (["--domains", "-1"], "--domains -1"),
        (["--domains", "3", "--domain_method", "leiden"], "chooses the number of domains itself"),
        (["--cell_type_key", "fate"], "no obs['fate']"),
    ],
)
def test_flags_that_do_not_go_together_are_named(files, tmp_path, capsys, flags, words):
    output = tmp_path / "out.h5ad"
    assert main(command(files, output, *flags)) == 1
    assert words in capsys.readouterr().err and not output.exists()


def test_other_inputs_are_named(files, tmp_path, capsys):
    output = tmp_path / "out.h5ad"
    assert main(command({**files, "--data": "s3://bucket/a.h5ad"}, output)) == 1
    assert "s3://bucket/a.h5ad: only local files can be read" in capsys.readouterr().err
    (tmp_path / "damaged.h5ad").write_bytes(b"x")
    assert main(command({**files, "--data": str(tmp_path / "damaged.h5ad")}, output)) == 1
    error = capsys.readouterr().err
    assert "damaged.h5ad cannot be read as h5ad: OSError" in error and "Traceback" not in error
    assert not output.exists()
