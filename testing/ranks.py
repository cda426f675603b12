"""Run a function in several processes that form one gloo group: a distributed test is an ordinary test."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOADED = ("torch", "torch.distributed", "torch._dynamo", "dist_ssn.train.loop", "pytest", "hypothesis")
"""What every rank would import, which takes seconds. DDP imports torch._dynamo when the first one is made."""


class RanksFailed(AssertionError):
    """At least one rank raised, died or took too long; the message holds the ranks' tracebacks."""


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120, group: bool = True
) -> list[Any]:
    """Calls `fn(rank, world_size, *args)` in `world_size` processes, and returns what each returned, by rank.

    No process is left in any case.

    Args:
        fn: a function at the top level of a module.
        timeout: seconds for everything.
        group: start a gloo group over loopback before the call, and end it afterwards.

    Raises:
        RanksFailed: with the ranks' tracebacks.
    """
    # A server that has imported torch once forks the ranks: nothing of this process is inherited, and each is quick.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(world_size):
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=_child, args=(fn, rank, world_size, args, folder, timeout, group, there), daemon=True
            )
            process.start()
            there.close()
            ranks.append((process, here))
        try:
            return _collect(ranks, Path(folder), timeout)
        finally:
            for process, here in ranks:
                process.kill()
                process.join()
                here.close()


def _collect(ranks: list[tuple[Any, Connection]], folder: Path, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    while len(results) + len(failures) < len(ranks):
        waiting = {ranks[i][1]: i for i in range(len(ranks)) if i not in results and i not in failures}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            for i in waiting.values():
                kind = "stopped, because another rank failed" if failures else f"still running after {timeout} s"
                failures[i] = f"{kind}:\n{_where(ranks[i][0], folder / f'stack{i}')}"
        for connection in ready:
            rank = waiting[connection]  # pyright: ignore[reportArgumentType]
            try:
                ok, value = pickle.loads(connection.recv_bytes())  # pyright: ignore[reportAttributeAccessIssue]
            except EOFError:
                ranks[rank][0].join(5)
                ok, value = False, f"died without a word (exit code {ranks[rank][0].exitcode})"
            (results if ok else failures)[rank] = value
            if not ok:
                # The others now wait for this rank in some collective: give them a moment to fail by themselves.
                deadline = min(deadline, time.monotonic() + 2)
    if failures:
        raise RanksFailed("\n".join(f"--- rank {rank}: {text}" for rank, text in sorted(failures.items())))
    return [results[rank] for rank in range(len(ranks))]


def _where(process: Any, file: Path) -> str:
    """The Python stack of a process that is still running."""
    if process.is_alive() and process.pid is not None and file.exists():
        os.kill(process.pid, signal.SIGUSR2)
        time.sleep(0.3)
        return file.read_text()
    return "(no stack)"


def _child(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple,
    folder: str,
    timeout: float,
    group: bool,
    out: Connection,
) -> None:
    stack = open(Path(folder) / f"stack{rank}", "w")  # noqa: SIM115 - stays open as long as the process lives
    faulthandler.register(signal.SIGUSR2, file=stack)
    import torch
    import torch.distributed as dist

    from dist_ssn.engines.world.join import end_process_group

    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        if group:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/rendezvous",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=timeout),
            )
        value = fn(rank, world_size, *args)
        if group and dist.is_initialized():
            end_process_group()
        message = pickle.dumps((True, value))
    except BaseException:
        message = pickle.dumps((False, traceback.format_exc()))
    out.send_bytes(message)
    out.close()
