"""`make_exchange`: the object that averages gradients instead of an engine, for overlap settings other than "none"."""

from __future__ import annotations

import torch
from torch import nn

from dist_ssn.engines.overlap.delay import Delay
from dist_ssn.engines.overlap.pieces import PieceSender
from dist_ssn.engines.overlap.sums import Start
from dist_ssn.errors import UserError
from dist_ssn.plan.overlap import Overlap, least_alone
from dist_ssn.sharing.bank import banks_of
from dist_ssn.torch_private import END_OF_BACKWARD, FAST_PATH, MISSING

Exchange = PieceSender | Delay
"""Averages the gradients of its `.parameters` instead of the engine. The engine calls `.arm(loss)` before a step's last backward,
and `.stepped()` after the step."""


def make_exchange(model: nn.Module, overlap: Overlap, start: Start, world_size: int) -> Exchange | None:
    """The exchange for an overlap setting; None if the engine itself averages.

    Args:
        model: shared or dense.
        overlap: the setting.
        start: starts a sum over all processes.
        world_size: number of processes.

    Raises:
        UserError: this PyTorch lacks a function that the setting needs.
    """
    if overlap.kind == "none" or world_size == 1:
        return None
    if not END_OF_BACKWARD or not (FAST_PATH or overlap.kind == "delay"):
        lacking = ", ".join(MISSING) or "the autograd engine's queue_callback"
        raise UserError(
            f"overlap {overlap.kind!r} needs {lacking}, which torch {torch.__version__} lacks: use overlap 'none'"
        )
    if overlap.kind == "delay":
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        return Delay(parameters, overlap.correction, start, world_size)
    banks = [bank for bank in banks_of(model) if bank.bank.requires_grad]
    least = least_alone([bank.bank.nbytes for bank in banks])
    large = [bank for bank in banks if bank.bank.nbytes >= least]
    return PieceSender(large, overlap, start, world_size) if large else None
