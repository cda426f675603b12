"""Accelerate on shared models: prepare, accumulation, saved states, two processes."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ssn import CommMeter, comm_hook, parameter_groups, set_generation, share
from testing.ranks import run_ranks

accelerate = pytest.importorskip("accelerate")
from accelerate.state import AcceleratorState, GradientState  # noqa: E402


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate keeps what the first Accelerator of a process was given."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return share(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)), 0.3)


def batches(count: int, rows: int = 8) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(rows, 8, generator=generator), torch.randint(0, 4, (rows,), generator=generator))
        for _ in range(count)
    ]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def prepared(model: nn.Module, **options: Any) -> tuple[Any, nn.Module, Any]:
    accelerator = accelerate.Accelerator(cpu=True, **options)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=3e-3))
    return accelerator, *accelerator.prepare(model, optimizer)


def steps(accelerator: Any, model: nn.Module, optimizer: Any, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    losses = []
    for batch in data:
        with accelerator.accumulate(model):
            loss = loss_of(model, batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def assert_equal(got: nn.Module, wanted: nn.Module, **tolerance: float) -> None:
    states = [module.state_dict() for module in (got, wanted)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], **tolerance)


def test_accumulation() -> None:
    """Two batches accumulated are one batch of both: compared with a plain loop."""
    data = batches(12)
    model, plain = net(), net()
    steps(*prepared(model, gradient_accumulation_steps=2), data)
    optimizer = torch.optim.AdamW(parameter_groups(plain, lr=3e-3))
    for first, second in zip(data[::2], data[1::2], strict=True):
        loss_of(plain, (torch.cat([first[0], second[0]]), torch.cat([first[1], second[1]]))).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_equal(model, plain, rtol=1e-4, atol=1e-5)


def test_a_saved_state_resumes_exactly(tmp_path: Path) -> None:
    """In a model built from another seed."""
    data = batches(6)
    model = net()
    parts = prepared(model)
    steps(*parts, data[:3])
    parts[0].save_state(str(tmp_path))
    steps(*parts, data[3:])
    AcceleratorState._reset_state(True)
    again = net(seed=5)
    parts = prepared(again)
    parts[0].load_state(str(tmp_path))
    steps(*parts, data[3:])
    assert_equal(again, model, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["on_demand", "per_step"])
def test_offloading_gives_the_same_outputs(mode: str) -> None:
    """The banks are on the meta device then, but for each read."""
    model, x = net(), batches(1)[0][0]
    set_generation(model, mode)
    with torch.no_grad():
        expected = model(x)
        accelerate.cpu_offload(model, execution_device="cpu")
        assert torch.equal(model(x), expected)


def test_bf16() -> None:
    losses = steps(*prepared(net(), mixed_precision="bf16"), batches(1) * 8)
    assert losses[-1] < 0.95 * losses[0]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def train_with_a_hook(rank: int, world_size: int) -> tuple[list[float], float, bytes]:
    """Losses, bytes per trainable parameter and step, and the parameters, with gradients in 8 bits."""
    torch.manual_seed(0)
    model = share(nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 4)), 0.9)
    parts = prepared(model)
    parts[1].register_comm_hook(*comm_hook("int8"))
    with CommMeter() as meter:
        losses = steps(*parts, batches(2)[rank::world_size] * 8)
    state = torch.cat([p.detach().flatten() for p in model.parameters()])
    return losses, meter.totals("gradients").logical_bytes / 8 / state.numel(), state.numpy().tobytes()


def train_on_ranks(rank: int, world_size: int, port: int) -> tuple[Any, ...]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    model = net()
    handlers = [accelerate.DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    parts = prepared(model, gradient_accumulation_steps=2, kwargs_handlers=handlers)
    assert isinstance(parts[1], nn.parallel.DistributedDataParallel)
    with CommMeter() as meter:
        losses = steps(*parts, batches(16)[rank::world_size])
    state = torch.cat([p.detach().flatten() for p in model.parameters()])
    sent = meter.totals("gradients").logical_bytes
    GradientState._reset_state()
    return losses[-1], sent, state.numel(), state.numpy().tobytes(), train_with_a_hook(rank, world_size)


@pytest.mark.distributed
def test_two_processes() -> None:
    """Ranks stay equal; eight batches accumulated by two send four times the trainable parameters; a hook sends a quarter."""
    first, second = run_ranks(train_on_ranks, 2, free_port(), group=False)
    assert first[3] == second[3] and first[0] != second[0]
    assert first[1] == 4 * 4 * first[2]
    (losses, sent, state), (_, _, other) = first[4], second[4]
    assert state == other
    assert losses[-1] < losses[0]
    assert 1 < sent < 1.01  # a byte for each parameter, and scales
