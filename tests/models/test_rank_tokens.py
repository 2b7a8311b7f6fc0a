"""The rank scheme against a plain tokenizer of one cell at a time."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData, read_h5ad
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import sparse
from transformers import AutoTokenizer, DataCollatorForLanguageModeling

from stformer_hf import GeneBertConfig, GeneTokenizer
from stformer_hf.models.gene_bert import gene_order

GENES = ["a", "b", "c", "d", "e", "f"]
MEDIANS = {"a": 1.0, "b": 2.5, "c": 1.0, "d": 0.3, "e": 7.0, "f": 1.1}
PHENOTYPES = {"tissue": ["lung", "bone marrow"], "cell_type": ["T cell", "B cell"]}
FIRST = 4  # id of the first gene, after the special tokens


def plain_ranks(counts, columns, genes, medians, target_sum=10_000.0):
    """Genes of one cell, by falling score; as references/systems.md section 2 has it."""
    total = float(np.sum(counts, dtype=np.float64))
    place = {gene: i for i, gene in enumerate(genes)}
    summed = {}
    for column, count in zip(columns, counts, strict=True):
        if column in place and count > 0 and medians.get(column):
            summed[column] = summed.get(column, 0.0) + float(count)
    scored = [(-(x / total * target_sum / medians[gene]), place[gene], gene) for gene, x in summed.items()]
    return [gene for _, _, gene in sorted(scored)]


@pytest.fixture
def tokenizer():
    return GeneTokenizer(GENES, scheme="rank", medians=MEDIANS, phenotypes=PHENOTYPES)


def test_vocabulary_and_layout_by_hand(tokenizer):
    assert list(tokenizer.get_vocab()) == [
        *("[CLS]", "[EOS]", "[MASK]", "[PAD]"),
        *GENES,
        *("[T_cell]", "[B_cell]", "[lung]", "[bone_marrow]"),
    ]
    assert (tokenizer.vocab_size, tokenizer.type_vocab_size, tokenizer.gene_token_type_offset) == (14, 4, 3)
    obs = pd.DataFrame({"tissue": ["lung"], "cell_type": ["B cell"]})
    tokens = tokenizer(np.array([[2, 5, 0, 1, 7, 2]]), obs=obs)
    # 2 / 1, 5 / 2.5, 1 / .3, 7 / 7, 2 / 1.1: d, then a and b (equal), f, e
    assert tokenizer.convert_ids_to_tokens(tokens["input_ids"][0]) == [
        *("[CLS]", "[lung]", "[B_cell]"),
        *("d", "a", "b", "f", "e"),
        "[EOS]",
    ]
    assert tokens["token_type_ids"] == [[0, 2, 1, 3, 3, 3, 3, 3, 0]]
    assert tokenizer.decode(tokens["input_ids"][0]) == "[CLS] [lung] [B_cell] d a b f e [EOS]"
    assert tokenizer.convert_token_types_to_names([0, 1, 2, 3]) == [None, "cell_type", "tissue", "cell"]
    assert tokenizer.get_gene_tokens_mask([0, 3, 4, 9, 10]) == [0, 0, 1, 1, 0]
    assert tokenizer.get_phenotypic_tokens_mask(torch.tensor([9, 10, 13])).tolist() == [False, True, True]
    assert tokenizer.get_special_tokens_mask([0, 1, 2, 3, 4], already_has_special_tokens=True) == [1, 1, 1, 1, 0]


@given(
    counts=hnp.arrays(
        st.sampled_from([np.uint8, np.uint16, np.int64, np.float32, np.float64]),
        st.tuples(st.integers(0, 8), st.just(9)),
        elements=st.sampled_from([0, 0, 0, 1, 1, 2, 3, 200]),
    ),
    form=st.sampled_from([np.array, sparse.csr_matrix, sparse.csc_matrix, sparse.coo_array]),
    columns=st.permutations([*GENES, "a", "unknown", "other"]),
    without_median=st.sampled_from([[], ["c"], ["a", "f"]]),
    max_length=st.integers(3, 12),
    ends=st.tuples(st.booleans(), st.booleans()),
)
def test_any_counts_give_the_plain_ranks(counts, form, columns, without_median, max_length, ends):
    medians = {gene: median for gene, median in MEDIANS.items() if gene not in without_median}
    tokenizer = GeneTokenizer(
        GENES, scheme="rank", medians=medians, max_length=max_length, add_cls=ends[0], add_eos=ends[1]
    )
    tokenizer.min_coverage = 0
    tokens = tokenizer(form(counts), genes=columns)
    for row, ids in zip(counts, tokens["input_ids"], strict=True):
        wanted = plain_ranks(row, columns, GENES, medians)[: max_length - sum(ends)]
        wanted = ["[CLS]"] * ends[0] + wanted + ["[EOS]"] * ends[1]
        assert tokenizer.convert_ids_to_tokens(ids) == wanted


@given(data=st.data(), n_cells=st.sampled_from([1, 3, 700]), at_a_time=st.sampled_from([1, 50, 1 << 13]))
def test_many_cells_and_many_ties_give_the_plain_ranks(data, n_cells, at_a_time):
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    genes = [f"g{i}" for i in range(70)]
    # Scores that are equal, that differ in their last bit, and that differ by far.
    values = rng.choice([1.0, np.nextafter(1.0, 2), np.nextafter(1.0, 0), 2.0, 1e-8, 1e8], len(genes))
    medians = dict(zip(genes, values.tolist(), strict=True))
    counts = rng.poisson(0.7, (n_cells, len(genes))) * rng.choice([1, 1, 1, 1000], (n_cells, len(genes)))
    tokenizer = GeneTokenizer(genes, scheme="rank", medians=medians)
    before, gene_order._ENTRIES_AT_A_TIME = gene_order._ENTRIES_AT_A_TIME, at_a_time
    try:
        tokens = tokenizer(sparse.csr_matrix(counts))
    finally:
        gene_order._ENTRIES_AT_A_TIME = before
    for row, ids in zip(counts[:40], tokens["input_ids"], strict=False):
        assert tokenizer.convert_ids_to_tokens(ids)[1:-1] == plain_ranks(row, genes, genes, medians)


def test_scores_that_differ_in_the_last_bit_are_told_apart():
    up = np.nextafter(1.0, 2)
    tokenizer = GeneTokenizer(["a", "b", "c"], scheme="rank", medians=[up, 1.0, up], add_cls=False, add_eos=False)
    assert tokenizer(np.array([[1, 1, 1]]))["input_ids"] == [[FIRST + 1, FIRST, FIRST + 2]]


def test_genes_without_counts_are_no_tokens(tokenizer):
    tokens = tokenizer(sparse.csr_matrix(np.array([[0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])))
    assert tokens["input_ids"] == [[0, 1], [0, FIRST, 1]]
    stored_zero = sparse.csr_matrix((np.array([0.0, 3.0]), np.array([0, 2]), np.array([0, 2])), shape=(1, 6))
    assert tokenizer(stored_zero)["input_ids"] == [[0, FIRST + 2, 1]]


def test_a_target_sum_changes_scores_and_totals_are_of_all_columns():
    """Unknown columns count for the total: x / total rounds otherwise without them."""
    rng = np.random.default_rng(0)
    genes = [f"g{i}" for i in range(300)]
    medians = dict(zip(genes, rng.uniform(0.9, 1.1, 300).tolist(), strict=True))
    counts = rng.poisson(3, (20, 301))
    tokenizer = GeneTokenizer(genes, scheme="rank", medians=medians, target_sum=7.0)
    tokens = tokenizer(counts, genes=[*genes, "unknown"])
    for row, ids in zip(counts, tokens["input_ids"], strict=True):
        wanted = plain_ranks(row, [*genes, "unknown"], genes, medians, 7.0)
        assert tokenizer.convert_ids_to_tokens(ids)[1:-1] == wanted


@pytest.mark.parametrize("separator", ["[SEP]", None])
def test_neighbourhoods(separator):
    counts = np.array([[2, 0, 0, 1, 0, 0], [0, 3, 0, 0, 0, 1], [0, 1, 4, 0, 0, 0], [0, 0, 0, 0, 9, 0]])
    graph = np.array([[5, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    adata = AnnData(sparse.csr_matrix(counts), var=pd.DataFrame(index=GENES))
    adata.obsp["spatial_connectivities"] = sparse.csr_matrix(graph)
    tokenizer = GeneTokenizer(
        GENES, scheme="rank", medians=MEDIANS, neighborhood=True, separator=separator, max_length=8
    )
    tokens = tokenizer(adata)
    np.fill_diagonal(graph, 0)  # a cell is not its own neighbour
    room = (8 - 2 - (separator is not None)) // 2
    for i, (ids, types) in enumerate(zip(tokens["input_ids"], tokens["token_type_ids"], strict=True)):
        own = plain_ranks(counts[i], GENES, GENES, MEDIANS)[:room]
        around = plain_ranks((graph[i] > 0) @ counts, GENES, GENES, MEDIANS)[:room]
        middle = [] if separator is None else [separator]
        assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", *own, *middle, *around, "[EOS]"]
        assert types == [0] + [1] * len(own) + [0] * len(middle) + [2] * len(around) + [0]
        assert tokenizer.convert_token_types_to_names([1, 2]) == ["cell", "neighborhood"]
    del adata.obsp["spatial_connectivities"]
    with pytest.raises(ValueError, match="no obsp.*spatial_neighbors"):
        tokenizer(adata)
    with pytest.raises(ValueError, match="neighborhood=…"):
        tokenizer(counts)
    assert tokenizer(counts, neighborhood=(graph > 0) @ counts) == tokens


def test_the_reference_layout_of_neighbourhoods():
    """STFormer's: as many of the spot's genes as of its neighbours', nothing between them."""
    tokenizer = GeneTokenizer.from_token_dictionary(
        {"<pad>": 0, "<mask>": 1, **{gene: 2 + i for i, gene in enumerate(GENES)}},
        MEDIANS,
        neighborhood=True,
        separator=None,
        max_length=4,
    )
    adata = AnnData(sparse.csr_matrix(np.array([[3, 2, 1, 0, 0, 0], [1, 2, 8, 0, 0, 0]])))
    adata.var_names = GENES
    adata.obsp["spatial_connectivities"] = sparse.csr_matrix(np.array([[0, 1], [1, 0]]))
    assert tokenizer(adata)["input_ids"] == [[2, 4, 4, 2], [4, 2, 2, 4]]


def test_random_truncation_is_a_function_of_seed_epoch_and_cell():
    genes = [f"g{i}" for i in range(50)]
    counts = np.random.default_rng(0).integers(1, 9, (6, 50))
    medians = dict.fromkeys(genes, 1.0)
    tokenizer = GeneTokenizer(genes, scheme="rank", medians=medians, truncation="random", max_length=12, seed=3)

    def chosen(**kwargs):
        tokens = tokenizer.encode_cells(counts, **kwargs)
        return [tokens.input_ids[a:b].tolist() for a, b in zip(tokens.indptr, tokens.indptr[1:], strict=False)]

    first = chosen()
    assert chosen() == first != chosen(epoch=1)
    for row, ids in zip(counts, first, strict=True):
        kept = [i - FIRST for i in ids[1:-1]]
        assert len(set(kept)) == 10
        assert kept == sorted(kept, key=lambda gene: (-row[gene], gene))
    many = GeneTokenizer(genes, scheme="rank", medians=medians, truncation="random", max_length=12, seed=4)
    ids = many.encode_cells(np.random.default_rng(1).integers(1, 9, (3000, 50))).input_ids
    share = np.bincount(ids)[FIRST:] / 3000
    np.testing.assert_allclose(share, 0.2, atol=0.04)  # 5 standard errors


@pytest.mark.parametrize("reload", [lambda path: GeneTokenizer.from_pretrained(path), AutoTokenizer.from_pretrained])
def test_save_and_load(tokenizer, tmp_path, reload):
    counts = np.random.default_rng(0).poisson(2, (5, 6))
    GeneBertConfig.from_tokenizer(tokenizer, size="tiny").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.pkl"))
    back = reload(tmp_path)
    assert type(back) is GeneTokenizer
    assert back(counts) == tokenizer(counts)
    assert back.get_vocab() == tokenizer.get_vocab()
    assert back.fingerprint == tokenizer.fingerprint
    assert (back.medians == tokenizer.medians).all()
    assert (back.add_cls, back.add_eos, back.neighborhood, back.separator) == (True, True, False, None)


def test_a_process_with_neither_plugin_nor_remote_code_reads_the_same_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import PreTrainedTokenizerFast;"
        f"t = PreTrainedTokenizerFast.from_pretrained({str(tmp_path)!r});"
        "print(t.encode('f a [lung] [MASK] b', add_special_tokens=False)); assert 'stformer_hf' not in sys.modules"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == tokenizer.convert_tokens_to_ids(["f", "a", "[lung]", "[MASK]", "b"])


@pytest.mark.parametrize("layout", [{}, {"add_cls": False, "add_eos": False}, {"neighborhood": True}])
@pytest.mark.parametrize("hidden", [False, True])
def test_a_cell_written_as_text_has_the_tokens_of_its_counts(layout, hidden):
    tokenizer = GeneTokenizer(GENES, scheme="rank", medians=MEDIANS, phenotypes=PHENOTYPES, max_length=14, **layout)
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"tissue": rng.choice(["lung", "bone marrow"], 30), "cell_type": "T cell"})
    around = rng.poisson(1.0, (30, 6)) if "neighborhood" in layout else None
    cells = tokenizer.encode_cells(rng.poisson(1.0, (30, 6)), obs=obs, neighborhood=around, for_inference=hidden)
    for start, stop in zip(cells.indptr, cells.indptr[1:], strict=False):
        ids, types = cells.input_ids[start:stop].tolist(), cells.token_type_ids[start:stop].tolist()
        text = tokenizer.decode(ids)
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        written = tokenizer.prepare_for_model(ids, add_special_tokens=False, max_length=20, padding="max_length")
        assert written["input_ids"] == ids + [tokenizer.pad_token_id] * (20 - len(ids))
        assert written["token_type_ids"] == types + [0] * (20 - len(ids))
        inner = tokenizer.convert_tokens_to_ids(text.split()[tokenizer.add_cls : len(ids) - tokenizer.add_eos])
        assert tokenizer.create_token_type_ids_from_sequences(inner) == types
        prepared = tokenizer.prepare_for_model(inner, return_tensors="pt", prepend_batch_axis=True)
        assert prepared["input_ids"].tolist() == [ids] and prepared["token_type_ids"].tolist() == [types]


def test_text_that_does_not_tell_the_token_types_is_refused(tokenizer):
    binned = GeneTokenizer(GENES)
    for special in (True, False):
        with pytest.raises(ValueError, match="text does not have: tokenize counts"):
            binned.encode("bin_1 bin_1", add_special_tokens=special)
        with pytest.raises(ValueError, match="1 of the 3 words of the text are neither .* the first is word 2"):
            tokenizer.encode("a nothing b", add_special_tokens=special)
    with pytest.raises(ValueError, match="text does not have"):
        binned.prepare_for_model([5, 5])
    with pytest.raises(ValueError, match="one sequence"):
        tokenizer.encode("a b", "c")
    layout = GeneTokenizer(GENES, scheme="rank", medians=MEDIANS, neighborhood=True, separator=None)
    with pytest.raises(ValueError, match="where the neighbourhood begins"):
        layout.encode("a b a c")


def test_the_stock_collator_masks_genes_only(tokenizer):
    counts = np.random.default_rng(0).poisson(2, (64, 6))
    tokens = tokenizer(counts)
    examples = [
        {"input_ids": ids, "token_type_ids": types} for ids, types in zip(*list(tokens.values())[:2], strict=True)
    ]
    torch.manual_seed(0)
    batch = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.5)(examples)
    labelled = batch["labels"] != -100
    assert 50 < labelled.sum() < 300
    assert tokenizer.get_gene_tokens_mask(batch["labels"][labelled]).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"medians": None}, "needs medians"),
        ({"medians": [1.0, 2.0]}, "2 medians for 6 genes"),
        ({"medians": dict.fromkeys(GENES, 0.0)}, "not positive numbers, such as 0.0 of a"),
        ({"medians": dict.fromkeys(GENES, np.inf)}, "not positive"),
        ({"medians": {"z": 1.0}}, "None of the genes has a median"),
        ({"bin_edges": [1.0]}, "bin_edges: only for the binned scheme"),
        ({"normalize": "log1p_cp10k"}, "normalize: only for the binned scheme"),
        ({"truncation": "tail"}, "truncation must be one of top, head, random"),
        ({"neighborhood": True, "max_length": 4}, "no room for a gene"),
        ({"special_tokens": {"pad_token": "<pad>"}}, "mask_token, pad_token are required"),
        ({"special_tokens": {"pad_token": "a", "mask_token": "b"}}, "name of a special token"),
        ({"token_ids": {"a": 4, "b": 4}}, "id 4 of 'b'"),
        ({"token_ids": {"z": 4}}, "has z, which is not a gene"),
        ({"token_ids": {"a": 1 << 40}}, "ids up to"),
    ],
)
def test_bad_settings_raise(arguments, words):
    with pytest.raises(ValueError, match=words):
        GeneTokenizer(**{"genes": GENES, "scheme": "rank", "medians": MEDIANS, **arguments})


def test_medians_of_other_genes_are_told(caplog):
    genes = [f"ENSG{i:011d}" for i in range(30)]
    symbols = {f"CD{i}": 1.0 for i in range(20)}
    match = "None of the genes has a median. .*Ensembl ids of human. 0 of 20 medians belong .*: they are for CD0, CD1"
    with pytest.raises(ValueError, match=match):
        GeneTokenizer(genes, scheme="rank", medians=symbols)
    GeneTokenizer(genes, scheme="rank", medians={**symbols, f"{genes[0]}.4": 1.0})
    assert (
        "29 of 30 genes have no median" in caplog.text and "1 of 21 medians belong to genes of the tok" in caplog.text
    )
    caplog.clear()
    GeneTokenizer(genes, scheme="rank", medians=dict.fromkeys(genes[:4], 1.0))
    assert "26 of 30 genes have no median, and never become tokens." in caplog.text
    assert "medians belong to genes" not in caplog.text


def test_a_store_gives_genes_with_medians_only(store):
    medians = {gene: 1.0 + i for i, gene in enumerate(store.gene_ids[:30])}
    tokenizer = GeneTokenizer.from_store(store, "rank", medians=medians)
    assert tokenizer.genes == store.gene_ids[:30].tolist()
    batch = store.__getitems__(range(10))
    wanted = tokenizer(store.rows(range(10)), genes=store.gene_ids)
    cuts = tokenizer.encode_cells(batch).indptr
    assert np.diff(cuts).tolist() == list(map(len, wanted["input_ids"]))
    assert tokenizer.encode_cells(batch).input_ids.tolist() == sum(wanted["input_ids"], [])
    with pytest.raises(ValueError, match="needs medians"):
        GeneTokenizer.from_store(store, "rank")


def test_real_cells_give_the_plain_ranks(shared_data):
    adata = read_h5ad(shared_data / "pbmc_ifnb.h5ad")[:60]
    rng = np.random.default_rng(0)
    genes = adata.var["ensembl_id"].tolist()
    medians = dict(zip(genes, rng.choice(rng.lognormal(0, 1, 500), len(genes)).tolist(), strict=True))  # with ties
    tokenizer = GeneTokenizer(genes, scheme="rank", medians=medians, max_length=500)
    tokens = tokenizer(adata)
    dense = adata.X.toarray()
    for row, ids in zip(dense, tokens["input_ids"], strict=True):
        wanted = plain_ranks(row, genes, genes, medians)[:498]
        assert tokenizer.convert_ids_to_tokens(ids)[1:-1] == wanted
