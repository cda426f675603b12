"""Connection of a bank's reads to autograd's graph, through one *anchor*: an empty tensor that depends on the bank's parameters.

A read saves only the index of its weight. The weight's backward adds its gradient in place to one sum per parameter. The anchor's
backward, which autograd runs after the last of them, returns the sums as ordinary gradients of the parameters. So hooks, DDP's
reducer, `autograd.grad` and accumulation work as with any other parameter. (Slices of a flat parameter would cost a bank-sized
tensor of zeros per read in backward.)
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from dist_ssn.sharing.second_derivative import differentiable_once
from dist_ssn.sharing.weight_source import WeightSource
from dist_ssn.torch_private import graph_task_id


class Watcher(Protocol):
    """An observer of a bank's gradient, which may send parts of it before it is complete. Each backward pass has its own `sums`."""

    def read(self, index: int) -> None:
        """Is called when slot `index` is read in a forward whose backward is to come."""
        ...

    def begin(self, sums: dict[str, Tensor]) -> None:
        """Is called when a backward pass reaches the first weight of the bank; `sums` are zero."""
        ...

    def grown(self, index: int, sums: dict[str, Tensor]) -> None:
        """Is called when the gradient of slot `index` has been added to `sums`."""
        ...

    def collect(self, sums: dict[str, Tensor]) -> None:
        """Is called when the pass is complete. Sums that are removed from `sums` do not reach their parameters."""
        ...


class DifferentiableSource(WeightSource, Protocol):
    """A source whose weights and gradients are computed by hand, without a graph of their own."""

    watcher: Watcher | None
    """Observes the gradient."""
    anchor: Anchor | None
    """The anchor of the current forward."""

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
        """Adds the gradients of the parameters, given the weight's `gradient`, to `sums`."""
        ...


class Sums:
    """One sum per parameter for each backward pass in progress.

    Passes are distinguished by autograd's own id, because a reentrant checkpoint runs one pass inside another, and a pass that
    ended with an exception must not change the next one.
    """

    def __init__(self, source: DifferentiableSource, parameters: tuple[tuple[str, Tensor], ...]):
        self.source = weakref.ref(source)
        self.parameters = parameters
        self.passes: dict[int, dict[str, Tensor]] = {}

    def of_this_pass(self) -> dict[str, Tensor]:
        """The sums of the backward pass that is running, by parameter."""
        number = graph_task_id()
        if number not in self.passes:
            self.passes[number] = {name: torch.zeros_like(p, requires_grad=False) for name, p in self.parameters}
            if (watcher := self.watcher()) is not None:
                watcher.begin(self.passes[number])
        return self.passes[number]

    def watcher(self) -> Watcher | None:
        """The source's watcher, if the source is still alive."""
        source = self.source()
        return None if source is None else source.watcher

    def weight_name(self) -> str:
        """Name of the source's first weight, for messages."""
        source = self.source()
        return "a model that is gone" if source is None else source.weight_name(0)

    def collect(self) -> tuple[Tensor | None, ...]:
        """Ends the running pass; returns the gradient of each parameter."""
        sums = self.passes.pop(graph_task_id(), {})
        if (watcher := self.watcher()) is not None:
            watcher.collect(sums)
        source = self.source()
        if source is not None and source.anchor is not None and source.anchor.sums is self:
            source.anchor = None
        return tuple(sums.get(name) for name, _ in self.parameters)


class Anchor:
    """An anchor's tensor, with the sums of its parameters."""

    def __init__(self, source: DifferentiableSource, parameters: tuple[tuple[str, Tensor], ...]):
        self.sums = Sums(source, parameters)
        with torch.inference_mode(False):
            self.tensor: Tensor = _AnchorFunction.apply(self.sums, *(p for _, p in parameters))  # type: ignore[assignment]

    def depends_on(self, parameters: tuple[tuple[str, Tensor], ...]) -> bool:
        """True if the anchor depends on exactly these tensors."""
        mine = self.sums.parameters
        return len(mine) == len(parameters) and all(a[1] is b[1] for a, b in zip(mine, parameters, strict=True))


class _AnchorFunction(torch.autograd.Function):
    """Parameters → an empty tensor; backward returns the sums that the weights' backwards have filled."""

    @staticmethod
    def forward(ctx: Any, sums: Sums, *parameters: Tensor) -> Tensor:
        ctx.sums = sums
        return parameters[0].new_empty(0)

    @staticmethod
    @differentiable_once(lambda ctx: (ctx.sums.weight_name(), tuple(p for _, p in ctx.sums.parameters)))
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.sums.collect()


class Generate(torch.autograd.Function):
    """Anchor → one weight; saves no tensor except the requested rows."""

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
        """The weight of number `index` from `source`, see `DifferentiableSource.fast`."""
        ctx.sums, ctx.source, ctx.index, ctx.values = sums, source, index, source.values()
        ctx.save_for_backward(rows)
        return source.fast(index, rows, dtype, ctx.values.tensors)

    @staticmethod
    @differentiable_once(lambda ctx: (ctx.source.weight_name(ctx.index), ()))
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Adds the weight's gradient to the sums of this pass."""
        (rows,) = ctx.saved_tensors
        values = ctx.values.checked(ctx.source.weight_name(ctx.index))
        sums = ctx.sums.of_this_pass()
        ctx.source.pull_back(gradient, ctx.index, rows, values, sums)
        if ctx.source.watcher is not None:
            ctx.source.watcher.grown(ctx.index, sums)
        return gradient.new_empty(0, dtype=values["bank"].dtype), None, None, None, None, None
