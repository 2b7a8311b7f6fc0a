"""A checkpoint in a process that cannot import the plugin."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import torch
from anndata import read_h5ad

from stformer_hf import GeneBertConfig, GeneBertForClassification, GeneBertForPhenotypicMLM, GeneTokenizer

PROCESS = """
import json, sys

class NoPlugin:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "stformer_hf":
            raise ModuleNotFoundError("the plugin is not installed here")

sys.meta_path.insert(0, NoPlugin())
import anndata, torch
from transformers import (
    AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer
)

mlm, classifier, data = sys.argv[1:]
adata = anndata.read_h5ad(data)
assert AutoConfig.from_pretrained(mlm, trust_remote_code=True).model_type == "gene_bert"
tokenizer = AutoTokenizer.from_pretrained(mlm, trust_remote_code=True)
batch = tokenizer(adata, padding=True, return_tensors="pt")
results = [batch["input_ids"].tolist(), batch["token_type_ids"].tolist()]
with torch.no_grad():
    for auto, path in (
        (AutoModel, mlm), (AutoModelForMaskedLM, mlm), (AutoModelForSequenceClassification, classifier)
    ):
        outputs = auto.from_pretrained(path, trust_remote_code=True).eval()(**batch)
        results.append(outputs[0].double().tolist())
assert "stformer_hf" not in sys.modules
print(json.dumps(results))
"""


def test_all_auto_classes_give_the_same_numbers_without_the_plugin(config, tokenizer, adata, tmp_path):
    cells = adata[:6].copy()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    config.num_labels = 3
    models = {"mlm": GeneBertForPhenotypicMLM(config).eval(), "cls": GeneBertForClassification(config).eval()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    arguments = [str(tmp_path / name) for name in ("mlm", "cls", "cells.h5ad")]
    environment = {"PATH": "", "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    process = subprocess.run(
        [sys.executable, "-c", PROCESS, *arguments], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    ids, types, hidden, mlm_logits, logits = json.loads(process.stdout.splitlines()[-1])
    batch = tokenizer(cells, padding=True, return_tensors="pt")
    assert ids == batch["input_ids"].tolist()
    assert types == batch["token_type_ids"].tolist()
    with torch.no_grad():
        np.testing.assert_allclose(hidden, models["mlm"].gene_bert(**batch)[0], atol=1e-6)
        np.testing.assert_allclose(mlm_logits, models["mlm"](**batch).logits, atol=1e-6)
        np.testing.assert_allclose(logits, models["cls"](**batch).logits, atol=1e-6)


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
