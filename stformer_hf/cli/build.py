"""Make a CellStore from h5ad files.

stformer-hf build --data a.h5ad b.h5ad --output atlas --obs cell_type donor
"""

from __future__ import annotations

from dataclasses import dataclass, field

from .arguments import parse


@dataclass
class BuildArguments:
    """Flags of `build`."""

    data: list[str] = field(metadata={"help": "h5ad files, in the order that the cells shall have"})
    output: str = field(metadata={"help": "folder to make"})
    obs: list[str] | None = field(default=None, metadata={"help": "columns of obs to keep"})
    layer: str | None = field(default=None, metadata={"help": "where the counts are: X, raw or a layer"})
    fractional: bool = field(default=False, metadata={"help": "allow fractions (RSEM, SoupX)"})
    overwrite: bool = field(default=False, metadata={"help": "replace a store that is there"})


def main(argv: list[str]) -> None:
    """Parse and run."""
    args, _ = parse(argv, BuildArguments, verb="build", description=__doc__)
    print(run(args))


def run(args: BuildArguments):
    """Build the store; returns it."""
    from ..data.cell_store import CellStore

    return CellStore.build(
        args.output,
        args.data,
        obs=args.obs,
        layer=args.layer,
        fractional=args.fractional,
        overwrite=args.overwrite,
    )
