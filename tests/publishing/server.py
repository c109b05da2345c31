"""A Hugging Face hub of a few routes, on this machine: those that a push and a download use.

It checks what it is told: tokens, owners, visibility, and the digests and sizes of large files.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKENS = {"hf_writes": ("me", True), "hf_reads": ("me", False)}
"""Owner of a token, and whether it may write."""


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0

    @property
    def commit(self) -> str:
        return hashlib.sha1(str(self.commits).encode()).hexdigest()


class Hub(ThreadingHTTPServer):
    """Serves from its construction to `close`.

    log: the requests. fail: a route, by a part of its path, that answers 500. stall: one that answers only at the end.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.log: list[str] = []
        self.fail: str | None = None
        self.stall: str | None = None
        self.ended = threading.Event()
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        self._route("POST")

    def do_GET(self) -> None:
        self._route("GET")

    def do_HEAD(self) -> None:
        self._route("GET")

    def do_PUT(self) -> None:
        self._route("PUT")

    def _route(self, method: str) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.log.append(f"{method} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user, self.writes = TOKENS.get(token, (None, False))
        if self.server.stall and self.server.stall in path:
            self.server.ended.wait()
        if self.server.fail and self.server.fail in path:
            return self._error(500, "", "out of order")
        if token and self.user is None:
            return self._error(401, "", "Invalid credentials in Authorization header")
        for verb, pattern, answer in _ROUTES:
            found = re.fullmatch(pattern, path)
            if verb == method and found:
                return answer(self, *found.groups())
        return self._error(404, "", f"no route {path}")

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):  # a client that was stopped
                self.wfile.write(content)

    def _json(self, content: object, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _repository(self, name: str, write: bool = False) -> Repository | None:
        found = self.server.repositories.get(name)
        if found is None or (found.private and self.user != name.split("/")[0]):
            self._error(404 if self.user else 401, "RepoNotFound", "Repository not found")
            return None
        if write and not self.writes:
            self._error(403, "", "the token may not write")
            return None
        return found

    def create(self) -> None:
        asked = json.loads(self.body)
        owner = asked["organization"] or self.user
        if not self.writes or owner != self.user:
            return self._error(403, "", f"You don't have the rights to create a model under {owner}")
        name = f"{owner}/{asked['name']}"
        if name in self.server.repositories:
            return self._json({"error": "exists", "url": f"{self.server.address}/{name}"}, 409)
        self.server.repositories[name] = Repository(asked.get("visibility") == "private" or asked.get("private", False))
        return self._json({"url": f"{self.server.address}/{name}", "name": name})

    def validate(self) -> None:
        good = json.loads(self.body)["content"].startswith("---\n")
        problem = [] if good else [{"message": "no front matter"}]
        self._json({"errors": problem, "warnings": []}, 200 if good else 400)

    def preupload(self, name: str) -> None:
        if self._repository(name, write=True):
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(self.body)["files"]
            ]
            self._json({"files": [{**f, "shouldIgnore": False} for f in files]})

    def batch(self, name: str) -> None:
        if self._repository(name, write=True):
            objects = json.loads(self.body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.server.address}/large/{each['oid']}"}}
            self._json({"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self._error(400, "", "another digest")
        self.server.large[oid] = self.body
        return self._json({})

    def commit(self, name: str) -> None:
        repository = self._repository(name, write=True)
        if repository is None:
            return
        for line in self.body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                content = self.server.large[value["oid"]]
                assert len(content) == value["size"]
                repository.files[value["path"]] = content
            elif key == "deletedFile":
                del repository.files[value["path"]]
        repository.commits += 1
        url = f"{self.server.address}/{name}/commit/{repository.commit}"
        self._json({"commitUrl": url, "commitOid": repository.commit})

    def tree(self, name: str) -> None:
        repository = self._repository(name)
        if repository is not None:
            files = repository.files.items()
            self._json([{"type": "file", "path": p, "oid": "0" * 40, "size": len(c)} for p, c in files])

    def info(self, name: str) -> None:
        repository = self._repository(name)
        if repository is not None:
            files = [{"rfilename": path} for path in repository.files]
            self._json({"id": name, "sha": repository.commit, "private": repository.private, "siblings": files})

    def resolve(self, name: str, revision: str, file: str) -> None:
        repository = self._repository(name)
        if repository is None:
            return
        if revision not in ("main", repository.commit):
            self._error(404, "RevisionNotFound", "Invalid rev id")
        elif file not in repository.files:
            self._error(404, "EntryNotFound", "Entry not found")
        else:
            content = repository.files[file]
            headers = {"X-Repo-Commit": repository.commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            self._send(200, content, headers)


_NAME = r"([\w.-]+/[\w.-]+)"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{_NAME}/preupload/main", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/large/(\w+)", _Handler.put),
    ("POST", f"/api/models/{_NAME}/commit/main", _Handler.commit),
    ("GET", f"/api/models/{_NAME}/tree/main", _Handler.tree),
    ("GET", f"/api/models/{_NAME}(?:/revision/main)?", _Handler.info),
    ("GET", rf"/{_NAME}/resolve/([\w.-]+)/(.+)", _Handler.resolve),
]
