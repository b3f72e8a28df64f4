"""Find images with the same content: exact copies, and copies that were resized, recompressed or mirrored.

Candidates have perceptual hashes (imagehash.phash) that differ in at most `MAX_DISTANCE` of 64 bits; a pair is a near
duplicate if the thumbnails agree as well. Both thresholds were chosen by measurement; docs/how-to/check.md has the
figures. Where most images have fewer pixels than the hash looks at, 32 x 32, two such images are compared for exact
copies only.
"""

from collections.abc import Iterator

import numpy as np

from resnext_hub.data.examine import Examined

MAX_DISTANCE = 10
"""Greatest number of bits in which the hashes of near duplicates differ."""

MIN_CORRELATION = 0.99
"""Least correlation of the thumbnails of near duplicates, over all pixels and colors."""

_BANDS = (11, 11, 11, 11, 10, 10)
"""Bits of each band of a hash. If two hashes differ in at most 10 bits, they differ in at most one bit of some band."""

_BLOCK = 1 << 14
"""Pairs whose thumbnails are compared at once."""

_PAIRS = 1 << 22
"""Most candidate pairs to compare at once."""


def duplicate_groups(examined: Examined) -> list[list[int]]:
    """Return groups of images with the same content, as indices of `examined.images`; each has at least two.

    Groups are connected: each member is a duplicate of another one, though not of all others.
    """
    roots = np.arange(len(examined.images))  # an image that stands for the group of each image
    members: dict[int, list[int]] = {}

    def join(first: int, second: int) -> None:
        one, other = (members.setdefault(int(root), [int(root)]) for root in (roots[first], roots[second]))
        into, smaller = (one, other) if len(one) >= len(other) else (other, one)
        root, gone = int(roots[into[0]]), int(roots[smaller[0]])
        roots[smaller] = root
        into += smaller
        del members[gone]

    copies: dict[bytes, list[int]] = {}
    for index, facts in enumerate(examined.images):
        if facts.size is not None:
            copies.setdefault(facts.digest, []).append(index)
    for group in copies.values():
        roots[group] = group[0]
        members[group[0]] = group
    # identical images are compared once
    indices = np.array([index for index in examined.comparable if roots[index] == index], dtype=np.int64)
    for first, second, is_mirrored in _close(examined.hashes[indices], examined.detailed[indices]):
        for a, b in _blocks(indices[first], indices[second]):
            apart = roots[a] != roots[b]
            a, b = a[apart], b[apart]
            for one, other in zip(*_alike(examined, a, b, is_mirrored), strict=True):
                if roots[one] != roots[other]:
                    join(one, other)
    order = np.argsort(roots, kind="stable")
    starts = np.flatnonzero(np.diff(roots[order], prepend=-1))
    return sorted(group.tolist() for group in np.split(order, starts[1:]) if len(group) > 1)


def near_duplicates(examined: Examined) -> list[tuple[int, int]]:
    """Return all pairs of images that are near duplicates, as sorted indices of `examined.images`."""
    indices = examined.comparable
    found: set[tuple[int, int]] = set()
    for first, second, is_mirrored in _close(examined.hashes[indices], examined.detailed[indices]):
        for a, b in _blocks(indices[first], indices[second]):
            pairs = zip(*_alike(examined, a, b, is_mirrored), strict=True)
            found.update((int(min(pair)), int(max(pair))) for pair in pairs)
    return sorted(found)


def _blocks(first: np.ndarray, second: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield pairs in blocks whose thumbnails take little memory."""
    for start in range(0, len(first), _BLOCK):
        yield first[start : start + _BLOCK], second[start : start + _BLOCK]


def _alike(examined: Examined, a: np.ndarray, b: np.ndarray, is_mirrored: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs whose thumbnails correlate, the second one mirrored if the hashes were."""
    theirs = examined.thumbnails[b]
    agree = (_normalized(examined.thumbnails[a]) * _normalized(theirs[:, :, ::-1] if is_mirrored else theirs)).sum(
        axis=1
    )
    return a[agree >= MIN_CORRELATION], b[agree >= MIN_CORRELATION]


def _normalized(thumbnails: np.ndarray) -> np.ndarray:
    """Return thumbnails as vectors of mean 0 and length 1, `(N, D)` float32, so that a product is a correlation."""
    vectors = thumbnails.reshape(len(thumbnails), int(np.prod(thumbnails.shape[1:]))).astype(np.float32)
    vectors -= vectors.mean(axis=1, keepdims=True)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) + 1e-6
    return vectors


def _close(hashes: np.ndarray, detailed: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, bool]]:
    """Yield pairs of a detailed image and another one whose hashes are close, and whether one of the two is mirrored.

    A pair may repeat; of two detailed images, the one with the smaller index comes first.

    Args:
        hashes: Those of each image and of its mirror image, `(N, 2)` uint64.
        detailed: Which images are detailed, `(N,)` bool.
    """
    searched = np.flatnonzero(detailed)
    for is_mirrored in (False, True):
        theirs = hashes[:, int(is_mirrored)]
        shift = 0
        for width in _BANDS:
            mask = np.uint64((1 << width) - 1)
            ours = (hashes[searched, 0] >> np.uint64(shift)) & mask
            order = np.argsort((theirs >> np.uint64(shift)) & mask, kind="stable")
            keys = ((theirs >> np.uint64(shift)) & mask)[order]
            shift += width
            for flip in (0, *(1 << bit for bit in range(width))):
                wanted = ours ^ np.uint64(flip)
                starts, ends = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
                for found, second in _expanded(starts, ends, order):
                    first = searched[found]
                    kept = (first < second) | ~detailed[second]
                    first, second = first[kept], second[kept]
                    near = np.bitwise_count(hashes[first, 0] ^ theirs[second]) <= MAX_DISTANCE
                    yield first[near], second[near], is_mirrored


def _expanded(starts: np.ndarray, ends: np.ndarray, order: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield every pair (i, order[k]) with starts[i] <= k < ends[i], at most about `_PAIRS` at once."""
    counts = ends - starts
    totals = np.cumsum(counts)
    begin = 0
    while begin < len(counts):
        before = totals[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(totals, before + _PAIRS, "right")))
        part = counts[begin:end]
        first = np.repeat(np.arange(begin, end), part)
        within = np.arange(len(first)) - np.repeat(np.cumsum(part) - part, part)
        yield first, order[np.repeat(starts[begin:end], part) + within]
        begin = end
