"""GeneBert on one cell without padding, in float64, from a model's weights and without its code."""

import torch
from torch.nn import functional as F


def plain_encoder(model, input_ids, token_type_ids, values=None) -> torch.Tensor:
    """Hidden states (length, hidden) of one cell."""
    weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
    config = model.config

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name, x):
        if config.norm_type == "rms_norm":
            x = x / (x.square().mean(-1, keepdim=True) + config.layer_norm_eps).sqrt()
            return x * weights[f"{name}.weight"]
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + config.layer_norm_eps).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    activation = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}[config.hidden_act]

    def feed_forward(name, x):
        inner = linear(f"{name}.lin1", x)
        if config.gated_feed_forward:
            n = config.intermediate_size
            return linear(f"{name}.lin2", activation(inner[:, :n]) * inner[:, n:])
        return linear(f"{name}.lin2", activation(inner))

    size = config.hidden_size // config.num_attention_heads

    def turned(x):
        """Each pair (i, i + size / 2) is a complex number, turned by place * base ** (-2 i / size)."""
        if config.position_embedding_type != "rotary":
            return x
        half = size // 2
        pairs = torch.complex(x[:, :half], x[:, half:])
        speed = config.rotary_base ** (-2 * torch.arange(half, dtype=torch.float64) / size)
        angle = torch.arange(len(x), dtype=torch.float64)[:, None] * speed
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pairs.real, pairs.imag], -1)

    def attention(name, x):
        query, key, value = (linear(f"{name}.{part}_lin", x) for part in "qkv")
        heads = []
        for h in range(config.num_attention_heads):
            cut = slice(h * size, (h + 1) * size)
            scores = turned(query[:, cut]) @ turned(key[:, cut]).T / size**0.5
            heads.append(torch.softmax(scores, dim=-1) @ value[:, cut])
        return linear(f"{name}.out_lin", torch.cat(heads, -1))

    x = weights["embeddings.word_embeddings.weight"][input_ids]
    if config.value_embedding == "soft_bins":
        for i, value in enumerate(values):
            if value:
                slope, offset, bins = (
                    weights[f"embeddings.value_embeddings.{name}"] for name in ("slope", "offset", "bins.weight")
                )
                x[i] = torch.softmax(slope * value + offset, -1) @ bins
    x = x + weights["embeddings.token_type_embeddings.weight"][token_type_ids]
    if config.position_embedding_type == "learned":
        x = x + weights["embeddings.position_embeddings.weight"][: len(x)]
    if config.value_embedding is True:
        for i, value in enumerate(values):
            if value:
                inner = activation(linear("embeddings.value_embeddings.lin1", torch.tensor([value]).double()))
                x[i] += linear("embeddings.value_embeddings.lin2", inner)
    x = norm("embeddings.LayerNorm", x)
    for i in range(config.num_hidden_layers):
        layer = f"layers.{i}"
        if config.pre_norm:
            x = x + attention(f"{layer}.attention", norm(f"{layer}.sa_layer_norm", x))
            x = x + feed_forward(f"{layer}.ffn", norm(f"{layer}.output_layer_norm", x))
        else:
            x = norm(f"{layer}.sa_layer_norm", x + attention(f"{layer}.attention", x))
            x = norm(f"{layer}.output_layer_norm", x + feed_forward(f"{layer}.ffn", x))
    return norm("final_norm", x) if config.pre_norm else x
