"""A Hugging Face hub on loopback: the endpoints that `snapshot_download` asks, over files in memory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Repository:
    files: dict[str, bytes]
    token: str = ""
    """What the Authorization header must carry; empty: anybody may read."""
    is_gated: bool = False
    revisions: tuple[str, ...] = ("main",)


@dataclass
class Hub:
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    """Method and path of every request."""
    endpoint: str = ""

    @property
    def downloaded(self) -> set[str]:
        return {
            path.rsplit("/", 1)[1]
            for method, path in map(str.split, self.requests)
            if method == "GET" and "/resolve/" in path
        }


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._serve(has_body=True)

        def do_HEAD(self) -> None:
            self._serve(has_body=False)

        def _serve(self, *, has_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            status, headers, body = answer(hub, path, self.headers.get("Authorization", ""))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if has_body:
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: pytest's output is for failures."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


Answer = tuple[int, dict[str, str], bytes]


def answer(hub: Hub, path: str, authorization: str) -> Answer:
    is_api = path.startswith("/api/models/")
    parts = path.removeprefix("/api/models/").strip("/").split("/")
    repository = hub.repositories.get("/".join(parts[:2]))
    rest = parts[2:]
    if repository is None or (repository.token and not repository.is_gated and not may_read(repository, authorization)):
        return refusal(401, "RepoNotFound", "Repository not found")
    if rest and rest[0] in {"revision", "tree", "resolve"} and rest[1] not in (*repository.revisions, COMMIT):
        return refusal(404, "RevisionNotFound", f"Invalid rev id: {rest[1]}")
    if is_api:
        return api(repository, "/".join(parts[:2]), rest)
    if repository.is_gated and not may_read(repository, authorization):
        return refusal(403 if authorization else 401, "GatedRepo", "Access to the model is restricted")
    return resolve(repository, "/".join(rest[2:]))


def may_read(repository: Repository, authorization: str) -> bool:
    return authorization == f"Bearer {repository.token}"


def refusal(status: int, code: str, message: str) -> Answer:
    headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
    return status, headers, json.dumps({"error": message}).encode()


def api(repository: Repository, name: str, rest: list[str]) -> Answer:
    if rest[:1] == ["tree"]:
        value: object = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in repository.files.items()
        ]
    else:
        value = {
            "_id": "1",
            "id": name,
            "modelId": name,
            "sha": COMMIT,
            "private": bool(repository.token),
            "gated": "manual" if repository.is_gated else False,
            "siblings": [{"rfilename": path} for path in repository.files],
        }
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def resolve(repository: Repository, path: str) -> Answer:
    data = repository.files.get(path)
    if data is None:
        return refusal(404, "EntryNotFound", f"no file {path}")
    return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}, data
