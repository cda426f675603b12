"""What test_mpi.py runs under mpirun: python -m tests.test_engines.mpi_worker SCENARIO; rank 0 prints one line of JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dist_ssn
from dist_ssn.comm import CommMeter
from dist_ssn.engines import World, init_world, mpi
from dist_ssn.errors import ShareError, UserError

STEPS = 4


class Branches(nn.Module):
    """Two branches behind a stem: which of them come first, or at all, may depend on the rank."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.left, self.right = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.reentrant = reentrant
        self.double()

    def forward(self, x: Tensor, branches: str) -> Tensor:
        x = self.stem(x)
        for name in branches.split():
            branch = self.get_submodule(name)
            x = x + (checkpoint(branch, x, use_reentrant=True) if self.reentrant else branch(x)).tanh()
        return x


def difference(
    world: World, branches: Callable[[int], str], reentrant: bool = False, sync: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The largest difference, after some steps, between the engine's parameters and plain autograd's on all ranks' batches."""
    results, sent = [], 0
    data = torch.randn(STEPS, world.world_size, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for alone in (True, False):
        model = dist_ssn.share(Branches(reentrant), 0.7, mapping="depth:3")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if alone:
            for step in range(STEPS):
                for rank in range(world.world_size):
                    (model(data[step, rank], branches(rank)).square().mean() / world.world_size).backward()
                optimizer.step()
                optimizer.zero_grad()
        else:
            engine = mpi.MPIEngine(model, optimizer, sync=sync)
            with CommMeter() as meter:
                for step in range(STEPS):
                    with engine.accumulating(True):
                        engine.backward(model(data[step, world.rank], branches(world.rank)).square().mean())
                    engine.step()
            sent = meter.totals("gradients").logical_bytes // STEPS
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return {"difference": float((results[0] - results[1]).abs().max()), "sent": sent, "bytes": results[0].nbytes}


def pieces(world: World) -> dict[str, Any]:
    mpi.PIECE_BYTES = 100
    return difference(world, lambda rank: "left right")


def order(world: World) -> dict[str, Any]:
    return difference(world, lambda rank: "left right" if rank else "right left")


def missing(world: World) -> dict[str, Any]:
    return difference(world, lambda rank: "left" if rank else "left right")


def reentrant(world: World) -> dict[str, Any]:
    return difference(world, lambda rank: "left right left", reentrant=True)


def local(world: World) -> dict[str, Any]:
    """Local updates of one step, averaged plainly, are steps with mean gradients; only changes are sent."""
    found = difference(world, lambda rank: "left right", sync={"every": 1, "outer": "average"})
    return {"difference": found["difference"], "gradients": found["sent"]}


def keep(world: World) -> dict[str, Any]:
    """Kept values: steps like those of one process; what is sent at the start, and what another base on rank 1 raises."""
    data = torch.randn(STEPS, world.world_size, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def kept(change: float = 0.0) -> nn.Module:
        base = Branches()
        with torch.no_grad():
            base.left.weight[0, 0] += change * (world.rank == 1)
        return dist_ssn.share(base, 40, keep=True, exclude="right", train="stem")

    alone, model = kept(), kept()
    with CommMeter() as meter:
        engine = mpi.MPIEngine(model, torch.optim.SGD(model.parameters(), lr=0.1))
        start = meter.totals().logical_bytes
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
        for step in range(STEPS):
            with engine.accumulating(True):
                engine.backward(model(data[step, world.rank], "left right").square().mean())
            engine.step()
            for part in data[step]:
                (alone(part, "left right").square().mean() / world.world_size).backward()
            optimizer.step()
            optimizer.zero_grad()
    pairs = zip(alone.parameters(), model.parameters(), strict=True)
    try:
        mpi.MPIEngine(other := kept(1e-3), torch.optim.SGD(other.parameters(), lr=0.1))
        error = ""
    except ShareError as raised:
        error = str(raised)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return {
        "difference": max(float((mine - theirs).abs().max()) for mine, theirs in pairs),
        "sent": meter.totals("gradients").logical_bytes // STEPS,
        "trained": trained,
        "start": start,
        "frozen": sum(p.nbytes for p in model.parameters()) - trained,
        "error": error,
    }


def crash(world: World) -> None:
    """Rank 1 raises in its third step, and the others wait for it."""
    die(world, lambda: (_ for _ in ()).throw(UserError("rank 1 has had enough")))


def killed(world: World) -> None:
    die(world, lambda: os.kill(os.getpid(), signal.SIGKILL))


def die(world: World, end: Callable[[], Any]) -> None:
    model = dist_ssn.share(Branches(), 0.7)
    engine = mpi.MPIEngine(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(1000):
        if step == 3 and world.rank == 1:
            end()
        with engine.accumulating(True):
            engine.backward(model(torch.ones(5, 6, dtype=torch.float64), "left right").square().mean())
        engine.step()
        time.sleep(0.01)


def world(found: World) -> dict[str, Any]:
    return {"rank": found.rank, "world_size": found.world_size, "local_rank": found.local_rank}


SCENARIOS = {f.__name__: f for f in (pieces, order, missing, reentrant, local, keep, crash, killed, world)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    with init_world(60, device="cpu") as joined:
        for scenario in sys.argv[1:]:
            found = SCENARIOS[scenario](joined)
            if joined.rank == 0:
                print(json.dumps({"scenario": scenario, **(found or {})}), flush=True)
