"""push_to_hub by Trainer's flags, into a stand-in of the Hub."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_adata
from hub_stand_in import StandIn
from huggingface_hub import ModelCard
from transformers import AutoModelForMaskedLM, AutoTokenizer

from stformer_hf import CellStore

SCRIPT = Path(__file__).with_name("push_to_stand_in.py")
OF_A_MODEL = {
    "README.md",
    "cell_counts.py",
    "config.json",
    "configuration_gene_bert.py",
    "model.safetensors",
    "modeling_gene_bert.py",
    "tokenization_gene_bert.py",
    "tokenizer_config.json",
    "training_args.bin",
}


@pytest.fixture(scope="module")
def pushed(tmp_path_factory) -> StandIn:
    """The stand-in, after runs that pushed to it by each strategy."""
    folder = tmp_path_factory.mktemp("push")
    store = CellStore.build(folder / "store", make_adata(), obs=["cell_type"])
    with StandIn() as server:
        # HF_ENDPOINT is read at import, so a process of its own.
        others = {name: of for name, of in os.environ.items() if not re.match("HF_|.*PROXY", name.upper())}
        own = {
            "HF_ENDPOINT": server.address,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(folder / "home"),
            "OMP_NUM_THREADS": "1",
        }
        run = subprocess.run(
            [sys.executable, str(SCRIPT), str(store.path), str(folder)],
            env={**others, **own},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert run.returncode == 0, run.stderr[-4000:] + "\n".join(server.asked)
    return server


def as_downloaded(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.slow
def test_the_end_of_training_is_pushed_with_our_card(pushed, tmp_path):
    files = pushed.files("someone/end")
    assert pushed.asked[0] == "POST /api/repos/create"
    assert [message for message, _ in pushed.commits["someone/end"]] == ["End of training"]
    assert files.keys() >= OF_A_MODEL
    assert not any(name.startswith(("checkpoint-", ".")) for name in files)
    assert pushed.token == {"Bearer hf_of_nobody"}
    copy = as_downloaded(files, tmp_path)
    card = ModelCard.load(copy / "README.md")
    assert (card.data.license, card.data.library_name) == ("cc-by-4.0", "transformers")
    assert {"stformer_hf", "gene_bert", "blood"} <= set(card.data.tags)
    assert 'from_pretrained("someone/end")' in card.text and "| steps | 2 |" in card.text
    assert files["README.md"].decode() in pushed.cards  # the Hub was asked to check it
    tokenizer = AutoTokenizer.from_pretrained(copy)
    assert len(AutoModelForMaskedLM.from_pretrained(copy).get_input_embeddings().weight) == len(tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["every_save", "checkpoint"])
def test_what_is_pushed_while_training_loads_without_the_plugin(pushed, strategy):
    commits = pushed.commits[f"someone/{strategy}"]
    assert {"Training in progress, step 1", "Training in progress, step 2"} <= {message for message, _ in commits}
    first = next(files for message, files in commits if message == "Training in progress, step 1")
    assert first.keys() >= OF_A_MODEL and b"| steps | 1 |" in first["README.md"]
    files = pushed.files(f"someone/{strategy}")
    assert b"| steps | 2 |" in files["README.md"]
    state = files.get("last-checkpoint/trainer_state.json")
    assert (state is not None) == (strategy == "checkpoint")
    assert state is None or json.loads(state)["global_step"] == 2
    seen, wanted = set(), {of.split(".")[0] for of in json.loads(files["config.json"])["auto_map"].values()}
    while wanted - seen:  # the code that a checkpoint names, and what that imports
        seen.add(module := (wanted - seen).pop())
        wanted |= set(re.findall(r"^from \.(\w+) import", files[f"{module}.py"].decode(), re.MULTILINE))
    assert len(seen) > 3
