"""Throughput of training: tokens and cells per second, padding, waiting for data, memory, MFU."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from ..models.gene_bert.configuration_gene_bert import IGNORE
from ..models.gene_bert.modeling_gene_bert import GeneBertForClassification, GeneBertForPhenotypicMLM
from ..models.remote_code import is_a

# Dense bf16 peaks of matrix units with float32 sums, FLOP/s, by the name that torch.cuda.get_device_name returns. From
# NVIDIA's data sheets (A100, A30, A40, A10, L4, L40, L40S, H100, H200, B200, GH200) and white papers (GA102: RTX 3090,
# RTX A6000; Ada: RTX 4090), halved where a sheet counts sparsity. Names must match exactly: a laptop chip, a MIG slice
# or a vendor's variant with a similar name has another peak.
BF16_PEAKS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A30": 165e12,
    "NVIDIA A40": 149.7e12,
    "NVIDIA A10": 125e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181.05e12,
    "NVIDIA L40S": 362.05e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GH200 480GB": 989.4e12,
    "NVIDIA RTX A6000": 154.8e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}

_STATE = "Throughput"  # among the states of callbacks in trainer_state.json
_SUMS = ("tokens", "squares", "predictions", "cells", "positions", "wait", "elapsed")  # times in microseconds


class ModelFlops:
    """Floating point operations that a training step needs, independent of the implementation.

    For T tokens in cells of lengths s, with P predicted tokens (or cells): 6 N T + 12 L d sum(s ** 2) + 6 H P. N is
    the number of the encoder's parameters without embeddings, H that of the head, with the output embedding; there are
    L layers of width d, `config.num_hidden_layers` and `config.hidden_size` of the model. What follows the attention
    of the last layer belongs to H where GeneBert computes it for predicted tokens, or `[CLS]`, alone. Padding and
    recomputed activations do not count.

    Notes
    -----
    Chowdhery et al. 2022 (PaLM), appendix B: 6 N + 12 L H Q T per token, with heads of size Q and d = H Q.
    """

    def __init__(self, model: nn.Module):
        config, base = model.config, getattr(model, "base_model", model)
        own = {id(of) for of in base.parameters()}
        embeddings = {id(part.weight) for part in base.modules() if isinstance(part, nn.Embedding)}
        self.encoder = sum(_numel(of) for of in base.parameters() if id(of) not in embeddings)
        self.head = sum(_numel(of) for of in model.parameters() if id(of) not in own)
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if output is not None and id(output.weight) in own:
            self.head += _numel(output.weight)
        if _reads_few_states(model):
            last = base.layers[-1]
            parts = (last.attention.out_lin, last.ffn, last.output_layer_norm)
            moved = sum(_numel(of) for part in parts for of in part.parameters())
            self.encoder, self.head = self.encoder - moved, self.head + moved
        self.attention = config.num_hidden_layers * config.hidden_size

    def __call__(self, tokens: int, squares: int, predictions: int) -> int:
        """Return the operations, forward and backward, from numbers of tokens, squared lengths and predictions."""
        return 6 * self.encoder * tokens + 12 * self.attention * squares + 6 * self.head * predictions


class Throughput:
    """Number of tokens and cells seen in training, and its time without evaluation and saving.

    Sums of tensors stay on their device until they are logged, so that steps never wait for the GPU. The accelerator
    of the trainer gathers the counts of all processes.

    Attributes
    ----------
    totals : dict of str to float
        `tokens`, `cells` and `seconds` over all processes, up to the last log or checkpoint, including those of the
        run that this one resumed.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self.begin()

    def begin(self) -> None:
        """Reset all counts, and read the totals of a resumed run from the trainer's state."""
        self._counts, self._positions = torch.zeros(4, dtype=torch.int64), 0
        self._wait = self._elapsed = 0.0
        self._since: float | None = None
        self._at_last_log = dict.fromkeys(_SUMS, 0)
        self._flops: ModelFlops | None = None
        state = self._trainer.state
        self._resumed = state.global_step > 0
        self._before = {"tokens": 0, "cells": 0, "seconds": 0.0, **state.stateful_callbacks.get(_STATE, {})}
        self.totals = dict(self._before)

    # ------------------------------------------------------------------ time

    def start(self) -> None:
        """Start the clock, unless it is running."""
        if self._since is None:
            self._since = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock once the device has finished its work."""
        if self._since is not None:
            if self._trainer.args.device.type == "cuda":
                torch.cuda.synchronize(self._trainer.args.device)
            self._elapsed += time.perf_counter() - self._since
            self._since = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock within the context."""
        running = self._since is not None
        self.stop()
        yield
        if running:
            self.start()

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield batches, and add up the time spent waiting for them.

        In a resumed run the clock starts at its first batch: those before it are read and skipped.
        """
        began = time.perf_counter()
        for batch in batches:
            now = time.perf_counter()
            if self._resumed:
                self._resumed, self._since = False, now
            else:
                self._wait += now - began
            yield batch
            began = time.perf_counter()

    # ------------------------------------------------------------------ counts

    def count(self, batch: Mapping[str, Any]) -> None:
        """Add a padded, packed or neighbourhood batch; batches of another kind are ignored.

        Tokens are those attended to, or for neighbourhoods the observed cells and their cls tokens. Cells are those in
        the batch, or for neighbourhoods the masked ones. Dead tokens of a packed batch (-1 in `seq_idx`) are padding.
        """
        ids = batch.get("input_ids")
        if ids is None:
            observed, masked = batch.get("observed_cell_type"), batch.get("masked_cell_type")
            if observed is not None and masked is not None:
                n_tokens = len(observed) + len(masked)
                self._add(torch.tensor([n_tokens, 0, 0, len(masked)]), n_tokens)
            return
        packed = batch.get("cu_seq_lens_q") is not None
        if packed:
            lengths = batch["cu_seq_lens_q"].diff().long()
        elif batch.get("attention_mask") is not None:
            lengths = batch["attention_mask"].sum(-1)
        else:
            lengths = (ids != getattr(self._trainer.processing_class, "pad_token_id", None)).sum(-1)
        n_cells = torch.full_like(lengths[:1], len(lengths)).sum()
        if packed and batch.get("seq_idx") is not None:
            n_cells = batch["seq_idx"].max().long() + 1  # dead and empty segments follow them
            lengths = lengths * (torch.arange(len(lengths), device=lengths.device) < n_cells)
        labels = batch.get("labels")
        predictions = n_cells if labels is None or labels.shape != ids.shape else (labels != IGNORE).sum()
        self._add(torch.stack([lengths.sum(), lengths.square().sum(), predictions, n_cells]), ids.numel())

    def _add(self, counts: torch.Tensor, n_positions: int) -> None:
        self._counts = self._counts.to(counts.device) + counts
        self._positions += n_positions

    # ------------------------------------------------------------------ figures

    def figures(self, of_run: bool = False) -> dict[str, float]:
        """Return the figures since the last call, or of the whole call of `train`; all processes must call it.

        Returns
        -------
        dict of str to float
            `tokens_per_second`, `cells_per_second`: over all processes. `padding_share`: share of positions without a
            token. `data_wait_share`: share of the time spent waiting for batches. `peak_memory_gb`: peak memory in
            10 ** 9 bytes allocated by torch on a GPU, or used by the process on a CPU; the maximum over processes.
            `mfu`: share of the dense bf16 peak of the GPUs, see `ModelFlops`; only for token encoders that are trained
            as a whole (not LoRA, nor with frozen layers), on GPUs that `BF16_PEAKS` lists. Empty if nothing was
            counted.
        """
        sums, memory = self._gather()
        since = sums if of_run else {name: sums[name] - self._at_last_log[name] for name in sums}
        self._at_last_log = sums
        world, seconds = self._trainer.args.world_size, since["elapsed"] / 1e6  # summed over processes
        if not since["cells"] or not seconds:
            return {}
        figures = {
            "tokens_per_second": since["tokens"] * world / seconds,
            "cells_per_second": since["cells"] * world / seconds,
            "padding_share": 1 - since["tokens"] / since["positions"],
            "data_wait_share": since["wait"] / since["elapsed"],
        }
        if memory:
            figures["peak_memory_gb"] = memory / 1e9
        if self._flops is not None:
            peak = BF16_PEAKS[torch.cuda.get_device_name(self._trainer.args.device)]
            done = self._flops(since["tokens"], since["squares"], since["predictions"])
            figures["mfu"] = done / seconds / (peak * max(self._trainer.args.n_gpu, 1))
        return figures

    def remember(self) -> None:
        """Write the totals to the trainer's state, for a run that resumes; all processes must call it."""
        self._gather()
        self._trainer.state.stateful_callbacks[_STATE] = dict(self.totals)

    def look_at(self, model: nn.Module) -> None:
        """Set the operations per token of an encoder of tokens that is trained as a whole, on a GPU of known peak."""
        device, config = self._trainer.args.device, getattr(model, "config", None)
        is_encoder = hasattr(config, "num_hidden_layers") and hasattr(config, "hidden_size")
        of_tokens = is_encoder and getattr(model, "main_input_name", None) == "input_ids"
        parts = [part for part in getattr(model, "base_model", model).modules() if not isinstance(part, nn.Embedding)]
        whole = all(of.requires_grad or of.ndim < 2 for part in parts for of in part.parameters(recurse=False))
        if device.type == "cuda" and of_tokens and whole and torch.cuda.get_device_name(device) in BF16_PEAKS:
            self._flops = ModelFlops(model)

    def _gather(self) -> tuple[dict[str, int], int]:
        """Return the sums since `begin` over all processes, and the largest peak memory of a process in bytes."""
        device = self._trainer.args.device
        elapsed = self._elapsed + (0.0 if self._since is None else time.perf_counter() - self._since)
        own = [self._positions, round(1e6 * self._wait), round(1e6 * elapsed), _peak_memory(device)]
        row = torch.cat([self._counts.to(device), torch.tensor(own, device=device)])
        rows = self._trainer.accelerator.gather(row[None])
        *counts, _ = rows.sum(0).tolist()
        sums = dict(zip(_SUMS, counts, strict=True))
        done = {**sums, "seconds": sums["elapsed"] / 1e6 / self._trainer.args.world_size}
        self.totals = {name: before + done[name] for name, before in self._before.items()}
        return sums, int(rows[:, -1].max())


class MeasuredTrainer(Trainer):
    """Trainer that logs the figures of `Throughput.figures`, with the prefix `train_` at the end of training.

    Time excludes evaluation, saving and logging, and the batches that a resumed run skips.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.throughput = Throughput(self)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> tuple[nn.Module, DataLoader]:
        self.throughput.begin()
        self.throughput.look_at(self.model)
        return super()._prepare_for_training(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """Draw batches as Trainer does, count them, and measure the time spent waiting for them."""
        self.throughput.start()
        drawn = super().get_batch_samples(self.throughput.timed(epoch_iterator), num_batches, device)
        for batch in drawn[0]:
            self.throughput.count(batch)
        return drawn

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        control = self.control
        if not (control.should_log or control.should_evaluate or control.should_save):
            super()._maybe_log_save_evaluate(*args, **kwargs)
            return
        with self.throughput.paused():
            if control.should_save or control.should_evaluate:  # an evaluation may lead to a save
                self.throughput.remember()
            super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as Trainer does, with the throughput since the last log, or of the whole run in its last log."""
        if self.is_in_train and "loss" in logs:
            logs = {**logs, **self.throughput.figures()}
        elif self.is_in_train and "train_loss" in logs:
            self.throughput.stop()
            # In place, since `train` returns them.
            logs.update({f"train_{name}": value for name, value in self.throughput.figures(of_run=True).items()})
        super().log(logs, *args, **kwargs)


def _reads_few_states(model: nn.Module) -> bool:
    """Return whether a step computes the last states of predicted tokens, or of `[CLS]`, alone."""
    if is_a(model, GeneBertForClassification):
        few = model.config.classifier_pooling == "cls"
    else:
        few = is_a(model, GeneBertForPhenotypicMLM) and model.config.sparse_prediction
        few = few and not model.config.cell_decoder
    return few and model.config.num_hidden_layers > 0


def _numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # DeepSpeed ZeRO-3 shards a parameter


def _peak_memory(device: torch.device) -> int:
    """Return peak memory in bytes: allocated by torch on the GPUs, else used by the process; 0 if unknown."""
    if device.type == "cuda":
        return max(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
    return peak_resident_memory()


def peak_resident_memory() -> int:
    """Return the peak resident memory of this process in bytes; 0 if unknown (Windows)."""
    try:
        import resource
        import sys
    except ImportError:
        return 0
    # ru_maxrss is in KiB, on macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
