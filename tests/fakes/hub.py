"""A local Hugging Face Hub over real HTTP: as much of it as an unmodified huggingface_hub client needs to push a model.

Create, info, tree, preupload, LFS batch with PUT and verify, commits (ndjson, parentCommit checked), tags, resolve. Every
commit keeps its tree, so that a test can materialise the repo as it was at any of them. Faults are queued and happen
once each. It does not speak Xet: run clients with HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
from pathlib import Path
import re
import socket
import struct
import threading
from typing import Any
from urllib.parse import unquote, urlsplit


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Commit:
    oid: str
    parent: str | None
    message: str
    #: Paths in the order in which the client sent them.
    changed: list[str]
    #: path -> (content, whether it is a large file)
    tree: dict[str, tuple[bytes, bool]]


@dataclass
class Repo:
    private: bool
    commits: list[Commit] = field(default_factory=list)
    #: Name of a tag -> hash of the commit.
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def add(self, message: str, changes: dict[str, tuple[bytes, bool]]) -> Commit:
        parent = self.commits[-1] if self.commits else None
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        tree = {**(parent.tree if parent else {}), **changes}
        self.commits.append(Commit(oid, parent.oid if parent else None, message, list(changes), tree))
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.head
        return next((commit for commit in self.commits if commit.oid == self.tags.get(revision, revision)), None)


@dataclass
class Fault:
    """Happens once, to the first request whose method and path match."""

    pattern: str
    #: An HTTP status; or "drop": close the connection unanswered; "answer-lost": do the work, then close it;
    #: "answer-held": the same, but close it when the Hub's `let_go` is set; "overtake": another writer commits first.
    kind: int | str


class FakeHub:
    """The server's state. `faults` and `tokens` (None lets everybody in) may be changed while it runs."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.tokens: set[str] | None = None
        #: Set when an answer is held, and by whoever lets it go.
        self.holding, self.let_go = threading.Event(), threading.Event()
        self.lock = threading.RLock()
        self.endpoint = ""

    def materialise(self, repo: str, commit: Commit, directory: Path) -> Path:
        """Write the repo as it was at `commit` into `directory`."""
        directory.mkdir(parents=True)
        for path, (content, _) in commit.tree.items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_bytes(content)
        return directory

    def take_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if re.search(fault.pattern, request):
                    self.faults.remove(fault)
                    return fault
        return None


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve a fresh Hub on a free port of this machine until the block ends."""
    hub = FakeHub()

    class BoundHandler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), BoundHandler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.let_go.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FakeHub

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        fault = self.state.take_fault(request)
        try:
            with self.state.lock:
                self.state.requests.append(request)
                if fault and fault.kind == "drop":
                    return self._hang_up()
                if fault and isinstance(fault.kind, int):
                    raise _Refused(fault.kind, "injected")
                if fault and fault.kind == "overtake":
                    next(iter(self.state.repos.values())).add("someone else", {"NOTES.md": (b"mine", False)})
                answer = self._route(path, body)
            if fault and fault.kind == "answer-held":
                self.state.holding.set()
                self.state.let_go.wait()
            if fault and fault.kind in ("answer-lost", "answer-held"):
                return self._hang_up()
            self._answer(200, answer)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            self._answer(refused.status, {"error": str(refused), **getattr(refused, "extra", {})},
                         {**headers, "X-Error-Message": str(refused)})  # fmt: skip

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _hang_up(self) -> None:
        # Linger 0 makes closing a reset, as when a middlebox loses the connection.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _answer(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if isinstance(answer, bytes):
            self.send_header("ETag", f'"{hashlib.sha256(answer).hexdigest()}"')
            self.send_header("X-Repo-Commit", getattr(self, "commit", "0" * 40))
            self.send_header("Content-Type", "application/octet-stream")
        else:
            self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _route(self, path: str, body: bytes) -> Any:
        if self.command == "PUT" and path.startswith("/storage/"):
            return self._put(path.removeprefix("/storage/"), body)
        self._authorise()
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        for pattern, method in (
            (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", self._commit),
            (r"/api/models/([^/]+/[^/]+)/refs", self._refs),
            (r"/api/models/([^/]+/[^/]+)/tag/([^/]+)", self._tag),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", self._tree),
            (r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", self._info),
            (r"/api/models/([^/]+/[^/]+)", self._info),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/([^/]+/[^/]+)\.git/info/lfs/verify", self._verify),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ):
            if match := re.fullmatch(pattern, path):
                repo = self.state.repos.get(match[1])
                if repo is None:
                    raise _Refused(404, "Repository not found", "RepoNotFound")
                return method(match[1], repo, match.groups()[1:], body)
        raise _Refused(404, f"no such endpoint: {self.command} {path}")

    def _authorise(self) -> None:
        allowed = self.state.tokens
        if allowed is not None and self.headers.get("Authorization", "").removeprefix("Bearer ") not in allowed:
            raise _Refused(401, "Invalid credentials in Authorization header")

    def _create(self, asked: dict[str, Any]) -> Any:
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        url = f"{self.state.endpoint}/{name}"
        if name in self.state.repos:
            refused = _Refused(409, "You already created this model repo")
            refused.extra = {"url": url}  # type: ignore[attr-defined]
            raise refused
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.state.repos[name] = repo = Repo(private)
        repo.add("initial commit", {".gitattributes": (b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n", False)})
        return {"url": url, "name": name, "id": name}

    def _validate(self, content: str) -> Any:
        import yaml

        if not content.startswith("---\n") or not isinstance(yaml.safe_load(content.split("---\n")[1]), dict):
            raise _Refused(400, "the card has no metadata")
        return {"errors": [], "warnings": []}

    def _info(self, name: str, repo: Repo, parts: tuple[str, ...], body: bytes) -> Any:
        commit = self._at(repo, parts[0] if parts else "main")
        siblings = [{"rfilename": path} for path in commit.tree]
        return {"id": name, "sha": commit.oid, "private": repo.private, "siblings": siblings, "tags": []}

    def _refs(self, name: str, repo: Repo, parts: tuple[str, ...], body: bytes) -> Any:
        tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": oid} for tag, oid in repo.tags.items()]
        return {"branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": repo.head.oid}], "converts": [],
                "tags": tags}  # fmt: skip

    def _tag(self, name: str, repo: Repo, parts: tuple[str, ...], body: bytes) -> Any:
        """POST names a revision, DELETE takes a tag away."""
        if self.command == "DELETE":
            if repo.tags.pop(parts[0], None) is None:
                raise _Refused(404, "Tag not found", "RevisionNotFound")
            return {}
        tag = json.loads(body)["tag"]
        if tag in repo.tags:
            raise _Refused(409, "Tag reference exists already")
        repo.tags[tag] = self._at(repo, parts[0]).oid
        return {}

    def _tree(self, name: str, repo: Repo, parts: tuple[str, ...], body: bytes) -> Any:
        return [self._entry(path, *item) for path, item in sorted(self._at(repo, parts[0]).tree.items())]

    def _entry(self, path: str, content: bytes, large: bool) -> dict[str, Any]:
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if large:
            sha256 = hashlib.sha256(content).hexdigest()
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
            entry["oid"] = git_hash(pointer)
            entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": len(pointer)}
        return entry

    def _preupload(self, name: str, repo: Repo, parts: tuple[str, ...], body: bytes) -> Any:
        tree = self._at(repo, parts[0]).tree
        files = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(".safetensors") or file["size"] > 10_000_000
            held = tree.get(file["path"])
            oid = None if held is None else hashlib.sha256(held[0]).hexdigest() if held[1] else git_hash(held[0])
            files.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False,
                          "oid": oid})  # fmt: skip
        return {"files": files}

    def _batch(self, name: str, repo: Repo, parts: tuple[str, ...], body: bytes) -> Any:
        objects = []
        for item in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.state.endpoint}/storage/{item['oid']}", "header": {}},
                "verify": {"href": f"{self.state.endpoint}/{name}.git/info/lfs/verify", "header": {}},
            }
            held = item["oid"] in self.state.objects
            objects.append({"oid": item["oid"], "size": item["size"], **({} if held else {"actions": actions})})
        return {"transfer": "basic", "objects": objects}

    def _put(self, oid: str, body: bytes) -> Any:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "the bytes do not have the sha256 that was announced")
        self.state.objects[oid] = body
        return {}

    def _verify(self, name: str, repo: Repo, parts: tuple[str, ...], body: bytes) -> Any:
        asked = json.loads(body)
        if len(self.state.objects.get(asked["oid"], b"")) != asked["size"]:
            raise _Refused(404, "the object was not uploaded")
        return {}

    def _commit(self, name: str, repo: Repo, parts: tuple[str, ...], body: bytes) -> Any:
        header, *lines = [json.loads(line) for line in body.splitlines()]
        parent = header["value"].get("parentCommit")
        if parent is not None and parent != repo.head.oid:
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        changes: dict[str, tuple[bytes, bool]] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = (base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile" and value["oid"] in self.state.objects:
                changes[value["path"]] = (self.state.objects[value["oid"]], True)
            else:
                raise _Refused(400, f"cannot commit {line['key']} {value['path']}: it was not uploaded")
        commit = repo.add(header["value"]["summary"], changes)
        url = f"{self.state.endpoint}/{name}/commit/{commit.oid}"
        return {"success": True, "commitOid": commit.oid, "commitUrl": url}

    def _resolve(self, name: str, repo: Repo, parts: tuple[str, ...], body: bytes) -> Any:
        commit = self._at(repo, parts[0])
        if parts[1] not in commit.tree:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        self.commit = commit.oid
        return commit.tree[parts[1]][0]

    def _at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision)
        if commit is None:
            raise _Refused(404, "Invalid rev id", "RevisionNotFound")
        return commit
