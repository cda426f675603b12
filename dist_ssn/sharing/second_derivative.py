"""Second derivatives through the hand-written gradients of `autograd.py`: an error that names the pure path.

torch's `once_differentiable` puts its error beside the way to the inputs, so `torch.autograd.grad(slopes, parameters)` never meets
it and leaves terms out silently. Here the error's node lies on every way: to the incoming gradient, and to the parameters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Backward = Callable[..., tuple[Tensor | None, ...]]


def differentiable_once(facts: Callable[[Any], tuple[str, tuple[Tensor, ...]]]) -> Callable[[Backward], Backward]:
    """A decorator for a function's `backward`, whose results can't be differentiated again.

    Args:
        facts: context → the name of a weight, for the message, and the parameters that the results depend on.
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def wrapper(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
            with torch.no_grad():
                outputs = backward(ctx, *gradients)
            if not torch.is_grad_enabled():
                return outputs
            name, parameters = facts(ctx)
            made = [output for output in outputs if output is not None]
            given = [gradient for gradient in gradients if gradient is not None]
            refused = iter(_Refuse.apply(name, len(made), *made, *given, *parameters))  # type: ignore[arg-type]
            return tuple(None if output is None else next(refused) for output in outputs)

        return wrapper

    return decorate


class _Refuse(torch.autograd.Function):
    """Copies the first `count` tensors; its backward is an error."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"the fast path cannot differentiate twice through the bank of {ctx.name}: take the pure path, "
            "`for bank in dist_ssn.sharing.bank.banks_of(model): bank.pure = True`, or materialize(model)"
        )
