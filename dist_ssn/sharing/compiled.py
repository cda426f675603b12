"""All weights of a bank as one operation of a compiled graph: "per_step" under `torch.compile`.

Inductor fuses the pure path of a weight. But the gradient of each is then a slice in an array of the bank's size, and the compiler
has as many of them to sum up as there are weights. As an operation of a library, generation runs here as it does outside of graphs,
kernels included, and no graph breaks.

An operation gets no objects, so it finds its blocks by a fingerprint of the plan: graphs that torch keeps on disk have it inside.
Its outputs are flat, one per dtype, because the outputs of an operation must not share memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dist_ssn.sharing.blocks import Block, Given, Placed, make_blocks

_plans: dict[str, tuple[Sequence[Placed], int, int, Collection[int]]] = {}
_blocks: dict[tuple[str, torch.device], list[Block]] = {}


def register(slots: Sequence[Placed], seed: int, bank: int, lowered: Collection[int]) -> str:
    """Makes weights known to the operation, and returns their fingerprint; the arguments are those of `make_blocks`."""
    text = repr(([tuple(placed) for placed in slots], seed, bank, sorted(lowered)))
    key = hashlib.sha256(text.encode()).hexdigest()
    _plans[key] = slots, seed, bank, lowered
    return key


def all_weights(
    bank: Tensor, scales: Tensor, gains: Tensor | None, key: str, lower: torch.dtype | None
) -> dict[int, Tensor]:
    """The weights by slot, as the graph's tensors.

    Args:
        bank: [B, 1].
        scales: [1 + slots], as in `BankValues`.
        gains: all gains of the bank.
        key: see `register`.
        lower: dtype of the weights that autocast lowers; None: that of all others.
    """
    slots, _, _, lowered = _plans[key]
    flat = torch.ops.dist_ssn.all_weights(bank, scales, gains, key, lower)
    low = [placed for placed in slots if lower is not None and placed.index in lowered]
    exact = [placed for placed in slots if lower is None or placed.index not in lowered]
    weights: dict[int, Tensor] = {}
    for values, its in zip(flat, (exact, low), strict=True):
        for placed, piece in zip(its, values.split([placed.slot.numel for placed in its]), strict=False):
            weights[placed.index] = piece.view(placed.slot.shape)
    return weights


def _blocks_of(key: str, device: torch.device) -> list[Block]:
    if (key, device) not in _blocks:
        _blocks[key, device] = make_blocks(*_plans[key], device)
    return _blocks[key, device]


def _parts(
    blocks: Sequence[Block], flat: Sequence[Tensor], lower: torch.dtype | None
) -> Iterator[tuple[Block, Tensor]]:
    """The blocks, each with its part of the two flat tensors: the exact weights and the lowered ones."""
    starts = [0, 0]
    for block in blocks:
        which = int(lower is not None and block.lowered)
        yield block, flat[which].narrow(0, starts[which], block.numel)
        starts[which] += block.numel


def _empty(bank: Tensor, key: str, lower: torch.dtype | None) -> list[Tensor]:
    """The two flat tensors, without values."""
    slots, _, _, lowered = _plans[key]
    low = sum(placed.slot.numel for placed in slots if lower is not None and placed.index in lowered)
    exact = sum(placed.slot.numel for placed in slots) - low
    return [bank.new_empty(exact), bank.new_empty(low, dtype=lower)]


@torch.library.custom_op(
    "dist_ssn::all_weights",
    mutates_args=(),
    schema="(Tensor bank, Tensor scales, Tensor? gains, str key, ScalarType? lower) -> Tensor[]",
)
def _all_weights(
    bank: Tensor, scales: Tensor, gains: Tensor | None, key: str, lower: torch.dtype | None
) -> list[Tensor]:
    flat, given = _empty(bank, key, lower), Given.of(bank, scales, gains)
    for block, part in _parts(_blocks_of(key, bank.device), flat, lower):
        block.generate(given, part)
    return flat


@_all_weights.register_fake
def _(bank: Tensor, scales: Tensor, gains: Tensor | None, key: str, lower: torch.dtype | None) -> list[Tensor]:
    return _empty(bank, key, lower)


@torch.library.custom_op(
    "dist_ssn::all_gradients",
    mutates_args=(),
    schema="(Tensor[] flat, Tensor bank, Tensor scales, Tensor? gains, str key, ScalarType? lower) -> Tensor[]",
)
def _all_gradients(
    flat: Sequence[Tensor], bank: Tensor, scales: Tensor, gains: Tensor | None, key: str, lower: torch.dtype | None
) -> list[Tensor]:
    given = Given.of(bank, scales, gains)
    sums = [torch.zeros_like(tensor) for tensor in (given.bank, given.gains) if tensor is not None]
    for block, part in _parts(_blocks_of(key, bank.device), flat, lower):
        block.pull_back(part.clone(), given, sums[0], sums[1] if gains is not None else None)
    return [sums[0].to(bank.dtype).view(bank.shape), *(total.to(bank.dtype) for total in sums[1:])]


@_all_gradients.register_fake
def _(
    flat: Sequence[Tensor], bank: Tensor, scales: Tensor, gains: Tensor | None, key: str, lower: torch.dtype | None
) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in (bank, gains) if tensor is not None]


def _remember(ctx: object, inputs: tuple[object, ...], output: Iterable[Tensor]) -> None:
    bank, scales, gains, ctx.key, ctx.lower = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(bank, scales, gains)  # type: ignore[attr-defined]


def _backward(ctx: object, flat: list[Tensor]) -> tuple[Tensor | None, ...]:
    bank, scales, gains = ctx.saved_tensors  # type: ignore[attr-defined]
    sums = torch.ops.dist_ssn.all_gradients(flat, bank, scales, gains, ctx.key, ctx.lower)  # type: ignore[attr-defined]
    return sums[0], None, sums[1] if gains is not None else None, None, None


_all_weights.register_autograd(_backward, setup_context=_remember)
