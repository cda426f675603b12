"""Worker of test_mpi.py under mpirun: python -m tests.test_sync.mpi_worker; rank 0 prints one line of JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from dist_ssn.comm import CommMeter
from dist_ssn.engines.world.mpi import load_mpi
from dist_ssn.errors import UserError
from dist_ssn.sync.codecs import CODECS
from dist_ssn.sync.exchange import Exchange
from dist_ssn.sync.transport import MPITransport

SIZE = 3 * 4096 + 50


def draw(rank: int) -> Tensor:
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(rank))


def measure(transport: MPITransport, name: str, route: str) -> dict[str, Any]:
    exchange, started = (Exchange(SIZE, name, group=transport, route=route, plain=[slice(7, 90)]) for _ in range(2))
    wanted = torch.stack([draw(rank) for rank in range(transport.ranks)]).mean(0)
    with CommMeter() as meter:
        mean = exchange.average(draw(transport.rank))
    everybody = transport.all_gather(mean.view(torch.uint8), "other")
    totals = meter.totals("synchronization")
    return {
        "error": float((mean - wanted).norm() / wanted.norm()),
        "equal": bool((everybody == everybody[0]).all()),
        "beside": torch.equal(started.start(draw(transport.rank)).wait(), mean),
        "booked": (totals.logical_bytes, totals.ring_bytes) == (exchange.packed_bytes, exchange.sent_bytes),
        "timed": totals.exposed_seconds is not None,
    }


def differ(transport: MPITransport) -> str:
    try:
        Exchange(10 + transport.rank, "int8", group=transport).average(torch.zeros(10 + transport.rank))
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    world = MPITransport(load_mpi().COMM_WORLD)
    cells = {f"{name} {route}": measure(world, name, route) for name in CODECS for route in ("auto", "two-phase")}
    said = differ(world)
    if world.rank == 0:
        print(json.dumps({"cells": cells, "differ": said}), flush=True)
