"""What a model knows about genes: their embeddings, and their states in cells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from transformers import AutoModel, PreTrainedModel

from ..genes.wrong_names import must_have
from ..models.gene_bert.gene_columns import are_ids
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..sources.open_source import Source, open_source
from ..training.loading import name_of
from ..training.starts.gene_embeddings import embedding_of_genes
from .batches import TokenBatch, at_work, check_cells, check_hidden_layer, load, read_batches


def gene_embeddings(
    model: str | PreTrainedModel,
    tokenizer: GeneTokenizer | None = None,
    adata: AnnData | None = None,
    cell_type_key: str | None = None,
    *,
    genes: Sequence[str] | None = None,
    min_cells: int = 1,
    hidden_layer: int = -1,
    layer: str | None = None,
    fractional: bool = False,
    batch_size: int = 64,
    device: str | None = None,
) -> AnnData:
    """Return embeddings of genes: the static ones of a model, or their mean states in cells.

    Parameters
    ----------
    model : str or PreTrainedModel
        Checkpoint, folder of a PEFT adapter, or model.
    tokenizer : GeneTokenizer, optional
        The checkpoint's own by default.
    adata : AnnData, MuData or SpatialData, optional
        Cells with raw counts. Without them, the result is the table of embeddings that the model begins with.
    cell_type_key : str, optional
        Column of obs: states are averaged within each of its values. Cells without a value are left out.
    genes : sequence of str, optional
        Ids or symbols of the genes to return; all by default.
    min_cells : int, default: 1
        With `adata`, a gene is returned for a type if it is a token of at least this many cells of the type.
    hidden_layer : int, default: -1
        With `adata`, number of the hidden state: 0 is the embedding layer, -1 the last layer.
    layer, fractional, batch_size, device
        As for `embed`.

    Returns
    -------
    AnnData (n_rows, hidden size)
        X is float32. Without `adata`, one row per gene, with `obs["gene_id"]` and `obs["symbol"]`; for a model that
        reads whole cells, `obsm["X_cell"]` are the embeddings that are summed into `[CLS]`. With `adata`, one row per
        gene and type, with `obs["n_cells"]`, the number of cells averaged over, and `obs["cell_type"]` if
        `cell_type_key` is given. `nearest_genes` and `scanpy.pp.neighbors(…, use_rep="X")` find neighbours.

    Raises
    ------
    ValueError
        A gene or the column is unknown; no gene is a token of enough cells; the model reads neighbourhoods; settings
        of cells are given without cells.

    Notes
    -----
    Cells are read in blocks. Memory is that of one float64 vector per gene and type: 360 MB for 20,000 genes, 9 types
    and a hidden size of 256.
    """
    if adata is None and cell_type_key is not None:
        raise ValueError("cell_type_key needs cells: pass adata.")
    if adata is not None:
        check_cells(adata)
    name = name_of(model)
    encoder, tokenizer = load(model, tokenizer, AutoModel)
    refuse_neighborhoods(tokenizer)
    encoder = encoder.base_model
    if adata is None:
        found = _static(encoder, tokenizer, indices_of(genes, tokenizer))
    else:
        check_hidden_layer(encoder, hidden_layer)
        source = open_source(adata, layer, fractional)
        chosen = indices_of(genes, tokenizer, adata, source)
        types = groups_of(source, cell_type_key)
        with at_work(encoder, device):
            batches = read_batches(source, tokenizer, batch_size, desc="gene states")
            found = _contextual(encoder, tokenizer, batches, types, chosen, hidden_layer, min_cells)
        if cell_type_key is None:
            del found.obs["cell_type"]
    found.uns["gene_embeddings"] = {
        "model": str(name),
        "vocabulary_fingerprint": tokenizer.fingerprint,
        **({} if adata is None else {"layer": hidden_layer, "cell_type_key": cell_type_key or ""}),
    }
    return found


def _static(encoder: PreTrainedModel, tokenizer: GeneTokenizer, chosen: np.ndarray) -> AnnData:
    weight, rows = embedding_of_genes(encoder, tokenizer)
    found = AnnData(_array(weight)[rows[chosen]], obs=gene_frame(tokenizer, chosen))
    if hasattr(encoder, "cell_embedding"):
        found.obsm["X_cell"] = _array(encoder.cell_embedding.genes.weight)[chosen]
    return found


def _array(weight: torch.Tensor) -> np.ndarray:
    return weight.detach().float().cpu().numpy()


def _contextual(
    encoder: PreTrainedModel,
    tokenizer: GeneTokenizer,
    batches: Iterator[TokenBatch],
    types: pd.Categorical,
    chosen: np.ndarray,
    hidden_layer: int,
    min_cells: int,
) -> AnnData:
    """Average the states of genes within types."""
    n_types, n_genes = len(types.categories), len(chosen)
    places = places_of(chosen, tokenizer)
    sums = np.zeros((n_types * n_genes, encoder.config.hidden_size))
    n_cells = np.zeros(n_types * n_genes, np.int64)
    for batch in batches:
        batch = batch.to(encoder.device)
        of_token, of_cell = places[batch.genes], types.codes[batch.rows].astype(np.int64)
        wanted = (of_token >= 0) & (of_cell >= 0)[:, None]
        if not wanted.any():
            continue
        hidden = encoder(**batch.inputs, output_hidden_states=True).hidden_states[hidden_layer]
        states = hidden[torch.from_numpy(wanted).to(hidden.device)].cpu().double().numpy()  # MPS has no float64
        keys = (of_cell[:, None] * n_genes + of_token)[wanted]
        members = sparse.csr_array((np.ones(len(keys)), (keys, np.arange(len(keys)))), shape=(len(sums), len(keys)))
        rows = np.unique(keys)
        sums[rows] += members[rows] @ states
        n_cells += np.bincount(keys, minlength=len(n_cells))
    kept = np.flatnonzero(n_cells >= max(min_cells, 1))
    if not len(kept):
        raise ValueError(f"No gene is a token of {max(min_cells, 1)} cells of a type: lower min_cells.")
    frame = gene_frame(tokenizer, chosen[kept % n_genes])
    frame["cell_type"] = pd.Categorical.from_codes(kept // n_genes, types.categories)
    frame["n_cells"] = n_cells[kept]
    if n_types > 1:
        frame.index = frame["gene_id"].astype(str) + " in " + frame["cell_type"].astype(str)
    return AnnData((sums[kept] / n_cells[kept, None]).astype(np.float32), obs=frame)


def nearest_genes(states: AnnData, genes: Sequence[str], n_neighbors: int = 10, use_rep: str = "X") -> pd.DataFrame:
    """Return the nearest genes of some genes by the cosine of their embeddings.

    Parameters
    ----------
    states : AnnData
        As `gene_embeddings` returns it; of several cell types, select one first.
    genes : sequence of str
        Ids or symbols.
    n_neighbors : int, default: 10
        Neighbours per gene, at most the number of other genes.
    use_rep : str, default: "X"
        "X", or a key of obsm.

    Returns
    -------
    DataFrame
        `gene`, `neighbor` (ids), `symbol` (of the neighbour) and `cosine`, nearest first.

    Raises
    ------
    ValueError
        A gene is unknown, or in several rows.
    """
    from sklearn.neighbors import NearestNeighbors

    ids, symbols = (states.obs[name].to_numpy(str) for name in ("gene_id", "symbol"))
    rows = []
    for name in genes:
        found = np.flatnonzero(ids == name) if name in ids else np.flatnonzero(symbols == name)
        if len(found) != 1:
            raise ValueError(f"{len(found)} rows are of the gene {name!r}; one is needed. Select one cell type first.")
        rows.append(found[0])
    vectors = states.X if use_rep == "X" else states.obsm[use_rep]
    n_neighbors = min(n_neighbors, len(ids) - 1)
    search = NearestNeighbors(n_neighbors=n_neighbors + 1, metric="cosine").fit(vectors)
    distances, near = search.kneighbors(vectors[rows])
    asked, at = np.repeat(np.arange(len(rows)), near.shape[1]), near.ravel()
    of = np.array(rows)[asked]
    found = pd.DataFrame(
        {"gene": ids[of], "neighbor": ids[at], "symbol": symbols[at], "cosine": 1 - distances.ravel()}
    )
    others = at != of
    return found[others].groupby(asked[others]).head(n_neighbors).reset_index(drop=True)


def pairs_of(matrix: np.ndarray) -> np.ndarray:
    """Return the entries above the diagonal, array (n * (n - 1) / 2,)."""
    return matrix[np.triu_indices(len(matrix), 1)]


def symmetric(scores: np.ndarray) -> np.ndarray:
    """Return the mean of both directions of each pair, or the one that is known; NaN if none is."""
    both = np.ma.masked_invalid([pairs_of(scores), pairs_of(scores.T)])
    return both.mean(axis=0).filled(np.nan)


def groups_of(source: Source, key: str | None) -> pd.Categorical:
    """Return the group of each cell; only groups with cells are categories."""
    if key is None:
        return pd.Categorical.from_codes(np.zeros(source.shape[0], np.int64), ["all"])
    must_have(source.obs, "obs", key)
    found = pd.Categorical(source.obs[key]).remove_unused_categories()
    if not len(found.categories):
        raise ValueError(f"No cell has a value in obs[{key!r}].")
    return found


def places_of(chosen: np.ndarray, tokenizer: GeneTokenizer) -> np.ndarray:
    """Return the place of each gene among the chosen ones, -1 for others, and last for tokens that are not genes."""
    places = np.full(len(tokenizer.genes) + 1, -1)
    places[chosen] = np.arange(len(chosen))
    return places


def indices_of(
    genes: Sequence[str] | None, tokenizer: GeneTokenizer, adata: AnnData | None = None, source: Source | None = None
) -> np.ndarray:
    """Return the indices of genes, each once: int64 array.

    They are found by id or symbol, and last by the names of the columns of `adata`, if it is an AnnData.
    """
    if genes is None:
        return np.arange(len(tokenizer.genes))
    if isinstance(genes, str):
        raise ValueError(f"genes must be a list, got the string {genes!r}: pass [{genes!r}].")
    names = list(genes)
    found = tokenizer.find_genes(names)
    if source is not None and isinstance(adata, AnnData) and adata.n_vars == len(source.genes):
        columns = tokenizer.find_genes(source.genes.gene_ids, source.genes.symbols)
        pairs = zip(adata.var_names[::-1].astype(str), columns[::-1].tolist(), strict=True)  # the first one stays
        of_column = {name: gene for name, gene in pairs if gene >= 0}
        for at in np.flatnonzero(found < 0):
            found[at] = of_column.get(str(names[at]), -1)
    unknown = [name for name, gene in zip(names, found, strict=True) if gene < 0]
    if unknown:
        raise ValueError(
            f"The model does not know {len(unknown)} of {len(names)} genes, such as {', '.join(unknown[:3])}; its "
            f"genes are like {', '.join(tokenizer.genes[:3])}."
        )
    return pd.unique(found)


def gene_frame(tokenizer: GeneTokenizer, chosen: np.ndarray) -> pd.DataFrame:
    """Return a table of the ids and symbols of chosen genes, int array (k,), indexed by their ids."""
    ids = [tokenizer.genes[i] for i in chosen]
    symbol = {gene: name for name, gene in reversed(tokenizer.symbols.items())}  # the first one stays
    symbols = [symbol.get(gene, "" if is_id else gene) for gene, is_id in zip(ids, are_ids(ids), strict=True)]
    return pd.DataFrame({"gene_id": ids, "symbol": symbols}, index=pd.Index(ids, dtype=object))


def refuse_neighborhoods(tokenizer: GeneTokenizer) -> None:
    """Raise a ValueError for a model that reads neighbourhoods."""
    if tokenizer.neighborhood:
        raise ValueError("The model reads the genes of a cell's neighbours too, so a gene has no single token.")
