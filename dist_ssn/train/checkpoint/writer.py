"""Writing of checkpoints in the background."""

from __future__ import annotations

import threading
from pathlib import Path

from dist_ssn.errors import CheckpointError, UserError, describe
from dist_ssn.train.checkpoint import folder as folders
from dist_ssn.train.checkpoint.snapshot import Snapshot, write


class Writer:
    """Writes one checkpoint at a time on a thread; the next one waits until the previous one is written.

    The process does not end before the thread has ended, so a started checkpoint is completed.

    Args:
        folder: of the run's checkpoints.
        keep: number of checkpoints to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.failure: UserError | None = None
        """The error of the last checkpoint, until `wait` has raised it."""
        self._thread: threading.Thread | None = None

    def start(self, snapshot: Snapshot) -> None:
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

    def _write(self, snapshot: Snapshot) -> None:
        try:
            write(snapshot, self.folder, self.keep)
        except UserError as error:
            self.failure = error
        except Exception as error:  # an exception on this thread would be lost
            target = self.folder / folders.name_of(snapshot.step)
            self.failure = CheckpointError(f"cannot write the checkpoint {target}: {describe(error)}")
