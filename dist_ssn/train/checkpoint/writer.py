"""Writing of checkpoints in the background."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from dist_ssn.errors import CheckpointError, UserError, describe
from dist_ssn.train.checkpoint import folder as folders
from dist_ssn.train.checkpoint.parts import Part, write_part
from dist_ssn.train.checkpoint.snapshot import Snapshot, write

HURRY_SECONDS = 5.0
"""Time for a part of another process that may be gone."""


class Writer:
    """Writes one checkpoint at a time on a thread; the next one waits until the previous one is written.

    The process does not end before the thread has ended, so a started checkpoint is completed.

    Args:
        folder: of the run's checkpoints.
        keep: number of checkpoints to keep.
        timeout_seconds: longest wait for the parts of the other processes.
    """

    def __init__(self, folder: Path, keep: int, timeout_seconds: float = 600.0) -> None:
        self.folder, self.keep = folder, keep
        self.failure: UserError | None = None
        """The error of the last checkpoint, until `wait` has raised it."""
        self._thread: threading.Thread | None = None
        self._timeout_seconds, self._hurry = timeout_seconds, threading.Event()

    def hurry(self) -> None:
        """Waits for no part of another process any more that is not there soon, because a process is gone."""
        self._hurry.set()

    def start(self, snapshot: Snapshot | Part) -> None:
        """Begins to write, as soon as the previous checkpoint is written.

        Raises:
            CheckpointError: the previous checkpoint could not be written.
        """
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Waits until nothing is being written.

        Raises:
            CheckpointError: the checkpoint could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure

    def _write(self, snapshot: Snapshot | Part) -> None:
        began = time.monotonic()

        def give_up() -> bool:
            return time.monotonic() - began > (HURRY_SECONDS if self._hurry.is_set() else self._timeout_seconds)

        try:
            if isinstance(snapshot, Part):
                write_part(snapshot, self.folder)
            else:
                write(snapshot, self.folder, self.keep, give_up)
        except UserError as error:
            self.failure = error
        except Exception as error:  # an exception on this thread would be lost
            target = self.folder / folders.name_of(snapshot.step)
            self.failure = CheckpointError(f"cannot write the checkpoint {target}: {describe(error)}")
