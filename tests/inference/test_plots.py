"""Pictures show what they say."""

import numpy as np
import pytest

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")

from stformer_hf.inference import plots  # noqa: E402


def test_confusion_has_true_classes_in_rows(tmp_path):
    ax = plots.confusion(["a", "a", "b"], ["a", "b", "b"], ["a", "b"], save=tmp_path / "c.png")
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.5, 0.5], [0, 1]])
    assert {(text.get_position(), text.get_text()) for text in ax.texts} == {
        ((0, 0), "1"),
        ((1, 0), "1"),
        ((1, 1), "1"),
    }
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("true", "predicted")
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_confusion_refuses_classes_that_have_no_row():
    with pytest.raises(ValueError, match="1 classes are not in labels, such as c"):
        plots.confusion(["a", "c"], ["a", "b"], ["a", "b"])


def test_loss_curves_draw_both_losses():
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}, {"train_runtime": 1}]
    ax = plots.loss_curves({"run": history})
    assert [line.get_ydata().tolist() for line in ax.lines] == [[3.0, 2.0], [2.5]]
    assert matplotlib.pyplot.get_fignums()
    matplotlib.pyplot.close("all")
