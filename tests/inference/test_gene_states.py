"""Embeddings of genes and networks of gene pairs, beside the same sums in plain numpy."""

import copy

import networkx
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from conftest import make_adata
from scipy import sparse

from stformer_hf import GeneBertConfig, GeneBertModel, GeneTokenizer, gene_embeddings, gene_network
from stformer_hf.inference.gene_states import nearest_genes, symmetric

N_CELLS, N_GENES = 24, 16


@pytest.fixture(params=["binned", "rank", "whole_cell"])
def model(request, adata):
    genes = adata.var_names.tolist()
    symbols = {f"SYM{i}": gene for i, gene in enumerate(genes)}
    if request.param == "rank":
        tokenizer = GeneTokenizer(genes, scheme="rank", medians=np.ones(len(genes)), symbols=symbols, max_length=12)
    else:
        whole = request.param == "whole_cell"
        tokenizer = GeneTokenizer(genes, bin_edges=[0.5, 1.5], symbols=symbols, max_length=12, whole_cell=whole)
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    config = GeneBertConfig.from_tokenizer(tokenizer, **sizes, initializer_range=0.5, residual_init="normal")
    model = GeneBertModel(config).eval()
    model.tokenizer = tokenizer
    return model


@pytest.fixture
def adata():
    return make_adata(N_CELLS, N_GENES, seed=1)


def one_by_one(model, adata, **kwargs):
    """Each cell alone: its row, the gene of each token (-1 for others), and the outputs of the model."""
    tokenizer = model.tokenizer
    for row in range(adata.n_obs):
        batch = tokenizer(adata[row], padding=True, return_tensors="pt")
        ids, types = batch["input_ids"][0].numpy(), batch["token_type_ids"][0].numpy()
        names = (
            tokenizer.convert_ids_to_tokens(ids.tolist())
            if tokenizer.scheme == "rank"
            else tokenizer.convert_token_types_to_names(types)
        )
        genes = np.array([tokenizer.genes.index(name) if name in tokenizer.genes else -1 for name in names])
        given = {name: batch[name] for name in batch}
        if "token_type_ids" not in given:
            given["token_type_ids"] = torch.zeros_like(given["input_ids"])
        yield row, genes, given


# ---------------------------------------------------------------------- embeddings


def test_static_embeddings_are_rows_of_the_model(model):
    found = gene_embeddings(model)
    tokenizer = model.tokenizer
    assert found.obs["gene_id"].tolist() == list(tokenizer.genes)
    assert found.obs["symbol"].tolist() == [f"SYM{i}" for i in range(N_GENES)]
    weights = model.state_dict()
    if tokenizer.scheme == "rank":
        table, rows = weights["embeddings.word_embeddings.weight"], tokenizer.convert_tokens_to_ids(tokenizer.genes)
    else:
        table, rows = weights["embeddings.token_type_embeddings.weight"], range(len(weights) and 1, N_GENES + 1)
    assert np.array_equal(found.X, table[list(rows)].numpy())
    assert ("X_cell" in found.obsm) == tokenizer.whole_cell
    if tokenizer.whole_cell:
        assert np.array_equal(found.obsm["X_cell"], weights["cell_embedding.genes.weight"].numpy())
    few = gene_embeddings(model, genes=["SYM5", tokenizer.genes[2]])
    assert np.array_equal(few.X, found.X[[5, 2]])


def test_states_are_means_within_cell_types(model, adata):
    adata.obs["cell_type"] = adata.obs["cell_type"].cat.add_categories("unused")
    adata.obs.loc[adata.obs_names[5], "cell_type"] = None
    states = {}
    for row, genes, batch in one_by_one(model, adata):
        kind = adata.obs["cell_type"].iloc[row]
        if pd.isna(kind):
            continue
        with torch.no_grad():
            hidden = model(**batch, output_hidden_states=True).hidden_states[1][0].numpy()
        for gene, state in zip(genes, hidden, strict=True):
            if gene >= 0:
                states.setdefault((adata.var_names[gene], kind), []).append(state)
    found = gene_embeddings(model, None, adata, "cell_type", hidden_layer=1, min_cells=3, batch_size=5)
    expected = {pair: of for pair, of in states.items() if len(of) >= 3}
    assert len(expected) < len(states)
    pairs = list(zip(found.obs["gene_id"], found.obs["cell_type"], strict=True))
    assert set(pairs) == set(expected) and len(pairs) == len(expected)
    assert found.obs["n_cells"].tolist() == [len(expected[pair]) for pair in pairs]
    np.testing.assert_allclose(found.X, [np.mean(expected[pair], axis=0) for pair in pairs], atol=1e-5)
    over_all = gene_embeddings(model, adata=adata)
    assert "cell_type" not in over_all.obs and over_all.obs_names.is_unique


def test_states_of_more_genes_than_a_byte_can_number():
    adata = make_adata(9, 300)
    tokenizer = GeneTokenizer(adata.var_names.tolist(), bin_edges=[0.5], max_length=12)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
    model = GeneBertModel(GeneBertConfig.from_tokenizer(tokenizer, **sizes)).eval()
    model.tokenizer = tokenizer
    found = gene_embeddings(model, adata=adata, cell_type_key="cell_type")
    kinds = adata.obs["cell_type"]
    tokens = [
        (adata.var_names[i], kinds.iloc[row]) for row, genes, _ in one_by_one(model, adata) for i in genes[genes >= 0]
    ]
    expected = pd.Series(tokens).value_counts().to_dict()
    rows = zip(found.obs["gene_id"], found.obs["cell_type"], strict=True)
    assert dict(zip(rows, found.obs["n_cells"], strict=True)) == expected


def test_nearest_genes_by_their_cosine(model):
    states = gene_embeddings(model)
    found = nearest_genes(states, ["SYM3"], n_neighbors=4)
    unit = states.X / np.linalg.norm(states.X, axis=1, keepdims=True)
    cosine = unit @ unit[3]
    best = [i for i in np.argsort(-cosine) if i != 3][:4]
    assert found["neighbor"].tolist() == [states.obs["gene_id"].iloc[i] for i in best]
    np.testing.assert_allclose(found["cosine"], cosine[best], atol=1e-5)
    with pytest.raises(ValueError, match="0 rows are of the gene 'TP53'"):
        nearest_genes(states, ["TP53"])
    states.X[:] = states.X[0]  # a gene need not be among its nearest
    found = nearest_genes(states, ["SYM3", "SYM9"], n_neighbors=4)
    assert (found["gene"] != found["neighbor"]).all() and found["gene"].value_counts().tolist() == [4, 4]


# ---------------------------------------------------------------------- networks


def test_attention_of_pairs_summed_one_by_one(model, adata):
    chosen = [1, 2, 3, 5, 8, 13]
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    scores = {kind: np.full((6, 6, N_CELLS), np.nan) for kind in ("B cell", "T cell")}
    for row, genes, batch in one_by_one(model, adata):
        with torch.no_grad():
            weights = np.mean(
                [layer[0].numpy().mean(0) for layer in eager(**batch, output_attentions=True).attentions], 0
            )
        for i, target in enumerate(chosen):
            for j, source in enumerate(chosen):
                if i != j and target in genes and source in genes:
                    at, of = np.flatnonzero(genes == target)[0], np.flatnonzero(genes == source)[0]
                    relative = weights[at, of] / weights[at, genes >= 0].mean()
                    scores[adata.obs["cell_type"].iloc[row]][i, j, row] = relative
    names = [adata.var_names[i] for i in chosen]
    network = gene_network(model, adata, groups="cell_type", genes=names, min_cells=2, batch_size=7)
    assert model.config._attn_implementation == "sdpa"
    assert network.genes["gene_id"].tolist() == names
    for kind, values in scores.items():
        n_cells = np.isfinite(values).sum(axis=2)
        assert np.array_equal(network.n_cells[kind], n_cells)
        expected = np.where(n_cells >= 2, np.nansum(values, axis=2) / np.maximum(n_cells, 1), np.nan)
        np.testing.assert_allclose(network.scores[kind], expected, atol=1e-4)


def test_gradients_of_pairs_one_target_at_a_time(model, adata):
    names = adata.var_names[:8].tolist()
    network = gene_network(model, adata, genes=names, method="gradient", n_targets=99, min_cells=1, batch_size=7)
    again = gene_network(model, adata[::-1].copy(), genes=names, method="gradient", n_targets=99, min_cells=1)
    np.testing.assert_allclose(again.scores["all"], network.scores["all"], atol=1e-3)
    # A state that is moved by the input of another gene by finite differences is moved in the score too.
    row, genes, batch = next(entry for entry in one_by_one(model, adata) if np.isin(range(8), entry[1]).sum() > 3)
    target, *sources = [gene for gene in range(8) if gene in genes]
    signs = probe_signs(16)
    alone = gene_network(model, adata[[row]].copy(), genes=names, method="gradient", n_targets=99, min_cells=1)
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    at = np.flatnonzero(genes == target)[0]
    norms = []
    for position in np.flatnonzero(genes >= 0):
        slopes = []
        for dimension in range(16):
            ends = []
            for step in (1e-2, -1e-2):
                moved = embeds.clone()
                moved[0, position, dimension] += step
                with torch.no_grad():
                    ends.append(float(model(inputs_embeds=moved, **batch).last_hidden_state[0, at] @ signs))
            slopes.append((ends[0] - ends[1]) / 2e-2)
        norms.append(0.0 if position == at else np.linalg.norm(slopes))
    expected = dict(zip(genes[genes >= 0], norms / np.mean(norms), strict=True))
    found = alone.scores["all"][target, sources]
    np.testing.assert_allclose(found, [expected[gene] for gene in sources], rtol=0.02, atol=1e-3)


def probe_signs(size):
    from stformer_hf.models.gene_bert.randomness import uniforms

    drawn = uniforms(0, 0, 40, np.zeros(size, np.int64), np.arange(size))
    return torch.from_numpy(np.where(drawn < 0.5, 1.0, -1.0).astype(np.float32))


def test_coexpression_is_the_correlation_of_log_counts(model, adata):
    network = gene_network(model, adata, genes=10, min_cells=1)
    counts = adata.X.toarray()
    n_cells = (counts > 0).sum(axis=0)
    most = np.sort(np.argsort(-n_cells, kind="stable")[:10])
    assert network.genes["gene_id"].tolist() == adata.var_names[most].tolist()
    logs = np.log1p(1e4 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1))
    np.testing.assert_allclose(network.coexpression["all"], np.corrcoef(logs.T)[np.ix_(most, most)], atol=1e-4)


def test_edges_agreement_and_files(model, adata, tmp_path):
    network = gene_network(model, adata, groups="cell_type", min_cells=1)
    assert repr(network) == "GeneNetwork(16 genes, method attention, groups: B cell, T cell)"
    edges = network.edges(5)
    assert edges.groupby("group").size().to_dict() == {"B cell": 5, "T cell": 5}
    scores = network.scores["B cell"]
    best = edges.iloc[0]
    assert best["score"] == np.nanmax(scores)
    at = [network.genes["gene_id"].tolist().index(best[name]) for name in ("target", "source")]
    assert scores[tuple(at)] == best["score"]
    assert best["n_cells"] == network.n_cells["B cell"][tuple(at)]
    assert best["coexpression"] == network.coexpression["B cell"][tuple(at)]
    network.save(tmp_path / "edges.csv", n_edges=5)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "edges.csv"), edges, check_dtype=False, rtol=1e-4)
    network.save(tmp_path / "b.graphml", "B cell", n_edges=5)
    graph = networkx.read_graphml(tmp_path / "b.graphml")
    assert graph.number_of_edges() == 5
    assert graph.edges[best["source"], best["target"]]["score"] == pytest.approx(float(best["score"]), rel=1e-5)
    assert graph.nodes[best["source"]]["symbol"] == best["source_symbol"]
    agreement = network.agreement().set_index("group").loc["B cell"]
    both = symmetric(scores)
    expected = np.abs(network.coexpression["B cell"][np.triu_indices(N_GENES, 1)])
    known = np.isfinite(both) & np.isfinite(expected)
    assert agreement["n_pairs"] == known.sum()
    ranks = [pd.Series(of[known]).rank() for of in (both, expected)]
    assert agreement["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    with pytest.raises(ValueError, match="There is no group None; groups are B cell, T cell"):
        network.graph()
    with pytest.raises(ValueError, match="csv or .graphml"):
        network.save(tmp_path / "edges.txt")
    with pytest.raises(ValueError, match="There is no group 'NK'"):
        network.save(tmp_path / "edges.csv", group="NK")


def test_both_directions_of_a_pair_count_as_one():
    nan = np.nan
    scores = np.array([[9, 1, nan, nan], [4, 9, 2, nan], [3, nan, 9, nan], [nan, nan, 5, 9]], np.float32)
    np.testing.assert_array_equal(symmetric(scores), [2.5, 3, nan, 2, nan, 5])
    assert symmetric(scores[:1, :1]).shape == (0,)


def test_a_model_whose_genes_have_no_effect_on_one_another_has_no_network(model, adata):
    attentions = [layer.attention for layer in model.layers]
    for attention in attentions:
        torch.nn.init.zeros_(attention.out_lin.weight)
    for method in ("attention", "gradient"):
        with pytest.raises(ValueError, match="No gene has an effect .* the outputs of its attention are 0"):
            gene_network(model, adata, genes=4, min_cells=1, method=method)
    torch.nn.init.eye_(attentions[-1].out_lin.weight)
    assert np.nanmax(gene_network(model, adata, genes=4, min_cells=1, method="gradient").scores["all"]) > 0


def test_genes_are_found_by_the_names_of_the_columns_too(model, adata):
    """As by perturb: names that were made unique, `genes=adata.var_names[:9]`."""
    ids = adata.var_names[[5, 2]].tolist()
    adata.var["gene_id"], adata.var_names = adata.var_names, [f"G{i}--1" for i in range(N_GENES)]
    for use in (
        lambda genes: gene_embeddings(model, adata=adata, genes=genes).X,
        lambda genes: gene_network(model, adata, genes=genes, min_cells=1).scores["all"],
    ):
        np.testing.assert_array_equal(use(["G5--1", "G2--1"]), use(ids))


def test_genes_that_most_cells_express_are_counted_by_cell(model, adata):
    """Neither repeated entries of a matrix nor two columns of a gene count twice."""
    ones, twos = np.zeros((2, N_CELLS, N_GENES), np.float32)
    ones[:14, 6:11], twos[:8, :6], twos[:8, 11:] = 1, 1, 1  # counts of 1 in 14 cells, and of 2 in 8
    rows, genes = np.nonzero(np.hstack([ones, twos, twos]))
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=N_CELLS))])
    repeated = sparse.csr_matrix((np.ones(len(rows), np.float32), genes % N_GENES, indptr), (N_CELLS, N_GENES))
    assert not repeated.has_canonical_format
    columns = AnnData(sparse.csr_matrix(np.hstack([ones + twos, twos])), var=pd.concat([adata.var, adata.var]))
    for cells in (AnnData(repeated, var=adata.var), columns):
        found = gene_network(model, cells, genes=5, min_cells=1).genes["gene_id"]
        assert found.tolist() == adata.var_names[6:11].tolist()


def test_what_is_refused(model, adata, caplog):
    with pytest.raises(ValueError, match="6,000 genes in 1 groups has 36,000,000 pairs.*at most 5,000"):
        gene_network(model, adata, genes=6_000)
    with pytest.raises(ValueError, match="at most 3,535"):
        gene_network(model, adata, genes=4_000, groups="cell_type")
    with pytest.raises(ValueError, match="does not know 1 of 2 genes, such as TP53"):
        gene_network(model, adata, genes=["TP53", adata.var_names[0]])
    with pytest.raises(ValueError, match="must be a list, got the string 'SYM1'"):
        gene_network(model, adata, genes="SYM1")
    with pytest.raises(ValueError, match="must be a list, got the string 'SYM1'"):
        gene_embeddings(model, genes="SYM1")
    with pytest.raises(ValueError, match="at least two genes, got 1"):
        gene_network(model, adata, genes=["SYM1", "SYM1"])
    with pytest.raises(ValueError, match="no obs\\['donor'\\]"):
        gene_embeddings(model, adata=adata, cell_type_key="donor")
    with pytest.raises(ValueError, match="needs cells"):
        gene_embeddings(model, cell_type_key="donor")
    with pytest.raises(ValueError, match="hidden_layer 3 does not exist"):
        gene_embeddings(model, adata=adata, hidden_layer=3)
    for numbers in ({"n_targets": 0}, {"min_cells": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            gene_network(model, adata, **numbers)
    assert gene_network(model, adata, genes=np.int64(4), groups="cell_type", min_cells=99).edges().empty
    assert "No pair of genes was scored in 99 cells of B cell, T cell: lower min_cells" in caplog.text
