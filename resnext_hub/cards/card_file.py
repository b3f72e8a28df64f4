"""README.md as a file with two authors: this package writes its own part between two marks, its owner all the rest."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from resnext_hub.yaml_files import parse_yaml, yaml_fields

_BEGIN = re.compile(r"^<!-- resnext-hub card (\{.{1,8000}) -->\n", re.MULTILINE)
_END = "<!-- resnext-hub card end -->\n"
_ADVICE = "What stands between this line and the end mark is written anew by push: write above or below it."


@dataclass(frozen=True)
class Kept:
    """What the owner of a card wrote."""

    fields: Mapping[str, str] = field(default_factory=dict)
    """The YAML text of each field of the metadata."""
    tags: tuple[str, ...] = ()
    before: str = ""
    after: str = ""

    @property
    def digest(self) -> str:
        """Short SHA-256; white space at the ends does not count."""
        return _digest([dict(self.fields), self.tags, self.before.strip(), self.after.strip()])

    def __bool__(self) -> bool:
        return self.digest != Kept().digest


@dataclass(frozen=True)
class CardFile:
    """A card taken apart."""

    kept: Kept
    marked: bool
    """Whether it holds a part that this package wrote."""
    edited: bool = False
    """Whether that part has changed since, or the metadata that go with it."""
    kept_then: str | None = None
    """Digest of what the owner had written when this package last wrote its part."""

    @property
    def foreign(self) -> bool:
        """Whether writing the own part would lose what somebody else wrote."""
        return self.edited or (not self.marked and bool(self.kept.before.strip()))


class CardConflictError(ValueError):
    """Two cards of a model cannot be made one."""


def take_apart(text: str, own_tags: Sequence[str]) -> CardFile:
    """Take a card apart.

    Args:
        text: README.md.
        own_tags: The tags that this package writes.

    Raises:
        ValueError: If its metadata cannot be read.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    metadata, body = _split(text)
    fields = yaml_fields(metadata)
    found = parse_yaml(metadata).get("tags")
    tags = tuple(str(tag) for tag in (found if isinstance(found, list) else [found] if found else []))
    begin = _BEGIN.search(body)
    end = body.find(_END, begin.end()) if begin else -1
    if begin is None or end < 0:
        others = {name: text for name, text in fields.items() if name != "tags"}
        return CardFile(Kept(others, _without(tags, own_tags), body), marked=False)
    mark = _read_mark(begin[1])
    keys = mark["keys"]
    own = {name: text for name, text in fields.items() if name in keys}
    kept = Kept(
        {name: text for name, text in fields.items() if name not in keys and name != "tags"},
        _without(tags, own_tags),
        body[: begin.start()],
        body[end + len(_END) :],
    )
    # a second part of this package is a copy, whose figures would be published as the owner's words
    twice = _BEGIN.search(kept.after) is not None
    edited = twice or mark.get("own") != _digest([own, body[begin.end() : end]])
    return CardFile(kept, marked=True, edited=edited, kept_then=mark.get("kept"))


def _read_mark(text: str) -> dict[str, Any]:
    """Return what the mark holds, before the advice."""
    try:
        mark, _ = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("its mark is damaged") from error
    if not isinstance(mark.get("keys"), list):
        raise ValueError("its mark is damaged")
    return dict(mark)


def put_together(metadata: str, body: str, kept: Kept) -> str:
    """Return a card: the own metadata and part, and around them what the owner wrote.

    Args:
        metadata: The own fields, as YAML with a list of tags.
        body: The own part, in Markdown.
        kept: What the owner wrote; fields of its own that this package writes too give way.
    """
    fields = yaml_fields(metadata)
    own = {name: text for name, text in fields.items() if name != "tags"}
    tags = [*(parse_yaml(metadata).get("tags") or []), *kept.tags]
    kept = Kept({n: t for n, t in kept.fields.items() if n not in own}, kept.tags, kept.before, kept.after)
    mark = json.dumps({"keys": sorted(own), "own": _digest([own, body]), "kept": kept.digest})
    lines = "".join(own.values()) + "tags:\n" + "".join(f"- {json.dumps(tag)}\n" for tag in tags)
    lines += "".join(kept.fields.values())
    before = kept.before if not kept.before or kept.before.endswith("\n") else kept.before + "\n"
    return f"---\n{lines}---\n\n{before}<!-- resnext-hub card {mark} {_ADVICE} -->\n{body}{_END}{kept.after}"


def choose_kept(here: CardFile | None, there: CardFile | None, own: set[str]) -> Kept:
    """Return what the owner wrote, of a card on this disk and one on the Hub.

    What was written in one place alone is taken from there; if both have changed since the last push, neither is.

    Args:
        here: The card on this disk, if any.
        there: The card on the Hub, if any.
        own: Names of the fields that this package writes.

    Raises:
        CardConflictError: If somebody's words would be lost.
    """
    for card, place in ((here, "the README.md of the model folder"), (there, "the README.md on the Hub")):
        if card is not None and card.foreign:
            raise CardConflictError(
                f"{place} was edited inside the part that push writes" if card.marked else f"{place} is not from push"
            )
    mine, theirs = (_of_owner(card, own) for card in (here, there))
    if there is None or not theirs or mine.digest == theirs.digest:
        return mine
    if not mine or there.kept_then == mine.digest:
        return theirs
    if there.kept_then == theirs.digest:
        return mine
    raise CardConflictError(
        "the README.md on the Hub and that of the model folder were both edited since the last push"
    )


def _of_owner(card: CardFile | None, own: set[str]) -> Kept:
    """Return what the owner wrote, without the fields that this package writes now."""
    if card is None:
        return Kept()
    kept = card.kept
    return Kept({n: t for n, t in kept.fields.items() if n not in own}, kept.tags, kept.before, kept.after)


def _split(text: str) -> tuple[str, str]:
    """Split a card into the YAML text of its metadata and its body."""
    match = re.match(r"---[ \t]*\n(.*?\n)?---[ \t]*(?:\n|\Z)\n?", text, re.DOTALL)
    return (match[1] or "", text[match.end() :]) if match else ("", text)


def _without(tags: Sequence[str], own: Sequence[str]) -> tuple[str, ...]:
    return tuple(tag for tag in tags if tag not in own)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
