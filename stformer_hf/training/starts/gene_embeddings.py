"""Initialise the gene embeddings of GeneBert from others, such as those of a protein model or gene2vec."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from ...genes.text_files import naming, open_text, suffix_of
from ...models.gene_bert.tokenization_gene_bert import GeneTokenizer

logger = logging.getLogger(__name__)


def load_gene_embeddings(
    model: PreTrainedModel,
    tokenizer: GeneTokenizer,
    embeddings: str | os.PathLike | pd.DataFrame | Mapping[str, np.ndarray],
) -> float:
    """Initialise a model's embeddings of genes from a table.

    The rows of genes in the table are written to the embedding of token types (binned scheme) or of tokens (rank
    scheme); other rows are unchanged. The table is centred and scaled to the standard deviation `initializer_range`.
    If it has more columns than the model's hidden size, its first principal components are used; if it has fewer, the
    remaining dimensions are unchanged.

    Parameters
    ----------
    model : PreTrainedModel
        GeneBert with or without a head, or, in the rank scheme, another model with input embeddings.
    tokenizer : GeneTokenizer
        Finds the genes by id, by id with version, or by symbol.
    embeddings : path, DataFrame or mapping
        One row per gene: .parquet, .csv, .tsv or .txt with the names of the genes in the first column (including
        gene2vec and word2vec text files), .npz with one array per gene, a DataFrame indexed by gene, or a mapping of
        gene to vector.

    Returns
    -------
    float
        Share of the tokenizer's genes that were found.

    Raises
    ------
    ValueError
        None or only one of the genes is known; values are not numbers; the file format is not supported.
    """
    names, values = _read(embeddings)
    genes = tokenizer.find_genes(names)
    known, first = np.unique(genes, return_index=True)  # the first row of a repeated gene
    known, first = known[known >= 0], first[known >= 0]
    if not len(known):
        raise ValueError(
            f"The tokenizer knows none of the {len(names)} genes of the embeddings, such as {', '.join(names[:3])}; "
            f"its genes are like {', '.join(tokenizer.genes[:3])}."
        )
    if len(known) < 2:
        raise ValueError(f"Only one gene of the embeddings is known, {tokenizer.genes[known[0]]}: scaling needs two.")
    values = values[first]
    weight, rows = embedding_of_genes(model, tokenizer)
    rows = rows[known]
    values = values - values.mean(axis=0)
    size = weight.shape[1]
    if values.shape[1] > size:
        # The right singular vectors, longest first, are the principal components.
        _, _, components = np.linalg.svd(values, full_matrices=False)
        values = values @ components[:size].T
    spread = values.std()
    if spread > 0:
        values = values * (model.config.initializer_range / spread)
    with torch.no_grad():
        weight[torch.from_numpy(rows), : values.shape[1]] = torch.from_numpy(values).to(weight)
    share = len(known) / len(tokenizer.genes)
    logger.info(f"Initialised the embeddings of {len(known)} of {len(tokenizer.genes)} genes ({share:.1%}).")
    return share


def embedding_of_genes(model: PreTrainedModel, tokenizer: GeneTokenizer) -> tuple[torch.Tensor, np.ndarray]:
    """Return the embedding of genes, Tensor (n_rows, hidden), and the row of each gene in it, int64 (n_genes,).

    It is that of token types in the binned scheme, of tokens in the rank scheme.
    """
    if tokenizer.scheme == "rank":
        return model.get_input_embeddings().weight, tokenizer.gene_token_ids
    base = getattr(model, model.base_model_prefix, model)
    rows = np.arange(len(tokenizer.genes)) + tokenizer.gene_token_type_offset
    return base.embeddings.token_type_embeddings.weight, rows


def _read(embeddings: str | os.PathLike | pd.DataFrame | Mapping[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
    """Return the names of the genes, and their vectors: float64 array (n, d)."""
    what = "the table"
    if isinstance(embeddings, (str, os.PathLike)):
        what = str(embeddings)
        with naming(what, "gene embeddings"):
            embeddings = _read_file(Path(what))
    if isinstance(embeddings, Mapping):
        lengths = {np.size(vector) for vector in embeddings.values()}
        if len(lengths) != 1:
            raise ValueError(f"{what}: all embeddings must have the same length; found {sorted(lengths) or 'none'}.")
        embeddings = pd.DataFrame(np.stack([np.ravel(v) for v in embeddings.values()]), index=list(embeddings))
    try:
        values = embeddings.to_numpy(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what} holds values that are not numbers: {error}") from error
    if not np.isfinite(values).all():
        raise ValueError(f"{what} holds {(~np.isfinite(values)).sum()} values that are NaN or infinite.")
    return [str(name) for name in embeddings.index], values


def _read_file(path: Path) -> pd.DataFrame | dict[str, np.ndarray]:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    if path.suffix == ".parquet":
        table = pd.read_parquet(path)
        return table.set_index(table.columns[0]) if isinstance(table.index, pd.RangeIndex) else table
    if suffix_of(path) in (".csv", ".tsv", ".txt"):
        return _read_text(path)
    raise ValueError(f"{path}: gene embeddings are a .parquet, .csv, .tsv, .txt or .npz file.")


def _read_text(path: Path) -> pd.DataFrame:
    """Read names and numbers separated by commas, tabs or spaces; a first row of names, or of sizes, is skipped."""
    with open_text(path) as file:
        first = file.readline().decode("utf-8-sig")
    separator = "," if "," in first else "\t" if "\t" in first else r"\s+"
    words = first.replace(",", " ").split()
    sizes = len(words) == 2 and _is_number(words[0])  # word2vec's "n d"
    header = sizes or not all(map(_is_number, words[1:]))
    with open_text(path) as file:
        # From pandas 3 on, a name such as "NA" would be missing, also if a converter returns it.
        table = pd.read_csv(
            file, sep=separator, header=None, skiprows=int(header), converters={0: "'{}".format}, encoding="utf-8-sig"
        )
    table.index = [name[1:] for name in table.pop(0)]
    return table.dropna(axis=1, how="all")  # a separator at the end of the lines


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
