"""Averaging of banks' gradients in pieces, each sent in the middle of backward as soon as its last layer has added its part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from dist_ssn.engines.overlap.sums import Start, Sum
from dist_ssn.errors import UserError
from dist_ssn.plan.overlap import Overlap, Piece, pieces_of
from dist_ssn.sharing.bank import Bank
from dist_ssn.torch_private import at_end_of_backward


class PieceSender:
    """Averages the gradients of `banks` over all processes, in the pieces of `plan.overlap.pieces_of`.

    A layer has added its part when each of its reads since the last step has had its backward. All processes start the pieces in
    the same order, that of the plan, so a piece also waits for its predecessors. Incomplete pieces are sent at the end of backward.
    So processes agree on their messages even if their graphs differ.

    Args:
        banks: in the model's order.
        overlap: "segments" or "sums".
        start: starts a sum over all processes.
        world_size: number of processes.
    """

    def __init__(self, banks: Sequence[Bank], overlap: Overlap, start: Start, world_size: int):
        self.parameters = {bank.bank for bank in banks}
        self.active = False
        """True in a backward that averages gradients."""
        self._start, self._world_size = start, world_size
        # If banks are stages of depth, backward begins with the last bank.
        self._gradients = [_Gradient(bank, pieces_of(bank.group, overlap), self) for bank in reversed(banks)]
        self._queue = [(gradient, piece) for gradient in self._gradients for piece in gradient.pieces]
        self._sums: list[Sum] = []

    def arm(self, loss: Tensor) -> None:
        """Prepares the step's last backward, that of `loss`: after it, gradients are means over all processes."""
        self.active, self._sums = True, []
        for gradient in self._gradients:
            gradient.reset()
        loss.register_hook(lambda _: at_end_of_backward(self._close))

    def stepped(self) -> None:
        """Forgets reads without a backward."""
        for gradient in self._gradients:
            gradient.open.clear()

    def advance(self) -> None:
        """Starts the pieces that are complete, up to the first incomplete one."""
        while len(self._sums) < len(self._queue):
            gradient, piece = self._queue[len(self._sums)]
            if not gradient.is_complete(piece):
                return
            self._sums.append(self._start(gradient.take(piece)))

    def _close(self) -> None:
        for gradient in self._gradients:
            gradient.closed = True
        self.advance()
        at_end_of_backward(self._finish)

    def _finish(self) -> None:
        self.active = False
        for (gradient, piece), total in zip(self._queue, self._sums, strict=True):
            gradient.mean[piece.start : piece.end] += total.wait() / self._world_size
        for gradient in self._gradients:
            gradient.deliver()


class _Gradient:
    """One bank's gradient during backward; it is the bank's `Watcher`."""

    def __init__(self, bank: Bank, pieces: tuple[Piece, ...], sender: PieceSender):
        self.bank, self.pieces, self.sender = bank, pieces, sender
        self.open: Counter[int] = Counter()
        """Slot → number of reads whose backward is still to come."""
        self.reset()
        bank.watcher = self

    def reset(self) -> None:
        self.local: Tensor | None = None
        """This process's sum that was not sent yet."""
        self.closed = False
        self.settled: set[int] = set()
        """Slots whose part was sent, and must not grow any more."""
        self.mean = torch.zeros_like(self.bank.bank, requires_grad=False)

    def is_complete(self, piece: Piece) -> bool:
        return self.closed or (self.local is not None and not any(self.open[slot] for slot in piece.slots))

    def take(self, piece: Piece) -> Tensor:
        """The piece's gradient so far; it is set to zero, so that later parts are sent with a later piece."""
        if self.local is None:  # backward did not reach this bank, or did so without its anchor (torch.compile)
            self.local, self.bank.bank.grad = self._accumulated(), None
        part = self.local[piece.start : piece.end]
        sent = part.clone()
        part.zero_()
        later = self.pieces[self.pieces.index(piece) + 1 :]
        if not any(other.start < piece.end and piece.start < other.end for other in later):
            self.settled |= piece.slots
        return sent

    def deliver(self) -> None:
        """Makes the mean the parameter's gradient."""
        if self.bank.bank.grad is not None:
            raise UserError(
                f"a part of the gradient of bank {self.bank.group.name!r} did not come from its layers' backward "
                "(torch.compile, or the bank itself in the loss), and was not averaged: use overlap 'none'"
            )
        self.bank.bank.grad, self.local = self.mean, None

    def _accumulated(self) -> Tensor:
        """The gradient of earlier micro-batches."""
        gradient = self.bank.bank.grad
        return torch.zeros_like(self.mean) if gradient is None else gradient

    def read(self, index: int) -> None:
        self.open[index] += 1

    def begin(self, sums: dict[str, Tensor]) -> None:
        if not self.sender.active:
            return
        if self.local is not None:
            raise UserError(
                f"the gradient of bank {self.bank.group.name!r} came in several parts, and the first one was sent: checkpoint with "
                "use_reentrant=False, or use overlap 'none'"
            )
        sums["bank"] += self._accumulated()
        self.local, self.bank.bank.grad = sums["bank"], None

    def grown(self, index: int, sums: dict[str, Tensor]) -> None:
        self.open[index] = max(0, self.open[index] - 1)
        if not self.sender.active:
            return
        if index in self.settled:
            raise UserError(
                f"the gradient of {self.bank.group.slots[index].name} grew after it was sent (backward ran twice through a graph): "
                "use overlap 'none'"
            )
        self.sender.advance()

    def collect(self, sums: dict[str, Tensor]) -> None:
        if self.sender.active:
            sums.pop("bank", None)
