"""Banks' gradients averaged in pieces, each sent in the middle of backward as soon as its last reader's part is in."""

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

    A reader's part is in when each of its reads since the last step has had its backward. All processes start the pieces in one
    order, that of the plan, so a piece also waits for its predecessors; what is not complete at the end of backward is sent
    then. So processes agree on what they send, however their graphs differ.

    Args:
        start: starts a sum over all processes.
    """

    def __init__(self, banks: Sequence[Bank], overlap: Overlap, start: Start, world_size: int):
        self.parameters = {bank.bank for bank in banks}
        self.active = False
        """Does the backward now under way end in averaged gradients?"""
        self._start, self._world_size = start, world_size
        # Backward comes to the last bank first, where banks are stages of depth.
        self._gradients = [_Gradient(bank, pieces_of(bank.group, overlap), self) for bank in reversed(banks)]
        self._queue = [(gradient, piece) for gradient in self._gradients for piece in gradient.pieces]
        self._sums: list[Sum] = []

    def arm(self, loss: Tensor) -> None:
        """Says that the next backward is that of `loss`, a step's last: after it, gradients are means over all processes."""
        self.active, self._sums = True, []
        for gradient in self._gradients:
            gradient.reset()
        loss.register_hook(lambda _: at_end_of_backward(self._close))

    def stepped(self) -> None:
        """Forgets reads whose backward never came."""
        for gradient in self._gradients:
            gradient.open.clear()

    def advance(self) -> None:
        """Starts the pieces that are complete and have no incomplete one before them."""
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
        for (gradient, piece), under_way in zip(self._queue, self._sums, strict=True):
            gradient.mean[piece.start : piece.end] += under_way.wait() / self._world_size
        for gradient in self._gradients:
            gradient.deliver()


class _Gradient:
    """One bank's gradient on its way: the bank's `Watcher`."""

    def __init__(self, bank: Bank, pieces: tuple[Piece, ...], sender: PieceSender):
        self.bank, self.pieces, self.sender = bank, pieces, sender
        self.open: Counter[int] = Counter()
        """slot → reads whose backward is still to come."""
        self.reset()
        bank.watcher = self

    def reset(self) -> None:
        self.local: Tensor | None = None
        """What this process has added up and not sent yet."""
        self.closed = False
        self.settled: set[int] = set()
        """Slots that may not grow any more: their part was sent."""
        self.mean = torch.zeros_like(self.bank.bank, requires_grad=False)

    def is_complete(self, piece: Piece) -> bool:
        return self.closed or (self.local is not None and not any(self.open[slot] for slot in piece.slots))

    def take(self, piece: Piece) -> Tensor:
        """The piece's gradient so far; what comes later is counted from zero."""
        if self.local is None:  # backward did not come to this bank, or not by its anchor (torch.compile)
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
                f"a part of the gradient of bank {self.bank.group.name!r} came by another way than its layers' backward "
                "(torch.compile, or the bank itself in the loss), and was not averaged: take overlap 'none'"
            )
        self.bank.bank.grad, self.local = self.mean, None

    def _accumulated(self) -> Tensor:
        """What earlier micro-batches have left."""
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
                "use_reentrant=False, or take overlap 'none'"
            )
        sums["bank"] += self._accumulated()
        self.local, self.bank.bank.grad = sums["bank"], None

    def grown(self, index: int, sums: dict[str, Tensor]) -> None:
        self.open[index] = max(0, self.open[index] - 1)
        if not self.sender.active:
            return
        if index in self.settled:
            raise UserError(
                f"the gradient of {self.bank.group.slots[index].name} grew after it was sent (a graph was gone through twice): "
                "take overlap 'none'"
            )
        self.sender.advance()

    def collect(self, sums: dict[str, Tensor]) -> None:
        if self.sender.active:
            sums.pop("bank", None)
