"""Fine-tune a classifier of cells, which starts at linear models and is trained further only if that helps."""

from __future__ import annotations

import copy
import itertools
import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy.special import log_softmax
from torch.utils.data import IterableDataset
from transformers import AutoModelForSequenceClassification, PreTrainedModel, TrainingArguments, set_seed

from ..batches.draws import sampling_columns
from ..batches.iterable_ann_dataset import IterableAnnDataset
from ..batches.parts import as_selection
from ..evaluation.metrics import balanced_class_weights
from ..genes.wrong_names import must_have
from ..models.gene_bert.configuration_gene_bert import GeneBertConfig
from ..models.gene_bert.heads import fields_of_columns, label_columns_of
from ..models.gene_bert.modeling_gene_bert import GeneBertForClassification
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..sources.formats import expand, is_format
from ..sources.open_source import open_source
from ..sources.same_cells import join_groups
from ..store.cell_store import CellStore
from .adapting import check_adapts
from .calibration import OutOfFold, sign
from .defaults import FINETUNING, MAX_LENGTH
from .epoch_choice import choose_epochs
from .label_selection import select_labelled
from .loading import is_adapter, is_model, let_cls_learn, load_config, load_model, tokenizer_of, unwrap
from .prepared_classifier import Finetuning, predict
from .starts.classifier_start import start_classifier
from .starts.labelled_cells import LabelledCells, labelled_cells
from .starts.linear_readers import fit_temperature

logger = logging.getLogger(__name__)

_EPOCHS_WITHOUT_START = 10
_PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")


def finetune(
    cells: CellStore | AnnData | str | Path | Sequence[AnnData | str | Path] | IterableAnnDataset,
    label_key: str | Sequence[str],
    *,
    model: str | PreTrainedModel | None = None,
    tokenizer: GeneTokenizer | None = None,
    output: str | Path | None = None,
    eval_cells: CellStore | AnnData | str | Path | Sequence[AnnData | str | Path] | IterableAnnDataset | None = None,
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
    cells : CellStore (or Subset of one), AnnData, MuData, SpatialData, path, list of them, or IterableAnnDataset
        Labelled cells; those without a label or without counts are left out. A path is that of a store, or of files
        as in `CellStore.build`, which are first built into a temporary store, because the cells are read several
        times. So are the files of a stream, whose tokenizer and order are not used.
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
        Folder in which to save the model, its tokenizer, `out_of_fold.safetensors`, the model card and
        `fine_tuning.json`, which says what was chosen and why.
    eval_cells : as `cells`, optional
        Held-out cells, evaluated at the end of each epoch; nothing is chosen on them. Cells of classes that no
        training cell has are left out, with a warning.
    num_train_epochs : float, optional
        Epochs of training; 0 keeps the start as it is. By default, the number is chosen by cross-validation; from
        random weights, and for a model that does not read whole cells, it is 10.
    init : {"spectral", "random"}, default: "spectral"
        Whether the classifier starts at linear models (for a new model, of the spectral views of the cells), or at
        random weights.
    split_by : str, optional
        Obs column, such as the donor; cells of one group are never in both training and validation of a choice, nor
        are copies of a cell (`CellStore.twins`), whatever their group.
    phenotypes : sequence of str, optional
        Phenotype tokens that the model may read; none by default, since a phenotype may be the label under another
        name.
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
        Where the counts of an AnnData or file are: X, raw or a layer. Streams have their own `layer` and `fractional`.
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
        A column is missing; no cell is labelled; the labels do not fit the problem; the tokenizer does not fit;
        `training` holds `output_dir` or `num_train_epochs`, which are parameters of this function.
    TypeError
        `label_key` is not the name of a column, or names.
    """
    for name, parameter in {"output_dir": "output", "num_train_epochs": "num_train_epochs"}.items():
        if name in (training or {}):
            raise ValueError(f"training: {name!r} is a parameter of finetune itself: pass {parameter}=… instead.")
    if not isinstance(label_key, Iterable):
        raise TypeError(f"label_key must be the name of an obs column, or a list of names; got {label_key!r}.")
    if (layer is not None or fractional) and all(
        isinstance(of, IterableAnnDataset) for of in (cells, eval_cells) if of is not None
    ):
        raise ValueError("layer and fractional are those of the stream: pass them to IterableAnnDataset.")
    others = [*([] if split_by is None else [split_by]), *phenotypes, *sampling_columns(sampling)]
    with tempfile.TemporaryDirectory() as folder:
        rules = (label_key, problem_type, layer, fractional)
        cells = _store_of(cells, Path(folder) / "store", others, *rules)
        if eval_cells is not None:
            eval_cells = _store_of(eval_cells, Path(folder) / "eval_store", phenotypes, *rules)
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
            prepared.save_choice(trainer)
            trainer.create_model_card()
        if prepared.out_of_fold is not None:
            sign(prepared.out_of_fold, unwrap(prepared.model, merge=True))
        unwrap(prepared.model).out_of_fold = prepared.out_of_fold
        return prepared.model.eval()


def _store_of(
    cells: Any,
    path: Path,
    others: Sequence[str],
    label_key: str | Sequence[str],
    problem_type: str | None,
    layer: str | None,
    fractional: bool,
) -> CellStore:
    """Return cells that are a store; build one at `path` of others, with the label columns and `others`."""
    if isinstance(cells, IterableDataset) and not isinstance(cells, IterableAnnDataset):
        raise TypeError(
            f"finetune cannot read the counts of a {type(cells).__name__}: pass its files, a store of them, or an "
            "IterableAnnDataset."
        )
    cells = as_selection(cells)
    if isinstance(cells, (str, Path)) and is_format(cells, "CellStore"):
        return CellStore(cells)
    if isinstance(cells, CellStore):
        return cells
    settings: dict[str, Any] = {"layer": layer, "fractional": fractional}
    if isinstance(cells, IterableAnnDataset):
        if cells.sources is None:
            raise ValueError("The stream is a copy, which has no sources: pass the stream itself, or its files.")
        cells, settings = cells.sources, cells.source_settings
    keys = [label_key] if isinstance(label_key, str) else list(label_key)
    columns = list(dict.fromkeys([*keys, *others]))
    sources = [open_source(source, settings["layer"], settings["fractional"]) for source in expand(cells)]
    for source, name in itertools.product(sources, columns):
        must_have(source.obs, "obs", name, f" ({source.name})")
    of_classes = problem_type == "single_label_classification" or (
        problem_type != "regression"
        and isinstance(label_key, str)
        and all(pd.api.types.is_bool_dtype(source.obs[label_key].dtype) for source in sources)
    )
    return CellStore.build(path, cells, obs=columns, classes=keys if of_classes else [], report=False, **settings)


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
    """
    check_adapts(model, lora, freeze, layer_decay)
    for name, value, known in (
        ("init", init, ("spectral", "random")),
        ("class_weights", class_weights, ("none", "balanced")),
        ("problem_type", problem_type, (None, *_PROBLEMS)),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}: must be one of {', '.join(repr(of) for of in known if of)}.")
    cells, labels, key, classes, problem_type = select_labelled(cells, label_key, problem_type)
    balanced = class_weights == "balanced"
    if balanced and problem_type != "single_label_classification":
        raise ValueError(f"class_weights={class_weights!r} is for classes, and the problem is {problem_type}.")
    head = _fields_of_head(key, classes, problem_type, model_config or {})
    set_seed(arguments.seed)
    if model is None:
        settings = {"whole_cell": True, "max_length": max_length, **(tokenizer_config or {})}
        tokenizer = GeneTokenizer.from_store(cells, **settings)
        wide = {"wide_head": True} if tokenizer.whole_cell else {}
        classifier = GeneBertForClassification(GeneBertConfig.from_tokenizer(tokenizer, size=size, **wide, **head))
    else:
        classifier, tokenizer = _load(model, tokenizer, head, gated=lora is None)
    config, classifier.tokenizer = classifier.config, tokenizer
    _leave_out_phenotypes(tokenizer, phenotypes)
    if config.classifier_pooling == "cls" and not tokenizer.add_cls:
        raise ValueError("The tokenizer adds no [CLS]: use --pooling mean.")
    if balanced and classes:
        weights = [balanced_class_weights(cells.obs[name], of_column) for name, of_column in classes.items()]
        config.class_weights = [weight for of_column in weights for weight in of_column]
    starts = init == "spectral" and getattr(config, "wide_head", False)
    prepared = Finetuning(
        *(classifier, tokenizer, cells, key, num_train_epochs or 0),
        new_embedding=model is None,
        balanced=balanced,
        lora=lora,
        freeze=freeze,
        layer_decay=layer_decay,
        sampling=sampling,
        facts={"label": key, "pooling": config.classifier_pooling},
    )
    if starts:
        _start(prepared, labels, arguments, num_train_epochs is None, split_by)
    elif num_train_epochs is None:
        prepared.num_train_epochs = _EPOCHS_WITHOUT_START
    return prepared


def _fields_of_head(
    key: str | list[str], classes: dict[str, list[str]] | None, problem_type: str, others: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the fields of the configuration that describe the head; those of a checkpoint's head are reset."""
    head: dict[str, Any] = {"class_weights": None, "reader_weights": None, "temperature": 1.0, "label_columns": None}
    head |= {"problem_type": problem_type, **others}
    if classes and not isinstance(key, str):
        return head | fields_of_columns(classes)
    columns = [key] if isinstance(key, str) else key
    names = classes[columns[0]] if classes else columns
    return head | {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def _leave_out_phenotypes(tokenizer: GeneTokenizer, phenotypes: Sequence[str]) -> None:
    """Let a tokenizer include only these phenotypes in the tokens of a cell; others are left out with a warning."""
    left_out = [name for name in tokenizer.included_phenotypes if name not in phenotypes]
    if left_out:
        logger.warning(
            f"The phenotype tokens of {', '.join(left_out)} are left out: one of them may be the label under another "
            "name. List those that the model may read: phenotypes=[…], or --phenotypes."
        )
    tokenizer.included_phenotypes = list(phenotypes)


def _start(
    prepared: Finetuning,
    labels: np.ndarray,
    arguments: TrainingArguments,
    chooses_epochs: bool,
    split_by: str | None,
) -> None:
    """Start a classifier at linear models, choose the number of epochs, and keep the out-of-fold predictions."""
    config = prepared.model.config
    columns = labelled_cells(config, labels)
    twins = prepared.cells.twins()
    prepared.twins = twins if len(np.unique(twins)) < len(twins) else None
    groups = None if split_by is None else _groups(prepared.cells, split_by, columns)
    if groups is not None and prepared.twins is not None:
        groups = join_groups(groups, twins)
        if len(np.unique(groups)) < 2:
            raise ValueError(f"All groups of {split_by!r} share cells (same barcode and counts): remove duplicates.")
    prepared.start = start = start_classifier(
        prepared.model,
        prepared.tokenizer,
        prepared.cells,
        labels,
        groups=groups,
        twins=prepared.twins,
        new_embedding=prepared.new_embedding,
        seed=arguments.seed,
        balanced=prepared.balanced,
        to_train=prepared.num_train_epochs > 0,
    )
    started = [column for column in columns if column.column in start]
    for column in started:
        choice = start[column.column].choice
        prepared.facts.setdefault("start", "linear models of [CLS] and of all genes")
        prepared.facts[column.named("reader_weights")] = list(choice.weights)
        if len(choice.rows):
            prepared.facts["start"] = "linear models of [CLS] and of all genes, chosen by inner cross-validation"
            prepared.facts[column.named("inner_score_of_the_start")] = round(choice.score, 4)
    trained: dict[str | None, OutOfFold] | None = None
    if chooses_epochs:
        prepared.num_train_epochs, reasons, trained = choose_epochs(prepared, labels, groups, arguments)
        prepared.facts |= reasons
    if trained is None and prepared.num_train_epochs > 0:
        return  # no model was trained as this one will be
    out_of_fold: dict[Any, OutOfFold] = {}
    temperatures = {column.name: column.temperature for column in label_columns_of(config)}
    for column in started:
        found = start[column.column].out_of_fold if trained is None else trained[column.column]
        if trained is not None:
            scale = fit_temperature(column.problem, found.predictions, found.labels)
            temperatures[column.column] = float(temperatures[column.column] * scale)
            found.predictions = (found.predictions / scale).astype(np.float32)
            if config.problem_type == "single_label_classification":
                found.predictions = log_softmax(found.predictions, axis=1)
        out_of_fold[column.column] = found
        if config.problem_type == "single_label_classification" and len(found.rows):
            calibration = found.facts(temperatures[column.column])
            prepared.facts |= {column.named(name): value for name, value in calibration.items()}
    prepared.out_of_fold = out_of_fold[None] if None in out_of_fold else out_of_fold or None
    if trained is not None:
        prepared.temperature = temperatures.get(None, list(temperatures.values()))


def _groups(cells: CellStore, split_by: str, columns: Sequence[LabelledCells]) -> np.ndarray:
    """Return the group of each cell, after checking that validation has a group other than that of training."""
    must_have(cells.obs, "obs", split_by)
    n_without = int(cells.obs[split_by].isna().sum())
    if n_without:
        raise ValueError(f"{n_without} cells have no {split_by!r}: remove them, or fill it in.")
    groups = cells.obs[split_by].astype(str).to_numpy()
    for column in columns:
        has = np.unique(groups[column.rows])
        if len(has) < 2:
            which, leave_out = "All usable cells", "split_by"
            if column.column is not None:
                which, leave_out = f"All cells with a {column.column!r}", "split_by, or the column"
            raise ValueError(
                f"{which} have the same {split_by!r}, {has[0]!r}, but validation needs another. Leave out {leave_out}."
            )
        if column.problem.kind != "regression":
            _check_classes_of_groups(column, groups[column.rows], split_by)
    return groups


def _check_classes_of_groups(column: LabelledCells, groups: np.ndarray, split_by: str) -> None:
    """Warn of classes that have cells in one group alone, which no fold can test; refuse them if all are such."""
    which = "classes" if column.column is None else f"classes of {column.column!r}"
    if column.problem.kind == "multi_label_classification":
        which, table = "labels", pd.DataFrame(column.labels > 0.5).groupby(groups).sum().T
    else:
        table = pd.crosstab(column.labels, groups)
    alone = (table > 0).sum(axis=1) == 1
    if alone.all():
        raise ValueError(
            f"Each of the {len(alone)} {which} has cells of one {split_by!r} alone, so a cross-validation by "
            f"{split_by!r} cannot test any: leave out split_by."
        )
    if alone.any():
        n_cells = int(table[alone].to_numpy().sum())
        logger.warning(
            f"{alone.sum()} of {len(alone)} {which} have cells of one {split_by!r} alone: no model that has not seen "
            f"these {n_cells} cells knows them, so they take no part in the cross-validation."
        )


def _load(
    model: str | PreTrainedModel, tokenizer: GeneTokenizer | None, head: dict[str, Any], gated: bool
) -> tuple[PreTrainedModel, GeneTokenizer]:
    """Return a checkpoint or a model object as a classifier with new heads, and its tokenizer.

    With `gated`, one that kept `[CLS]` fixed begins there.
    """
    of_object = is_model(model)
    model = unwrap(model, merge=True) if of_object else model
    tokenizer = copy.deepcopy(tokenizer_of(model, tokenizer))
    if of_object or is_adapter(model):
        trained: PreTrainedModel = model if of_object else load_model(model)
        if trained.config.model_type != "gene_bert":
            raise ValueError(f"finetune needs a GeneBert, but the model is a {type(trained).__name__}.")
        config = copy.deepcopy(trained.config)
        config.update({**head, **({"wide_head": True} if getattr(config, "cell_embedding", False) else {})})
        config.update(let_cls_learn(config, gated))
        config.num_labels = len(head["id2label"])
        classifier = GeneBertForClassification(config)
        gates = {name: gate for name, gate in classifier.gene_bert.state_dict().items() if name.endswith(".cls_gate")}
        classifier.gene_bert.load_state_dict({**gates, **trained.base_model.state_dict()})
        return classifier, tokenizer
    if getattr(tokenizer, "whole_cell", False):
        head = {"wide_head": True, **let_cls_learn(load_config(model), gated), **head}
    classifier = load_model(model, AutoModelForSequenceClassification, new_head=True, dtype=torch.float32, **head)
    return classifier, tokenizer


__all__ = ["Finetuning", "choose_epochs", "finetune", "predict", "prepare_classifier"]
