"""Batches of neighbourhoods: stacked as they are, masks by their definitions, and packed without any."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

from stformer_hf.space.center_mask_sampler import NeighborhoodBatch, NeighborhoodMetadata
from stformer_hf.space.neighborhood_collator import collate, collate_neighborhoods

lengths_of_items = st.lists(st.integers(0, 6), min_size=1, max_size=7)


def make_items(lengths, n_genes=4, seed=0) -> list[NeighborhoodMetadata]:
    rng = np.random.default_rng(seed)
    return [
        NeighborhoodMetadata(
            rng.poisson(1, (n, n_genes)).astype(np.float32),
            rng.poisson(1, (1, n_genes)).astype(np.float32),
            rng.integers(0, 9, n),
            rng.integers(0, 9, 1),
            n,
        )
        for n in lengths
    ]


def as_batch(items, kind) -> NeighborhoodBatch:
    rows = np.concatenate([*(item.observed_expression for item in items), *(item.masked_expression for item in items)])
    return NeighborhoodBatch(
        np.concatenate([[0], np.cumsum([item.num_cells_obs for item in items])]),
        sparse.csr_matrix(rows) if kind == "sparse" else rows,
        np.concatenate([item.observed_cell_type for item in items]),
        np.concatenate([item.masked_cell_type for item in items]),
    )


def same(one: dict, two: dict) -> None:
    assert list(one) == list(two)
    for name in one:
        if isinstance(one[name], torch.Tensor):
            assert one[name].dtype == two[name].dtype
            assert torch.equal(one[name], two[name]), name
        else:
            assert one[name] == two[name]


def check_cells(batch, items) -> None:
    n_cells, n_items, n_genes = sum(len(item.observed_cell_type) for item in items), len(items), 4
    wanted = {
        "observed_expression": ((n_cells, n_genes), torch.float32),
        "masked_expression": ((n_items, n_genes), torch.float32),
        "observed_cell_type": ((n_cells,), torch.int64),
        "masked_cell_type": ((n_items,), torch.int64),
    }
    for name, (shape, dtype) in wanted.items():
        assert batch[name].shape == shape and batch[name].dtype == dtype, name
        plain = [value for item in items for value in np.asarray(getattr(item, name)).tolist()]
        assert batch[name].tolist() == plain
    assert batch["bs"] == n_items and type(batch["bs"]) is int


@given(lengths=lengths_of_items, seed=st.integers(0, 1000))
def test_masks_are_those_of_their_definitions(lengths, seed):
    items = make_items(lengths, seed=seed)
    batch = collate(items)
    assert set(batch) == {
        "observed_expression",
        "masked_expression",
        "observed_cell_type",
        "masked_cell_type",
        "observed_neighboorhood_lens",
        "full_mask",
        "encoder_mask",
        "pooling_mask",
        "decoder_mask",
        "bs",
    }
    check_cells(batch, items)
    assert batch["observed_neighboorhood_lens"] == lengths
    n_cells, n_items = sum(lengths), len(lengths)
    segment = [item for item, n in enumerate(lengths) for _ in range(n)] + 2 * list(range(n_items))
    full = [[one != other for other in segment] for one in segment]
    assert batch["full_mask"].tolist() == full
    assert batch["encoder_mask"].tolist() == [row[: n_cells + n_items] for row in full[: n_cells + n_items]]
    for item in range(n_items):
        row = [segment[cell] != item for cell in range(n_cells)] + [True] * n_items
        assert batch["pooling_mask"][item].tolist() == row
    for i in range(2 * n_items):
        for j in range(2 * n_items):
            assert bool(batch["decoder_mask"][i, j]) == (abs(i - j) != n_items)
    assert {batch[name].dtype for name in batch if name.endswith("mask")} == {torch.bool}


@given(lengths=lengths_of_items)
def test_packed_batches_say_where_items_are(lengths):
    items = make_items(lengths)
    batch = collate_neighborhoods(items, packed=True)
    assert not [name for name in batch if name.endswith("mask")]
    check_cells(batch, items)
    assert batch["cu_seq_lens"].dtype == batch["segment_ids"].dtype == torch.int32
    assert batch["cu_seq_lens"].tolist() == [sum(lengths[:item]) for item in range(len(lengths) + 1)]
    assert batch["segment_ids"].tolist() == [item for item, n in enumerate(lengths) for _ in range(n)]
    assert batch["max_length"] == max(lengths) and type(batch["max_length"]) is int


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["sparse", "dense"])
@pytest.mark.parametrize("lengths", [[3, 0, 2], [0], [0, 0], [5]])
def test_flat_arrays_give_what_items_give(lengths, kind, packed):
    items = make_items(lengths)
    batch = as_batch(items, kind)
    for one, two in zip(batch, items, strict=True):
        for ours, theirs in zip(one, two, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    made = collate_neighborhoods(batch, packed=packed)
    assert next(iter(made)) == "masked_expression"  # Trainer takes the size of a batch from it
    if packed and kind == "sparse":
        made = {"masked_expression": made.pop("masked_expression"), "observed_expression": dense(made), **made}
    same(made, collate_neighborhoods(items, packed=packed))


def dense(batch) -> torch.Tensor:
    """Take the sparse expression out of a batch, and make it dense."""
    indptr, genes, values = (batch.pop(f"observed_{name}") for name in ("indptr", "genes", "values"))
    assert indptr.dtype == genes.dtype == torch.int32 and values.dtype == torch.float32
    rows = sparse.csr_matrix((values, genes, indptr), (len(indptr) - 1, batch.pop("n_genes")))
    return torch.from_numpy(rows.toarray())


def test_a_packed_batch_takes_the_memory_of_the_expressed_genes():
    items = make_items([40, 50], n_genes=1000)
    for item in items:
        item.observed_expression[:, 20:] = 0
    made = collate_neighborhoods(as_batch(items, "sparse"), packed=True)
    taken = sum(value.nbytes for value in made.values() if isinstance(value, torch.Tensor))
    assert taken - made["masked_expression"].nbytes < 90 * 20 * 8 + 4000 < items[0].observed_expression.nbytes


def test_a_lonely_cell_of_another_maker():
    """Where the expression of no cells has the shape (0,)."""
    items = make_items([0, 2])
    other = [items[0]._replace(observed_expression=np.empty(0), observed_cell_type=np.empty(0)), items[1]]
    same(collate(other), collate(items))
    same(collate(other[:1]), collate(items[:1]))


def test_expression_of_one_cell_may_be_flat():
    items = make_items([1, 2])
    same(collate([items[0]._replace(observed_expression=items[0].observed_expression[0]), items[1]]), collate(items))


def test_tensors_and_other_types_are_taken():
    items = make_items([2, 3])
    other = [
        item._replace(
            observed_expression=torch.from_numpy(item.observed_expression).double(),
            masked_expression=item.masked_expression.astype(np.int16),
            observed_cell_type=item.observed_cell_type.tolist(),
        )
        for item in items
    ]
    same(collate(other), collate(items))


def test_one_function_with_two_names():
    assert collate is collate_neighborhoods


def test_memory_of_a_packed_batch_is_linear():
    sizes = []
    for n in (200, 400):
        batch = collate_neighborhoods(make_items([n] * 16, n_genes=1), packed=True)
        sizes.append(sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor)))
    assert sizes[1] < 2.01 * sizes[0]


def test_the_encoder_mask_takes_no_memory():
    batch = collate(make_items([3, 2]))
    assert batch["encoder_mask"].data_ptr() == batch["full_mask"].data_ptr()


def test_items_that_do_not_fit():
    with pytest.raises(ValueError, match="at least one neighbourhood"):
        collate([])
    items = make_items([2, 3])
    for wrong in (
        items[1]._replace(masked_expression=np.zeros((1, 5))),
        items[1]._replace(observed_expression=np.zeros((3, 5))),
        items[1]._replace(observed_cell_type=np.zeros(2, int)),
        items[1]._replace(observed_expression=items[1].observed_expression.T),
        items[1]._replace(observed_expression=items[1].observed_expression.reshape(2, 6)),
        items[1]._replace(observed_expression=items[1].observed_expression.T[:, None]),
        items[1]._replace(num_cells_obs=2),
        items[1]._replace(num_cells_obs=12),
    ):
        with pytest.raises(ValueError, match="Item 1 has [23] cell types.*the first item has 4 genes"):
            collate([items[0], wrong])
    with pytest.raises(ValueError, match="Item 0 has 0 cell types, num_cells_obs=1"):
        collate([make_items([0])[0]._replace(num_cells_obs=1)])
