from __future__ import annotations

import dataclasses
import functools
import json
import pickle
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dist_ssn.baselines import CONTROLS
from dist_ssn.engines import ENGINES
from dist_ssn.errors import RecipeError
from dist_ssn.train.data import DATA, data_hints
from dist_ssn.train.models import build_model
from dist_ssn.train.optim import OPTIMIZERS, SCHEDULES
from dist_ssn.train.recipe.check import validate
from dist_ssn.train.recipe.keys import bundled_recipes, recipe_keys, recipe_schema
from dist_ssn.train.recipe.read import load_recipe, parse_recipe, recipe_from_json, recipe_to_yaml
from dist_ssn.train.recipe.schema import Recipe, changed_settings
from dist_ssn.train.recipe.sections import ENGINE_OPTIONS, DataConfig, OptimizerConfig, ScheduleConfig, ShareConfig
from testing.write_schemas import text_of


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "my.yaml"


def message_of(*arguments: str, file: Path | None = None, text: str = "") -> str:
    if file is not None:
        file.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, arguments)
    message = str(caught.value)
    assert "\n" not in message and "<class" not in message
    return message


def test_defaults_are_the_dataclasses_own() -> None:
    assert load_recipe(None) == Recipe()


def test_file_and_command_line_become_typed_values(file: Path) -> None:
    file.write_text(
        "name: mine\nmodel_args: {width: 64}\noptimizer: {lr: 3e-4, betas: [0.8, 0.9]}\n"
        "share: {budget: 10%, include: ['*.q']}"
    )
    recipe = load_recipe(
        file,
        ["--steps=7", "clip_norm=null", "--model_args.layers=2", "--share.mapping={'a*': x}", "data.augment=false"],
    )
    assert recipe == Recipe(
        name="mine",
        steps=7,
        clip_norm=None,
        model_args={"width": 64, "layers": 2},
        optimizer=OptimizerConfig(lr=3e-4, betas=(0.8, 0.9)),
        share=ShareConfig(budget="10%", include=("*.q",), mapping={"a*": "x"}),
        data=DataConfig(augment=False),
    )
    assert isinstance(recipe.optimizer.betas, tuple)


@pytest.mark.parametrize(
    ("text", "budget"),
    [("0.1", 0.1), ("5000000", 5_000_000), ("5_000_000", 5_000_000), ("1", 1), ("1.0", 1.0), ("5MB/step", "5MB/step")],
)
def test_a_budget_keeps_its_meaning(text: str, budget: float | str, file: Path) -> None:
    """An int is a count and a float a fraction: neither the file nor the command line may turn one into the other."""
    file.write_text(f"share: {{budget: {text}}}")
    for recipe in (load_recipe(file), load_recipe(None, [f"--share.budget={text}"])):
        assert recipe.share.budget == budget and type(recipe.share.budget) is type(budget)


def test_a_budget_that_cannot_be_read_is_told_with_the_rest() -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, ["--share.budget=banana", "--steps=-1"])
    assert "share.budget 'banana' cannot be read" in str(caught.value) and "cannot be read: give a fraction" in str(
        caught.value
    )
    assert "steps" in str(caught.value)


def test_a_value_may_follow_its_key(file: Path) -> None:
    file.write_text("steps: 5")
    words = ["--seed", "4", "--optimizer.lr", "0.5", "--config", str(file)]
    recipe = parse_recipe(words)
    assert (recipe.seed, recipe.optimizer.lr, recipe.steps) == (4, 0.5, 5)


def test_values_as_a_script_writes_them() -> None:
    settings = {"name": "a b", "share.budget": "10%", "share.include": ["x", "y*"], "clip_norm": None, "steps": 3}
    settings |= {"model_args": {"layers": 2, "text": "3"}, "data.augment": False, "optimizer.lr": 1e-05}
    recipe = load_recipe(None, [f"--{key}={json.dumps(value)}" for key, value in settings.items()])
    assert (recipe.name, recipe.share.budget, recipe.share.include) == ("a b", "10%", ("x", "y*"))
    assert (recipe.clip_norm, recipe.steps, recipe.data.augment, recipe.optimizer.lr) == (None, 3, False, 1e-05)
    assert recipe.model_args == {"layers": 2, "text": "3"}


def test_model_args_keep_their_types(file: Path) -> None:
    """A text in a dict is not read as YAML once more, and that of a single key is."""
    file.write_text('model_args: {a: "3", b: 3, c: "x: y", d: "null", e: 1e-3, f: ["4", 4], g: true, h: 2024-01-01}')
    args = {"a": "3", "b": 3, "c": "x: y", "d": "null", "e": 0.001, "f": ["4", 4], "g": True, "h": "2024-01-01"}
    recipe = load_recipe(file)
    assert recipe.model_args == args and recipe_from_json(recipe.to_json()) == recipe
    more = {"--model_args.b=1e-4": 1e-4, "--model_args.b='5'": "5", "--model_args.b={x: 1}": {"x": 1}}
    more |= {
        "--model_args.b=batch": "batch",
        "--model_args.b=null": None,
        "--model_args.b=7": 7,
        "--model_args.b=[": "[",
    }
    for option, value in more.items():
        assert load_recipe(file, [option]).model_args == args | {"b": value}
    assert load_recipe(file, ["--model_args={z: 1}", "--model_args.y=2"]).model_args == {"z": 1, "y": 2}
    assert load_recipe(None, ["--model_args.b=2", f"--config={file}"]).model_args == args | {"b": 2}


def test_the_command_line_wins_wherever_it_stands(file: Path) -> None:
    file.write_text("steps: 5")
    assert load_recipe(None, ["--steps=9", f"--config={file}"]).steps == 9


@pytest.mark.parametrize("name", bundled_recipes())
def test_built_in_recipes(name: str) -> None:
    recipe = load_recipe(name)
    validate(recipe, world_size=2)
    assert recipe_from_json(recipe.to_json()) == recipe
    assert recipe.share.budget is not None
    small = {"width": 1} if recipe.model == "wide_resnet" else {}
    build_model(recipe.model, recipe.model_args | small, data_hints(recipe.data))


def test_json_round_trip_of_every_field() -> None:
    changed = Recipe(
        name="other name",
        seed=3,
        model_args={"layers": 2, "deep": {"list": [1, None, "x", 0.5]}},
        share=ShareConfig(budget=0.25, mapping={"a*": "one"}, include=("x", "y"), exclude=()),
        optimizer=OptimizerConfig(betas=(0.5, 0.75)),
        schedule=dataclasses.replace(Recipe().schedule, name="step", milestones=(10, 20)),
        wandb=dataclasses.replace(Recipe().wandb, tags=("a", "b"), entity="me"),
        clip_norm=None,
        patience=4,
    )
    assert recipe_from_json(changed.to_json()) == changed


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[1, 2", "recipe.json: line 1 cannot be read as JSON"),
        ("[1, 2]", "recipe.json: a recipe is a dict"),
        ('{"stepz": 3}', "recipe.json: unknown key stepz; did you mean steps?"),
        ('{"steps": "many"}', "recipe.json: steps must be a whole number, got 'many'"),
        ('{"optimizer": null}', r"recipe.json: optimizer must be a dict .*, got null"),
    ],
)
def test_wrong_json(text: str, wanted: str) -> None:
    with pytest.raises(RecipeError, match=wanted):
        recipe_from_json(text)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("stepz: 3", "FILE: unknown key stepz; did you mean steps?"),
        ("lr: 3", "FILE: unknown key lr; did you mean optimizer.lr?"),
        ("optimizer: {lrr: 3}", "FILE: unknown key optimizer.lrr; did you mean optimizer.lr?"),
        ("qqqq: 3", "FILE: unknown key qqqq; --help lists all keys"),
        ("7: 3", "FILE: unknown key 7; --help lists all keys"),
        ("config: other.yaml", "FILE: unknown key config; did you mean engine.config?"),
        ("steps: abc", "FILE: steps must be a whole number, got 'abc'"),
        ("steps: 2.5", "FILE: steps must be a whole number, got 2.5"),
        ("steps: true", "FILE: steps must be a whole number, got True"),
        ("steps:", "FILE: steps must be a whole number, got null"),
        ("clip_norm: high", "FILE: clip_norm must be a number or null, got 'high'"),
        ("name: 3", "FILE: name must be text (in quotes, if it looks like something else), got 3"),
        ("data: {augment: 2}", "FILE: data.augment must be true or false, got 2"),
        (
            "optimizer: {betas: [0.9]}",
            "FILE: optimizer.betas must be a list of two numbers, such as [0.9, 0.95], got [0.9]",
        ),
        ("share: {include: abc}", "FILE: share.include must be a list of texts, such as [a, b], or null, got 'abc'"),
        ("share: {budget: [1]}", 'FILE: share.budget must be a budget such as 0.1, "10%" or "5MB", or null, got [1]'),
        ("model_args: [1]", "FILE: model_args must be a dict of argument names to values, got [1]"),
        ("data: text", "FILE: data must be a dict of keys and values (data.name, "),
        ("schedule:", "FILE: schedule must be a dict of keys and values (schedule.name, "),
        ("", "FILE: a recipe is a dict of keys and values, such as 'steps: 1000'"),
        ("- steps", "FILE: a recipe is a dict of keys and values, such as 'steps: 1000'"),
        ("steps: 1\nsteps: 2", "FILE, line 2: the key 'steps' is there twice"),
        ("steps: 1\nname: [a", "FILE, line 2: this is not valid YAML ("),
        ("a: b: c", "FILE, line 1: this is not valid YAML ("),
        ("optimizer: {lr: .nan}", "FILE: optimizer.lr must be a number above 0, got nan"),
        ("optimizer: {lr: .inf}", "FILE: optimizer.lr must be a number above 0, got inf"),
        ("optimizer: {lr: 0}", "FILE: optimizer.lr must be a number above 0, got 0"),
        ("model_args: {depth: .nan}", "FILE: model_args must hold only text, numbers"),
    ],
)
def test_wrong_files(file: Path, text: str, wanted: str) -> None:
    assert message_of(file=file, text=text).startswith(wanted.replace("FILE", str(file)))


@pytest.mark.parametrize(
    ("argument", "wanted"),
    [
        ("--stepz=3", "unknown key stepz; did you mean steps?"),
        ("--model_args.a.b=3", "model_args.a.b is too deep: write --model_args.a={...}"),
        ("--data=x.yaml", "data is a section: data.name, data.path, "),
        ("--steps", "--steps needs a value, as in --steps=value"),
        ("--steps=few", "steps must be a whole number, got 'few'"),
        ("--steps=1e3", "steps must be a whole number, got '1e3'"),
        ("--steps=0", "steps must be at least 1, got 0"),
        ("--steps=-5", "steps must be at least 1, got -5"),
        ("--seed=-1", "seed must be 0 or more, got -1"),
        ("--data.limit=0", "data.limit must be at least 1, got 0"),
        ("--data.validation=1", "data.validation must be above 0 and below 1, got 1"),
        (
            "--data.name=digit",
            "data.name is an unknown name 'digit': known are cifar10, cifar100, digits, fashion_captions, fashion_mnist, text; ",
        ),
        ("--model=gtp", "model is an unknown name 'gtp': known are gpt, wide_resnet; did you mean 'gpt'?"),
        (
            "--optimizer.name=adam",
            "optimizer.name is an unknown name 'adam': known are adamw, sgd; did you mean 'adamw'?",
        ),
        ("--schedule.name=cosin", "schedule.name is an unknown name 'cosin'"),
        ("--precision=fp16", "precision is an unknown name 'fp16': known are bf16, fp32"),
        ("--engine.name=dpd", "engine.name is an unknown name 'dpd'"),
        ("--wandb.mode=on", "wandb.mode is an unknown name 'on'"),
        ("--optimizer.betas=[0.9, 1.0]", "optimizer.betas must be two numbers, at least 0 and below 1, got [0.9, 1.0]"),
        ("--optimizer.weight_decay=-1", "optimizer.weight_decay must be 0 or more, got -1"),
        ("--optimizer.momentum=1", "optimizer.momentum must be at least 0 and below 1, got 1"),
        ("--clip_norm=0", "clip_norm must be a number above 0, or null for no clipping, got 0"),
        ("--schedule.final=2", "schedule.final must be between 0 and 1, got 2"),
        ("--schedule.warmup=1001", "schedule.warmup must be at most the 1000 steps, got 1001"),
        ("--schedule.milestones=[5,3]", "schedule.milestones must be rising step numbers, got [5, 3]"),
        ("--schedule.name=step", "schedule.milestones must name at least one step, for schedule.name is step"),
        (
            "--accumulation=3",
            "batch_size must be divisible by processes × accumulation = 1 × 3 = 3, got 32; the next one is 33",
        ),
        ("--name=a/b", "name must be a plain name, for it names the run's folder, got 'a/b'"),
        ("--name=..", "name must be a plain name"),
        ("--output=", "output must not be empty"),
        ("--data.limit=", "data.limit must be a whole number or null, got ''"),
        ("--share.plan=", "share.plan must be a plan's JSON file, but '' does not exist"),
        ("--share.control=", "share.control is an unknown name ''"),
        ("--share.budget=.nan", "share.budget must be a budget such as"),
        ("--share.plan=nowhere.json", "share.plan must be a plan's JSON file, but 'nowhere.json' does not exist"),
        ("--share.mapping=shpae", "share.mapping is wrong: unknown mapping 'shpae'"),
        ('--share.mapping={"*": "a b"}', "share.mapping is wrong: group name 'a b' in the mapping"),
        ("--share.morph=offset:chunk=0", "share.morph is wrong: morph 'offset': chunk=0 must be"),
    ],
)
def test_wrong_options(argument: str, wanted: str) -> None:
    assert re.sub("^(command line: )?", "", message_of(argument)).startswith(wanted)


def test_a_missing_file_names_the_folder_and_the_built_in_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        RecipeError, match=rf"'no.yaml' does not exist in {tmp_path}; the built-in ones are .*quickstart"
    ):
        load_recipe("no.yaml")
    with pytest.raises(RecipeError, match="is not a file"):
        load_recipe(tmp_path)


def test_a_file_that_is_not_text(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00bad")
    with pytest.raises(RecipeError, match="is not a text file in UTF-8"):
        load_recipe(file)


def test_all_problems_are_reported_at_once_each_with_its_place(file: Path) -> None:
    message = message_of("--step=1", "extra", file=file, text="seed: -1\nbatch_sice: 3\nsteps: x\ndata: 1")
    for part in (
        f"{file}: unknown key batch_sice; did you mean batch_size?",
        f"{file}: steps must be a whole number",
        f"{file}: data must be a dict",
        "command line: unknown key step; did you mean steps?",
        "command line: unknown key extra",
    ):
        assert part in message, part
    assert f"{file}: seed must be 0 or more" in message and message.startswith("6 problems: (1) ")
    # a rule that reads a wrong value is not asked; the others are
    message = message_of(
        "--batch_size=33",
        "--accumulation=2",
        file=file,
        text="seed: -1\nmodel: x\nsteps: 1.5\nschedule: {warmup: 9999}",
    )
    assert message.startswith("4 problems: ") and "warmup" not in message
    assert f"{file}: seed must be" in message and "command line: batch_size must be" in message
    message = message_of("--prune.final=0.5", "--accumulation=3", file=file, text="share: 1")
    assert message.startswith("2 problems: ") and f"{file}: share must be a dict" in message and "prune" not in message


def test_yaml_cannot_run_code(file: Path, tmp_path: Path) -> None:
    text = f"name: !!python/object/apply:os.mkdir ['{tmp_path}/made']"
    assert "the tag tag:yaml.org,2002:python/object/apply:os.mkdir is not for recipes" in message_of(
        file=file, text=text
    )
    assert not (tmp_path / "made").exists()


def test_recipes_made_in_python_are_checked_when_they_are_made() -> None:
    with pytest.raises(RecipeError, match=r"^DataConfig: limit must be at least 1, got 0$"):
        DataConfig(limit=0)
    with pytest.raises(RecipeError) as caught:
        Recipe(steps="x", seed=None, precision="fp8")
    assert str(caught.value) == (
        "Recipe: 3 problems: (1) seed must be a whole number, got null; (2) steps must be a whole number, got 'x'; "
        "(3) precision is an unknown name 'fp8': known are bf16, fp32"
    )
    with pytest.raises(RecipeError, match=r"^Recipe: schedule\.warmup must be at most the 5 steps, got 9$"):
        Recipe(steps=5, schedule=ScheduleConfig(warmup=9))
    with pytest.raises(RecipeError, match=r"schedule\.warmup"):
        dataclasses.replace(Recipe(schedule=ScheduleConfig(warmup=9)), steps=5)
    made = Recipe(batch_size=6)
    with pytest.raises(RecipeError, match=r"^recipe 'run': batch_size .* 4 × 1 = 4, got 6; the next one is 8$"):
        validate(made, world_size=4)
    validate(made, world_size=3)
    assert pickle.loads(pickle.dumps(made)) == made


def test_a_recipe_that_an_older_version_saved_is_read_unchanged() -> None:
    text = Path(__file__).with_name("saved_before_pydantic.json").read_text()
    recipe = recipe_from_json(text)
    saved = json.loads(text)
    younger = json.loads(recipe_from_json("{}").to_json())
    with_new_keys = {name: younger[name] | saved[name] for name in ("share", "checkpoint")}
    assert json.loads(recipe.to_json()) == younger | saved | with_new_keys
    assert (recipe.share.mapping, recipe.schedule.milestones, recipe.clip_norm) == ({"a*": "x"}, (3, 5), None)


def test_a_saved_recipe_loads_without_the_files_that_it_names() -> None:
    text = json.dumps({"share": {"plan": "/gone/plan.json"}, "distill": {"teacher": "/gone"}, "optimizer": {"lr": 1}})
    recipe = recipe_from_json(text)
    assert (recipe.share.plan, recipe.distill.teacher, recipe.optimizer.lr) == ("/gone/plan.json", "/gone", 1.0)
    with pytest.raises(RecipeError, match=r"2 problems: .*'/gone/plan.json' does not exist.*but is '/gone'"):
        validate(recipe, world_size=1)


def test_the_batch_is_checked_against_torchruns_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "3 × 1 = 3, got 32" in message_of()


def test_every_key_has_words_for_its_type_and_a_sentence_of_help() -> None:
    assert len({key.name for key in recipe_keys()}) == len(recipe_keys())
    for key in recipe_keys():
        assert re.fullmatch(r"[A-Z].*[^.]\.", key.help) and "\n" not in key.help, key
        assert key.type and key.name.startswith(key.section) and key.default == value_of(Recipe(), key.name), key


def value_of(recipe: Recipe, key: str) -> object:
    return functools.reduce(getattr, key.split("."), recipe)


def test_names_are_those_of_the_registries() -> None:
    """A recipe names what the registries have, so that reading one does not import them all."""
    for key, registry in {
        "data.name": DATA,
        "optimizer.name": OPTIMIZERS,
        "schedule.name": SCHEDULES,
        "engine.name": ENGINES,
        "share.control": CONTROLS,
    }.items():
        assert names_in_schema(key) == sorted(registry), key
    assert list(ENGINE_OPTIONS) == list(ENGINES)


def names_in_schema(key: str) -> list[str]:
    section, name = key.split(".")
    definition = recipe_schema()["properties"][section]["$ref"].rpartition("/")[2]
    found = recipe_schema()["$defs"][definition]["properties"][name]
    return sorted((found if "enum" in found else found["anyOf"][0])["enum"])


def test_the_schema_beside_the_recipes_is_the_exported_one() -> None:
    folder = bundled_recipes()["quickstart"].parent
    assert (folder / "recipe.schema.json").read_text() == text_of(recipe_schema()), "python -m testing.write_schemas"
    for path in bundled_recipes().values():
        assert path.read_text().startswith("# yaml-language-server: $schema=recipe.schema.json\n")


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("steps: 1:30", "steps must be a whole number, got '1:30'"),
        ("steps: 0x10", "steps must be a whole number, got '0x10'"),
        ("steps: 2024-01-01", "steps must be a whole number, got '2024-01-01'"),
        ("data: {augment: yes}", "data.augment must be true or false, got 'yes'"),
        ("wandb: {mode: off}", "wandb.mode is an unknown name 'off'"),
        ("clip_norm: 1:30.5", "clip_norm must be a number or null, got '1:30.5'"),
    ],
)
def test_what_yaml_1_1_takes_for_something_else(file: Path, line: str, wanted: str) -> None:
    assert wanted in message_of(file=file, text=line)
    key, _, value = line.replace(": {", ".").rstrip("}").partition(": ")
    assert wanted in message_of(f"--{key}={value}")


def test_a_leading_zero_is_decimal(file: Path) -> None:
    file.write_text("batch_size: 010")
    assert load_recipe(file).batch_size == load_recipe(None, ["--batch_size=010"]).batch_size == 10


@given(
    st.text(max_size=12)
    | st.sampled_from(["1:30", "1e3", "08", "0x1", "yes", "null", "1_0", ".5", "~", "=", "<<", "a\x85 b"])
)
@example("\x85")
@example("a\u2028\u2029 b")
def test_a_recipe_as_yaml_reads_back(text: str) -> None:
    recipe = Recipe(model_args={"a": text, "b": [1, 2.5, None, True]}, share=ShareConfig(include=(text,)))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.yaml"
        path.write_text(recipe_to_yaml(recipe), encoding="utf-8")
        assert load_recipe(path) == recipe


def test_changed_settings_are_written_as_in_a_recipe() -> None:
    before, now = ({"clip_norm": None, "model": "gpt"}, {"clip_norm": 0.5, "model": "lstm"})
    assert changed_settings(before, now) == ["clip_norm was null and is 0.5", "model was gpt and is lstm"]
