"""Distributions of counts: negative binomial with or without zero inflation, a head for them, Pearson r per cell."""

import math
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import logsigmoid

# Bounds of the log dispersion that the head returns. Beyond them a count is practically Poisson, or practically 0.
MAX_LOG_DISPERSION = 12.0


_FARTHEST_LOG = 40.0  # logs are clipped to it, so that nothing overflows
_SHIFT = 4  # f(z) is computed from Stirling's series at z + 4, where four of its terms are exact to 3e-9


def _bounded_exp(logs: torch.Tensor) -> torch.Tensor:
    return logs.clamp(-_FARTHEST_LOG, _FARTHEST_LOG).exp()


def _gamma_parts(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a and b of log Gamma(z) - z log z + z = a - log(b) / 2 + log(2 pi) / 2 - 4."""
    shifted = z + _SHIFT
    r = 1 / shifted
    s, y = r * r, z * (z + 3)  # y (y + 2) = z (z + 1) (z + 2) (z + 3)
    series = r * (1 / 12 - s * (1 / 360 - s * (1 / 1260 - s / 1680)))
    return z * torch.log1p(_SHIFT / z) + series, (y * s * ((y + 2) * s)).square() * shifted


def _gamma_slope(z: torch.Tensor) -> torch.Tensor:
    """Return the derivative of log Gamma(z) - z log z + z, digamma(z) - log z."""
    r, y = 1 / (z + _SHIFT), z * (z + 3)
    s = r * r
    series = r / 2 + s * (1 / 12 - s * (1 / 120 - s * (1 / 252 - s / 240)))
    return torch.log1p(_SHIFT / z) - series - (2 * z + 3) * (1 / y + 1 / (y + 2))


class _NegativeBinomial(torch.autograd.Function):
    r"""Log likelihood of counts x in the dtype of all three tensors, without differences of large numbers.

    With :math:`f(z) = \log \Gamma(z) - z \log z + z`, and f + log x in place of f for the last one, it is

    .. math:: f(x + \theta) - f(\theta) - (f(x) + \log x) - D, \quad
        D = x \log \frac{x (\mu + \theta)}{\mu (x + \theta)} - \theta \log \frac{x + \theta}{\mu + \theta} \ge 0

    where the logarithms of D are those of 1 + |x - mu| / something. No term is much larger than the result, as in the
    binomial of Loader 2000; float32 is as exact as its parameters.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, log_mean: torch.Tensor, log_dispersion: torch.Tensor) -> torch.Tensor:
        mu, theta = _bounded_exp(log_mean), _bounded_exp(log_dispersion)
        some, lower, upper = x.clamp(min=1), torch.minimum(x, mu), torch.maximum(x, mu)
        apart = upper - lower
        of_x = x * torch.log1p(apart / torch.minimum(some, mu) * (theta / (upper + theta)))
        deviance = (of_x - theta * torch.log1p(apart / (lower + theta))).abs()
        (a_both, b_both), (a, b), (a_x, b_x) = (_gamma_parts(z) for z in (x + theta, theta, some))
        factorial = a_x - _SHIFT + (math.log(2 * math.pi) - torch.log(b_x / some.square())) / 2
        return a_both - a + torch.log(b / b_both) / 2 - factorial * x.clamp(max=1) - deviance

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        x, log_mean, log_dispersion = ctx.saved_tensors
        mu, theta = _bounded_exp(log_mean), _bounded_exp(log_dispersion)
        away = (x - mu) / (mu + theta)
        log_ratio = torch.copysign(torch.log1p((x - mu).abs() / (torch.minimum(x, mu) + theta)), away)
        of_dispersion = _gamma_slope(x + theta) - _gamma_slope(theta) + log_ratio - away
        return None, gradient * theta * away, gradient * theta * of_dispersion


def nb_log_likelihood(counts: torch.Tensor, log_mean: torch.Tensor, log_dispersion: torch.Tensor) -> torch.Tensor:
    r"""Log likelihood of counts under negative binomials.

    Parameters
    ----------
    counts : Tensor (…)
        Whole numbers, 0 or more, of any type.
    log_mean : Tensor (…)
        Log of the mean :math:`\mu`.
    log_dispersion : Tensor (…)
        Log of the dispersion :math:`\theta`: the variance is :math:`\mu + \mu^2 / \theta`. Both logs are clipped to
        -40 and 40; beyond these the gradient is that at -40 or 40, not 0.

    Returns
    -------
    Tensor (…)
        In nats, in the dtype of `log_mean`; computed in float64 if that is its dtype, else in float32.

    Notes
    -----
    .. math:: \log \Gamma(x + \theta) - \log \Gamma(\theta) - \log \Gamma(x + 1)
        + \theta \log \frac{\theta}{\theta + \mu} + x \log \frac{\mu}{\theta + \mu}

    `scipy.stats.nbinom` calls :math:`\theta` n, and :math:`\theta / (\theta + \mu)` p.

    For counts up to 100,000 and logs m of the mean and t of the dispersion within -12 and 12, a float32 value l is
    exact to 1e-6 (1 + |l| + |dl/dm|), about what one rounding of m changes; dl/dm is exact to
    1e-6 (|dl/dm| + :math:`\mu \theta / (\mu + \theta)`), and dl/dt to 3e-6 (1 + |dl/dt| + |dl/dm|). In
    float64 the bounds are 3e-9 and 9e-9.

    References
    ----------
    Loader 2000, Fast and accurate computation of binomial probabilities.
    """
    dtype = torch.promote_types(log_mean.dtype, torch.float32)
    tensors = torch.broadcast_tensors(counts, log_mean, log_dispersion)
    return _NegativeBinomial.apply(*(tensor.to(dtype) for tensor in tensors)).to(log_mean.dtype)


def zinb_log_likelihood(
    counts: torch.Tensor, log_mean: torch.Tensor, log_dispersion: torch.Tensor, gate_logits: torch.Tensor
) -> torch.Tensor:
    r"""Log likelihood of counts under zero-inflated negative binomials.

    Parameters
    ----------
    counts, log_mean, log_dispersion : Tensor (…)
        As in `nb_log_likelihood`; mean and dispersion are those of the negative binomial.
    gate_logits : Tensor (…)
        Log odds g of an excess zero: a count is 0 with probability :math:`\pi = \sigma(g)`, else a draw from the
        negative binomial.

    Returns
    -------
    Tensor (…)
        In nats, in the dtype of `log_mean`; computed as by `nb_log_likelihood`.

    Notes
    -----
    :math:`\log(\pi + (1 - \pi) \mathrm{NB}(0))` for a zero, :math:`\log(1 - \pi) + \log \mathrm{NB}(x)` else.
    """
    dtype = torch.promote_types(log_mean.dtype, torch.float32)
    gate = gate_logits.to(dtype)
    drawn = logsigmoid(-gate) + nb_log_likelihood(counts, log_mean.to(dtype), log_dispersion)
    return torch.where(counts == 0, torch.logaddexp(logsigmoid(gate), drawn), drawn).to(log_mean.dtype)


class CountDistribution(NamedTuple):
    """Negative binomials of the counts of B cells in G genes: float32 Tensors (B, G)."""

    log_mean: torch.Tensor
    log_dispersion: torch.Tensor
    gate_logits: torch.Tensor | None  # log odds of an excess zero; None without zero inflation

    def log_likelihood(self, counts: torch.Tensor) -> torch.Tensor:
        """Return the log likelihood (B, G) of counts (B, G), in nats."""
        if self.gate_logits is None:
            return nb_log_likelihood(counts, self.log_mean, self.log_dispersion)
        return zinb_log_likelihood(counts, self.log_mean, self.log_dispersion, self.gate_logits)

    def expected(self) -> torch.Tensor:
        """Return the expected counts (B, G): the mean times the probability of no excess zero."""
        mean = self.log_mean.exp()
        return mean if self.gate_logits is None else mean * torch.sigmoid(-self.gate_logits)


class CountHead(nn.Module):
    r"""Distribution of each gene's counts from a state, with one linear layer per parameter.

    The mean is the exponential of a linear layer. It is not a share (softmax) times a library size: the total of a
    masked cell is part of the prediction, and a head that reads it would see part of the answer.

    Parameters
    ----------
    hidden_size, n_genes : int
    likelihood : {"zinb", "nb"}
    """

    def __init__(self, hidden_size: int, n_genes: int, likelihood: str):
        super().__init__()
        self.log_mean = nn.Linear(hidden_size, n_genes)
        self.log_dispersion = nn.Linear(hidden_size, n_genes)
        self.gate_logits = nn.Linear(hidden_size, n_genes) if likelihood == "zinb" else None

    def forward(self, states: torch.Tensor) -> CountDistribution:
        """Return the distributions of B cells from states (B, hidden_size)."""
        log_dispersion = self.log_dispersion(states).float().clamp(-MAX_LOG_DISPERSION, MAX_LOG_DISPERSION)
        gate_logits = None if self.gate_logits is None else self.gate_logits(states).float()
        return CountDistribution(self.log_mean(states).float(), log_dispersion, gate_logits)

    @torch.no_grad()
    def start_at(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Initialise the head so that it predicts the given mean and variance of each gene for any state.

        The weights are set to 0, and the biases to negative binomials with this mean and variance and 5 % excess
        zeros. Training would take long to get there from another start: 1,000 steps of Adam at 1e-3 move a log mean by
        at most 1.

        Parameters
        ----------
        mean, variance : Tensor (n_genes,)
            Mean and variance of the training cells' counts. Means are clipped to at least 1e-4.
        """
        mean = mean.double().clamp_min(1e-4)
        # The variance of a negative binomial is mean + mean ** 2 / dispersion.
        dispersion = (mean.square() / (variance.double() - mean).clamp_min(1e-12)).clamp(0.05, 1000.0)
        biases = [(self.log_mean, mean.log()), (self.log_dispersion, dispersion.log())]
        if self.gate_logits is not None:
            biases.append((self.gate_logits, torch.full_like(mean, math.log(1 / 19))))
        for layer, values in biases:
            layer.weight.zero_()
            layer.bias.copy_(values)


def check_counts(counts: torch.Tensor, name: str) -> None:
    """Raise ValueError if a tensor holds NaN, infinite, negative or fractional values; `name` is for the message.

    Nothing is checked on a GPU, which would have to synchronise.
    """
    if (
        counts.device.type != "cpu"
        or torch.compiler.is_compiling()
        or bool(((counts >= 0) & (counts == counts.round()) & (counts < float("inf"))).all())
    ):
        return
    unfit = (
        "NaN or infinite" if not torch.isfinite(counts).all() else "negative" if (counts < 0).any() else "fractional"
    )
    raise ValueError(
        f"{name} holds {unfit} values, but the likelihood needs counts. Pass batches of counts (a sampler with "
        "normalize=None); the model applies log1p to its input itself (config.apply_log1p=True)."
    )


def pearson_r(predicted: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
    """Compute the Pearson correlation of each cell's predicted and observed expression over its genes.

    Parameters
    ----------
    predicted, observed : Tensor (B, G)
        Expression on the same scale, such as counts or their log1p.

    Returns
    -------
    Tensor (B,)
        float64 (float32 on devices without float64). NaN if one of the two is constant over the genes, as in a cell
        without counts, since r is not defined there.
    """
    dtype = torch.float32 if predicted.device.type == "mps" else torch.float64
    a, b = (part - part.mean(-1, keepdim=True) for part in (predicted.to(dtype), observed.to(dtype)))
    # In a constant row rounding errors of the mean may remain, and r would be noise.
    varies = (predicted != predicted[..., :1]).any(-1) & (observed != observed[..., :1]).any(-1)
    r = nn.functional.cosine_similarity(a, b, dim=-1, eps=0.0)
    return torch.where(varies, r, torch.nan)
