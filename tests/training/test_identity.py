"""Whatever two parts mean is compared where they meet: every pair fits, or is refused."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from conftest import make_adata
from scipy import sparse
from torch.utils.data import ConcatDataset, Subset
from transformers import TrainingArguments

from stformer_hf import (
    CellNeighborhoodConfig,
    CellNeighborhoodForMaskedCell,
    CellStore,
    CellTrainer,
    CenterMaskSampler,
    DataCollatorForCellClassification,
    DataCollatorForPhenotypicMLM,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    IterableAnnDataset,
    NeighborhoodTrainer,
    STFormerPretrainer,
    collate_fn_wrapper,
    embed,
    embed_neighborhoods,
)
from stformer_hf.sources.obs_columns import ClassCode


def arguments(folder, **settings) -> TrainingArguments:
    return TrainingArguments(
        str(folder), **{"max_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True, **settings}
    )


# ---------------------------------------------------------------------- genes, bins, phenotypes

GENES = [f"ENSG{i:011d}" for i in range(20)]
TOKENIZERS = {
    "same": {},
    "same genes, other seed, length and truncation": {"seed": 3, "max_length": 9, "truncation": "random"},
    "other order": {"genes": GENES[::-1]},
    "another gene": {"genes": [*GENES[:-1], "ENSG00000000099"]},
    "other edges": {"bin_edges": [0.5, 3.5]},
    "more edges": {"bin_edges": [0.5, 1.5, 3.5]},
    "normalised": {"normalize": "log1p_cp10k"},
    "other values": {"phenotypes": {"type": ["A", "C"]}},
    "other order of values": {"phenotypes": {"type": ["B", "A"]}},
    "other phenotype": {"phenotypes": {"kind": ["A", "B"]}},
    "whole cells": {"whole_cell": True},
}
FIT = {"same", "same genes, other seed, length and truncation"}


def make_tokenizer(name: str = "same") -> GeneTokenizer:
    settings = {"genes": GENES, "bin_edges": [0.5, 1.5], "phenotypes": {"type": ["A", "B"]}, **TOKENIZERS[name]}
    return GeneTokenizer(settings.pop("genes"), included_phenotypes=[], **settings)


@pytest.fixture
def cells() -> AnnData:
    adata = make_adata(24, 20)[4:].copy()
    adata.obs["type"] = pd.Categorical(np.resize(["A", "B"], 20))
    return adata


@pytest.fixture
def cell_store(cells, tmp_path) -> CellStore:
    return CellStore.build(tmp_path / "cells", cells, obs=["type"], report=False)


def meet(pair: str, one: str, other: str, cells: AnnData, store: CellStore, folder) -> None:
    """Bring two tokenizers, one of each part of the pair, together."""
    first, second = make_tokenizer(one), make_tokenizer(other)
    torch.manual_seed(0)
    model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(first, size="tiny", num_hidden_layers=1))
    settings = {"model": model, "args": arguments(folder)}
    collator = DataCollatorForPhenotypicMLM(first)
    if pair == "model, tokenizer":
        embed(cells.copy(), model, tokenizer=second)
    elif pair == "model, processing_class":
        STFormerPretrainer(train_dataset=store, processing_class=second, **settings)
    elif pair == "model, collator":
        CellTrainer(train_dataset=store, data_collator=DataCollatorForPhenotypicMLM(second), **settings)
    elif pair == "processing_class, collator":
        # Of a model that does not know its vocabulary's fingerprint.
        model.config.vocabulary_fingerprint = None
        CellTrainer(
            train_dataset=store,
            data_collator=DataCollatorForPhenotypicMLM(second),
            processing_class=first,
            **settings,
        )
    elif pair == "processing_class, collate function":
        model.config.vocabulary_fingerprint = None
        CellTrainer(train_dataset=store, data_collator=collate_fn_wrapper(second), processing_class=first, **settings)
    elif pair == "model, new model of a trial":
        trainer = STFormerPretrainer(train_dataset=store, processing_class=first, **settings)
        trainer.model_init = lambda: GeneBertForPhenotypicMLM(
            GeneBertConfig.from_tokenizer(second, size="tiny", num_hidden_layers=1)
        )
        trainer.call_model_init()
    elif pair == "collator, stream":
        stream = IterableAnnDataset(cells, second)
        CellTrainer(train_dataset=stream, data_collator=collator, **settings)
    elif pair == "collator, evaluation set":
        rows = second.tokenize_store(store, folder / "tokens")
        CellTrainer(train_dataset=store, eval_dataset={"held out": rows}, data_collator=collator, **settings)
    elif pair == "collator, data given to evaluate":
        rows = second.tokenize_store(store, folder / "tokens")
        CellTrainer(train_dataset=store, data_collator=collator, **settings).evaluate(rows)
    else:
        rows = second.tokenize_store(store, folder / "tokens")
        rows = {
            "collator, tokenized dataset": rows,
            "collator, rows of it": rows.select([3, 1]).shuffle(seed=0),
            "collator, part of it": ConcatDataset([Subset(rows, [1, 2]), Subset(Subset(rows, [3, 4]), [0])]),
        }[pair]
        CellTrainer(train_dataset=rows, data_collator=collator, **settings)


@pytest.mark.parametrize(
    "pair",
    [
        "model, tokenizer",
        "model, processing_class",
        "model, collator",
        "processing_class, collator",
        "processing_class, collate function",
        "model, new model of a trial",
        "collator, stream",
        "collator, evaluation set",
        "collator, data given to evaluate",
        "collator, tokenized dataset",
        "collator, rows of it",
        "collator, part of it",
    ],
)
def test_every_pair_of_vocabularies_is_the_same_or_refused(pair, cells, cell_store, tmp_path):
    for number, other in enumerate(TOKENIZERS):
        folder = tmp_path / str(number)
        folder.mkdir()
        if other in FIT:
            meet(pair, "same", other, cells, cell_store, folder)
        else:
            with pytest.raises(ValueError, match=r"does not fit the model|another tokenizer|differs from|whole"):
                meet(pair, "same", other, cells, cell_store, folder)


def test_medians_are_a_part_of_the_vocabulary(tmp_path):
    one, other = (
        GeneTokenizer(GENES, scheme="rank", medians=dict.fromkeys(GENES, 1.0) | {GENES[0]: first})
        for first in (1.0, 2.0)
    )
    model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(one, size="tiny"))
    with pytest.raises(ValueError, match="does not fit the model"):
        embed(make_adata(5, 20), model, tokenizer=other)


# ---------------------------------------------------------------------- classes


def classes_in_order(cells: AnnData, order: list[str]) -> AnnData:
    cells = cells.copy()
    cells.obs["type"] = cells.obs["type"].cat.reorder_categories(order)
    return cells


def labels_that_train(model, dataset, label="type", collator=None, **kwargs) -> torch.Tensor:
    """Labels of all batches of the first pass over the data, in the order of the data."""
    tokenizer = make_tokenizer()
    collator = collator or DataCollatorForCellClassification(tokenizer, label)
    trainer = CellTrainer(
        model=model,
        args=kwargs.pop("args"),
        train_dataset=kwargs.pop("train_dataset", dataset),
        data_collator=collator,
        **kwargs,
    )
    return torch.cat([batch["labels"] for batch in trainer.get_eval_dataloader(dataset)])


def classifier(names=None, **fields) -> GeneBertForClassification:
    torch.manual_seed(0)
    if names is not None:
        fields |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return GeneBertForClassification(
        GeneBertConfig.from_tokenizer(make_tokenizer(), size="tiny", num_hidden_layers=1, **fields)
    )


def every_kind(cells: AnnData, order: list[str], folder) -> dict:
    """The same cells as every kind of dataset, their classes numbered in an order."""
    cells = classes_in_order(cells, order)
    store = CellStore.build(folder / "store", cells, obs=["type"], report=False)
    rows = make_tokenizer().tokenize_store(store, folder / "rows", obs=["type"])
    all_rows = list(range(len(store)))
    return {
        "store": store,
        "selection": Subset(store, all_rows),
        "rows": rows,
        "subset of rows": Subset(rows, all_rows),
        "two parts": ConcatDataset([rows.select(all_rows[:7]), Subset(rows, all_rows[7:])]),
        "stream": IterableAnnDataset(cells, make_tokenizer(), obs="type"),
    }


@pytest.mark.parametrize("order", [["A", "B"], ["B", "A"]])
def test_a_class_has_the_models_number_whatever_the_dataset_calls_it(cells, tmp_path, order):
    expected = [{"A": 1, "B": 0}[name] for name in cells.obs["type"]]
    for name, dataset in every_kind(cells, order, tmp_path).items():
        model = classifier(["B", "A"])
        found = labels_that_train(model, dataset, args=arguments(tmp_path / "run"))
        assert found.tolist() == expected, name
        assert model.config.id2label == {0: "B", 1: "A"}


def test_a_model_without_names_learns_those_of_the_training_cells(cells, tmp_path):
    kinds = every_kind(cells, ["B", "A"], tmp_path)
    held_out = CellStore.build(tmp_path / "other", classes_in_order(cells, ["A", "B"]), obs=["type"], report=False)
    for name in ("store", "subset of rows", "two parts", "stream"):
        model = classifier()
        found = labels_that_train(
            model, held_out, train_dataset=kinds[name], args=arguments(tmp_path / "run"), processing_class=None
        )
        assert model.config.id2label == {0: "B", 1: "A"} and model.config.label2id == {"B": 0, "A": 1}
        assert found.tolist() == [{"A": 1, "B": 0}[of] for of in cells.obs["type"]], name


def test_a_head_with_room_numbers_classes_by_name(cells, tmp_path):
    """Also those of another set of cells, which numbers them in another order."""
    kinds = [every_kind(cells, order, tmp_path / order[0]) for order in (["B", "A"], ["A", "B"])]
    model = classifier(num_labels=4)
    found = labels_that_train(model, kinds[1]["store"], train_dataset=kinds[0]["store"], args=arguments(tmp_path))
    assert found.tolist() == [{"A": 1, "B": 0}[of] for of in cells.obs["type"]]
    assert model.config.id2label == {0: "B", 1: "A", 2: "LABEL_2", 3: "LABEL_3"}
    labels_that_train(model, kinds[1]["store"], args=arguments(tmp_path))  # trained on: its names stay
    assert model.config.label2id["B"] == 0


@pytest.mark.parametrize(
    "names",
    [
        {"id2label": {0: "B", 1: "A"}},
        {"label2id": {"B": 0, "A": 1}},
        {"id2label": {0: "LABEL_1", 1: "LABEL_0"}},  # real names, though they look like the default ones
    ],
)
def test_names_in_one_direction_are_names(cells, tmp_path, names):
    model = classifier(num_labels=2)
    for field, value in names.items():
        setattr(model.config, field, value)
    expected = {"A": 1, "B": 0}
    if "LABEL_1" in names.get("id2label", {}).values():
        cells.obs["type"] = cells.obs["type"].cat.rename_categories({"A": "LABEL_0", "B": "LABEL_1"})
        expected = {"LABEL_0": 1, "LABEL_1": 0}
    store = CellStore.build(tmp_path / "named", cells, obs=["type"], report=False)
    found = labels_that_train(model, store, args=arguments(tmp_path))
    assert found.tolist() == [expected[of] for of in cells.obs["type"]]
    assert model.config.label2id == expected and {i: n for n, i in expected.items()} == model.config.id2label


def test_columns_of_numbers_are_compared_with_the_names_of_the_outputs(cells, tmp_path):
    cells.obs["a"], cells.obs["b"] = np.resize([0, 1, 1], 20), np.resize([1, 0], 20)
    store = CellStore.build(tmp_path / "s", cells, obs=["a", "b"], report=False)

    def trains(label, names, label2id=None, **settings):
        collator = DataCollatorForCellClassification(make_tokenizer(), label, label2id=label2id)
        model = classifier(names, **settings)
        return model, labels_that_train(model, store, collator=collator, args=arguments(tmp_path / "run"))

    several = {"problem_type": "multi_label_classification"}
    model, found = trains(["b", "a"], None, {"a": 0, "b": 1}, num_labels=2, **several)
    assert model.config.id2label == {0: "a", 1: "b"} and found.tolist() == cells.obs[["a", "b"]].to_numpy().tolist()
    with pytest.raises(ValueError, match="label2id is 0 'a', 1 'b', but the model's is 0 'b', 1 'a'"):
        trains(["b", "a"], ["b", "a"], {"a": 0, "b": 1}, **several)
    number = {"problem_type": "regression"}
    with pytest.raises(ValueError, match="labels are the columns 'a', but the model's are 'age'"):
        trains("a", ["age"], **number)
    model, found = trains("a", ["age"], {"a": 0}, **number)
    assert model.config.id2label == {0: "age"} and found.tolist() == cells.obs["a"].tolist()


def test_a_collator_that_numbers_classes_otherwise_is_refused(cell_store, tmp_path):
    tokenizer = make_tokenizer()
    for label2id, fits in (({"A": 0, "B": 1}, True), ({"A": 1, "B": 0}, False), ({"A": 0, "C": 1}, False)):
        collator = DataCollatorForCellClassification(tokenizer, "type", label2id=label2id)
        settings = {"args": arguments(tmp_path), "train_dataset": cell_store, "data_collator": collator}
        if fits:
            CellTrainer(model=classifier(["A", "B"]), **settings)
        else:
            with pytest.raises(ValueError, match="label2id is .* but the model's is 0 'A', 1 'B'"):
                CellTrainer(model=classifier(["A", "B"]), **settings)
    collator = DataCollatorForCellClassification(tokenizer, "type")
    CellTrainer(model=classifier(["B", "A"]), args=arguments(tmp_path), data_collator=collator)
    assert collator.label2id is None  # the caller's own: it may meet another model


def test_a_model_in_data_parallel_is_checked_as_the_model_inside(cell_store, tmp_path):
    settings = {"args": arguments(tmp_path), "train_dataset": cell_store}
    model = torch.nn.DataParallel(classifier(["B", "A"]))
    collator = DataCollatorForCellClassification(make_tokenizer(), "type")
    trainer = CellTrainer(model=model, data_collator=collator, **settings)
    assert trainer.data_collator.label2id == {"B": 0, "A": 1}
    with pytest.raises(ValueError, match="does not fit the model"):
        CellTrainer(model=model, data_collator=collator, processing_class=make_tokenizer("other order"), **settings)


def test_several_labels_are_in_the_models_order(cells, tmp_path):
    cells.obs["b"] = np.resize([0, 1, 1], 20)
    cells.obs["a"] = np.resize([1, 0], 20)
    cells.obs["named"] = pd.Categorical(np.resize(["no", "yes"], 20))
    cells.obs["truth"] = pd.Categorical(np.resize(["1", "0"], 20), categories=["1", "0"])
    store = CellStore.build(tmp_path / "s", cells, obs=["a", "b", "named", "truth"], report=False)
    settings = {"problem_type": "multi_label_classification"}
    found = labels_that_train(classifier(["a", "b"], **settings), store, ["b", "a"], args=arguments(tmp_path))
    assert found.tolist() == cells.obs[["a", "b"]].to_numpy().tolist()
    model = classifier(num_labels=2, **settings)
    found = labels_that_train(model, store, ["b", "a"], args=arguments(tmp_path))
    assert model.config.id2label == {0: "b", 1: "a"} and found.tolist() == cells.obs[["b", "a"]].to_numpy().tolist()
    with pytest.raises(ValueError, match="columns 'b', 'a', but the model's are 'x', 'y'"):
        labels_that_train(classifier(["x", "y"], **settings), store, ["b", "a"], args=arguments(tmp_path))
    collator = DataCollatorForCellClassification(make_tokenizer(), ["b", "a"], label2id={"a": 0, "b": 1})
    found = labels_that_train(classifier(["x", "y"], **settings), store, collator=collator, args=arguments(tmp_path))
    assert found.tolist() == cells.obs[["a", "b"]].to_numpy().tolist()
    # Categories are what they are called, not the code that their order gives them.
    found = DataCollatorForCellClassification(make_tokenizer(), ["truth", "a"])(store.__getitems__(range(20)))
    assert found["labels"][:, 0].tolist() == found["labels"][:, 1].tolist() == cells.obs["a"].tolist()
    with pytest.raises(ValueError, match="'named' has the categories 'no', 'yes': with several labels"):
        DataCollatorForCellClassification(make_tokenizer(), ["named", "a"])(store.__getitems__(range(20)))
    with pytest.raises(ValueError, match="map each column to its index, 0 to 1"):
        DataCollatorForCellClassification(make_tokenizer(), ["b", "a"], label2id={"a": 0, "b": 2})(
            store.__getitems__([0])
        )


def test_a_batch_of_two_streams_goes_by_the_names(cells):
    one, other = (
        list(IterableAnnDataset(classes_in_order(cells, order), make_tokenizer(), obs="type"))
        for order in (["A", "B"], ["B", "A"])
    )
    mixed = [*one[:5], *other[5:]]
    collator = DataCollatorForCellClassification(make_tokenizer(), "type", label2id={"A": 0, "B": 1})
    expected = [{"A": 0, "B": 1}[name] for name in cells.obs["type"]]
    assert collator(mixed)["labels"].tolist() == expected
    with pytest.raises(ValueError, match="different codes for the classes of 'type'"):
        DataCollatorForCellClassification(make_tokenizer(), "type")(mixed)
    assert DataCollatorForCellClassification(make_tokenizer(), "type")(one)["labels"].tolist() == expected


def test_a_code_is_a_number_that_knows_its_name():
    names = ["A", "B"]
    code = copy.deepcopy(ClassCode(1, names))
    assert code == 1 and code.name == "B" and ClassCode(-1, names).name is None
    assert np.array([code, code]).dtype == np.int64 and torch.tensor([code]).tolist() == [1]


# ---------------------------------------------------------------------- neighbourhoods


@pytest.fixture
def tissue() -> AnnData:
    adata = make_adata(40, 12, seed=1)
    adata.obs["type"] = pd.Categorical(np.resize(["T0", "T1", "T2"], 40))
    adata.obs["part"] = np.repeat(["s1", "s2"], 20)
    adata.obsm["spatial"] = np.random.default_rng(0).uniform(0, 10, (40, 2))
    return adata


def sample(adata: AnnData, **options) -> CenterMaskSampler:
    settings = {"patch_size": 4.0, "cell_type_key": "type", "section_key": "part", **options}
    return CenterMaskSampler.from_anndata(adata, settings.pop("patch_size"), **settings)


def neighborhood_model(**fields) -> CellNeighborhoodForMaskedCell:
    torch.manual_seed(0)
    return CellNeighborhoodForMaskedCell(
        CellNeighborhoodConfig.from_size("tiny", n_genes=12, n_cell_types=3, encoder_layers=1, **fields)
    )


def test_a_trained_model_knows_what_its_sampler_knows(tissue, tmp_path):
    model = neighborhood_model()
    NeighborhoodTrainer(arguments(tmp_path), sample(tissue, max_num_cells=5), model=model)
    assert model.config.gene_ids == tissue.var_names.tolist() and model.config.cell_types == ["T0", "T1", "T2"]
    assert model.config.neighborhood == {"patch_size": 4.0, "shape": "box", "max_num_cells": 5}
    assert model.config.section_key == "part"
    model.save_pretrained(tmp_path / "m")
    reversed_columns, reordered = tissue[:, ::-1].copy(), tissue.copy()
    reordered.obs["type"] = reordered.obs["type"].cat.reorder_categories(["T2", "T0", "T1"])
    for adata in (tissue, reversed_columns, reordered):
        embed_neighborhoods(adata, str(tmp_path / "m"), cell_type_key="type")
    for adata in (reversed_columns, reordered):
        np.testing.assert_allclose(adata.obsm["X_neighborhood"], tissue.obsm["X_neighborhood"], atol=1e-5)
    assert tissue.uns["stformer_neighborhood"]["section_key"] == "part"


def test_types_are_compared_in_a_model_with_room_for_more(tissue, tmp_path):
    two = other_types(tissue, ["T0", "T1"])
    model = neighborhood_model()
    NeighborhoodTrainer(arguments(tmp_path), sample(two), model=model)
    assert model.config.cell_types == ["T0", "T1"] and model.config.n_cell_types == 3
    model.save_pretrained(tmp_path / "m")
    embed_neighborhoods(two, str(tmp_path / "m"), cell_type_key="type")
    with pytest.raises(ValueError, match="eval_dataset numbers the cell types 'T1', 'T0', but the model 'T0', 'T1'"):
        NeighborhoodTrainer(
            arguments(tmp_path), sample(two), model=model, eval_dataset=sample(other_types(tissue, ["T1", "T0"]))
        )


def test_counts_do_not_reach_a_model_of_their_logarithms(tissue, tmp_path):
    with pytest.raises(ValueError, match="train_dataset returns counts .*apply_log1p=False"):
        NeighborhoodTrainer(arguments(tmp_path), sample(tissue), model=neighborhood_model(apply_log1p=False))


def test_row_numbers_are_no_genes(tissue, tmp_path):
    tissue.var_names = [str(i) for i in range(12)]
    model = neighborhood_model()
    NeighborhoodTrainer(arguments(tmp_path), sample(tissue), model=model)
    assert model.config.gene_ids is None and model.config.cell_types == ["T0", "T1", "T2"]


def other_types(adata: AnnData, categories: list[str]) -> AnnData:
    adata = adata[adata.obs["type"].isin(categories)].copy()
    adata.obs["type"] = adata.obs["type"].cat.remove_unused_categories().cat.set_categories(categories)
    return adata


SAMPLERS = {
    "the same": (True, lambda adata: sample(adata)),
    "other cells": (True, lambda adata: sample(adata[5:].copy(), indices=[3, 4], seed=7, neighbors_from="indices")),
    "the first types": (True, lambda adata: sample(other_types(adata, ["T0", "T1"]))),
    "the last types": (False, lambda adata: sample(other_types(adata, ["T1", "T2"]))),
    "types in another order": (False, lambda adata: sample(other_types(adata, ["T2", "T0", "T1"]))),
    "genes in another order": (False, lambda adata: sample(adata[:, ::-1].copy())),
    "fewer genes": (False, lambda adata: sample(adata[:, :-1].copy())),
    "a smaller box": (False, lambda adata: sample(adata, patch_size=3.0)),
    "a disc": (False, lambda adata: sample(adata, shape="disc")),
    "the nearest": (False, lambda adata: sample(adata, k_nearest=3)),
    "a few": (False, lambda adata: sample(adata, max_num_cells=3)),
    "logarithms": (False, lambda adata: sample(adata, normalize="log1p")),
}


@pytest.mark.parametrize("place", ["train", "eval", "eval by name", "given to evaluate", "a trained model"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_is_the_models_or_refused(tissue, tmp_path, name, place):
    fits, make = SAMPLERS[name]
    model, own, other = neighborhood_model(), sample(tissue), make(tissue)

    def bring_together():
        if place == "train":  # a model that has learnt already
            NeighborhoodTrainer(arguments(tmp_path), own, model=model)
            NeighborhoodTrainer(arguments(tmp_path), other, model=model)
        elif place == "eval":
            NeighborhoodTrainer(arguments(tmp_path), own, model=model, eval_dataset=other)
        elif place == "eval by name":
            NeighborhoodTrainer(arguments(tmp_path), own, model=model, eval_dataset={"one": own, "two": other})
        elif place == "given to evaluate":
            NeighborhoodTrainer(arguments(tmp_path), own, model=model).evaluate(other)
        else:
            NeighborhoodTrainer(arguments(tmp_path), own, model=model)
            NeighborhoodTrainer(arguments(tmp_path), model=model, eval_dataset=other)

    if fits:
        bring_together()
    else:
        with pytest.raises(ValueError, match="_dataset (has|returns|numbers)"):
            bring_together()


def test_cells_without_the_sections_of_the_model_are_told(tissue, tmp_path, caplog):
    """Also where the column has no usual name; the sections of a metadata table have no column of obs."""
    model = neighborhood_model()
    NeighborhoodTrainer(arguments(tmp_path), sample(tissue), model=model, eval_dataset=sample(tissue[:20].copy()))
    x, y = tissue.obsm["spatial"].T
    table = tissue.obs.assign(cell=tissue.obs_names, x=x, y=y, code=0)
    columns = {"cell_id_colname": "cell", "cell_type_colname": "code", "tissue_section_colname": "part"}
    trainer = NeighborhoodTrainer(arguments(tmp_path), CenterMaskSampler(table, tissue, 4.0, **columns), model=model)
    assert "section" not in caplog.text
    trainer.evaluate(sample(tissue, section_key=None))
    assert "trained with the sections of obs['part'], and eval_dataset was made without sections" in caplog.text


def test_sections_that_were_not_named_are_told(tissue, caplog):
    tissue.obs["Slide"] = tissue.obs["part"]
    CenterMaskSampler.from_anndata(tissue, 4.0)
    assert "obs['Slide'] has 2 values, but all cells are treated as one section" in caplog.text
    caplog.clear()
    CenterMaskSampler.from_anndata(tissue, 4.0, section_key="part")
    tissue.obs["Slide"] = "one"
    CenterMaskSampler.from_anndata(tissue, 4.0)
    assert caplog.text == ""


def test_expression_is_that_of_the_columns_it_is_named_by(tissue):
    """The ids of `var` come before symbols in its index, as for every other door."""
    tissue.var["gene_ids"], tissue.var_names = tissue.var_names, [f"SYM{i}" for i in range(12)]
    assert sample(tissue).gene_ids == tissue.var["gene_ids"].tolist()
    assert sparse.issparse(tissue.X)
