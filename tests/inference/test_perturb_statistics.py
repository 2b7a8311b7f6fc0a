"""Statistics of perturbations: on simulations where the drivers are known, and where there are none."""

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse, stats

from stformer_hf import GeneBertConfig, GeneBertModel, GeneTokenizer, initialise_from_store, perturb
from stformer_hf.inference import perturb_statistics
from stformer_hf.inference.gene_edits import Perturbation
from stformer_hf.inference.perturb_statistics import (
    CellGroups,
    DonorGroups,
    ShardScores,
    benjamini_hochberg,
    cell_statistics,
    compare,
    compare_groups,
    interval,
    make_table,
    permute_donors,
)
from stformer_hf.inference.plots import volcano


def simulate(n_donors: int, n_cells: int, n_genes: int, n_drivers: int, donor_sd: float, seed: int) -> AnnData:
    """Cells of sick and healthy donors: drivers are four times as high in the sick, donors differ in all genes."""
    rng = np.random.default_rng(seed)
    donors = np.repeat(np.arange(n_donors), n_cells)
    sick = donors % 2 == 0
    rates = rng.lognormal(-0.5, 1.0, n_genes)[None] * np.exp(rng.normal(0, donor_sd, (n_donors, n_genes)))[donors]
    drivers = np.zeros(n_genes, bool)
    drivers[rng.choice(n_genes, n_drivers, replace=False)] = True
    rates[np.ix_(sick, drivers)] *= 4
    rates *= rng.lognormal(0, 0.3, len(donors))[:, None]
    obs = pd.DataFrame({"state": np.where(sick, "sick", "healthy"), "donor": [f"d{donor}" for donor in donors]})
    obs.index = [f"c{i}" for i in range(len(donors))]
    var = pd.DataFrame({"driver": drivers}, index=[f"ENSG{i:011d}" for i in range(n_genes)])
    return AnnData(sparse.csr_matrix(rng.poisson(rates).astype(np.float32)), obs=obs, var=var)


def perturb_simulation(cells: AnnData, with_donors: bool, genes=None, n_null=0) -> pd.DataFrame:
    """Delete the genes of sick cells, in a model at its spectral start."""
    tokenizer = GeneTokenizer(cells.var_names.tolist(), bin_edges=[0.5], max_length=8, whole_cell=True)
    config = GeneBertConfig.from_tokenizer(
        tokenizer,
        **{"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 32},
        **{"cell_embedding": True, "pre_norm": True, "norm_type": "rms_norm", "residual_init": "zero"},
        pooling="cls",
    )
    model = GeneBertModel(config)
    initialise_from_store(model, tokenizer, cells, n_components=10)
    donor_key = "donor" if with_donors else None
    groups = {"goal_key": "state", "goal": "healthy", "donor_key": donor_key}
    return perturb(cells, model, genes, tokenizer=tokenizer, max_tokens=4096, n_null=n_null, **groups)


@pytest.mark.parametrize("with_donors", [pytest.param(False, marks=pytest.mark.slow), True])
def test_drivers_are_found_and_move_the_cells_to_the_goal(with_donors):
    cells = simulate(14, 12, 300, 10, 0.3 * with_donors, seed=0)
    table = perturb_simulation(cells, with_donors)
    driver = cells.var.loc[table.index, "driver"].to_numpy()
    called = (table["fdr"] < 0.05).to_numpy()
    assert called[driver].mean() >= 0.75
    assert called[~driver].sum() <= stats.binom.ppf(0.99, (~driver).sum(), 0.05)
    assert (table.loc[called & driver, "goal_shift"] > 0).all()
    assert ("p_donors" in table) == with_donors


@pytest.mark.parametrize("donor_sd", [pytest.param(0.0, marks=pytest.mark.slow), 0.6])
def test_without_drivers_few_genes_are_called(donor_sd):
    cells = simulate(14, 12, 200, 0, donor_sd, seed=1)
    table = perturb_simulation(cells, with_donors=donor_sd > 0)
    most = stats.binom.ppf(0.99, len(table), 0.05)
    assert (table["p"] < 0.05).sum() <= most
    assert (table["fdr"] < 0.05).sum() <= 0.05 * len(table)
    # The test has power against the difference that donors make: without them it calls more, not fewer.
    assert table["p"].notna().mean() > 0.95  # the others change one or two cells


def test_a_driver_among_few_genes_is_compared_with_genes_of_its_expression():
    cells = simulate(6, 20, 200, 8, 0.0, seed=2)
    genes = cells.var_names[cells.var["driver"]][:3].tolist() + cells.var_names[~cells.var["driver"]][:3].tolist()
    table = perturb_simulation(cells, False, genes, n_null=15)
    assert table.index.tolist() == genes
    assert (table["z"].to_numpy()[:3] > 1.7).all() and (table["z"].abs().to_numpy()[3:] < 1.7).all()
    ax = volcano(table, fdr=0.2)
    assert ax.get_title().startswith(f"{(table['fdr'] < 0.2).sum()} of 6")
    with pytest.raises(ValueError, match="no score 'nothing'; it has goal_shift"):
        volcano(table, "nothing")


def test_compare_with_one_another_is_calibrated():
    rng = np.random.default_rng(0)
    matched = np.repeat(["a", "b"], 2000)
    effects = np.where(matched == "a", 1.0, 5.0) * rng.standard_t(4, 4000) + (matched == "b")
    z, p = compare(effects, matched, np.zeros(4000, bool))
    for value in ("a", "b"):
        assert abs((p[matched == value] < 0.1).mean() - 0.1) < 0.02
    assert compare(np.append(effects, 1e9), np.append(matched, "a"), np.zeros(4001, bool))[1].min() == 1e-16
    few = compare(effects[:15], matched[:15], np.arange(15) < 9)[1]
    assert np.isnan(few).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_compare_ranks_effects_among_a_null_that_was_drawn(seed):
    rng = np.random.default_rng(seed)
    matched = np.array(["a"] * 30 + ["b"] * 25)
    is_null = np.concatenate([np.arange(30) >= 12, np.arange(25) >= 5])
    effects = np.where(matched == "a", 1.0, 50.0) * rng.standard_t(1.5, 55)

    def distance(value, others):
        centre = np.median(others)
        return abs(value - centre) / np.quantile(np.abs(others - centre), 0.9)

    null = {value: effects[(matched == value) & is_null] for value in ("a", "b")}
    of_null = [distance(x, np.delete(of, i)) for of in null.values() for i, x in enumerate(of)]
    expected = [
        (1 + sum(far >= distance(effect, null[value]) for far in of_null)) / (1 + len(of_null))
        for effect, value in zip(effects, matched, strict=True)
    ]
    z, p = compare(effects, matched, is_null)
    np.testing.assert_allclose(p, expected)
    assert p.min() >= 1 / 39


def test_an_effect_like_those_of_the_null_is_rarely_far_out_whatever_the_tails():
    """A normal distribution would call one in six of these."""
    rng = np.random.default_rng(0)
    matched, is_null = np.repeat([f"bin {i}" for i in range(4)], 30), np.tile(np.arange(30) >= 5, 4)
    p = np.concatenate([compare(rng.standard_t(1.2, 120), matched, is_null)[1][~is_null] for _ in range(100)])
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.02)
    assert (p <= 0.2).mean() == pytest.approx(0.2, abs=0.03)


def test_groups_of_cells_are_compared_along_each_direction():
    rng = np.random.default_rng(0)
    states = [rng.normal(0, scale, (n, 4)) for n, scale in ((40, 1.0), (15, 3.0))]
    states[1][:, 0] += 1.5
    directions = np.vstack([np.eye(4), rng.normal(0, 1e-4, (3, 4)), np.zeros((1, 4))])
    found = compare_groups(directions, CellGroups(*map(cell_statistics, states)))
    expected = stats.ttest_ind(*(of @ directions[:-1].T for of in states), equal_var=False).pvalue
    np.testing.assert_allclose(found[:-1], expected, rtol=1e-6)
    assert np.isnan(found[-1])
    assert np.isnan(compare_groups(directions, CellGroups(cell_statistics(states[0]), (1, *found[:2])))).all()


def test_groups_that_do_not_differ_have_no_hits():
    """Half of the cells are the goal by chance, and some genes move the cells much further than others."""
    cells = simulate(4, 30, 200, 0, 0.0, seed=3)
    cells.obs["state"] = np.random.default_rng(0).permutation(cells.obs["state"])
    counts = cells.X.toarray()
    counts[:, :8] *= 30
    cells.X = sparse.csr_matrix(counts)
    for genes, n_null in ((None, 0), (cells.var_names[:40].tolist(), 25)):
        table = perturb_simulation(cells, False, genes, n_null)
        assert (table["fdr"] < 0.05).sum() == 0 and table["p_cells"].notna().mean() > 0.9


def groups_of(rng, effect: float, n: int = 7, d: int = 5, paired: bool = False) -> DonorGroups:
    """States of n donors per group around one direction; the goal's are moved along the first axis."""
    states = rng.normal(0, 1, (2 * n, d)) + 3
    states[n:, 0] += effect
    donors = np.tile(np.arange(n), 2) if paired else np.arange(2 * n)
    return DonorGroups(states, donors, np.arange(2 * n) >= n)


@pytest.mark.parametrize("paired", [False, True])
def test_donor_permutations_keep_their_level_and_find_an_effect(paired):
    rng = np.random.default_rng(0)
    direction = np.eye(5)[:1]

    def p_of(groups: DonorGroups) -> float:
        return permute_donors(direction @ groups.states.T, groups, 0)[0]

    under_null = [p_of(groups_of(rng, 0.0, paired=paired)) for _ in range(200)]
    assert (np.array(under_null) < 0.05).sum() <= stats.binom.ppf(0.995, 200, 0.05)
    assert p_of(groups_of(rng, 8.0, paired=paired)) < 0.03
    few = p_of(groups_of(rng, 8.0, n=2, paired=paired))
    assert few == pytest.approx(2 / 4 if paired else 2 / 6, abs=0.02)  # two of all permutations


@pytest.mark.parametrize("paired", [False, True])
def test_donor_permutations_are_pooled_over_perturbations(paired, monkeypatch):
    """Three donors per group: alone, no p-value is below 2 / 20, or 2 / 8 for pairs."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(perturb_statistics, "N_PERMUTATIONS", 999)
    groups = groups_of(rng, 0.0, n=3, paired=paired)
    scale = rng.lognormal(0, 2, (60, 1))  # perturbations that move the cells much, and little

    def draw(effect: float, sizes: np.ndarray) -> np.ndarray:
        of_donors = rng.normal(0, 2, (60, 6))[:, groups.donors] if paired else 0
        noise = of_donors + rng.normal(0, 1, (60, 6))
        noise[0] += effect * groups.is_goal
        return sizes * noise

    under_null = np.array([permute_donors(draw(0.0, scale), groups, 0) for _ in range(60)])
    assert (under_null < 0.05).mean() == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / under_null.size) ** 0.5)
    scale[0] = 1e-3
    drivers = draw(20.0, scale)
    found = permute_donors(drivers, groups, 0)
    assert found[0] < 0.01 < 2 / 20 <= permute_donors(drivers[:1], groups, 0)[0]
    monkeypatch.setattr(perturb_statistics, "_AT_ONCE", 7)
    np.testing.assert_array_equal(permute_donors(drivers, groups, 0), found)
    assert np.isnan(permute_donors(np.r_[drivers, np.full((1, 6), 0.3)], groups, 0)).tolist() == [False] * 60 + [True]


@pytest.mark.parametrize("n_least", [0, 2])
def test_a_perturbation_that_changes_hardly_a_cell_is_not_compared(n_least):
    rng = np.random.default_rng(0)
    n_changed = np.array([5] * 12 + [n_least])
    changed = np.arange(8) < n_changed[:, None]
    values = np.where(changed, 1 + rng.normal(0, 0.1, (13, 8)), 0)[:, None]
    directions = values.mean(axis=2) * np.eye(5)[:1]
    shard = ShardScores(np.arange(13), n_changed, values, changed, directions)
    perturbations = [Perturbation(f"g{i}", (i,), "bin 0") for i in range(13)]
    donors = np.repeat(np.arange(4), 2)
    table = make_table(perturbations, lambda: iter([shard]), ["goal_shift"], donors, groups_of(rng, 0.0))
    assert table[["z", "p", "p_donors", "fdr"]].isna().all(axis=1).tolist() == [False] * 12 + [True]
    assert table["z"].abs().max() < 5
    alone = make_table(perturbations, lambda: iter([shard]), ["goal_shift"], None, None)
    assert alone["p_wilcoxon"][:12].median() > 0.1 > stats.wilcoxon(values[0, 0, :5]).pvalue  # not against 0


def test_an_interval_over_donors_is_wider_than_over_their_cells():
    rng = np.random.default_rng(0)
    donors = np.repeat(np.arange(6), 50)
    values = rng.normal(0, 1, 6)[donors] + rng.normal(0, 0.1, 300)
    mean, low, high = interval(values)
    of_donors = interval(values, donors)
    assert of_donors[0] == mean == pytest.approx(values.mean())
    assert of_donors[2] - of_donors[1] > 3 * (high - low)
    expected = stats.t.interval(0.95, 299, mean, values.std(ddof=1) / np.sqrt(300))
    np.testing.assert_allclose((low, high), expected)


@given(st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), max_size=30))
def test_false_discovery_rates_leave_missing_tests_out(values):
    """Each is the least n p / rank of a p at least as large, among the n that are known."""
    p = np.array(values)
    found, known = benjamini_hochberg(p), np.sort(p[~np.isnan(p)])
    shares = len(known) * known / np.arange(1, len(known) + 1)
    expected = [np.nan if np.isnan(each) else min(1, shares[known >= each].min()) for each in p]
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-300)
    np.testing.assert_array_equal(found[~np.isnan(p)], stats.false_discovery_control(p[~np.isnan(p)]))
