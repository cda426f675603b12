"""What local updates did without a word: each is now an error on all workers, a warning, or right."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ssn import LocalUpdates
from dist_ssn.errors import UserError
from testing.ranks import run_ranks
from tests.test_sync.test_states_and_faults import gathered, raised


def net(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4) if norm else nn.Tanh(), nn.Linear(4, 2))


def sgd(model: nn.Module, rate: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), rate)


def step(model: nn.Module, optimizer: Any, rank: int, number: int = 0) -> None:
    optimizer.zero_grad()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * rank + number))
    model(x).square().sum(1).mean().backward()
    optimizer.step()


def steps(model: nn.Module, optimizer: Any, rank: int, count: int) -> None:
    for number in range(count):
        step(model, optimizer, rank, number)


def values(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def mean_of(value: Tensor) -> Tensor:
    return torch.stack(gathered(value)).mean(0)


def refused(run: Callable[[], None], local: LocalUpdates) -> str:
    """The error of a run in which the block is left, too."""

    def block() -> None:
        with local:
            run()

    return raised(block)


# ---------------------------------------------------------------- the beginning


def _late_group(rank: int, n: int, folder: Path) -> list[str]:
    """No group under a launcher, and a group that comes after LocalUpdates. Leaves a group for what follows."""
    model = net()
    optimizer = sgd(model)
    os.environ["WORLD_SIZE"] = "2"
    found = [raised(lambda: LocalUpdates(model, optimizer))]
    del os.environ["WORLD_SIZE"]
    early = LocalUpdates(model, optimizer, every=2)
    dist.init_process_group("gloo", init_method=f"file://{folder}/late", rank=rank, world_size=n)
    found += [raised(lambda: steps(model, optimizer, rank, 2)), raised(early.synchronize)]
    early.close()
    return found


def _other_forms(rank: int, n: int) -> list[str]:
    """Buffers and frozen parameters that differ in order, size, number or dtype."""

    def model_with(kind: str) -> nn.Module:
        model = net()
        if kind == "order":
            for name in ("ab", "ba")[rank]:
                model.register_buffer(name, torch.full((3,), float(ord(name))))
        elif kind == "size":
            model.register_buffer("cache", torch.zeros(8 - 4 * rank))
        elif kind == "extra" and rank:
            model.register_buffer("cache", torch.zeros(1000))
        elif kind == "dtype":
            model.frozen = nn.Parameter(
                torch.zeros(64, dtype=(torch.float32, torch.bfloat16)[rank]), requires_grad=False
            )
        return model

    def begin(kind: str) -> None:
        model = model_with(kind)
        LocalUpdates(model, sgd(model[0] if kind == "dtype" else model))  # pyright: ignore[reportIndexIssue]

    return [raised(lambda kind=kind: begin(kind)) for kind in ("order", "size", "extra", "dtype")]


class Scheduled(torch.optim.SGD):
    """Has modes, as schedule-free optimizers have."""

    def train(self) -> None: ...

    def eval(self) -> None: ...


def _optimizers(rank: int, n: int) -> list[str]:
    from torch.distributed.optim import (
        ZeroRedundancyOptimizer,
    )  # its import warns, which is an error in pytest's process

    model = net()
    scheduled = Scheduled(model.parameters(), 0.1)
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)

    def fails_on_one(tensors: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(tensors, 0.1 / (1 - rank))

    of_first: Any = dist.new_group([0])
    return [
        raised(lambda: LocalUpdates(model, scheduled)),
        raised(lambda: LocalUpdates(model, zero)),
        raised(lambda: LocalUpdates(model, sgd(model), outer=torch.optim.LBFGS)),
        raised(lambda: LocalUpdates(model, sgd(model), outer=fails_on_one)),
        raised(lambda: LocalUpdates(model, sgd(model), group=of_first)) if rank else "",
    ]


def test_arguments_that_cannot_be() -> None:
    model, optimizer = net(), sgd(net())
    assert "needs a model and a torch optimizer of it, in this order, got SGD and Sequential" in raised(
        lambda: LocalUpdates(optimizer, model)  # pyright: ignore[reportArgumentType]
    )
    assert "got NoneType and SGD" in raised(lambda: LocalUpdates(None, optimizer))  # pyright: ignore[reportArgumentType]
    lazy, meta, empty = nn.LazyLinear(2), nn.Linear(2, 2, device="meta"), nn.ParameterList([torch.zeros(0)])
    sparse, wide = net(), net()
    sparse.register_buffer("links", torch.eye(2).to_sparse())
    wide.register_buffer("mask", torch.zeros(1, 2).expand(3, 2))
    for odd, sentence in (
        (lazy, "weight has no shape yet"),
        (meta, "weight is on the meta device"),
        (empty, "trains no parameter of the model"),
        (sparse, "links is sparse, quantized or expanded"),
        (wide, "mask is sparse, quantized or expanded"),
    ):
        assert sentence in raised(lambda odd=odd: LocalUpdates(odd, sgd(odd)))


# ---------------------------------------------------------------- buffers


def _buffers(rank: int, n: int) -> dict[str, Any]:
    """Values after the block, and warnings, where some buffers are not finite."""
    model = net(norm=True)
    starts = {
        "best": torch.tensor(torch.inf),
        "unset": torch.tensor(torch.nan),
        "mask": torch.tensor([0.0, -torch.inf]),
        "seen": torch.full((3,), torch.inf),
        "reset": torch.zeros(2),
        "lost": torch.zeros(2),
        "all lost": torch.ones(2),
    }
    for name, start in starts.items():
        model.register_buffer(name, start)
    optimizer = sgd(model)
    found: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with LocalUpdates(model, optimizer, every=4) as local:
            steps(model, optimizer, rank, 2)
            now = dict(model.named_buffers())
            now["best"].fill_(0.5 + rank)
            now["seen"][rank] = 7.0  # each worker has seen another element; nobody has seen the last
            now["reset"].fill_(torch.inf)
            now["all lost"].copy_(torch.tensor([rank, torch.nan]))
            now["lost"].fill_(torch.nan if rank else 4.0)
            found["expected"] = mean_of(now["1.running_var"])
            with local.anchored():
                found["anchored"] = now["1.running_var"].clone()
            local.synchronize()
            found |= {name: now[name].clone() for name in (*starts, "1.running_var")}
    found["warnings"] = sorted({str(warning.message) for warning in caught})
    return found


def _check_buffers(found: dict[str, Any]) -> None:
    torch.testing.assert_close(found["1.running_var"], found["expected"])
    assert torch.equal(found["anchored"], found["1.running_var"])
    assert found["best"] == 1.0 and found["unset"].isnan()
    assert found["mask"].tolist() == [0.0, -torch.inf]
    assert found["seen"].tolist() == [7.0, 7.0, torch.inf]
    assert found["reset"].tolist() == [torch.inf, torch.inf]  # on all workers alike
    assert found["lost"].tolist() == [4.0, 4.0] and found["all lost"].tolist() == [1.0, 1.0]
    assert found["warnings"] == [
        "the buffer all lost on rank 0, 1 is not finite: it is left out, and goes back to its last mean",
        "the buffer lost on rank 1 is not finite: it is left out, and gets the others' mean",
    ]


def _grown(rank: int, n: int) -> str:
    model = net()
    model.register_buffer("cache", torch.zeros(4), persistent=False)
    optimizer = sgd(model)
    local = LocalUpdates(model, optimizer, every=2)
    model.cache = torch.zeros(8)
    return refused(lambda: steps(model, optimizer, rank, 2), local)


# ---------------------------------------------------------------- all of them


def _all(rank: int, n: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"late group": _late_group(rank, n, folder)}
    cases = (_other_forms, _optimizers, _buffers, _grown)
    for case in cases:
        try:
            found[case.__name__] = case(rank, n)
        except UserError as error:
            raise AssertionError(f"{case.__name__}: {error}") from error
    return found


@pytest.mark.distributed
def test_silent_faults_are_said_on_all_ranks(tmp_path: Path) -> None:
    ranks = run_ranks(_all, 2, tmp_path, group=False)
    for found in ranks:
        assert "the launcher has started 2 processes" in found["late group"][0]
        assert all("was initialized after LocalUpdates was made" in message for message in found["late group"][1:])
        assert all("shapes or dtypes of parameters and buffers on rank 1" in text for text in found["_other_forms"])
        _check_buffers(found["_buffers"])
        assert "the buffer cache had the shape (4,)" in found["_grown"]
        scheduled, zero, closure, *_ = found["_optimizers"]
        assert "Scheduled keeps the weights of its evaluation mode in its own state" in scheduled
        assert "the steps of ZeroRedundancyOptimizer send parameters to rank" in zero
        assert "LBFGS, whose step needs a closure" in closure
    first, second = (found["_optimizers"] for found in ranks)
    assert first[3].startswith("rank 1 cannot begin local updates")
    assert "the function that LocalUpdates got as outer failed: ZeroDivisionError" in second[3]
    assert second[4].startswith("rank 1 is not in the group that LocalUpdates got")
