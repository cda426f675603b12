"""Checks of a saved state of `comm_hook`, before anything of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_ssn.errors import CheckpointError
from dist_ssn.sync.codecs import Codec
from dist_ssn.sync.exchange import check_feedback

Key = tuple[tuple[int, int], ...]
"""A bucket: (number, size) of its parameters, by number."""


def buckets_of(state: object, codec: Codec) -> list[tuple[Key, dict[str, Any]]]:
    """The buckets of a state, each with the state of its exchange.

    Args:
        state: what `CommHookState.state_dict` has returned.
        codec: of the hook that loads it.

    Raises:
        CheckpointError: it is something else, damaged, or of another codec.
    """
    if not isinstance(state, Mapping) or "codec" not in state or "buckets" not in state:
        raise CheckpointError(
            f"this is no state of comm_hook, but of type {type(state).__name__}: load what its state_dict() returned, on each rank"
        )
    if state["codec"] != codec.name:
        raise CheckpointError(
            f"the state of comm_hook is of codec {state['codec']!r}, and this hook has {codec.name!r}: make the hook with the "
            "state's codec, or go on without the state, with feedback at zero"
        )
    if not isinstance(state["buckets"], list | tuple):
        raise CheckpointError("the state of comm_hook is damaged: buckets must be a list")
    return [_bucket(at, found) for at, found in enumerate(state["buckets"])]


def check_numbers(sizes: Mapping[int, int], number: int, size: int, name: str) -> None:
    """Checks that a state is of the model that has this parameter.

    Args:
        sizes: number → size of the state's parameters.
        number: of the parameter.
        size: its values.
        name: its name.

    Raises:
        CheckpointError: the state has another size, or no such number.
    """
    if sizes.get(number) != size:
        there = f"{sizes[number]:,} values" if number in sizes else "none"
        raise CheckpointError(
            f"the state of comm_hook is of another model: in the place of {name}, which has {size:,} values, it has {there}; load "
            "the state that was saved with this model, or go on without it, with feedback at zero"
        )


def _bucket(at: int, found: object) -> tuple[Key, dict[str, Any]]:
    if isinstance(found, list | tuple) and len(found) == 2 and _is_key(found[0]):
        key = tuple((number, size) for number, size in found[0])
        check_feedback(found[1])
        if found[1]["size"] == sum(size for _, size in key):
            return key, dict(found[1])
    raise CheckpointError(
        f"the state of comm_hook is damaged: bucket {at} must be (number, size) of its parameters, and what they have not sent yet"
    )


def _is_key(key: object) -> bool:
    return isinstance(key, list | tuple) and len(key) > 0 and all(map(_is_place, key))


def _is_place(pair: object) -> bool:
    """True for the number and the size of a parameter."""
    return isinstance(pair, list | tuple) and [type(part) for part in pair] == [int, int] and pair[1] > 0
