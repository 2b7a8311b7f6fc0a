"""Collators: rates, what may be swapped, and masks that depend on nothing but seed, epoch and cell."""

import copy
import io
import pickle
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from anndata import AnnData
from conftest import make_adata, of_epoch
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse, stats
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

from stformer_hf import (
    CellStore,
    DataCollatorForCellClassification,
    DataCollatorForPhenotypicMLM,
    GeneTokenizer,
    IterableAnnDataset,
    collate_fn_wrapper,
)
from stformer_hf.batches.token_rows import TokenRows
from stformer_hf.store import worker_slots
from stformer_hf.store.worker_slots import CollatedBatch


def examples_of(tokenizer, cells, **columns) -> list[dict]:
    tokens = tokenizer(cells)
    n = len(tokens["input_ids"])
    return [
        {
            "input_ids": tokens["input_ids"][i],
            "token_type_ids": tokens["token_type_ids"][i],
            "cell_id": i,
            **{name: values[i] for name, values in columns.items()},
        }
        for i in range(n)
    ]


def within(hits: int, trials: int, rate: float) -> bool:
    """Whether a count fits a rate, at a level that one test in ten thousand misses."""
    return stats.binomtest(int(hits), int(trials), rate).pvalue > 1e-4


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """2,600 cells of 200 genes, about 50 of them expressed; a store and its tokenizer."""
    adata = make_adata(2600, 200, seed=1, density=0.5)
    store = CellStore.build(tmp_path_factory.mktemp("many") / "store", adata, obs=["cell_type"])
    return store, GeneTokenizer.from_store(store, phenotypes=["cell_type"], bin_edges=[0.5, 1.5, 3.5])


def test_rates_of_masking_swapping_and_dropping(many):
    store, tokenizer = many
    cells = store.__getitems__(range(len(store)))
    plain = collate_fn_wrapper(tokenizer)(cells)
    batch = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.2, seed=3)(cells)
    labels, types = batch["labels"], batch["token_type_ids"]

    gene = tokenizer.get_gene_tokens_mask(plain["input_ids"])
    labelled = gene & (labels != -100)
    assert gene.sum() > 100_000
    assert within(int(labelled.sum()), int(gene.sum()), 0.2)
    assert (batch["input_ids"][labelled] == tokenizer.mask_token_id).all()
    swapped = labelled & (labels == tokenizer.first_bin_id)
    # Swaps come by cell, nine cells in ten, so their share varies more than a binomial one.
    assert abs(swapped.sum() / labelled.sum() - 1 / tokenizer.n_bins) < 0.02
    cells_with_swap = (swapped.any(1) & (labelled.sum(1) > 15)).sum() / (labelled.sum(1) > 15).sum()
    assert 0.85 < cells_with_swap < 0.92
    kept = labelled & ~swapped
    assert torch.equal(labels[kept], plain["input_ids"][kept])
    assert torch.equal(types[kept], plain["token_type_ids"][kept])

    phenotype = tokenizer.get_phenotypic_tokens_mask(plain["input_ids"])
    masked = phenotype & (labels != -100)
    dropped = phenotype & (batch["input_ids"] == tokenizer.pad_token_id)
    n = int(phenotype.sum())
    assert within(int(masked.sum() + dropped.sum()), n, 0.5)
    assert within(int(dropped.sum()), n, 0.05)
    assert torch.equal(labels[masked], plain["input_ids"][masked])
    assert torch.equal(types[masked], plain["token_type_ids"][masked])
    assert (types[dropped] == 0).all() and (batch["attention_mask"][dropped] == 0).all()

    untouched = ~labelled & ~masked & ~dropped
    assert (labels[untouched] == -100).all()
    assert torch.equal(batch["input_ids"][untouched], plain["input_ids"][untouched])
    assert torch.equal(batch["attention_mask"][~dropped], plain["attention_mask"][~dropped])


@pytest.mark.parametrize("max_length", [2048, 20])
def test_a_swap_never_takes_an_expressed_gene_nor_one_twice(many, max_length):
    store, full = many
    tokenizer = GeneTokenizer(full.genes, bin_edges=full.bin_edges, max_length=max_length)
    collator = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=1.0)
    expressed = store.rows(slice(None)).toarray() >= 0.5
    n_swapped = 0
    for epoch in range(3):
        collator.set_epoch(epoch)
        batch = collator(store.__getitems__(range(len(store))))
        swapped = batch["labels"] == tokenizer.first_bin_id
        rows, columns = swapped.nonzero(as_tuple=True)
        genes = batch["token_type_ids"][rows, columns] - tokenizer.gene_token_type_offset
        assert (genes >= 0).all()
        assert not expressed[rows, genes].any()
        assert len(set(zip(rows.tolist(), genes.tolist(), strict=True))) == len(rows)
        n_swapped += len(rows)
    assert n_swapped > 1000


def test_swapped_genes_are_uniform_over_the_unexpressed(many):
    # One cell, expressing the even genes, many epochs.
    tokenizer = GeneTokenizer([f"g{i}" for i in range(40)])
    store_like = examples_of(tokenizer, np.arange(40)[None] % 2 == 0)
    collator = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.3)
    drawn = np.zeros(40, int)
    for epoch in range(1000):
        collator.set_epoch(epoch)
        batch = collator(store_like)
        types = batch["token_type_ids"][batch["labels"] == tokenizer.first_bin_id]
        drawn += np.bincount(types - 1, minlength=40)
    assert drawn[::2].sum() == 0
    assert drawn.sum() > 1000
    assert stats.chisquare(drawn[1::2]).pvalue > 1e-4


@given(data=st.data(), n_genes=st.integers(1, 12), n_cells=st.integers(1, 6), seed=st.integers(0, 5))
def test_nearly_full_cells_run_out_of_genes_without_taking_expressed_ones(data, n_genes, n_cells, seed):
    expressed = np.array(
        data.draw(
            st.lists(st.lists(st.booleans(), min_size=n_genes, max_size=n_genes), min_size=n_cells, max_size=n_cells)
        )
    )
    tokenizer = GeneTokenizer([f"g{i}" for i in range(n_genes)])
    collator = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=1.0, seed=seed)
    batch = collator(examples_of(tokenizer, expressed))
    rows, columns = (batch["labels"] == tokenizer.first_bin_id).nonzero(as_tuple=True)
    genes = batch["token_type_ids"][rows, columns] - 1
    assert not expressed[rows, genes].any()
    for row in range(n_cells):
        mine = genes[rows == row].tolist()
        assert len(set(mine)) == len(mine) <= (n_genes - expressed[row].sum()) // 2


def test_an_example_of_full_length_swaps_nothing():
    tokenizer = GeneTokenizer([f"g{i}" for i in range(40)], max_length=12)
    collator = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=1.0)
    batch = collator(examples_of(tokenizer, np.ones((20, 40))))
    assert (batch["labels"] != tokenizer.first_bin_id).all()
    assert (batch["labels"] != -100).sum() == 200


def by_cell(collator, store, order, batch_size, n_workers=0) -> dict[int, tuple]:
    """What each cell becomes, without its padding."""
    seen = {}

    def collate(cells):
        batch = collator(cells)
        return cells.cell_id, {name: tensor.numpy() for name, tensor in batch.items()}

    loader = DataLoader(store, batch_size=batch_size, sampler=order, collate_fn=collate, num_workers=n_workers)
    for cell_ids, batch in loader:
        for i, cell in enumerate(cell_ids.tolist()):
            length = int(np.flatnonzero(batch["input_ids"][i] == 1)[0]) + 1
            seen[cell] = tuple(batch[name][i, :length].tolist() for name in sorted(batch))
    return seen


@pytest.mark.parametrize("n_workers", [0, 1, 3])
def test_masks_are_a_function_of_seed_epoch_and_cell(store, tokenizer, n_workers):
    collator = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.4, seed=7)
    collator.set_epoch(2)
    reference = by_cell(collator, store, range(60), 60)
    torch.manual_seed(n_workers)
    np.random.seed(n_workers)
    order = np.random.permutation(60).tolist()
    assert by_cell(collator, store, order, 7, n_workers) == reference
    collator.set_epoch(3)
    assert by_cell(collator, store, range(60), 60) != reference
    other_seed = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.4, seed=8)
    other_seed.set_epoch(2)
    assert by_cell(other_seed, store, range(60), 60) != reference


@pytest.mark.parametrize("n_workers", [0, 2])
def test_without_an_epoch_each_pass_draws_other_masks(store, tokenizer, n_workers):
    """As in loops that do not know set_epoch; set_seed repeats them."""
    collator = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.5, gene_dropout=0.2)
    first, second = (by_cell(collator, store, range(60), 20, n_workers) for _ in range(2))
    assert sum(first[cell] == second[cell] for cell in range(60)) == 1  # the cell without counts
    torch.manual_seed(0)
    assert by_cell(collator, store, range(60), 20, n_workers) == first
    again = collator(store.__getitems__([7, 7, 8]))  # one number for a batch
    assert all(torch.equal(again[name][0], again[name][1]) for name in again)
    evaluating = collator.for_evaluation()
    assert by_cell(evaluating, store, range(60), 20) == by_cell(evaluating, store, range(60), 7, n_workers)
    assert collator.epoch == -1 and evaluating.epoch == 0


def test_random_truncation_changes_with_the_masks(store):
    tokenizer = GeneTokenizer.from_store(store, max_length=8, truncation="random")
    collator = DataCollatorForPhenotypicMLM(tokenizer, mlm=False)
    first, second = (collator(store.__getitems__(range(60)))["token_type_ids"] for _ in range(2))
    assert not torch.equal(first, second)


def test_workers_that_outlive_an_epoch_see_the_next(store, tokenizer):
    collator = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.4)
    loader = DataLoader(store, batch_size=20, collate_fn=collator, num_workers=1, persistent_workers=True)
    for epoch in range(3):
        collator.set_epoch(epoch)
        for batch, start in zip(loader, (0, 20, 40), strict=True):
            assert torch.equal(batch["labels"], collator(store.__getitems__(range(start, start + 20)))["labels"])


@pytest.mark.parametrize("kind", ["padded", "packed", "classes", "plain"])
def test_batches_of_a_worker_come_through_few_slots_of_shared_memory(store, tokenizer, kind):
    tokenizer.included_phenotypes = []
    collator = {
        "padded": lambda: of_epoch(DataCollatorForPhenotypicMLM(tokenizer)),
        "packed": lambda: of_epoch(DataCollatorForPhenotypicMLM(tokenizer, packing=True)),
        "classes": lambda: DataCollatorForCellClassification(tokenizer, label="cell_type"),
        "plain": lambda: collate_fn_wrapper(tokenizer),
    }[kind]()
    expected = [collator(store.__getitems__(range(first, first + 6))) for first in range(0, 60, 6)]
    loader = DataLoader(store, 6, collate_fn=collator, num_workers=1, persistent_workers=True)
    for _ in range(2):
        for batch, of in zip(loader, expected, strict=True):
            assert batch.keys() == of.keys()
            assert all(torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(of[name])) for name in of)
            del batch
    assert copy.copy(of)["input_ids"] is of["input_ids"]  # as pinning memory copies
    worker = loader._iterator._workers[0].pid
    assert 1 <= sum(process == worker for process, _ in worker_slots._received) <= 5  # of 20 batches


class CopyingCollator:
    """A collator of a user, who copies, pickles and saves batches in the worker and adds tensors of other kinds."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, examples):
        batch = pickle.loads(pickle.dumps(copy.deepcopy(self.collator(examples))))
        torch.save(batch, io.BytesIO())
        batch |= {"weight": torch.ones(2, requires_grad=True), "half": torch.ones(2, dtype=torch.bfloat16)}
        batch["sparse"] = torch.eye(2).to_sparse()
        return batch


def test_a_worker_may_copy_and_pickle_its_batches(store, tokenizer):
    collator = CopyingCollator(of_epoch(DataCollatorForPhenotypicMLM(tokenizer)))
    expected = collator(store.__getitems__(range(6)))
    assert type(copy.deepcopy(expected)) is type(expected)
    loader = DataLoader(store, 6, collate_fn=collator, num_workers=1, persistent_workers=True)
    first, *others = loader
    assert first.keys() == expected.keys()
    assert all(torch.equal(*(torch.as_tensor(of[name]).to_dense() for of in (first, expected))) for name in expected)
    worker = loader._iterator._workers[0].pid
    assert {number for process, number in worker_slots._received if process == worker} == set(range(10))  # no other


def test_a_loader_moves_every_batch_once_and_in_order(store, tokenizer, monkeypatch):
    """accelerate calls `CollatedBatch.to`, from the first batch of an epoch on, and where a run resumes."""
    collator = of_epoch(DataCollatorForPhenotypicMLM(tokenizer, packing=True))
    loader, moved, move = DataLoader(store, 7, collate_fn=collator), [], CollatedBatch.to
    expected = list(loader)
    monkeypatch.setattr(
        CollatedBatch, "to", lambda self, *args, **kwargs: moved.append(self) or move(self, *args, **kwargs)
    )
    prepared = prepare_data_loader(loader, torch.device("cpu"), put_on_device=True)
    for skipped, batches in ((0, prepared), (3, skip_first_batches(prepared, 3))):
        moved.clear()
        found = list(batches)
        assert len(found) == len(moved) == len(expected) - skipped
        for batch, other in zip(found, expected[skipped:], strict=True):
            assert type(batch) is CollatedBatch and batch.keys() == other.keys()
            assert all(torch.equal(torch.as_tensor(batch[name]), torch.as_tensor(other[name])) for name in other)


def test_pinned_tensors_are_copied_on_a_stream_that_the_current_one_waits_for(monkeypatch):
    """A GPU is replaced here: the order of the calls is what counts."""
    calls, device = [], torch.device("cuda", 0)
    current = SimpleNamespace(device=device, wait_stream=lambda stream: calls.append(f"wait for {stream}"))
    pinned, plain = torch.ones(2), torch.ones(3)

    @contextmanager
    def on(stream):
        calls.append(f"on {stream}")
        yield
        calls.append("off")

    def to(value, where, non_blocking):
        assert where == device
        calls.append(f"copy {len(value)}" + " without waiting" * non_blocking)
        return value

    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda value: value is pinned)
    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda value, stream: calls.append(f"{len(value)} is in use"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of: current)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(worker_slots, "_stream_to", lambda of: "copies")
    batch = CollatedBatch(pinned=pinned, nested=[plain], number=4)
    assert batch.to("cuda:0") == batch
    copies = ["on copies", "copy 2 without waiting", "off", "wait for copies", "2 is in use"]
    assert calls == ["copy 3", *copies]


@pytest.mark.gpu
def test_copies_do_not_wait_for_what_the_gpu_computes():
    batch = CollatedBatch({"ids": torch.arange(2**20).pin_memory(), "n": 3})
    batch.to("cuda")["ids"].sum().item()  # loads the kernels, which may wait
    torch.cuda._sleep(10**9)  # about half a second
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = batch.to("cuda")
        total = moved["ids"].sum()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    worker_slots._stream_to(moved["ids"].device).synchronize()
    assert not torch.cuda.current_stream().query()  # it still sleeps, and the copy is done
    assert (total.item(), moved["n"]) == (2**19 * (2**20 - 1), 3)


def test_a_tokenized_example_is_masked_as_its_cell_in_the_store(store, adata, tokenizer):
    collator = of_epoch(DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.4))
    from_store = collator(store.__getitems__(range(60)))
    from_examples = collator(examples_of(tokenizer, adata))
    for name, tensor in from_store.items():
        assert torch.equal(tensor, from_examples[name])


def test_examples_without_cell_id_are_masked_the_same_in_any_batch(adata, tokenizer):
    examples = [{k: v for k, v in example.items() if k != "cell_id"} for example in examples_of(tokenizer, adata)]
    collator = of_epoch(DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.4))
    together, alone = collator(examples), collator(examples[4:5])
    length = alone["labels"].shape[1]
    assert torch.equal(together["labels"][4, :length], alone["labels"][0])
    assert not torch.equal(together["labels"][4, :10], together["labels"][5, :10])


def test_without_mlm_nothing_is_masked(store, tokenizer):
    cells = store.__getitems__(range(5))
    batch = DataCollatorForPhenotypicMLM(tokenizer, mlm=False)(cells)
    assert (batch["labels"] == -100).all()
    assert torch.equal(batch["input_ids"], collate_fn_wrapper(tokenizer)(cells)["input_ids"])


def test_cells_without_counts_give_no_labels_and_no_error(tokenizer):
    empty = AnnData(sparse.csr_matrix((2, 40), dtype=np.float32))
    empty.var_names = tokenizer.genes
    batch = DataCollatorForPhenotypicMLM(tokenizer)(examples_of(tokenizer, empty))
    assert batch["input_ids"].tolist() == [[0, 1], [0, 1]]
    assert (batch["labels"] == -100).all()


@pytest.mark.parametrize(
    "make",
    [DataCollatorForPhenotypicMLM, DataCollatorForCellClassification, collate_fn_wrapper],
    ids=lambda of: of.__name__,
)
def test_a_collator_may_be_sent_to_a_spawned_worker(make, store, tokenizer):
    tokenizer.included_phenotypes = []
    settings = {"label": "cell_type"} if make is DataCollatorForCellClassification else {}
    collator = make(tokenizer, **settings)
    if make is DataCollatorForPhenotypicMLM:
        of_epoch(collator)
    again, cells = pickle.loads(pickle.dumps(collator)), store.__getitems__(range(4, 9))
    batch, found = collator(cells), again(cells)
    assert set(batch) == set(found) and all(torch.equal(batch[name], found[name]) for name in batch)
    assert again.tokenizer.fingerprint == tokenizer.fingerprint


def test_padding_to_a_multiple_and_labels_of_tokens_and_cells(tokenizer, adata):
    examples = examples_of(tokenizer, adata[:5])
    lengths = [len(example["input_ids"]) for example in examples]
    for example in examples:
        example["labels"] = list(range(len(example["input_ids"])))
    batch = collate_fn_wrapper(tokenizer, pad_to_multiple_of=16)(examples)
    assert batch["labels"].shape == batch["input_ids"].shape == (5, -(-max(lengths) // 16) * 16)
    for i, length in enumerate(lengths):
        assert batch["labels"][i].tolist() == [*range(length), *[-100] * (batch["labels"].shape[1] - length)]
        assert (batch["input_ids"][i, length:] == tokenizer.pad_token_id).all()
        assert (batch["token_type_ids"][i, length:] == 0).all()
        assert batch["attention_mask"][i].sum() == length
    for i, example in enumerate(examples):
        example["labels"] = i % 2
    assert collate_fn_wrapper(tokenizer)(examples)["labels"].tolist() == [0, 1, 0, 1, 0]
    assert DataCollatorForPhenotypicMLM(tokenizer, pad_to_multiple_of=16)(examples)["labels"].shape[1] % 16 == 0


def test_classification_gives_the_classes(store, adata, tokenizer):
    tokenizer.included_phenotypes = []
    collator = DataCollatorForCellClassification(tokenizer, "cell_type")
    batch = collator(store.__getitems__([4, 2, 9]))
    names = [["B cell", "T cell"][i] for i in batch["labels"]]
    assert names == adata.obs["cell_type"].iloc[[4, 2, 9]].tolist()
    swapped = DataCollatorForCellClassification(tokenizer, "cell_type", label2id={"T cell": 0, "B cell": 1})
    assert swapped(store.__getitems__([4, 2, 9]))["labels"].tolist() == (1 - batch["labels"]).tolist()
    examples = examples_of(tokenizer, adata, labels=[i % 3 for i in range(60)])
    assert DataCollatorForCellClassification(tokenizer)(examples[:4])["labels"].tolist() == [0, 1, 2, 0]


def test_classification_refuses_leaks_and_missing_labels(store, tokenizer):
    with pytest.raises(ValueError, match="would read the answer"):
        DataCollatorForCellClassification(tokenizer, "cell_type")
    tokenizer.included_phenotypes = []
    with pytest.raises(ValueError, match="no obs column 'type'; it has cell_type"):
        DataCollatorForCellClassification(tokenizer, "type")(store.__getitems__([0]))
    collator = DataCollatorForCellClassification(tokenizer, "cell_type", label2id={"B cell": 0})
    with pytest.raises(ValueError, match="have no known 'cell_type'"):
        collator(store.__getitems__(range(10)))


@pytest.mark.parametrize("label", ["degrees", ["degrees", "age"]])
def test_minus_100_is_no_number_to_predict(label, adata, tokenizer):
    """Whatever the trainer and the data: transformers counts labels by it."""
    adata.obs["degrees"] = np.where(np.arange(len(adata)) < 3, -100.0000001, 20.0)  # -100 in float32
    adata.obs["age"] = 1.5
    collator = DataCollatorForCellClassification(tokenizer, label)
    stream = list(IterableAnnDataset(adata, tokenizer, obs=["degrees", "age"]))
    assert collator(stream[5:9])["labels"].ravel()[0] == 20
    with pytest.raises(ValueError, match="'degrees' is -100 for 1 cells"):
        collator(stream[2:5])


@pytest.mark.parametrize("name", ["mlm_probability", "phenotype_mask_prob"])
def test_probabilities_are_checked(tokenizer, name):
    with pytest.raises(ValueError, match=f"{name} must be a probability, got 15"):
        DataCollatorForPhenotypicMLM(tokenizer, **{name: 15})


def test_gene_dropout_leaves_out_its_share_anew_each_epoch_and_never_swaps_it_in(many):
    store, full = many
    tokenizer = GeneTokenizer(full.genes, bin_edges=full.bin_edges)
    cells = store.__getitems__(range(len(store)))
    expressed = store.rows(slice(None)).toarray() >= 0.5
    collator = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.5, gene_dropout=0.3)
    kept = []
    for epoch in range(2):
        collator.set_epoch(epoch)
        batch = collator(cells)
        assert (batch["input_ids"][:, 0] == tokenizer.cls_token_id).all()
        assert ((batch["input_ids"] == tokenizer.eos_token_id).sum(1) == 1).all()
        rows, columns = (batch["token_type_ids"] > 0).nonzero(as_tuple=True)
        genes = batch["token_type_ids"][rows, columns] - 1
        swapped = batch["labels"][rows, columns] == tokenizer.first_bin_id
        assert expressed[rows, genes].tolist() == (~swapped).tolist()
        assert within(len(rows), int(expressed.sum()), 0.7)
        kept.append(set(zip(rows.tolist(), genes.tolist(), strict=True)))
    assert len(kept[0] & kept[1]) < 0.8 * len(kept[0])
    evaluation = collator.for_evaluation()
    assert (evaluation(cells)["attention_mask"].sum(1) == torch.from_numpy(expressed.sum(1) + 2)).all()
    assert (evaluation.epoch, collator.epoch) == (0, 1)


def test_gene_dropout_for_classification(store, tokenizer):
    tokenizer.included_phenotypes = []
    cells = store.__getitems__(range(60))
    whole = DataCollatorForCellClassification(tokenizer, "cell_type")(cells)
    less = DataCollatorForCellClassification(tokenizer, "cell_type", gene_dropout=0.5)(cells)
    assert torch.equal(whole["labels"], less["labels"])
    assert 0.4 < (less["attention_mask"].sum() - 120) / (whole["attention_mask"].sum() - 120) < 0.6


def test_genes_that_a_store_has_not_measured_are_never_labelled_as_not_expressed(tmp_path):
    adata = make_adata(400, 40, seed=2)
    store = CellStore.build(tmp_path / "store", adata[:, 10:30].copy(), obs=["cell_type"])
    tokenizer = GeneTokenizer(adata.var_names, bin_edges=[0.5, 1.5])
    batch = DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.5)(store.__getitems__(range(400)))
    swapped = batch["labels"] == tokenizer.first_bin_id
    genes = batch["token_type_ids"][swapped] - tokenizer.gene_token_type_offset
    assert len(genes) > 200
    assert sorted(genes.unique().tolist()) == list(range(10, 30))
    counts = adata.X.toarray()
    for row, gene in zip(np.nonzero(swapped.numpy())[0], genes.tolist(), strict=True):
        assert counts[row, gene] == 0


def test_labels_of_tokenized_datasets(store, tokenizer, tmp_path):
    other = {"T cell": 0, "B cell": 1}
    bare = GeneTokenizer.from_store(store, bin_edges=[0.5])
    dataset = TokenRows(bare.tokenize_store(store, tmp_path / "bare", obs=["cell_type", "age"]))
    rows = [5, 2, 9, 11]
    expected = DataCollatorForCellClassification(bare, "cell_type", other)(store.__getitems__(rows))
    found = DataCollatorForCellClassification(bare, "cell_type", other)(dataset.__getitems__(rows))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {
        name: tensor.tolist() for name, tensor in expected.items()
    }
    assert expected["labels"].tolist() == [other[name] for name in store.obs["cell_type"].iloc[rows]]
    ages = DataCollatorForCellClassification(bare, "age")(store.__getitems__(rows))["labels"]
    assert ages.dtype == torch.float32 and ages.tolist() == store.obs["age"].iloc[rows].tolist()
    several = DataCollatorForCellClassification(bare, ["age"])(store.__getitems__(rows))["labels"]
    assert several.shape == (4, 1) and several[:, 0].tolist() == ages.tolist()
    # Tokens that were made with the label in them.
    told = TokenRows(tokenizer.tokenize_store(store, tmp_path / "told", obs=["cell_type"]))
    tokenizer.included_phenotypes = []
    with pytest.raises(ValueError, match="would read the answer: tokenize them without it"):
        DataCollatorForCellClassification(tokenizer, "cell_type")(told.__getitems__(rows))
    with pytest.raises(ValueError, match="1 cells of the batch have no token"):
        DataCollatorForCellClassification(bare, "y")([{"input_ids": [], "token_type_ids": [], "y": 1}])
    with pytest.raises(ValueError, match="integers are classes"):
        DataCollatorForCellClassification(bare, "y")([{"input_ids": [0], "token_type_ids": [0], "y": -2}])


def test_values_are_for_our_collators(store):
    tokenizer = GeneTokenizer.from_store(store, bin_edges=[0.5], values=True)
    tokens = tokenizer(store.rows(range(4)))
    examples = [dict(zip(tokens, one, strict=True)) for one in zip(*tokens.values(), strict=True)]
    with pytest.raises(ValueError, match="use DataCollatorForPhenotypicMLM"):
        DataCollatorForLanguageModeling(tokenizer)(examples)
    assert "expression_values" in collate_fn_wrapper(tokenizer)(examples)
    without = [{name: example[name] for name in ("input_ids", "token_type_ids")} for example in examples]
    for packing in (False, True):
        with pytest.raises(ValueError, match="the tokens have no expression_values"):
            collate_fn_wrapper(tokenizer, packing=packing)(without)
    with pytest.raises(ValueError, match="must be integers, got float64"):
        collate_fn_wrapper(tokenizer)([{"input_ids": [0], "token_type_ids": [0], "labels": [0.7]}])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_collator_that_draws_nothing_leaves_the_generator_of_torch(store, dropout):
    tokenizer = GeneTokenizer.from_store(store, bin_edges=[0.5])
    collator = DataCollatorForCellClassification(tokenizer, "cell_type", gene_dropout=dropout)
    before = torch.get_rng_state()
    collator(store.__getitems__(range(4)))
    assert torch.equal(torch.get_rng_state(), before) == (dropout == 0)
