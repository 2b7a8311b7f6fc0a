"""GeneBert configuration."""

from collections.abc import Callable
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

IGNORE = -100  # label of what is not predicted, as in torch's cross entropy

# layers, heads, hidden size, feed-forward size, attention dropout. base and large are PerturbGene's; tiny and small
# are for a laptop: on a CPU, attention dropout disables sdpa's fast kernel, and a step takes three times as long.
SIZES = {
    "tiny": (2, 4, 128, 512, 0.0),
    "small": (6, 4, 256, 1024, 0.0),
    "base": (12, 12, 768, 3072, 0.1),
    "large": (24, 16, 1024, 4096, 0.1),
}

# For a model whose `[CLS]` starts as the whole cell: at step 0 the encoder returns it unchanged.
WHOLE_CELL = {
    "cell_embedding": True,
    "pre_norm": True,
    "norm_type": "rms_norm",
    "residual_init": "zero",
    "classifier_head": "linear",
    "classifier_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0,  # so that packed batches run on torch's varlen attention
}

# Every Auto class that a checkpoint answers to, so that it loads with `trust_remote_code=True` and no plugin.
AUTO_MAP = {
    "AutoConfig": "configuration_gene_bert.GeneBertConfig",
    "AutoModel": "modeling_gene_bert.GeneBertModel",
    "AutoModelForMaskedLM": "modeling_gene_bert.GeneBertForPhenotypicMLM",
    "AutoModelForPreTraining": "modeling_gene_bert.GeneBertForPhenotypicMLM",
    "AutoModelForSequenceClassification": "modeling_gene_bert.GeneBertForClassification",
    "AutoModelForTokenClassification": "modeling_gene_bert.GeneBertForTokenClassification",
}


_CHOICES = {
    "classifier_head": ("mlp", "linear"),
    "classifier_pooling": ("cls", "mean"),
    "pooling": (None, "cls", "mean"),
    "residual_init": ("normal", "zero"),
    "cls_state": (None, "layers", "fixed", "gated"),
    "value_embedding": (False, True, "soft_bins"),
    "norm_type": ("layer_norm", "rms_norm"),
    "position_embedding_type": ("none", "learned", "rotary"),
}


def output_name(column: str, name: str) -> str:
    """Return the name of the output for a class of one of several label columns, such as "cell_type: B cell"."""
    return f"{column}: {name}"


@strict
class GeneBertConfig(PreTrainedConfig):
    r"""Configuration of the GeneBert models: a DistilBERT encoder over gene tokens.

    A token is the sum of two embeddings: its id (an expression bin, a phenotype value or a special token) and its
    type (a gene, or a phenotype category). The defaults are PerturbGene's base model, without positions.

    Parameters
    ----------
    vocab_size : int, default: 6
        Number of token ids: special tokens, phenotype tokens and expression bins.
    type_vocab_size : int, default: 1
        Number of token types: one for the special tokens, one per phenotype category, one per gene.
    hidden_size, num_hidden_layers, num_attention_heads, intermediate_size : int
        Shape of the encoder; `from_tokenizer` sets them by name.
    hidden_act : str, default: "gelu"
        Activation of the feed-forward blocks and of the MLM head.
    gated_feed_forward : bool, default: False
        GeGLU (with "gelu") or SwiGLU (with "silu") feed-forward blocks, with 1.5 times the parameters.
    pre_norm : bool, default: False
        Norms before each block and at the end, instead of after each residual.
    norm_type : {"layer_norm", "rms_norm"}, default: "layer_norm"
        Type of all norms of the encoder and the MLM head.
    position_embedding_type : {"none", "learned", "rotary"}, default: "none"
        Embedding of a token's position in its cell: ranks need it, bins do not. `from_tokenizer` sets "learned" for
        ranks (as in BERT, and so in STFormer and Geneformer).
    max_position_embeddings : int, default: 2048
        Maximum number of tokens per cell, with learned positions.
    rotary_base : float, default: 10,000
        Base of the rotary wavelengths.
    value_embedding : bool or "soft_bins", default: False
        Whether the value of each gene is embedded: in addition to its bin (True, see `ValueEmbedding`), or in place of
        it, as a mixture of learned bins (see `SoftBins`). Needs a tokenizer with `values=True`.
    cell_embedding : bool, default: False
        Whether `[CLS]` starts as the whole cell, regardless of which genes are tokens: see `CellEmbedding`. Needs a
        tokenizer with `whole_cell=True`, which returns the cells' counts.
    cls_state : {"layers", "fixed", "gated"}, optional
        With `cell_embedding`: whether the layers change `[CLS]` as any token ("layers", and by default); or not at
        all, nor are its embedding and the last norm trained ("fixed"); or by a learned factor per layer and dimension
        that begins at 0 ("gated"; ReZero, Bachlechner et al. 2020). CellTrainer and STFormerPretrainer set "fixed"
        where masked genes alone are trained from the start: their loss does not read `[CLS]`, and would only blur it.
        `finetune` sets "gated" for such a model.
    cell_decoder : bool, default: False
        Whether `GeneBertForPhenotypicMLM` also decodes the counts of all genes from `[CLS]`: see `CellDecoder`; needs
        `cell_embedding`.
    num_genes : int, default: 0
        Number of genes of the tokenizer; needed with `cell_embedding`.
    residual_init : {"normal", "zero"}, default: "normal"
        Initialisation of the last linear map of each block: with zero, the encoder starts as the identity.
    pooling : {"cls", "mean"}, optional
        Default pooling of `embed`, set to what training made useful. None: for a classifier, what its head reads;
        else `[CLS]` with `cell_embedding`, and the mean over the genes without.
    hidden_dropout_prob, attention_probs_dropout_prob : float, default: 0.1
        Dropout on embeddings and feed-forward outputs, and on attention weights.
    classifier_dropout : float, default: 0.2
        Dropout before the last layer of the classification head (DistilBERT's value).
    classifier_pooling : {"cls", "mean"}, default: "cls"
        Input of the classification head: the hidden state of `[CLS]`, or the mean over all tokens but special ones.
    classifier_head : {"mlp", "linear"}, default: "mlp"
        DistilBERT's two layers, or one.
    wide_head : bool, default: False
        Whether a linear map of all genes of the cell (`WideHead`) is combined with the head; needs `cell_embedding`.
        For classes, the weighted log probabilities of both are added; for multiple labels per cell, the weighted
        logits; for regression, the weighted mean is taken.
    reader_weights : list of float, optional
        Weights of the head and of the wide head; 1 and 1 by default. With `label_columns`, two per column.
    temperature : float, or list of float, default: 1.0
        Divisor of the sum of log probabilities, or of logits, of both heads; with `label_columns`, of each column.
    label_columns : dict of str to int, optional
        Number of classes of each label column, for a head that predicts a class in each of several columns. They are
        in alphabetical order, and so are their outputs, `reader_weights` and `temperature`; outputs are named by
        `output_name`. None if there is one column.
    initializer_range : float, default: 0.02
        Standard deviation of the normal initialisation.
    layer_norm_eps : float, default: 1e-12
        Epsilon of every LayerNorm.
    label_smoothing : float, default: 0.0
        Label smoothing of the MLM loss. PerturbGene trains with 0.5.
    classifier_label_smoothing : float, default: 0.0
        Label smoothing of the classification loss. PerturbGene trains with 0.1.
    token_classes : list of str, optional
        Phenotype categories in the order of their token types, then "genes": classes of tokens whose losses are
        weighted and reported separately.
    loss_weights : dict of str to float, optional
        Weight of the MLM loss of some of `token_classes`; 1 for the others.
    class_weights : list of float, optional
        Weight of the loss of each class (single or multi label), such as scikit-learn's
        `compute_class_weight("balanced", …)`.
    sparse_prediction : bool, default: True
        In training, compute MLM logits at the labelled positions only; the output's `logits` are then
        (n_labelled, vocab_size), in row-major order of the positions. In evaluation mode, and without labels, logits
        are computed at all positions.
    rank_prior_sizes : list of int, optional
        Numbers of levels, tokens and axes of the MLM head's `RankPrior`, for ranks; `start_rank_model` sets them. By
        default the head has no prior.
    vocabulary_fingerprint : str, optional
        `GeneTokenizer.fingerprint` of the tokenizer that the model was created for.
    pad_token_id, eos_token_id : int, default: 3, 1
        Ids of `[PAD]` and `[EOS]`.
    tie_word_embeddings : bool, default: True
        Whether the last layer of the MLM head shares its weight with the embedding of the token ids.

    Notes
    -----
    PerturbGene: `model.py` and the documents named in its "Code Organization"; DistilBERT: Sanh et al. 2019.
    """

    model_type = "gene_bert"
    _auto_class = "AutoConfig"
    # Called after a configuration is created or unpickled. The plugin registers the model classes here, so that
    # `import stformer_hf` need not import them; a checkpoint loaded from the Hub without the plugin leaves it unset.
    on_init: ClassVar[Callable[[], None] | None] = None
    # Trainer gathers all other outputs as predictions.
    keys_to_ignore_at_inference = ["class_statistics", "gene_logits", "log_dispersion"]

    vocab_size: int = 6
    type_vocab_size: int = 1
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    gated_feed_forward: bool = False
    pre_norm: bool = False
    norm_type: str = "layer_norm"
    position_embedding_type: str = "none"
    max_position_embeddings: int = 2048
    rotary_base: float | int = 10_000.0
    value_embedding: bool | str = False
    cell_embedding: bool = False
    cls_state: str | None = None
    cell_decoder: bool = False
    num_genes: int = 0
    residual_init: str = "normal"
    pooling: str | None = None
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    classifier_dropout: float | int = 0.2
    classifier_pooling: str = "cls"
    classifier_head: str = "mlp"
    wide_head: bool = False
    reader_weights: list[float | int] | None = None
    temperature: float | int | list[float | int] = 1.0
    label_columns: dict[str, int] | None = None
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    label_smoothing: float | int = 0.0
    classifier_label_smoothing: float | int = 0.0
    sparse_prediction: bool = True
    token_classes: list[str] | None = None
    loss_weights: dict[str, float] | None = None
    class_weights: list[float] | None = None
    rank_prior_sizes: list[int] | None = None
    vocabulary_fingerprint: str | None = None
    pad_token_id: int | None = 3
    eos_token_id: int | None = 1
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        # Names in one direction are names in both: collators read the one, and predictions the other.
        config: Any = self
        if config.id2label is None and config.label2id is not None:
            config.id2label = {int(i): name for name, i in config.label2id.items()}
        elif config.label2id is None and config.id2label is not None:
            config.label2id = {name: int(i) for i, name in config.id2label.items()}
        super().__post_init__(**kwargs)
        if sorted(self.id2label) != list(range(self.num_labels)):
            raise ValueError(f"id2label and label2id must number the outputs from 0 on, got {sorted(self.id2label)}.")
        self.auto_map = dict(AUTO_MAP)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}."
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {getattr(self, name)!r}.")
        if self.position_embedding_type == "rotary" and self.hidden_size // self.num_attention_heads % 2:
            raise ValueError(
                f"Rotary positions need heads of an even size, got {self.hidden_size // self.num_attention_heads}."
            )
        if self.cell_embedding and (self.num_genes < 1 or self.hidden_size % 2):
            raise ValueError(
                f"cell_embedding needs num_genes and an even hidden_size, got {self.num_genes} and {self.hidden_size}."
            )
        if self.cls_state in ("fixed", "gated") and not self.cell_embedding:
            raise ValueError(f'cls_state="{self.cls_state}" needs cell_embedding=True: no loss would train [CLS].')
        for name in ("wide_head", "cell_decoder"):
            if getattr(self, name) and not self.cell_embedding:
                raise ValueError(f"{name} reads the whole cell: it needs cell_embedding=True.")
        if self.label_columns is not None:
            self.label_columns = dict(sorted(self.label_columns.items()))  # config.json has sorted keys
            self._check_label_columns(self.label_columns)
        self._check_readers()
        unknown = set(self.loss_weights or {}) - set(self.token_classes or ["genes"])
        if unknown:
            raise ValueError(
                f"loss_weights has unknown classes {', '.join(sorted(unknown))}; token_classes are "
                f"{', '.join(self.token_classes or ['genes'])}."
            )
        if self.class_weights is not None and len(self.class_weights) != self.num_labels:
            raise ValueError(f"There are {len(self.class_weights)} class_weights for {self.num_labels} labels.")
        self._call_on_init()

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._call_on_init()  # in a process that has only unpickled configurations

    def _call_on_init(self) -> None:
        on_init = type(self).on_init
        if on_init is not None:
            on_init()

    def _check_label_columns(self, columns: dict[str, int]) -> None:
        if sum(columns.values()) != self.num_labels or min(columns.values(), default=0) < 2:
            raise ValueError(
                f"label_columns must have at least two classes each, and {self.num_labels} in all (num_labels), got "
                f"{columns}. For a head of one column, pass id2label and label2id instead of num_labels, and "
                "label_columns=None, reader_weights=None and temperature=1.0; finetune does so."
            )
        wanted = [output_name(column, "") for column, n in columns.items() for _ in range(n)]
        names = [str(self.id2label[i]) for i in range(self.num_labels)]
        wrong = [name for name, start in zip(names, wanted, strict=True) if not name.startswith(start)]
        if wrong or len(set(names)) < len(names):
            raise ValueError(
                "The outputs of label_columns must have unique names, in the alphabetical order of the columns, such "
                f"as {output_name(next(iter(columns)), 'B cell')!r}; got {', '.join(wrong[:5] or names[:5])}, …"
            )

    def _check_readers(self) -> None:
        n_columns = len(self.label_columns or [None])
        temperatures = self.temperature if isinstance(self.temperature, list) else [self.temperature] * n_columns
        if len(self.reader_weights or [1, 1] * n_columns) != 2 * n_columns:
            raise ValueError(f"reader_weights must be two numbers per label column, got {self.reader_weights}.")
        if len(temperatures) != n_columns or min(temperatures) <= 0:
            raise ValueError(f"temperature must be positive, one number per label column, got {self.temperature}.")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Create a configuration from saved fields, with others in their place, as `from_pretrained` does.

        All are checked together; transformers sets those of `kwargs` afterwards. `id2label` or `label2id` alone
        replace both. If the number of outputs changes, the weights of the saved head do not fit, and neither do its
        `reader_weights`, `temperature` and `class_weights`, which return to their defaults unless given.

        Parameters
        ----------
        config_dict : dict
            Saved fields.
        **kwargs
            Other values of some fields, and arguments of `PreTrainedConfig.from_dict`.

        Returns
        -------
        GeneBertConfig, or (GeneBertConfig, dict of unused arguments) with `return_unused_kwargs=True`

        Raises
        ------
        ValueError
            As for the constructor.
        """
        given = {name: kwargs.pop(name) for name in cls.__dataclass_fields__ if name in kwargs and name != "dtype"}
        saved = config_dict.get("id2label") or config_dict.get("label2id")
        n_saved = len(saved or (0, 1))  # two outputs without names are not saved
        names = given.get("id2label") or given.get("label2id") or ()
        n_outputs = len(names) or kwargs.get("num_labels") or n_saved
        if names or n_outputs != n_saved:
            given = {"id2label": None, "label2id": None, **given}
        if n_outputs != n_saved:
            given = {"reader_weights": None, "temperature": 1.0, "class_weights": None, **given}
        return super().from_dict({**config_dict, **given}, **kwargs)

    @classmethod
    def from_size(cls, size: str, **kwargs: Any) -> "GeneBertConfig":
        """Create a configuration of a named size.

        Parameters
        ----------
        size : {"tiny", "small", "base", "large"}
            (layers, hidden size): (2, 128), (6, 256), (12, 768), (24, 1024); tiny and small without attention
            dropout, and initialised with standard deviation hidden size ** -0.5 instead of 0.02.
        **kwargs
            Any other field; overrides the values of the size.

        Raises
        ------
        ValueError
            The size is unknown.
        """
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}.")
        layers, heads, hidden, intermediate, attention_dropout = SIZES[size]
        fields = {
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "attention_probs_dropout_prob": attention_dropout,
            # DistilBERT's 0.02 suits its 768 dimensions; narrower layers need more to distinguish genes.
            "initializer_range": 0.02 if hidden >= 768 else hidden**-0.5,
        }
        return cls(**{**fields, **kwargs})

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, size: str = "base", **kwargs: Any) -> "GeneBertConfig":
        """Create the configuration of a model for a tokenizer.

        Parameters
        ----------
        tokenizer : GeneTokenizer
            Source of the vocabulary sizes, the padding id and the fingerprint of the vocabulary.
        size : {"tiny", "small", "base", "large"}, default: "base"
            See `from_size`.
        **kwargs
            Any other field; overrides the values of size and tokenizer. Models for a whole-cell tokenizer have no
            attention dropout in any size.

        Raises
        ------
        ValueError
            The size is unknown.
        """
        fields = {
            "vocab_size": len(tokenizer),
            "type_vocab_size": tokenizer.type_vocab_size,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "vocabulary_fingerprint": tokenizer.fingerprint,
            "token_classes": [*tokenizer.phenotypes, "genes"],
            "value_embedding": tokenizer.values,
            "num_genes": len(tokenizer.genes) if tokenizer.whole_cell else 0,
            **(WHOLE_CELL if tokenizer.whole_cell else {}),
            "position_embedding_type": "learned" if tokenizer.scheme == "rank" else "none",
            "max_position_embeddings": tokenizer.max_length,
            "classifier_pooling": "cls" if tokenizer.add_cls else "mean",
        }
        return cls.from_size(size, **{**fields, **kwargs})
