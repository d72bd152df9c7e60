"""A Hugging Face hub on this machine: serves folders by the protocol of huggingface_hub."""

from __future__ import annotations

import base64
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
        self.tokens: dict[str, str] = {}
        """Who may write below their own name, by token."""
        self.public: set[str] = set()
        """Models that everybody sees, of those that were pushed."""
        self.stored: dict[str, bytes] = {}
        """Contents of large files that were sent, by their sha256."""
        self.refused = 0
        """How many of the next large files are not taken, since the hub fails."""

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

    def do_POST(self) -> None:
        self._take(self._body())

    def do_PUT(self) -> None:
        self._take(self._body())

    def log_message(self, *args: Any) -> None: ...

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _take(self, body: bytes) -> None:
        """What is pushed: a new repository, questions about files, large files, and commits."""
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[0] == "large":
            if self.server.refused:
                self.server.refused -= 1
                self._refuse(400, "The storage fails")
            else:
                self.server.stored[parts[1]] = body
                self._json({})
            return
        content = [json.loads(line) for line in body.splitlines()] if parts[-2:-1] == ["commit"] else json.loads(body)
        who = self._who()
        if parts[:2] == ["api", "validate-yaml"]:
            self._json({"errors": [], "warnings": []})
        elif who is None:
            self._refuse(401, "Invalid credentials in Authorization header")
        elif path == "/api/repos/create":
            self._create(content, who)
        elif parts[-3:] == ["lfs", "objects", "batch"]:
            self._json({"objects": [self._instruction(each) for each in content["objects"]], "transfer": "basic"})
        else:
            self._commit(parts, content, who)

    def _create(self, content: dict[str, Any], who: str) -> None:
        name = f"{content['organization'] or who}/{content['name']}"
        if not name.startswith(f"{who}/"):
            self._refuse(
                403, f"You don't have the rights to create a model under the namespace {content['organization']}"
            )
            return
        if (self.server.root / name).is_dir():
            self._refuse(409, "You already created this model repo")
            return
        (self.server.root / name).mkdir(parents=True)
        if content.get("visibility") != "private":
            self.server.public.add(name)
        self._json({"url": f"{self.server.endpoint}/{name}", "name": name})

    def _instruction(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.server.stored:
            return wanted
        return wanted | {"actions": {"upload": {"href": f"{self.server.endpoint}/large/{wanted['oid']}"}}}

    def _commit(self, parts: list[str], content: Any, who: str) -> None:
        name, folder = "/".join(parts[2:4]), self.server.root.joinpath(*parts[2:4])
        if not name.startswith(f"{who}/"):
            self._refuse(403, "You don't have the rights")
            return
        if parts[4] == "preupload":
            modes = [(each["path"], "lfs" if each["path"].endswith(LARGE) else "regular") for each in content["files"]]
            self._json({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]})
            return
        for line in content[1:]:
            value = line["value"]
            (folder / value["path"]).parent.mkdir(parents=True, exist_ok=True)
            large = line["key"] == "lfsFile"
            data = self.server.stored[value["oid"]] if large else base64.b64decode(value["content"])
            (folder / value["path"]).write_bytes(data)
        commit = hashlib.sha1(name.encode()).hexdigest()
        self._json(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.server.endpoint}/{name}/commit/{commit}"}
        )

    def _who(self) -> str | None:
        return self.server.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[0] == "cdn":
            self._send(self.server.root.joinpath(*parts[1:]), {})
            return
        if path == "/api/whoami-v2":
            who = self._who()
            if who:
                self._json({"type": "user", "name": who})
            else:
                self._refuse(401, "Invalid credentials in Authorization header")
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
            seen = {"private": bool(self.server.tokens) and called not in self.server.public}
            self._json({"id": called, "sha": commit, "siblings": siblings} | seen)
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
