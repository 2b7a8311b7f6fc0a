"""Metrics of batches against their definitions, and against scib-metrics where it is installed."""

import sys

import numpy as np
import pytest

from stformer_hf.evaluation.integration import batch_ilisi, batch_kbet, batch_pcr, connectivity, integration_scores


def cells(shift: float, n: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells of three classes in two batches that are `shift` apart."""
    rng = np.random.default_rng(0)
    labels, batches = rng.integers(0, 3, n), rng.integers(0, 2, n)
    embedding = rng.normal(size=(n, 6)) + 4 * np.eye(6)[labels] + shift * batches[:, None]
    return embedding, np.array(["a", "b", "c"])[labels], np.array(["p", "q"])[batches]


def test_mixed_batches_score_higher_than_separate_ones():
    mixed, between, apart = (integration_scores(*cells(shift)) for shift in (0.0, 1.0, 20.0))
    for metric in mixed:
        assert 1.001 > mixed[metric] > between[metric] > apart[metric] > -0.001, metric
    assert apart["batch_ilisi"] == pytest.approx(0, abs=1e-3)
    assert mixed["batch_ilisi"] > 0.85 and mixed["batch_pcr"] > 0.99


def test_variance_of_batches_is_that_of_a_regression():
    embedding, _, batches = cells(1.0)
    centred = embedding - embedding.mean(axis=0)
    one_hot = np.stack([batches == "p", batches == "q"], axis=1).astype(float)
    explained = one_hot @ np.linalg.lstsq(one_hot, centred, rcond=None)[0]
    assert batch_pcr(embedding, batches) == pytest.approx(1 - (explained**2).sum() / (centred**2).sum())
    assert np.isnan(batch_pcr(np.ones((4, 2)), np.array(["p", "q"] * 2)))


def test_the_order_of_hashes_changes_no_digit():
    """Python draws the hashes of strings anew in each process."""

    class Name(str):
        turn = 0

        def __hash__(self):
            return (int(self) + Name.turn) % 8

    for seed in range(60):
        rng = np.random.default_rng(seed)
        embedding, batches = rng.normal(size=(60, 3)), np.array([Name(i) for i in rng.integers(0, 8, 60)], object)
        found = set()
        for Name.turn in range(8):
            found.add(batch_pcr(embedding, batches))
        assert len(found) == 1


def test_a_constant_embedding_mixes_perfectly_however_many_batches():
    batches = np.array(["p", "q", "r"] * 40)
    assert batch_ilisi(np.zeros((120, 2)), batches) == pytest.approx(1, abs=0.05)


def test_a_class_in_two_places_is_half_connected():
    rng = np.random.default_rng(0)
    place = np.repeat([0, 50, 100], 40)
    embedding = rng.normal(size=(120, 2)) + place[:, None]
    assert connectivity(embedding, np.repeat(["a", "b", "c"], 40)) == 1
    assert connectivity(embedding, np.where(place == 50, "b", "a")) == 0.75


def test_kbet_without_its_extra_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "scib_metrics", None)
    with pytest.raises(ImportError, match=r"stformer_hf\[scib\]"):
        batch_kbet(*cells(0.0))


def test_the_plain_forms_give_what_scib_metrics_gives():
    scib_metrics = pytest.importorskip("scib_metrics", reason="scib-metrics (extra scib) is not installed")
    from scib_metrics.nearest_neighbors import NeighborsResults
    from scib_metrics.utils import principal_component_regression
    from sklearn.neighbors import NearestNeighbors

    embedding, labels, batches = cells(1.0)
    embedding = embedding.astype(np.float32)
    distances, rows = NearestNeighbors(n_neighbors=90).fit(embedding).kneighbors(embedding)
    near = NeighborsResults(indices=rows, distances=distances)
    found = integration_scores(embedding, labels, batches)
    assert found == pytest.approx(
        {
            "batch_silhouette": scib_metrics.silhouette_batch(embedding, labels, batches),
            "batch_ilisi": scib_metrics.ilisi_knn(near, batches),
            "batch_pcr": 1 - principal_component_regression(embedding, batches, categorical=True),
            "connectivity": scib_metrics.graph_connectivity(near.subset_neighbors(15), labels),
        },
        abs=1e-4,
    )


@pytest.mark.slow
def test_kbet_accepts_mixed_batches_alone():
    pytest.importorskip("scib_metrics", reason="scib-metrics (extra scib) is not installed")
    assert batch_kbet(*cells(0.0)) > 0.5 > batch_kbet(*cells(20.0))
