"""Encoders for single-cell and spatial transcriptomics, trained and used with Hugging Face Transformers.

Importing the package registers its classes with `AutoConfig`, `AutoTokenizer` and the `AutoModel` family. The public
names are imported on first use:

cells      `CellStore`, `IterableAnnDataset`, `CenterMaskSampler`, `GeneTable`, `estimate_gene_medians`
models     `GeneTokenizer`, `GeneBertConfig`, `GeneBertModel`, `GeneBertForPhenotypicMLM`, `GeneBertForClassification`,
           `CellNeighborhoodConfig`, `CellNeighborhoodForMaskedCell`
training   `STFormerPretrainer`, `CellTrainer`, `NeighborhoodTrainer`, `finetune`, `initialise_from_store`, and the
           collators `DataCollatorForPhenotypicMLM`, `DataCollatorForGeneRankMLM`, `DataCollatorForCellClassification`
use        `embed`, `annotate`, `map_to_reference`, `perturb`, `embed_neighborhoods`, `evaluate_embedding`, and
           `pl` with the plots

The classes and functions of PerturbGene, STFormer, brainformr, AnnDataset and BioNeMo-SCDL can also be imported from
here.
"""

from importlib import import_module
from threading import RLock
from typing import Any

__version__ = "0.1.0"

from . import _moved, _registration

_registration.register()
_moved.register()

_MODULES = {
    # cells and genes
    "store.cell_store": ["CellStore"],
    "batches.iterable_ann_dataset": ["IterableAnnDataset"],
    "space.center_mask_sampler": ["CenterMaskSampler"],
    "genes.gene_table": ["GeneTable"],
    "store.gene_medians": ["estimate_gene_medians"],
    # tokenizer and models
    "models.gene_bert.tokenization_gene_bert": ["GeneTokenizer"],
    "models.gene_bert.configuration_gene_bert": ["GeneBertConfig"],
    "models.gene_bert.modeling_gene_bert": [
        "GeneBertForClassification",
        "GeneBertForPhenotypicMLM",
        "GeneBertModel",
    ],
    "models.cell_neighborhood.configuration_cell_neighborhood": ["CellNeighborhoodConfig"],
    "models.cell_neighborhood.modeling_cell_neighborhood": ["CellNeighborhoodForMaskedCell"],
    # training
    "batches.collators": ["DataCollatorForGeneRankMLM", "DataCollatorForPhenotypicMLM"],
    "batches.label_collator": ["DataCollatorForCellClassification"],
    "training.cell_trainer": ["CellTrainer"],
    "training.pretrainer": ["STFormerPretrainer"],
    "space.neighborhood_trainer": ["NeighborhoodTrainer"],
    "training.starts.spectral_start": ["initialise_from_store"],
    "training.finetuning": ["finetune"],
    # use
    "inference.annotate": ["annotate"],
    "inference.embed": ["embed"],
    "inference.perturb": ["perturb"],
    "inference.map_to_reference": ["map_to_reference"],
    "space.embed_neighborhoods": ["embed_neighborhoods"],
    "evaluation.evaluate_embedding": ["evaluate_embedding"],
}
# Names of the systems that this package unites, and of what is needed later than the first week.
_MORE_MODULES = {
    "batches.collators": ["collate_fn_wrapper"],
    "batches.draws": ["WeightedDraw", "group_weights"],
    "batches.length_sampler": ["EvenBatchSampler", "LengthGroupedSampler", "padding_share"],
    "batches.lengths": ["load_example_lengths", "write_example_lengths"],
    "batches.precollator": ["STFormerPreCollator"],
    "batches.samplers": ["BlockShuffleSampler", "RowSampler"],
    "batches.stream_batches": ["TokenBudgetBuffer"],
    "batches.token_budget": ["TokenBudgetBatchSampler"],
    "cli.parse_args": ["parse_args"],
    "compat.ann_dataset": ["AnnDataset"],
    "compat.legacy_weights": ["convert_perturbgene_checkpoint", "load_geneformer"],
    "compat.run_setup": ["choose_closest", "make_output_dirs", "setup_environment"],
    "compat.scdl": ["NeighborSamplingStrategy", "SingleCellMemMapDataset"],
    "compat.scdl_batches": ["collate_neighbor_sparse_matrix_batch", "collate_sparse_matrix_batch"],
    "compat.scdl_collection": ["SingleCellCollection"],
    "compat.transforms": ["Compose", "EncodeLabels", "LogTransform", "NormalizeRowSum", "Transform"],
    "genes.statistics": ["GeneStatistics"],
    "inference.gene_network": ["gene_network"],
    "inference.gene_states": ["gene_embeddings"],
    "models.cell_neighborhood.count_likelihoods": ["nb_log_likelihood", "pearson_r", "zinb_log_likelihood"],
    "models.cell_neighborhood.modeling_cell_neighborhood": ["CellNeighborhoodModel"],
    "models.gene_bert.modeling_gene_bert": ["GeneBertForTokenClassification", "PositionlessEmbeddings"],
    "space.center_mask_sampler": ["NeighborhoodBatch", "NeighborhoodMetadata"],
    "space.domains": ["spatial_domains"],
    "space.neighborhood_collator": ["collate", "collate_neighborhoods"],
    "space.prepare_metadata": ["prepare_metadata"],
    "space.spatial_graph": ["spatial_neighbors"],
    "store.cell_batch": ["CellBatch", "collate_cells", "small_batches"],
    "store.remote_files": ["RemoteFolder"],
    "training.extension": ["extend_vocabulary"],
    "training.starts.gene_embeddings": ["load_gene_embeddings"],
}
_MODULE_OF = {
    name: module for modules in (_MODULES, _MORE_MODULES) for module, names in modules.items() for name in names
}

__all__ = sorted([*(name for names in _MODULES.values() for name in names), "__version__", "pl"])

_IMPORTING = RLock()  # torch and transformers cannot be imported for the first time by several threads at once


def __getattr__(name: str) -> Any:
    if name != "pl" and name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with _IMPORTING:
        if name == "pl":
            return import_module(".inference.plots", __name__)
        value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULE_OF})  # what the documentation uses can be completed, also beyond the first week
