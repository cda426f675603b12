"""However many ranks share a global batch, the banks become what one process makes of it; and all ranks' are bit-equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dist_ssn
from dist_ssn.comm import CommMeter
from dist_ssn.engines import DDPEngine
from dist_ssn.errors import ShareError
from dist_ssn.train.models.gpt import build_gpt
from dist_ssn.train.models.wide_resnet import build_wide_resnet
from testing.ranks import run_ranks

STEPS, BATCH = 5, 8


def _gpt() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 64, (STEPS, BATCH, 16))
    return build_gpt(vocabulary=64, layers=2, width=32, heads=4, context=16), tokens, tokens.roll(1, -1)


def _wide_resnet() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    images, labels = torch.randn(STEPS, BATCH, 1, 8, 8), torch.randint(0, 10, (STEPS, BATCH))
    return build_wide_resnet(depth=10, width=1, norm="group"), images, labels


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.rnn, self.head = nn.Embedding(64, 24), nn.LSTM(24, 32, 2, batch_first=True), nn.Linear(32, 64)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.tokens(tokens))[0])


def _recurrent() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(0, 64, (STEPS, BATCH, 16))
    return _Recurrent(), tokens, tokens.roll(1, -1)


MODELS = {"gpt": _gpt, "wide_resnet": _wide_resnet, "lstm": _recurrent}


def train(name: str, budget: float, rank: int = 0, world_size: int = 1) -> dict[str, Any]:
    """Five steps on this rank's part of each global batch; the parameters after them, and what was sent."""
    torch.manual_seed(0)
    model, inputs, targets = MODELS[name]()
    dist_ssn.share(model, budget)
    # Momentum SGD: Adam's division would blow rounding differences of tiny gradients up to whole steps.
    optimizer = torch.optim.SGD(dist_ssn.parameter_groups(model), lr=0.05, momentum=0.9)
    with CommMeter() as meter:
        engine = DDPEngine(model, optimizer, clip_norm=1.0)
        part = slice(rank * BATCH // world_size, (rank + 1) * BATCH // world_size)
        for step in range(STEPS):
            outputs = engine.model(inputs[step, part])
            engine.backward(F.cross_entropy(outputs.flatten(0, -2), targets[step, part].flatten()))
            engine.step()
    sent = meter.ledger.totals("gradients").logical_bytes
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"parameters": {k: v.detach() for k, v in model.named_parameters()}, "sent": sent, "trainable": trainable}


def _on_rank(rank: int, world_size: int, name: str, budget: float) -> dict[str, Any]:
    return train(name, budget, rank, world_size)


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize(("name", "budget"), [("gpt", 0.1), ("gpt", 1.0), ("wide_resnet", 0.1), ("lstm", 0.1)])
def test_ranks_together_do_what_one_process_does(name: str, budget: float, world_size: int) -> None:
    alone = train(name, budget)
    ranks = run_ranks(_on_rank, world_size, name, budget, timeout=240)
    for result in ranks:
        assert result["sent"] == 4 * result["trainable"] * STEPS  # nothing but one gradient per trainable number
        for key, expected in alone["parameters"].items():
            found = result["parameters"][key]
            assert torch.equal(found, ranks[0]["parameters"][key]), f"{key} differs between ranks"
            error = (found - expected).norm() / expected.norm().clamp_min(1e-12)
            assert error <= 1e-6 or expected.norm() < 1e-6, f"{key}: relative difference {error:.1e}"


def _differing(rank: int, world_size: int) -> str:
    torch.manual_seed(0)
    model = dist_ssn.share(_Recurrent(), 0.1, seed=rank)
    try:
        DDPEngine(model, torch.optim.SGD(model.parameters(), lr=0.1))
    except ShareError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.distributed
def test_ranks_with_different_plans_stop_together() -> None:
    said = run_ranks(_differing, 2)
    assert said[0] == said[1] and "different plans" in said[0]
