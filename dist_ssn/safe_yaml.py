"""YAML that anybody may have written, as plain data: no tag runs code, and no small file stands for a huge value.

Plain scalars are read as YAML 1.2 says: `010` is ten, `1:30`, `yes` and `2024-01-01` are texts (YAML 1.1, which PyYAML follows,
makes 8, 90, true and a date of them), and 1e-3 is a number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from dist_ssn.errors import UserError
from dist_ssn.files import read_text


@dataclass(frozen=True)
class Kind:
    """A kind of file, and what is refused in it.

    Args:
        noun: what such files are called, in the plural.
        error: what is raised.
        most_bytes: bytes of the largest file; PyYAML makes some 300 bytes of each.
        most_depth: dicts and lists inside of each other.
    """

    noun: str
    error: type[UserError]
    most_bytes: int = 64 * 1024
    most_depth: int = 20


_OPTION = Kind("options", UserError)
_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9][0-9_]*", list("-+0123456789")),
    "float": (
        r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
}
"""type → which plain scalars are of it, and their first characters"""


class _Refused(yaml.MarkedYAMLError):
    """Valid YAML that a file of this kind may not have."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict[str, list]] = {}
    depth = 0
    kind = _OPTION

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()
        if getattr(event, "anchor", None):
            # A few lines of aliases of aliases stand for more values than any memory holds.
            self._refuse(f"anchors and aliases are not for {self.kind.noun}: write the value again", event)
        if tag := getattr(event, "tag", None):
            self._refuse(f"the tag {tag[:60]} is not for {self.kind.noun}: leave it out", event)
        if self.depth > self.kind.most_depth or (
            self.depth == self.kind.most_depth and isinstance(event, yaml.CollectionStartEvent)
        ):
            self._refuse(f"dicts and lists are nested more than {self.kind.most_depth} deep", event)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._refuse("a key must be a name", key)
            if key.value in seen:
                self._refuse(f"the key {key.value[:80]!r} is there twice", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def _refuse(self, problem: str, at: yaml.Event | yaml.Node) -> None:
        raise _Refused(problem=problem, problem_mark=at.start_mark)


class _Dumper(yaml.SafeDumper):
    """Puts also those texts in quotes that `_Loader` would take for something else."""

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """A text; Unicode's line breaks become escapes, since PyYAML writes and reads them differently."""
        return self.represent_scalar(f"{_TAG}str", text, style='"' if set("\x85\u2028\u2029") & set(text) else None)


_Dumper.add_representer(str, _Dumper.represent_text)

for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})$"), _first)
_Loader.add_constructor(f"{_TAG}int", lambda _, node: int(node.value.replace("_", "")))


def yaml_value(text: str) -> Any:
    """The value of an option: as YAML reads it, else the text itself."""
    try:
        return _load(text, _OPTION)
    except (yaml.YAMLError, ValueError):
        return text


def read_yaml(path: Path, kind: Kind) -> Any:
    """The content of a file.

    Raises:
        kind.error: it cannot be read; names the file and, where there is one, the line.
    """
    try:
        text = read_text(path, kind.most_bytes)
    except OSError as error:
        raise kind.error(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise kind.error(f"{path}: this is not a text file in UTF-8") from None
    except ValueError as error:
        raise kind.error(f"{path}: cannot be read ({error})") from None
    return parse_yaml(text, str(path), kind)


def parse_yaml(text: str, source: str, kind: Kind) -> Any:
    """The content of a text.

    Raises:
        kind.error: it cannot be read; names `source` and, where there is one, the line.
    """
    try:
        return _load(text, kind)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        problem = error.problem if isinstance(error, _Refused) else f"this is not valid YAML ({error.problem})"
        raise kind.error(f"{source}{line}: {problem}") from None
    except yaml.YAMLError:  # control characters
        raise kind.error(f"{source}: this is not a text file in UTF-8") from None
    except ValueError as error:  # a number of thousands of digits
        raise kind.error(f"{source}: this has a value that cannot be read ({str(error)[:80]})") from None


def to_yaml(value: Any) -> str:
    """Plain data as YAML text, which `parse_yaml` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)


def _load(text: str, kind: Kind) -> Any:
    loader = _Loader(text)
    loader.kind = kind
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()
