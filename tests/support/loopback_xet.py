"""The storage behind a Hub's large files as hf_xet speaks to it: xorbs of chunks, and shards that make files of them.

Follows the Xet protocol (https://huggingface.co/docs/xet) as far as clients use it, those of today and those that knew
neither grants for uploads nor the second versions of the routes. Hashes are taken as given; what a commit names, the
SHA-256, is computed. No chunk is offered for deduplication across repositories.
"""

import hashlib
import itertools
import json
import re
import struct
import time
from typing import Any, NamedTuple

import lz4.frame

TOKEN = "xetloopbacktokento"
"""Of which a token begins; `read` or `write` and a number follow."""

ENTRY = 48
"""Bytes of every entry of a shard, and of its header."""


class Segment(NamedTuple):
    """A part of a file: chunks of one xorb."""

    xorb: str
    start: int
    end: int
    length: int
    """In bytes of the file."""


class Refusal(Exception):
    """A request that the storage answers with an error.

    Args:
        status: Of the answer.
        message: What was wrong.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class XetStorage:
    """Xorbs and files by their hashes.

    Args:
        blobs: Contents by SHA-256, where every file goes that is uploaded whole.
    """

    def __init__(self, blobs: dict[str, bytes]) -> None:
        self.blobs = blobs
        self.xorbs: dict[str, bytes] = {}
        self.files: dict[str, list[Segment]] = {}
        self.hashes: dict[str, str] = {}
        """The Xet hash of a content by its SHA-256."""
        self.grants: dict[str, int] = {}
        """How long what may be uploaded is, by the grant's ID."""
        self.uploads: dict[str, bytes] = {}
        """What has come by a grant, and is kept when the client commits it."""
        self.address = ""
        self._numbers = itertools.count(1)

    def clear(self) -> None:
        """Forget everything."""
        for kept in (self.xorbs, self.files, self.hashes, self.grants, self.uploads):
            kept.clear()

    def token(self, scope: str) -> dict[str, Any]:
        """Return what a client needs in order to `read` or `write`."""
        token = f"{TOKEN}{scope}{next(self._numbers)}"
        return {"casUrl": f"{self.address}/cas", "accessToken": token, "exp": int(time.time()) + 3600}

    def answer(self, request: str, token: str, asked: str, body: bytes) -> tuple[int, Any]:
        """Do what a request asks for; return the status and the content of the answer.

        Args:
            request: `METHOD /v1/…`.
            token: Of the request.
            asked: Value of its header Range.
            body: What it brings.
        """
        scope = "read" if request.startswith("GET") else "write"
        if not token.startswith(f"{TOKEN}{scope}") and not token.startswith(f"{TOKEN}write"):
            return 401, {"error": f"a token to {scope} is needed"}
        try:
            if match := re.fullmatch(r"POST /v1/xorb-grants/default/(\w+)", request):
                return self._grant(match[1], json.loads(body)["length"])
            if match := re.fullmatch(r"POST /v1/xorb-commits/default/(\w+)/grant/(\w+)", request):
                if match[2] not in self.uploads:
                    raise Refusal(404, "nothing was uploaded")
                return 200, {"was_inserted": self._keep(match[1], self.uploads[match[2]])}
            if match := re.fullmatch(r"POST /(?:v1/)?xorbs/default/(\w+)", request):
                return 200, {"was_inserted": self._keep(match[1], body)}
            if match := re.fullmatch(r"POST /(?:v1/|v2/|)shards", request):
                self._assemble(body)
                return 200, {"type": "result"} if "/v2/" in request else {"result": 1}
            if match := re.fullmatch(r"GET /(?:(v1|v2)/)?reconstructions/(\w+)", request):
                return 200, self._reconstruction(match[2], asked, match[1] or "v1")
        except Refusal as error:
            return error.status, {"error": str(error)}
        return 404, {"error": f"no such route {request}"}

    def upload(self, grant: str, body: bytes) -> tuple[int, Any]:
        """Take what was granted to be uploaded."""
        if len(body) != self.grants[grant]:
            return 400, {"error": f"{self.grants[grant]} bytes were granted, {len(body)} came"}
        self.uploads[grant] = body
        return 200, {}

    def _grant(self, xorb: str, length: int) -> tuple[int, Any]:
        if xorb in self.xorbs:
            return 200, {}
        grant = f"{next(self._numbers)}"
        self.grants[grant] = length
        return 201, {"id": grant, "method": "PUT", "url": f"{self.address}/xorb-uploads/{grant}", "headers": {}}

    def _keep(self, xorb: str, data: bytes) -> bool:
        is_new = xorb not in self.xorbs
        _chunks(data)  # so that what is no xorb is refused
        self.xorbs[xorb] = data
        return is_new

    def _assemble(self, shard: bytes) -> None:
        for name, segments, digest in _files_of(shard):
            missing = {segment.xorb for segment in segments} - self.xorbs.keys()
            if missing:
                raise Refusal(400, f"the shard needs xorbs that are not here: {', '.join(sorted(missing))}")
            content = b"".join(map(self._content, segments))
            found = hashlib.sha256(content).hexdigest()
            if digest not in (None, found):
                raise Refusal(400, f"the content has the SHA-256 {found}, and the shard says {digest}")
            self.files[name] = segments
            self.blobs[found] = content
            self.hashes[found] = name

    def _content(self, segment: Segment) -> bytes:
        data = self.xorbs[segment.xorb]
        bounds = _chunks(data)[segment.start : segment.end]
        content = b"".join(_unpack(data[start:end]) for start, end in bounds)
        if len(content) != segment.length:
            raise Refusal(400, f"a segment has {len(content)} bytes, and the shard says {segment.length}")
        return content

    def _reconstruction(self, name: str, asked: str, version: str) -> dict[str, Any]:
        if name not in self.files:
            raise Refusal(404, f"no file {name}")
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", asked)
        first, last = (int(match[1]), int(match[2])) if match else (0, sum(s.length for s in self.files[name]) - 1)
        terms, start, offset = [], 0, 0
        for segment in self.files[name]:
            if start <= last and start + segment.length > first:
                offset = offset if terms else first - start
                terms.append(segment)
            start += segment.length
        if not terms:
            raise Refusal(416, f"the file has {start} bytes")
        fetches: dict[str, list[dict[str, Any]]] = {}
        for segment in dict.fromkeys(terms):
            bounds = _chunks(self.xorbs[segment.xorb])
            chunks = {"start": segment.start, "end": segment.end}
            places = {"start": bounds[segment.start][0], "end": bounds[segment.end - 1][1] - 1}
            url = f"{self.address}/xorbs/{segment.xorb}"
            fetch = {"range": chunks, "url": url, "url_range": places}
            if version == "v2":
                fetch = {"url": url, "ranges": [{"chunks": chunks, "bytes": places}]}
            fetches.setdefault(segment.xorb, []).append(fetch)
        listed = [
            {"hash": s.xorb, "unpacked_length": s.length, "range": {"start": s.start, "end": s.end}} for s in terms
        ]
        return {
            "offset_into_first_range": offset,
            "terms": listed,
            "xorbs" if version == "v2" else "fetch_info": fetches,
        }


def _hex(raw: bytes) -> str:
    """Write a hash as the protocol does: four numbers, each of eight bytes, the last of which is the highest."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def _chunks(xorb: bytes) -> list[tuple[int, int]]:
    """Return where each chunk begins and ends, its header included."""
    bounds, start = [], 0
    while start < len(xorb) and xorb[start : start + 7] != b"XETBLOB":  # the name of the footer that may follow
        if xorb[start] != 0 or start + 8 > len(xorb):
            raise Refusal(400, f"no chunk at {start} of a xorb")
        end = start + 8 + int.from_bytes(xorb[start + 1 : start + 4], "little")
        if end > len(xorb):
            raise Refusal(400, "a xorb ends within a chunk")
        bounds.append((start, end))
        start = end
    return bounds


def _unpack(chunk: bytes) -> bytes:
    """Return the content of a chunk, whose header states the scheme: none, LZ4, or LZ4 of bytes grouped by four."""
    scheme, length, data = chunk[4], int.from_bytes(chunk[5:8], "little"), chunk[8:]
    if scheme in (1, 2):
        data = lz4.frame.decompress(data)
    if scheme == 2:
        grouped, data, start = data, bytearray(len(data)), 0
        for place in range(4):
            count = len(data[place::4])
            data[place::4] = grouped[start : start + count]
            start += count
    if scheme > 2 or len(data) != length:
        raise Refusal(400, f"a chunk of scheme {scheme} has {len(data)} bytes, and its header says {length}")
    return bytes(data)


def _files_of(shard: bytes) -> list[tuple[str, list[Segment], str | None]]:
    """Return the files that a shard describes: Xet hash, segments, and SHA-256 if it is there."""
    if not shard.startswith(b"HFRepoMetaData\0"):
        raise Refusal(400, "no shard")
    files, at = [], ENTRY
    while shard[at : at + 32] != b"\xff" * 32:
        name, (flags, count) = _hex(shard[at : at + 32]), struct.unpack_from("<2I", shard, at + 32)
        segments = []
        for _ in range(count):
            at += ENTRY
            _, length, start, end = struct.unpack_from("<4I", shard, at + 32)
            segments.append(Segment(_hex(shard[at : at + 32]), start, end, length))
        at += ENTRY * (1 + (count if flags >> 31 else 0))  # hashes of the segments, which are not checked here
        digest = None
        if flags >> 30 & 1:
            digest = _hex(shard[at : at + 32])
            at += ENTRY
        files.append((name, segments, digest))
    return files
