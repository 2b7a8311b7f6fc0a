"""Load weights of other systems: PerturbGene's into GeneBert, Geneformer's into a stock BERT with its tokenizer."""

import os
import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BertForMaskedLM
from transformers.modeling_utils import load_state_dict

from ..models.gene_bert.configuration_gene_bert import GeneBertConfig
from ..models.gene_bert.gene_columns import sample
from ..models.gene_bert.modeling_gene_bert import GeneBertForClassification, GeneBertForPhenotypicMLM, GeneBertModel
from ..models.gene_bert.tokenization_gene_bert import GeneTokenizer

# Possible prefixes of the encoder's weights. PerturbGene's heads use `distilbert`, as DistilBERT does.
_PREFIXES = ("distilbert.", "gene_bert.", "bert.")
# Prefixes of names here, and in PerturbGene. Its blocks and its MLM head are DistilBERT's.
_NAMES = {
    "layers.": "transformer.layer.",
    "mlm_head.transform.": "vocab_transform.",
    "mlm_head.layer_norm.": "vocab_layer_norm.",
    "mlm_head.decoder.": "vocab_projector.",
}
_LAYER = re.compile(r"transformer\.layer\.(\d+)\.")
_WORDS = "embeddings.word_embeddings.weight"
_DECODER = "vocab_projector.weight"
# The weight and axis that determine a field of the configuration.
_SIZES = {
    "vocab_size": (_WORDS, 0),
    "type_vocab_size": ("embeddings.token_type_embeddings.weight", 0),
    "hidden_size": (_WORDS, 1),
    "intermediate_size": ("transformer.layer.0.ffn.lin1.weight", 0),
    "num_labels": ("classifier.weight", 0),
}


# ---------------------------------------------------------------------- PerturbGene


def convert_perturbgene_checkpoint(
    checkpoint: Mapping[str, torch.Tensor] | str | os.PathLike, config: GeneBertConfig
) -> GeneBertModel | GeneBertForPhenotypicMLM | GeneBertForClassification:
    """Load weights of PerturbGene into a GeneBert model with the same outputs.

    Parameters
    ----------
    checkpoint : dict of str to Tensor, or path
        State dict; a `.safetensors` file, or one of `torch.save` (from which only tensors are loaded); or the folder
        of a checkpoint. Names of the encoder may begin with `distilbert.`, `gene_bert.`, `bert.`, or none of these.
    config : GeneBertConfig
        Configuration from `GeneBertConfig.from_tokenizer` for a `GeneTokenizer.from_perturbgene`; it is not changed.
        The weights do not determine `num_attention_heads`, nor `num_labels` of a model without a classifier.

    Returns
    -------
    GeneBertForPhenotypicMLM, GeneBertForClassification or GeneBertModel
        Model with the head of the checkpoint, if any; in evaluation mode. To fine-tune it with another head, save it,
        and load it with that head's class. PerturbGene does not tie its MLM head to the embedding: if the two differ,
        `tie_word_embeddings` of the model's configuration is set to False.

    Raises
    ------
    ValueError
        Weights are missing, unexpected, or have other shapes than the configuration; there are two heads; the file
        holds anything but tensors.

    Examples
    --------
    >>> tokenizer = GeneTokenizer.from_perturbgene("phenotypes.json", [0.1], genes)
    >>> config = GeneBertConfig.from_tokenizer(tokenizer, size="base")
    >>> model = convert_perturbgene_checkpoint("checkpoint-5000/model.safetensors", config)

    Notes
    -----
    PerturbGene has its own embeddings (`PositionlessEmbeddings`), then DistilBERT's blocks and MLM head (Sanh et al.
    2019), or a classification head.
    """
    weights = _without_prefix(_read(checkpoint))
    heads = {
        GeneBertForPhenotypicMLM: any(name.startswith("vocab_") for name in weights),
        GeneBertForClassification: any(name.startswith(("pre_classifier.", "classifier.")) for name in weights),
    }
    if all(heads.values()):
        raise ValueError("The checkpoint has an MLM head and a classification head; remove one of them.")
    model_class = next((of for of, found in heads.items() if found), GeneBertModel)
    config = deepcopy(config)
    if heads[GeneBertForPhenotypicMLM] and _WORDS in weights:
        weights.setdefault(_DECODER, weights[_WORDS])  # tied weights are saved once
        if config.tie_word_embeddings and not torch.equal(weights[_DECODER], weights[_WORDS]):
            config.tie_word_embeddings = False

    with torch.device("meta"):
        wanted = {_perturbgene_name(name): (name, of.shape) for name, of in model_class(config).state_dict().items()}
    _check_weights(weights, {name: shape for name, (_, shape) in wanted.items()}, config)
    # Copies, since the model would otherwise train the given tensors.
    state_dict = {wanted[name][0]: tensor.clone() for name, tensor in weights.items()}
    model = model_class.from_pretrained(None, config=config, state_dict=state_dict)
    model.config.name_or_path = ""
    return model


def _read(checkpoint: Mapping[str, torch.Tensor] | str | os.PathLike) -> dict[str, torch.Tensor]:
    """Return a state dict, reading it if it is a path."""
    if isinstance(checkpoint, Mapping):
        source, weights = "The checkpoint", checkpoint
    else:
        path = Path(checkpoint)
        if path.is_dir():
            files = [path / name for name in ("model.safetensors", "pytorch_model.bin")]
            there = [file for file in files if file.exists()]
            if not there:
                raise ValueError(f"{checkpoint} holds neither model.safetensors nor pytorch_model.bin.")
            path = there[0]
        source = str(path)
        try:
            weights = load_state_dict(path, weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"Cannot load {source}: {error}") from error
    if not isinstance(weights, Mapping):
        raise ValueError(f"{source} holds a {type(weights).__name__}, not a state dict.")
    others = [name for name, value in weights.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(f"{source} holds values that are not tensors, such as {sample(others)}: pass its state dict.")
    return dict(weights)


def _without_prefix(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove the prefixes of the encoder's weights."""
    found = {}
    for name, tensor in weights.items():
        short = name
        for prefix in _PREFIXES:
            short = short.removeprefix(prefix)
        if short in found:
            raise ValueError(f"The checkpoint holds {short} twice, under different prefixes.")
        found[short] = tensor
    return found


def _perturbgene_name(name: str) -> str:
    """Return PerturbGene's name, without prefix, of a weight of a GeneBert model."""
    name = name.removeprefix("gene_bert.")
    for ours, theirs in _NAMES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _check_weights(
    weights: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size], config: GeneBertConfig
) -> None:
    """Compare the weights of a checkpoint with those of a model, both under PerturbGene's names."""
    sizes = {
        field: weights[name].shape[axis]
        for field, (name, axis) in _SIZES.items()
        if name in weights and weights[name].dim() > axis
    }
    sizes["num_hidden_layers"] = len({found[1] for name in weights if (found := _LAYER.match(name))})
    wrong = [
        f"{field} is {getattr(config, field)} ({size} in the checkpoint)"
        for field, size in sizes.items()
        if getattr(config, field) != size
    ]
    plain = {"position_embedding_type": "none"}  # fields that no weight determines
    if "classifier.weight" in weights:
        plain["classifier_pooling"] = "cls"
    wrong += [
        f"{field} is {getattr(config, field)!r} ({theirs!r} in PerturbGene)"
        for field, theirs in plain.items()
        if getattr(config, field) != theirs
    ]
    missing = [name for name in shapes if name not in weights]
    left_over = [name for name in weights if name not in shapes]
    reshaped = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(shape)}"
        for name, shape in shapes.items()
        if name in weights and weights[name].shape != shape
    ]
    parts = [
        ("In the configuration, ", wrong),
        (f"{len(missing)} weights are missing: ", missing),
        (f"{len(left_over)} weights are unexpected: ", left_over),
        (f"{len(reshaped)} weights have another shape: ", reshaped),
    ]
    told = [f"{what}{sample(names, 20)}." for what, names in parts if names]
    if told:
        raise ValueError(f"The checkpoint does not fit the model. {' '.join(told)}")


# ---------------------------------------------------------------------- Geneformer


def load_geneformer(
    path: str | os.PathLike,
    token_dictionary: Mapping[str, int] | str | os.PathLike | None = None,
    medians: Any = None,
    *,
    symbols: Any = None,
) -> tuple[BertForMaskedLM, GeneTokenizer]:
    """Load a model of Geneformer, or of the same format, as a stock BERT, and its tokenizer.

    Parameters
    ----------
    path : str or Path
        Folder with `config.json` and weights, or a name on the Hub.
    token_dictionary : dict, or path of a .pkl, .json or vocab.txt, optional
        Gene -> token id. By default `token_dictionary*.pkl`, or `vocab.txt`, in the folder or in its subfolder
        `geneformer`.
    medians : GeneStatistics, dict of gene to float, or path of a .pkl or .json, optional
        Non-zero medians. By default `gene_median_dictionary*.pkl` in the same folders.
    symbols : dict, or path of a .pkl or .json, or GeneTable, optional
        Symbol -> gene. By default `gene_name_id_dict*.pkl` in the same folders, if present.

    Returns
    -------
    model : transformers.BertForMaskedLM
        In evaluation mode.
    tokenizer : GeneTokenizer
        Tokenizer of the rank scheme, with the model's number of positions as `max_length`. Its `model_input_names` are
        `input_ids` and `attention_mask`: Geneformer has no token types.

    Raises
    ------
    ValueError
        The model is not a BERT, or lacks weights; the dictionary has another size; there are no files of the
        dictionary or medians, or more than one.

    Notes
    -----
    Geneformer (Theodoris et al. 2023) is BERT with ReLU over up to 2,048 genes, or 4,096 between `<cls>` and `<eos>`.
    """
    config = AutoConfig.from_pretrained(path)
    if config.model_type != "bert":
        raise ValueError(f"{path} holds a model of type {config.model_type!r}; Geneformer's is 'bert'.")
    if token_dictionary is None:
        token_dictionary = _only_file(path, "token_dictionary", "token_dictionary*.pkl", "vocab.txt")
    if medians is None:
        medians = _only_file(path, "medians", "gene_median_dictionary*.pkl")
    if symbols is None:
        found = _files(path, "gene_name_id_dict*.pkl")
        symbols = found[0] if len(found) == 1 else None
    tokenizer = GeneTokenizer.from_token_dictionary(
        token_dictionary,
        medians,
        symbols=symbols,
        max_length=config.max_position_embeddings,
        model_input_names=["input_ids", "attention_mask"],
    )
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"The token dictionary has {len(tokenizer)} ids, but the model has {config.vocab_size}: it belongs to "
            "another version of Geneformer. Pass the model's own token_dictionary and medians."
        )
    model, loaded = BertForMaskedLM.from_pretrained(path, output_loading_info=True)
    if loaded["missing_keys"]:
        missing = sorted(loaded["missing_keys"])
        raise ValueError(f"{path} lacks {len(missing)} weights of a masked language model, such as {sample(missing)}.")
    return model, tokenizer


def _files(path: str | os.PathLike, pattern: str) -> list[Path]:
    return [file for folder in (Path(path), Path(path) / "geneformer") for file in sorted(folder.glob(pattern))]


def _only_file(path: str | os.PathLike, parameter: str, *patterns: str) -> Path:
    """Find the only file that matches a pattern in the folder of a checkpoint; the first pattern takes precedence."""
    for pattern in patterns:
        found = _files(path, pattern)
        if len(found) > 1:
            raise ValueError(f"{path} has {len(found)} files {pattern}: choose one with {parameter}=….")
        if found:
            return found[0]
    raise ValueError(f"{path} has no {' or '.join(patterns)}: pass {parameter}=….")
