"""Count likelihoods against scipy and plain formulas in double precision."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from stformer_hf.models.cell_neighborhood.count_likelihoods import (
    MAX_LOG_DISPERSION,
    CountHead,
    check_counts,
    nb_log_likelihood,
    pearson_r,
    zinb_log_likelihood,
)

counts = st.integers(0, 10**6)
log_means = st.floats(-12, 14)
log_dispersions = st.floats(-MAX_LOG_DISPERSION, MAX_LOG_DISPERSION)
logits = st.floats(-40, 40)


def nb_of_scipy(x, log_mean, log_dispersion) -> float:
    theta, mean = math.exp(log_dispersion), math.exp(log_mean)
    return float(stats.nbinom.logpmf(x, theta, theta / (theta + mean)))


def nb_by_products(x, log_mean, log_dispersion) -> float:
    """Gamma(x + theta) / Gamma(theta) / x! is a product of x factors: no gamma function."""
    theta, mean = math.exp(log_dispersion), math.exp(log_mean)
    terms = [math.log((theta + i) / (i + 1)) for i in range(x)]
    return math.fsum([*terms, -theta * math.log1p(mean / theta), -x * math.log1p(theta / mean)])


def tensors(*values):
    return [torch.tensor([value], dtype=torch.float64) for value in values]


@given(counts, log_means, st.floats(-6, 6))
def test_nb_is_that_of_scipy(x, log_mean, log_dispersion):
    ours = nb_log_likelihood(*tensors(x, log_mean, log_dispersion)).item()
    assert ours == pytest.approx(nb_of_scipy(x, log_mean, log_dispersion), rel=1e-7, abs=1e-7)


@given(st.integers(0, 300), log_means, log_dispersions)
def test_nb_is_the_plain_product_also_at_the_ends_of_the_dispersion(x, log_mean, log_dispersion):
    ours = nb_log_likelihood(*tensors(x, log_mean, log_dispersion)).item()
    assert ours == pytest.approx(nb_by_products(x, log_mean, log_dispersion), rel=1e-7, abs=1e-7)


@given(st.integers(0, 300), log_means, log_dispersions, st.floats(-15, 15))
def test_zinb_is_the_plain_mixture(x, log_mean, log_dispersion, gate):
    ours = zinb_log_likelihood(*tensors(x, log_mean, log_dispersion, gate)).item()
    pi, one_less_pi = 1 / (1 + math.exp(-gate)), 1 / (1 + math.exp(gate))
    nb = nb_by_products(x, log_mean, log_dispersion)
    plain = math.log(pi + one_less_pi * math.exp(nb)) if x == 0 else math.log(one_less_pi) + nb
    assert ours == pytest.approx(plain, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("gate", [None, -1.0, 2.0])
@pytest.mark.parametrize(("log_mean", "log_dispersion"), [(0.5, -1.0), (2.0, 0.0), (-3.0, 3.0)])
def test_probabilities_add_up_to_one_and_give_the_mean_and_variance_that_are_said(log_mean, log_dispersion, gate):
    x = torch.arange(5000, dtype=torch.float64)
    parameters = [torch.full_like(x, value) for value in (log_mean, log_dispersion)]
    if gate is None:
        p = nb_log_likelihood(x, *parameters).exp()
    else:
        p = zinb_log_likelihood(x, *parameters, torch.full_like(x, gate)).exp()
    mean, theta = math.exp(log_mean), math.exp(log_dispersion)
    kept = 1.0 if gate is None else 1 / (1 + math.exp(gate))
    assert p.sum().item() == pytest.approx(1, abs=1e-9)
    assert (p * x).sum().item() == pytest.approx(kept * mean, rel=1e-6)
    assert (p * x**2).sum().item() == pytest.approx(kept * (mean + mean**2 / theta + mean**2), rel=1e-6)


def test_parameters_in_32_bits_lose_no_more_than_their_own_rounding():
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.integers(0, 50_000, 500), dtype=torch.float32)
    m, t, g = (torch.tensor(rng.uniform(-8, 11, 500), dtype=torch.float32) for _ in range(3))
    for function, parameters in ((nb_log_likelihood, (m, t)), (zinb_log_likelihood, (m, t, g))):
        narrow = function(x, *parameters)
        assert narrow.dtype == torch.float32
        wide = function(x.double(), *(parameter.double() for parameter in parameters))
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-6, atol=1e-6)


def nb_by_gammas(x, m, t):
    theta = t.exp()
    choose = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    return choose + theta * F.logsigmoid(t - m) + x * F.logsigmoid(m - t)


logs = st.floats(-12, 12, width=32)
points = st.tuples(st.integers(0, 10**5), logs, st.floats(-MAX_LOG_DISPERSION, MAX_LOG_DISPERSION, width=32))
near = st.tuples(st.just(-1), logs, logs)  # the count is the mean, where the terms cancel


@given(st.lists(points | near, min_size=1, max_size=40), st.integers(0, 2**32 - 1))
def test_values_and_slopes_are_as_exact_as_said(found, seed):
    """Against the plain formula in float64, which loses 1e-10 at most here."""
    rng = np.random.default_rng(seed)
    m, t = rng.uniform(-12, 12, (2, 200)).astype(np.float32)
    drawn = rng.poisson(np.minimum(rng.gamma(np.exp(t), np.exp(m - t)), 1e5)).clip(max=10**5)
    x, m, t = (
        torch.tensor(np.concatenate(pair)) for pair in zip(zip(*found, strict=True), (drawn, m, t), strict=True)
    )
    x, m, t = torch.where(x < 0, m.exp().round(), x).float(), m.float(), t.float()

    def value_and_slopes(function, *parameters):
        m, t = (parameter.detach().requires_grad_() for parameter in parameters)
        value = function(x.to(m.dtype), m, t)
        return [part.detach().double() for part in (value, *torch.autograd.grad(value.sum(), (m, t)))]

    exact, exact_of_mean, exact_of_dispersion = value_and_slopes(nb_by_gammas, m.double(), t.double())
    steep, variance = exact_of_mean.abs(), 1 / ((-m.double()).exp() + (-t.double()).exp())
    for parameters, bound in (((m, t), 1e-6), ((m.double(), t.double()), 3e-9)):
        value, of_mean, of_dispersion = value_and_slopes(nb_log_likelihood, *parameters)
        assert ((value - exact).abs() <= bound * (1 + exact.abs() + steep)).all()
        assert ((of_mean - exact_of_mean).abs() <= bound * (steep + variance)).all()
        assert (
            (of_dispersion - exact_of_dispersion).abs() <= 3 * bound * (1 + exact_of_dispersion.abs() + steep)
        ).all()


def test_the_likelihoods_compile_whole_and_need_no_float64():
    x, m, t, g = torch.randint(0, 5, (6, 4)), *torch.randn(3, 6, 4)
    compiled = torch.compile(zinb_log_likelihood, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (zinb_log_likelihood, compiled):
        parameters = [part.clone().requires_grad_() for part in (m, t, g)]
        function(x, *parameters).sum().backward()
        gradients.append(torch.stack([parameter.grad for parameter in parameters]))
    torch.testing.assert_close(*gradients)
    with NoFloat64():  # as on MPS
        nb_log_likelihood(x, m.requires_grad_(), t.bfloat16()).sum().backward()
        assert nb_log_likelihood(x, m.bfloat16(), t[0]).dtype == torch.bfloat16


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        assert not isinstance(result, torch.Tensor) or result.dtype != torch.float64
        return result


def test_gradients_are_the_numeric_ones():
    torch.manual_seed(0)
    x = torch.tensor([0.0, 0, 0, 1, 2, 17, 400, 0, 3])
    parameters = [(torch.randn(9, dtype=torch.float64) * 2).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(lambda m, t: nb_log_likelihood(x, m, t), parameters[:2])
    assert torch.autograd.gradcheck(lambda m, t, g: zinb_log_likelihood(x, m, t, g), parameters)
    assert torch.autograd.gradgradcheck(lambda m, t: nb_log_likelihood(x, m, t), parameters[:2])


@given(counts, st.floats(-80, 80), log_dispersions, st.floats(-200, 200))
def test_far_parameters_give_finite_values_and_gradients(x, log_mean, log_dispersion, gate):
    parameters = [torch.tensor([value]).requires_grad_() for value in (log_mean, log_dispersion, gate)]
    value = zinb_log_likelihood(torch.tensor([x]), *parameters)
    value.sum().backward()
    assert torch.isfinite(value).all() and value.item() <= 1e-6
    assert all(torch.isfinite(parameter.grad).all() for parameter in parameters)


def test_a_large_dispersion_is_poisson():
    x = torch.arange(40.0)
    ours = nb_log_likelihood(x, torch.full((40,), 2.0), torch.full((40,), MAX_LOG_DISPERSION))
    np.testing.assert_allclose(ours, stats.poisson.logpmf(x, math.exp(2.0)), atol=0.01)


@pytest.mark.parametrize("likelihood", ["nb", "zinb"])
def test_the_head_is_the_distribution_of_its_linear_layers(likelihood):
    torch.manual_seed(0)
    head, states, x = CountHead(6, 4, likelihood), torch.randn(5, 6), torch.randint(0, 4, (5, 4))
    with torch.no_grad():
        given = head(states)
        wide = head.double()
        mean, theta = wide.log_mean(states.double()).exp().numpy(), wide.log_dispersion(states.double()).exp().numpy()
        pi = 0 if likelihood == "nb" else torch.sigmoid(wide.gate_logits(states.double())).numpy()
    assert (given.gate_logits is None) == (likelihood == "nb")
    np.testing.assert_allclose(given.expected(), (1 - pi) * mean, rtol=1e-5)
    nb = stats.nbinom.pmf(x, theta, theta / (theta + mean))
    likelihoods = np.log(pi * (x.numpy() == 0) + (1 - pi) * nb)
    np.testing.assert_allclose(given.log_likelihood(x), likelihoods, rtol=1e-5, atol=1e-5)
    far = head.float()(states * 1e4)
    assert far.log_dispersion.abs().max() == MAX_LOG_DISPERSION
    assert torch.isfinite(far.log_likelihood(x)).all()


@given(st.integers(2, 30), st.integers(0, 2**32 - 1))
def test_pearson_is_that_of_scipy(n_genes, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.gamma(0.5, 20, (3, n_genes)), rng.poisson(3, (3, n_genes)).astype(float)
    a[1] = 7.3
    ours = pearson_r(torch.tensor(a, dtype=torch.float32), torch.tensor(b))
    assert torch.isnan(ours[1])
    for i in (0, 2):
        if (b[i] == b[i, 0]).all():
            assert torch.isnan(ours[i])
        else:
            assert ours[i].item() == pytest.approx(stats.pearsonr(a[i].astype(np.float32), b[i])[0], abs=1e-6)


@pytest.mark.parametrize(
    ("values", "found"),
    [([0.5, 1], "fractional"), ([-1, 2], "negative"), ([float("nan"), 1], "NaN"), ([float("inf"), 1], "infinite")],
)
def test_what_is_no_count_is_told(values, found):
    with pytest.raises(ValueError, match=f"masked_expression holds .*{found}.*normalize=None"):
        check_counts(torch.tensor(values), "masked_expression")


def test_counts_of_any_type_pass():
    for values in (
        torch.tensor([0.0, 3e7]),
        torch.tensor([0, 5]),
        torch.zeros(0, 4),
        torch.tensor([3], dtype=torch.uint8),
    ):
        check_counts(values, "counts")
