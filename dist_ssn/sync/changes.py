"""Changes of a model that are no steps of the watched optimizer: a round would not average them, or count them as training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from dist_ssn.errors import UserError
from dist_ssn.sharing.bases import fingerprint
from dist_ssn.sync.fingerprints import bit_sum
from dist_ssn.sync.settings import held
from dist_ssn.sync.trained import Trained, values_of

_NESTED = 4
"""Steps of wrappers that may begin before that of the optimizer inside of them."""


class Changes:
    """Finds what else changes a model than the steps of the optimizer whose rounds are averaged.

    Args:
        model: all workers hold the same values now.
        trained: the parameters that the rounds average.
        every: steps in a round.
        kept: name → fingerprint of what the model keeps; see `kept_fingerprints`.
    """

    def __init__(self, model: nn.Module, trained: Sequence[Trained], every: int, kept: Mapping[str, str]) -> None:
        self._model, self._trained, self._every, self._kept = model, trained, every, kept
        self.begin()

    def begin(self) -> None:
        """All workers hold the same values now."""
        self._seen = {
            name: (_version(p), 0 if name in self._kept else self._read(name, p)) for name, p in self._others().items()
        }
        self._foreign, self._foreign_kind, self._is_stepping = 0, "", False
        self.forget_loads()

    # ------------------------------------------------------------ parameters outside of the optimizer

    def _others(self) -> dict[str, nn.Parameter]:
        """The parameters that no LocalUpdates averages now."""
        names = {t.name for t in self._trained}
        averaged = {id(p) for optimizer in held for g in optimizer.param_groups for p in g["params"] if p.requires_grad}
        return {name: p for name, p in self._model.named_parameters() if name not in names and id(p) not in averaged}

    def others(self, read_all: bool) -> dict[str, int]:
        """Name → a number that stands for its values, for the parameters that no LocalUpdates averages: all workers hold the same.

        Args:
            read_all: read all but those that `share(keep=True)` keeps. Else only those whose version has changed are read again; an
                optimizer that is fused, or writes to `.data`, does not change it.
        """
        found = {}
        for name, p in self._others().items():
            version, found[name] = self._seen.get(name, (-1, 0))
            if version != _version(p) or (read_all and name not in self._kept):
                found[name] = self._read(name, p)
            self._seen[name] = _version(p), found[name]
        return found

    def _read(self, name: str, p: nn.Parameter) -> int:
        """A number that stands for a parameter's values; 0 for kept ones that are what they were."""
        if name not in self._kept:
            return bit_sum([values_of(p)])
        return 0 if (now := fingerprint(p)) == self._kept[name] else int(now[:16], 16)

    # ------------------------------------------------------------ steps of other optimizers

    def before_step(self) -> None:
        """A step of the watched optimizer begins."""
        self.settle_loads()
        self._is_stepping = True

    def after_step(self) -> None:
        """It ends."""
        self._is_stepping, self._foreign = False, 0

    def before_any_step(self, optimizer: Optimizer) -> None:
        """A step of any optimizer begins. One inside of the watched optimizer's step, or around it, is a part of it.

        Raises:
            UserError: another optimizer has taken more steps on the trained parameters than a round has.
        """
        if self._is_stepping or optimizer in held or not self._trains_ours(optimizer):
            return
        self._foreign, self._foreign_kind = self._foreign + 1, type(optimizer).__name__
        if self._foreign > self._every + _NESTED:
            raise UserError(self._unseen_steps())

    def _trains_ours(self, optimizer: Optimizer) -> bool:
        ours = {id(t.parameter) for t in self._trained}
        return any(id(p) in ours for group in optimizer.param_groups for p in group["params"])

    def _unseen_steps(self) -> str:
        return (
            f"{self._foreign_kind} changes the parameters, and the optimizer that LocalUpdates got takes no steps, so that no "
            "round ends: give LocalUpdates the optimizer whose step() is called, and close() one that is no longer needed"
        )

    # ------------------------------------------------------------ values that are loaded

    @property
    def has_loads(self) -> bool:
        """True if values were loaded since the last step."""
        return self._sum_before_load is not None

    def before_load(self) -> None:
        """A `load_state_dict` of the model begins."""
        if self._sum_before_load is None:
            self._sum_before_load = self._trained_sum()

    def settle_loads(self) -> None:
        """Notes whether values were loaded since the last step and are still there; an average that was put back is none."""
        if self._sum_before_load is not None:
            self._is_loaded |= self._sum_before_load != self._trained_sum()
            self._sum_before_load = None

    def forget_loads(self) -> None:
        """The values that were loaded are where all workers begin, or they have been put back."""
        self._sum_before_load: int | None = None
        self._is_loaded = False

    def _trained_sum(self) -> int:
        return bit_sum(t.values for t in self._trained)

    def problem(self, steps: int) -> str | None:
        """A sentence about a change that was found, for an error on all workers; None if there is none.

        Args:
            steps: of the watched optimizer since the last exchange.
        """
        if self._is_loaded:
            return (
                "values were loaded into the model in the middle of local updates, which would count as training: load them before "
                "the first forward or after the block; or load the same on all workers and call restart(step), or a state of "
                "LocalUpdates by its load_state_dict"
            )
        if self._foreign and (not steps or self._foreign >= self._every):
            return self._unseen_steps()
        return None


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version
