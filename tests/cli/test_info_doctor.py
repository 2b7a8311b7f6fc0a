"""`stformer-hf info` and `stformer-hf doctor`, as a user types them."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from anndata import AnnData
from scipy import sparse
from transformers import AutoModelForSequenceClassification

from stformer_hf import CellNeighborhoodConfig, CellStore, GeneBertForClassification
from stformer_hf.cli import main
from stformer_hf.cli.doctor import EXTRAS, _version
from stformer_hf.models.gene_bert.pretrained_gene_bert import best_attention
from stformer_hf.training.calibration import OutOfFold, load_out_of_fold, replace_out_of_fold
from stformer_hf.training.loading import is_adapter, load_config, load_model, load_tokenizer


@pytest.fixture
def model(tokenizer, config, tmp_path):
    """A classifier that knows the first 30 of 40 genes, and 10 others."""
    tokenizer = type(tokenizer)([*tokenizer.genes[:30], *(f"ENSG9{i:010d}" for i in range(10))], bin_edges=[0.5])
    config = type(config).from_tokenizer(
        tokenizer,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_size=16,
        intermediate_size=32,
        id2label={0: "B cell", 1: "T cell"},
    )
    model = GeneBertForClassification(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return model


def facts(capsys, *argv) -> dict[str, str]:
    assert main(["info", *map(str, argv)]) == 0
    return dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_a_file_and_its_store(adata, tmp_path, capsys):
    adata.layers["counts"] = adata.X.astype(np.int16)
    adata.X = (adata.X * 0.5 - 1e-3 * (adata.X > 0)).astype(np.float32)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    found = facts(capsys, tmp_path / "cells.h5ad")
    assert (found["cells"], found["species"], found["counts"]) == ("60", "human", "in counts")
    assert found["genes"].startswith("40, such as ENSG00000000000")
    assert found["matrices"] == "X (float32), counts (int16)"
    assert found["obs"] == "cell_type (2 categories); age (int64)"
    counts = adata.layers["counts"].toarray()
    median = f"{np.median((counts > 0).sum(1)):,.0f} genes and {np.median(counts.sum(1)):,.0f} counts"
    assert found["per cell"] == f"{median} (median of all cells), {(counts.sum(1) == 0).sum()} without counts"
    CellStore.build(tmp_path / "store", tmp_path / "cells.h5ad", obs=["cell_type"])
    capsys.readouterr()  # what the build printed
    store = facts(capsys, "--path", tmp_path / "store")
    assert store["what"] == "cells (CellStore)"
    for name in ("cells", "species", "per cell"):
        assert store[name] == found[name]


def test_a_store_in_a_new_process(store):
    """Nothing else that this process has imported makes stores known."""
    words = [sys.executable, "-m", "stformer_hf.cli", "info", str(store.path)]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cells (CellStore)" in done.stdout and "cell_type (2 categories)" in done.stdout


def test_a_file_without_counts_says_why(adata, tmp_path, capsys):
    adata.X = (adata.X * 0.5 - 1e-3 * (adata.X > 0)).astype(np.float32)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    found = facts(capsys, tmp_path / "cells.h5ad")
    assert found["cells"] == "60" and found["counts"].startswith("none: ")
    assert "fraction" in found["counts"]


def test_a_file_without_a_matrix(adata, tmp_path, capsys):
    AnnData(obs=adata.obs, var=adata.var).write_h5ad(tmp_path / "cells.h5ad")
    found = facts(capsys, tmp_path / "cells.h5ad")
    assert (found["cells"], found["counts"]) == ("60", "none: the file has no matrix in X, raw or a layer")
    assert found["genes"].startswith("40, such as") and found["obs"] == "cell_type (2 categories); age (int64)"
    assert main(["info", str(tmp_path / "cells.h5ad"), "--model", "x"]) == 1
    assert "has no counts, so --model cannot be compared with it" in capsys.readouterr().err


def test_a_model_of_neighbourhoods(tmp_path, capsys):
    fields = {"n_genes": 3, "n_cell_types": 2, "hidden_size": 16, "encoder_layers": 2, "decoder_layers": 1}
    names = {"gene_ids": [f"ENSG{i:011d}" for i in range(3)], "cell_types": ["A", "B"], "section_key": "slice"}
    around = {"k_nearest": 20, "patch_size": None}
    for config in (CellNeighborhoodConfig(**fields), CellNeighborhoodConfig(**fields, **names, neighborhood=around)):
        config.architectures = ["CellNeighborhoodForMaskedCell"]
        config.save_pretrained(tmp_path)
        found = facts(capsys, tmp_path)
        assert found["size"] == "2 + 1 layers of 16"
        if config.gene_ids is None:
            told = ("3", "2", "not recorded", "none")
        else:
            told = ("3, such as ENSG00000000000", "2: A, B", "k_nearest 20, patch_size None", "by obs['slice']")
        found["genes"] = found["genes"].partition(" and")[0].partition(", ENSG")[0]
        assert tuple(found[name] for name in ("genes", "cell types", "neighbours", "sections")) == told
    assert main(["models", str(tmp_path)]) == 0 and "3, such as ENSG" in capsys.readouterr().out


def test_a_model_and_how_it_fits(model, adata, tmp_path, capsys):
    found = facts(capsys, tmp_path / "model")
    n_weights = sum(parameter.numel() for parameter in model.parameters())
    assert found["weights"] == f"{n_weights:,} numbers in the folder"
    assert found["predicts"] == "2 outputs: B cell, T cell"
    assert found["type"] == "gene_bert, GeneBertForClassification"
    anndata.concat([adata, adata, adata[:30]], index_unique="-").write_h5ad(tmp_path / "cells.h5ad")
    fit = facts(capsys, tmp_path / "cells.h5ad", "--model", tmp_path / "model")
    assert fit["model's genes"].startswith("30 of 40 are in the file (75.0%;")
    assert fit["file's genes"] == "75.0% are known to the model"
    for work in ("to embed", "to train an epoch"):
        said = r"about ([\d.]+) s for 150 cells: 64 of them took ([\d.]+) s on this machine, with [\d,]+ MB of memory"
        total, of_some = map(float, re.fullmatch(said, fit[work]).groups())
        assert abs(total - of_some * 150 / 64) < 0.1
    assert main(["info", str(tmp_path / "model"), "--model", "x"]) == 1
    assert "is a model" in capsys.readouterr().err


def test_repeated_entries_are_one_gene(adata, tmp_path, capsys):
    X = adata.X.tocsr()
    twice = np.repeat(X.data, 2) * np.tile([1, 2], X.nnz)
    adata.X = 3 * X
    adata.write_h5ad(tmp_path / "plain.h5ad")
    adata.X = sparse.csr_matrix((twice, np.repeat(X.indices, 2), X.indptr * 2), X.shape)
    adata.write_h5ad(tmp_path / "repeated.h5ad")
    plain, repeated = (facts(capsys, tmp_path / f"{name}.h5ad")["per cell"] for name in ("plain", "repeated"))
    assert plain == repeated


def test_how_an_adapter_fits(model, adata, tmp_path, capsys):
    peft = pytest.importorskip("peft")
    base = GeneBertForClassification.from_pretrained(tmp_path / "model")
    peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path / "adapter")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    fit = facts(capsys, tmp_path / "cells.h5ad", "--model", tmp_path / "adapter")
    assert fit["model's genes"].startswith("30 of 40") and fit["to embed"].startswith("about")
    assert "to train an epoch" not in fit


def test_what_does_not_exist(tmp_path, capsys):
    assert main(["info", str(tmp_path / "none.h5ad")]) == 1
    assert "No such file" in capsys.readouterr().err


def test_the_doctor_reads_what_is_there(capsys, monkeypatch):
    monkeypatch.setattr("stformer_hf.cli.doctor.find_spec", lambda name: None if name == "peft" else object())
    assert main(["doctor"]) == 0
    found = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert found["torch"] == torch.__version__
    assert found["attention"].startswith('"auto" takes sdpa for float32 (')
    backend, reason = best_attention(torch.bfloat16, 0.1)
    assert found["attention"].endswith(f"{backend} for bfloat16 with attention dropout ({reason})")
    assert [name for name in found if name.startswith("extra")] == ["extra lora"]
    assert found["extra lora"].startswith("missing peft: for finetune --lora")
    assert found["torch threads"].startswith(f"{torch.get_num_threads()} (")
    assert _version("no_such_package") == "missing"


def test_bfloat16_that_is_emulated_is_not_recommended(capsys, monkeypatch):
    monkeypatch.setattr("stformer_hf.cli.doctor._gpus", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert main(["doctor"]) == 0
    assert "no: use float16 or float32" in capsys.readouterr().out


def test_the_doctor_knows_every_extra():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    of_users = set(project["optional-dependencies"]) - {"demo", "bench", "docs", "dev"}
    assert set(EXTRAS) == of_users


def test_models_lists_those_below_a_folder_and_in_the_cache(model, tokenizer, tmp_path, capsys, monkeypatch):
    """Configurations of other packages, and files that are none, are passed over; a damaged model is named."""
    for name, text in (
        ("other", json.dumps({"model_type": "bert"})),
        ("list", "[1]"),
        ("text", "no json"),
        (".hidden", (tmp_path / "model" / "config.json").read_text()),
        ("damaged", (tmp_path / "model" / "config.json").read_text()),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    revision = tmp_path / ".cache" / "models--lab--blood" / "snapshots" / ("0" * 40)
    shutil.copytree(tmp_path / "model", revision)
    (revision.parents[1] / "refs").mkdir()
    (revision.parents[1] / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(tmp_path / ".cache"))
    monkeypatch.chdir(tmp_path)
    assert main(["models"]) == 0
    lines = [re.split(r"  +", line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["model", "type", "size", "genes", "tokens", "predicts"]
    rows = {line[0]: line[1:] for line in lines[1:]}
    assert list(rows) == ["damaged", "lab/blood", "model"]
    kind, size, genes, tokens, predicts = rows["model"]
    assert rows["lab/blood"] == rows["model"]
    assert (kind, size, predicts) == ("GeneBertForClassification", "2 layers of 16", "2 outputs: B cell, T cell")
    assert genes.startswith("40, such as") and tokens.startswith("binned, at most")
    assert rows["damaged"][0].startswith("cannot be read: ")
    assert main(["models", "other", "list"]) == 0
    assert "No model of this package in other, list" in capsys.readouterr().out
    assert main(["models", "absent"]) == 1 and "There is no folder absent" in capsys.readouterr().err


def test_a_model_of_an_installed_package_has_a_name_everywhere(model, tokenizer, tmp_path, capsys, monkeypatch):
    """A folder of the same name comes before it."""
    package = tmp_path / "packages"
    (package / "blood-1.0.dist-info").mkdir(parents=True)
    (package / "blood-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: blood\nVersion: 1.0\n")
    entry = "[stformer_hf.models]\nblood_of_package = blood:FOLDER\n"
    (package / "blood-1.0.dist-info" / "entry_points.txt").write_text(entry)
    (package / "blood.py").write_text(f"FOLDER = {str(tmp_path / 'model')!r}\n")
    monkeypatch.syspath_prepend(str(package))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    assert len(load_tokenizer("blood_of_package").genes) == 40
    found = OutOfFold(np.zeros((4, 2), np.float32), np.zeros(4, np.int64), np.arange(4))
    replace_out_of_fold(tmp_path / "model", found)
    assert len(load_out_of_fold("blood_of_package").labels) == 4
    loaded = load_model("blood_of_package", AutoModelForSequenceClassification)
    assert loaded.config.name_or_path == "blood_of_package"  # what adapters and cards name as their base
    assert all(torch.equal(one, other) for one, other in zip(loaded.parameters(), model.parameters(), strict=True))
    assert main(["models"]) == 0 and "blood_of_package" in capsys.readouterr().out
    assert main(["info", "blood_of_package"]) == 0 and "B cell, T cell" in capsys.readouterr().out

    assert not is_adapter("blood_of_package")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    monkeypatch.setattr("blood.FOLDER", str(adapter))
    assert is_adapter("blood_of_package")

    (tmp_path / "here" / "blood_of_package").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_config("blood_of_package")
