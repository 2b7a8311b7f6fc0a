"""`stformer-hf search`, as a user types it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from stformer_hf import GeneBertConfig
from stformer_hf.cli import main
from stformer_hf.cli.arguments import parse_training
from stformer_hf.cli.pretrain import TRAINING_DEFAULTS
from stformer_hf.cli.search import SearchArguments
from stformer_hf.search.search_space import SearchSpace

pytest.importorskip("optuna")

CONFIG = {
    "space": {
        "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
        "hidden_size": {"choices": [8, 16]},
        "num_hidden_layers": {"low": 1, "high": 2},
    },
    "model_config": {"num_attention_heads": 2, "intermediate_size": 16, "hidden_dropout_prob": 0.0},
    "bin_edges": [0.5, 1.5],
    "held_out": 0.2,
    "max_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "per_device_train_batch_size": 4,
    "seed": 3,
    "use_cpu": True,
    "disable_tqdm": True,
}


@pytest.fixture
def line(adata, tmp_path):
    """A command line without --output."""
    adata.write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(CONFIG))
    return ["search", "--config", str(tmp_path / "run.yaml"), "--data", str(tmp_path / "cells.h5ad")]


@pytest.mark.slow
def test_eight_trials_killed_after_three_end_with_eight_and_the_best_pretrains(line, tmp_path, capfd):
    killed = subprocess.Popen(
        [sys.executable, "-m", "stformer_hf.cli", *line, "--output", str(tmp_path / "search")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    for text in killed.stdout:
        if text.startswith("trial 3 of 8"):
            break
    time.sleep(0.1)  # into the fourth
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    killed.stdout.close()

    again = [*line, "--output", str(tmp_path / "search")]
    assert main(again) == 0
    out = capfd.readouterr().out
    assert "trial 4 of 8" in out and "trial 3 of 8" not in out and "trial 9" not in out
    table = pd.read_csv(tmp_path / "search" / "trials.csv")
    assert table["trial"].tolist() == [*range(1, 9)]
    assert set(table["state"]) <= {"COMPLETE", "PRUNED"}
    assert (tmp_path / "search" / "trials.png").stat().st_size > 10_000
    assert not list((tmp_path / "search").rglob("*.safetensors"))

    best = table[table["state"] == "COMPLETE"].sort_values("score").iloc[0]
    config = yaml.safe_load((tmp_path / "search" / "best.yaml").read_text())
    assert config["learning_rate"] == pytest.approx(best["learning_rate"])
    assert main(["pretrain", "--config", str(tmp_path / "search" / "best.yaml"), "--output", str(tmp_path / "m")]) == 0
    # The trial again: the same sizes, the same score.
    assert f"eval_loss {best['score']:.4g}" in capfd.readouterr().out
    made = GeneBertConfig.from_pretrained(tmp_path / "m")
    assert (made.hidden_size, made.num_hidden_layers) == (best["hidden_size"], best["num_hidden_layers"])
    assert (made.num_attention_heads, made.intermediate_size) == (2, 16)

    # Other settings are not gone on with; more trials are.
    assert main([*again, "--held_out", "0.3"]) == 1
    assert "another held_out (0.2, now 0.3)" in capfd.readouterr().err
    assert main([*again, "--trials", "9", "--dataloader_num_workers", "0"]) == 0
    assert len(pd.read_csv(tmp_path / "search" / "trials.csv")) == 9


def test_wrong_spaces_are_errors_before_any_data_are_read(line, tmp_path, capfd):
    (tmp_path / "cells.h5ad").unlink()
    for space, words in (
        ("{hiden_size: {choices: [8]}}", "unknown name 'hiden_size'; the closest known one is hidden_size"),
        ("{hidden_size: {choices: [8, 9]}}", "invalid model with hidden_size 9"),
        ("{size: {choices: [tiny, huge]}}", "size must be one of tiny, small, base, large, got 'huge'"),
        ("{position_embedding_type: {choices: [none, some]}}", "position_embedding_type"),
        ("{mlm_probability: {low: 0.5, high: 0.1}}", "mlm_probability: `low <= high` must hold"),
    ):
        assert main([*line, "--output", str(tmp_path / "search"), "--space", space]) == 1
        assert words in capfd.readouterr().err
    assert not (tmp_path / "search").exists()


def test_the_recipe_is_one():
    recipe = Path(__file__).parents[2] / "recipes" / "search_tiny.yaml"
    argv = ["--config", str(recipe), "--data", "x", "--output", "y"]
    args, training = parse_training(argv, SearchArguments, TRAINING_DEFAULTS)
    assert args.trials == 8 and training["eval_steps"] < training["max_steps"]
    assert SearchSpace(args.space).model == ["hidden_size", "num_hidden_layers"]
