"""Registration of the classes of this package with transformers, PEFT and `sources`, as soon as those are imported.

`import stformer_hf` has to make `AutoConfig`, `AutoTokenizer` and the `AutoModel` family know the models, and
importing transformers takes seconds. So each registration waits until the module that it writes to has been imported.
The model classes are registered when the first configuration is made or unpickled, since importing them costs another
second.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sources.registry import Layer

# Layers of both models, by their names in BERT.
_LAYERS_OF_BERT = {"query": ["q_lin"], "key": ["k_lin"], "value": ["v_lin"], "output.dense": ["out_lin", "lin2"]}


def _register_configs() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from .models.cell_neighborhood.configuration_cell_neighborhood import CellNeighborhoodConfig
    from .models.gene_bert.configuration_gene_bert import GeneBertConfig

    for config in (GeneBertConfig, CellNeighborhoodConfig):
        AutoConfig.register(config.model_type, config)


def _register_tokenizers() -> None:
    from transformers.models.auto.tokenization_auto import AutoTokenizer

    from .models.gene_bert.configuration_gene_bert import GeneBertConfig
    from .models.gene_bert.tokenization_gene_bert import GeneTokenizer

    AutoTokenizer.register(GeneBertConfig, GeneTokenizer)


def _register_models(module: str) -> None:
    """Register the models of a configuration with the Auto classes that its `AUTO_MAP` names."""
    import transformers

    configuration = sys.modules[module]
    config = getattr(configuration, _CONFIGS[module])
    config.on_init = None
    for auto_class, path in configuration.AUTO_MAP.items():
        file, _, name = path.partition(".")
        if auto_class != "AutoConfig":
            models = importlib.import_module(f".{file}", configuration.__package__)
            getattr(transformers, auto_class).register(config, getattr(models, name))


def _register_pipelines() -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification
    from transformers.pipelines import PIPELINE_REGISTRY

    pipelines = sys.modules[_PIPELINES]
    for task, kind, auto_class in (
        ("cell-embedding", pipelines.CellEmbeddingPipeline, AutoModel),
        ("cell-classification", pipelines.CellClassificationPipeline, AutoModelForSequenceClassification),
    ):
        PIPELINE_REGISTRY.register_pipeline(task, pipeline_class=kind, pt_model=auto_class)


def _register_layers() -> None:
    """Register with PEFT the layers to adapt if no `target_modules` are named: those of BERT."""
    from peft.utils import constants

    for name, layers in vars(constants).items():
        of_bert = layers.get("bert") if name.endswith("_MODULES_MAPPING") else None
        if of_bert is not None and all(layer in _LAYERS_OF_BERT for layer in of_bert):
            for model_type in ("gene_bert", "cell_neighborhood"):
                layers.setdefault(model_type, [own for layer in of_bert for own in _LAYERS_OF_BERT[layer]])


def _register_stores() -> None:
    """Make stores a format of `sources`, which stands above `store` and cannot import it."""
    from .sources.registry import reads
    from .sources.stored_cells import store_layers

    def is_store(path: Path) -> bool:
        return (path / "manifest.json").exists() and (path / "dataset_info.json").exists()

    @reads("CellStore", is_store, remote=True)
    def read_store(path: Path | str) -> list[Layer]:
        from .store.cell_store import CellStore

        return store_layers(CellStore(path))


_PIPELINES = f"{__package__}.models.gene_bert.pipelines_gene_bert"
_CONFIGS = {
    f"{__package__}.models.gene_bert.configuration_gene_bert": "GeneBertConfig",
    f"{__package__}.models.cell_neighborhood.configuration_cell_neighborhood": "CellNeighborhoodConfig",
}


def _at_the_first_configuration(module: str) -> None:
    getattr(sys.modules[module], _CONFIGS[module]).on_init = partial(_register_models, module)


_AFTER: dict[str, Callable[[], object]] = {
    "transformers.models.auto.configuration_auto": _register_configs,
    "transformers.models.auto.tokenization_auto": _register_tokenizers,
    "transformers.pipelines": partial(importlib.import_module, _PIPELINES),
    _PIPELINES: _register_pipelines,
    "peft.utils.constants": _register_layers,
    f"{__package__}.sources.formats": _register_stores,
    **{module: partial(_at_the_first_configuration, module) for module in _CONFIGS},
}


class _AfterImport(MetaPathFinder):
    """Finds modules as usual, and runs a function after one of them was imported."""

    def __init__(self, functions: dict[str, Callable[[], object]]):
        self._functions = functions

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        function = self._functions.pop(name, None)
        if function is None:
            return None
        try:
            spec = importlib.util.find_spec(name)  # of the other finders
        finally:
            self._functions[name] = function  # until an import of the module succeeds
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            if self._functions.pop(name, None) is not None:
                function()

        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]  # of this module's loader alone
        return spec


def register() -> None:
    """Register the classes with the modules that are imported already, and with the others on import."""
    imported = [name for name in _AFTER if name in sys.modules]
    sys.meta_path.insert(0, _AfterImport({name: of for name, of in _AFTER.items() if name not in imported}))
    for name in imported:
        _AFTER[name]()
