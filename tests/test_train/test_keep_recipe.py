"""`model_weights` and `share.keep` in recipes: what they start from, what they save, and what is wrong at once."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_ssn.errors import CheckpointError, RecipeError
from dist_ssn.sharing.bank_set import shared_plan
from dist_ssn.train.build import start_model
from dist_ssn.train.checkpoint.folder import size_and_hash
from dist_ssn.train.data import data_hints
from dist_ssn.train.loop import train
from dist_ssn.train.models import build_model
from dist_ssn.train.recipe.read import load_recipe
from dist_ssn.train.recipe.schema import Recipe
from dist_ssn.train.recipe.sections import CheckpointConfig, DataConfig, ShareConfig

ARGS: dict[str, Any] = {"layers": 1, "width": 16, "heads": 2, "context": 8}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog; " * 200)
    return file


def recipe_of(tmp_path: Path, text: Path, seed: int = 0, **changes: Any) -> Recipe:
    """A recipe that goes on from pretrained weights, which are written first."""
    data = DataConfig(path=str(text))
    torch.manual_seed(seed)
    dense = build_model("gpt", ARGS, data_hints(data, context=8))
    weights = tmp_path / f"pretrained{seed}.safetensors"
    first: dict[int, str] = {}
    state = dense.state_dict(keep_vars=True)
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    save_file({name: t.detach() for name, t in state.items() if first[id(t)] == name}, weights)
    return Recipe(
        **{
            "output": str(tmp_path / "runs"),
            "model_args": ARGS,
            "model_weights": str(weights),
            "data": data,
            "share": ShareConfig(budget=0.1, keep=True),
            "steps": 3,
            "batch_size": 4,
            "evaluate_batches": 1,
            "threads": 1,
            **changes,
        }
    )


def test_a_run_goes_on_from_the_file_and_saves_no_kept_weight(tmp_path: Path, text: Path) -> None:
    recipe = recipe_of(tmp_path, text)
    result = train(recipe, progress=False)
    plan = shared_plan(result.model)
    assert plan is not None and plan.keep and '"keep": true' in (result.folder / "plan.json").read_text()
    assert result.row["parameters"] == plan.parameters
    base = load_file(recipe.model_weights or "")
    for name, parameter in result.model.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, base[name]), name
    saved = load_file(result.folder / "checkpoints" / "step-00000003" / "model.safetensors")
    assert saved.keys() and not base.keys() & saved.keys()

    longer = dataclasses.replace(recipe, steps=5, checkpoint=CheckpointConfig(resume=True))
    again = train(longer, progress=False)
    assert again.row["history"][-1]["step"] == 5
    with pytest.raises(
        CheckpointError, match=r"the checkpoint .* was trained on other kept values of .*load the same pretrained"
    ):
        train(
            dataclasses.replace(recipe_of(tmp_path, text, seed=1), steps=7, checkpoint=longer.checkpoint),
            progress=False,
        )


def test_another_value_beside_the_banks_is_named_and_an_old_checkpoint_has_it(tmp_path: Path, text: Path) -> None:
    recipe = recipe_of(tmp_path, text)
    folder = train(recipe, progress=False).folder / "checkpoints" / "step-00000003"
    base = load_file(recipe.model_weights or "")
    name = next(name for name, tensor in base.items() if name.endswith(".bias"))
    weights = tmp_path / "other.safetensors"
    save_file({**base, name: base[name] + 1}, weights)
    longer = dataclasses.replace(
        recipe, steps=4, model_weights=str(weights), checkpoint=CheckpointConfig(resume=True, base=True)
    )
    with pytest.raises(
        CheckpointError, match=rf"was trained on other kept values of {name} \(1 of \d+ frozen parameters"
    ):
        train(longer, progress=False)
    state = json.loads((folder / "state.json").read_text())  # as it was before fingerprints took the values' places
    del state["kept"]
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="tensors of the model are not in it"):
        train(dataclasses.replace(longer, model_weights=recipe.model_weights), progress=False)
    frozen = {key: value for key, value in base.items() if value.ndim == 1}
    save_file({**load_file(folder / "model.safetensors"), **frozen}, folder / "model.safetensors")
    state["files"]["model.safetensors"] = size_and_hash(folder / "model.safetensors")
    (folder / "state.json").write_text(json.dumps(state))
    train(dataclasses.replace(longer, model_weights=recipe.model_weights), progress=False)
    found = load_file(folder.with_name("step-00000004") / "base.safetensors")
    assert found.keys() == base.keys() and all(torch.equal(found[key], value) for key, value in base.items())


def test_full_fine_tuning_is_the_same_recipe_without_a_budget(tmp_path: Path, text: Path) -> None:
    recipe = recipe_of(tmp_path, text, share=ShareConfig())
    model = start_model(recipe, data_hints(recipe.data, context=8))
    wanted = load_file(recipe.model_weights or "")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items() if name in wanted)


def test_a_file_of_another_model_is_named(tmp_path: Path, text: Path) -> None:
    recipe = recipe_of(tmp_path, text)
    hints = data_hints(recipe.data, context=8)
    tensors = load_file(recipe.model_weights or "")
    name = next(iter(tensors))
    broken = tmp_path / "broken.safetensors"
    for change, sentence in (
        ({"more": torch.ones(2)}, "the model has no more$"),
        ({name: torch.ones(2)}, rf"{name} has the shape \(2,\) there and \("),
    ):
        save_file(tensors | change, broken)
        with pytest.raises(RecipeError, match=rf"model_weights: {broken} is of another model: .*{sentence}"):
            start_model(dataclasses.replace(recipe, model_weights=str(broken)), hints)
    save_file({key: value for key, value in tensors.items() if key != name}, broken)
    with pytest.raises(RecipeError, match=rf"is of another model: it has no {name}"):
        start_model(dataclasses.replace(recipe, model_weights=str(broken)), hints)
    broken.write_text("no tensors")
    with pytest.raises(RecipeError, match=r"model_weights: cannot read .*: its header should have"):
        start_model(dataclasses.replace(recipe, model_weights=str(broken)), hints)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--share.keep=true"], "share.keep is true, which needs a budget or a plan: set share.budget too"),
        (
            ["--share.keep=true", "--share.budget=1%"],
            "share.keep is true, and there are no values to keep: set model_weights",
        ),
        (["--share.train=['head']"], "share.train goes with share.keep"),
        (
            ["--model_weights=a", "--share.budget=1%"],
            "model_weights would be lost, because a shared model draws new values",
        ),
        (
            ["--model_weights=a", "--share.budget=1%", "--share.keep=true", "--prune.final=0.5"],
            "prune.final is above 0, and",
        ),
        (
            ["--model_weights=a", "--share.budget=1%", "--share.keep=true", "--share.control=tied"],
            "share.keep is for shared weights, and share.control tied has no banks: leave one of them false",
        ),
    ],
)
def test_what_does_not_go_together_is_one_sentence(arguments: list[str], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(None, arguments)


def test_a_missing_file_is_named_before_anything_starts(tmp_path: Path, text: Path) -> None:
    recipe = dataclasses.replace(recipe_of(tmp_path, text), model_weights=str(tmp_path / "gone"))
    with pytest.raises(RecipeError, match=r"model_weights must be a safetensors file, but .*gone' does not exist"):
        train(recipe, progress=False)
