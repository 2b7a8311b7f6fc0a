"""Add genes and phenotypes to a trained model without changing what it has learnt."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..models.gene_bert.bin_encoder import check_bin_edges
from ..models.gene_bert.gene_columns import sample
from ..models.gene_bert.phenotype_tokens import name_phenotypes, phenotype_token
from ..models.gene_bert.rank_encoder import read_medians
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..models.gene_bert.tokenizer_settings import check_symbols
from .identity import check_tokenizer_fits

_ROWS_AT_A_TIME = 1024


def extend_vocabulary(
    model: PreTrainedModel,
    tokenizer: GeneTokenizer,
    genes: Sequence[str] = (),
    phenotypes: Mapping[str, Sequence[Any]] | None = None,
    *,
    medians: Any = None,
    bin_edges: Mapping[str, Sequence[float]] | Sequence[float] | None = None,
    symbols: Any = None,
) -> tuple[PreTrainedModel, GeneTokenizer]:
    """Add genes and phenotypes to a tokenizer, and their embeddings to its model.

    Parameters
    ----------
    model : PreTrainedModel
        GeneBert with or without a head, or another model with a rank tokenizer (such as `load_geneformer` returns).
        It is changed in place, as by `resize_token_embeddings`: make its optimizer afterwards.
    tokenizer : GeneTokenizer
        The model's tokenizer, in either scheme. It is not changed.
    genes : sequence of str, optional
        Gene ids. Those that the tokenizer knows, by id or symbol, are skipped, so `store.gene_ids` is valid.
    phenotypes : dict of str to sequence, optional
        Category -> values, of old or new categories. Values that the tokenizer knows are skipped.
    medians : GeneStatistics, dict of gene to float, path of a .json or .pkl, or sequence (n_genes,)
        Non-zero medians of the new genes, for the rank scheme. Old genes keep theirs.
    bin_edges : dict of gene to sequence, or sequence, optional
        For a binned tokenizer with edges per gene: edges of each new gene, or the same for all; at most as many as
        the old genes have.
    symbols : dict of symbol to gene, or GeneTable, optional
        Other names of the new genes.

    Returns
    -------
    model : PreTrainedModel
        The same object.
    tokenizer : GeneTokenizer
        A new one, or the same object if nothing is new. New genes follow the old ones, in the order given; new
        categories are included in a cell's tokens, after the old ones.

    Raises
    ------
    TypeError
        The model is not one of transformers, for example because it has adapters.
    ValueError
        Nothing is given; the tokenizer does not fit the model, or has tokens of `add_tokens`; medians are missing, or
        have another target sum; edges are missing or too many; settings of the other scheme are given; genes or values
        are ambiguous.

    Notes
    -----
    Old token ids do not change: new ones follow the last. Token types number the categories first, so a new category
    moves up the types of the categories sorted after it, and of all genes, together with their rows of the embedding.
    A dataset that was tokenized before stays valid unless a category is new.

    Old rows of the embeddings, of the MLM head and of its bias are unchanged, bit for bit. New rows are drawn with
    torch's generator from the normal distribution with the mean and covariance of the old rows of their kind (genes,
    phenotype values, categories), so that a new gene looks like a gene (Hewitt 2021, "Initializing New Word Embeddings
    for Pretrained Language Models"). If there are fewer than two old rows, the distribution is that of a new model, of
    mean 0 and standard deviation `config.initializer_range`. A new bias is the mean of those of its kind.

    A model with `cell_embedding` has no statistics of new genes: they add nothing to `[CLS]` (their share is 0) until
    `initialise_from_store` is run again. Their rows of the cell embedding, and of a wide head, are 0.
    """
    phenotypes = phenotypes or {}
    if not len(genes) and not phenotypes:
        raise ValueError("There is nothing to add: pass genes, phenotypes, or both.")
    for what, names in {
        "genes": genes,
        **{f"phenotypes[{of!r}]": values for of, values in phenotypes.items()},
    }.items():
        if isinstance(names, str):
            raise ValueError(f"{what} must be a list of names, got {names!r}.")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"Expected a transformers model, got {type(model).__name__}; merge adapters first.")
    _check_fits(model, tokenizer)
    extended = _extend_tokenizer(tokenizer, genes, phenotypes, medians, bin_edges, symbols)
    if extended is not tokenizer:
        _extend_words(model, tokenizer, extended)
        _extend_types(model, tokenizer, extended)
        if getattr(model.config, "cell_embedding", False):
            _extend_cells(model, len(extended.genes))
        if model.config.model_type == "gene_bert":
            model.config.vocabulary_fingerprint = extended.fingerprint
            if model.config.token_classes is not None:
                model.config.token_classes = [*extended.phenotypes, "genes"]
    return model, extended


def _reads_types(model: PreTrainedModel, tokenizer: GeneTokenizer) -> bool:
    return "token_type_ids" in tokenizer.model_input_names and hasattr(model.config, "type_vocab_size")


def _check_fits(model: PreTrainedModel, tokenizer: GeneTokenizer) -> None:
    """Check that a tokenizer is the model's, and has no tokens beyond its vocabulary."""
    config = model.config
    check_tokenizer_fits(model, tokenizer)
    n_types = config.type_vocab_size if _reads_types(model, tokenizer) else tokenizer.type_vocab_size
    of_model = config.vocab_size, n_types, getattr(config, "cell_embedding", False)
    found = len(tokenizer), tokenizer.type_vocab_size, tokenizer.whole_cell
    if of_model != found:  # a model of transformers
        raise ValueError(
            "The tokenizer does not fit the model: {} ids, {} types and whole_cell={}, where the model has {}, {} and "
            "{}. Load both from one checkpoint.".format(*found, *of_model)
        )
    added = tokenizer.get_vocab().keys() - tokenizer.encoder.ids.keys()
    if added:
        raise ValueError(
            f"The tokenizer has tokens from add_tokens that are not in its vocabulary: {sample(sorted(added))}. "
            "Extend the tokenizer without them, and pass phenotypes instead."
        )


# ---------------------------------------------------------------------- the tokenizer


def _extend_tokenizer(
    tokenizer: GeneTokenizer,
    genes: Sequence[str],
    phenotypes: Mapping[str, Sequence[Any]],
    medians: Any,
    bin_edges: Any,
    symbols: Any,
) -> GeneTokenizer:
    settings = tokenizer.saved_settings()
    genes = [str(gene) for gene in genes]
    known = tokenizer._matcher.find(genes) >= 0
    new_genes = [gene for gene, is_known in zip(genes, known, strict=True) if not is_known]
    all_phenotypes = _merge_phenotypes(tokenizer, phenotypes)
    of_rank = tokenizer.scheme == "rank"
    if (bin_edges if of_rank else medians) is not None:
        name = "bin_edges" if of_rank else "medians"
        raise ValueError(f'{name} are settings of the other scheme; this tokenizer is "{tokenizer.scheme}".')
    if not new_genes and all_phenotypes == tokenizer.phenotypes:
        return tokenizer

    if tokenizer.scheme == "binned" and tokenizer.normalize is not None:
        settings["totals"] = tokenizer.totals
    settings["genes"] = tokenizer.genes + new_genes
    settings["phenotypes"] = all_phenotypes
    # A name of an old gene keeps its meaning.
    settings["symbols"] = {**check_symbols(symbols, new_genes), **tokenizer.symbols}
    settings["token_ids"] = _old_ids(tokenizer, settings)
    if new_genes and tokenizer.scheme == "rank":
        settings["medians"] = _merge_medians(tokenizer, genes, medians)
    elif new_genes:
        settings["bin_edges"] = _merge_edges(tokenizer, new_genes, bin_edges)
    settings["included_phenotypes"] += [name for name in phenotypes if name not in tokenizer.phenotypes]
    weights = tokenizer.gene_weights
    if weights is not None:  # a new gene has the mean weight of the old ones
        settings["gene_weights"] = np.concatenate([weights, np.full(len(new_genes), weights.mean())])
    extended = type(tokenizer)(
        **settings, padding_side=tokenizer.padding_side, model_input_names=tokenizer.model_input_names
    )
    if new_genes and tokenizer.scheme == "rank" and np.isnan(extended.medians[len(tokenizer.genes) :]).all():
        raise ValueError(f"None of the new genes has a median: {sample(new_genes)}.")
    return extended


def _merge_phenotypes(tokenizer: GeneTokenizer, phenotypes: Mapping[str, Sequence[Any]]) -> dict[str, list[str]]:
    """Append new values to the old ones of their category; categories are sorted."""
    merged = {category: list(values) for category, values in tokenizer.phenotypes.items()}
    for category, values in phenotypes.items():
        old = merged.setdefault(category, [])
        known = {phenotype_token(value) for value in old}
        old.extend(str(value) for value in values if phenotype_token(str(value)) not in known)
    return dict(sorted(merged.items()))


def _old_ids(tokenizer: GeneTokenizer, settings: Mapping[str, Any]) -> dict[str, int]:
    """Return the old id of each token of the new vocabulary that means something the old one knew.

    Tokens are matched by meaning: if categories share a value, a new category can rename the token of an old value.
    """
    encoder, special = tokenizer.encoder, list(tokenizer.special_tokens.values())
    is_rank = tokenizer.scheme == "rank"
    of_genes = tokenizer.genes if is_rank else [f"bin_{i}" for i in range(tokenizer.n_bins)]
    names = name_phenotypes(settings["phenotypes"], special + (settings["genes"] if is_rank else []))
    return {
        **{token: encoder.ids[token] for token in special},
        **dict(zip(of_genes, encoder.expression_ids.tolist(), strict=True)),
        **{names[of][value]: i for of, values in encoder.phenotype_ids.items() for value, i in values.items()},
    }


def _merge_medians(tokenizer: GeneTokenizer, genes: Sequence[str], medians: Any) -> dict[str, float]:
    """Add the medians of new genes to those of the old ones, which stay: gene -> median."""
    medians, target_sum = read_medians(medians)
    if target_sum not in (None, tokenizer.target_sum):
        raise ValueError(
            f"The medians were estimated with target_sum {target_sum:g}, and those of the tokenizer with "
            f"{tokenizer.target_sum:g}: estimate them with target_sum={tokenizer.target_sum:g}."
        )
    if not isinstance(medians, Mapping):
        if len(medians) != len(genes):
            raise ValueError(f"There are {len(medians)} medians for {len(genes)} genes.")
        medians = dict(zip(genes, medians, strict=True))
    # If a gene is in both, the tokenizer's median counts.
    return {**medians, **dict(zip(tokenizer.genes, tokenizer.medians.tolist(), strict=True))}


def _merge_edges(tokenizer: GeneTokenizer, new_genes: list[str], bin_edges: Any) -> Any:
    """Add the edges of new genes to those of the old ones, if genes have edges of their own."""
    if not isinstance(tokenizer.bin_edges, dict):
        if bin_edges is not None:
            raise ValueError("The tokenizer has the same bin_edges for all genes: leave bin_edges out.")
        return tokenizer.bin_edges
    if bin_edges is None:
        raise ValueError("The tokenizer has bin_edges per gene: pass bin_edges={gene: edges} for the new genes.")
    if not isinstance(bin_edges, Mapping):
        bin_edges = dict.fromkeys(new_genes, bin_edges)
    new_edges: Any = check_bin_edges(bin_edges, new_genes)
    most = max(map(len, new_edges.values()))
    if most >= tokenizer.n_bins:
        raise ValueError(
            f"A new gene has {most} bin_edges, but the model has bins for at most {tokenizer.n_bins - 1}: pass fewer."
        )
    return {**tokenizer.bin_edges, **new_edges}


# ---------------------------------------------------------------------- the model


@torch.no_grad()
def _extend_words(model: PreTrainedModel, tokenizer: GeneTokenizer, extended: GeneTokenizer) -> None:
    """Add rows for new token ids to the embedding and the MLM head; old tokens keep their ids."""
    n_old = len(tokenizer)
    if len(extended) == n_old:
        return
    bias = getattr(model.get_output_embeddings(), "bias", None)
    train_bias = bias is not None and bias.requires_grad
    model.resize_token_embeddings(len(extended), mean_resizing=False)
    weights = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not weights[0]:
        weights.append(head.weight)
    if bias is not None:
        head.bias.requires_grad_(train_bias)  # a frozen weight would freeze it
    for ids in (extended.encoder.expression_ids, extended.encoder.all_phenotype_ids):
        ids = torch.tensor(ids, dtype=torch.long)
        old, new = ids[ids < n_old], ids[ids >= n_old]
        for weight in weights:
            _draw_rows(weight, new, weight[old], model.config.initializer_range)
        if bias is not None and len(old):
            head.bias[new] = head.bias[old].mean()


@torch.no_grad()
def _extend_types(model: PreTrainedModel, tokenizer: GeneTokenizer, extended: GeneTokenizer) -> None:
    """Move the rows of old token types to their new positions, and add rows for new types."""
    if not _reads_types(model, tokenizer) or extended.type_vocab_size == tokenizer.type_vocab_size:
        return
    embedding = model.base_model.embeddings.token_type_embeddings
    old = embedding.weight
    old_type = {name: i for i, name in enumerate(_name_types(tokenizer))}
    names = _name_types(extended)
    origin = torch.tensor([old_type.get(name, -1) for name in names])
    weight = old.new_empty(len(names), old.shape[1])
    weight[origin >= 0] = old[origin[origin >= 0]]
    for kind in ("category", "gene"):
        of_kind = torch.tensor([name[0] == kind for name in names])
        rows = old[origin[of_kind & (origin >= 0)]]
        _draw_rows(weight, torch.where(of_kind & (origin < 0))[0], rows, model.config.initializer_range)
    embedding.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
    embedding.num_embeddings = model.config.type_vocab_size = len(names)


@torch.no_grad()
def _extend_cells(model: PreTrainedModel, n_genes: int) -> None:
    """Append rows of 0 for new genes to the cell embedding, the wide head and the statistics."""
    embedding = model.base_model.cell_embedding
    tables = [embedding.genes, *([model.wide_head.genes] if hasattr(model, "wide_head") else [])]
    for table in tables:
        old = table.weight
        weight = torch.cat([old, old.new_zeros(n_genes - len(old), old.shape[1])])
        table.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
        table.num_embeddings = n_genes
    statistics = embedding.statistics
    for name in ("shares", "means"):
        old = getattr(statistics, name)
        setattr(statistics, name, torch.cat([old, old.new_zeros(*old.shape[:-1], n_genes - old.shape[-1])], dim=-1))
    model.config.num_genes = n_genes


def _name_types(tokenizer: GeneTokenizer) -> list[tuple[str, ...]]:
    """Return the kind and the name of each token type; a name may occur in more than one kind."""
    genes = [("gene", gene) for gene in tokenizer.genes] if tokenizer.scheme == "binned" else [("cell",), ("around",)]
    names = [("special",), *(("category", name) for name in tokenizer.phenotypes), *genes]
    return names[: tokenizer.type_vocab_size]


def _draw_rows(weight: torch.Tensor, new: torch.Tensor, like: torch.Tensor, std: float) -> None:
    """Draw rows `new` of a weight, in place, from the normal distribution with the mean and covariance of other rows.

    If there are fewer than two rows that they should be `like`, the mean is 0 and the standard deviation `std`. With n
    centred rows X and z ~ N(0, I_n), the covariance of z X / sqrt(n - 1) is that of the rows, even if they do not span
    all dimensions.
    """
    like = like.float()
    for some in new.split(_ROWS_AT_A_TIME):
        if len(like) < 2:
            drawn = std * torch.randn(len(some), weight.shape[1], device=weight.device)
        else:
            mean = like.mean(0)
            z = torch.randn(len(some), len(like), device=weight.device)
            drawn = mean + z @ (like - mean) / (len(like) - 1) ** 0.5
        weight[some] = drawn.to(weight.dtype)
