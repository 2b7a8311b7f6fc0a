"""Registration with transformers, however a configuration comes."""

import pickle
import subprocess
import sys

import pytest

from stformer_hf import CellNeighborhoodConfig
from stformer_hf._registration import _AfterImport

UNPICKLE = """
import pickle, sys
import stformer_hf
assert "torch" not in sys.modules  # importing the package is fast
config = pickle.load(open(sys.argv[1], "rb"))
from transformers import AutoModel, AutoModelForMaskedLM
assert type(AutoModel.from_config(config)).__name__ == "GeneBertModel"
assert type(AutoModelForMaskedLM.from_config(config)).__name__ == "GeneBertForPhenotypicMLM"
neighbors = pickle.load(open(sys.argv[2], "rb"))
assert type(AutoModel.from_config(neighbors)).__name__ == "CellNeighborhoodModel"
"""


def test_an_unpickled_configuration_in_a_new_process_has_models(config, tmp_path):
    files = [tmp_path / "cells.pkl", tmp_path / "neighborhoods.pkl"]
    for file, of in zip(files, (config, CellNeighborhoodConfig.from_size("tiny")), strict=True):
        file.write_bytes(pickle.dumps(of))
    command = [sys.executable, "-c", UNPICKLE, *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


PIPELINES = """
from transformers.pipelines import PIPELINE_REGISTRY
import stformer_hf
assert {"cell-embedding", "cell-classification"} <= set(PIPELINE_REGISTRY.get_supported_tasks())
"""


@pytest.mark.parametrize("first", ["transformers.pipelines", "stformer_hf.models.gene_bert.pipelines_gene_bert"])
def test_pipelines_are_registered_once_whatever_is_imported_first(first):
    command = [sys.executable, "-c", f"import {first}{PIPELINES}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_what_waits_for_a_module_waits_until_its_import_succeeds(tmp_path, monkeypatch):
    module = tmp_path / "awaited_module.py"
    module.write_text("raise ImportError('a part is missing')")
    ran = []
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    finder = _AfterImport({"awaited_module": lambda: ran.append(sys.modules["awaited_module"].value)})
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    for _ in range(2):
        with pytest.raises(ImportError, match="a part is missing"):
            import awaited_module
    assert ran == []
    module.write_text("value = 3")
    import awaited_module  # noqa: F811

    assert ran == [3] and awaited_module.value == 3
    monkeypatch.delitem(sys.modules, "awaited_module")
    import awaited_module

    assert ran == [3]  # once
