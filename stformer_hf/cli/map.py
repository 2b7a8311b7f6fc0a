"""Label the cells of a file by their nearest neighbours in a labelled reference.

stformer-hf map --data query.h5ad --reference atlas.h5ad --label_key cell_type --model pretrained --output mapped.h5ad
stformer-hf map --data query.h5ad --reference folder --model pretrained --output mapped.h5ad

--save_reference FOLDER keeps the embedding of the reference, for the next query.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import OnCells, flag, parse

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(kw_only=True)
class MapArguments(OnCells):
    """Flags of `map`."""

    data: str = flag("query: file of cells (h5ad, h5mu, zarr, 10x, loom, …), or a store (path or address)")
    reference: str = flag("file or store of labelled cells, or a folder that --save_reference wrote")
    output: str = flag('file to write (.h5ad or .zarr), with obs["mapped_label"] and obs["mapped_score"]')
    label_key: str | None = flag(
        "column of the reference's obs (a saved reference has its own)", None, aliases=["--label"]
    )
    save_reference: str | None = flag("folder for the reference", None)
    n_neighbors: int = flag("neighbours of each cell", 15)
    approximate: bool = flag("find neighbours with faiss (extra `faiss`), faster for many cells, and not exact", False)
    reject: float | None = flag('nominal share of known cells to label "unknown", such as 0.05 (default: none)', None)


def main(argv: list[str]) -> None:
    """Parse and run."""
    args = parse(argv, MapArguments)
    from .files import is_first_process, writing

    with writing(args.output):
        mapped = run(args).obs["mapped_label"]
    if is_first_process():
        print(mapped.cat.remove_unused_categories().value_counts().to_string())


def run(args: MapArguments) -> AnnData:
    """Map the cells and write the file; return the AnnData."""
    from accelerate import PartialState

    from ..inference.map_to_reference import REFERENCE_FILE, map_to_reference, save_reference
    from .files import is_first_process, read, several_processes, write, writing

    is_folder = (Path(args.reference) / REFERENCE_FILE).is_file()
    if is_folder and args.save_reference:
        raise ValueError(f"{args.reference} is a saved reference already: leave out --save_reference.")
    query, layer = read(args.data, args.output, args.overwrite, args.layer, blockwise=True)
    reference = args.reference if is_folder else read(args.reference, blockwise=True)[0]
    if args.save_reference:
        if args.label_key is None:
            raise ValueError("--save_reference needs --label_key.")
        shared = {name: getattr(args, name) for name in ("fractional", "batch_size", "device", "dtype", "overwrite")}
        if is_first_process():
            with writing(args.save_reference):
                save_reference(reference, args.model, args.save_reference, args.label_key, **shared)
        if several_processes():
            PartialState().wait_for_everyone()
        reference = args.save_reference
    label_key = None if isinstance(reference, str) and not is_folder else args.label_key
    options = args.options("reference", "label_key", "save_reference")
    found = map_to_reference(
        query, reference, args.model, label_key=label_key, layer=layer, **options, distributed=several_processes()
    )
    query = query if found is None else found
    write(query, args.output)
    return query
