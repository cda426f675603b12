"""The undocumented parts of PyTorch: this PyTorch has them, nothing else of the package uses any, and what happens without."""

from __future__ import annotations

import ast
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import dist_ssn
from dist_ssn import torch_private
from dist_ssn.comm import CommMeter
from dist_ssn.engines.overlap import exchange
from dist_ssn.engines.overlap.exchange import make_exchange
from dist_ssn.errors import UserError
from dist_ssn.plan.overlap import parse_overlap
from dist_ssn.sharing import morphs, scopes
from dist_ssn.sharing.bank import Bank, banks_of
from testing.layer_kinds import relative_error

PACKAGE = Path(dist_ssn.__file__).parent


# ------------------------------------------------------------------------------------------- one file


def test_this_torch_has_them_all() -> None:
    assert torch_private.FAST_PATH and torch_private.END_OF_BACKWARD and not torch_private.MISSING
    assert len(torch_private.CONVOLUTION) == len(torch_private.NORM) == 1
    assert torch_private.outside_of_modes().__class__.__name__ != "nullcontext"
    assert torch_private._modes is not None and not torch_private.dispatch_mode_is_on()
    assert hasattr(DistributedDataParallel, "_active_ddp_module")
    assert isinstance(torch_private._found("torch.distributed.distributed_c10d._world").pg_names, dict)
    assert importlib.util.find_spec(torch_private.FSDP_COLLECTIVES)
    for method in torch_private.DDP_METHODS:
        assert hasattr(DistributedDataParallel, method), method


def private_names(source: str) -> list[str]:
    """Names of torch that begin with an underscore and are imported, or reached through `torch` or one of its classes."""
    tree = ast.parse(source)
    roots = {"torch"}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            found += [f"{node.module}.{a.name}" for a in node.names if "._" in f"{node.module}.{a.name}"]
            roots |= {a.asname or a.name for a in node.names}
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.startswith("torch.") and "._" in a.name]
            roots |= {a.asname for a in node.names if a.asname and a.name.startswith("torch.")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            root: ast.expr = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in roots:
                found.append(ast.unparse(node))
    return found


def test_private_names_are_found() -> None:
    source = "import torch.nn as n\nfrom torch.a import _b\nfrom torch import dist\n"
    source += "torch._C._x\ndist.D._y()\nn.z._w\nself._v\ntorch.q"
    assert sorted(set(private_names(source))) == ["dist.D._y", "n.z._w", "torch._C", "torch._C._x", "torch.a._b"]


def test_no_other_file_of_the_package_uses_a_private_name_of_torch() -> None:
    found = {
        str(path.relative_to(PACKAGE)): names
        for path in PACKAGE.rglob("*.py")
        if path.name != "torch_private.py" and (names := private_names(path.read_text(encoding="utf-8")))
    }
    assert found == {}


# ------------------------------------------------------------------------------------------- what happens without


def imported_without(name: str) -> Any:
    """`dist_ssn.torch_private`, imported again as if PyTorch lacked `name`, which it warns of."""
    holder, _, attribute = name.rpartition(".")
    spec: Any = importlib.util.spec_from_file_location("torch_private_again", torch_private.__file__)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(torch_private._found(holder), attribute)
        with pytest.warns(UserWarning, match=f"lacks {name}: dist_ssn generates weights by its pure path"):
            spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", torch_private._NEEDED)
def test_a_torch_without_a_function_of_the_fast_path_is_told(name: str) -> None:
    module = imported_without(name)
    assert not module.FAST_PATH and list(module.MISSING) == [name]
    assert not module.is_tracing()


class Twice(nn.Module):
    """Two layers and a recurrent one; the second is checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.lstm = nn.Linear(6, 12), nn.Linear(12, 6), nn.LSTM(6, 5)
        self.table = nn.Embedding(200, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.second, torch.tanh(self.first(x)), use_reentrant=False)  # type: ignore[assignment]
        return self.lstm(x + self.table(torch.arange(4)))[0]


def gradients(model: nn.Module) -> list[Tensor]:
    x = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))


def test_without_the_fast_path_gradients_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = dist_ssn.share(Twice().double(), 0.5)
    expected = gradients(model)
    monkeypatch.setattr(Bank, "pure", True)
    monkeypatch.setattr(scopes, "FAST_PATH", False)
    torch.manual_seed(0)
    plain = dist_ssn.share(Twice().double(), 0.5)
    assert all(bank.pure for bank in banks_of(plain))
    for got, right in zip(gradients(plain), expected, strict=True):
        assert relative_error(got, right) < 1e-12


def test_without_a_callback_an_overlap_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dist_ssn.share(nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 6)), 0.5)
    monkeypatch.setattr(exchange, "END_OF_BACKWARD", False)
    for overlap in ("segments", "delay"):
        with pytest.raises(
            UserError, match=f"overlap '{overlap}' needs the autograd engine's queue_callback, which torch"
        ):
            make_exchange(model, parse_overlap(overlap), lambda _: None, 2)  # type: ignore[arg-type]
    assert make_exchange(model, parse_overlap("none"), lambda _: None, 2) is None  # type: ignore[arg-type]


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_without_them_the_meter_counts_the_same(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def ledger() -> list[Any]:
        with CommMeter() as meter:
            model = DistributedDataParallel(nn.Linear(4, 2))
            model(torch.ones(3, 4)).sum().backward()
            dist.all_reduce(torch.ones(2))
        return [(row["collective"], row["purpose"], row["logical_bytes"]) for row in meter.ledger.rows()]

    expected = ledger()
    assert ("all_reduce", "gradients", 40) in expected and ("all_reduce", "other", 8) in expected
    module = imported_without("torch._C._current_graph_task_id")
    monkeypatch.setattr("dist_ssn.comm.meter.graph_task_id", module.graph_task_id)
    monkeypatch.setattr("dist_ssn.comm.meter.END_OF_BACKWARD", False)
    assert ledger() == expected


def without_the_flag() -> Callable[[], bool]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torch.fx._symbolic_trace", types.ModuleType("empty"))
        return torch_private._fx_flag()


@pytest.mark.parametrize("traces", [torch_private.is_tracing, without_the_flag()])
def test_a_symbolic_trace_is_noticed(traces: Callable[[], bool]) -> None:
    seen = []

    class Asks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(traces())
            return x + 1

    torch.fx.symbolic_trace(Asks())
    Asks()(torch.ones(1))
    assert seen == [True, False]


def test_the_wrapper_whose_forward_runs_is_found_by_its_frame(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class WithoutNote:
        forward = DistributedDataParallel.forward

    class Asks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch_private.active_ddp())
            with monkeypatch.context() as patch:
                patch.setattr(torch_private, "DistributedDataParallel", WithoutNote)
                seen.append(torch_private.active_ddp())
            return super().forward(x)

    seen: list[Any] = []
    model = Asks(2, 2)
    wrapper = DistributedDataParallel(model)
    wrapper(torch.ones(1, 2))
    model(torch.ones(1, 2))
    assert seen == [wrapper, wrapper, None, None]


def test_a_ddp_that_leaves_nothing_out_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    assert torch_private.ignore_in_ddp(model, ["bias"])
    assert model._ddp_params_and_buffers_to_ignore == ["bias"]
    monkeypatch.delattr(DistributedDataParallel, "_set_params_and_buffers_to_ignore_for_model")
    assert not torch_private.ignore_in_ddp(model, ["bias"])


def test_an_assertion_waits_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_private, "_assert_async", None)
    torch_private.assert_soon(torch.tensor(True), "never")
    with pytest.raises(RuntimeError, match="too large"):
        torch_private.assert_soon(torch.tensor(False), "too large")


def test_a_table_of_a_mode_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    cpu = torch.device("cpu")
    monkeypatch.setattr(torch_private, "_no_modes", torch_private.nullcontext)
    with FakeTensorMode():
        assert isinstance(morphs.sign_table(987, 64, cpu, torch.float32), FakeTensor)
        assert isinstance(morphs.chunk_order(987, "w", 0, 4, 4, cpu), FakeTensor)
    assert type(morphs.sign_table(987, 64, cpu, torch.float32)) is Tensor
    assert sorted(morphs.chunk_order(987, "w", 0, 4, 4, cpu).tolist()) == [0, 1, 2, 3]


def test_users_of_a_storage_are_counted_alike_in_every_release() -> None:
    weight = torch.ones(4, 3)
    alone = torch_private.storage_users(weight)
    views = [weight.detach(), weight.t()]
    assert (alone, torch_private.storage_users(weight)) in ((1, 1 + len(views)), (None, None))
