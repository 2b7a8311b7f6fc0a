"""A stand-in of the Hub that speaks as much HTTP as huggingface_hub asks for, on the loopback."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote


class StandIn(ThreadingHTTPServer):
    """Repositories of the Hub: what was committed to them, and what was asked; a context manager."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answers)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.asked: list[str] = []
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.blobs: dict[str, bytes] = {}
        self.cards: list[str] = []
        self.token: set[str | None] = set()

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
        self.thread.join()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Files of a repository at a commit; those that were deleted are None in its commits."""
        commits = self.commits.get(repo, [])
        found: dict[str, bytes | None] = {}
        for _, commit in commits[: len(commits) if revision == "main" else int(revision)]:
            found.update(commit)
        return {path: content for path, content in found.items() if content is not None}

    def sha(self, repo: str) -> str:
        return f"{len(self.commits.get(repo, [])):040d}"


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, content: dict | list, status: int = 200, **headers: str):
        self.send(json.dumps(content).encode(), status, {"Content-Type": "application/json", **headers})

    def send(self, body: bytes, status: int, headers: dict[str, str]):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
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

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.asked.append(f"{self.command} {self.path}")
        path = unquote(self.path.split("?")[0])
        here = self.server
        if found := re.fullmatch(r"/api/\w+/(someone/\w+)(?:/revision/\w+)?", path):
            self.answer({"id": found[1], "sha": here.sha(found[1]), "private": False, "tags": [], "siblings": []})
        elif found := re.fullmatch(r"/api/\w+/(someone/\w+)/tree/(\w+)", path):
            files = here.files(found[1], found[2])
            self.answer(
                [{"type": "file", "path": name, "size": len(of), "oid": "0" * 40} for name, of in files.items()]
            )
        elif found := re.fullmatch(r"/(?:datasets/)?(someone/\w+)/resolve/(\w+)/(.+)", path):
            self.send_file(found[1], found[2], found[3])
        else:
            self.answer({"error": f"the stand-in has no {path}"}, 404)

    def send_file(self, repo: str, revision: str, name: str):
        files = self.server.files(repo, revision)
        if name not in files:
            self.answer({"error": f"no {name}"}, 404, **{"X-Error-Code": "EntryNotFound"})
            return
        content, status = files[name], 200
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.server.sha(repo)}
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            content, status = content[int(wanted[1]) : int(wanted[2]) + 1], 206
        self.send(content, status, headers)

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
            wanted = json.loads(body)
            name = f"someone/{wanted['name']}"
            folder = "datasets/" if wanted.get("type") == "dataset" else ""
            self.answer({"url": f"{here}/{folder}{name}", "name": name, "id": "1"})
        elif path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/(models|datasets)/someone/\w+/preupload/[^/]+", path):
            files = json.loads(body)["files"]
            of_lfs = (".safetensors", ".bin", ".pt", ".pth", ".arrow", ".parquet")
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
        elif re.fullmatch(r"/(datasets/)?someone/\w+\.git/info/lfs/objects/batch", path):
            wanted = json.loads(body)["objects"]
            objects = [
                {**of, "actions": {"upload": {"href": f"{here}/blobs/{of['oid']}", "header": {}}}} for of in wanted
            ]
            self.answer({"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/(?:models|datasets)/(someone/\w+)/commit/[^/]+", path):
            lines = [json.loads(line) for line in body.splitlines() if line]
            files = {}
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.blobs[value["oid"]]
                elif line["key"] == "deletedFile":
                    files[value["path"]] = None
            commits = self.server.commits.setdefault(found[1], [])
            commits.append((lines[0]["value"]["summary"], files))
            oid = f"{len(commits):040d}"
            self.answer({"success": True, "commitOid": oid, "commitUrl": f"{here}/{found[1]}/commit/{oid}"})
        else:
            self.answer({"error": f"the stand-in knows no {path}"}, 404)
