"""All that a checkpoint needs. Importing this package registers the Auto classes."""

from transformers import AutoConfig, AutoTokenizer

from .cell_neighborhood.configuration_cell_neighborhood import CellNeighborhoodConfig
from .gene_bert.configuration_gene_bert import GeneBertConfig
from .gene_bert.tokenization_gene_bert import GeneTokenizer

AutoConfig.register(GeneBertConfig.model_type, GeneBertConfig)
AutoConfig.register(CellNeighborhoodConfig.model_type, CellNeighborhoodConfig)
AutoTokenizer.register(GeneBertConfig, GeneTokenizer)


def _register_gene_bert() -> None:
    """Register the model classes, at the first configuration: importing them with the package costs seconds."""
    from transformers import (
        AutoModel,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    from .gene_bert.modeling_gene_bert import (
        GeneBertForClassification,
        GeneBertForPhenotypicMLM,
        GeneBertForTokenClassification,
        GeneBertModel,
    )

    GeneBertConfig.on_init = None
    AutoModel.register(GeneBertConfig, GeneBertModel)
    AutoModelForMaskedLM.register(GeneBertConfig, GeneBertForPhenotypicMLM)
    AutoModelForSequenceClassification.register(GeneBertConfig, GeneBertForClassification)
    AutoModelForTokenClassification.register(GeneBertConfig, GeneBertForTokenClassification)


def _register_cell_neighborhood() -> None:
    from transformers import AutoModel, AutoModelForPreTraining

    from .cell_neighborhood.modeling_cell_neighborhood import CellNeighborhoodForMaskedCell, CellNeighborhoodModel

    CellNeighborhoodConfig.on_init = None
    AutoModel.register(CellNeighborhoodConfig, CellNeighborhoodModel)
    AutoModelForPreTraining.register(CellNeighborhoodConfig, CellNeighborhoodForMaskedCell)


GeneBertConfig.on_init = _register_gene_bert
CellNeighborhoodConfig.on_init = _register_cell_neighborhood
