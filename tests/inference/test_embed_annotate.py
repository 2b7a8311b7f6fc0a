"""embed and annotate against the model on one cell at a time."""

import threading

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData, read_h5ad
from scipy import sparse
from transformers import AutoModel, AutoTokenizer, BertConfig, BertForMaskedLM

from stformer_hf import (
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneBertModel,
    GeneTokenizer,
    annotate,
    embed,
    load_geneformer,
)
from stformer_hf.batches.evaluating import evaluating
from stformer_hf.inference import batches
from stformer_hf.sources.open_source import open_source


@pytest.fixture
def checkpoints(config, tokenizer, tmp_path):
    """A pretrained model, a classifier; tokenizers beside them."""
    paths = {name: tmp_path / name for name in ("mlm", "cls")}
    GeneBertForPhenotypicMLM(config).save_pretrained(paths["mlm"])
    config.id2label = {0: "B cell", 1: "T cell", 2: "other"}
    GeneBertForClassification(config).save_pretrained(paths["cls"])
    for path in paths.values():
        tokenizer.save_pretrained(path)
    return {name: str(path) for name, path in paths.items()}


def one_by_one(path, model_class, adata):
    """Outputs and tokens of each cell alone."""
    model, tokenizer = model_class.from_pretrained(path).eval(), GeneTokenizer.from_pretrained(path)
    with torch.no_grad():
        for i in range(len(adata)):
            tokens = tokenizer(adata[i], return_tensors="pt")
            yield model(**tokens, output_hidden_states=True), tokens


@pytest.mark.parametrize("hidden_layer", [-1, 1, 0])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_embeddings_are_those_of_each_cell_alone(checkpoints, adata, hidden_layer, pooling, batch_size):
    embed(
        adata,
        checkpoints["mlm"],
        hidden_layer=hidden_layer,
        pooling=pooling,
        batch_size=batch_size,
        with_phenotypes=True,
    )
    embedding = adata.obsm["X_stformer"]
    assert embedding.shape == (60, 16) and embedding.dtype == np.float32
    for i, (outputs, tokens) in enumerate(one_by_one(checkpoints["mlm"], GeneBertModel, adata)):
        hidden = outputs.hidden_states[hidden_layer][0]
        if pooling == "cls":
            expected = hidden[0]
        else:
            expected = hidden[tokens["token_type_ids"][0] > 0].mean(0)
        np.testing.assert_allclose(embedding[i], expected, atol=1e-5)
    assert adata.uns["stformer"]["layer"] == hidden_layer
    assert adata.uns["stformer"]["pooling"] == pooling
    assert adata.uns["stformer"]["model"] == checkpoints["mlm"]
    assert adata.uns["stformer"]["version"]


def test_an_embedding_depends_on_the_counts_alone(checkpoints, adata):
    """Whatever obs says of the cells: a label that the model were shown would be found in the embedding."""
    embed(adata, checkpoints["mlm"])
    other = adata.copy()
    other.obs["cell_type"] = other.obs["cell_type"].cat.codes.map({0: "T cell", 1: "B cell"}).astype("category")
    embed(other, checkpoints["mlm"])
    np.testing.assert_array_equal(other.obsm["X_stformer"], adata.obsm["X_stformer"])
    del other.obs["cell_type"]
    embed(other, checkpoints["mlm"])
    np.testing.assert_array_equal(other.obsm["X_stformer"], adata.obsm["X_stformer"])
    embed(adata, checkpoints["mlm"], key_added="shown", with_phenotypes=True)
    assert np.abs(adata.obsm["shown"] - adata.obsm["X_stformer"]).max() > 1e-3


def test_random_truncation_does_not_depend_on_the_row(adata):
    tokenizer = GeneTokenizer(adata.var_names.tolist(), max_length=8, truncation="random")
    model = GeneBertModel(GeneBertConfig.from_tokenizer(tokenizer, size="tiny"))
    part = adata[30:].copy()
    for cells in (adata, part):
        embed(cells, model, tokenizer=tokenizer)
    np.testing.assert_allclose(part.obsm["X_stformer"], adata.obsm["X_stformer"][30:], atol=1e-5)


def modes_of(model) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("fails", [False, True])
def test_a_model_object_is_afterwards_what_it_was(checkpoints, adata, fails):
    tokenizer = GeneTokenizer.from_pretrained(checkpoints["cls"])
    for use, model_class in ((embed, GeneBertModel), (annotate, GeneBertForClassification)):
        model = model_class.from_pretrained(checkpoints["cls"]).train()
        encoder = getattr(model, "gene_bert", model)
        encoder.embeddings.eval()  # a frozen part
        modes, seen, weight = modes_of(model), [], encoder.embeddings.LayerNorm.weight

        def watch(module, inputs, seen=seen, model=model):
            seen.append((any(modes_of(model).values()), model.device))
            if fails:
                raise RuntimeError("no memory is left")

        encoder.layers[0].register_forward_pre_hook(watch)
        if fails:
            with pytest.raises(RuntimeError, match="no memory"):
                use(adata, model, tokenizer=tokenizer, device="cpu")
        else:
            use(adata, model, tokenizer=tokenizer, device="cpu")
        assert {mode for mode, _ in seen} == {False}
        assert modes_of(model) == modes and encoder.embeddings.LayerNorm.weight is weight
        assert not any(parameter.is_inference() for parameter in model.parameters())


def test_a_model_object_comes_back_from_another_device(checkpoints, monkeypatch):
    model, moves = GeneBertModel.from_pretrained(checkpoints["mlm"]), []
    monkeypatch.setattr(model, "to", lambda device: moves.append(str(device)))
    with evaluating(model, "cuda") as used:
        assert used is model and moves == ["cuda"]
    assert moves == ["cuda", "cpu"]
    model.layers[1].to_empty(device="meta")  # its parts are on several devices
    with evaluating(model, "cuda"):
        pass
    assert moves == ["cuda", "cpu"]


def test_blocks_keep_the_order_of_the_cells(checkpoints, adata, monkeypatch):
    embed(adata, checkpoints["mlm"])
    whole = adata.obsm["X_stformer"]
    monkeypatch.setattr("stformer_hf.inference.batches._ROWS_PER_BLOCK", 11)
    embed(adata, checkpoints["mlm"], key_added="X_blocks")
    np.testing.assert_allclose(adata.obsm["X_blocks"], whole, atol=1e-6)


def test_the_next_block_is_tokenized_while_the_model_reads_one(checkpoints, adata, monkeypatch):
    begun, encode = threading.Semaphore(0), GeneTokenizer.encode_cells
    monkeypatch.setattr(batches, "_ROWS_PER_BLOCK", 10)

    def encode_cells(self, block, **options):
        begun.release()
        if block.shape[0] < 10:
            raise ValueError("the last block is short")
        return encode(self, block, **options)

    monkeypatch.setattr(GeneTokenizer, "encode_cells", encode_cells)
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["mlm"])
    found = batches.read_batches(open_source(adata[:25]), tokenizer, 10, desc=None, ahead=True)
    rows = next(found).rows
    assert begun.acquire(timeout=60) and begun.acquire(timeout=60)  # of the second block, too
    assert not begun.acquire(timeout=0.2)  # no third block in memory
    assert sorted([*rows, *next(found).rows]) == list(range(20))
    with pytest.raises(ValueError, match="the last block is short"):  # an error of the thread
        next(found)


def test_a_model_elsewhere_than_on_the_cpu_does_not_wait_for_tokens(checkpoints, adata, monkeypatch):
    asked, read = [], batches.read_batches
    monkeypatch.setattr(batches, "read_batches", lambda *of, ahead, **how: asked.append(ahead) or read(*of, **how))
    embed(adata, checkpoints["mlm"])
    monkeypatch.setattr(GeneBertModel, "device", torch.device("meta"))  # a device that is not the CPU
    monkeypatch.setattr(batches.TokenBatch, "to", lambda batch, device: batch)
    embed(adata, checkpoints["mlm"])
    assert asked == [False, True]


def test_a_file_with_embeddings_is_written_and_read(checkpoints, adata, tmp_path):
    embed(adata, checkpoints["mlm"])
    adata.write_h5ad(tmp_path / "out.h5ad")
    back = read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(back.obsm["X_stformer"], adata.obsm["X_stformer"])
    assert back.uns["stformer"]["pooling"] == "mean"  # nothing has trained [CLS]


def test_labels_are_the_most_probable_classes(checkpoints, adata):
    annotate(adata, checkpoints["cls"], batch_size=9)
    labels, scores = adata.obs["stformer_label"], adata.obs["stformer_score"]
    assert labels.cat.categories.tolist() == ["B cell", "T cell", "other"]
    for i, (outputs, tokens) in enumerate(one_by_one(checkpoints["cls"], GeneBertForClassification, adata)):
        if (tokens["token_type_ids"] > 1).any():
            probabilities = outputs.logits[0].softmax(-1)
            assert labels.iloc[i] == labels.cat.categories[int(probabilities.argmax())]
            assert scores.iloc[i] == pytest.approx(float(probabilities.max()), abs=1e-5)
    assert adata.uns["stformer_annotation"]["model"] == checkpoints["cls"]
    assert adata.uns["stformer_annotation"]["counts_in"] == "X"


def test_a_cell_without_counts_gets_an_embedding_and_no_label(checkpoints, adata, caplog):
    embed(adata, checkpoints["mlm"], pooling="mean")
    assert np.isfinite(adata.obsm["X_stformer"]).all()
    annotate(adata, checkpoints["cls"])
    assert adata.obs["stformer_label"].isna().tolist() == [i == 3 for i in range(60)]
    assert adata.obs["stformer_score"].isna().tolist() == [i == 3 for i in range(60)]
    assert "1 of 60 cells have no counts in genes that the model knows" in caplog.text


def test_genes_in_another_order_or_in_another_column_are_the_same_genes(checkpoints, adata):
    embed(adata, checkpoints["mlm"])
    order = np.random.default_rng(0).permutation(adata.n_vars)
    shuffled = adata[:, order].copy()
    shuffled.var["ensembl_id"] = shuffled.var_names
    shuffled.var_names = [f"symbol{i}" for i in range(adata.n_vars)]
    embed(shuffled, checkpoints["mlm"])
    np.testing.assert_allclose(shuffled.obsm["X_stformer"], adata.obsm["X_stformer"], atol=1e-6)


def test_symbols_serve_where_the_model_knows_symbols(config, adata, tmp_path):
    adata.var["gene_symbol"] = [f"S{i}" for i in range(adata.n_vars)]
    tokenizer = GeneTokenizer(adata.var["gene_symbol"].tolist())
    config.vocab_size, config.type_vocab_size, config.vocabulary_fingerprint = 6, 41, None
    embed(adata, GeneBertModel(config), tokenizer=tokenizer)
    assert adata.obsm["X_stformer"].shape == (60, 16)


def test_bad_input_is_refused_and_nothing_is_written(checkpoints, adata, config):
    before = set(adata.obs), set(adata.obsm), set(adata.uns)
    with pytest.raises(ValueError, match="not a classifier"):
        annotate(adata, checkpoints["mlm"])
    with pytest.raises(ValueError, match='"cls" or "mean"'):
        embed(adata, checkpoints["mlm"], pooling="max")
    with pytest.raises(ValueError, match="hidden_layer 3 does not exist in a model of 2 layers"):
        embed(adata, checkpoints["mlm"], hidden_layer=3)
    with pytest.raises(ValueError, match="needs its tokenizer"):
        embed(adata, GeneBertModel(config))
    with pytest.raises(ValueError, match="does not fit the model"):
        embed(adata, checkpoints["mlm"], tokenizer=GeneTokenizer(["a"]))
    strange = AnnData(np.ones((2, 3), np.float32), var=pd.DataFrame(index=["x", "y", "z"]))
    with pytest.raises(ValueError, match="has 0 of the model's 40 genes"):
        embed(strange, checkpoints["mlm"])
    with pytest.raises(ValueError, match="no cells"):
        embed(adata[:0].copy(), checkpoints["mlm"])
    assert (set(adata.obs), set(adata.obsm), set(adata.uns)) == before


def test_a_model_of_ranks_and_neighbourhoods(adata, tmp_path):
    """Embeddings are those of each cell alone, with the sum of its neighbours beside it."""
    ring = sparse.diags([1.0, 1.0, 1.0], [-1, 1, 5], shape=(60, 60), format="csr")
    adata.obsp["spatial_connectivities"] = ring
    medians = np.random.default_rng(0).uniform(0.5, 2, adata.n_vars)
    tokenizer = GeneTokenizer(adata.var_names.tolist(), scheme="rank", medians=medians, neighborhood=True)
    model = GeneBertModel(GeneBertConfig.from_tokenizer(tokenizer, size="tiny")).eval()
    embed(adata, model, tokenizer=tokenizer, pooling="mean", batch_size=7)
    around = (ring.toarray() > 0) @ adata.X.toarray()
    for i in range(0, 60, 7):
        tokens = tokenizer(adata.X[[i]], neighborhood=around[[i]], return_tensors="pt")
        with torch.no_grad():
            hidden = model(**tokens).last_hidden_state[0]
        genes = tokenizer.get_gene_tokens_mask(tokens["input_ids"][0])
        np.testing.assert_allclose(adata.obsm["X_stformer"][i], hidden[genes].mean(0), atol=1e-5)
    bare = GeneTokenizer(adata.var_names.tolist(), scheme="rank", medians=medians, add_cls=False)
    with pytest.raises(ValueError, match=r"no \[CLS\]: use pooling"):
        embed(adata, GeneBertModel(GeneBertConfig.from_tokenizer(bare, size="tiny")), tokenizer=bare, pooling="cls")


def test_a_stock_bert_of_ranks_is_embedded(store, adata, tmp_path):
    genes = store.gene_ids.tolist()
    dictionary = {"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3, **{gene: i + 4 for i, gene in enumerate(genes)}}
    medians = dict.fromkeys(genes, 1.0)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(dictionary),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    model, tokenizer = load_geneformer(tmp_path, dictionary, medians)
    for pooling in ("cls", "mean"):
        embed(adata, model, tokenizer=tokenizer, pooling=pooling, key_added=pooling)
    tokens = tokenizer(adata[:2])["input_ids"]
    for row, ids in enumerate(tokens):
        with torch.no_grad():
            hidden = model.eval().bert(torch.tensor([ids])).last_hidden_state[0]
        np.testing.assert_allclose(adata.obsm["cls"][row], hidden[0], atol=1e-5)
        np.testing.assert_allclose(adata.obsm["mean"][row], hidden[1:-1].mean(0), atol=1e-5)


def test_a_store_is_read_in_blocks_and_its_results_are_those_of_the_cells(checkpoints, adata, store, monkeypatch):
    from stformer_hf.inference import batches

    embed(adata, checkpoints["mlm"])
    annotate(adata, checkpoints["cls"], top_k=2)
    monkeypatch.setattr(batches, "_ROWS_PER_BLOCK", 7)
    embedded, labelled = embed(store, checkpoints["mlm"]), annotate(store, checkpoints["cls"], top_k=2)
    np.testing.assert_allclose(embedded.obsm["X_stformer"], adata.obsm["X_stformer"], atol=1e-5)
    assert embedded.obs_names.equals(adata.obs_names) and embedded.var_names.equals(adata.var_names)
    assert embedded.X is None and list(embedded.obs) == ["cell_type", "age"]
    found, expected = (of.obs["stformer_label_2"] for of in (labelled, adata))
    pd.testing.assert_series_equal(found, expected, check_index_type=False)
    found = embed(store.select([5, 2]), checkpoints["mlm"])  # some of its cells, in their order
    np.testing.assert_allclose(found.obsm["X_stformer"], adata.obsm["X_stformer"][[5, 2]], atol=1e-5)


def test_a_view_of_a_backed_file_is_refused_before_its_cells_are_read(checkpoints, adata, tmp_path, monkeypatch):
    adata.write_h5ad(tmp_path / "a.h5ad")
    monkeypatch.setattr(batches, "open_source", None)
    for use in (embed, annotate):
        with pytest.raises(ValueError, match="a view of an AnnData on disk"):
            use(read_h5ad(tmp_path / "a.h5ad", backed="r")[:5], checkpoints["cls"])


def test_a_backed_file_gives_the_same_embedding(checkpoints, adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    embed(adata, checkpoints["mlm"])
    backed = read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert embed(backed, checkpoints["mlm"]) is None
    np.testing.assert_allclose(backed.obsm["X_stformer"], adata.obsm["X_stformer"], atol=1e-5)


def test_a_part_of_the_cells_is_read_as_among_all(checkpoints, adata):
    """What each of several processes reads."""
    from stformer_hf.inference.batches import load, read_batches
    from stformer_hf.sources.open_source import open_source

    _, tokenizer = load(checkpoints["mlm"], None, AutoModel, None)
    source, found = open_source(adata), []
    for cells in (range(0), range(23), range(23, 60), range(60, 60)):
        batches = list(read_batches(source, tokenizer, 8, desc="", cells=cells))
        rows = np.concatenate([batch.rows for batch in batches]) if batches else np.empty(0, int)
        assert sorted(rows) == list(cells)
        for batch in batches:
            found += [(row, *genes[genes >= 0]) for row, genes in zip(batch.rows, batch.genes, strict=True)]
    (whole,) = read_batches(source, tokenizer, 60, desc="")
    assert sorted(found) == sorted(
        (row, *genes[genes >= 0]) for row, genes in zip(whole.rows, whole.genes, strict=True)
    )
