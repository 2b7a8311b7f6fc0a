"""Training on packed batches of one size: one compilation, counts of the cells alone, dtypes of sums."""

import os
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments

from stformer_hf import (
    CellTrainer,
    DataCollatorForCellClassification,
    DataCollatorForPhenotypicMLM,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneTokenizer,
    STFormerPretrainer,
)
from stformer_hf.cli.arguments import PRETRAINING
from stformer_hf.models.gene_bert import modeling_gene_bert
from stformer_hf.training.defaults import FINETUNING
from stformer_hf.training.loss_trainer import sum_dtype
from stformer_hf.training.throughput import ModelFlops

BUDGET = 150


def make_trainer(folder, store, tokenizer, compiled=True, **changes):
    compiling = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
    settings = {"num_train_epochs": 2, "logging_steps": 5, "save_strategy": "no", "report_to": "none"}
    settings |= {"disable_tqdm": True, "use_cpu": True, **compiling, **changes}
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    return STFormerPretrainer(
        TrainingArguments(str(folder), **settings),
        store,
        model=GeneBertForPhenotypicMLM(GeneBertConfig.from_tokenizer(tokenizer, **shape)),
        processing_class=tokenizer,
        packing=True,
        max_tokens_per_batch=BUDGET,
    )


@pytest.mark.skipif(not hasattr(torch.compiler, "is_exporting"), reason="torch 2.6 cannot compile this")
def test_a_compiled_run_is_compiled_once_and_counts_its_cells(store, tokenizer, tmp_path):
    torch._dynamo.reset()
    counters.clear()
    trainer = make_trainer(tmp_path, store, tokenizer)
    trainer.get_train_dataloader()
    n_tokens, n_cells = trainer.data_collator.pad_packed_to
    assert n_tokens == BUDGET and n_cells > 3
    sampler = trainer.get_train_sampler()
    assert sampler.max_cells == n_cells and max(map(len, sampler)) <= n_cells
    trainer.train()
    assert trainer.state.global_step == 2 * len(sampler) > 10
    assert counters["stats"]["unique_graphs"] == 1
    sums, _ = trainer.throughput._gather()
    assert sums["cells"] == 2 * 59
    assert sums["positions"] == trainer.state.global_step * 192  # the multiple of 64 above the budget
    plain = trainer.data_collator.for_evaluation()
    alive = sum(int(plain(store.__getitems__(rows))["attention_mask"].sum()) for rows in sampler)
    assert sums["tokens"] == pytest.approx(2 * alive, rel=0.05)  # training leaves out some phenotypes
    assert trainer.state.log_history[0]["padding_share"] > 0


class Reads(TorchDispatchMode):
    """Counts where values of tensors, or sizes that depend on them, are read: what waits for a GPU."""

    waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2"}

    def __init__(self):
        super().__init__()
        self.files = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in self.waits:
            frames = [
                frame.filename for frame in traceback.extract_stack() if f"{os.sep}torch{os.sep}" not in frame.filename
            ]
            self.files[Path(frames[-2]).name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("waits", [False, True])
def test_a_step_of_the_trainer_reads_no_value(store, tokenizer, tmp_path, monkeypatch, waits):
    """Of a run, the log reads values, not the steps, unless Trainer filters their losses."""
    monkeypatch.setattr(modeling_gene_bert, "check_packing", lambda *_: None)  # reads on a CPU alone
    runs = []
    for n_steps in (2, 5):  # of an epoch
        settings = {"max_steps": n_steps, "logging_steps": 100, "logging_nan_inf_filter": waits}
        trainer = make_trainer(tmp_path, store, tokenizer, compiled=False, **settings)
        with Reads() as reads:
            trainer.train()
        for name in ("collate.py", "optimizer.py"):  # the epoch of the collator, and AdamW's steps: on the CPU
            del reads.files[name]
        runs.append(reads.files)
    assert set(runs[1] - runs[0]) == ({"trainer.py"} if waits else set()) and runs[0]
    assert PRETRAINING["logging_nan_inf_filter"] is FINETUNING["logging_nan_inf_filter"] is False


def test_a_checkpoint_of_another_size_is_refused(store, tokenizer, tmp_path):
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, store, tokenizer, compiled=False, **settings).train()
    settings["max_steps"] = 4
    with pytest.raises(ValueError, match="filled up to one size was None and is True"):
        make_trainer(tmp_path, store, tokenizer, **settings).train(resume_from_checkpoint=True)
    trainer = make_trainer(tmp_path, store, tokenizer, compiled=False, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4 and trainer.data_collator.pad_packed_to is None


def test_ddp_does_not_search_for_unused_parameters(store, tokenizer, tmp_path):
    trainer = make_trainer(tmp_path, store, tokenizer, compiled=False)
    assert trainer.accelerator.ddp_handler.find_unused_parameters is False
    asked = make_trainer(tmp_path, store, tokenizer, compiled=False, ddp_find_unused_parameters=True)
    assert asked.accelerator.ddp_handler.find_unused_parameters is True
    trainer.model.config.cell_decoder = True  # whose outputs the masked loss does not read
    trainer.create_accelerator_and_postprocess()
    assert trainer.accelerator.ddp_handler.find_unused_parameters is True


@pytest.mark.parametrize("cls_state", [None, "fixed", "gated", "layers"])
@pytest.mark.parametrize("head", ["masked", "classes"])
def test_a_loss_reaches_all_parameters_that_are_trained(store, tmp_path, head, cls_state):
    """Else DDP, which does not search for the others, would stop."""
    tokenizer = GeneTokenizer.from_store(store, bin_edges=[0.5], whole_cell=True, max_length=20)
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    config = GeneBertConfig.from_tokenizer(tokenizer, **shape, num_labels=2, cls_state=cls_state)
    if head == "masked":
        model, collator = GeneBertForPhenotypicMLM(config), DataCollatorForPhenotypicMLM(tokenizer)
    else:
        model, collator = GeneBertForClassification(config), DataCollatorForCellClassification(tokenizer, "cell_type")
    settings = TrainingArguments(str(tmp_path), max_steps=1, save_strategy="no", report_to="none", use_cpu=True)
    trainer = CellTrainer(model, settings, collator, store, processing_class=tokenizer)
    assert trainer.accelerator.ddp_handler.find_unused_parameters is False
    trainer.train()
    assert model.config.cls_state == ("fixed" if head == "masked" and cls_state is None else cls_state)
    model(**collator(store.__getitems__([4, 5, 6]))).loss.backward()
    trained = {name: of.grad for name, of in model.named_parameters() if of.requires_grad}
    assert trained and [name for name, gradient in trained.items() if gradient is None] == []


def test_sums_have_a_dtype_that_the_device_has():
    assert sum_dtype(torch.device("cpu")) == sum_dtype(torch.device("cuda")) == torch.float64
    assert sum_dtype(torch.device("mps")) == torch.float32


def test_operations_of_a_model_worked_out_by_hand(tokenizer):
    """12 layers of 512, feed-forward 512; 64 cells of 1,024 tokens, 15 % of them predicted."""
    config = GeneBertConfig.from_tokenizer(
        tokenizer, num_hidden_layers=12, num_attention_heads=8, hidden_size=512, intermediate_size=512
    )
    with torch.device("meta"):
        flops = ModelFlops(GeneBertForPhenotypicMLM(config))
    # A layer: six matrices with biases and two norms; a norm of the embeddings. Three matrices and a norm of the last
    # layer are applied to predicted tokens alone.
    last = 3 * (512 * 512 + 512) + 2 * 512
    assert flops.encoder == 12 * (6 * (512 * 512 + 512) + 2 * 2 * 512) + 2 * 512 - last == 18_147_840
    assert flops.head == 512 * 512 + 512 + 2 * 512 + (512 + 1) * config.vocab_size + last
    n_tokens, n_predicted = 65_536, 9_830
    of_encoder = 6 * 18_147_840 * 65_536  # 7.14e12
    of_attention = 12 * 12 * 512 * 64 * 1_024**2  # 12 x layers x hidden x length x tokens: 4.95e12
    of_head = 6 * flops.head * 9_830
    assert flops(n_tokens, 64 * 1_024**2, n_predicted) == of_encoder + of_attention + of_head
    assert of_encoder + of_attention == 12_083_823_378_432
