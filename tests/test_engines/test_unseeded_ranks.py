"""Ranks with different seeds: rank 0's scales are everybody's, and other structures are told."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dist_ssn import parameter_groups, share
from dist_ssn.comm.meter import CommMeter
from dist_ssn.errors import ShareError
from dist_ssn.sharing.bank import banks_of
from testing.architectures import ARCHITECTURES
from testing.ranks import run_ranks

SLOW = ("Mamba", "MobileNetV2", "EfficientNet", "like timm's ConvNeXt", "Wide ResNet of recipes")
NAMES = [name for name in ARCHITECTURES if name not in SLOW]
BOTH_ORDERS = ("T5", "ResNet")  # whose scales are measured


def output(found: Any) -> Tensor:
    """The tensor that a model of any library returns first."""
    if isinstance(found, Tensor):
        return found
    for name in ("logits", "logits_per_image"):
        if getattr(found, name, None) is not None:
            return getattr(found, name)
    return found[0]


def steps(rank: int, name: str, wrapped: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """Output after some steps on other data for each rank; and all scales."""
    optimizer = torch.optim.AdamW(parameter_groups(wrapped.module, lr=1e-3))  # pyright: ignore
    for step in range(count):
        torch.manual_seed(100 * step + rank)
        optimizer.zero_grad()
        output(wrapped(**ARCHITECTURES[name].batch())).square().mean().backward()
        optimizer.step()
    wrapped.eval()
    torch.manual_seed(7)
    with torch.no_grad():
        found = output(wrapped(**ARCHITECTURES[name].batch()))
    return found, torch.cat([bank.scales for bank in banks_of(wrapped)])


def made(rank: int, name: str, budget: float = 0.2) -> nn.Module:
    torch.manual_seed(1000 + rank)
    return share(ARCHITECTURES[name].build(), budget)


def train_all(rank: int, world_size: int, file: str) -> dict[str, Any]:
    """Trains each architecture in plain DDP, shared before the process group exists, and some after it, too."""
    before = {name: made(rank, name) for name in NAMES}
    own = {name: torch.cat([bank.scales for bank in banks_of(model)]) for name, model in before.items()}
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    found: dict[str, Any] = {}
    for name in NAMES:
        models = [before[name], *([made(rank, name)] if name in BOTH_ORDERS else [])]
        found[name] = [
            steps(rank, name, DistributedDataParallel(model, find_unused_parameters=True), 5) for model in models
        ]
    dist.destroy_process_group()
    return {"own": own, "found": found}


@pytest.mark.distributed
@pytest.mark.timeout(400)
def test_ranks_with_other_seeds_train_one_model(tmp_path: Any) -> None:
    first, second = run_ranks(train_all, 2, str(tmp_path / "store"), group=False, timeout=380)
    differ = {name for name in NAMES if not torch.equal(first["own"][name], second["own"][name])}
    assert len(NAMES) >= 12 and "T5" in differ  # with transformers 5.0, ResNet's scales are not measured
    for name in NAMES:
        for (out, scales), (their_out, their_scales) in zip(first["found"][name], second["found"][name], strict=True):
            assert torch.equal(scales, their_scales) and torch.equal(scales, first["own"][name]), name
            assert torch.equal(out, their_out), name


class Mlp(nn.Module):
    """Layers with scales that no formula gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 48), nn.Linear(48, 32)
        nn.init.normal_(self.first.weight, std=0.031)
        nn.init.normal_(self.second.weight, std=0.057)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def wrap_in_many_ways(rank: int, world_size: int) -> dict[str, Any]:
    x = torch.ones(3, 32)
    found: dict[str, Any] = {}

    def mlp(**options: Any) -> nn.Module:
        torch.manual_seed(rank)
        return share(Mlp(), 0.3, **options)

    model = DistributedDataParallel(mlp())
    if rank == 0:
        with torch.no_grad():
            model(x)  # rank 0 alone may evaluate, as it may with any model without buffers
    with CommMeter() as meter:
        for _ in range(2):
            model(x).sum().backward()
    found["sent with buffers"] = meter.totals("buffers").logical_bytes
    found["DDP"] = model(x)

    model = DistributedDataParallel(mlp(), broadcast_buffers=False)
    if rank == 0:
        with torch.no_grad():
            model(x)
    found["DDP without buffers"] = model(x).detach()

    model = mlp()
    fully_shard(model, reshard_after_forward=False)
    found["FSDP2"] = model(x).detach()
    found["scales"] = banks_of(model)[0].scales.clone()

    copied = copy.deepcopy(mlp())
    (bank,) = banks_of(copied)
    found["own"] = bank.scales.clone()

    model = DistributedDataParallel(mlp(seed=rank))
    try:
        with torch.no_grad():
            model(x)
    except ShareError as error:
        found["other structure"] = str(error)
    model = mlp(seed=rank)
    fully_shard(model, reshard_after_forward=False)
    try:
        with torch.no_grad():
            model(x)
    except ShareError as error:
        found["other structure under FSDP2"] = str(error)
    return found


@pytest.mark.distributed
def test_every_wrapper_lets_the_ranks_agree() -> None:
    first, second = run_ranks(wrap_in_many_ways, 2)
    assert not torch.equal(first["own"], second["own"])
    for name in ("DDP", "DDP without buffers", "FSDP2", "scales"):
        assert torch.equal(first[name], second[name]), name
    assert first["sent with buffers"] == second["sent with buffers"] == 0
    for name in ("other structure", "other structure under FSDP2"):
        assert name not in first
        assert "first.weight is read in another way on rank 0, so the ranks' models differ" in second[name]


def under_deepspeed(rank: int, world_size: int, stage: int) -> tuple[Tensor, Tensor, str]:
    """As a script of a user's own calls DeepSpeed: the scales, an output after two steps, and the error about another base."""
    import deepspeed

    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # is compiled at the start otherwise

    def engine_of(model: nn.Module) -> Any:
        config = {
            "train_micro_batch_size_per_gpu": 3,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    torch.manual_seed(rank)
    x, model = torch.ones(3, 32), share(Mlp(), 0.3)
    engine = engine_of(model)
    for _ in range(2):
        engine.backward(engine(x).square().mean())
        engine.step()
    scales, output, said = banks_of(model)[0].scales.clone(), engine(x).detach().clone(), ""
    engine = engine_of(share(Mlp(), 0.3, keep=True))
    try:
        engine(x)
    except (ShareError, RuntimeError) as error:  # rank 0: perhaps that rank 1 has left
        said = str(error)
    return scales, output, said


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_deepspeed_in_a_script_of_ones_own(stage: int) -> None:
    pytest.importorskip("deepspeed", reason="pip install 'dist_ssn[deepspeed]'")
    first, second = run_ranks(under_deepspeed, 2, stage)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert second[2].startswith("rank 0 is trained on other kept values of first.weight (2 of 2")
