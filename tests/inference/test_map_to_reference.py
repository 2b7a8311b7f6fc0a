"""Mapping onto a reference, against plain numpy, and references that belong to another model."""

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import concat, read_h5ad
from scipy import sparse

import stformer_hf as sf
from stformer_hf import GeneBertConfig, GeneBertModel, GeneTokenizer, embed, map_to_reference
from stformer_hf.cli import main
from stformer_hf.inference.map_to_reference import save_reference, vote


def make_model(store, seed=0):
    torch.manual_seed(seed)
    genes = GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5], max_length=50)
    model = GeneBertModel(GeneBertConfig.from_tokenizer(genes, size="tiny")).eval()
    model.tokenizer = genes
    return model


@pytest.fixture
def model(store):
    return make_model(store)


@pytest.fixture
def cells(adata):
    """A reference of 40 cells, 3 of them without a label, and a query of 20."""
    adata.obs["type"] = np.where(np.arange(60) % 3, adata.obs["cell_type"].astype(str), "other")
    reference, query = adata[:40].copy(), adata[40:].copy()
    reference.obs.loc[["cell5", "cell6", "cell30"], "type"] = None
    query.obs = query.obs[[]]
    return reference, query


def by_numpy(reference, query, k=None):
    """The label, score and distance of each query cell and the neighbours' names, one cell at a time."""
    labelled = reference[reference.obs["type"].notna()]
    labels = labelled.obs["type"].astype(str).to_numpy()
    for state in query.obsm["X_stformer"].astype(np.float64):
        distances = np.sqrt(((labelled.obsm["X_stformer"].astype(np.float64) - state) ** 2).sum(axis=1))
        nearest = np.argsort(distances)[:k]
        weights = {
            name: (1 / distances[nearest])[labels[nearest] == name].sum() for name in sorted(set(labels[nearest]))
        }
        best = max(weights, key=weights.get)
        yield best, weights[best] / sum(weights.values()), distances[nearest].mean(), labelled.obs_names[nearest]


def test_labels_are_those_of_weighted_neighbours(model, cells, tmp_path):
    reference, query = cells
    map_to_reference(query, reference, model, label_key="type", n_neighbors=7)
    embed(reference, model, key_added="again")
    np.testing.assert_array_equal(reference.obsm["X_stformer"], reference.obsm["again"])
    names = query.obsm["mapped_neighbors"]
    for i, (label, score, distance, neighbors) in enumerate(by_numpy(reference, query, 7)):
        assert query.obs["mapped_label"].iloc[i] == label and names.iloc[i].tolist() == list(neighbors)
        assert query.obs["mapped_score"].iloc[i] == pytest.approx(score, rel=1e-4)
        assert query.obs["mapped_distance"].iloc[i] == pytest.approx(distance, rel=1e-4)
    assert query.obs["mapped_label"].nunique() > 1 and not {"cell5", "cell6", "cell30"} & set(names.to_numpy().ravel())
    query.write_h5ad(tmp_path / "q.h5ad")
    pd.testing.assert_frame_equal(read_h5ad(tmp_path / "q.h5ad").obsm["mapped_neighbors"], names)


def test_cells_of_the_reference_are_counted(model, cells, caplog):
    """By name and embedding: other cells may have the names of some."""
    reference, query = cells
    map_to_reference(query, reference, model, label_key="type")
    named = query.copy()
    named.obs_names = reference.obs_names[:20]
    map_to_reference(named, reference, model, label_key="type")
    assert "in the reference too" not in caplog.text
    both = concat([query, reference[[7, 20, 39, 5]]])  # cell 5 has no label
    map_to_reference(both, reference, model, label_key="type")
    assert "3 of 24 cells are in the reference too" in caplog.text


def test_classes_that_look_like_missing_labels_are_named(model, cells, caplog):
    reference, query = cells
    reference.obs["type"] = np.where(np.arange(40) % 4 == 0, "", np.where(np.arange(40) % 4 == 1, "NaN", "T"))
    map_to_reference(query, reference, model, label_key="type")
    assert caplog.text.count("has the classes '', 'NaN', like any other class") == 1


def test_a_cell_does_not_depend_on_the_others(model, cells):
    reference, query = cells
    part = query[[9, 2, 15]].copy()
    for of in (query, part):
        map_to_reference(of, reference, model, label_key="type", reject=0.2)
    assert (query.obs["mapped_label"] == "unknown").any()
    whole = query.obs.loc[part.obs_names]
    assert whole["mapped_label"].tolist() == part.obs["mapped_label"].tolist()
    np.testing.assert_allclose(whole["mapped_distance"], part.obs["mapped_distance"], rtol=1e-4)
    assert query.obsm["mapped_neighbors"].loc[part.obs_names].equals(part.obsm["mapped_neighbors"])


def test_rejected_cells_are_further_than_the_references_own(model, cells):
    reference, query = cells
    map_to_reference(query, reference, model, label_key="type", n_neighbors=5, reject=0.2)
    labelled = reference[reference.obs["type"].notna()].copy()
    own = {}
    for i in range(len(labelled)):
        others = labelled[np.arange(len(labelled)) != i]
        label, _, distance, _ = next(by_numpy(others, labelled[[i]], 5))
        own.setdefault(label, []).append(distance)
    pooled = [distance for of in own.values() for distance in of]
    expected = []
    for label, _, distance, _ in by_numpy(reference, query, 5):
        of = own.get(label, [])
        k = int(0.2 * (len(of) + 1))
        limit = sorted(of)[-k] if k else sorted(pooled)[-int(0.2 * (len(pooled) + 1))]
        expected.append("unknown" if distance > limit else label)
    assert query.obs["mapped_label"].tolist() == expected
    assert 0 < expected.count("unknown") < 20


def test_a_saved_reference_maps_the_same_and_refuses_another_model(model, cells, store, tmp_path):
    reference, query = cells
    other = query.copy()
    map_to_reference(query, reference, model, label_key="type", reject=0.1)
    save_reference(reference, model, tmp_path / "ref", "type")
    map_to_reference(other, tmp_path / "ref", model, reject=0.1)
    pd.testing.assert_frame_equal(query.obs, other.obs)
    pd.testing.assert_frame_equal(query.obsm["mapped_neighbors"], other.obsm["mapped_neighbors"])

    refused = other[:, :].copy()
    refused.obsm, refused.obs = {}, refused.obs[[]]
    another = make_model(store, seed=1)
    longer = GeneTokenizer.from_store(store, bin_edges=[0.5, 1.5, 2.5], max_length=50)
    rebinned = GeneBertModel(GeneBertConfig.from_tokenizer(longer, size="tiny"))
    rebinned.tokenizer = longer
    for wrong in (another, rebinned):
        with pytest.raises(ValueError, match="embedded by another model .* Save the reference with this model"):
            map_to_reference(refused, tmp_path / "ref", wrong)
    model.config.pooling = "cls"
    with pytest.raises(ValueError, match="embedded by another model"):
        map_to_reference(refused, tmp_path / "ref", model)
    assert not list(refused.obsm) and not list(refused.obs)


def test_bad_references_are_refused(model, cells, tmp_path):
    reference, query = cells
    for key, message in ((None, "label_key is not given; its columns are cell_type"), ("x", "no obs column 'x'")):
        with pytest.raises(ValueError, match=message):
            map_to_reference(query, reference, model, label_key=key)
    reference.obs["type"] = None
    with pytest.raises(ValueError, match="0 cells of the reference have a 'type'"):
        map_to_reference(query, reference, model, label_key="type")
    with pytest.raises(FileNotFoundError, match=r"holds no reference\.json"):
        map_to_reference(query, tmp_path, model)
    assert not list(query.obsm)


def test_cells_without_a_known_gene_have_no_label_and_label_none(model, cells):
    reference, query = cells  # the fourth cell of the reference is empty
    full = reference[np.arange(40) != 3].copy()
    query.X = sparse.diags_array(np.arange(20) > 0, dtype=np.float32).tocsr() @ query.X
    other = query.copy()
    map_to_reference(query, reference, model, label_key="type", n_neighbors=37, reject=0.2)
    map_to_reference(other, full, model, label_key="type", n_neighbors=37, reject=0.2)
    pd.testing.assert_frame_equal(query.obs, other.obs)
    assert query.uns["mapped"]["n_reference"] == 36
    columns = ["mapped_label", "mapped_score", "mapped_distance"]
    assert query.obs[columns].isna().all(axis=1).tolist() == [True] + [False] * 19
    assert (query.obsm["mapped_neighbors"].iloc[0] == "").all() and np.isnan(
        query.obsm["mapped_neighbor_distances"][0]
    ).all()
    reference.obs["type"] = None
    reference.obs.iloc[[0, 3], -1] = "one"
    with pytest.raises(ValueError, match="1 cells of the reference have a 'type' and counts"):
        map_to_reference(query, reference, model, label_key="type")


def test_labels_may_be_whole_numbers_and_no_fractions(model, cells):
    reference, query = cells
    reference.obs["type"] = np.where(np.arange(40) < 3, np.nan, np.arange(40) % 2)
    map_to_reference(query, reference, model, label_key="type")
    assert set(query.obs["mapped_label"]) <= {"0", "1"}
    reference.obs["type"] /= 2
    with pytest.raises(ValueError, match="'type' of the reference holds fractions"):
        map_to_reference(query, reference, model, label_key="type")


def test_the_command_maps_and_keeps_the_reference(model, cells, tmp_path):
    reference, query = cells
    model.save_pretrained(tmp_path / "m")
    model.tokenizer.save_pretrained(tmp_path / "m")
    for name, of in (("ref", reference), ("query", query)):
        of.write_h5ad(tmp_path / f"{name}.h5ad")
    kept, common = str(tmp_path / "kept"), ["--data", str(tmp_path / "query.h5ad"), "--model", str(tmp_path / "m")]
    runs = (
        ["--reference", str(tmp_path / "ref.h5ad"), "--label_key", "type", "--save_reference", kept],
        ["--reference", kept],
    )
    for i, flags in enumerate(runs):
        out = str(tmp_path / f"{i}.h5ad")
        assert main(["map", *common, *flags, "--output", out, "--reject", "0.2", "--n_neighbors", "5"]) == 0
    map_to_reference(query, reference, tmp_path / "m", label_key="type", reject=0.2, n_neighbors=5)
    for i in range(2):
        found = read_h5ad(tmp_path / f"{i}.h5ad").obs["mapped_label"]
        assert found.astype(str).tolist() == query.obs["mapped_label"].astype(str).tolist()
    assert main(["map", *common, *runs[0][:2], "--output", str(tmp_path / "no.h5ad")]) == 1  # without a label
    before = (tmp_path / "kept" / "reference.json").read_bytes()
    again = [
        "map",
        *common,
        *runs[0][:2],
        "--label_key",
        "cell_type",
        *runs[0][4:],
        "--output",
        str(tmp_path / "no.h5ad"),
    ]
    assert main(again) == 1 and (tmp_path / "kept" / "reference.json").read_bytes() == before
    assert main([*again, "--overwrite"]) == 0 and (tmp_path / "kept" / "reference.json").read_bytes() != before


@pytest.mark.usefixtures("compiled_umap")
def test_both_are_drawn_in_one_picture(model, cells, tmp_path):
    pytest.importorskip("scanpy")
    reference, query = cells
    map_to_reference(query, reference, model, label_key="type")
    axes = sf.pl.mapping(query, reference, "mapped_label", reference_color="type", save=tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert [ax.get_title() for ax in axes] == ["cells", "mapped_label"]
    assert [len(ax.collections[0].get_offsets()) for ax in axes] == [60, 60]
    texts = [{text.get_text() for text in ax.get_legend().get_texts()} for ax in axes]
    assert texts == [{"reference", "query"}, {*reference.obs["type"].dropna(), "missing"}]
    with pytest.raises(ValueError, match=r"There is no reference.obs\['mapped_label'\]; reference.obs has"):
        sf.pl.mapping(query, reference, "mapped_label")


def test_neighbours_at_distance_zero_are_the_only_ones_that_count():
    shares = vote(np.array([[0.0, 0.0, 1.0], [1.0, 2.0, 4.0]]), np.array([[0, 1, 2], [2, 1, 1]]), 3)
    np.testing.assert_allclose(shares, [[0.5, 0.5, 0], [0, 0.75 / 1.75, 1 / 1.75]])
