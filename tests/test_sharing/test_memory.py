"""Memory of generation on demand: generated weights are temporaries, and backward allocates one sum per bank, not one per layer."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import dist_ssn
from dist_ssn import parameter_groups
from dist_ssn.sharing.bank import Bank
from dist_ssn.train.models import MODELS
from testing.layer_kinds import KINDS, Unknown, banks_of, tensors

Batch = tuple[nn.Module, Tensor]
share = functools.partial(dist_ssn.share, generate="on_demand")


def gpt() -> Batch:
    return MODELS["gpt"](vocabulary=64, layers=4, width=32, heads=2, context=16), torch.randint(0, 64, (2, 16))


def wide_resnet() -> Batch:
    return MODELS["wide_resnet"](depth=16, width=1), torch.randn(2, 1, 8, 8)


CASES = {"gpt": gpt, "wide_resnet": wide_resnet}


class Watch(TorchDispatchMode):
    """Looks at memory after every operation, those of backward and of checkpoints included."""

    def __init__(self, look: Callable[[], None] = lambda: None):
        super().__init__()
        self.look = look
        self.made: list[tuple[str, int, StorageWeakRef]] = []
        """Operation, bytes and memory of every tensor that was made, views left out."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {self._memory(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and self._memory(leaf) not in given:
                storage = leaf.untyped_storage()
                self.made.append((str(func), storage.nbytes(), StorageWeakRef(storage)))
        self.look()
        return result

    @staticmethod
    def _memory(tensor: Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def alive(self) -> int:
        """Bytes of what was made while watching and is still there."""
        found = {memory.cdata: size for _, size, memory in self.made if not memory.expired()}
        return sum(found.values())


@contextmanager
def generated(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, StorageWeakRef]]]:
    """The weights that banks generate from now on: layer, bytes and memory of each, whole or some rows of it."""
    made: list[tuple[str, int, StorageWeakRef]] = []
    plain = Bank.fast

    def fast(bank: Bank, index: int, *args: Any, **kwargs: Any) -> Tensor:
        weight = plain(bank, index, *args, **kwargs)
        layer = bank.group.slots[index].name.rpartition(".")[0]
        made.append((layer, weight.untyped_storage().nbytes(), StorageWeakRef(weight.untyped_storage())))
        return weight

    with monkeypatch.context() as patch:
        patch.setattr(Bank, "fast", fast)
        yield made


def layers_alive(made: list[tuple[str, int, StorageWeakRef]]) -> set[str]:
    return {layer for layer, _, memory in made if not memory.expired()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpoint"])
@pytest.mark.parametrize("morph", ["auto", "offset:gains=true,rank=2", "hash:templates=2", "inter"])
@pytest.mark.parametrize("name", CASES)
def test_at_most_two_layers_weights_are_alive(
    name: str, morph: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In forward and in backward, looked at after every single operation; and none at all between the two."""
    model, batch = CASES[name]()
    share(model, 0.2, morph=morph)
    most: set[str] = set()

    def look() -> None:
        nonlocal most
        now = layers_alive(made)
        most = now if len(now) > len(most) else most

    with generated(monkeypatch) as made, Watch(look):
        output = checkpoint(model, batch, use_reentrant=False) if checkpointing else model(batch)
        loss = output.square().mean()
        forward = len(made)
        assert not layers_alive(made), "between forward and backward"
        loss.backward()
        assert not layers_alive(made), "after backward"
    layers = {layer for layer, _, _ in made}
    assert len(layers) >= 12 and forward >= len(layers)
    assert len(made) > forward, "backward must have made weights again, or this test sees nothing"
    assert 1 <= len(most) <= 2, f"{len(most)} layers at once: {sorted(most)}"


@pytest.mark.parametrize("name", CASES)
def test_forward_keeps_no_more_than_dense(name: str) -> None:
    """What is alive between forward and backward: the dense model's activations, and nothing of the weights' size."""
    kept = {}
    for budget in (None, 0.2):
        torch.manual_seed(0)
        model, batch = CASES[name]()
        if budget:
            share(model, budget)
        with Watch() as watch:
            loss = model(batch).square().mean()
            kept[budget] = watch.alive()
        loss.backward()
    smallest = 4 * min(p.numel() for p in CASES[name]()[0].parameters() if p.ndim >= 2)
    assert kept[0.2] <= kept[None] + smallest, kept


@pytest.mark.parametrize("morph", ["offset", "offset:templates=2,gains=true,rank=2", "hash", "inter", "wavg/mask"])
@pytest.mark.parametrize("name", CASES)
def test_backward_makes_one_sum_per_bank_and_no_more(name: str, morph: str) -> None:
    """Slicing a flat parameter would cost a bank of zeros per read; here it is one for all of the bank's readers."""
    model, batch = CASES[name]()
    share(model, 0.9, morph=morph, mapping="single")
    (bank,) = banks_of(model)
    size = bank.bank.untyped_storage().nbytes()
    largest = max(slot.numel for slot in bank.group.slots) * bank.bank.element_size()
    assert size > 1.5 * largest, "a weight must not be mistaken for a bank"
    loss = model(batch).square().mean()
    with Watch() as watch:
        loss.backward()
    large = [operation for operation, made, _ in watch.made if made >= size]
    assert 1 <= len(large) <= 2, large


def test_the_work_of_a_read_does_not_grow_with_the_bank() -> None:
    """O(K·n): in forward and backward of one small layer, nothing as large as the bank is made but its one gradient."""
    model = nn.ModuleList([nn.Linear(16, 16), nn.Linear(400, 400)])
    share(model, 0.9, morph="offset:templates=1", mapping="single")
    (bank,) = banks_of(model)
    with Watch() as watch:
        loss = model[0](torch.randn(2, 16)).sum()
        assert max(made for _, made, _ in watch.made) <= 16 * 16 * 4
        loss.backward()
    large = [operation for operation, made, _ in watch.made if made > 64 * 16 * 16]
    assert len(large) == 1, large
    assert bank.bank.grad is not None


@pytest.mark.parametrize("kind", ["unknown", "lstm", "gru", "attention-packed", "embedding-few", "linear"])
def test_forward_without_backward_leaks_nothing(kind: str) -> None:
    """Trap: a saved-tensor hook that keeps an operation's own output makes a cycle that no collector sees."""
    model = share(KINDS[kind].build().double(), 0.6)
    inputs = KINDS[kind].inputs()
    tensors(model(*inputs))
    with Watch() as watch:
        for _ in range(3):
            outputs = tensors(model(*inputs))
            del outputs
        gc.collect()
        assert watch.alive() == 0, f"{watch.alive()} bytes are left"


def test_a_pass_that_died_leaves_nothing_behind() -> None:
    """Sums of a backward that ended with an exception go with the graph, not with the process."""
    model = share(nn.Sequential(*[nn.Linear(32, 32) for _ in range(4)]), 0.5)
    x = torch.randn(2, 32)

    def fail(_: Tensor) -> None:
        raise KeyError("on purpose")

    with Watch() as watch:
        for _ in range(3):
            hidden = model[0](x)  # type: ignore[index]
            hidden.register_hook(fail)
            loss = model[1:](hidden).sum()  # type: ignore[index]
            with pytest.raises(KeyError):
                loss.backward()
            del hidden, loss
        model(x).sum().backward()
        for parameter in model.parameters():
            parameter.grad = None
        gc.collect()
        assert watch.alive() == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt", {"layers": 6, "width": 128}),
        ("wide_resnet", {"depth": 16, "width": 4}),
    ],
)
@pytest.mark.parametrize("budget", [0.05, 0.1])
def test_gradients_and_optimizer_state_are_as_small_as_the_budget(
    name: str, options: dict[str, int], budget: float
) -> None:
    """At most (budget + 0.02) of the dense model's, counted after a real step of AdamW."""
    model = MODELS[name](**options)
    dense = 3 * sum(p.numel() for p in model.parameters())
    share(model, budget)
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-3)
    model(torch.randint(0, 256, (1, 4)) if name == "gpt" else torch.randn(2, 1, 8, 8)).square().mean().backward()
    gradients = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    state = sum(v.numel() for s in optimizer.state.values() for k, v in s.items() if k.startswith("exp_avg"))
    assert state == 2 * gradients
    assert gradients + state <= (budget + 0.02) * dense


def test_a_layer_with_many_weights_makes_each_once_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention reads its packed weight several times; `Unknown` reads one of its own twice."""
    for model, inputs in (
        (share(nn.MultiheadAttention(12, 3), 0.5), (torch.randn(4, 2, 12),) * 3),
        (share(Unknown(), 0.5), (torch.randn(3, 6),)),
        (share(nn.LSTM(5, 6, num_layers=2), 0.5), (torch.randn(4, 2, 5),)),
    ):
        weights = sum(len(bank.group.slots) for bank in banks_of(model))
        with generated(monkeypatch) as made:
            model(*inputs)
        assert len(made) == weights


def test_sharing_kept_weights_copies_at_most_one(tmp_path: Path) -> None:
    """Also of a file that is mapped into memory: the banks read the file's own pages."""
    dense = nn.Sequential(*(nn.Linear(512, 512) for _ in range(6)))
    save_file(dense.state_dict(), tmp_path / "dense.safetensors")
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(6)))
    mapped = load_file(tmp_path / "dense.safetensors")
    model.load_state_dict(mapped, assign=True)
    one, most = 512 * 512 * 4, 0

    def look() -> None:
        nonlocal most
        most = max(most, watch.alive())

    with Watch(look) as watch:
        dist_ssn.share(model, 1000, keep=True)
    assert most < one + 100_000, f"{most:,} bytes were alive, and one weight has {one:,}"
    (bank,) = banks_of(model)
    assert bank.bases is not None
    for slot, base in zip(bank.group.slots, bank.bases.tensors, strict=True):
        assert base.data_ptr() == mapped[slot.name].data_ptr()


def test_banks_get_their_values_when_the_dense_weights_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a large model is never in memory beside its banks and what draws them."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    dense = [weakref.ref(layer.weight) for layer in model]
    alive: list[int] = []
    reset = Bank.reset_parameters

    def seen(bank: Bank, scales: Any = None) -> None:
        alive.append(sum(reference() is not None for reference in dense))
        reset(bank, scales)

    monkeypatch.setattr(Bank, "reset_parameters", seen)
    share(model, 0.3)
    assert alive == [0]
