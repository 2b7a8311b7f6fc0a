"""Run a model over the cells of an AnnData, in batches of similar length."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from anndata import AnnData
from scipy import sparse
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..batches.collate import pack, pad
from ..batches.evaluating import evaluating
from ..models.gene_bert.cell_counts import NEIGHBORS, pad_ragged, sum_of_neighbors
from ..models.gene_bert.cell_tables import find_table, is_mudata, is_spatialdata
from ..models.gene_bert.heads import default_pooling
from ..models.gene_bert.packed_attention import takes_boundaries
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer
from ..models.gene_bert.tokenized_cells import TokenizedCells, take
from ..sources.open_source import Source, open_source
from ..store.cell_store import CellStore
from ..store.engines import check_engine, run_tasks, runs_here
from ..training.cell_heads import check_finite, predicts_cells
from ..training.identity import check_tokenizer_fits
from ..training.loading import is_model, load_config, load_model, tokenizer_of, unwrap

logger = logging.getLogger(__name__)

_ROWS_PER_BLOCK = 4096
_BLOCKS_PER_TASK = 4
_T = TypeVar("_T")


def load(
    model: str | PreTrainedModel, tokenizer: GeneTokenizer | None, auto_class: Any, min_coverage: float | None = None
) -> tuple[PreTrainedModel, GeneTokenizer]:
    """Load a checkpoint, or unwrap a model object; return model and tokenizer. Errors are those of `embed`.

    With `min_coverage`, the tokenizer is a copy with that setting.
    """
    of_object = is_model(model)
    config = unwrap(model).config if of_object else load_config(model)
    if config.model_type == "cell_neighborhood":
        raise ValueError(
            f"{'The model' if of_object else model} reads the cells around a cell: use embed_neighborhoods, or "
            "stformer-hf embed --kind neighborhood."
        )
    model = unwrap(model) if of_object else model
    tokenizer = tokenizer_of(model, tokenizer)
    if not of_object:
        model = load_model(model, auto_class)
    check_tokenizer_fits(model, tokenizer)
    if min_coverage is not None:
        tokenizer = copy.copy(tokenizer)
        tokenizer.min_coverage = min_coverage
    return model, tokenizer


def is_classifier(model: str | PreTrainedModel) -> bool:
    """Return whether a checkpoint or a model predicts classes or numbers of cells."""
    return predicts_cells(
        [type(unwrap(model)).__name__] if is_model(model) else load_config(model).architectures or []
    )


def choose_pooling(pooling: str | None, model: PreTrainedModel, tokenizer: GeneTokenizer) -> str:
    """Return the pooling, by default as the model was trained; raise a ValueError for one that is not possible."""
    if pooling not in (None, "cls", "mean"):
        raise ValueError(f'pooling must be "cls" or "mean", got {pooling!r}.')
    pooling = pooling or default_pooling(model.config)
    if pooling == "cls" and not tokenizer.add_cls:
        raise ValueError('The tokenizer adds no [CLS]: use pooling="mean".')
    return pooling


def check_hidden_layer(model: PreTrainedModel, hidden_layer: int) -> None:
    """Raise a ValueError if a model has no such hidden state: 0 is the embedding layer, -1 the last layer."""
    n_layers = model.config.num_hidden_layers
    if not -n_layers - 1 <= hidden_layer <= n_layers:
        raise ValueError(
            f"hidden_layer {hidden_layer} does not exist in a model of {n_layers} layers: pass 0 to {n_layers}, or -1."
        )


def check_dtype(dtype: str | None) -> None:
    """Raise a ValueError if inference cannot compute in `dtype`."""
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise ValueError(f'dtype must be "float32", "bfloat16" or "float16", got {dtype!r}.')


@contextmanager
def at_work(
    model: PreTrainedModel, device: str | None, gradients: bool = False, dtype: str | None = None
) -> Iterator[None]:
    """Put a model into evaluation mode on a device, by default a GPU if there is one, and restore both afterwards.

    Without `gradients`, torch is in inference mode. With `dtype`, "bfloat16" or "float16", torch computes in it where
    that is safe (autocast), and the weights stay as they are.
    """
    check_dtype(dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    half = None if dtype in (None, "float32") else getattr(torch, dtype)
    autocast = torch.autocast(torch.device(device).type, half, enabled=half is not None)
    with evaluating(model, device), torch.enable_grad() if gradients else torch.inference_mode(), autocast:
        yield


def packs(model: PreTrainedModel) -> bool:
    """Return whether inference packs the cells of a batch into one row, with the model's device and precision.

    It does where attention takes the boundaries of cells (flash attention, or sdpa on a GPU in half precision), and
    with sdpa on a CPU, where one call per cell is faster than the mask of a padded batch. It pads for eager and flex
    attention, which need a mask over all pairs of tokens of a packed row, and for sdpa on a GPU in float32.
    """
    weights = next(model.parameters())
    on_cpu = model.config._attn_implementation == "sdpa" and weights.device.type == "cpu"
    return model.config.model_type == "gene_bert" and (on_cpu or takes_boundaries(model.config, weights))


def run(
    adata: AnnData,
    model: PreTrainedModel,
    tokenizer: GeneTokenizer,
    forward: Callable[[PreTrainedModel, dict[str, torch.Tensor], torch.Tensor], torch.Tensor],
    *,
    layer: str | None,
    fractional: bool,
    batch_size: int,
    device: str | None,
    desc: str,
    with_phenotypes: bool,
    max_length: int | None = None,
    dtype: str | None = None,
    distributed: bool = False,
    workers: int = 1,
    engine: str = "local",
) -> tuple[np.ndarray, np.ndarray, Source]:
    """Apply a function to every cell; the other parameters are those of `embed`.

    Parameters
    ----------
    forward : callable
        Model, inputs of a batch of n cells, padded or packed (see `packs`), and their token types -> Tensor (n, d).
        With more than one worker, it must be picklable.
    desc : str
        Text of the progress bar.
    max_length : int, optional
        Number of tokens to read of each cell, see `batches.evaluating.length_to_read`.

    Returns
    -------
    results : float32 array (n_cells, d)
        In the order of the cells, whatever the processes, as far as torch computes the same with as many threads.
    n_genes : int64 array (n_cells,)
        Number of genes of each cell among its tokens.
    source : Source
        Source of the counts.
    """
    check_engine(engine, workers)
    here = runs_here(engine, workers)
    if not here and not isinstance(adata, CellStore):
        raise ValueError("workers and engine need a CellStore: build one from the cells first.")
    source = open_source(adata, layer, fractional)
    state, n_cells = PartialState() if distributed else None, source.shape[0]
    rank, world = (0, 1) if state is None else (state.process_index, state.num_processes)
    own = range(rank * n_cells // world, (rank + 1) * n_cells // world)
    if state is not None and device is None:
        device = str(state.device)
    work = _Work(model, tokenizer, forward, batch_size, device, dtype, with_phenotypes, max_length)
    if here:
        parts = [work.run(source, own, desc)]
    else:
        if world > 1:
            raise ValueError("accelerate launch divides the cells already: leave workers and engine out.")
        parts = _by_workers(work, adata, workers, engine, desc)
    if world > 1:
        parts = gather_object(parts)  # in the order of the processes
    outputs = [part for part, _ in parts if part is not None]  # a process may have no cells
    results = outputs[0] if len(outputs) == 1 else np.concatenate(outputs)
    n_genes = np.concatenate([part for _, part in parts])
    check_finite(results, n_genes > 0)
    if (n_genes == 0).any():
        logger.warning(f"{(n_genes == 0).sum()} of {len(n_genes)} cells have no counts in genes that the model knows.")
    return results, n_genes, source


@dataclass
class _Work:
    """What any process needs to apply a function to cells; see `run`."""

    model: PreTrainedModel
    tokenizer: GeneTokenizer
    forward: Callable[[PreTrainedModel, dict[str, torch.Tensor], torch.Tensor], torch.Tensor]
    batch_size: int
    device: str | None
    dtype: str | None
    with_phenotypes: bool
    max_length: int | None

    def __getstate__(self) -> dict[str, Any]:
        """Hold the model as its weights: a model that ran has hooks of Transformers, which cannot be pickled."""
        weights = {name: weight.cpu() for name, weight in self.model.state_dict().items()}
        with torch.device("meta"):
            known = type(self.model)(copy.deepcopy(self.model.config)).state_dict()
        if weights.keys() != known.keys():
            other = sorted(weights.keys() ^ known.keys())
            raise ValueError(
                f"Workers make a {type(self.model).__name__} from its configuration, but this one has other weights, "
                f"such as {other[0]}. Merge its adapters first (merge_and_unload), or leave workers and engine out."
            )
        return {**self.__dict__, "model": (type(self.model), self.model.config, weights)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kind, config, weights = state["model"]
        model = kind(config)
        model.load_state_dict(weights, assign=True)
        self.__dict__.update({**state, "model": model})

    def run(self, source: Source, cells: range, desc: str | None) -> tuple[np.ndarray | None, np.ndarray]:
        """Return the results of a range of cells, None without cells, and the number of genes of each.

        `desc` is the text of the progress bar; None shows none.
        """
        results, n_genes = None, np.zeros(len(cells), np.int64)
        with at_work(self.model, self.device, dtype=self.dtype):
            batches = read_batches(
                source,
                self.tokenizer,
                self.batch_size,
                desc=desc,
                with_phenotypes=self.with_phenotypes,
                cells=cells,
                packed=packs(self.model),
                max_length=self.max_length,
                ahead=self.model.device.type != "cpu",  # which would not wait for the model
            )
            for batch in batches:
                batch = batch.to(self.model.device)
                found = self.forward(self.model, batch.inputs, batch.types).float().cpu().numpy()
                if results is None:
                    results = np.empty((len(cells), *found.shape[1:]), found.dtype)
                rows = batch.rows - cells.start
                results[rows] = found
                n_genes[rows] = batch.n_genes
        return results, n_genes


def _by_workers(
    work: _Work, store: CellStore, workers: int, engine: str, desc: str
) -> list[tuple[np.ndarray | None, np.ndarray]]:
    """Let workers do the work; return the results of ranges of cells, in order.

    The ranges are of whole blocks, so that the batches are those of one process.
    """
    step = _BLOCKS_PER_TASK * _ROWS_PER_BLOCK
    ranges = [range(start, min(start + step, len(store))) for start in range(0, max(len(store), 1), step)]
    parts: list = [None] * len(ranges)
    gpus = 1 if torch.device(work.device or "cpu").type == "cuda" else 0
    with (
        tqdm(total=len(store), desc=desc, unit="cell", disable=None) as bar,
        run_tasks(_run_range, ranges, shared=(work, store), workers=workers, engine=engine, gpus=gpus) as results,
    ):
        for number, part in results:
            parts[number] = part
            bar.update(len(ranges[number]))
    return parts


def _run_range(shared: tuple[_Work, CellStore], cells: range) -> tuple[np.ndarray | None, np.ndarray]:
    work, store = shared
    return work.run(open_source(store), cells, None)


class TokenBatch(NamedTuple):
    """Tokens of n cells: padded, one row per cell (n, length), or packed, all T tokens in one row (1, T)."""

    rows: np.ndarray  # of the cells in their source: int64 (n,)
    inputs: dict[str, torch.Tensor | int]  # of the model, as made by `pad` or `pack`
    types: torch.Tensor  # token types, which not every model reads
    genes: np.ndarray  # int64 index of the gene of each token; -1 for tokens that are not genes, and padding
    n_genes: np.ndarray  # number of genes of each cell among its tokens: int64 (n,)

    def to(self, device: torch.device) -> TokenBatch:
        """Return the batch with its tensors on a device."""
        inputs = {name: of if isinstance(of, int) else of.to(device) for name, of in self.inputs.items()}
        return self._replace(inputs=inputs, types=self.types.to(device))


def read_batches(
    source: Source,
    tokenizer: GeneTokenizer,
    batch_size: int,
    *,
    desc: str | None,
    with_phenotypes: bool = False,
    max_padded: int | None = None,
    cells: range | None = None,
    packed: bool = False,
    max_length: int | None = None,
    ahead: bool = False,
) -> Iterator[TokenBatch]:
    """Tokenize the cells of a source, and yield them in batches of similar length.

    Parameters
    ----------
    source : Source
        Cells, read in blocks of 4,096.
    desc : str, optional
        Text of the progress bar; None shows none.
    with_phenotypes : bool, default: False
        Whether the model reads the phenotypes in obs; they are masked otherwise.
    max_padded : int, optional
        Maximum of cells x longest ** 2 in a batch of several cells, for what needs memory by pair of tokens.
    cells : range, optional
        Rows of the cells to read; all by default.
    packed : bool, default: False
        Whether to pack the batches instead of padding them, see `make_batch`.
    max_length : int, optional
        Maximum number of tokens per cell, by default the tokenizer's.
    ahead : bool, default: False
        Whether a thread tokenizes the next block while the caller works on the batches of one.

    Yields
    ------
    TokenBatch
        Each cell once; within a block, the longest cells come first.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: must be at least 1.")
    if not source.shape[0]:
        raise ValueError("The AnnData has no cells.")
    cells = range(source.shape[0]) if cells is None else cells
    tokenized = _tokenize(source, tokenizer, cells, with_phenotypes, max_length)
    with tqdm(total=len(cells), desc=desc, unit="cell", disable=True if cells.start or desc is None else None) as bar:
        for start, tokens in _one_ahead(tokenized) if ahead else tokenized:
            lengths = np.diff(tokens.indptr)
            order = np.argsort(-lengths, kind="stable")
            first = 0
            while first < len(order):
                n = batch_size
                if max_padded is not None:
                    n = min(n, max(max_padded // max(int(lengths[order[first]]) ** 2, 1), 1))
                some = order[first : first + n]
                yield make_batch(take(tokens, some), start + some, tokenizer, packed)
                bar.update(len(some))
                first += n


def _tokenize(
    source: Source, tokenizer: GeneTokenizer, cells: range, with_phenotypes: bool, max_length: int | None
) -> Iterator[tuple[int, TokenizedCells]]:
    """Yield the row of the first cell of each block, and the tokens of the block; see `read_batches`."""
    names = (source.genes.gene_ids, source.genes.symbols)
    start, around = cells.start, None
    if tokenizer.neighborhood:
        graph = source.neighbors(NEIGHBORS).rows(0, source.shape[0])
        around = sum_of_neighbors(graph, sparse.vstack(list(source.blocks(_ROWS_PER_BLOCK)), format="csr"))
    for block in source.blocks(_ROWS_PER_BLOCK, cells.start, cells.stop):
        stop = start + block.shape[0]
        tokens = tokenizer.encode_cells(
            block,
            genes=names,
            obs=source.obs.iloc[start:stop],
            fractional=source.fractional,
            neighborhood=None if around is None else around[start:stop],
            for_inference=not with_phenotypes,
            max_length=max_length,
        )
        yield start, tokens
        start = stop


def _one_ahead(items: Iterator[_T]) -> Iterator[_T]:
    """Yield the items of an iterator; a thread makes the next one while the caller works on one."""
    with ThreadPoolExecutor(1) as thread:

        def make() -> list[_T]:
            return list(islice(items, 1))

        coming = thread.submit(make)
        while made := coming.result():
            coming = thread.submit(make)
            yield from made


def make_batch(tokens: TokenizedCells, rows: np.ndarray, tokenizer: GeneTokenizer, packed: bool) -> TokenBatch:
    """Make a batch of all cells of `tokens`, packed if asked for and if their lengths differ, else padded.

    Cells of one length need no padding, and no mask, which makes the padded batch the faster one.
    """
    indptr = tokens.indptr
    of_genes = tokenizer.get_gene_tokens_mask(tokens.input_ids)
    genes = np.full(len(of_genes), -1, np.int64)
    genes[of_genes] = tokenizer.genes_of(tokens.input_ids[of_genes], tokens.token_type_ids[of_genes])
    n_genes = np.diff(np.concatenate([[0], np.cumsum(of_genes)])[indptr])
    if packed and np.ptp(np.diff(indptr)):
        inputs, types, genes = pack(tokens, tokenizer), tokens.token_type_ids[None], genes[None]
    else:
        inputs = pad(tokens, tokenizer)
        length, side = inputs["input_ids"].shape[1], tokenizer.padding_side
        types = pad_ragged(tokens.token_type_ids, indptr, length, 0, side)
        genes = pad_ragged(genes, indptr, length, -1, side)
    return TokenBatch(rows, inputs, torch.from_numpy(types), genes, n_genes)


def table_of(cells: Any, layer: str | None) -> AnnData:
    """Return the AnnData that results are written to: that of the cells (see `find_table`), or a new one for a store.

    The new one has the obs and the genes of the store, and no counts, so that the store may be larger than memory.
    """
    if isinstance(cells, CellStore):
        return AnnData(obs=cells.obs.copy(), var=cells.genes.frame.set_index("gene_id"))
    check_cells(cells)
    table = find_table(cells, layer).table
    if table.is_view and table.isbacked:
        raise ValueError(
            "Results cannot be written into a view of an AnnData on disk: read its cells first, adata[…].to_memory()."
        )
    return table


def check_cells(cells: Any) -> None:
    """Raise a TypeError for objects that results cannot be written to: all but an AnnData, MuData or SpatialData."""
    if isinstance(cells, AnnData) or is_mudata(cells) or is_spatialdata(cells):
        return
    found = type(cells).__name__
    if isinstance(cells, str | os.PathLike):
        raise TypeError(f"Results are written into an AnnData, got the path {os.fspath(cells)!r}: read it first.")
    if isinstance(cells, CellStore):
        raise TypeError(
            f"Results are written into an AnnData, not into a {found}. Make an AnnData of its cells: "
            "AnnData(store.rows(slice(None)), obs=store.obs, var=store.genes.frame.set_index('gene_id'))."
        )
    raise TypeError(f"Results are written into an AnnData, MuData or SpatialData, got {found}.")
