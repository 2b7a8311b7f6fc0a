"""Pictures show what they say."""

import sys

import networkx
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st

from stformer_hf.inference.gene_network import GeneNetwork

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("agg")

from mpl_toolkits.axes_grid1.anchored_artists import AnchoredSizeBar  # noqa: E402

from stformer_hf.inference import cell_plots, plots  # noqa: E402


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
    with pytest.raises(ValueError, match="Not all classes are in labels, such as c"):
        plots.confusion(["a", "c"], ["a", "b"], ["a", "b"])
    with pytest.raises(ValueError, match="There are 2 true classes and 1 predicted ones"):
        plots.confusion(["a", "c"], ["a"])


def test_loss_curves_draw_both_losses():
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "eval_loss": 2.5}, {"train_runtime": 1}]
    ax = plots.loss_curves({"run": history})
    assert [line.get_ydata().tolist() for line in ax.lines] == [[3.0, 2.0], [2.5]]
    assert matplotlib.pyplot.get_fignums()


@pytest.fixture
def tissue() -> AnnData:
    """Six cells of two sections; y points down."""
    adata = AnnData(np.arange(12, dtype=np.float32).reshape(6, 2))
    adata.var_names = ["ACTB", "GAPDH"]
    adata.obsm["spatial"] = np.array([[0, 0], [1, 0], [0, 5], [7, 0], [8, 0], [7, 9]], float)
    adata.obs["slice"] = pd.Categorical(["b", "b", "b", "a", "a", "a"], ["b", "a", "unused"])
    adata.obs["domain"] = pd.Categorical(["1", "0", None, "1", "1", "0"], ["0", "1", "2"])
    adata.obs["score"] = [1.0, 5.0, np.nan, 2.0, 3.0, 4.0]
    return adata


def drawn(ax) -> dict[tuple[float, float], str]:
    """Colour of the point at each place."""
    (points,) = ax.collections
    return {
        tuple(place): matplotlib.colors.to_hex(colour)
        for place, colour in zip(points.get_offsets().tolist(), points.get_facecolors(), strict=True)
    }


def test_sections_are_panels_that_share_their_colours(tissue, tmp_path):
    panels = plots.sections(tissue, "domain", section_key="slice", n_columns=1, title="all")
    assert [panel.get_title() for panel in panels] == ["b", "a"]  # the categories' order
    zero, one, two = tissue.uns["domain_colors"]
    assert len({zero, one, two}) == 3
    grey = matplotlib.colors.to_hex("lightgray")
    assert drawn(panels[0]) == {(0, 0): one, (1, 0): zero, (0, 5): grey}
    assert drawn(panels[1]) == {(7, 0): one, (8, 0): one, (7, 9): zero}
    for panel in panels:
        assert panel.get_aspect() == 1 and panel.yaxis_inverted() and not panel.xaxis_inverted()
        assert panel.collections[0].get_rasterized()
    (legend,) = panels[0].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["0", "1", "missing"]  # no cell is of domain 2
    assert panels[0].figure._suptitle.get_text() == "all"
    panels[0].figure.canvas.draw()
    assert panels[0].get_window_extent().y0 > panels[1].get_window_extent().y1
    tissue.obsm["wide"] = tissue.obsm["spatial"] * [20, 1]  # fills what room there is
    ax = plots.sections(tissue, "domain", spatial_key="wide")
    ax.figure.canvas.draw()
    assert ax.figure.legends[0].get_window_extent().x0 >= ax.get_window_extent().x1
    open_figures = matplotlib.pyplot.get_fignums()
    plots.sections(tissue, "domain", section_key="slice", save=tmp_path / "s.png")
    assert matplotlib.pyplot.get_fignums() == open_figures
    assert (tmp_path / "s.png").stat().st_size > 1000


def test_colours_that_are_there_are_kept(tissue):
    tissue.uns["domain_colors"] = np.array(["#ff0000", "#00ff00", "#0000ff"])
    ax = plots.sections(tissue, "domain")
    assert drawn(ax)[0, 0] == "#00ff00" and drawn(ax)[7, 9] == "#ff0000" and len(drawn(ax)) == 6
    tissue.uns["domain_colors"] = ["#ff0000"]  # too few
    plots.sections(tissue, "domain")
    assert len(set(tissue.uns["domain_colors"])) == 3


def test_colours_may_be_named_by_category(tissue):
    colours = {"1": "#00ff00", "0": "red", "other": "#0000ff"}  # no cell is of domain 2
    tissue.uns["domain_colors"] = dict(colours)
    places = drawn(plots.sections(tissue, "domain"))
    assert (places[0, 0], places[7, 9]) == ("#00ff00", "#ff0000")
    assert places[0, 5] == matplotlib.colors.to_hex("lightgray") and tissue.uns["domain_colors"] == colours
    tissue.obs["domain"] = tissue.obs["domain"].cat.rename_categories([0, 1, 2])  # numbers, and names in uns
    assert drawn(plots.sections(tissue, "domain")) == places
    tissue.uns["domain_colors"] = {1: "#00ff00", 0: "red"}
    assert drawn(plots.sections(tissue, "domain")) == places
    tissue.uns["domain_colors"] = {"1": "#00ff00", "2": "red"}
    with pytest.raises(ValueError, match=r"uns\['domain_colors'\] has no colour for 1 of 3 categories, such as '0'"):
        plots.sections(tissue, "domain")


@pytest.mark.parametrize("n", [2, 10, 15, 25, 60])
def test_new_colours_are_scanpys(n):
    sc = pytest.importorskip("scanpy")
    groups = pd.Categorical([f"{i:03d}" for i in range(n)])
    ours, theirs = (AnnData(obs=pd.DataFrame({"g": groups}, [f"c{i}" for i in range(n)])) for _ in range(2))
    for adata in (ours, theirs):
        adata.obsm["spatial"] = np.random.default_rng(0).normal(size=(n, 2))
    plots.sections(ours, "g")
    sc.pl.embedding(theirs, "spatial", color="g", show=False)
    assert ours.uns["g_colors"] == [matplotlib.colors.to_hex(colour) for colour in theirs.uns["g_colors"]]


def test_without_scanpy_there_are_colours(monkeypatch):
    monkeypatch.setitem(sys.modules, "scanpy.plotting", None)
    assert len(set(cell_plots._default_colours(20))) == 20 and len(cell_plots._default_colours(25)) == 25


def test_numbers_and_genes_have_one_scale(tissue):
    viridis = matplotlib.colormaps["viridis"]
    panels = plots.sections(tissue, "score", section_key="slice")
    grey = matplotlib.colors.to_hex("lightgray")
    as_hex = [matplotlib.colors.to_hex(viridis(share)) for share in (0, 0.25, 0.5, 0.75, 1.0)]
    assert drawn(panels[0]) == {(0, 0): as_hex[0], (1, 0): as_hex[4], (0, 5): grey}
    assert drawn(panels[1]) == {(7, 0): as_hex[1], (8, 0): as_hex[2], (7, 9): as_hex[3]}
    assert panels[0].collections[0].get_offsets()[-1].tolist() == [1, 0]  # the largest on top
    assert len(panels[0].figure.axes) == 3 and panels[0].figure.axes[-1].get_ylabel() == "score"
    assert "score_colors" not in tissue.uns
    ax = plots.sections(tissue, "GAPDH")
    assert drawn(ax)[0, 0] == as_hex[0] and drawn(ax)[7, 9] == as_hex[4]
    tissue.obs["score"] = np.nan
    assert set(drawn(plots.sections(tissue, "score")).values()) == {grey}
    tissue.obs["flag"] = [True, False] * 3
    plots.sections(tissue, "flag")
    assert len(tissue.uns["flag_colors"]) == 2


def test_sections_tell_what_is_missing(tissue):
    def refuses(words, adata=tissue, color="domain", **options):
        with pytest.raises(ValueError, match=words):
            plots.sections(adata, color, **options)

    refuses(
        "no column or gene 'gene'; obs has 'slice', 'domain', 'score', and genes have names like ACTB", color="gene"
    )
    refuses(r"no obsm\['places'\]", spatial_key="places")
    refuses(r"no obs\['sections'\]", section_key="sections")
    refuses("n_columns=0", n_columns=0)
    refuses("no cells", adata=tissue[:0].copy())
    refuses("1 of 6 cells have no section", section_key="domain")
    tissue.obsm["line"] = np.ones((6, 1))
    refuses("2 or 3 columns", spatial_key="line")
    tissue.obsm["holes"] = tissue.obsm["spatial"].copy()
    tissue.obsm["holes"][[2, 4], [0, 1]] = np.nan, np.inf
    refuses(r"2 of 6 cells have no finite coordinates in obsm\['holes'\], such as 2", spatial_key="holes")
    tissue.var_names = ["ACTB", "ACTB"]
    refuses("2 genes are named 'ACTB'", color="ACTB")
    assert not matplotlib.pyplot.get_fignums()


def test_the_confusion_matrix_says_the_accuracy():
    ax = plots.confusion(["a", "a", "b", "b"], ["a", "b", "b", "b"], ["b", "a"], title="4 cells")
    assert ax.get_title() == "4 cells: accuracy 0.750 (3 of 4)"
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a"]
    assert plots.confusion(["a"], ["a"], ["a"]).get_title() == "accuracy 1.000 (1 of 1)"


def test_baselines_of_a_loss_are_horizontal_lines():
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}]
    ax = plots.loss_curves({"run": history}, baselines={"marginal": 2.5, "uniform": 4.0})
    lines = {line.get_label(): set(np.ravel(line.get_ydata())) for line in ax.lines[1:]}
    assert lines == {"marginal: 2.500": {2.5}, "uniform: 4.000": {4.0}}
    assert len({line.get_color() for line in ax.lines}) == 3


def test_the_curve_of_labels_is_of_means_with_all_draws():
    points = pd.DataFrame(
        {"classifier": ["x", "x", "x", "y"], "n_labels": [5, 5, 10, 5], "accuracy": [0, 1, 0.7, 0.2]}
    )
    ax = plots.label_curve(points, emphasised="y")
    (x, x_draws, y, _) = ax.lines
    assert (x.get_xdata().tolist(), x.get_ydata().tolist()) == ([5, 10], [0.5, 0.7])
    assert x_draws.get_ydata().tolist() == [0, 1, 0.7]
    assert y.get_linewidth() > x.get_linewidth()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["5", "10"]


@pytest.mark.usefixtures("compiled_umap")
def test_umaps_are_panels_of_one_legend_with_edges_of_some_cells(tmp_path):
    pytest.importorskip("scanpy")
    rng = np.random.default_rng(0)
    groups = pd.Categorical(np.repeat(["a", "b"], 20))
    adata = AnnData(obs=pd.DataFrame({"g": groups, "held out": np.arange(40) % 4 == 0}, [f"c{i}" for i in range(40)]))
    adata.obsm["X_one"] = np.repeat([[0.0], [9.0]], 20, axis=0) + rng.normal(size=(40, 5))
    adata.obsm["X_two"] = rng.normal(size=(40, 3))
    panels = plots.umaps(adata, "g", {"one": "X_one", "two": "X_two"}, outlined="held out", save=tmp_path / "u.png")
    assert [panel.get_title() for panel in panels] == ["one", "two"]
    assert {(panel.get_xlabel(), panel.get_ylabel()) for panel in panels} == {("UMAP 1", "UMAP 2")}
    for panel, key in zip(panels, ("X_one", "X_two"), strict=True):
        plain, edged = panel.collections
        places = adata.obsm[f"{key}_umap"]
        assert edged.get_offsets().tolist() == places[::4].tolist() and len(plain.get_offsets()) == 30
        assert matplotlib.colors.to_hex(edged.get_edgecolors()[0]) == "#000000"
    (legend,) = panels[0].figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "held out"]
    assert (tmp_path / "u.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="no obsm\\['X_three'\\]; obsm has 'X_one'"):
        plots.umaps(adata, "g", {"three": "X_three"})
    with pytest.raises(ValueError, match="no obs\\['seen'\\]; obs has 'g', 'held out'"):
        plots.umaps(adata, "g", {"one": "X_one"}, outlined="seen")
    adata.obs["text"] = adata.obs["held out"].astype(str)  # "False" is true
    with pytest.raises(ValueError, match=r"obs\['text'\] must be boolean"):
        plots.umaps(adata, "g", {"one": "X_one"}, outlined="text")


@pytest.mark.usefixtures("compiled_umap")
def test_a_umap_is_that_of_the_embedding_drawn_and_leaves_the_users_own(tmp_path):
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1], 20), np.tile([0, 1], 20)

    def embedding(group):
        return (rng.normal(size=(40, 5)) + 20 * group[:, None]).astype(np.float32)

    def separates(places, group):
        means = [places[group == which].mean(axis=0) for which in (0, 1)]
        return np.linalg.norm(means[0] - means[1]) > 3 * places[group == 0].std(axis=0).max()

    adata = AnnData(np.ones((40, 3), np.float32), obs=pd.DataFrame({"g": groups[1].astype(str)}))
    for key in ("X_stformer", "X_other"):
        for group in groups:  # the key is written anew
            adata.obsm[key] = embedding(group)
            plots.umap(adata, "g", use_rep=key, save=tmp_path / "u.png")
            assert separates(adata.obsm[f"{key}_umap"], group)
            assert np.array_equal(adata.obsm["X_umap"], adata.obsm[f"{key}_umap"])
    assert "neighbors" not in adata.uns and not adata.obsp
    adata.obsm["X_umap"] = own = rng.normal(size=(40, 2))
    adata.uns["neighbors"] = {"params": {"use_rep": "X_stformer"}}
    ax = plots.umap(adata, "g", save=tmp_path / "u.png")
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("UMAP 1", "UMAP 2")
    assert np.array_equal(adata.obsm["X_umap"], own)
    with pytest.raises(ValueError, match="no obsm\\['X_none'\\]"):
        plots.umap(adata, "g", use_rep="X_none")
    with pytest.raises(ValueError, match="There is no column or gene 'h'; obs has 'g', and genes"):
        plots.umap(adata, "h")


@pytest.mark.usefixtures("compiled_umap")
@pytest.mark.parametrize(("missing", "used"), [(False, True), (True, True), (True, False)])
def test_a_category_may_be_called_na(missing, used):
    pytest.importorskip("scanpy")
    names = pd.Series(["NA" if used else "a", "b"] * 20)
    names[:5] = None if missing else "b"
    groups = pd.Categorical(names, ["NA" if used else "a", "b"]).add_categories([] if used else ["NA"])
    adata = AnnData(obs=pd.DataFrame({"g": groups}, [f"c{i}" for i in range(40)]))
    adata.obsm["X_stformer"] = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    ax = plots.umap(adata, "g")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == (["NA", "b"] if used else ["a", "b", "NA"])
    grey = matplotlib.colors.to_hex("lightgray")
    colours = [matplotlib.colors.to_hex(colour) for colour in ax.collections[0].get_facecolors()]
    assert colours.count(grey) == 5 * missing


@pytest.mark.parametrize("dtype", ["boolean", object, bool])
@pytest.mark.parametrize("missing", [0, 5])
def test_a_umap_of_booleans_has_a_legend(dtype, missing, monkeypatch):
    """Nullable ones too, and those among objects; the column stays as it is, and its colours are the user's."""
    pytest.importorskip("scanpy")
    monkeypatch.setattr(cell_plots, "_write_umap", lambda adata, key, seed: adata.obsm[key])
    infected = pd.Series([True, False] * 20, [f"c{i}" for i in range(40)], dtype=bool if dtype is bool else object)
    if missing and dtype is bool:
        pytest.skip("numpy's booleans are never missing")
    infected[:missing] = None if missing else infected[:missing]
    adata = AnnData(obs=pd.DataFrame({"infected": infected.astype(dtype)}))
    adata.uns["infected_colors"] = ["#0000ff", "#ff0000"]
    adata.obsm["X_stformer"] = adata.obsm["X_stformer_umap"] = np.random.default_rng(0).normal(size=(40, 2))
    ax = plots.umap(adata, "infected")
    shown = [text.get_text() for text in ax.get_legend().get_texts()]
    assert shown == ["False", "True", "NA"][: 3 if missing else 2]
    colours = [matplotlib.colors.to_hex(colour) for colour in ax.collections[0].get_facecolors()]
    assert colours.count("#0000ff") == (infected == False).sum()  # noqa: E712
    assert colours.count("#ff0000") == (infected == True).sum()  # noqa: E712
    assert adata.obs["infected"].dtype == dtype and list(adata.uns["infected_colors"]) == ["#0000ff", "#ff0000"]
    del adata.uns["infected_colors"]
    plots.umap(adata, "infected")
    assert len(adata.uns["infected_colors"]) == 2  # which the next plot takes, as scanpy's own do
    panels = plots.umaps(adata, "infected", {"one": "X_stformer"}, outlined="infected")
    plain, edged = panels[0].collections
    assert len(edged.get_offsets()) == (infected == True).sum()  # noqa: E712


def test_a_network_has_an_arrow_per_edge_with_its_score_and_coexpression(tmp_path):
    scores = np.array([[np.nan, 4, 2], [1, np.nan, np.nan], [np.nan, 3, np.nan]], np.float32)
    coexpression = np.array([[1, 0.5, np.nan], [0.5, 1, -1], [np.nan, -1, 1]], np.float32)
    genes = pd.DataFrame({"gene_id": ["ENSG1", "ENSG2", "ENSG3"], "symbol": ["A", "", "C"]})
    both = {"T": scores, "none": np.full_like(scores, np.nan)}
    n_cells, correlations = ({name: of for name in both} for of in (np.ones((3, 3), np.int32), coexpression))
    found = GeneNetwork(genes, both, n_cells, correlations, "attention")
    ax = plots.network(found, "T", n_edges=3, save=tmp_path / "n.png")
    assert sorted(text.get_text() for text in ax.texts) == ["A", "C", "ENSG2"]
    assert (tmp_path / "n.png").stat().st_size > 1000 and ax.figure._suptitle.get_text() == "T: 3 edges by attention"
    colours = matplotlib.colormaps["coolwarm"]
    # From ENSG2 to A, ENSG2 to C and C to A; the fourth pair is not among the three strongest.
    expected = {3.0: colours(0.75), 2.25: colours(0.0), 1.5: matplotlib.colors.to_rgba("lightgray")}
    drawn = {arrow.get_linewidth(): arrow.get_edgecolor() for arrow in ax.patches}
    assert drawn.keys() == expected.keys()
    for width, colour in expected.items():
        np.testing.assert_allclose(drawn[width], colour, atol=0.01)
    with pytest.raises(ValueError, match="There is no group None; groups are T, none"):
        plots.network(found)
    with pytest.raises(ValueError, match="No pair of genes was scored in this group: lower min_cells"):
        plots.network(found, "none")


def test_classes_are_all_of_them_by_default():
    """Sorted; cells without a class are left out."""
    true, predicted = pd.Series(["b", "a", None, "c"], dtype="category"), ["c", "a", "b", np.nan]
    ax = plots.confusion(true, predicted)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]
    assert ax.get_title() == "accuracy 0.500 (1 of 2)"


@pytest.mark.parametrize("width", [0.7, 3.0, 40.0, 2000.0])
def test_sections_have_a_scale_and_say_what_a_gene_shows(width):
    rng = np.random.default_rng(0)
    adata = AnnData(rng.poisson(2, (30, 1)).astype(np.float32), var=pd.DataFrame(index=["GENE"]))
    adata.obsm["spatial"] = rng.random((30, 2)) * width
    adata.obs["score"] = rng.random(30)
    ax = plots.sections(adata, "GENE")
    (bar,) = [artist for artist in ax.artists if isinstance(artist, AnchoredSizeBar)]
    extent = np.ptp(adata.obsm["spatial"][:, 0])
    assert extent / 5 < bar.size_bar.get_children()[0].get_width() <= extent / 2
    assert ax.figure._supxlabel.get_text() == "bars: units of obsm['spatial']"
    assert ax.figure.axes[-1].get_ylabel() == "GENE (counts in X)"
    adata.X = np.log1p(adata.X)
    assert plots.sections(adata, "GENE").figure.axes[-1].get_ylabel() == "GENE (values in X)"
    assert plots.sections(adata, "score").figure.axes[-1].get_ylabel() == "score"


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=40))
@settings(max_examples=25, deadline=None)
def test_edges_of_a_network_are_long_enough_to_be_seen(edges):
    graph = networkx.DiGraph(edges)
    places = plots._places_of(graph)
    assert set(places) == set(graph) and np.isfinite([*places.values()]).all()
    for nodes in networkx.connected_components(graph.to_undirected()):
        lengths = [np.linalg.norm(places[a] - places[b]) for a, b in graph.edges if a != b and a in nodes]
        assert not lengths or np.median(lengths) > 0.5
        others = [places[node] for node in graph if node not in nodes]
        for node in nodes:
            assert not others or np.linalg.norm(np.array(others) - places[node], axis=1).min() > 0.9
