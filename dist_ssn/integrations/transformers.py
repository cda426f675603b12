"""`transformers.Trainer`: the optimizer that a shared model needs, and the bytes that it sends in Trainer's logs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from dist_ssn.errors import UserError
from dist_ssn.integrations.step_bytes import StepBytes
from dist_ssn.sharing.group_check import scales_with_uses, warn_of_groups
from dist_ssn.sharing.optimizer_groups import parameter_groups

_OWN_GROUPS = ("params", "model", "optimizer_dict")
"""Arguments by which Trainer tells that an optimizer makes its own groups."""


def create_optimizer(model: nn.Module, args: TrainingArguments) -> torch.optim.Optimizer:
    """The optimizer that `args` ask for, with the groups of `dist_ssn.parameter_groups`.

    Trainer's own optimizer lets gains decay and gives banks the learning rate of a dense weight. Pass this one to
    `Trainer(optimizers=(create_optimizer(model, args), None))`; the scheduler is then Trainer's, and scales all groups alike. With
    FSDP or DeepSpeed, where Trainer takes no optimizer, call it from an override of `Trainer.create_optimizer`.

    Args:
        model: shared or dense.
        args: `learning_rate` is the dense model's; `weight_decay`, `optim`, `optim_args` and Adam's options are used, too.

    Raises:
        UserError: the optimizer of `args.optim` makes its own groups.
    """
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)  # pyright: ignore[reportArgumentType]
    if (
        not isinstance(kind, type)
        or not issubclass(kind, torch.optim.Optimizer)
        or any(k in options for k in _OWN_GROUPS)
    ):
        raise UserError(
            f"optim={args.optim!s} makes its own parameter groups, in which a bank has no place: take one that accepts groups, "
            'such as optim="adamw_torch"'
        )
    lr = args.learning_rate if scales_with_uses(kind.__name__) else None
    return kind(parameter_groups(model, weight_decay=args.weight_decay, lr=lr), **options)


class LedgerCallback(TrainerCallback):
    """Adds the bytes that this rank sends to Trainer's logs; `add_ledger` puts it where W&B and the console see them.

    The logs of the loss get "bytes_per_step_logical", "bytes_per_step_ring" and "ring_bytes" (see `StepBytes.figures`). When
    training begins, an optimizer that was made as for a dense model is warned of.

    Attributes:
        bytes: the `StepBytes`; `bytes.meter` is the `CommMeter` of the last training.
    """

    def __init__(self) -> None:
        self.bytes = StepBytes()
        self._is_first = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins to count."""
        warn_of_groups(
            kwargs["model"],
            kwargs.get("optimizer"),
            "give Trainer optimizers=(create_optimizer(model, args), None)",
            lr=getattr(args, "learning_rate", None),
        )
        if args.report_to and not self._is_first:
            raise UserError(
                f"LedgerCallback in callbacks= runs after {', '.join(args.report_to)}, which would not see its figures: make the "
                "Trainer without it, and call add_ledger(trainer)"
            )
        self.bytes.start(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Adds the figures to what is logged, and to `state.log_history`."""
        if logs is None or "loss" not in logs:
            return
        figures = self.bytes.figures(state.global_step)
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends counting."""
        self.bytes.stop()


def add_ledger(trainer: Trainer) -> LedgerCallback:
    """Adds a `LedgerCallback` to a Trainer, before all others, so that each of them sees its figures."""
    callback = LedgerCallback()
    callback._is_first = True
    trainer.callback_handler.callbacks.insert(0, callback)
    return callback
