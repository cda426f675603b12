"""Lightning: the bytes that a shared model sends, in Lightning's logs."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from dist_ssn.integrations.step_bytes import StepBytes
from dist_ssn.sharing.group_check import warn_of_groups


class LedgerCallback(Callback):
    """Logs the bytes that this rank sends, every `log_every_n_steps` of the Trainer.

    The figures are "bytes_per_step_logical", "bytes_per_step_ring" and "ring_bytes" (see `StepBytes.figures`). When training
    begins, an optimizer that was made as for a dense model is warned of.

    Attributes:
        bytes: the `StepBytes`; `bytes.meter` is the `CommMeter` of the last training.
    """

    def __init__(self) -> None:
        self.bytes = StepBytes()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins to count."""
        for optimizer in trainer.optimizers:
            warn_of_groups(pl_module, optimizer, "make it from dist_ssn.parameter_groups(model, weight_decay, lr)")
        self.bytes.start(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        """Logs the figures."""
        step = trainer.global_step
        if step and step % trainer.log_every_n_steps == 0:
            pl_module.log_dict({name: float(value) for name, value in self.bytes.figures(step).items()})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Ends counting."""
        self.bytes.stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Ends counting."""
        self.bytes.stop()
