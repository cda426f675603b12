"""The thread beside the training, and the interpreter's exit."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

FREES = """
import time
from dist_ssn.sync.worker import Worker

class Slow:
    def __del__(self):
        time.sleep(0.3)
        print("freed")

worker, value = Worker(), Slow()
future = worker.submit(lambda value=value: "done")
del value
print(future.result())
"""
HANGS = """
import threading
from dist_ssn.sync.worker import Worker

worker = Worker()
worker.submit(threading.Event().wait)
print("ends")
"""


@pytest.mark.processes
def test_an_interpreter_ends_after_what_the_thread_frees() -> None:
    """Tensors that a thread freed while the interpreter ended aborted the process, once in some 20 programs."""
    done = subprocess.run([sys.executable, "-c", FREES], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "done\nfreed\n"), done.stderr


@pytest.mark.processes
def test_a_thread_that_hangs_does_not_keep_the_interpreter() -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "ends\n"), done.stderr
    assert time.monotonic() - began < 60
