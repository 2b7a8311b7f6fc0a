"""Weights of PerturbGene and Geneformer: against models put together here from torch's and transformers' parts."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DistilBertConfig,
    GPT2Config,
)
from transformers.models.distilbert.modeling_distilbert import Transformer

from stformer_hf import (
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneBertModel,
    GeneTokenizer,
)
from stformer_hf.compat.legacy_weights import convert_perturbgene_checkpoint, load_geneformer

GENES = [f"g{i}" for i in range(30)]
N_LABELS = 3


# ---------------------------------------------------------------------- PerturbGene


class PerturbGeneEmbeddings(nn.Module):
    def __init__(self, n_ids: int, n_types: int, hidden: int):
        super().__init__()
        self.word_embeddings = nn.Embedding(n_ids, hidden)
        self.token_type_embeddings = nn.Embedding(n_types, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=1e-12)

    def forward(self, ids, types):
        return self.LayerNorm(self.word_embeddings(ids) + self.token_type_embeddings(types))


class PerturbGeneEncoder(nn.Module):
    """DistilBERT's own blocks over these embeddings."""

    def __init__(self, n_ids: int, n_types: int, hidden: int):
        super().__init__()
        config = DistilBertConfig(dim=hidden, n_heads=2, n_layers=2, hidden_dim=24)
        config._attn_implementation = "eager"
        self.embeddings = PerturbGeneEmbeddings(n_ids, n_types, hidden)
        self.transformer = Transformer(config)

    def forward(self, ids, types):
        return self.transformer(self.embeddings(ids, types)).last_hidden_state


class PerturbGeneMLM(nn.Module):
    def __init__(self, n_ids: int, n_types: int, hidden: int):
        super().__init__()
        self.distilbert = PerturbGeneEncoder(n_ids, n_types, hidden)
        self.vocab_transform = nn.Linear(hidden, hidden)
        self.vocab_layer_norm = nn.LayerNorm(hidden, eps=1e-12)
        self.vocab_projector = nn.Linear(hidden, n_ids)

    def forward(self, ids, types):
        hidden = self.distilbert(ids, types)
        return self.vocab_projector(self.vocab_layer_norm(F.gelu(self.vocab_transform(hidden))))


class PerturbGeneClassifier(nn.Module):
    def __init__(self, n_ids: int, n_types: int, hidden: int):
        super().__init__()
        self.distilbert = PerturbGeneEncoder(n_ids, n_types, hidden)
        self.pre_classifier = nn.Linear(hidden, hidden)
        self.classifier = nn.Linear(hidden, N_LABELS)

    def forward(self, ids, types):
        return self.classifier(F.relu(self.pre_classifier(self.distilbert(ids, types)[:, 0])))


@pytest.fixture
def tokenizer():
    vocabulary = {"tissue": ["[lung]", "[bone_marrow]"], "cell_type": ["[T_cell]", "[B_cell]"]}
    return GeneTokenizer.from_perturbgene(vocabulary, [0.1, 2], GENES, truncation="head")


@pytest.fixture
def config(tokenizer):
    return GeneBertConfig.from_tokenizer(
        tokenizer,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_size=12,
        intermediate_size=24,
        num_labels=N_LABELS,
    )


@pytest.fixture
def cells(tokenizer):
    """Cells of different lengths."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(3, (6, len(GENES))) * (rng.random((6, len(GENES))) < rng.random((6, 1)))
    obs = {"tissue": ["lung", "bone marrow"] * 3, "cell_type": ["B cell", "T cell", None] * 2}
    return tokenizer(counts, obs=obs), dict(tokenizer(counts, obs=obs, padding=True, return_tensors="pt"))


def random_perturbgene(of, tokenizer, seed: int = 0) -> nn.Module:
    """Random in every weight: of norms and biases too, so that none can stand for another."""
    torch.manual_seed(seed)
    model = of(len(tokenizer), tokenizer.type_vocab_size, 12)
    for name, weight in model.named_parameters():
        nn.init.normal_(weight, 1.0 * name.endswith("orm.weight"), 0.5)
    return model.eval()


MODELS = {
    PerturbGeneEncoder: GeneBertModel,
    PerturbGeneMLM: GeneBertForPhenotypicMLM,
    PerturbGeneClassifier: GeneBertForClassification,
}


@pytest.mark.parametrize("prefix", ["distilbert.", "gene_bert.", "bert.", ""])
@pytest.mark.parametrize("of", MODELS)
def test_a_converted_model_gives_the_outputs_of_perturbgene(config, tokenizer, cells, of, prefix):
    theirs = random_perturbgene(of, tokenizer)
    weights = {name.replace("distilbert.", ""): tensor for name, tensor in theirs.state_dict().items()}
    is_head = ("vocab_", "pre_classifier", "classifier")
    weights = {name if name.startswith(is_head) else prefix + name: of for name, of in weights.items()}
    ours = convert_perturbgene_checkpoint(weights, config)
    assert type(ours) is MODELS[of] and not ours.training
    tokens, batch = cells
    assert len({len(ids) for ids in tokens["input_ids"]}) > 2
    with torch.no_grad():
        outputs = ours(**batch)[0]
        for i, (ids, types) in enumerate(zip(tokens["input_ids"], tokens["token_type_ids"], strict=True)):
            alone = theirs(torch.tensor([ids]), torch.tensor([types]))[0]
            assert alone.std() > 0.1
            mine = outputs[i] if of is PerturbGeneClassifier else outputs[i, : len(ids)]
            torch.testing.assert_close(mine, alone, atol=1e-5, rtol=0)


def test_the_untied_head_stays_untied_also_when_saved(config, tokenizer, cells, tmp_path):
    """PerturbGene declares its head tied, and does not tie it."""
    weights = random_perturbgene(PerturbGeneMLM, tokenizer).state_dict()
    model = convert_perturbgene_checkpoint(weights, config)
    assert config.tie_word_embeddings and not model.config.tie_word_embeddings
    assert model.config.vocabulary_fingerprint == tokenizer.fingerprint
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert not torch.equal(again.mlm_head.decoder.weight, again.get_input_embeddings().weight)
    with torch.no_grad():
        assert torch.equal(again(**cells[1]).logits, model(**cells[1]).logits)
    # Fine-tuning: the encoder under another head.
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            classifier.gene_bert(**cells[1]).last_hidden_state, model.gene_bert(**cells[1]).last_hidden_state
        )


@pytest.mark.parametrize("written", [True, False])
@pytest.mark.parametrize("tie", [True, False])
def test_a_tied_head_is_tied_as_the_configuration_says(config, tokenizer, cells, written, tie):
    theirs = random_perturbgene(PerturbGeneMLM, tokenizer)
    theirs.vocab_projector.weight = theirs.distilbert.embeddings.word_embeddings.weight
    weights = dict(theirs.state_dict())
    if not written:
        del weights["vocab_projector.weight"]
    config.tie_word_embeddings = tie
    ours = convert_perturbgene_checkpoint(weights, config)
    assert (ours.mlm_head.decoder.weight is ours.get_input_embeddings().weight) == tie
    ids, types = (torch.tensor([cells[0][name][0]]) for name in ("input_ids", "token_type_ids"))
    with torch.no_grad():
        logits = ours(input_ids=ids, token_type_ids=types).logits
        torch.testing.assert_close(logits, theirs(ids, types), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["model.safetensors", "pytorch_model.bin", "weights.pt", "folder"])
def test_files_and_folders_give_the_same_model(config, tokenizer, tmp_path, kind):
    weights = random_perturbgene(PerturbGeneMLM, tokenizer).state_dict()
    if kind in ("model.safetensors", "folder"):
        save_file(weights, tmp_path / "model.safetensors")
    else:
        torch.save(weights, tmp_path / kind)
    path = tmp_path if kind == "folder" else tmp_path / kind
    expected = convert_perturbgene_checkpoint(weights, config).state_dict()
    for source in (path, str(path)):
        found = convert_perturbgene_checkpoint(source, config).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_training_the_model_leaves_the_given_weights_alone(config, tokenizer, cells):
    weights = random_perturbgene(PerturbGeneMLM, tokenizer).state_dict()
    before = {name: tensor.clone() for name, tensor in weights.items()}
    model = convert_perturbgene_checkpoint(weights, config).train()
    model(**cells[1], labels=cells[1]["input_ids"]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(model.mlm_head.decoder.weight, before["vocab_projector.weight"])
    assert all(torch.equal(weights[name], before[name]) for name in before)


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"echo harm > {self.path}",)


def test_files_that_hold_more_than_tensors_are_refused(config, tokenizer, tmp_path):
    weights = random_perturbgene(PerturbGeneMLM, tokenizer).state_dict()
    torch.save({**weights, "x": Harm(tmp_path / "harm")}, tmp_path / "evil.bin")
    with pytest.raises(ValueError, match="Cannot load .*evil.bin"):
        convert_perturbgene_checkpoint(tmp_path / "evil.bin", config)
    assert not (tmp_path / "harm").exists()
    torch.load(tmp_path / "evil.bin", weights_only=False)
    assert (tmp_path / "harm").exists(), "the file does no harm: this test shows nothing"
    torch.save({"model": weights, "step": 5}, tmp_path / "trainer.pt")
    with pytest.raises(ValueError, match="trainer.pt holds values that are not tensors, such as model, step"):
        convert_perturbgene_checkpoint(tmp_path / "trainer.pt", config)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="list.pt holds a list"):
        convert_perturbgene_checkpoint(tmp_path / "list.pt", config)
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0")
    with pytest.raises(ValueError, match="Cannot load .*cut.safetensors"):
        convert_perturbgene_checkpoint(tmp_path / "cut.safetensors", config)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="holds neither model.safetensors nor pytorch_model.bin"):
        convert_perturbgene_checkpoint(tmp_path / "folder", config)
    for name in ("none.bin", "none.safetensors"):
        with pytest.raises(FileNotFoundError):
            convert_perturbgene_checkpoint(tmp_path / name, config)


def test_every_weight_is_used_or_named(config, tokenizer):
    weights = random_perturbgene(PerturbGeneMLM, tokenizer).state_dict()
    for name in weights:
        some = {other: tensor for other, tensor in weights.items() if other != name}
        short = name.removeprefix("distilbert.")
        if name == "vocab_projector.weight":
            continue  # tied
        with pytest.raises(ValueError, match=f"1 weights are missing: {short}"):
            convert_perturbgene_checkpoint(some, config)
        with pytest.raises(ValueError, match=rf"1 weights have another shape: {short} \({len(weights[name]) + 1}"):
            grown = torch.cat([weights[name], weights[name][:1]])
            convert_perturbgene_checkpoint({**weights, name: grown}, config)
    with pytest.raises(ValueError, match="1 weights are unexpected: embeddings.position_embeddings.weight"):
        more = {"distilbert.embeddings.position_embeddings.weight": torch.zeros(5, 12)}
        convert_perturbgene_checkpoint({**weights, **more}, config)
    with pytest.raises(ValueError, match="are unexpected: somewhere.else"):
        convert_perturbgene_checkpoint({**weights, "somewhere.else": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match="embeddings.LayerNorm.bias twice"):
        convert_perturbgene_checkpoint({**weights, "embeddings.LayerNorm.bias": torch.zeros(12)}, config)
    with pytest.raises(ValueError, match="an MLM head and a classification head"):
        convert_perturbgene_checkpoint({**weights, "classifier.bias": torch.zeros(3)}, config)
    with pytest.raises(ValueError, match="weights are missing: embeddings.word_embeddings.weight"):
        convert_perturbgene_checkpoint({}, config)


@pytest.mark.parametrize(
    ("of", "field", "value", "found"),
    [
        (PerturbGeneMLM, "vocab_size", 12, 11),
        (PerturbGeneMLM, "type_vocab_size", 34, 33),
        (PerturbGeneMLM, "hidden_size", 24, 12),
        (PerturbGeneMLM, "intermediate_size", 48, 24),
        (PerturbGeneMLM, "num_hidden_layers", 3, 2),
        (PerturbGeneMLM, "num_hidden_layers", 1, 2),
        (PerturbGeneClassifier, "num_labels", 5, 3),
    ],
)
def test_sizes_that_differ_are_named_by_their_field(config, tokenizer, of, field, value, found):
    weights = random_perturbgene(of, tokenizer).state_dict()
    setattr(config, field, value)
    with pytest.raises(ValueError, match=rf"In the configuration, {field} is {value} \({found} in the checkpoint\)\."):
        convert_perturbgene_checkpoint(weights, config)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("position_embedding_type", "rotary", r"position_embedding_type is 'rotary' \('none' in PerturbGene\)"),
        ("position_embedding_type", "learned", "position_embedding_type is 'learned'"),
        ("classifier_pooling", "mean", r"classifier_pooling is 'mean' \('cls' in PerturbGene\)"),
        ("pre_norm", True, "weights are missing"),
        ("norm_type", "rms_norm", "weights are unexpected: .*LayerNorm.bias"),
        ("value_embedding", True, "weights are missing: .*value_embeddings"),
        ("gated_feed_forward", True, "another shape: .*lin1"),
    ],
)
def test_options_that_perturbgene_has_not_are_refused(config, tokenizer, field, value, words):
    weights = random_perturbgene(PerturbGeneClassifier, tokenizer).state_dict()
    convert_perturbgene_checkpoint(weights, config)
    setattr(config, field, value)
    with pytest.raises(ValueError, match=words):
        convert_perturbgene_checkpoint(weights, config)


# ---------------------------------------------------------------------- Geneformer

DICTIONARY = {"<pad>": 0, "<mask>": 1, "ENSG1": 2, "ENSG2": 3, "ENSG3": 4}
MEDIANS = {"ENSG1": 1.0, "ENSG2": 0.5, "ENSG3": 2.0}


def write_geneformer(folder, n_ids: int = 5, safe: bool = True, **fields) -> BertForMaskedLM:
    """Write a small model of Geneformer's form with random weights."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=n_ids,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        hidden_act="relu",
        max_position_embeddings=64,
        **fields,
    )
    model = BertForMaskedLM(config).eval()
    folder.mkdir(exist_ok=True)
    if safe:
        model.save_pretrained(folder)
    else:  # as older checkpoints are
        config.architectures = ["BertForMaskedLM"]
        config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


def batch_of(tokenizer, counts) -> dict[str, torch.Tensor]:
    """Make a batch of what the model takes."""
    tokens = tokenizer(counts, padding=True, return_tensors="pt")
    return {name: tokens[name] for name in tokenizer.model_input_names}


@pytest.mark.parametrize("safe", [True, False])
def test_a_geneformer_folder_becomes_a_stock_model_and_its_tokenizer(tmp_path, safe):
    original = write_geneformer(tmp_path / "m", safe=safe)
    model, tokenizer = load_geneformer(tmp_path / "m", DICTIONARY, MEDIANS, symbols={"TP53": "ENSG2"})
    assert type(model) is BertForMaskedLM and not model.training and model.config.hidden_act == "relu"
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]
    assert (tokenizer.scheme, tokenizer.max_length, len(tokenizer)) == ("rank", 64, 5)
    assert tokenizer.convert_tokens_to_ids("TP53") == 3
    counts = np.array([[2, 1, 0], [1, 1, 8]])
    batch = batch_of(tokenizer, counts)
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["input_ids"].tolist() == [[2, 3, 0], [4, 3, 2]]
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, original(**batch).logits)

    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert type(loaded) is GeneTokenizer
    assert loaded.model_input_names == ["input_ids", "attention_mask"]
    assert (loaded.max_length, loaded.fingerprint) == (64, tokenizer.fingerprint)
    with torch.no_grad():
        again = AutoModelForMaskedLM.from_pretrained(tmp_path / "again").eval()(**batch_of(loaded, counts)).logits
        assert torch.equal(again, original(**batch).logits)


@pytest.mark.parametrize("sub", ["", "geneformer"])
def test_dictionaries_are_found_in_the_folder(tmp_path, sub):
    write_geneformer(tmp_path / "m")
    with pytest.raises(ValueError, match=r"no token_dictionary\*.pkl or vocab.txt: pass token_dictionary="):
        load_geneformer(tmp_path / "m", medians=MEDIANS)
    with pytest.raises(ValueError, match=r"no gene_median_dictionary\*.pkl: pass medians="):
        load_geneformer(tmp_path / "m", DICTIONARY)
    folder = tmp_path / "m" / sub
    folder.mkdir(exist_ok=True)
    (folder / "token_dictionary_gc30M.pkl").write_bytes(pickle.dumps(DICTIONARY))
    (folder / "gene_median_dictionary_gc30M.pkl").write_bytes(pickle.dumps(MEDIANS))
    (folder / "gene_name_id_dict_gc30M.pkl").write_bytes(pickle.dumps({"TP53": "ENSG2"}))
    _, tokenizer = load_geneformer(tmp_path / "m")
    _, given = load_geneformer(tmp_path / "m", DICTIONARY, MEDIANS)
    assert tokenizer.get_vocab() == DICTIONARY and tokenizer.fingerprint == given.fingerprint
    assert tokenizer.symbols == {"TP53": "ENSG2"}
    (folder / "token_dictionary.pkl").write_bytes(pickle.dumps(DICTIONARY))
    with pytest.raises(ValueError, match=r"2 files token_dictionary\*.pkl: choose one with token_dictionary="):
        load_geneformer(tmp_path / "m")


def test_a_geneformer_that_does_not_fit_is_refused(tmp_path):
    write_geneformer(tmp_path / "m", n_ids=7)
    with pytest.raises(ValueError, match="has 5 ids, but the model has 7"):
        load_geneformer(tmp_path / "m", DICTIONARY, MEDIANS)
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="type 'gpt2'; Geneformer's is 'bert'"):
        load_geneformer(tmp_path / "gpt2", DICTIONARY, MEDIANS)
    encoder = write_geneformer(tmp_path / "m").bert
    BertModel.save_pretrained(encoder, tmp_path / "encoder")
    with pytest.raises(ValueError, match="weights of a masked language model, such as cls.predictions"):
        load_geneformer(tmp_path / "encoder", DICTIONARY, MEDIANS)


def test_geneformers_own_dictionary(tmp_path, shared_data):
    original = write_geneformer(tmp_path / "m", n_ids=25_426)
    folder = shared_data / "geneformer"
    dictionary, medians = folder / "token_dictionary.pkl", folder / "gene_median_dictionary.pkl"
    model, tokenizer = load_geneformer(tmp_path / "m", dictionary, medians, symbols=folder / "gene_name_id_dict.pkl")
    counts = np.zeros((2, 40), int)
    counts[0, 3:20], counts[1, 10:40] = 4, 1
    batch = batch_of(tokenizer, np.pad(counts, ((0, 0), (0, len(tokenizer.genes) - 40))))
    assert set(batch["input_ids"][0].tolist()) == {0, *range(2 + 3, 2 + 20)}
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, original(**batch).logits)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert model.config.vocab_size == config["vocab_size"] == len(tokenizer)
