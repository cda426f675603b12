"""A small GPT with a fault in one forward of one rank. The variable FAULT names it: `kind rank step`.

The fault comes in the process's forward of that number. The kind `mark` does nothing here: the driver acts from outside (on links,
disks, all ranks at once). Every kind first writes the time into the file FAULT_MARK.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ssn.comm import in_flight
from dist_ssn.train.checkpoint import folder
from dist_ssn.train.models.gpt import build_gpt

STOPPED_SECONDS, PAUSED_SECONDS = 60, 10
"""Seconds that "stop" and "pause" last: longer than the time-out, and shorter."""


class FaultyGPT(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = 0
        kind, rank, step = os.environ.get("FAULT", "none 0 0").split()
        self.kind, self.rank, self.at = kind, int(rank), int(step)

    def forward(self, tokens: Tensor) -> Tensor:
        self.forwards += self.training
        now = self.training and self.forwards == self.at and dist.get_rank() == self.rank
        if now and self.kind in BEFORE:
            BEFORE[self.kind](self)
        logits = self.model(tokens)
        if now and self.kind == "nan":
            mark()
            logits = logits * math.nan
        return logits


def build(**arguments: Any) -> nn.Module:
    """Builds the recipe's model."""
    return FaultyGPT(build_gpt(**arguments))


def mark() -> None:
    """Writes down the time of the fault."""
    path = Path(os.environ["FAULT_MARK"])
    path.with_suffix(".tmp").write_text(repr(time.time()))
    os.replace(path.with_suffix(".tmp"), path)


def _kill(_: object = None) -> None:
    mark()
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_in_all_reduce(_: object) -> None:
    def look() -> None:
        while True:
            operation = in_flight.oldest()
            if operation is not None and operation.purpose == "gradients" and time.monotonic() - operation.began > 0.01:
                _kill()
            time.sleep(0.001)

    threading.Thread(target=look, daemon=True).start()


def _kill_while_saving(_: object) -> None:
    folder.sync = _kill  # the files are there, and not under their name yet


def _stop(_: object, seconds: int = STOPPED_SECONDS) -> None:
    mark()
    later = f"sleep {seconds}; kill -CONT {os.getpid()} 2>/dev/null"
    subprocess.Popen(["sh", "-c", later], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def _flip(model: object) -> None:
    assert isinstance(model, nn.Module)
    with torch.no_grad():
        bank = next(parameter for name, parameter in model.named_parameters() if name.endswith(".bank"))
        bank.data.view(-1).view(torch.int32)[3] ^= 1 << 20
    mark()


BEFORE: dict[str, Callable[[nn.Module], None]] = {
    "kill in forward": _kill,
    "kill in all-reduce": _kill_in_all_reduce,
    "kill while saving": _kill_while_saving,
    "stop": _stop,
    "pause": partial(_stop, seconds=PAUSED_SECONDS),
    "flip": _flip,
    "mark": lambda _: mark(),
}
BEFORE = {kind.replace(" ", "-"): accident for kind, accident in BEFORE.items()}
