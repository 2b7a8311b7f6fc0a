"""Training of [CLS] by two views of each cell."""

import numpy as np
import pytest
import torch
from conftest import make_adata
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModel, TrainerCallback, TrainingArguments

from stformer_hf import (
    CellStore,
    EvenBatchSampler,
    GeneBertConfig,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    STFormerPretrainer,
)
from stformer_hf.training.objectives.contrast import contrast_loss
from stformer_hf.training.starts.spectral_start import initialise_from_store

ALL = {"mlm": 1.0, "contrast": 0.5, "decode": 0.3, "cross_correlation": 0.2}


@pytest.fixture
def cells(tmp_path) -> CellStore:
    parts = [make_adata(60, 60, density=0.8), make_adata(30, 60, seed=1, density=0.8)]
    return CellStore.build(tmp_path / "cells", parts, obs=["cell_type"])


@pytest.fixture
def whole_cells(cells) -> GeneTokenizer:
    return GeneTokenizer.from_store(cells, bin_edges=[0.5, 1.5, 3.5], whole_cell=True, max_length=20)


def make_model(cells, tokenizer, **settings):
    torch.manual_seed(0)
    settings = {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "hidden_dropout_prob": 0.0,
        **settings,
    }
    model = GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, size="tiny", **settings))
    if tokenizer.whole_cell:
        initialise_from_store(model, tokenizer, cells, n_components=8)
    return model


def make_trainer(folder, cells, tokenizer, model=None, objectives=ALL, eval_dataset=None, callbacks=None, **changes):
    own = ("view", "batch_key", "ema", "packing", "max_tokens_per_batch", "baselines", "mlm_probability")
    of_trainer = {name: changes.pop(name) for name in own if name in changes}
    settings = {
        "max_steps": 8,
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-3,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return STFormerPretrainer(
        TrainingArguments(str(folder), **settings),
        cells,
        model=make_model(cells, tokenizer) if model is None else model,
        processing_class=tokenizer,
        objectives=objectives,
        eval_dataset=eval_dataset,
        callbacks=callbacks,
        **of_trainer,
    )


def train_logs(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("objectives", [{"mlm": 1.0}, {"contrast": 1.0}, {"cross_correlation": 1.0}, ALL])
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_of_a_packed_batch_has_no_size_that_a_gpu_must_tell(
    cells, whole_cells, tmp_path, monkeypatch, objectives, training
):
    model = make_model(cells, whole_cells, attn_implementation="eager", intermediate_size=4)
    trainer = make_trainer(tmp_path, cells, whole_cells, model, objectives, packing=True)
    trainer.current_gradient_accumulation_steps = 1  # as train() sets it
    batch = trainer.data_collator(cells.__getitems__(range(9)))
    model.train(training)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # else checks read numbers, on a CPU alone
    with FakeTensorMode(allow_non_fake_inputs=True):  # knows shapes alone, and fails where numbers are needed
        fake = {name: torch.empty_like(of) if isinstance(of, torch.Tensor) else of for name, of in batch.items()}
        loss = trainer.compute_loss(model, fake)
        assert loss.shape == ()
        if training:
            loss.backward()


@pytest.mark.parametrize("view", ["disjoint", "thinning"])
def test_the_log_has_the_parts_of_the_sum_in_training_and_evaluation(cells, whole_cells, tmp_path, view):
    trainer = make_trainer(tmp_path / "run", cells, whole_cells, view=view, eval_dataset=cells.select(slice(0, 20)))
    trainer.train()
    evaluated = trainer.evaluate()
    for entry, prefix, total in [*((log, "", log["loss"]) for log in train_logs(trainer)), (evaluated, "eval_", None)]:
        parts = sum(weight * entry[f"{prefix}{name}_loss"] for name, weight in ALL.items())
        assert parts == pytest.approx(evaluated["eval_loss"] if total is None else total, rel=1e-4)
        assert entry[f"{prefix}contrast_of_totals"] > 0 and entry[f"{prefix}effective_rank"] > 1
        assert entry[f"{prefix}total_r2"] < 1
    again = trainer.evaluate()
    assert again["eval_loss"] == evaluated["eval_loss"]
    trainer.args.per_device_eval_batch_size = 7
    of_sevens = trainer.evaluate()
    for name in ("mlm", "decode"):  # the others compare the cells of a batch
        assert of_sevens[f"eval_{name}_loss"] == pytest.approx(evaluated[f"eval_{name}_loss"], rel=1e-5)
    assert of_sevens["eval_contrast_loss"] != pytest.approx(evaluated["eval_contrast_loss"], rel=1e-3)
    assert trainer.model.config.pooling == "cls"


def test_packed_and_padded_batches_have_the_same_losses(cells, whole_cells, tmp_path):
    logs = []
    for packing in (False, True):
        trainer = make_trainer(
            tmp_path / str(packing), cells, whole_cells, packing=packing, logging_steps=1, max_steps=3
        )
        trainer.train()
        logs.append([[log[f"{name}_loss"] for name in ALL] for log in train_logs(trainer)])
    np.testing.assert_allclose(*logs, rtol=1e-4)


def test_accumulated_batches_are_averaged(cells, whole_cells, tmp_path):
    """Two batches of a step give the mean of their losses, and the mean of their gradients."""
    gradients = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.append(model.gene_bert.cell_embedding.genes.weight.grad.clone())

    for n_batches, learning_rate in ((2, 1e-3), (1, 0.0)):
        trainer = make_trainer(
            tmp_path / str(n_batches),
            cells,
            whole_cells,
            objectives={"contrast": 1.0, "decode": 1.0},
            callbacks=[Keep()],
            gradient_accumulation_steps=n_batches,
            learning_rate=learning_rate,
            max_steps=2 // n_batches,
            max_grad_norm=0.0,
        )
        trainer.train()
    torch.testing.assert_close(gradients[0], (gradients[1] + gradients[2]) / 2, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_training_does_not_collapse_the_embedding_and_the_log_would_show_it(cells, whole_cells, tmp_path, monkeypatch):
    def ranks(folder):
        trainer = make_trainer(
            folder,
            cells,
            whole_cells,
            objectives={"contrast": 1.0},
            max_steps=60,
            logging_steps=20,
            learning_rate=1e-2,
        )
        trainer.train()
        return [log["effective_rank"] for log in train_logs(trainer)]

    kept = ranks(tmp_path / "contrast")
    assert kept[-1] > 8 and kept[-1] > 0.7 * kept[0]

    def attraction(states, comparable):  # InfoNCE without its negatives
        first, second = torch.nn.functional.normalize(states, dim=-1).chunk(2)
        return -(first * second).sum(1).mean() / 0.1

    monkeypatch.setattr("stformer_hf.training.objective_trainer.contrast_loss", attraction)
    collapsed = ranks(tmp_path / "attraction")
    assert collapsed[-1] < 0.5 * kept[-1]
    assert contrast_loss is not attraction


@pytest.mark.slow
def test_contrast_learns_to_tell_cells_apart(cells, whole_cells, tmp_path):
    trainer = make_trainer(tmp_path / "run", cells, whole_cells, objectives={"contrast": 1.0}, max_steps=60)
    trainer.train()
    logs = train_logs(trainer)
    assert logs[-1]["contrast_loss"] < logs[0]["contrast_loss"] - 0.2


def test_a_resumed_run_is_the_uninterrupted_one(cells, whole_cells, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 1, "ema": 0.8, "view": "thinning"}
    whole = make_trainer(tmp_path / "run", cells, whole_cells, **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "run", cells, whole_cells, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    names = [*(f"{name}_loss" for name in ALL), "loss", "effective_rank", "total_r2"]
    before, after = ([[log[name] for name in names] for log in train_logs(each)][4:] for each in (whole, resumed))
    assert len(after) == 4 and before == after
    for (name, one), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(ValueError, match=r"batch_key was None and is cell_type"):
        other = make_trainer(tmp_path / "run", cells, whole_cells, batch_key="cell_type", **settings)
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))


def test_the_model_ends_with_the_average_and_is_evaluated_by_it(cells, whole_cells, tmp_path):
    seen = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.append(model.gene_bert.cell_embedding.genes.weight.detach().clone())

    trainer = make_trainer(
        tmp_path / "run",
        cells,
        whole_cells,
        ema=0.5,
        callbacks=[Keep()],
        max_steps=3,
        eval_dataset=cells.select(slice(0, 20)),
        eval_strategy="steps",
        eval_steps=3,
    )
    average = trainer.model.gene_bert.cell_embedding.genes.weight.detach().clone()
    trainer.train()
    for weights in seen:
        average = 0.5 * average + 0.5 * weights
    weight = trainer.model.gene_bert.cell_embedding.genes.weight.detach()
    torch.testing.assert_close(weight, average)
    assert (weight - seen[-1]).abs().max() > 1e-4
    in_training = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert in_training == [trainer.evaluate()["eval_loss"]]


def test_batches_are_of_one_source_and_the_same_for_any_number_of_workers(cells, whole_cells, tmp_path):
    logs = []
    for n_workers in (0, 2):
        trainer = make_trainer(
            tmp_path / str(n_workers),
            cells,
            whole_cells,
            batch_key="cell_type",
            dataloader_num_workers=n_workers,
            logging_steps=1,
            max_steps=3,
        )
        trainer.train()
        logs.append([log["loss"] for log in train_logs(trainer)])
    assert logs[0] == logs[1]
    codes = trainer.train_dataset.obs["cell_type"].cat.codes.to_numpy()
    batches = list(EvenBatchSampler(trainer.get_train_sampler(), 16, world_size=2))
    mixed = [batch for batch in batches if len(set(codes[batch])) > 1]
    assert len(mixed) <= 2 and len(batches) % 2 == 0
    assert sorted(sum(batches, [])) == list(range(len(codes)))


def test_a_decoder_is_saved_and_left_out_where_it_is_not_wanted(cells, whole_cells, tmp_path):
    trainer = make_trainer(tmp_path / "run", cells, whole_cells, objectives={"decode": 1.0}, max_steps=2)
    shares = trainer.model.gene_bert.cell_embedding.statistics.shares
    torch.testing.assert_close(trainer.model.cell_decoder.genes.bias.detach().exp(), shares.clamp(min=1e-9))
    trainer.train()
    trainer.save_model()
    loaded = GeneBertForPhenotypicMLM.from_pretrained(tmp_path / "run")
    assert loaded.config.cell_decoder and loaded.config.pooling == "cls"
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    encoder = AutoModel.from_pretrained(tmp_path / "run")
    assert not any("decoder" in name for name in encoder.state_dict())
    fresh = GeneBertForPhenotypicMLM(loaded.config)
    assert not fresh.cell_decoder.genes.weight.any() and not fresh.cell_decoder.log_dispersion.any()


def test_without_mlm_nothing_is_masked_and_phenotypes_are_never_shown(cells, tmp_path):
    tokenizer = GeneTokenizer.from_store(cells, phenotypes=["cell_type"], whole_cell=True)
    trainer = make_trainer(tmp_path / "run", cells, tokenizer, objectives={"contrast": 1.0})
    batch = trainer.data_collator(cells.__getitems__(np.arange(20)))
    assert not tokenizer.get_phenotypic_tokens_mask(batch["input_ids"]).any()
    labelled = batch["token_type_ids"][batch["labels"] != -100]
    assert len(labelled) and (labelled == 1).all()  # the phenotype
    assert (batch["cell_counts"] >= 0).all()


def test_masked_genes_alone_are_trained_as_ever(cells, whole_cells, tmp_path):
    """Without objectives on [CLS] there are no views, and nothing in the log of them."""
    losses = []
    for objectives in (None, {"mlm": 1.0}):
        trainer = make_trainer(
            tmp_path / "run", cells, whole_cells, objectives=objectives, max_steps=2, logging_steps=1
        )
        trainer.train()
        losses.append([log["loss"] for log in train_logs(trainer)])
        assert "effective_rank" not in train_logs(trainer)[0]
    assert losses[0] == losses[1] and trainer.model.config.pooling is None


def test_what_does_not_fit_is_refused(cells, whole_cells, tmp_path):
    plain = GeneTokenizer.from_store(cells, bin_edges=[0.5])
    with pytest.raises(ValueError, match="whole_cell=True"):
        make_trainer(tmp_path, cells, plain)
    with pytest.raises(ValueError, match="has no cell_embedding"):
        make_trainer(tmp_path, cells, whole_cells, model=make_model(cells, plain))
    with pytest.raises(ValueError, match="leave max_tokens_per_batch"):
        make_trainer(tmp_path, cells, whole_cells, batch_key="cell_type", max_tokens_per_batch=500)
    with pytest.raises(ValueError, match="needs objectives that train"):
        make_trainer(tmp_path, cells, whole_cells, objectives=None, batch_key="cell_type")
    with pytest.raises(ValueError, match="need a CellStore, got Subset"):
        make_trainer(
            tmp_path, torch.utils.data.Subset(range(3), [0]), whole_cells, model=make_model(cells, whole_cells)
        )
    with pytest.raises(ValueError, match="baselines=True masks whole cells"):
        make_trainer(tmp_path, cells, whole_cells, baselines=True)
    with pytest.raises(ValueError, match="'donor' is not a categorical"):
        make_trainer(tmp_path, cells, whole_cells, batch_key="donor")


def test_losses_are_not_those_of_an_attempt_that_ran_out_of_memory(cells, whole_cells, tmp_path):
    trainer = make_trainer(tmp_path, cells, whole_cells, auto_find_batch_size=True, max_steps=4)
    forward, means, n_calls, n_batches = trainer.model.forward, trainer._means, [], []

    def limited(*args, **kwargs):
        n_calls.append(1)
        if len(n_calls) == 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate")
        return forward(*args, **kwargs)

    def watch(training, prefix=""):
        n_batches.append(trainer._sums[training]["contrast_loss"][1].item())
        return means(training, prefix)

    trainer.model.forward, trainer._means = limited, watch
    trainer.train()
    assert len(n_calls) == 7 and n_batches == [4]
