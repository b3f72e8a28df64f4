"""A small server that speaks enough of the Hub's HTTP protocol for the real clients: repositories, commits, downloads.

Large files go over plain LFS (batch, PUT, verify), so clients run with HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_FROM = 100_000
"""Bytes from which a file counts as large."""


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    kind: str
    private: bool = False
    commits: list[Commit] = field(default_factory=list)

    def commit(self, message: str, files: dict[str, bytes]) -> Commit:
        listing = "".join(f"{name}{hashlib.sha256(data).hexdigest()}" for name, data in sorted(files.items()))
        oid = hashlib.sha1(f"{len(self.commits)}{message}{listing}".encode()).hexdigest()
        self.commits.append(Commit(oid, message, files))
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.oid == revision), None)


class LoopbackHub:
    """Repositories by `models/owner/name` and `datasets/owner/name`, and the requests that were made."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.endpoint = ""

    def create(self, kind: str, repo_id: str, private: bool = False) -> Repo:
        repo = self.repos[f"{kind}/{repo_id}"] = Repo(kind, private)
        repo.commit("initial commit", {})
        return repo

    def environment(self) -> dict[str, str]:
        """Variables under which a client in another process talks to this server."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "hf_loopbacktoken",
            "NO_PROXY": "127.0.0.1",
        }


@contextmanager
def serve() -> Iterator[LoopbackHub]:
    hub = LoopbackHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, format: str, *args: Any) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            self.hub.blobs[match[1]] = body
            return self._json({})
        if match := re.fullmatch(r"/(?:(datasets)/)?([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return self._json({"transfer": "basic", "objects": [self._upload(o) for o in json.loads(body)["objects"]]})
        if path == "/lfs-verify":
            verified = json.loads(body)
            blob = self.hub.blobs.get(verified["oid"], b"")
            right = hashlib.sha256(blob).hexdigest() == verified["oid"]
            return self._json({}, 200 if right else 422)
        if match := re.fullmatch(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(\w[\w-]*)/([^/]+)(?:/(.*))?)?", path):
            return self._api(*match.groups(), body)
        if match := re.fullmatch(r"/(?:(datasets)/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(match[1] or "models", *match.groups()[1:])
        return self._json({"error": f"no such route {path}"}, 404)

    def _create(self, asked: dict[str, Any]) -> None:
        kind = asked.get("type", "model") + "s"
        repo_id = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if f"{kind}/{repo_id}" in self.hub.repos:
            return self._json({"error": "You already created this repo", "url": f"{self.hub.endpoint}/{repo_id}"}, 409)
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.hub.create(kind, repo_id, private)
        return self._json({"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id})

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        known = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] in self.hub.blobs:
            return known
        return known | {
            "actions": {
                "upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"},
                "verify": {"href": f"{self.hub.endpoint}/lfs-verify"},
            }
        }

    def _api(
        self, kind: str, repo_id: str, action: str | None, revision: str | None, rest: str | None, body: bytes
    ) -> None:
        repo = self.hub.repos.get(f"{kind}/{repo_id}")
        if repo is None:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if action == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "lfs" if f["size"] >= LFS_FROM else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if action == "commit":
            return self._commit(repo, repo_id, body)
        commit = repo.at(revision or "main")
        if commit is None:
            return self._json({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if action in (None, "revision"):
            siblings = [{"rfilename": name} for name in sorted(commit.files)]
            info = {"id": repo_id, "sha": commit.oid, "private": repo.private, "siblings": siblings, "tags": []}
            return self._json(info | {"lastModified": "2026-01-01T00:00:00.000Z", "downloads": 0, "likes": 0})
        if action == "tree":
            return self._json(self._tree(commit, rest or ""))
        if action == "paths-info":
            text = body.decode()
            paths = json.loads(text)["paths"] if text.startswith("{") else re.findall(r"paths=([^&]+)", unquote(text))
            entries = {entry["path"]: entry for entry in self._tree(commit, "")}
            return self._json([entries[path] for path in paths if path in entries])
        return self._json({"error": f"no such action {action}"}, 404)

    def _tree(self, commit: Commit, under: str) -> list[dict[str, Any]]:
        entries: dict[str, dict[str, Any]] = {}
        for name, data in sorted(commit.files.items()):
            if under and not name.startswith(f"{under}/"):
                continue
            parts = name.split("/")
            for depth in range(1, len(parts)):
                folder = "/".join(parts[:depth])
                entries[folder] = {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            entries[name] = {"type": "file", "path": name, "size": len(data), "oid": _git_oid(data)}
            if len(data) >= LFS_FROM:
                digest = hashlib.sha256(data).hexdigest()
                entries[name]["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
        return list(entries.values())

    def _commit(self, repo: Repo, repo_id: str, body: bytes) -> None:
        files = dict(repo.commits[-1].files)
        message = ""
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        commit = repo.commit(message, files)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{commit.oid}"
        self._json({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def _resolve(self, kind: str, repo_id: str, revision: str, name: str) -> None:
        repo = self.hub.repos.get(f"{kind}/{repo_id}")
        if repo is None:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        commit = repo.at(revision)
        if commit is None:
            return self._json({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if name not in commit.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid}
            return self._json({"error": "Entry not found"}, 404, headers)
        data = commit.files[name]
        large = len(data) >= LFS_FROM
        etag = hashlib.sha256(data).hexdigest() if large else _git_oid(data)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(match[1]), int(match[2] or len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            data, status = data[start:stop], 206
        return self._send(data, status, headers | {"Content-Type": "application/octet-stream"})

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
