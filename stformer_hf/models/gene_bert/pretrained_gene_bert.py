"""What all GeneBert models share: configuration, initialisation, and the backend of their attention."""

from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.integrations.hub_kernels import load_and_register_attn_kernel
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import (
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_flash_attn_4_available,
    is_kernels_available,
    logging,
)

from .cell_decoder import CellDecoder
from .configuration_gene_bert import GeneBertConfig
from .encoder_layers import GeneBertAttention, GeneBertLayer, SoftBins
from .heads import PreClassifier
from .packed_attention import HAS_VARLEN
from .whole_cell import GeneStatistics, WideHead

logger = logging.get_logger(__name__)


class GeneBertPreTrainedModel(PreTrainedModel):
    """Base class of the GeneBert models: configuration, initialisation, supported backends.

    `attn_implementation` is eager, sdpa, flex_attention, flash_attention_2, _3 or _4, a kernel of the Hub, or "auto"
    (see `best_attention`): flash attention if there are a GPU, the package and weights in half precision, else sdpa,
    which also separates the cells of a packed batch (under autocast too, which leaves the weights in float32).
    """

    config: GeneBertConfig
    config_class = GeneBertConfig
    base_model_prefix = "gene_bert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GeneBertLayer"]
    _keep_in_fp32_modules_strict = ["statistics"]  # the statistics of the genes
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": GeneBertLayer, "attentions": GeneBertAttention}
    # A checkpoint may have another head, or one that the model lacks, without a warning; a missing head is reported.
    _keys_to_ignore_on_load_unexpected = [
        r"^mlm_head\.",
        r"^cell_decoder\.",
        r"^pre_classifier\.",
        r"^classifier\.",
        r"^wide_head\.",
    ]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, GeneStatistics):
            init.constant_(module.shares, 1 / len(module.shares))
            init.zeros_(module.means)
            init.constant_(module.n_cells, torch.inf)
        elif isinstance(module, PreClassifier):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            init.zeros_(module.bias)
        elif isinstance(module, GeneBertLayer) and hasattr(module, "cls_gate"):
            init.zeros_(module.cls_gate)
        elif isinstance(module, SoftBins):
            module.reset_weights()
        elif isinstance(module, WideHead):
            init.zeros_(module.bias)
        elif isinstance(module, CellDecoder):
            init.zeros_(module.log_dispersion)
        elif getattr(module, "begins_at_zero", False):
            init.zeros_(module.weight)

    def get_position_embeddings(self) -> nn.Embedding:
        """Return the embedding of the positions of tokens in their cell; raise ValueError if the model has none."""
        embeddings = self.base_model.embeddings
        if not hasattr(embeddings, "position_embeddings"):
            raise ValueError(
                f'The model has no position embeddings: position_embedding_type is "'
                f'{self.config.position_embedding_type}". Cells of any length fit it.'
            )
        return embeddings.position_embeddings

    def resize_position_embeddings(self, new_num_position_embeddings: int) -> None:
        """Change the maximum number of tokens per cell; new positions get random embeddings.

        Parameters
        ----------
        new_num_position_embeddings : int
            Maximum number of tokens per cell; also written to `config.max_position_embeddings`.

        Raises
        ------
        ValueError
            The model has no position embeddings.
        """
        old = self.get_position_embeddings().weight
        new = nn.Embedding(new_num_position_embeddings, old.shape[1], device=old.device, dtype=old.dtype)
        n_kept = min(len(old), new_num_position_embeddings)
        with torch.no_grad():
            new.weight.normal_(mean=0.0, std=self.config.initializer_range)
            new.weight[:n_kept] = old[:n_kept]
        new.weight.requires_grad_(old.requires_grad)
        self.base_model.embeddings.position_embeddings = new
        self.config.max_position_embeddings = new_num_position_embeddings

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation == "auto":
            dtype, dropout = self.config.dtype or torch.get_default_dtype(), self.config.attention_probs_dropout_prob
            attn_implementation, reason = best_attention(dtype, dropout)
            logger.warning_once(f'attn_implementation="auto" selects {attn_implementation!r} here: {reason}.')
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)


def best_attention(dtype: torch.dtype, dropout: float = 0.0) -> tuple[str, str]:
    """Choose the backend for `attn_implementation="auto"` on this machine.

    On a GPU and in half precision, it is an installed version of flash attention; else sdpa, if torch has varlen
    attention, which then serves packed batches; else the kernel of the Hub that transformers takes in place of
    flash-attn, if the package `kernels` can load it, which downloads it the first time; else sdpa. With attention
    dropout, only version 2 of flash attention and the kernel of the Hub serve: other versions ignore it, and torch's
    varlen attention refuses it.

    Parameters
    ----------
    dtype : torch.dtype
        Dtype of the weights.
    dropout : float
        Attention dropout of the model.

    Returns
    -------
    name, reason : str
        The backend, and why it is the best here.
    """
    if not torch.cuda.is_available():
        return "sdpa", "there is no GPU"
    if dtype not in (torch.float16, torch.bfloat16):
        return "sdpa", "flash attention needs weights in half precision"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return "sdpa", "flash attention needs a GPU of compute capability 8.0 or higher"
    installed = {2: is_flash_attn_2_available(), 3: is_flash_attn_3_available(), 4: is_flash_attn_4_available()}
    is_blackwell = capability >= (10, 0)  # which version 3 does not run on
    for number in (2,) if dropout else (4, 2) if is_blackwell else (3, 2, 4):
        if installed[number]:
            return f"flash_attention_{number}", "it is installed"
    if HAS_VARLEN and not dropout:
        return "sdpa", "torch has varlen attention"
    return _load_from_hub()


@cache  # the Hub is asked once: it may answer late, or never
def _load_from_hub() -> tuple[str, str]:
    """Load the kernel of the Hub for flash attention; return its name, or sdpa, and the reason."""
    kernel = FLASH_ATTN_KERNEL_FALLBACK["flash_attention_2"]
    if not is_kernels_available():
        return "sdpa", "neither flash-attn nor kernels is installed, in a version that transformers takes"
    logger.warning_once(f"Loading {kernel} from the Hub, or from the cache with HF_HUB_OFFLINE=1.")
    try:
        load_and_register_attn_kernel(kernel)
    except Exception as error:  # of the Hub, the kernel or its binary
        return "sdpa", f"{kernel} cannot be loaded ({str(error).rstrip('.')})"
    return kernel, "flash-attn is not installed, and kernels is"
