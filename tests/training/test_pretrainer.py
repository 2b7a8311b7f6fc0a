"""STFormerPretrainer: what it trains on, what it masks, what it refuses."""

import numpy as np
import pytest
import torch
from conftest import of_epoch
from datasets import Dataset
from torch.utils.data import Subset
from transformers import TrainerCallback, TrainingArguments

from stformer_hf import (
    CellStore,
    CellTrainer,
    DataCollatorForCellClassification,
    DataCollatorForGeneRankMLM,
    DataCollatorForPhenotypicMLM,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    STFormerPretrainer,
)
from stformer_hf.evaluation.metrics import balanced_class_weights


def arguments(folder, **changes) -> TrainingArguments:
    settings = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**settings, **changes})


def new_model(config) -> GeneBertForPhenotypicMLM:
    torch.manual_seed(0)
    return GeneBertForPhenotypicMLM(config)


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class WatchEpochs(TrainerCallback):
    """Writes down the epoch that the collator is in, at each step."""

    def __init__(self, collator):
        self.collator, self.epochs = collator, []

    def on_step_end(self, args, state, control, **kwargs):
        self.epochs.append(self.collator.epoch)


def test_it_learns_from_a_store(store, tokenizer, config, tmp_path):
    trainer = STFormerPretrainer(
        arguments(tmp_path, num_train_epochs=15), store, model=new_model(config), processing_class=tokenizer
    )
    trainer.train()
    curve = losses(trainer)
    assert np.mean(curve[-4:]) < np.mean(curve[:4]) - 0.5
    trainer.save_model()
    loaded = GeneTokenizer.from_pretrained(tmp_path)
    assert loaded.fingerprint == GeneBertConfig.from_pretrained(tmp_path).vocabulary_fingerprint


def test_a_tokenized_dataset_trains_as_its_store(store, adata, tokenizer, config, tmp_path):
    filled = np.flatnonzero(store.lengths > 0)
    tokens = tokenizer(adata[filled])
    columns = {name: tokens[name] for name in ("input_ids", "token_type_ids")}
    dataset = Dataset.from_dict({**columns, "cell_id": filled, "length": store.lengths[filled]})
    curves = []
    for cells in (store, dataset, Subset(store, filled.tolist())):
        trainer = STFormerPretrainer(
            arguments(tmp_path), cells, model=new_model(config), processing_class=tokenizer, mlm_probability=0.3
        )
        trainer.train()
        curves.append(losses(trainer))
    assert curves[0] == curves[1] == curves[2]


def test_empty_cells_are_left_out(store, tokenizer, config, tmp_path):
    trainer = STFormerPretrainer(arguments(tmp_path), store, model=new_model(config), processing_class=tokenizer)
    assert len(store) == 60
    assert len(trainer.train_dataset) == 59
    assert 3 not in trainer.train_dataset.__getitems__(range(59)).cell_id


def test_masks_follow_the_epoch_in_training_and_stay_in_evaluation(store, tokenizer, config, tmp_path):
    trainer = STFormerPretrainer(
        arguments(tmp_path, num_train_epochs=3),
        store,
        model=new_model(config),
        processing_class=tokenizer,
        eval_dataset=store,
    )
    watch = WatchEpochs(trainer.data_collator)
    trainer.add_callback(watch)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert watch.epochs == [0] * 4 + [1] * 4 + [2] * 4
    trainer.model.load_state_dict(new_model(config).state_dict())
    assert trainer.data_collator.epoch == 2
    assert trainer.evaluate()["eval_loss"] == before


def test_a_resumed_run_equals_an_uninterrupted_one(store, tokenizer, config, tmp_path):
    runs = []
    for name, n_workers in (("a", 0), ("b", 2)):
        settings = {"save_strategy": "steps", "save_steps": 6, "dataloader_num_workers": n_workers}
        trainer = STFormerPretrainer(
            arguments(tmp_path / name, **settings), store, model=new_model(config), processing_class=tokenizer
        )
        if name == "a":
            trainer.train()
        else:
            trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
        runs.append((losses(trainer)[-2:], trainer.model.state_dict()))
    assert runs[0][0] == runs[1][0]
    for name, tensor in runs[0][1].items():
        assert torch.equal(tensor, runs[1][1][name]), name


def test_model_init_serves_as_model(store, tokenizer, config, tmp_path):
    trainer = STFormerPretrainer(
        arguments(tmp_path, max_steps=2), store, model_init=lambda: new_model(config), processing_class=tokenizer
    )
    trainer.train()
    assert len(losses(trainer)) == 2


def test_the_seed_of_the_masks_is_the_seed_of_the_run(store, tokenizer, config, tmp_path):
    trainer = STFormerPretrainer(
        arguments(tmp_path, seed=11),
        store,
        model=new_model(config),
        processing_class=tokenizer,
        phenotype_mask_prob=0.25,
    )
    collator = trainer.data_collator
    assert isinstance(collator, DataCollatorForPhenotypicMLM)
    assert (collator.seed, collator.mlm_probability, collator.phenotype_mask_prob) == (11, 0.15, 0.25)


def test_what_is_missing_is_said(store, tokenizer, config, tmp_path):
    with pytest.raises(ValueError, match="needs a model, or a model_init"):
        STFormerPretrainer(arguments(tmp_path), store, processing_class=tokenizer)
    with pytest.raises(ValueError, match="processing_class=tokenizer"):
        STFormerPretrainer(arguments(tmp_path), store, model=new_model(config))


def test_a_tokenizer_that_does_not_fit_is_refused(store, tokenizer, config, tmp_path):
    more_bins = GeneTokenizer(tokenizer.genes, phenotypes=tokenizer.phenotypes, bin_edges=[1, 2, 3, 4])
    other_order = GeneTokenizer(tokenizer.genes[::-1], phenotypes=tokenizer.phenotypes, bin_edges=tokenizer.bin_edges)
    for other, words in (
        (more_bins, "11 ids and 42 types, where the model has 10 and 42"),
        (other_order, "another order"),
    ):
        with pytest.raises(ValueError, match=words):
            STFormerPretrainer(arguments(tmp_path), store, model=new_model(config), processing_class=other)


def test_predictions_of_the_mlm_meet_their_labels(store, tokenizer, config, tmp_path):
    seen = []

    def compute_metrics(prediction):
        seen.append((prediction.predictions, prediction.label_ids))
        return {"n": int((prediction.label_ids >= 0).sum())}

    args = TrainingArguments(str(tmp_path), per_device_eval_batch_size=7, use_cpu=True, report_to="none")
    trainer = STFormerPretrainer(
        args, model=GeneBertForPhenotypicMLM(config), processing_class=tokenizer, compute_metrics=compute_metrics
    )
    cells = Subset(store, [i for i in range(60) if i != 3])  # 59: the last batch is not full
    output = trainer.predict(cells)
    assert output.predictions.shape == (*output.label_ids.shape, len(tokenizer)) and len(output.label_ids) == 59
    masked = output.label_ids >= 0
    logits = torch.tensor(output.predictions[masked])
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(output.label_ids[masked]))
    assert trainer.evaluate(cells)["eval_n"] == masked.sum()
    assert trainer.model.config.sparse_prediction
    weights = [(batch[1] >= 0).sum() for batch in seen]
    assert weights[0] == weights[1] and torch.isfinite(loss)


def test_a_collator_needs_no_evaluation_form(store, tokenizer, config, tmp_path):
    class Collator(DataCollatorForPhenotypicMLM):
        for_evaluation = property()

    args = TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no")
    model = GeneBertForPhenotypicMLM(config)
    trainer = STFormerPretrainer(args, store, model=model, data_collator=Collator(tokenizer))
    assert trainer.train().global_step == 1


def test_classes_are_the_models_whatever_the_order_of_the_store(adata, tmp_path):
    losses = []
    adata = adata[[i for i in range(60) if i != 3]].copy()
    for order in (["B cell", "T cell"], ["T cell", "B cell"]):
        adata.obs["cell_type"] = adata.obs["cell_type"].cat.reorder_categories(order)
        store = CellStore.build(tmp_path / order[0], adata, obs=["cell_type"])
        tokenizer = GeneTokenizer.from_store(store)
        torch.manual_seed(0)
        config = GeneBertConfig.from_tokenizer(
            tokenizer, size="tiny", id2label={0: "B cell", 1: "T cell"}, label2id={"B cell": 0, "T cell": 1}
        )
        trainer = CellTrainer(
            model=GeneBertForClassification(config),
            args=TrainingArguments(str(tmp_path / "m"), use_cpu=True, report_to="none"),
            data_collator=DataCollatorForCellClassification(tokenizer, "cell_type"),
            eval_dataset=store,
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_packed_training_equals_padded_training_and_reports_each_class_of_tokens(store, tokenizer, config, tmp_path):
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    histories = []
    for packing in (False, True):
        trainer = STFormerPretrainer(
            arguments(tmp_path, gradient_accumulation_steps=2, eval_strategy="epoch"),
            store,
            model=new_model(config),
            processing_class=tokenizer,
            mlm_probability=0.4,
            packing=packing,
            eval_dataset=store,
        )
        trainer.train()
        histories.append(trainer.state.log_history)
    for padded, packed in zip(*histories, strict=True):
        assert padded.keys() == packed.keys()
        for name in padded:
            if "loss" in name or "accuracy" in name:
                assert packed[name] == pytest.approx(padded[name], abs=2e-4), name
    # The evaluation's figures are those of the model's logits.
    collator = of_epoch(DataCollatorForPhenotypicMLM(tokenizer, mlm_probability=0.4, seed=42))
    cells = np.flatnonzero(store.lengths > 0)
    batch = collator(store.__getitems__(cells))
    labels = batch.pop("labels")
    with torch.no_grad():
        log_p = trainer.model.eval()(**batch).logits.log_softmax(-1)
    found = trainer.evaluate()
    for name, types in (("cell_type", batch["token_type_ids"] == 1), ("genes", batch["token_type_ids"] > 1)):
        at = types & (labels != -100)
        of, wanted = log_p[at], labels[at]
        assert found[f"eval_{name}_loss"] == pytest.approx(-of[range(len(of)), wanted].mean().item(), rel=1e-4)
        assert found[f"eval_{name}_accuracy"] == pytest.approx((of.argmax(-1) == wanted).float().mean().item())


def test_ranked_cells_are_masked_as_ranks(store, tmp_path):
    tokenizer = GeneTokenizer.from_store(store, scheme="rank", medians=np.ones(len(store.gene_ids)))
    config = GeneBertConfig.from_tokenizer(tokenizer, size="tiny")
    trainer = STFormerPretrainer(
        arguments(tmp_path, num_train_epochs=20), store, model=new_model(config), processing_class=tokenizer
    )
    assert isinstance(trainer.data_collator, DataCollatorForGeneRankMLM)
    trainer.train()
    curve = losses(trainer)
    assert np.mean(curve[-4:]) < np.mean(curve[:4]) - 0.3


def test_class_weights_of_a_collection():
    assert balanced_class_weights(["a", "b", "a", "a", None], ["b", "a"]) == pytest.approx([2.0, 2 / 3])
    assert balanced_class_weights(["a", "a"], ["b", "a"]) == [1.0, 1.0]
