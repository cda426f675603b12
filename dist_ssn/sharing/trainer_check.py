"""The optimizer that `transformers.Trainer` makes by itself: its first step says what it costs a shared model.

Other optimizers are not judged. Trainer is looked for among the callers of the step, so that transformers is never imported here.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from torch.optim.optimizer import Optimizer

from dist_ssn.sharing.group_check import warn_of_groups


def warn_of_trainer(optimizer: Optimizer) -> None:
    """Warns if this is an optimizer as Trainer makes it, and its groups are those of a dense model.

    Args:
        optimizer: any optimizer, about to take its first step.
    """
    trainer = _stepping_trainer()
    if trainer is not None and _is_like_its_own(trainer.args, optimizer):
        warn_of_groups(
            trainer.model,
            optimizer,
            "give Trainer optimizers=(dist_ssn.integrations.transformers.create_optimizer(model, args), None)",
            lr=trainer.args.learning_rate,
            engine=True,
        )


def _stepping_trainer() -> Any:
    """The Trainer whose loop takes the step; None outside of one."""
    kind = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if not isinstance(kind, type):
        return None
    frame: Any = sys._getframe(2)
    while frame is not None:
        caller = frame.f_locals.get("self") if frame.f_code.co_varnames[:1] == ("self",) else None
        if issubclass(type(caller), kind):
            return caller
        frame = frame.f_back
    return None


def _is_like_its_own(args: Any, optimizer: Optimizer) -> bool:
    """True if all groups have the learning rate of `args`, and its weight decay or none.

    Trainer keeps no note of whether it made its optimizer. One that a user made so has the same fault.
    """
    for group in optimizer.param_groups:
        lr, decay = group.get("initial_lr", group.get("lr")), group.get("weight_decay", 0)
        if lr is None or not math.isclose(lr, args.learning_rate) or decay not in (0, args.weight_decay):
            return False
    return True
