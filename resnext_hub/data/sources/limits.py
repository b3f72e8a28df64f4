"""Limits against decompression bombs: how much an archive may contain in relation to its own size."""

from pathlib import Path

MAX_RATIO = 200
"""Greatest size of the content, as a multiple of the size of the archive; images are hardly ever compressed by it."""

SPARE_BYTES = 1 << 30
"""Size of the content that is accepted in any case."""


def content_limit(path: Path) -> int:
    """Return the most bytes that an archive may contain: files, headers, and what is skipped."""
    return SPARE_BYTES + MAX_RATIO * path.stat().st_size


def require_room(left: int) -> None:
    """Raise ValueError if the bytes that are left of a limit are less than zero."""
    if left < 0:
        raise ValueError(
            f"its content is more than {MAX_RATIO} times as large as the archive itself, so the archive may be a "
            "decompression bomb; if you trust it, unpack it and use the folder"
        )
