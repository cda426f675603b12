"""Seconds of each step, without making the host wait for a CUDA device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WARM_UP = 5
"""Steps that the median leaves out."""


class Clock:
    """Durations of steps: put `with clock.step():` around each step."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._open: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.times: list[float] = []

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measures the block as one step."""
        if self._cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._open.append((start, end))
        else:
            began = time.perf_counter()
            yield
            self.times.append(time.perf_counter() - began)

    def settle(self) -> None:
        """Waits for the device, and reads the durations of all steps."""
        for start, end in self._open:
            end.synchronize()
            self.times.append(start.elapsed_time(end) / 1000)
        self._open.clear()

    def median(self) -> float:
        """Median seconds of a step, without the warm-up."""
        return statistics.median(self.times[min(WARM_UP, len(self.times) // 2) :])

    def mean(self) -> float:
        """Mean seconds of a step, without the warm-up: where some steps end a round, and others do not, a median is of neither."""
        return statistics.fmean(self.times[min(WARM_UP, len(self.times) // 2) :])
