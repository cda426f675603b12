"""Parameters that belong together by their memory or by their values, which sharing would part."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from dist_ssn.errors import ShareError
from dist_ssn.model.specs import Specs
from dist_ssn.sharing.parts import listed

_SOME = 8
"""Number of first elements that are compared before all are."""


def require_apart(model: nn.Module, specs: Specs) -> None:
    """Checks that no weight lies in the memory of another parameter, as `decoder.weight.data = encoder.weight.data.t()` makes it.

    Args:
        model: is about to be shared.
        specs: of its weights.

    Raises:
        ShareError: two parameters overlap.
    """
    weights = {id(model.get_parameter(weight.name)) for weight in specs.weights}
    spans = sorted(
        (*span, name, id(parameter)) for name, parameter in model.named_parameters() for span in _span(parameter)
    )
    for (storage, _, end, name, one), (other_storage, begin, _, other_name, other) in pairwise(spans):
        if storage == other_storage and begin < end and (one in weights or other in weights):
            raise ShareError(
                f"{name} and {other_name} have the same memory, so that they train as one, and sharing would part them: make them "
                f"one parameter, compute with {name}.t() in forward, or exclude=[{name!r}, {other_name!r}]"
            )


def _span(parameter: Tensor) -> Iterator[tuple[int, int, int]]:
    """(storage, first byte, end) of a parameter's memory; nothing where it has none."""
    if (
        parameter.layout is not torch.strided
        or parameter.is_meta
        or not parameter.numel()
        or hasattr(parameter, "device_mesh")
    ):
        return
    begin = int(parameter.storage_offset())
    end = begin + 1 + sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    size = parameter.element_size()
    yield parameter.untyped_storage().data_ptr(), begin * size, int(end) * size


def warn_of_copies(model: nn.Module, specs: Specs) -> None:
    """Warns of frozen copies of weights, such as a target network: they keep the values that the weights lose.

    Args:
        model: is about to be shared.
        specs: of its weights.
    """
    frozen = {
        name: p for name, p in model.named_parameters() if not p.requires_grad and p.ndim > 1 and p.numel() > _SOME
    }
    if not frozen:
        return
    weights: dict[tuple[object, ...], list[str]] = {}
    for weight in specs.weights:
        weights.setdefault(_beginning(model.get_parameter(weight.name)), []).append(weight.name)
    pairs = [
        (name, weight)
        for name, parameter in frozen.items()
        for weight in weights.get(_beginning(parameter), ())
        if torch.equal(parameter, model.get_parameter(weight))
    ]
    if pairs:
        warnings.warn(
            f"{listed(name for name, _ in pairs)}: frozen copies of weights that are shared now, such as {pairs[0][1]}, and so get "
            "other values: copy the module after share(), or share the part that trains by itself",
            stacklevel=3,
        )


def _beginning(parameter: Tensor) -> tuple[object, ...]:
    values = () if parameter.is_meta else tuple(parameter.detach().reshape(-1)[:_SOME].tolist())
    return parameter.shape, parameter.dtype, parameter.device, values
