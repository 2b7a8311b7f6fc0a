"""cell-embedding and cell-classification, pipelines of transformers, against `embed` and `annotate`."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, pipeline

from stformer_hf import (
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    annotate,
    embed,
    finetune,
)
from stformer_hf.training.loading import load_model, load_tokenizer

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
WITHOUT_PLUGIN = """
import json, sys

class NoPlugin:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "stformer_hf":
            raise ModuleNotFoundError("the plugin is not installed here")

sys.meta_path.insert(0, NoPlugin())
import anndata
from transformers import pipeline

cells = anndata.read_h5ad(sys.argv[1])
embedding = pipeline("cell-embedding", model=sys.argv[2], trust_remote_code=True)(cells)
classes = pipeline("cell-classification", model=sys.argv[3], trust_remote_code=True)(cells)
assert "stformer_hf" not in sys.modules
print(json.dumps([embedding.tolist(), classes]))
"""


@pytest.fixture
def classifier(store, tmp_path):
    """Return a function that saves a classifier, whose embedding differs with phenotypes, and returns its folder."""

    def save(scheme: str = "whole", **fields) -> str:
        torch.manual_seed(0)
        whole = {"whole_cell": True} if scheme == "whole" else {}
        tokenizer = GeneTokenizer.from_store(
            store, bin_edges=[0.5, 1.5], max_length=20, phenotypes=["cell_type"], **whole
        )
        fields = {"id2label": {0: "B cell", 1: "T cell", 2: "NK"}, **fields}
        config = GeneBertConfig.from_tokenizer(
            tokenizer, **SMALL, initializer_range=0.3, residual_init="normal", **fields
        )
        model = GeneBertForClassification(config)
        model.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


@pytest.mark.parametrize("scheme", ["binned", "whole"])
def test_the_embedding_is_that_of_embed(classifier, adata, scheme):
    path = classifier(scheme)
    embed(adata, path)
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X * 0.5
    for size in (7, 64):
        found = pipeline("cell-embedding", model=path)(adata, layer="counts", batch_size=size)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, adata.obsm["X_stformer"], atol=1e-5)
    embed(adata, path, pooling="mean", layer="counts")
    found = pipeline("cell-embedding", model=path, pooling="mean", layer="counts")(adata)
    np.testing.assert_allclose(found, adata.obsm["X_stformer"], atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"batch_size": 7}, {"num_workers": 2}], ids=str)
def test_a_list_is_read_as_each_of_its_parts(classifier, adata, settings):
    path = classifier()
    wanted = pipeline("cell-embedding", model=path)(adata)
    parts = [adata[:11], adata[11:]]
    made_so = pipeline("cell-embedding", model=path, **settings)(parts)
    called_so = pipeline("cell-embedding", model=path)(parts, **settings)
    for found in (made_so, called_so):
        np.testing.assert_allclose(np.concatenate(list(found)), wanted, atol=1e-5)


def test_the_labels_are_those_of_annotate(classifier, adata):
    path = classifier()
    annotate(adata, path, top_k=2)
    classify = pipeline("cell-classification", model=path, batch_size=7)
    found, two = classify(adata), classify(adata, top_k=2)
    labels, scores = adata.obs["stformer_label"].astype(object), adata.obs["stformer_score"]
    assert labels.nunique() > 1
    assert [of["label"] for of in found] == labels.where(labels.notna(), None).tolist()
    assert [of["label"] for of in found].count(None) == 1  # the cell without counts
    np.testing.assert_allclose([of["score"] for of in found], scores, atol=1e-5)
    assert [of[0] for of in two if of[0]["label"]] == [of for of in found if of["label"]]
    assert [of[1]["label"] for of in two if of[1]["label"]] == adata.obs["stformer_label_2"].dropna().tolist()
    with pytest.raises(TypeError, match="no option colour"):
        classify(adata, colour="red")


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_other_heads_return_all_outputs(classifier, adata, problem):
    path = classifier(problem_type=problem)
    annotate(adata, path)
    found = pipeline("cell-classification", model=path)(adata)
    for i, name in enumerate(("B cell", "T cell", "NK")):
        assert {of[i]["label"] for of in found} == {name}
        np.testing.assert_allclose([of[i]["score"] for of in found], adata.obs[f"stformer_{name}"], atol=1e-5)


def test_adapters_and_heads_without_names_are_refused(classifier, store, adata, tmp_path):
    path = classifier(id2label=None)
    with pytest.raises(ValueError, match="no names, but LABEL_0.*finetune"):
        pipeline("cell-classification", model=path)
    tokenizer = GeneTokenizer.from_pretrained(path)
    masked = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, **SMALL))
    masked.save_pretrained(tmp_path / "masked")
    tokenizer.save_pretrained(tmp_path / "masked")
    with pytest.raises(ValueError, match="a head that was not trained"):
        pipeline("cell-classification", model=str(tmp_path / "masked"))

    folder = str(tmp_path / "adapter")
    other = classifier(id2label={0: "healthy", 1: "ill"})
    finetune(store, "cell_type", model=other, lora=2, output=folder, num_train_epochs=0)
    with pytest.raises(ValueError, match="adapter.*annotate"):
        pipeline("cell-classification", model=folder)
    annotate(adata, folder)
    classify = pipeline(
        "cell-classification",
        model=load_model(folder, AutoModelForSequenceClassification),
        tokenizer=load_tokenizer(folder),
    )
    labels = adata.obs["stformer_label"].astype(object)
    assert [of["label"] for of in classify(adata)] == labels.where(labels.notna(), None).tolist()


@pytest.mark.slow  # several seconds
def test_a_saved_pipeline_runs_without_the_plugin(classifier, adata, tmp_path):
    path = classifier()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    pipelines = [pipeline(task, model=path) for task in ("cell-embedding", "cell-classification")]
    folders = [str(tmp_path / name) for name in ("embedding", "classes")]
    for each, folder in zip(pipelines, folders, strict=True):
        each.save_pretrained(folder)
    command = [sys.executable, "-c", WITHOUT_PLUGIN, str(tmp_path / "cells.h5ad"), *folders]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    embedding, classes = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(embedding, pipelines[0](adata), atol=1e-6)
    for own, other in zip(pipelines[1](adata), classes, strict=True):
        assert own["label"] == other["label"]
        np.testing.assert_allclose(own["score"], other["score"], atol=1e-6)
