"""The folder of a run's checkpoints: names, order, replacement, and removal of leftovers of killed saves."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

_NAME = re.compile(r"step-(\d{8,18})")


def name_of(step: int) -> str:
    """Name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first; leftovers of killed saves are ignored."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint in `folder`; None if there is none."""
    found = checkpoints(Path(folder))
    return found[-1] if found else None


def temporary(target: Path) -> Path:
    """Path at which a checkpoint is written before it gets its name."""
    return target.parent / f".{target.name}.{os.getpid()}.tmp"


def set_aside(checkpoint: Path) -> None:
    """Renames a checkpoint to a leftover, in one step: a kill while it is being removed must not leave half of it."""
    os.replace(checkpoint, checkpoint.parent / f".{checkpoint.name}.old.tmp")


def clean(folder: Path) -> None:
    """Removes leftovers of killed saves."""
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover)


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk and survives a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_and_hash(path: Path) -> dict[str, Any]:
    """A file's size in bytes and its SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
