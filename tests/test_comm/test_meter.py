from __future__ import annotations

import statistics
import threading
import time
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from dist_ssn.comm import PURPOSES, CommMeter, Ledger, Totals, purpose
from dist_ssn.comm.meter import OPERATORS
from dist_ssn.errors import UserError
from dist_ssn.torch_private import all_gather_single
from testing.ranks import run_ranks

distributed = pytest.mark.distributed
BEFORE_2_14 = not hasattr(torch.ops.c10d, "gather_into_tensor_")  # torch has it from 2.14 on


class Tied(nn.Module):
    """One weight that three layers use; a part that no forward uses, and buffers, if wanted."""

    def __init__(self, *, unused: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.weight = nn.Parameter(torch.linspace(-0.5, 0.5, 64).reshape(8, 8))
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.never = nn.Linear(3, 3) if unused else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for _ in range(3):
            x = torch.tanh(x @ self.weight)
        return self.norm(x)


def _size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_counts_zero_without_a_process_group() -> None:
    with CommMeter() as meter, meter.purpose("metrics"):
        Tied()(torch.ones(2, 4)).sum().backward()
    total = meter.ledger.totals()
    assert (total.operations, total.logical_bytes, total.ring_bytes) == (0, 0, 0)
    assert (total.seconds, total.exposed_seconds) == (0.0, 0.0)
    assert meter.ledger.rows() == []
    assert meter.report() == "0 collectives, 0 B logical, 0 B ring"


def test_every_collective_of_torch_is_known() -> None:
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("c10d::")]
    takes_group = {
        s.name.removeprefix("c10d::") for s in schemas if any(a.name == "process_group" for a in s.arguments)
    }
    assert takes_group == set(OPERATORS) - ({"gather_into_tensor_"} if BEFORE_2_14 else set())
    for schema in schemas:
        _, payload = OPERATORS.get(schema.name.removeprefix("c10d::"), ("", None))
        assert payload is None or payload in {argument.name for argument in schema.arguments}, schema


@pytest.mark.parametrize("wrong", ["gradient", "", "GRADIENTS"])
def test_an_unknown_purpose_lists_the_known_ones(wrong: str) -> None:
    meter = CommMeter()
    for use in (lambda: meter.ledger.totals(wrong), lambda: purpose(wrong).__enter__()):
        with pytest.raises(UserError, match=f"unknown purpose '{wrong}': known are .*gradients"):
            use()


def test_an_unknown_collective_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown collective 'allreduce': known are .*did you mean 'all_reduce'"):
        Ledger().add("allreduce", "other", 4, 2)


def test_entering_a_meter_twice_is_an_error() -> None:
    with CommMeter() as meter, pytest.raises(UserError, match="counting already"):
        meter.__enter__()
    with meter:
        pass


def test_ledger_adds_up_and_says_what_it_does_not_know() -> None:
    ledger = Ledger()
    row = ledger.add("all_reduce", "gradients", 100, 4, timed=True, exposed=True)
    ledger.add_times(row, seconds=2.0, exposed=0.5)
    ledger.add("broadcast", "buffers", 10, 4, timed=True)
    ledger.add("broadcast", "buffers", 10, 1)
    assert ledger.totals("gradients") == Totals(1, 100, 150.0, 2.0, 0.5)
    buffers = ledger.totals("buffers")
    assert (buffers.operations, buffers.logical_bytes, buffers.ring_bytes) == (2, 20, 10.0)
    assert buffers.seconds is None and buffers.exposed_seconds is None
    assert ledger.totals().logical_bytes == sum(ledger.totals(name).logical_bytes for name in PURPOSES) == 120
    assert [(r["purpose"], r["collective"]) for r in ledger.rows()] == [
        ("gradients", "all_reduce"),
        ("buffers", "broadcast"),
    ]


def _every_collective(rank: int, n: int) -> dict[str, tuple[int, int, float]]:
    reduce_scatter = (
        dist.reduce_scatter_single if hasattr(dist, "reduce_scatter_single") else dist.reduce_scatter_tensor
    )
    with CommMeter() as meter:
        x = torch.zeros(24)  # 96 bytes: S
        parts = [torch.zeros(24) for _ in range(n)]
        dist.all_reduce(x)
        dist.broadcast(x, 0)
        dist.reduce(x, 0)
        dist.all_gather(parts, x)
        all_gather_single(torch.zeros(24 * n), x)
        reduce_scatter(torch.zeros(24 // n), x)
        dist.gather(x, parts if rank == 0 else None)
        dist.scatter(x, parts if rank == 0 else None)
        dist.all_to_all_single(torch.zeros(24), x)
        if rank == 0:
            dist.send(x, 1)
        elif rank == 1:
            dist.recv(x, 0)
        dist.barrier()
        rows = {
            row["collective"]: (row["operations"], row["logical_bytes"], row["ring_bytes"])
            for row in meter.ledger.rows()
        }
        assert meter.totals("other") == meter.totals()
    with CommMeter() as meter:
        with torch.inference_mode():
            dist.all_reduce(torch.zeros(6))
        functional.all_reduce(torch.zeros(6), "sum", dist.group.WORLD).wait()  # pyright: ignore
        pair = dist.new_group([0, 1])
        before = meter.ledger.totals()
        if rank < 2:
            dist.all_reduce(torch.zeros(6), group=pair)
            after = meter.ledger.totals()
            assert after.logical_bytes - before.logical_bytes == 24
            assert after.ring_bytes - before.ring_bytes == 24  # of two ranks, whatever the world's size
    assert before.logical_bytes >= 48
    dist.all_reduce(x)
    assert meter.ledger.totals().logical_bytes == before.logical_bytes + (24 if rank < 2 else 0)
    return rows


@distributed
@pytest.mark.parametrize("n", [2, 4])
def test_bytes_of_every_collective(n: int) -> None:
    for rank, rows in enumerate(run_ranks(_every_collective, n)):
        S, root = 96, rank == 0
        assert rows.pop("send", None) == ((1, S, S) if rank == 0 else None)
        assert rows.pop("recv", None) == ((1, 0, 0) if rank == 1 else None)
        assert rows == {
            "all_reduce": (1, S, S * 2 * (n - 1) / n),
            "broadcast": (1, S, S),
            "reduce": (1, S, S),
            "all_gather": (2, 2 * S, 2 * S * (n - 1)),
            "reduce_scatter": (1, S, S * (n - 1) / n),
            "gather": (1, S, S),
            "scatter": (1, n * S if root else 0, S * (n - 1) if root else 0),
            "all_to_all": (1, S, S * (n - 1) / n),
            "barrier": (1, 0, 0),
        }


def _purposes(rank: int, n: int) -> dict[str, int]:
    x = torch.zeros(1)
    with CommMeter() as meter, CommMeter() as second:
        with meter.purpose("metrics"):
            dist.all_reduce(x)
            with purpose("checkpoint"):
                dist.all_reduce(torch.zeros(2))
            # Another thread has purposes of its own.
            thread = threading.Thread(target=dist.all_reduce, args=(torch.zeros(4),))
            thread.start()
            thread.join()
        dist.all_reduce(torch.zeros(8))
    assert {row["collective"]: row["logical_bytes"] for row in second.ledger.rows()}.keys() == {"all_reduce"}
    assert second.totals().logical_bytes == meter.totals().logical_bytes
    assert meter.ledger.totals().seconds is not None
    return {row["purpose"]: row["logical_bytes"] for row in meter.ledger.rows()}


@distributed
def test_purposes_belong_to_the_thread_that_sets_them() -> None:
    assert run_ranks(_purposes, 2) == [{"metrics": 4, "checkpoint": 8, "other": 16 + 32}] * 2


def _ddp_attribution(rank: int, n: int) -> None:
    torch.manual_seed(rank)
    for unused, norm, late in ((False, False, False), (False, True, True), (True, False, True)):
        model = Tied(unused=unused, norm=norm)
        parameters, buffers = _size(model.parameters()), _size(model.buffers())
        tensors = len(list(model.parameters()))
        with CommMeter() as early:
            ddp = DistributedDataParallel(model, find_unused_parameters=unused)
        initialization = early.ledger.totals("initialization")
        assert initialization == early.ledger.totals()
        # Beside the values, DDP compares the number of parameter tensors and all their sizes and strides (int64).
        shapes = 8 + sum(16 * p.dim() for p in model.parameters())
        assert initialization.logical_bytes == parameters + buffers + shapes
        for step in range(4):
            with CommMeter() if late else early as meter:
                before = meter.ledger.totals("gradients").logical_bytes, meter.ledger.totals("buffers").logical_bytes
                loss = ddp(torch.randn(5, 4)).square().sum()
                if step == 3:  # from a thread that is not the meter's
                    thread = threading.Thread(target=loss.backward)
                    thread.start()
                    thread.join()
                else:
                    loss.backward()
            totals = {name: meter.ledger.totals(name) for name in PURPOSES}
            assert totals["gradients"].logical_bytes - before[0] == parameters
            assert totals["buffers"].logical_bytes - before[1] == buffers
            assert totals["gradients"].exposed_seconds is not None
            assert totals["metrics"].operations == totals["checkpoint"].operations == 0
            if late:
                # The map of unused parameters: an int32 for each parameter tensor, and not a gradient.
                assert totals["other"].logical_bytes == (4 * tensors if unused else 0)
                # Once, before the second step, DDP tells the new buckets; with unused parameters it keeps the old ones.
                assert totals["initialization"].operations == (2 if step == 1 and not unused else 0)


@distributed
@pytest.mark.parametrize("n", [2, 4])
def test_ddp_by_purpose(n: int) -> None:
    run_ranks(_ddp_attribution, n)


def _power_sgd(rank: int, n: int) -> dict[str, int]:
    ddp = DistributedDataParallel(nn.Linear(32, 32, bias=False))
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2)
    ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    for _ in range(3):
        ddp(torch.randn(2, 32)).sum().backward()
    with CommMeter() as meter:
        ddp(torch.randn(2, 32)).sum().backward()
    return {row["purpose"]: row["logical_bytes"] for row in meter.ledger.rows()}


@distributed
def test_power_sgd_sends_less() -> None:
    # Rank 1 of a 32 × 32 matrix: P and Q, 32 numbers each.
    assert run_ranks(_power_sgd, 2) == [{"gradients": 2 * 32 * 4}] * 2


def _two_rounds(rank: int, n: int, name: str) -> tuple[set[int], dict[str, int]]:
    threads = set()

    def second_round(future: torch.futures.Future) -> torch.Tensor:
        threads.add(threading.get_ident())
        dist.all_reduce(torch.zeros(8))
        return future.value()[0]

    def hook(state, bucket):  # DDP compares the annotations with types, and ours are strings
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        assert work is not None
        return work.get_future().then(second_round)

    ddp = DistributedDataParallel(nn.Linear(4, 4, bias=False))
    ddp.register_comm_hook(None, hook)
    with CommMeter() as meter, meter.purpose(name) if name else nullcontext():
        loss = ddp(torch.ones(1, 4)).sum()
        if rank == 1:
            time.sleep(0.3)
        loss.backward()
    return threads - {threading.get_ident()}, {row["purpose"]: row["logical_bytes"] for row in meter.ledger.rows()}


@distributed
@pytest.mark.parametrize("name", ["", "checkpoint"])
def test_rounds_on_the_backend_s_threads_belong_to_the_backward(name: str) -> None:
    results = run_ranks(_two_rounds, 2, name)
    # Rank 1 comes late, so that on rank 0 the first round ends, and the second begins, on a thread of gloo.
    assert results[0][0]
    assert [sent for _, sent in results] == [{name or "gradients": (16 + 8) * 4}] * 2


def _cost(rank: int, n: int) -> tuple[float, float, Totals, Totals]:
    alone = [dist.new_group([r]) for r in range(n)][rank]  # nobody to wait for: what is left is the call itself
    x = torch.zeros(1)

    def one(metered: bool) -> float:
        with CommMeter() if metered else nullcontext():
            start = time.perf_counter()
            for _ in range(50):
                dist.all_reduce(x, group=alone)
            return (time.perf_counter() - start) / 50

    one(True)
    plain, metered = zip(*[(one(False), one(True)) for _ in range(15)], strict=True)
    dist.barrier()
    with CommMeter() as meter:
        dist.barrier()
        if rank == 1:
            time.sleep(0.2)
        dist.all_reduce(x)
    called = meter.ledger.totals()
    ddp = DistributedDataParallel(nn.Linear(4, 4))
    ddp(torch.ones(1, 4)).sum().backward()
    with CommMeter() as meter:
        loss = ddp(torch.ones(1, 4)).sum()
        if rank == 1:
            time.sleep(0.2)
        loss.backward()
    return statistics.median(plain), statistics.median(metered), called, meter.ledger.totals("gradients")


@distributed
def test_cost_and_seconds() -> None:
    results = run_ranks(_cost, 2)
    for plain, metered, _, _ in results:
        assert metered - plain < 1e-3  # measured: 0.04 ms; a step of a small model takes 100 ms and has one or two
    for total in results[0][2:]:  # rank 0 waited for rank 1: in the call itself, and at the end of backward
        assert total.seconds is not None and 0.1 < total.seconds < 5
        assert total.exposed_seconds is not None and 0.1 < total.exposed_seconds < 5


def _short_meters(rank: int, n: int) -> list[float | None]:
    ddp = DistributedDataParallel(nn.Linear(4, 4))
    seconds = []
    for _ in range(300):
        with CommMeter() as meter:
            loss = ddp(torch.ones(1, 4)).sum()
            if rank == 1:
                time.sleep(0.001)
            loss.backward()
        seconds.append(meter.ledger.totals().seconds)
    return seconds


@distributed
def test_leaving_waits_for_the_seconds_of_what_has_completed() -> None:
    # gloo's thread books them after it has woken the caller: without the wait, one block in ten had none.
    for seconds in run_ranks(_short_meters, 2):
        assert all(seconds)
