"""GeneTokenizer against a plain tokenizer of one cell at a time."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData, read_h5ad
from conftest import make_adata
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse
from transformers import AutoTokenizer

from stformer_hf import CellStore, GeneBertConfig, GeneTokenizer

GENES = ["a", "b", "c", "d", "e", "f"]
PHENOTYPES = {"tissue": ["lung", "bone marrow"], "cell_type": ["T cell", "B cell"]}


def plain_tokens(counts, genes, edges, phenotypes, included, values, max_length):
    """One cell: lists of ids and types, as references/systems.md lays them out."""
    vocabulary = ["[CLS]", "[EOS]", "[MASK]", "[PAD]"]
    for category in sorted(phenotypes):
        vocabulary += [f"[{value.replace(' ', '_')}]" for value in phenotypes[category]]
    first_bin = len(vocabulary)
    ids, types = [0], [0]
    for category in included:
        if values.get(category) in phenotypes[category]:
            ids.append(vocabulary.index(f"[{values[category].replace(' ', '_')}]"))
            types.append(1 + sorted(phenotypes).index(category))
    expressed = [(j, x) for j, x in enumerate(counts) if np.digitize(x, edges) > 0]
    strongest = sorted(expressed, key=lambda gene: (-float(gene[1]), gene[0]))[: max_length - 1 - len(ids)]
    for j, x in sorted(strongest):
        ids.append(first_bin + int(np.digitize(x, edges)))
        types.append(1 + len(phenotypes) + j)
    return [*ids, 1], [*types, 0]


@pytest.fixture
def tokenizer():
    return GeneTokenizer(GENES, bin_edges=[0.5, 2, 4], phenotypes=PHENOTYPES)


def test_vocabulary_is_perturbgenes(tokenizer):
    assert tokenizer.get_vocab() == {
        "[CLS]": 0,
        "[EOS]": 1,
        "[MASK]": 2,
        "[PAD]": 3,
        "[T_cell]": 4,
        "[B_cell]": 5,
        "[lung]": 6,
        "[bone_marrow]": 7,
        "bin_0": 8,
        "bin_1": 9,
        "bin_2": 10,
        "bin_3": 11,
    }
    assert (tokenizer.vocab_size, len(tokenizer), tokenizer.first_bin_id, tokenizer.n_bins) == (12, 12, 8, 4)
    assert (tokenizer.gene_token_type_offset, tokenizer.type_vocab_size, tokenizer.genes_start_ind) == (3, 9, 3)
    assert list(GeneTokenizer(GENES).get_vocab()) == ["[CLS]", "[EOS]", "[MASK]", "[PAD]", "bin_0", "bin_1"]
    assert (tokenizer.cls_token_id, tokenizer.pad_token_id) == (0, 3)
    assert tokenizer.convert_tokens_to_ids(["[lung]", "bin_2"]) == [6, 10]
    assert tokenizer.decode([0, 6, 10, 1]) == "[CLS] [lung] bin_2 [EOS]"
    assert tokenizer.convert_token_types_to_names([0, 1, 2, 3, 8]) == [None, "cell_type", "tissue", "a", "f"]


def test_layout_of_one_cell_by_hand(tokenizer):
    counts = np.array([[0, 1, 2, 0, 4, 3]])
    obs = pd.DataFrame({"tissue": ["bone marrow"], "cell_type": ["T cell"]})
    tokens = tokenizer(counts, obs=obs)
    assert tokens["input_ids"] == [[0, 7, 4, 9, 10, 11, 10, 1]]
    assert tokens["token_type_ids"] == [[0, 2, 1, 4, 5, 7, 8, 0]]
    assert tokens["attention_mask"] == [[1] * 8]
    tokenizer.included_phenotypes = ["cell_type"]
    assert tokenizer(counts, obs=obs)["input_ids"] == [[0, 4, 9, 10, 11, 10, 1]]


counts_strategy = hnp.arrays(
    st.sampled_from([np.uint8, np.int64, np.float32, np.float64]),
    st.tuples(st.integers(1, 8), st.just(len(GENES))),
    elements=st.sampled_from([0, 0, 0, 1, 2, 3, 4, 5, 200]),
)


@given(
    counts=counts_strategy,
    form=st.sampled_from([np.array, sparse.csr_matrix, sparse.csc_matrix, sparse.coo_array]),
    order=st.permutations(range(len(GENES))),
    max_length=st.integers(5, 12),
    included=st.sampled_from([[], ["tissue"], ["tissue", "cell_type"], ["cell_type", "tissue"]]),
    data=st.data(),
)
def test_any_counts_give_the_plain_tokens(counts, form, order, max_length, included, data):
    value = st.sampled_from(["lung", "bone marrow", "T cell", "B cell", "unheard of", None])
    obs = pd.DataFrame(
        {name: [data.draw(value) for _ in counts] for name in PHENOTYPES if data.draw(st.booleans())},
        index=range(len(counts)),
    )
    tokenizer = GeneTokenizer(
        GENES, bin_edges=[0.5, 2, 4], phenotypes=PHENOTYPES, included_phenotypes=included, max_length=max_length
    )
    tokens = tokenizer(form(counts[:, order]), genes=[GENES[i] for i in order], obs=obs)
    for i, row in enumerate(counts):
        values = {name: obs[name].iloc[i] for name in obs}
        ids, types = plain_tokens(row, GENES, [0.5, 2, 4], PHENOTYPES, included, values, max_length)
        assert tokens["input_ids"][i] == ids
        assert tokens["token_type_ids"][i] == types


def test_edges_belong_to_the_bin_above(tokenizer):
    bins = tokenizer(np.array([[0.0, 1, 2, 3, 4, 5]]))["input_ids"][0][1:-1]
    assert bins == [9, 10, 10, 11, 11]
    for dtype in (np.uint8, np.uint16, np.uint32, np.int32, np.float32):
        assert tokenizer(np.array([[0, 1, 2, 3, 4, 5]], dtype))["input_ids"][0][1:-1] == bins


def test_a_store_an_anndata_and_a_matrix_give_the_same_tokens(store, adata):
    tokenizer = GeneTokenizer.from_store(store, phenotypes=["cell_type"], bin_edges=[0.5, 1.5, 3.5])
    from_adata = tokenizer(adata)
    from_matrix = tokenizer(adata.X, genes=list(adata.var_names), obs=adata.obs)
    from_store = tokenizer(store.__getitems__(range(60)))
    assert from_adata == from_matrix == from_store
    assert from_adata["input_ids"][3] == [0, tokenizer(adata)["input_ids"][3][1], 1]  # a cell without counts


def test_input_is_not_changed_and_repeated_entries_are_summed(tokenizer):
    matrix = sparse.csr_matrix((np.array([1.0, 1, 3]), np.array([2, 0, 2]), np.array([0, 3])), shape=(1, 6))
    copy = matrix.copy()
    ids = tokenizer(matrix)["input_ids"][0]
    assert ids == [0, 9, 11, 1]  # 1, and 1 + 3
    np.testing.assert_array_equal(matrix.data, copy.data)
    np.testing.assert_array_equal(matrix.indices, copy.indices)


def test_columns_with_one_gene_id_are_summed(tokenizer):
    tokens = tokenizer(np.array([[3, 200, 100]], np.uint8), genes=["b", "a", "b"])
    assert tokens["token_type_ids"][0] == [0, 3, 4, 0]
    assert tokens["input_ids"][0] == [0, 11, 11, 1]


def test_versions_of_ensembl_ids_do_not_matter():
    tokenizer = GeneTokenizer(["ENSG00000000001", "ENSG00000000002.7"])
    tokens = tokenizer(np.array([[1, 1]]), genes=["ENSG00000000002", "ENSG00000000001.3"])
    assert tokens["token_type_ids"] == [[0, 1, 2, 0]]


def test_an_anndata_is_mapped_by_the_column_that_knows_its_genes():
    ids = [f"ENSG{i:011d}" for i in range(6)]
    tokenizer = GeneTokenizer(ids, bin_edges=[0.5, 2, 4], phenotypes=PHENOTYPES)
    var = pd.DataFrame({"gene_id": [ids[2], ids[0], ids[1]]}, index=["x", "y", "z"])
    adata = AnnData(np.array([[1.0, 0, 2]]), var=var)
    assert tokenizer(adata)["token_type_ids"] == [[0, 4, 5, 0]]
    assert tokenizer.last_coverage == {"genes": 1.0, "counts": 1.0, "vocabulary": 0.5, "weight": 0.5}


def test_unknown_genes_are_counted_and_an_input_without_the_models_genes_raises(tokenizer):
    counts = np.array([[6, 4, 0]])
    tokens = tokenizer(counts, genes=["a", "z", "b"])
    assert tokens["token_type_ids"] == [[0, 3, 0]]
    share = 2 / 6
    assert tokenizer.last_coverage == pytest.approx(
        {"genes": 2 / 3, "counts": 0.6, "vocabulary": share, "weight": share}
    )
    with pytest.raises(
        ValueError,
        match=r"has 0 of the model's 6 genes \(0.0%; at least 10% are needed\); 0.0% of the input's counts.*"
        r"like z, y, x.*model needs genes like a, b, c",
    ):
        tokenizer(counts, genes=["z", "y", "x"])
    tokenizer.min_coverage = 0.0
    assert tokenizer(counts, genes=["z", "y", "x"])["token_type_ids"] == [[0, 0]]
    tokenizer.min_coverage = 0.1  # the same genes, and another rule
    with pytest.raises(ValueError, match="has 0 of the model's 6 genes"):
        tokenizer(counts, genes=["z", "y", "x"])


def test_another_order_of_genes_is_not_read_as_other_genes(tokenizer):
    counts = np.array([[5, 0, 0, 1, 0, 0]])
    reverse = tokenizer(counts[:, ::-1], genes=GENES[::-1])
    assert reverse == tokenizer(counts, genes=GENES)


def test_truncation_keeps_the_strongest_genes_and_eos():
    tokenizer = GeneTokenizer(GENES, bin_edges=[0.5, 2, 4], max_length=5)
    tokens = tokenizer.encode_cells(np.array([[1, 3, 1, 9, 2, 2], [1, 0, 0, 0, 0, 1]]))
    assert tokens.token_type_ids.tolist() == [0, 2, 4, 5, 0, 0, 1, 6, 0]
    assert tokens.input_ids[4] == tokens.input_ids[-1] == 1
    assert tokens.dropped_type_ids.tolist() == [1, 3, 6]
    assert tokens.dropped_cells.tolist() == [0, 0, 0]


def test_padding_and_tensors(tokenizer):
    counts = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]])
    batch = tokenizer(counts, padding=True, return_tensors="pt")
    assert batch["input_ids"].tolist() == [[0, 9, 9, 9, 1], [0, 9, 1, 3, 3]]
    assert batch["token_type_ids"].tolist() == [[0, 3, 4, 5, 0], [0, 8, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert batch["input_ids"].dtype == torch.int64
    assert tokenizer(counts, padding=True, pad_to_multiple_of=8, return_tensors="np")["input_ids"].shape == (2, 8)
    assert tokenizer(counts, padding="max_length", max_length=7, return_tensors="pt")["input_ids"].shape == (2, 7)
    stock = tokenizer.pad(tokenizer(counts), return_tensors="pt")
    for name, tensor in batch.items():
        assert torch.equal(stock[name], tensor)
    with pytest.raises(ValueError, match="padding=True"):
        tokenizer(counts, return_tensors="pt")
    tokenizer.padding_side = "left"
    left = tokenizer(counts, padding=True, return_tensors="pt")
    assert left["input_ids"].tolist() == [[0, 9, 9, 9, 1], [3, 3, 0, 9, 1]]
    assert torch.equal(tokenizer.pad(tokenizer(counts), return_tensors="pt")["input_ids"], left["input_ids"])


def test_no_cells(tokenizer):
    assert tokenizer(np.zeros((0, 6)))["input_ids"] == []
    assert tokenizer(np.zeros((0, 6)), padding=True, return_tensors="pt")["input_ids"].shape == (0, 0)


def test_masks_of_ids_in_lists_arrays_and_tensors(tokenizer):
    ids = [0, 6, 2, 9, 1, 3]
    assert tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True) == [1, 0, 1, 0, 1, 1]
    assert tokenizer.get_phenotypic_tokens_mask(ids) == [0, 1, 0, 0, 0, 0]
    assert tokenizer.get_gene_tokens_mask(ids) == [0, 0, 0, 1, 0, 0]
    assert tokenizer.get_gene_tokens_mask(torch.tensor([ids])).tolist() == [[False, False, False, True, False, False]]
    assert tokenizer.get_phenotypic_tokens_mask(np.array(ids)).dtype == bool
    assert tokenizer.get_special_tokens_mask([6, 9]) == [1, 0, 0, 1]


def test_missing_phenotypes_are_left_out_and_told_once(tokenizer, caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    counts = np.ones((3, 6), int)
    obs = pd.DataFrame({"tissue": ["lung", None, "spleen"]})
    tokens = tokenizer(counts, obs=obs)
    tokenizer(counts, obs=obs)
    assert [ids[1] for ids in tokens["input_ids"]] == [6, 9, 9]
    told = [record.message for record in caplog.records if "no known value" in record.message]
    assert len(told) == 2
    assert "2 of 3 cells have no known value of phenotype 'tissue'" in told[0]
    assert "3 of 3 cells have no known value of phenotype 'cell_type'" in told[1]


def test_values_shared_by_categories_keep_ids_of_their_own():
    tokenizer = GeneTokenizer(["g"], phenotypes={"sex": ["unknown"], "age": ["unknown", "MASK"]})
    assert len(tokenizer.get_vocab()) == len(tokenizer) == 9
    obs = pd.DataFrame({"sex": ["unknown"], "age": ["unknown"]})
    ids = tokenizer(np.array([[1]]), obs=obs)["input_ids"][0]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "[sex=unknown]", "[unknown]", "bin_1", "[EOS]"]
    assert tokenizer.convert_ids_to_tokens([5]) == ["[age=MASK]"]


@pytest.mark.parametrize("reload", [lambda path: GeneTokenizer.from_pretrained(path), AutoTokenizer.from_pretrained])
def test_save_and_load(store, adata, tmp_path, reload):
    tokenizer = GeneTokenizer.from_store(
        store, phenotypes={"cell_type": ["T cell", "B cell"]}, bin_edges=[0.5, 1.25], max_length=20
    )
    GeneBertConfig.from_tokenizer(tokenizer, size="tiny").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.pkl"))
    back = reload(tmp_path)
    assert type(back) is GeneTokenizer
    assert back(adata) == tokenizer(adata)
    assert back.get_vocab() == tokenizer.get_vocab()
    assert back.fingerprint == tokenizer.fingerprint
    assert (back.max_length, back.included_phenotypes) == (20, ["cell_type"])
    back.save_pretrained(tmp_path / "again")
    assert reload(tmp_path / "again")(adata) == tokenizer(adata)
    assert AutoTokenizer.from_pretrained(tmp_path, max_length=10).max_length == 10


def test_a_newer_vocabulary_raises(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "gene_vocabulary.json").read_text())
    (tmp_path / "gene_vocabulary.json").write_text(json.dumps({**saved, "format_version": 99}))
    with pytest.raises(ValueError, match="format version 99"):
        GeneTokenizer.from_pretrained(tmp_path)


def test_fingerprints_tell_vocabularies_apart():
    variants = [
        GeneTokenizer(GENES),
        GeneTokenizer(GENES[::-1]),
        GeneTokenizer(GENES, bin_edges=[1]),
        GeneTokenizer(GENES, phenotypes=PHENOTYPES),
    ]
    assert len({tokenizer.fingerprint for tokenizer in variants}) == 4
    assert GeneTokenizer(GENES, max_length=50).fingerprint == variants[0].fingerprint


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"genes": None}, "needs genes"),
        ({"genes": []}, "needs genes"),
        ({"genes": ["a", "b", "a"]}, "are repeated"),
        ({"genes": ["ENSG00000000001", "ENSG00000000001.2"]}, "are repeated"),
        ({"scheme": "words"}, "scheme"),
        ({"medians": {"a": 1.0}}, "rank scheme"),
        ({"bin_edges": []}, "strictly increasing"),
        ({"bin_edges": [1, 1]}, "strictly increasing"),
        ({"bin_edges": [0, 1]}, "positive"),
        ({"bin_edges": [1, np.nan]}, "finite"),
        ({"phenotypes": {"t": ["T cell", "T_cell"]}}, r"both become \[T_cell\]"),
        ({"phenotypes": {"t": ["x"]}, "included_phenotypes": ["u"]}, "Unknown phenotype 'u'"),
        ({"phenotypes": {"t": ["x"]}, "included_phenotypes": ["t", "t"]}, "twice"),
        ({"max_length": 2}, "no room for a gene"),
    ],
)
def test_bad_settings_raise(arguments, words):
    with pytest.raises(ValueError, match=words):
        GeneTokenizer(**{"genes": GENES, **arguments})


@pytest.mark.parametrize(
    ("value", "words"), [(-1.0, "negative"), (np.nan, "NaN"), (np.inf, "NaN or infinite"), (0.3, "fractional")]
)
def test_values_that_are_no_counts_raise_and_name_the_layer_that_has_them(tokenizer, value, words):
    adata = AnnData(np.array([[value, 1.0, 2, 0, 0, 0]]), var=pd.DataFrame(index=GENES))
    with pytest.raises(ValueError, match=words):
        tokenizer(adata)
    with pytest.raises(ValueError, match=words):
        tokenizer(adata.X)
    adata.layers["umi"] = np.array([[1.0, 1, 2, 0, 0, 0]])
    with pytest.raises(ValueError, match="layer='umi'"):
        tokenizer(adata)
    assert tokenizer(adata, layer="umi")["input_ids"] == [[0, 9, 9, 10, 1]]


def test_input_of_the_wrong_kind_or_shape_raises(tokenizer):
    with pytest.raises(TypeError, match="got str"):
        tokenizer("CD4 CD8A")
    with pytest.raises(ValueError, match="4 columns, but there are 6 gene ids.*genes="):
        tokenizer(np.ones((2, 4)))
    with pytest.raises(ValueError, match="obs has 3 rows for 2 cells"):
        tokenizer(np.ones((2, 6)), obs=pd.DataFrame({"tissue": ["lung"] * 3}))
    with pytest.raises(ValueError, match="'depth' in the store; it has cell_type"):
        adata = make_adata()
        GeneTokenizer.from_store(_FakeStore(adata), phenotypes=["depth"])


class _FakeStore:
    """The two attributes of a store that a tokenizer is made of."""

    def __init__(self, adata):
        self.gene_ids = adata.var_names.to_numpy()
        self.categories = {"cell_type": ["B cell", "T cell"]}


def test_real_cells_give_the_plain_tokens(shared_data, tmp_path):
    adata = read_h5ad(shared_data / "geact_fetal.h5ad")[::100].copy()
    store = CellStore.build(tmp_path / "s", adata, obs=["tissue"])
    tokenizer = GeneTokenizer.from_store(store, phenotypes=["tissue"], bin_edges=[0.5, 5, 50], max_length=1500)
    tokens = tokenizer(store.__getitems__(range(len(store))))
    counts = store.rows(slice(None)).toarray()
    phenotypes = {"tissue": store.categories["tissue"]}
    for i in range(len(store)):
        values = {"tissue": str(adata.obs["tissue"].iloc[i])}
        ids, types = plain_tokens(counts[i], None, [0.5, 5, 50], phenotypes, ["tissue"], values, 1500)
        assert (tokens["input_ids"][i], tokens["token_type_ids"][i]) == (ids, types)
    assert max(map(len, tokens["input_ids"])) == 1500


def test_whole_number_labels_beside_a_missing_one():
    obs = pd.DataFrame({"leiden": pd.Categorical([1, 2, None])})
    tokenizer = GeneTokenizer(["a"], phenotypes={"leiden": [1, 2]})
    counts = sparse.csr_matrix(np.ones((3, 1)))
    ids = tokenizer(counts, genes=["a"], obs=obs)["input_ids"]
    assert [row[1:-1] for row in ids] == [[4, 7], [5, 7], [7]]
    for missing in (None, np.nan):
        odd = GeneTokenizer(["a"], phenotypes={"x": ["nan", "None"]})
        assert len(odd(counts[:1], genes=["a"], obs=pd.DataFrame({"x": [missing]}))["input_ids"][0]) == 3


@pytest.mark.parametrize("form", ["csr", "coo"])
def test_sums_of_repeated_entries_do_not_wrap(form):
    counts = sparse.coo_matrix((np.array([200, 100], np.uint8), ([0, 0], [0, 0])), shape=(1, 1))
    if form == "csr":
        counts = sparse.csr_matrix((counts.data, [0, 0], [0, 2]), shape=(1, 1))
    tokenizer = GeneTokenizer(["a"], bin_edges=[1, 100, 250])
    assert tokenizer(counts)["input_ids"] == [[0, tokenizer.first_bin_id + 3, 1]]


def test_one_tokenizer_reads_stores_of_other_genes(tmp_path):
    one = make_adata()
    other = one[:, ::-1].copy()
    tokenizer = GeneTokenizer(one.var_names.tolist())
    expected = tokenizer(one)["token_type_ids"]
    for i, cells in enumerate((one, other, one)):
        store = CellStore.build(tmp_path / str(i), cells)
        tokens = tokenizer.encode_cells(store.__getitems__(range(60)))
        assert tokens.token_type_ids.tolist() == sum(expected, [])


def test_a_data_frame_names_its_genes():
    tokenizer = GeneTokenizer(["a", "b"])
    assert tokenizer(pd.DataFrame({"b": [0], "a": [3]}))["token_type_ids"] == [[0, 1, 0]]


def test_settings_that_would_have_no_effect_are_refused(tokenizer, adata, tmp_path):
    with pytest.raises(ValueError, match="has its own"):
        tokenizer(adata, obs=adata.obs)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="do not pass them too"):
        GeneTokenizer.from_pretrained(tmp_path, bin_edges=[5.0])


def test_cells_are_truncated_with_and_without_the_argument_of_transformers(store):
    tokenizer = GeneTokenizer.from_store(store)
    cells = store.__getitems__(range(9))
    expected = tokenizer(cells, max_length=6)["input_ids"]
    for truncation in (True, "longest_first"):
        assert tokenizer(cells, truncation=truncation, max_length=6)["input_ids"] == expected
    for truncation in (False, "do_not_truncate", "random"):  # random is a setting of the tokenizer
        with pytest.raises(ValueError, match="always truncated.*'top'"):
            tokenizer(cells, truncation=truncation, max_length=6)
