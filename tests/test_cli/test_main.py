from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dist_ssn.cli import entry as cli
from dist_ssn.cli.entry import main
from dist_ssn.errors import BudgetError
from dist_ssn.plan import Plan
from dist_ssn.train.recipe.read import load_recipe
from dist_ssn.train.recipe.schema import Recipe


def run(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line in this process."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, bool]]:
    """What `train` was called with, instead of training."""
    calls: list[tuple[Recipe, bool]] = []
    monkeypatch.setattr("dist_ssn.train.loop.train", lambda recipe, *, progress, **_: calls.append((recipe, progress)))
    return calls


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("dist_ssn.train.loop.train", fail)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run("--help", capsys=capsys)
    assert code == 0 and not err and all(f"\n  {name}" in out for name in ("train", "plan", "report"))
    code, out, _ = run("--version", capsys=capsys)
    assert code == 0 and out.startswith("dist-ssn ")
    for command, option in (("train", "--no-progress"), ("plan", "--json"), ("report", "--output")):
        code, out, err = run(command, "--help", capsys=capsys)
        assert code == 0 and not err and option in out and f"usage: dist-ssn {command}" in out
    assert "--optimizer.weight_decay" in run("train", "--help", capsys=capsys)[1]


def test_train_hands_over_the_recipe(trained: list, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "--config", "digits", "--steps=3", "--optimizer.lr", "0.5", capsys=capsys) == (0, "", "")
    assert run("train", "--no-progress", "--seed=4", capsys=capsys) == (0, "", "")
    assert trained == [(load_recipe("digits", ["steps=3", "optimizer.lr=0.5"]), True), (Recipe(seed=4), False)]


def test_print_config_is_a_recipe(tmp_path: Path, trained: list, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run("train", "--config=digits", "--steps=3", "--print_config", capsys=capsys)
    (tmp_path / "all.yaml").write_text(out)
    assert code == 0 and not trained
    assert load_recipe(tmp_path / "all.yaml") == load_recipe("digits", ["steps=3"])


def test_plan_prints_a_table_and_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    small = ("--model_args={layers: 1, width: 32, heads: 2, context: 16}", "--share.budget=20%")
    code, table, err = run("plan", *small, capsys=capsys)
    assert (code, err) == (0, "") and "blocks.0.mlp.up.weight" in table and "head.weight" not in table
    code, text, _ = run("plan", *small, "--json", capsys=capsys)
    plan = Plan.from_json(text)
    weights = {slot.name: slot.shape for _, slot in plan.slots()}
    assert code == 0 and weights["blocks.0.mlp.up.weight"] == (128, 32)
    assert weights["tokens.weight"] == (256, 32)
    assert 0.99 * plan.numel / 5 <= plan.parameters <= plan.numel / 5


def test_plan_needs_no_data_and_reads_a_plan_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ("--config=cifar10", "--model_args={depth: 10, width: 1}", "--data.path=nowhere")
    code, text, _ = run("plan", *recipe, "--json", capsys=capsys)
    assert code == 0 and json.loads(text)
    (tmp_path / "plan.json").write_text(text)
    again = run("plan", f"--share.plan={tmp_path / 'plan.json'}", "--json", capsys=capsys)
    assert again == (0, text, "")


def test_plan_says_which_weight_a_plan_file_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = "--model_args={layers: 1, width: 32, heads: 2, context: 16}"
    plan = json.loads(run("plan", small, "--share.budget=20%", "--json", capsys=capsys)[1])
    lost = plan["groups"][0]["slots"].pop()["name"]
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    code, out, err = run("plan", small, f"--share.plan={tmp_path / 'plan.json'}", capsys=capsys)
    assert (code, err) == (0, "") and f"{lost} (not included)" in " ".join(out.split())


def test_report_is_called_with_the_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []
    monkeypatch.setattr("dist_ssn.report.report", lambda *given: calls.append(given))
    assert run("report", "a", "b", "--output", "c", capsys=capsys)[0] == 0
    assert run("report", "a", capsys=capsys)[0] == 0
    assert calls == [(["a", "b"], "c"), (["a"], None)]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], "the following arguments are required: COMMAND"),
        (
            ["trian"],
            "unknown command 'trian': known are cluster, completion, doctor, lab, launch, plan, report, search, train; "
            "did you mean 'train'?",
        ),
        (["--nonsense", "train"], "unknown command"),
        (["train", "--stepz=3"], "command line: unknown key stepz; did you mean steps?"),
        (["train", "--no-progres"], "command line: unknown key no-progres; did you mean no-progress?"),
        (["train", "--json"], "command line: unknown key json"),
        (["train", "recipe.yaml"], "command line: unexpected 'recipe.yaml': options are written --key=value"),
        (["train", "--config"], "command line: --config needs a value"),
        (["train", "--config", "nowhere.yaml"], "the recipe 'nowhere.yaml' does not exist in "),
        (["train", "--steps=0"], "command line: steps must be at least 1, got 0"),
        (["plan"], "share.budget is null, which leaves the model dense: give one, such as --share.budget=10%"),
        (["plan", "--share.budget=10 apples"], "budget '10 apples'"),
        (["plan", "--share.budget=-1"], "budget -1"),
        (["plan", "--share.budget=0.1", "--model=nowhere.build"], "model 'nowhere.build': nowhere cannot be imported"),
        (["plan", "--share.budget=0.1", "--model_args.layer=3"], "model_args of gpt: unknown argument 'layer'"),
        (["plan", "--share.budget=0.1", "--share.mapping=sape"], "unknown mapping 'sape'"),
        (["report"], "the following arguments are required: RUN"),
        (["report", "--plot", "a"], "unrecognized arguments: --plot"),
        (["report", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], wanted: str, trained: list, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(*arguments, capsys=capsys)
    assert code == 2 and not out and not trained
    assert err.startswith("dist-ssn: ") and wanted in err and err.count("\n") == 1, err


def test_only_one_process_of_a_machine_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, BudgetError("too small"))
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert run("train", capsys=capsys) == (2, "", "dist-ssn: too small\n") and waited == []
    monkeypatch.setenv("LOCAL_RANK", "1")  # whom the launcher ends while it waits; if not, it speaks
    assert run("train", capsys=capsys) == (2, "", "dist-ssn: too small\n") and waited == [cli.PATIENCE_SECONDS]


def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/model.safetensors"))
    assert run("train", capsys=capsys) == (1, "", "dist-ssn: runs/x/model.safetensors: No space left on device\n")


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, KeyboardInterrupt())
    assert run("train", capsys=capsys) == (130, "", "dist-ssn: stopped by Ctrl-C\n")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("a bug"), OSError("without a number")])
def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    failing(monkeypatch, error)
    with pytest.raises(type(error)) as caught:
        main(["train"])
    assert caught.value is error


def command(*arguments: str, shell: str = '"$@"') -> subprocess.CompletedProcess[str]:
    """Runs the command line in a process of its own, as a user does."""
    words = [sys.executable, "-m", "dist_ssn.cli", *arguments]
    return subprocess.run(
        ["bash", "-c", shell, "bash", *words], capture_output=True, text=True, timeout=100, check=False
    )


@pytest.mark.processes
def test_as_a_process() -> None:
    result = command("train", "--stepz=3")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "dist-ssn: command line: unknown key stepz; did you mean steps?\n"


@pytest.mark.processes
def test_a_reader_that_stops_early_is_no_error() -> None:
    result = command("plan", "--config=digits", "--json", shell='set -o pipefail; "$@" | true; echo "${PIPESTATUS[0]}"')
    assert (result.stdout, result.stderr) == ("1\n", "")
