"""Models by name or by import path."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import nn

from dist_ssn.errors import RecipeError, UserError, describe, unknown_choice
from dist_ssn.train.models.gpt import build_gpt
from dist_ssn.train.models.wide_resnet import build_wide_resnet

MODELS: dict[str, Callable[..., nn.Module]] = {"gpt": build_gpt, "wide_resnet": build_wide_resnet}

_TYPES: dict[Any, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


class HasHints(Protocol):
    """A task, or the facts of one that a model needs."""

    @property
    def model_hints(self) -> dict[str, Any]:
        """Arguments for a builder, such as {"classes": 10}."""
        ...


def build_model(name: str, args: Mapping[str, Any], task: HasHints | None = None) -> nn.Module:
    """Builds a model on the CPU.

    Args:
        name: a name in MODELS, or the import path of a function such as "my_module.build"; modules in the current folder
            are found, too.
        args: the function's keyword arguments.
        task: its hints (vocabulary, context, classes, channels, size) are passed to arguments of the same name that are not in
            `args`.

    Raises:
        RecipeError: the function does not exist, does not take these arguments, or does not return a model.
    """
    builder = MODELS[name] if name in MODELS else _imported(name)
    hints = task.model_hints if task is not None else {}
    known, open_ended = _arguments(builder)
    for key, value in args.items():
        if key not in known and not open_ended:
            raise RecipeError(f"model_args of {name}: {unknown_choice('argument', key, known)}")
        annotation = known[key].annotation if key in known else None
        allowed = _TYPES.get(getattr(annotation, "__name__", annotation))
        # A bool is an int to Python, but layers: true is a mistake.
        if allowed and (not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed)):
            raise RecipeError(
                f"model_args of {name}: {key} must be {' or '.join(kind.__name__ for kind in allowed)}, got {value!r}"
            )
    for key in ("vocabulary", "classes"):
        if key in args and key in hints and isinstance(args[key], int) and args[key] < hints[key]:
            raise RecipeError(f"model_args of {name}: {key} is {args[key]}, but the data has {hints[key]}")
    if {"channels"} <= args.keys() & hints.keys() and args["channels"] != hints["channels"]:
        raise RecipeError(f"model_args of {name}: channels is {args['channels']}, but the data has {hints['channels']}")
    given = {key: value for key, value in hints.items() if key in known} | dict(args)
    missing = [
        key for key, parameter in known.items() if key not in given and parameter.default is inspect.Parameter.empty
    ]
    if missing:
        raise RecipeError(
            f"model_args of {name}: {', '.join(missing)} must be given, because {name} has no default for it"
        )
    try:
        model = builder(**given)
    except UserError:
        raise
    except Exception as error:  # a user's code, or sizes that do not fit
        raise RecipeError(f"model {name!r} cannot be built with {_shown(given)}: {describe(error)}") from error
    if not isinstance(model, nn.Module):
        raise RecipeError(f"model {name!r} must return a torch.nn.Module, but returned a {type(model).__name__}")
    return model


def _shown(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value!r:.40}" for key, value in given.items()) or "no arguments"


def _arguments(builder: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The arguments that can be passed by name, and True if the function takes any other name, too."""
    parameters = inspect.signature(builder).parameters.values()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = {parameter.name: parameter for parameter in parameters if parameter.kind in named}
    return known, any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)


def _imported(path: str) -> Callable[..., Any]:
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        known = unknown_choice("model", path, MODELS)
        raise RecipeError(f"{known}; a model of your own is an import path such as my_module.build")
    if module_name.partition(".")[0] in sys.stdlib_module_names:  # a recipe must not be able to call os.system
        raise RecipeError(f"model {path!r}: Python's own library builds no model; name a function of yours")
    folder = os.getcwd()
    if folder not in sys.path:  # as `python -m` does; a console script has its own folder there instead
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RecipeError(
            f"model {path!r}: {module_name} cannot be imported from {folder} or the installed packages ({error})"
        ) from error
    if not hasattr(module, attribute):
        functions = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        raise RecipeError(f"model {path!r}: {unknown_choice(f'function of {module_name}', attribute, functions)}")
    builder = getattr(module, attribute)
    if not callable(builder):
        raise RecipeError(f"model {path!r} must be a function that returns a model, but is a {type(builder).__name__}")
    return builder
