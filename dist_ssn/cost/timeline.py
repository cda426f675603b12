"""Moments of a step at which each gradient becomes final, measured on this machine, on all processes at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_ssn.sharing.bank import Bank, banks_of

WARM_UP = 3
PROBE_ELEMENTS = 2**14
"""Elements of the all-reduce that is timed with and without compute beside it: short enough to end before a step does."""


@dataclass(frozen=True)
class Timeline:
    """Seconds from the moment at which all processes have the previous step's gradients.

    Args:
        ready: name of a weight or own parameter → moment at which its gradient was final: [steps, processes].
        end: end of backward: [steps, processes].
        drag: additional seconds of each round of a collective beside compute, where processor cores do both.
    """

    ready: Mapping[str, np.ndarray]
    end: np.ndarray
    drag: float = 0.0


class _Clock:
    """Records when gradients are final; the `Watcher` of one bank, or of no bank."""

    def __init__(self, bank: Bank | None, times: dict[str, float]):
        self.names = [slot.name for slot in bank.group.slots] if bank is not None else []
        self.times = times

    def read(self, index: int) -> None:
        pass

    def begin(self, sums: dict[str, Tensor]) -> None:
        pass

    def grown(self, index: int, sums: dict[str, Tensor]) -> None:
        self.times[self.names[index]] = time.perf_counter()

    def collect(self, sums: dict[str, Tensor]) -> None:
        pass


@contextmanager
def _watched(model: nn.Module, times: dict[str, float]) -> Iterator[None]:
    """Fills `times` with the last moment at which each gradient grew, of weights and of the model's own parameters."""
    banks = banks_of(model)
    before = [bank.watcher for bank in banks]
    of_banks = {p for bank in banks for p in bank.parameters(recurse=False)}
    handles = []
    for bank in banks:
        bank.watcher = _Clock(bank, times)
    for name, parameter in model.named_parameters():
        if parameter not in of_banks and parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(_recorder(name, times)))
    try:
        yield
    finally:
        for bank, watcher in zip(banks, before, strict=True):
            bank.watcher = watcher
        for handle in handles:
            handle.remove()


def _recorder(name: str, times: dict[str, float]) -> Callable[[Tensor], None]:
    def record(_: Tensor) -> None:
        times[name] = time.perf_counter()

    return record


def measure_timeline(
    model: nn.Module, optimizer: Optimizer, loss_of: Callable[[int], Tensor], steps: int = 20
) -> Timeline:
    """Trains without communication and measures when each gradient is final; changes the model.

    In a job of several processes all measure at once, from a common start of each step, because they may share a machine and a
    sum is complete only when the slowest process has added its part.

    Args:
        model: is trained.
        optimizer: of the model.
        loss_of: step number → loss.
        steps: number of measured steps, after WARM_UP others.
    """
    joined = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    names: list[str] = []
    rows: list[list[float]] = []
    for step in range(WARM_UP + steps):
        times: dict[str, float] = {}
        if joined:
            dist.barrier()
        start = time.perf_counter()
        if step:
            optimizer.step()
            optimizer.zero_grad()
        with _watched(model, times):
            loss_of(step).backward()
        end = time.perf_counter()
        if step >= WARM_UP:
            names = names or sorted(times)
            rows.append([*(times.get(name, end) - start for name in names), end - start])
    table = torch.tensor(rows, dtype=torch.float64)
    everyone = [torch.empty_like(table) for _ in range(dist.get_world_size() if joined else 1)]
    if joined:
        dist.all_gather(everyone, table)
    else:
        everyone = [table]
    whole = torch.stack(everyone, dim=1).numpy()  # [steps, processes, columns]
    ready = {name: whole[:, :, column] for column, name in enumerate(names)}
    drag = _measure_drag(lambda step: loss_of(step).backward(), steps) if joined else 0.0
    optimizer.zero_grad()
    return Timeline(ready, whole[:, :, -1], drag)


def _measure_drag(compute: Callable[[int], None], steps: int) -> float:
    """Additional seconds of each round of an all-reduce beside `compute`, as a mean over processes and steps."""
    sums = torch.zeros(2, dtype=torch.float64)  # alone, beside
    for step in range(steps):
        for is_beside in (0, 1):
            arrived: list[float] = []
            dist.barrier()
            start = time.perf_counter()
            work = dist.all_reduce(torch.zeros(PROBE_ELEMENTS), async_op=True)
            assert work is not None
            work.get_future().add_done_callback(lambda _, arrived=arrived: arrived.append(time.perf_counter()))
            if is_beside:
                compute(step)
            work.wait()
            while not arrived:  # the callback may come a moment later
                time.sleep(1e-4)
            sums[is_beside] += arrived[0] - start
    dist.all_reduce(sums)
    alone, beside = (sums / (steps * dist.get_world_size())).tolist()
    return max(0.0, beside - alone) / (2 * (dist.get_world_size() - 1))
