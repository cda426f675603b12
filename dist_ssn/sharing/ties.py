"""`tie_weights` of a shared model of `transformers`: ties are in the plan, so there is nothing left to tie.

`transformers` calls it in `init_weights`, `resize_token_embeddings` and when its Trainer loads a model, and looks for parameters.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from dist_ssn.errors import ShareError

_NAME = "tie_weights"


class _Ties:
    """Is called as `model.tie_weights()`."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ties = getattr(self.model, "all_tied_weights_keys", None) or {}
        if ties and all(self._is_kept(target, source) for target, source in ties.items()):
            return None
        try:
            return type(self.model).tie_weights(self.model, *args, **kwargs)  # type: ignore[attr-defined]
        except AttributeError as error:
            raise ShareError(
                f"tie_weights() of {type(self.model).__name__} looks for a parameter where a weight is generated ({error}): tie "
                "before share(), or tie materialize(model)"
            ) from error

    def _is_kept(self, target: str, source: str) -> bool:
        slots = [self._slot(name) for name in (target, source)]
        return slots[0] is not None and slots[0] == slots[1]

    def _slot(self, name: str) -> tuple[int, int] | None:
        path, _, local = name.rpartition(".")
        slot = self.model.get_submodule(path).__dict__.get("_dist_ssn_slots", {}).get(local)
        return None if slot is None else (id(slot[0]), slot[1])


def keep_ties(model: nn.Module) -> None:
    """Gives each module of `transformers` in a shared model a `tie_weights` that knows generated weights."""
    for module in model.modules():
        if callable(getattr(type(module), _NAME, None)) and hasattr(module, "all_tied_weights_keys"):
            module.__dict__[_NAME] = _Ties(module)


def release_ties(model: nn.Module) -> None:
    """Removes what `keep_ties` gave."""
    for module in model.modules():
        if isinstance(module.__dict__.get(_NAME), _Ties):
            del module.__dict__[_NAME]
