"""Losses of two views, against plain numpy versions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from stformer_hf.training.objectives import check_objectives
from stformer_hf.training.objectives.contrast import comparable_cells, contrast_loss, contrast_of_totals
from stformer_hf.training.objectives.cross_correlation import cross_correlation_loss
from stformer_hf.training.objectives.decode import decode_loss

TWINS = torch.tensor([1, 2, 1, 3, 4, 5])
SOURCES = torch.tensor([0, 0, 0, 0, 1, 1])
USABLE = torch.tensor([True, True, True, False, True, True])


def plain_info_nce(logits, twins, sources, usable):
    losses = []
    for own in np.flatnonzero(usable):
        others = [
            k for k in np.flatnonzero(usable) if k != own and sources[k] == sources[own] and twins[k] != twins[own]
        ]
        if others:
            for scores in (logits[own], logits[:, own]):
                losses.append(np.log(np.exp(scores[[own, *others]]).sum()) - scores[own])
    return np.mean(losses)


def test_contrast_is_within_a_source_and_leaves_twins_out():
    states = torch.randn(12, 8, generator=torch.manual_seed(0))
    comparable = comparable_cells(TWINS, SOURCES, USABLE)
    unit = (states / states.norm(dim=1, keepdim=True)).double().numpy()
    expected = plain_info_nce(unit[:6] @ unit[6:].T / 0.1, TWINS.numpy(), SOURCES.numpy(), USABLE.numpy())
    assert contrast_loss(states, comparable).item() == pytest.approx(expected, rel=1e-5)
    assert not comparable[0, 2] and not comparable[0, 4] and comparable[0, 1] and not comparable[3].any()


def test_contrast_without_negatives_is_zero_and_has_a_gradient():
    states = torch.randn(4, 8, requires_grad=True)
    comparable = comparable_cells(torch.tensor([1, 1]), torch.zeros(2), torch.ones(2, dtype=torch.bool))
    loss = contrast_loss(states, comparable)
    loss.backward()
    assert loss.item() == 0 and not states.grad.any()


def test_contrast_of_totals_is_that_of_a_normal_reader():
    totals = torch.tensor([10.0, 200, 35, 1, 900, 50, 12, 180, 30, 0, 1000, 45])
    x, y = np.log(np.maximum(totals.numpy(), 1)).reshape(2, -1).astype(float)
    difference = (x - y)[USABLE.numpy()]
    scores = stats.norm(difference.mean(), difference.std()).logpdf(x[:, None] - y)
    expected = plain_info_nce(scores, TWINS.numpy(), SOURCES.numpy(), USABLE.numpy())
    found = contrast_of_totals(totals, comparable_cells(TWINS, SOURCES, USABLE))
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_cross_correlation():
    states = torch.randn(12, 5, generator=torch.manual_seed(1))
    states[:, 4] = 2.0  # does not vary
    first, second = states.double().numpy().reshape(2, 6, 5)[:, USABLE.numpy()]
    expected = 0.0
    for i in range(5):
        for j in range(5):
            a, b = first[:, i], second[:, j]
            spread = np.sqrt((a.var() + 1e-4) * (b.var() + 1e-4))
            correlation = ((a - a.mean()) * (b - b.mean())).mean() / spread
            expected += (1 - correlation) ** 2 / 5 if i == j else 0.01 * correlation**2 / 5
    assert cross_correlation_loss(states, USABLE).item() == pytest.approx(expected, rel=1e-5)
    assert cross_correlation_loss(states, torch.zeros(6, dtype=torch.bool)).item() == 0


def decoding_batch(packed: bool) -> dict:
    """Two cells of five genes, in two views; -1 is a masked gene."""
    counts = np.array([[3, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 1, 7, -1], [0, 0, 0, 2, 5]], np.float32)
    entries = [(np.flatnonzero(row), row[np.flatnonzero(row)]) for row in counts]
    measured = np.array([[1, 1, 0, 0, 0]] * 2 + [[0, 0, 1, 1, 1]] * 2, bool)
    batch = {"measured_genes": torch.from_numpy(measured)}
    if packed:
        cuts = np.cumsum([0, *(len(genes) for genes, _ in entries)])
        flat = [np.concatenate(of)[None] for of in zip(*entries, strict=True)]
        return batch | {
            "cell_genes": torch.from_numpy(flat[0]),
            "cell_counts": torch.from_numpy(flat[1]),
            "cell_indptr": torch.from_numpy(cuts),
        }
    genes, values = np.zeros((4, 3), np.int64), np.zeros((4, 3), np.float32)
    for row, (of, number) in enumerate(entries):
        genes[row, : len(of)], values[row, : len(of)] = of, number
    return batch | {"cell_genes": torch.from_numpy(genes), "cell_counts": torch.from_numpy(values)}


@pytest.mark.parametrize("packed", [False, True])
def test_decoding_predicts_the_counts_of_the_other_view_from_its_total(packed):
    logits = torch.randn(4, 5, generator=torch.manual_seed(2), requires_grad=True)
    dispersion = torch.tensor([0.3, -0.2, 1.0, 0.5, 0.0], requires_grad=True)
    known = torch.tensor([True] * 5)
    usable = torch.tensor([True, False])
    loss, n_views = decode_loss(logits, dispersion, decoding_batch(packed), known, usable)
    loss.backward()

    def nll(row, genes, counts):
        shares = np.exp(logits.detach().double().numpy()[row, genes])
        theta = np.exp(dispersion.detach().double().numpy()[genes])
        mean = shares / shares.sum() * sum(counts)
        return -stats.nbinom.logpmf(counts, theta, theta / (theta + mean)).sum() / sum(counts)

    # From the first view of cell 0 its genes 2 and 3 (4 is masked), from the second its genes 0 and 1.
    expected = (nll(0, [2, 3], [1, 7]) + nll(2, [0, 1], [3, 0])) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5) and n_views == 2
    assert torch.isfinite(logits.grad).all() and logits.grad[0, [2, 3]].all() and not logits.grad[[1, 3]].any()
    assert not logits.grad[0, [0, 1, 4]].any()


def losses_of_pairs(states, totals, twins, sources, usable):
    comparable = comparable_cells(twins, sources, usable)
    return [
        contrast_loss(states, comparable),
        cross_correlation_loss(states, usable),
        contrast_of_totals(totals, comparable),
    ]


@given(usable=st.lists(st.booleans(), min_size=1, max_size=9), seed=st.integers(0, 99))
def test_cells_without_counts_change_neither_loss_nor_gradient(usable, seed):
    generator = torch.manual_seed(seed)
    usable = torch.tensor(usable)
    n, both = len(usable), usable.repeat(2)
    states = torch.randn(2 * n, 5, generator=generator)
    totals = torch.randint(1, 900, (2 * n,), generator=generator) * both
    twins, sources = torch.randint(0, 5, (n,), generator=generator), torch.randint(0, 2, (n,), generator=generator)
    of_all, of_usable = states.requires_grad_(), states.detach()[both].requires_grad_()
    found = losses_of_pairs(of_all, totals, twins, sources, usable)
    others = totals[both], twins[usable], sources[usable], usable[usable]
    expected = losses_of_pairs(of_usable, *others)
    for loss, of in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, of, rtol=1e-4, atol=1e-5)
    sum(found[:2]).backward()
    sum(expected[:2]).backward()
    torch.testing.assert_close(of_all.grad[both], of_usable.grad, rtol=1e-3, atol=1e-5)
    assert not of_all.grad[~both].any()


@given(counts=arrays(np.float32, (6, 5), elements=st.sampled_from([-1, 0, 0, 1, 4])), seed=st.integers(0, 99))
def test_decoding_padded_and_packed_views_is_the_same(counts, seed):
    generator = torch.manual_seed(seed)
    logits, dispersion = torch.randn(6, 5, generator=generator), torch.randn(5, generator=generator)
    known, usable = torch.rand(5, generator=generator) < 0.8, torch.rand(3, generator=generator) < 0.8
    rows, genes = np.nonzero(counts)
    lengths = np.bincount(rows, minlength=6)
    packed = {
        "cell_genes": torch.from_numpy(genes)[None],
        "cell_counts": torch.from_numpy(counts[rows, genes])[None],
        "cell_indptr": torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])),
    }
    padded = {"cell_genes": torch.zeros(6, 5, dtype=torch.int64), "cell_counts": torch.zeros(6, 5)}
    for row in range(6):  # the padding has gene 0, which may be masked in the cell
        padded["cell_genes"][row, : lengths[row]] = torch.from_numpy(np.flatnonzero(counts[row]))
        padded["cell_counts"][row, : lengths[row]] = torch.from_numpy(counts[row][np.flatnonzero(counts[row])])
    found, expected = (decode_loss(logits, dispersion, batch, known, usable) for batch in (padded, packed))
    torch.testing.assert_close(found[0], expected[0])
    assert found[1] == expected[1] and torch.isfinite(found[0])


def test_objectives_are_checked():
    assert check_objectives(None) == {"mlm": 1.0}
    assert check_objectives({"decode": 2, "mlm": 0}) == {"decode": 2.0}
    with pytest.raises(ValueError, match="Unknown objective 'contrst'; valid ones are mlm, contrast"):
        check_objectives({"contrst": 1.0})
    for wrong in (-1.0, float("nan"), float("inf"), "1", True):
        with pytest.raises(ValueError, match="0 or more; got contrast"):
            check_objectives({"contrast": wrong})
    with pytest.raises(ValueError, match="No objective has a weight above 0"):
        check_objectives({"mlm": 0})
