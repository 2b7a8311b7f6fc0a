"""Cards: what the program knows is in them; metadata the Hub reads; names from data make no Markdown; edits stay."""

import json
import math
import os
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import make_adata
from huggingface_hub import ModelCard
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainingArguments

from stformer_hf import (
    CellNeighborhoodConfig,
    CellNeighborhoodForMaskedCell,
    CellNeighborhoodModel,
    CellStore,
    CellTrainer,
    DataCollatorForCellClassification,
    GeneBertConfig,
    GeneBertForClassification,
    GeneBertForPhenotypicMLM,
    GeneBertForTokenClassification,
    GeneTokenizer,
    STFormerPretrainer,
    __version__,
)
from stformer_hf.compat.scdl_collection import SingleCellCollection
from stformer_hf.training import card_facts, model_card
from stformer_hf.training.card_facts import gene_coverage, last_metrics, settings_of
from stformer_hf.training.loading import is_hub_id
from stformer_hf.training.model_card import is_unchanged_card, write_model_card

TINY = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return CellStore.build(tmp_path_factory.mktemp("cells") / "store", make_adata(), obs=["cell_type"])


@pytest.fixture(scope="module")
def genes(cells):
    return GeneTokenizer.from_store(cells, phenotypes=["cell_type"], bin_edges=[0.5, 1.5])


def make_model(tokenizer, kind=GeneBertForPhenotypicMLM, **changes):
    torch.manual_seed(0)
    return kind(GeneBertConfig.from_tokenizer(tokenizer, **TINY, **changes))


def make_trainer(folder, cells, genes, **changes):
    arguments = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 30,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    return STFormerPretrainer(
        TrainingArguments(str(folder), **arguments),
        cells,
        model=make_model(genes),
        processing_class=genes,
        eval_dataset=cells.select(range(20)),
        mlm_probability=0.3,
    )


def rows(path, title) -> dict[str, str]:
    """Read the two-column tables of a section."""
    section = path.read_text().split(f"\n## {title}\n")[1].split("\n## ")[0]
    return dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE))


def test_any_trainer_writes_a_card_of_what_it_did(cells, genes, tmp_path):
    trainer = make_trainer(tmp_path / "m", cells, genes)
    trainer.train()
    assert STFormerPretrainer.create_model_card is CellTrainer.create_model_card is not Trainer.create_model_card
    trainer.create_model_card(license="cc-by-4.0", tags="blood", language="en")
    path = tmp_path / "m" / "README.md"
    facts = rows(path, "Training")
    totals = trainer.throughput.totals
    assert totals["cells"] == 12
    wanted = {
        "masked genes": "0.3",
        "cells in training": "59",
        "cells held out": "19",
        "steps": "3",
        "batch": "4",
        "learning rate": "5e-05",
        "seed": "42",
        "tokens seen": str(totals["tokens"]),
        "cells seen": "12",
    }
    assert {name: facts[name] for name in wanted} == wanted
    assert facts["hardware"].startswith("1 x ") and "threads per process" in facts["hardware"]
    found = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert rows(path, "Results")["eval_loss"] == f"{found['eval_loss']:.4f}"
    text = path.read_text()
    assert "| AnnData | 60 | 40 | 40 | X |" in text
    assert "The tokenizer knows 100.0%" in text and f"torch {torch.__version__}" in text
    data = ModelCard.load(path).data
    assert (data.library_name, data.license, data.language) == ("transformers", "cc-by-4.0", "en")
    assert data.pipeline_tag == "feature-extraction" and data.tags[-2:] == ["gene_bert", "blood"]
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values["loss"] == pytest.approx(found["eval_loss"], abs=1e-6)
    assert not any("runtime" in name or "second" in name for name in values)


def test_a_folder_of_the_code_serves_without_installation(adata, tokenizer, tmp_path, monkeypatch):
    """As on a machine with a GPU and without a network, with the folder in PYTHONPATH."""
    of_name = metadata.Distribution.from_name.__func__

    def missing(cls, name: str):
        if name.replace("-", "_") == "stformer_hf":
            raise metadata.PackageNotFoundError(name)
        return of_name(cls, name)

    monkeypatch.setattr(metadata.Distribution, "from_name", classmethod(missing))
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("stformer_hf")
    cells = CellStore.build(tmp_path / "cells", adata, report=False)
    path = write_model_card(tmp_path, model=make_model(tokenizer), tokenizer=tokenizer, store=cells)
    assert f"stformer_hf {__version__}" in (tmp_path / "cells" / "manifest.json").read_text()
    assert f"stformer_hf {__version__}, " in path.read_text()
    assert SingleCellCollection(tmp_path / "scdl").version() == f"stformer_hf {__version__}"


def test_the_precision_is_that_of_the_weights(cells, genes, tmp_path):
    trainer = make_trainer(tmp_path, cells, genes)
    trainer.model.to(torch.bfloat16)
    for autocast, precision in ((False, "bfloat16"), (True, "bf16, weights in bfloat16")):
        trainer.args.bf16 = autocast
        assert settings_of(trainer)["precision"] == precision
    trainer.model.to(torch.float32)
    assert settings_of(trainer)["precision"] == "bf16"


def test_the_figures_are_of_the_weights_that_are_kept(cells, genes, tmp_path):
    trainer = make_trainer(tmp_path, cells, genes)
    history = [
        {"eval_loss": 1.0, "step": 1},
        {"eval_loss": 2.0, "step": 2},
        {"train_loss": 3.0, "train_runtime": 1.0, "step": 2},
    ]
    trainer.state.log_history, trainer.state.best_global_step = history, 1
    assert last_metrics(trainer) == {"train_loss": 3.0, "eval_loss": 2.0}
    trainer.args.load_best_model_at_end = True
    assert last_metrics(trainer) == {"train_loss": 3.0, "eval_loss": 1.0}
    history.append({"eval_accuracy": 0.5, "step": 2})  # evaluated after training
    assert last_metrics(trainer)["eval_accuracy"] == 0.5
    no_step = [{"train_loss": 0.0, "train_runtime": 0.1, "step": 0}, {"eval_loss": 2.0, "step": 0}]
    trainer.state.log_history = no_step
    assert last_metrics(trainer) == {"eval_loss": 2.0}


def test_figures_stand_beside_their_baselines(cells, genes, tmp_path):
    metrics = {
        "eval_genes_nll": 5.0,
        "eval_genes_loss": 5.5,
        "eval_b0_nll": 9.0,
        "eval_b1_nll": 4.5,
        "eval_b3_width": 0.05,
        "eval_accuracy": 0.8,
        "eval_majority_accuracy": 0.6,
        "eval_logistic_regression_accuracy": 0.9,
        "eval_macro_f1": 0.7,
        "eval_logistic_regression_macro_f1": 0.7,
        "eval_age_macro_f1": 0.2,
        "eval_age_majority_macro_f1": 0.1,
        "eval_context_swap_gap": 0.25,
        "eval_runtime": 3.0,
        "eval_matrix": [[1, 2]],
        "eval_nothing": math.nan,
    }
    path = write_model_card(tmp_path, model=make_model(genes), tokenizer=genes, store=cells, metrics=metrics)
    text = path.read_text()
    table = text.split("| metric | model or baseline | value |\n|---|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert table == [
        "| masked genes: negative log likelihood, nats (lower is better) | this model | 5.0000 |",
        "| | B0: all genes equally likely | 9.0000 |",
        "| | B1: frequency of the gene in the training cells | 4.5000 |",
        "| accuracy (higher is better) | this model | 0.8000 |",
        "| | most frequent class | 0.6000 |",
        "| | logistic regression | 0.9000 |",
        "| macro F1 (higher is better) | this model | 0.7000 |",
        "| | logistic regression | 0.7000 |",
        "| age: macro F1 (higher is better) | this model | 0.2000 |",
        "| | most frequent class | 0.1000 |",
    ]
    unbeaten = [line for line in text.splitlines() if line.startswith("- It does not beat")]
    assert [re.search('that of "(.+)" (.+)[.]', line).groups() for line in unbeaten] == [
        ("B1: frequency of the gene in the training cells", "4.5000"),
        ("logistic regression", "0.9000"),
        ("logistic regression", "0.7000"),
    ]
    others = text.split("| metric | value |\n|---|---|\n")[1].split("\n\n")[0]
    assert others.splitlines() == [
        "| eval_genes_loss | 5.5000 |",
        "| eval_b3_width | 0.0500 |",
        "| eval_context_swap_gap | 0.2500 |",
        "| eval_nothing | nan |",
    ]
    names = {result.metric_name: result.metric_value for result in ModelCard.load(path).data.eval_results}
    assert names == {
        "genes nll": 5.0,
        "genes loss": 5.5,
        "accuracy": 0.8,
        "macro f1": 0.7,
        "age macro f1": 0.2,
        "context swap gap": 0.25,
    }


def neighborhoods(kind):
    config = CellNeighborhoodConfig.from_size("tiny", n_genes=3, n_cell_types=2, cell_types=["T", "B"])
    return kind(config)


@pytest.mark.parametrize(
    ("kind", "task", "says"),
    [
        (GeneBertForPhenotypicMLM, "feature-extraction", "masked expression bins and phenotypes"),
        ("rank", "feature-extraction", "Scheme rank: genes in descending order of count / total x 10,000 / median"),
        (GeneBertForClassification, "tabular-classification", "2 classes: B cell, T cell"),
        (GeneBertForTokenClassification, None, "assigns each gene of a cell to one of 2 classes"),
        (CellNeighborhoodModel, "feature-extraction", "collate_neighborhoods(items, packed=True)"),
        (
            CellNeighborhoodForMaskedCell,
            "feature-extraction",
            "Expression of 3 genes, as counts, and the cell types: T, B.",
        ),
        (BertForMaskedLM, "feature-extraction", "The source of the training cells is not recorded."),
    ],
)
def test_each_kind_of_model_has_its_card(cells, genes, tmp_path, kind, task, says):
    known = {"tokenizer": genes, "store": cells}
    if kind == "rank":
        known["tokenizer"] = GeneTokenizer.from_store(cells, scheme="rank", medians=dict.fromkeys(cells.gene_ids, 1.0))
        model = make_model(known["tokenizer"])
    elif kind is BertForMaskedLM:
        known, model = {}, kind(BertConfig(vocab_size=9, **TINY))
    elif kind in (CellNeighborhoodModel, CellNeighborhoodForMaskedCell):
        known, model = {"store": cells}, neighborhoods(kind)
    else:
        model = make_model(genes, kind, id2label={0: "B cell", 1: "T cell"})
    path = write_model_card(tmp_path, model=model, **known)
    assert says in path.read_text()
    assert ModelCard.load(path).data.pipeline_tag == task
    assert ("bin edges" in path.read_text()) == ("tokenizer" in known and kind != "rank")


def test_coverage_is_that_of_the_genes_and_counts(tmp_path, genes):
    adata = make_adata(n_cells=30, n_genes=50)[:, 20:].copy()  # 20 of the tokenizer's 40 genes, and 10 others
    store = CellStore.build(tmp_path / "s", adata)
    counts = adata.X.toarray()
    assert gene_coverage(store, genes) == pytest.approx(
        {"genes": 20 / 30, "vocabulary": 20 / 40, "counts": counts[:, :20].sum() / counts.sum()}
    )


def test_only_names_of_the_hub_become_metadata(cells, genes, tmp_path):
    local = tmp_path / "secret folder" / "pretrained"
    local.mkdir(parents=True)
    known = {"model": make_model(genes), "tokenizer": genes, "store": cells}
    path = write_model_card(tmp_path, base_model=str(local), datasets=["someone/pbmc", "a b: c"], **known)
    data = ModelCard.load(path).data
    assert (data.base_model, data.datasets) == (None, ["someone/pbmc"])
    assert rows(path, "Training")["started from"] == "pretrained" and "secret" not in path.read_text()
    path = write_model_card(tmp_path, base_model="someone/gene-bert", language=("en", "de"), **known)
    data = ModelCard.load(path).data
    assert (data.base_model, data.language) == ("someone/gene-bert", ["en", "de"])
    assert [is_hub_id(name) for name in (None, "", "a/b/c", "x--y", "bert", str(local))] == [False] * 4 + [True, False]


# ---------------------------------------------------------------------- text from data

ODD = st.text(
    st.one_of(st.sampled_from("|\n\r\t`*_#<>[]()!&\\\"':-+=~$%{}@.,0aé🧬\x85\u2028\x00\ud800"), st.characters()),
    min_size=1,
    max_size=25,
).filter(lambda text: model_card._plain(text) != "")
PLAIN = "name"


def card_with(folder, cells, genes, text, model=None) -> tuple[Path, ModelCard]:
    """A card in which a text stands wherever data can put one."""
    model = model or make_model(genes, GeneBertForClassification)
    model.config.id2label = {0: text, 1: "other"}
    store = cells.select(range(5))
    store.manifest = {**cells.manifest, "sources": [{**cells.manifest["sources"][0], "name": text, "counts_in": text}]}
    store.manifest["sources"].append(cells.manifest["sources"][0])
    path = write_model_card(
        folder,
        model=model,
        tokenizer=genes,
        store=store,
        settings={text: text, "another setting": 1},
        metrics={"eval_accuracy": 0.5, f"eval_{text}_majority_accuracy": 0.1, f"eval_{text}_accuracy": 0.5},
        base_model=text,
        name=text,
        license=text,
        tags=[text],
        intended_use=text,
        limits=text,
    )
    return path, ModelCard.load(path)


def structure(text: str) -> list:
    """What kinds of Markdown a text is made of, in order."""
    markdown_it = pytest.importorskip("markdown_it")
    kinds = []
    for token in markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        kinds.append(token.type)
        kinds += [child.type for child in token.children or [] if child.type not in ("text", "text_special")]
    return kinds


@pytest.fixture(scope="module")
def plain(cells, genes, tmp_path_factory):
    """A folder, a model, and its card with a plain name."""
    folder, model = tmp_path_factory.mktemp("odd"), make_model(genes, GeneBertForClassification)
    return folder, model, card_with(folder, cells, genes, PLAIN, model)[1]


@given(text=ODD)
def test_no_text_from_data_makes_markdown_or_breaks_the_metadata(cells, genes, plain, text):
    assume(text not in card_facts._BASELINES)  # the metrics of such a class would be taken for those of a baseline
    folder, model, plain = plain
    path, card = card_with(folder, cells, genes, text, model)
    assert is_unchanged_card(path)
    assert structure(card.text) == structure(plain.text)
    of_hub = {"base_model"} if is_hub_id(text) else set()
    assert card.data.to_dict().keys() == (plain.data.to_dict().keys() - {"base_model"}) | of_hub
    clean = model_card._plain(text)
    assert card.data.license == clean and clean in card.data.tags and card.data.model_name == clean
    # Bars of a table are its own: as many a line as in the plain card.
    bars = [[line.count("|") for line in of.text.splitlines() if line.startswith("|")] for of in (card, plain)]
    assert bars[0] == bars[1]


def test_an_odd_text_is_shown_as_it_is(cells, genes, tmp_path):
    markdown_it = pytest.importorskip("markdown_it")
    text = "a|b *c* <b>&amp; `d` [e](f) __g__ \\| #h ~~i~~ 1. j"
    path, card = card_with(tmp_path, cells, genes, text)
    tokens = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card.text)
    shown = ["".join(child.content for child in token.children) for token in tokens if token.type == "inline"]
    assert shown[0] == text  # the title
    assert shown.count(text) >= 4  # a source and where its counts are, a setting and its value
    assert f"From its authors: {text}" in shown
    assert f"from_pretrained({json.dumps(text)})" in path.read_text()


def test_a_class_with_a_comma_is_in_quotes(genes, tmp_path):
    model = make_model(genes, GeneBertForClassification)
    model.config.id2label = {0: "CD4, naive", 1: "B cell"}
    text = write_model_card(tmp_path, model=model, tokenizer=genes).read_text(encoding="utf-8")
    assert 'one of 2 classes: "CD4, naive", B cell.' in text


# ---------------------------------------------------------------------- files


def test_a_card_that_somebody_edited_is_not_lost(cells, genes, tmp_path, caplog):
    known = {"model": make_model(genes), "tokenizer": genes, "store": cells}
    path = write_model_card(tmp_path, settings={"round": 1}, **known)
    assert path.name == "README.md" and not caplog.records
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))  # as git may check it out
    assert write_model_card(tmp_path, settings={"round": 2}, **known) == path
    assert "| round | 2 |" in path.read_text() and not caplog.records
    edited = path.read_text().replace("No licence was given.", "CC-BY 4.0.")
    path.write_text(edited)
    other = write_model_card(tmp_path, settings={"round": 3}, **known)
    assert other.name == "README.new.md" and "| round | 3 |" in other.read_text()
    assert path.read_text() == edited and "was edited and is kept" in caplog.text
    path.write_text("---\nlicense: mit\n---\nMy model.")
    write_model_card(tmp_path, **known)
    assert path.read_text() == "---\nlicense: mit\n---\nMy model."


def test_a_card_is_written_whole_or_not_at_all(cells, genes, tmp_path, monkeypatch):
    known = {"model": make_model(genes), "tokenizer": genes, "store": cells}
    path = write_model_card(tmp_path, **known)
    before = path.read_text()

    def full(self, *args, **kwargs):
        with open(self, "w") as file:
            file.write("---\nhalf")
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_model_card(tmp_path, settings={"round": 2}, **known)
    assert path.read_text() == before and os.listdir(tmp_path) == ["README.md"]


def test_the_template_is_where_people_look_for_it():
    root = Path(__file__).resolve().parents[2]
    shipped = root / "stformer_hf" / "training" / "model_card_template.md"
    assert (root / "model_cards" / "TEMPLATE.md").read_text() == shipped.read_text()


def test_finish_writes_the_card_with_what_it_was_told(cells, genes, tmp_path, capsys):
    from stformer_hf.cli.runs import finish

    genes = GeneTokenizer.from_store(cells, bin_edges=[0.5, 1.5])
    labelled = DataCollatorForCellClassification(genes, "cell_type")
    trainer = CellTrainer(
        model=make_model(genes, GeneBertForClassification, num_labels=2),
        args=TrainingArguments(
            str(tmp_path), max_steps=2, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
        ),
        data_collator=labelled,
        train_dataset=cells,
        eval_dataset=cells.select(range(10)),
        processing_class=genes,
    )
    figures = finish(trainer, card={"settings": {"folds": 5}, "store": cells, "base_model": "someone/gene-bert"})
    speed = {"tokens_per_second", "cells_per_second", "padding_share", "data_wait_share", "peak_memory_gb"}
    assert figures.keys() >= speed | {"train_loss", "eval_loss", "steps_per_second", "peak_memory_mb"}
    assert "eval_runtime" not in figures
    facts = rows(tmp_path / "README.md", "Training")
    assert (facts["folds"], facts["steps"], facts["label"]) == ("5", "2", "cell_type")
    assert facts["started from"] == "someone/gene-bert"
    assert rows(tmp_path / "README.md", "Results")["eval_loss"] == f"{figures['eval_loss']:.4f}"
    assert (tmp_path / "model.safetensors").exists()
