"""Pretrain a CellNeighborhood model to predict the counts of a cell from its type and the cells around it.

stformer-hf pretrain_neighborhood --data section.h5ad --cell_type_key cell_type --patch_size 50 --output model
stformer-hf pretrain_neighborhood --config cell_neighborhood_tiny_cpu --data section.h5ad --output model
accelerate launch -m stformer_hf.cli pretrain_neighborhood --data a.h5ad b.h5ad --patch_size 50 --output model
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import numpy as np

from .arguments import PRETRAINING, check_names, flag, parse_training, some_flags

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from transformers import TrainingArguments

    from ..models.cell_neighborhood.modeling_cell_neighborhood import CellNeighborhoodForMaskedCell
    from ..store.cell_store import CellStore

logger = logging.getLogger(__name__)

TRAINING_DEFAULTS = {**PRETRAINING, "weight_decay": 0.0}
_AXES = ("x", "y", "z")
_SECTION = "section"
_ONE_TYPE = "cell"


@dataclass
class PretrainNeighborhoodArguments:
    """Flags of `pretrain_neighborhood`."""

    data: list[str] = flag(
        "h5ad files of sections (built into a store in OUTPUT/store); or such a store, with x and y in obs"
    )
    output: str = flag("folder for the checkpoint")
    patch_size: float | None = flag("side of the box around a cell, in the units of the coordinates", None)
    shape: Literal["box", "disc"] = flag("a disc has diameter patch_size", "box")
    k_nearest: int | None = flag("number of nearest neighbours to use", None)
    max_num_cells: int | None = flag("use at most this many neighbours, a random subset drawn in each epoch", None)
    min_neighbors: int = flag("cells with fewer neighbours are excluded from training", 0)
    spatial_key: str = flag("key of the coordinates in obsm, 2-D or 3-D", "spatial")
    section_key: str | None = flag(
        "column of obs with sections (default: `section`, if present); cells of different sections are not neighbours",
        None,
        aliases=["--section"],
    )
    cell_type_key: str | None = flag(
        "column of obs with cell types; cells without one are left out (default: one type)",
        None,
        aliases=["--cell_type"],
    )
    layer: str | None = None
    held_out: float = 0.1
    held_out_by: Literal["region", "cell"] = flag(
        "region: one end of each section, along its longer axis; cell: cells at random", "region"
    )
    held_out_sections: list[str] | None = flag(
        "sections held out for evaluation, instead of a share of the cells", None
    )
    neighbors_from: Literal["all", "indices"] = flag(
        "indices: exclude held-out cells from training neighbourhoods; all: include them", "indices"
    )
    size: str = flag("tiny or base", "tiny")
    model_config: dict | None = flag(
        "fields of CellNeighborhoodConfig, such as '{likelihood: nb}', that override the size", None
    )
    baselines: bool = flag("compute baselines: the means of the cell type and of the neighbours", False)
    overwrite: bool = flag("replace an existing model in OUTPUT", False)


def main(argv: list[str]) -> None:
    """Parse and run."""
    args, training = parse_training(argv, PretrainNeighborhoodArguments, TRAINING_DEFAULTS)
    from .runs import run_and_print

    run_and_print(args.output, lambda: run(args, training))


def run(args: PretrainNeighborhoodArguments, training: dict) -> dict[str, float]:
    """Pretrain and save; return the metrics of the run."""
    from transformers import set_seed

    from ..models.cell_neighborhood.configuration_cell_neighborhood import CellNeighborhoodConfig
    from ..models.cell_neighborhood.modeling_cell_neighborhood import CellNeighborhoodForMaskedCell
    from ..space.center_mask_sampler import CenterMaskSampler
    from ..space.neighborhood_baselines import gene_moments
    from ..space.neighborhood_trainer import NeighborhoodTrainer
    from .runs import finish, removing_store, training_arguments

    check_names("model_config", args.model_config, [option.name for option in fields(CellNeighborhoodConfig)])
    neighborhood = some_flags(args, "patch_size", "shape", "k_nearest", "max_num_cells")
    arguments = training_arguments(Path(args.output), training, args.overwrite)
    with removing_store(arguments):
        cells = open_sections(args, arguments)
        held_out = choose_held_out(args, cells.metadata, arguments.seed)
        cells, held_out = _without_unseen_types(*_without_twins(cells, held_out))
        options = {
            "metadata": cells.metadata,
            "adata": cells.store,
            "tissue_section_colname": "section",
            "z": "z" if "z" in cells.metadata else None,
            "seed": arguments.seed,
            "patch_size": None,
            **neighborhood,
        }
        train = CenterMaskSampler(
            indices=~held_out, neighbors_from=args.neighbors_from, min_neighbors=args.min_neighbors, **options
        )
        evaluated = CenterMaskSampler(indices=held_out, **options) if held_out.any() else None
    if evaluated is None:
        arguments.eval_strategy = "no"
    config = CellNeighborhoodConfig.from_size(
        args.size,
        **{
            "n_genes": train.n_genes,
            "n_cell_types": len(cells.cell_types),
            "gene_ids": [str(gene) for gene in cells.store.gene_ids],
            "cell_types": cells.cell_types,
            "neighborhood": neighborhood,
            "section_key": args.section_key or (_SECTION if _SECTION in cells.store.obs else None),
            **(args.model_config or {}),
        },
    )
    set_seed(arguments.seed)
    model = CellNeighborhoodForMaskedCell(config)
    _add_types(model, cells.unseen_types)
    model.count_head.start_at(*gene_moments(train, seed=arguments.seed))
    trainer = NeighborhoodTrainer(
        arguments, train, model=model, eval_dataset=evaluated, baselines=args.baselines and evaluated is not None
    )
    which = f"{args.held_out:.0%} of the cells, by {args.held_out_by}"
    if args.held_out_sections:
        which = f"sections {', '.join(args.held_out_sections)}"
    return finish(trainer, card={"store": cells.store, "settings": {**neighborhood, "held out": which}})


class Sections(NamedTuple):
    """Cells of tissue sections."""

    store: CellStore
    metadata: pd.DataFrame  # of cells with a type: `cell_label`, `x`, `y` (and `z`), `section`, `cell_type` (codes)
    cell_types: list[str]  # names of the codes
    unseen_types: tuple[str, ...] = ()  # types of these sections that no training cell has


def open_sections(args: PretrainNeighborhoodArguments, arguments: TrainingArguments) -> Sections:
    """Open the store of the cells, or build one with their coordinates."""
    import pandas as pd

    from .runs import is_store, open_cells

    columns = [*_AXES, args.section_key or _SECTION, *([] if args.cell_type_key is None else [args.cell_type_key])]
    sources: list[Any] = list(args.data)
    layer = args.layer
    if not is_store(args.data):
        placed, layer = _with_places(args)
        sources = list(placed)
        columns = [name for name in columns if name in placed[0].obs]
    store = open_cells(sources, arguments, columns, layer, args.overwrite)
    fewest = min((source["n_genes"] for source in store.manifest["sources"]), default=store.manifest["n_genes"])
    if fewest < store.manifest["n_genes"]:
        logger.warning(
            f"Sources measure different genes, one only {fewest} of {store.manifest['n_genes']}. Missing genes "
            "count as 0, which a model takes for biology: consider keeping only the genes that all sources measure."
        )
    obs = store.obs
    wanted = [*_AXES[:2], *(name for name in (args.section_key, args.cell_type_key) if name is not None)]
    missing = [name for name in wanted if name not in obs]
    if missing:
        raise ValueError(f"The store has no obs column {missing[0]!r}; it has {', '.join(map(repr, obs)) or 'none'}.")
    section = args.section_key or (_SECTION if _SECTION in obs else None)
    types = pd.Categorical([_ONE_TYPE] * len(obs) if args.cell_type_key is None else obs[args.cell_type_key])
    types = types.remove_unused_categories()
    metadata = pd.DataFrame(
        {
            "cell_label": obs.index,
            **{axis: obs[axis].to_numpy() for axis in _AXES if axis in obs},
            "section": ["all"] * len(obs) if section is None else obs[section].astype(object).to_numpy(),
            "cell_type": types.codes.astype("int64"),
        }
    )
    typed = (types.codes >= 0) & (store.lengths > 0)
    if not typed.any():
        raise ValueError(f"No cell has counts and a type in obs[{args.cell_type_key!r}].")
    where = [axis for axis in _AXES if axis in metadata]
    lost = typed & ~np.isfinite(metadata[where].to_numpy(np.float64)).all(axis=1)
    if lost.any():
        raise ValueError(
            f"{lost.sum()} of {len(lost)} cells have no finite coordinates (obsm[{args.spatial_key!r}] of files, "
            f"{' and '.join(where)} in obs of a store), such as {metadata['cell_label'][lost.argmax()]}: remove them "
            "first."
        )
    if not typed.all():
        logger.warning(f"{(~typed).sum()} of {len(typed)} cells have no counts or no type and are left out.")
    return Sections(store, metadata[typed].reset_index(drop=True), [str(name) for name in types.categories])


def _without_twins(cells: Sections, held_out: np.ndarray) -> tuple[Sections, np.ndarray]:
    """Leave out the training cells that are held out too: of equal barcode and counts (see `CellStore.twins`)."""
    from ..space.spatial_metadata import match_cells

    rows = match_cells(cells.metadata["cell_label"], cells.store.obs_names, "cell_label")
    twins = cells.store.select(rows).twins()
    seen = ~held_out & np.isin(twins, twins[held_out])
    if not seen.any():
        return cells, held_out
    logger.warning(f"{seen.sum()} training cells are held out too, and are left out of training.")
    if (seen | held_out).all():
        raise ValueError("All training cells are held out too: none is left to train on.")
    return cells._replace(metadata=cells.metadata[~seen].reset_index(drop=True)), held_out[~seen]


def _without_unseen_types(cells: Sections, held_out: np.ndarray) -> tuple[Sections, np.ndarray]:
    """Leave out held-out cells of types that no training cell has, which cannot be evaluated."""
    types = cells.metadata["cell_type"].to_numpy()
    seen = np.unique(types[~held_out])
    known = np.isin(types, seen)
    unseen = tuple(name for code, name in enumerate(cells.cell_types) if code not in seen)
    if not known.all():
        logger.warning(
            f"{(~known).sum()} held-out cells are not evaluated: no training cell has their types, such as "
            f"{', '.join(cells.cell_types[code] for code in np.unique(types[~known])[:3])}. To embed cells, the model "
            "treats these types like the mean of the others."
        )
    metadata = cells.metadata[known].reset_index(drop=True)
    metadata["cell_type"] = np.searchsorted(seen, types[known])
    return Sections(cells.store, metadata, [cells.cell_types[code] for code in seen], unseen), held_out[known]


def _add_types(model: CellNeighborhoodForMaskedCell, names: Sequence[str]) -> None:
    """Add types that no training cell has to a new model; no other weight depends on them."""
    import torch

    table = cast("torch.nn.Embedding", model.get_input_embeddings())
    known = table.weight.detach()
    table.weight = torch.nn.Parameter(torch.cat([known, known.mean(dim=0).expand(len(names), -1)]))
    table.num_embeddings += len(names)
    model.config.n_cell_types += len(names)
    model.config.cell_types = [*(model.config.cell_types or ()), *names]


def _with_places(args: PretrainNeighborhoodArguments) -> tuple[list[AnnData], str | None]:
    """Open files with the coordinates and section of each cell in obs; return them and the layer to read."""
    import pandas as pd

    from ..genes.text_files import naming
    from ..genes.wrong_names import must_have
    from ..sources.read_anndata import is_anndata_file, read_anndata, section_of
    from ..space.spatial_metadata import warn_of_sections
    from .runs import one_layer

    paths = [Path(path) for path in args.data]
    names = [path.stem for path in paths]
    if len(set(names)) < len(names):  # such as sample1/adata.h5ad and sample2/adata.h5ad
        names = [str(path.with_suffix("")) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"{', '.join(args.data)}: a file is repeated.")
    files, layers, section = [], [], args.section_key or _SECTION
    for path, file in zip(paths, names, strict=True):
        if not is_anndata_file(path):
            raise ValueError(f"{path} is not a file of cells with coordinates (.h5ad, .h5mu or .zarr) or a store.")
        adata, layer = read_anndata(path, args.layer, backed=True)
        layers.append(layer)
        with naming(path):
            must_have(adata.obsm, "obsm", args.spatial_key)
            must_have(adata.obs, "obs", args.section_key)
            must_have(adata.obs, "obs", args.cell_type_key, " If the cells have no types: --cell_type_key null.")
        places = np.asarray(adata.obsm[args.spatial_key], np.float64)  # of cells that are left out, they may be NaN
        if places.ndim != 2 or places.shape[1] not in (2, 3):
            raise ValueError(f"{path}: obsm[{args.spatial_key!r}] has the shape {places.shape}, not 2 or 3 columns.")
        others = adata.obs.drop(columns=[axis for axis in _AXES if axis in adata.obs])  # a column z may hold anything
        adata.obs = others.assign(**dict(zip(_AXES, places.T, strict=False)))
        region = None if args.section_key else section_of(adata)
        if region is None and section not in adata.obs:
            warn_of_sections(adata.obs)
        if region is not None:
            adata.obs[section] = adata.obs[region]
        own = adata.obs[section] if section in adata.obs else pd.Series("", adata.obs_names)
        if own.isna().any():
            raise ValueError(f"{path}: {own.isna().sum()} of {len(own)} cells have no section in obs[{section!r}].")
        if len(paths) > 1:
            adata.obs[section] = pd.Categorical([f"{file}:{name}".rstrip(":") for name in own])
        files.append(adata)
    if len({"z" in adata.obs for adata in files}) > 1:
        raise ValueError(f"Some files have 2 and others 3 columns of coordinates in obsm[{args.spatial_key!r}].")
    cells = pd.Index([name for adata in files for name in adata.obs_names])
    if len(paths) > 1 and not cells.is_unique:  # files share barcodes
        for adata, file in zip(files, names, strict=True):
            adata.obs_names = [f"{file}:{name}" for name in adata.obs_names]
    return files, one_layer(layers, args.layer)


def choose_held_out(args: PretrainNeighborhoodArguments, metadata: pd.DataFrame, seed: int) -> np.ndarray:
    """Choose the held-out cells: bool array (n_cells,)."""
    if not 0 <= args.held_out < 1:
        raise ValueError(f"held_out must be a share of the cells, at least 0 and below 1; got {args.held_out}.")
    sections = metadata["section"].astype(str).to_numpy()
    held_out = np.zeros(len(metadata), bool)
    if args.held_out_sections is not None:
        unknown = sorted(set(args.held_out_sections) - set(sections))
        if unknown:
            there = ", ".join(map(repr, np.unique(sections)[:10]))
            raise ValueError(f"held_out_sections: there is no section {unknown[0]!r}; sections are {there}.")
        held_out = np.isin(sections, args.held_out_sections)
    elif args.held_out_by == "cell":
        chosen = np.random.default_rng(seed).permutation(len(metadata))[: math.ceil(args.held_out * len(metadata))]
        held_out[chosen] = True
    else:
        places = metadata[[axis for axis in _AXES if axis in metadata]].to_numpy()
        for section in np.unique(sections):
            rows = np.flatnonzero(sections == section)
            along = places[rows, np.ptp(places[rows], axis=0).argmax()]
            n_held_out = min(math.ceil(args.held_out * len(rows)), len(rows) - 1)
            held_out[rows[np.argsort(along, kind="stable")[len(rows) - n_held_out :]]] = True
    if args.held_out and not held_out.any():
        logger.warning("No cell is held out: each section has only one cell.")
    if held_out.all():
        raise ValueError("All cells are held out: none is left to train on.")
    return held_out
