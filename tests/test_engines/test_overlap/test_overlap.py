"""Gradients that travel in the middle of backward, or during the next step: what is sent when, and that nothing is ever wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dist_ssn
from dist_ssn.comm import CommMeter
from dist_ssn.engines import DDPEngine
from dist_ssn.engines.mpi import _messages_of
from dist_ssn.engines.overlap.delay import Delay, without_delay
from dist_ssn.engines.overlap.exchange import make_exchange
from dist_ssn.engines.overlap.pieces import PieceSender
from dist_ssn.errors import UserError
from dist_ssn.plan.overlap import parse_overlap
from dist_ssn.sharing.bank import Bank
from dist_ssn.train.models.wide_resnet import build_wide_resnet
from testing.ranks import RanksFailed, run_ranks

LAYERS, WIDTH = 6, 8


class Stack(nn.Module):
    """Float64 layers; `calls` counts those whose backward has begun."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.reentrant, self.backwards = reentrant, 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            y: Any = checkpoint(layer, x, use_reentrant=True) if self.reentrant else layer(x)
            x = y.tanh()
            if x.requires_grad:
                x.register_hook(self._count)
        return x

    def _count(self, _: Tensor) -> None:
        self.backwards += 1


class _Echo:
    """A sum over two processes that hold the same."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor

    def wait(self) -> Tensor:
        return 2 * self.tensor


def sender(model: Stack, overlap: str) -> tuple[PieceSender, list[tuple[int, int]]]:
    """A sender of `model` as one of two equal processes; and (layers gone through, numbers sent) of each message."""
    sent: list[tuple[int, int]] = []

    def start(tensor: Tensor) -> _Echo:
        sent.append((model.backwards, tensor.numel()))
        return _Echo(tensor.clone())

    banks = [module for module in model.modules() if isinstance(module, Bank)]
    return PieceSender(banks, parse_overlap(overlap), start, 2), sent


def shared(**options: Any) -> Stack:
    model = Stack(options.pop("reentrant", False))
    dist_ssn.share(model, 0.5, **options)
    return model


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in model.parameters()])


def expected(model: nn.Module, *inputs: Tensor) -> Tensor:
    model = copy.deepcopy(model)
    for x in inputs:
        model(x).square().sum().backward()
    return gradients(model)


X = torch.linspace(-1, 1, 3 * WIDTH, dtype=torch.float64).view(3, WIDTH)


@pytest.mark.parametrize("mapping", ["single", "depth:2"])
@pytest.mark.parametrize("morph", ["offset", "hash", "inter"])
@pytest.mark.parametrize("overlap", ["segments:3", "sums:3"])
def test_pieces_are_the_gradient_also_after_accumulation(overlap: str, morph: str, mapping: str) -> None:
    model = shared(mapping=mapping, morph=morph)
    told = expected(model, X, 2 * X)
    by_hand, sent = sender(model, overlap)
    for _ in range(3):  # a step leaves nothing behind for the next
        sent.clear()
        model(X).square().sum().backward()  # a micro-batch that is not the last: nothing is sent
        assert sent == []
        loss = model(2 * X).square().sum()
        by_hand.arm(loss)
        loss.backward()
        by_hand.stepped()
        assert (gradients(model) - told).norm() <= 1e-12 * told.norm()
        banks = [module.group.size for module in model.modules() if isinstance(module, Bank)]
        assert sum(numbers for _, numbers in sent) == sum(banks) * (3 if overlap == "sums:3" else 1)
        model.zero_grad()


def test_small_banks_ride_along() -> None:
    """They have no pieces of their own; over MPI they travel with what belongs to no bank."""
    model = dist_ssn.share(build_wide_resnet(depth=10, width=1), 0.1)
    banks = {name: bank for name, bank in model.dist_ssn.named_children() if isinstance(bank, Bank)}
    assert {name: len(bank.group.slots) for name, bank in banks.items()} == {"blocks": 8, "once-0": 1, "once-1": 1}
    exchange = make_exchange(model, parse_overlap("segments:4"), lambda _: None, 2)  # type: ignore[arg-type, return-value]
    assert exchange is not None and exchange.parameters == {banks["blocks"].bank}
    first, rest = _messages_of(model, set())
    assert first.parameters == [banks["blocks"].bank]
    assert {*first.parameters, *rest.parameters} == {*model.parameters()}
    assert len(_messages_of(model, exchange.parameters)) == 1


def test_pieces_start_before_backward_ends() -> None:
    model = shared(mapping="single", morph="offset:gains=false")
    by_hand, sent = sender(
        model, "segments:3"
    )  # of 191 numbers, where a layer reads 64: the first two are the first layer's
    loss = model(X).square().sum()
    by_hand.arm(loss)
    loss.backward()
    assert [when for when, _ in sent] == [LAYERS - 1, LAYERS, LAYERS]
    model = shared(mapping="single")
    by_hand, sent = sender(model, "sums:2")
    loss = model(X).square().sum()
    by_hand.arm(loss)
    loss.backward()
    assert [when for when, _ in sent] == [LAYERS // 2, LAYERS]


def test_reads_whose_backward_never_comes_only_delay_the_message() -> None:
    model = shared(mapping="single")
    told = expected(model, X)
    by_hand, sent = sender(model, "segments:3")
    model(X)  # with a graph that nobody goes through
    loss = model(X).square().sum()
    by_hand.arm(loss)
    loss.backward()
    assert {when for when, _ in sent} == {LAYERS}
    assert (gradients(model) - told).norm() <= 1e-12 * told.norm()
    by_hand.stepped()
    sent.clear()
    loss = model(X).square().sum()
    by_hand.arm(loss)
    loss.backward()
    assert min(when for when, _ in sent) < 2 * LAYERS  # forgotten: the first piece goes early again


def test_two_forwards_before_their_backwards() -> None:
    model = shared(mapping="single")
    told = expected(model, X, 2 * X)
    by_hand, _ = sender(model, "segments:3")
    losses = [model(X).square().sum(), model(2 * X).square().sum()]
    losses[0].backward()
    by_hand.arm(losses[1])
    losses[1].backward()
    assert (gradients(model) - told).norm() <= 1e-12 * told.norm()


def test_a_bank_without_a_gradient_is_sent_as_zeros() -> None:
    model = shared(mapping="single")
    by_hand, sent = sender(model, "segments:3")
    loss = model.layers[0].bias.sum()  # type: ignore[union-attr, operator]
    by_hand.arm(loss)
    loss.backward()
    assert len(sent) == 3
    (bank,) = (module for module in model.modules() if isinstance(module, Bank))
    assert bank.bank.grad is not None and not bank.bank.grad.any()


def test_what_would_be_wrong_is_an_error() -> None:
    model = shared(reentrant=True, mapping="single")
    by_hand, _ = sender(model, "segments:3")
    loss = model(X.clone().requires_grad_()).square().sum()
    by_hand.arm(loss)
    with pytest.raises(UserError, match="use_reentrant=False"):
        loss.backward()
    model = shared(mapping="single")
    by_hand, _ = sender(model, "segments:3")
    loss = model(X).square().sum()
    loss.backward(retain_graph=True)  # these reads are done now
    by_hand.arm(loss)
    with pytest.raises(UserError, match="grew after it was sent"):
        loss.backward()
    model = shared(mapping="single")
    by_hand, _ = sender(model, "sums:2")
    (bank,) = (module for module in model.modules() if isinstance(module, Bank))
    loss = model(X).square().sum() + bank.bank.square().sum()
    by_hand.arm(loss)
    with pytest.raises(UserError, match="did not come from its layers' backward"):
        loss.backward()


# ---------------------------------------------------------------- a step delayed by one


def delayed_by_hand(correction: float, steps: int) -> list[Tensor]:
    """Parameters after each step, by plain autograd on the whole batch and SGD with the gradient of the step before."""
    model = shared()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before: tuple[list[Tensor], list[Tensor]] | None = None
    square: list[Tensor] | None = None
    found = []
    for step in range(steps):
        batch(model, step, slice(None)).backward()
        now = [p.grad.clone() for p in parameters], [p.detach().clone() for p in parameters]  # pyright: ignore
        for i, p in enumerate(parameters):
            p.grad = torch.zeros_like(p)
            if before is not None:
                g, then = before[0][i], before[1][i]
                mean = g**2 if square is None else 0.05 * g**2 + 0.95 * square[i]
                p.grad = g + correction * g**2 / (mean + 1e-12).sqrt() * (p.detach() - then)
        if before is not None:
            square = [g**2 if square is None else 0.05 * g**2 + 0.95 * square[i] for i, g in enumerate(before[0])]
        before = now
        optimizer.step()
        optimizer.zero_grad()
        found.append(torch.cat([p.detach().flatten() for p in parameters]))
    return found


def batch(model: nn.Module, step: int, part: slice) -> Tensor:
    x = torch.randn(4, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return (model(x[part]) - 1).square().mean()


def _delayed(rank: int, world_size: int, correction: float, steps: int) -> list[Any]:
    """Parameters after each step; in the middle, what a checkpoint keeps goes over into a new engine."""
    model = shared()
    found, sent = [], []
    engine = DDPEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), overlap=f"delay:{correction}")
    for step in range(steps):
        with CommMeter() as meter, engine.accumulating(True):
            engine.backward(batch(engine.model, step, slice(rank * 2, rank * 2 + 2)))
        sent.append(meter.totals("gradients").logical_bytes)
        assert meter.totals("gradients").exposed_seconds is not None
        engine.step()
        if step == 1:
            parameters, state = copy.deepcopy(engine.gathered())
            model = shared()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            engine = DDPEngine(model, optimizer, overlap=f"delay:{correction}")
            engine.scatter(parameters, state)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    engine.gathered()  # waits for the last message
    assert sent == [8 * found[0].numel()] * steps
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("correction", [0.0, 0.7])
def test_a_delayed_step_uses_the_gradient_of_the_step_before(correction: float) -> None:
    told = delayed_by_hand(correction, 5)
    for ranks in run_ranks(_delayed, 2, correction, 5):
        for step, parameters in enumerate(ranks):
            assert (parameters - told[step]).norm() <= 1e-12 * told[step].norm(), step


def test_other_engines_do_without_what_a_delay_keeps() -> None:
    model = shared()
    delay = Delay(dict(model.named_parameters()), 1.0, lambda tensor: _Echo(tensor.clone()), 2)
    loss = model(X).square().sum()
    delay.arm(loss)
    loss.backward()
    state: Any = delay.state()
    assert all(set(entries) == {"delay_mean", "delay_parameters"} for entries in state.values())
    assert without_delay({"a": {"step": 1, **next(iter(state.values()))}}) == {"a": {"step": 1}}


# ---------------------------------------------------------------- under DDP


def _compiled(rank: int, world_size: int) -> None:
    model = shared(mapping="single")
    engine = DDPEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), overlap="segments:2")
    (bank,) = (module for module in model.modules() if isinstance(module, Bank))
    bank.pure = True  # as under torch.compile: gradients don't go through the anchor
    told = sum(expected(model, X + r) for r in range(world_size)) / world_size
    with engine.accumulating(True):
        engine.backward(engine.model(X + rank).square().sum())
    assert (gradients(model) - told).norm() <= 1e-12 * told.norm()


def _without_own_parameters(rank: int, world_size: int) -> None:
    torch.manual_seed(0)
    model = dist_ssn.share(
        nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)).double(), 0.3, morph="repeat"
    )
    engine = DDPEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), overlap="segments:2")
    told = sum(expected(model, X + r) for r in range(world_size)) / world_size
    engine.backward(F.mse_loss(engine.model(X + rank), torch.zeros_like(X), reduction="sum"))
    assert (gradients(model) - told).norm() <= 1e-12 * told.norm()


def _many_sizes(rank: int, world_size: int) -> None:
    widths = range(4, 14)
    model = nn.Sequential(*(nn.Linear(a, a + 1) for a in widths))
    dist_ssn.share(model, 0.5, mapping="shape")
    banks = [module.bank for module in model.modules() if isinstance(module, Bank)]
    for i, bank in enumerate(banks):
        nn.init.constant_(bank, i + 100 * rank)
    DDPEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), overlap="segments:2")
    assert len(banks) == len(widths) and [float(bank.mean()) for bank in banks] == list(range(len(widths)))


@pytest.mark.distributed
@pytest.mark.parametrize("case", [_compiled, _without_own_parameters, _many_sizes])
def test_under_ddp(case: Any) -> None:
    run_ranks(case, 2)


def _reentrant(rank: int, world_size: int) -> None:
    model = shared(reentrant=True, mapping="single")
    engine = DDPEngine(model, torch.optim.SGD(model.parameters(), lr=0.1), overlap="sums:2", static_graph=True)
    engine.backward(engine.model(X.clone().requires_grad_()).square().sum())


@pytest.mark.distributed
def test_reentrant_checkpoints_are_refused_on_all_ranks() -> None:
    with pytest.raises(RanksFailed, match="use_reentrant=False"):
        run_ranks(_reentrant, 2, timeout=60)
