"""Print what affects a run on this machine: versions, devices, threads, attention, missing extras.

stformer-hf doctor
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

from .. import __version__
from .arguments import parse
from .info import print_facts

_PACKAGES = ("torch", "transformers", "datasets", "accelerate", "anndata", "numpy", "scipy", "pandas", "scikit-learn")
# Extra of this package -> the modules that it installs, and what they are for.
EXTRAS = {
    "plots": (("matplotlib", "scanpy", "leidenalg"), "plots, UMAP, Leiden clusters"),
    "search": (("optuna",), "stformer-hf search"),
    "ray": (("ray",), "search, and preparation of data, on several machines"),
    "flash": (("flash_attn",), "flash attention on a GPU"),
    "kernels": (("kernels",), "flash attention from the Hub, without compiling it"),
    "liger": (("liger_kernel",), "use_liger_kernel on a GPU"),
    "faiss": (("faiss",), "map --approximate"),
    "lora": (("peft",), "finetune --lora, and adapters instead of checkpoints"),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "stformer-hf export"),
    "scib": (("scib_metrics",), "integration metrics of stformer-hf evaluate"),
    "scvi": (("scvi",), "scVI as a baseline of stformer-hf evaluate"),
    "soma": (("tiledbsoma",), "experiments of TileDB-SOMA as input"),
    "spatialdata": (("spatialdata",), "SpatialData as input"),
}


@dataclass
class DoctorArguments:
    """Flags of `doctor`: none."""


def main(argv: list[str]) -> None:
    """Parse and run."""
    parse(argv, DoctorArguments)
    print_facts(run())


def run() -> dict[str, Any]:
    """Return the facts about this machine and installation, by name."""
    import torch

    from ..models.gene_bert.pretrained_gene_bert import best_attention

    facts: dict[str, Any] = {
        "stformer_hf": __version__,
        "python": f"{platform.python_version()}, {platform.platform()}",
    }
    facts |= {name: _version(name) for name in _PACKAGES} | {"torch": torch.__version__}  # with its CUDA
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    facts["processors"] = f"{os.cpu_count()}, of which {usable} may be used"
    threads = os.environ.get("OMP_NUM_THREADS")
    facts["torch threads"] = f"{torch.get_num_threads()} (OMP_NUM_THREADS is {threads or 'not set'})"
    facts["GPU"] = _gpus() or "none: models run on the CPU"
    if torch.cuda.is_available():
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
        facts["bfloat16"] = "yes" if is_fast else "no: use float16 or float32"
    chosen = []
    for weights, dtype, dropout in (
        ("float32", torch.float32, 0.0),
        ("bfloat16", torch.bfloat16, 0.0),
        ("bfloat16 with attention dropout", torch.bfloat16, 0.1),
    ):
        name, reason = best_attention(dtype, dropout)
        chosen.append(f"{name} for {weights} ({reason})")
    facts["attention"] = '"auto" takes ' + ", ".join(chosen)
    for extra, (modules, purpose) in EXTRAS.items():
        missing = [name for name in modules if find_spec(name) is None]
        if missing:
            facts[f"extra {extra}"] = f"missing {', '.join(missing)}: for {purpose}"
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def _gpus() -> str:
    import torch

    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found.append(f"cuda:{number} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        found.append("mps")
    return "; ".join(found)
