"""All weights of a bank in one pass, once per forward of the model: the mode "per_step".

The slots of an "offset" bank follow each other, so all their weights together are one flat array, which `blocks.py` makes in few
operations. The layers read views of it as ordinary tensors, which autograd saves and sums the gradients of, and one function of the
graph reduces these into the bank.

This costs the memory of one copy of the weights, and saves the second generation in backward and nearly all launches. A weight of
another morph is generated on demand.

Under autocast, weights that only linear and convolution layers read are made in the lower precision at once, as on demand. A 16-bit
bank's weights and gradients are computed in float32, and rounded once.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_ssn.sharing.bases import Bases
from dist_ssn.sharing.blocks import Block, Given, Placed, Views, make_blocks
from dist_ssn.sharing.second_derivative import differentiable_once
from dist_ssn.sharing.weight_source import Values
from dist_ssn.torch_private import add_to_each, storage_users

SMALL = {"cpu": 2**22}
"""Device → elements of a bank's weights up to which "auto" keeps a copy of them, 16 MiB in float32. Larger weights are mostly in
large layers, where generation on demand costs 1 to 5 % on a processor (docs/results/cost.md)."""
_SMALL_ELSEWHERE = 2**26
"""On other devices small operations cost more, and memory is larger. Not measured yet."""


class Sheet:
    """The buffers of a bank's weights, and the blocks that fill them.

    Args:
        blocks: of the weights that are made.
        bank: that they are made of.
        dtype: of the weights.
        lower: dtype of the weights that autocast lowers; None: that of all others.
    """

    def __init__(self, blocks: Sequence[Block], bank: Tensor, dtype: torch.dtype, lower: torch.dtype | None):
        self.blocks, self.dtype, self.device = blocks, bank.dtype, bank.device
        self.indices = tuple(placed.index for block in blocks for placed in block.slots)
        with torch.inference_mode(False), torch.no_grad():
            sizes: dict[torch.dtype, list[int]] = {}
            for block in blocks:
                sizes.setdefault(block.dtype(dtype, lower), []).append(block.numel)
            self.buffers = {its: bank.new_empty(sum(each), dtype=its) for its, each in sizes.items()}
            places = {its: iter(buffer.split(sizes[its])) for its, buffer in self.buffers.items()}
            self.parts = [next(places[block.dtype(dtype, lower)]) for block in blocks]
            self.weights = [
                part.matrix(values).view(part.slot.shape)
                for block, values in zip(blocks, self.parts, strict=True)
                for part in block.parts
            ]
        self._views: dict[Block, Views] = {}
        self._idle = [storage_users(buffer) for buffer in self.buffers.values()]

    def suits(self, bank: Tensor) -> bool:
        """True if the buffers are for the bank's dtype and device."""
        return self.dtype == bank.dtype and self.device == bank.device

    def in_use(self) -> bool:
        """True if somebody may hold a weight of the last forward, such as a graph whose backward is to come."""
        pairs = zip((storage_users(buffer) for buffer in self.buffers.values()), self._idle, strict=True)
        return any(users is None or idle is None or users > idle for users, idle in pairs)

    def fill(
        self, tensors: Mapping[str, Tensor | None], bases: Bases | None, lower: torch.dtype | None
    ) -> tuple[Tensor, ...]:
        """The weights, as new views of the buffers.

        Args:
            tensors: the bank's, by name.
            bases: kept weights, which the generated differences are added to.
            lower: dtype of the blocks that autocast lowers.
        """
        given = self._given(tensors)
        for block, part in zip(self.blocks, self.parts, strict=True):
            block.generate(given, part)
        if bases is None:
            return tuple(weight.detach() for weight in self.weights)
        add_to_each(self.weights, [bases.tensors[index] for index in self.indices])
        dtypes = [block.dtype(bases.dtype, lower) for block in self.blocks for _ in block.slots]
        return tuple(weight.detach().to(dtype) for weight, dtype in zip(self.weights, dtypes, strict=True))

    def _given(self, tensors: Mapping[str, Tensor | None]) -> Given:
        """The tensors of the bank, by name, as a block takes them."""
        bank, scales = tensors["bank"], tensors["scales"]
        assert bank is not None and scales is not None
        return Given.of(bank, scales, tensors["gains"], self._views)

    def pull_back(
        self,
        gradients: Sequence[Tensor | None],
        tensors: Mapping[str, Tensor | None],
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the bank [B, 1] and of the gains.

        Args:
            gradients: of the weights; None for those without one.
            tensors: the bank's, by name.
            needs: whether the bank and the gains need a gradient.
        """
        given = self._given(tensors)
        bank, gains = given.bank, given.gains
        bank_sum = torch.zeros_like(bank) if needs[0] else None
        gains_sum = torch.zeros_like(gains) if needs[1] and gains is not None else None
        first = 0
        for block in self.blocks:
            its = gradients[first : first + len(block.slots)]
            first += len(block.slots)
            some = next((gradient for gradient in its if gradient is not None), None)
            if some is None:
                continue
            flat = [
                some.new_zeros(placed.slot.numel) if gradient is None else gradient.reshape(-1)
                for gradient, placed in zip(its, block.slots, strict=True)
            ]
            block.pull_back(torch.cat(flat), given, bank_sum, gains_sum)
        bank_sum, gains_sum = (None if total is None else total.to(self.dtype) for total in (bank_sum, gains_sum))
        return None if bank_sum is None else bank_sum.unsqueeze(1), gains_sum


class _Made(NamedTuple):
    """Weights that were generated together."""

    weights: dict[int, Tensor]
    """By slot."""
    has_graph: bool
    values: Values


class PerStep:
    """The weights of one bank that were generated for the forward that runs.

    Args:
        slots: that can be generated together.
        seed: of the plan.
        bank: number of elements in the bank.
        lowered: indices of the slots whose weights are made in a lower precision under autocast.
        only_small: generate together only while the weights are `SMALL` for their device.
    """

    def __init__(
        self, slots: Sequence[Placed], seed: int, bank: int, lowered: Collection[int] = (), only_small: bool = False
    ):
        self.slots, self.seed, self.bank, self.lowered, self.only_small = slots, seed, bank, lowered, only_small
        self.numel = sum(placed.slot.numel for placed in slots)
        self.indices = frozenset(placed.index for placed in slots)
        self.forwards = 0
        """Number of forwards of the model that run. One that was interrupted, as by Ctrl-C, counts for ever."""
        self.made: dict[torch.dtype | None, _Made] = {}
        """The weights that were made last, by the dtype of autocast; None outside of it."""
        self.sheets: dict[torch.dtype | None, Sheet] = {}
        self._blocks: dict[tuple[torch.device, bool], list[Block]] = {}
        """By device, and whether autocast lowers some of them."""
        self._lock = threading.RLock()
        """Held while buffers are chosen and filled: forwards of several threads share them."""

    def suits(self, device: str) -> bool:
        """True unless the weights are to be small, and are not for this type of device."""
        return not self.only_small or self.numel <= SMALL.get(device, _SMALL_ELSEWHERE)

    def begin(self, device: str) -> None:
        """A forward of the model begins.

        Args:
            device: type of the bank's device.
        """
        with self._lock:
            if self.forwards == 0:
                self.sheets = {lower: sheet for lower, sheet in self.sheets.items() if lower in self.made}
                self.made = {}
            if self.suits(device):
                self.forwards += 1
            else:
                self.sheets = {}

    def end(self) -> None:
        """A forward of the model has ended, perhaps by an exception."""
        with self._lock:
            self.forwards = max(0, self.forwards - 1)

    def current(
        self,
        lower: torch.dtype | None,
        graph: bool,
        parameters: Mapping[str, Tensor | None],
        fixed: Mapping[str, Tensor | None] | None = None,
    ) -> dict[int, Tensor] | None:
        """The weights of the bank's present values, by slot; None if they are not made yet.

        The values are compared at every read: a forward may train, exchange parameters (`functional_call`), or run beside another.

        Args:
            lower: dtype of autocast.
            graph: whether the weights must depend on the parameters in the graph.
            parameters: of the bank, by name.
            fixed: its scales, by name.
        """
        made = self.made.get(lower)
        if made is None or (graph and not made.has_graph):
            return None
        return made.weights if made.values.are(parameters, fixed) else None

    def make(
        self,
        values: Values,
        name: str,
        lower: torch.dtype | None,
        graph: bool,
        frozen: Collection[int],
        bases: Bases | None,
    ) -> dict[int, Tensor]:
        """Generates the weights.

        Args:
            values: of the bank.
            name: of the bank's first weight, for messages.
            lower: dtype of autocast.
            graph: whether the weights depend on the parameters in the graph.
            frozen: indices of the slots that send no gradient.
            bases: kept weights.
        """
        bank, gains = values.tensors["bank"], values.tensors["gains"]
        assert bank is not None
        with self._lock:
            if (weights := self.current(lower, graph, values.tensors)) is not None:
                return weights  # another thread has made them
            self.made.pop(lower, None)
            sheet = self._free_sheet(bank, lower, bases)
            if graph:
                filled = _AllAtOnce.apply(sheet, values, bases, lower, name, bank, gains)
            else:
                filled = sheet.fill(values.tensors, bases, lower)
            made = {
                index: weight.detach() if index in frozen else weight
                for index, weight in zip(sheet.indices, filled, strict=True)  # type: ignore[arg-type]
            }
            self.made[lower] = _Made(made, graph, values)
            return made

    def _free_sheet(self, bank: Tensor, lower: torch.dtype | None, bases: Bases | None) -> Sheet:
        """Buffers that nobody reads: those of the last forward, or new ones; arguments as of `make`."""
        sheet = self.sheets.get(lower)
        if sheet is not None and sheet.suits(bank) and not sheet.in_use():
            return sheet
        place = (bank.device, lower is not None)
        if place not in self._blocks:
            lowered = () if lower is None else self.lowered  # weights of two precisions are in different blocks
            self._blocks[place] = make_blocks(self.slots, self.seed, self.bank, lowered, bank.device)
        kind = (bank.dtype, lower)
        if bases is not None:  # a difference is added, and only then rounded
            kind = (torch.promote_types(bank.dtype, torch.float32), None)
        sheet = self.sheets[lower] = Sheet(self._blocks[place], bank.detach(), *kind)
        return sheet


class _AllAtOnce(torch.autograd.Function):
    """A bank and its gains → all weights of a sheet."""

    @staticmethod
    def forward(
        ctx: Any,
        sheet: Sheet,
        values: Values,
        bases: Bases | None,
        lower: torch.dtype | None,
        name: str,
        bank: Tensor,
        gains: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sheet, ctx.values, ctx.name = sheet, values, name
        return sheet.fill(values.tensors, bases, lower)

    @staticmethod
    @differentiable_once(lambda ctx: (ctx.name, tuple(p for p in ctx.values.tensors.values() if p is not None)))
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        values = ctx.values.checked(ctx.name)
        needs = ctx.needs_input_grad[5:]
        return None, None, None, None, None, *ctx.sheet.pull_back(gradients, values, needs)
