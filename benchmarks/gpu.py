"""What a GPU makes of training: time of a step by way of packing and backend, what waits, and the loader's part.

python -m benchmarks gpu --minutes 8 --out FOLDER

A step is forward, backward and fused AdamW in bfloat16 (autocast) on rank tokens, with the head and the masks of
`python -m benchmarks model`; MFU is counted as there, of useful work alone. "mix" are the cells of `--h5ad`, all
their genes; "1,024" are made cells cut to 1,024 tokens. A batch has about as many tokens as `TOKENS` says.
"attention" times the attention of one layer alone, on the cells of a "mix" batch, by each kernel that is there; a row
whose kernel is not there is skipped. The parts come in the order of their worth and share the minutes; a part or row
that takes longer than `LIMIT` seconds is stopped, and the JSON is written after each, so that a run that is cut short
keeps what it has. `--device cpu` runs all lines that need no kernel of a GPU in about a minute, on few tokens and a
tiny model, in float32, compiled without generating code.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from anndata import AnnData
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

from stformer_hf.training.throughput import BF16_PEAKS

from .gpu_kernels import attention_kernels, fuse_loss, missing, norms_in_half_precision, packed_attention_by
from .model import LENGTH_MEDIAN, MASKED, _made_cells, make_model, useful_flops

# layers, heads, hidden size, feed-forward size, attention dropout
SHAPES = {"19M": (12, 8, 512, 512, 0.0), "85M": (12, 12, 768, 3072, 0.0)}
CPU_SHAPES = {"tiny": (2, 2, 32, 64, 0.0), "small": (2, 2, 64, 64, 0.0)}
TOKENS, CPU_TOKENS = 65_536, 1_024  # of a batch
CPU_GENES = 2_000
LIMIT = 150  # seconds of a part or row
N_BATCHES, CPU_BATCHES = 6, 2  # distinct ones, of other lengths


class Way(NamedTuple):
    """How a step is made: model, layout of a batch, attention, what is compiled, and what else differs.

    Batches of "one size" are packed and filled up with dead tokens (`pad_packed_to`): one compilation serves all.
    """

    model: str = "gene_bert"
    layout: str = "packed"
    attention: str = "sdpa"
    compiled: str | None = None
    change: str | None = None


_LAYERS = Way(layout="one size", compiled="layers")
CONTENDERS = {
    "packed": Way(),
    "packed, compiled": _LAYERS._replace(compiled="model"),
    "packed, layers compiled": _LAYERS,
    "packed, layers compiled, cuDNN": _LAYERS._replace(change="cuDNN"),
    "packed, layers compiled, flash-attn 3": _LAYERS._replace(attention="flash_attention_3"),
    "packed, layers compiled, flash-attn 4": _LAYERS._replace(attention="flash_attention_4"),
    "packed, layers compiled, heads of 128": _LAYERS._replace(change="heads of 128"),
    "padded": Way(layout="padded"),
    "BERT, padded": Way("bert", "padded"),
    "ModernBERT, padded": Way("modernbert_sparse", "padded"),
    "packed, layers compiled, norms in bfloat16": _LAYERS._replace(change="half norms"),
    "packed, layers compiled, Liger": _LAYERS._replace(change="Liger"),
    "packed, layers compiled, flash-attn 2": _LAYERS._replace(attention="flash_attention_2"),
    "packed, one size": Way(layout="one size"),
    "padded, compiled": Way(layout="padded", compiled="model"),
    "packed, flex": Way(attention="flex_attention"),
}
LATE = tuple(CONTENDERS)[-6:]  # which compile long, or tell least
HEADS = {"8 x 64": (8, 64), "4 x 128": (4, 128)}  # of the attention that is timed alone


def run(arguments: list[str]) -> None:
    """Measure the parts in turn, and write them as JSON after each row."""
    _Run(parsed(arguments)).all()


def parsed(arguments: list[str]) -> argparse.Namespace:
    """Parse the arguments of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no new row is begun")
    parser.add_argument("--out", default="gpu_out", help="folder for the figures")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="cuda where there is one")
    parser.add_argument("--h5ad", help="file of counts; .data/pbmc_ifnb.h5ad where there is one, else made cells")
    return parser.parse_args(arguments)


class _Run:
    """One run: its data, its clock and its figures."""

    def __init__(self, args: argparse.Namespace):
        self.ends = time.monotonic() + 60 * args.minutes
        self.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.on_gpu = self.device == "cuda"
        self.shapes = SHAPES if self.on_gpu else CPU_SHAPES
        self.n_tokens = TOKENS if self.on_gpu else CPU_TOKENS
        self.n_batches = N_BATCHES if self.on_gpu else CPU_BATCHES
        self.compiler = "inductor" if self.on_gpu else "aot_eager"
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        default = Path(".data/pbmc_ifnb.h5ad")
        self.h5ad = args.h5ad or (str(default) if default.exists() else None)
        name = torch.cuda.get_device_name() if self.on_gpu else "cpu"
        self.peak = BF16_PEAKS.get(name)
        self.figures: dict[str, Any] = {
            "device": name,
            "cells": Path(self.h5ad).name if self.h5ad else f"made, median {LENGTH_MEDIAN} genes",
            "tokens a batch": self.n_tokens,
            "date": time.strftime("%Y-%m-%d"),
            "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
            "steps": [],
        }

    def all(self) -> None:
        """Run the parts, the most telling first."""
        with tempfile.TemporaryDirectory() as folder:
            self.prepare(Path(folder))
            small, *larger = self.shapes
            first = [name for name in CONTENDERS if name not in LATE]
            self.part("attention", self.attention)
            self.part("waits", self.waits, small)
            for name in first:
                self.step(small, "mix", name)
            self.part("profile", self.profile, small)
            self.part("loader", self.loader, Path(folder), small)
            for size, mix in [(small, "1,024"), *((size, "mix") for size in larger)]:
                for name in first if self.on_gpu else first[:1]:  # on a CPU, their lines have run
                    self.step(size, mix, name)
            for name in LATE:
                self.step(small, "mix", name)
        print(f"written to {self.out / 'benchmark_gpu.json'}")

    # ------------------------------------------------------------------ data

    def prepare(self, folder: Path) -> None:
        """Make the stores, the tokenizers and the batches."""
        from stformer_hf import CellStore, GeneTokenizer, estimate_gene_medians

        self.tokenizers, self.rows, self.stores = {}, {}, {}
        longest = 2048 if self.on_gpu else 256
        mixes = ("mix", self.h5ad or self.made_cells(LENGTH_MEDIAN), longest), ("1,024", None, longest // 2)
        for mix, cells, longest in mixes:
            cells = self.made_cells(2_000) if cells is None else cells
            store = self.stores[mix] = CellStore.build(folder / mix, cells)
            self.tokenizers[mix] = GeneTokenizer.from_store(
                store, "rank", medians=estimate_gene_medians(store), max_length=longest
            )
            self.rows[mix] = np.random.default_rng(0).permutation(np.flatnonzero(store.lengths))

    def made_cells(self, median: int) -> AnnData:
        """Return made cells; on a CPU few of them, of few genes."""
        return _made_cells(2_000, median) if self.on_gpu else _made_cells(60, median)[:, :CPU_GENES].copy()

    def batches(self, mix: str, layout: str) -> tuple[list[dict], list[np.ndarray]]:
        """Return batches of about as many tokens, the same cells for all, and the lengths of their cells."""
        from stformer_hf.batches.collators import DataCollatorForGeneRankMLM

        store, tokenizer, made, lengths, at = self.stores[mix], self.tokenizers[mix], [], [], 0
        special = tokenizer.add_cls + tokenizer.add_eos
        n_tokens = np.minimum(store.lengths + special, tokenizer.max_length)
        n_cells = int(1.5 * self.n_tokens / n_tokens[self.rows[mix]].mean())  # as the trainer has it
        collate = DataCollatorForGeneRankMLM(
            tokenizer,
            mlm_probability=MASKED,
            packing=layout != "padded",
            pad_packed_to=(self.n_tokens, n_cells) if layout == "one size" else None,
        )
        torch.manual_seed(0)  # of the masks
        for _ in range(self.n_batches):
            sums = np.cumsum(n_tokens[self.rows[mix][at : at + n_cells]])
            n = max(1, int(np.searchsorted(sums, self.n_tokens, side="right")))
            batch = dict(collate(store.__getitems__(self.rows[mix][at : at + n].tolist())))
            lengths.append(_lengths(batch))
            made.append({k: v.to(self.device) if torch.is_tensor(v) else v for k, v in batch.items()})
            at = (at + n) % max(1, len(self.rows[mix]) - 2 * n)
        return made, lengths

    def model(self, size: str, mix: str, way: Way) -> PreTrainedModel:
        """Return the model of a way, on the device."""
        tokenizer, (layers, heads, hidden, *rest) = self.tokenizers[mix], self.shapes[size]
        if way.change == "heads of 128":
            heads = max(1, hidden // 128)
        torch.manual_seed(0)
        net = make_model(
            way.model,
            (layers, heads, hidden, *rest),
            len(tokenizer),
            tokenizer.type_vocab_size,
            tokenizer.pad_token_id,
            attention=way.attention,
        )
        if way.change == "half norms":
            norms_in_half_precision(net)
        if way.change == "Liger":
            fuse_loss(net)
        return net.to(self.device).train()

    # ------------------------------------------------------------------ parts

    def part(self, name: str, work: Callable[..., Any], *arguments: Any) -> None:
        """Run a part if there is time, keep what it gives, or what went wrong, and write all."""
        if time.monotonic() > self.ends:
            print(f"no time left for {name}", flush=True)
            return
        try:
            with limited(LIMIT):
                found = work(*arguments)
        except Exception:  # a part that fails must not cost the others; its error is a result
            found = {"failed": traceback.format_exc()[-3000:]}
        if name == "steps":
            self.figures["steps"].append(found)
        else:
            self.figures[name] = found
        print(f"{name}: {json.dumps(found)[:1500]}", flush=True)
        (self.out / "benchmark_gpu.json").write_text(json.dumps(self.figures, indent=1))
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def step(self, size: str, mix: str, name: str) -> None:
        """Time the steps of one contender."""

        def work() -> dict:
            row, way = {"size": size, "cells": mix, "way": name}, CONTENDERS[name]
            if lacks := missing(way.attention, self.on_gpu) or missing(way.change, self.on_gpu):
                return {**row, "skipped": lacks}
            try:
                with packed_attention_by(way.change):
                    return {**row, **self.timed_step(size, mix, way)}
            except Exception:
                return {**row, "failed": traceback.format_exc()[-1500:]}

        self.part("steps", work)

    def attention(self) -> dict[str, dict]:
        """Time the attention of one layer alone, forward and with backward, by each kernel that is there."""
        batches, lengths = self.batches("mix", "packed")
        n_tokens, given = lengths[0], batches[0]
        packing = {key: given[key] for key in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")}
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        found: dict[str, dict] = {}
        for heads, (n_heads, head_dim) in HEADS.items():
            torch.manual_seed(0)
            shape = (3, 1, int(n_tokens.sum()), n_heads, head_dim)  # in memory, as the layers have them
            states = torch.randn(shape, device=self.device, dtype=dtype, requires_grad=True)
            flops = 4 * n_heads * head_dim * (n_tokens.astype(float) ** 2).sum()
            expected = None
            for kernel, attend in attention_kernels(self.on_gpu).items():
                try:
                    speeds, out = self.attention_speeds(functools.partial(attend, **packing), states, flops)
                    expected = out if expected is None else expected
                    found[f"{kernel}, {heads}"] = {**speeds, "difference": float((out - expected).abs().max())}
                except Exception:  # such as a kernel that does not support these heads
                    found[f"{kernel}, {heads}"] = {"failed": traceback.format_exc()[-1000:]}
        return found

    def attention_speeds(
        self, attend: Callable[..., torch.Tensor], states: torch.Tensor, flops: float
    ) -> tuple[dict[str, float], torch.Tensor]:
        """Return TFLOP/s of an attention of queries, keys and values, and what it returns."""

        def both() -> None:
            attend(*states.transpose(2, 3)).sum().backward()

        with torch.no_grad():
            out = attend(*states.transpose(2, 3))
            forward = self.seconds(lambda: attend(*states.transpose(2, 3)))
        return {
            "forward_tflops": round(flops / forward / 1e12, 3),
            "both_tflops": round(3 * flops / self.seconds(both) / 1e12, 3),
        }, out

    def seconds(self, work: Callable[[], Any]) -> float:
        """Return the seconds of a call, the mean of ten after a first one."""
        work()
        self.wait()
        began = time.perf_counter()
        for _ in range(10):
            work()
        self.wait()
        return (time.perf_counter() - began) / 10

    def ready(
        self, size: str, mix: str, way: Way
    ) -> tuple[list[dict], list[np.ndarray], PreTrainedModel, Callable[[dict], None]]:
        """Return batches, the lengths of their cells, a model, and a function that makes a step on a batch."""
        batches, lengths = self.batches(mix, way.layout)
        if way.model.startswith("modernbert"):
            for batch in batches:
                del batch["token_type_ids"]
        net = self.model(size, mix, way)
        torch._dynamo.reset()
        counters.clear()
        how: dict[str, bool] = {"dynamic": True}
        if way.layout == "one size":  # torch cannot trace all kernels
            how = {"dynamic": False, "fullgraph": way.attention == "sdpa" and way.change != "cuDNN"}
        if way.compiled == "layers":  # one graph for all but the last, which is computed for fewer tokens
            for layer in net.base_model.layers:
                layer.compile(backend=self.compiler, **how)
        whole = torch.compile(net, backend=self.compiler, **how) if way.compiled == "model" else net
        return batches, lengths, net, self.stepper(whole, net)

    def timed_step(self, size: str, mix: str, way: Way) -> dict:
        """Time steps after warming up: each batch at least twice, and on a GPU three seconds."""
        batches, lengths, net, step = self.ready(size, mix, way)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        for batch in batches:
            step(batch)
        self.wait()
        warming = time.perf_counter() - began
        began, done = time.perf_counter(), 0
        while done < 2 * len(batches) or (time.perf_counter() - began < 3 and self.on_gpu):
            for batch in batches:
                step(batch)
            done += len(batches)
            self.wait()
        seconds = (time.perf_counter() - began) / done * len(batches)
        flat = np.concatenate(lengths)
        found = {
            "tokens_per_second": round(flat.sum() / seconds),
            "cells_per_second": round(len(flat) / seconds, 1),
            "ms_a_step": round(1e3 * seconds / len(batches), 1),
            "warming_seconds": round(warming, 1),
            "padding": round(1 - flat.sum() / sum(batch["input_ids"].numel() for batch in batches), 3),
        }
        if self.on_gpu:
            found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        if way.compiled:
            found["graphs"] = counters["stats"]["unique_graphs"]
        if self.peak:
            flops = useful_flops(flat, net.config.vocab_size, self.shapes[size])
            found["mfu"] = round(flops / seconds / self.peak, 4)
        return found

    def stepper(self, net: torch.nn.Module, owner: torch.nn.Module) -> Callable[[dict], None]:
        """Return a function that makes a training step on a batch."""
        optimizer = torch.optim.AdamW(owner.parameters(), 1e-4, fused=True)

        def step(batch: dict) -> None:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.on_gpu):
                loss = net(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def wait(self) -> None:
        """Wait until the GPU has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def waits(self, size: str) -> dict:
        """Count where a packed step waits for the GPU, by the lines of the package that do."""
        return {layout: self.waits_of(size, layout) for layout in ("packed", "one size")}

    def waits_of(self, size: str, layout: str) -> dict[str, int]:
        """Count the waits of a step, by line; a CPU has none."""
        batches, _, _, step = self.ready(size, "mix", Way(layout=layout))
        step(batches[0])
        if not self.on_gpu:
            return {}
        torch.cuda.set_sync_debug_mode("warn")
        found: Counter[str] = Counter()

        def note(message: Warning | str, *_: Any, **__: Any) -> None:
            ours = [frame for frame in traceback.extract_stack() if "stformer_hf/" in frame.filename]
            line = f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {ours[-1].line}" if ours else "elsewhere"
            found[line] += 1

        shown, warnings.showwarning = warnings.showwarning, note
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always")
                warnings.showwarning = note
                step(batches[1])
        finally:
            warnings.showwarning = shown
            torch.cuda.set_sync_debug_mode("default")
        return dict(found)

    def profile(self, size: str) -> dict:
        """Return the kernels that a step spends its time in, as shares of all, packed and compiled."""
        from torch.profiler import ProfilerActivity, profile

        found = {}
        for number, name in enumerate(("packed", "packed, layers compiled")):
            batches, _, _, step = self.ready(size, "mix", CONTENDERS[name])
            for batch in batches:
                step(batch)
            self.wait()
            with profile(activities=[ProfilerActivity.CUDA if self.on_gpu else ProfilerActivity.CPU]) as profiler:
                for batch in batches[:3]:
                    step(batch)
                self.wait()
            by = "self_device_time_total" if self.on_gpu else "self_cpu_time_total"
            averages = profiler.key_averages()
            table = averages.table(sort_by=by, row_limit=60, max_name_column_width=100)
            (self.out / f"profile_{number}.txt").write_text(f"{name}\n{table}")
            events = sorted(averages, key=lambda event: -getattr(event, by))
            total = sum(getattr(event, by) for event in events) or 1
            found[name] = {event.key[:100]: round(getattr(event, by) / total, 3) for event in events[:20]}
        return found

    def loader(self, folder: Path, size: str) -> dict:
        """Train through the trainer, cells tokenized on the way, with workers and without."""
        from transformers import TrainingArguments

        from stformer_hf import STFormerPretrainer

        found = {}
        ways = [(2, False, False), (0, True, False)]
        if self.on_gpu:
            ways = [(8, True, False), (8, False, False), (8, False, True), (4, False, False), (0, False, False)]
        for n_workers, compiled, waits in ways:
            torch._dynamo.reset()
            counters.clear()
            net = self.model(size, "mix", Way())
            settings = TrainingArguments(
                str(folder / f"run-{n_workers}-{compiled}-{waits}"),
                max_steps=60 if self.on_gpu else 4,
                logging_steps=20 if self.on_gpu else 2,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                bf16=self.on_gpu,
                use_cpu=not self.on_gpu,
                dataloader_num_workers=n_workers,
                dataloader_pin_memory=self.on_gpu,
                optim="adamw_torch_fused",
                logging_nan_inf_filter=waits,  # for the loss of each step
                torch_compile=compiled,
                torch_compile_backend=self.compiler if compiled else None,
            )
            trainer = STFormerPretrainer(
                settings,
                self.stores["mix"],
                model=net,
                processing_class=self.tokenizers["mix"],
                max_tokens_per_batch=self.n_tokens,
                packing=True,
            )
            trainer.train()
            last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
            kept = ("tokens_per_second", "cells_per_second", "data_wait_share", "mfu", "padding_share")
            way = f"{n_workers} workers" + ", compiled" * compiled + ", waiting for losses" * waits
            found[way] = {key: last[key] for key in kept if key in last}
            if compiled:
                found[way]["graphs"] = counters["stats"]["unique_graphs"]
            del trainer, net
        return found


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in the context after so many seconds."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"It took longer than {seconds} s.")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _lengths(batch: dict) -> np.ndarray:
    """Return the tokens of each cell."""
    if "cu_seq_lens_q" in batch:
        return batch["cu_seq_lens_q"].diff()[: batch["seq_idx"].max() + 1].numpy()  # without the dead tokens
    return batch["attention_mask"].sum(1).numpy()
