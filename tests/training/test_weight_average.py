"""A moving average of the weights."""

import pytest
import torch
from torch import nn

from stformer_hf.training.weight_average import WeightAverage


def test_the_average_is_that_of_all_weights_so_far(tmp_path):
    model = nn.Linear(3, 2)
    average = WeightAverage(0.75)
    average.begin(model)
    expected = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for _ in range(4):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.add_(torch.randn_like(weight))
                expected[name] = 0.75 * expected[name] + 0.25 * weight
        average.update(model)
    weights = model.weight.detach().clone()
    with average.in_place_of_weights(model):
        torch.testing.assert_close(model.weight.detach(), expected["weight"])
    assert torch.equal(model.weight.detach(), weights)

    average.save(tmp_path)
    again = WeightAverage(0.75)
    again.load(tmp_path, model)
    for each in (average, again):
        each.update(model)
    results = []
    for each in (average, again):
        other = nn.Linear(3, 2)
        each.copy_to(other)
        results.append(other.weight.detach())
    assert torch.equal(*results)
    with pytest.raises(ValueError, match="belongs to another model"):
        again.load(tmp_path, nn.Bilinear(2, 2, 2, bias=False))
    with pytest.raises(ValueError, match="resume without ema"):
        again.load(tmp_path / "nothing", model)


@pytest.mark.parametrize("decay", [0, 1, -0.5, 1.5])
def test_a_decay_is_between_0_and_1(decay):
    with pytest.raises(ValueError, match="above 0 and below 1"):
        WeightAverage(decay)
