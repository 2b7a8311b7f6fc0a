"""Models exported to ONNX, run by onnxruntime on other numbers of cells than at the export."""

import json
import warnings

import numpy as np
import pytest
import torch

from stformer_hf import GeneBertConfig, GeneBertForClassification, GeneBertModel, GeneTokenizer, annotate, embed
from stformer_hf.cli import main
from tests.models.test_whole_cell import randomise

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
if not hasattr(torch.compiler, "is_exporting"):
    pytest.skip("exporting needs torch 2.7", allow_module_level=True)


def save(folder, store, model_class, whole_cell, **fields):
    genes = [*store.gene_ids, "ENSG90000000000"]  # the last one is in no cell
    tokenizer = GeneTokenizer(genes, bin_edges=[0.5, 1.5], whole_cell=whole_cell, max_length=12)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    torch.manual_seed(0)
    config = GeneBertConfig.from_tokenizer(tokenizer, **sizes, initializer_range=0.3, residual_init="normal", **fields)
    model = model_class(config)
    if whole_cell:
        randomise(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_file(folder, name, adata):
    """What a server does: the tokenizer of the folder, and onnxruntime."""
    tokenizer = GeneTokenizer.from_pretrained(folder)
    batch = tokenizer(adata, padding=True, return_tensors="np")
    session = onnxruntime.InferenceSession(folder / name)
    return session.run(None, {one.name: batch[one.name] for one in session.get_inputs()})[0]


@pytest.mark.slow
def test_a_classifier_labels_as_torch_does(store, adata, tmp_path, capsys, caplog):
    labels = {"id2label": {0: "B cell", 1: "T cell"}, "label2id": {"B cell": 0, "T cell": 1}}
    save(tmp_path / "m", store, GeneBertForClassification, True, wide_head=True, **labels)
    out = tmp_path / "onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["export", "--model", str(tmp_path / "m"), "--output", str(out), "--int8"]) == 0
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    printed = capsys.readouterr().out
    assert "model.onnx" in printed and "model_int8.onnx" in printed and "the same label" in printed
    settings = json.loads((out / "onnx_settings.json").read_text())
    assert settings["labels"] == ["B cell", "T cell"] and settings["output"] == "logits"
    assert settings["comparison"]["model.onnx"]["same_labels"] == 1
    annotate(adata, str(tmp_path / "m"))
    cells = adata[adata.obs["stformer_label"].notna()]
    for chosen in (cells, cells[:1], cells[7:9]):
        logits = run_file(out, "model.onnx", chosen)
        found = np.exp(logits - logits.max(axis=1, keepdims=True))
        found /= found.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(found.max(axis=1), chosen.obs["stformer_score"], atol=1e-4)
        names = [settings["labels"][i] for i in found.argmax(axis=1)]
        assert names == chosen.obs["stformer_label"].tolist()
    small = run_file(out, "model_int8.onnx", cells)
    large = run_file(out, "model.onnx", cells)
    assert 0 < np.abs(small - large).max() < 0.5 * np.abs(large).max()
    assert settings["comparison"]["model_int8.onnx"]["max_abs_difference"] > 0
    assert main(["export", "--model", str(tmp_path / "m"), "--output", str(out)]) == 1
    assert "holds an exported model. Choose another output, or pass --overwrite." in capsys.readouterr().err


@pytest.mark.slow  # a second export; the models' own tests export encoders too
def test_an_encoder_embeds_as_torch_does(store, adata, tmp_path):
    save(tmp_path / "m", store, GeneBertModel, False)
    adata[:1].write_h5ad(tmp_path / "cells.h5ad")  # the model is not traced on these
    command = ["export", "--model", str(tmp_path / "m"), "--output", str(tmp_path / "onnx")]
    assert main([*command, "--data", str(tmp_path / "cells.h5ad")]) == 0
    settings = json.loads((tmp_path / "onnx" / "onnx_settings.json").read_text())
    assert settings["pooling"] == "mean" and settings["inputs"] == ["input_ids", "token_type_ids", "attention_mask"]
    embed(adata, str(tmp_path / "m"))
    found = run_file(tmp_path / "onnx", "model.onnx", adata)
    np.testing.assert_allclose(found, adata.obsm["X_stformer"], atol=1e-4)


def test_a_file_that_disagrees_is_refused(store, tmp_path, monkeypatch):
    from stformer_hf.inference import export

    save(tmp_path / "m", store, GeneBertModel, False)
    monkeypatch.setattr(export, "_export", lambda *args: None)
    (tmp_path / "onnx").mkdir()
    for former in ("model_int8.onnx", "onnx_settings.json"):
        (tmp_path / "onnx" / former).write_text("of an earlier model")
    monkeypatch.setattr(export, "run_onnx", lambda path, inputs: np.full((len(inputs["input_ids"]), 16), 9.0))
    with pytest.raises(ValueError, match="differs from torch by up to"):
        export.export_onnx(str(tmp_path / "m"), tmp_path / "onnx")
    assert not list((tmp_path / "onnx").iterdir())
