"""Plain YAML: a mapping from names to values, without the features that a hostile file could abuse."""

import functools
import re
from pathlib import Path
from typing import Any

from resnext_hub.errors import RequestError, one_line
from resnext_hub.files import read_regular
from resnext_hub.text import printable

YAML_BYTES = 1 << 16
"""Largest YAML file in bytes; settings have a few kilobytes, and PyYAML reads 50 kB/s."""

YAML_FLOAT = r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?"
"""Pattern of floats in YAML 1.2; PyYAML follows YAML 1.1, where `1e-3` is text and `1:30` is 90."""


def read_yaml(path: Path, way_out: str, *, most: int = YAML_BYTES, any_names: bool = False) -> dict[str, Any]:
    """Read a YAML file with a mapping from names to plain values: text, numbers, booleans, null and lists.

    Args:
        path: The file.
        way_out: What to do about an unreadable file, for the message.
        most: Largest size in bytes.
        any_names: Whether names such as 7 and true, which YAML reads as other values, are taken as text.

    Raises:
        RequestError: If it is not a regular file, cannot be read, or has other content.
    """
    try:
        return parse_yaml(read_regular(path, most).decode("utf-8-sig"), any_names=any_names)
    except OSError as error:
        raise RequestError(
            f"{printable(path)} cannot be read: {error.strerror or one_line(error)}; {way_out}"
        ) from error
    except ValueError as error:
        raise RequestError(f"{printable(path)} cannot be read: {one_line(error)}; {way_out}") from error


def parse_yaml(text: str, *, any_names: bool = False) -> dict[str, Any]:
    """Parse YAML text to a mapping; empty text is an empty mapping.

    Tags, aliases (which can expand without bound) and repeated names are refused. Scalars follow YAML 1.2: `1e-3` is a
    number; `no`, `010`, `1_000`, `1:30` and dates are text.

    Raises:
        ValueError: If it is anything but a mapping from names to plain values.
    """
    import yaml

    try:
        content = yaml.load(text, Loader=_plain_loader())
    except yaml.error.MarkedYAMLError as error:  # its own message has several lines
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}{printable(error.problem or error.context)}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(one_line(error)) from error
    if content is None:
        return {}
    if any_names and isinstance(content, dict):
        content = {str(name).lower() if isinstance(name, bool) else str(name): value for name, value in content.items()}
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError("expected settings, one `name: value` per line")
    return content


def yaml_fields(text: str) -> dict[str, str]:
    """Return the source text of each field of a YAML mapping, with its comments, as whole lines.

    Raises:
        ValueError: If it is not a mapping that `parse_yaml` accepts, or not in block style.
    """
    import yaml

    if not parse_yaml(text):
        return {}
    node = yaml.compose(text, Loader=_plain_loader())
    assert isinstance(node, yaml.MappingNode)
    starts = [0, *(key.start_mark.index for key, _ in node.value[1:]), len(text)]
    fields = {key.value: text[a:b] for (key, _), a, b in zip(node.value, starts, starts[1:], strict=False)}
    if node.flow_style or not all(part.endswith("\n") for part in fields.values()):
        raise ValueError("expected one `name: value` per line")
    return fields


@functools.cache
def _plain_loader() -> type:
    """Return a YAML loader that refuses tags, aliases and repeated names."""
    import yaml
    from yaml.error import MarkedYAMLError

    class PlainLoader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            """Refuse aliases and tags: a short file could fill the memory with them, or name code."""
            event: Any = self.peek_event()  # type: ignore[no-untyped-call] # not in the stubs
            start: Any = event.start_mark
            if event.__class__ is yaml.AliasEvent:
                raise MarkedYAMLError(problem="aliases are not supported", problem_mark=start)
            if getattr(event, "tag", None) is not None:
                raise MarkedYAMLError(problem=f"the tag {event.tag} is not supported", problem_mark=start)
            self.depth += 1
            if self.depth > 8:
                raise MarkedYAMLError(problem="nested too deeply", problem_mark=start)
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            """Refuse repeated names, of which PyYAML would take the last."""
            start: Any = node.start_mark
            content = super().construct_mapping(node, deep)
            if len(content) < len(node.value):
                raise MarkedYAMLError(problem="a name occurs twice", problem_mark=start)
            return content

    PlainLoader.yaml_implicit_resolvers = {}
    for name, pattern, first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"-?(?:0|[1-9][0-9]{0,99})", list("-0123456789")),
        ("float", YAML_FLOAT, list("-+.0123456789")),
    ):
        tag = f"tag:yaml.org,2002:{name}"
        PlainLoader.add_implicit_resolver(tag, re.compile(rf"(?:{pattern})\Z"), first)
    PlainLoader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))
    return PlainLoader
