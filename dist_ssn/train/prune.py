"""Magnitude pruning during training, at once or gradually, of a bank's elements or of the weights'.

After each step, a fraction s = final · (1 - (1 - t)³) of the elements is zero; t grows from 0 to 1 between the steps `begin` and
`end`. Two things can be pruned:

    bank      the smallest elements of all banks, in units of each bank's initial standard deviation; a pruned element stays zero
    weights   the smallest elements of each weight. In a dense model a pruned element stays zero. In a shared model weights are
              generated, so each weight has a threshold below which generated elements are set to zero; they may come back

Storage shrinks to `kept` elements, and one bit for each element that tells if it is kept. Communication does not shrink: every
gradient is sent as before.

Source: Zhu and Gupta 2017, arXiv 1710.01878, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dist_ssn.model.specs import find_specs
from dist_ssn.sharing.bank import Bank, banks_of
from dist_ssn.train.recipe.sections import PruneConfig, ShareConfig


def sparsity(config: PruneConfig, step: int, steps: int) -> float:
    """Fraction that is zero after `step` steps of `steps`."""
    end = steps if config.end is None else config.end
    if step < config.begin:
        return 0.0
    done = min(1.0, (step - config.begin) / (end - config.begin)) if end > config.begin else 1.0
    return config.final * (1 - (1 - done) ** 3)


def with_thresholds(model: nn.Module, config: PruneConfig) -> nn.Module:
    """Adds a buffer of one threshold per weight to a shared model's banks, if its weights are pruned; checkpoints contain it."""
    if config.final and config.what == "weights":
        for bank in banks_of(model):
            bank.register_buffer("thresholds", torch.zeros(len(bank.group.slots), device=bank.bank.device))
    return model


class Pruner:
    """Prunes a model between steps, identically on every process, since all hold the same parameters.

    Args:
        config: `what`, `final`, `begin`, `end` and `every`.
        share: gives the weights of a dense model.
        model: after `with_thresholds`, with the values that training starts or resumes from. If pruning has begun, zeros stay.
        step: number of steps that were made.
        steps: number of steps of the run.
    """

    def __init__(self, config: PruneConfig, share: ShareConfig, model: nn.Module, step: int, steps: int) -> None:
        self._config, self._steps = config, steps
        self._banks = banks_of(model)
        self._thresholds = config.what == "weights" and bool(self._banks)
        # Parameters with elements held at zero, and their units.
        self._held: list[tuple[nn.Parameter, float | Tensor]] = []
        if config.what == "bank":
            self._held = [(bank.bank, bank.scales[0]) for bank in self._banks]
        elif not self._banks:
            weights = find_specs(model, share.include, share.exclude, structure=False).weights
            self._held = [(model.get_parameter(weight.name), 1.0) for weight in weights]
        began = sparsity(config, step, steps) > 0
        self._masks = [
            parameter != 0 if began else torch.ones_like(parameter, dtype=torch.bool) for parameter, _ in self._held
        ]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Sets pruned elements to zero again, and prunes further if it is time."""
        self._hold()  # first: an optimizer moves zeros too, and they must not grow back
        since = step - self._config.begin
        if since < 0 or (since % self._config.every and step != self._steps):
            return
        part = sparsity(self._config, step, self._steps)
        if self._thresholds:
            for bank in self._banks:
                self._set_thresholds(bank, part)
        elif self._config.what == "bank":
            sizes = [parameter.abs() / unit for parameter, unit in self._held]
            limit = _smallest(torch.cat(sizes).flatten(), part)
            self._masks = [size > limit for size in sizes]
        else:
            self._masks = [size > _smallest(size.flatten(), part) for size in (p.abs() for p, _ in self._held)]
        self._hold()

    def _hold(self) -> None:
        for (parameter, _), mask in zip(self._held, self._masks, strict=True):
            parameter.mul_(mask)

    def _set_thresholds(self, bank: Bank, part: float) -> None:
        assert bank.thresholds is not None
        bank.thresholds.zero_()  # so that weights are whole
        for index in range(len(bank.group.slots)):
            bank.thresholds[index] = _smallest(bank(index).abs().flatten(), part)

    @torch.no_grad()
    def counts(self) -> dict[str, Any]:
        """Counts for `summary.json`: the pruned object, its elements, and those that are kept."""
        if self._thresholds:
            made = [bank(index) for bank in self._banks for index in range(len(bank.group.slots))]
        else:
            made = [parameter for parameter, _ in self._held]
        kept = sum(int(tensor.count_nonzero()) for tensor in made)
        return {"what": self._config.what, "numbers": sum(tensor.numel() for tensor in made), "kept": kept}


def _smallest(sizes: Tensor, part: float) -> Tensor:
    """The threshold below or at which the smallest `part` of the sizes [m] lies; -1 if that is no element."""
    count = int(part * sizes.numel())
    return sizes.kthvalue(count).values if count else sizes.new_tensor(-1.0)
