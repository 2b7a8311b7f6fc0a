"""Transforms: each is what its formula says, and what is no transform is told at once."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.preprocessing import LabelEncoder

from stformer_hf.compat.transforms import Compose, EncodeLabels, LogTransform, NormalizeRowSum, Transform


class Add(Transform):
    def __init__(self, value):
        self.value = value

    def __call__(self, data_dict):
        data_dict["X"] = data_dict["X"] + self.value
        return data_dict


def cell(values, **obs) -> dict:
    return {"X": torch.tensor(values, dtype=torch.float32), **{f"obs_{name}": value for name, value in obs.items()}}


@pytest.fixture
def encoder():
    return LabelEncoder().fit(["T cell", "B cell", "NK"])  # sorted: B cell 0, NK 1, T cell 2


def test_transform_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Transform()


def test_compose_applies_in_order():
    assert Compose([Add(1), LogTransform()])(cell([0.0, 1.0]))["X"].tolist() == pytest.approx(np.log([2, 3]).tolist())
    assert Compose([LogTransform(), Add(1)])(cell([0.0, 1.0]))["X"].tolist() == pytest.approx([1, np.log(2) + 1])


def test_an_empty_compose_and_members_that_are_no_transform_are_refused():
    with pytest.raises(ValueError, match="at least one transform"):
        Compose([])
    for member in (torch.log1p, LogTransform, None):
        with pytest.raises(TypeError, match="subclass of Transform"):
            Compose([LogTransform(), member])


@given(st.lists(st.floats(-50, 1000, width=32), min_size=1, max_size=20), st.floats(0.5, 1e6))
def test_row_sums_are_normalised_as_by_numpy(values, target_sum):
    found = NormalizeRowSum(target_sum)(cell(values))["X"]
    clipped = np.clip(np.array(values, np.float64), 0, None)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), clipped * target_sum / (clipped.sum() + 1e-8), rtol=1e-4, atol=1e-30)


def test_a_cell_without_counts_stays_zero():
    assert Compose([NormalizeRowSum(), LogTransform()])(cell([0.0, 0.0]))["X"].tolist() == [0, 0]


@pytest.mark.parametrize("target_sum", [0, -1.0, float("nan")])
def test_a_sum_that_no_cell_can_have_is_refused(target_sum):
    with pytest.raises(ValueError, match="above 0"):
        NormalizeRowSum(target_sum)


@pytest.mark.parametrize(("label", "number"), [("B cell", 0), ("NK", 1), ("T cell", 2), ("", -100)])
def test_labels_are_encoded_beside_themselves(encoder, label, number):
    found = EncodeLabels(label_encoder=encoder)(cell([1.0], cell_type=label))
    assert found["obs_cell_type"] == label
    assert found["obs_cell_type_encoded"].dtype == torch.long
    assert found["obs_cell_type_encoded"].shape == ()
    assert found["obs_cell_type_encoded"].item() == number


def test_a_missing_label_adds_nothing_to_the_loss(encoder):
    encode = EncodeLabels(label_encoder=encoder)
    labels = [encode(cell([1.0], cell_type=label))["obs_cell_type_encoded"] for label in ("NK", "")]
    logits = torch.randn(2, 3)
    loss = torch.nn.functional.cross_entropy(logits, torch.stack(labels))
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[:1], torch.tensor([1])))


def test_an_unknown_label_is_named(encoder):
    with pytest.raises(ValueError, match="'cell_type': the encoder does not know the label 'Mast cell'"):
        EncodeLabels(label_encoder=encoder)(cell([1.0], cell_type="Mast cell"))


def test_labels_that_are_numbers_are_encoded_too():
    encode = EncodeLabels("cluster", "target", LabelEncoder().fit([3, 8]))
    assert encode(cell([1.0], cluster=torch.tensor(8)))["target"].item() == 1
    assert encode(cell([1.0], cluster=torch.tensor(float("nan"))))["target"].item() == -100


def test_nothing_is_encoded_without_an_encoder_or_a_label(encoder):
    assert EncodeLabels()(cell([1.0], cell_type="NK")).keys() == {"X", "obs_cell_type"}
    assert EncodeLabels("donor", label_encoder=encoder)(cell([1.0], cell_type="NK")).keys() == {"X", "obs_cell_type"}


def test_transforms_are_pickled_and_shown(encoder):
    transform = Compose([NormalizeRowSum(100.0), LogTransform(), EncodeLabels(label_encoder=encoder)])
    again = pickle.loads(pickle.dumps(transform))
    one, other = (t(cell([1.0, 3.0], cell_type="NK")) for t in (transform, again))
    assert one["X"].tolist() == other["X"].tolist()
    assert one["obs_cell_type_encoded"] == other["obs_cell_type_encoded"]
    assert repr(transform) == (
        "Compose([NormalizeRowSum(target_sum=100.0), LogTransform(), "
        "EncodeLabels(obs_key='cell_type', encoded_key='obs_cell_type_encoded')])"
    )
