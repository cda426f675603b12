"""How reads of a bank join autograd's graph: all through one *anchor*, an empty tensor that depends on the bank's parameters.

A read remembers only which weight was read. The weight's backward adds its part in place to one sum per parameter; the anchor's
backward, which autograd runs after the last of them, hands the sums to the parameters as ordinary gradients. So hooks, DDP's
reducer, `autograd.grad` and accumulation see exactly what they would see without us. (Slicing a flat parameter instead costs a
bank-sized tensor of zeros per read in backward.)
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_ssn.sharing.weight_source import WeightSource
from dist_ssn.torch_private import graph_task_id


class Watcher(Protocol):
    """Who follows the growth of a bank's gradient, to send it before it is complete. Every backward pass has `sums` of its own."""

    def read(self, index: int) -> None:
        """Slot `index` was read outside of a backward, by an operation that will have one."""
        ...

    def begin(self, sums: dict[str, Tensor]) -> None:
        """A backward pass has come to the first of its readers; `sums` are zero."""
        ...

    def grown(self, index: int, sums: dict[str, Tensor]) -> None:
        """The gradient of slot `index` was added to `sums`."""
        ...

    def collect(self, sums: dict[str, Tensor]) -> None:
        """Nothing more comes in this pass. What is taken out of `sums` does not reach its parameter."""
        ...


class DifferentiableSource(WeightSource, Protocol):
    """A source whose weights and gradients are computed by hand, without a graph of their own."""

    watcher: Watcher | None
    """Follows the growth of the gradient."""
    anchored: Anchored | None
    """The anchor of the present forward."""

    def fast(
        self, index: int, rows: Tensor | None, dtype: torch.dtype | None, values: Mapping[str, Tensor | None]
    ) -> Tensor:
        """The weight, without a graph."""
        ...

    def pull_back(
        self,
        gradient: Tensor,
        index: int,
        rows: Tensor | None,
        values: Mapping[str, Tensor | None],
        sums: dict[str, Tensor],
    ) -> None:
        """Adds to `sums`, by parameter, what the weight's `gradient` is for them."""
        ...


class Sums:
    """One sum per parameter for each backward pass that is under way.

    Passes are told apart by autograd's own number, since a reentrant checkpoint runs one inside another, and a pass that
    died with an exception must leave nothing behind for the next.
    """

    def __init__(self, source: DifferentiableSource, parameters: tuple[tuple[str, Tensor], ...]):
        self.source = weakref.ref(source)
        self.parameters = parameters
        self.passes: dict[int, dict[str, Tensor]] = {}

    def here(self) -> dict[str, Tensor]:
        number = graph_task_id()
        if number not in self.passes:
            self.passes[number] = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.parameters}
            if (watcher := self.watcher()) is not None:
                watcher.begin(self.passes[number])
        return self.passes[number]

    def watcher(self) -> Watcher | None:
        source = self.source()
        return None if source is None else source.watcher

    def collect(self) -> tuple[Tensor | None, ...]:
        sums = self.passes.pop(graph_task_id(), {})
        if (watcher := self.watcher()) is not None:
            watcher.collect(sums)
        source = self.source()
        if source is not None and source.anchored is not None and source.anchored.sums is self:
            source.anchored = None
        return tuple(sums.get(name) for name, _ in self.parameters)


class Anchored:
    """An anchor, and what belongs to it."""

    def __init__(self, source: DifferentiableSource, parameters: tuple[tuple[str, Tensor], ...]):
        self.sums = Sums(source, parameters)
        with torch.inference_mode(False):
            self.tensor: Tensor = _Anchor.apply(self.sums, *(p for _, p in parameters))  # type: ignore[assignment]

    def holds(self, parameters: tuple[tuple[str, Tensor], ...]) -> bool:
        """Whether it hangs on exactly these tensors."""
        mine = self.sums.parameters
        return len(mine) == len(parameters) and all(a[1] is b[1] for a, b in zip(mine, parameters, strict=True))


class _Anchor(torch.autograd.Function):
    """parameters → an empty tensor; backward hands out the sums that the weights' backwards have made."""

    @staticmethod
    def forward(ctx: Any, sums: Sums, *parameters: Tensor) -> Tensor:
        ctx.sums = sums
        return parameters[0].new_empty(0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.sums.collect()


class Generate(torch.autograd.Function):
    """anchor → one weight; saves no tensor but the rows that were asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        sums: Sums,
        source: DifferentiableSource,
        index: int,
        rows: Tensor | None,
        dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.sums, ctx.source, ctx.index, ctx.values = sums, source, index, source.values()
        ctx.save_for_backward(rows)
        return source.fast(index, rows, dtype, ctx.values.tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        values = ctx.values.checked(ctx.source.weight_name(ctx.index))
        sums = ctx.sums.here()
        ctx.source.pull_back(gradient, ctx.index, rows, values, sums)
        if ctx.source.watcher is not None:
            ctx.source.watcher.grown(ctx.index, sums)
        return gradient.new_empty(0, dtype=values["bank"].dtype), None, None, None, None, None
