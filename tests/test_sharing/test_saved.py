"""Files of a difference: they go onto the same base, are small, are switched and summed, and name what does not fit."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import dist_ssn
from dist_ssn import load, materialize, merge, save, share
from dist_ssn.errors import CheckpointError, ShareError
from dist_ssn.sharing.saved_file import FILE, read

X = torch.linspace(-1, 1, 48).view(4, 12)


class Net(nn.Module):
    """Two layers around a norm with buffers, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def trained(seed: int, budget: float = 0.3, train: str | tuple[str, ...] = "head", morph: str = "auto") -> nn.Module:
    """A model of `net()` that was trained for three steps."""
    torch.manual_seed(seed)
    model = share(net(), budget, keep=True, train=train, morph=morph, seed=seed)
    optimizer = torch.optim.AdamW(dist_ssn.parameter_groups(model, lr=0.1))
    for _ in range(3):
        model(X + torch.randn_like(X)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("morph", ["auto", "hash:templates=2", "offset:gains=true,rank=1", "emb/inter"])
def test_save_then_load_on_a_fresh_base_is_the_model(tmp_path: Path, morph: str) -> None:
    model = trained(1, 0.6, morph=morph)
    path = save(model, tmp_path / "new" / "a")
    assert path == tmp_path / "new" / "a" / FILE and [p.name for p in path.parent.iterdir()] == [FILE]
    base = net().eval()
    assert load(base, path.parent) is base
    assert torch.equal(base(X), model(X)) and not torch.equal(base(X), net().eval()(X))
    assert [n for n, p in base.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    assert torch.allclose(materialize(base)(X), model(X), atol=1e-6)
    assert path.stat().st_size < 30_000


def test_the_file_holds_nothing_of_the_base(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = share(nn.Sequential(nn.Linear(500, 1000), nn.Linear(1000, 500)), 10_000, keep=True)
    assert save(model, tmp_path).stat().st_size < 45_000


def test_differences_are_switched(tmp_path: Path) -> None:
    first = trained(1, train="head")
    save(first, tmp_path / "a")
    state = load(net(), tmp_path / "a").eval()
    second = load(net(), tmp_path / "a")
    with torch.no_grad():
        for parameter in second.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5)
    save(second.eval(), tmp_path / "b")
    assert torch.equal(load(state, tmp_path / "b")(X), second(X))
    assert torch.equal(load(state, tmp_path / "a")(X), first(X))
    save(trained(2), tmp_path / "other plan")
    with pytest.raises(CheckpointError, match=r"follows another plan: .*load it onto the dense base"):
        load(state, tmp_path / "other plan")


def test_a_switch_does_not_leave_a_trained_head_behind(tmp_path: Path) -> None:
    save(share(net(), 0.3, keep=True, exclude="head"), tmp_path / "frozen head")
    model = share(net(), 0.3, keep=True, train="head")
    with torch.no_grad():
        model.head.weight.add_(1)
    with pytest.raises(
        CheckpointError, match=r"was trained on other values of head\.weight \(1 of \d+ tensors differ\)"
    ):
        load(model, tmp_path / "frozen head")


def test_a_weighted_sum_of_two_plans(tmp_path: Path) -> None:
    """base + Σ weight · (trained − base), whatever the morphs, own parameters and buffers included."""
    base = net().eval()
    models = [trained(1, train="head"), trained(2, 0.5, train=("*.bias", "head"), morph="offset:gains=true,rank=1")]
    for number, model in enumerate(models):
        save(model, tmp_path / str(number))
    dense = [dict(materialize(model).named_parameters()) for model in models]
    merged = merge(base, {tmp_path / "0": 0.25, tmp_path / "1": 0.75})
    assert type(merged) is Net and torch.equal(base(X), net().eval()(X))
    for name, parameter in merged.named_parameters():
        start = base.get_parameter(name)
        wanted = start + 0.25 * (dense[0][name] - start) + 0.75 * (dense[1][name] - start)
        assert torch.allclose(parameter, wanted, atol=1e-6), name
    alone = merge(base, {tmp_path / "0": 1.0})
    assert torch.allclose(alone(X), models[0](X), atol=1e-5)
    with pytest.raises(ShareError, match="Net is shared: merge onto the dense base"):
        merge(models[0], {tmp_path / "0": 1.0})


def test_another_base_is_one_sentence(tmp_path: Path) -> None:
    save(trained(1), tmp_path)
    other = net()
    with torch.no_grad():
        other.body[3].bias[0] += 1e-3
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(
        CheckpointError, match=r"was trained on other values of body\.3\.bias \(1 of \d+ tensors differ\): load"
    ):
        load(other, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    with pytest.raises(
        CheckpointError, match=r"on body\.0\.weight in float32, and here it is in bfloat16: load the pretrained"
    ):
        load(net().bfloat16(), tmp_path)
    small = net()
    small.body = small.body[:3]
    with pytest.raises(
        CheckpointError, match=r"was trained on a model with body\.3\.weight, which this one does not have"
    ):
        load(small, tmp_path)
    wide = net()
    wide.head = nn.Linear(16, 4)
    with pytest.raises(CheckpointError, match=r"has head\.bias of shape \(3,\), and here it has \(4,\)"):
        load(wide, tmp_path)
    with pytest.raises(ShareError, match=r"Net is not shared as a whole with keep=True"):
        save(share(net(), 0.3), tmp_path / "b")


def test_a_new_head_needs_no_fingerprint(tmp_path: Path) -> None:
    model = trained(1, train="head")
    save(model, tmp_path)
    base = net()
    nn.init.zeros_(base.head.weight)
    assert torch.equal(load(base.eval(), tmp_path)(X), model(X))


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not what dist_ssn\.save writes: .*No such file"):
        load(net(), tmp_path / "gone")
    path = save(trained(1), tmp_path)
    tensors = {
        key: tensor.clone() for key, tensor in load_file(path).items()
    }  # safetensors 0.4 reads from the file later
    with safe_open(path, "pt") as file:
        text = file.metadata()["dist_ssn"]
    content = json.loads(text)
    del content["metadata"], content["tensors"]
    old = json.dumps(content)  # as older versions wrote it

    def written(tensors: dict[str, Tensor], text: str) -> None:
        save_file(tensors, path, {"dist_ssn": text})

    written(tensors, old)
    assert torch.equal(load(net().eval(), tmp_path)(X), trained(1)(X))
    name = next(key for key in tensors if key.startswith("bank/"))
    for changed, words, sentence in (
        ({k: v for k, v in tensors.items() if k != name}, text, f"damaged: {name} is not that of its plan"),
        (tensors | {name: torch.ones(3)}, text, f"damaged: {name} was changed after it was written"),
        (tensors | {name: torch.ones(3)}, old, f"damaged: {name} is not that of its plan"),
        (tensors, "{}", "no entry 'dist_ssn' of format 1"),
        (tensors, json.dumps(content | {"plan": 3}), "is not what dist_ssn.save writes"),
        (tensors, json.dumps(content | {"base": {"a": 1}}), "is not what dist_ssn.save writes"),
        (tensors, json.dumps(content | {"base": {}}), "damaged: it has no fingerprint of"),
        (
            {k: v for k, v in tensors.items() if k != "own/head.bias"},
            text,
            r"damaged: head\.bias was trained and is not",
        ),
    ):
        written(changed, words)
        with pytest.raises(CheckpointError, match=sentence):
            load(net(), tmp_path)
    path.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match=r"is not what dist_ssn\.save writes: its header"):
        load(net(), tmp_path)


def test_what_was_trained_is_saved_though_it_is_frozen_now(tmp_path: Path) -> None:
    """As before an export: by torch, or by `freeze`."""
    for number, freeze in enumerate((lambda m: m.requires_grad_(False), lambda m: dist_ssn.freeze(m, "head"))):
        model = trained(1)
        freeze(model)
        save(model, tmp_path / str(number))
        other = load(net().eval(), tmp_path / str(number))
        assert torch.equal(other(X), model(X))
        other.requires_grad_(False)
        save(other, tmp_path / "again")
        assert torch.equal(load(net().eval(), tmp_path / "again")(X), model(X))


def test_every_flipped_byte_of_a_tensor_is_found(tmp_path: Path) -> None:
    path = save(trained(1), tmp_path)
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    for place in range(begin, len(content), max(1, (len(content) - begin) // 40)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :])
        with pytest.raises(CheckpointError, match="was changed after it was written"):
            load(net(), tmp_path)


@pytest.mark.parametrize("bit", [1, 8])
def test_a_flipped_bit_of_the_header_is_found_or_changes_nothing(tmp_path: Path, bit: int) -> None:
    """The plan's seed and the slots' places are digits of the header; a name of an entry that is not read may change."""
    path = save(trained(1), tmp_path)
    content, wanted = path.read_bytes(), load(net().eval(), tmp_path)(X)
    end = 8 + int.from_bytes(content[:8], "little")
    numbers = [found.end() - 1 for found in re.finditer(rb": \d", content[:end])]
    harmless = 0
    for place in sorted({*numbers, *range(0, end, 8)}):
        path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        try:
            read(tmp_path)
        except CheckpointError:
            continue
        harmless += 1
        assert torch.equal(load(net().eval(), tmp_path)(X), wanted), content[place - 20 : place + 20]
    assert len(numbers) > 10 and harmless <= 8


@pytest.mark.parametrize(
    "weights", ["a", ["a"], {"a": float("nan")}, {"a": float("inf")}, {"a": "0.5"}, {"a": None}, {"a": True}]
)
def test_weights_of_a_sum(tmp_path: Path, weights: Any) -> None:
    with pytest.raises(
        ShareError, match=r"merge takes folders with their weights|the weight of a must be a finite number"
    ):
        merge(net(), weights)


@pytest.mark.parametrize("train", [None, 3, True, nn.Linear(1, 1), [nn.Linear(1, 1)]])
def test_names_of_what_is_trained_whole(train: Any) -> None:
    with pytest.raises(ShareError, match="train must be a name or a glob"):
        share(net(), 0.3, keep=True, train=train)
    with pytest.raises(ShareError, match="keep must be True or False, got 'no'"):
        share(net(), 0.3, keep="no")  # type: ignore[arg-type]


class Twice(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.table, self.head, self.rest = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False), nn.Linear(16, 16)
        self.head.weight = self.table.weight if tied else nn.Parameter(self.table.weight.detach().clone())


def test_a_base_whose_ties_differ(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save(share(Twice(True), 0.5, keep=True), tmp_path)
    torch.manual_seed(0)
    base = Twice(False)
    for action in (lambda: load(base, tmp_path), lambda: merge(base, {tmp_path: 1.0})):
        with pytest.raises(CheckpointError, match=r"was trained on another model: .*tied"):
            action()


def test_a_failed_write_leaves_the_former_file(tmp_path: Path) -> None:
    model = trained(1)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        save(model, tmp_path / "file")
