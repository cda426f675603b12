"""On a GPU: the gradients of every kind of layer, no wait of the host in a step, and a run by recipe like the processor's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ssn import parameter_groups, share
from dist_ssn.train.loop import train
from dist_ssn.train.models.gpt import build_gpt
from dist_ssn.train.recipe.read import load_recipe
from testing.layer_kinds import KINDS, Twins, loss_of, relative_error, shake

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")


def gradients(model: nn.Module, inputs: tuple[Tensor, ...], device: str) -> dict[str, Tensor]:
    """Those of all parameters, taken on a device, on the processor."""
    model.to(device).zero_grad(set_to_none=True)
    loss_of(model(*(x.to(device) for x in inputs))).backward()
    return {name: p.grad.detach().clone().cpu() for name, p in model.named_parameters() if p.grad is not None}


def check(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    shake(model)
    here, there = gradients(model, inputs, "cpu"), gradients(model, inputs, "cuda")
    assert here.keys() == there.keys() and any(name.startswith("dist_ssn") for name in here)
    for name, gradient in here.items():
        assert relative_error(there[name], gradient) < 1e-10, name


@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_has_the_processors_gradients(kind: str) -> None:
    """In float64, a bank that two layers read."""
    model = share(Twins(KINDS[kind]).double(), 0.5, morph="offset")
    check(model, KINDS[kind].inputs())


@pytest.mark.parametrize(
    ("budget", "morph"),
    [(0.1, "offset:rank=2"), (0.3, "offset:templates=2"), (0.1, "hash"), (0.5, "inter"), (0.1, "mask"), (2.0, "wavg")],
)
def test_every_morph_has_the_processors_gradients(budget: float, morph: str) -> None:
    model = share(build_gpt(layers=2, width=32, heads=2, context=16).double(), budget, morph=morph)
    check(model, (torch.randint(0, 256, (4, 16)),))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize(("budget", "morph"), [(0.1, "offset"), (2.0, "wavg")])
def test_the_host_never_waits_in_a_step(budget: float, morph: str) -> None:
    """Once the first step has worked out what is worked out once."""
    model = share(build_gpt(layers=2, width=32, heads=2, context=16), budget, morph=morph).to("cuda")
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3), fused=True)
    tokens = torch.randint(0, 256, (4, 16), device="cuda")

    def step() -> None:
        model(tokens).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_by_recipe_ends_where_it_does_on_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str) -> dict[str, Any]:
        options = ["steps=6", "share.budget=0.1", f"output={tmp_path}", f"name={name}"]
        return train(load_recipe("digits", options), progress=False).row

    there = run("there")
    assert json.loads((tmp_path / "there" / "summary.json").read_text())["device"].startswith("cuda")
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: False)
        here = run("here")
    assert there["validation_loss"] == pytest.approx(here["validation_loss"], rel=1e-3)
    assert there["parameters"] == here["parameters"]
