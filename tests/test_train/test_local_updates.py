"""Local updates by a recipe: runs go on exactly in the middle of a round, and only rounds are sent."""

from __future__ import annotations

import gc
import os
import shutil
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dist_ssn.engines import DDPEngine
from dist_ssn.errors import CheckpointError, Preempted, RecipeError, UserError
from dist_ssn.sync.codecs import CODECS
from dist_ssn.sync.islands import check_islands
from dist_ssn.sync.local_updates import LocalUpdates
from dist_ssn.sync.outer import OUTER
from dist_ssn.train.checkpoint.folder import checkpoints
from dist_ssn.train.checkpoint.packed import pack, unpack
from dist_ssn.train.checkpoint.parts import read_state
from dist_ssn.train.loop import train
from dist_ssn.train.ranks import agreement as agreements
from dist_ssn.train.recipe.schema import Recipe
from dist_ssn.train.recipe.sections import (
    CheckpointConfig,
    EngineConfig,
    OptimizerConfig,
    PruneConfig,
    ScheduleConfig,
    SyncConfig,
)
from testing.ranks import run_ranks
from tests.test_train.test_loop import assert_equal, outcome, recipe

distributed = pytest.mark.distributed
EVERY = CheckpointConfig(every=4, keep=9)
IN_A_ROUND = "step-00000008"
SYNCS = {
    "late": SyncConfig(every=3, delay=1, codec="int4", warmup=1),
    "bits": SyncConfig(every=5, codec="bins2", outer="average"),
}


def _cut(rank: int, run: Path, checkpoint: str) -> None:
    """Leaves nothing of a run after a checkpoint."""
    dist.barrier()
    if rank == 0:
        for path in checkpoints(run / "checkpoints"):
            if path.name > checkpoint:
                shutil.rmtree(path)
    dist.barrier()


def _whole_and_resumed(rank: int, n: int, output: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, sync in SYNCS.items():
        args = {"dropout": 0.3, "norm": True}
        made = recipe(output, name=name, sync=sync, model_args=args, checkpoint=EVERY)
        whole = outcome(train(made, progress=False))
        _cut(rank, output / name, IN_A_ROUND)
        again = replace(made, checkpoint=replace(EVERY, resume=True))
        found[name] = whole, outcome(train(again, progress=False))
    plain = recipe(
        output, optimizer=OptimizerConfig(name="sgd", lr=0.1, momentum=0.0), schedule=ScheduleConfig("constant")
    )
    each = SyncConfig(every=1, outer="average")
    plain = replace(plain, clip_norm=None, patience=None)
    found["synchronous"] = [
        outcome(train(replace(plain, name=f"step{sync.every}", sync=sync), progress=False))
        for sync in (SyncConfig(), each)
    ]
    patient = recipe(output, name="patient", patience=1, evaluate_every=1, sync=SyncConfig(every=100))
    patient = replace(patient, optimizer=OptimizerConfig(lr=1e-9))
    found["patient"] = outcome(train(patient, progress=False))
    return found


@distributed
def test_runs_go_on_exactly_in_a_round_and_equal_synchronous_ones(tmp_path: Path) -> None:
    ranks = run_ranks(_whole_and_resumed, 2, tmp_path)
    for name in SYNCS:
        whole, resumed = ranks[0][name]
        assert_equal(whole, resumed)
        assert_equal(whole, ranks[1][name][1])
        purposes = whole["summary"]["ring_bytes_by_purpose"]
        assert purposes["synchronization"] > 0 and "gradients" not in purposes
        assert 0 < whole["row"]["bytes_per_step_logical"] < 4 * whole["row"]["parameters"]
    every, rounds = ranks[0]["synchronous"]
    for key, tensor in every["tensors"].items():
        assert (rounds["tensors"][key] - tensor).abs().max() < 1e-6, key
    for mine, theirs in zip(every["row"]["history"], rounds["row"]["history"], strict=True):
        assert mine["validation_loss"] == pytest.approx(theirs["validation_loss"], abs=1e-6)
    patient = ranks[0]["patient"]  # its first evaluation is the best, and it ends in a round
    assert_equal(patient, ranks[1]["patient"])
    assert [point["step"] for point in patient["row"]["history"]] == [1, 2]
    rounds = {name: [row["step"] for row in ranks[0][name][0]["summary"]["rounds"]] for name in SYNCS}
    assert rounds == {"late": [1, 4, 7, 10, 12], "bits": [5, 10, 12]}  # the last two means arrive after the same step
    assert [row["step"] for row in patient["summary"]["rounds"]] == [2]


def _until_it_makes_room(rank: int, n: int, made: Recipe) -> str:
    agreements.ASK_SECONDS = 0.0
    with pytest.raises(Preempted) as caught:
        train(made, progress=False)
    said = str(caught.value)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        del caught
        gc.collect()
    assert not warned  # such as of a round that is not over, which is no fault of the user's
    return said


def _goes_on(rank: int, n: int, made: Recipe, resume: bool) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return outcome(train(replace(made, checkpoint=CheckpointConfig(resume=resume)), progress=False))


@distributed
def test_a_signal_in_a_round_loses_nothing(tmp_path: Path) -> None:
    sync = SyncConfig(every=100, outer="average", codec="int8")
    args = {"dropout": 0.3}
    made = recipe(tmp_path, sync=sync, model_args=args | {"accident": "term", "at": 5, "rank": 1}, evaluate_every=100)
    first, second = run_ranks(_until_it_makes_room, 2, made)
    assert first == second and "was preempted by signal 15" in first
    going = replace(made, model_args={"context": 8, **args})
    resumed, _ = run_ranks(_goes_on, 2, going, True)
    whole, _ = run_ranks(_goes_on, 2, replace(going, name="whole"), False)
    assert_equal(resumed, whole)
    (saved, *_) = checkpoints(tmp_path / "small" / "checkpoints")
    _fewer_processes_go_on(going, saved)
    _damage_is_named(going, saved)


def _fewer_processes_go_on(made: Recipe, saved: Path) -> None:
    """One process goes on from the anchor of two."""
    shutil.copytree(saved, saved.parents[2] / "fewer" / "checkpoints" / saved.name)
    going = replace(made, name="fewer", checkpoint=CheckpointConfig(resume=True))
    with pytest.warns(
        UserWarning, match="this state is worker 0's of 2, and this is worker 0 of 1: it goes on from the anchor"
    ):
        assert train(going, progress=False).row["history"][-1]["step"] == 12
    without = replace(going, name="without", sync=SyncConfig())
    shutil.copytree(saved, saved.parents[2] / "without" / "checkpoints" / saved.name)
    assert train(without, progress=False).row["history"][-1]["step"] == 12
    # And back again: a run without local updates goes on with them.
    shutil.rmtree(saved.parents[2] / "without" / "checkpoints" / "step-00000012")
    train(replace(without, steps=10), progress=False)
    assert train(replace(without, sync=SyncConfig(every=2)), progress=False).row["history"][-1]["step"] == 12


def test_a_run_goes_on_with_the_settings_of_its_recipe(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the outer optimizer's settings were in the checkpoint; only the codec must be the same."""
    made = recipe(tmp_path, sync=SyncConfig(every=3, codec="int4"), checkpoint=CheckpointConfig(every=4), steps=8)
    train(made, progress=False)
    going = replace(made, steps=12, checkpoint=CheckpointConfig(resume=True))
    with pytest.raises(CheckpointError) as caught:
        train(replace(going, sync=SyncConfig(every=3, codec="int8")), progress=False)
    assert str(caught.value) == (
        f"the checkpoint {tmp_path}/small/checkpoints/step-00000008: what its rounds have not sent yet is in the codec int4, and "
        "sync.codec is int8: set sync.codec=int4"
    )
    found = []
    for steps, sync in ((10, SyncConfig(every=2, codec="int4", outer="average")), (12, made.sync)):
        train(replace(going, steps=steps, sync=sync))
        saved = checkpoints(tmp_path / "small" / "checkpoints")[-1]
        (group,) = read_state(saved, 1, 0)[0]["outer"]["param_groups"]
        found.append((group["lr"], group["momentum"], group["nesterov"]))
    assert found == [(1.0, 0, False), (0.7, 0.6, True)]
    assert not [str(one.message) for one in recwarn if "settings" in str(one.message)]
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "it goes on with other settings than before:" in said
        and "sync.every was 3 and is 2; sync.outer was nesterov" in said
    )


def _damage_is_named(made: Recipe, saved: Path) -> None:
    going = replace(made, name="damaged", checkpoint=CheckpointConfig(resume=True))
    copy = saved.parents[2] / "damaged" / "checkpoints" / saved.name
    for name in ("sync.safetensors", "worker-00000.safetensors"):
        shutil.copytree(saved, copy)
        content = bytearray((copy / name).read_bytes())
        content[-1] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name} was changed after it was written"):
            train(going, progress=False)
        (copy / name).unlink()
        with pytest.raises(CheckpointError, match=f"{name} is missing"):
            train(going, progress=False)
        shutil.rmtree(copy)


def _on_nodes(rank: int, n: int, output: Path) -> dict[str, Any]:
    os.environ |= {"GROUP_RANK": str(rank // 2), "LOCAL_WORLD_SIZE": "2"}
    made = recipe(output, name="nodes", sync=SyncConfig(every=3, within="node"))
    found = outcome(train(made, progress=False))
    os.environ["GROUP_RANK"] = "0"
    with pytest.raises(UserError, match="all 4 processes are on one node"):
        train(replace(made, name="one"), progress=False)
    return found


@distributed
def test_nodes_are_islands(tmp_path: Path) -> None:
    """Two nodes of two processes train like two processes with the same samples each."""
    ranks = run_ranks(_on_nodes, 4, tmp_path)
    pair = run_ranks(_goes_on, 2, recipe(tmp_path, name="pair", sync=SyncConfig(every=3)), False)
    for found in ranks:
        assert_equal(found, ranks[0])
    assert ranks[0]["row"]["validation_loss"] == pytest.approx(pair[0]["row"]["validation_loss"], rel=1e-3)
    purposes = ranks[0]["summary"]["ring_bytes_by_purpose"]
    assert purposes["gradients"] > 0 and purposes["synchronization"] > 0


def test_the_keys_of_a_recipe_are_the_words_of_local_updates() -> None:
    import inspect

    words = inspect.signature(LocalUpdates).parameters
    assert {field.name for field in fields(SyncConfig)} - {"within", "limit"} <= set(words)
    schema = SyncConfig.__pydantic_fields__  # type: ignore[attr-defined]
    assert set(schema["codec"].annotation.__args__) == set(CODECS)
    assert set(schema["outer"].annotation.__args__) == set(OUTER)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"sync": SyncConfig(codec="int4")},
            "sync.codec needs local updates: set sync.every too, such as --sync.every=16",
        ),
        (
            {"engine": EngineConfig("fsdp")},
            "sync.every goes with the engine ddp or mpi; a script can train islands of FSDP2, by LocalUpdates(group=...)",
        ),
        (
            {"engine": EngineConfig("deepspeed")},
            "sync.every goes with the engine ddp or mpi, not with deepspeed, which averages gradients on every step",
        ),
        (
            {"engine": EngineConfig("mpi"), "sync": SyncConfig(every=2, within="node")},
            "sync.within goes with the engine ddp",
        ),
        (
            {"sync": SyncConfig(every=2, outer="average", outer_momentum=0.5)},
            "goes with sync.outer nesterov, not with average",
        ),
        ({"engine": EngineConfig(overlap="delay")}, "engine.overlap is for gradients that are averaged on every step"),
        ({"engine": EngineConfig(compress="fp16")}, "engine.compress is for gradients that are averaged on every step"),
        (
            {"prune": PruneConfig(final=0.5)},
            "prune.final needs processes that hold the same parameters after every step",
        ),
        ({"predicted": "p.json"}, "predicted is for gradients that are averaged on every step, not for sync.every"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path, **{"sync": SyncConfig(every=4)} | changes)
    assert sentence in str(caught.value)


def test_engine_options_that_cannot_be() -> None:
    model = torch.nn.Linear(2, 2)
    for options, sentence in (
        ({"overlap": "delay"}, "leave them out with sync"),
        ({"compress": "fp16"}, "leave them out with sync"),
        ({"within": "node"}, "islands need several processes"),
        ({"within": "rack"}, "unknown kind of island 'rack': known are node"),
    ):
        with pytest.raises(UserError, match=sentence):
            DDPEngine(model, torch.optim.SGD(model.parameters()), sync={"every": 2}, **options)


def test_islands_of_different_sizes() -> None:
    with pytest.raises(
        UserError, match=r"different numbers of processes \(2 on a, 1 on b\): start equally many on each"
    ):
        check_islands({"a": [0, 1], "b": [2]})


def test_packed_states() -> None:
    state = {"a": {0: torch.ones(2), 1: {"b": [torch.zeros(()), None, True, 1.5, "x"]}}, "c": (), "d": {}}
    found = unpack(pack(state))
    assert torch.equal(found["a"][0], torch.ones(2)) and found["a"][1]["b"][1:] == [None, True, 1.5, "x"]
    assert found["c"] == () and found["d"] == {}
    text = torch.tensor(list(b'{"pairs": [["a", {"tensor": "nothing"}]]}'), dtype=torch.uint8)
    deep = torch.tensor(list(b"[" * 100_000), dtype=torch.uint8)
    for tensors in (
        {},
        {"json": torch.ones(3)},
        {"json": text},
        {"json": deep},
        {"json": text[:9]},
        {"json": text[:0]},
    ):
        with pytest.raises(ValueError, match=r"state|Expecting|nests"):
            unpack(tensors)
