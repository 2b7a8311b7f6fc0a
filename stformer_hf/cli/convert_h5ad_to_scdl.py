"""Convert all h5ad files of a folder and its subfolders to one SingleCellMemMapDataset.

convert_h5ad_to_scdl --data-path hdf5s --save-path example_dataset
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import guarded

if TYPE_CHECKING:
    from ..compat.scdl import SingleCellMemMapDataset


def main(argv: list[str] | None = None) -> int:
    """Parse and run; return the exit status as `stformer_hf.cli.main` does."""
    args = _parser().parse_args(argv)
    return guarded(
        "convert_h5ad_to_scdl",
        lambda: print(run(args)),
        args.debug,
        interrupted="interrupted; run it again to resume with the next file",
    )


def run(args: argparse.Namespace) -> SingleCellMemMapDataset:
    """Convert the files; return the dataset."""
    from ..compat.scdl import SingleCellMemMapDataset
    from ..compat.scdl_building import check_free
    from ..compat.scdl_collection import SingleCellCollection
    from .files import writing

    save_path = Path(args.save_path)
    check_free(save_path, "Choose another --save-path, or delete it.")
    # Kept if a file cannot be converted, so that the others need not be converted again.
    parts = save_path.with_name(f".{save_path.name}.parts")
    with writing(parts):
        collection = SingleCellCollection(parts)
        collection.load_h5ad_multi(
            args.data_path,
            max_workers=args.num_workers,
            use_processes=args.use_mp or args.num_workers > 1,
            paginated_load_cutoff=args.paginated_load_cutoff,
            load_block_row_size=args.load_block_row_size,
            data_dtype=args.data_dtype,
            use_X_not_raw=args.use_X_not_raw,
        )
        collection.flatten(save_path)
        shutil.rmtree(parts)
    return SingleCellMemMapDataset(save_path, data_dtype=args.data_dtype)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "convert_h5ad_to_scdl", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-path", required=True, help="folder with the h5ad files")
    parser.add_argument("--save-path", required=True, help="folder to create")
    parser.add_argument("--num-workers", type=int, default=1, help="number of files read at a time (default: 1)")
    parser.add_argument("--use-mp", action="store_true", help="read in a separate process even with one worker")
    parser.add_argument(
        "--paginated-load-cutoff", type=int, default=10_000, help="no effect: files are always read in blocks"
    )
    parser.add_argument(
        "--load-block-row-size",
        type=int,
        default=1_000_000,
        help="maximum number of cells in memory at a time; blocks never exceed 2,048 cells",
    )
    parser.add_argument("--data-dtype", help="dtype that all values must fit, such as uint16 (default: float32)")
    parser.add_argument("--use-X-not-raw", action="store_true", help="use X even if a file has a raw matrix")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


if __name__ == "__main__":
    sys.exit(main())
