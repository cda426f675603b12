"""Banks are columns, so that rules by the number of dimensions treat them as weights; what was saved when they were flat loads."""

from __future__ import annotations

import copy
import io
import json
import pickle
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.parallel import DistributedDataParallel

from dist_ssn import initialize, load, materialize, parameter_groups, save, share
from dist_ssn.errors import CheckpointError, ShareError
from dist_ssn.sharing.columns import COLUMNS
from dist_ssn.sync.local_updates import LocalUpdates
from testing.layer_kinds import banks_of, relative_error, shake
from testing.ranks import run_ranks

EXACT = 1e-12
OFFSET = "offset:templates=2,gains=true,rank=1"


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 8)).double()


def shared(morph: str = OFFSET, **options: Any) -> nn.Module:
    model = share(net(), 0.5, morph=morph, **options)
    shake(model)
    return model


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for seed in steps:
        model(inputs(seed)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def flattened(value: Any) -> Any:
    """A state as version 0.1.0 had it: every column flat."""
    if isinstance(value, dict):
        return {key: flattened(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(flattened(part) for part in value)
    return value.squeeze(1) if isinstance(value, Tensor) and value.shape[1:] == (1,) else value


# --- rules by dimensions


def decayed_by_dimensions(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.ndim >= 2}


@pytest.mark.parametrize("morph", [OFFSET, "hash", "wavg", "emb/wavg", "avg/mask", "wavg/inter"])
def test_a_rule_by_dimensions_decays_what_parameter_groups_decay(morph: str) -> None:
    model = shared(morph, exclude="3.*")
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, 0.1)
    assert decayed_by_dimensions(model) == {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
    assert {"3.weight"} < decayed_by_dimensions(model) and not any("gains" in n for n in decayed_by_dimensions(model))


def test_weights_decay_as_in_the_dense_model() -> None:
    """A step with gradients of zero: each weight shrinks by the factor 1 − rate · decay, and gains and norms stay."""
    model = shared("offset:gains=true")
    before = materialize(model).state_dict()
    matrices, others = ([p for p in model.parameters() if (p.ndim >= 2) is large] for large in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, value in materialize(model).state_dict().items():
        wanted = before[name] * (0.95 if before[name].ndim == 2 else 1.0)
        assert relative_error(value, wanted) <= EXACT, name


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.float().double()])
def test_a_copy_has_columns(make: Callable[[nn.Module], nn.Module]) -> None:
    model = shared()
    bank = banks_of(make(model))[0]
    assert bank.bank.shape == (bank.group.size, 1) and bank.differences is not None and bank.differences.ndim == 2
    assert relative_error(make(model)(inputs()), model(inputs())) <= 1e-6


def test_factored_states_are_exact() -> None:
    """Adafactor keeps one factor per row: for a column that is every element's own, as for a flat parameter."""
    column, flat = (nn.Parameter(torch.linspace(1, 2, 6, dtype=torch.float64).view(shape)) for shape in ((6, 1), (6,)))
    for parameter in (column, flat):
        optimizer = torch.optim.Adafactor([parameter], lr=0.1)
        for seed in range(3):
            torch.manual_seed(seed)
            parameter.grad = torch.randn(6, dtype=torch.float64).view(parameter.shape)
            optimizer.step()
    assert relative_error(column.view(-1), flat) <= EXACT


def test_vmap_over_models_and_a_functional_call_with_flat_values() -> None:
    models = [shared(), shared()]
    with torch.no_grad():
        banks_of(models[1])[0].bank.mul_(2)
    parameters, buffers = stack_module_state(models)
    x = inputs()
    made = vmap(lambda p, b: functional_call(models[0], (p, b), (x,)), (0, 0))(parameters, buffers)
    for result, model in zip(made, models, strict=True):
        assert relative_error(result, model(x)) <= EXACT
    old = flattened(dict(models[0].named_parameters()))
    assert any(v.ndim == 1 for n, v in old.items() if n.endswith(".bank"))
    assert relative_error(functional_call(models[0], old, (x,)), models[0](x)) <= EXACT


# --- what was saved when banks were flat


@pytest.mark.parametrize("assign", [False, True])
def test_a_flat_state_dict_loads(assign: bool) -> None:
    model, other = shared(), shared()
    shake(model)
    state = flattened(model.state_dict())
    assert {n.rpartition(".")[2] for n, v in state.items() if v.shape != model.state_dict()[n].shape} == set(COLUMNS)
    kept = dict(state)
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other(inputs()), model(inputs()))
    assert all(state[name] is kept[name] for name in kept)  # the caller's dict is as it was
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict({name: v[1:] if name.endswith(".bank") else v for name, v in state.items()})


def make_flat(model: nn.Module) -> None:
    for bank in banks_of(model):
        for name in COLUMNS:
            parameter = bank._parameters[name]
            assert parameter is not None
            parameter.data = parameter.data.squeeze(1)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "AdamW, one by one": lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
    "SGD": lambda p: torch.optim.SGD(p, 0.01, momentum=0.9),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_flat_state_of_an_optimizer_goes_on_as_if_it_had_not_been_saved(name: str) -> None:
    model = shared()
    optimizer = OPTIMIZERS[name](model.parameters())
    step(model, optimizer, range(3))
    state, saved = flattened(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
    step(model, optimizer, range(3, 6))
    other = shared(seed=0)
    other.load_state_dict(state)
    again = OPTIMIZERS[name](other.parameters())
    step(other, again, range(1))  # loading replaces the state of an optimizer that has stepped already
    other.load_state_dict(state)
    again.load_state_dict(saved)
    step(other, again, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_flat_state_that_differs_in_kind_is_refused() -> None:
    model = shared()
    optimizer = torch.optim.Adafactor(model.parameters())
    step(model, optimizer, range(1))
    state = optimizer.state_dict()
    for entries in state["state"].values():
        if entries.get("row_var") is not None and entries["row_var"].shape[1:] == (1,):
            entries |= {"variance": entries["row_var"].squeeze(1), "row_var": None, "col_var": None}
    optimizer.load_state_dict(state)
    with pytest.raises(ShareError, match=r"state of this Adafactor .* flat banks, .* new optimizer"):
        step(model, optimizer, range(1))


def test_a_model_and_its_optimizer_pickled_flat() -> None:
    model = shared()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    step(model, optimizer, range(2))
    file = io.BytesIO()
    make_flat(model)
    for entries in optimizer.state.values():
        entries.update(flattened(entries))
    torch.save((model, optimizer), file)
    file.seek(0)
    other, again = torch.load(file, weights_only=False)
    assert all(bank.bank.ndim == 2 for bank in banks_of(other))
    assert {id(p) for group in again.param_groups for p in group["params"]} == set(map(id, other.parameters()))
    twin = shared()
    twin.load_state_dict(model.state_dict())
    third = torch.optim.AdamW(twin.parameters(), 0.01)
    third.load_state_dict(optimizer.state_dict())
    for one, its in ((other, again), (twin, third)):
        step(one, its, range(2, 4))
    assert torch.equal(other(inputs()), twin(inputs()))


def test_a_saved_difference_that_is_flat(tmp_path: Path) -> None:
    model = share(net(), 0.5, keep=True, train="3.bias")
    shake(model.get_submodule("0.dist_ssn"))
    path = save(model, tmp_path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    content = json.loads(metadata["dist_ssn"])
    assert content.pop("format") == 1
    assert content.pop("tensors") and content.pop("metadata")  # the older version wrote no fingerprints of these
    metadata["dist_ssn"] = json.dumps({"format": 1, **content})
    save_file({name: flattened(tensor).contiguous() for name, tensor in load_file(path).items()}, path, metadata)
    assert any(name.endswith(".bank") and tensor.ndim == 1 for name, tensor in load_file(path).items())
    assert torch.equal(load(net(), tmp_path)(inputs()), model(inputs()))


def test_a_flat_state_of_local_updates() -> None:
    model = shared()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    local = LocalUpdates(model, optimizer, every=4)
    step(model, optimizer, range(2))  # in the middle of a round
    state = local.state_dict()
    assert state["parameters"]
    state["shapes"] = {n: s[:-1] if s[1:] == [1] else s for n, s in state["shapes"].items()}
    old = flattened(state)
    other = shared()
    local = LocalUpdates(other, torch.optim.SGD(other.parameters(), 0.01), every=4)
    local.load_state_dict(old)
    assert torch.equal(other(inputs()), model(inputs()))
    old["shapes"] = {n: [*s, 2] for n, s in old["shapes"].items()}
    with pytest.raises(CheckpointError, match="has the shape"):
        local.load_state_dict(old)


@pytest.fixture
def group() -> Any:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_dcp_names_the_flat_bank_and_loads_into_flat_views(group: None, tmp_path: Path) -> None:
    model, other = shared(), shared()
    shake(model)
    dcp.save(flattened(model.state_dict()), checkpoint_id=tmp_path)
    with pytest.raises(dcp.CheckpointException, match=r"Size mismatch.*\.(bank|differences)"):
        dcp.load(other.state_dict(), checkpoint_id=tmp_path)
    dcp.load(flattened(other.state_dict()), checkpoint_id=tmp_path)
    assert torch.equal(other(inputs()), model(inputs()))


def _sharded(rank: int, world_size: int) -> float:
    """FSDP2 on uneven parts goes on from a whole, flat state."""
    model = shared("offset:gains=true")
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    step(model, optimizer, range(2))
    options = StateDictOptions(full_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    saved, state = flattened(copy.deepcopy((saved, model.state_dict())))
    step(model, optimizer, range(2, 4))
    other = shared("offset:gains=true")
    other.load_state_dict(state)
    assert banks_of(other)[0].bank.numel() % world_size
    fully_shard(other, reshard_after_forward=False)
    again = torch.optim.AdamW(other.parameters(), 0.01)
    set_optimizer_state_dict(other, again, saved, options=options)
    step(other, again, range(2, 4))
    bank: Any = banks_of(other)[0].bank
    return relative_error(bank.full_tensor(), banks_of(model)[0].bank)


@pytest.mark.distributed
def test_fsdp2_goes_on_from_a_flat_state() -> None:
    assert max(run_ranks(_sharded, 2)) <= EXACT


# --- initial values


def drawn_anew(model: nn.Module) -> None:
    """The loop of many scripts."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def told(run: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run()
    return [str(warning.message) for warning in seen if "standard deviation" in str(warning.message)]


def wide(**options: Any) -> nn.Module:
    return share(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)), 0.5, **options)


@pytest.mark.parametrize("options", [{}, {"generate": "on_demand"}, {"keep": True}])
def test_a_loop_that_draws_initial_values_after_sharing_is_told(options: dict[str, Any]) -> None:
    model, x = wide(**options), torch.randn(2, 64)
    drawn_anew(model)
    (message,) = told(lambda: [model(x) for _ in range(2)])
    assert message.startswith("the bank of 0.weight has a standard deviation of") and "initialize(model)" in message
    initialize(model)
    assert not told(lambda: model(x))


def test_a_wrapper_tells_it_before_it_sends(group: None) -> None:
    model = wide()
    drawn_anew(model)
    assert len(told(lambda: DistributedDataParallel(model))) == 1
    fine = wide()
    wrapped = DistributedDataParallel(fine)
    with torch.no_grad():  # as if rank 0 had sent the values of a trained model
        banks_of(fine)[0].bank.mul_(3)
    assert not told(lambda: wrapped(torch.randn(2, 64)))


def test_values_that_are_loaded_or_drawn_before_sharing_are_fine() -> None:
    model, trained, x = wide(), wide(), torch.randn(2, 64)
    with torch.no_grad():
        banks_of(trained)[0].bank.mul_(3)
    model.load_state_dict(trained.state_dict())
    assert not told(lambda: model(x))
    dense = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    drawn_anew(dense)
    assert not told(lambda: share(dense, 0.5)(x))
    assert not told(lambda: copy.deepcopy(wide())(x))
