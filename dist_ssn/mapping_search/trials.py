"""Trials of a search, as JSON lines. Each line is written at once, so a killed search loses at most the trial in progress."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dist_ssn.errors import UserError

Line = dict[str, Any]


class Trials:
    """The lines of one search, in a file that may hold those of other searches; without a file, in memory only.

    Args:
        path: the file; None: nothing is written.
        key: hash of everything that the search depends on; lines with another key are left alone.
        writes: False on all processes but one.

    Raises:
        UserError: the file cannot be read or written, or is not a file of trials.
    """

    def __init__(self, path: str | os.PathLike[str] | None, key: str, writes: bool = True):
        self.path, self.key = None if path is None or not writes else Path(path), key
        self.lines: list[Line] = []
        if self.path is not None and self.path.exists():
            self.lines = [line for line in self._read(self.path) if line.get("search") == key]

    def _read(self, path: Path) -> list[Line]:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"search: the trials' file {path} cannot be read ({error}): give another one") from None
        whole, _, torn = text.rpartition("\n")
        lines = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                lines.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                raise UserError(
                    f"search: line {number} of {path} is not a trial: give another file, or remove this one"
                ) from None
        if torn:  # the search was killed while the last line was being written: that trial is lost
            self._write(path, whole + "\n" if whole else "", "w")
        return lines

    def find(self, **wanted: Any) -> Line | None:
        """The first line with these values; None if there is none."""
        return next((line for line in self.lines if all(line.get(k) == v for k, v in wanted.items())), None)

    def add(self, **values: Any) -> Line:
        """Writes a line to the disk before it returns."""
        line = {"search": self.key, **values}
        self.lines.append(line)
        if self.path is not None:
            self._write(self.path, json.dumps(line) + "\n", "a")
        return line

    @staticmethod
    def _write(path: Path, text: str, mode: str) -> None:
        try:
            with path.open(mode, encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"search: the trials' file {path} cannot be written ({error}): give another one") from None
