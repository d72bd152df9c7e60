"""A Hugging Face hub on this machine: serves folders by the protocol of huggingface_hub."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from urllib.parse import urlsplit

LARGE = (".safetensors", ".bin", ".pth")
"""Suffixes of files that the hub stores elsewhere, and to which it redirects its clients."""


class Hub(ThreadingHTTPServer):
    """Serves the folders ``root/ORG/NAME``, each as a model with one commit, and ``root/datasets/ORG/NAME/COMMIT`` as
    commits of a data set."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.gated: set[str] = set()
        """Models and data sets whose files are for others."""
        self.heads: dict[str, str] = {}
        """The current commit of each data set."""
        self.cut: dict[str, int] = {}
        """Names of files of which only so many bytes are sent before the connection breaks, however often asked."""
        self.asked: list[str] = []
        """``METHOD PATH`` of each request."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def cdn(self) -> str:
        """Where large files are: for clients another host, to which they send no token."""
        return f"http://localhost:{self.server_address[1]}/cdn"

    def fetched(self) -> list[str]:
        """Sorted names of the files whose content was requested, each as often as it was."""
        gets = (asked.removeprefix("GET ") for asked in self.asked if asked.startswith("GET "))
        return sorted(path.rpartition("/")[2] for path in gets if "/resolve/" in path or path.startswith("/cdn/"))


@contextmanager
def hub_of(root: Path) -> Iterator[Hub]:
    """A hub with the folders in ``root``, for the duration of the context."""
    with Hub(root) as hub:
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        yield hub
        hub.shutdown()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *args: Any) -> None: ...

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[0] == "cdn":
            self._send(self.server.root.joinpath(*parts[1:]), {})
            return
        in_api = parts[0] == "api"
        parts = parts[1:] if in_api else parts
        of_data, parts = parts[0] == "datasets", parts[1:] if parts[0] in ("datasets", "models") else parts
        if len(parts) < 2:
            self._refuse(404, "Not found")
            return
        owner, name, *rest = parts
        called = f"{owner}/{name}"
        folder, commit = self.server.root / owner / name, hashlib.sha1(called.encode()).hexdigest()
        if of_data:
            asked = rest[1] if rest[1:] else "main"
            commit = self.server.heads.get(called, "") if asked == "main" else asked
            folder = self.server.root / "datasets" / owner / name
            if folder.is_dir() and not (folder / commit).is_dir():
                self._refuse(404, f"Invalid rev id: {commit}", "RevisionNotFound")
                return
            folder /= commit
        if not folder.is_dir():
            self._refuse(404, "Repository not found", "RepoNotFound")
            return
        files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
        if in_api and rest[:1] == ["tree"]:
            self._json([_described(file, path) for path, file in files.items()])
        elif in_api:
            siblings = [{"rfilename": path} for path in files]
            self._json({"id": called, "sha": commit, "siblings": siblings})
        elif called in self.server.gated:
            told = f"Access to {'dataset' if of_data else 'model'} {called} is restricted. You must be authenticated."
            self._refuse(401, told, "GatedRepo")
        elif (inner := "/".join(rest[2:])) not in files:
            self._refuse(404, "Entry not found", "EntryNotFound")
        else:
            file, about = files[inner], {"X-Repo-Commit": commit}
            if file.name.endswith(LARGE):
                linked = {"X-Linked-Size": str(file.stat().st_size), "X-Linked-ETag": f'"{_sha256(file)}"'}
                linked |= {"Content-Length": "0"}
                self._head(302, about | linked | {"Location": f"{self.server.cdn}/{called}/{inner}"})
            else:
                self._send(file, about | {"ETag": f'"{_sha256(file)[:40]}"'})

    def _send(self, file: Path, headers: dict[str, str]) -> None:
        content = file.read_bytes()
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        length = {"Content-Length": str(len(content) - begin), "Accept-Ranges": "bytes"}
        if begin:
            length["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        self._head(206 if begin else 200, headers | length)
        if self.command == "GET":
            self.wfile.write(content[begin : self.server.cut.get(file.name)])
            if file.name in self.server.cut:
                self.close_connection = True

    def _json(self, content: Any) -> None:
        body = json.dumps(content).encode()
        self._head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))})
        self.wfile.write(body)

    def _refuse(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"X-Error-Message": message, "Content-Length": "0"}
        self._head(status, headers | ({"X-Error-Code": code} if code else {}))

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _described(file: Path, path: str) -> dict[str, Any]:
    size = file.stat().st_size
    entry = {"type": "file", "path": path, "size": size, "oid": _sha256(file)[:40]}
    if file.name.endswith(LARGE):
        entry["lfs"] = {"oid": _sha256(file), "size": size, "pointerSize": 130}
    return entry
