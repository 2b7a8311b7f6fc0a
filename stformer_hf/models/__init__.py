"""Models, configurations and tokenizer: all that a checkpoint needs. Importing this package registers them."""

from transformers import AutoConfig, AutoTokenizer
from transformers.utils import is_peft_available

from .cell_neighborhood.configuration_cell_neighborhood import CellNeighborhoodConfig
from .gene_bert.configuration_gene_bert import GeneBertConfig
from .gene_bert.tokenization_gene_bert import GeneTokenizer

AutoConfig.register(GeneBertConfig.model_type, GeneBertConfig)
AutoConfig.register(CellNeighborhoodConfig.model_type, CellNeighborhoodConfig)
AutoTokenizer.register(GeneBertConfig, GeneTokenizer)


# Layers of both models; the names are those of BERT.
_LAYERS_OF_BERT = {"query": ["q_lin"], "key": ["k_lin"], "value": ["v_lin"], "output.dense": ["out_lin", "lin2"]}


def _register_with_peft(model_type: str) -> None:
    """Register the layers that PEFT adapts by default, when no `target_modules` are given: those of BERT."""
    if not is_peft_available():
        return
    from peft.utils import constants

    for name, layers in vars(constants).items():
        of_bert = layers.get("bert") if name.endswith("_MODULES_MAPPING") else None
        if of_bert is not None and all(layer in _LAYERS_OF_BERT for layer in of_bert):
            layers.setdefault(model_type, [own for layer in of_bert for own in _LAYERS_OF_BERT[layer]])


def _register_gene_bert() -> None:
    """Register the model classes when the first configuration is created, since importing them takes seconds."""
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
    _register_with_peft(GeneBertConfig.model_type)
    AutoModel.register(GeneBertConfig, GeneBertModel)
    AutoModelForMaskedLM.register(GeneBertConfig, GeneBertForPhenotypicMLM)
    AutoModelForSequenceClassification.register(GeneBertConfig, GeneBertForClassification)
    AutoModelForTokenClassification.register(GeneBertConfig, GeneBertForTokenClassification)


def _register_cell_neighborhood() -> None:
    from transformers import AutoModel, AutoModelForPreTraining

    from .cell_neighborhood.modeling_cell_neighborhood import CellNeighborhoodForMaskedCell, CellNeighborhoodModel

    CellNeighborhoodConfig.on_init = None
    _register_with_peft(CellNeighborhoodConfig.model_type)
    AutoModel.register(CellNeighborhoodConfig, CellNeighborhoodModel)
    AutoModelForPreTraining.register(CellNeighborhoodConfig, CellNeighborhoodForMaskedCell)


GeneBertConfig.on_init = _register_gene_bert
CellNeighborhoodConfig.on_init = _register_cell_neighborhood
