"""A hub on this machine: the requests that huggingface_hub makes for one repository at a time."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest


class FakeHub:
    """Repositories, each a list of commits: (hash, files by name). `asked`: the requests."""

    def __init__(self) -> None:
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.asked: list[str] = []
        self.private: dict[str, bool] = {}
        self.refuse: int | None = None
        self.url = ""

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        commits = self.repositories.setdefault(name, [])
        before = commits[-1][1] if commits else {}
        sha = hashlib.sha1(repr((len(commits), name, sorted(files))).encode()).hexdigest()
        commits.append((sha, {**before, **files}))
        return sha

    def at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.repositories.get(name, [])
        if revision == "main":
            return commits[-1] if commits else None
        return next((commit for commit in commits if commit[0] == revision), None)

    def fetched(self) -> set[str]:
        """Names of the files whose content was asked for."""
        lines = [line.split() for line in self.asked]
        return {path.rpartition("/")[2] for verb, path in lines if "/resolve/" in path}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _handle(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.refuse is not None:
            self._send(self.hub.refuse)
        elif self.command == "POST":
            self._post(path, body)
        elif path.startswith("api/models/"):
            self._info(path.removeprefix("api/models/"))
        else:
            self._file(path)

    do_GET = do_HEAD = do_POST = _handle

    def _info(self, path: str) -> None:
        name, _, revision = path.partition("/revision/")
        if name not in self.hub.repositories:
            self._send(404, X_Error_Code="RepoNotFound")
            return
        found = self.hub.at(name, revision or "main")
        if found is None:
            self._send(404, X_Error_Code="RevisionNotFound")
            return
        siblings = [{"rfilename": file, "size": len(data)} for file, data in found[1].items()]
        self._json({"id": name, "sha": found[0], "siblings": siblings})

    def _file(self, path: str) -> None:
        name, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        found = self.hub.at(name, revision)
        if found is None or file not in found[1]:
            self._send(404, X_Error_Code="EntryNotFound")
            return
        data = found[1][file]
        etag = f'"{hashlib.sha1(data).hexdigest()}"'
        self._send(200, data, ETag=etag, X_Repo_Commit=found[0])

    def _post(self, path: str, body: bytes) -> None:
        if path == "api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            exists = name in self.hub.repositories
            self.hub.repositories.setdefault(name, [])
            self.hub.private.setdefault(name, wanted.get("visibility") == "private")
            self._json({"url": f"{self.hub.url}/{name}"}, 409 if exists else 200)
        elif path == "api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in files
            ]
            self._json({"files": modes})
        else:
            name = path.removeprefix("api/models/").partition("/commit/")[0]
            entries = [json.loads(line) for line in body.splitlines()]
            sha = self.hub.commit(
                name,
                {
                    entry["value"]["path"]: base64.b64decode(entry["value"]["content"])
                    for entry in entries
                    if entry["key"] == "file"
                },
            )
            url = f"{self.hub.url}/{name}/commit/{sha}"
            self._json({"commitUrl": url, "commitOid": sha, "success": True})


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch, cache: str) -> Iterator[FakeHub]:
    """A hub that this process talks to, with an empty cache."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = hub.url = f"http://127.0.0.1:{server.server_port}"
    names = "huggingface_hub.constants"
    monkeypatch.setattr(f"{names}.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{names}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(f"{names}.HF_HUB_CACHE", cache)
    monkeypatch.setattr(f"{names}.HF_HUB_OFFLINE", False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
