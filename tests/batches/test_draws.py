"""Weighted draws: the promised frequencies in every order of rows, on any number of ranks, resumable."""

import bisect
import json
import logging
from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import make_adata, of_epoch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch.utils.data import ConcatDataset, DataLoader, Subset

from stformer_hf import (
    CellStore,
    DataCollatorForPhenotypicMLM,
    EvenBatchSampler,
    LengthGroupedSampler,
    RowSampler,
    TokenBudgetBatchSampler,
    WeightedDraw,
    group_weights,
)
from stformer_hf.batches.draws import Permutation
from stformer_hf.batches.repeats import NumberedRepeats, RepeatedRows
from stformer_hf.batches.samplers import SameSourceSampler
from stformer_hf.batches.token_rows import TokenRows
from stformer_hf.store.cell_batch import REPEAT
from stformer_hf.training.objectives.views import sources_of

WEIGHTS = st.lists(st.sampled_from([0.0, 1e-9, 0.5, 1.0, 3.0, 1e9]), min_size=1, max_size=30).filter(any)
ORDERS = ("rows", "grouped", "budget", "packed", "sources")


def make(order, draw, *, rank=None, world_size=1, epoch=0, seed=5):
    """Return the batches of a rank (of all ranks in turn by default) of a sampler with a draw."""
    lengths = np.arange(draw.n_rows) * 7 % 11 + 1
    if order in ("budget", "packed"):
        options = {"packing": order == "packed", "rank": rank, "world_size": world_size}
        sampler = TokenBudgetBatchSampler(lengths, 25, mega_batch=3, seed=seed, draw=draw, **options)
    else:
        rows = {
            "rows": lambda: RowSampler(draw, seed),
            "grouped": lambda: LengthGroupedSampler(lengths, 4 * world_size, mega_batch=2, seed=seed, draw=draw),
            "sources": lambda: SameSourceSampler(np.arange(draw.n_rows) % 3, 4, seed, draw=draw),
        }[order]()
        sampler = EvenBatchSampler(rows, 4, rank=rank, world_size=world_size)
    sampler.set_epoch(epoch)
    return sampler


def rows_of(batches) -> list[int]:
    return sum(batches, [])


# ---------------------------------------------------------------------- draws


def plain_draw(weights, n_draws, replacement, rng) -> list[int]:
    """The documented draw, without numpy's sort and search."""
    positive = [i for i, weight in enumerate(weights) if weight > 0]
    if replacement:
        ends, total = [], 0.0
        for i in positive:
            total += weights[i] / max(weights)
            ends.append(total)
        return [positive[bisect.bisect_right([end / total for end in ends], u)] for u in rng.random(n_draws)]
    drawn = rng.standard_exponential(len(positive)).tolist()
    first = sorted(range(len(positive)), key=lambda k: np.log(drawn[k]) - np.log(weights[positive[k]] / max(weights)))
    return rng.permutation([positive[k] for k in first[:n_draws]]).tolist()


@given(weights=WEIGHTS, seed=st.integers(0, 9), replacement=st.booleans(), data=st.data())
def test_a_draw_is_that_of_the_definition(weights, seed, replacement, data):
    n_positive = np.count_nonzero(weights)
    n_draws = data.draw(st.integers(1, 40 if replacement else n_positive))
    draw = WeightedDraw(weights, n_draws, replacement)
    rows = draw(np.random.default_rng(seed))
    assert rows.dtype == np.int64 and len(rows) == len(draw) == n_draws and draw.n_rows == len(weights)
    assert rows.tolist() == plain_draw(weights, n_draws, replacement, np.random.default_rng(seed))
    assert (np.array(weights)[rows] > 0).all()
    assert draw.same_rows == (not replacement and n_draws == n_positive)
    if not replacement:
        assert len(set(rows.tolist())) == n_draws
    again = WeightedDraw(np.array(weights) * 4, n_draws, replacement)  # only ratios matter
    assert again(np.random.default_rng(seed)).tolist() == rows.tolist() and again.settings() == draw.settings()


def test_without_replacement_each_next_row_is_drawn_from_those_that_are_left():
    weights, n_draws, n_times = np.array([1.0, 2.0, 0.0, 4.0, 8.0]), 2, 4000
    expected = {}
    for first, second in permutations([0, 1, 3, 4], 2):
        left = weights.sum() - weights[first]
        chosen = tuple(sorted((first, second)))
        probability = weights[first] / weights.sum() * weights[second] / left
        expected[chosen] = expected.get(chosen, 0) + probability
    draw, found, orders = WeightedDraw(weights, n_draws, replacement=False), dict.fromkeys(expected, 0), 0
    for epoch in range(n_times):
        rows = draw(np.random.default_rng([1, epoch])).tolist()
        found[tuple(sorted(rows))] += 1
        orders += rows[0] < rows[1]
    assert sum(expected.values()) == pytest.approx(1)
    assert chisquare(list(found.values()), [n_times * of for of in expected.values()]).pvalue > 1e-3
    assert chisquare([orders, n_times - orders]).pvalue > 1e-3  # large weights do not come first


def test_the_draw_of_all_rows_is_the_order_without_weights():
    assert list(RowSampler(Permutation(20), 3)) == np.random.default_rng([3, 0]).permutation(20).tolist()
    rows = RowSampler(WeightedDraw([1, 9, 0, 4], 3, replacement=False))
    assert sorted(rows) == [0, 1, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1, -1],), "1 of 2 are negative, missing or not finite, such as -1.0 of row 1"),
        (([1, np.nan, np.inf],), "2 of 3 are negative"),
        (([0, 0],), "all 2 are 0"),
        (([],), "all 0 are 0"),
        (([[1, 2]],), r"one number per row, got .* of shape \(1, 2\)"),
        ((["a", "b"],), "one number per row"),
        (([1, 1], 0), "n_draws=0"),
        (([1, 1, 0], 3, False), "n_draws=3, but only 2 of 3 rows have a positive weight"),
        (([1, 1], None, False), "replacement=False needs n_draws"),
    ],
)
def test_weights_that_cannot_be_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightedDraw(*arguments)


# ---------------------------------------------------------------------- orders, ranks, workers


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_frequencies_are_in_proportion_to_the_weights(order, world_size):
    weights = np.array([1.0, 2.0, 0.0, 4.0, 8.0, 0.5, 1.0, 3.0, 0.0, 2.5] * 2)
    draw = WeightedDraw(weights, 96)
    seen = np.zeros((world_size, len(weights)))
    for epoch in range(40):
        for rank in range(world_size):
            sampler = make(order, draw, rank=rank, world_size=world_size, epoch=epoch, seed=11)
            np.add.at(seen[rank], rows_of(sampler), 1)
    assert seen.sum() == 40 * 96 and not seen[:, weights == 0].any()
    expected = weights[weights > 0] / weights.sum()
    assert chisquare(seen.sum(0)[weights > 0], 40 * 96 * expected).pvalue > 1e-3
    if order == "rows":  # any part of the draw is one: ranks are independent
        for of_rank in seen:
            assert chisquare(of_rank[weights > 0], of_rank.sum() * expected).pvalue > 1e-3


@given(
    order=st.sampled_from(ORDERS),
    weights=WEIGHTS,
    world_size=st.integers(1, 3),
    replacement=st.booleans(),
    epoch=st.integers(0, 3),
    data=st.data(),
)
def test_ranks_divide_the_rows_that_are_drawn(order, weights, world_size, replacement, epoch, data):
    n_positive = np.count_nonzero(weights)
    n_draws = data.draw(st.integers(1, 40 if replacement else n_positive))
    draw = WeightedDraw(weights, n_draws, replacement)
    samplers = [make(order, draw, rank=rank, world_size=world_size, epoch=epoch) for rank in range(world_size)]
    ranks = [list(sampler) for sampler in samplers]
    assert [len(sampler) for sampler in samplers] == [len(batches) for batches in ranks]
    assert len({len(batches) for batches in ranks}) == 1
    whole = make(order, draw, world_size=world_size, epoch=epoch)
    assert list(whole) == [batch for step in zip(*ranks, strict=True) for batch in step]
    rows = sorted(rows_of(sum(ranks, [])))
    drawn = sorted(draw(np.random.default_rng([5, epoch])).tolist())
    if n_draws >= len(whole):  # else some come twice, to give each rank a batch
        assert rows == drawn
        if not replacement:
            assert sum(len(set(rows_of(of))) for of in ranks) == n_draws


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_rows_of_a_rank_are_a_part_of_the_draw(world_size):
    draw = WeightedDraw(np.arange(10), 37)
    ranks = [list(RowSampler(draw, 4, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert sum(ranks, []) == draw(np.random.default_rng([4, 0])).tolist()
    assert np.ptp([len(rows) for rows in ranks]) <= 1
    assert [len(RowSampler(draw, 4, rank=rank, world_size=world_size)) for rank in range(world_size)] == [
        len(rows) for rows in ranks
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_workers_deliver_the_same_cells(store, world_size):
    draw = WeightedDraw.from_dataset(store, by="cell_type")
    for rank in range(world_size):
        loaders = [
            DataLoader(
                store,
                batch_sampler=make("grouped", draw, rank=rank, world_size=world_size, epoch=1),
                num_workers=n_workers,
                collate_fn=lambda batch: batch.cell_id.tolist(),
            )
            for n_workers in (0, 2)
        ]
        batches = [list(loader) for loader in loaders]
        assert batches[0] == batches[1] == list(make("grouped", draw, rank=rank, world_size=world_size, epoch=1))


@given(
    order=st.sampled_from(["rows", "grouped", "budget", "sources"]),
    weights=WEIGHTS,
    n_draws=st.integers(1, 40),
    epoch=st.integers(0, 2),
    data=st.data(),
)
def test_a_state_at_any_position_gives_the_rest(order, weights, n_draws, epoch, data):
    def sampler(weights):
        made = make(order, WeightedDraw(weights, n_draws))
        return made if order == "budget" else made.sampler

    first = sampler(weights)
    first.set_epoch(epoch)
    drawn = iter(first)
    taken = [next(drawn) for _ in range(data.draw(st.integers(0, len(first))))]
    state = json.loads(json.dumps(first.state_dict()))
    other = sampler(weights)
    other.load_state_dict(state)
    whole = list(first)
    assert taken + list(other) == whole and len(whole) == len(first)
    with pytest.raises(ValueError, match="another sampler: .*weights .* instead of"):
        sampler([*weights[:-1], weights[-1] + 1, 2.0]).load_state_dict(state)


def test_a_state_with_weights_is_not_that_of_a_sampler_without():
    lengths = np.arange(8)
    plain, weighted = LengthGroupedSampler(lengths, 2), LengthGroupedSampler(lengths, 2, draw=WeightedDraw(lengths))
    for one, other in ((plain, weighted), (weighted, plain)):
        with pytest.raises(ValueError, match="another sampler: .*weights"):
            one.load_state_dict(other.state_dict())


@pytest.mark.parametrize("order", ["grouped", "budget", "sources"])
def test_a_draw_of_other_rows_is_refused(order):
    draw = WeightedDraw([1, 1])
    makers = {
        "grouped": lambda: LengthGroupedSampler([1] * 3, 2, draw=draw),
        "budget": lambda: TokenBudgetBatchSampler([1] * 3, 2, draw=draw),
        "sources": lambda: SameSourceSampler(np.zeros(3), 2, draw=draw),
    }
    with pytest.raises(ValueError, match="weights for 2 rows, but there are 3"):
        makers[order]()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(("n_rows", "n_draws", "replacement"), [(300, 300, True), (40, 25, True), (300, 100, False)])
def test_a_token_budget_takes_each_epoch_as_it_is_drawn(packing, n_rows, n_draws, replacement):
    """No draw is rejected because it has many tokens, which would make short cells more frequent."""
    rng = np.random.default_rng(0)
    lengths = np.where(rng.random(n_rows) < 0.1, 90, rng.integers(1, 20, n_rows))
    draw = WeightedDraw(np.where(lengths == 90, 0.3, 1.0), n_draws, replacement)
    sampler = TokenBudgetBatchSampler(lengths, 100, packing=packing, seed=1, draw=draw)
    sizes = set()
    for epoch in range(150):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        sizes.add(len(batches))
        for batch in batches:
            cost = lengths[batch].sum() if packing else len(batch) * lengths[batch].max()
            assert 0 < cost <= 100
        assert sorted(rows_of(batches)) == sorted(draw(np.random.default_rng([1, epoch])).tolist())
    assert sizes == {len(sampler)}


# ---------------------------------------------------------------------- groups


@given(
    groups=st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=40).filter(any),
    temperature=st.sampled_from([0.5, 1, 2, 5.0, np.inf, "inf", None]),
)
def test_groups_are_drawn_in_proportion_to_a_power_of_their_size(groups, temperature):
    weights = group_weights(groups, temperature=temperature)
    sizes = {name: groups.count(name) for name in set(groups) - {None}}
    powers = {name: size ** (1 / float(temperature or np.inf)) for name, size in sizes.items()}
    for name, weight in zip(groups, weights, strict=True):
        expected = 0 if name is None else powers[name] / sum(powers.values()) / sizes[name]
        assert weight == pytest.approx(expected)
    shares = {"a": 2, "b": 1.0, "c": 5}
    weights = group_weights(pd.Categorical(groups), shares={name: shares[name] for name in sizes})
    for name, weight in zip(groups, weights, strict=True):
        total = sum(shares[of] for of in sizes)
        assert weight == pytest.approx(0 if name is None else shares[name] / total / sizes[name])


def test_proportions_that_cannot_be_raise():
    groups = ["a", "a", "b"]
    for temperature in (0, -1, np.nan):
        with pytest.raises(ValueError, match="temperature=.*must be above 0"):
            group_weights(groups, temperature=temperature)
    for shares, message in (
        ({"a": 1}, r"none for b \(1 rows\)"),
        ({"a": 1, "b": 1, "c": 1}, "no row belongs to c; groups are a, b"),
        ({"a": 1, "b": -1}, "at least 0"),
        ({"a": 0, "b": 0}, "not all 0"),
        ({"a": np.inf, "b": 1}, "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            group_weights(groups, shares=shares)
    with pytest.raises(ValueError, match="temperature and shares"):
        group_weights(groups, shares={"a": 1, "b": 1}, temperature=1)
    with pytest.raises(ValueError, match="None of the 2 rows has a group"):
        group_weights([None, np.nan])
    assert group_weights(groups, shares={"a": 1, "b": 0}).tolist() == [0.5, 0.5, 0]


@pytest.fixture
def two_stores(tmp_path):
    """Two stores whose types are in other orders; one cell of the second has no type."""
    stores = []
    for name, n_cells, types in (("first", 30, ["B cell", "T cell"]), ("second", 10, ["T cell", "B cell"])):
        cells = make_adata(n_cells, seed=n_cells)
        cells.obs["cell_type"] = cells.obs["cell_type"].cat.reorder_categories(types)
        cells.obs["quality"] = np.arange(n_cells, dtype=float)
        if name == "second":
            cells.obs.loc[cells.obs_names[4], "cell_type"] = np.nan
        stores.append(CellStore.build(tmp_path / name, cells, obs=["cell_type", "age", "quality"], report=False))
    return stores


def shares_of(draw, groups) -> dict:
    """How often the groups are drawn, exactly."""
    groups = np.array(groups, object)
    return {name: draw.mean((groups == name).astype(float)) for name in dict.fromkeys(groups)}


def test_columns_are_read_by_name_from_every_kind_of_dataset(two_stores, tokenizer, tmp_path, caplog):
    names = np.concatenate([store.obs["cell_type"].astype(object) for store in two_stores])
    names = np.where(pd.isna(names), None, names)
    tokens = [
        store.tokenize(tokenizer, tmp_path / f"{store.path.name}_tokens", obs="cell_type") for store in two_stores
    ]
    rows = np.random.default_rng(0).permutation(40)
    for parts in (two_stores, tokens):
        both = ConcatDataset(parts)
        for dataset, groups in ((both, names), (Subset(both, rows.tolist()), names[rows]), (parts[0], names[:30])):
            with caplog.at_level(logging.WARNING):
                draw = WeightedDraw.from_dataset(dataset, by="cell_type")
            n_without = int(pd.isna(groups).sum())
            told = f"{n_without} of {len(groups)} cells have no 'cell_type': they are never drawn"
            assert (told in caplog.text) == (n_without > 0)
            caplog.clear()
            found = shares_of(draw, groups)
            assert found.pop(None, 0) == 0 and found == {
                "B cell": pytest.approx(0.5),
                "T cell": pytest.approx(0.5),
            }
    ages = WeightedDraw.from_dataset(two_stores[0], by="age", shares=None, temperature=1)
    assert ages.settings() == WeightedDraw(np.ones(30)).settings()  # as they are


def test_parts_and_files_are_mixed_by_shares(two_stores, tmp_path):
    both = ConcatDataset(two_stores)
    parts = np.repeat(["first", "second"], [30, 10])
    shares = {"first": 0.2, "second": 0.8}
    rows = np.random.default_rng(0).permutation(40)
    assert shares_of(WeightedDraw.from_dataset(both, shares=shares), parts) == pytest.approx(shares)
    part = Subset(both, rows.tolist())
    assert shares_of(WeightedDraw.from_dataset(part, shares=shares), parts[rows]) == pytest.approx(shares)
    found = shares_of(WeightedDraw.from_dataset(both, temperature=2), parts)
    assert found["first"] / found["second"] == pytest.approx(3**0.5)
    halves = ConcatDataset([Subset(two_stores[0], range(10)), Subset(two_stores[0], range(10, 30))])
    numbered = WeightedDraw.from_dataset(halves, shares={0: 1, "1": 3})
    assert shares_of(numbered, np.repeat([0, 1], [10, 20])) == pytest.approx({0: 0.25, 1: 0.75})
    joined = CellStore.build(tmp_path / "joined", two_stores, obs=["cell_type"], report=False)
    chosen = joined.select(rows)
    assert shares_of(WeightedDraw.from_dataset(chosen, shares=shares), parts[rows]) == pytest.approx(shares)
    with pytest.raises(ValueError, match="no row belongs to third; groups are first, second"):
        WeightedDraw.from_dataset(joined, shares={**shares, "third": 1})
    shuffled = CellStore.build(tmp_path / "shuffled", two_stores, obs=["cell_type"], shuffle=True, report=False)
    with pytest.raises(ValueError, match="were shuffled .* pass by"):
        WeightedDraw.from_dataset(shuffled, shares=shares)


def test_weights_can_be_a_column_or_none(two_stores):
    store = two_stores[0]
    of_column = WeightedDraw.from_dataset(store, weights="quality", n_draws=7)
    assert of_column.settings() == WeightedDraw(np.arange(30), 7).settings() and len(of_column) == 7
    some = WeightedDraw.from_dataset(store, n_draws=5, replacement=False)
    assert some.settings() == WeightedDraw(np.ones(30), 5, False).settings()
    assert len(WeightedDraw.from_dataset([0] * 4, weights=torch.ones(4))) == 4  # any dataset with a length


def test_data_that_cannot_be_sampled_raise(two_stores):
    store = two_stores[0]
    stream = Dataset.from_dict({"cell_type": ["a"]}).to_iterable_dataset()
    for dataset, arguments, message in (
        (store, {"by": "donor"}, "no column 'donor'; columns are cell_type, age, quality"),
        (Dataset.from_dict({"x": [1]}), {"by": "donor"}, "no column 'donor'; columns are x"),
        (store, {"weights": [1, 2]}, "2 weights for 30 rows"),
        (store, {"weights": "cell_type"}, "30 of 30 are negative, missing or not finite"),
        (store, {"weights": "quality", "by": "age"}, "pass one"),
        (store, {"weights": "quality", "temperature": 1}, "pass one"),
        (stream, {"by": "cell_type"}, "a stream is read in its own order"),
        ([1, 2], {"by": "cell_type"}, "list has no columns"),
        ([1, 2], {"temperature": 2}, "sources of the rows of a list are not known"),
    ):
        with pytest.raises(ValueError, match=message):
            WeightedDraw.from_dataset(dataset, **arguments)


# ---------------------------------------------------------------------- repeats


@given(batches=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), max_size=6))
def test_repeats_are_numbered_in_the_order_of_the_batches(batches):
    numbered = NumberedRepeats(batches, 5)
    assert len(numbered) == len(batches)
    for _ in range(2):  # the next epoch begins anew
        times, expected = [0] * 5, []
        for batch in batches:
            expected.append([])
            for row in batch:
                expected[-1].append(row + 5 * times[row])
                times[row] += 1
        assert list(numbered) == expected


def masks_of(dataset, tokenizer, numbers):
    collator = of_epoch(DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.5))
    return collator(RepeatedRows(dataset, 9).__getitems__(numbers))["labels"]


@pytest.mark.parametrize("kind", ["store", "tokens", "several", "several tokens", "rows"])
def test_a_cell_that_comes_again_is_masked_anew(store, tokenizer, tmp_path, kind):
    tokens = store.tokenize(tokenizer, tmp_path / "tokens")
    dataset = {
        "store": store,
        "tokens": TokenRows(tokens),
        "rows": tokens,
        "several": ConcatDataset([store.select(range(20)), store.select(range(20, 60))]),
        "several tokens": ConcatDataset(
            [TokenRows(tokens.select(range(20))), TokenRows(tokens.select(range(20, 60)))]
        ),
    }[kind]
    again = masks_of(dataset, tokenizer, [7, 7 + 60, 7 + 120, 7])
    assert torch.equal(again[0], again[3])
    assert len({tuple(row.tolist()) for row in again}) == 3
    # The first time a cell comes, it has the masks that it has without sampling.
    plain = of_epoch(DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.5))
    examples = dataset.__getitems__([7, 8]) if hasattr(dataset, "__getitems__") else [dataset[7], dataset[8]]
    assert torch.equal(masks_of(dataset, tokenizer, [7, 8]), plain(examples)["labels"])
    assert torch.equal(masks_of(dataset, tokenizer, [7 + 60, 8])[1], plain(examples)["labels"][1])


def test_a_repeat_has_the_values_of_its_cell(store):
    batch = RepeatedRows(store, 3).__getitems__([2, 62, 5])
    assert batch.cell_id.tolist() == [2, 2 + REPEAT, 5] and len(RepeatedRows(store, 3)) == 3
    plain = store.__getitems__([2, 2, 5])
    assert batch.counts.tolist() == plain.counts.tolist() and batch.obs["age"].tolist() == plain.obs["age"].tolist()
    assert RepeatedRows([{"x": 1}], 3).__getitems__([0, 1]) == [{"x": 1}, {"x": 1}]


def test_a_repeat_is_of_the_file_of_its_cell(two_stores, tmp_path):
    joined = CellStore.build(tmp_path / "joined", two_stores, obs=["cell_type"], report=False)
    batch = RepeatedRows(joined, 3).__getitems__([2, 42, 35])  # 40 cells
    assert batch.cell_id.tolist() == [2, 2 + REPEAT, 35] and sources_of(batch, None).tolist() == [0, 0, 1]
