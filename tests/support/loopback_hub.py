"""A small server that speaks the Hub's HTTP protocol to the real clients, and fails where a test asks for it.

Models, datasets and Spaces, branches and pull requests, private and gated repositories, tokens. Large files go over
plain LFS (batch, PUT, verify), or over Xet where a client is not told HF_HUB_DISABLE_XET=1, and come from a storage
under another host name, as the Hub's do.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from support.loopback_xet import XetStorage

LFS_FROM = 100_000
"""Bytes from which a file counts as large."""

TOKEN = "hf_loopbacktokenofme"


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repo:
    private: bool = False
    granted: set[str] | None = None
    """Who has been given access, if it has to be asked for."""
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    sdk: str | None = None
    """SDK of a Space."""
    pulls: list[str] = field(default_factory=list)
    """Titles of pull requests, numbered from 1."""

    @property
    def commits(self) -> list[Commit]:
        """The commits of main."""
        return self.branches.setdefault("main", [])

    def commit(self, message: str, files: dict[str, bytes], branch: str = "main") -> Commit:
        """Add a commit whose tree is the given files."""
        history = self.branches.setdefault(branch, [])
        listing = "".join(f"{name}{hashlib.sha256(data).hexdigest()}" for name, data in sorted(files.items()))
        oid = hashlib.sha1(f"{branch}{len(history)}{message}{listing}".encode()).hexdigest()
        history.append(Commit(oid, message, files))
        return history[-1]

    def at(self, revision: str) -> Commit | None:
        """Return the commit of a branch, a pull request, or an ID."""
        if self.branches.get(revision):
            return self.branches[revision][-1]
        return next((c for history in self.branches.values() for c in history if c.oid == revision), None)


@dataclass
class Fault:
    """What goes wrong with the next requests that match."""

    pattern: str
    """Regular expression on `METHOD path`."""
    kind: str
    """A status such as 503; reset, slow, truncated, wrong bytes; lost reply: the work is done, but no answer comes."""
    times: int = 1


class LoopbackHub:
    """Repositories by `models/owner/name`, or `datasets` or `spaces`, and the requests that were made."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.sent = 0
        """Bytes of files that were sent, as a whole or in parts."""
        self.faults: list[Fault] = []
        self.users = {
            TOKEN: ("me", "write"),
            "hf_readonlytokenofme": ("me", "read"),
            "hf_tokenofsomeoneelse": ("you", "write"),
        }
        """Name and role by token."""
        self.organisations = {"club": {"me"}}
        self.endpoint = self.storage = ""
        self.xet = XetStorage(self.blobs)
        self.lock = threading.Lock()

    def create(self, kind: str, repo_id: str, private: bool = False) -> Repo:
        """Make a repository as the Hub does, with a first commit of its own."""
        repo = self.repos[f"{kind}/{repo_id}"] = Repo(private)
        repo.commit("initial commit", {})
        return repo

    def environment(self, token: str = TOKEN, xet: bool = False) -> dict[str, str]:
        """Variables under which a client in another process talks to this server, over Xet or over plain LFS."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "0" if xet else "1",
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "2ms",
            "HF_XET_TELEMETRY_ENABLED": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": token,
            "NO_PROXY": "127.0.0.1,localhost",
        }

    def owns(self, user: str | None, repo_id: str) -> bool:
        """Return whether a user may write to a repository."""
        owner = repo_id.partition("/")[0]
        return user is not None and (user == owner or user in self.organisations.get(owner, ()))

    def fault_of(self, request: str) -> str | None:
        """Return the fault of a request, and count it."""
        with self.lock:
            for fault in self.faults:
                if fault.times and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault.kind
        return None


@contextmanager
def serve() -> Iterator[LoopbackHub]:
    """Run a Hub on this machine."""
    hub = LoopbackHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    hub.storage = hub.xet.address = f"http://localhost:{server.server_port}"
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


def _oid(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if len(data) >= LFS_FROM else _git_oid(data)


REPO = r"([\w.-]+/[\w.-]+)"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body go one after the other, and would wait 40 ms for each other
    hub: LoopbackHub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = f"{self.command} {unquote(self.path)}"
        self.hub.requests.append(request)
        self.fault = self.hub.fault_of(request)
        if self.fault and self.fault.isdigit():
            headers = {"Retry-After": "1"} if self.fault == "429" else {}
            return self._json({"error": f"asked to fail with {self.fault}"}, int(self.fault), headers)
        if self.fault == "reset":
            return self._hang_up()
        if self.fault == "slow":
            time.sleep(3)
        return self._route(unquote(urlsplit(self.path).path), body)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.close()

    def _user(self) -> tuple[str | None, str]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.hub.users.get(token, (None, "none"))

    def _route(self, path: str, body: bytes) -> None:
        if path.startswith("/cas/"):
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            request = f"{self.command} {path.removeprefix('/cas')}"
            status, content = self.hub.xet.answer(request, token, self.headers.get("Range", ""), body)
            return self._json(content, status)
        if match := re.fullmatch(r"/xorb-uploads/(\w+)", path):
            status, content = self.hub.xet.upload(match[1], body)
            return self._json(content, status)
        if match := re.fullmatch(r"/xorbs/(\w+)", path):
            return self._send_range(self.hub.xet.xorbs[match[1]], {})
        if self.headers.get("Authorization") and self._user()[0] is None:
            return self._json({"error": "Invalid user token."}, 401)
        if path == "/api/whoami-v2":
            name, role = self._user()
            if name is None:
                return self._json({"error": "Invalid user token."}, 401)
            orgs = [{"name": org} for org, people in self.hub.organisations.items() if name in people]
            return self._json(
                {
                    "type": "user",
                    "name": name,
                    "orgs": orgs,
                    "auth": {"accessToken": {"role": role, "displayName": "t"}},
                }
            )
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            errors = _card_errors(json.loads(body)["content"])
            return self._json({"errors": errors, "warnings": []}, 400 if errors else 200)
        if match := re.fullmatch(r"/lfs/(\w+)", path):
            self.hub.blobs[match[1]] = body
            return self._json({})
        if match := re.fullmatch(r"/cdn/(\w+)", path):
            return self._send_range(self.hub.blobs[match[1]], {"ETag": f'"{match[1]}"'})
        if match := re.fullmatch(rf"/(?:(datasets|spaces)/)?{REPO}\.git/info/lfs/objects/batch", path):
            asked = json.loads(body)
            transfer = "xet" if "xet" in asked.get("transfers", ()) else "basic"
            return self._json({"transfer": transfer, "objects": [self._upload(o) for o in asked["objects"]]})
        if path == "/lfs-verify":
            verified = json.loads(body)
            blob = self.hub.blobs.get(verified["oid"], b"")
            right = hashlib.sha256(blob).hexdigest() == verified["oid"]
            return self._json({}, 200 if right else 422)
        if match := re.fullmatch(rf"/api/(models|datasets|spaces)/{REPO}(?:/([\w-]+)(?:/(.*))?)?", path):
            return self._api(*match.groups(), body)
        if match := re.fullmatch(rf"/(?:(datasets|spaces)/)?{REPO}/resolve/(refs/pr/\d+|[^/]+)/(.+)", path):
            return self._resolve(match[1] or "models", *match.groups()[1:])
        return self._json({"error": f"no such route {path}"}, 404)

    def _find(self, kind: str, repo_id: str, write: bool = False) -> Repo | None:
        """Return a repository if the request may read or write it; else answer the request."""
        repo = self.hub.repos.get(f"{kind}/{repo_id}")
        user, role = self._user()
        owns = self.hub.owns(user, repo_id)
        if repo is None or (repo.private and not owns):
            status = 404 if user else 401
            return self._json({"error": "Repository not found"}, status, {"X-Error-Code": "RepoNotFound"})
        if write and (not owns or role != "write"):
            return self._json({"error": "You don't have the rights to write to this repository"}, 403)
        return repo

    def _create(self, asked: dict[str, Any]) -> None:
        user, role = self._user()
        kind = asked.get("type", "model") + "s"
        repo_id = f"{asked.get('organization') or user}/{asked['name']}"
        if not self.hub.owns(user, repo_id) or role != "write":
            return self._json({"error": f"You don't have the rights to create a {kind[:-1]} under {repo_id}"}, 403)
        if f"{kind}/{repo_id}" in self.hub.repos:
            return self._json({"error": "You already created this repo", "url": f"{self.hub.endpoint}/{repo_id}"}, 409)
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        if kind == "spaces" and asked.get("sdk") not in ("static", "gradio", "docker"):
            return self._json({"error": "a Space needs an SDK: static, gradio or docker"}, 400)
        self.hub.create(kind, repo_id, private).sdk = asked.get("sdk")
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

    def _api(self, kind: str, repo_id: str, action: str | None, rest: str | None, body: bytes) -> None:
        repo = self._find(
            kind, repo_id, write=action in ("preupload", "commit", "branch", "xet-write-token", "super-squash")
        )
        if repo is None:
            return None
        if action == "branch":
            start = (json.loads(body) if body else {}).get("startingPoint") or "main"
            if rest in repo.branches:
                return self._json({"error": "Reference already exists"}, 409)
            repo.branches[str(rest)] = [commit for commit in [repo.at(start)] if commit]
            return self._json({})
        if action == "super-squash":
            history = repo.branches.get(str(rest))
            if not history:
                return self._json({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
            files = history[-1].files
            history.clear()
            repo.commit(json.loads(body)["message"], files, str(rest))
            return self._json({})
        if action == "refs":
            branches = {name: history[-1].oid for name, history in repo.branches.items() if history}
            listed = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
                for name, oid in branches.items()
                if not name.startswith("refs/")
            ]
            return self._json({"branches": listed, "converts": [], "tags": []})
        if action == "discussions" and self.command == "POST":
            repo.pulls.append(json.loads(body)["title"])
            repo.branches[f"refs/pr/{len(repo.pulls)}"] = repo.commits[-1:]
            return self._json({"num": len(repo.pulls)})
        if action == "discussions":
            entries = [
                {
                    "num": number,
                    "title": title,
                    "status": "open",
                    "isPullRequest": True,
                    "author": {"name": "me"},
                    "createdAt": "2026-01-01T00:00:00.000Z",
                    "repo": {"name": repo_id, "type": kind[:-1]},
                }
                for number, title in enumerate(repo.pulls, start=1)
            ]
            return self._json({"discussions": entries, "count": len(entries), "start": 0, "numClosedDiscussions": 0})
        if action == "preupload":
            at = repo.at(str(rest))
            there = at.files if at else {}
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "lfs" if f["size"] >= LFS_FROM else "regular",
                    "shouldIgnore": False,
                    "oid": _oid(there[f["path"]]) if f["path"] in there else None,
                }
                for f in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if action in ("xet-read-token", "xet-write-token"):
            token = self.hub.xet.token(action.split("-")[1])
            names = {"casUrl": "X-Xet-Cas-Url", "accessToken": "X-Xet-Access-Token", "exp": "X-Xet-Token-Expiration"}
            return self._json(token, headers={names[key]: str(value) for key, value in token.items()})
        if action == "commit":
            return self._commit(repo, kind, repo_id, str(rest), body)
        match = re.fullmatch(r"(refs/pr/\d+|[^/]+)(?:/(.*))?", rest or "main")
        assert match
        commit = repo.at(match[1])
        if commit is None:
            return self._json({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        if action in (None, "revision"):
            info = {"id": repo_id, "sha": commit.oid, "private": repo.private, "tags": [], "downloads": 0, "likes": 0}
            info |= {
                "gated": "manual" if repo.granted is not None else False,
                "lastModified": "2026-01-01T00:00:00.000Z",
            }
            return self._json(
                info | {"siblings": [_sibling(name, data) for name, data in sorted(commit.files.items())]}
            )
        if action == "tree":
            return self._json(_tree(commit, match[2] or "", self.hub.xet.hashes))
        if action == "paths-info":
            text = body.decode()
            paths = json.loads(text)["paths"] if text.startswith("{") else re.findall(r"paths=([^&]+)", unquote(text))
            entries = {entry["path"]: entry for entry in _tree(commit, "", self.hub.xet.hashes)}
            return self._json([entries[path] for path in paths if path in entries])
        return self._json({"error": f"no such action {action}"}, 404)

    def _commit(self, repo: Repo, kind: str, repo_id: str, branch: str, body: bytes) -> None:
        pull = "create_pr=1" in self.path
        history = repo.branches.get(branch)
        if not history:
            return self._json({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        files = dict(history[-1].files)
        message = ""
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, history[-1].oid):
                    return self._json({"error": "The parent commit is not the head of the branch"}, 412)
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    return self._json({"error": f"the content of {value['path']} was not uploaded"}, 422)
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
            elif line["key"] == "deletedFolder":
                files = {name: data for name, data in files.items() if not name.startswith(value["path"])}
        if pull:
            repo.pulls.append(message)
            branch = f"refs/pr/{len(repo.pulls)}"
        commit = repo.commit(message, files, branch)
        if self.fault == "lost reply":
            return self._hang_up()
        url = f"{self.hub.endpoint}/{'' if kind == 'models' else f'{kind}/'}{repo_id}"
        answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{url}/commit/{commit.oid}", "hookOutput": ""}
        return self._json(answer | ({"pullRequestUrl": f"{url}/discussions/{len(repo.pulls)}"} if pull else {}))

    def _resolve(self, kind: str, repo_id: str, revision: str, name: str) -> None:
        repo = self._find(kind, repo_id)
        if repo is None:
            return None
        commit = repo.at(revision)
        if commit is None:
            return self._json({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        user, _ = self._user()
        if repo.granted is not None and user not in repo.granted:
            message = f"Access to {kind[:-1]} {repo_id} is restricted. You must have access to it and be authenticated."
            return self._json({"error": message}, 403 if user else 401, {"X-Error-Code": "GatedRepo"})
        if name not in commit.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.oid}
            return self._json({"error": "Entry not found"}, 404, headers)
        data = commit.files[name]
        headers = {"X-Repo-Commit": commit.oid}
        if len(data) < LFS_FROM:
            return self._send_range(data, headers | {"ETag": f'"{_git_oid(data)}"'})
        digest = hashlib.sha256(data).hexdigest()
        self.hub.blobs[digest] = data
        headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
        if digest in self.hub.xet.hashes:
            token = f"{self.hub.endpoint}/api/{kind}/{repo_id}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": self.hub.xet.hashes[digest], "Link": f'<{token}>; rel="xet-auth"'}
        return self._send(b"", 302, headers | {"Location": f"{self.hub.storage}/cdn/{digest}"})

    def _send_range(self, data: bytes, headers: dict[str, str]) -> None:
        status = 200
        headers = headers | {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(match[1]), int(match[2] or len(data) - 1) + 1
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(data)) - 1}/{len(data)}"
            data, status = data[start:stop], 206
        with self.hub.lock:
            self.hub.sent += len(data)
        if self.fault == "wrong bytes":
            middle = len(data) // 2
            data = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        self._send(data, status, headers)

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if self.fault == "lost reply":
            return self._hang_up()
        return self._send(json.dumps(content).encode(), status, {"Content-Type": "application/json"} | (headers or {}))

    def _send(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            if self.fault == "truncated":
                self.wfile.write(data[: len(data) // 2])
                return self._hang_up()
            self.wfile.write(data)
        return None


def _sibling(name: str, data: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": _git_oid(data)}
    if len(data) >= LFS_FROM:
        entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


def _tree(commit: Commit, under: str, xet_hashes: dict[str, str]) -> list[dict[str, Any]]:
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
            if digest in xet_hashes:
                entries[name]["xetHash"] = xet_hashes[digest]
    return list(entries.values())


def _card_errors(content: str) -> list[dict[str, str]]:
    """Check a card's metadata as the Hub does where it refuses a commit."""
    match = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
    data = yaml.safe_load(match[1]) if match else {}
    errors = []
    if "license" in data and not re.fullmatch(r"[a-z0-9.-]+", str(data["license"])):
        errors.append({"message": f'"license" must be an ID: {data["license"]}'})
    for model in data.get("model-index", []):
        for result in model["results"]:
            if not {"type"} <= result["task"].keys() or not {"type", "name"} <= result["dataset"].keys():
                errors.append({"message": '"model-index[0].results[0]" lacks a task or a dataset'})
            if not all({"type", "value"} <= metric.keys() for metric in result["metrics"]):
                errors.append({"message": '"model-index[0].results[0].metrics" lacks a type or a value'})
    return errors
