"""Models on the meta device: a plan before there are values, banks that are initialized later, and no use before that."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dist_ssn import initialize, make_plan, materialize, share, shared_plan
from dist_ssn.errors import ShareError
from dist_ssn.model.specs import find_specs
from dist_ssn.sharing.bank import banks_of
from testing.architectures import ARCHITECTURES
from testing.ranks import run_ranks

X = torch.randn(4, 24)


class Net(nn.Module):
    """Layers as torch initializes them."""

    def __init__(self, std: float | None = None) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 48), nn.Linear(48, 10)
        if std is not None:
            nn.init.normal_(self.first.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def on_meta() -> nn.Module:
    with torch.device("meta"):
        model = Net()
    with pytest.warns(
        UserWarning, match="Net is on 'meta', so the initial scales of its weights are assumed, such as 0.118 for"
    ):
        return share(model, 0.3, morph="offset:templates=2,gains=true,rank=1")


def test_a_plan_on_meta_is_that_of_the_initialized_model() -> None:
    """For layers with a default of their own, or with a config that has the deviation."""
    same = ("BERT", "ViT", "Llama", "Qwen2", "GPT-2", "LSTM", "torch's encoder")
    for name in same:
        with torch.device("meta"):
            model: Any = ARCHITECTURES[name].build()
            if hasattr(model, "tie_weights"):
                model.tie_weights()  # transformers 5.0 leaves that to its loading, on meta
            empty = find_specs(model)
        specs = find_specs(ARCHITECTURES[name].build())
        assert make_plan(empty, 0.2).to_json() == make_plan(specs, 0.2).to_json(), name


def test_share_then_to_empty_then_initialize_gives_what_share_gives() -> None:
    model = on_meta()
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    assert initialize(model) is model
    expected = share(Net(), plan=shared_plan(model))
    for (name, mine), theirs in zip(
        banks_of(model)[0].state_dict().items(), banks_of(expected)[0].state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    for own in (model.first.bias, model.second.bias):  # pyright: ignore
        nn.init.zeros_(own)  # pyright: ignore
    model(X).sum().backward()
    assert float(materialize(model).first.weight.detach().std()) == pytest.approx((1 / 3 / 24) ** 0.5, rel=0.1)  # pyright: ignore


def test_other_initial_scales_are_given_by_name() -> None:
    model = on_meta().to_empty(device="cpu")
    initialize(model, {"first.*": 0.02, "*": 0.5})
    for layer, std in ((model.first, 0.02), (model.second, 0.5)):
        assert float(layer.weight.detach().std()) == pytest.approx(std, rel=0.12)  # pyright: ignore
    with pytest.raises(ShareError, match="'third' matches no weight: the weights are first"):
        initialize(model, {"third": 1.0})
    with pytest.raises(ShareError, match="must be a number above 0"):
        initialize(model, {"*": 0.0})
    with pytest.raises(ShareError, match="Net has no banks to initialize"):
        initialize(Net())
    with pytest.raises(ShareError, match="Net is on 'meta': call model"):
        initialize(on_meta())


def test_use_before_initialization_is_an_error() -> None:
    model = on_meta().to_empty(device="cpu")
    compiled = torch.compile(model, backend="eager")
    for use in (lambda: model(X), lambda: model.first.weight, lambda: materialize(model), lambda: compiled(X)):  # pyright: ignore
        with pytest.raises(ShareError, match=r"the bank of first.weight has no values since"):
            use()
    shared = share(Net(), 0.3)
    shared.to_empty(device="cpu")
    with pytest.raises(ShareError, match="has no values since to_empty"):
        shared(X)


def test_shapes_can_be_computed_on_meta() -> None:
    assert on_meta()(X.to("meta")).shape == (4, 10)


def test_a_model_goes_to_meta_and_comes_back_by_its_state_dict() -> None:
    torch.manual_seed(0)
    model = share(Net(0.037), 0.3)
    state, expected = {name: value.clone() for name, value in model.state_dict().items()}, model(X)
    model.to("meta").to_empty(device="cpu")
    assert banks_of(model)[0].scales.tolist() == state["dist_ssn.all.scales"].tolist()
    model.load_state_dict(state)
    assert torch.equal(model(X), expected)
    model.to("meta").load_state_dict(state, assign=True)
    assert torch.equal(model(X), expected)
    assert not any(buffer.is_meta for buffer in model.buffers())  # which `to(device)` and DDP would copy
    model.to("meta").to_empty(device="cpu")
    with torch.no_grad():  # in place, as torch.distributed.checkpoint loads
        for name, value in model.state_dict().items():
            value.copy_(state[name])
    assert torch.equal(model(X), expected)


def test_a_decoder_of_a_billion_parameters_is_planned_in_seconds() -> None:
    with torch.device("meta"):
        blocks = nn.ModuleList(nn.TransformerEncoderLayer(2048, 16, 8192) for _ in range(22))
        model = nn.ModuleDict({"table": nn.Embedding(32000, 2048), "blocks": blocks})
    specs_start = time.process_time()
    plan = make_plan(model, "1%")
    assert plan.numel > 1e9 and time.process_time() - specs_start < 10


def shard_then_initialize(rank: int, world_size: int) -> dict[str, Tensor]:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(rank)
    model = on_meta()
    fully_shard(model, reshard_after_forward=False)
    model.to_empty(device="cpu")
    try:
        model(X)
    except ShareError as error:
        message = str(error)
    initialize(model)
    for parameter in (model.first.bias, model.second.bias):  # pyright: ignore
        nn.init.zeros_(parameter)  # pyright: ignore
    return {"out": model(torch.ones(3, 24)).detach(), "message": message}  # type: ignore[dict-item]


@pytest.mark.distributed
def test_fsdp_2_shards_first_and_initializes_afterwards() -> None:
    first, second = run_ranks(shard_then_initialize, 2)
    model = on_meta().to_empty(device="cpu")
    initialize(model)
    for parameter in (model.first.bias, model.second.bias):  # pyright: ignore
        nn.init.zeros_(parameter)  # pyright: ignore
    assert torch.equal(first["out"], second["out"]) and "has no values" in str(first["message"])
    torch.testing.assert_close(first["out"], model(torch.ones(3, 24)).detach())
