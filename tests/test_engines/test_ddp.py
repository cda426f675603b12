from __future__ import annotations

import copy
import os
import socket
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dist_ssn import share
from dist_ssn.comm import CommMeter
from dist_ssn.engines import DDPEngine, init_world
from dist_ssn.engines.ddp import _bucket_limit
from dist_ssn.errors import UserError
from dist_ssn.plan import Group
from dist_ssn.plan.overlap import bucket_bytes
from dist_ssn.sharing.bank import Bank
from dist_ssn.sharing.registrations import watch_registrations
from testing.ranks import RanksFailed, run_ranks

distributed = pytest.mark.distributed


class Tied(nn.Module):
    """Float64; one weight is used by three layers; `extra` is used by some forwards only."""

    def __init__(self, *, reentrant: bool | None = None, extra: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.weight = nn.Parameter(torch.empty(8, 8))
        self.last = nn.Linear(8, 2)
        self.extra = nn.Linear(8, 8) if extra else None
        self.reentrant = reentrant
        self.double()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)

    def forward(self, x: torch.Tensor, use_extra: bool = False) -> torch.Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self._layer(x) if self.reentrant is None else checkpoint(self._layer, x, use_reentrant=self.reentrant)
        if self.extra is not None and use_extra:
            x = self.extra(x)
        return self.last(x)

    def _layer(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight)


def _batch(step: int) -> torch.Tensor:
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def _flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _train(rank: int, n: int, model: nn.Module, micro: int, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank's part of the same 16 samples per step that one process would see."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2)
    engine = DDPEngine(model, optimizer, scheduler=scheduler, clip_norm=0.3, **options)
    norms, sent, rounds = [], [], []
    for step in range(steps):
        parts = _batch(step)[rank::n].chunk(micro)
        with CommMeter() as meter:
            for i, part in enumerate(parts):
                with engine.accumulating(last=i == micro - 1):
                    use = {"use_extra": step % 2 == 1} if isinstance(model, Tied) and model.extra is not None else {}
                    loss = engine.model(part, **use).square().mean() / micro
                    engine.backward(loss, last=i == micro - 1)
            norm = engine.step()
        assert norm is not None and all(p.grad is None for p in model.parameters())
        norms.append(norm.item())
        sent.append(meter.ledger.totals("gradients").logical_bytes)
        rounds.append(meter.ledger.totals("gradients").operations)
    assert (engine.rank, engine.world_size) == (rank, n)
    assert engine.module is model and (engine.model is model) == (n == 1)
    lr = optimizer.param_groups[0]["lr"]
    return {"parameters": _flat(model), "norms": norms, "sent": sent, "rounds": rounds, "lr": lr}


CASES: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "plain": ({}, 1, {}),
    "accumulation": ({}, 2, {}),
    "checkpoint": ({"reentrant": False}, 1, {}),
    "reentrant checkpoint": ({"reentrant": True}, 1, {"static_graph": True}),
    "static graph, accumulation": ({}, 2, {"static_graph": True}),
    "unused": ({"extra": True}, 1, {"find_unused_parameters": True}),
}


def _all_cases(rank: int, n: int) -> dict[str, dict[str, Any]]:
    return {name: _train(rank, n, Tied(**model), micro, 5, options) for name, (model, micro, options) in CASES.items()}


@distributed
@pytest.mark.parametrize("n", [2, 4])
def test_equals_one_process_and_sends_each_gradient_once(n: int) -> None:
    ranks = run_ranks(_all_cases, n)
    for name, (model, _, _) in CASES.items():
        alone = _train(0, 1, Tied(**model), 1, 5, {})
        assert alone["sent"] == [0] * 5
        assert not torch.allclose(alone["parameters"], _flat(Tied(**model)), rtol=1e-3)
        for got in (rank[name] for rank in ranks):
            assert torch.equal(got["parameters"], ranks[0][name]["parameters"]), name
            torch.testing.assert_close(got["parameters"], alone["parameters"], rtol=1e-9, atol=1e-11)
            assert got["norms"] == pytest.approx(alone["norms"], rel=1e-9), name
            # The engine must send the first micro-batch of a static graph too.
            first = 2 if name == "static graph, accumulation" else 1
            assert got["rounds"] == [first, 1, 1, 1, 1], name
            assert got["sent"] == [8 * alone["parameters"].numel() * k for k in got["rounds"]], name  # float64
            assert got["lr"] == pytest.approx(alone["lr"])


class Banks(nn.Module):
    """The shape of a shared model: a flat bank per group at the root, and small own parameters."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        watch_registrations()  # as `share` does, so that DDP leaves out the banks' buffers
        groups = [Group(f"group{i}", size, slots=()) for i, size in enumerate(sizes)]
        self.dist_ssn = nn.ModuleDict({group.name: Bank(group, seed=0) for group in groups})
        for parameter in self.dist_ssn.parameters():
            nn.init.constant_(parameter, 0.01)
        self.own = nn.ModuleList(nn.LayerNorm(16) for _ in range(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, norm in enumerate(self.own):
            banks = list(self.dist_ssn.values())
            bank = banks[i * len(banks) // len(self.own)].bank
            x = norm(x + x @ bank.narrow(0, 16 * i, 256).view(16, 16) + bank.mean())  # pyright: ignore
        return x


def _rounds(rank: int, n: int) -> dict[str, list[list[int]]]:
    mib = 1024 * 256  # numbers of 4 bytes
    found = {}
    for name, sizes, bucket_mb in (
        ("small", (4000,), None),
        ("big", (3 * mib,), None),
        ("three", (2 * mib, 2 * mib, 2 * mib), None),
        ("cut", (4000,), 0.0005),
    ):
        model = Banks(*sizes)
        engine = DDPEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), bucket_mb=bucket_mb)
        steps = []
        for _ in range(3):
            with CommMeter() as meter:
                engine.backward(engine.model(torch.ones(2, 16)).square().sum())
                engine.step()
            gradients = meter.ledger.totals("gradients")
            assert gradients.logical_bytes == 4 * sum(p.numel() for p in model.parameters())
            assert gradients == meter.ledger.totals() or meter.ledger.totals("initialization").operations == 2
            steps.append(gradients.operations)
        found[name] = steps
    return found


@distributed
def test_buckets() -> None:
    for found in run_ranks(_rounds, 2):
        assert found["small"] == found["big"] == [1, 1, 1]
        # DDP learns in the first step in which order the gradients come.
        # Each bank closes a bucket; what becomes final after the last one may need a bucket of its own.
        assert found["three"][0] == 1 and found["three"][2] in (3, 4)
        assert found["cut"][2] > 2


def test_bucket_choice() -> None:
    mib = 2**20
    assert bucket_bytes([], own=50 * mib) is None
    assert bucket_bytes([400], own=400) == 800
    assert bucket_bytes([100 * mib], own=mib) == 101 * mib
    assert bucket_bytes([100 * mib], own=40 * mib) == 25 * mib
    assert bucket_bytes([100 * mib, 7 * mib], own=mib) == 7 * mib
    assert bucket_bytes([400, 400], own=mib) == 2**16
    assert bucket_bytes([100 * mib, 400], own=mib) == 101 * mib + 400  # a small bank rides along
    assert bucket_bytes([64_000, 4 * 999], own=mib) == mib + 4 * 16_999
    assert bucket_bytes([64_000, 4_000], own=mib) == 2**16


def test_only_the_banks_of_the_model_count_as_banks() -> None:
    model = share(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), 0.5)
    trainable = list(model.parameters())
    assert _bucket_limit(model, trainable) == sum(p.nbytes for p in trainable)  # one bank, and biases with it
    assert _bucket_limit(nn.Linear(4, 4), trainable) is None


def _buffers(rank: int, n: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    engine = DDPEngine(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in range(3):
        with CommMeter() as meter:
            engine.backward(engine.model(torch.full((3, 4), float(rank))).sum())
            assert engine.step() is None
        assert meter.ledger.totals("buffers").logical_bytes == sum(
            b.numel() * b.element_size() for b in model.buffers()
        )
    with CommMeter() as meter, torch.no_grad():
        engine.module.eval()(torch.ones(3, 4))
    assert meter.ledger.totals().operations == 0


@distributed
def test_buffers_are_broadcast_in_training_only() -> None:
    run_ranks(_buffers, 2)


def _engine(model: nn.Module, **options: Any) -> DDPEngine:
    return DDPEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


@pytest.mark.parametrize("inside", [True, False])
def test_backward_must_agree_with_accumulating(inside: bool) -> None:
    engine = _engine(nn.Linear(2, 2))
    with engine.accumulating(last=inside), pytest.raises(UserError, match=rf"accumulating\(last={not inside}\)"):
        engine.backward(engine.model(torch.ones(1, 2)).sum(), last=not inside)


def test_step_needs_averaged_gradients() -> None:
    engine = _engine(nn.Linear(2, 2))
    with engine.accumulating(last=False):
        engine.backward(engine.model(torch.ones(1, 2)).sum(), last=False)
    with pytest.raises(UserError, match="last micro-batch needs last=True"):
        engine.step()
    engine.backward(engine.model(torch.ones(1, 2)).sum())
    assert engine.step() is None


def test_wrong_models_and_optimizers_are_named() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UserError, match=r"Linear\) has no trainable parameters"):
        _engine(frozen)
    old, new = nn.Linear(2, 3), nn.Linear(2, 3)
    with pytest.raises(UserError, match=r"2 of 2 parameters that are not the model's .*\(3, 2\).*after share"):
        DDPEngine(new, torch.optim.SGD(old.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match=r"1 trainable parameters are not in the optimizer \(the first is bias\)"):
        DDPEngine(new, torch.optim.SGD([new.weight], lr=0.1))
    for option in ("clip_norm", "bucket_mb"):
        for value in (0, -1.0, float("nan")):
            with pytest.raises(UserError, match=f"{option} must be above 0"):
                _engine(new, **{option: value})


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _joins(rank: int, n: int, port: int) -> tuple[int, int, int, str]:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with init_world(60, device="cpu") as world:
        assert dist.get_backend() == "gloo" and dist.get_world_size() == n
        again = init_world(device="cpu")  # the group is there already, and stays after the second one's end
        again.close()
        assert dist.is_initialized() and again.rank == rank
        x = torch.ones(1)
        dist.all_reduce(x)
        assert x.item() == n
    assert not dist.is_initialized()
    world.close()
    return world.rank, world.world_size, world.local_rank, str(world.device)


@distributed
def test_init_world_joins_and_leaves() -> None:
    assert run_ranks(_joins, 2, _free_port(), group=False) == [(0, 2, 0, "cpu"), (1, 2, 1, "cpu")]


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("size", [None, "1"])
def test_one_process_starts_nothing(variables: pytest.MonkeyPatch, size: str | None) -> None:
    if size is not None:
        variables.setenv("WORLD_SIZE", size)
    with init_world(device="cpu") as world:
        assert (world.rank, world.world_size, str(world.device)) == (0, 1, "cpu")
        assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two': it must be an integer 1 or more"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"RANK": "2"}, "RANK is '2': it must be an integer from 0 to 1"),
        ({"RANK": "-1"}, "RANK is '-1'"),
        ({"RANK": None}, "RANK is missing"),
        ({"LOCAL_RANK": "1.5"}, "LOCAL_RANK is '1.5'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is missing"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http': it must be an integer from 1 to 65535"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
    ],
)
def test_malformed_variables_are_named(
    variables: pytest.MonkeyPatch, wrong: dict[str, str | None], message: str
) -> None:
    right = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in {**right, **wrong}.items():
        if value is not None:
            variables.setenv(name, value)
    with pytest.raises(UserError, match=message):
        init_world(1, device="cpu")
    assert not dist.is_initialized()


def test_slurm_tasks_that_know_nothing_of_each_other_do_not_train_alone(variables: pytest.MonkeyPatch) -> None:
    variables.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UserError, match=r"Slurm has started 2 tasks .*--mpi=pmi2"):
        init_world(device="cpu")
    variables.setenv("SLURM_STEP_NUM_TASKS", "1")
    init_world(device="cpu").close()


def test_unreachable_processes_are_an_error_with_the_address(variables: pytest.MonkeyPatch) -> None:
    port = _free_port()
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        variables.setenv(name, value)
    with pytest.raises(UserError, match=rf"rank 1 could not meet the other 1 processes at 127.0.0.1:{port} within 1 s"):
        init_world(1, device="cpu")
    assert not dist.is_initialized()


def test_wrong_arguments_of_init_world() -> None:
    with pytest.raises(UserError, match="device must be 'cpu' or 'cuda', got 'gpu'"):
        init_world(device="gpu")
    with pytest.raises(UserError, match="timeout_seconds must be above 0"):
        init_world(0)


def _fails(rank: int, n: int, how: str) -> None:
    if rank == 1:
        if how == "raise":
            raise KeyError("the reason")
        if how == "exit":
            os._exit(7)
        time.sleep(60)
    dist.barrier()


@distributed
@pytest.mark.parametrize(
    ("how", "message"),
    [("raise", "KeyError: 'the reason'"), ("exit", r"exit code 7"), ("hang", r"still running after 3 s:(.|\n)*_fails")],
)
def test_the_harness_tells_why_and_leaves_nothing(how: str, message: str) -> None:
    threads = threading.active_count()
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=message):
        run_ranks(_fails, 2, how, timeout=3)
    assert time.monotonic() - start < 20 and threading.active_count() == threads


def _plain(rank: int, n: int) -> torch.Tensor:
    ddp = DistributedDataParallel(Tied())
    ddp(_batch(0)[rank::n]).square().mean().backward()
    gradient = ddp.module.weight.grad
    assert gradient is not None
    return gradient


@distributed
def test_the_harness_returns_tensors_by_rank() -> None:
    model = Tied()
    model(_batch(0)).square().mean().backward()
    for gradient in run_ranks(_plain, 2):
        torch.testing.assert_close(gradient, model.weight.grad, rtol=1e-12, atol=1e-14)
