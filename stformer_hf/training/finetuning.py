"""Fine-tune a classifier of cells, which starts at linear models and is trained further only if that helps."""

from __future__ import annotations

import copy
import itertools
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from torch import nn
from torch.utils.data import IterableDataset
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..batches.collators import DataCollatorForCellClassification
from ..batches.draws import sampling_columns
from ..batches.parts import as_selection
from ..evaluation.metrics import balanced_class_weights
from ..genes.wrong_names import must_have
from ..models.gene_bert.configuration_gene_bert import GeneBertConfig
from ..models.gene_bert.heads import IGNORE, fields_of_columns, label_columns_of
from ..models.gene_bert.modeling_gene_bert import GeneBertForClassification
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..sources.formats import expand, is_format
from ..sources.open_source import open_source
from ..store.cell_store import CellStore
from .adapting import adapt, check_adapts, layer_rates
from .calibration import OutOfFold
from .cell_heads import read_heads
from .cell_trainer import CellTrainer
from .defaults import FINETUNING, MAX_LENGTH
from .loading import is_adapter, is_model, load_model, tokenizer_of, unwrap
from .starts.classifier_start import ClassifierStart, run_cells, start_classifier
from .starts.labelled_cells import LabelledCells, labelled_cells
from .starts.linear_readers import fit_temperature, inner_folds, log_softmax

logger = logging.getLogger(__name__)

MOST_EPOCHS = 3
N_FOLDS = 2
FEW_LABELS = 50  # cells of the median class: with fewer, fine-tuning lowers the start more often than not
_EPOCHS_WITHOUT_START = 10
_PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


@dataclass
class Finetuning:
    """A classifier that is ready to train.

    Attributes
    ----------
    model : PreTrainedModel
        Initialised, with its tokenizer at `model.tokenizer`.
    tokenizer : GeneTokenizer
    cells : CellStore
        Training cells, with counts and labels.
    label_key : str or list of str
    num_train_epochs : float
        As chosen, or as given.
    start : dict of str to ClassifierStart, optional
        Start of a model that reads whole cells, by label column (None if there are not several).
    new_embedding : bool
        Whether the spectral views were fitted to these cells; False if the model has its own.
    balanced : bool
        Whether all classes have the same weight, whatever their number of cells.
    lora : int, optional
        Rank of the adapters that are trained instead of the encoder; see `adapt`.
    freeze : int
        Number of first layers that are not trained.
    layer_decay : float
        Learning rate of a layer, relative to that of the layer above it; see `layer_rates`.
    sampling : mapping, optional
        Which cells an epoch reads; see `CellTrainer`.
    out_of_fold : OutOfFold, or dict of str to OutOfFold, optional
        Predictions of training cells by models trained as this one will be; by label column if there are several. None
        if there are none: it does not start at linear models, or the number of epochs was passed.
    temperature : float or list of float, optional
        Temperature of the trained model, as in its configuration; that of the start by default.
    facts : dict
        Settings for the model card.
    """

    model: PreTrainedModel
    tokenizer: GeneTokenizer
    cells: CellStore
    label_key: str | list[str]
    num_train_epochs: float
    start: dict[str | None, ClassifierStart] | None = None
    new_embedding: bool = True
    balanced: bool = False
    lora: int | None = None
    freeze: int = 0
    layer_decay: float = 1.0
    sampling: Mapping[str, Any] | None = None
    out_of_fold: OutOfFold | dict[str, OutOfFold] | None = None
    temperature: float | list[float] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def known(self, cells: CellStore) -> CellStore:
        """Select the cells that have a number, or labels that the model knows; the number left out is logged."""
        for name in [self.label_key] if isinstance(self.label_key, str) else self.label_key:
            must_have(cells.obs, "obs", name, " (held-out cells)")
        heads, unknown = read_heads(unwrap(self.model)), []
        names = [head.column or self.label_key for head in heads]
        if all(isinstance(name, str) and name in cells.categories for name in names):
            labels = [cells.obs[name] for name in names]
            knows = [of.isin(head.names).to_numpy() for head, of in zip(heads, labels, strict=True)]
            others = [~is_known & of.notna().to_numpy() for is_known, of in zip(knows, labels, strict=True)]
            known = np.any(knows, axis=0) & ~np.any(others, axis=0)
            unknown = [name for of, other in zip(labels, others, strict=True) for name in of[other].unique()]
        elif getattr(unwrap(self.model).config, "label_columns", None):
            numeric = next(name for name in names if name not in cells.categories)
            raise ValueError(
                f"{numeric!r} of the held-out cells is not categorical, but the model predicts classes of it. Build "
                f"the store with classes=[{numeric!r}], or make it categorical, adata.obs[key].astype('category')."
            )
        else:
            numbers = cells.obs[self.label_key].to_numpy(np.float32)
            known = np.isfinite(numbers.reshape(len(cells), -1)).all(axis=1)
        if known.all():
            return cells
        logger.warning(
            f"{(~known).sum()} of {len(cells)} held-out cells are not evaluated: they have no {self.label_key!r}, or "
            f"a value that no training cell has ({', '.join(map(str, unknown[:10])) or 'none here'})."
        )
        return cells.select(known)

    def trainer(self, arguments: TrainingArguments, eval_cells: CellStore | None = None, **kwargs) -> CellTrainer:
        """Make the trainer; `kwargs` are those of `CellTrainer`, and the collator's `gene_dropout` and `packing`."""
        eval_cells = None if eval_cells is None else self.known(as_selection(eval_cells))
        options = {name: kwargs.pop(name) for name in ("gene_dropout", "packing") if name in kwargs}
        arguments.num_train_epochs = self.num_train_epochs
        self.model = adapt(self.model, self.lora, self.freeze)
        if self.temperature is not None:
            kwargs["callbacks"] = [*kwargs.get("callbacks", []), _SetTemperature(self.temperature)]
        kwargs |= _optimizer(self.model, arguments, self.layer_decay)
        trainer = CellTrainer(
            model=self.model,
            args=arguments,
            data_collator=_collator(self.tokenizer, self.label_key, arguments.seed, **options),
            train_dataset=self.cells,
            eval_dataset=eval_cells,
            processing_class=self.tokenizer,
            sampling=self.sampling,
            **kwargs,
        )
        trainer.out_of_fold = self.out_of_fold
        return trainer


class _SetTemperature(TrainerCallback):
    """Set the temperature of a model when its training ends."""

    def __init__(self, temperature: float | list[float]):
        self.temperature = temperature

    def on_train_end(self, args, state, control, *, model: PreTrainedModel, **_) -> None:
        unwrap(model).config.temperature = self.temperature


def finetune(
    cells: CellStore | AnnData | str | Path | Sequence[AnnData | str | Path],
    label_key: str | Sequence[str],
    *,
    model: str | PreTrainedModel | None = None,
    tokenizer: GeneTokenizer | None = None,
    output: str | Path | None = None,
    eval_cells: CellStore | str | Path | None = None,
    num_train_epochs: float | None = None,
    init: Literal["spectral", "random"] = "spectral",
    split_by: str | None = None,
    phenotypes: Sequence[str] = (),
    class_weights: Literal["none", "balanced"] = "none",
    problem_type: str | None = None,
    size: str = "tiny",
    max_length: int = MAX_LENGTH,
    layer: str | None = None,
    fractional: bool = False,
    seed: int = 0,
    training: Mapping[str, Any] | None = None,
    lora: int | None = None,
    freeze: int = 0,
    layer_decay: float = 1.0,
    sampling: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Fine-tune a classifier of cells.

    A new model starts at linear models of the training cells (see `start_classifier`). The number of epochs of
    further training, possibly 0, is chosen by inner cross-validation (see `choose_epochs`).

    Parameters
    ----------
    cells : CellStore (or Subset of one), AnnData, MuData, SpatialData, path, or list of them
        Labelled cells; those without a label or without counts are left out. A path is that of a store, or of files
        as in `CellStore.build`, which are first built into a temporary store.
    label_key : str, or list of str
        Column of obs: classes, or numbers with `problem_type="regression"`. A list of columns of categories: the model
        predicts a class in each, and learns the columns in which a cell has a label. A list of columns of 0 and 1 for
        multiple labels per cell, each of which must have a value.
    model : str or PreTrainedModel, optional
        Pretrained checkpoint, or model; a new one by default. A model that reads whole cells keeps its embedding, and
        its heads start at linear models of it.
    tokenizer : GeneTokenizer, optional
        Tokenizer of a model object; by default `model.tokenizer`, or the checkpoint's.
    output : str or Path, optional
        Folder to save the model, its tokenizer and `out_of_fold.safetensors` in.
    eval_cells : CellStore or path of one, optional
        Held-out cells, evaluated at the end of each epoch; nothing is chosen on them. Cells of classes that no
        training cell has are left out, with a warning.
    num_train_epochs : float, optional
        Epochs of training; 0 keeps the start as it is. By default chosen by cross-validation; 10 from random weights,
        and for a model that does not read whole cells.
    init : {"spectral", "random"}, default: "spectral"
        Whether the classifier starts at linear models (for a new model, of the spectral views of the cells), or at
        random weights.
    split_by : str, optional
        Obs column, such as the donor; cells of one group are never in both training and validation of a choice.
    phenotypes : sequence of str, optional
        Phenotype tokens that the model may read; none by default, since a phenotype may be the label by another name.
    class_weights : {"none", "balanced"}, default: "none"
        "balanced" gives all classes of a column the same weight, whatever their number of cells.
    problem_type : str, optional
        "single_label_classification", "multi_label_classification" or "regression"; inferred from the columns by
        default. With the first, integers and booleans of an AnnData are classes, as categories always are; those of a
        single boolean column are classes by default.
    size : str, default: "tiny"
        Size of a new model.
    max_length : int, default: 8
        Maximum number of tokens per cell, for a new model. `[CLS]` reads all genes in any case.
    layer : str, optional
        Layer of the AnnData that holds the counts.
    fractional : bool, default: False
        Accept fractional counts, such as estimates.
    seed : int, default: 0
    training : dict, optional
        `TrainingArguments` that override `training.defaults.FINETUNING`.
    lora : int, optional
        Train LoRA adapters of this rank instead of the encoder's weights, and the heads in full; for a checkpoint.
        `output` then holds the adapter alone, and is loaded with the checkpoint. Needs PEFT.
    freeze : int, default: 0
        Number of first layers that are not trained, with the embeddings; for a checkpoint.
    layer_decay : float, default: 1.0
        Learning rate of each layer, relative to that of the layer above it, such as 0.8; for a checkpoint.
    sampling : mapping, optional
        Which cells an epoch reads, such as {"by": "donor"}; see `CellTrainer`. Weights must be a column. The start at
        linear models does not depend on it.

    Returns
    -------
    PreTrainedModel
        In evaluation mode, with its tokenizer at `model.tokenizer`, so that `annotate(new, model)` works, and its
        out-of-fold predictions at `model.out_of_fold`, so that `annotate(new, model, reject=0.05)` does. They are
        None without linear models, and if `num_train_epochs` is set above 0. With `lora`, a
        `peft.PeftModel`.

    Raises
    ------
    ValueError
        A column is missing; no cell is labelled; the labels do not fit the problem; the tokenizer does not fit.
    """
    if isinstance(cells, IterableDataset):
        raise ValueError("finetune reads the cells several times: pass the files of the stream, or a store of them.")
    cells = as_selection(cells)
    if isinstance(cells, (str, Path)) and is_format(cells, "CellStore"):
        cells = CellStore(cells)
    if isinstance(eval_cells, (str, Path)):
        eval_cells = CellStore(eval_cells)
    with tempfile.TemporaryDirectory() as folder:
        if not isinstance(cells, CellStore):
            keys = [label_key] if isinstance(label_key, str) else list(label_key)
            columns = [*keys, *(name for name in (split_by, *phenotypes) if name is not None)]
            columns += sampling_columns(sampling)
            sources = [open_source(source, layer, fractional) for source in expand(cells)]
            for source, name in itertools.product(sources, columns):
                must_have(source.obs, "obs", name, f" ({source.name})")
            of_classes = problem_type == "single_label_classification" or (
                problem_type != "regression"
                and isinstance(label_key, str)
                and all(pd.api.types.is_bool_dtype(source.obs[label_key].dtype) for source in sources)
            )
            cells = CellStore.build(
                Path(folder) / "store",
                cells,
                obs=list(dict.fromkeys(columns)),
                classes=keys if of_classes else [],
                layer=layer,
                fractional=fractional,
                report=False,
            )
        arguments = TrainingArguments(
            output_dir=str(output or folder),
            **{
                **FINETUNING,
                "seed": seed,
                "save_strategy": "no" if output is None else "epoch",
                "eval_strategy": "no" if eval_cells is None else "epoch",
                "dataloader_pin_memory": torch.cuda.is_available(),
                **(training or {}),
            },
        )
        prepared = prepare_classifier(
            cells,
            label_key,
            arguments,
            model=model,
            tokenizer=tokenizer,
            num_train_epochs=num_train_epochs,
            init=init,
            split_by=split_by,
            phenotypes=phenotypes,
            class_weights=class_weights,
            problem_type=problem_type,
            size=size,
            max_length=max_length,
            lora=lora,
            freeze=freeze,
            layer_decay=layer_decay,
            sampling=sampling,
        )
        trainer = prepared.trainer(arguments, eval_cells)
        if prepared.num_train_epochs > 0:
            trainer.train()
        if output is not None:
            trainer.save_model(str(output))
        prepared.model.out_of_fold = prepared.out_of_fold
        return prepared.model.eval()


def prepare_classifier(
    cells: CellStore,
    label_key: str | Sequence[str],
    arguments: TrainingArguments,
    *,
    model: str | PreTrainedModel | None = None,
    tokenizer: GeneTokenizer | None = None,
    num_train_epochs: float | None = None,
    init: str = "spectral",
    split_by: str | None = None,
    phenotypes: Sequence[str] = (),
    class_weights: str = "none",
    problem_type: str | None = None,
    size: str = "tiny",
    max_length: int = MAX_LENGTH,
    model_config: Mapping[str, Any] | None = None,
    tokenizer_config: Mapping[str, Any] | None = None,
    lora: int | None = None,
    freeze: int = 0,
    layer_decay: float = 1.0,
    sampling: Mapping[str, Any] | None = None,
) -> Finetuning:
    """Make (or load) the classifier of some cells, start it, and choose how long to train it.

    Parameters are those of `finetune`; `arguments` hold the seed and the settings of training, `model_config` fields
    of `GeneBertConfig`, and `tokenizer_config` settings of `GeneTokenizer` for a new model.

    Returns
    -------
    Finetuning
    """
    check_adapts(model, lora, freeze, layer_decay)
    _check_option("init", init, ("spectral", "random"))
    _check_option("class_weights", class_weights, ("none", "balanced"))
    if problem_type is not None:
        _check_option("problem_type", problem_type, _PROBLEMS)
    cells, labels, key, classes, problem_type = _labelled(cells, label_key, problem_type)
    if class_weights != "none" and problem_type != "single_label_classification":
        raise ValueError(f"class_weights={class_weights!r} is for classes, and the problem is {problem_type}.")
    head: dict[str, Any] = {
        "problem_type": problem_type,
        **{"class_weights": None, "reader_weights": None, "temperature": 1.0, "label_columns": None},
        **(model_config or {}),
    }
    if classes and not isinstance(key, str):
        head |= fields_of_columns(classes)
    else:
        columns = [key] if isinstance(key, str) else key
        names = classes[columns[0]] if classes else columns
        head |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    set_seed(arguments.seed)
    if model is None:
        settings = {"whole_cell": True, "max_length": max_length, **(tokenizer_config or {})}
        tokenizer = GeneTokenizer.from_store(cells, **settings)
        wide = {"wide_head": True} if tokenizer.whole_cell else {}
        classifier = GeneBertForClassification(GeneBertConfig.from_tokenizer(tokenizer, size=size, **wide, **head))
    else:
        classifier, tokenizer = _load(model, tokenizer, head)
    config = classifier.config
    left_out = [name for name in tokenizer.included_phenotypes if name not in phenotypes]
    if left_out:
        logger.warning(
            f"The phenotype tokens of {', '.join(left_out)} are left out: one of them may be the label under another "
            "name. List those that the model may read: phenotypes=[…], or --phenotypes."
        )
    tokenizer.included_phenotypes = list(phenotypes)
    classifier.tokenizer = tokenizer
    facts: dict[str, Any] = {"label": key, "pooling": config.classifier_pooling}
    if config.classifier_pooling == "cls" and not tokenizer.add_cls:
        raise ValueError("The tokenizer adds no [CLS]: use --pooling mean.")
    balanced = class_weights == "balanced"
    if balanced and classes:
        weights = [balanced_class_weights(cells.obs[name], of_column) for name, of_column in classes.items()]
        config.class_weights = [weight for of_column in weights for weight in of_column]
    if init == "random" or not getattr(config, "wide_head", False):
        epochs = _EPOCHS_WITHOUT_START if num_train_epochs is None else num_train_epochs
        return Finetuning(
            *(classifier, tokenizer, cells, key, epochs),
            lora=lora,
            freeze=freeze,
            layer_decay=layer_decay,
            sampling=sampling,
            facts=facts,
        )

    groups = None
    if split_by is not None:
        must_have(cells.obs, "obs", split_by)
        if cells.obs[split_by].isna().any():
            raise ValueError(
                f"{int(cells.obs[split_by].isna().sum())} cells have no {split_by!r}: remove them, or fill it in."
            )
        groups = cells.obs[split_by].astype(str).to_numpy()
        for column in labelled_cells(config, labels):
            has = np.unique(groups[column.rows])
            if column.column is not None and len(has) < 2:
                raise ValueError(
                    f"All cells with a {column.column!r} have the same {split_by!r}, {has[0]!r}, but validation "
                    "needs another. Leave out split_by, or the column."
                )
    began = time.monotonic()
    start = start_classifier(
        classifier,
        tokenizer,
        cells,
        labels,
        groups=groups,
        new_embedding=model is None,
        seed=arguments.seed,
        balanced=balanced,
    )
    logger.info(f"The start took {time.monotonic() - began:.0f} s.")
    facts |= _facts_of(start, labelled_cells(config, labels))
    prepared = Finetuning(
        *(classifier, tokenizer, cells, key, num_train_epochs or 0, start, model is None, balanced),
        *(lora, freeze, layer_decay, sampling),
        facts=facts,
    )
    trained: dict[str | None, OutOfFold] | None = None
    if num_train_epochs is None:
        prepared.num_train_epochs, reasons, trained = choose_epochs(prepared, labels, groups, arguments)
        facts |= reasons
    out_of_fold: dict[str | None, OutOfFold] = {}
    temperatures = {column.name: column.temperature for column in label_columns_of(config)}
    for column in labelled_cells(config, labels):
        if column.column not in start:
            continue
        if trained is not None:
            found = trained[column.column]
            scale = fit_temperature(column.problem, found.predictions, found.labels)
            temperatures[column.column] = float(temperatures[column.column] * scale)
            found.predictions = (found.predictions / scale).astype(np.float32)
            if classes:
                found.predictions = log_softmax(found.predictions)
        elif prepared.num_train_epochs == 0:
            of, choice = start[column.column], start[column.column].choice
            found = OutOfFold(choice.out_of_fold, of.labels, of.rows, choice.distances, of.centroids)
        else:
            continue
        out_of_fold[column.column] = found
        if classes:
            calibration = found.facts(temperatures[column.column])
            facts |= {column.named(name): value for name, value in calibration.items()}
    by_column = {name: found for name, found in out_of_fold.items() if name is not None}
    prepared.out_of_fold = by_column or out_of_fold.get(None)
    if trained is not None:
        prepared.temperature = temperatures.get(None, list(temperatures.values()))
    return prepared


def choose_epochs(
    prepared: Finetuning, labels: np.ndarray, groups: np.ndarray | None, arguments: TrainingArguments
) -> tuple[float, dict[str, Any], dict[str | None, OutOfFold] | None]:
    """Choose for how many epochs to train beyond the start, 0 included.

    In each of 2 inner folds the start is fitted to the fold's training cells, trained for 3 epochs, and scored on the
    fold's other cells at the start and after each epoch. The number of epochs with the best mean score is taken if
    training beats the start by more than the standard error of the difference over cells, else 0. That difference is
    cross-fitted: each fold is scored at the epoch that is best in the other fold, because the best of three epochs
    flatters training on the cells that chose it. If no epoch beats the start in the first fold, the result is 0
    without trying the second; if the median class has fewer than 50 cells, or there is only one class, it is 0 without
    trying. For several label columns, the score of a cell is the mean over its labels, and the median class of each
    column must have 50 cells.

    Parameters
    ----------
    prepared : Finetuning
        Classifier with its start.
    labels : array (n, …)
        Labels of its cells.
    groups : array (n,), optional
        As in `inner_folds`.
    arguments : TrainingArguments
        Settings of training.

    Returns
    -------
    epochs : float
    facts : dict
        `fine_tuning`, the reason; `inner_scores`, the mean score at the start and after each epoch, if it was tried.
    out_of_fold : dict of str to OutOfFold, or None
        Outputs for the cells of the inner folds after that number of epochs, by label column; None if it is 0.

    Notes
    -----
    The regularisation and weights of the linear models may have been chosen on the same cells, and are kept in every
    fold; the models themselves, and the axes of the views, are fitted within each fold.
    """
    model = prepared.model
    if not prepared.start:
        return 0, {"fine_tuning": "none: there is only one class"}, None
    columns = labelled_cells(model.config, labels)
    for column in columns:
        of_classes = column.problem.kind == "single_label_classification"
        per_class = np.bincount(column.labels) if of_classes else np.array([len(labels)])
        median = int(np.median(per_class[per_class > 0]))
        if median < FEW_LABELS:
            which = "" if column.column is None else f" of {column.column}"
            why = f"none: the median class{which} has {median} cells, fewer than {FEW_LABELS}"
            return 0, {"fine_tuning": why}, None

    def cell_scores(outputs: np.ndarray, cells: np.ndarray) -> np.ndarray:
        total, n_labels = np.zeros(len(cells)), np.zeros(len(cells))
        for column in columns:
            has = np.isin(cells, column.rows)
            total[has] += column.problem.cell_scores(outputs[has, column.outputs], column.labels_of(cells[has]))
            n_labels += has
        return total / n_labels

    folds = inner_folds(columns[0].problem, labels, groups, arguments.seed)[:N_FOLDS]
    outputs: list[np.ndarray] = []
    scores: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    for train, held_out, _ in folds:
        outputs.append(_outputs_of_epochs(prepared, labels, train, held_out, arguments))
        rows.append(held_out)
        scores.append(np.stack([cell_scores(of, held_out) for of in outputs[-1]], axis=1))
        if (scores[0].mean(axis=0)[1:] <= scores[0][:, 0].mean()).all():
            break
    overall = np.concatenate(scores).mean(axis=0)
    best = int(overall.argmax())
    facts: dict[str, Any] = {"inner_scores": [round(float(score), 4) for score in overall]}
    gain, error = _gain_over_start(*scores) if best else (0.0, 0.0)
    if gain <= error:
        return 0, {**facts, "fine_tuning": "none: it did not beat the start by more than its standard error"}, None
    facts["fine_tuning"] = f"{best} epochs: {gain:+.4f} over the start (standard error {error:.4f})"
    tried, predictions = np.concatenate(rows), np.concatenate([of[best] for of in outputs])
    found: dict[str | None, OutOfFold] = {}
    for column in columns:
        has = np.isin(tried, column.rows)
        own = tried[has]
        found[column.column] = OutOfFold(predictions[has, column.outputs], column.labels_of(own), own)
    return best, facts, found


def _gain_over_start(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Return the mean gain of training over the start, and its standard error over the cells of two folds.

    Both take the scores of a fold's cells at the start and after each epoch, (n_cells, 1 + epochs). The epoch of one
    fold is the best of the other fold.
    """
    gains = [
        of[:, 1 + other[:, 1:].mean(axis=0).argmax()] - of[:, 0] for of, other in ((first, second), (second, first))
    ]
    gain = np.concatenate(gains)
    return float(gain.mean()), float(gain.std(ddof=1) / np.sqrt(len(gain)))


def _outputs_of_epochs(
    prepared: Finetuning,
    labels: np.ndarray,
    train: np.ndarray,
    held_out: np.ndarray,
    arguments: TrainingArguments,
) -> np.ndarray:
    """Train on one part, and predict another at the start and after each epoch: (1 + epochs, n, n_outputs)."""
    model, start = copy.deepcopy(prepared.model), prepared.start
    assert start  # without one, choose_epochs tries nothing
    cells, others = prepared.cells.select(train), prepared.cells.select(held_out)
    of_all = all(len(start[of.column].rows) == len(of.rows) for of in labelled_cells(model.config, labels))
    rotated = {name: (of.rotated[0][np.isin(of.rows, train)], of.rotated[1]) for name, of in start.items()}
    start_classifier(
        model,
        prepared.tokenizer,
        cells,
        labels[train],
        new_embedding=prepared.new_embedding,
        seed=arguments.seed,
        balanced=prepared.balanced,
        choices={name: of.choice for name, of in start.items()},
        rotated=rotated if of_all else None,
    )
    model = adapt(model, prepared.lora, prepared.freeze)
    outputs: list[np.ndarray] = []

    def predict_others() -> None:
        outputs.append(predict(model, prepared.tokenizer, others))

    class PredictEpochs(TrainerCallback):
        def on_train_begin(self, args, state, *_, **__) -> None:
            self.bar = tqdm(total=state.max_steps, desc="try fine-tuning", unit="step", disable=None)

        def on_step_end(self, *_, **__) -> None:
            self.bar.update()

        def on_epoch_end(self, *_, **__) -> None:
            predict_others()

        def on_train_end(self, *_, **__) -> None:
            self.bar.close()

    predict_others()
    with tempfile.TemporaryDirectory() as folder:
        inner = copy.copy(arguments)
        inner.output_dir, inner.num_train_epochs, inner.max_steps = folder, MOST_EPOCHS, -1
        inner.save_strategy = inner.eval_strategy = inner.logging_strategy = "no"
        inner.push_to_hub, inner.report_to, inner.disable_tqdm = False, [], True
        trainer = CellTrainer(
            model=model,
            args=inner,
            data_collator=_collator(prepared.tokenizer, prepared.label_key, inner.seed),
            train_dataset=cells,
            processing_class=prepared.tokenizer,
            sampling=prepared.sampling,
            callbacks=[PredictEpochs()],
            **_optimizer(model, inner, prepared.layer_decay),
        )
        trainer.remove_callback(PrinterCallback)  # its losses would look like those of the final model
        trainer.train()
    return np.stack(outputs)


def predict(model: PreTrainedModel, tokenizer: GeneTokenizer, cells: CellStore) -> np.ndarray:
    """Compute the logits of cells: float64 array (n, num_labels), in the order of the cells.

    For several label columns, those of a column are its `CellHead.outputs`; see `read_heads`.
    """
    return run_cells(model, tokenizer, cells, lambda batch: model(**batch).logits, 128)


# ---------------------------------------------------------------------- parts


def _collator(
    tokenizer: GeneTokenizer, label_key: str | list[str], seed: int, **options: Any
) -> DataCollatorForCellClassification:
    return DataCollatorForCellClassification(tokenizer, label_key, seed=seed, **options)


def _optimizer(model: nn.Module, arguments: TrainingArguments, layer_decay: float) -> dict[str, Any]:
    """Return the argument of Trainer for one learning rate per layer; none if all have the same."""
    return {} if layer_decay == 1 else {"optimizer_cls_and_kwargs": layer_rates(model, arguments, layer_decay)}


def _check_option(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: must be one of {', '.join(map(repr, known))}.")


def _labelled(
    cells: CellStore, label_key: str | Sequence[str], problem_type: str | None
) -> tuple[CellStore, np.ndarray, str | list[str], dict[str, list[str]] | None, str]:
    """Select the cells with counts and labels.

    Return them, their labels, the columns (a list if there are several; of classes in alphabetical order), the classes
    of each column, and the problem type.
    """
    columns = [label_key] if isinstance(label_key, str) else list(label_key)
    several = not isinstance(label_key, str)
    if not columns:
        raise ValueError("label_key is empty: pass at least one column.")
    for name in columns:
        must_have(cells.obs, "obs", name)
    categorical = [name for name in columns if name in cells.categories]
    if problem_type is None and several and 0 < len(categorical) < len(columns):
        raise ValueError(
            f"{', '.join(map(repr, categorical))} of the label columns hold categories, and "
            f"{', '.join(repr(name) for name in columns if name not in categorical)} numbers. Classes cannot be "
            "combined with columns of 0 and 1: make all of them categorical, or for whole numbers and booleans pass "
            "problem_type='single_label_classification' with an AnnData."
        )
    if problem_type is None:
        problem_type = "multi_label_classification" if several and not categorical else "single_label_classification"
    usable = cells.lengths > 0
    classes: dict[str, list[str]] | None = None
    if problem_type == "single_label_classification":
        columns = sorted(set(columns))
        several = len(columns) > 1
        found = {name: _codes(cells, name, usable) for name in columns}
        classes = {name: of_column for name, (_, of_column) in found.items()}
        labels = np.stack([codes for codes, _ in found.values()], axis=1)
        usable &= (labels != IGNORE).any(axis=1)
        if several:
            for name, n in zip(columns, (labels[usable] == IGNORE).sum(axis=0), strict=True):
                logger.info(f"{n} of {usable.sum()} cells have no {name!r}: they train the other columns only.")
    else:
        if categorical:
            raise ValueError(f"{problem_type} needs columns of numbers, but not all of {columns} are.")
        labels = cells.obs[columns].to_numpy(np.float32)
        usable &= np.isfinite(labels).all(axis=1)
    key = columns if several else columns[0]
    labels = labels if several else labels[:, 0]
    n_without = int((~usable & (cells.lengths > 0)).sum())
    if n_without:
        logger.warning(f"{n_without} of {len(cells)} cells have no label {key!r}: they are left out.")
    if not usable.any():
        raise ValueError(f"None of the {len(cells)} cells has counts and a {key!r}.")
    if not usable.all():
        logger.warning(
            f"{(~usable).sum()} of {len(cells)} cells have no counts or no {key!r}: they are left out of training."
        )
    return (cells if usable.all() else cells.select(usable)), labels[usable], key, classes, problem_type


def _codes(cells: CellStore, name: str, usable: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return the class of each cell in a column, int64 (n,) with -100 for none, and the classes of usable cells."""
    if name not in cells.categories:
        kinds = {"b": "booleans", "i": "whole numbers", "u": "whole numbers", "f": "numbers"}
        raise ValueError(
            f"{name!r} is not one categorical column (it holds {kinds.get(cells.obs[name].dtype.kind, 'other values')}"
            f"); categorical columns are {', '.join(cells.categories) or 'none'}. For numbers pass "
            "problem_type='regression'. For classes stored as integers or booleans pass "
            "problem_type='single_label_classification' with an AnnData, build the store with classes=[…] "
            "(stformer-hf build --classes), or make them categorical, adata.obs[key].astype('category')."
        )
    names, codes = cells.categories[name], cells.obs[name].cat.codes.to_numpy().astype(np.int64)
    used = np.unique(codes[usable & (codes >= 0)])  # classes that only held-out cells have are left out
    classes = [names[i] for i in used]
    if not classes:
        raise ValueError(f"None of the {len(cells)} cells has counts and a {name!r}.")
    if len(classes) == 1:
        raise ValueError(
            f"{name!r} has only one class among the training cells, {classes[0]!r}: at least two are needed."
        )
    unused = [of for i, of in enumerate(names) if i not in set(used.tolist())]
    if unused:
        logger.warning(
            f"{len(unused)} classes of {name!r} have no training cell with counts, and the model does not "
            f"know them: {', '.join(unused[:10])}{', …' if len(unused) > 10 else ''}."
        )
    return np.where(codes < 0, IGNORE, np.searchsorted(used, codes)), classes


def _load(
    model: str | PreTrainedModel, tokenizer: GeneTokenizer | None, head: dict[str, Any]
) -> tuple[PreTrainedModel, GeneTokenizer]:
    """Return a checkpoint or a model object as a classifier with new heads, and its tokenizer."""
    of_object = is_model(model)
    model = unwrap(model, merge=True) if of_object else model
    tokenizer = copy.deepcopy(tokenizer_of(model, tokenizer))
    if of_object or is_adapter(model):
        trained: PreTrainedModel = model if of_object else load_model(model)
        if trained.config.model_type != "gene_bert":
            raise ValueError(f"finetune needs a GeneBert, but the model is a {type(trained).__name__}.")
        config = copy.deepcopy(trained.config)
        config.update({**head, **({"wide_head": True} if getattr(config, "cell_embedding", False) else {})})
        config.num_labels = len(head["id2label"])
        classifier = GeneBertForClassification(config)
        classifier.gene_bert.load_state_dict(trained.base_model.state_dict())
        return classifier, tokenizer
    if getattr(tokenizer, "whole_cell", False):
        head = {"wide_head": True, **head}
    classifier = load_model(model, AutoModelForSequenceClassification, new_head=True, dtype=torch.float32, **head)
    return classifier, tokenizer


def _facts_of(start: dict[str | None, ClassifierStart], columns: Sequence[LabelledCells]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    for column in columns:
        if column.column in start:
            choice = start[column.column].choice
            facts |= {
                "start": "linear models of [CLS] and of all genes, chosen by inner cross-validation",
                "components_per_view": choice.n_components,
                column.named("reader_weights"): list(choice.weights),
                column.named("inner_score_of_the_start"): round(choice.score, 4),
            }
    return facts


__all__ = ["Finetuning", "choose_epochs", "finetune", "predict", "prepare_classifier"]
