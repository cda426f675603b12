"""The exchange of `dist_ssn.sync`, of all workers in one process: the same codecs, error feedback, routes and bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_ssn.sync import routes
from dist_ssn.sync.codecs import find_codec
from dist_ssn.sync.feedback import Lane


class SimulatedExchange:
    """Averages one vector of each worker, as `dist_ssn.sync.exchange.Exchange` does over processes.

    Args:
        size: Values of a vector, P.
        packed: Number of first values that are in the codec; the others travel in `small`, if the codec has fewer than 16 bits.
        codec: A name in CODECS.
        workers: Number of workers, n.
        small: A name in CODECS, for gains, coefficients, biases and norms; None: as `dist_ssn.sync` has it.

    Attributes:
        handed_bytes: Bytes that one worker hands to collectives in an exchange.
        sent_bytes: Bytes that one worker must send in an exchange, on average.
    """

    def __init__(self, size: int, packed: int, codec: str, workers: int, small: str | None = None) -> None:
        lanes = routes.lanes_of(find_codec(codec), size, size - packed)
        if small is not None:
            lanes[1] = (find_codec(small), lanes[1][1])
        self._sizes = [values for _, values in lanes]
        self.route = routes.choose_route("auto", lanes, workers)
        self.handed_bytes = sum(routes.handed_bytes(self.route, lanes, workers).values())
        self.sent_bytes = routes.sent_bytes(self.route, lanes, workers)
        ends = [(codec, routes.cuts(values, workers)) for codec, values in lanes]
        self._lanes = [[Lane(codec, cuts, rank) for codec, cuts in ends] for rank in range(workers)]

    @torch.no_grad()
    def average(self, vectors: Sequence[Tensor]) -> Tensor:
        """The mean [P] of the workers' vectors, float32 [P] each, as all of them receive it."""
        if self.route == "all-reduce":
            return torch.stack(list(vectors)).mean(0)
        parts = [vector.split(self._sizes) for vector in vectors]
        return torch.cat(
            [self._lane([lanes[at] for lanes in self._lanes], [part[at] for part in parts]) for at in (0, 1)]
        )

    def _lane(self, lanes: Sequence[Lane], values: Sequence[Tensor]) -> Tensor:
        """The mean of one lane's values; `lanes` are those of the workers."""
        packed = [lane.of_values.encode(part)[0] for lane, part in zip(lanes, values, strict=True)]
        if self.route == "all-gather":
            return lanes[0].mean(packed, lanes[0].size)
        by_owner = zip(*(lane.pieces(message) for lane, message in zip(lanes, packed, strict=True)), strict=True)
        means = []
        for owner, messages in zip(lanes, by_owner, strict=True):
            mean = owner.mean(list(messages), owner.own.stop - owner.own.start)
            means.append(owner.of_mean.encode(mean)[1])
        return torch.cat(means)
