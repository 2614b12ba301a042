"""A Hub on this machine, as far as its clients need one: models are created, committed to, listed and fetched."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

USER = "me"


class HubServer(ThreadingHTTPServer):
    """A Hub with one user, `me`, and no revisions.

    Attributes:
        endpoint: address, for HF_ENDPOINT.
        files: the contents of each file of each model and Space, {"me/name": {"folder/file": bytes}}.
        created: what was asked for when a model was created, by model.
        large: contents that came as large files (LFS), by SHA-256.
        failing: paths that answer 500, as regular expressions.
        tokens: who may write; anyone, if there are none.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, dict[str, bytes]] = {}
        self.created: dict[str, dict[str, Any]] = {}
        self.large: dict[str, bytes] = {}
        self.failing: list[str] = []
        self.tokens: set[str] = set()

    def commit_id(self, model: str) -> str:
        return hashlib.sha1(repr(sorted(self.files[model].items())).encode()).hexdigest()

    def is_private(self, model: str) -> bool:
        asked = self.created[model]  # in the words of huggingface_hub 2, or of 1
        return asked.get("visibility") == "private" or asked.get("private") is True


@contextmanager
def running_hub() -> Iterator[HubServer]:
    with HubServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._route("GET")

    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        body = self._body()
        if any(re.search(pattern, self.path) for pattern in self.server.failing):
            return self._send(HTTPStatus.INTERNAL_SERVER_ERROR, {"error": "out of order"})
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if method == "POST" and self.server.tokens and token not in self.server.tokens:
            return self._send(HTTPStatus.UNAUTHORIZED, {"error": "Invalid username or password."})
        for wanted, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, urlsplit(self.path).path)
            if wanted == method and match:
                names = {name: unquote(value) for name, value in match.groupdict().items() if value}
                if method == "GET" and names["model"] not in self.server.files:
                    return self._send(HTTPStatus.NOT_FOUND, {}, {"X-Error-Code": "RepoNotFound"})
                return answer(self, body, **names)
        return self._send(HTTPStatus.NOT_IMPLEMENTED, {"error": f"{method} {self.path}"})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        model = f"{asked['organization'] or USER}/{asked['name']}"
        status = HTTPStatus.CONFLICT if model in self.server.files else HTTPStatus.OK
        self.server.files.setdefault(model, {})
        self.server.created.setdefault(model, asked)
        self._send(status, {"url": f"{self.server.endpoint}/{model}"})

    def validate(self, body: bytes) -> None:
        self._send(HTTPStatus.OK, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, model: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._send(HTTPStatus.OK, {"files": files})

    def large_batch(self, body: bytes, model: str) -> None:
        objects = []
        for one in json.loads(body)["objects"]:
            href = f"{self.server.endpoint}/large/{one['oid']}"
            objects.append({**one, "actions": {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}})
        self._send(HTTPStatus.OK, {"transfer": "basic", "objects": objects})

    def large_put(self, body: bytes, oid: str) -> None:
        self.server.large[oid] = body
        self._send(HTTPStatus.OK if hashlib.sha256(body).hexdigest() == oid else HTTPStatus.BAD_REQUEST, {})

    def large_verify(self, body: bytes, oid: str) -> None:
        is_there = len(self.server.large.get(oid, b"")) == json.loads(body)["size"]
        self._send(HTTPStatus.OK if is_there else HTTPStatus.NOT_FOUND, {})

    def commit(self, body: bytes, model: str) -> None:
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                self.server.files[model][value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                self.server.files[model][value["path"]] = self.server.large[value["oid"]]
        commit = self.server.commit_id(model)
        address = f"{self.server.endpoint}/{model}/commit/{commit}"
        self._send(HTTPStatus.OK, {"success": True, "commitOid": commit, "commitUrl": address})

    def information(self, body: bytes, model: str) -> None:
        siblings = [{"rfilename": name} for name in self.server.files[model]]
        self._send(
            HTTPStatus.OK,
            {
                "id": model,
                "sha": self.server.commit_id(model),
                "siblings": siblings,
                "private": self.server.is_private(model),
            },
        )

    def tree(self, body: bytes, model: str, folder: str = "") -> None:
        files = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in self.server.files[model].items()
            if not folder or name.startswith(f"{folder}/")
        ]
        self._send(HTTPStatus.OK, files)

    def resolve(self, body: bytes, model: str, name: str) -> None:
        content = self.server.files[model].get(name)
        commit = {"X-Repo-Commit": self.server.commit_id(model)}
        if content is None:
            return self._send(HTTPStatus.NOT_FOUND, {}, {**commit, "X-Error-Code": "EntryNotFound"})
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self._send(HTTPStatus.OK, content, {**commit, "ETag": tag, "X-Linked-Size": str(len(content))})


_MODEL = r"(?P<model>[^/]+/[^/]+?)"
_KIND = "(?:models|spaces)"
_ROUTES = (
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/{_KIND}/{_MODEL}/preupload/main", _Handler.preupload),
    ("POST", rf"/(spaces/)?{_MODEL}\.git/info/lfs/objects/batch", _Handler.large_batch),
    ("PUT", "/large/(?P<oid>[0-9a-f]+)", _Handler.large_put),
    ("POST", "/large/(?P<oid>[0-9a-f]+)/verify", _Handler.large_verify),
    ("POST", f"/api/{_KIND}/{_MODEL}/commit/main", _Handler.commit),
    ("GET", f"/api/{_KIND}/{_MODEL}(/revision/[^/]+)?", _Handler.information),
    ("GET", f"/api/{_KIND}/{_MODEL}/tree/[^/]+(/(?P<folder>.+))?", _Handler.tree),
    ("GET", f"/(spaces/)?{_MODEL}/resolve/[^/]+/(?P<name>.+)", _Handler.resolve),
)
