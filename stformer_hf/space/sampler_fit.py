"""Check that a model and the neighbourhoods of a sampler have the same genes, cell types and options."""

from __future__ import annotations

import logging
from typing import Any

from transformers import PreTrainedModel

from ..genes.wrong_names import some_of
from ..models.gene_bert.gene_columns import strip_versions

logger = logging.getLogger(__name__)

# Options of neighbourhoods, which differ from others only if they do.
DEFAULTS = {"patch_size": None, "shape": "box", "k_nearest": None, "max_num_cells": None, "discretize": False}


def fit_sampler(model: PreTrainedModel, sampler: Any, name: str, learn: bool) -> None:
    """Check a sampler against a model, and complete the model's configuration.

    A warning is logged if the model was trained with sections, and the sampler has none. Parameters are those of
    `CenterMaskSampler.fit_model`; with `learn`, gene ids, types, neighbourhood and section key are set if None.
    """
    config = getattr(model, "config", None)
    if config is None or getattr(config, "model_type", None) != "cell_neighborhood":
        return
    check_sampler_fits(model, sampler, name)
    if config.section_key is not None and not sampler.has_sections:
        logger.warning(
            f"The model was trained with the sections of obs[{config.section_key!r}], and {name} was made without "
            "sections: all of its cells are treated as one. Make it with section_key if they are of several sections."
        )
    if not learn:
        return
    if config.gene_ids is None and sampler.gene_ids is not None:
        config.gene_ids = list(sampler.gene_ids)
    if config.cell_types is None and sampler.cell_types:
        config.cell_types = list(sampler.cell_types)
    if config.neighborhood is None:
        config.neighborhood = dict(sampler.neighborhood)
    if config.section_key is None:
        config.section_key = sampler.section_key


def check_sampler_fits(model: PreTrainedModel, sampler: Any, name: str = "sampler") -> None:
    """Compare the genes, types, neighbourhoods and values of a sampler with those of a model.

    Anything unknown to one of the two is not compared; `name` is that of the sampler in errors.

    Raises
    ------
    ValueError
        The genes or their order, the types or the neighbourhoods differ; the model would read log1p of log1p, or
        counts as their logarithms.
    """
    config = model.config
    if sampler.n_genes != config.n_genes or sampler.n_cell_types > config.n_cell_types:
        raise ValueError(
            f"{name} has {sampler.n_genes} genes and {sampler.n_cell_types} cell types, but the model has "
            f"{config.n_genes} and {config.n_cell_types}."
        )
    if config.gene_ids is not None and sampler.gene_ids is not None:
        known, found = strip_versions(config.gene_ids).tolist(), strip_versions(sampler.gene_ids).tolist()
        if found != known:
            first = next(i for i, pair in enumerate(zip(found, known, strict=True)) if pair[0] != pair[1])
            order = "the same genes in another order" if sorted(found) == sorted(known) else "other genes"
            raise ValueError(
                f"{name} has {order} than the model: column {first} is {found[first]!r}, but the model reads "
                f"{known[first]!r} there. Put the columns into the model's order: adata[:, model.config.gene_ids]."
            )
    if config.cell_types is not None and sampler.cell_types is not None:
        if sampler.cell_types != config.cell_types[: len(sampler.cell_types)]:
            raise ValueError(
                f"{name} numbers the cell types {some_of(map(repr, sampler.cell_types))}, but the model "
                f"{some_of(map(repr, config.cell_types))}: set the model's categories, in their order, "
                "adata.obs[key].cat.set_categories(model.config.cell_types)."
            )
    if config.neighborhood is not None:
        found, learnt = ({**DEFAULTS, **options} for options in (sampler.neighborhood, config.neighborhood))
        other = [f"{key}={found[key]!r} instead of {learnt[key]!r}" for key in DEFAULTS if found[key] != learnt[key]]
        if other:
            raise ValueError(
                f"{name} has other neighbourhoods than the model was trained with: {', '.join(other)}. Make it with "
                "the options of model.config.neighborhood; to train the model with others, set that to None."
            )
    if sampler.normalize is not None and config.apply_log1p:
        raise ValueError(
            f"{name} returns log1p of the counts (normalize={sampler.normalize!r}), but the model takes log1p itself "
            "(apply_log1p=True): make the sampler with normalize=None."
        )
    if sampler.normalize is None and not config.apply_log1p:
        raise ValueError(
            f"{name} returns counts (normalize=None), but the model reads log1p of counts (apply_log1p=False), which "
            "embed_neighborhoods passes to it: make the model with apply_log1p=True, and it takes log1p itself."
        )
