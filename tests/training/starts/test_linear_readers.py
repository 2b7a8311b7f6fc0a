"""Linear readers, and what inner cross-validation chooses."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from scipy.special import log_softmax
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_info, threadpool_limits

from stformer_hf.evaluation import readers
from stformer_hf.evaluation.readers import rotate_genes
from stformer_hf.training.starts.cell_features import _principal_scores
from stformer_hf.training.starts.linear_readers import (
    _TEMPERATURES,
    PENALTIES,
    PREFERRED,
    WEIGHTS,
    Problem,
    ReaderChoice,
    choose_readers,
    fit_temperature,
    inner_folds,
)

CLASSES = "single_label_classification"


def cells(n: int = 90, n_genes: int = 200, n_classes: int = 3, seed: int = 0):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    rates = rng.gamma(1.0, 1.0, (n_classes, n_genes))
    return sparse.csr_array(np.log1p(rng.poisson(rates[labels])).astype(float)), labels


def test_a_reader_of_rotated_genes_is_the_reader_of_the_genes():
    values, labels = cells()
    features, to_genes = rotate_genes(values)
    assert features.shape[1] <= len(labels)
    reader = Problem(CLASSES, 3).fit(features, labels, 1.0)
    slow = LogisticRegression(C=1.0, max_iter=5000, tol=1e-8).fit(values.toarray(), labels)
    weight = to_genes(reader.weight)
    expected = log_softmax(values @ slow.coef_.T + slow.intercept_, axis=1)
    np.testing.assert_allclose(log_softmax(values @ weight + reader.bias, axis=1), expected, atol=0.02)


def test_a_rotation_uses_one_thread(monkeypatch):
    """With 2 threads the basis of 2,100 cells is another, and readers fitted to few digits make other choices."""
    threads, solve = [], readers.linalg.eigh

    def eigh(*args, **kwargs):
        threads.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return solve(*args, **kwargs)

    monkeypatch.setattr(readers.linalg, "eigh", eigh)
    with threadpool_limits(2, "blas"):
        rotate_genes(cells()[0])
    assert threads and set(threads) == {1}


@given(st.integers(0, 10_000), st.sampled_from([0.01, 0.1, 0.6]), st.integers(1, 50))
def test_a_rotation_keeps_the_dot_products_of_cells(seed, density, n_genes):
    values = sparse.random_array((30, n_genes), density=density, format="csr", rng=np.random.default_rng(seed))
    values = values + sparse.csr_array(
        ([1.0], ([0], [0])), shape=values.shape
    )  # eigenvalues are judged by the largest
    dense = values.toarray()
    features, to_genes = rotate_genes(sparse.csr_array(values))
    np.testing.assert_allclose(features @ features.T, dense @ dense.T, atol=1e-6)
    weight = np.ones((features.shape[1], 2))
    np.testing.assert_allclose(dense @ to_genes(weight), features @ weight, atol=1e-3)


@given(st.integers(0, 10_000), st.integers(1, 8))
def test_scores_from_dot_products_are_those_of_pca(seed, k):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(30, 12)) * np.linspace(4, 0.5, 12)
    train, held_out = np.arange(20), np.arange(20, 30)
    slow = PCA(k, svd_solver="full").fit(matrix[train])
    for found, rows in zip(_principal_scores(matrix @ matrix.T, train, held_out, k), (train, held_out), strict=True):
        np.testing.assert_allclose(np.abs(found), np.abs(slow.transform(matrix[rows])), atol=1e-6)


def test_folds_keep_groups_together_and_shares_of_classes():
    _, labels = cells(120)
    groups = np.repeat(np.arange(8), 15)
    problem = Problem(CLASSES, 3)
    for train, held_out, _ in inner_folds(problem, labels, groups, 0):
        assert not set(groups[train]) & set(groups[held_out])
    seen = np.zeros((2, 120), int)
    for train, held_out, repeat in inner_folds(problem, labels, None, 0):
        assert not set(train) & set(held_out)
        seen[repeat, held_out] += 1
        assert np.ptp(np.bincount(labels[held_out], minlength=3)) <= 1
    assert (seen == 1).all()
    with pytest.raises(ValueError, match="at least two groups, got 1"):
        inner_folds(problem, labels, np.zeros(120), 0)


def test_a_reader_that_knows_nothing_is_left_out():
    """Of two readers, one of noise that claims to be sure, the other is believed."""
    rng = np.random.default_rng(1)
    labels = np.arange(300) % 3
    good = np.eye(3)[labels] + rng.normal(size=(300, 3))
    noise = 3 * rng.normal(size=(300, 100))
    problem = Problem(CLASSES, 3)
    folds = inner_folds(problem, labels, None, 0)
    for head, genes, knows in ((noise, good, 1), (good, noise, 0)):
        choice = choose_readers(problem, labels, folds, lambda t, h, of=head: (of[t], of[h]), genes)
        assert choice.weights[knows] > choice.weights[1 - knows] and choice.score > 0.5


def test_an_earlier_choice_is_kept():
    """Its regularisation always, its weights unless others are clearly better."""
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    both, noise = (size * np.eye(3)[labels] + rng.normal(size=(300, 3)) for size in (1, 0))
    problem = Problem(CLASSES, 3)
    folds = inner_folds(problem, labels, None, 0)
    for head, weights, kept in ((both, (0.0, 1.0), True), (both, (1.0, 0.0), True), (noise, (1.0, 0.0), False)):
        earlier = ReaderChoice(0.3, 0.2, weights, 1.0, 0.0, 0.0, np.zeros((0, 3)), np.arange(0))
        found = choose_readers(problem, labels, folds, lambda t, h, of=head: (of[t], of[h]), both, earlier=earlier)
        assert (found.head, found.wide, found.weights == weights) == (0.3, 0.2, kept)


@given(st.integers(0, 10_000), st.floats(0.3, 7))
def test_the_temperature_undoes_a_scale(seed, scale):
    rng = np.random.default_rng(seed)
    logits = 2 * rng.normal(size=(2000, 3))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    assert abs(np.log(fit_temperature(Problem(CLASSES, 3), scale * logits, labels) / scale)) < 0.3


def test_out_of_fold_predictions_do_not_know_the_cell():
    """Labels that nothing tells are not found out of fold, though a reader of as many features fits them all."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(100, 200)), rng.integers(0, 2, 100)
    folds = inner_folds(Problem(CLASSES, 2), labels, None, 0)
    choice = choose_readers(Problem(CLASSES, 2), labels, folds, lambda t, h: (features[t], features[h]), features)
    assert (choice.out_of_fold.argmax(1) == labels).mean() < 0.7
    assert Problem(CLASSES, 2).score(Problem(CLASSES, 2).fit(features, labels, 1.0)(features), labels) == 1
    np.testing.assert_allclose(np.exp(choice.out_of_fold.astype(float)).sum(1), 1, atol=1e-5)


def test_out_of_fold_distances_are_to_centroids_of_the_other_folds():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    features = rng.normal(size=(60, 4)) + np.eye(3, 4)[labels]
    folds = inner_folds(Problem(CLASSES, 3), labels, None, 0)
    choice = choose_readers(Problem(CLASSES, 3), labels, folds, lambda t, h: (features[t], features[h]), features)
    expected = np.zeros(60)
    for train, held_out, _ in folds:  # two repeats
        means = [features[train][labels[train] == kind].mean(axis=0) for kind in range(3)]
        for row in held_out:
            expected[row] += min(np.sqrt(((features[row] - mean) ** 2).sum()) for mean in means) / 2
    np.testing.assert_allclose(choice.distances, expected, rtol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_the_choice_has_the_lowest_loss_if_it_is_lower_by_more_than_its_standard_error(seed):
    """The rule computed slowly; the next test shows that the usual choice is kept for some of the seeds."""
    features, labels = alike(seed)
    folds = inner_folds(Problem(CLASSES, 3), labels, None, 0)
    assert settings_of(choose(features, labels, folds)) == slow_choice(features, labels, folds)


def test_the_usual_choice_is_kept_where_nothing_is_clearly_better():
    folds = inner_folds(Problem(CLASSES, 3), alike(0)[1], None, 0)
    kept = [settings_of(choose(*alike(seed), folds)) == PREFERRED for seed in range(6)]
    assert any(kept) and not all(kept)


def alike(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features of cells of three types that overlap, by descending variance; and the types."""
    rng = np.random.default_rng(seed)
    labels = np.arange(120) % 3
    rates = rng.gamma(1.0, 1.0, 100) * np.exp(0.3 * rng.normal(size=(3, 100)))
    return rotate_genes(sparse.csr_array(np.log1p(rng.poisson(rates[labels])).astype(float)))[0][:, ::-1], labels


def settings_of(choice) -> dict:
    return {name: getattr(choice, name) for name in PREFERRED}


def choose(features: np.ndarray, labels: np.ndarray, folds: list):
    def of_head(train, held_out):
        return features[train, :30], features[held_out, :30]

    return choose_readers(Problem(CLASSES, 3), labels, folds, of_head, features)


def slow_choice(features: np.ndarray, labels: np.ndarray, folds: list) -> dict:
    def log_probabilities(columns: np.ndarray, penalty: float) -> list[np.ndarray]:
        return [
            log_softmax(
                Problem(CLASSES, 3).fit(columns[train], labels[train], penalty, "choice")(columns[held_out]), axis=1
            )
            for train, held_out, _ in folds
        ]

    heads = {c: log_probabilities(features[:, :30], c) for c in PENALTIES["head"]}
    wides = {c: log_probabilities(features.astype(np.float32), c) for c in PENALTIES["wide"]}
    losses = {}
    for head, wide, weights in itertools.product(heads, wides, WEIGHTS):
        of_temperatures = []
        for temperature in _TEMPERATURES:
            of_cells = np.zeros(len(labels))  # the mean of each cell over two repeats
            for (_, held_out, _), of_head, of_wide in zip(folds, heads[head], wides[wide], strict=True):
                found = np.exp((weights[0] * of_head + weights[1] * of_wide) / temperature)
                found /= found.sum(axis=1, keepdims=True)
                of_cells[held_out] -= np.log(found[np.arange(len(held_out)), labels[held_out]]) / 2
            of_temperatures.append(of_cells)
        losses[head, wide, weights] = min(of_temperatures, key=lambda of: of.mean())
    best = min(losses, key=lambda setting: losses[setting].mean())
    gains = losses[1.0, 1.0, (1.0, 0.5)] - losses[best]
    chosen = best if gains.mean() > gains.std(ddof=1) / np.sqrt(len(labels)) else (1.0, 1.0, (1.0, 0.5))
    return dict(zip(PREFERRED, chosen, strict=True))


@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_numbers_and_several_labels(kind):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(120, 6))
    labels = features[:, :2] @ rng.normal(size=(2, 2))
    if kind == "multi_label_classification":
        labels = (labels > 0).astype(np.float32)
    problem = Problem(kind, 2)
    folds = inner_folds(problem, labels, None, 0)
    choice = choose_readers(problem, labels, folds, lambda t, h: (features[t], features[h]), features)
    assert choice.score > 0.9
    reader = problem.fit(features, labels, 1.0)
    assert reader(features).shape == (120, 2) and problem.score(reader(features), labels) > 0.9


def test_classes_that_a_fold_lacks_and_a_single_class():
    problem = Problem(CLASSES, 4)
    reader = problem.fit(np.eye(6), np.array([0, 0, 2, 2, 2, 0]), 1.0)
    assert (
        set(reader(np.eye(6)).argmax(1)) == {0, 2} and (log_softmax(reader(np.eye(6)), axis=1)[:, [1, 3]] < -10).all()
    )
    assert (problem.fit(np.eye(3), np.array([1, 1, 1]), 1.0)(np.eye(3)).argmax(1) == 1).all()


def test_cells_of_classes_that_a_fold_lacks_do_not_count():
    """A class of one group, and one of one cell: they change neither what is chosen nor how sure it is."""
    rng = np.random.default_rng(0)
    features = np.concatenate([np.eye(4)[np.arange(300) % 3], np.tile(np.eye(4)[3], (60, 1))])
    features += rng.normal(size=features.shape) * 0.6
    labels, groups = np.append(np.arange(300) % 3, np.full(60, 3)), np.append(np.arange(300) % 5, np.zeros(60, int))

    def choose(n: int, groups: np.ndarray | None) -> ReaderChoice:
        problem = Problem(CLASSES, 4)
        folds = inner_folds(problem, labels[:n], groups, 0)
        return choose_readers(problem, labels[:n], folds, lambda t, h: (features[t], features[h]), features[:n])

    few, every = choose(300, groups[:300]), choose(360, groups)
    np.testing.assert_array_equal(every.rows, np.arange(300))
    assert every.out_of_fold.shape == (300, 4) and every.distances.shape == (300,)
    assert abs(every.temperature - few.temperature) < 0.3 and abs(every.loss - few.loss) < 0.1
    alone, without = choose(301, None), choose(300, None)
    np.testing.assert_array_equal(alone.rows, np.arange(300))
    assert abs(alone.temperature - without.temperature) < 0.3 and abs(alone.loss - without.loss) < 0.1


def test_without_cells_that_count_the_usual_settings_are_kept():
    problem, labels, features = Problem(CLASSES, 4), np.arange(4), np.eye(4)
    folds = inner_folds(problem, labels, None, 0)
    found = choose_readers(problem, labels, folds, lambda t, h: (features[t], features[h]), features)
    assert {"head": found.head, "wide": found.wide, "weights": found.weights} == PREFERRED
    assert found.temperature == 1.5 and np.isnan([found.loss, found.score]).all()
    assert found.out_of_fold.shape == (0, 4) and found.distances.shape == found.rows.shape == (0,)


def test_numbers_of_multiple_labels_that_a_fold_lacks():
    known, labels = np.array([[0, 1], [0, 1]], np.float32), np.array([[0, 1], [1, 0], [1, 1]], np.float32)
    of_several = Problem("multi_label_classification", 2)
    counts, those = of_several.that_count(known, labels)
    assert counts.tolist() == [True, False, True]
    np.testing.assert_array_equal(those, [[0, 1], [np.nan, np.nan], [np.nan, 1]])
    outputs = np.array([[-1.0, 2.0], [0.0, 0.0], [9.0, -2.0]])
    np.testing.assert_allclose(of_several.cell_scores(outputs[counts], those[counts]), [1, 0])
    np.testing.assert_allclose(of_several.loss(outputs[counts], those[counts])[1], np.logaddexp(0, -2) + 2)
    counts, those = Problem("regression", 2).that_count(known, labels)
    assert counts.all() and those is labels
    counts, those = Problem(CLASSES, 3).that_count(np.array([0, 2]), np.array([0, 1, 2]))
    assert counts.tolist() == [True, False, True] and those.tolist() == [0, 1, 2]
    for some, shape in ((CLASSES, (0,)), ("multi_label_classification", (0, 2))):
        nothing = np.empty(shape, np.int64)
        assert Problem(some, 2).that_count(nothing, nothing)[0].shape == (0,)
        assert fit_temperature(Problem(some, 2), np.empty((0, 2)), nothing) == 1


def test_a_rotation_of_more_cells_gives_the_same_reader():
    values, labels = cells(150)
    few, n = slice(0, 90), len(labels)
    found = []
    for features, to_genes in (rotate_genes(values[few]), rotate_genes(values)):
        reader = Problem(CLASSES, 3).fit(features[few], labels[few], 1.0)
        found.append(log_softmax(values @ to_genes(reader.weight) + reader.bias, axis=1))
    assert found[0].shape == (n, 3)
    np.testing.assert_allclose(*found, atol=0.02)
