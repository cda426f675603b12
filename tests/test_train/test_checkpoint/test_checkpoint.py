"""Checkpoints come back bit-equal and are whole or absent; bad ones give one sentence and change nothing."""

from __future__ import annotations

import builtins
import errno
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import dist_ssn
from dist_ssn.engines import DDPEngine
from dist_ssn.errors import CheckpointError, UserError
from dist_ssn.train.checkpoint import store as checkpoint
from dist_ssn.train.checkpoint.folder import size_and_hash
from dist_ssn.train.ranks.raise_together import raise_together
from testing.ranks import run_ranks

DENSE = None


class Tied(nn.Module):
    """A tied head, running statistics, and enough weights to share."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, width)
        self.middle = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.middle(self.embedding(tokens))))


Trained = tuple[nn.Module, torch.optim.Optimizer]


def made(
    budget: float | None = 0.5, seed: int = 0, width: int = 16, kind: str = "adamw", plan_seed: int = 0
) -> Trained:
    torch.manual_seed(seed)
    model = Tied(width)
    if budget is not None:
        dist_ssn.share(model, budget, seed=plan_seed)
    groups = dist_ssn.parameter_groups(model)
    optimizer = torch.optim.AdamW(groups, lr=1e-2) if kind == "adamw" else torch.optim.SGD(groups, 0.1, momentum=0.9)
    return model, optimizer


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> float:
    tokens = torch.randint(32, (8,), generator=torch.Generator().manual_seed(seed))
    loss = nn.functional.cross_entropy(model(tokens), (tokens + 1) % 32)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def saved(folder: Path, trained: Trained, number: int = 3, keep: int = 2) -> Path:
    model, optimizer = trained
    return checkpoint.save(
        folder,
        step=number,
        engine=DDPEngine(model, optimizer),
        recipe_json='{"name": "test"}',
        plan=dist_ssn.shared_plan(model),
        keep=keep,
        run={"note": [1, 2]},
    )


def loaded(path: Path, trained: Trained) -> checkpoint.State:
    return checkpoint.load(path, engine=DDPEngine(*trained), plan=dist_ssn.shared_plan(trained[0]))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("budget", [DENSE, 0.5])
def test_a_round_trip_goes_on_bit_equal(tmp_path: Path, budget: float | None, kind: str) -> None:
    first = made(budget, kind=kind)
    for number in range(3):
        step(*first, seed=number)
    path = saved(tmp_path, first)
    state = loaded(path, second := made(budget, seed=7, kind=kind))
    assert (state.step, state.run, state.recipe) == (3, {"note": [1, 2]}, {"name": "test"})
    assert [step(*first, seed=n) for n in (5, 6)] == [step(*second, seed=n) for n in (5, 6)]
    for name, value in first[0].state_dict().items():
        assert torch.equal(value, second[0].state_dict()[name]), name


def test_a_tied_tensor_and_a_bank_are_written_once(tmp_path: Path) -> None:
    dense = load_file(saved(tmp_path / "dense", made(DENSE)) / "model.safetensors")
    assert "embedding.weight" in dense and "head.weight" not in dense and "norm.running_mean" in dense
    model, optimizer = made(0.5)
    step(model, optimizer, 0)
    path = saved(tmp_path / "shared", (model, optimizer))
    shared = load_file(path / "model.safetensors")
    numbers = sum(tensor.numel() for name, tensor in shared.items() if not name.endswith("extra_state"))
    state = model.state_dict()
    buffers = sum(buffer.numel() for name, buffer in model.named_buffers() if name in state)
    assert numbers == sum(parameter.numel() for parameter in model.parameters()) + buffers
    assert {name.partition("/")[0] for name in load_file(path / "optimizer.safetensors")} == {
        "exp_avg",
        "exp_avg_sq",
        "step",
    }
    assert dist_ssn.Plan.from_json((path / "plan.json").read_text()) == dist_ssn.shared_plan(model)


def test_the_newest_of_a_folder_is_meant_and_only_so_many_are_kept(tmp_path: Path) -> None:
    trained = made()
    for number in (1, 2, 30):
        saved(tmp_path, trained, number)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000030"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000030"
    assert loaded(tmp_path, trained).step == 30
    assert checkpoint.latest(tmp_path / "nowhere") is None


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    trained = made()
    saved(tmp_path, trained)
    step(*trained, seed=0)
    loaded(saved(tmp_path, trained), again := made())
    assert torch.equal(next(trained[0].parameters()), next(again[0].parameters()))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


# ---------------------------------------------------------------- damaged and foreign checkpoints


class Payload:
    """Unpickled, it makes the file "ran"."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return builtins.open, (str(self.folder / "ran"), "w")


def _truncate(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _flip(path: Path) -> None:
    file = path / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def _pickle(path: Path) -> None:
    (path / "model.safetensors").write_bytes(pickle.dumps(Payload(path)))


def _honest_pickle(path: Path) -> None:
    """A pickle that state.json vouches for: only the reader itself can refuse it."""
    _pickle(path)
    _vouch(path, "model.safetensors")


def _vouch(path: Path, name: str) -> None:
    state = json.loads((path / "state.json").read_text())
    state["files"][name] = size_and_hash(path / name)
    (path / "state.json").write_text(json.dumps(state))


def _optimizer(path: Path, old: str, new: str, value: torch.Tensor | None = None) -> None:
    """Gives the first tensor whose name begins with `old` another name, or value, as its writer."""
    file = path / "optimizer.safetensors"
    tensors = load_file(file)
    name = min(name for name in tensors if name.startswith(old))
    taken = tensors.pop(name)
    save_file({**tensors, name.replace(old, new): taken if value is None else value}, file)
    _vouch(path, file.name)


def _edit_state(path: Path, **changes: object) -> None:
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | changes))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (_truncate, "model.safetensors has .* bytes and was written with"),
    "one bit": (_flip, "optimizer.safetensors was changed after it was written"),
    "a pickle": (_pickle, "model.safetensors has .* bytes and was written with"),
    "a pickle with the right hash": (_honest_pickle, "not a safetensors file"),
    "no model": (lambda path: (path / "model.safetensors").unlink(), "model.safetensors is missing"),
    "no plan": (lambda path: (path / "plan.json").unlink(), "plan.json is missing"),
    "no state": (lambda path: (path / "state.json").unlink(), "not a complete checkpoint: .*state.json"),
    "half a state": (lambda path: (path / "state.json").write_text('{"step": '), "not a complete checkpoint"),
    "a list as state": (lambda path: (path / "state.json").write_text("[]"), "has format None"),
    "another format": (lambda path: _edit_state(path, format=99), "has format 99, .* reads 1"),
    "no moment": (lambda path: _optimizer(path, "exp_avg/", "exp/"), "the optimizer's state of .* has no exp_avg"),
    "no number of steps": (lambda path: _optimizer(path, "step/", "stop/"), "the optimizer's state of .* has no step"),
    "many numbers of steps": (
        lambda path: _optimizer(path, "step/", "step/", torch.ones(2)),
        "the optimizer's step of .* is not one number",
    ),
    "endless steps": (
        lambda path: _optimizer(path, "step/", "step/", torch.tensor(torch.inf)),
        "the optimizer's step of .* is not one number",
    ),
    "no step": (lambda path: _edit_state(path, step=None), "in state.json, step must be of type int"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_one_sentence_and_changes_nothing(tmp_path: Path, damage: str) -> None:
    trained = made()
    step(*trained, seed=0)
    path = saved(tmp_path, trained)
    act, sentence = DAMAGES[damage]
    act(path)
    other = made(seed=3)
    before = {name: value.clone() for name, value in other[0].state_dict().items()}
    with pytest.raises(CheckpointError, match=sentence) as caught:
        loaded(path, other)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not (path / "ran").exists()
    assert all(torch.equal(value, before[name]) for name, value in other[0].state_dict().items())
    assert not other[1].state


def test_a_damaged_newest_checkpoint_names_the_one_before(tmp_path: Path) -> None:
    trained = made()
    before, newest = saved(tmp_path, trained, 1), saved(tmp_path, trained, 2)
    _truncate(newest)
    with pytest.raises(CheckpointError, match=f"remove that folder to go on from {before}"):
        loaded(tmp_path, trained)


def test_loading_never_unpickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, made())

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, forbidden)
    assert loaded(path, made(seed=1)).step == 3
    assert sorted(file.suffix for file in path.iterdir()) == [".json", ".json", ".json", ".safetensors", ".safetensors"]


FOREIGN: dict[str, tuple[Callable[[], Trained], Callable[[], Trained], str]] = {
    "another plan": (lambda: made(0.5), lambda: made(0.25), "of another plan: .*(bank|weight)"),
    "another seed of the plan": (lambda: made(0.5), lambda: made(0.5, plan_seed=1), "of another plan: .*"),
    "dense into shared": (lambda: made(DENSE), lambda: made(), "of a dense model and this model is shared"),
    "shared into dense": (lambda: made(), lambda: made(DENSE), "of a shared model and this model is dense"),
    "another width": (
        lambda: made(DENSE),
        lambda: made(DENSE, width=8),
        r"another model: embedding.weight has the shape \(32, 16\) there and \(32, 8\) here",
    ),
    "another optimizer": (lambda: made(), lambda: made(kind="sgd"), "the optimizer AdamW and this run uses SGD"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_foreign_checkpoint_says_what_differs(tmp_path: Path, case: str) -> None:
    there, here, sentence = FOREIGN[case]
    path = saved(tmp_path, there())
    with pytest.raises(CheckpointError, match=sentence):
        loaded(path, here())


def test_another_architecture_says_which_tensors(tmp_path: Path) -> None:
    path = saved(tmp_path, made(DENSE))
    model = nn.Linear(3, 3)
    with pytest.raises(
        CheckpointError, match="2 tensors of the model are not in it, the first is bias; 8 of its tensors"
    ):
        checkpoint.load(path, engine=DDPEngine(model, torch.optim.AdamW(model.parameters())), plan=None)


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint at .*nowhere"):
        loaded(tmp_path / "nowhere", made())


def test_extra_state_that_is_no_json_is_refused(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_extra_state(self) -> object:
            return object()

        def set_extra_state(self, state: object) -> None:
            raise AssertionError("nothing to set")

    model = Odd(2, 2)
    with pytest.raises(CheckpointError, match="_extra_state is of type object"):
        saved(tmp_path, (model, torch.optim.SGD(model.parameters())))


# ---------------------------------------------------------------- saving that fails


def test_a_file_that_cannot_grow_leaves_the_former_checkpoint(tmp_path: Path) -> None:
    """The kernel itself refuses to write on, as on a full disk."""
    trained = made()
    former = saved(tmp_path, trained, 1)
    step(*trained, seed=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*step-00000002: .*File too large"):
            saved(tmp_path, trained, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [former]
    assert loaded(tmp_path, made()).step == 1


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_at_any_moment(tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = made()
    former = saved(tmp_path, trained, 1)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        saved(tmp_path, trained, 2)
    assert list(tmp_path.iterdir()) == [former]
    assert loaded(tmp_path, made()).step == 1


KILLED_WHILE_SAVING = """
import os, signal, sys
from pathlib import Path
from tests.test_train.test_checkpoint.test_checkpoint import made, saved
saved(Path(sys.argv[1]), made(), 1)
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
saved(Path(sys.argv[1]), made(), 2)
"""


@pytest.mark.processes
def test_a_killed_save_is_not_seen_and_is_cleaned(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(tmp_path)]
    assert subprocess.run(command, env=environment, timeout=150).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2, "the kill came too early or too late"
    trained = made()
    assert loaded(tmp_path, trained).step == 1
    saved(tmp_path, trained, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


# ---------------------------------------------------------------- several ranks


def _fails_on(rank: int, world_size: int, failing: int) -> str:
    def action() -> int:
        if rank == failing:
            raise CheckpointError(f"the disk of rank {rank} is full: × ∞")
        return rank

    device = torch.device("cpu")
    assert raise_together(lambda: rank, device) == rank
    try:
        raise_together(action, device)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.distributed
@pytest.mark.parametrize("failing", [0, 1])
def test_what_fails_on_one_rank_is_raised_on_all(failing: int) -> None:
    expected = f"CheckpointError: the disk of rank {failing} is full: × ∞"
    assert run_ranks(_fails_on, 2, failing) == [expected, expected]


def test_together_in_one_process() -> None:
    device = torch.device("cpu")
    assert raise_together(lambda: 5, device) == 5
    with pytest.raises(CheckpointError, match="full"):
        raise_together(lambda: (_ for _ in ()).throw(CheckpointError("full")), device)


def test_a_view_into_a_larger_storage_is_written_alone(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    model.register_buffer("view", torch.arange(100.0)[10:20:2])
    path = saved(tmp_path, (model, torch.optim.SGD(model.parameters())))
    tensors = load_file(path / "model.safetensors")
    assert tensors["view"].tolist() == [10, 12, 14, 16, 18]
    save_file(tensors, tmp_path / "again.safetensors")
