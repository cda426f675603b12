"""Errors of one rank, raised on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dist_ssn import errors
from dist_ssn.errors import Preempted, UserError
from dist_ssn.torch_private import all_gather_single

_SENTENCE_BYTES = 2048  # longest message that is sent to the other ranks
T = TypeVar("T")


def raise_together(action: Callable[[], T], device: torch.device) -> T:
    """Runs `action` on every rank; if it raises a `UserError` or `Preempted` on any of them, all raise it, and none waits for ever.

    It costs one all-gather of 8 bytes per rank, and a broadcast of the message if there is one.

    Args:
        action: runs once on every rank.
        device: of the collectives.

    Returns:
        The result of `action` on this rank.

    Raises:
        UserError: this rank's own error; on the other ranks, that of the highest rank that failed.
        Preempted: likewise.
    """
    failure: UserError | Preempted | None = None
    result: Any = None
    try:
        result = action()
    except (UserError, Preempted) as error:
        failure = error
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        if failure is not None:
            raise failure
        return result
    mine = torch.tensor([0 if failure is None else dist.get_rank() + 1], device=device)  # rank + 1
    failed = mine.new_empty(dist.get_world_size())
    all_gather_single(failed, mine)  # half of an all-reduce's packets in Gloo
    if not (source := int(failed.max().item())):
        return result
    text = torch.zeros(_SENTENCE_BYTES, dtype=torch.uint8, device=device)
    if failure is not None and source == dist.get_rank() + 1:
        sentence = f"{type(failure).__name__}:{failure}".encode()[:_SENTENCE_BYTES]
        text[: len(sentence)] = torch.tensor(list(sentence), dtype=torch.uint8)
    dist.broadcast(text, src=source - 1)
    if failure is not None:
        raise failure
    kind, _, sentence_text = bytes(text.tolist()).rstrip(b"\0").decode(errors="ignore").partition(":")
    raise getattr(errors, kind, UserError)(sentence_text)
