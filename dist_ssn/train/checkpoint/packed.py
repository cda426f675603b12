"""Nested states as tensors, for a safetensors file: nothing in it can run code.

Tensors keep their place as a name such as `outer/state/0/momentum_buffer`. Everything else is one JSON text, as bytes in the tensor
`json`, where each tensor's place holds its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dist_ssn.files import parse_json

JSON = "json"
_TENSOR, _PAIRS, _TUPLE = "tensor", "pairs", "tuple"


def pack(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file that holds `state`: dicts, lists, tuples, texts, numbers, booleans, None and tensors."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_packed(state, "", tensors))
    tensors[JSON] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return tensors


def unpack(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The reverse of `pack`.

    Raises:
        ValueError: the tensors are not those of a packed state.
    """
    text = tensors.get(JSON)
    if text is None or text.dtype != torch.uint8 or text.dim() != 1:
        raise ValueError("it holds no state")
    try:
        state = _unpacked(parse_json(bytes(text.tolist()).decode()), tensors)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"its state is malformed ({type(error).__name__}: {error})") from None
    if not isinstance(state, dict):
        raise ValueError("its state is not a dict")
    return state


def _packed(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[place] = value
        return {_TENSOR: place}
    if isinstance(value, Mapping):  # as pairs: keys may be numbers
        return {_PAIRS: [[key, _packed(part, f"{place}/{key}".lstrip("/"), tensors)] for key, part in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: _packed(list(value), place, tensors)}
    if isinstance(value, list):
        return [_packed(part, f"{place}/{number}", tensors) for number, part in enumerate(value)]
    return value


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(part, tensors) for part in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_unpacked(value[_TUPLE], tensors))
    return {key: _unpacked(part, tensors) for key, part in value[_PAIRS]}
