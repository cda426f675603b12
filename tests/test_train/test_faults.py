"""What goes wrong while a run is under way: it is saved meanwhile, ends together, says who is missing, and goes on by itself."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist_ssn.engines import init_world
from dist_ssn.errors import CheckpointError, DistSSNError, Preempted, RanksLost, UserError
from dist_ssn.train.checkpoint import writer as writers
from dist_ssn.train.checkpoint.folder import checkpoints, latest
from dist_ssn.train.checkpoint.snapshot import Snapshot
from dist_ssn.train.checkpoint.writer import Writer
from dist_ssn.train.loop import train
from dist_ssn.train.ranks import agreement as agreements
from dist_ssn.train.ranks.agreement import Agreement, Wants
from dist_ssn.train.ranks.raise_together import raise_together
from dist_ssn.train.ranks.stop import EXIT_REQUEUE, Stop
from dist_ssn.train.recipe.schema import Recipe
from dist_ssn.train.recipe.sections import CheckpointConfig, EngineConfig
from testing.ranks import RanksFailed, run_ranks
from tests.test_train.test_loop import recipe

ROOT = Path(__file__).parents[2]
EVERY = CheckpointConfig(every=4)


def snapshot(step: int) -> Snapshot:
    tensors = {"bank": torch.full((4,), float(step))}
    return Snapshot(
        step, tensors, {}, {"plan.json": "null", "recipe.json": "{}"}, {"run": {}, "extra": {}, "optimizer": {}}
    )


def ends(folder: Path) -> list[dict[str, torch.Tensor]]:
    found = latest(folder / "checkpoints")
    assert found is not None
    files = [load_file(found / name) for name in ("model.safetensors", "optimizer.safetensors")]
    return [
        {name: tensor.clone() for name, tensor in file.items()} for file in files
    ]  # no longer the file's own memory


def assert_same_end(one: Path, other: Path) -> None:
    for mine, theirs in zip(ends(one), ends(other), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


# ---------------------------------------------------------------- saving in the background


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first write ends only when two more steps were made; what it writes is what was there when it was taken."""
    write, at_write, go_on = writers.write, [], threading.Event()

    def slow(taken: Snapshot, *args: Any) -> Path:
        if taken.step == 4:
            assert go_on.wait(60), "the steps did not go on"
        at_write.append(taken.step)
        return write(taken, *args)

    from dist_ssn.train.checkpoint import saver

    after_step = saver.Saver.after_step

    def counted(self: saver.Saver, step: int) -> Wants:
        if step == 6:
            assert at_write == []
            go_on.set()
        return after_step(self, step)

    monkeypatch.setattr(writers, "write", slow)
    monkeypatch.setattr(saver.Saver, "after_step", counted)
    train(recipe(tmp_path, checkpoint=CheckpointConfig(every=4, keep=3)), progress=False)
    assert at_write == [4, 8, 12]
    monkeypatch.undo()
    train(recipe(tmp_path / "plain", checkpoint=CheckpointConfig(every=4, keep=3)), progress=False)
    for name in ("step-00000004", "step-00000008", "step-00000012"):
        one, other = (
            load_file(folder / "small/checkpoints" / name / "model.safetensors")
            for folder in (tmp_path, tmp_path / "plain")
        )
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_the_newest_checkpoint_is_whole_at_every_moment(tmp_path: Path) -> None:
    writer, seen, over = Writer(tmp_path, keep=2), set(), threading.Event()

    def look() -> None:
        while not over.is_set():
            found = latest(tmp_path)
            try:
                if found is not None:
                    state = json.loads((found / "state.json").read_text())
                    seen.add((state["step"], load_file(found / "model.safetensors")["bank"][0].item()))
            except FileNotFoundError:
                continue  # it was removed between the two looks, for two newer ones were there

    watcher = threading.Thread(target=look)
    watcher.start()
    for step in range(1, 40):
        writer.start(snapshot(step))
    writer.wait()
    over.set()
    watcher.join()
    assert seen and all(step == value for step, value in seen)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000038", "step-00000039"]


def test_a_checkpoint_every_so_many_seconds(tmp_path: Path) -> None:
    timed = CheckpointConfig(every_seconds=1e-6, keep=20)
    train(recipe(tmp_path, steps=3, checkpoint=timed), progress=False)
    assert len(checkpoints(tmp_path / "small" / "checkpoints")) == 3


def test_a_writer_that_fails_in_an_unforeseen_way_is_heard(tmp_path: Path) -> None:
    writer = Writer(tmp_path, keep=2)
    writer.start(replace(snapshot(1), state={"run": object()}))
    with pytest.raises(CheckpointError, match=r"cannot write the checkpoint .*step-00000001: TypeError"):
        writer.wait()
    writer.start(snapshot(2))
    writer.wait()
    assert latest(tmp_path) == tmp_path / "step-00000002"


def _full_disk(rank: int, world_size: int, output: str) -> tuple[str, list[str]]:
    write = writers.write

    def fails(taken: Snapshot, *args: Any) -> Path:
        if taken.step == 8:
            raise CheckpointError("the disk is full")
        return write(taken, *args)

    writers.write = fails
    try:
        with pytest.raises(UserError) as caught:
            train(recipe(output, steps=100_000, evaluate_every=50_000, checkpoint=EVERY), progress=False)
    finally:
        writers.write = write
    return str(caught.value), [path.name for path in checkpoints(Path(output) / "small" / "checkpoints")]


@pytest.mark.distributed
def test_a_failed_write_stops_all_ranks_with_one_sentence(tmp_path: Path) -> None:
    assert run_ranks(_full_disk, 2, str(tmp_path)) == [("the disk is full", ["step-00000004"])] * 2


# ---------------------------------------------------------------- making room


def _wants(rank: int, world_size: int) -> list[tuple[int, Wants]]:
    agreements.ASK_SECONDS = 0.0  # after every other step
    agreement, heard = Agreement(world_size, torch.device("cpu")), []
    for step in range(1, 40):
        wants = agreement.after_step(step, Wants(stop=15 if rank == 1 and step >= 5 else 0))
        if wants:
            heard.append((step, wants))
    agreement.answer(40)
    return heard


@pytest.mark.distributed
def test_what_one_rank_wants_all_hear_after_the_same_step() -> None:
    first, second = run_ranks(_wants, 2)
    assert first == second and first[0][0] > 5 and {wants for _, wants in first} == {Wants(stop=15)}


def _until_it_makes_room(rank: int, world_size: int, going: Recipe) -> str:
    agreements.ASK_SECONDS = 0.0
    with pytest.raises(Preempted) as caught:
        train(going, progress=False)
    return str(caught.value)


def _goes_on(rank: int, world_size: int, going: Recipe, restarted: bool) -> float:
    os.environ["SLURM_RESTART_COUNT"] = "1" if restarted else "0"
    return train(going, progress=False).row["validation_loss"]


@pytest.mark.distributed
def test_a_signal_to_one_rank_saves_all_and_a_restart_goes_on_by_itself(tmp_path: Path) -> None:
    args = {"dropout": 0.3, "accident": "term", "at": 5, "rank": 1}
    going = recipe(tmp_path, model_args=args, evaluate_every=100)
    first, second = run_ranks(_until_it_makes_room, 2, going)
    assert first == second
    assert "was preempted by signal 15: it is saved after step" in first
    (saved,) = checkpoints(tmp_path / "small" / "checkpoints")
    assert str(saved) in first and 5 <= json.loads((saved / "state.json").read_text())["step"] < 12
    assert saved.name != "step-00000012"
    losses = run_ranks(_goes_on, 2, replace(going, model_args={"context": 8, "dropout": 0.3}), True)
    whole = recipe(tmp_path, name="whole", model_args={"dropout": 0.3}, evaluate_every=100)
    assert losses == run_ranks(_goes_on, 2, whole, False)
    assert_same_end(tmp_path / "small", tmp_path / "whole")


SMALL = """
name: run
model_args: {layers: 1, width: 16, heads: 2, context: 16}
data: {limit: 50000}
share: {budget: 20%}
steps: 1000000
batch_size: 4
evaluate_every: 1000000
evaluate_batches: 1
checkpoint: {every_seconds: 0.5}
"""


@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_command_line_ends_with_the_code_for_another_try(tmp_path: Path, number: int) -> None:
    (tmp_path / "recipe.yaml").write_text(SMALL)
    command = [
        sys.executable,
        "-m",
        "dist_ssn.cli",
        "train",
        "--config",
        str(tmp_path / "recipe.yaml"),
        f"--output={tmp_path}",
    ]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
        try:
            assert until(lambda: latest(tmp_path / "run" / "checkpoints"), 100), (tmp_path / "said").read_text()
            process.send_signal(number)
            assert process.wait(60) == EXIT_REQUEUE == 75, (tmp_path / "said").read_text()
        finally:
            process.kill()
            process.wait()
    assert f"was preempted by signal {number}: it is saved after step" in (tmp_path / "said").read_text()


SLOW = """
import time
from pathlib import Path

def build(vocabulary, context, how="sleep"):
    Path("started").touch()
    if how == "swallow":
        try:
            time.sleep(100)
        except Exception as error:
            raise ValueError("the model could not be built") from error
    time.sleep(100)
"""


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("how", ["sleep", "swallow"])
def test_a_signal_ends_a_slow_start_at_once(tmp_path: Path, number: int, how: str) -> None:
    """Data on a slow drive, or a model that takes minutes: nothing is there to be saved."""
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "recipe.yaml").write_text(f"name: slow\nmodel: slow.build\nmodel_args: {{how: {how}}}\n")
    command = [sys.executable, "-m", "dist_ssn.cli", "train", "--config", "recipe.yaml"]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=said, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": path}
        )
        try:
            assert until((tmp_path / "started").exists, 100), (tmp_path / "said").read_text()
            process.send_signal(number)
            assert process.wait(20) == EXIT_REQUEUE, (tmp_path / "said").read_text()
        finally:
            process.kill()
            process.wait()
    said_in_all = (tmp_path / "said").read_text()
    assert f"was preempted by signal {number} before its first step: nothing is lost, start it again" in said_in_all
    assert "Traceback" not in said_in_all and not (tmp_path / "runs").exists()


def _stopped_while_it_starts(rank: int, world_size: int) -> str:
    with init_world(30) as world, Stop(30, str) as stop:

        def build() -> None:
            with stop.at_once():
                if rank == 1:
                    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
                    threading.Event().wait(60)

        with pytest.raises(Preempted) as caught:
            raise_together(build, world.device)
        return str(caught.value)


@pytest.mark.distributed
def test_a_signal_to_one_rank_that_starts_ends_all() -> None:
    first, second = run_ranks(_stopped_while_it_starts, 2)
    assert first == second and "signal 15 before its first step" in first


@pytest.mark.processes
def test_a_start_that_returns_to_no_handler_ends_too() -> None:
    """A read in the kernel holds the main thread: it is ended some seconds after the signal."""
    script = """
import ctypes, os, signal, threading
from dist_ssn.train.ranks import stop as stops
stops.GRACE_SECONDS = 0.5
stops.LOOK_SECONDS = 0.1
sleep = ctypes.CDLL(None).sleep
with stops.Stop(60, str) as stop, stop.at_once():
    threading.Timer(0.2, stop._theirs.send, (bytes([signal.SIGTERM]),)).start()
    sleep(30)
"""
    process = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == EXIT_REQUEUE, process.stderr
    assert "was preempted by signal 15 before its first step" in process.stderr


def until(condition: Callable[[], object], seconds: float) -> bool:
    return any(condition() or threading.Event().wait(0.1) for _ in range(int(seconds * 10)))


# ---------------------------------------------------------------- restarts


@pytest.mark.distributed
def test_torchrun_restarts_a_group_that_goes_on_by_itself(tmp_path: Path) -> None:
    dies = {"dropout": 0.3, "accident": "kill", "at": 11, "rank": 1, "context": 8}
    going = recipe(tmp_path, model_args=dies, checkpoint=EVERY)
    (tmp_path / "recipe.json").write_text(going.to_json())  # JSON is YAML
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--local-addr=127.0.0.1"]
    elastic = ["--nnodes=1:1", "--nproc-per-node=2", "--max-restarts=1", "-m", "dist_ssn.cli"]
    command = [*torchrun, *elastic, "train", "--config", str(tmp_path / "recipe.json")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    # Of step 4 if the kill came before the checkpoint of step 8, written in the background, was whole.
    assert re.search(rf"goes on from {re.escape(str(tmp_path))}/small/checkpoints/step-0000000[48]\n", done.stdout)
    run_ranks(_goes_on, 2, recipe(tmp_path, name="whole", model_args={"dropout": 0.3}), False)
    assert_same_end(tmp_path / "small", tmp_path / "whole")


def test_a_restart_passes_over_a_damaged_checkpoint_and_a_person_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(tmp_path, checkpoint=EVERY), progress=False)
    whole = ends(tmp_path / "small")
    damaged = tmp_path / "small" / "checkpoints" / "step-00000012" / "model.safetensors"
    os.truncate(damaged, damaged.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"remove that folder to go on from .*step-00000008"):
        train(recipe(tmp_path, checkpoint=CheckpointConfig(resume=True)), progress=False)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(recipe(tmp_path, checkpoint=EVERY))
    said = capsys.readouterr().out
    assert "model.safetensors has" in said and "it is skipped" in said
    assert all(torch.equal(tensor, ends(tmp_path / "small")[0][name]) for name, tensor in whole[0].items())


# ---------------------------------------------------------------- who is missing


def _tells(rank: int, world_size: int, port: int, going: Recipe, folder: str) -> str:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        train(going, progress=False)
        said = "nothing"
    except DistSSNError as error:
        said = f"{type(error).__name__}: {error}"
    except IndexError:
        said = "IndexError"
    (Path(folder) / f"said-{rank}").write_text(said)
    return said


MISSING = {
    "kill": "rank 1 on .* gives no sign of life: it was killed, is stopped, or cannot be reached",
    "stop": "rank 1 on .* gives no sign of life: it was killed, is stopped, or cannot be reached",
    "raise": "rank 1 on .* ended by IndexError: list index out of range",
    "sleep": r"rank 1 on .* lives and has not reached it \(it has made 6 steps\)",
}


@pytest.mark.distributed
@pytest.mark.parametrize("accident", MISSING)
def test_who_is_missing_in_which_collective_is_named(tmp_path: Path, accident: str) -> None:
    args = {"accident": accident, "at": 7, "rank": 1}
    engine = EngineConfig(timeout_seconds=3.0)
    going = recipe(tmp_path, model_args=args, checkpoint=EVERY, engine=engine)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if accident == "kill":
        with pytest.raises(RanksFailed, match="died without a word"):
            run_ranks(_tells_at_leisure, 2, port, going, str(tmp_path), group=False)
    else:
        run_ranks(_tells, 2, port, going, str(tmp_path), group=False)
    said = (tmp_path / "said-0").read_text()
    assert said.startswith(f"{RanksLost.__name__}: rank 0 gave up the all_reduce of gradients after step 6"), said
    assert re.search(MISSING[accident], said), said
    assert said.endswith(f"the last checkpoint is {tmp_path / 'small' / 'checkpoints' / 'step-00000004'}")


def _tells_at_leisure(*args: Any) -> str:
    return _tells(*args)


HANGS = """
import sys, threading
from dist_ssn.comm import in_flight
from dist_ssn.train.ranks import stop
stop.SPARE_SECONDS = 0.0
with stop.Stop(0.5, lambda why: f"rank 3 is missing ({why})"):
    in_flight.started("all_reduce", "gradients")
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
"""


@pytest.mark.processes
def test_a_process_that_waits_for_ever_ends() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", HANGS], env=environment, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (1, "dist-ssn: rank 3 is missing (its time is up)\n")


# ---------------------------------------------------------------- numbers that are none, on every engine


def _nan(rank: int, world_size: int, output: str, engine: EngineConfig) -> str:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    args = {"accident": "nan", "at": 8, "rank": 1}
    with pytest.raises(UserError) as caught:
        train(recipe(output, model_args=args, checkpoint=CheckpointConfig(every=5), engine=engine), progress=False)
    return str(caught.value)


@pytest.mark.distributed
@pytest.mark.parametrize("engine", [EngineConfig("fsdp"), EngineConfig("deepspeed", stage=1)], ids=lambda e: e.name)
def test_a_loss_that_is_no_number_stops_every_engine_alike(tmp_path: Path, engine: EngineConfig) -> None:
    if engine.name == "deepspeed":
        pytest.importorskip("deepspeed")
    first, second = run_ranks(_nan, 2, str(tmp_path), engine)
    assert first == second and "training loss became nan in step 8;" in first
    assert first.endswith(f"the last checkpoint is {tmp_path / 'small' / 'checkpoints' / 'step-00000005'}")
