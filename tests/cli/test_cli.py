"""The commands, as a user types them."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import read_h5ad
from conftest import make_adata
from transformers import AutoModel, AutoModelForMaskedLM

from stformer_hf import CellStore, GeneBertConfig, GeneTokenizer
from stformer_hf.cli import VERBS, arguments, as_flags, guarded, main, runs
from stformer_hf.cli.files import writing
from stformer_hf.cli.pretrain import PretrainArguments
from stformer_hf.store import replacing

pytestmark = pytest.mark.usefixtures("two_folds")

SHORT = ["--max_steps", "2", "--use_cpu", "true", "--disable_tqdm", "true"]


@pytest.fixture
def file(adata, tmp_path):
    adata.write_h5ad(tmp_path / "cells.h5ad")
    return str(tmp_path / "cells.h5ad")


def test_from_files_to_labels_and_embeddings(file, tmp_path, capsys):
    def run(*argv):
        assert main([str(word) for word in argv]) == 0
        return capsys.readouterr().out

    store, pretrained, classifier = tmp_path / "store", tmp_path / "pretrained", tmp_path / "classifier"
    out = run("build", "--data", file, "--output", store, "--obs", "cell_type", "age")
    assert "60 cells, 40 genes, obs: cell_type, age" in out
    out = run("pretrain", "--data", store, "--output", pretrained, "--phenotypes", "cell_type", *SHORT)
    ends = rf"^{re.escape(str(pretrained))}: train_loss \S+, cells_per_second \S+, peak_memory_mb \S+, eval_loss \S+"
    assert re.search(ends, out, re.MULTILINE)
    config = GeneBertConfig.from_pretrained(pretrained)
    assert (config.hidden_size, config.num_hidden_layers) == (128, 2)
    assert GeneTokenizer.from_pretrained(pretrained).included_phenotypes == ["cell_type"]
    out = run(
        "finetune", "--data", file, "--label_key", "cell_type", "--model", pretrained, "--output", classifier, *SHORT
    )
    assert "eval macro f1" in out and "53 cells for training, 6 held out (--held_out 0 trains on all)." in out
    # The label was a phenotype of the pretraining; the classifier does not read it.
    assert GeneTokenizer.from_pretrained(classifier).included_phenotypes == []
    assert GeneBertConfig.from_pretrained(classifier).id2label == {0: "B cell", 1: "T cell"}
    out = run("annotate", "--data", file, "--model", classifier, "--output", tmp_path / "labelled.h5ad")
    assert f"{tmp_path / 'labelled.h5ad'}: obs['stformer_label']: 59 of 60 cells labelled, 1 without a known" in out
    labelled = read_h5ad(tmp_path / "labelled.h5ad")
    assert labelled.obs["stformer_label"].notna().sum() == 59
    assert labelled.obs_names.tolist() == make_adata().obs_names.tolist()
    run("embed", "--data", file, "--model", pretrained, "--output", tmp_path / "embedded.h5ad", "--pooling", "mean")
    embedded = read_h5ad(tmp_path / "embedded.h5ad")
    assert embedded.obsm["X_stformer"].shape == (60, 128)
    assert embedded.uns["stformer"]["model"] == str(pretrained)
    assert np.array_equal(embedded.X.toarray(), make_adata().X.toarray())
    card = (pretrained / "README.md").read_text()
    assert "GeneBertForPhenotypicMLM" in card and "library_name: transformers" in card and "| steps | 2 |" in card
    assert "2 classes: B cell, T cell" in (classifier / "README.md").read_text()
    assert json.loads((pretrained / "trainer_state.json").read_text())["global_step"] == 2


def test_the_last_line_has_the_main_figures(tmp_path, monkeypatch, capsys):
    figures = {"train_loss": 1.25, "peak_memory_mb": 1234.4, "peak_memory_gb": 13.3, "cells_per_second": 8.0}
    figures |= {"tokens_per_second": 99.0, "padding_share": 0.5, "data_wait_share": 0.5, "steps_per_second": 2.0}
    figures |= {"eval_loss": 1.5, "eval_genes_loss": 1.5, "eval_accuracy": 0.25, "eval_majority_accuracy": 0.125}
    shown = "train_loss 1.25, peak_memory_mb 1234, cells_per_second 8, eval_loss 1.5, eval_accuracy 0.25, "
    for device, gpu_memory in (("cpu", ""), ("cuda", ", peak_gpu_memory_gb 13.3")):
        state = SimpleNamespace(is_main_process=True, device=torch.device(device))
        monkeypatch.setattr(runs, "PartialState", lambda state=state: state)
        runs.run_and_print(str(tmp_path / "out"), lambda: figures)
        line = f"{tmp_path / 'out'}: {shown}eval_majority_accuracy 0.125{gpu_memory}\n"
        assert capsys.readouterr().out == line


def test_a_classifier_that_is_not_trained_has_no_figures_of_training(file, tmp_path, capsys):
    argv = ["finetune", "--data", file, "--label_key", "cell_type", "--output", str(tmp_path / "m")]
    assert main([*argv, "--use_cpu", "true", "--disable_tqdm", "true"]) == 0
    out = capsys.readouterr().out
    assert "'cell_type' is learnt as 2 classes: B cell, T cell.\n" in out
    assert "Training beyond the start: none (the median class has 26 cells, fewer than 50).\n" in out
    assert "eval accuracy" in out and not re.search("train.loss|steps_per_second", out)


def test_a_new_classifier_needs_no_pretrained_model(file, tmp_path):
    assert main(["finetune", "--data", file, "--label_key", "cell_type", "--output", str(tmp_path / "m"), *SHORT]) == 0
    assert (tmp_path / "m" / "store" / "manifest.json").exists()
    assert (tmp_path / "m" / "model.safetensors").exists()


def test_the_config_gives_values_and_flags_override_it(file, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: [{file}]\noutput: {tmp_path / 'a'}\nbin_edges: [0.5, 2]\nmax_steps: 1\nlearning_rate: 1e-4\n"
        "use_cpu: true\ndisable_tqdm: true\nsize: tiny\nheld_out: 0\n"
    )
    assert main(["pretrain", "--config", str(config), "--output", str(tmp_path / "b"), "--max_steps", "2"]) == 0
    assert not (tmp_path / "a").exists()
    assert json.loads((tmp_path / "b" / "trainer_state.json").read_text())["global_step"] == 2
    assert GeneTokenizer.from_pretrained(tmp_path / "b").bin_edges == [0.5, 2]
    assert "| learning rate | 0.0001 |" in (tmp_path / "b" / "README.md").read_text()


def test_a_flag_overrides_names_of_a_mapping_in_the_file(tmp_path):
    from stformer_hf.cli.arguments import parse
    from stformer_hf.cli.pretrain import PretrainArguments

    def read(text, *flags):
        (tmp_path / "c.yaml").write_text(text)
        argv = ["--config", str(tmp_path / "c.yaml"), "--data", "x", "--output", "y", *flags]
        return parse(argv, PretrainArguments).model_config

    file = "model_config:\n  hidden_act: relu\n  hidden_size: 32"
    assert read(file) == {"hidden_act": "relu", "hidden_size": 32}
    assert read(file, "--model_config", "{hidden_size: 16}") == {"hidden_act": "relu", "hidden_size": 16}
    assert read("", "--model_config", '{"hidden_size": 16}') == {"hidden_size": 16}
    assert read("") is None and read("model_config: {}") is None
    with pytest.raises(ValueError, match="model_config must be a mapping of names to values, got 5"):
        read("model_config: 5")
    with pytest.raises(SystemExit):
        read("", "--model_config", "relu")


def test_null_unsets_a_key_of_the_file(tmp_path):
    """Whatever its type; the default then holds. Elsewhere null is a word."""
    (tmp_path / "c.yaml").write_text(
        "section_key: slide\nphenotypes: [a, b]\nema: 0.9\nmodel_config: {n: 1}\nheld_out: 0.5\nmax_steps: 7\n"
        "layer: 'null'"
    )

    def read(*flags):
        argv = ["--config", str(tmp_path / "c.yaml"), "--data", "x", "--output", "y", *flags]
        return arguments.parse_training(argv, PretrainArguments, {"max_steps": 3})

    keys = ["section_key", "phenotypes", "ema", "model_config", "held_out"]
    args, training = read(*(word for key in keys for word in (f"--{key}", "null")), "--max-steps=null")
    assert [getattr(args, key) for key in keys] == [None, None, None, None, 0.05] and training == {"max_steps": 3}
    assert args.layer == "null"
    args, training = read("--phenotypes", "null", "c")
    assert [getattr(args, key) for key in keys] == ["slide", ["null", "c"], 0.9, {"n": 1}, 0.5]
    assert training == {"max_steps": 7}
    with pytest.raises(SystemExit):
        read("--emma", "null")


WRITERS = sorted(set(VERBS) - {"recipes", "info", "models", "doctor"})  # which write nothing, or copy one file


@pytest.fixture
def command_line(file, tmp_path):
    """Return the command line of a command that fails for want of a layer, a column or a model."""
    label, model, layer = ["--label_key", "nothing"], ["--model", "nothing"], ["--layer", "nothing"]
    flags = {
        "finetune": label,
        "annotate": model,
        "embed": model,
        "map": [*model, *label, "--reference", file],
        "evaluate": label,
        "perturb": model,
        "export": model,
        "search": [*layer, "--space", "{learning_rate: {low: 0.1, high: 1.0}}"],
        "tokenize": ["--tokenizer", "nothing"],
        "demo": ["--seed", "-1"],
    }

    def make(verb, output):
        source = str(CellStore.build(tmp_path / "store", file).path) if verb == "tokenize" else file
        data = [] if verb in ("demo", "export") else ["--data", source]
        return [verb, *data, "--output", str(output), *flags.get(verb, layer)]

    return make


def suffixed(verb, path):
    return path.with_suffix({"medians": ".json"}.get(verb, ".h5ad"))


@pytest.mark.parametrize("verb", WRITERS)
def test_an_error_leaves_no_empty_folder(verb, command_line, tmp_path, capsys, monkeypatch):
    line = command_line(verb, suffixed(verb, tmp_path / "new" / "runs" / "out"))
    there = sorted(tmp_path.rglob("*"))
    if verb == "demo":
        monkeypatch.setattr("stformer_hf.cli.demo._make_folder", lambda folder, overwrite: folder.mkdir() or 1 / 0)
    assert main(line) == 1
    missing = {"export": "|needs torch|pip install", "search": "|pip install"}  # an extra, or a torch that exports
    assert re.search("nothing" + missing.get(verb, ""), capsys.readouterr().err) or verb == "demo"
    assert sorted(tmp_path.rglob("*")) == there


@pytest.mark.parametrize("verb", WRITERS)
def test_two_commands_do_not_write_to_one_path(verb, command_line, tmp_path, capsys):
    output = suffixed(verb, tmp_path / "out")
    line = command_line(verb, output)
    there = sorted(tmp_path.rglob("*"))
    if verb in ("build", "tokenize"):  # which open their sources before
        del line[-2:]
    with writing(output):
        assert main(line) == 1
    assert f"Another process is writing {output}. Wait for it, or choose another path." in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == there


def test_a_path_is_the_same_through_a_link(tmp_path):
    output = tmp_path / "out.h5ad"
    (tmp_path / "link").symlink_to(output)
    with writing(output), pytest.raises(BlockingIOError), writing(tmp_path / "link"):
        pass
    (tmp_path / "link").unlink()  # the other has ended
    assert not list(tmp_path.iterdir())


def test_messages_of_the_package_are_printed(monkeypatch, capsys):
    """Those of other packages only from warnings on."""
    monkeypatch.setattr(logging, "lastResort", logging._StderrHandler(logging.WARNING))
    monkeypatch.setattr(logging.root, "handlers", [])  # of pytest

    def run():
        logging.getLogger("stformer_hf.training").info("This takes long.")
        logging.getLogger("another.package").info("not for users")

    assert guarded("stformer_hf.cli.info", run) == 0
    assert capsys.readouterr().err == "This takes long.\n"


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_threads_of_commands_spin_briefly(given, expected):
    """Unless the user has set it; and before torch is imported, which reads it then."""
    code = (
        "import os, sys; from stformer_hf import cli; from stformer_hf.cli import convert_h5ad_to_scdl, parse_args\n"
        "guarded = cli.guarded\n"
        "def look(*_, **__): guarded('', lambda: print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules))\n"
        "cli.guarded = convert_h5ad_to_scdl.guarded = look\n"
        "cli.main(['demo'])\n"
        "parse_args.main([])\n"
        "convert_h5ad_to_scdl.main(['--data-path', 'a', '--save-path', 'b'])"
    )
    own = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**own, **given}
    )
    assert out.stdout.splitlines() == [f"{expected} False"] * 3


def test_the_lock_of_a_mounted_folder_is_inside(tmp_path, monkeypatch):
    """Whose parent cannot be written to."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(replacing.os, "access", lambda path, _: path != tmp_path)
    with writing(tmp_path / "out"):
        assert not list(tmp_path.glob(".*")) and list((tmp_path / "out").iterdir())
        with pytest.raises(BlockingIOError), writing(tmp_path / "out"):
            pass
    assert not list((tmp_path / "out").iterdir())


def test_the_processes_of_one_command_share_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with replacing.locked(tmp_path / "out"), writing(tmp_path / "out"):
        pass


def test_older_names_of_flags_and_keys_are_read(tmp_path):
    """Columns are named as in Python: label_key, section_key, cell_type_key. Underscores and dashes are one."""
    from stformer_hf.cli.arguments import parse
    from stformer_hf.cli.finetune import FinetuneArguments

    def read(*flags):
        argv = ["--data", "x", "--output", "y", *flags]
        return parse(argv, FinetuneArguments).label_key[0]

    (tmp_path / "c.yaml").write_text("label: c")
    assert [read(flag, "c") for flag in ("--label_key", "--label-key", "--label")] == ["c", "c", "c"]
    assert read("--config", str(tmp_path / "c.yaml")) == "c"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["pretrain", "--data", "x", "--output", "y", "--max_lenght", "5"],
            "--max_lenght; the closest known one is --max_length",
        ),
        (
            ["pretrain", "--data", "x", "--output", "y", "--learning_rat", "5"],
            "the closest known one is --learning_rate",
        ),
        (["pretrain", "--data", "x", "--output", "y", "--max_steps", "many"], "invalid int value: 'many'"),
        (["build", "--output", "y"], "required: --data"),
        (["build", "--data", "x", "--ouput", "y"], "unknown argument --ouput; the closest known one is --output"),
        (["finetune", "--data", "x", "--output", "y"], "required: --label_key/--label-key/--label"),
        (["pretrian"], "unknown command 'pretrian'; the closest known one is pretrain"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_names_the_closest(argv, words, capsys):
    try:
        status = main(argv)
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_lenght: 5", "unknown key 'max_lenght'; the closest known one is max_length"),
        ("learning_rates: 5", "unknown key 'learning_rates'; the closest known one is learning_rate"),
        ("- a\n- b", "not a mapping"),
        ("a: [", "not YAML"),
    ],
)
def test_a_wrong_config_is_told(text, words, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    assert main(["pretrain", "--config", str(tmp_path / "c.yaml"), "--data", "x", "--output", "y"]) == 1
    assert words in capsys.readouterr().err


def test_bad_input_gives_an_error_and_debug_a_traceback(file, tmp_path, capsys):
    argv = ["build", "--data", str(tmp_path / "none.h5ad"), "--output", str(tmp_path / "s")]
    assert main(argv) == 1
    err = capsys.readouterr().err
    assert "stformer-hf build: error: No such file" in err and "Traceback" not in err
    with pytest.raises(FileNotFoundError):
        main([*argv, "--debug"])
    bad = make_adata()
    bad.X = bad.X * 0.5
    bad.write_h5ad(tmp_path / "bad.h5ad")
    assert main(["build", "--data", str(tmp_path / "bad.h5ad"), "--output", str(tmp_path / "s")]) == 1
    assert "fractional values" in capsys.readouterr().err
    assert main(["finetune", "--data", file, "--label_key", "fate", "--output", str(tmp_path / "m")]) == 1
    assert "no obs column 'fate'; it has cell_type, age" in capsys.readouterr().err
    assert main(["pretrain", "--data", file, "--output", str(tmp_path / "n"), "--held_out", "1"]) == 1
    assert "held_out must be a share" in capsys.readouterr().err


def test_what_is_there_is_not_replaced_unless_asked(file, tmp_path, capsys):
    model = tmp_path / "m"
    argv = ["pretrain", "--data", file, "--output", str(model), *SHORT, "--held_out", "0"]
    assert main(argv) == 0
    weights = (model / "model.safetensors").read_bytes()
    assert main(argv) == 1
    assert "holds a model" in capsys.readouterr().err
    assert (model / "model.safetensors").read_bytes() == weights
    assert main([*argv, "--overwrite"]) == 0
    output = tmp_path / "out.h5ad"
    output.write_text("mine")
    assert main(["embed", "--data", file, "--model", str(model), "--output", str(output)]) == 1
    assert output.read_text() == "mine"
    assert main(["embed", "--data", file, "--model", str(model), "--output", file, "--overwrite"]) == 1
    assert "is the input" in capsys.readouterr().err


def test_help_of_every_verb_is_light():
    code = f"""
import sys
from stformer_hf.cli import main
for verb in {list(VERBS)}:
    print("VERB", verb)
    try:
        main([verb, "--help"])
    except SystemExit as stopped:
        assert stopped.code == 0, verb
    print("heavy:", [m for m in ("datasets", "scanpy", "anndata") if m in sys.modules])
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0
    helps = process.stdout.split("VERB ")[1:]
    assert [text.split()[0] for text in helps] == list(VERBS)
    for text in helps:
        for flag in ("--config", "--debug"):
            assert flag in text
        assert ("--output" in text) == (text.split()[0] not in ("info", "doctor", "models"))  # which print
        assert "heavy: []" in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_flag_has_help(verb, monkeypatch):
    made, make = [], arguments._parser
    monkeypatch.setattr(arguments, "_parser", lambda *args: made.append(make(*args)) or made[-1])
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    assert [action.dest for parser in made for action in parser._actions if not action.help] == []
    assert len(made) == 1
    if verb == "finetune":
        helps = {action.dest: action.help for action in made[0]._actions}
        assert helps["held_out"].endswith("0 trains on all of them (default: %(default)s)")


def test_help_shows_each_flag_once_after_the_required_ones(monkeypatch, capsys):
    for columns in ("1", "40", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        with pytest.raises(SystemExit):
            main(["finetune", "--help"])
        usage, *lines = capsys.readouterr().out.splitlines()
        required = "--data DATA [DATA ...] --label_key LABEL_KEY [LABEL_KEY ...] --output OUTPUT"
        assert usage == f"usage: stformer-hf finetune {required} [options]"
        flags = [line.strip() for line in lines if line.startswith("  --")]
        assert len([flag for flag in flags if flag.startswith("--label_key, --label LABEL_KEY [LABEL_KEY ...]")]) == 1
        assert not any("label-key" in line or "--no_" in line for line in lines)
    with pytest.raises(SystemExit):
        main(["finetune", "--label-key", "type"])
    assert "required: --data, --output" in capsys.readouterr().err


def test_help_and_version(capsys):
    assert main([]) == main(["--help"]) == main(["--version"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)


def test_the_split_keeps_shares_of_classes_and_leaves_out_empty_cells(adata, tmp_path):
    from stformer_hf.cli.runs import split

    adata.obs.loc["cell7", "cell_type"] = None
    store = CellStore.build(tmp_path / "s", adata, obs=["cell_type"])

    def rows(seed):
        return [
            side.__getitems__(range(len(side))).cell_id for side in split(store, 0.25, seed=seed, labels=["cell_type"])
        ]

    train, held_out = rows(1)
    both = {*train, *held_out}
    assert both == set(range(60)) - {3, 7}
    assert len(both) == len(train) + len(held_out)
    is_t = (store.obs["cell_type"] == "T cell").to_numpy()
    assert abs(is_t[held_out].mean() - is_t[sorted(both)].mean()) < 0.05
    assert rows(1)[0].tolist() == train.tolist()
    assert rows(2)[0].tolist() != train.tolist()
    assert split(store, 0, seed=1)[1] is None

    adata.obs["half"] = pd.Categorical(np.where(np.arange(60) % 2, "odd", "even"))
    adata.obs.loc[["cell7", "cell8"], "half"] = ["odd", None]
    columns = ["cell_type", "half"]
    store = CellStore.build(tmp_path / "two", adata, obs=columns, report=False)
    train, held_out = split(store, 0.25, 1, columns)
    assert len(train) + len(held_out) == 59, "cells 7 and 8 have one of the labels"
    both = pd.concat([train.obs, held_out.obs]).value_counts(columns)
    assert ((held_out.obs.value_counts(columns) - both / 4).abs() < 1).all()


def test_one_group_of_usable_cells_cannot_be_held_out(adata, tmp_path):
    adata.obs["donor"] = np.where(adata.obs["cell_type"] == "T cell", "d1", "d2")
    adata.obs.loc[adata.obs["donor"] == "d2", "cell_type"] = None
    store = CellStore.build(tmp_path / "s", adata, obs=["cell_type", "donor"], report=False)
    assert all(len(part) for part in runs.split(store, 0.3, 1, split_by="donor"))
    with pytest.raises(ValueError, match="All [0-9]+ cells to split have the same 'donor', 'd1'"):
        runs.split(store, 0.3, 1, ["cell_type"], split_by="donor")
    with pytest.raises(ValueError, match=r"There is no obs\['patient'\]"):
        runs.split(store, 0.3, 1, split_by="patient")


def test_cells_without_a_group_are_a_group(adata, tmp_path):
    adata.obs["donor"] = np.where(adata.obs["cell_type"] == "T cell", "d1", None)
    store = CellStore.build(tmp_path / "s", adata, obs=["donor"], report=False)
    parts = runs.split(store, 0.3, 1, split_by="donor")
    assert sorted(part.obs["donor"].isna().mean() for part in parts) == [0, 1]


def test_a_rare_class_does_not_end_the_shares_of_the_others(adata, tmp_path, caplog):
    from stformer_hf.cli.runs import split

    labels = np.array(["A"] * 30 + ["B"] * 24 + ["few"] * 2 + ["rare"] + ["none"] * 3, object)
    labels[labels == "none"] = None
    adata.obs["x"] = pd.Categorical(labels)
    store = CellStore.build(tmp_path / "s", adata, obs=["x"], report=False)
    caplog.clear()
    for seed in range(5):
        train, held_out = split(store, 0.2, seed, ["x"])
        assert held_out.obs["x"].value_counts()[["A", "B", "rare"]].tolist() == [6, 5, 0]
        assert (train.obs["x"] == "rare").sum() == 1
    assert "3 of 60 cells have no label 'x': they are left out" in caplog.text
    assert (
        "Classes of 'x' with only one cell, which is used for training, are not evaluated: " in caplog.text
        and "stratified as one" not in caplog.text
    )
    few = [split(store, 0.03, seed, ["x"])[1].obs["x"].value_counts() for seed in range(5)]
    assert all(counts["A"] == 1 and counts.sum() == 2 for counts in few)
    assert "One side of the split has 2 cells, fewer than the 3 classes of 'x': the 2 smallest" in caplog.text


def test_twins_are_on_one_side_and_those_of_the_evaluation_data_not_in_training(tmp_path, caplog):
    from stformer_hf.cli.runs import split

    adata = make_adata(60)
    adata.obs_names = ["ACGTACGTAC" + "".join("ACGT"[i // 4**k % 4] for k in range(3)) for i in range(60)]
    adata.obs["donor"] = [f"d{i // 10}" for i in range(60)]
    again = adata[20:40].copy()
    again.obs["donor"] = [f"again {name}" for name in again.obs["donor"]]
    sources = {}
    for name, cells in (("a", adata), ("b", again)):
        sources[name] = str(tmp_path / f"{name}.h5ad")
        cells.write_h5ad(sources[name])
    store = CellStore.build(
        tmp_path / "s", list(sources.values()), obs=["cell_type", "donor"], report=False, allow_duplicates=True
    )
    for seed in range(5):
        train, held_out = split(store, 0.3, seed, split_by="donor")
        assert not set(train.obs_names) & set(held_out.obs_names)
        assert not set(train.obs["donor"]) & set(held_out.obs["donor"])
    for labels in ((), ["cell_type"]):
        for seed in range(3):
            train, held_out = split(store, 0.3, seed, labels)
            assert not set(train.obs_names) & set(held_out.obs_names)
            assert len(train) + len(held_out) == 79  # one cell has no counts
    train, held_out = split(store, 0.3, 0, eval_data=[sources["b"]])
    assert held_out.obs_names.tolist() == again.obs_names.tolist()
    assert not set(train.obs_names) & set(held_out.obs_names) and len(train) == 39
    assert "20 training cells are also in eval_data, and are left out of training" in caplog.text


def test_flags_reach_the_model_and_the_collator(file, tmp_path):
    flags = "--size small --bin_edges 0.5 2.5 --max_length 30 --label_smoothing 0.25 --held_out 0".split()
    masks = "--mlm_probability 0.4 --phenotype_mask_prob 0.7 --gene_dropout 0.3".split()
    made, tuned = tmp_path / "m", tmp_path / "c"
    assert main(["pretrain", "--data", file, "--output", str(made), *flags, *masks, *SHORT]) == 0
    config, tokenizer = GeneBertConfig.from_pretrained(made), GeneTokenizer.from_pretrained(made)
    assert (config.num_hidden_layers, config.label_smoothing) == (6, 0.25)
    assert (tokenizer.bin_edges, tokenizer.max_length) == ([0.5, 2.5], 30)
    card = (made / "README.md").read_text()
    for row in ("masked genes | 0.4", "masked phenotypes | 0.7", "gene dropout | 0.3"):
        assert row in card
    tune = ["finetune", "--data", file, "--label_key", "cell_type", "--model", str(made)]
    tune += ["--output", str(tuned), *SHORT]
    sampling = ["--sampling", "{by: cell_type, temperature: 2}"]
    assert main([*tune, "--pooling", "mean", "--gene_dropout", "0.2", *sampling]) == 0
    assert GeneBertConfig.from_pretrained(tuned).classifier_pooling == "mean"
    card = (tuned / "README.md").read_text()
    assert "gene dropout | 0.2" in card and "sampling | by cell_type, temperature 2" in card


def test_objectives_reach_the_trainer(file, tmp_path, capsys):
    made = tmp_path / "pretrained"
    flags = ["--objectives", "{contrast: 0.5, decode: 1.0}", "--view", "thinning", "--batch_key", "cell_type"]
    flags += ["--sampling", "{by: age, temperature: inf}"]
    assert main(["pretrain", "--data", file, "--output", str(made), *flags, "--ema", "0.9", *SHORT]) == 0
    out = capsys.readouterr().out
    assert "eval contrast loss" in out and "eval decode loss" in out and "mlm loss" not in out
    config = GeneBertConfig.from_pretrained(made)
    assert config.pooling == "cls" and config.cell_decoder
    card = (made / "README.md").read_text()
    assert "| objectives | contrast 0.5, decode 1 |" in card and "| sampling | by age, temperature inf |" in card


def test_ranks_of_spots_and_neighbours_with_settings_of_tokenizer_and_model(file, tmp_path, capsys):
    adata = make_adata()
    argv = ["pretrain", "--data", file, "--output", str(tmp_path / "m"), *SHORT, "--scheme", "rank"]
    assert main([*argv, "--neighborhood"]) == 1
    assert "no graph obsp['spatial_connectivities'] and no coordinates" in capsys.readouterr().err
    adata.obsm["spatial"] = np.random.default_rng(0).random((60, 2))
    adata.write_h5ad(file)
    assert main([*argv, "--neighborhood", "--section_key", "cell_type", "--tokenizer_config", "{add_cls: false}"]) == 0
    store, tokenizer = CellStore(tmp_path / "m" / "store"), GeneTokenizer.from_pretrained(tmp_path / "m")
    rows, columns = store.neighbors(range(60)).nonzero()
    types = adata.obs["cell_type"].to_numpy()
    assert len(rows) and (types[rows] == types[columns]).all()  # each section for itself
    assert tokenizer.scheme == "rank" and tokenizer.neighborhood and not tokenizer.add_cls
    assert GeneBertConfig.from_pretrained(tmp_path / "m").position_embedding_type == "learned"
    # Medians of a file, and a model with other positions.
    (tmp_path / "medians.json").write_text(json.dumps(dict.fromkeys(adata.var_names[:30], 2.0)))
    argv[4] = str(tmp_path / "n")
    given = ["--medians", str(tmp_path / "medians.json"), "--model_config", "{position_embedding_type: rotary}"]
    assert main([*argv, *given]) == 0
    tokenizer = GeneTokenizer.from_pretrained(tmp_path / "n")
    assert tokenizer.genes == adata.var_names[:30].tolist() and (tokenizer.medians == 2).all()
    assert GeneBertConfig.from_pretrained(tmp_path / "n").position_embedding_type == "rotary"


def test_medians_are_those_of_the_cells_in_training(adata, tmp_path):
    from stformer_hf import estimate_gene_medians
    from stformer_hf.cli.pretrain import PretrainArguments, prepare
    from stformer_hf.cli.runs import training_arguments

    adata[:40].write_h5ad(tmp_path / "a.h5ad")
    adata[40:].write_h5ad(tmp_path / "b.h5ad")
    args = PretrainArguments(
        data=[str(tmp_path / "a.h5ad")],
        eval_data=[str(tmp_path / "b.h5ad")],
        output=str(tmp_path / "m"),
        scheme="rank",
    )
    run = prepare(args, training_arguments(tmp_path / "m", {"use_cpu": True}, False))
    assert len(run.train_cells) == 39 and len(run.held_out_cells) == 20
    assert run.held_out_cells.__getitems__(range(20)).cell_id.tolist() == list(range(40, 60))
    expected = estimate_gene_medians(adata[:40].copy()).medians
    assert dict(zip(run.tokenizer.genes, run.tokenizer.medians, strict=True)) == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model_config", "{hiden_size: 5}"], "unknown name 'hiden_size'; the closest known one is hidden_size"),
        (["--tokenizer_config", "{truncate: top}"], "unknown name 'truncate'; the closest known one is truncation"),
        (["--tokenizer_config", "{bin_edges: [1.5]}", "--bin_edges", "2"], "pass one of them"),
        (["--neighborhood"], "only for the rank scheme"),
        (["--scheme", "rank", "--bin_edges", "2"], "only for the binned scheme"),
    ],
)
def test_settings_that_do_not_fit_are_told(adata, tmp_path, capsys, flags, words):
    adata.obsm["spatial"] = np.random.default_rng(0).random((60, 2))
    adata.write_h5ad(tmp_path / "cells.h5ad")
    argv = ["pretrain", "--data", str(tmp_path / "cells.h5ad"), "--output", str(tmp_path / "m"), *SHORT, *flags]
    assert main(argv) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--size", "small"], ["--bin_edges", "7.5"], ["--max_length", "100"]])
def test_flags_of_a_new_model_beside_a_checkpoint_are_refused(file, tmp_path, capsys, flags):
    for verb in (["pretrain"], ["finetune", "--label_key", "cell_type"]):
        argv = [*verb, "--data", file, "--output", str(tmp_path / "o"), "--model", "m", *flags]
        assert main(argv) == 1
        assert f"{flags[0]}: only for a new model" in capsys.readouterr().err


def test_going_on_from_a_checkpoint_keeps_its_phenotypes(file, tmp_path, caplog):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["pretrain", "--data", file, "--output", str(first), "--phenotypes", "cell_type", *SHORT]) == 0
    assert main(["pretrain", "--data", file, "--output", str(second), "--model", str(first), *SHORT]) == 0
    assert CellStore(second / "store").categories["cell_type"] == ["B cell", "T cell"]
    assert "no known value" not in caplog.text


def test_a_run_leaves_a_store_and_checkpoints_of_another_alone(file, tmp_path, capsys, caplog):
    output = tmp_path / "run"
    assert main(["build", "--data", file, "--output", str(output / "store"), "--obs", "age"]) == 0
    argv = ["pretrain", "--data", file, "--output", str(output), *SHORT]
    assert main(argv) == 1
    assert "store exists" in capsys.readouterr().err
    assert list(CellStore(output / "store").obs) == ["age"]
    argv[2] = str(output / "store")
    assert main([*argv, "--save_steps", "1"]) == 0
    (output / "config.json").unlink()  # as after an interruption
    assert main(argv) == 1
    assert "--resume_from_checkpoint true" in capsys.readouterr().err
    assert main([*argv, "--max_steps", "4", "--resume_from_checkpoint", "true"]) == 0
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 4
    argv[4] = str(tmp_path / "other")
    assert main([*argv, "--resume_from_checkpoint", "true"]) == 0  # nothing yet: it begins
    assert "no checkpoint to resume from: starting a new run" in caplog.text
    for checkpoint in (tmp_path / "other").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    finished = (tmp_path / "other" / "model.safetensors").read_bytes()
    assert main([*argv, "--resume_from_checkpoint", "true"]) == 1  # it would replace the model
    assert "holds a model but no checkpoint to resume from" in capsys.readouterr().err
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == finished
    # What replaces a run leaves nothing that a later resumption would go on from.
    assert main([*argv, "--save_steps", "1", "--overwrite", "--max_steps", "3"]) == 0
    assert main([*argv, "--save_steps", "1", "--overwrite", "--max_steps", "1", "--seed", "1"]) == 0
    assert [path.name for path in (tmp_path / "other").glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_a_checkpoint_in_half_precision_is_trained_in_float32(file, tmp_path, verb, caplog):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["pretrain", "--data", file, "--output", str(first), *SHORT]) == 0
    model = AutoModelForMaskedLM.from_pretrained(first)
    model.to(torch.bfloat16).save_pretrained(first)
    label = ["--label_key", "cell_type"] if verb == "finetune" else []
    assert main([verb, "--data", file, "--model", str(first), "--output", str(second), *label, *SHORT]) == 0
    assert AutoModel.from_pretrained(second).dtype == torch.float32
    assert "| precision | fp32 |" in (second / "README.md").read_text()
    assert "The weights are bfloat16" not in caplog.text  # they were loaded in float32


def test_a_folder_is_no_output_file(file, tmp_path, capsys):
    (tmp_path / "out.h5ad").mkdir()
    argv = ["embed", "--data", file, "--model", "m", "--output", str(tmp_path / "out.h5ad"), "--overwrite"]
    assert main(argv) == 1
    assert "is a folder" in capsys.readouterr().err


@pytest.mark.parametrize("error", [None, ValueError("no cells"), KeyboardInterrupt()])
def test_a_command_leaves_the_group_of_its_processes(tmp_path, error):
    def run():
        if error is not None:
            raise error

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        assert guarded("a command", run) == {type(None): 0, ValueError: 1, KeyboardInterrupt: 130}[type(error)]
        assert not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("message", "printed"),
    [
        ("Counts are in 'a': pass layer='a'.", "Counts are in 'a': pass --layer a."),
        ("No such file: parts/layer=2/c.h5ad", "No such file: parts/layer=2/c.h5ad"),
        ("https://x.y?layer=raw&layer=2", "https://x.y?layer=raw&layer=2"),
        (
            "name it with layer=…; estimates need fractional=True.",
            "name it with --layer …; estimates need --fractional.",
        ),
        ("pass layer='my counts', or reject=0.05: so", "pass --layer 'my counts', or --reject 0.05: so"),
        ("pass tokenizer='a' or distributed=True", "pass tokenizer='a' or distributed=True"),
        ("call embed(adata, layer='a') first", "call embed(adata, layer='a') first"),
        ("a no_layer='a', layer==b", "a no_layer='a', layer==b"),
    ],
)
def test_errors_name_flags(message, printed):
    assert as_flags(message, {"layer", "fractional", "reject"}) == printed


def test_the_command_line_names_its_own_flags(adata, tmp_path, capsys):
    adata.layers["raw_counts"] = adata.X.copy()
    adata.X = adata.X * 0.3
    adata.write_h5ad(tmp_path / "cells.h5ad")
    assert main(["build", "--data", str(tmp_path / "cells.h5ad"), "--output", str(tmp_path / "store")]) == 1
    assert "pass --layer raw_counts" in capsys.readouterr().err
