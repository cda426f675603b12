"""Values that are checked once, where they enter, by pydantic: frozen dataclasses, and one sentence for each mistake.

A class is declared with `@checked`, a key as `name: type = default` and a docstring, its help. Bounds, examples and the words of
messages, where those made from type and bounds would say less, are in `Annotated`. Rules across keys yield `Problem`s, and a
validator of the whole hands them to `refuse`. A field whose type is a checked class is a section.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import pydantic.dataclasses
from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import dataclass_transform

from dist_ssn.errors import UserError, unknown_choice

T = TypeVar("T")

_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text (in quotes, if it looks like something else)",
    (str, None): "text or null",
    (tuple, str): "a list of texts, such as [a, b]",
    (tuple, int): "a list of whole numbers, such as [500, 800]",
}
"""Type → its words in messages."""


@dataclasses.dataclass(frozen=True)
class Key:
    """One key of a file, for `--help` and the docs.

    Args:
        name: full name, such as share.budget.
        type: what a value may be, in words.
        default: value without it; `REQUIRED` where there is none.
        help: sentence that says what it does.
        section: section it belongs to, such as share; empty at the top.
    """

    name: str
    type: str
    default: Any
    help: str
    section: str


REQUIRED = "(required)"
"""Default of a key that must be given."""


@dataclasses.dataclass(frozen=True)
class Says:
    """Words of a key's messages, after "must be".

    Args:
        right: what would be right, for a value of the right type out of its bounds; empty: made from the bounds.
        type: the same for a value of another type, and in `Key`; empty: made from the type.
    """

    right: str = ""
    type: str = ""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A rule that a value breaks.

    Args:
        key: full key.
        text: what is wrong, a clause to follow the key.
        reads: other keys that the rule looked at; while one of them is wrong itself, this problem is not reported.
        complete: the text names the key itself.
    """

    key: str
    text: str
    reads: tuple[str, ...] = ()
    complete: bool = False


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
def checked(error: type[UserError]) -> Callable[[type[T]], type[T]]:
    """Makes a class a frozen dataclass that takes only right values; made with wrong ones, it raises `error`."""

    def decorate(cls: type[T]) -> type[T]:
        config = ConfigDict(
            extra="forbid",
            allow_inf_nan=False,
            use_attribute_docstrings=True,
            field_title_generator=lambda name, _: name,
        )
        made = pydantic.dataclasses.dataclass(frozen=True, config=config)(cls)
        init: Any = made.__init__
        names = list(made.__pydantic_fields__)  # pyright: ignore[reportAttributeAccessIssue]

        @functools.wraps(init)
        def __init__(self: T, *args: Any, **kwargs: Any) -> None:
            if len(args) > len(names):
                raise TypeError(f"{cls.__name__} takes at most {len(names)} arguments, got {len(args)}")
            values = dict(zip(names, args, strict=False)) | kwargs
            try:
                init(self, **values)
            except ValidationError as found:
                problems = _sentences(_problems(made, found, values))
                raise error(f"{cls.__name__}: {one_sentence(list(problems.values()))}") from None

        made.__init__ = __init__  # pyright: ignore[reportAttributeAccessIssue]
        return made  # pyright: ignore[reportReturnType]

    return decorate


def check(
    cls: type[T], leaves: Mapping[str, Any], further: Callable[[T], Iterable[Problem]] | None = None
) -> tuple[T | None, dict[str, str]]:
    """A checked value from plain data, or everything that is wrong with it.

    Args:
        cls: a class made by `checked`.
        leaves: full key → value, as `flat` makes it.
        further: rules besides those of the class, for its validator to `refuse`.

    Returns:
        The value and nothing; or None, and key → sentence.
    """
    adapter = _adapter(cls)
    try:
        return adapter.validate_python(_nested(cls, leaves), context=further), {}
    except ValidationError as error:
        problems = _problems(cls, error, leaves)
    # pydantic asks rules across keys only when each key is right. Asked with defaults for the wrong ones, they still say what is
    # wrong with the others.
    wrong = {problem.key for problem in problems}
    right = {key: value for key, value in leaves.items() if not any(f"{name}.".startswith(f"{key}.") for name in wrong)}
    try:
        adapter.validate_python(_nested(cls, right), context=further)
    except ValidationError as error:
        for found in _problems(cls, error, leaves):
            keys = {found.key, *found.reads}
            if not wrong & (keys | {key.partition(".")[0] for key in keys}):  # a section may be wrong as a whole
                problems.append(found)
    return None, _sentences(problems)


def mistake(text: str) -> PydanticCustomError:
    """Error for a validator of one key to raise; its text is a clause that follows the key, such as "must not be empty"."""
    return PydanticCustomError("rule", "{text}", {"text": text, "reads": ()})


def refuse(title: str, problems: Iterable[Problem]) -> None:
    """Refuses a whole, in a validator of it, whose rules are broken.

    Raises:
        ValidationError: names all problems; nothing is raised where there are none.
    """
    lines = [
        InitErrorDetails(
            type=PydanticCustomError("rule", "{text}", {"text": problem.text, "reads": problem.reads}),
            loc=tuple(problem.key.split(".", 1)),
            input=None,
        )
        for problem in problems
    ]
    if lines:
        raise ValidationError.from_exception_data(title, lines)


def one_sentence(problems: Sequence[str]) -> str:
    """All problems as one sentence, numbered if there are several."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems: " + "; ".join(f"({n}) {problem}" for n, problem in enumerate(problems, 1))


@functools.cache
def keys_of(cls: type) -> tuple[Key, ...]:
    """Every key of a file, in the order of the fields; an excluded field is none."""
    return tuple(
        Key(name, _type_words(field), _default(field), field.description or "", section)
        for name, (section, field) in _fields(cls).items()
        if not field.exclude
    )


def schema_of(cls: type) -> dict[str, Any]:
    """JSON schema of a checked class's file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_adapter(cls).json_schema()}


def sections_of(cls: type) -> dict[str, type]:
    """Name → class of the sections of a checked class."""
    fields: dict[str, FieldInfo] = cls.__pydantic_fields__
    return {name: field.annotation for name, field in fields.items() if dataclasses.is_dataclass(field.annotation)}  # pyright: ignore[reportReturnType]


def flat(cls: type, content: Mapping[Any, Any]) -> dict[str, Any]:
    """Full key → value of a file's content; a section that is no dict stays a value under its own name."""
    leaves: dict[str, Any] = {}
    for name, value in content.items():
        if name in sections_of(cls) and isinstance(value, Mapping):
            leaves |= {f"{name}.{key}": part for key, part in value.items()}
        else:
            leaves[str(name)] = value
    return leaves


def members(cls: type, section: str) -> str:
    """The keys of a section, as a list in words."""
    return ", ".join(key.name for key in keys_of(cls) if key.section == section)


def unknown_key(key: str, known: Collection[str]) -> str:
    """The sentence for a key that does not exist, with the nearest one by full or by last name."""
    last = {name: name.rpartition(".")[2] for name in known}
    near = difflib.get_close_matches(key[:80], last, n=1) or [
        name
        for name in last
        if last[name] in difflib.get_close_matches(key[:80].rpartition(".")[2], last.values(), n=1)
    ]
    name = key if 0 < len(key) <= 80 and key.isprintable() else shown(key)
    if near:
        return f"unknown key {name}; did you mean {' or '.join(near)}?"
    return f"unknown key {name}; {'--help lists all keys' if len(known) > 20 else 'known are ' + ', '.join(known)}"


def shown(value: Any) -> str:
    """A value in a message, at most a line long."""
    try:
        text = "null" if value is None else repr(value)
    except (ValueError, RecursionError):  # a number of more than 4,300 digits, or lists as deep as the stack
        text = "a very long value"
    return text if len(text) <= 80 else f"{text[:77]}..."


def plain_types(cls: type, key: str) -> set[type]:
    """Types of the plain values that a key takes: int, float, bool, str, list, dict and NoneType."""
    taken = {get_origin(_bare(part)) or _bare(part) for part in _parts(_fields(cls)[key][1].annotation)}
    plain: dict[Any, set[type]] = {float: {int, float}, tuple: {list}, Literal: {str}, Mapping: {dict}}
    return set().union(*(plain.get(kind, {kind}) for kind in taken))


@functools.cache
def _adapter(cls: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(cls)


def _fields(cls: type) -> dict[str, tuple[str, FieldInfo]]:
    """Full key → its section and its field."""
    found: dict[str, tuple[str, FieldInfo]] = {}
    sections = sections_of(cls)
    for name, field in cls.__pydantic_fields__.items():
        if name in sections:
            found |= {f"{name}.{inner}": (name, field) for inner, (_, field) in _fields(sections[name]).items()}
        else:
            found[name] = ("", field)
    return found


def _default(field: FieldInfo) -> Any:
    return REQUIRED if field.is_required() else field.get_default(call_default_factory=True)


def _nested(cls: type, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `flat`; every section is there."""
    sections: dict[str, dict[str, Any]] = {section: {} for section in sections_of(cls)}
    others: dict[str, Any] = {}
    for key, value in leaves.items():
        section, dot, name = key.partition(".")
        if dot and section in sections:
            sections[section][name] = value
        else:
            others[key] = value
    return sections | others


def _problems(cls: type, error: ValidationError, leaves: Mapping[str, Any]) -> list[Problem]:
    return [_problem(cls, found, leaves) for found in error.errors(include_url=False)]


def _sentences(problems: Iterable[Problem]) -> dict[str, str]:
    """Key → sentence: the first of each key, for pydantic reports each member of a union and each item of a list."""
    found: dict[str, str] = {}
    for problem in problems:
        found.setdefault(problem.key, problem.text if problem.complete else f"{problem.key} {problem.text}")
    return found


def _problem(cls: type, error: Mapping[str, Any], leaves: Mapping[str, Any]) -> Problem:
    """One of pydantic's errors in our words."""
    loc, kind, context = error["loc"], error["type"], error.get("ctx", {})
    fields = _fields(cls)
    if kind == "rule":
        return Problem(".".join(map(str, loc)), context["text"], context["reads"])
    depth = 2 if loc[0] in sections_of(cls) and len(loc) > 1 else 1
    key = ".".join(map(str, loc[:depth]))
    if kind == "unexpected_keyword_argument":
        return Problem(key, unknown_key(key, [known.name for known in keys_of(cls)]), complete=True)
    if key in sections_of(cls):
        right = f"must be a dict of keys and values ({members(cls, key)})"
        return Problem(key, f"is missing: it {right}" if kind == "missing" else f"{right}, got {shown(error['input'])}")
    field = fields[key][1]
    says = next((extra for extra in field.metadata if isinstance(extra, Says)), Says())
    got = leaves.get(key, error["input"])
    if kind == "missing" and len(loc) == depth:
        return Problem(key, f"is missing: it must be {says.right or _type_words(field)}")
    if kind == "value_error":
        return Problem(key, f"is wrong: {context['error']}")
    if kind == "literal_error" and isinstance(got, str) and not says.right:
        return Problem(key, f"is an {unknown_choice('name', got, _choices(field.annotation))}")
    in_type = kind.startswith(("greater_", "less_", "finite_", "string_pattern", "string_too"))
    right = says.right or _bounds(field) if in_type else _type_words(field)
    return Problem(key, f"must be {right}, got {shown(list(got) if isinstance(got, tuple) else got)}")


def _bounds(field: FieldInfo) -> str:
    """Bounds of a number in words."""
    found: dict[str, Any] = {}
    for bound in (*field.metadata, *(extra for part in _parts(field.annotation) for extra in get_args(part)[1:])):
        if isinstance(bound, (Ge, Gt, Le, Lt)):
            found |= dataclasses.asdict(bound)
    low, high = found.get("ge", found.get("gt")), found.get("le", found.get("lt"))
    if high is None:
        return f"a number above {low}" if "gt" in found else f"at least {low}" if low else "0 or more"
    if "ge" in found and "le" in found:
        return f"between {low} and {high}"
    return f"{'above' if 'gt' in found else 'at least'} {low} and {'below' if 'lt' in found else 'at most'} {high}"


def _type_words(field: FieldInfo) -> str:
    says = next((extra for extra in field.metadata if isinstance(extra, Says)), Says())
    return says.type or _words(field.annotation)


def _words(annotation: Any) -> str:
    """A type in words."""
    first, *others = map(_bare, _parts(annotation))
    if others:
        assert others == [type(None)], f"{annotation} needs words of its own: give it a Says"
        words = _words(first)
        return _WORDS.get((first, None), f"{words}{',' if ',' in words else ''} or null")
    if get_origin(first) is Literal:
        *names, last = map(str, get_args(first))
        return f"{', '.join(names)} or {last}" if names else last
    return _WORDS[tuple, _bare(get_args(first)[0])] if get_origin(first) is tuple else _WORDS[first]


def _choices(annotation: Any) -> tuple[str, ...]:
    """Names that a value may be, where the type or a member of a union lists them."""
    return tuple(
        name for part in _parts(annotation) if get_origin(_bare(part)) is Literal for name in get_args(_bare(part))
    )


def _parts(annotation: Any) -> tuple[Any, ...]:
    """Members of a union, or the type itself."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
