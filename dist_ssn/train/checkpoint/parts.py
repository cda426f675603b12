"""Parts of a checkpoint that each process writes for itself: with local updates, each has a state of its own.

A part is written beside the checkpoints, `.part-00000100-00002.safetensors`. Rank 0 moves all parts into the checkpoint before
that gets its name. Nothing is sent: like a run that goes on, it needs a folder that all processes can reach.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dist_ssn.files import read_tensors
from dist_ssn.sync.state import OWN
from dist_ssn.train.checkpoint.packed import pack, unpack

COMMON = "sync.safetensors"
"""File of what all processes hold in common: anchor, outer state, a mean that is on its way."""
_LOOK_SECONDS = 0.05


@dataclass(frozen=True)
class Part:
    """A process's part of a checkpoint, on the CPU, in memory of its own.

    Args:
        step: number of steps that were made.
        rank: the process.
        tensors: of its file.
    """

    step: int
    rank: int
    tensors: dict[str, Tensor]


def name_of(rank: int) -> str:
    """Name of a process's file in a checkpoint."""
    return f"worker-{rank:05d}.safetensors"


def split_state(state: Mapping[str, Any], optimizer: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of `COMMON` and of a process's own file, from a state of local updates and of the process's optimizer."""
    common = {key: value for key, value in state.items() if key not in OWN}
    return pack(common), pack({key: state[key] for key in OWN} | {"optimizer": dict(optimizer)})


def read_state(path: Path, workers: int, rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state of local updates, and of the optimizer, for process `rank`; another process's if it has none of its own.

    Args:
        path: a checkpoint.
        workers: number of processes that wrote it.
        rank: this process.

    Raises:
        ValueError: a file is malformed.
        OSError: it cannot be read.
    """
    common, own = (unpack(read_tensors(path / name)) for name in (COMMON, name_of(rank if rank < workers else 0)))
    optimizer = own.pop("optimizer", None)
    if not isinstance(optimizer, dict) or not all(
        isinstance(optimizer.get(key), dict) for key in ("tensors", "scalars")
    ):
        raise ValueError("it has no state of the optimizer")
    return common | own, optimizer


def write_part(part: Part, folder: Path) -> None:
    """Writes a part; if it cannot be written, rank 0 finds the reason in a file beside it."""
    target = _place(folder, part.step, part.rank)
    temporary = target.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(part.tensors, temporary)
        os.replace(temporary, target)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        target.with_suffix(".failed").write_text(str(error), encoding="utf-8")
        raise


def collect(folder: Path, step: int, ranks: int, into: Path, give_up: Callable[[], bool]) -> None:
    """Moves the parts of all processes but the first into a checkpoint, as soon as they are written.

    Args:
        folder: of the run's checkpoints.
        step: of the checkpoint.
        ranks: number of processes.
        into: folder of the checkpoint.
        give_up: True when waiting makes no sense any more.

    Raises:
        OSError: a part could not be written, or does not come.
    """
    for rank in range(1, ranks):
        part = _place(folder, step, rank)
        while not part.exists():
            if (failed := part.with_suffix(".failed")).exists():
                raise OSError(f"rank {rank} could not write its part: {failed.read_text(encoding='utf-8')}")
            if give_up():
                raise TimeoutError(
                    f"rank {rank} has not written its part into {folder}, which all processes must reach"
                )
            time.sleep(_LOOK_SECONDS)
        os.replace(part, into / name_of(rank))


def clean(folder: Path) -> None:
    """Removes the parts of killed saves."""
    for leftover in folder.glob(".part-*"):
        leftover.unlink(missing_ok=True)


def _place(folder: Path, step: int, rank: int) -> Path:
    return folder / f".part-{step:08d}-{rank:05d}.safetensors"
