"""A recipe: everything that a training run depends on, as one frozen and typed value.

A YAML file and the command line go through one jsonargparse parser, which knows the keys and their types from the
dataclasses below. Every mistake in them is found before anything starts, and all are reported together.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import os
import re
from argparse import SUPPRESS
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from dist_ssn.errors import RecipeError, unknown_choice
from dist_ssn.train.data import DATA
from dist_ssn.train.models import MODELS
from dist_ssn.train.optim import OPTIMIZERS, SCHEDULES

# ------------------------------------------------------------------------------------------------------- the recipe


@dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    Args:
        name: data set: text, digits, fashion_mnist, cifar10 or cifar100
        path: file, folder or glob that holds it; null: where the set is usually found
        limit: use only the first so many training samples (of text: bytes, before anything is held out); null: all
        validation: fraction held out for validation, of the sets that have no test set of their own (text, digits)
        augment: shift and flip training images at random
    """

    name: str = "text"
    path: str | None = None
    limit: int | None = None
    validation: float = 0.1
    augment: bool = True


@dataclass(frozen=True)
class ShareConfig:
    """How the model's weights share their parameters.

    Args:
        budget: trainable numbers for all the weights: 0.1, "10%", 5000000, "5M", "5MB", "5MB/step"; null: dense
        mapping: which weights share a bank; or a dict of globs of weight names to groups
        morph: how a weight is made from its bank
        include: names, globs or classes of the weights to share; null: all that can be
        exclude: names, globs or classes of the weights to leave as they are
        plan: JSON file of a plan to follow instead of budget, mapping and morph
        seed: seed of the plan's pseudo-random choices
    """

    budget: int | float | str | None = None
    mapping: dict[str, str] | str = "auto"
    morph: str = "auto"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    plan: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer.

    Args:
        name: adamw or sgd
        lr: learning rate of the dense model, which a shared model uses too
        weight_decay: decay of banks and weights; biases, norms, gains and coefficients have none
        betas: decay of the first and second moment (adamw)
        momentum: momentum (sgd)
        nesterov: Nesterov's momentum (sgd)
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = 0.9
    nesterov: bool = True


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over the steps.

    Args:
        name: cosine, step or constant
        warmup: steps in which the rate grows linearly
        final: rate at the last step, as a fraction of lr (cosine)
        milestones: steps at which the rate is multiplied by gamma (step)
        gamma: factor at each milestone (step)
    """

    name: str = "cosine"
    warmup: int = 0
    final: float = 0.1
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints.

    Args:
        every: steps between two checkpoints; null: only at the end
        keep: how many of the latest to keep
        resume: go on from the latest checkpoint of this run, if there is one
    """

    every: int | None = None
    keep: int = 2
    resume: bool = False


@dataclass(frozen=True)
class EngineConfig:
    """How the processes work together.

    Args:
        name: ddp
        static_graph: every step uses the same layers in the same order (ddp)
        find_unused_parameters: some steps leave layers out (ddp)
    """

    name: str = "ddp"
    static_graph: bool = False
    find_unused_parameters: bool = False


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases, beside the JSON lines that are always written.

    Args:
        mode: disabled, offline or online
        project: project of the run
        entity: user or team; null: the account's own
        tags: tags of the run
    """

    mode: str = "disabled"
    project: str = "dist_ssn"
    entity: str | None = None
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """A training run.

    Args:
        name: name of the run, and of its folder in output
        seed: seed of the initial weights and of the order of the data
        output: folder of the runs
        model: gpt, wide_resnet, or the import path of a function that returns an nn.Module, such as my_module.build
        model_args: arguments of that function
        data: the data
        share: how weights share parameters
        optimizer: the optimizer
        schedule: the learning rate over the steps
        steps: optimizer steps
        batch_size: samples per step, of all processes and accumulated micro-batches together
        accumulation: micro-batches per step
        clip_norm: largest norm of the gradient; null: not clipped
        precision: fp32 or bf16 (autocast)
        evaluate_every: steps between two evaluations
        evaluate_batches: batches (of batch_size samples) in an evaluation
        patience: stop after so many evaluations without a better one; null: never
        checkpoint: checkpoints
        engine: how processes work together
        wandb: Weights & Biases
        threads: processor threads of each process; null: as torch chooses
    """

    name: str = "run"
    seed: int = 0
    output: str = "runs"
    model: str = "gpt"
    model_args: dict = field(default_factory=dict)  # as dict[str, Any], jsonargparse would make "3" in it a number
    data: DataConfig = field(default_factory=DataConfig)
    share: ShareConfig = field(default_factory=ShareConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    steps: int = 1000
    batch_size: int = 32
    accumulation: int = 1
    clip_norm: float | None = 1.0
    precision: str = "fp32"
    evaluate_every: int = 100
    evaluate_batches: int = 16
    patience: int | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    threads: int | None = None

    def to_json(self) -> str:
        """This recipe as JSON text, which `from_json` reads back to an equal recipe."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @staticmethod
    def from_json(text: str, source: str = "recipe.json") -> Recipe:
        """The recipe in JSON text. Raises: RecipeError, whose sentence names `source`."""
        problems: list[str] = []
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise RecipeError(f"{source}: line {error.lineno} cannot be read as JSON ({error.msg})") from None
        leaves = dict(_leaves(content, source, problems))
        problems += [f"{source}: {problem}" for problem in _type_problems(leaves).values()]
        _raise(problems)
        return _recipe(_checker().parse_object(content))


# Values that are one of a few names.
CHOICES: dict[str, tuple[str, ...]] = {
    "data.name": tuple(DATA),
    "optimizer.name": tuple(OPTIMIZERS),
    "schedule.name": tuple(SCHEDULES),
    "engine.name": ("ddp",),
    "wandb.mode": ("disabled", "offline", "online"),
    "precision": ("fp32", "bf16"),
}

# ------------------------------------------------------------------------------------------------------- the checks


def validate(recipe: Recipe, world_size: int) -> None:
    """Checks every value of a recipe, for a run on `world_size` processes, and reports all problems at once.

    Raises:
        RecipeError: one sentence with each wrong key, its value, and what would be right.
    """
    problems = _problems(recipe, world_size)
    _raise([f"recipe {recipe.name!r}: {problem}" for problem in problems.values()])


def _problems(recipe: Recipe, world_size: int) -> dict[str, str]:
    """Key → what is wrong with it, types first: a value of a wrong type is not looked at further."""
    values = {key: functools.reduce(getattr, key.split("."), recipe) for key in _keys()}
    problems = _type_problems(values)
    for key, problem in _value_problems(values, world_size, wrong=set(problems)):
        problems.setdefault(key, f"{key} {problem}")
    return problems


def _value_problems(values: Mapping[str, Any], world_size: int, wrong: set[str]) -> Iterator[tuple[str, str]]:
    def given(*keys: str) -> bool:
        return all(key not in wrong and values[key] is not None for key in keys)

    for key in (
        *("steps", "batch_size", "accumulation", "evaluate_every", "evaluate_batches", "patience", "threads"),
        *("data.limit", "checkpoint.every", "checkpoint.keep"),
    ):
        if given(key) and values[key] < 1:
            yield key, f"must be at least 1, got {values[key]}"
    for key in ("seed", "share.seed", "schedule.warmup"):
        if given(key) and values[key] < 0:
            yield key, f"must be 0 or more, got {values[key]}"
    for key, low, high, rule in (
        ("optimizer.lr", math.ulp(0), math.inf, "a number above 0"),
        ("clip_norm", math.ulp(0), math.inf, "a number above 0, or null for no clipping"),
        ("optimizer.weight_decay", 0, math.inf, "0 or more"),
        ("optimizer.momentum", 0, 1, "at least 0 and below 1"),
        ("schedule.final", 0, math.nextafter(1, 2), "between 0 and 1"),
        ("schedule.gamma", math.ulp(0), math.nextafter(1, 2), "above 0 and at most 1"),
        ("data.validation", math.ulp(0), 1, "above 0 and below 1"),
    ):
        if given(key) and not low <= values[key] < high:  # nan and inf fail too
            yield key, f"must be {rule}, got {values[key]}"
    if given("optimizer.betas") and not all(0 <= beta < 1 for beta in values["optimizer.betas"]):
        yield "optimizer.betas", f"must be two numbers, at least 0 and below 1, got {list(values['optimizer.betas'])}"
    for key, known in CHOICES.items():
        if given(key) and values[key] not in known:
            yield key, f"is an {unknown_choice('name', values[key], known)}"
    for key in ("name", "output", "model"):
        if given(key) and not values[key].strip():
            yield key, "must not be empty"
    if given("name") and (Path(values["name"]).name != values["name"] or values["name"] == ".."):
        yield "name", f"must be a plain name, for it names the run's folder, got {values['name']!r}"
    if given("output") and Path(values["output"]).exists() and not Path(values["output"]).is_dir():
        yield "output", f"must be a folder, but {values['output']!r} is a file"
    if given("model") and values["model"] not in MODELS and "." not in values["model"]:
        known = unknown_choice("name", values["model"], MODELS)
        yield "model", f"is an {known}; a model of your own is an import path such as my_module.build"
    if given("model_args") and not _is_json(values["model_args"]):
        yield "model_args", "must hold only text, numbers, true, false, null, lists and dicts of them"
    if given("steps", "schedule.warmup") and values["schedule.warmup"] > values["steps"] > 0:
        yield "schedule.warmup", f"must be at most the {values['steps']} steps, got {values['schedule.warmup']}"
    milestones = values["schedule.milestones"] if given("schedule.milestones") else ()
    if list(milestones) != sorted(set(milestones)) or any(milestone < 1 for milestone in milestones):
        yield "schedule.milestones", f"must be rising step numbers, got {list(milestones)}"
    if given("schedule.name", "schedule.milestones") and values["schedule.name"] == "step" and not milestones:
        yield "schedule.milestones", "must name at least one step, for schedule.name is step"
    if given("share.plan") and not Path(values["share.plan"]).is_file():
        yield "share.plan", f"must be a plan's JSON file, but {values['share.plan']!r} does not exist"
    if given("batch_size", "accumulation") and min(values["batch_size"], values["accumulation"]) > 0:
        parts = world_size * values["accumulation"]
        if values["batch_size"] % parts:
            yield (
                "batch_size",
                f"must be divisible by processes × accumulation = {world_size} × {values['accumulation']} = {parts}, "
                f"got {values['batch_size']}; the next one is {parts * math.ceil(values['batch_size'] / parts)}",
            )


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


# ------------------------------------------------------------------------------------------------------- the parser

# How the types of the keys are called in messages.
_EXPECTED = {
    "int": "a whole number",
    "int | None": "a whole number or null",
    "float": "a number",
    "float | None": "a number or null",
    "bool": "true or false",
    "str": "text (in quotes, if it looks like something else)",
    "str | None": "text or null",
    "dict": "a dict of argument names to values",
    "dict[str, str] | str": "a name, or a dict of globs to groups",
    "int | float | str | None": 'a budget such as 0.1, "10%" or "5MB", or null',
    "tuple[str, ...]": "a list of texts, such as [a, b]",
    "tuple[str, ...] | None": "a list of texts, such as [a, b], or null",
    "tuple[float, float]": "a list of two numbers, such as [0.9, 0.95]",
    "tuple[int, ...]": "a list of whole numbers, such as [500, 800]",
}


@functools.cache
def _keys() -> dict[str, str]:
    """Full key → the text of its type; the dataclasses inside `Recipe` are the groups."""
    keys: dict[str, str] = {}
    for outer in dataclasses.fields(Recipe):
        if dataclasses.is_dataclass(outer.default_factory):
            keys |= {
                f"{outer.name}.{inner.name}": str(inner.type) for inner in dataclasses.fields(outer.default_factory)
            }
        else:
            keys[outer.name] = str(outer.type)
    return keys


def bundled_recipes() -> dict[str, Path]:
    """The recipes that come with this package: name without ending → file."""
    folder = Path(__file__).parent.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def recipe_parser(
    prog: str = "dist-ssn", description: str | None = None, flags: Mapping[str, str] = MappingProxyType({})
) -> ArgumentParser:
    """The parser of every key of a recipe, from a YAML file (`--config`) and the command line (`--any.key=value`).

    Args:
        flags: options without a value that are not keys of a recipe, for the help: name → what it does.
    """
    # Abbreviations are off: with them, a new key can change what an old command line means.
    parser = ArgumentParser(
        prog=prog,
        usage=" ".join([prog, *(f"[{flag}]" for flag in flags), "[--config FILE] [--any.key=value ...]"]),
        description=description,
        exit_on_error=False,
        default_env=False,
        allow_abbrev=False,
    )
    bundled = ", ".join(bundled_recipes())
    parser.add_argument("--config", action="config", help=f"YAML file of a recipe, or one that is built in: {bundled}")
    for flag, text in flags.items():
        parser.add_argument(flag, action="store_true", default=SUPPRESS, help=text)
    parser.add_class_arguments(Recipe)
    for action in parser._actions:
        if any(key.startswith(f"{action.dest}.") for key in _keys()):
            action.help = SUPPRESS  # --data=FILE, which we don't take: one file is a whole recipe
    return parser


@functools.cache
def _checker() -> ArgumentParser:
    """One parser for all checks: making it takes longer than using it."""
    return recipe_parser()


def load_recipe(path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe from a YAML file, if one is given, and `--any.key=value` overrides.

    Args:
        path: a YAML file, or the name of a recipe that comes with this package; None: the default recipe.
        overrides: `--any.key=value`; the two dashes may be left out.

    Raises:
        RecipeError: one sentence that names every mistake with its file, key and value.
    """
    config = [] if path is None else [f"--config={os.fspath(path)}"]
    dashed = [override if override.startswith("--") else f"--{override}" for override in overrides]
    return parse_recipe(config + dashed)[0]


def parse_recipe(
    arguments: Sequence[str],
    prog: str = "dist-ssn",
    description: str | None = None,
    flags: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Recipe, set[str]]:
    """Reads a recipe from command-line arguments; what the command line says wins over the file.

    Args:
        arguments: `--config=FILE`, `--any.key=value`, flags. `--help` and `--print_config` print and exit.
        prog, description, flags: see `recipe_parser`.

    Returns:
        The recipe, and those flags that were given.

    Raises:
        RecipeError: one sentence that names every mistake with its file, key and value.
    """
    problems: list[str] = []
    origin: dict[str, str] = {}  # key → where it was set
    files: list[str] = []
    options: list[str] = []
    given: set[str] = set()
    model_args: dict[str, Any] = {}
    model_arg: dict[str, Any] = {}  # those that are set one by one
    parser = _checker()
    remaining = list(arguments)
    while remaining:
        argument = remaining.pop(0)
        if argument in flags:
            given.add(argument)
            continue
        if argument in ("-h", "--help") or argument.partition("=")[0] == "--print_config":
            parser = recipe_parser(prog, description, flags)
            options.append(argument)
            continue
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            problems.append(f"command line: unexpected {argument!r}: options are written --key=value")
            continue
        if key != "config" and (problem := _key_problem(key, ["config", *(flag.strip("-") for flag in flags)])):
            problems.append(f"command line: {problem}")
            continue
        if not equals:
            if not remaining or remaining[0].startswith("--"):
                problems.append(f"command line: --{key} needs a value, as in --{key}=value")
                continue
            value = remaining.pop(0)
        if key == "config":
            path = _find(value)
            files.append(f"--config={path}")
            leaves = dict(_leaves(_read_yaml(path), str(path), problems))
            found = _type_problems(leaves)
            origin |= dict.fromkeys(leaves, str(path))
            model_args = leaves.get("model_args", model_args)
        elif key.startswith("model_args."):
            model_arg[key.removeprefix("model_args.")] = _yaml_value(value)
            origin["model_args"] = "command line"
            found = {}
        else:
            value = _unquoted(value)
            options.append(f"--{key}={value}")
            found = _option_problem(key, value)
            origin[key] = "command line"
            model_args = _yaml_value(value) if key == "model_args" else model_args
        problems += [f"{origin[key]}: {problem}" for key, problem in found.items()]
    _raise(problems)
    if model_arg:
        options.append(f"--model_args={json.dumps(model_args | model_arg, default=str)}")
    try:
        namespace = parser.parse_args(files + options)
    except ArgumentError as error:
        raise RecipeError(f"the recipe cannot be read: {' '.join(str(error).split())}") from None
    recipe = _recipe(namespace)
    somewhere = files[-1].partition("=")[2] if files else "command line"
    processes = os.environ.get("WORLD_SIZE", "1")  # torchrun's; a malformed one is reported where processes meet
    found = _problems(recipe, int(processes) if processes.isdigit() else 1)
    _raise([f"{origin.get(key, somewhere)}: {problem}" for key, problem in found.items()])
    return recipe, given


def _unquoted(value: str) -> str:
    """What a script writes with `json.dumps` has quotes, which a shell would have taken away."""
    try:
        return json.loads(value) if value.startswith('"') else value
    except json.JSONDecodeError:
        return value


def _recipe(namespace: Namespace) -> Recipe:
    values = namespace.as_dict()
    made = {}
    for part in dataclasses.fields(Recipe):
        value = values[part.name]
        made[part.name] = part.default_factory(**value) if dataclasses.is_dataclass(part.default_factory) else value
    return Recipe(**made)


def _find(name: str) -> Path:
    path, bundled = Path(name), bundled_recipes()
    if path.is_file():
        return path
    if name.removesuffix(".yaml") in bundled:
        return bundled[name.removesuffix(".yaml")]
    problem = "is not a file" if path.exists() else f"does not exist in {Path.cwd()}"
    raise RecipeError(f"the recipe {name!r} {problem}; the built-in ones are {', '.join(bundled)}")


def _yaml_value(text: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError:
        return text


class _UniqueKeys(yaml.SafeLoader):
    """YAML's safe loader (no tag can run code), which also refuses a key that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML follows, takes 1e-3 for a text; jsonargparse and everybody else takes it for a number.
_UniqueKeys.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))


def _read_yaml(path: Path) -> Any:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise RecipeError(f"{path}{line}: this is not valid YAML ({error.problem})") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise RecipeError(f"{path}: this is not a text file in UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from None
    return content


def _leaves(content: Any, source: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    """The known keys in a file's content with their values; unknown ones go to `problems`."""
    if not isinstance(content, dict):
        problems.append(f"{source}: a recipe is a dict of keys and values, such as 'steps: 1000'")
        return
    groups = {key.partition(".")[0] for key in _keys() if "." in key}
    for name, value in content.items():
        if name not in groups:
            inner = {str(name): value}
        elif isinstance(value, dict):
            inner = {f"{name}.{key}": part for key, part in value.items()}
        else:
            members = ", ".join(key for key in _keys() if key.startswith(f"{name}."))
            problems.append(f"{source}: {name} must be a dict of keys and values ({members}), got {_shown(value)}")
            continue
        for key, part in inner.items():
            if problem := _key_problem(key):
                problems.append(f"{source}: {problem}")
            else:
                yield key, part


def _key_problem(key: str, others: Sequence[str] = ()) -> str | None:
    known = [*_keys(), *others]
    if key in known or (key.startswith("model_args.") and key.count(".") == 1):
        return None
    if key.startswith("model_args."):
        return f"{key} is too deep: write --{'.'.join(key.split('.')[:2])}={{...}}"
    if members := [name for name in known if name.startswith(f"{key}.")]:
        return f"{key} is a group of keys: {', '.join(members)}"
    last = {name: name.rpartition(".")[2] for name in known}
    near = difflib.get_close_matches(key, known, n=1) or [
        name for name in known if last[name] in difflib.get_close_matches(key.rpartition(".")[2], last.values(), n=1)
    ]
    hint = f"did you mean {' or '.join(near)}?" if near else "--help lists all keys"
    return f"unknown key {key}; {hint}"


def _type_problems(leaves: Mapping[str, Any]) -> dict[str, str]:
    """Key → what is wrong with the type of its value, one by one, for the parser stops at the first."""
    problems = {}
    for key, value in leaves.items():
        nested: Any = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        try:
            _checker().parse_object(nested, defaults=False)
            right = value is not None or "None" in _keys()[key]  # the parser lets null through for every type
        except ArgumentError:
            right = False
        if not right:
            problems[key] = f"{key} must be {_expected(key)}, got {_shown(value)}"
    return problems


def _option_problem(key: str, value: str) -> dict[str, str]:
    try:
        _checker().parse_args([f"--{key}={value}"], defaults=False)
    except ArgumentError:
        return {key: f"{key} must be {_expected(key)}, got {value!r}"}
    return {}


def _expected(key: str) -> str:
    kind = _keys().get(key, "str")
    return _EXPECTED.get(kind, f"of type {kind}")


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value)


def _raise(problems: Sequence[str]) -> None:
    if len(problems) == 1:
        raise RecipeError(problems[0])
    if problems:
        numbered = "; ".join(f"({number}) {problem}" for number, problem in enumerate(problems, 1))
        raise RecipeError(f"{len(problems)} problems: {numbered}")
