"""One bank in several reentrant checkpoints, each of which runs a backward of its own inside the backward."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dist_ssn
from dist_ssn.engines import engine_class
from testing.ranks import RanksFailed, run_ranks

pytestmark = pytest.mark.distributed
STEPS = 3


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 10)
        self.blocks = nn.ModuleList(nn.Linear(10, 10) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=True).tanh()  # type: ignore[union-attr]
        return x


def _difference(rank: int, world_size: int, kind: str, options: dict[str, Any]) -> float:
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank))
    data = torch.randn(STEPS, 8, 6, generator=torch.Generator().manual_seed(1))
    results = []
    for alone in (True, False):
        model = dist_ssn.share(Blocks(), 0.5)
        cls = engine_class("ddp" if alone else kind)
        model = model if alone else cls.prepare(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        engine = None if alone else cls(model, optimizer, **options)
        for x in data:
            if engine is None:
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                with engine.accumulating(True):
                    engine.backward(engine.model(x[rank::world_size]).square().mean())
                engine.step()
        named = dict(model.named_parameters()) if engine is None else engine.gathered()[0]
        results.append(torch.cat([named[name].detach().flatten() for name in sorted(named)]))
    return float((results[0] - results[1]).norm() / results[0].norm())


@pytest.mark.parametrize(
    ("kind", "options"),
    [("ddp", {"static_graph": True}), ("fsdp", {}), *(("deepspeed", {"stage": stage}) for stage in (0, 1))],
    ids=["ddp", "fsdp", "zero-0", "zero-1"],
)
def test_gradients_are_those_of_one_process(kind: str, options: dict[str, Any]) -> None:
    if kind == "deepspeed":
        pytest.importorskip("deepspeed", reason="pip install 'dist_ssn[deepspeed]'")
    assert max(run_ranks(_difference, 2, kind, options)) <= 1e-5


@pytest.mark.parametrize("stage", [2, 3])
def test_what_deepspeed_cannot_do_is_one_sentence(stage: int) -> None:
    pytest.importorskip("deepspeed", reason="pip install 'dist_ssn[deepspeed]'")
    with pytest.raises(RanksFailed, match=r"checkpoint with use_reentrant=False, or use engine\.stage 0 or 1"):
        run_ranks(_difference, 2, "deepspeed", {"stage": stage})
