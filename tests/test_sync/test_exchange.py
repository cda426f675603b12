"""Exchanges on several ranks: the same bits, the codec's error, nothing lost, bytes as counted, and what goes wrong."""

from __future__ import annotations

import ctypes
import math
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_ssn.comm import CommMeter
from dist_ssn.errors import CheckpointError, UserError
from dist_ssn.sync.codecs import CODECS
from dist_ssn.sync.exchange import Exchange
from dist_ssn.sync.transport import GroupTransport
from dist_ssn.torch_private import timeout_of
from testing.ranks import run_ranks

SIZE = 5 * 4096 + 300
PLAIN = (slice(100, 300), slice(4096, 4100), slice(SIZE - 1, SIZE))
ROUNDS = 20
ERROR = {"none": 1e-7, "fp16": 5e-4, "bf16": 4e-3, "int8": 0.015, "int4": 0.3, "bins2": 0.6, "sparse": 1.0}
"""Bound of a mean's error, relative to the mean of normal values, where a route encodes twice."""


def draw(rank: int, number: int = 0, size: int = SIZE) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(1000 * number + rank))


def raised(call: Any) -> str:
    try:
        call()
    except UserError as error:
        return str(error)
    return ""


def _means(rank: int, n: int) -> dict[tuple[str, str], dict[str, Any]]:
    found = {}
    wanted = torch.stack([draw(r) for r in range(n)]).double().mean(0)
    for name in CODECS:
        for route in ("auto", "all-gather", "two-phase"):
            exchange = Exchange(SIZE, name, route=route, plain=PLAIN)
            with CommMeter() as meter:
                mean = exchange.average(draw(rank))
            if route == "auto":
                _started(exchange.packed_bytes, rank, name, mean)
            found[name, route] = {
                "mean": mean,
                "error": float((mean - wanted).norm() / wanted.norm()),
                "plain": float((mean - wanted)[100:300].norm() / wanted[100:300].norm()),
                "route": exchange.route,
                "handed": (exchange.packed_bytes, meter.totals("synchronization").logical_bytes),
                "sent": (exchange.sent_bytes, meter.totals("synchronization").ring_bytes),
            }
    return found


def _started(handed: int, rank: int, name: str, mean: Tensor) -> None:
    """The same exchange beside the training: the same bits and bytes, and the seconds of waiting for it."""
    exchange, change = Exchange(SIZE, name, plain=PLAIN), draw(rank)
    with CommMeter() as meter:
        began = time.perf_counter()
        pending = exchange.start(change)
        change.zero_()  # it is the caller's again
        assert torch.equal(pending.wait(), mean)
        assert torch.equal(pending.wait(), mean) and pending.done()
    totals = meter.totals("synchronization")
    assert totals.logical_bytes == handed and totals.seconds is not None
    assert totals.exposed_seconds is not None and 0 < totals.exposed_seconds < time.perf_counter() - began


def _nothing_is_lost(rank: int, n: int) -> dict[tuple[str, str], dict[str, Any]]:
    """n times the means of all rounds lack exactly the values that the ranks have not sent yet."""
    found = {}
    for name in CODECS:
        for route in ("all-gather", "two-phase"):
            exchange = Exchange(SIZE, name, route=route, plain=PLAIN)
            total, wanted = (torch.zeros(SIZE, dtype=torch.float64) for _ in range(2))
            for number in range(ROUNDS if n == 2 else 5):
                total += exchange.average(draw(rank, number)).double()
                wanted += torch.stack([draw(r, number) for r in range(n)]).double().mean(0)
            unsent = exchange.unsent().double()
            dist.all_reduce(unsent)
            found[name, route] = {
                "lost": float((wanted - total - unsent / n).abs().max()),
                "behind": float((wanted - total).norm() / wanted.norm()),
            }
    return found


def _states(rank: int, n: int) -> None:
    for name in ("none", "int4", "sparse"):
        for route in ("all-gather", "two-phase"):
            whole, first, second = (Exchange(SIZE, name, route=route, plain=PLAIN) for _ in range(3))
            for number in range(2):
                whole.average(draw(rank, number))
                first.average(draw(rank, number))
            second.load_state_dict(first.state_dict())
            first.average(draw(rank, 7))  # the state is a copy
            for number in range(2, 4):
                assert torch.equal(whole.average(draw(rank, number)), second.average(draw(rank, number)))
    state = whole.state_dict()
    other = Exchange(SIZE, "sparse", route="two-phase", plain=PLAIN)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        other.load_state_dict({**state, "rank": n + 1})
        other.load_state_dict({**state, "ranks": n + 1})
    assert [str(warning.message).partition(":")[0] for warning in seen] == ["error feedback starts at zero"] * 2
    assert not other.unsent().any()
    kept = other.state_dict()["kept"]
    for wrong, said in (
        ({"size": 3}, f"what was not sent yet is of another model: 3 values, and there are {SIZE} here"),
        ({"codec": "int8"}, "of codec 'int8', and the codec is 'sparse' now: give codec 'int8'"),
        ({"plain": []}, "of another model: its gains, biases and norms have other places or sizes"),
        ({"kept": None}, "damaged: it must be the state_dict"),
        ({"kept": kept[1:]}, "damaged: kept must be float32"),
        ({"kept": [torch.zeros(3), *kept[1:]]}, "damaged: kept must be float32"),
    ):
        with pytest.raises(CheckpointError, match=re.escape(said)):
            other.load_state_dict({**state, **wrong})
    with pytest.raises(CheckpointError, match="damaged: it has no size"):
        other.load_state_dict({"kept": []})


def _wrong_use(rank: int, n: int) -> dict[str, str]:
    exchange = Exchange(100, "int8")
    found = {
        "type": raised(lambda: exchange.average(torch.zeros(100).double())),
        "shape": raised(lambda: exchange.average(torch.zeros(10, 10))),
        "codecs": raised(lambda: Exchange(100, "int4" if rank == 1 else "int8").average(torch.zeros(100))),
        "plain": raised(lambda: Exchange(100, "int8", plain=[slice(0, 1 + rank)]).average(torch.zeros(100))),
        "sizes": raised(lambda: Exchange(100 + rank, "none").average(torch.zeros(100 + rank))),
    }
    assert dist.is_initialized()
    change = torch.ones(100)
    if rank == 1:
        change[5] = float("nan")
    assert not exchange.average(change).isfinite().all()
    torch.testing.assert_close(exchange.average(torch.ones(100)), torch.ones(100), rtol=0.02, atol=0)
    pending = exchange.start(torch.ones(2**7)[:100])
    pending.wait()
    assert exchange._worker is not None
    assert timeout_of(exchange._worker[1].group) == timeout_of(dist.group.WORLD) == timedelta(seconds=120)
    return found


def _islands(rank: int, n: int) -> None:
    """Two pairs of ranks, each with exchanges of its own; rank 0 is in one more group than the others."""
    dist.new_group([0])
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own, other = pairs if rank < 2 else reversed(pairs)
    exchange = Exchange(SIZE, "int8", group=own)
    assert exchange.ranks == 2 and exchange.rank == rank % 2
    wanted = (draw(rank) + draw(rank ^ 1)) / 2
    torch.testing.assert_close(exchange.average(draw(rank)), wanted, rtol=0, atol=0.03)
    mean = exchange.start(draw(rank)).wait()
    torch.testing.assert_close(mean, wanted, rtol=0, atol=0.06)
    with pytest.raises(UserError, match="not a member of the process group"):
        GroupTransport(other)


def _all(rank: int, n: int) -> dict[str, Any]:
    if n == 4:
        _islands(rank, n)
    else:
        _states(rank, n)
    return {"means": _means(rank, n), "rounds": _nothing_is_lost(rank, n), "wrong": _wrong_use(rank, n)}


@pytest.mark.distributed
@pytest.mark.parametrize("n", [2, 4])
def test_exchanges(n: int) -> None:
    """One start of the ranks for all checks, since it takes long."""
    ranks = run_ranks(_all, n)
    means = ranks[0]["means"]
    for (name, route), cell in means.items():
        what = f"{name}, {route}"
        for other in ranks:
            assert torch.equal(other["means"][name, route]["mean"], cell["mean"]), what
        assert cell["error"] <= ERROR[name], what
        assert cell["plain"] <= min(ERROR[name], ERROR["int4"]), what  # at least 4 bits
        assert len(set(cell["handed"])) == len(set(cell["sent"])) == 1, what
        gathered = means[name, "all-gather"]["mean"]
        assert (cell["mean"] - gathered).norm() <= ERROR[name] * gathered.norm(), what
    assert means["none", "auto"]["route"] == "all-reduce"
    assert means["sparse", "auto"]["route"] == means["int4", "auto"]["route"] == "all-gather"
    for (name, route), cell in ranks[0]["rounds"].items():
        if CODECS[name].feedback_decay == 1:
            assert cell["lost"] < 2e-4, (name, route)
            assert cell["behind"] < ERROR[name] / (3 if n == 2 else 1) + 1e-6, (name, route)
    for rank in ranks:
        wrong = rank["wrong"]
        assert wrong["type"] == (
            "an exchange of 100 values takes a float32 tensor of shape (100,), not torch.float64 of (100,)"
        )
        assert "not torch.float32 of (10, 10)" in wrong["shape"]
        assert "rank 0 has 100 values, codec 'int8', route 'all-gather'" in wrong["codecs"]
        assert "rank 1 has 100 values, codec 'int4'" in wrong["codecs"]
        assert "rank 1 has 101 values, codec 'none', route 'all-reduce'" in wrong["sizes"]
        assert "the ranks' exchanges differ" in wrong["plain"]


def test_one_rank_sends_nothing() -> None:
    exchange = Exchange(10, "sparse")
    change = torch.randn(10)
    mean = exchange.average(change)
    assert torch.equal(mean, change) and mean.data_ptr() != change.data_ptr()
    assert torch.equal(exchange.start(change).wait(), change)
    assert (exchange.packed_bytes, exchange.sent_bytes, exchange.logical_bytes) == (0, 0, 40)


@pytest.mark.parametrize("plain", [[slice(0, 3), slice(2, 4)], [slice(8, 11)], [slice(0, 4, 2)], [slice(5, 3)]])
def test_wrong_stretches(plain: list[slice]) -> None:
    with pytest.raises(
        UserError, match=r"plain slice\(.*\) overlaps another, leaves a vector of 10 values, or has a step"
    ):
        Exchange(10, "int8", plain=plain)


def test_wrong_arguments() -> None:
    with pytest.raises(UserError, match="did you mean 'int8'"):
        Exchange(10, "int88")
    with pytest.raises(UserError, match="unknown route 'gather'"):
        Exchange(10, "int8", route="gather")
    with pytest.raises(UserError, match="at least one value, got size 0"):
        Exchange(0, "int8")


@pytest.fixture
def namespace() -> Iterator[str]:
    """A network with nothing but a loopback device, whose counters see our bytes alone."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("a network namespace needs Linux, root and iproute2")
    name = f"dssn-test-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"no network namespace: {made.stderr.strip()}")
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def allowed(ledger: float) -> float:
    """Bytes that the interface may count: the barriers around an exchange are some 10 kB, however large the message."""
    return 1.05 * ledger + 12_000


def _interface(rank: int, n: int, namespace: str, rendezvous: str) -> dict[tuple[str, str], tuple[int, float]]:
    """(fewest bytes at the interface in an exchange, bytes by the ledger) of all ranks, by codec and route."""
    with open(f"/var/run/netns/{namespace}") as file:
        assert ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000) == 0
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=n)

    def counted() -> int:
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        return int(next(line for line in lines if line.strip().startswith("lo:")).split(":")[1].split()[8])

    found = {}
    for name in CODECS:
        for route in ("auto", "two-phase") if name != "sparse" else ("auto",):
            size = {"sparse": 2_000_003, "bins2": 500_003}.get(name, 300_003)  # messages of some 50 kB or more
            exchange = Exchange(size, name, route=route, plain=[slice(0, 2000)])
            change, fewest, ledger = draw(rank, size=exchange.size), torch.tensor([math.inf]), n * exchange.sent_bytes
            exchange.average(change)
            for _ in range(20):  # on a busy machine TCP sends windows and segments again: the fewest bytes are ours
                dist.barrier()
                before = counted()
                dist.barrier()
                exchange.average(change)
                dist.barrier()
                fewest = fewest.clamp(max=counted() - before)
                dist.broadcast(fewest, 0)
                if fewest <= allowed(ledger):
                    break
            found[name, route] = int(fewest), ledger
    dist.destroy_process_group()
    return found


@pytest.mark.distributed
def test_bytes_at_the_interface(namespace: str, tmp_path: Path) -> None:
    ranks = run_ranks(_interface, 3, namespace, str(tmp_path / "rendezvous"), group=False)
    for what, (interface, ledger) in ranks[0].items():
        assert ledger <= interface <= allowed(ledger), (what, interface, ledger)
