"""A server on the loopback that reads ranges of the files of a folder, counts what it sends, and fails on demand."""

import re
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer(ThreadingHTTPServer):
    """Serves a folder; a context manager.

    Attributes
    ----------
    requests : list of (method, file name, start, stop)
        What was asked for; start and stop are None for whole files.
    n_bytes : int
        Bytes of files that were sent.
    drop : Counter of file name -> int
        So many answers of a file end in the middle of their body.
    status : dict of file name -> int
        Files that are refused with a status.
    """

    daemon_threads = True

    def __init__(self, folder: Path, etags: bool = True, ranges: bool = True):
        super().__init__(("127.0.0.1", 0), Answers)
        self.folder, self.etags, self.ranges = folder, etags, ranges
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.requests, self.n_bytes = [], 0
        self.drop, self.status = Counter(), {}
        self.lock = threading.Lock()

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.thread.join()
        self.server_close()

    def forget(self):
        self.requests, self.n_bytes = [], 0

    def gets(self, suffix: str = "") -> list[tuple]:
        return [request for request in self.requests if request[0] == "GET" and request[1].endswith(suffix)]

    def handle_error(self, request, client_address):
        pass  # clients close connections


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer("HEAD")

    def do_GET(self):
        self.answer("GET")

    def answer(self, method: str):
        server, path = self.server, self.server.folder / self.path.lstrip("/")
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if server.ranges else None
        start, stop = (int(wanted[1]), int(wanted[2]) + 1) if wanted else (None, None)
        with server.lock:
            server.requests.append((method, path.name, start, stop))
            drops = method == "GET" and server.drop[path.name] > 0
            server.drop[path.name] -= drops
        status = server.status.get(path.name) or (200 if path.is_file() else 404)
        content, headers = b"no", {"Last-Modified": "Sat, 01 Jan 2000 00:00:00 GMT"}
        if status == 200:
            size = path.stat().st_size
            if server.etags:
                headers["ETag"] = f'"{size}-{path.stat().st_mtime_ns}"'
            if start is not None:
                status = 206 if start < size else 416
                headers["Content-Range"] = f"bytes {start}-{min(stop, size) - 1}/{size}"
            with open(path, "rb") as file:
                file.seek(start or 0)
                content = file.read(None if stop is None else stop - start)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if method == "GET":
            sent = content[: len(content) // 2] if drops else content
            self.wfile.write(sent)
            with server.lock:
                server.n_bytes += len(sent)
            if drops:
                self.wfile.flush()
                self.close_connection = True
                self.connection.close()
