"""The model of `packages/fetal_tiny`, as its users have it, and how a trained model is packed."""

import runpy
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from conftest import make_adata
from huggingface_hub import ModelCard
from safetensors import safe_open
from scipy import sparse

import stformer_hf as sf
from stformer_hf.cli import main
from stformer_hf.training.loading import MODEL_PACKAGES, load_model, load_tokenizer

PACKAGE = Path(__file__).parents[1] / "packages" / "fetal_tiny"
pytestmark = pytest.mark.skipif(not PACKAGE.exists(), reason="source distributions do not hold the package")
B_CELLS, MUSCLE = ["CD79A", "CD79B", "MS4A1", "CD37", "CD74"], ["ACTC1", "TNNT1", "TTN", "MYL1", "TNNC2"]


@pytest.fixture(scope="module")
def folder() -> str:
    """Load the folder's path as an installed package's entry point does."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    [(name, value)] = project["entry-points"][MODEL_PACKAGES].items()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PACKAGE))
        return EntryPoint(name, value, MODEL_PACKAGES).load()


def test_it_labels_cells_by_their_markers(folder):
    """Of genes by symbol: 3,000 at the level of noise, and those of B cells or of muscle."""
    symbols, rng = list(load_tokenizer(folder).symbols)[:3000], np.random.default_rng(0)
    names = list(dict.fromkeys([*B_CELLS, *MUSCLE, *symbols]))
    counts = rng.poisson(0.1, (40, len(names))).astype(np.float32)
    counts[:20, :5], counts[20:, 5:10] = rng.poisson(60, (20, 5)), rng.poisson(60, (20, 5))
    cells = ad.AnnData(sparse.csr_matrix(counts))
    cells.var_names = names
    sf.annotate(cells, folder, min_coverage=0.0)
    assert set(cells.obs["stformer_label"][:20]) <= {"B-Immature", "B-Mature", "B-Prol", "Pre-B", "Pro-B"}
    assert set(cells.obs["stformer_label"][20:]) == {"SKM"}


def test_weights_have_16_bits_in_the_file_and_32_in_memory(folder):
    check_weights(Path(folder))


def check_weights(folder: Path) -> None:
    """Statistics of the training cells have 32 bits in the file too."""
    with safe_open(folder / "model.safetensors", "pt") as weights:
        kinds = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}
    assert {kind for name, kind in kinds.items() if ".statistics." not in name} == {"F16"}
    assert {parameter.dtype for parameter in load_model(folder).parameters()} == {torch.float32}


def test_the_card_has_figures_on_other_cells_and_the_licence(folder):
    card = (Path(folder) / "README.md").read_text()
    assert "license: apache-2.0" in card and (PACKAGE / "card.md").read_text() in card
    assert not list(Path(folder).glob("*.py"))


@pytest.mark.usefixtures("two_folds")
def test_a_packed_model_labels_as_the_trained_one_and_replaces_the_one_before(tmp_path):
    trained, package = tmp_path / "trained", tmp_path / "blood_tiny"
    cells = make_adata()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    words = [
        "--data",
        tmp_path / "cells.h5ad",
        "--label_key",
        "cell_type",
        "--output",
        trained,
        "--num_train_epochs",
        0,
    ]
    assert main(["finetune", *map(str, words)]) == 0
    model = package / "stformer_hf_blood_tiny" / "model"
    model.mkdir(parents=True)
    (model / "of_the_one_before.txt").touch()
    (package / "card.md").write_text("## Licence\n\nMIT, as the cells.")
    runpy.run_path(str(PACKAGE.parent / "pack_model.py"))["pack"](trained, package, "mit")
    check_weights(model)
    kept = {path.name for path in trained.iterdir()} & {path.name for path in model.iterdir()}
    assert {path.name for path in model.iterdir()} == kept >= {"out_of_fold.safetensors", "tokenizer_config.json"}
    assert not list(model.glob("*.py")) and list(trained.glob("*.py"))
    card, before = ModelCard.load(model / "README.md"), ModelCard.load(trained / "README.md").text
    assert card.data.license == "mit" and card.text.count("## Licence") == 1 and "MIT, as the cells." in card.text
    assert card.text.startswith(before[:200]) and card.text.endswith(before[before.index("Made with ") :])
    found = []
    for folder in (trained, model):
        own = cells.copy()
        sf.annotate(own, str(folder), reject=0.2)
        found.append(own)
    assert found[0].obs["stformer_label"].equals(found[1].obs["stformer_label"])
    np.testing.assert_allclose(*(of.obsm["stformer_probabilities"] for of in found), atol=0.01)
