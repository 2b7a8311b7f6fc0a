"""Obs columns by their values: what is missing fits any type, numbers and dates stay what they are."""

import tempfile
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from conftest import of_epoch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Subset
from transformers import default_data_collator

from stformer_hf import (
    CellStore,
    DataCollatorForPhenotypicMLM,
    GeneTokenizer,
    IterableAnnDataset,
    collate_cells,
    collate_fn_wrapper,
)

N_CELLS = 4
DATES = pd.to_datetime(["2024-02-29 00:00", "2024-03-01 12:30", None, "1999-12-31 23:59"])
KNOWN = {
    "labels": pd.Categorical(["T", "B", "T", "B"]),
    "strings": ["T", "B", "T", "B"],
    "other strings": ["a", "b", "c", "d"],
    "floats": [0.5, np.nan, 2.0, 3.0],
    "integers": [1, 2, 3, 2**60 + 1],
    "integers beside missing": pd.array([1, None, 3, 2**60 + 1], dtype="Int64"),
    "booleans": [True, False, True, True],
    "booleans beside missing": np.array([True, None, False, True], object),
    "dates": DATES,
}
MISSING = {
    "floats": np.full(N_CELLS, np.nan),
    "objects": np.full(N_CELLS, None, object),
    "integers": pd.array([None] * N_CELLS, dtype="Int64"),
    "labels": pd.Categorical([None] * N_CELLS, categories=["x", "y"]),
    "dates": pd.to_datetime([None] * N_CELLS),
}


def cells(values=None, seed: int = 0) -> AnnData:
    counts = np.random.default_rng(seed).integers(1, 50, (N_CELLS, 5)).astype(np.float32)
    obs = pd.DataFrame(index=[f"{seed}-{i}" for i in range(N_CELLS)])
    if values is not None:
        obs["v"] = values
    return AnnData(counts, obs, pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(5)]))


def plain(values) -> list:
    """Values as Python's own, None where missing."""
    return [None if pd.isna(value) else value for value in pd.Series(values, dtype=object)]


def streamed(sources, **settings) -> list:
    return plain([cell["v"] for cell in IterableAnnDataset(sources, obs=["v"], **settings)])


# ---------------------------------------------------------------------- missing in one file


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("known", KNOWN)
def test_a_column_all_missing_in_a_file_fits_any_type(tmp_path, known, missing):
    a, b = cells(KNOWN[known], seed=1), cells(MISSING[missing], seed=2)
    there = plain(KNOWN[known])
    for name, sources, expected in (("ab", [a, b], there + [None] * 4), ("ba", [b, a], [None] * 4 + there)):
        store = CellStore.build(tmp_path / name, sources, obs=["v"], report=False)
        assert plain(store.obs["v"]) == expected == streamed(sources)
        assert store.categories.get("v", ["T", "B"]) in (["T", "B"], ["B", "T"])
        assert "v" in CellStore.build(tmp_path / f"{name}-all", sources, obs="all", report=False).obs
    store = CellStore.build(tmp_path / "s", a, obs=["v"], report=False)
    store.append(b)
    assert plain(store.obs["v"]) == there + [None] * 4


def test_a_column_missing_everywhere_stays(tmp_path):
    for name, missing in MISSING.items():
        store = CellStore.build(tmp_path / name, cells(missing), obs=["v"], report=False)
        assert store.obs["v"].isna().all()


# ---------------------------------------------------------------------- numbers


def test_labels_of_numbers_keep_their_printed_form(tmp_path):
    values = [0.1, 0.25, 3.0, 0.1]
    narrow, wide = (cells(pd.Categorical(np.array(values, dtype)), i) for i, dtype in enumerate(["f4", "f8"]))
    store = CellStore.build(tmp_path / "s", [narrow, wide], obs=["v"], report=False)
    assert store.categories["v"] == ["0.1", "0.25", "3"]
    assert plain(store.obs["v"]) == ["0.1", "0.25", "3", "0.1"] * 2
    tokenizer = GeneTokenizer.from_store(store, phenotypes=["v"])
    of_store = tokenizer(store.__getitems__(range(4)))["input_ids"]
    for adata in (narrow, wide):
        adata.obs["v"] = adata.obs["v"].astype(adata.obs["v"].cat.categories.dtype)
    for adata in (cells(pd.Categorical(np.array(values, "f4"))), narrow):
        assert [list(map(int, row)) for row in tokenizer(adata)["input_ids"]] == [
            list(map(int, row)) for row in of_store
        ]


whole = st.integers(-(2**63), 2**64 - 1) | st.integers(-9, 9)
DTYPES = ["int64", "uint64", "Int64", "UInt64", "float64", "object"]


@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(whole | st.none(), min_size=4, max_size=4)), min_size=1, max_size=3
    )
)
def test_whole_numbers_stay_exact_or_the_column_is_named(files):
    sources, expected = [], []
    for seed, (dtype, values) in enumerate(files):
        try:
            if dtype == "float64":
                array = np.array([np.nan if value is None else value for value in values])
            elif dtype == "object":
                array = np.array(values, object)
            elif dtype in ("Int64", "UInt64"):
                array = pd.array(values, dtype=dtype)
            else:
                array = np.array([0 if value is None else value for value in values], dtype)
        except (OverflowError, TypeError, ValueError):  # the type does not hold them
            return
        sources.append(cells(array, seed))
        expected += plain(array)
    with tempfile.TemporaryDirectory() as folder:
        try:
            store = CellStore.build(Path(folder, "s"), sources, obs=["v"], report=False)
        except ValueError as error:
            assert "obs column 'v'" in str(error)
            return
        assert plain(store.obs["v"]) == expected == streamed(sources)
        batch = collate_cells(store.__getitems__(range(len(store))))["obs_v"]
        assert plain(batch if isinstance(batch, list) else batch.numpy()) == expected


def test_what_is_added_takes_the_types_of_the_store_where_its_values_allow(tmp_path):
    store = CellStore.build(tmp_path / "s", cells([0.5, 1, 2, 3]), obs=["v"], report=False)
    store.append(cells([4, 5, 6, 7], seed=1))
    assert store.obs["v"].tolist() == [0.5, 1, 2, 3, 4, 5, 6, 7]
    for wrong in ([2**60 + 1, 0, 0, 0], ["1", "2", "3", "4"]):
        with pytest.raises(ValueError, match="obs column 'v'"):
            store.append(cells(wrong, seed=2))
    store = CellStore.build(tmp_path / "t", cells([1, 2, 3, 4]), obs=["v"], report=False)
    store.append(cells([5, np.nan, 7, 8], seed=1))
    assert plain(store.obs["v"]) == [1, 2, 3, 4, 5, None, 7, 8]
    with pytest.raises(ValueError, match="obs column 'v'.*another type"):
        store.append(cells([0.5, 1, 2, 3], seed=2))
    store = CellStore.build(tmp_path / "u", cells(list("abcd")), obs=["v"], report=False)
    store.append(cells(pd.Categorical(list("aabb")), seed=1))
    assert store.obs["v"].tolist() == list("abcdaabb")


# ---------------------------------------------------------------------- dates


@pytest.mark.parametrize("unit", ["s", "us", "ns"])
def test_a_date_stays_a_date_in_every_way_of_reading(tmp_path, unit):
    sources = [cells(DATES.as_unit(unit)), cells(DATES, seed=1)]
    expected = plain(DATES) * 2
    store = CellStore.build(tmp_path / "s", sources, obs=["v"], report=False)
    tokenizer = GeneTokenizer.from_store(store)
    ways = {
        "obs": store.obs["v"],
        "cells": [store[i]["v"] for i in range(8)],
        "batch": store.__getitems__(range(8)).obs["v"],
        "collate_cells": collate_cells(store.__getitems__(range(8)))["obs_v"],
        "dataset": list(store.dataset["v"]),
        "tokens": list(store.tokenize(tokenizer, tmp_path / "t", obs=["v"])["v"]),
        "stream": streamed(sources),
        "stream of tokens": [cell["v"] for cell in IterableAnnDataset(sources, tokenizer, obs=["v"])],
        "saved": store.save(tmp_path / "u").obs["v"],
    }
    for way, values in ways.items():
        values = plain(values)
        assert values == expected, way
        assert all(value is None or hasattr(value, "year") for value in values), way


# ---------------------------------------------------------------------- what cannot be read


def test_a_column_that_cannot_be_read_is_left_out_and_named(tmp_path, caplog):
    adata = cells(["x", "y", "x", "y"])
    adata.obs["odd"], adata.obs["short"], adata.obs["age"] = 1.0, 2.0, [1, 2, 3, 4]
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        file["obs/odd"].attrs["encoding-type"] = "of-another-package"
        del file["obs/short"]
        file["obs/short"] = np.ones(2)
        file["obs/short"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    store = CellStore.build(tmp_path / "s", tmp_path / "a.h5ad", obs=["v", "age"], report=False)
    assert store.obs["age"].tolist() == [1, 2, 3, 4] and store.obs["v"].tolist() == list("xyxy")
    assert store.obs.index.tolist() == adata.obs_names.tolist()
    assert list(CellStore.build(tmp_path / "t", tmp_path / "a.h5ad", obs="all", report=False).obs) == ["v", "age"]
    for name in ("odd", "short"):
        assert f"a.h5ad: the obs column '{name}' cannot be read" in caplog.text
        with pytest.raises(ValueError, match=f"a.h5ad has no obs column '{name}'"):
            CellStore.build(tmp_path / "u", tmp_path / "a.h5ad", obs=[name], report=False)


# ---------------------------------------------------------------------- torch's ways


def test_torch_ways_to_read_stores_work_or_say_what_to_give(tmp_path):
    store, other = (CellStore.build(tmp_path / str(i), cells(seed=i), report=False) for i in range(2))
    tokenizer = GeneTokenizer.from_store(store)
    (batch,) = DataLoader(Subset(store, [2, 0]), 2, collate_fn=collate_cells)
    assert batch["cell_id"].tolist() == [2, 0]
    (batch,) = DataLoader(Subset(store, [2, 0]), 2, collate_fn=DataCollatorForPhenotypicMLM(tokenizer))
    assert len(batch["input_ids"]) == 2
    for collate in (None, default_data_collator):
        for n_workers in (0, 1):
            with pytest.raises(TypeError, match="collate_fn=collate_cells"):
                next(iter(DataLoader(store, 2, collate_fn=collate, num_workers=n_workers)))
    both = ConcatDataset([store, other])
    joined = CellStore.join(tmp_path / "joined", [store.path, other.path])
    for collate in (collate_cells, of_epoch(DataCollatorForPhenotypicMLM(tokenizer)), collate_fn_wrapper(tokenizer)):
        for n_workers in (0, 1):
            batches = list(DataLoader(both, 4, collate_fn=collate, num_workers=n_workers))
            parts = [collate(one.__getitems__(range(4))) for one in (store, other)]
            for batch, expected in zip(batches, parts, strict=True):
                assert batch.keys() == expected.keys()
                assert all(torch.equal(batch[name], expected[name]) for name in batch if name.find("obs_"))
    assert torch.cat([batch["cell_id"] for batch in DataLoader(joined, 3, collate_fn=collate_cells)]).tolist() == [
        *range(8)
    ]
