"""A checkpoint in a process that cannot import the plugin."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from anndata import read_h5ad

from stformer_hf import (
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneBertForTokenClassification,
    GeneTokenizer,
)

PROCESS = """
import json, sys

class NoPlugin:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "stformer_hf":
            raise ModuleNotFoundError("the plugin is not installed here")

sys.meta_path.insert(0, NoPlugin())
import anndata, torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification,
    AutoModelForTokenClassification, AutoTokenizer
)

data, *paths = sys.argv[1:]
adata = anndata.read_h5ad(data)
results = []
for path in paths:
    auto = {
        "mlm": AutoModelForMaskedLM, "cells": AutoModelForSequenceClassification,
        "genes": AutoModelForTokenClassification,
    }[path.split("-")[-1]]
    assert AutoConfig.from_pretrained(path, trust_remote_code=True).model_type == "gene_bert"
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
    batch = tokenizer(adata, padding=True, return_tensors="pt")
    result = [batch["input_ids"].tolist(), batch["token_type_ids"].tolist()]
    with torch.no_grad():
        for of in (AutoModel, auto):
            outputs = of.from_pretrained(path, trust_remote_code=True).eval()(**batch)
            result.append(outputs[0].double().tolist())
    results.append(result)
assert "stformer_hf" not in sys.modules
print(json.dumps(results))
"""


def test_all_auto_classes_give_the_same_numbers_without_the_plugin(store, adata, tmp_path):
    cells = adata[:6].copy()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    medians = np.random.default_rng(0).lognormal(0, 1, len(store.gene_ids))
    whole = {"whole_cell": True, "max_length": 12}
    schemes = {
        "binned": {"bin_edges": [0.5, 1.5, 3.5]},
        "rank": {"medians": medians},
        "whole": {"bin_edges": [0.5], **whole},  # [CLS] is the whole cell
        "wholerank": {"medians": medians, **whole},
    }
    classes = {
        "mlm": GeneBertForPhenotypicMLM,
        "cells": GeneBertForClassification,
        "genes": GeneBertForTokenClassification,
    }
    expected = {}
    for scheme, settings in schemes.items():
        of = "rank" if "medians" in settings else "binned"
        tokenizer = GeneTokenizer.from_store(store, scheme=of, phenotypes=["cell_type"], **settings)
        batch = tokenizer(cells, padding=True, return_tensors="pt")
        for name, model_class in classes.items():
            wide = {"wide_head": True} if tokenizer.whole_cell and name == "cells" else {}
            config = GeneBertConfig.from_tokenizer(tokenizer, size="tiny", num_labels=3, **wide)
            model = model_class(config).eval()
            if wide:
                torch.nn.init.normal_(model.wide_head.genes.weight)
            path = tmp_path / f"{scheme}-{name}"
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
            with torch.no_grad():
                expected[str(path)] = (batch, model.gene_bert(**batch)[0], model(**batch)[0])
    environment = {"PATH": "", "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", PROCESS, str(tmp_path / "cells.h5ad"), *expected],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert process.returncode == 0, process.stderr
    results = json.loads(process.stdout.splitlines()[-1])
    for (ids, types, hidden, logits), (batch, *wanted) in zip(results, expected.values(), strict=True):
        assert ids == batch["input_ids"].tolist()
        assert types == batch["token_type_ids"].tolist()
        np.testing.assert_allclose(hidden, wanted[0], atol=1e-5)
        np.testing.assert_allclose(logits, wanted[1], atol=1e-5)


TOKENS = """
import hashlib, sys

if sys.argv[1] == "without":
    class NoPlugin:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "stformer_hf":
                raise ModuleNotFoundError("the plugin is not installed here")
    sys.meta_path.insert(0, NoPlugin())
else:
    import stformer_hf
import anndata
from transformers import AutoTokenizer

adata = anndata.read_h5ad(sys.argv[2])
for path in sys.argv[3:]:
    tokens = AutoTokenizer.from_pretrained(path, trust_remote_code=sys.argv[1] == "without").encode_cells(adata)
    print(hashlib.sha256(b"".join(part.tobytes() for part in tokens[:3])).hexdigest())
"""


@pytest.mark.slow
def test_other_processes_give_the_same_tokens_of_real_cells(shared_data, tmp_path):
    adata = read_h5ad(shared_data / "pbmc_ifnb.h5ad")
    genes = adata.var["ensembl_id"].tolist()
    medians = np.random.default_rng(0).lognormal(0, 1, len(genes))
    tokenizers = {
        "binned": GeneTokenizer(
            genes, bin_edges=[1, 2, 4], phenotypes={"condition": ["ctrl", "stim"]}, max_length=500
        ),
        "rank": GeneTokenizer(
            genes, scheme="rank", medians=medians, phenotypes={"condition": ["stim", "ctrl"]}, max_length=500
        ),
    }
    wanted = []
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(tmp_path / name)
        GeneBertConfig.from_tokenizer(tokenizer, size="tiny").save_pretrained(tmp_path / name)
        tokens = tokenizer.encode_cells(adata)
        wanted.append(hashlib.sha256(b"".join(part.tobytes() for part in tokens[:3])).hexdigest())
    arguments = [str(shared_data / "pbmc_ifnb.h5ad"), *(str(tmp_path / name) for name in tokenizers)]
    environment = {"PATH": "", "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TOKENS, plugin, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for plugin in ("with", "without")
    ]
    for process in processes:
        printed, errors = process.communicate()
        assert process.returncode == 0, errors
        assert printed.split() == wanted
