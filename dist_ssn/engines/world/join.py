"""This process's rank and the number of processes, from the environment that torchrun sets, or from MPI."""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]  # torch documents it there
from torch.distributed.rendezvous import rendezvous

from dist_ssn.engines.world import mpi as mpi_world
from dist_ssn.engines.world.rendezvous import agree_on_id
from dist_ssn.errors import Preempted, UserError

_FAREWELL_SECONDS = 0.1


@dataclass(frozen=True)
class World:
    """This process among `world_size` processes; use it as a context manager, or call `close` at the end.

    Args:
        rank: this process, from 0.
        world_size: number of processes.
        local_rank: this process on its node, from 0.
        device: of this process.
        owns_process_group: `close` ends the process group (False for one process, or if the process group existed before).
        store: address and port of the rendezvous's key-value store, if known.
        rendezvous_id: name of this start of the job in that store.
    """

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    owns_process_group: bool = False
    store: tuple[str, int] | None = None
    rendezvous_id: str = ""

    def close(self) -> None:
        """Ends the process group that `init_world` started; a second call does nothing."""
        if self.owns_process_group and dist.is_initialized():
            end_process_group()

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is not None and not issubclass(kind, Preempted):
            mpi_world.failed()
        self.close()


def is_distributed() -> bool:
    """True if this process is one of several in a process group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def end_process_group() -> None:
    """Ends torch.distributed's process group for good.

    Traps (torch 2.13): the last owner of a gloo process group waits for its threads when it frees the process group. If the owner
    is DDP's reducer, it holds Python's lock meanwhile, which such a thread may need to free the last collective's tensors: the
    process never ends. If the owner is such a thread itself, the process aborts. So a reference is kept, and the process group is
    never freed. A thread that still needs the lock when the interpreter ends aborts it as well; the pause lets it finish before.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
    dist.destroy_process_group()
    time.sleep(_FAREWELL_SECONDS)


def init_world(timeout_seconds: float = 600.0, *, device: str | None = None) -> World:
    """Joins the other processes that torchrun (or any launcher that sets the same variables) or an MPI launcher has started.

    Without WORLD_SIZE above 1 and without an MPI launcher, no process group is started. An existing process group is used. The
    backend is gloo on CPU, NCCL on CUDA, and gloo with an MPI launcher.

    Args:
        timeout_seconds: longest wait for the other processes, here and in each later collective.
        device: "cpu" or "cuda"; None: CUDA if there is a device.

    Raises:
        UserError: an environment variable is missing or malformed, or the other processes cannot be reached.
    """
    if not timeout_seconds > 0:
        raise UserError(f"timeout_seconds must be above 0, got {timeout_seconds!r}")
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise UserError(f"device must be 'cpu' or 'cuda', got {kind!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' was asked for, but PyTorch finds no CUDA device: use 'cpu'")

    joined = dist.is_available() and dist.is_initialized()
    if not joined and "WORLD_SIZE" not in os.environ and mpi_world.started_by_mpi():
        rank, world_size, local_rank, store = mpi_world.join_mpi(timeout_seconds)
        return World(rank, world_size, local_rank, _device(kind, local_rank), owns_process_group=True, store=store)
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    # Otherwise each task would train alone, and overwrite the others' files.
    if tasks != "1" and not joined and "WORLD_SIZE" not in os.environ:
        raise UserError(
            f"Slurm has started {tasks} tasks that are not connected with each other: use srun --mpi=pmi2 (or pmix), or one task "
            "per node that starts torchrun, as launch/slurm.sbatch does"
        )
    world_size = dist.get_world_size() if joined else _integer("WORLD_SIZE", default=1, low=1)
    if world_size == 1:
        return World(0, 1, 0, _device(kind, 0))
    rank = dist.get_rank() if joined else _integer("RANK", low=0, high=world_size - 1)
    # On CPU nothing depends on the local rank; with CUDA a default would put several processes on one device.
    local_default = 0 if kind == "cpu" else None
    local_rank = _integer("LOCAL_RANK", default=local_default, low=0, high=world_size - 1)
    where = _device(kind, local_rank)
    if joined:
        return World(rank, world_size, local_rank, where)

    address, port = _text("MASTER_ADDR"), _integer("MASTER_PORT", low=1, high=65535)
    try:
        rendezvous_id = _start_process_group("nccl" if kind == "cuda" else "gloo", rank, world_size, timeout_seconds)
    except (dist.DistError, RuntimeError) as error:
        raise UserError(
            f"rank {rank} could not meet the other {world_size - 1} processes at {address}:{port} within "
            f"{timeout_seconds:g} s (MASTER_ADDR, MASTER_PORT): {str(error).splitlines()[0]}"
        ) from error
    store = (address, port)
    return World(rank, world_size, local_rank, where, owns_process_group=True, store=store, rendezvous_id=rendezvous_id)


def processes_of_job() -> int:
    """Number of processes that `init_world` would join, without joining them.

    Raises:
        UserError: WORLD_SIZE is malformed.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    if "WORLD_SIZE" not in os.environ and mpi_world.started_by_mpi():
        return mpi_world.load_mpi().COMM_WORLD.size
    return _integer("WORLD_SIZE", default=1, low=1)


def _start_process_group(backend: str, rank: int, world_size: int, timeout_seconds: float) -> str:
    """Meets the other processes and starts torch's process group; returns the name under which they have met."""
    timeout = timedelta(seconds=timeout_seconds)
    # Not tcp://: under torchrun the launcher itself holds the store at this port, and only env:// takes that into account.
    store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
    store.set_timeout(timeout)
    rendezvous_id = agree_on_id(store, rank, world_size, timeout)
    named = PrefixStore(f"dist_ssn/{rendezvous_id}", store)
    dist.init_process_group(backend, store=named, rank=rank, world_size=world_size, timeout=timeout)
    return rendezvous_id


def _device(kind: str, local_rank: int) -> torch.device:
    if kind == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"LOCAL_RANK is {local_rank}, but this machine has {torch.cuda.device_count()} CUDA devices: "
            "start at most one process per device"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _text(name: str) -> str:
    value = os.environ.get(name, "").strip()
    if not value:
        raise UserError(f"environment variable {name} is missing, though WORLD_SIZE is above 1: start with torchrun")
    return value


def _integer(name: str, *, low: int, high: int | None = None, default: int | None = None) -> int:
    if default is not None and name not in os.environ:
        return default
    text = _text(name) if default is None else os.environ[name]
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low or (high is not None and value > high):
        span = f"{low} or more" if high is None else f"from {low} to {high}"
        raise UserError(f"environment variable {name} is {text!r}: it must be an integer {span}")
    return value
