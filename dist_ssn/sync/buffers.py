"""The model's buffers, such as the running statistics of batch norms: local in rounds, averaged at `synchronize`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_ssn.sharing.bank import banks_of
from dist_ssn.sync.fingerprints import bit_sum, halves
from dist_ssn.sync.reports import Workers


def is_averaged(buffer: Tensor) -> bool:
    """True for a floating-point buffer but those of 8 bits, which are packed weights and have no arithmetic."""
    return buffer.is_floating_point() and buffer.element_size() > 1


class Buffers:
    """Averages the floating-point buffers over all workers, in 32 bits.

    What is averaged is their change, so that a buffer that nobody changed keeps its bits. An element that was not finite has no
    change: its mean is that of the values that are finite now. A worker's buffer that has become not finite is left out, with a
    warning, and gets the others' mean; one that is so on all workers alike stays.

    Args:
        model: its buffers are equal on all workers now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.base = {name: buffer.detach().clone() for name, buffer in self._current().items()}
        """Values after the last average, by name."""

    def _current(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self._own_buffers().items() if is_averaged(buffer)}

    def _counters(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self._own_buffers().items() if not is_averaged(buffer)}

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
                    f"{tuple(buffer.shape)} now: give it its last shape before LocalUpdates is made (by a forward of the longest "
                    "input), or keep it in an attribute that is no buffer"
                )
        return None

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
                with torch.inference_mode(current[name].is_inference()):
                    current[name].copy_(value)

    def mean(self, workers: Workers) -> dict[str, Tensor]:
        """The mean over all workers, by name; one all-reduce, none if there is nothing to average."""
        current = self._current()
        if not current or (workers.count == 1 and workers.island is None):
            return {name: buffer.detach().clone() for name, buffer in current.items()}
        parts = [_part(buffer, self.base[name]) for name, buffer in current.items()]
        all_count = torch.stack([part.counts for part in parts]).all()
        flat = torch.cat([*(part.values for part in parts), all_count.reshape(1).float()])
        if workers.island is not None:
            dist.all_reduce(flat, group=workers.island)
        if workers.count > 1:
            dist.all_reduce(flat, group=workers.group)
        processes = workers.count * (1 if workers.island is None else dist.get_world_size(workers.island))
        shares = [1.0] * len(parts)
        if flat[-1] < processes:
            shares = _shares(current, parts, workers)
        totals = flat[:-1].split([part.values.numel() for part in parts])
        return {
            name: buffer.detach().clone() if share is None else _mean(total, self.base[name], processes * share)
            for (name, buffer), total, share in zip(current.items(), totals, shares, strict=True)
        }

    def average(self, workers: Workers) -> None:
        """Sets all buffers to their mean."""
        self.base = self.mean(workers)
        self.put(self.base)


class _Part(NamedTuple):
    """What one process adds to the mean of a buffer of S elements, K of which have no finite base.

    Args:
        counts: bool; the buffer is finite, where its base is.
        values: float32 [S + K], zeros if it does not count: the changes, or the values themselves where the base is not finite; and
            1 for each of the K that is finite now.
    """

    counts: Tensor
    values: Tensor


def _part(buffer: Tensor, base: Tensor) -> _Part:
    buffer, base = buffer.reshape(-1), base.reshape(-1)
    begun = base.isfinite()
    change = torch.where(buffer == base, 0, buffer - torch.where(begun, base, 0)).float()
    finite = change.isfinite()
    counts = (finite | ~begun).all()
    arrived = (counts & buffer.isfinite())[~begun]
    return _Part(counts, torch.cat([torch.where(counts & finite, change, 0), arrived]))


def _mean(total: Tensor, base: Tensor, counted: float) -> Tensor:
    """The mean of a buffer; an element that no process has finite keeps its base.

    Args:
        total: sum of the processes' values; see `_Part`.
        base: of the buffer.
        counted: number of processes that count.
    """
    old, begun = base.reshape(-1), base.isfinite().reshape(-1)
    changes, arrived = total.split([old.numel(), total.numel() - old.numel()])
    change = (changes / max(counted, 1)).to(base.dtype)
    found = torch.where(change == 0, old, old + change)
    values = (changes[~begun] / arrived.clamp(min=1)).to(base.dtype)
    found[~begun] = torch.where(arrived > 0, values, old[~begun])
    return found.view_as(base)


def _shares(buffers: Mapping[str, Tensor], parts: Sequence[_Part], workers: Workers) -> list[float | None]:
    """The share of the processes that count, for each buffer; warns of those that do not.

    Returns:
        None for a buffer that is not finite anywhere and has the same bits on all workers.
    """
    mine = [(float(p.counts), *halves(bit_sum([b]))) for b, p in zip(buffers.values(), parts, strict=True)]
    rows = torch.tensor(workers.gather([value for of_buffer in mine for value in of_buffer]), dtype=torch.float64)
    shares: list[float | None] = []
    for name, of_name in zip(buffers, rows.view(workers.count, -1, 3).unbind(1), strict=True):
        share = float(of_name[:, 0].mean())
        if share == 0 and (of_name == of_name[0]).all():
            shares.append(None)
            continue
        shares.append(share)
        if ranks := [str(rank) for rank, row in zip(workers.ranks, of_name, strict=True) if row[0] < 1]:
            end = "gets the others' mean" if share else "goes back to its last mean"
            warnings.warn(
                f"the buffer {name} on rank {', '.join(ranks)} is not finite: it is left out, and {end}", stacklevel=2
            )
    return shares
