"""Seeds, folders and the choice of a name."""

import os
import random
from difflib import SequenceMatcher

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stformer_hf import choose_closest, make_output_dirs, setup_environment


@pytest.fixture
def environment(monkeypatch):
    """What the process has is put back."""
    for name in ("PYTHONHASHSEED", "TOKENIZERS_PARALLELISM", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_a_seed_fixes_all_three_generators(environment):
    def draw(seed):
        setup_environment(seed)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = draw(5)
    assert draw(5) == first
    assert all(a != b for a, b in zip(draw(6), first, strict=True))
    assert os.environ["PYTHONHASHSEED"] == "6"


def test_variables_that_are_set_stay(environment, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    setup_environment(0)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    with pytest.raises(ValueError, match="got -1"):
        setup_environment(-1)


def test_folders_are_made_and_kept(tmp_path):
    folders = make_output_dirs(tmp_path / "out", "first")
    assert folders == {
        "training": tmp_path / "out" / "models" / "first",
        "logging": tmp_path / "out" / "runs" / "first",
        "model": tmp_path / "out" / "models" / "first" / "final",
    }
    assert all(folder.is_dir() for folder in folders.values())
    (folders["model"] / "mine").write_text("kept")
    assert make_output_dirs(str(tmp_path / "out"), "first") == folders
    assert (folders["model"] / "mine").read_text() == "kept"


@pytest.mark.parametrize("name", ["", ".", "..", "a/../../b", "/somewhere"])
def test_names_that_lead_elsewhere_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="name of a folder"):
        make_output_dirs(tmp_path, name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("BERT", "bert"), ("bert", "bert"), ("Distilbert", "DistilBERT"), ("distlbert", "DistilBERT"), ("BRET", "bert")],
)
def test_case_does_not_count_and_the_name_is_written_as_supported(name, expected):
    assert choose_closest(name, ["roberta", "bert", "DistilBERT"]) == expected


def test_unsupported_and_distant_names_are_refused():
    with pytest.raises(ValueError, match="'GPT2' is not supported; choose one of gpt, bert"):
        choose_closest("GPT2", ["gpt", "bert"], unsupported=["gpt2"])
    assert choose_closest("GPT2", ["gpt", "bert"]) == "gpt"
    with pytest.raises(ValueError, match="'xyz' is not close to any of gpt, bert"):
        choose_closest("xyz", ["gpt", "bert"])
    with pytest.raises(ValueError, match="not close"):
        choose_closest("brt", ["bert"], cutoff=0.99)


words = st.text(alphabet="abAB1", min_size=1, max_size=6)


@given(words, st.lists(words, min_size=1, max_size=5), st.floats(0, 1))
def test_none_is_closer_than_the_chosen_one(name, supported, cutoff):
    ratios = [SequenceMatcher(None, other.lower(), name.lower()).ratio() for other in supported]
    if max(ratios) < cutoff:
        with pytest.raises(ValueError, match="not close"):
            choose_closest(name, supported, cutoff=cutoff)
        return
    chosen = choose_closest(name, supported, cutoff=cutoff)
    assert ratios[supported.index(chosen)] == max(ratios)
