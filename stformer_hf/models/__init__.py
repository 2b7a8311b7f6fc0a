"""All that a checkpoint needs. Importing this package registers the Auto classes."""

from transformers import AutoConfig, AutoTokenizer

from .gene_bert.configuration_gene_bert import GeneBertConfig
from .gene_bert.tokenization_gene_bert import GeneTokenizer

AutoConfig.register(GeneBertConfig.model_type, GeneBertConfig)
AutoTokenizer.register(GeneBertConfig, GeneTokenizer)


def _register_models() -> None:
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


GeneBertConfig.on_init = _register_models
