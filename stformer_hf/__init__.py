"""Single-cell and spatial transcriptomics encoders on stock Hugging Face objects.

Importing the package registers its classes with `AutoConfig`, `AutoTokenizer` and the `AutoModel` family. The public
names are imported on first use.
"""

from importlib import import_module

__version__ = "0.1.0"

from . import _moved
from . import models as _models  # noqa: F401  (registers the Auto classes)

_moved.register()

_MODULES = {
    "cli.parse_args": ["parse_args"],
    "store.cell_batch": ["CellBatch", "collate_cells"],
    "compat.ann_dataset": ["AnnDataset"],
    "store.cell_store": ["CellStore"],
    "space.center_mask_sampler": ["CenterMaskSampler", "NeighborhoodBatch", "NeighborhoodMetadata"],
    "store.gene_medians": ["estimate_gene_medians"],
    "batches.iterable_ann_dataset": ["IterableAnnDataset"],
    "space.prepare_metadata": ["prepare_metadata"],
    "compat.scdl": ["NeighborSamplingStrategy", "SingleCellMemMapDataset"],
    "compat.scdl_batches": ["collate_neighbor_sparse_matrix_batch", "collate_sparse_matrix_batch"],
    "compat.scdl_collection": ["SingleCellCollection"],
    "space.spatial_graph": ["spatial_neighbors"],
    "compat.transforms": ["Compose", "EncodeLabels", "LogTransform", "NormalizeRowSum", "Transform"],
    "evaluation.evaluate_embedding": ["evaluate_embedding"],
    "genes.gene_table": ["GeneTable"],
    "genes.statistics": ["GeneStatistics"],
    "inference.annotate": ["annotate"],
    "space.domains": ["spatial_domains"],
    "inference.embed": ["embed"],
    "space.embed_neighborhoods": ["embed_neighborhoods"],
    "models.cell_neighborhood.configuration_cell_neighborhood": ["CellNeighborhoodConfig"],
    "models.cell_neighborhood.count_likelihoods": ["nb_log_likelihood", "pearson_r", "zinb_log_likelihood"],
    "models.cell_neighborhood.modeling_cell_neighborhood": [
        "CellNeighborhoodForMaskedCell",
        "CellNeighborhoodModel",
    ],
    "models.gene_bert.configuration_gene_bert": ["GeneBertConfig"],
    "training.extension": ["extend_vocabulary"],
    "compat.legacy_weights": ["convert_perturbgene_checkpoint", "load_geneformer"],
    "models.gene_bert.modeling_gene_bert": [
        "GeneBertForClassification",
        "GeneBertForPhenotypicMLM",
        "GeneBertForTokenClassification",
        "GeneBertModel",
        "PositionlessEmbeddings",
    ],
    "models.gene_bert.tokenization_gene_bert": ["GeneTokenizer"],
    "training.cell_trainer": ["CellTrainer"],
    "batches.collators": [
        "DataCollatorForCellClassification",
        "DataCollatorForGeneRankMLM",
        "DataCollatorForPhenotypicMLM",
        "collate_fn_wrapper",
    ],
    "training.finetuning": ["finetune"],
    "training.starts.gene_embeddings": ["load_gene_embeddings"],
    "batches.length_sampler": ["EvenBatchSampler", "LengthGroupedSampler", "padding_share"],
    "batches.lengths": ["load_example_lengths", "write_example_lengths"],
    "space.neighborhood_trainer": ["NeighborhoodTrainer"],
    "space.neighborhood_collator": ["collate", "collate_neighborhoods"],
    "batches.precollator": ["STFormerPreCollator"],
    "compat.run_setup": ["choose_closest", "make_output_dirs", "setup_environment"],
    "batches.samplers": ["BlockShuffleSampler"],
    "training.pretrainer": ["STFormerPretrainer"],
    "training.starts.spectral_start": ["initialise_from_store"],
    "batches.stream_batches": ["TokenBudgetBuffer"],
    "batches.token_budget": ["TokenBudgetBatchSampler"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = sorted([*_MODULE_OF, "__version__"])


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
