"""More genes and phenotypes for a trained model: what it had learnt stays, and training goes on."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    ModernBertForMaskedLM,
)

from stformer_hf import (
    CellStore,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneBertModel,
    GeneTokenizer,
    estimate_gene_medians,
)
from stformer_hf.compat.legacy_weights import load_geneformer
from stformer_hf.models.gene_bert.modeling_gene_bert import GeneBertForTokenClassification
from stformer_hf.training.extension import _draw_rows, extend_vocabulary
from stformer_hf.training.starts.spectral_start import initialise_from_store

NEW_GENES = ["ENSG90000000001", "ENSG90000000000"]


def trained(model: nn.Module) -> nn.Module:
    """Return every weight a value of its own."""
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        nn.init.normal_(weight, 1.0 * name.endswith("orm.weight"), 0.3)
    return model.eval()


def small(tokenizer, **fields) -> GeneBertConfig:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 8, "intermediate_size": 16}
    return GeneBertConfig.from_tokenizer(tokenizer, **{**sizes, **fields})


def id_of_meaning(tokenizer) -> dict[tuple, int]:
    """Ids by what they mean: read off tokens, not off how an extension makes them."""
    special = {("special", token): tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    names = tokenizer.genes if tokenizer.scheme == "rank" else [f"bin_{i}" for i in range(tokenizer.n_bins)]
    ids = {("expression", name): tokenizer.get_vocab()[name] for name in names}
    for category in tokenizer.phenotypes:
        for value in tokenizer.phenotypes[category]:
            alone = copy.copy(tokenizer)
            alone.included_phenotypes = [category]
            counts = np.zeros((1, len(tokenizer.genes)))
            counts[0, 0] = 1
            around = {"neighborhood": counts} if tokenizer.neighborhood else {}
            found = alone(counts, obs={category: [value]}, **around)["input_ids"][0]
            ids["phenotype", category, value] = found[int(tokenizer.add_cls)]
    return {**special, **ids}


def type_of_meaning(tokenizer) -> dict[tuple, int]:
    names = tokenizer.convert_token_types_to_names(range(tokenizer.type_vocab_size))
    n = tokenizer.gene_token_type_offset
    return {("category" if i < n else "gene", name): i for i, name in enumerate(names)}


def check_old_rows(before: dict[str, torch.Tensor], model, old: GeneTokenizer, new: GeneTokenizer) -> None:
    """See that each old meaning has its row, bit for bit, wherever it is now; that no two meanings share one."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    old_ids, new_ids = id_of_meaning(old), id_of_meaning(new)
    assert old_ids.items() <= new_ids.items()
    assert len(set(new_ids.values())) == len(new_ids)
    old_types, new_types = type_of_meaning(old), type_of_meaning(new)
    assert old_types.keys() <= new_types.keys()
    assert sorted(new_types.values()) == list(range(new.type_vocab_size))
    for name, weight in before.items():
        if name.endswith("word_embeddings.weight") or ".decoder." in name or name == "cls.predictions.bias":
            assert len(after[name]) == len(new)
            pairs = [(old_ids[key], new_ids[key]) for key in old_ids]
        elif name.endswith("token_type_embeddings.weight") and "token_type_ids" in old.model_input_names:
            assert len(after[name]) == new.type_vocab_size
            pairs = [(old_types[key], new_types[key]) for key in old_types]
        else:
            assert torch.equal(after[name], weight), name
            continue
        for then, now in pairs:
            assert torch.equal(after[name][now], weight[then]), (name, then, now)
        assert torch.isfinite(after[name]).all()


def batch_of(tokenizer, cells, **kwargs) -> dict[str, torch.Tensor]:
    tokens = tokenizer(cells, padding=True, return_tensors="pt", **kwargs)
    return {name: tokens[name] for name in tokenizer.model_input_names}


def check_old_cells(old_model, model, old: GeneTokenizer, new: GeneTokenizer, cells, **kwargs) -> None:
    """See that cells of old genes and values get the tokens and outputs that they had."""
    old_batch, batch = batch_of(old, cells, **kwargs), batch_of(new, cells, **kwargs)
    assert torch.equal(batch["input_ids"], old_batch["input_ids"])
    for i, j in ((0, 0), (1, 2)):  # what the types of some tokens mean
        if "token_type_ids" in batch:
            meant = old.convert_token_types_to_names([old_batch["token_type_ids"][i, j]])
            assert new.convert_token_types_to_names([batch["token_type_ids"][i, j]]) == meant
    with torch.no_grad():
        expected, found = old_model.eval()(**old_batch)[0], model.eval()(**batch)[0]
    assert expected.std() > 0.01
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, atol=1e-6, rtol=0)


def extend_a_copy(model, tokenizer, *args, **kwargs):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    original = copy.deepcopy(model)
    vocabulary = copy.deepcopy(tokenizer.saved_settings())
    same, extended = extend_vocabulary(model, tokenizer, *args, **kwargs)
    assert same is model
    assert tokenizer.saved_settings() == vocabulary
    check_old_rows(before, model, tokenizer, extended)
    if model.config.model_type == "gene_bert":
        assert model.config.vocabulary_fingerprint == extended.fingerprint != tokenizer.fingerprint
        assert model.config.type_vocab_size == extended.type_vocab_size
        assert model.config.token_classes == [*extended.phenotypes, "genes"]
    assert model.config.vocab_size == len(extended)
    return original, extended


# ---------------------------------------------------------------------- the binned scheme


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize(
    "model_class",
    [GeneBertForPhenotypicMLM, GeneBertForClassification, GeneBertForTokenClassification, GeneBertModel],
)
@pytest.mark.parametrize(
    ("genes", "phenotypes"),
    [
        (NEW_GENES, {}),
        ([], {"cell_type": ["NK cell"]}),
        ([], {"age group": ["old", "young"]}),  # sorted before the old category
        (NEW_GENES, {"tissue": ["lung"], "cell_type": ["B cell", "NK cell"], "age group": ["old"]}),
    ],
)
def test_old_rows_and_outputs_stay(tokenizer, adata, model_class, tie, genes, phenotypes):
    model = trained(model_class(small(tokenizer, tie_word_embeddings=tie)))
    original, extended = extend_a_copy(model, tokenizer, genes, phenotypes)
    check_old_cells(original, model, tokenizer, extended, adata[:8])
    assert extended.genes == tokenizer.genes + genes
    assert extended.included_phenotypes == ["cell_type", *(name for name in phenotypes if name != "cell_type")]
    if model_class is GeneBertForPhenotypicMLM:
        assert (model.mlm_head.decoder.weight is model.get_input_embeddings().weight) == tie


def test_new_genes_and_values_become_tokens(tokenizer, adata):
    model = trained(GeneBertForPhenotypicMLM(small(tokenizer)))
    _, extended = extend_vocabulary(model, tokenizer, NEW_GENES, {"tissue": ["lung"], "cell_type": ["NK cell"]})
    obs = {"cell_type": ["NK cell"], "tissue": ["lung"]}
    assert extended.gene_weights[:-2].tolist() == tokenizer.gene_weights.tolist()
    assert set(extended.gene_weights[-2:]) == {tokenizer.gene_weights.mean()}
    extended.min_coverage = 0.0
    tokens = extended(np.array([[2, 1]]), genes=NEW_GENES, obs=obs)
    assert len(tokenizer) == 10  # 4 special tokens, 2 values, 4 bins
    assert tokens["input_ids"] == [[0, 10, 11, 8, 7, 1]]  # edges 0.5, 1.5, 3.5
    names = extended.convert_token_types_to_names(tokens["token_type_ids"][0])
    assert names == [None, "cell_type", "tissue", *NEW_GENES, None]
    assert extended.get_phenotypic_tokens_mask(tokens["input_ids"][0]) == [0, 1, 1, 0, 0, 0]
    assert extended.get_gene_tokens_mask(tokens["input_ids"][0]) == [0, 0, 0, 1, 1, 0]
    with torch.no_grad():
        inputs = {name: torch.tensor(tokens[name]) for name in ("input_ids", "token_type_ids")}
        assert model(**inputs).logits.shape == (1, 6, 12)


COVERAGE = ("min_coverage", "warn_coverage")


def test_settings_of_the_tokenizer_stay(store):
    tokenizer = GeneTokenizer.from_store(
        store,
        phenotypes=["cell_type"],
        normalize="log1p_cp10k",
        max_length=17,
        truncation="random",
        seed=5,
        min_coverage=0.25,
        warn_coverage=0.75,
        padding_side="left",
        included_phenotypes=[],
    )
    _, extended = extend_vocabulary(GeneBertModel(small(tokenizer)), tokenizer, NEW_GENES, {"tissue": ["lung"]})
    for name in ("normalize", "max_length", "truncation", "seed", "padding_side", "bin_edges", *COVERAGE):
        assert getattr(extended, name) == getattr(tokenizer, name), name
    assert extended.included_phenotypes == ["tissue"]


def test_values_beside_bins(store, adata):
    tokenizer = GeneTokenizer.from_store(store, phenotypes=["cell_type"], values=True)
    model = trained(GeneBertForPhenotypicMLM(small(tokenizer)))
    assert model.config.value_embedding
    original, extended = extend_a_copy(model, tokenizer, NEW_GENES, {"age": ["old"]})
    assert extended.values and extended.model_input_names == tokenizer.model_input_names
    check_old_cells(original, model, tokenizer, extended, adata[:8])


def test_losses_are_counted_to_the_classes_that_they_are_of(tokenizer, adata):
    """The new category comes first, so that the old one's tokens, and genes, have other types."""
    model = trained(GeneBertForPhenotypicMLM(small(tokenizer, loss_weights={"cell_type": 3.0, "genes": 0.5})))
    original, extended = extend_a_copy(model, tokenizer, phenotypes={"age group": ["old", "young"]})
    results = []
    for one, its_tokenizer in ((original, tokenizer), (model, extended)):
        batch = batch_of(its_tokenizer, adata[:8])
        labels = torch.where(batch["token_type_ids"] > 0, batch["input_ids"], -100)
        with torch.no_grad():
            statistics = one.eval()(**batch, labels=labels).class_statistics
        results.append(dict(zip(one.config.token_classes, statistics[:, 2].tolist(), strict=True)))
    assert results[0]["cell_type"] == 8 and results[0]["genes"] > 8
    assert results[1] == {"age group": 0, **results[0]}


def test_a_saved_model_is_extended_saved_loaded_and_extended_again(tokenizer, adata, tmp_path):
    model = trained(GeneBertForPhenotypicMLM(small(tokenizer)))
    first = model.get_input_embeddings().weight.detach().clone()
    for step, (genes, phenotypes) in enumerate([(NEW_GENES[:1], {"tissue": ["lung"]}), (NEW_GENES, {"age": ["old"]})]):
        model.save_pretrained(tmp_path / str(step))
        tokenizer.save_pretrained(tmp_path / str(step))
        model = AutoModelForMaskedLM.from_pretrained(tmp_path / str(step))
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / str(step))
        original, extended = extend_a_copy(model, tokenizer, genes, phenotypes)
        check_old_cells(original, model, tokenizer, extended, adata[:8])
        tokenizer = extended
    model.save_pretrained(tmp_path / "end")
    tokenizer.save_pretrained(tmp_path / "end")
    back = AutoTokenizer.from_pretrained(tmp_path / "end")
    assert back.fingerprint == tokenizer.fingerprint == model.config.vocabulary_fingerprint
    assert back.genes[-2:] == NEW_GENES and list(back.phenotypes) == ["age", "cell_type", "tissue"]
    assert torch.equal(model.get_input_embeddings().weight[: len(first)], first)
    loaded = AutoModel.from_pretrained(tmp_path / "end").eval()
    with torch.no_grad():
        batch = batch_of(back, adata[:8])
        assert torch.equal(loaded(**batch).last_hidden_state, model.gene_bert(**batch).last_hidden_state)


def test_training_goes_on(tokenizer, adata):
    model = GeneBertForPhenotypicMLM(small(tokenizer))
    _, extended = extend_vocabulary(model, tokenizer, NEW_GENES, {"tissue": ["lung", "liver"]})
    counts = np.concatenate([adata.X.toarray()[:8], np.full((8, 2), 2)], axis=1)
    obs = {"cell_type": adata.obs["cell_type"].iloc[:8], "tissue": ["lung", "liver"] * 4}
    batch = batch_of(extended, counts, obs=obs)
    labels = torch.where(batch["attention_mask"] == 1, batch["input_ids"], -100)
    new_types = [extended.type_vocab_size - 1, extended.convert_token_types_to_names(range(4)).index("tissue")]
    types = model.gene_bert.embeddings.token_type_embeddings
    before = types.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss = model.train()(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert (types.weight[new_types] != before[new_types]).all()
    assert model.mlm_head.decoder.weight is model.get_input_embeddings().weight


def test_a_value_of_two_categories_keeps_the_id_of_its_own():
    """The new category comes first, so that the plain name of the token is its value's now."""
    old = GeneTokenizer(["a", "b"], phenotypes={"tissue": ["lung", "bone marrow"]})
    model = trained(GeneBertForPhenotypicMLM(small(old)))
    _, new = extend_a_copy(model, old, phenotypes={"organ": ["lung", "bone_marrow"]})
    assert old.convert_ids_to_tokens([4, 5]) == ["[lung]", "[bone_marrow]"]
    assert new.convert_ids_to_tokens([4, 5]) == ["[tissue=lung]", "[tissue=bone_marrow]"]
    assert new.convert_ids_to_tokens([8, 9]) == ["[lung]", "[bone_marrow]"]
    assert new.included_phenotypes == ["tissue", "organ"]
    counts = np.array([[1, 1]])
    assert new(counts, obs={"tissue": ["lung"], "organ": ["lung"]})["input_ids"] == [[0, 4, 8, 7, 7, 1]]


def test_a_tokenizer_of_perturbgene():
    vocabulary = {"tissue": ["[lung]", "[bone_marrow]"], "cell_type": ["[T_cell]", "[B_cell]"]}
    old = GeneTokenizer.from_perturbgene(vocabulary, [0.1, 2], ["a", "b", "c"], truncation="head")
    model = trained(GeneBertForPhenotypicMLM(small(old, tie_word_embeddings=False)))
    # As the data spell them: known, and passed over.
    more = {"tissue": ["bone marrow", "liver"], "cell_type": ["B cell"], "sex": ["f", "m"]}
    original, new = extend_a_copy(model, old, ["d", "b"], more)
    assert new.genes == ["a", "b", "c", "d"]
    assert new.phenotypes == {
        "cell_type": ["T_cell", "B_cell"],
        "sex": ["f", "m"],
        "tissue": ["lung", "bone_marrow", "liver"],
    }
    assert list(new.get_vocab())[: len(old)] == list(old.get_vocab())
    assert list(new.get_vocab())[len(old) :] == ["[f]", "[m]", "[liver]"]
    obs = pd.DataFrame({"tissue": ["bone marrow", "lung"], "cell_type": ["B cell", "T cell"]})
    counts = np.array([[1, 0, 5], [3, 1, 1]])
    check_old_cells(original, model, old, new, counts, genes=["a", "b", "c"], obs=obs)


def test_edges_a_gene():
    edges = {"a": [0.5, 2], "b": [1]}
    old = GeneTokenizer(["a", "b"], bin_edges=edges)
    model = trained(GeneBertForPhenotypicMLM(small(old)))
    for given_edges, expected in (({"c": [3], "d": [4, 5]}, [[3], [4, 5]]), ([3, 4], [[3, 4], [3, 4]])):
        _, new = extend_vocabulary(copy.deepcopy(model), old, ["c", "d"], bin_edges=given_edges)
        assert new.bin_edges == {**edges, **dict(zip(["c", "d"], expected, strict=True))}
        assert new.n_bins == 3 and len(new) == len(old)
    with pytest.raises(ValueError, match="bin_edges per gene: pass"):
        extend_vocabulary(model, old, ["c"])
    with pytest.raises(ValueError, match="no edges for 1 genes, such as d"):
        extend_vocabulary(model, old, ["c", "d"], bin_edges={"c": [1]})
    with pytest.raises(ValueError, match="has 3 bin_edges, but the model has bins for at most 2"):
        extend_vocabulary(model, old, ["c"], bin_edges=[1, 2, 3])
    assert model.config.type_vocab_size == old.type_vocab_size


# ---------------------------------------------------------------------- the rank scheme


@pytest.mark.parametrize("neighborhood", [False, True])
@pytest.mark.parametrize("tie", [True, False])
def test_ranks(store, adata, tie, neighborhood):
    medians = estimate_gene_medians(store)
    old = GeneTokenizer.from_store(
        store, "rank", medians=medians, phenotypes=["cell_type"], neighborhood=neighborhood, max_length=64
    )
    model = trained(GeneBertForPhenotypicMLM(small(old, tie_word_embeddings=tie)))
    original, new = extend_a_copy(
        model, old, [*old.genes[:3], *NEW_GENES], {"age": ["old"]}, medians=dict.fromkeys(NEW_GENES, 0.5)
    )
    cells = {"genes": adata.var_names, "obs": adata.obs}
    if neighborhood:
        cells["neighborhood"] = adata.X
    check_old_cells(original, model, old, new, adata.X, **cells)
    assert new.genes == old.genes + NEW_GENES
    assert new.medians[:-2].tolist() == old.medians.tolist() and new.medians[-2:].tolist() == [0.5, 0.5]
    assert new.convert_tokens_to_ids(NEW_GENES) == [len(old), len(old) + 1]
    # A new gene that is counted a lot comes first, whatever its id.
    new.min_coverage, counts = 0.0, np.array([[1, 50, 2]])
    extra = {"neighborhood": counts} if neighborhood else {}
    ids = new(counts, genes=[old.genes[0], NEW_GENES[1], old.genes[1]], **extra)["input_ids"][0]
    assert ids[1] == len(old) + 1


def test_medians_come_as_statistics_and_as_a_sequence(store, adata, tmp_path):
    medians = estimate_gene_medians(store)
    old = GeneTokenizer.from_store(store, "rank", medians=medians)
    counts = np.random.default_rng(0).poisson(2, (50, 45))
    genes = [*adata.var_names[:35], *(f"ENSG9{i:010d}" for i in range(10))]
    more = AnnData(sparse.csr_matrix(counts.astype(np.float32)), var=pd.DataFrame(index=genes))
    statistics = estimate_gene_medians(CellStore.build(tmp_path / "more", more))
    model = GeneBertForPhenotypicMLM(small(old))
    wanted = [statistics.medians[gene] for gene in genes[35:]]
    assert all(statistics.medians[gene] != medians.medians[gene] for gene in genes[:5])
    values = [statistics.medians[gene] for gene in genes]
    for given_medians in (statistics, statistics.medians, values):
        _, new = extend_vocabulary(copy.deepcopy(model), old, genes, medians=given_medians)
        assert new.medians.tolist() == old.medians.tolist() + wanted  # old genes keep theirs
    with pytest.raises(ValueError, match="44 medians for 45 genes"):
        extend_vocabulary(model, old, genes, medians=values[1:])
    other = estimate_gene_medians(store, target_sum=500)
    with pytest.raises(ValueError, match="target_sum 500, and those of the tokenizer with 10000"):
        extend_vocabulary(model, old, genes, medians=other)
    with pytest.raises(ValueError, match="None of the new genes has a median"):
        extend_vocabulary(model, old, genes, medians=medians)
    with pytest.raises(ValueError, match="needs medians"):
        extend_vocabulary(model, old, genes)
    with pytest.raises(ValueError, match='bin_edges are settings of the other scheme; this tokenizer is "rank"'):
        extend_vocabulary(model, old, genes, medians=statistics, bin_edges=[1])
    assert model.config.vocab_size == len(old)


def test_a_model_of_geneformer(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=5, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertForMaskedLM(config).save_pretrained(tmp_path / "m")
    dictionary = {"<pad>": 0, "<mask>": 1, "ENSG1": 2, "ENSG2": 3, "ENSG3": 4}
    model, old = load_geneformer(tmp_path / "m", dictionary, {"ENSG1": 1.0, "ENSG2": 0.5, "ENSG3": 2.0})
    trained(model)
    more = {"tissue": ["lung", "liver"]}
    original, new = extend_a_copy(model, old, ["ENSG4"], more, medians={"ENSG4": 1.0})
    assert new.get_vocab() == {**dictionary, "ENSG4": 5, "[lung]": 6, "[liver]": 7}
    assert new.model_input_names == old.model_input_names == ["input_ids", "attention_mask"]
    counts = np.array([[3, 1, 2], [0, 1, 4]])
    check_old_cells(original, model, old, new, counts, genes=["ENSG1", "ENSG2", "ENSG3"])
    model.save_pretrained(tmp_path / "new")
    new.save_pretrained(tmp_path / "new")
    back, tokenizer = (
        AutoModelForMaskedLM.from_pretrained(tmp_path / "new"),
        AutoTokenizer.from_pretrained(tmp_path / "new"),
    )
    batch = batch_of(tokenizer, np.array([[3, 1, 2, 9]]), obs={"tissue": ["liver"]})
    assert batch["input_ids"].tolist() == [[7, 5, 2, 3, 4]]
    with torch.no_grad():
        assert torch.equal(back.eval()(**batch).logits, model.eval()(**batch).logits)
        assert model(**batch).logits.shape == (1, 5, 8)
    model(**batch, labels=batch["input_ids"]).loss.backward()
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
    assert model.cls.predictions.bias is model.cls.predictions.decoder.bias


def stock(model_class, tokenizer, **fields):
    config = model_class.config_class(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=tokenizer.pad_token_id,
        **{"num_hidden_layers": 1, **fields},
    )
    return trained(model_class(config))


def test_a_stock_model_that_reads_token_types(store, adata):
    old = GeneTokenizer.from_store(
        store, "rank", medians=estimate_gene_medians(store), phenotypes=["cell_type"], max_length=64
    )
    model = stock(BertForMaskedLM, old, type_vocab_size=old.type_vocab_size)
    original, new = extend_a_copy(
        model, old, NEW_GENES, {"age": ["old", "young"]}, medians=dict.fromkeys(NEW_GENES, 0.5)
    )
    assert model.config.type_vocab_size == new.type_vocab_size == old.type_vocab_size + 1
    check_old_cells(original, model, old, new, adata[:8])
    with pytest.raises(ValueError, match="does not fit the model: .* 3 types .*, where the model has .* 2 and"):
        extend_vocabulary(stock(BertForMaskedLM, old, type_vocab_size=2), old, ["x"])


@pytest.mark.parametrize("with_bias", [True, False])
def test_a_stock_model_without_token_types(store, adata, with_bias):
    old = GeneTokenizer.from_store(store, "rank", medians=estimate_gene_medians(store), max_length=64)
    # Two layers: transformers 5.15 refuses a configuration without local attention, which the first layer lacks.
    fields = {"num_hidden_layers": 2, "eos_token_id": old.eos_token_id}
    model = stock(ModernBertForMaskedLM, old, decoder_bias=with_bias, **fields)
    original = copy.deepcopy(model)
    _, new = extend_vocabulary(model, old, NEW_GENES, {"age": ["old"]}, medians=dict.fromkeys(NEW_GENES, 0.5))
    assert model.config.vocab_size == len(new) == len(old) + 3
    tokens = new(adata[:8], padding=True, return_tensors="pt")
    batch = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected, logits = original(**batch).logits, model(**batch).logits
    torch.testing.assert_close(logits[..., : len(old)], expected, atol=1e-6, rtol=0)


# ---------------------------------------------------------------------- any vocabulary

names = st.text("abc_= ", min_size=1, max_size=3)
categories = st.dictionaries(
    names, st.lists(names, max_size=3, unique_by=lambda v: v.replace(" ", "_").strip()), max_size=3
)
gene_lists = st.lists(st.text("gh.1", min_size=1, max_size=3), min_size=1, max_size=5, unique=True)


@given(
    scheme=st.sampled_from(["binned", "rank"]),
    genes=gene_lists,
    more_genes=gene_lists,
    phenotypes=categories,
    more=categories,
)
def test_any_vocabulary_keeps_its_meanings(scheme, genes, more_genes, phenotypes, more):
    extra = {"medians": dict.fromkeys([*genes, *more_genes], 1.0)} if scheme == "rank" else {}
    try:
        old = GeneTokenizer(genes, scheme=scheme, phenotypes=phenotypes, **extra)
    except ValueError:  # values that become one token
        return
    model = trained(GeneBertForPhenotypicMLM(small(old, hidden_size=4, num_hidden_layers=0)))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    try:
        same, new = extend_vocabulary(model, old, more_genes, more, **extra)
    except ValueError as error:
        assert "become" in str(error)
        assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())
        return
    check_old_rows(before, same, old, new)
    assert set(genes) | set(more_genes) == set(new.genes)
    for category, values in more.items():
        spelt = {value.replace(" ", "_").strip() for value in new.phenotypes[category]}
        assert {value.replace(" ", "_").strip() for value in values} <= spelt
    again = extend_vocabulary(same, new, more_genes, more, **extra)
    assert again == (same, new) and again[1] is new


# ---------------------------------------------------------------------- new rows


def test_new_rows_have_the_mean_and_covariance_of_their_kind():
    torch.manual_seed(0)
    mixing = torch.tensor([[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 0.0, 0.0]])  # flat in one dimension
    like = torch.randn(500, 3) @ mixing.T + torch.tensor([5.0, 0.0, -1.0])
    weight = torch.full((20_010, 3), 7.0)
    new = torch.arange(5, 20_005)
    _draw_rows(weight, new, like, 0.02)
    assert (weight[:5] == 7).all() and (weight[-5:] == 7).all()
    drawn = weight[new].double().numpy()
    mean, covariance = like.double().mean(0).numpy(), np.cov(like.double().numpy().T)
    # Five standard errors of each: of a mean sqrt(c_ii / n), of a covariance sqrt((c_ii c_jj + c_ij^2) / n).
    variance = np.diag(covariance)
    assert (abs(drawn.mean(0) - mean) <= 5 * np.sqrt(variance / len(new)) + 1e-6).all()
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / len(new))
    assert (abs(np.cov(drawn.T) - covariance) <= 5 * error + 1e-6).all()
    for n_old in (0, 1):
        _draw_rows(weight, new, like[:n_old], 0.02)
        drawn = weight[new]
        assert drawn.mean().abs() < 5 * 0.02 / drawn.numel() ** 0.5
        assert drawn.std().item() == pytest.approx(0.02, rel=5 / (2 * drawn.numel()) ** 0.5)


def test_new_rows_are_like_their_kind():
    """Genes, categories and values lie far apart in this model, and special tokens elsewhere."""
    old = GeneTokenizer.from_perturbgene({"a": ["[x]", "[y]"], "b": ["[z]"]}, [1], [f"g{i}" for i in range(20)])
    model = trained(GeneBertForPhenotypicMLM(small(old, tie_word_embeddings=False)))
    with torch.no_grad():
        types = model.gene_bert.embeddings.token_type_embeddings.weight
        types[:1], types[1:3], types[3:] = -100.0, types[1:3] + 10, types[3:] + 20
        for weight in (model.get_input_embeddings().weight, model.mlm_head.decoder.weight):
            weight[:4], weight[7:], weight[4:7] = -100.0, 100.0, weight[4:7] + 30
        model.mlm_head.decoder.bias[:] = torch.tensor([-9.0] * 4 + [1.0, 2.0, 6.0] + [-9.0] * 2)
    genes = [f"h{i}" for i in range(5)]
    _, new = extend_vocabulary(model, old, genes, {"c": ["v", "w"]})
    types = model.gene_bert.embeddings.token_type_embeddings.weight
    assert (types[new.gene_token_type_offset :][-5:] - 20).abs().max() < 3
    assert (types[3] - 10).abs().max() < 4
    for weight in (model.get_input_embeddings().weight, model.mlm_head.decoder.weight):
        assert (weight[9:] - 30).abs().max() < 4
    assert model.mlm_head.decoder.bias[9:].tolist() == [3.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_and_frozen_embeddings_stay(tokenizer, dtype):
    model = trained(GeneBertForPhenotypicMLM(small(tokenizer))).to(dtype)
    model.gene_bert.embeddings.requires_grad_(False)
    extend_a_copy(model, tokenizer, NEW_GENES, {"tissue": ["lung"]})
    for name, weight in model.named_parameters():
        assert weight.dtype == dtype
        assert weight.requires_grad == (".embeddings." not in name), name


def test_the_same_seed_gives_the_same_rows(tokenizer):
    model = trained(GeneBertForPhenotypicMLM(small(tokenizer)))
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        extended, _ = extend_vocabulary(copy.deepcopy(model), tokenizer, NEW_GENES, {"tissue": ["lung"]})
        results.append(
            torch.cat(
                [
                    extended.get_input_embeddings().weight[-1:],
                    extended.gene_bert.embeddings.token_type_embeddings.weight[-2:],
                ]
            )
        )
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


# ---------------------------------------------------------------------- symbols, what is known, errors


def test_symbols_of_new_genes_are_added_and_old_ones_stay():
    old = GeneTokenizer(["E1", "E2"], symbols={"TP53": "E1", "MYC": "E2"})
    model = GeneBertModel(small(old))
    _, new = extend_vocabulary(model, old, ["E3", "E4"], symbols={"TP53": "E3", "KRAS": "E4", "OTHER": "E9"})
    assert new.symbols == {"TP53": "E1", "MYC": "E2", "KRAS": "E4"}
    assert new(np.array([[1, 1]]), genes=["KRAS", "TP53"])["token_type_ids"] == [[0, 1, 4, 0]]


def test_what_is_known_is_passed_over():
    old = GeneTokenizer(
        ["ENSG00000000001", "ENSG00000000002"], symbols={"MYC": "ENSG00000000002"}, phenotypes={"t": ["a b"]}
    )
    model = trained(GeneBertModel(small(old)))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    same, tokenizer = extend_vocabulary(model, old, ["ENSG00000000001.7", "MYC"], {"t": ["a_b"]})
    assert tokenizer is old and same is model
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())


def test_bad_input_raises_and_changes_nothing(tokenizer):
    model = trained(GeneBertForPhenotypicMLM(small(tokenizer)))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for arguments, words in (
        ({}, "nothing to add"),
        ({"genes": "ENSG1"}, "genes must be a list of names, got 'ENSG1'"),
        ({"phenotypes": {"tissue": "lung"}}, r"phenotypes\['tissue'\] must be a list of names, got 'lung'"),
        ({"genes": ["x", "x"]}, "are repeated"),
        (
            {"genes": ["x"], "medians": {"x": 1}},
            'medians are settings of the other scheme; this tokenizer is "binned"',
        ),
        ({"genes": ["x"], "bin_edges": [1]}, "the same bin_edges for all genes"),
        ({"phenotypes": {"tissue": ["a b", "a_b"]}}, r"both become \[a_b\]"),
    ):
        with pytest.raises(ValueError, match=words):
            extend_vocabulary(model, tokenizer, **arguments)
    with pytest.raises(TypeError, match="Expected a transformers model, got Linear"):
        extend_vocabulary(nn.Linear(1, 1), tokenizer, ["x"])
    with pytest.raises(ValueError, match="does not fit the model: 9 ids and 42 types"):
        extend_vocabulary(model, GeneTokenizer(tokenizer.genes, bin_edges=[1, 2], phenotypes={"t": ["a", "b"]}), ["x"])
    other = GeneTokenizer(tokenizer.genes, bin_edges=[1, 2, 3], phenotypes={"t": ["a", "b"]})
    with pytest.raises(ValueError, match="same number of ids and types, but other"):
        extend_vocabulary(model, other, ["x"])
    added = copy.deepcopy(tokenizer)
    added.add_tokens(["more"])
    model.resize_token_embeddings(len(added))
    model.config.vocabulary_fingerprint = None
    with pytest.raises(ValueError, match="that are not in its vocabulary: more"):
        extend_vocabulary(model, added, ["x"])
    model.resize_token_embeddings(len(tokenizer))
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in before.items())


# ---------------------------------------------------------------------- whole cells


@pytest.mark.parametrize("scheme", ["binned", "rank"])
@pytest.mark.parametrize("model_class", [GeneBertModel, GeneBertForPhenotypicMLM, GeneBertForClassification])
def test_whole_cell_models_keep_their_numbers_and_new_genes_add_nothing(store, adata, tmp_path, scheme, model_class):
    medians = estimate_gene_medians(store)
    settings = {"bin_edges": [0.5, 1.5]} if scheme == "binned" else {"medians": medians}
    tokenizer = GeneTokenizer.from_store(store, scheme, phenotypes=["cell_type"], whole_cell=True, **settings)
    wide = {"wide_head": True} if model_class is GeneBertForClassification else {}
    model = trained(model_class(small(tokenizer, **wide)))
    initialise_from_store(model, tokenizer, store, n_components=3)
    original = copy.deepcopy(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    n_old = len(tokenizer.genes)
    more = {"medians": dict.fromkeys(NEW_GENES, 1.0)} if scheme == "rank" else {}
    _, extended = extend_vocabulary(model, tokenizer, NEW_GENES, {"age group": ["old"]}, **more)
    assert (extended.whole_cell, model.config.num_genes) == (True, n_old + 2)
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name in (name for name in before if "cell_embedding" in name or "wide_head" in name):
        axis = -1 if "statistics" in name else 0
        if before[name].dim() == 0 or name.endswith("bias"):
            assert torch.equal(after[name], before[name]), name
            continue
        assert after[name].shape[axis] == n_old + 2
        assert torch.equal(after[name].narrow(axis, 0, n_old), before[name]), name
        assert not after[name].narrow(axis, n_old, 2).any(), name
    # Old cells, and old cells that express the new genes too, whose tokens are cut off.
    counts = adata[:8].X.toarray().astype(int)
    both = np.hstack([counts, np.full((8, 2), 7)])
    old_batch = batch_of(tokenizer, counts, genes=tokenizer.genes)
    batch = batch_of(extended, counts, genes=tokenizer.genes)
    batch["measured_genes"] = torch.tensor(np.tile(np.arange(n_old + 2) < n_old, (8, 1)))
    with_new = {
        **batch,
        **{n: batch_of(extended, both, genes=extended.genes)[n] for n in ("cell_genes", "cell_counts")},
    }
    with_new.pop("measured_genes")
    # A norm in the MLM head magnifies what rounding leaves of a sum over more genes: the states are compared there.
    part = (lambda of: of.base_model) if model_class is GeneBertForPhenotypicMLM else (lambda of: of)
    with torch.no_grad():
        expected = part(original)(**old_batch)[0]
        assert expected.std() > 0.01
        for cells in (batch, with_new):
            torch.testing.assert_close(part(model)(**cells)[0], expected, atol=1e-5, rtol=0)
        cells = [
            m.base_model.read_cells(b["cell_genes"], b["cell_counts"])
            for m, b in ((original, old_batch), (model, with_new))
        ]
        assert torch.equal(*(of.depth for of in cells))
    # Saved, loaded, begun again with cells that have the new genes, trained on.
    model.save_pretrained(tmp_path)
    extended.save_pretrained(tmp_path)
    again, tokens = model_class.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.state_dict().items())
    rng = np.random.default_rng(0)
    wider = AnnData(
        sparse.csr_matrix(rng.poisson(1.0, (60, n_old + 2)).astype(np.float32)), var=pd.DataFrame(index=tokens.genes)
    )
    initialise_from_store(again, tokens, wider, n_components=3)
    assert (again.base_model.cell_embedding.statistics.shares > 0).all()
    again.train()
    batch = batch_of(tokens, wider[:9])
    assert "measured_genes" not in batch
    optimizer = torch.optim.SGD(again.parameters(), lr=1e-2)
    again(**batch)[0].square().mean().backward()
    assert again.base_model.cell_embedding.genes.weight.grad[n_old:].any()
    optimizer.step()


def test_a_tokenizer_for_whole_cells_and_a_model_that_reads_none_do_not_fit(store):
    whole, plain = (GeneTokenizer.from_store(store, bin_edges=[0.5], whole_cell=of) for of in (True, False))
    for of_model, of_tokens in ((whole, plain), (plain, whole)):
        config = small(of_model, vocabulary_fingerprint=None)
        with pytest.raises(ValueError, match="whole cells"):
            extend_vocabulary(GeneBertModel(config), of_tokens, NEW_GENES)
