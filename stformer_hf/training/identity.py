"""Check that models, tokenizers, collators and datasets mean the same genes, bins, phenotypes, classes and neighbours.

Sizes are not enough: a tokenizer with the same genes in another order has the same number of ids and types. Compared
are the fingerprints of tokenizers, the names of classes, and the genes, types and options of neighbourhoods.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset as HuggingFaceDataset
from transformers import PreTrainedModel

from ..batches.iterable_ann_dataset import IterableAnnDataset
from ..batches.parts import bases
from ..batches.token_rows import class_names
from ..genes.wrong_names import some_of
from ..models.gene_bert.heads import label_columns_of, output_names, problem_of
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..models.remote_code import is_a
from ..store.cell_store import CellStore
from .cell_heads import name_outputs, read_numbers

_REMEDY = "Load all of them from one checkpoint, or make the model with GeneBertConfig.from_tokenizer(tokenizer)."


def check_tokenizer_fits(model: PreTrainedModel, tokenizer: GeneTokenizer, name: str = "tokenizer") -> None:
    """Raise a ValueError if a tokenizer, which errors call `name`, has another vocabulary than a model.

    The sizes, or the genes, bins or phenotypes themselves, differ, or only one of the two is for whole cells.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "gene_bert" or not is_a(tokenizer, GeneTokenizer):
        return
    ids, types, n_genes = len(tokenizer), tokenizer.type_vocab_size, len(tokenizer.genes)
    if (config.vocab_size, config.type_vocab_size) != (ids, types):
        found = f"{ids} ids and {types} types, where the model has {config.vocab_size} and {config.type_vocab_size}"
    elif config.cell_embedding != tokenizer.whole_cell:
        raise ValueError(
            f"The model reads whole cells (cell_embedding=True), but the {name} does not return them: make it with "
            "whole_cell=True."
            if config.cell_embedding
            else f"The {name} returns whole cells (whole_cell=True), but the model does not read them: make the model "
            "with GeneBertConfig.from_tokenizer(tokenizer), or the tokenizer without whole_cell."
        )
    elif config.cell_embedding and config.num_genes != n_genes:
        found = f"{n_genes} genes, where the model has {config.num_genes}"
    elif config.vocabulary_fingerprint not in (None, tokenizer.fingerprint):
        found = "the same number of ids and types, but other genes, bins or phenotypes, or another order"
    else:
        return
    raise ValueError(f"The {name} does not fit the model: {found}. {_REMEDY}")


def check_tokenizers(model: PreTrainedModel, processing_class: Any, collator: Any) -> None:
    """Raise a ValueError if a model, its tokenizer and the tokenizer of its collator differ in their vocabulary."""
    of_collator = getattr(collator, "tokenizer", None)
    for name, tokenizer in (("processing_class", processing_class), ("tokenizer of the data_collator", of_collator)):
        if tokenizer is not None:
            check_tokenizer_fits(model, tokenizer, name)
    if processing_class is None or of_collator is None or processing_class is of_collator:
        return
    if _vocabulary(processing_class) != _vocabulary(of_collator):
        raise ValueError(
            "The tokenizer of the data_collator differs from processing_class: other genes, bins or phenotypes, or "
            "another order. Pass both the same tokenizer."
        )


def _vocabulary(tokenizer: Any) -> Any:
    if is_a(tokenizer, GeneTokenizer):
        return tokenizer.fingerprint
    return dict(tokenizer.get_vocab()) if hasattr(tokenizer, "get_vocab") else None


# ---------------------------------------------------------------------- tokens of a dataset


def check_tokens(dataset: Any, model: PreTrainedModel, tokenizer: Any) -> None:
    """Raise a ValueError if tokens of a dataset were made with another tokenizer than the collator's, or the model's.

    A stream has its tokenizer, and a tokenized dataset the manifest that `CellStore.tokenize` wrote. The tokens of
    other datasets cannot be checked.
    """
    wanted = getattr(getattr(model, "config", None), "vocabulary_fingerprint", None)
    if is_a(tokenizer, GeneTokenizer):
        wanted = tokenizer.fingerprint
    for part in bases(dataset):
        found = _fingerprint_of(part)
        if wanted is not None and found is not None and found != wanted:
            raise ValueError(
                f"The tokens of {_named(part)} were made with another tokenizer (fingerprint {found}) than that of "
                f"the model and the collator ({wanted}): other genes, bins or phenotypes, or another order. Tokenize "
                "the cells with this tokenizer, or load the one saved with the tokens, in tokenizer/."
            )


def check_stores_together(dataset: Any) -> None:
    """Raise a ValueError if the stores of a ConcatDataset, whose cells come in one batch, differ in genes or obs."""
    stores = [base for base in bases(dataset) if isinstance(base, CellStore)]
    for other in stores[1:]:
        first = stores[0]
        same_genes = first.gene_ids.tolist() == other.gene_ids.tolist()
        if not same_genes or list(first.obs.columns) != list(other.obs.columns):
            raise ValueError(
                f"The stores {first.path} and {other.path} are combined, but differ in their "
                f"{'obs columns' if same_genes else 'genes'}: merge them with CellStore.build(path, stores)."
            )


def _fingerprint_of(dataset: Any) -> str | None:
    if isinstance(dataset, IterableAnnDataset):
        return getattr(dataset.tokenizer, "fingerprint", None)
    if not isinstance(dataset, HuggingFaceDataset):
        return None
    for folder in {Path(file["filename"]).parent for file in dataset.cache_files}:
        manifest = folder / "manifest.json"
        tokenizer = json.loads(manifest.read_text()).get("tokenizer") if manifest.exists() else None
        if tokenizer:
            return tokenizer["fingerprint"]
    return None


def _named(dataset: Any) -> str:
    files = getattr(dataset, "cache_files", None)
    return str(Path(files[0]["filename"]).parent) if files else f"the {type(dataset).__name__}"


# ---------------------------------------------------------------------- classes


def fit_classes(model: PreTrainedModel, collator: Any, dataset: Any) -> Any:
    """Make a collator number classes and columns as its model does; name unnamed outputs after the training cells.

    `config.id2label` and `config.label2id` are set if the outputs have no names, the collator or the training cells
    (`dataset`) know them, and the head has room for them.

    Return a copy of a `DataCollatorForCellClassification` with `label2id`, if it had none; any other collator itself.

    Raises
    ------
    ValueError
        The collator and the model number the classes differently; the columns of numbers, or of multiple labels per
        cell, are not the model's outputs.
    """
    label, config = getattr(collator, "label", None), getattr(model, "config", None)
    if label is None or not hasattr(collator, "label2id") or config is None:
        return collator
    several, given = not isinstance(label, str), collator.label2id
    columns = list(label) if several else [label]
    if getattr(config, "label_columns", None):
        of_column = {str(column.name): output_names(config, column) for column in label_columns_of(config)}
        numbers = {column: {name: i for i, name in enumerate(names)} for column, names in of_column.items()}
        if set(columns) != set(numbers) or given not in (None, numbers):
            raise ValueError(
                f"The labels are the column(s) {', '.join(map(repr, columns))}, but the model predicts a class in "
                f"each of {', '.join(map(repr, numbers))}: pass the collator these columns, without label2id."
            )
        return _numbering(collator, numbers)
    of_columns = several or problem_of(config) != "single_label_classification"
    of_model = read_numbers(config)
    if of_model is None:
        names = (columns if of_columns else _names_of(dataset, label)) or []
        of_model = given or {str(name): i for i, name in enumerate(names)}
        if not of_model or not set(of_model.values()) <= set(range(config.num_labels)):
            return collator
    elif given is not None and (
        any(of_model.get(str(name)) != int(number) for name, number in given.items())
        and (not of_columns or set(given) <= set(of_model))
    ):
        raise ValueError(
            f"The collator's label2id is {_shown(given)}, but the model's is {_shown(of_model)}: its "
            "predictions would be misnamed. Leave label2id out to use the model's."
        )
    elif given is None and of_columns and set(columns) != set(of_model):
        raise ValueError(
            f"The labels are the columns {', '.join(map(repr, columns))}, but the model's are "
            f"{', '.join(map(repr, of_model))}: name the model's labels like the columns (id2label and label2id), or "
            "pass the collator the number of each column, label2id={…}."
        )
    of_model = name_outputs(config, of_model)
    return collator if given is not None or (of_columns and not several) else _numbering(collator, of_model)


def _numbering(collator: Any, numbers: Mapping[str, Any]) -> Any:
    """Return a copy of a collator that has `label2id`."""
    fitted = copy.copy(collator)
    fitted.label2id = numbers
    return fitted


def _shown(numbers: Mapping[str, int]) -> str:
    return some_of(f"{numbers[name]} {name!r}" for name in sorted(numbers, key=numbers.__getitem__))


def _names_of(dataset: Any, column: str) -> list[str] | None:
    """Return the classes of a column, in the order of their codes; None if a part has no or other classes."""
    found = [class_names(part).get(column) for part in bases(dataset)]
    return found[0] if found and all(names == found[0] for names in found) else None


# ---------------------------------------------------------------------- datasets that check the model themselves


def fit_datasets(model: PreTrainedModel, train: Any, others: Iterable[Any]) -> None:
    """Let datasets check a model, and let the training cells complete its configuration.

    This is the hook for datasets whose rows are not tokens. If a dataset, or one inside a Subset or ConcatDataset, has
    a method `fit_model(model, name, learn)`, it is called with the model, the name of the argument for errors, and
    whether it may add to `model.config` what is missing there; it raises a ValueError if the dataset does not fit.
    `CenterMaskSampler` has such a method.
    """
    for name, datasets in (("train_dataset", [train]), ("eval_dataset", others)):
        for part in (part for dataset in datasets for part in bases(dataset)):
            if hasattr(part, "fit_model"):
                part.fit_model(model, name, name == "train_dataset")
