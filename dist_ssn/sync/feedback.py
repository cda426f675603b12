"""Error feedback: what a codec did not send of a vector is kept, and added to the next one.

    value = change + decay · kept,    sent = decode(encode(value)),    kept = value − sent

A route of two phases encodes the mean of a piece once more; its owner keeps what that loses in the same way.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from dist_ssn.sync.codecs import Codec


class Feedback:
    """The rest of the vectors of one codec that was not sent yet.

    Args:
        codec: the codec; an exact one keeps nothing.

    Attributes:
        kept: float32 of the vector's size; None before the first vector.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.kept: Tensor | None = None

    def encode(self, change: Tensor) -> tuple[Tensor, Tensor]:
        """Encodes `change` with what was kept.

        A value that is not finite is sent, and not kept: it would be in every vector from then on.

        Args:
            change: float32 [n].

        Returns:
            (packed bytes, the values that they decode to).
        """
        if self.codec.is_exact:
            return self.codec.encode(change), change
        value = change
        if self.kept is not None:  # after loading it may be on another device
            value = torch.add(change, self.kept.to(change.device), alpha=self.codec.feedback_decay)
        packed = self.codec.encode(value)
        sent = self.codec.decode(packed, len(value))
        self.kept = (value - sent).nan_to_num_(0, 0, 0)
        return packed, sent


class Lane:
    """Values of a vector that travel in one codec.

    Args:
        codec: the codec.
        ends: where the ranks' pieces begin and end, n + 1 places.
        rank: this rank.
    """

    def __init__(self, codec: Codec, ends: list[int], rank: int) -> None:
        self.codec, self.ends, self.size = codec, ends, ends[-1]
        self.own = slice(ends[rank], ends[rank + 1])
        self.of_values = Feedback(codec)
        self.of_mean = Feedback(codec)

    def pieces(self, packed: Tensor) -> list[Tensor]:
        """The packed bytes of the whole lane, by the rank that owns them."""
        at = [self.codec.packed_bytes(end) for end in self.ends]
        return [packed[a:b] for a, b in pairwise(at)]

    def mean(self, messages: list[Tensor], size: int) -> Tensor:
        """The mean of what the messages decode to, float32 [size], in the order of the ranks."""
        total = messages[0].new_zeros(size, dtype=torch.float32)
        for message in messages:
            total += self.codec.decode(message, size)
        return total.div_(len(messages))

    def unsent(self) -> Tensor:
        """Values that this rank has not sent yet, float32 [size].

        What it kept of its piece's mean counts n times, because a rank's value is an n-th of a mean.
        """
        kept = self.of_values.kept
        found = torch.zeros(self.size) if kept is None else kept.clone()
        if self.of_mean.kept is not None:
            found[self.own] += (len(self.ends) - 1) * self.of_mean.kept.to(found.device)
        return found

    def add_unsent(self, values: Tensor) -> None:
        """Adds float32 [size] to what this rank has not sent yet."""
        if not self.codec.is_exact:
            kept = self.of_values.kept
            self.of_values.kept = values.clone() if kept is None else kept + values.to(kept.device)
