"""Identity: which genes, bins, phenotypes, classes and neighbourhoods two parts mean, compared where they meet.

Sizes do not tell: a tokenizer of the same genes in another order has as many ids and types. What a part means is its
tokenizer's fingerprint, the names of its classes, or the genes, types and options of its neighbourhoods.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset as HuggingFaceDataset
from torch.utils.data import ConcatDataset, Subset
from transformers import PreTrainedModel

from ..batches.token_rows import TokenRows, class_names
from ..data.center_mask_sampler import CenterMaskSampler
from ..data.iterable_ann_dataset import IterableAnnDataset
from ..models.gene_bert.gene_columns import strip_versions
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer

_UNNAMED = "LABEL_"  # how transformers names the classes of a model that was told none
_REMEDY = "Load all of them from one checkpoint, or make the model with GeneBertConfig.from_tokenizer(tokenizer)."


def check_tokenizer_fits(model: PreTrainedModel, tokenizer: GeneTokenizer, name: str = "tokenizer") -> None:
    """Compare a model's vocabulary with a tokenizer's.

    Parameters
    ----------
    model : PreTrainedModel
    tokenizer : GeneTokenizer
    name : str, default: "tokenizer"
        What the tokenizer is called in errors.

    Raises
    ------
    ValueError
        The sizes, or the genes, bins or phenotypes themselves, differ; one of the two is for whole cells, and the
        other is not.
    """
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "gene_bert" or not isinstance(tokenizer, GeneTokenizer):
        return
    sizes = (config.vocab_size, config.type_vocab_size)
    if sizes != (len(tokenizer), tokenizer.type_vocab_size):
        raise ValueError(
            f"The {name} does not fit the model: {len(tokenizer)} ids and {tokenizer.type_vocab_size} types, where "
            f"the model has {sizes[0]} and {sizes[1]}. {_REMEDY}"
        )
    if config.cell_embedding != tokenizer.whole_cell:
        raise ValueError(
            f"The model reads whole cells (cell_embedding=True), and the {name} does not give them: make it with "
            "whole_cell=True."
            if config.cell_embedding
            else f"The {name} gives whole cells (whole_cell=True), and the model does not read them: make the model "
            "with GeneBertConfig.from_tokenizer(tokenizer), or the tokenizer without whole_cell."
        )
    if config.cell_embedding and config.num_genes != len(tokenizer.genes):
        raise ValueError(
            f"The {name} does not fit the model: {len(tokenizer.genes)} genes, where the model has "
            f"{config.num_genes}. {_REMEDY}"
        )
    if config.vocabulary_fingerprint not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"The {name} does not fit the model: as many ids and types, but other genes, bins or phenotypes, or "
            f"another order. {_REMEDY}"
        )


def check_tokenizers(model: PreTrainedModel, processing_class: Any, collator: Any) -> None:
    """Compare the vocabularies of a model, its tokenizer and the tokenizer of its collator.

    Raises
    ------
    ValueError
        Two of them differ; see `check_tokenizer_fits`.
    """
    of_collator = getattr(collator, "tokenizer", None)
    for name, tokenizer in (("processing_class", processing_class), ("tokenizer of the data_collator", of_collator)):
        if tokenizer is not None:
            check_tokenizer_fits(model, tokenizer, name)
    if processing_class is None or of_collator is None or processing_class is of_collator:
        return
    if _vocabulary(processing_class) != _vocabulary(of_collator):
        raise ValueError(
            "The tokenizer of the data_collator is not that of processing_class: other genes, bins or phenotypes, or "
            "another order. Give both the same tokenizer."
        )


def _vocabulary(tokenizer: Any) -> Any:
    if isinstance(tokenizer, GeneTokenizer):
        return tokenizer.fingerprint
    return dict(tokenizer.get_vocab()) if hasattr(tokenizer, "get_vocab") else None


# ---------------------------------------------------------------------- tokens that were made before


def check_tokens(dataset: Any, model: PreTrainedModel, tokenizer: Any) -> None:
    """Compare the tokenizer that made the tokens of a dataset with that of the collator, or of the model.

    Parameters
    ----------
    dataset : any dataset
        A stream has its tokenizer; a tokenized dataset the manifest that `CellStore.tokenize` wrote. Other tokens do
        not say what made them.
    model : PreTrainedModel
    tokenizer : GeneTokenizer, optional
        Of the collator, or `processing_class`.

    Raises
    ------
    ValueError
        The tokens mean other genes, bins or phenotypes.
    """
    wanted = (
        tokenizer.fingerprint
        if isinstance(tokenizer, GeneTokenizer)
        else getattr(getattr(model, "config", None), "vocabulary_fingerprint", None)
    )
    for part in _parts(dataset):
        found = _fingerprint_of(part)
        if wanted is not None and found is not None and found != wanted:
            raise ValueError(
                f"{_named(part)} holds the tokens of another tokenizer (fingerprint {found}) than that of the model "
                f"and the collator ({wanted}): other genes, bins or phenotypes, or another order. Tokenize the cells "
                "with this tokenizer, or load the one that lies beside the tokens, in tokenizer/."
            )


def _parts(dataset: Any) -> Iterable[Any]:
    """List the datasets that a dataset is made of: of a Subset, of a ConcatDataset, and so on."""
    if isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _parts(part)
    elif isinstance(dataset, (Subset, TokenRows)):
        yield from _parts(dataset.dataset)
    elif dataset is not None:
        yield dataset


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
    return str(Path(files[0]["filename"]).parent) if files else f"The {type(dataset).__name__}"


# ---------------------------------------------------------------------- classes


def fit_classes(model: PreTrainedModel, collator: Any, dataset: Any) -> Any:
    """Give a collator the model's number of each class, and a model without names those of the training cells.

    Parameters
    ----------
    model : PreTrainedModel
        `config.label2id` is written where its names are transformers' own (LABEL_0, …), and as many as in the
        dataset.
    collator : DataCollatorForCellClassification, or any other
        Others are returned as they are.
    dataset : any dataset
        Training cells.

    Returns
    -------
    The collator, or a copy with `label2id`.

    Raises
    ------
    ValueError
        The collator numbers the classes otherwise than the model; of several labels per cell, columns that are not
        the model's.
    """
    label, config = getattr(collator, "label", None), getattr(model, "config", None)
    if label is None or not hasattr(collator, "label2id") or config is None:
        return collator
    several = not isinstance(label, str)
    if not several and (config.problem_type == "regression" or config.num_labels == 1):
        return collator
    of_model = {str(name): int(i) for i, name in (config.id2label or {}).items()}
    if all(name.startswith(_UNNAMED) for name in of_model):
        of_model = {str(name): int(i) for name, i in (config.label2id or {}).items()}
    if all(name.startswith(_UNNAMED) for name in of_model):
        known = collator.label2id or _numbered(label if several else _names_of(dataset, label))
        if known is None or sorted(known.values()) != list(range(config.num_labels)):
            return collator
        config.label2id = dict(known)
        config.id2label = {i: name for name, i in known.items()}
        of_model = known
    elif collator.label2id is not None and not several and not _agree(collator.label2id, of_model):
        raise ValueError(
            f"The collator's label2id is {_shown(collator.label2id)}, and the model's {_shown(of_model)}: its "
            "predictions would go by other names. Leave label2id out, and the model's is taken."
        )
    if several and collator.label2id is None and set(label) != set(of_model):
        raise ValueError(
            f"The labels are the columns {', '.join(map(repr, label))}, and the model's are "
            f"{', '.join(map(repr, of_model))}: name the model's labels like the columns (id2label and label2id), or "
            "give the collator the number of each column, label2id={…}."
        )
    if collator.label2id is not None:
        return collator
    fitted = copy.copy(collator)
    fitted.label2id = of_model
    return fitted


def _agree(one: Mapping[str, int], other: Mapping[str, int]) -> bool:
    return {str(name): int(i) for name, i in one.items()} == dict(other)


def _shown(numbers: Mapping[str, int]) -> str:
    names = sorted(numbers, key=numbers.get)
    return ", ".join(f"{numbers[name]} {name!r}" for name in names[:5]) + (", …" if len(names) > 5 else "")


def _numbered(names: Sequence[str] | None) -> dict[str, int] | None:
    return None if names is None else {str(name): i for i, name in enumerate(names)}


def _names_of(dataset: Any, column: str) -> list[str] | None:
    """Return the classes of a column, in the order of their codes; None where a part has none, or others."""
    found = [class_names(part).get(column) for part in _parts(dataset)]
    return found[0] if found and all(names == found[0] for names in found) else None


# ---------------------------------------------------------------------- neighbourhoods


def fit_neighborhoods(model: PreTrainedModel, train: Any, datasets: Iterable[Any]) -> None:
    """Write into a model's configuration what its training cells know, and compare all samplers with it.

    Parameters
    ----------
    model : PreTrainedModel
        Of a `CellNeighborhoodConfig`, `gene_ids`, `cell_types`, `neighborhood` and `section_key` are written where
        they are None. Others are left alone.
    train : CenterMaskSampler, or anything else
        Training cells.
    datasets : iterable of datasets
        All others, such as those to evaluate on.

    Raises
    ------
    ValueError
        Other genes, or another order of them; other types; other neighbourhoods; counts that are taken the logarithm
        of twice.
    """
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "cell_neighborhood":
        return
    for part in _parts(train):
        if isinstance(part, CenterMaskSampler):
            check_sampler_fits(model, part, "train_dataset")
            _learn(config, part)
    for dataset in datasets:
        for part in _parts(dataset):
            if isinstance(part, CenterMaskSampler):
                check_sampler_fits(model, part, "eval_dataset")


def _learn(config: Any, sampler: CenterMaskSampler) -> None:
    if config.gene_ids is None and sampler.gene_ids is not None:
        config.gene_ids = list(sampler.gene_ids)
    if config.cell_types is None and len(sampler.cell_types or ()) == config.n_cell_types:
        config.cell_types = list(sampler.cell_types)
    if config.neighborhood is None:
        config.neighborhood = dict(sampler.neighborhood)
    if config.section_key is None:
        config.section_key = sampler.section_key


def check_sampler_fits(model: PreTrainedModel, sampler: CenterMaskSampler, name: str = "sampler") -> None:
    """Compare the genes, types, neighbourhoods and values of a sampler with those that a model knows.

    Parameters
    ----------
    model : PreTrainedModel
        Of a `CellNeighborhoodConfig`.
    sampler : CenterMaskSampler
        What it, or the configuration, does not know is not compared.
    name : str, default: "sampler"
        What it is called in errors.

    Raises
    ------
    ValueError
        See `fit_neighborhoods`.
    """
    config = model.config
    if sampler.n_genes != config.n_genes or sampler.n_cell_types > config.n_cell_types:
        raise ValueError(
            f"{name} has {sampler.n_genes} genes and {sampler.n_cell_types} cell types, and the model "
            f"{config.n_genes} and {config.n_cell_types}."
        )
    if config.gene_ids is not None and sampler.gene_ids is not None:
        known, found = strip_versions(config.gene_ids).tolist(), strip_versions(sampler.gene_ids).tolist()
        if found != known:
            first = next(i for i, pair in enumerate(zip(found, known, strict=True)) if pair[0] != pair[1])
            order = "the same genes in another order" if sorted(found) == sorted(known) else "other genes"
            raise ValueError(
                f"{name} has {order} than the model: column {first} is {found[first]!r}, and the model reads "
                f"{known[first]!r} there. Put the columns into the model's order: adata[:, model.config.gene_ids]."
            )
    if config.cell_types is not None and sampler.cell_types is not None:
        if sampler.cell_types != config.cell_types[: len(sampler.cell_types)]:
            raise ValueError(
                f"{name} numbers the cell types {_few(sampler.cell_types)}, and the model {_few(config.cell_types)}: "
                "give the column the model's categories, in their order, adata.obs[key].cat.set_categories("
                "model.config.cell_types)."
            )
    if config.neighborhood is not None:
        other = {
            option: value
            for option, value in _complete(sampler.neighborhood).items()
            if _complete(config.neighborhood)[option] != value
        }
        if other:
            learnt = _complete(config.neighborhood)
            found = ", ".join(f"{option}={value!r} instead of {learnt[option]!r}" for option, value in other.items())
            raise ValueError(
                f"{name} has other neighbourhoods than those that the model learns from: {found}. Make it with the "
                "options of model.config.neighborhood; to train the model on other ones, set that to None."
            )
    if sampler.normalize is not None and config.apply_log1p:
        raise ValueError(
            f"{name} gives log1p of the counts (normalize={sampler.normalize!r}), and the model takes log1p itself "
            "(apply_log1p=True): make the sampler with normalize=None."
        )


_OF_NEIGHBORHOODS = {"patch_size": None, "shape": "box", "k_nearest": None, "max_num_cells": None, "discretize": False}


def _complete(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options.get(name, default) for name, default in _OF_NEIGHBORHOODS.items()}


def _few(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (", …" if len(names) > 5 else "")


__all__ = [
    "check_sampler_fits",
    "check_tokenizer_fits",
    "check_tokenizers",
    "check_tokens",
    "fit_classes",
    "fit_neighborhoods",
]
