"""Write predictions for cells into `obs`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from .. import __version__
from ..batches.evaluating import length_to_read
from ..genes.wrong_names import must_have, warn_of_missing
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..store.cell_store import CellStore
from ..training.calibration import OutOfFold, changed_weight, load_out_of_fold
from ..training.cell_heads import CellHead, read_heads
from ..training.loading import is_model, name_of, unwrap
from .ancestors import ancestors_of, climb, read_parents
from .batches import load, run, table_of
from .rejection import UNKNOWN, check_reject, rejection_thresholds, typicality

_HOW_TO_CLUSTER = (
    " Clusters are made by embed(adata, model), scanpy.pp.neighbors(adata, use_rep='X_stformer') and "
    "scanpy.tl.leiden(adata), which writes obs['leiden']."
)


def annotate(
    adata: AnnData | CellStore,
    model: str | PreTrainedModel,
    *,
    tokenizer: GeneTokenizer | None = None,
    top_k: int = 1,
    reject: float | None = None,
    parents: Mapping[str, str] | str | Path | None = None,
    over: str | None = None,
    key_added: str = "stformer",
    layer: str | None = None,
    fractional: bool = False,
    batch_size: int = 64,
    device: str | None = None,
    dtype: str | None = None,
    min_coverage: float | None = None,
    distributed: bool = False,
) -> AnnData | None:
    """Write the predictions of a classifier or regression model for every cell into `adata.obs`.

    Parameters
    ----------
    adata : AnnData, MuData, SpatialData or CellStore
        Cells with raw counts in X, raw or a layer. Labels are written to the gene modality of a MuData, or to the
        table of a SpatialData. A backed AnnData and a store are read in blocks.
    model : str or PreTrainedModel
        Checkpoint of a classifier, or folder of a PEFT adapter, which is loaded with its base; or a classifier,
        possibly wrapped by PEFT or torch. Its configuration defines the head (`problem_type`, `id2label`).
    tokenizer : GeneTokenizer, optional
        The checkpoint's own by default.
    top_k : int, default: 1
        Number of most probable classes to write to obs.
    reject : float, optional
        Nominal share of the known cells to label "unknown", such as 0.05. A cell is rejected if it is less typical
        than all but this share of the training cells with the same predicted label, each predicted by a model that had
        not seen it. By default no cell is rejected.
    parents : mapping, str or Path, optional
        Coarser label of each class, such as {"CD4 T cell": "T cell"}, and of each coarser label that has one itself;
        or a CSV file with the columns `child` and `parent`. A rejected cell gets the nearest ancestor of its most
        probable class that does not reject it, by the sum of the probabilities of the ancestor's classes. Needs
        `reject`.
    over : str, optional
        Column of obs with clusters, such as "leiden": the most frequent label of each cluster, "unknown" included, is
        also written.
    key_added : str, default: "stformer"
        Prefix of the results, which depend on the model. Results of an earlier call with the same prefix are removed.

        - One class per cell: `obs[key_added + "_label"]` is the most probable class (categorical; missing for a cell
          without a known gene), `_score` its probability and `_margin` the difference to the next probability
          (float32; NaN for such a cell). With `top_k`, `_label_2`, `_score_2` and so on follow; with `over`,
          `_majority` is the label of the cluster. `obsm[key_added + "_probabilities"]` has the probabilities of all
          classes (float32, n_obs x n_classes). A rejected cell keeps its score and probabilities.
        - Several label columns: all of these for each column, with its name after `key_added`.
        - Multiple labels per cell: `obs[key_added + "_" + label]` is the probability of each.
        - Numbers: `obs[key_added + "_" + name]` is the number (`_value` if the model does not name it).

        The names of the columns and classes, and the kind of model, are written to `uns[key_added + "_annotation"]`.
    layer, fractional, batch_size, device, dtype, min_coverage, distributed
        As for `embed`.

    Returns
    -------
    AnnData or None
        For a store an AnnData with its obs and genes, without counts, that holds the results; otherwise None.

    Raises
    ------
    ValueError
        The model is not a classifier of cells, or its head was not trained. With `reject`: it has no out-of-fold
        predictions, or was trained after they were made. An option is invalid, or requires classes. The cells have no
        counts, or too few of the model's genes. The tokenizer does not fit, or outputs are not finite.
    FileNotFoundError, TypeError
        As for `embed`.

    Notes
    -----
    Cells are rejected by cross-conformal prediction (Vovk 2015): for each label with enough training cells (19 for
    0.05), and for the other labels together. The share holds for cells that are exchangeable with the training cells.
    Cells of another donor, plate or protocol are not: more of them are rejected.
    How typical a cell is combines its highest probability and its distance to the nearest centroid of a class. A model
    that cross-validation chose to train beyond its start has no centroids: its probability alone counts. It rejects
    fewer cells, since the models of the cross-validation are trained on fewer cells and are less certain.

    The threshold of an ancestor comes from the training cells whose predicted label is one of its classes, so it too
    rejects that share of them; with too few of these it labels no cell. An ancestor of all classes is not used.
    """
    table = table_of(adata, layer)
    must_have(table.obs, "obs", over, _HOW_TO_CLUSTER)
    if top_k < 1:
        raise ValueError(f"top_k={top_k}: must be at least 1.")
    if is_model(model):
        read_heads(unwrap(model))  # before the cells are read
    model_name = name_of(model)
    classifier, tokenizer = load(model, tokenizer, AutoModelForSequenceClassification, min_coverage)
    heads = read_heads(classifier)
    kind, of_classes = heads[0].kind, heads[0].kind == "single_label_classification"
    if not of_classes and (top_k > 1 or any(option is not None for option in (reject, parents, over))):
        raise ValueError(
            f"top_k, reject, parents and over are for classes, and the model is for {kind}: leave them out."
        )
    for head in heads if of_classes else ():
        warn_of_missing(head.names, "The model" if head.column is None else f"{head.column!r} of the model")
    check_reject(reject, [name for head in heads for name in head.names])
    if parents is not None and reject is None:
        raise ValueError("parents are for rejected cells: pass reject too, such as reject=0.05.")
    parents = None if parents is None else read_parents(parents)
    ancestors: dict[str | None, list[list[str]] | None] = {head.column: None for head in heads}
    if parents is not None:
        with_parents = [head for head in heads if any(name in parents for name in head.names)]
        ancestors |= {head.column: ancestors_of(head.names, parents) for head in with_parents or heads}
    of_heads = [] if reject is None else _load_out_of_fold(model, classifier, heads)
    centroids = [of.centroids for of in of_heads if of.centroids is not None]  # of all label columns, or of none

    def forward(model: PreTrainedModel, batch: dict[str, torch.Tensor], types: torch.Tensor) -> torch.Tensor:
        outputs = model(**batch, output_hidden_states=bool(centroids))
        found = [head.predictions(outputs.logits) for head in heads]
        if centroids:
            hidden, boundaries = outputs.hidden_states[-1], batch.get("cu_seq_lens_q")
            states = model.pool(hidden, types, batch.get("attention_mask"), boundaries).cpu().double()
            for of in centroids:
                distances = torch.cdist(states, torch.from_numpy(of).to(states))
                found.append(distances.amin(dim=1, keepdim=True).to(found[0]))
        return torch.cat(found, dim=1)

    predictions, n_genes, source = run(
        adata,
        classifier,
        tokenizer,
        forward,
        layer=layer,
        fractional=fractional,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        desc="annotate",
        with_phenotypes=True,  # as in training
        max_length=length_to_read(classifier.base_model, tokenizer, classifier.config.classifier_pooling),
        distributed=distributed,
    )
    columns: dict[str, Any] = {}
    matrices: dict[str, np.ndarray] = {}
    n_outputs = sum(len(head.names) for head in heads)
    predictions, distances = predictions[:, :n_outputs], predictions[:, n_outputs:]
    for i, head in enumerate(heads):
        of_head, prefix = predictions[:, head.outputs], head.named(key_added)
        columns |= head.columns(of_head, n_genes > 0, prefix, top_k)
        if not of_classes:
            continue
        label = f"{prefix}_label"
        matrices[f"{prefix}_probabilities"] = np.where(n_genes[:, None] > 0, of_head, np.float32(np.nan))
        if reject is not None:
            columns[label], columns[f"{prefix}_typicality"] = _reject(
                columns[label], of_head, distances[:, i : i + 1], of_heads[i], reject, ancestors[head.column]
            )
        if over is not None:
            columns[f"{prefix}_majority"] = majority(columns[label], table.obs[over])
    settings = {
        "model": model_name,
        "problem_type": kind,
        "columns": list(columns),
        "obsm": list(matrices),
        **({"classes": _classes(heads)} if of_classes else {}),
        **({} if reject is None else {"reject": reject}),
        **({} if parents is None else {"parents": {"child": [*parents], "parent": [*parents.values()]}}),
        **({} if over is None else {"over": over}),
        "version": __version__,
        "counts_in": source.counts_in,
        "vocabulary_fingerprint": tokenizer.fingerprint,
    }
    _write(table, f"{key_added}_annotation", columns, matrices, settings)
    return table if isinstance(adata, CellStore) else None


def _classes(heads: list[CellHead]) -> list[str] | dict[str, list[str]]:
    """Return the names of the classes; by label column, if there are several."""
    return {head.column: head.names for head in heads if head.column is not None} or heads[0].names


def _load_out_of_fold(
    model: str | PreTrainedModel, classifier: PreTrainedModel, heads: list[CellHead]
) -> list[OutOfFold]:
    """Return the out-of-fold predictions of each head of a model, which must have some, and still have its weights."""
    found = load_out_of_fold(model)
    if found is None:
        raise ValueError(
            "The model has no out-of-fold predictions to reject cells by. finetune keeps them (in the folder of the "
            "checkpoint, or at model.out_of_fold), unless the number of epochs is given: leave it out, or pass 0."
        )
    of_heads = [found[str(head.column)] for head in heads] if isinstance(found, dict) else [found]
    if of_heads[0].weights is not None:
        changed = changed_weight(of_heads[0].weights, unwrap(model, merge=True) if is_model(model) else classifier)
        if changed is not None:
            raise ValueError(
                f"The out-of-fold predictions are not those of this model: it was trained further, or has another "
                f"adapter ({changed} has changed since). Fine-tune again with finetune, or leave out reject=…"
            )
    return of_heads


def _write(table: AnnData, key: str, columns: Mapping, matrices: Mapping[str, np.ndarray], settings: dict) -> None:
    """Write results to obs, obsm and `uns[key]`, and remove those of an earlier call that this one does not write."""
    former = table.uns.get(key, {})
    stale = set(former.get("columns", ())) - set(columns)
    table.obs = table.obs.drop(columns=[column for column in stale if column in table.obs])
    for name in set(former.get("obsm", ())) - set(matrices):
        table.obsm.pop(name, None)
    for column, values in columns.items():
        table.obs[column] = values
    for name, matrix in matrices.items():
        table.obsm[name] = matrix
    table.uns[key] = settings


def _reject(
    labels: pd.Categorical,
    probabilities: np.ndarray,
    distances: np.ndarray,
    out_of_fold: OutOfFold,
    reject: float,
    ancestors: list[list[str]] | None,
) -> tuple[pd.Categorical, np.ndarray]:
    """Replace the labels of cells below the threshold of their label by an ancestor or "unknown".

    Return also the typicality. `distances` (n, 1) has no column if the model has no centroids.
    """
    of_known = np.exp(out_of_fold.predictions)
    far_known = [] if out_of_fold.distances is None else [-out_of_fold.distances]
    known = np.column_stack([of_known.max(axis=1), *far_known])
    measures, n_classes = np.column_stack([probabilities.max(axis=1), -distances]), len(labels.categories)
    predicted = out_of_fold.predictions.argmax(axis=1)
    thresholds = rejection_thresholds(typicality(known, known), predicted, n_classes, reject)
    is_labelled, typical = labels.codes >= 0, typicality(known, measures)
    rejected = np.flatnonzero(is_labelled & (typical < thresholds[labels.codes]))
    found = labels.astype(object)
    found[rejected] = UNKNOWN
    classes: list[str] = list(labels.categories)
    above: list[str] = []
    if ancestors is not None:
        far = None if out_of_fold.distances is None else distances[rejected, 0]
        accepted = climb(
            *(classes, ancestors, labels.codes[rejected], probabilities[rejected], far),
            *(of_known, out_of_fold.distances, reject),
        )
        found[rejected] = np.where(accepted == "", UNKNOWN, accepted)
        above = list(dict.fromkeys(name for chain in ancestors for name in chain if name not in classes))
    replaced = pd.Categorical(found, [*classes, *above, UNKNOWN])
    return replaced, np.where(is_labelled, typical, np.nan).astype(np.float32)


def majority(labels: pd.Categorical, clusters: pd.Series) -> pd.Categorical:
    """Return the most frequent label of the cluster of each cell; of equally frequent ones, the first category.

    It is missing for cells without a cluster, and in clusters without a label.
    """
    clusters = pd.Categorical(clusters)
    counts = np.zeros((len(clusters.categories), len(labels.categories)), np.int64)
    counted = (clusters.codes >= 0) & (labels.codes >= 0)
    np.add.at(counts, (clusters.codes[counted], labels.codes[counted]), 1)
    winners = np.where(counts.any(axis=1), counts.argmax(axis=1), -1)
    codes = np.append(winners, -1)[clusters.codes]  # the code of no cluster is -1
    return pd.Categorical.from_codes(codes, labels.categories)
