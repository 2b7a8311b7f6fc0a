"""Export a model of cells to ONNX, optionally with int8 weights, and compare it with torch."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anndata import AnnData
from scipy import sparse
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from ..models.gene_bert.gene_columns import is_id
from ..models.gene_bert.heads import default_pooling, pool
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..sources.open_source import open_source
from ..training.cell_heads import CellHead, read_heads
from ..training.loading import name_of
from .batches import TokenBatch, at_work, is_classifier, load, read_batches

MODEL, MODEL_INT8, SETTINGS = "model.onnx", "model_int8.onnx", "onnx_settings.json"
_TOLERANCE = 1e-3  # of outputs, relative to the largest one
_BATCHES = (1, 4, 27)  # cells of the batches that are compared


class _ForOnnx(nn.Module):
    """Cells -> logits, or the pooled state; takes tensors in the order of `names`."""

    def __init__(self, model: PreTrainedModel, names: list[str], pooling: str | None):
        super().__init__()
        self.model, self.names, self.pooling = model, names, pooling

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        inputs = dict(zip(self.names, tensors, strict=True))
        if self.pooling is None:
            return self.model(**inputs).logits
        types, mask = inputs.get("token_type_ids"), inputs["attention_mask"]
        return pool(self.model(**inputs).last_hidden_state, types, mask, self.pooling)


def export_onnx(
    model: str | PreTrainedModel,
    output: str | Path,
    *,
    tokenizer: GeneTokenizer | None = None,
    adata: AnnData | None = None,
    int8: bool = False,
    layer: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a classifier, or the encoder of any other model, as ONNX for any number of cells and tokens.

    Parameters
    ----------
    model : str or PreTrainedModel
        GeneBert checkpoint, folder of a PEFT adapter, or model.
    output : str or Path
        Folder for `model.onnx`, the tokenizer, and `onnx_settings.json`: the names of inputs and output, classes or
        pooling, and the comparison.
    tokenizer : GeneTokenizer, optional
        The checkpoint's own by default.
    adata : AnnData, optional
        Cells to compare the exported model on; by default 32 random ones, for whom labels mean little.
    int8 : bool, default: False
        Also write `model_int8.onnx`, in which the linear layers of the encoder have int8 weights and activations
        (dynamic quantisation by onnxruntime). Embeddings, sums over genes and the head stay in float32.
    layer : str, optional
        Location of the counts in `adata`.
    overwrite : bool, default: False
        Replace a model that was exported to the folder before.

    Returns
    -------
    dict
        The settings. `comparison` has, for each file, `cells`, `max_abs_difference` of the outputs from torch,
        and for a classifier `same_labels`, the share of cells with the same most probable class (of cells and label
        columns, if there are several).

    Raises
    ------
    ValueError
        As for `embed`; `model.onnx` does not agree with torch.
    ImportError
        onnx, onnxscript or onnxruntime is missing, or torch is older than 2.7.
    FileExistsError
        The folder holds an exported model, and `overwrite` is False.
    """
    output = Path(output)
    if (output / MODEL).exists() and not overwrite:
        raise FileExistsError(f"{output} holds an exported model. Choose another output, or pass overwrite=True.")
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("Exporting needs onnx, onnxscript, onnxruntime: pip install 'stformer_hf[onnx]'") from error
    if not hasattr(torch.compiler, "is_exporting"):
        raise ImportError(f"Exporting needs torch 2.7 or later; this is {torch.__version__}.")
    of_cells = is_classifier(model)
    name = name_of(model)
    model, tokenizer = load(model, tokenizer, AutoModelForSequenceClassification if of_cells else AutoModel)
    pooling = None if of_cells else default_pooling(model.config)
    heads = read_heads(model) if of_cells else []
    output_name = "logits" if of_cells else "cell_state"  # "embedding" is a value inside the graph
    if not of_cells:
        model = model.base_model
    source = open_source(_random_cells(tokenizer) if adata is None else adata, layer)
    output.mkdir(parents=True, exist_ok=True)
    with at_work(model, "cpu"):
        batches = [next(read_batches(source, tokenizer, size, desc="compare")) for size in _BATCHES]
        random = next(read_batches(open_source(_random_cells(tokenizer)), tokenizer, _BATCHES[1], desc="trace"))
        names = list(random.inputs)
        if tokenizer.whole_cell and "measured_genes" not in names:
            names.append("measured_genes")
        exported = _ForOnnx(model, names, pooling).eval()
        tensors = [_tensors(batch, names, tokenizer) for batch in batches]
        expected, inputs = [exported(*of).numpy() for of in tensors], [[one.numpy() for one in of] for of in tensors]
    with torch.no_grad():
        # Random cells: those to compare on may be too few, or have too few genes, for lengths that vary.
        example = tuple(tensor.clone() for tensor in _tensors(random, names, tokenizer))
        _export(exported, example, names, output_name, output / MODEL)
    for former in (MODEL_INT8, SETTINGS):  # of another model
        (output / former).unlink(missing_ok=True)
    if int8:
        _quantise(output / MODEL, output / MODEL_INT8)
    settings: dict[str, Any] = {
        "model": str(name),
        "vocabulary_fingerprint": tokenizer.fingerprint,
        "inputs": names,
        "output": output_name,
        **(_describe(heads) if of_cells else {"pooling": pooling}),
        "comparison": {},
    }
    for file in (MODEL, MODEL_INT8) if int8 else (MODEL,):
        found = [run_onnx(output / file, dict(zip(names, arrays, strict=True))) for arrays in inputs]
        settings["comparison"][file] = _compare(expected, found, heads)
    scale = max(1.0, *(float(np.abs(of).max()) for of in expected))
    difference = settings["comparison"][MODEL]["max_abs_difference"]
    if not difference <= _TOLERANCE * scale:
        raise ValueError(
            f"{output / MODEL} differs from torch by up to {difference:.3g} (outputs are up to {scale:.3g}): do not "
            "use it, and report this with your versions (stformer-hf doctor)."
        )
    tokenizer.save_pretrained(output)
    (output / SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")
    return settings


def run_onnx(path: str | Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Run an exported file once: float32 array (n_cells, n_outputs). A server keeps the session instead."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {one.name: inputs[one.name] for one in session.get_inputs()})[0]


def _export(module: nn.Module, example: tuple, names: list[str], output_name: str, path: Path) -> None:
    cells, length, entries = (torch.export.Dim(name, min=2) for name in ("cells", "length", "entries"))
    second = {"cell_genes": {1: entries}, "cell_counts": {1: entries}, "measured_genes": {}}
    shapes = tuple({0: cells, **second.get(name, {1: length})} for name in names)
    with _errors_only():
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            dynamic_shapes=(shapes,),
            input_names=names,
            output_names=[output_name],
            verbose=False,
        )
    program.save(path)


def _quantise(path: Path, to: Path) -> None:
    """Quantise the linear layers of the encoder; sums over genes and the head stay in float32."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(path, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    of_layers = [
        node.name
        for node in graph.node
        if node.op_type in ("MatMul", "Gemm")
        and node.input[1] in constants
        and any(".layers." in entry.value for entry in node.metadata_props if entry.key.endswith("name_scopes"))
    ]
    if not of_layers:
        raise ValueError(f"{path} has no linear layers of an encoder to quantise: leave out int8.")
    with _errors_only():
        quantize_dynamic(path, to, nodes_to_quantize=of_layers, weight_type=QuantType.QInt8, per_channel=True)


@contextmanager
def _errors_only() -> Iterator[None]:
    """Leave out the warnings of the exporters: none is about the model, and what they write is compared with torch."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _describe(heads: list[CellHead]) -> dict[str, Any]:
    """Return the problem type and the names of the outputs; by label column, in their order, if there are several."""
    several = {"label_columns": [[head.column, head.names] for head in heads]} if len(heads) > 1 else {}
    return {"problem_type": heads[0].kind, **(several or {"labels": heads[0].names})}


def _compare(expected: list[np.ndarray], found: list[np.ndarray], heads: list[CellHead]) -> dict[str, float]:
    compared = {
        "cells": sum(map(len, expected)),
        "max_abs_difference": max(float(np.abs(a - b).max()) for a, b in zip(expected, found, strict=True)),
    }
    same = [
        a[:, head.outputs].argmax(axis=1) == b[:, head.outputs].argmax(axis=1)
        for a, b in zip(expected, found, strict=True)
        for head in heads
        if len(head.names) > 1
    ]
    if same:
        compared["same_labels"] = float(np.concatenate(same).mean())
    return compared


def _tensors(batch: TokenBatch, names: list[str], tokenizer: GeneTokenizer) -> tuple[torch.Tensor, ...]:
    """Return the inputs in order; a file with all genes has all of them measured."""
    every = torch.ones(len(batch.rows), len(tokenizer.genes), dtype=torch.bool)
    return tuple(batch.inputs.get(name, every) for name in names)


def _random_cells(tokenizer: GeneTokenizer, n_cells: int = 32, n_genes: int = 200) -> AnnData:
    """Make cells with random counts in random genes of the tokenizer."""
    rng = np.random.default_rng(0)
    genes = [gene for gene in tokenizer.genes if is_id(gene)] or list(tokenizer.genes)
    per_cell = rng.integers(2, max(3, min(n_genes, len(genes))), n_cells)
    columns = np.concatenate([rng.choice(len(genes), n, replace=False) for n in per_cell])
    indptr = np.concatenate([[0], np.cumsum(per_cell)])
    counts = rng.geometric(0.4, len(columns)).astype(np.float32)
    cells = AnnData(sparse.csr_matrix((counts, columns, indptr), shape=(n_cells, len(genes))))
    cells.var_names = genes
    return cells
