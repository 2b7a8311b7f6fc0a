"""Embed every cell of a file, or its neighbourhood.

stformer-hf embed --data cells.h5ad --model pretrained --output embedded.h5ad
stformer-hf embed --kind neighborhood --data section.h5ad --model model --domains 10 --plot d.png --output out.h5ad
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .arguments import OnCells, changed_flags, check_free, flag, parse

if TYPE_CHECKING:
    from anndata import AnnData

    from ..store.cell_store import CellStore

_KEYS = {"cells": "X_stformer", "neighborhood": "X_neighborhood"}
_OWN = {  # flags of each kind
    "cells": ("dtype", "hidden_layer", "pooling", "with_phenotypes", "min_coverage", "workers", "engine"),
    "neighborhood": (
        *("spatial_key", "section_key", "cell_type_key", "with_cell_type", "patch_size", "k_nearest", "max_num_cells"),
        *("domains", "domain_method", "resolution", "plot"),
    ),
}


@dataclass(kw_only=True)
class EmbedArguments(OnCells):
    """Flags of `embed`."""

    output: str = flag('file to write (.h5ad or .zarr), with obsm["X_stformer"] or obsm["X_neighborhood"]')
    kind: Literal["cells", "neighborhood"] = flag("embed each cell, or the cells around it in its section", "cells")
    hidden_layer: int = flag("cells: hidden state; 0 is the input embeddings, -1 the last layer", -1)
    pooling: Literal["cls", "mean"] | None = flag("cells: cls or mean (default: as the model was trained)", None)
    with_phenotypes: bool = flag("cells: let the model read their phenotypes, which are masked by default", False)
    workers: int = flag("cells of a store: number of processes", 1)
    engine: str = flag("cells of a store: where workers run: local, or ray (on a cluster)", "local")
    spatial_key: str = flag("neighbourhoods: key of the coordinates in obsm", "spatial")
    section_key: str | None = flag(
        "neighbourhoods: column of obs with the section (default: `section`, if present)", None, aliases=["--section"]
    )
    cell_type_key: str | None = flag(
        "neighbourhoods: column of obs with the cell type, for models that use it", None, aliases=["--cell_type"]
    )
    with_cell_type: bool = flag("neighbourhoods: the embedding also uses the type of the cell itself", False)
    patch_size: float | None = flag("neighbourhoods: side of the box around a cell (default: the model's)", None)
    k_nearest: int | None = flag("neighbourhoods: number of nearest neighbours to use (default: the model's)", None)
    max_num_cells: int | None = flag(
        "neighbourhoods: use a random subset of at most this many cells (default: the model's)", None
    )
    domains: int = flag('neighbourhoods: number of k-means domains, written to obs["domain"]; 0: none', 0)
    domain_method: Literal["kmeans", "leiden"] | None = flag(
        "neighbourhoods: clustering of domains; leiden finds their number", None
    )
    resolution: float = flag("neighbourhoods: resolution of leiden (higher: more domains)", 1.0)
    plot: str | None = flag("neighbourhoods: PNG to write, of the sections coloured by domain", None)


def main(argv: list[str]) -> None:
    """Parse and run."""
    args = parse(argv, EmbedArguments)
    from .files import is_first_process, writing

    with writing(args.output):
        adata = run(args)
    if not is_first_process():
        return
    key = _KEYS[args.kind]
    print(f"{args.output}: obsm[{key!r}] {adata.obsm[key].shape}")
    if _wants_domains(args):
        print(adata.obs["domain"].value_counts().to_string())


def run(args: EmbedArguments) -> AnnData:
    """Embed the cells and write the file; return the AnnData."""
    _check(args)
    from .files import read, write

    adata, args.layer = read(args.data, args.output, args.overwrite, args.layer, blockwise=args.kind == "cells")
    found = (_embed_cells if args.kind == "cells" else _embed_neighborhoods)(adata, args)
    adata = adata if found is None else found
    write(adata, args.output)
    return adata


def _embed_cells(adata: AnnData | CellStore, args: EmbedArguments) -> AnnData | None:
    from ..inference.embed import embed
    from .files import several_processes

    options = args.options("kind", *_OWN["neighborhood"])
    return embed(adata, args.model, layer=args.layer, distributed=several_processes(), **options)


def _embed_neighborhoods(adata: AnnData, args: EmbedArguments) -> None:
    from ..sources.read_anndata import section_of
    from ..space.domains import check_domains, spatial_domains
    from ..space.embed_neighborhoods import embed_neighborhoods
    from .files import writing

    method, n_domains = args.domain_method or "kmeans", args.domains or None
    check_domains(method, n_domains)  # before the work
    if args.plot:
        import matplotlib  # noqa: F401

        from ..inference.plots import sections
    section = args.section_key or section_of(adata) or ("section" if "section" in adata.obs else None)
    own = ("kind", "section_key", "domains", "domain_method", "resolution", "plot")
    options = args.options(*own, *_OWN["cells"])
    options = {name: value for name, value in options.items() if value is not None}  # by default, those of the model
    embed_neighborhoods(adata, args.model, section_key=section, layer=args.layer, **options)
    if _wants_domains(args):
        spatial_domains(adata, n_domains, method=method, resolution=args.resolution)
    if args.plot:
        with writing(args.plot):
            sections(adata, "domain", spatial_key=args.spatial_key, section_key=section, save=args.plot)


def _wants_domains(args: EmbedArguments) -> bool:
    return args.domains > 0 or args.domain_method is not None


def _check(args: EmbedArguments) -> None:
    """Refuse flags without effect, and an existing picture."""
    other = next(kind for kind in _OWN if kind != args.kind)
    foreign = changed_flags(args, _OWN[other])
    if foreign:
        raise ValueError(
            f"--kind {args.kind} does not read {', '.join(foreign)}: pass --kind {other}, or leave it out."
        )
    if args.domains < 0:
        raise ValueError(f"--domains {args.domains}: must be a number of domains, or 0 for none.")
    if args.plot and not _wants_domains(args):
        raise ValueError("--plot draws domains: pass --domains N, or --domain_method leiden.")
    if changed_flags(args, ["resolution"]) and args.domain_method != "leiden":
        raise ValueError("--resolution needs --domain_method leiden.")
    if args.plot:
        check_free(args.plot, args.overwrite, "--plot")
