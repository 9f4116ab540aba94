from __future__ import annotations

from collections.abc import Iterator
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "c" * 40


class FakeHub:
    """A local server that answers the unmodified client as the Hub does, for reading data sets."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.fetched: list[str] = []
        self.refuses = False
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                parts = unquote(urlsplit(self.path).path).strip("/").split("/")
                if parts[0] == "api" and parts[1] == "datasets":
                    hub.list(self, "/".join(parts[2:4]))
                else:
                    hub.resolve(self, "/".join(parts[1:3]), "/".join(parts[5:]), body)

            def log_message(self, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def list(self, request: BaseHTTPRequestHandler, repo: str) -> None:
        if self.refuses:
            self.send(request, 403, b"{}", {})
            return
        if repo not in self.files:
            self.send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
            return
        tree = [{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in self.files[repo].items()]  # fmt: skip
        info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": entry["path"]} for entry in tree]}
        body = tree if "/tree/" in request.path else info
        self.send(request, 200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def resolve(self, request: BaseHTTPRequestHandler, repo: str, path: str, body: bool) -> None:
        data = self.files[repo][path]
        if body:
            self.fetched.append(path)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        self.send(request, 200, data, headers, body)

    def send(
        self, request: BaseHTTPRequestHandler, status: int, data: bytes, headers: dict[str, str], body: bool = True
    ) -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(data)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    fake = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    thread = Thread(target=fake.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()
    thread.join()
