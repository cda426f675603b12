"""A test that starts a process says so by its mark: `make test-quick` leaves it out."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from testing.fixtures import guard

STARTS: dict[str, Callable[[], object]] = {
    "subprocess": lambda: subprocess.run([sys.executable, "-c", "pass"], check=True),
    "os.system": lambda: os.system("true"),
    "os.posix_spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
    **{
        f"multiprocessing, {way}": lambda way=way: multiprocessing.get_context(way).Process(target=print).start()
        for way in ("spawn", "forkserver", "fork")
    },
}


@pytest.mark.parametrize("way", STARTS)
def test_a_test_without_a_mark_starts_no_process(way: str) -> None:
    with pytest.raises(AssertionError, match=r"starts a process .*: mark it"):
        STARTS[way]()
    assert len(guard.started) == 1
    guard.started.clear()


@pytest.mark.processes
def test_a_test_with_a_mark_does() -> None:
    assert subprocess.run([sys.executable, "-c", "pass"], check=False).returncode == 0
    assert guard.started == []
