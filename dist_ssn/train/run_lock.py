"""A lock on a run's folder, so that no second program trains into it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from dist_ssn.errors import UserError

FILE = ".lock"
_held: dict[Path, int] = {}  # folders → descriptors, open as long as this process lives


def lock(folder: Path) -> None:
    """Takes the lock of a folder; it ends with the process, however that ends. A second call does nothing.

    Args:
        folder: exists. On a file system without locks nothing is locked.

    Raises:
        UserError: another process holds the lock.
        OSError: the file cannot be written.
    """
    path = folder.resolve()
    if path in _held:
        return
    descriptor = os.open(path / FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(descriptor, 200).decode("ascii", "replace").strip() or "another process"
        os.close(descriptor)
        raise UserError(
            f"{folder} is the folder of a run that is going on ({owner}): give another name or output, or stop that run first"
        ) from None
    except OSError:  # such as a network drive that cannot lock
        os.close(descriptor)
        return
    _held[path] = descriptor
    os.ftruncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode())


def unlock(folder: Path) -> None:
    """Gives a lock of this process back; without one, nothing happens."""
    descriptor = _held.pop(path := folder.resolve(), None)
    if descriptor is not None:
        (path / FILE).unlink(missing_ok=True)
        os.close(descriptor)
