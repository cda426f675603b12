"""What every test starts from, and what it may not do or leave behind; the conftest.py of each folder of tests imports it.

A test starts with one thread, seed 0 and no launcher's environment. A test that starts a process is marked `distributed` (several
processes that train together) or `processes` (any other), or it fails.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings

__all__ = ["clean_slate", "extensions", "fewer_objects", "pytest_runtest_protocol"]

# A deadline says nothing on shared machines. Examples follow from the test alone: what fails here fails everywhere.
settings.register_profile("dist_ssn", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("dist_ssn")

# Triton reads it when it is imported. Without a GPU, its kernels are interpreted (tests/test_sharing/test_kernels.py).
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# PyTorch's compiler starts a pool of processes at its import otherwise, where there are several cores.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MARKS = ("distributed", "processes")
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system", "multiprocessing"}
"""Python's audit events of a new process; the last is ours, for the processes that a fork server starts."""


class ProcessGuard:
    """Lets only tests that are marked start a process. There is one per pytest process: audit hooks stay until the end."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.unmarked: str | None = None
        self.started: list[str] = []
        sys.addaudithook(self._see)
        start = BaseProcess.start

        def seen_start(process: BaseProcess) -> None:
            self._see("multiprocessing", (process.name,))
            start(process)

        BaseProcess.start = seen_start  # pyright: ignore[reportAttributeAccessIssue]

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.unmarked is None or event not in STARTS or os.getpid() != self.pid:
            return
        self.started.append(f"{event}{arguments[:2]}")
        raise AssertionError(
            f"{self.unmarked} starts a process ({self.started[-1]}): mark it with pytest.mark.distributed, if several "
            "processes train together, or with pytest.mark.processes"
        )


guard = ProcessGuard()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Watches a test and the fixtures that are made for it."""
    marked = any(item.get_closest_marker(mark) for mark in MARKS)
    guard.unmarked = None if marked else item.nodeid
    guard.started.clear()
    try:
        return (yield)
    finally:
        guard.unmarked = None


@pytest.fixture(scope="session")
def extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where torch and DeepSpeed compile what they load: no lock that an earlier, killed run left is waited for."""
    return tmp_path_factory.mktemp("extensions")


@pytest.fixture(autouse=True, scope="module")
def fewer_objects() -> None:
    """Takes what pytest and torch made so far away from the garbage collector.

    `share()` looks through all objects for an optimizer where a layer such as an LSTM holds its weights twice. A process that has
    collected some thousand tests has millions of objects, and each look takes most of a second.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch, extensions: Path) -> Iterator[None]:
    """Gives each test the same start, and fails the one that leaves a process group or another default dtype."""
    for name in [name for name in os.environ if name in OF_LAUNCHERS or name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # else scikit-learn counts the cores by a command
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    left = []
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        left.append("a process group")
    if torch.get_default_dtype() != torch.float32:
        left.append(f"default dtype {torch.get_default_dtype()}")
        torch.set_default_dtype(torch.float32)
    if not torch.is_grad_enabled():
        left.append("gradients switched off")
        torch.set_grad_enabled(True)
    assert not left, f"the test left behind: {', '.join(left)}"
    assert not guard.started, f"the test, which is not marked so, started processes: {', '.join(guard.started)}"
