"""The loss of an evaluation is the mean over its labels: it does not depend on the batches."""

import numpy as np
import pytest
import torch
from transformers import TrainingArguments

from stformer_hf import GeneBertForPhenotypicMLM, STFormerPretrainer
from stformer_hf.training.loss_trainer import loss_of_batch


def arguments(folder, batch_size, **changes):
    return TrainingArguments(
        str(folder),
        per_device_eval_batch_size=batch_size,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **changes,
    )


@pytest.mark.parametrize("loss_only", [True, False])
def test_masked_tokens_weigh_the_same_in_batches_of_any_size(store, tokenizer, config, tmp_path, loss_only):
    config.loss_weights = {"cell_type": 3.0}
    torch.manual_seed(0)
    model = GeneBertForPhenotypicMLM(config)
    found = [
        STFormerPretrainer(
            arguments(tmp_path, size, prediction_loss_only=loss_only),
            store,
            model=model,
            processing_class=tokenizer,
            eval_dataset=store,
        ).evaluate()
        for size in (1, 7, 60)
    ]
    for name in ("eval_loss", "eval_genes_loss", "eval_cell_type_loss"):
        assert np.ptp([metrics[name] for metrics in found]) < 1e-5
    assert abs(found[0]["eval_loss"] - found[0]["eval_genes_loss"]) > 1e-3  # it has both classes, weighted


def test_an_infinite_batch_is_left_out_only_if_that_is_asked_for(store, tokenizer, config, tmp_path):
    class Fails(GeneBertForPhenotypicMLM):
        def forward(self, labels=None, **inputs):
            outputs = super().forward(labels=labels, **inputs)
            if len(labels) == 3:  # the last batch
                outputs.loss = outputs.loss * float("nan")
            return outputs

    def loss(only_finite, cells):
        torch.manual_seed(0)
        return STFormerPretrainer(
            arguments(tmp_path, 8, logging_nan_inf_filter=only_finite, prediction_loss_only=True),
            store,
            model=Fails(config),
            processing_class=tokenizer,
            eval_dataset=store.select(cells),
        ).evaluate()["eval_loss"]

    cells = np.flatnonzero(store.lengths)[:11]
    assert np.isnan(loss(False, cells))
    assert loss(True, cells) == pytest.approx(loss(True, cells[:8]), rel=1e-6)


def test_a_loss_that_is_not_finite_is_warned_of_once_and_does_not_spoil_the_log(
    store, tokenizer, config, tmp_path, caplog
):
    class Fails(GeneBertForPhenotypicMLM):
        n_batches = 0

        def forward(self, **inputs):
            outputs = super().forward(**inputs)
            self.n_batches += 1
            outputs.loss = outputs.loss + (float("nan") if self.n_batches in (2, 4) else 0.0)  # of the same gradient
            return outputs

    settings = {"max_steps": 5, "logging_steps": 1, "logging_nan_inf_filter": False, "save_strategy": "no"}
    trainer = STFormerPretrainer(
        arguments(tmp_path, 8, **settings), store, model=Fails(config), processing_class=tokenizer
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.isfinite(losses).tolist() == [True, False, True, False, True]
    assert caplog.text.count("The loss is nan in step 2") == caplog.text.count("The loss is") == 1


def test_a_batch_without_labels_adds_nothing():
    batches = ((2.0, 3), (float("nan"), 0), (6.0, 1))
    total, n_labels = sum(loss_of_batch(torch.tensor(loss), n, only_finite=False) for loss, n in batches)
    assert total / n_labels == 3.0


def test_the_number_of_labels_may_be_repeated_for_each_gpu():
    """Trainer does so with DataParallel, which needs several GPUs."""
    found = loss_of_batch(torch.tensor(2.0), torch.full((2, 1), 3.0), only_finite=True)
    assert found.tolist() == [6.0, 3.0]
