"""push_to_hub by Trainer's flags, into a stand-in of the Hub that speaks as much HTTP as huggingface_hub asks for."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import make_adata
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


class StandIn(ThreadingHTTPServer):
    """Repositories of the Hub: what was committed to them, and what was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[str] = []
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.blobs: dict[str, bytes] = {}
        self.cards: list[str] = []
        self.token: set[str | None] = set()

    def files(self, repo: str) -> dict[str, bytes]:
        return {path: content for _, commit in self.commits[repo] for path, content in commit.items()}


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, content: dict | list, status: int = 200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self):
        self.server.asked.append(f"GET {self.path}")
        self.answer({"error": f"the stand-in has no {self.path}"}, 404)

    def do_PUT(self):
        oid = self.path.rsplit("/", 1)[-1]
        self.server.blobs[oid] = content = self.body()
        self.answer({}, 200 if hashlib.sha256(content).hexdigest() == oid else 400)

    def do_POST(self):
        path, body = self.path.split("?")[0], self.body()
        self.server.asked.append(f"POST {path}")
        self.server.token.add(self.headers.get("Authorization"))
        here = self.server.address
        if path == "/api/repos/create":
            name = f"someone/{json.loads(body)['name']}"
            self.answer({"url": f"{here}/{name}", "name": name, "id": "1"})
        elif path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/someone/\w+/preupload/[^/]+", path):
            files = json.loads(body)["files"]
            of_lfs = (".safetensors", ".bin", ".pt", ".pth")
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(of_lfs) else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in files
            ]
            self.answer({"files": modes, "commitOid": None})
        elif re.fullmatch(r"/someone/\w+\.git/info/lfs/objects/batch", path):
            wanted = json.loads(body)["objects"]
            objects = [
                {**of, "actions": {"upload": {"href": f"{here}/blobs/{of['oid']}", "header": {}}}} for of in wanted
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/(someone/\w+)/commit/[^/]+", path):
            lines = [json.loads(line) for line in body.splitlines() if line]
            files = {}
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.blobs[value["oid"]]
            commits = self.server.commits.setdefault(found[1], [])
            commits.append((lines[0]["value"]["summary"], files))
            oid = f"{len(commits):040d}"
            self.answer({"success": True, "commitOid": oid, "commitUrl": f"{here}/{found[1]}/commit/{oid}"})
        else:
            self.answer({"error": f"the stand-in knows no {path}"}, 404)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory) -> StandIn:
    """The stand-in, after runs that pushed to it by each strategy."""
    folder = tmp_path_factory.mktemp("push")
    store = CellStore.build(folder / "store", make_adata(), obs=["cell_type"])
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
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
    server.shutdown()
    server.server_close()
    thread.join()
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
    assert "from_pretrained('someone/end')" in card.text and "| steps | 2 |" in card.text
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
