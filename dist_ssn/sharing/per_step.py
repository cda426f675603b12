"""All weights of a bank in one pass, once per forward of the model: the mode "per_step".

The slots of an "offset" bank follow each other, so all their weights together are one flat array: the bank, repeated, times one
factor per chunk (sign, scale, row gain), times the column gains. It is made in blocks of whole weights, by few operations. The
layers read views of it as ordinary tensors, which autograd saves and sums the gradients of, and one function of the graph reduces
these into the bank.

This costs the memory of one copy of the weights, and saves the second generation in backward and nearly all launches. A weight of
another morph is generated on demand.

Letters: n elements in a block, q = n / chunk (rounded up), B elements in the bank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dist_ssn.plan.slots import Slot
from dist_ssn.sharing.bases import Bases
from dist_ssn.sharing.morphs import sign_start, sign_table
from dist_ssn.sharing.second_derivative import differentiable_once
from dist_ssn.sharing.signed_path import Run, cut_runs
from dist_ssn.sharing.weight_source import Values
from dist_ssn.torch_private import add_to_each, multiply_each, storage_users

_BLOCK = {"cpu": 2**18}
"""Device → elements of a block that holds more than one weight: on a processor, what its cache holds."""
SMALL = {"cpu": 2**22}
"""Device → elements of a bank's weights up to which "auto" keeps a copy of them, 16 MiB in float32. Larger weights are mostly in
large layers, where generation on demand costs 1 to 5 % on a processor (docs/results/cost.md)."""
_SMALL_ELSEWHERE = 2**26
"""On other devices small operations cost more, and memory is larger. Not measured yet."""
_LARGE_BLOCK = 2**24
"""On other devices, few launches count more; it bounds what backward needs beside the gradients."""


def fits(slot: Slot) -> bool:
    """True if a slot's weight is a stretch of the bank times one factor per chunk, and gains."""
    return (
        slot.morph == "offset"
        and slot.templates == 1
        and not slot.coefficients
        and not slot.rank
        and slot.zero_row is None
        and slot.row_gains == slot.column_gains
    )


class Placed(NamedTuple):
    """A slot, its index in the bank, and the start of its gains in the bank's parameter `gains`."""

    index: int
    slot: Slot
    gains: int


class Block:
    """Consecutive slots of a bank, whose weights are one stretch of it.

    Args:
        slots: of which each starts where the one before ends; all with one chunk. Only the last may end inside a chunk.
        seed: of the plan.
        bank: number of elements in the bank.
    """

    def __init__(self, slots: Sequence[Placed], seed: int, bank: int):
        self.slots, self.seed = slots, seed
        self.chunk = slots[0].slot.chunk
        self.numel = sum(placed.slot.numel for placed in slots)
        self.runs: list[Run] = cut_runs(slots[0].slot.start, self.numel, self.chunk, bank)
        self.parts: list[_Part] = []
        start = 0
        for placed in slots:
            self.parts.append(_Part(placed, start, sign_start(seed, placed.slot.name, 0)))
            start += placed.slot.numel
        self.with_gains = [part for part in self.parts if part.slot.row_gains]

    def signs(self, like: Tensor) -> Tensor:
        """The sign of each chunk [q, 1]."""
        table = sign_table(self.seed, max(part.chunks for part in self.parts) + 1, like.device, like.dtype)
        return torch.cat([table[part.sign : part.sign + part.chunks] for part in self.parts]).unsqueeze(1)

    def factor(self, signs: Tensor, scales: Sequence[Tensor], gains: Tensor | None) -> Tensor:
        """Factor of each chunk [q, 1]: sign, scale, and the row gain where a row is a whole number of chunks.

        Args:
            signs: see `signs`.
            scales: of the bank's slots.
            gains: all gains of the bank.
        """
        factor = signs.clone()
        views = [part.per_row(factor) for part in self.parts]
        multiply_each(views, [scales[part.index] for part in self.parts])
        if gains is not None and (rows := [p for p in self.with_gains if p.rows_are_chunks]):
            multiply_each([part.per_row(factor) for part in rows], [part.row_gains(gains) for part in rows])
        return factor

    def apply_gains(self, values: Tensor, gains: Tensor | None) -> None:
        """Multiplies `values` [n] by the column gains, and by the row gains that are not in the factor, in place."""
        if gains is None or not self.with_gains:
            return
        multiply_each(
            [part.matrix(values) for part in self.with_gains], [part.column_gains(gains) for part in self.with_gains]
        )
        if rows := [part for part in self.with_gains if not part.rows_are_chunks]:
            multiply_each([part.matrix(values) for part in rows], [part.row_gains(gains) for part in rows])

    def generate(self, bank: Tensor, scales: Sequence[Tensor], gains: Tensor | None, out: Tensor) -> None:
        """Writes the block's weights to `out` [n]."""
        factor = self.factor(self.signs(bank), scales, gains)
        for run in self.runs:
            torch.mul(run.of(bank), run.of_chunks(factor), out=run.at(out))
        self.apply_gains(out, gains)

    def pull_back(
        self,
        gradient: Tensor,
        bank: Tensor,
        scales: Sequence[Tensor],
        gains: Tensor | None,
        bank_sum: Tensor | None,
        gains_sum: Tensor | None,
    ) -> None:
        """Adds to the gradients of the bank and of the gains.

        Args:
            gradient: of the block's weights [n]; is overwritten.
            bank: [B].
            scales: of the bank's slots.
            gains: all gains of the bank.
            bank_sum: gradient of the bank; None if it needs none.
            gains_sum: gradient of all gains; None if they need none.
        """
        signs = self.signs(bank)
        if gains is not None and gains_sum is not None and self.with_gains:
            product = torch.empty_like(gradient)
            for run in self.runs:
                torch.mul(run.of(bank), run.of_chunks(signs), out=run.at(product))
            product.mul_(gradient)
            for part in self.with_gains:
                matrix, scale = part.matrix(product), scales[part.index]
                part.row_gains(gains_sum).view(-1).addmv_(matrix, part.column_gains(gains) * scale)
                part.column_gains(gains_sum).addmv_(matrix.T, part.row_gains(gains).view(-1) * scale)
        if bank_sum is None:
            return
        self.apply_gains(gradient, gains)
        factor = self.factor(signs, scales, gains)
        for run in self.runs:
            run.of(bank_sum).addcmul_(run.at(gradient), run.of_chunks(factor))


class _Part:
    """Place of one slot in its block: views of the block's arrays."""

    def __init__(self, placed: Placed, start: int, sign: int):
        self.index, self.slot, self.gains = placed
        self.start, self.sign = start, sign
        slot = self.slot
        self.chunks = -(-slot.numel // slot.chunk)
        self.rows_are_chunks = slot.columns % slot.chunk == 0

    def per_row(self, factor: Tensor) -> Tensor:
        """The slot's factors [R, chunks in a row], or [chunks, 1] if a row is not a whole number of chunks."""
        shape = (self.slot.rows, self.chunks // self.slot.rows) if self.rows_are_chunks else (self.chunks, 1)
        return factor.as_strided(shape, (shape[1], 1), self.start // self.slot.chunk)

    def matrix(self, values: Tensor) -> Tensor:
        """The slot's elements of `values` [n] as [R, C]."""
        slot = self.slot
        return values.as_strided((slot.rows, slot.columns), (slot.columns, 1), values.storage_offset() + self.start)

    def row_gains(self, gains: Tensor) -> Tensor:
        """[R, 1]."""
        return gains.as_strided((self.slot.rows, 1), (1, 1), gains.storage_offset() + self.gains)

    def column_gains(self, gains: Tensor) -> Tensor:
        """[C]."""
        return gains.as_strided((self.slot.columns,), (1,), gains.storage_offset() + self.gains + self.slot.rows)


def make_blocks(slots: Sequence[Placed], seed: int, bank: int, device: str) -> list[Block]:
    """Cuts slots into blocks.

    Args:
        slots: in the plan's order; all of them `fits`.
        seed: of the plan.
        bank: number of elements in the bank.
        device: type of the bank's device.
    """
    blocks: list[list[Placed]] = []
    size, end, most = 0, -1, _BLOCK.get(device, _LARGE_BLOCK)
    for placed in slots:
        slot = placed.slot
        follows = slot.start == end and slot.chunk == blocks[-1][0].slot.chunk and size % slot.chunk == 0
        if not follows or size + slot.numel > most:
            blocks.append([])
            size = 0
        blocks[-1].append(placed)
        size, end = size + slot.numel, (slot.start + slot.numel) % bank
    return [Block(block, seed, bank) for block in blocks]


class Sheet:
    """The buffer of a bank's weights, and the blocks that fill it.

    Args:
        blocks: of the weights that are made.
        like: gives the dtype and device.
    """

    def __init__(self, blocks: Sequence[Block], like: Tensor):
        self.blocks = blocks
        self.indices = tuple(placed.index for block in blocks for placed in block.slots)
        with torch.inference_mode(False), torch.no_grad():
            self.values = like.new_empty(sum(block.numel for block in blocks))
            self.parts = self.values.split([block.numel for block in blocks])
            self.weights = [
                part.matrix(values).view(part.slot.shape)
                for block, values in zip(blocks, self.parts, strict=True)
                for part in block.parts
            ]
        self._idle = storage_users(self.values)

    def suits(self, bank: Tensor) -> bool:
        """True if the buffer has the bank's dtype and device."""
        return self.values.dtype == bank.dtype and self.values.device == bank.device

    def in_use(self) -> bool:
        """True if somebody may hold a weight of the last forward, such as a graph whose backward is to come."""
        users = storage_users(self.values)
        return users is None or self._idle is None or users > self._idle

    def fill(self, tensors: Mapping[str, Tensor | None], bases: Bases | None) -> tuple[Tensor, ...]:
        """The weights, as new views of the buffer.

        Args:
            tensors: the bank's, by name.
            bases: kept weights, which the generated differences are added to.
        """
        bank, scales, gains = _of_bank(tensors)
        for block, part in zip(self.blocks, self.parts, strict=True):
            block.generate(bank, scales, gains, part)
        if bases is None:
            return tuple(weight.detach() for weight in self.weights)
        add_to_each(self.weights, [bases.tensors[index] for index in self.indices])
        return tuple(weight.detach().to(bases.dtype) for weight in self.weights)

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
        bank, scales, gains = _of_bank(tensors)
        bank_sum = torch.zeros_like(bank) if needs[0] else None
        gains_sum = torch.zeros_like(gains) if needs[1] and gains is not None else None
        first = 0
        for block in self.blocks:
            given = gradients[first : first + len(block.slots)]
            first += len(block.slots)
            if all(gradient is None for gradient in given):
                continue
            flat = [
                bank.new_zeros(placed.slot.numel) if gradient is None else gradient.reshape(-1)
                for gradient, placed in zip(given, block.slots, strict=True)
            ]
            block.pull_back(torch.cat(flat).to(bank.dtype), bank, scales, gains, bank_sum, gains_sum)
        return None if bank_sum is None else bank_sum.unsqueeze(1), gains_sum


def _of_bank(tensors: Mapping[str, Tensor | None]) -> tuple[Tensor, Sequence[Tensor], Tensor | None]:
    """The bank [B], as a view of its parameter [B, 1], the scale of each slot, and all gains."""
    bank, scales = tensors["bank"], tensors["scales"]
    assert bank is not None and scales is not None
    return bank.view(-1), scales[1:].unbind(), tensors["gains"]


class PerStep:
    """The weights of one bank that were generated for the forward that runs.

    Args:
        slots: that can be generated together.
        seed: of the plan.
        bank: number of elements in the bank.
        only_small: generate together only while the weights are `SMALL` for their device.
    """

    def __init__(self, slots: Sequence[Placed], seed: int, bank: int, only_small: bool = False):
        self.slots, self.seed, self.bank, self.only_small = slots, seed, bank, only_small
        self.numel = sum(placed.slot.numel for placed in slots)
        self.indices = frozenset(placed.index for placed in slots)
        self.forwards = 0
        """Number of forwards of the model that run."""
        self.made: dict[int, Tensor] | None = None
        self.has_graph = False
        self.values: Values | None = None
        self.sheet: Sheet | None = None

    def begin(self, device: str) -> None:
        """A forward of the model begins.

        Args:
            device: type of the bank's device.
        """
        if self.forwards == 0:
            self.made = self.values = None
        if self.only_small and self.numel > SMALL.get(device, _SMALL_ELSEWHERE):
            self.sheet = None
        else:
            self.forwards += 1

    def end(self) -> None:
        """A forward of the model has ended, perhaps by an exception."""
        self.forwards = max(0, self.forwards - 1)

    def is_current(self, graph: bool, tensors: Callable[[], Mapping[str, Tensor | None]]) -> bool:
        """True if the weights that were made are those of this forward, or of the one that a backward recomputes.

        Args:
            graph: whether the weights must depend on the parameters in the graph.
            tensors: gives the bank's parameters and scales, by name.
        """
        if self.made is None or (graph and not self.has_graph):
            return False
        return self.forwards > 0 or (self.values is not None and self.values.are(tensors()))

    def make(
        self, values: Values, name: str, graph: bool, frozen: Collection[int], bases: Bases | None
    ) -> dict[int, Tensor]:
        """Generates the weights.

        Args:
            values: of the bank.
            name: of the bank's first weight, for messages.
            graph: whether the weights depend on the parameters in the graph.
            frozen: indices of the slots that send no gradient.
            bases: kept weights.
        """
        bank, gains = values.tensors["bank"], values.tensors["gains"]
        assert bank is not None
        self.made = None
        if self.sheet is None or not self.sheet.suits(bank) or self.sheet.in_use():
            self.sheet = Sheet(make_blocks(self.slots, self.seed, self.bank, bank.device.type), bank.detach())
        self.values, self.has_graph = values, graph
        if graph:
            weights = _AllAtOnce.apply(self.sheet, values, bases, name, bank, gains)
        else:
            weights = self.sheet.fill(values.tensors, bases)
        self.made = {
            index: weight.detach() if index in frozen else weight
            for index, weight in zip(self.sheet.indices, weights, strict=True)  # type: ignore[arg-type]
        }
        return self.made


class _AllAtOnce(torch.autograd.Function):
    """A bank and its gains → all weights of a sheet."""

    @staticmethod
    def forward(
        ctx: Any, sheet: Sheet, values: Values, bases: Bases | None, name: str, bank: Tensor, gains: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.sheet, ctx.values, ctx.name = sheet, values, name
        return sheet.fill(values.tensors, bases)

    @staticmethod
    @differentiable_once(lambda ctx: (ctx.name, tuple(p for p in ctx.values.tensors.values() if p is not None)))
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        values = ctx.values.checked(ctx.name)
        needs = ctx.needs_input_grad[4:]
        return None, None, None, None, *ctx.sheet.pull_back(gradients, values, needs)
