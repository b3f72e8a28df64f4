"""Datasets given as the URL of a file: downloaded to the cache, and opened there as a local file.

A URL may contain secrets: a user and password, or a query that is signed. Only `download` uses these; messages, logs,
records and cards have the public name.
"""

import hashlib
import importlib
import logging
import re
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

from filelock import FileLock
from huggingface_hub.errors import HTTPError

from resnext_hub.data.sources import archives
from resnext_hub.data.sources.http import http_get
from resnext_hub.data.sources.table_files import LABEL_TABLES
from resnext_hub.errors import RequestError, RunError, one_line, setting
from resnext_hub.files import new_folder, read_json, write_json
from resnext_hub.machine import cache_folder
from resnext_hub.text import printable

SCHEMES = ("https", "http", "hf", "s3")
"""Schemes of URLs that can be downloaded."""

SUFFIXES = (*archives.SUFFIXES, *LABEL_TABLES)
"""Suffixes of files that can be datasets."""

_PACKAGES = {"s3": "s3fs"}
"""The packages that fsspec needs for a scheme, apart from those that this package needs."""

_VERSION_KEYS = ("ETag", "etag", "blob_id", "xet_hash", "LastModified", "last_modified", "mtime")
"""What file systems of fsspec state about the version of a file."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Version:
    """What a server states about the version of a file; None where it does not."""

    etag: str | None = None
    modified: str | None = None
    size: int | None = None
    """Bytes."""
    request: str = ""
    """Digest of the whole URL."""

    def is_same(self, other: "Version") -> bool:
        """Return whether two versions are the same; if the server states nothing, those of the same URL are."""
        stated = (self.etag, self.modified) != (None, None)
        return (self.etag, self.modified, self.size) == (other.etag, other.modified, other.size) and (
            stated or self.request == other.request
        )


def is_url(dataset: str) -> bool:
    """Return whether a dataset is given as a URL, of whatever scheme."""
    return re.match(r"[a-z][a-z0-9+.-]*://", dataset, re.IGNORECASE) is not None


def public_name(dataset: str) -> str:
    """Return a dataset as it was given, without the user, password, query and fragment of a URL."""
    if not is_url(dataset):
        return dataset
    scheme, rest = dataset.split("://", 1)
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme.lower()}://{host.rpartition('@')[2]}{slash}{path}"


def check_url(dataset: str) -> None:
    """Check that a URL can be downloaded, before anything is.

    Raises:
        RequestError: If its scheme is not supported, a package is missing, or it is not that of a file of a dataset.
    """
    name = public_name(dataset)
    where = setting("dataset", name)
    scheme = name.partition(":")[0]
    if scheme == "file":
        raise RequestError(f"{where}: use the path of the file, without file://")
    if scheme not in SCHEMES:
        raise RequestError(
            f"{where}: the scheme {printable(scheme)}:// is not supported; expected one of "
            f"{', '.join(f'{known}://' for known in SCHEMES)}"
        )
    if scheme == "hf" and not re.fullmatch(r"hf://datasets/[^/]+/[^/]+/.+", name):
        raise RequestError(
            f"{where}: expected a file in a dataset, such as hf://datasets/owner/name/data.zip; for a whole dataset on "
            f"the Hub, use {setting('dataset', 'owner/name')}"
        )
    if not _file_name(name).lower().endswith(SUFFIXES):
        raise RequestError(
            f"{where} is not the URL of a dataset file; expected a file name that ends in one of {' '.join(SUFFIXES)}"
        )
    package = _PACKAGES.get(scheme)
    if package and find_spec(package) is None:
        raise RequestError(f"{where}: {scheme}:// needs the package {package}; pip install {package}")


def download(dataset: str) -> Path:
    """Download the file at a URL to the cache, unless its current version is there, and return its path.

    If the server cannot be reached or does not deliver the file, or with HF_HUB_OFFLINE=1, an earlier copy is used.

    Raises:
        RequestError: If the server does not have the file, or does not allow access to it.
        RunError: If it cannot be reached, or the cache cannot be written.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE

    name = public_name(dataset)
    file = _file_name(name)
    key = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16]
    folder = cache_folder() / "downloads" / f"{file}-{key}"
    copy = folder / "content" / file
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            known = _version_of(folder, copy)
            if HF_HUB_OFFLINE and known is None:
                raise RunError(f"{printable(name)} is not in the cache, and HF_HUB_OFFLINE=1 forbids downloading it")
            if not HF_HUB_OFFLINE:
                _refresh(dataset, folder, known)
    except OSError as error:
        raise RunError(
            f"{printable(name)} cannot be downloaded to {printable(folder)}: {error.strerror or one_line(error)}; set "
            "RESNEXT_HUB_CACHE to a folder with enough space"
        ) from error
    return copy


def _file_name(url: str) -> str:
    """Return the last part of a URL as the name of a file that is not hidden."""
    return re.sub(r"[^\w.-]+", "_", unquote(url.rpartition("/")[2])).lstrip(".")[-200:]


def _version_of(folder: Path, copy: Path) -> Version | None:
    """Return the version of the copy in the cache, or None if there is none or it is incomplete."""
    try:
        known = read_json(folder / "version.json", Version, "delete it")
        complete = copy.is_file() and known.size in (None, copy.stat().st_size)
    except RequestError:
        return None
    return known if complete else None


def _refresh(dataset: str, folder: Path, known: Version | None) -> None:
    """Replace the copy in the cache if the server has another version."""
    name = public_name(dataset)
    get = _get_http if name.startswith("http") else _get_fsspec
    try:
        with new_folder(folder) as aside:
            (aside / "content").mkdir()
            version = get(dataset, aside / "content" / _file_name(name), known)
            write_json(aside / "version.json", asdict(version))
    except _CurrentCopy:
        _logger.info("%s: using the copy in the cache, which is up to date", printable(name))
    except (RequestError, RunError) as error:
        if known is None:
            raise
        _logger.warning("%s; using the copy in the cache", error)


class _CurrentCopy(Exception):
    """The copy in the cache is the version that the server has."""


def _get_http(dataset: str, target: Path, known: Version | None) -> Version:
    """Download a file over HTTP; see `_refresh`."""
    name = public_name(dataset)
    etag = known.etag if known else None
    with http_get(dataset, name, etag) as response:
        if response.status == 304:
            raise _CurrentCopy
        length = response.headers["Content-Length"] or ""
        version = Version(
            etag=response.headers["ETag"],
            modified=response.headers["Last-Modified"],
            size=int(length) if length.isdecimal() else None,
            request=_digest(dataset),
        )
        if known and version.is_same(known):
            raise _CurrentCopy
        _log_size(name, version.size)
        response.save(target)
    return _with_size(version, target, name)


def _get_fsspec(dataset: str, target: Path, known: Version | None) -> Version:
    """Download a file from a file system of fsspec; see `_refresh`."""
    import fsspec

    name = public_name(dataset)
    failed: tuple[type[Exception], ...] = (OSError, HTTPError, ValueError, RuntimeError, *_errors_of(name))
    try:
        system, path = fsspec.core.url_to_fs(name)
        info = system.info(path)
        if info.get("type") == "directory":
            raise RequestError(f"{printable(name)} is a folder; expected a file")
        version = Version(
            etag=next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), None),
            size=info.get("size"),
            request=_digest(dataset),
        )
        if known and version.is_same(known):
            raise _CurrentCopy
        _log_size(name, version.size)
        system.get_file(path, str(target))
    except (FileNotFoundError, PermissionError) as error:
        raise RequestError(f"{printable(name)} does not exist, or you cannot access it") from error
    except (RequestError, RunError):
        raise
    except failed as error:
        raise RunError(f"{printable(name)} could not be downloaded: {one_line(error)}; retry later") from error
    return _with_size(version, target, name)


def _errors_of(name: str) -> tuple[type[Exception], ...]:
    """Return the exceptions that a package raises besides the usual ones."""
    if not name.startswith("s3:") or find_spec("botocore") is None:
        return ()
    return (importlib.import_module("botocore.exceptions").BotoCoreError,)


def _with_size(version: Version, target: Path, name: str) -> Version:
    """Return the version with the size of the file.

    Raises:
        RunError: If the file is truncated.
    """
    size = target.stat().st_size
    if version.size not in (None, size):
        raise RunError(f"{printable(name)} was truncated: received {size} of {version.size} bytes; retry later")
    return version


def _log_size(name: str, size: int | None) -> None:
    _logger.info("downloading %s (%s)", printable(name), "unknown size" if size is None else f"{size / 1e6:,.1f} MB")


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode(errors="surrogateescape")).hexdigest()
