"""Every recipe runs as it is written, but for the sizes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import make_adata

from stformer_hf import CellNeighborhoodConfig, GeneBertConfig, GeneTokenizer
from stformer_hf.cli import finetune, main, pretrain, pretrain_neighborhood
from stformer_hf.cli.arguments import parse_training
from stformer_hf.models.gene_bert.configuration_gene_bert import WHOLE_CELL
from stformer_hf.training.defaults import FINETUNING

pytestmark = pytest.mark.usefixtures("two_folds")

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml") if not path.name.startswith("search"))
ACCELERATE = sorted(path.name for path in (FOLDER / "accelerate").glob("*.yaml"))
SMALL = [
    *("--max_steps", "2", "--use_cpu", "true", "--disable_tqdm", "true", "--bf16", "false"),
    *("--per_device_train_batch_size", "8", "--dataloader_num_workers", "0", "--held_out", "0.2"),
]
SMALL_MODEL = "{num_hidden_layers: 1, hidden_size: 16, num_attention_heads: 2, intermediate_size: 32}"


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    """Spots of two types with coordinates."""
    adata = make_adata()
    adata.obsm["spatial"] = np.random.default_rng(0).random((60, 2))
    path = tmp_path_factory.mktemp("data") / "cells.h5ad"
    adata.write_h5ad(path)
    return str(path)


def verb_of(recipe: str) -> str:
    verbs = {"finetune": "finetune", "cell_neighborhood": "pretrain_neighborhood"}
    return next((verb for name, verb in verbs.items() if recipe.startswith(name)), "pretrain")


OF_SPACE = [name for name in RECIPES if verb_of(name) == "pretrain_neighborhood"]


def parsed(recipe: str, *flags: str):
    arguments, defaults = {
        "pretrain": (pretrain.PretrainArguments, pretrain.TRAINING_DEFAULTS),
        "pretrain_neighborhood": (
            pretrain_neighborhood.PretrainNeighborhoodArguments,
            pretrain_neighborhood.TRAINING_DEFAULTS,
        ),
        "finetune": (finetune.FinetuneArguments, FINETUNING),
    }[verb_of(recipe)]
    argv = ["--config", str(FOLDER / recipe), "--data", "x", "--output", "y", *flags]
    return parse_training(argv, arguments, defaults)


@pytest.mark.parametrize("recipe", OF_SPACE)
def test_a_recipe_of_neighborhoods_runs(recipe, file, tmp_path):
    output, argv = tmp_path / "model", [verb_of(recipe), "--config", str(FOLDER / recipe), *SMALL]
    if "patch_size" in (written := yaml.safe_load((FOLDER / recipe).read_text())):
        argv += ["--patch_size", "0.3", "--section_key", "cell_type"]  # of the file's unit
    small = "{encoder_layers: 1, decoder_layers: 1, hidden_size: 16, num_attention_heads: 2, intermediate_size: 32}"
    argv += ["--data", file, "--output", str(output), "--model_config", small, "--debug"]
    assert main(argv) == 0
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert "mean of the neighbours" in (output / "README.md").read_text()
    config = CellNeighborhoodConfig.from_pretrained(output)
    assert config.likelihood == written["model_config"]["likelihood"]
    assert config.neighborhood.get("k_nearest") == written.get("k_nearest")
    assert config.neighborhood.get("max_num_cells") == written.get("max_num_cells")


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in OF_SPACE])
def test_a_recipe_runs(recipe, file, tmp_path):
    output = tmp_path / "model"
    argv = [verb_of(recipe), "--config", str(FOLDER / recipe), "--data", file, "--output", str(output), *SMALL]
    if verb_of(recipe) == "pretrain":
        argv += ["--max_length", "24", "--model_config", SMALL_MODEL]
    assert main([*argv, "--debug"]) == 0
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 2
    written, config = yaml.safe_load((FOLDER / recipe).read_text()), GeneBertConfig.from_pretrained(output)
    tokenizer = GeneTokenizer.from_pretrained(output)
    assert tokenizer.scheme == written.get("scheme", "binned")
    assert tokenizer.neighborhood == written.get("neighborhood", False)
    # Recipes of the reference configurations name it; all others make whole-cell models.
    reference = recipe.startswith(("gene_", "stformer_"))
    assert written.get("whole_cell", True) is not reference
    assert tokenizer.whole_cell is config.cell_embedding is not reference
    if tokenizer.scheme == "binned" and "bin_edges" in written:
        assert tokenizer.bin_edges == written["bin_edges"]
    small = yaml.safe_load(SMALL_MODEL)
    for name, value in written.get("model_config", {}).items():
        assert getattr(config, name) == small.get(name, value)
    # A fine-tuning chooses its own length.
    assert recipe.startswith("finetune") or "num_train_epochs" in written or written["max_steps"] > 2


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_its_four_parts_and_says_what_it_needs(recipe):
    text = (FOLDER / recipe).read_text()
    parts = re.findall(r"^# (data|tokenizer|neighbourhoods|model|training)\b", text, re.MULTILINE)
    assert parts == ["data", "neighbourhoods" if recipe in OF_SPACE else "tokenizer", "model", "training"]
    head = text.split("\n\n")[0]
    assert re.search(r"^# Needs .*\d+(\.\d+)? GB", head, re.MULTILINE)
    assert re.search(r"\d (seconds|minutes|hours|days)", head)
    assert f"--config recipes/{recipe} --data" in head
    parsed(recipe)


def test_recipes_hold_the_settings_of_the_systems_they_are_of():
    args, training = parsed("gene_bert_base.yaml")
    assert (args.size, args.bin_edges, args.label_smoothing) == ("base", [0.1], 0.5)
    assert (training["learning_rate"], training["weight_decay"], training["warmup_steps"]) == (1e-4, 0.05, 0.1)
    for recipe in ("stformer_spot.yaml", "stformer_neighborhood.yaml"):
        args, training = parsed(recipe)
        assert args.model_config["hidden_act"] == "relu" and args.model_config["intermediate_size"] == 512
        assert args.neighborhood == (recipe == "stformer_neighborhood.yaml")
        assert args.max_length == (4096 if args.neighborhood else 2048)
        assert (training["per_device_train_batch_size"], training["warmup_steps"]) == (12, 10_000)
        assert (training["learning_rate"], training["weight_decay"], training["num_train_epochs"]) == (1e-3, 1e-3, 3)


def test_fine_tuning_leaves_to_the_command_what_it_chooses():
    args, training = parsed("finetune_cell_type.yaml")
    assert args.whole_cell and args.pooling is None and args.gene_dropout == 0
    assert "num_train_epochs" not in training and training.get("max_steps", -1) < 0
    assert {name: training[name] for name in FINETUNING if name != "save_total_limit"} == {
        name: value for name, value in FINETUNING.items() if name != "save_total_limit"
    }


@pytest.mark.parametrize(
    "recipe", ["cell_small.yaml", "cell_base.yaml", "gene_bert_small.yaml", "gene_bert_base.yaml"]
)
def test_recipes_for_a_gpu_pack_by_budget_for_attention_without_a_mask(recipe):
    """Which needs half precision and no attention dropout."""
    args, training = parsed(recipe)
    assert args.packing and args.max_tokens_per_batch and training["bf16"] is True
    assert training["logging_nan_inf_filter"] is False  # which would wait in each step
    fields = {"vocab_size": 9, "type_vocab_size": 9, **(args.model_config or {})}
    if args.whole_cell:
        fields.update(WHOLE_CELL, num_genes=9)
    assert GeneBertConfig.from_size(args.size, **fields).attention_probs_dropout_prob == 0


@pytest.mark.parametrize("recipe", ["cell_tiny_cpu.yaml", "cell_small.yaml", "cell_base.yaml"])
def test_whole_cell_recipes_begin_at_the_principal_components(recipe):
    args, _ = parsed(recipe)
    assert (args.whole_cell, args.init, args.scheme) == (True, "spectral", "binned")
    assert args.size == recipe.split(".")[0].split("_")[1]


def test_the_base_model_of_neighborhoods_has_the_settings_of_its_paper():
    args, training = parsed("cell_neighborhood_base.yaml")
    config = CellNeighborhoodConfig.from_size(args.size)
    assert (config.hidden_size, config.num_attention_heads) == (384, 8)
    assert (config.encoder_layers, config.decoder_layers) == (4, 4)
    assert (args.patch_size, args.max_num_cells, args.model_config) == (17, 250, {"likelihood": "zinb"})
    assert (training["learning_rate"], training["lr_scheduler_type"]) == (1e-3, "inverse_sqrt")
    assert (training["warmup_steps"], training["weight_decay"]) == (500, 0)
    assert training["per_device_train_batch_size"] == 32


def test_the_table_names_every_recipe_and_the_commands_are_those_of_the_files():
    text = (FOLDER / "README.md").read_text()
    rows = re.findall(r"^\| `([\w/]+\.yaml)` \|", text, re.MULTILINE)
    assert sorted(rows) == sorted(
        [path.name for path in FOLDER.glob("*.yaml")] + [f"accelerate/{n}" for n in ACCELERATE]
    )
    for name in re.findall(r"recipes/[\w/]+\.yaml", text):
        assert (FOLDER.parent / name).exists()


@pytest.mark.parametrize("name", ACCELERATE)
def test_accelerate_reads_its_configs(name):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    path = FOLDER / "accelerate" / name
    config = load_config_from_file(str(path))
    kind = {"fsdp2.yaml": "FSDP", "deepspeed_zero2.yaml": "DEEPSPEED"}.get(name, "MULTI_GPU")
    assert config.distributed_type == kind
    argv = ["--config_file", str(path), "script.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(argv))
    assert args.num_processes == config.num_processes > 1
    if kind == "FSDP":
        from stformer_hf import GeneBertModel

        assert int(args.fsdp_version) == 2
        assert args.fsdp_transformer_layer_cls_to_wrap in GeneBertModel._no_split_modules
    if kind == "DEEPSPEED":
        assert args.use_deepspeed and args.zero_stage == 2


@pytest.mark.slow
def test_two_processes_train_one_model(file, tmp_path):
    output = tmp_path / "model"
    argv = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--config_file", str(FOLDER / "accelerate" / "cpu_2.yaml"), "-m", "stformer_hf.cli", "pretrain"),
        *("--config", str(FOLDER / "gene_bert_tiny_cpu.yaml"), "--data", file, "--output", str(output)),
        *("--max_length", "24", "--model_config", SMALL_MODEL, *SMALL),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(argv, capture_output=True, text=True, timeout=300, env=environment)
    assert process.returncode == 0, process.stderr
    # 8 cells a process and step.
    assert "| batch | 16 |" in (output / "README.md").read_text()
    state = json.loads((output / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert (output / "store" / "manifest.json").exists() and (output / "model.safetensors").exists()


def test_recipes_are_listed_found_by_name_and_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.split("\n\n")[0].splitlines()]
    assert listed == sorted(path.stem for path in FOLDER.glob("*.yaml"))
    argv = ["--data", "x", "--output", "y", "--seed", "3"]
    kind = pretrain.PretrainArguments, pretrain.TRAINING_DEFAULTS
    by_name = parse_training(["--config", "cell_tiny_cpu", *argv], *kind)
    by_path = parse_training(["--config", str(FOLDER / "cell_tiny_cpu.yaml"), *argv], *kind)
    assert by_name == by_path
    with pytest.raises(FileNotFoundError, match="no file and no recipe cell_tiny; the closest .* cell_tiny_cpu"):
        parse_training(["--config", "cell_tiny", *argv], *kind)

    assert main(["recipes", "--copy", "cell_tiny_cpu"]) == 0
    assert Path("cell_tiny_cpu.yaml").read_bytes() == (FOLDER / "cell_tiny_cpu.yaml").read_bytes()
    Path("mine.yaml").write_text("mine")
    for flags, error in ([["--output", "mine.yaml"], "exists"], [["--copy", "cel_tiny_cpu"], "no recipe"]):
        assert main(["recipes", "--copy", "cell_tiny_cpu", *flags]) == 1
        assert error in capsys.readouterr().err
    assert Path("mine.yaml").read_text() == "mine"
    assert main(["recipes", "--copy", "search_tiny", "--output", "mine.yaml", "--overwrite"]) == 0
    assert Path("mine.yaml").read_bytes() == (FOLDER / "search_tiny.yaml").read_bytes()


def test_the_kind_of_a_pretraining_chooses_its_flags(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--kind", "neighborhood", "--help"])
    assert "--patch_size" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["pretrain", "--kind", "cells", "--help"])
    assert "--mlm_probability" in capsys.readouterr().out
