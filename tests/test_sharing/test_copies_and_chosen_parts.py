"""Copies of weights, parameters with one memory, parts with optimizers or learning rates of their own, and averages of models."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from dist_ssn import parameter_groups, parameters_of, share, summary
from dist_ssn.errors import ShareError
from testing.layer_kinds import banks_of


class Pair(nn.Module):
    """Two parts, as a generator and a discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
        self.second = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def step(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Warnings of a step."""
    optimizer.zero_grad()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model(torch.ones(2, 16)).square().sum().backward()
        optimizer.step()
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("view", [True, False])
def test_parameters_with_the_same_memory(keep: bool, view: bool) -> None:
    model = Pair()
    if view:
        model.second[0].weight = nn.Parameter(model.first[1].weight.t())
    else:
        model.second[0].weight.data = model.first[1].weight.data.t()
    with pytest.raises(ShareError, match=r"first\.1\.weight and second\.0\.weight have the same memory.*exclude=\["):
        share(model, 0.3, keep=keep)
    share(model, 0.3, exclude=["first.1.weight", "second.0.weight"], keep=keep)
    flat = torch.zeros(2 * 512)  # parts of one buffer that do not overlap are no tie
    model = Pair()
    for part, values in zip((model.first, model.second), flat.split(512), strict=True):
        part[0].weight.data = values.view(32, 16).copy_(part[0].weight.data)
    share(model, 0.3, keep=keep)


def test_frozen_copies_of_weights_are_told() -> None:
    model = Pair()
    model.second = copy.deepcopy(model.first).requires_grad_(False)
    with pytest.warns(
        UserWarning, match=r"second\.0\.weight, second\.1\.weight: frozen copies .* such as first\.0\.weight"
    ):
        share(model, 0.3)
    share(Pair(), 0.3).second.requires_grad_(False)  # others are not


def test_a_bank_in_two_optimizers_is_told() -> None:
    said = "two optimizers hold the bank that generates first.0.weight"
    for mapping, told in (("single", True), ({"first.*": "first", "*": "rest"}, False)):
        model = share(Pair(), 0.5, mapping=mapping)  # type: ignore[arg-type]
        pair = [torch.optim.SGD(parameters_of(part), 0.1) for part in (model.first, model.second)]
        first = step(pair[0], model) + step(pair[1], model)
        assert not any(message.startswith(said) for message in first)  # the first one may have taken its last step
        found = [message for _ in range(2) for one in pair for message in step(one, model)]
        assert sum(message.startswith(said) for message in found) == told, found
    model = share(Pair(), 0.5)
    again = [torch.optim.SGD(model.parameters(), 0.1) for _ in range(2)]  # one after the other
    assert not [message for one in again for message in step(one, model) if message.startswith(said)]


def test_learning_rates_of_parts_by_their_own_parameters() -> None:
    model = share(Pair(), 0.5, mapping="single")
    named = dict(model.named_parameters())
    second = [p for name, p in named.items() if name.startswith("second")]
    rest = [p for name, p in named.items() if not name.startswith("second")]
    (found,) = step(torch.optim.SGD([{"params": rest, "lr": 0.0}, {"params": second}], 0.1), model)
    assert found.startswith("the bank that generates second.0.weight, second.1.weight is in a parameter group with the")
    biases = [p for name, p in named.items() if name.endswith("bias")]
    banks = [p for name, p in named.items() if not name.endswith("bias")]
    for groups in ([{"params": biases, "lr": 0.2}, {"params": banks}], parameter_groups(model, lr=0.1)):
        assert not step(torch.optim.SGD(groups, 0.1), model)


def test_values_from_a_trained_model_are_no_initial_values() -> None:
    model, target = share(Pair(), 0.3), share(Pair(), 0.3)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for bank in banks_of(model):
        bank.bank.data.mul_(3)
    step(optimizer, model)
    average.update_parameters(model)
    for mine, theirs in zip(target.parameters(), model.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(target(torch.ones(2, 16)), model(torch.ones(2, 16)))
        average(torch.ones(2, 16))
    late = share(Pair(), 0.3)
    for parameter in late.parameters():
        parameter.data.normal_()
    with pytest.warns(UserWarning, match="draws initial values belongs before share"):
        late(torch.ones(2, 16))


def test_ensembles_on_a_base_without_values() -> None:
    models = [share(Pair(), 0.3) for _ in range(2)]
    for bank in banks_of(models[1]):
        bank.bank.data.add_(0.1)
    parameters, buffers = stack_module_state(models)
    base, x = copy.deepcopy(models[0]).to("meta"), torch.randn(3, 16)
    outputs = torch.vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    for model, output in zip(models, outputs, strict=True):
        assert torch.allclose(model(x), output, atol=1e-6)
    with pytest.warns(UserWarning, match="stack_module_state got the parameters of this Sequential"):
        stack_module_state([models[0].first])  # type: ignore[list-item]


class Tables(nn.Module):
    """As in a tagger with a CRF that gets colours."""

    def __init__(self, tags: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.randn(tags, tags))
        self.scores.data[tags - 2, :] = -10_000
        self.scores.data[:, tags - 1] = -10_000
        self.mean = nn.Parameter(torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.anchors = nn.Parameter(torch.randn(3, 2))
        self.table = nn.Embedding(20, 32)
        self.table.weight.data[0] = 0
        self.rest = nn.Linear(32, 32)


@pytest.mark.parametrize("tags", [5, 9, 20])
def test_tables_among_parameters_stay(tags: int) -> None:
    left = dict(summary(share(Tables(tags), 0.3)).left_out)
    assert left.keys() == {"scores", "mean", "anchors", "table.weight"}
    assert left["table.weight"] == "a row has one value"
    assert left["anchors"] == "fewer than 64 elements, and in no layer of torch"
