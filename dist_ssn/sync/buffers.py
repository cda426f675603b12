"""The model's buffers, such as the running statistics of batch norms: local in rounds, averaged at `synchronize`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_ssn.sharing.bank import banks_of
from dist_ssn.sync.reports import Workers


class Buffers:
    """Averages the floating-point buffers over all workers, in 32 bits.

    What is averaged is their change, so that a buffer that nobody changed keeps its bits. A worker whose buffers are not finite is
    left out, and gets the others' mean.

    Args:
        model: its buffers are equal on all workers now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.base = {name: buffer.detach().clone() for name, buffer in self._current().items()}
        """Values after the last average, by name."""

    def _current(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self._own_buffers().items() if buffer.is_floating_point()}

    def _counters(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self._own_buffers().items() if not buffer.is_floating_point()}

    def _own_buffers(self) -> dict[str, Tensor]:
        """This process's buffers but the banks' fixed ones, which never change."""
        fixed = {id(buffer) for bank in banks_of(self._model) for buffer in bank.fixed_buffers()}
        return {
            name: buffer
            for name, buffer in self._model.named_buffers()
            if not isinstance(buffer, DTensor) and id(buffer) not in fixed
        }

    def problem(self) -> str | None:
        """The reason why they cannot be averaged; None if they can."""
        current = self._current()
        if current.keys() != self.base.keys():
            name = min(current.keys() ^ self.base.keys())
            return f"the buffer {name} came or went after local updates began: make LocalUpdates after the model is complete"
        for name, buffer in current.items():
            if buffer.shape != self.base[name].shape:
                return (
                    f"the buffer {name} had the shape {tuple(self.base[name].shape)} when local updates began and has "
                    f"{tuple(buffer.shape)} now: workers cannot average it"
                )
        return None

    def restart(self, base: Mapping[str, Tensor]) -> None:
        """Sets buffers to the values of an earlier average."""
        self.put(base)
        self.base |= {name: value.to(self.base[name], copy=True) for name, value in base.items() if name in self.base}

    def own(self) -> dict[str, Tensor]:
        """Copies of the buffers that have changed since the last average, by name."""
        return {
            name: buffer.detach().clone()
            for name, buffer in self._current().items()
            if not torch.equal(buffer, self.base[name])
        }

    def counters(self) -> dict[str, Tensor]:
        """Copies of the buffers that are not averaged, such as the number of batches that a norm has seen, by name."""
        return {name: buffer.detach().clone() for name, buffer in self._counters().items()}

    def put_counters(self, values: Mapping[str, Tensor]) -> None:
        """Sets those of the buffers that are not averaged; other names are left alone."""
        for name, buffer in self._counters().items():
            if name in values and values[name].shape == buffer.shape:
                buffer.copy_(values[name])

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Sets buffers to these values, by name; others keep theirs."""
        current = self._current()
        for name, value in values.items():
            if name in current:
                current[name].copy_(value)

    def mean(self, workers: Workers) -> dict[str, Tensor]:
        """The mean over all workers, by name; one all-reduce, none if there is nothing to average."""
        current = self._current()
        if not current or (workers.count == 1 and workers.island is None):
            return {name: buffer.detach().clone() for name, buffer in current.items()}
        # inf - inf is not a number, so unchanged elements are left out before the difference is used.
        changes = [
            torch.where(buffer == self.base[name], 0, buffer - self.base[name]).float()
            for name, buffer in current.items()
        ]
        flat = torch.cat([change.reshape(-1) for change in changes])
        counted = flat.isfinite().all()
        flat = torch.cat([torch.where(counted, flat, 0), counted.reshape(1).float()])
        if workers.island is not None:
            dist.all_reduce(flat, group=workers.island)
        if workers.count > 1:
            dist.all_reduce(flat, group=workers.group)
        means = (flat[:-1] / flat[-1].clamp(min=1)).split([change.numel() for change in changes])
        found = {}
        for name, part in zip(current, means, strict=True):
            base = self.base[name]
            part = part.view_as(base).to(base.dtype)
            found[name] = torch.where(part == 0, base, base + part)
        return found

    def average(self, workers: Workers) -> None:
        """Sets all buffers to their mean."""
        self.base = self.mean(workers)
        self.put(self.base)
