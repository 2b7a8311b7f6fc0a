"""What a cell gets at inference depends on the cell: not on its row, nor on which cells are before and behind it."""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from conftest import make_adata
from hypothesis import given, settings
from hypothesis import strategies as st

from stformer_hf import (
    CellNeighborhoodConfig,
    CellNeighborhoodModel,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertModel,
    GeneTokenizer,
    annotate,
    embed,
    embed_neighborhoods,
    spatial_neighbors,
)

N = 24
TRUNCATIONS = ["top", "head", "random"]


def make_cells() -> AnnData:
    adata = make_adata(N, 30, seed=2)
    adata.obs["section"] = np.repeat(["a", "b", "c"], 8)
    # A square grid in each section: neighbours at equal distances, of which some are chosen.
    adata.obsm["spatial"] = np.tile(np.stack(np.divmod(np.arange(8), 3), 1), (3, 1)).astype(float)
    spatial_neighbors(adata, "radius", radius=1.0, section_key="section")
    return adata


CELLS = make_cells()


@st.composite
def pieces(draw) -> list[np.ndarray]:
    """Rows of the cells, permuted and cut into pieces."""
    order = draw(st.permutations(range(N)))
    cuts = sorted(draw(st.sets(st.integers(1, N - 1), max_size=3)))
    return np.split(np.array(order), cuts)


@st.composite
def whole_sections(draw) -> list[np.ndarray]:
    """Rows of the cells, permuted and cut into pieces that have all cells of their sections."""
    sections = draw(st.permutations("abc"))
    cut = draw(st.integers(1, 3))
    rows = [
        np.flatnonzero(CELLS.obs["section"].isin(list(names)))
        for names in (sections[:cut], sections[cut:])
        if len(names)
    ]
    return [draw(st.permutations(of.tolist())) for of in rows]


def in_pieces(call, parts) -> np.ndarray:
    """Results of the pieces, in the order of all cells."""
    found = [call(CELLS[np.asarray(part)].copy()) for part in parts]
    order = np.concatenate(parts).astype(int)
    return np.concatenate(found)[np.argsort(order)]


def make_tokenizer(scheme: str, **changes) -> GeneTokenizer:
    medians = {"medians": dict.fromkeys(CELLS.var_names, 1.0)}
    own = {"bin_edges": [0.5, 1.5, 3.5], "whole_cell": scheme == "whole"} if scheme != "rank" else medians
    return GeneTokenizer(
        CELLS.var_names.tolist(),
        scheme="rank" if scheme == "rank" else "binned",
        **{"max_length": 9, "phenotypes": {"cell_type": ["B cell", "T cell"]}, **own, **changes},
    )


def make_model(tokenizer, kind=GeneBertModel, **fields):
    torch.manual_seed(0)
    fields = {"num_hidden_layers": 1, "initializer_range": 0.3, **fields}
    return kind(GeneBertConfig.from_tokenizer(tokenizer, size="tiny", **fields)).eval()


def is_settled(call, parts) -> None:
    np.testing.assert_allclose(in_pieces(call, parts), call(CELLS.copy()), atol=1e-4)


@pytest.mark.parametrize("with_phenotypes", [False, True])
@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("scheme", ["binned", "rank", "whole"])
def test_embeddings(scheme, truncation, with_phenotypes):
    tokenizer = make_tokenizer(scheme, truncation=truncation)
    model = make_model(tokenizer)

    def call(cells):
        embed(cells, model, tokenizer=tokenizer, pooling="mean", with_phenotypes=with_phenotypes, batch_size=5)
        return cells.obsm["X_stformer"]

    @settings(max_examples=4)
    @given(parts=pieces())
    def check(parts):
        is_settled(call, parts)

    check()


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_labels(truncation):
    tokenizer = make_tokenizer("binned", truncation=truncation)
    model = make_model(tokenizer, GeneBertForClassification, num_labels=3)

    def call(cells):
        annotate(cells, model, tokenizer=tokenizer, batch_size=7)
        return np.column_stack([cells.obs["stformer_label"].cat.codes, cells.obs["stformer_score"].fillna(-1)])

    @settings(max_examples=6)
    @given(parts=pieces())
    def check(parts):
        is_settled(call, parts)

    check()


@pytest.mark.parametrize("scheme", ["binned", "rank"])
@pytest.mark.parametrize("truncation", TRUNCATIONS)
@settings(max_examples=10)
@given(parts=pieces(), dtype=st.sampled_from([np.float32, np.uint8, np.int64]))
def test_tokens(scheme, truncation, parts, dtype):
    tokenizer = make_tokenizer(scheme, truncation=truncation)
    expected = tokenizer(CELLS)["input_ids"]
    for part in parts:
        some = CELLS[np.asarray(part)].copy()
        some.X = some.X.astype(dtype)
        assert tokenizer(some)["input_ids"] == [expected[row] for row in part]
    assert max(map(len, expected)) == 9


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_tokens_of_neighbourhoods(truncation):
    tokenizer = make_tokenizer("rank", neighborhood=True, truncation=truncation, max_length=14)
    expected = tokenizer(CELLS)["input_ids"]

    @settings(max_examples=8)
    @given(parts=whole_sections())
    def check(parts):
        for part in parts:
            assert tokenizer(CELLS[np.asarray(part)].copy())["input_ids"] == [expected[row] for row in part]

    check()


@pytest.mark.parametrize(
    "options",
    [
        {"patch_size": 3.0},
        {"patch_size": 5.0, "max_num_cells": 2},
        {"patch_size": 3.0, "shape": "disc", "max_num_cells": 1, "seed": 3},
        {"patch_size": None, "k_nearest": 2},  # of four at one distance
        {"patch_size": 4.0, "k_nearest": 3, "max_num_cells": 2},
    ],
    ids=str,
)
def test_embeddings_of_neighbourhoods(options):
    torch.manual_seed(0)
    config = CellNeighborhoodConfig.from_size(
        "tiny", n_genes=30, n_cell_types=2, gene_ids=CELLS.var_names.tolist(), cell_types=["B cell", "T cell"]
    )
    model = CellNeighborhoodModel(config).eval()

    def call(cells):
        embed_neighborhoods(cells, model, cell_type_key="cell_type", section_key="section", batch_size=5, **options)
        return cells.obsm["X_neighborhood"]

    @settings(max_examples=8)
    @given(parts=whole_sections())
    def check(parts):
        is_settled(call, parts)

    check()
    apart = np.ptp(call(CELLS.copy()), axis=0).max()
    assert apart > 1e-2  # or nothing could differ


def test_cells_of_two_files_get_what_they_get_alone():
    """Concatenation, with genes in another order and cells of another file between them."""
    tokenizer = make_tokenizer("binned", truncation="random")
    model = make_model(tokenizer)
    other = make_adata(10, 30, seed=9)
    other.obs_names = [f"other{i}" for i in range(10)]
    both = anndata.concat([other, CELLS[:, ::-1]], join="outer")
    embed(both, model, tokenizer=tokenizer, pooling="mean")
    alone = CELLS.copy()
    embed(alone, model, tokenizer=tokenizer, pooling="mean")
    np.testing.assert_allclose(both.obsm["X_stformer"][10:], alone.obsm["X_stformer"], atol=1e-4)
    drawn = tokenizer(both[10:])["input_ids"]
    assert drawn == tokenizer(CELLS)["input_ids"] and pd.Series(map(len, drawn)).max() == 9
