"""Processes that mpirun, or Slurm with its PMI, has started: their ranks and their rendezvous."""

from __future__ import annotations

import atexit
import os
import socket
import sys
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  # torch documents it there

from dist_ssn.errors import UserError

_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS", "PMIX_RANK")
_failed = False


def started_by_mpi() -> bool:
    """True if an MPI launcher started this process: MPICH's or Open MPI's mpirun, `srun --mpi=pmi2` or `--mpi=pmix`."""
    return any(name in os.environ for name in _SIZES)


def load_mpi() -> Any:
    """The module `mpi4py.MPI`.

    By default mpi4py calls `MPI_Finalize` at exit, in which a process that has failed would wait for the others. Here it ends at
    once, and its launcher ends the others.

    Raises:
        UserError: mpi4py, or the MPI library that it needs, is not installed.
    """
    try:
        import mpi4py

        ours = "mpi4py.MPI" not in sys.modules  # otherwise the user's code decides how it ends
        if ours:
            mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(f"MPI needs mpi4py and an MPI library ({error}): pip install 'dist_ssn[mpi]'") from None
    if ours:
        atexit.register(lambda: None if _failed else MPI.Finalize())
        show = sys.excepthook

        def fail(*exception: Any) -> None:
            failed()
            show(*exception)

        sys.excepthook = fail
    return MPI


def failed() -> None:
    """Marks this process as failed, so that it ends without `MPI_Finalize`."""
    global _failed
    _failed = True


def join_mpi(timeout_seconds: float) -> tuple[int, int, int, tuple[str, int] | None]:
    """Joins the processes of an MPI launcher.

    Several processes also get a gloo process group, for everything but gradients. Rank 0 listens on MASTER_ADDR if that is set,
    else on loopback if all processes are on its machine, else on its host's name.

    Returns:
        (rank, world size, local rank, address and port of the rendezvous's store; None for the store with one process).
    """
    MPI = load_mpi()
    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    where = None
    if world.size > 1:
        timeout = timedelta(seconds=timeout_seconds)
        if world.rank == 0:
            alone = local.size == world.size
            address = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if alone else socket.gethostname())
            store = TCPStore(address, 0, is_master=True, timeout=timeout, wait_for_workers=False)
            where = (address, store.port)
        address, port = where = world.bcast(where)
        if world.rank != 0:
            store = TCPStore(address, port, is_master=False, timeout=timeout)
        dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=timeout)
    return world.rank, world.size, local.rank, where
