"""`Anchor`: the parameters that all workers hold in common, in a few flat tensors.

Letters: S = elements of all trained parameters of this process.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from dist_ssn.sync.fingerprints import bit_sum
from dist_ssn.sync.trained import Trained


class Anchor:
    """The values from which all workers went on after the last round; each parameter's are a view of one flat tensor per dtype.

    Parameters of 16 bits have an anchor of 32 bits, so that small outer steps are not lost; workers go on from its rounded values.

    Args:
        trained: the parameters, those that a codec packs first.
    """

    def __init__(self, trained: Sequence[Trained]) -> None:
        self.trained = list(trained)
        sizes = [t.values.numel() for t in trained]
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self.size: int = ends[-1]
        """S."""
        self._stretches = [slice(start, end) for start, end in pairwise(ends)]
        packed = sum(size for t, size in zip(trained, sizes, strict=True) if not t.plain)
        self.plain = [slice(packed, self.size)] if packed < self.size else []
        """Stretches of a flat change [S] that travel apart from banks and weights."""
        by_dtype: dict[torch.dtype, list[int]] = {}
        for place, t in enumerate(trained):
            by_dtype.setdefault(torch.float64 if t.values.dtype == torch.float64 else torch.float32, []).append(place)
        self.flats: list[Tensor] = []
        """One flat tensor per dtype."""
        self._views: list[Tensor] = [t.values for t in trained]  # replaced below
        self._places = list(by_dtype.values())
        for dtype, places in by_dtype.items():
            self.flats.append(torch.cat([trained[place].values.reshape(-1).to(dtype) for place in places]))
            parts = self.flats[-1].split([sizes[place] for place in places])
            for place, part in zip(places, parts, strict=True):
                self._views[place] = part.view(trained[place].values.shape)

    def fill(self) -> None:
        """Takes the parameters' current values."""
        for view, t in zip(self._views, self.trained, strict=True):
            view.copy_(t.values)

    def start(self) -> list[Tensor]:
        """The values from which workers go on, in the parameters' own dtypes; where dtypes agree, views of the anchor."""
        return [view.to(t.values.dtype) for view, t in zip(self._views, self.trained, strict=True)]

    def change(self, start: Sequence[Tensor]) -> Tensor:
        """start - current parameters, as float32 [S]."""
        change = torch.empty(self.size, device=self.flats[0].device)
        for begun, t, stretch in zip(start, self.trained, self._stretches, strict=True):
            whole = begun.to(torch.promote_types(begun.dtype, torch.float32))  # 16 bits would round the difference
            change[stretch].view(begun.shape).copy_(whole - t.values)
        return change

    def hand_out(self, progress: Tensor | None = None) -> None:
        """Sets the parameters to the anchor, less a worker's own change [S] that is not in the anchor yet."""
        for view, t, stretch in zip(self._views, self.trained, self._stretches, strict=True):
            t.values.copy_(view if progress is None else view - progress[stretch].view(view.shape))

    def gradients(self, mean: Tensor) -> list[Tensor]:
        """A mean change [S] in the form of `flats`."""
        if len(self.flats) == 1:
            return [mean.to(self.flats[0].dtype)]
        parts = [mean[stretch] for stretch in self._stretches]
        return [
            torch.cat([parts[place] for place in places]).to(flat.dtype)
            for flat, places in zip(self.flats, self._places, strict=True)
        ]

    def fingerprint(self) -> int:
        """Of all bits of the anchor; see `bit_sum`."""
        return bit_sum(self.flats)
