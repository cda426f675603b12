"""timm's networks on shared weights: gradients, a moving average, and the way back to a dense model."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ssn import materialize, parameter_groups, share
from dist_ssn.sharing.bank import banks_of

if importlib.util.find_spec("timm") is None:
    pytest.skip("needs timm", allow_module_level=True)
try:
    timm: Any = importlib.import_module("timm")
except (
    RuntimeError
):  # the wheel of torchvision beside a CPU build of torch lacks two operations, which no network here calls
    _LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _LIBRARY.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    timm = importlib.import_module("timm")

NETWORKS: dict[str, dict[str, Any]] = {
    "resnet50": {},
    "mobilenetv3_small_050": {},
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 2},
    "convnext_atto": {},
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=4, **NETWORKS[name])


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(dtype)


def gradients(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    nn.functional.cross_entropy(model(inputs), torch.arange(4)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@every_network
def test_gradients_are_those_of_plain_autograd(name: str) -> None:
    model = share(build(name), 0.2).double()
    fast = gradients(model, images(torch.float64))
    for bank in banks_of(model):
        bank.pure = True
    pure = gradients(model, images(torch.float64))
    assert fast.keys() == pure.keys() == dict(model.named_parameters()).keys()
    for key, gradient in pure.items():
        torch.testing.assert_close(fast[key], gradient, rtol=1e-8, atol=1e-10)


@every_network
def test_trains_averages_and_returns(name: str, tmp_path: Path) -> None:
    """timm's moving average follows; state dict and dense copy give the same outputs."""
    model = share(build(name), 0.2)
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
    before = {key: value.clone() for key, value in average.module.state_dict().items()}
    gradients(model, images())
    optimizer.step()
    average.update(model)
    for key, value in model.named_parameters():
        torch.testing.assert_close(average.module.get_parameter(key), (before[key] + value) / 2)

    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = share(build(name), 0.2)
    again.load_state_dict(torch.load(tmp_path / "model.pt"))
    dense = build(name)
    dense.load_state_dict(materialize(model).state_dict())
    with torch.no_grad():
        wanted, *others = (m.eval()(images()) for m in (model, again, dense))
    assert torch.equal(wanted, others[0])
    torch.testing.assert_close(wanted, others[1], rtol=1e-4, atol=1e-5)
