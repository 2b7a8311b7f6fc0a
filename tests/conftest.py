"""Fixtures: real data where it is, small random cells, stores and models of them."""

import gc
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from stformer_hf import CellStore, GeneBertConfig, GeneTokenizer
from stformer_hf.training.starts import linear_readers

# A loader waits this long (5 s by default) for each worker that raised an error before it ends it.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5

if find_spec("hypothesis"):  # which a machine with a GPU may lack
    from hypothesis import HealthCheck, settings

    of_all = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
    settings.register_profile("few", max_examples=30, **of_all)
    settings.register_profile("many", max_examples=300, **of_all)  # make test-slow
    settings.load_profile("few")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def pytest_configure(config) -> None:
    """Hide GPUs, unless `-m gpu` or CUDA_VISIBLE_DEVICES asks for them: the other tests compare with a CPU."""
    if config.option.markexpr != "gpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True)
def frozen() -> None:
    """A run of the trainer ends with gc.collect(), 0.3 s: let it skip the modules, and all else that is there."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Collators whose epoch was never set draw from torch's generator: let no test depend on those before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def closed_figures():
    """Close the figures of a test: matplotlib warns of many, in whichever test comes then."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture(scope="module")
def two_folds():
    """Let classifiers choose their readers in 2 folds, not 5: the fits of readers take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_readers, "N_FOLDS", 2)
        yield


@pytest.fixture(scope="session")
def compiled_umap() -> None:
    """Keep on disk what numba compiles of umap in each process, for 10 s; umap keeps its other functions there."""
    pytest.importorskip("umap")
    from umap import layouts, umap_

    of_layouts = layouts._get_optimize_layout_euclidean_single_epoch_fn()
    for function in (umap_.smooth_knn_dist, umap_.compute_membership_strengths, of_layouts):
        function.enable_caching()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data for development and CI; users do not have it."""
    if not SHARED.is_dir():
        pytest.skip(f"the shared data are not at {SHARED}")
    return SHARED


def make_adata(n_cells: int = 60, n_genes: int = 40, seed: int = 0, density: float = 0.4) -> AnnData:
    """Random counts; two types of cells that differ in half of the genes; one cell without counts."""
    rng = np.random.default_rng(seed)
    types = rng.integers(0, 2, n_cells)
    shape = 1 + 2 * (types[:, None] == (np.arange(n_genes) % 2))
    counts = rng.poisson(shape * rng.random((n_cells, n_genes)) * 2) * (rng.random((n_cells, n_genes)) < density)
    counts[3] = 0
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(types, ["B cell", "T cell"]),
            "age": rng.integers(20, 80, n_cells),
        },
        index=[f"cell{i}" for i in range(n_cells)],
    )
    var = pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(n_genes)])
    return AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


def with_genes(adata: AnnData) -> AnnData:
    """Name the genes: the row numbers that AnnData gives them are refused."""
    adata.var_names = [f"ENSG{i:011d}" for i in range(adata.n_vars)]
    return adata


@pytest.fixture
def adata() -> AnnData:
    return make_adata()


@pytest.fixture(scope="session")
def built_store(tmp_path_factory) -> Path:
    """A store of `adata`, built once; `store` is a copy of it."""
    return CellStore.build(tmp_path_factory.mktemp("built") / "store", make_adata(), obs=["cell_type", "age"]).path


@pytest.fixture
def store(built_store, tmp_path) -> CellStore:
    return CellStore(shutil.copytree(built_store, tmp_path / "store"))


@pytest.fixture
def tokenizer(store) -> GeneTokenizer:
    return GeneTokenizer.from_store(store, phenotypes=["cell_type"], bin_edges=[0.5, 1.5, 3.5])


def of_epoch(collator, epoch: int = 0):
    """Set the epoch of a collator, so that every call draws the same masks; return it."""
    collator.set_epoch(epoch)
    return collator


@pytest.fixture
def config(tokenizer) -> GeneBertConfig:
    return GeneBertConfig.from_tokenizer(
        tokenizer, num_hidden_layers=2, num_attention_heads=2, hidden_size=16, intermediate_size=32
    )


def checkpoint_activations(model):
    """Return the method that turns activation checkpointing on; older transformers call it another name."""
    name = "activation_checkpointing_enable"
    return getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests of a GPU where there is none."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
