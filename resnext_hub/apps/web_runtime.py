"""The files of ONNX Runtime Web, from npm's package of a pinned version, whose integrity is checked."""

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from resnext_hub.errors import RequestError, RunError, setting
from resnext_hub.files import FileTooLargeError, read_regular, write_atomic
from resnext_hub.machine import cache_folder
from resnext_hub.text import printable

VERSION = "1.30.0"
"""Version of ONNX Runtime Web."""

INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""Hash of the package, as npm's registry lists it."""

PACKAGE = f"onnxruntime-web@{VERSION}"

ARCHIVE = f"onnxruntime-web-{VERSION}.tgz"
"""Name of the file that `npm pack` writes."""

MEMBERS = {
    "ort.js": "package/dist/ort.wasm.bundle.min.mjs",  # some servers know no type for .mjs, and browsers insist on one
    "ort-wasm-simd-threaded.wasm": "package/dist/ort-wasm-simd-threaded.wasm",
}
"""Files of the package that a page needs to run a model on the CPU, by the names that they get."""

SECONDS = 300
"""Most time for the download."""

_MOST_BYTES = 1 << 28


def runtime_files(archive: Path | None) -> dict[str, bytes]:
    """Return the files of ONNX Runtime Web that a page needs, by name.

    Args:
        archive: The package, as `npm pack` writes it; if not given, it is downloaded by npm once, and cached.

    Raises:
        RequestError: If the archive is not the pinned package, or is not given and npm is not installed.
        RunError: If npm cannot download the package.
    """
    path = archive or cache_folder() / ARCHIVE
    if archive is None and not (path.is_file() and _has_integrity(path)):
        _download(path)
    if not _has_integrity(path):
        raise RequestError(
            f"{setting('onnxruntime_web', path)} is not {PACKAGE}: its hash differs; expected the file that "
            f"`npm pack {PACKAGE}` writes"
        )
    with tarfile.open(path) as package:
        return {name: _content(package, member) for name, member in MEMBERS.items()}


def _content(package: tarfile.TarFile, member: str) -> bytes:
    file = package.extractfile(member)
    assert file is not None, member  # the hash says that it is there
    return file.read()


def _has_integrity(path: Path) -> bool:
    try:
        content = read_regular(path, _MOST_BYTES)
    except FileTooLargeError:
        return False
    except OSError as error:
        raise RequestError(f"{printable(path)} cannot be read: {error.strerror or error}") from error
    return f"sha512-{base64.b64encode(hashlib.sha512(content).digest()).decode()}" == INTEGRITY


def _download(path: Path) -> None:
    """Have npm download the package to a path.

    Raises:
        RequestError: If npm is not installed.
        RunError: If npm fails.
    """
    npm = shutil.which("npm")
    by_hand = f"run `npm pack {PACKAGE}` on a machine where it works, and use {setting('onnxruntime_web', ARCHIVE)}"
    if npm is None:
        raise RequestError(f"the page needs the npm package {PACKAGE}, but npm is not installed; {by_hand}")
    with tempfile.TemporaryDirectory() as scratch:
        words = [npm, "pack", PACKAGE, "--ignore-scripts", "--pack-destination", scratch]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, cwd=scratch, check=False)
        except subprocess.TimeoutExpired as error:
            raise RunError(f"npm did not download {PACKAGE} within {SECONDS} s; {by_hand}") from error
        found = Path(scratch, ARCHIVE)
        if done.returncode or not found.is_file():
            reason = printable(" ".join(done.stderr.split()))[:200] or f"exit code {done.returncode}"
            raise RunError(f"npm cannot download {PACKAGE} ({reason}); {by_hand}")
        os.makedirs(path.parent, exist_ok=True)
        write_atomic(path, found.read_bytes())
