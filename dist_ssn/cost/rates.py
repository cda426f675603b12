"""Seconds per value of what local updates compute in a round, measured on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from dist_ssn.sync.anchor import Anchor
from dist_ssn.sync.codecs import CODECS
from dist_ssn.sync.feedback import Feedback
from dist_ssn.sync.outer import outer_optimizer
from dist_ssn.sync.trained import trained_parameters

REPETITIONS = 5
PARTS = 16
"""Parameters of the vector that is timed."""
MOST_VALUES = 2**20


@dataclass(frozen=True)
class Rates:
    """Seconds per value of a vector, measured.

    Args:
        meet: of what a worker does in a round besides the exchange: change, norm, fingerprint, outer step, new start.
        encode: codec → of encoding with error feedback.
        decode: codec → of decoding.
    """

    meet: float
    encode: Mapping[str, float]
    decode: Mapping[str, float]


@torch.no_grad()
def measure_rates(values: int, device: torch.device | None = None) -> Rates:
    """Times a round's parts on a vector of this many values, at most MOST_VALUES; nothing is sent.

    Args:
        values: trained parameters of a model.
        device: of the model; None is the CPU.
    """
    n = max(PARTS, min(values, MOST_VALUES))
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(n, generator=generator).to(device or "cpu")
    encode, decode = {}, {}
    for name, codec in CODECS.items():
        feedback = Feedback(codec)
        packed, _ = feedback.encode(change)
        encode[name] = _seconds(lambda f=feedback: f.encode(change), device) / n
        total = torch.zeros_like(change)
        decode[name] = _seconds(lambda c=codec, p=packed, t=total: t.add_(c.decode(p, n)), device) / n
    return Rates(_meet(n, device) / n, encode, decode)


def _meet(values: int, device: torch.device | None) -> float:
    """Seconds of a round without its exchange, as `LocalUpdates` does it."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(values // PARTS, 1)) for _ in range(PARTS)]).to(device or "cpu")
    anchor = Anchor(trained_parameters(model, torch.optim.SGD(model.parameters(), lr=0.1)))
    outer = outer_optimizer("nesterov", anchor.flats, None, None)
    start = anchor.start()

    def meet() -> None:
        change = anchor.change(start)
        float(torch.linalg.vector_norm(change, dtype=torch.float64))
        anchor.fingerprint()
        for flat, gradient in zip(anchor.flats, anchor.gradients(change), strict=True):
            flat.grad = gradient
        outer.step()
        outer.zero_grad(set_to_none=True)
        anchor.hand_out()

    return _seconds(meet, device)


def _seconds(call: Callable[[], object], device: torch.device | None) -> float:
    """The shortest duration, for another program only makes it longer; a first call does not count."""
    found = []
    for _ in range(1 + REPETITIONS):
        began = time.perf_counter()
        call()
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - began)
    return min(found[1:])
