"""Export a classifier or an encoder to ONNX, and compare it with torch.

stformer-hf export --model classifier --output exported --int8
stformer-hf export --model classifier --output exported --data cells.h5ad
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .arguments import flag, parse


@dataclass
class ExportArguments:
    """Flags of `export`."""

    model: str = flag("checkpoint or adapter; for models that are not classifiers, the encoder is exported")
    output: str = flag("folder for the exported model and its tokenizer")
    format: Literal["onnx"] = flag("format", "onnx")
    int8: bool = flag("also write a file whose matrix products are in int8", False)
    data: str | None = flag("cells on which to compare it with torch (default: random ones)", None)
    layer: str | None = flag("location of the counts in --data: X, raw or a layer", None)
    overwrite: bool = flag("replace files in the folder", False)


def main(argv: list[str]) -> None:
    """Parse and run."""
    args = parse(argv, ExportArguments)
    from .files import writing

    with writing(args.output):
        settings = run(args)
    for file, compared in settings["comparison"].items():
        labels = f", {compared['same_labels']:.1%} the same label" if "same_labels" in compared else ""
        size = (Path(args.output) / file).stat().st_size / 2**20
        print(
            f"{args.output}/{file} ({size:.1f} MiB): {compared['cells']} cells compared with torch, outputs differ by "
            f"up to {compared['max_abs_difference']:.2g}{labels}"
        )


def run(args: ExportArguments) -> dict[str, Any]:
    """Export the model; return the settings."""
    from ..inference.export import export_onnx
    from .files import read

    adata, layer = (None, args.layer) if args.data is None else read(args.data, layer=args.layer)
    return export_onnx(args.model, args.output, adata=adata, int8=args.int8, layer=layer, overwrite=args.overwrite)
