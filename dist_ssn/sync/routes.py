"""Ways of packed bytes: the routes of an exchange, their bytes, and the choice between them. Pure arithmetic.

- all-reduce: float32, summed by the network's own all-reduce (codec "none" alone).
- all-gather: every rank gets every rank's message. One round; the mean is not encoded again. Its bytes grow with the ranks.
- two-phase: each rank owns a piece. It gets the others' parts of its piece, averages them, encodes the mean, and sends it to all.
  Two rounds; the bytes hardly depend on the number of ranks.

A vector has lanes, (codec, number of values) each, with slices of their own: most values are in the first; gains, biases and norms
in the second.

Letter: n = ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_ssn.comm.ledger import RING_BYTES
from dist_ssn.errors import UserError, unknown_choice
from dist_ssn.sync.codecs import CODECS, SLICE, Codec

ROUTES = ("auto", "all-gather", "all-reduce", "two-phase")

ROUND_BYTES = 65_536
"""Bytes that take as long as one more round: 5 ms at 100 Mbit/s."""

LEAST = CODECS["int4"]
"""Codec of gains, coefficients, biases and norms, where the others' has fewer bits."""

Lanes = Sequence[tuple[Codec, int]]


@dataclass(frozen=True)
class Traffic:
    """Traffic of one rank in an exchange.

    Args:
        route: the route that "auto" became.
        handed: collective → bytes that the rank hands to it.
        sent_bytes: bytes that the rank must send, on average.
    """

    route: str
    handed: dict[str, int]
    sent_bytes: float

    @property
    def packed_bytes(self) -> int:
        """Bytes that the rank hands to collectives."""
        return sum(self.handed.values())


def traffic(codec: Codec, values: int, plain: int, ranks: int, route: str = "auto") -> Traffic:
    """An exchange's bytes.

    Args:
        codec: the exchange's.
        values: size of the vector.
        plain: values of it that travel apart: see `lanes_of`.
        ranks: n.
        route: one of `ROUTES`.

    Raises:
        UserError: see `check_route`.
    """
    lanes = lanes_of(codec, values, plain)
    chosen = choose_route(route, lanes, ranks)
    return Traffic(chosen, handed_bytes(chosen, lanes, ranks), sent_bytes(chosen, lanes, ranks))


def lanes_of(codec: Codec, values: int, plain: int) -> list[tuple[Codec, int]]:
    """The lanes of a vector; arguments as in `traffic`.

    A codec with scales has slices of its own for the plain values, whose size is another than that of weights. They have at least
    four bits: sent as sparsely as the bank, they cost 8 % of an LSTM's loss (docs/results/ladder.md).
    """
    apart = plain if is_smaller(codec) else 0
    return [(codec, values - apart), (LEAST if codec.is_rough else codec, apart)]


def is_smaller(codec: Codec) -> bool:
    """True if the codec has fewer than 16 bits per value, so that gains, biases and norms have a lane of their own."""
    return codec.packed_bytes(2**16) < 2 * 2**16


def cuts(size: int, ranks: int) -> list[int]:
    """The n + 1 borders of a lane's pieces, which are as equal as whole slices allow.

    Args:
        size: values of the lane.
        ranks: n.
    """
    slices = -(-size // SLICE)
    return [min(size, SLICE * (rank * slices // ranks)) for rank in range(ranks + 1)]


def piece_bytes(lanes: Lanes, ranks: int) -> list[list[int]]:
    """Packed bytes of the piece that each rank owns, by rank and lane."""
    by_lane = []
    for codec, size in lanes:
        ends = cuts(size, ranks)
        by_lane.append([codec.packed_bytes(ends[rank + 1] - ends[rank]) for rank in range(ranks)])
    return [list(sizes) for sizes in zip(*by_lane, strict=True)]


def handed_bytes(route: str, lanes: Lanes, ranks: int) -> dict[str, int]:
    """Collective → bytes that one rank hands to it in an exchange.

    Args:
        route: a route other than "auto".
        lanes: (codec, number of values) each.
        ranks: n.
    """
    if ranks == 1:
        return {}
    whole = sum(codec.packed_bytes(size) for codec, size in lanes)
    if route == "two-phase":
        return {"all_to_all": whole, "all_gather": max(map(sum, piece_bytes(lanes, ranks)))}
    return {route.replace("-", "_"): whole}


def sent_bytes(route: str, lanes: Lanes, ranks: int) -> float:
    """Bytes that a rank must send, on average; arguments as in `handed_bytes`."""
    handed = handed_bytes(route, lanes, ranks)
    return sum(RING_BYTES[collective](payload, ranks) for collective, payload in handed.items())


def check_route(route: str, codec: Codec) -> None:
    """Checks a route before anything starts.

    Raises:
        UserError: the route is unknown, or all-reduce is asked for with a codec whose bytes cannot be summed.
    """
    if route not in ROUTES:
        raise UserError(unknown_choice("route", str(route), ROUTES))
    if route == "all-reduce" and not codec.is_exact:
        raise UserError(f"route 'all-reduce' goes with codec 'none' only: bytes of {codec.name!r} cannot be summed")


def choose_route(route: str, lanes: Lanes, ranks: int) -> str:
    """The route that "auto" stands for; any other is checked.

    "auto" is all-reduce for codec "none", and all-gather for sparse codecs, because a mean is less sparse than its summands. Else
    it is two-phase where that sends less than all-gather by more than `ROUND_BYTES`, so never for two ranks.

    Args:
        route: one of `ROUTES`.
        lanes: as in `handed_bytes`; the first one has the exchange's codec.
        ranks: n.

    Raises:
        UserError: see `check_route`.
    """
    codec = lanes[0][0]
    check_route(route, codec)
    if route != "auto":
        return route
    if codec.is_exact:
        return "all-reduce"
    if codec.is_sparse:
        return "all-gather"
    gathered, phased = (sent_bytes(name, lanes, ranks) for name in ("all-gather", "two-phase"))
    return "two-phase" if gathered - phased > ROUND_BYTES else "all-gather"
