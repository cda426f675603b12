"""YAML that anybody may have written, as plain data: no tag runs code, and no small file stands for a huge value."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from dist_ssn.errors import RecipeError
from dist_ssn.files import read_text

MOST_BYTES = 64 * 1024  # PyYAML makes some 300 bytes of each
MOST_DEPTH = 20  # of dicts and lists inside of each other


class _Plain(yaml.SafeLoader):
    """YAML's safe loader, which also refuses a key that is there twice, aliases, and nesting without end."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            # A few lines of aliases of aliases stand for more values than any memory holds.
            raise ComposerError(None, None, "aliases are refused: write the value again", event.start_mark)
        if self.depth > MOST_DEPTH:
            raise ComposerError(None, None, f"it nests more than {MOST_DEPTH} deep", event.start_mark)
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML follows, takes 1e-3 for a text; jsonargparse and everybody else takes it for a number.
_Plain.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def yaml_value(text: str) -> Any:
    """The value of an option: as YAML reads it, else the text itself."""
    try:
        return yaml.load(text, Loader=_Plain)
    except (yaml.YAMLError, ValueError):
        return text


def read_yaml(path: Path) -> Any:
    """The content of a recipe's file. Raises: RecipeError, which names file and line."""
    try:
        return parse_yaml(read_text(path, MOST_BYTES), str(path))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: this is not a text file in UTF-8") from None
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(f"{path}: cannot be read ({error})") from None


def parse_yaml(text: str, source: str) -> Any:
    """The content of a recipe's text. Raises: RecipeError, which names `source` and the line."""
    try:
        return yaml.load(text, Loader=_Plain)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{source}{line}: this is not valid YAML ({error.problem})") from None
    except yaml.YAMLError:
        raise RecipeError(f"{source}: this is not a text file in UTF-8") from None
    except (ValueError, OverflowError, TypeError, AttributeError, KeyError, IndexError) as error:
        # Of PyYAML's own constructors, for a date such as 2024-99-99, a number of thousands of digits, a `!!int` that is none
        raise RecipeError(f"{source}: this has a value that cannot be read ({str(error)[:80]})") from None
