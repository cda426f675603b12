"""Files of version 0.1.0, from before the package's parts moved, still load and give the same numbers.

`fixtures/written_by_0_1_0/write.py` wrote them.
"""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from dist_ssn import Morph, Plan, make_plan, materialize, plan_of, share
from dist_ssn.report import report
from dist_ssn.train.loop import train
from dist_ssn.train.recipe.read import recipe_from_json
from testing.ranks import run_ranks

WRITTEN = Path(__file__).parent / "fixtures" / "written_by_0_1_0"
WEIGHTS = ("stem.0", "stem.2", "body.0", "body.2", "table", "out")
PLANS: dict[str, dict[str, Any]] = {
    "defaults": {"budget": 0.25},
    "one-bank-hash": {"budget": 0.1, "mapping": "single", "morph": "hash"},
    "shape-wavg": {"budget": 1.0, "mapping": "shape", "morph": "wavg/inter"},
    "random-mask": {"budget": 0.3, "mapping": "random:2", "morph": "avg/mask", "seed": 3},
    "globs-offset": {
        "budget": 0.3,
        "mapping": {"*.0.*": "first", "*": "rest"},
        "morph": Morph("offset", templates=2, gains=True, rank=1, chunk=8),
    },
    "demand": {
        **{"budget": 0.2, "mapping": "single", "morph": "emb/wavg"},
        "demand": {f"{name}.weight": 3.0 if name == "out" else 1.0 for name in WEIGHTS},
    },
}
"""Name of a plan → what `make_plan` got."""
RUNS = ("shared", "baseline")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "stem": nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
            "body": nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32)),
            "table": nn.Embedding(40, 16, padding_idx=0),
            "out": nn.Linear(32, 40),
        }
    )


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_is_made_again_and_gives_the_same_weights(name: str) -> None:
    text = (WRITTEN / "plans" / f"{name}.json").read_text()
    plan, given = Plan.from_json(text), dict(PLANS[name])
    assert plan == make_plan(net(), given.pop("budget"), **given)
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.scales == plan.scales is not None
    expected = json.loads((WRITTEN / "plans" / f"{name}.expected.json").read_text())
    assert plan.parameters == expected["parameters"]
    model = net()
    torch.manual_seed(1)
    dense = materialize(share(model, plan=plan)).state_dict()
    assert set(dense) == set(expected["sums"])
    for key, weight in dense.items():
        torch.testing.assert_close(weight.flatten()[:4], torch.tensor(expected["first"][key]), rtol=1e-7, atol=1e-7)
        sums = [float(weight.double().sum()), float(weight.double().square().sum())]
        assert sums == pytest.approx(expected["sums"][key], rel=1e-7, abs=1e-7), key


def _stopped(name: str, folder: Path) -> None:
    """Puts the run, as it was when it had written its first checkpoint, into `folder`."""
    shutil.copytree(WRITTEN / "runs" / name, folder / "runs" / name)
    shutil.copy(WRITTEN / "text.txt", folder)
    shutil.rmtree(folder / "runs" / name / "checkpoints" / "step-00000008")


def _go_on(rank: int, world_size: int, name: str, folder: str) -> dict[str, Any]:
    recipe = recipe_from_json((WRITTEN / "runs" / name / "recipe.json").read_text())
    recipe = replace(
        recipe,
        output=f"{folder}/runs",
        data=replace(recipe.data, path=f"{folder}/text.txt"),
        checkpoint=replace(recipe.checkpoint, resume=True),
    )
    result = train(recipe, progress=False)
    return {"row": result.row, "tensors": {key: tensor.clone() for key, tensor in result.model.state_dict().items()}}


def _holds(name: str, found: dict[str, Any]) -> None:
    (row,) = json.loads((WRITTEN / "runs" / name / "summary.json").read_text())["rows"]
    assert [point["step"] for point in found["row"]["history"]] == [point["step"] for point in row["history"]]
    for point, wanted in zip(found["row"]["history"], row["history"], strict=True):
        assert point["validation_loss"] == pytest.approx(wanted["validation_loss"], rel=1e-6)
    for key in ("parameters", "optimizer_bytes"):
        assert found["row"][key] == row[key]
    saved = load_file(WRITTEN / "runs" / name / "checkpoints" / "step-00000008" / "model.safetensors")
    assert set(saved) <= set(found["tensors"])
    for key, tensor in saved.items():
        if not key.endswith("_extra_state"):
            assert found["tensors"][key].shape == (*tensor.shape, *[1] * key.endswith(".bank"))  # flat banks then
            torch.testing.assert_close(found["tensors"][key].view_as(tensor), tensor, rtol=1e-5, atol=1e-6)
    if name == "shared":  # version 0.1.0 kept the plan's bytes as integers, and the scales in the plan
        plan = plan_of(saved)
        assert plan == plan_of(found["tensors"]) and plan.scales is not None
        for bank, scales in plan.scales.items():
            assert found["tensors"][f"dist_ssn.{bank}.scales"].tolist() == torch.tensor(scales).tolist()


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_goes_on_to_the_same_end(name: str, tmp_path: Path) -> None:
    """Two processes wrote it; one goes on with it."""
    _stopped(name, tmp_path)
    _holds(name, _go_on(0, 1, name, str(tmp_path)))


@pytest.mark.distributed
def test_a_checkpoint_goes_on_in_two_processes(tmp_path: Path) -> None:
    _stopped("shared", tmp_path)
    for found in run_ranks(_go_on, 2, "shared", str(tmp_path)):
        _holds("shared", found)


def test_a_results_folder_gives_the_same_rows() -> None:
    shown = io.StringIO()
    assert report([WRITTEN / "runs" / name for name in RUNS], None, Console(file=shown, width=200)) == []
    printed = [line.split() for line in shown.getvalue().splitlines() if line.startswith(RUNS)]
    before = (WRITTEN / "report.txt").read_text().splitlines()
    assert printed == [line.split() for line in before if line.startswith(RUNS)]
    assert len(printed) == len(RUNS)
