"""Models that load and save themselves by `from_pretrained` and `save_pretrained`, as those of Hugging Face do.

Nothing of theirs is imported: a model is recognized by its attributes.
"""

from __future__ import annotations

import inspect
import json
import os
import warnings
import weakref
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from dist_ssn.errors import ShareError
from dist_ssn.files import replace_text
from dist_ssn.model.specs import Specs
from dist_ssn.model.structure import scales_differ
from dist_ssn.sharing.bank_set import bank_sets

METHOD = "save_pretrained"


def warn_of_pretrained(model: nn.Module, specs: Specs) -> None:
    """Warns if `share` is about to replace weights that were loaded by `from_pretrained`.

    transformers marks the weights that it has loaded, and leaves a note in the model, which a deep copy keeps. The name in the
    config is not enough: a model that is built from a pretrained model's config has it, too.
    """
    marked = [w.name for w in specs.weights if getattr(model.get_parameter(w.name), "_is_hf_initialized", False)]
    for path, module in model.named_modules():
        source = getattr(getattr(module, "config", None), "name_or_path", None)
        if not isinstance(source, str) or not source:
            continue
        names = [weight.name for weight in specs.weights] if "_weight_conversions" in module.__dict__ else marked
        loaded = [name for name in names if name.startswith(f"{path}." if path else "")]
        if loaded:
            kind = type(module).__name__
            warnings.warn(
                f"{kind} was loaded from {source!r}, and share() replaces its values by new random ones ({loaded[0]}; "
                f"{len(loaded)} weights in all): to train from scratch, build it from its config, {kind}(config); to keep "
                "its values and train a difference, share(model, budget, keep=True)",
                stacklevel=3,
            )
            return
    _warn_of_uneven_scales(model, specs)


def _warn_of_uneven_scales(model: nn.Module, specs: Specs) -> None:
    """Warns of values that no initializer draws: word vectors, a checkpoint that was loaded, or another scale for some rows."""
    uneven = [w.name for w in specs.weights if scales_differ(model.get_parameter(w.name), w.zero_row)]
    if uneven:
        warnings.warn(
            f"the values of {uneven[0]} ({len(uneven)} weights in all) differ in scale by row or column, as loaded or trained "
            "ones do, and share() replaces them by new random ones of one scale: to keep its values, name it in exclude=, or train "
            "a difference from all, share(model, budget, keep=True)",
            stacklevel=4,
        )


def warn_of_new_values(model: nn.Module, trained: Collection[str]) -> None:
    """Warns if `share(keep=True)` is about to keep random values, such as those of a new head, beside loaded ones.

    A model that is built again has other values there, so that no saved difference goes onto it. transformers marks what it has
    loaded; of other models it is not known.

    Args:
        model: dense.
        trained: names of the parameters that are trained whole.
    """
    beside = {name: p for name, p in model.named_parameters() if not getattr(p, "_is_hf_initialized", False)}
    if len(beside) == sum(1 for _ in model.parameters()):
        return
    new = [name for name, p in beside.items() if name not in trained and not p.is_meta and _varies(p)]
    if new:
        warnings.warn(
            f"from_pretrained has not loaded {new[0]} ({len(new)} parameters in all), and share(keep=True) freezes its values: if "
            f"they are random, as a new head's, train it, train={new[0].rpartition('.')[0] or new[0]!r}; a saved difference goes "
            "only onto equal values",
            stacklevel=4,
        )


def _varies(parameter: nn.Parameter) -> bool:
    return bool((parameter != parameter.reshape(-1)[:1]).any())


def guard_saving(model: nn.Module) -> None:
    """Replaces `save_pretrained` of a shared model and of its parts, so that `from_pretrained` misreads nothing that it writes."""
    for module in model.modules():
        if callable(getattr(type(module), METHOD, None)) and any(
            "_dist_ssn_slots" in m.__dict__ for m in module.modules()
        ):
            module.__dict__[METHOD] = _SavePretrained(module, hasattr(module, "peft_config"))


def unguard_saving(model: nn.Module) -> None:
    """Restores the classes' own `save_pretrained`, in place."""
    for module in model.modules():
        if isinstance(module.__dict__.get(METHOD), _SavePretrained):
            del module.__dict__[METHOD]


class _SavePretrained:
    """`save_pretrained` of a shared model.

    `from_pretrained` builds a dense model and fills the weights that it misses with random values. So a plain call is an error. A
    caller that passes `state_dict`, as Trainer does for its checkpoints, gets its files, but `config.json` has a mark: the name of
    the weights' file is a sentence, with which `from_pretrained` fails, even where dist_ssn is not installed. Trainer itself
    resumes from such a folder.

    It refers to its model weakly, so that a model is freed as soon as nobody else refers to it.
    """

    def __init__(self, model: nn.Module, has_adapters: bool):
        self.model, self.has_adapters = weakref.ref(model), has_adapters

    def __getstate__(self) -> tuple[Any, bool]:
        return self.model(), self.has_adapters

    def __setstate__(self, state: tuple[Any, bool]) -> None:
        self.model, self.has_adapters = weakref.ref(state[0]), state[1]

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **options: Any) -> Any:
        """Saves as the class does, if the caller passes a state dict.

        Raises:
            ShareError: the folder would be read wrongly by `from_pretrained`.
        """
        model = self.model()
        if model is None:
            raise ShareError(
                "save_pretrained of a shallow copy whose original is gone: copy a shared model by copy.deepcopy"
            )
        name = type(model).__name__
        if self.has_adapters:
            raise ShareError(
                f"{name} had PEFT adapters when it was shared, and save_pretrained would leave out those that a bank generates: "
                "call share() first and get_peft_model() after it, or save state_dict()"
            )
        if getattr(model, "_hf_peft_config_loaded", False):  # adapters only are written, and those are the model's own
            return getattr(type(model), METHOD)(model, save_directory, *args, **options)
        if "state_dict" not in options or options.get("push_to_hub"):
            if any(banks.plan.keep for banks in bank_sets(model)):
                raise ShareError(
                    f"{name} keeps its weights and trains a difference: dist_ssn.save(model, folder) writes the difference, and "
                    "dist_ssn.materialize(model).save_pretrained(folder) the merged model"
                )
            whole = "" if bank_sets(model) else " of the whole model, and its part"
            raise ShareError(
                f"{name} is shared, and from_pretrained would fill what save_pretrained writes with random weights: save "
                f"dist_ssn.materialize(model){whole}, or keep the banks by torch.save(model.state_dict(), file)"
            )
        save = getattr(type(model), METHOD)
        if "save_original_format" in inspect.signature(save).parameters:
            # Trap: older names, which transformers writes for some models, are not those that Trainer resumes by.
            options.setdefault("save_original_format", False)
        misread = options.get("is_main_process", True) and not _has_weights(model, options["state_dict"])
        result = save(model, save_directory, *args, **options)  # empties the state dict
        config = Path(save_directory, "config.json")
        if misread and config.exists():
            _mark(config, name, any(banks.plan.keep for banks in bank_sets(model)))
        return result


def _has_weights(model: nn.Module, state: Mapping[str, Any] | None) -> bool:
    """True for the state dict of a dense model, which `materialize` returned."""
    return any(
        f"{path}.{name}".lstrip(".") in (state or {})
        for path, module in model.named_modules()
        for name in module.__dict__.get("_dist_ssn_slots", ())
    )


def _mark(path: Path, name: str, keeps: bool) -> None:
    """Makes `from_pretrained` fail with a sentence.

    Args:
        path: of the config.
        name: of the model's class.
        keeps: whether the model's weights are kept and its banks generate a difference.
    """
    config = json.loads(path.read_text(encoding="utf-8"))
    build, how = (
        (f"load the pretrained {name} that it was trained on", "share it as before, keep=True")
        if keeps
        else (f"build the model by {name}(config)", "share it as before")
    )
    config["transformers_weights"] = (
        f"this folder has the banks of a {name} that dist_ssn shares, not its weights; {build}, {how}, "
        "load_state_dict the safetensors file, and save dist_ssn.materialize(model) for from_pretrained"
    )
    replace_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
