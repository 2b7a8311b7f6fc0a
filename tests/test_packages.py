"""The model of `packages/fetal_tiny`, as its users have it."""

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy import sparse

import stformer_hf as sf
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
    """Statistics of the training cells have 32 bits in the file too."""
    with safe_open(Path(folder) / "model.safetensors", "pt") as weights:
        kinds = {name: weights.get_slice(name).get_dtype() for name in weights.keys()}
    assert {kind for name, kind in kinds.items() if ".statistics." not in name} == {"F16"}
    assert {parameter.dtype for parameter in load_model(folder).parameters()} == {torch.float32}


def test_the_card_has_figures_on_other_cells_and_the_licence(folder):
    card = (Path(folder) / "README.md").read_text()
    assert "license: apache-2.0" in card and (PACKAGE / "card.md").read_text() in card
    assert not list(Path(folder).glob("*.py"))
