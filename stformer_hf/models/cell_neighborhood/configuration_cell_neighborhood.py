"""CellNeighborhood configuration."""

from collections.abc import Callable
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

# encoder layers, decoder layers, heads, hidden size, feed-forward size. base is CellTransformer's, tiny for a laptop.
SIZES = {"tiny": (2, 2, 4, 64, 256), "base": (4, 4, 8, 384, 1536)}

# Every Auto class that a checkpoint answers to, so that it loads with `trust_remote_code=True` and no plugin.
AUTO_MAP = {
    "AutoConfig": "configuration_cell_neighborhood.CellNeighborhoodConfig",
    "AutoModel": "modeling_cell_neighborhood.CellNeighborhoodModel",
    "AutoModelForPreTraining": "modeling_cell_neighborhood.CellNeighborhoodForMaskedCell",
}


@strict
class CellNeighborhoodConfig(PreTrainedConfig):
    r"""Configuration of the CellNeighborhood models, which predict a masked cell's counts from the cells around it.

    The defaults are those of the paper (CellTransformer), except for the numbers of genes and cell types.

    Parameters
    ----------
    n_genes : int, default: 1
        Number of genes (columns of the expression).
    n_cell_types : int, default: 1
        Number of cell types; they are numbered from 0.
    hidden_size, num_attention_heads, intermediate_size : int
        Width of the transformer layers, number of their heads, width of their feed-forward blocks. One half of a
        cell's token is its type, the other its expression, so `hidden_size` must be even.
    encoder_layers, decoder_layers : int, default: 4
        Layers over the cells of a neighbourhood, and over the pooled neighbourhood and the masked cell.
    hidden_act : str, default: "gelu"
        Activation of the expression's MLP and of the feed-forward blocks.
    hidden_dropout_prob, attention_probs_dropout_prob : float, default: 0.0
        Dropout after attention and feed-forward blocks, and on attention weights.
    likelihood : {"zinb", "nb"}, default: "zinb"
        Distribution of the counts: negative binomial, with zero inflation or without.
    apply_log1p : bool, default: True
        Whether the model applies log1p to the observed expression. Use True if batches hold counts, as those of a
        sampler with `normalize=None` do, and False if the observed expression is log1p already. The masked cell's
        expression must be counts in both cases, since the likelihood is that of counts.
    use_expression : bool, default: True
        Whether the token of a cell reads its expression.
    cell_embedding_size : int, default: 0
        Size of an embedding of each observed cell, such as one by a GeneBert model, that its token reads in addition
        to its expression, or instead of it with `use_expression=False`. 0 for none.
    gene_ids, cell_types : list of str, optional
        Names of the columns and of the cell types, for use of the model on other data. There may be fewer names of
        types than `n_cell_types`.
    neighborhood : dict, optional
        How the training neighbourhoods were made: options of `CenterMaskSampler` such as `patch_size`, `shape`,
        `k_nearest` and `max_num_cells`. They are the defaults when the model is used.
    section_key : str, optional
        Column of obs with the tissue section of the training cells. If these four are None, `CellTrainer` sets them
        from the sampler of the training cells.
    initializer_range : float, default: 0.02
        Standard deviation of the normal initialisation.
    layer_norm_eps : float, default: 1e-5
        Epsilon of every LayerNorm.
    tie_word_embeddings : bool, default: False
        Has no effect, since there is nothing to tie.

    Notes
    -----
    CellTransformer (brainformr), Lee et al.: sampler, masks and model follow its documentation.
    """

    model_type = "cell_neighborhood"
    _auto_class = "AutoConfig"
    attribute_map = {"num_hidden_layers": "encoder_layers"}
    # Trainer gathers only the expected counts as predictions.
    keys_to_ignore_at_inference = [
        "mean",
        "dispersion",
        "gate",
        "neighborhood_embedding",
        "typed_neighborhood_embedding",
        "last_hidden_state",
        "hidden_states",
        "attentions",
    ]
    # Called after a configuration is created or unpickled; see `GeneBertConfig.on_init`.
    on_init: ClassVar[Callable[[], None] | None] = None

    n_genes: int = 1
    n_cell_types: int = 1
    hidden_size: int = 384
    num_attention_heads: int = 8
    intermediate_size: int = 1536
    encoder_layers: int = 4
    decoder_layers: int = 4
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    likelihood: str = "zinb"
    apply_log1p: bool = True
    use_expression: bool = True
    cell_embedding_size: int = 0
    gene_ids: list[str] | None = None
    cell_types: list[str] | None = None
    neighborhood: dict | None = None
    section_key: str | None = None
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        for name in ("n_genes", "n_cell_types", "encoder_layers", "decoder_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.hidden_size % 2 or self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size must be even and a multiple of num_attention_heads {self.num_attention_heads}, "
                f"got {self.hidden_size}."
            )
        if self.likelihood not in ("nb", "zinb"):
            raise ValueError(f'likelihood must be "nb" or "zinb", got {self.likelihood!r}.')
        if self.cell_embedding_size < 0 or not (self.use_expression or self.cell_embedding_size):
            raise ValueError(
                "A cell's token must read its expression (use_expression=True), an embedding of the cell "
                f"(cell_embedding_size, got {self.cell_embedding_size}), or both."
            )
        for name, least, most in (("gene_ids", self.n_genes, self.n_genes), ("cell_types", 1, self.n_cell_types)):
            given = getattr(self, name)
            if given is not None and not least <= len(given) <= most:
                raise ValueError(f"There are {len(given)} {name}, but the model has {most}.")
        self._call_on_init()

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._call_on_init()  # in a process that has only unpickled configurations

    def _call_on_init(self) -> None:
        on_init = type(self).on_init
        if on_init is not None:
            on_init()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Create a configuration from saved fields, with others in their place, and check all of them together.

        Parameters and results are those of `PreTrainedConfig.from_dict`, which sets `kwargs` after the checks.
        """
        given = {name: kwargs.pop(name) for name in cls.__dataclass_fields__ if name in kwargs and name != "dtype"}
        return super().from_dict({**config_dict, **given}, **kwargs)

    @classmethod
    def from_size(cls, size: str, **kwargs: Any) -> "CellNeighborhoodConfig":
        """Create a configuration of a named size.

        Parameters
        ----------
        size : {"tiny", "base"}
            (encoder and decoder layers, hidden size): (2 + 2, 64), (4 + 4, 384). tiny is initialised with standard
            deviation hidden size ** -0.5 instead of 0.02.
        **kwargs
            Any other field, such as `n_genes` and `n_cell_types`; overrides the values of the size.

        Raises
        ------
        ValueError
            The size is unknown.
        """
        if size not in SIZES:
            raise ValueError(f"size must be one of {', '.join(SIZES)}, got {size!r}.")
        encoder_layers, decoder_layers, heads, hidden, intermediate = SIZES[size]
        fields = {
            "encoder_layers": encoder_layers,
            "decoder_layers": decoder_layers,
            "num_attention_heads": heads,
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "initializer_range": 0.02 if hidden >= 384 else hidden**-0.5,
        }
        return cls(**{**fields, **kwargs})
