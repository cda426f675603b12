"""Kept weights under the engines and under local updates: nothing of them is sent, and a rank with others is named on all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_ssn import LocalUpdates, materialize, parameter_groups, share
from dist_ssn.comm import CommMeter
from dist_ssn.engines import Engine, engine_class
from dist_ssn.errors import CheckpointError, ShareError, UserError
from dist_ssn.sharing.bank_set import shared_plan
from dist_ssn.train.checkpoint import store as checkpoint
from testing.ranks import run_ranks

distributed = pytest.mark.distributed
BATCHES = torch.randn(3, 8, 128, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """0.5 MB of weights, and 0.1 MB beside that are not generated."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.beside, self.head = nn.Linear(128, 1000), nn.Linear(1000, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.beside(self.body(x).tanh()))


def shared(rank: int, change: str) -> nn.Module:
    base = Net()
    if rank and change:
        with torch.no_grad():
            base.get_parameter(change).view(-1)[0] += 1e-3
    return share(base, 500, keep=True, exclude="beside", train="head")


def engine_of(name: str, rank: int) -> tuple[type[Engine], dict[str, Any]]:
    """The class and the options of an engine; "zero-2" is DeepSpeed at stage 2."""
    if not name.startswith("zero-"):
        return engine_class(name), {}
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank))
    return engine_class("deepspeed"), {"stage": int(name[-1])}


def train(rank: int, size: int, name: str, change: str = "") -> Any:
    """Steps of an engine on this rank's part of each batch: the error's text, or (bytes at the start, in all, parameters)."""
    model, (kind, options) = shared(rank, change), engine_of(name, rank)
    with CommMeter() as meter:
        try:
            model = kind.prepare(model)
            # Momentum SGD: Adam's division would blow rounding differences of tiny gradients up to whole steps.
            engine = kind(model, torch.optim.SGD(parameter_groups(model, lr=1e-2), momentum=0.9), **options)
        except ShareError as error:
            return str(error)
        start = meter.ledger.totals().logical_bytes
        for batch in BATCHES:
            with engine.accumulating(True):
                engine.backward(engine.model(batch[rank::size]).square().mean())
            engine.step()
        whole = meter.ledger.totals().logical_bytes
        assert not meter.ledger.totals("buffers").operations  # fingerprints are sent once, not before each forward
        parameters, _ = engine.gathered()
    return start, whole, {key: value.clone() for key, value in parameters.items()}


def alone() -> dict[str, Tensor]:
    """The parameters after the same steps of plain autograd in one process."""
    model = shared(0, "")
    optimizer = torch.optim.SGD(parameter_groups(model, lr=1e-2), momentum=0.9)
    for batch in BATCHES:
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def require_deepspeed(name: str) -> None:
    if name.startswith("zero-"):
        pytest.importorskip("deepspeed", reason="pip install 'dist_ssn[deepspeed]'")


@distributed
@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero-0", "zero-1", "zero-2", "zero-3"])
def test_an_engine_does_what_one_process_does_and_sends_what_is_trained(name: str) -> None:
    require_deepspeed(name)
    expected, base = alone(), Net()
    trained = sum(p.nbytes for p in shared(0, "").parameters() if p.requires_grad)
    beside = sum(p.nbytes for p in base.beside.parameters()) + base.body.bias.nbytes
    results = run_ranks(train, 2, name)
    for start, whole, parameters in results:
        # Stage 3 sends all parameters as it shards them, also those that are frozen and not generated.
        sends = beside + trained if name == "zero-3" else 0
        assert trained <= start - sends <= trained + 2000
        if name in ("ddp", "zero-0"):
            assert whole - start <= len(BATCHES) * (trained + 64) + 2000  # fingerprints once more, in the first forward
        assert parameters.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(parameters[key], results[0][2][key]), f"{key} differs between ranks"
            error = (parameters[key] - value).norm() / value.norm()
            assert error <= 1e-6, f"{key}: relative difference {error:.1e}"
        for key, value in base.beside.named_parameters(prefix="beside"):
            assert torch.equal(parameters[key], value)


@distributed
@pytest.mark.parametrize("change", ["body.weight", "beside.bias"])
@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero-2"])
def test_all_ranks_name_the_rank_and_the_tensor(name: str, change: str) -> None:
    require_deepspeed(name)
    both = run_ranks(train, 2, name, change)
    assert both[0] == both[1]
    assert both[0].startswith(f"rank 1 keeps other values of {change} than rank 0 (1 of ")


def resume(rank: int, size: int, name: str, folder: str) -> tuple[set[str], bool, str]:
    """Names in a checkpoint; whether it brings back all parameters; what another base beside the banks raises."""
    models = [shared(rank, ""), shared(rank, ""), shared(0, "")]
    with torch.no_grad():
        models[2].get_parameter("beside.bias")[0] += 1  # on all ranks
    engines = []
    for model in models:
        kind, options = engine_of(name, rank)
        model = kind.prepare(model)
        engines.append(kind(model, torch.optim.AdamW(parameter_groups(model, lr=1e-2)), **options))
    trained, fresh, other = engines
    with trained.accumulating(True):
        trained.backward(trained.model(BATCHES[0, rank::size]).square().mean())
    trained.step()
    path = checkpoint.save(folder, step=1, engine=trained, recipe_json="{}", plan=shared_plan(trained.module))
    dist.barrier()
    checkpoint.load(path, engine=fresh, plan=shared_plan(fresh.module))
    before, after = trained.gathered()[0], fresh.gathered()[0]
    try:
        checkpoint.load(path, engine=other, plan=shared_plan(other.module))
        error = ""
    except CheckpointError as raised:
        error = str(raised)
    names = set(load_file(path / "model.safetensors"))
    return names, all(torch.equal(before[key], after[key]) for key in before), error


@distributed
@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero-2", "zero-3"])
def test_a_checkpoint_has_no_kept_value_and_resumes_beside_the_same(name: str, tmp_path: Path) -> None:
    require_deepspeed(name)
    for names, same, error in run_ranks(resume, 2, name, str(tmp_path)):
        assert {"head.weight", "head.bias"} <= names
        assert not names & {"body.weight", "body.bias", "beside.weight", "beside.bias"}
        assert same
        assert "was trained on other kept values of beside.bias (1 of 3 frozen parameters differ)" in error


def local(rank: int, size: int, change: str) -> Any:
    """One round of local updates."""
    model = shared(rank, change)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
    with CommMeter() as meter:
        try:
            LocalUpdates(model, optimizer, every=2)
        except UserError as error:
            return str(error)
        start = meter.ledger.totals().logical_bytes
        for _ in range(2):
            model(torch.ones(4, 128) * (rank + 1)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return start, meter.ledger.totals().logical_bytes, materialize(model)(torch.ones(1, 128)).sum().item()


@distributed
def test_local_updates_send_no_kept_value() -> None:
    trained = sum(p.nbytes for p in shared(0, "").parameters() if p.requires_grad)
    (start, whole, mine), (_, _, theirs) = run_ranks(local, 2, "")
    assert start <= trained + 2000 and whole <= 3 * trained + 4000
    assert mine == theirs
    for change in ("body.weight", "beside.bias"):
        both = run_ranks(local, 2, change)
        assert both[0] == both[1] and both[0].startswith("the kept values on rank 1 differ from those on the others")
