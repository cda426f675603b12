"""What local updates did without a word: each is now an error on all workers, a warning, or right."""

from __future__ import annotations

import copy
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ssn import LocalUpdates, share
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
        "packed": torch.ones(2).to(torch.float8_e4m3fn),
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
            found |= {name: now[name].float().clone() for name in (*starts, "1.running_var")}
    found["warnings"] = sorted({str(warning.message) for warning in caught})
    return found


def _check_buffers(found: dict[str, Any]) -> None:
    torch.testing.assert_close(found["1.running_var"], found["expected"])
    assert torch.equal(found["anchored"], found["1.running_var"])
    assert found["best"] == 1.0 and found["unset"].isnan()
    assert found["mask"].tolist() == [0.0, -torch.inf]
    assert found["seen"].tolist() == [7.0, 7.0, torch.inf]
    assert found["packed"].tolist() == [1.0, 1.0]  # 8 bits
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


# ---------------------------------------------------------------- steps that are not counted


class Sharp(torch.optim.Optimizer):
    """Steps that call those of an optimizer inside, as sharpness-aware ones do; a caller may take these alone."""

    def __init__(self, parameters: Any, rate: float) -> None:
        super().__init__(parameters, {})
        self.base = torch.optim.SGD(self.param_groups, rate)

    def second_step(self) -> None:
        self.base.step()

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for _ in range(6):
            self.second_step()


class Around(torch.optim.Optimizer):
    """A wrapper whose step goes around that of the optimizer that LocalUpdates has."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.inner.step()


def _unseen_steps(rank: int, n: int) -> list[str]:
    """Halves of steps; and a new optimizer: a few steps, many, and after a step in the round."""
    found = []
    for count in (3, 12):
        model = net()
        sharp = Sharp(model.parameters(), 0.1)

        def halves(model: nn.Module = model, sharp: Sharp = sharp, count: int = count) -> None:
            for _ in range(count):
                model(torch.ones(2, 4)).sum().backward()
                sharp.second_step()

        found.append(refused(halves, LocalUpdates(model, sharp, every=2)))
    model = net()
    optimizer = sgd(model)

    def phases() -> None:
        steps(model, optimizer, rank, 3)
        steps(model, torch.optim.AdamW(model.parameters(), 0.01), rank, 4)

    found.append(refused(phases, LocalUpdates(model, optimizer, every=2)))
    return found


def _seen_steps(rank: int, n: int) -> list[bool]:
    """Optimizers inside and around, and values that are clipped after a round, are no error; all hold the same."""
    found = []
    for kind in (Sharp, Around, sgd):
        model = net()
        inner = sgd(model)
        outside = Sharp(model.parameters(), 0.1) if kind is Sharp else Around(inner) if kind is Around else inner
        with LocalUpdates(model, outside if kind is Sharp else inner, every=1) as local:
            steps(model, outside, rank, 3)
            assert local.step == 3
            with torch.no_grad():
                for p in model.parameters():
                    p.clamp_(-0.2 - 0.1 * rank, 0.2)
            local.synchronize()
        found.append(all(torch.equal(values(model), other) for other in gathered(values(model))))
    return found


# ---------------------------------------------------------------- values that are loaded


def _loaded(rank: int, n: int) -> list[str]:
    """In a round on all workers, on one, and at the end."""
    found = []
    for count, who in ((1, (0, 1)), (1, (1,)), (2, (0, 1))):
        model = net()
        optimizer, saved = sgd(model), copy.deepcopy(model.state_dict())

        def load(model: nn.Module = model, optimizer: Any = optimizer, saved: Any = saved, count: int = count) -> None:
            steps(model, optimizer, rank, count)
            if rank in who:  # noqa: B023 - called in this turn of the loop
                model.load_state_dict(saved)

        found.append(refused(load, LocalUpdates(model, optimizer, every=2)))
    return found


def _loaded_rightly(rank: int, n: int) -> dict[str, bool]:
    """An average that is shown and put back; a roll-back; and values that all load before the first forward."""
    model, other = net(), net()
    nn.init.ones_(other[0].weight)  # pyright: ignore[reportArgumentType]
    optimizer, found = sgd(model), {}
    with LocalUpdates(model, optimizer, every=4, outer="average") as local:
        model.load_state_dict(other.state_dict())
        assert not local.synchronize()
        found["loaded at the start"] = torch.equal(values(model), values(other))
        steps(model, optimizer, rank, 3)
        own = copy.deepcopy(model.state_dict())
        model.load_state_dict(other.state_dict())
        model.load_state_dict(own)
        step(model, optimizer, rank, 3)
        steps(model, optimizer, rank, 2)
        with local.anchored():
            model.load_state_dict(other.state_dict())
        steps(model, optimizer, rank, 2)
        model.load_state_dict(other.state_dict())
        local.restart(local.step)
        found["rolled back"] = not local.synchronize() and torch.equal(values(model), values(other))
    ends = []
    for former in (0, 4):  # steps that a restart leaves behind: momentum, what a codec has kept, and a mean on its way
        model = net()
        optimizer, start = sgd(model), copy.deepcopy(model.state_dict())
        with LocalUpdates(model, optimizer, every=2, codec="int4", delay=1) as local:
            steps(model, optimizer, rank, former)
            model.load_state_dict(start)
            local.restart(0)
            steps(model, optimizer, rank, 5)
        ends.append(values(model))
    found["restarted"] = torch.equal(*ends)
    with LocalUpdates(model, optimizer, every=1, outer="average", outer_rate=0.5):
        model.load_state_dict(net().state_dict())
        optimizer.zero_grad()
        model[0](torch.ones(1, 4)).sum().backward()  # a forward that LocalUpdates does not see
        optimizer.step()
    found["before a part's forward"] = torch.allclose(  # half of a step with a gradient of 1, from what was loaded
        model.get_parameter("0.bias"), net().get_parameter("0.bias") - 0.05
    )
    return found


def _set_in_forward(rank: int, n: int) -> list[Tensor]:
    """Largest distances from the mean of workers that trained alone: renormalized embeddings, clipped weights."""
    found = []
    for make in (lambda: nn.Sequential(nn.Embedding(8, 4, max_norm=0.5), nn.Linear(4, 2)), net):
        torch.manual_seed(0)
        model = make()
        alone = copy.deepcopy(model)
        is_embedding = isinstance(model[0], nn.Embedding)

        def train(model: nn.Module, optimizer: Any, is_embedding: bool = is_embedding) -> None:
            for _ in range(2):
                with torch.no_grad():
                    for p in () if is_embedding else model.parameters():
                        p.data.clamp_(-0.1, 0.1)
                optimizer.zero_grad()
                model(
                    torch.arange(4) + 3 * rank if is_embedding else torch.ones(2, 4) + rank
                ).square().mean().backward()
                optimizer.step()

        train(alone, sgd(alone))
        optimizer = sgd(model)
        with LocalUpdates(model, optimizer, every=2, outer="average"):
            train(model, optimizer)
        found.append((values(model) - mean_of(values(alone))).abs().max())
    return found


# ---------------------------------------------------------------- parameters that nobody averages


class Raw(torch.optim.Optimizer):
    """Writes to `.data`, which no version counts."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for p in self.param_groups[0]["params"]:
            p.data.add_(p.grad, alpha=-0.1)


def _apart(rank: int, n: int) -> dict[str, str]:
    """A teacher, a trunk that is unfrozen, a module that is added, second optimizers that no version shows."""
    found = {}
    for kind in ("teacher", "unfrozen", "added", "on one", "fused", "raw"):
        model = nn.Sequential(*net(), nn.Linear(2, 2))
        trunk = model[0]
        if kind in ("teacher", "unfrozen"):
            trunk.requires_grad_(False)
        optimizer = sgd(model[2])
        second: Any = {
            "fused": lambda trunk=trunk: torch.optim.AdamW(trunk.parameters(), 0.01, fused=True),
            "raw": lambda trunk=trunk: Raw(trunk.parameters()),
        }.get(kind, lambda: None)()

        def train(kind: str = kind, model: Any = model, optimizer: Any = optimizer, second: Any = second) -> None:
            steps(model, optimizer, rank, 2)
            if kind == "unfrozen":
                model[0].requires_grad_(True)
                second = sgd(model[0])
            elif kind == "added" or (kind == "on one" and rank):
                torch.manual_seed(1)
                model.append(nn.Linear(2, 2))
                second = sgd(model[-1])
            for _ in range(3):
                step(model, optimizer, rank)
                if kind == "on one":
                    continue
                if second is not None:
                    second.step()
                else:
                    with torch.no_grad():
                        model[0].weight.lerp_(model[2].weight.mean() * torch.ones(4, 4), 0.1)

        found[kind] = refused(train, LocalUpdates(model, optimizer, every=2))
    return found


def _kept(rank: int, n: int) -> str:
    """Kept values that one worker loads again are no error; ones that it changes are."""
    model = share(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), 0.5, keep=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)

    def train() -> None:
        norm: Any = model[1]  # pyright: ignore[reportIndexIssue]
        for change in (0, rank):
            norm.weight.data += change
            norm.load_state_dict(norm.state_dict()) if rank else None
            model(torch.ones(2, 8)).sum().backward()
            optimizer.step()

    return refused(train, LocalUpdates(model, optimizer, every=1))


def _alike(rank: int, n: int) -> bool:
    """What changes in the same way on all workers, outside of the optimizer, is no error."""
    model = net()
    model[0].requires_grad_(False)
    optimizer = sgd(model[2])
    with LocalUpdates(model, optimizer, every=2):
        for number in range(5):
            step(model, optimizer, rank, number)
            with torch.no_grad():
                model[0].weight.mul_(0.9)  # pyright: ignore[reportCallIssue]
        if rank == 0:
            model[0].load_state_dict(model[0].state_dict())
    return all(torch.equal(values(model), other) for other in gathered(values(model)))


# ---------------------------------------------------------------- calls


def _anchored_on_one(rank: int, n: int) -> str:
    model = net(norm=True)
    optimizer = sgd(model)

    def train() -> None:
        step(model, optimizer, rank)
        if rank == 0:
            with local.anchored():
                raise AssertionError("unreachable")
        step(model, optimizer, rank)

    local = LocalUpdates(model, optimizer, every=2)
    return refused(train, local)


def _anchored_without_buffers(rank: int, n: int) -> bool:
    """Where nothing is sent, one worker may enter alone."""
    model = net()
    optimizer = sgd(model)
    with LocalUpdates(model, optimizer, every=2) as local:
        before = values(model)
        step(model, optimizer, rank)
        if rank == 0:
            with local.anchored():
                assert torch.equal(values(model), before)
        step(model, optimizer, rank)
    return local.step == 2


def _inference(rank: int, n: int) -> Tensor:
    """The first exchange is in inference mode; rounds go on."""
    model = net(norm=True)
    optimizer = sgd(model)
    with LocalUpdates(model, optimizer, every=2, codec="int8") as local:
        step(model, optimizer, rank)
        with torch.inference_mode():
            local.synchronize()
            with local.anchored():
                model(torch.ones(2, 4))
            state = local.state_dict()
        steps(model, optimizer, rank, 3)
        local.load_state_dict(state)
        steps(model, optimizer, rank, 3)
    return values(model)


def test_a_model_can_be_saved_and_copied_in_the_block() -> None:
    model = net()
    optimizer = sgd(model)
    with LocalUpdates(model, optimizer, every=2):
        step(model, optimizer, 0)
        file = io.BytesIO()
        torch.save(model, file)
        copied = copy.deepcopy(model)
    file.seek(0)
    for one in (torch.load(file, weights_only=False), copied):
        one.load_state_dict(model.state_dict())
        assert torch.equal(one(torch.ones(1, 4)), model(torch.ones(1, 4)))
    assert not model._forward_pre_hooks and not model[0]._load_state_dict_pre_hooks


# ---------------------------------------------------------------- all of them


def _all(rank: int, n: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"late group": _late_group(rank, n, folder)}
    cases = (
        *(_other_forms, _optimizers, _buffers, _grown, _unseen_steps, _seen_steps, _loaded, _loaded_rightly),
        *(_set_in_forward, _apart, _kept, _alike, _anchored_on_one, _anchored_without_buffers, _inference),
    )
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
        for message, kind in zip(found["_unseen_steps"], ("SGD", "SGD", "AdamW"), strict=True):
            assert message.startswith(
                f"{kind} changes the parameters, and the optimizer that LocalUpdates got takes no"
            )
        assert found["_seen_steps"] == [True] * 3
        assert all(found["_loaded_rightly"].values()), found["_loaded_rightly"]
        assert all(distance < 1e-6 for distance in found["_set_in_forward"])
        names = dict.fromkeys(("teacher", "unfrozen", "fused", "raw"), "0.weight")
        names |= {"added": "4.weight", "on one": "a parameter that not all workers have"}
        for kind, name in names.items():
            assert f"{name} on rank 1 differs from that on the others, and no LocalUpdates" in found["_apart"][kind], (
                kind
            )
        assert found["_kept"].startswith("after step 2 1.weight on rank 1 differs from that on the others")
        assert found["_alike"] and found["_anchored_without_buffers"]
        assert "rank 0 enters anchored() after step 1, rank 1 ends a round after step 2" in found["_anchored_on_one"]
        assert torch.equal(found["_inference"], ranks[0]["_inference"])
        scheduled, zero, closure, *_ = found["_optimizers"]
        assert "Scheduled keeps the weights of its evaluation mode in its own state" in scheduled
        assert "the steps of ZeroRedundancyOptimizer send parameters to rank" in zero
        assert "LBFGS, whose step needs a closure" in closure
    first, second = (found["_loaded"] for found in ranks)
    late = "values were loaded into the model in the middle of local updates"
    assert all(late in message for message in (first[0], first[2], *second))
    assert first[1].startswith("rank 1 cannot take part in the synchronization")
    first, second = (found["_optimizers"] for found in ranks)
    assert first[3].startswith("rank 1 cannot begin local updates")
    assert "what LocalUpdates got as outer makes no optimizer of the anchor: ZeroDivisionError" in second[3]
    assert second[4].startswith("rank 1 is not in the group that LocalUpdates got")
