"""A stand-in for the hub: what huggingface_hub asks of it to make a repository, commit to it and download from it.

A server on this machine that keeps everything in memory. It wants a token, knows branches and commits, and stores files that are
uploaded as LFS objects under their hash, which it checks.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "standin" * 5
OWNER = "somebody"


@dataclass
class Repository:
    """Branches, and the files of each commit."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]

    def commit(self, branch: str, changed: dict[str, bytes]) -> str:
        files = {**self.commits.get(self.branches.get(branch, ""), {}), **changed}
        named = "".join(f"{name}{hashlib.sha1(content).hexdigest()}" for name, content in sorted(files.items()))
        self.branches[branch] = sha = hashlib.sha1(f"{len(self.commits)}{named}".encode()).hexdigest()
        self.commits[sha] = files
        return sha


@dataclass
class Hub:
    """The repositories of a stand-in; `failing` says which paths it answers with an error of its own."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS
    failing: Callable[[str], bool] = lambda path: False
    asked: list[str] = field(default_factory=list)


@contextmanager
def serving() -> Iterator[Hub]:
    """Run a stand-in until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, content: Any = None, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str = "") -> None:
        self.answer({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code} if code else {})

    def handle_any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.failing(path):
            return self.refuse(500)
        writes = self.command in ("POST", "PUT") and "/lfs/" not in path and path != "/api/validate-yaml"
        if writes and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401)
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                return getattr(self, method)(body, *found.groups())
        return self.refuse(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked.get('organization') or OWNER}/{asked['name']}"
        if asked.get("organization") not in (None, OWNER):
            return self.refuse(403)
        known = name in self.hub.repositories
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        if not known:
            self.hub.repositories[name] = Repository(private)
            self.hub.repositories[name].commit("main", {".gitattributes": b""})
        return self.answer({"url": f"{self.hub.url}/{name}", "name": name}, 409 if known else 200)

    def branch(self, body: bytes, name: str, branch: str) -> None:
        found = self.hub.repositories[name]
        if branch in found.branches:
            return self.refuse(409)
        found.branches[branch] = found.branches["main"]
        return self.answer({})

    def validate(self, body: bytes) -> None:
        self.answer({"errors": [], "warnings": []})

    def preupload(self, body: bytes, name: str, revision: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self.answer({"files": files})

    def batch(self, body: bytes, name: str) -> None:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self.answer({"transfer": "basic", "objects": objects})

    def put_object(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.answer({})

    def commit(self, body: bytes, name: str, branch: str) -> None:
        changed: dict[str, bytes] = {}
        for line in body.decode().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                changed[value["path"]] = self.hub.objects[value["oid"]]
        sha = self.hub.repositories[name].commit(branch, changed)
        self.answer({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{name}/commit/{sha}"})

    def _found(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repository = self.hub.repositories.get(name)
        hidden = repository is not None and repository.private and self.headers.get("Authorization") is None
        if repository is None or hidden:
            self.refuse(401, "RepoNotFound")
            return None
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            self.refuse(404, "RevisionNotFound")
            return None
        return sha, repository.commits[sha]

    def resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        found = self._found(name, revision)
        if found is None:
            return None
        sha, files = found
        if path not in files:
            return self.answer({}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        etag = hashlib.sha256(files[path]).hexdigest()
        return self.answer(files[path], headers={"X-Repo-Commit": sha, "ETag": f'"{etag}"'})

    def info(self, body: bytes, name: str, revision: str | None = None) -> None:
        found = self._found(name, revision or "main")
        if found is not None:
            siblings = [{"rfilename": path} for path in found[1]]
            self.answer({"id": name, "sha": found[0], "siblings": siblings, "private": False, "tags": []})

    def tree(self, body: bytes, name: str, revision: str, folder: str | None = None) -> None:
        found = self._found(name, revision)
        if found is not None:
            inside = [path for path in found[1] if path.startswith(f"{folder}/")] if folder else list(found[1])
            if not inside:
                return self.refuse(404, "EntryNotFound")
            entries = [{"type": "file", "path": path, "size": len(found[1][path]), "oid": "0" * 40} for path in inside]
            return self.answer(entries)
        return None


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"POST /api/models/{NAME}/branch/(.+)", "branch"),
    (rf"POST /api/models/{NAME}/preupload/(.+)", "preupload"),
    (rf"POST /api/models/{NAME}/commit/(.+)", "commit"),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /lfs/(\w+)", "put_object"),
    (rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", "resolve"),
    (rf"GET /api/models/{NAME}", "info"),
    (rf"GET /api/models/{NAME}/revision/([^/]+)", "info"),
    (rf"GET /api/models/{NAME}/tree/([^/]+)(?:/(.+))?", "tree"),
)
