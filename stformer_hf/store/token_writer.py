"""Write the tokens of a store as a saved Hugging Face dataset, shard by shard, atomically."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from ..genes.whole_files import whole_file
from ..genes.wrong_names import must_have
from .engines import check_engine, run_tasks, runs_here
from .manifest import write_dataset_files, written_by
from .reader import StoreReader
from .replacing import Contents, check_free, recover, written_at
from .shards import checksum, gene_type, read_batches, told_when_full, write_json
from .writer import prepare

if TYPE_CHECKING:
    from datasets import Features


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
ROWS_PER_BATCH = 1024  # rows of an Arrow record batch
_ROWS_AT_A_TIME = 64  # cells that are tokenized at once; their arrays fit into the processor's cache
ROWS_PER_SHARD = 16_384
_OF_TOKENS = ("input_ids", "token_type_ids", "expression_values")
_OF_CELLS = ("cell_genes", "cell_counts")
_OWN_COLUMNS = (*_OF_TOKENS, *_OF_CELLS, "measured_genes", "length", "cell_id")
_TOKENS = Contents(
    "a tokenized dataset",
    "datasets.load_from_disk",
    ("lengths.json", "tokenizer", "manifest.json", "dataset_info.json", "state.json", "plan.json"),
)


def write_tokens(
    store: StoreReader,
    selection: np.ndarray | None,
    tokenizer: Any,
    path: Path,
    *,
    obs: Sequence[str] | str | None,
    workers: int,
    engine: str,
    rows_per_shard: int,
    overwrite: bool,
) -> None:
    """Write the tokens of a store's cells; parameters and errors are those of `CellStore.tokenize`.

    `selection` holds the row numbers of a selection, None for a whole store.
    """
    path = path.resolve()
    recover(path)
    check_engine(engine, workers)
    if rows_per_shard < 1:
        raise ValueError(f"rows_per_shard={rows_per_shard}: must be at least 1.")
    if not hasattr(tokenizer, "encode_cells"):
        raise TypeError(f"A GeneTokenizer is needed, got {type(tokenizer).__name__}.")
    check_free(path, _TOKENS, overwrite)
    columns = _chosen_obs(store, obs)
    features = _features(store, tokenizer, columns)
    with written_at(path, _TOKENS, overwrite) as building, told_when_full(building, "the tokens", "tokenize"):
        prepare(building, _plan(store, selection, tokenizer, columns, rows_per_shard))
        shards = TokenShards(store, tokenizer, building, columns, features.arrow_schema, rows_per_shard)
        _finish(building, shards, _write_shards(shards, workers, engine), features)
    (path / "plan.json").unlink(missing_ok=True)  # only now: without it, an interrupted call starts over


def _chosen_obs(store: StoreReader, obs: Sequence[str] | str | None) -> list[str]:
    """Return the names of the obs columns to copy."""
    known = list(store.manifest["obs"])
    if obs == "all":
        left_out = [name for name in known if name in _OWN_COLUMNS]
        if left_out:
            logger.warning(f"obs column {', '.join(left_out)} is not copied: the tokens use this name.")
        return [name for name in known if name not in _OWN_COLUMNS]
    names = [] if obs is None else [obs] if isinstance(obs, str) else list(dict.fromkeys(obs))
    for name in names:
        must_have(known, "obs", name)
        if name in _OWN_COLUMNS:
            raise ValueError(f"obs column {name!r}: the tokens use this name. Look it up in the store by cell_id.")
    return names


def _features(store: StoreReader, tokenizer: Any, obs: Sequence[str]) -> Features:
    """Return the columns of the dataset, in the narrowest types that hold the tokenizer's ids."""
    from datasets import Features, List, Value

    n_types = tokenizer.type_vocab_size
    of_cells = {
        "cell_genes": List(Value(gene_type(len(tokenizer.genes)))),
        "cell_counts": List(Value("float32")),
        "measured_genes": List(Value("bool")),  # null if the store measures all genes of the tokenizer
    }
    features = {
        "input_ids": List(Value(gene_type(tokenizer.vocab_size))),
        "token_type_ids": List(Value("uint8" if n_types <= 1 << 8 else gene_type(n_types))),
        **({"expression_values": List(Value("float32"))} if tokenizer.values else {}),
        **(of_cells if tokenizer.whole_cell else {}),
        "length": Value("int32"),
        "cell_id": Value("int64"),
    }
    return Features({**features, **{name: store.features[name] for name in obs}})


def _plan(
    store: StoreReader, selection: np.ndarray | None, tokenizer: Any, obs: Sequence[str], rows_per_shard: int
) -> dict:
    """Describe a call, to resume an interrupted one only if the descriptions are equal."""
    with tempfile.TemporaryDirectory() as folder:  # the vocabulary files hold all settings
        vocabulary = sorted(map(Path, tokenizer.save_vocabulary(folder)))
        settings = {file.name: checksum(file) for file in vocabulary}
    return {
        "format_version": FORMAT_VERSION,
        "written_by": written_by(),
        "tokenizer": {"fingerprint": tokenizer.fingerprint, **settings},
        # Checksums of the shards and of the gene table, and the names of the categories.
        "store": hashlib.sha256(json.dumps(store.manifest, sort_keys=True).encode()).hexdigest(),
        "selection": None if selection is None else hashlib.sha256(selection.tobytes()).hexdigest(),
        "n_cells": len(store),
        "obs": list(obs),
        "rows_per_shard": rows_per_shard,
    }


# ---------------------------------------------------------------------- shards


@dataclass
class TokenShards:
    """Shards of a tokenized dataset, and all that any process needs to write them."""

    store: StoreReader  # the cells, in the order of the rows
    tokenizer: Any  # GeneTokenizer
    folder: Path
    obs: list[str]  # columns that are copied
    schema: pa.Schema
    rows_per_shard: int

    def __len__(self) -> int:
        return max(1, -(-len(self.store) // self.rows_per_shard))  # without a file there is no dataset

    def write(self, number: int, progress: Callable[[int], object] = lambda n_cells: None) -> dict:
        """Write a shard, unless it exists; return its record."""
        start = number * self.rows_per_shard
        stop = min(start + self.rows_per_shard, len(self.store))
        file = self.folder / f"data-{number:05d}-of-{len(self):05d}.arrow"
        if file.exists():
            progress(stop - start)
        else:
            with (
                whole_file(file) as part,
                told_when_full(self.folder, "the tokens", "tokenize"),
                open(part, "wb") as sink,
                ThreadPoolExecutor(1) as flusher,
            ):
                # Flush while cells are tokenized; else every file would end with a wait for the disk.
                flushed = flusher.submit(os.fsync, sink.fileno())
                with pa.ipc.new_stream(sink, self.schema) as writer:
                    for first in range(start, stop, ROWS_PER_BATCH):
                        rows = np.arange(first, min(first + ROWS_PER_BATCH, stop))
                        writer.write_batch(self._tokenized(rows))
                        progress(len(rows))
                        if flushed.done():
                            flushed.result()
                            flushed = flusher.submit(os.fsync, sink.fileno())
                flushed.result()
                sink.flush()
                os.fsync(sink.fileno())
        return {"file": file.name, "rows": stop - start, "bytes": file.stat().st_size, "checksum": checksum(file)}

    def _tokenized(self, rows: np.ndarray) -> pa.RecordBatch:
        lists = [name for name in self.schema.names if name in _OF_TOKENS]
        of_cells = [name for name in self.schema.names if name in _OF_CELLS]
        parts: dict[str, list[np.ndarray]] = {name: [] for name in (*lists, *of_cells, "length", "cell_id")}
        n_genes, measured = [], None
        for start in range(0, len(rows), _ROWS_AT_A_TIME):
            cells = self.store.__getitems__(rows[start : start + _ROWS_AT_A_TIME])
            tokens = self.tokenizer.encode_cells(cells, epoch=0)
            parts["length"].append(np.diff(tokens.indptr).astype(np.int32))
            parts["cell_id"].append(cells.cell_id)
            for name in lists:
                narrow = self.schema.field(name).type.value_type.to_pandas_dtype()
                parts[name].append(getattr(tokens, name).astype(narrow))
            if of_cells:
                n_genes.append(np.diff(tokens.cells.indptr))
                measured = tokens.measured  # those of the store: the same for all cells
                for name, values in zip(_OF_CELLS, tokens.cells[1:], strict=True):
                    parts[name].append(values.astype(self.schema.field(name).type.value_type.to_pandas_dtype()))
        columns: dict[str, Any] = {name: np.concatenate(of) for name, of in parts.items()}
        lengths = {"tokens": columns["length"], "cells": np.concatenate(n_genes or [np.empty(0, np.int64)])}
        offsets = {of: pa.array(np.concatenate([[0], np.cumsum(n)]).astype(np.int32)) for of, n in lengths.items()}
        for of, names in (("tokens", lists), ("cells", of_cells)):
            columns.update({name: pa.ListArray.from_arrays(offsets[of], columns[name]) for name in names})
        if of_cells:
            own = None if measured is None else measured[0].tolist()
            columns["measured_genes"] = pa.array([own] * len(rows), self.schema.field("measured_genes").type)
        if self.obs:
            table = self._obs_columns.slice(rows[0], len(rows))
            columns.update({name: table.column(name).combine_chunks() for name in self.obs})
        return pa.record_batch([columns[name] for name in self.schema.names], schema=self.schema)

    @cached_property
    def _obs_columns(self) -> pa.Table:
        return self.store.obs_table(self.obs)


def _write_shards(shards: TokenShards, workers: int, engine: str) -> list[dict]:
    """Write the missing shards; return the records of all shards, in the order of the cells."""
    numbers = range(len(shards))
    with tqdm(total=len(shards.store), desc="tokenize", unit="cell", disable=None) as bar:
        if runs_here(engine, workers):
            return [shards.write(number, bar.update) for number in numbers]
        records: dict[int, dict] = {}
        with run_tasks(TokenShards.write, numbers, shared=shards, workers=workers, engine=engine) as results:
            for number, record in results:
                records[number] = record
                bar.update(record["rows"])
    return [records[number] for number in numbers]


# ---------------------------------------------------------------------- finishing


def _finish(building: Path, shards: TokenShards, records: list[dict], features: Features) -> None:
    """Write the files that make the folder a dataset, the manifest last."""
    for leftover in building.glob(".*.part"):  # of workers that were killed
        leftover.unlink()
    n_tokens = _write_lengths(building, records)
    tokenizer = shards.tokenizer
    tokenizer.save_pretrained(building / "tokenizer")
    write_dataset_files(building, features, records)
    write_json(
        building / "manifest.json",
        {
            "format_version": FORMAT_VERSION,
            "written_by": written_by(),
            "store": shards.store.path.name,
            "n_cells": len(shards.store),
            "n_tokens": n_tokens,
            "tokenizer": {
                "fingerprint": tokenizer.fingerprint,
                **{name: getattr(tokenizer, name) for name in ("scheme", "max_length", "truncation", "seed")},
            },
            "obs": shards.obs,
            "shards": records,
            "complete": True,
        },
    )


def _write_lengths(building: Path, records: list[dict]) -> int:
    """Write the number of tokens of each cell as a JSON list; return their sum."""
    n_tokens = 0
    with open(building / "lengths.json", "w", encoding="ascii") as file:
        separator = "["
        for record in records:
            for batch in read_batches(building / record["file"]):
                lengths = batch.column("length").to_numpy()
                n_tokens += int(lengths.sum(dtype=np.int64))
                file.write(separator + ", ".join(map(str, lengths.tolist())))
                separator = ",\n"
        file.write("]" if separator != "[" else "[]")  # no cells
        file.flush()
        os.fsync(file.fileno())
    return n_tokens
