"""`Exchange`: means over ranks, in few bits, with error feedback."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_ssn.comm.meter import waited
from dist_ssn.errors import CheckpointError, UserError
from dist_ssn.sync import routes
from dist_ssn.sync.codecs import Codec, find_codec
from dist_ssn.sync.feedback import Lane
from dist_ssn.sync.transport import GroupTransport, Transport
from dist_ssn.sync.worker import Worker

_CARD = 192
"""Bytes of the sentence by which ranks compare their exchanges."""


class Pending:
    """A mean that is on its way; `wait` gives it, again and again.

    Args:
        future: has the mean.
        collective: row of the ledger that gets the time of waiting.
        purpose: its purpose.
    """

    def __init__(self, future: Future, collective: str, purpose: str) -> None:
        self._future, self._row = future, (collective, purpose)

    def done(self) -> bool:
        """True if `wait` would return at once."""
        return self._future.done()

    def wait(self) -> Tensor:
        """Waits for the mean, float32 [size]; raises what the exchange has raised."""
        if self._future.done():
            return self._future.result()
        began = time.perf_counter()
        try:
            return self._future.result()
        finally:
            waited(*self._row, time.perf_counter() - began)


class Exchange:
    """Averages vectors over the ranks of a group, in a codec, with error feedback.

    All ranks make it with the same arguments, which the first exchange compares, and call it equally often. All get the same bits.
    A value that is not finite reaches all ranks, and is not kept. With one rank nothing is encoded.

    Args:
        size: values of a vector.
        codec: a name in `CODECS`, or a codec.
        group: a torch process group, None for the default one; or a `Transport`.
        route: one of `routes.ROUTES`.
        plain: stretches of the vector, gains, biases and the like, that have slices of their own, of at least 4 bits, in codecs of
            fewer than 16.
        purpose: purpose in the ledger.

    Attributes:
        route: the route that "auto" became.
        packed_bytes: bytes that one rank hands to collectives in an exchange.
        sent_bytes: bytes that one rank must send in an exchange, on average.
        logical_bytes: bytes of the vector in float32.
        is_compared: the ranks have compared their exchanges, as the first one does.

    Raises:
        UserError: an unknown codec or route, or stretches that overlap or leave the vector.
    """

    def __init__(
        self,
        size: int,
        codec: str | Codec = "none",
        *,
        group: dist.ProcessGroup | Transport | None = None,
        route: str = "auto",
        plain: Sequence[slice] = (),
        purpose: str = "synchronization",
    ) -> None:
        self.size, self.codec, self.purpose = size, find_codec(codec), purpose
        if size < 1:
            raise UserError(f"an exchange has at least one value, got size {size}")
        of_torch = group is None or isinstance(group, dist.ProcessGroup)
        self._transport: Transport = GroupTransport(group) if of_torch else group  # pyright: ignore
        self.ranks, self.rank = self._transport.ranks, self._transport.rank
        self._stretches = _stretches(plain, size, smaller=routes.is_smaller(self.codec))
        plain_values = sum(length for length, is_plain in self._stretches if is_plain)
        lanes = routes.lanes_of(self.codec, size, plain_values)
        found = routes.traffic(self.codec, size, plain_values, self.ranks, route)
        self.route, self.packed_bytes, self.sent_bytes = found.route, found.packed_bytes, found.sent_bytes
        self.logical_bytes = 4 * size
        self._lanes = [Lane(kind, routes.cuts(values, self.ranks), self.rank) for kind, values in lanes]
        self._piece_bytes = routes.piece_bytes(lanes, self.ranks)
        self.is_compared = self.ranks == 1
        self._worker: tuple[Worker, Transport] | None = None
        self._pending: Pending | None = None

    def average(self, change: Tensor) -> Tensor:
        """The mean of `change` over the ranks.

        Args:
            change: float32 [size].

        Returns:
            float32 [size], the same bits on all ranks.

        Raises:
            UserError: another type or size, an exchange that is still on its way, or ranks whose exchanges differ.
        """
        self._check(change)
        return self._run(change.detach(), self._transport)

    def start(self, change: Tensor) -> Pending:
        """Begins `average`, which goes on in a thread beside the training; wait for it before the next one.

        The first call makes a process group of its own, for which all processes must call it.

        Args:
            change: float32 [size]; it may be overwritten at once.

        Raises:
            UserError: as `average`.
        """
        self._check(change)
        worker, transport = self.prepare()
        copy = change.detach().clone()
        last = "all_reduce" if self.route == "all-reduce" else "all_gather"
        self._pending = Pending(worker.submit(lambda: self._run(copy, transport)), last, self.purpose)
        return self._pending

    def prepare(self) -> tuple[Worker, Transport]:
        """Makes the thread and the process group of `start`, once; the first call of `start` does so otherwise."""
        if self._worker is None:
            self._worker = Worker(), self._transport.twin()
        return self._worker

    def unsent(self) -> Tensor:
        """Values that this rank has not sent yet, float32 [size]. Summed over the ranks, n times the means so far lack them."""
        self._finish()
        return self._joined([lane.unsent() for lane in self._lanes])

    def add_unsent(self, values: Tensor) -> None:
        """Adds float32 [size] to what this rank has not sent yet; codec "none" ignores it, because it never keeps anything."""
        self._finish()
        for lane, part in zip(self._lanes, self._split(values), strict=True):
            lane.add_unsent(part)

    def forget(self) -> None:
        """Drops what was not sent yet, for values that start anew; waits for an exchange that is on its way."""
        self._finish()
        for lane in self._lanes:
            lane.of_values.kept = lane.of_mean.kept = None

    def state_dict(self) -> dict[str, Any]:
        """The values that this rank has not sent yet; each rank has its own."""
        self._finish()
        kept = [feedback.kept for lane in self._lanes for feedback in (lane.of_values, lane.of_mean)]
        return {**self._facts(), "kept": [None if tensor is None else tensor.clone() for tensor in kept]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues with what was not sent.

        The state of another rank, or of another number of ranks, is what others have to send. With it this rank starts at zero, and
        warns.

        Raises:
            CheckpointError: the state is of another vector or codec, or damaged. Nothing is loaded then.
        """
        self._finish()
        check_feedback(state)
        facts, kept = self._facts(), state["kept"]
        if state["codec"] != self.codec.name:
            raise CheckpointError(
                f"what was not sent yet is of codec {state['codec']!r}, and the codec is {self.codec.name!r} now: give codec "
                f"{state['codec']!r}"
            )
        if state["size"] != self.size:
            raise CheckpointError(
                f"what was not sent yet is of another model: {state['size']} values, and there are {self.size} here"
            )
        if state["plain"] != facts["plain"]:
            raise CheckpointError(
                "what was not sent yet is of another model: its gains, biases and norms have other places or sizes"
            )
        if any(state[name] != facts[name] for name in ("ranks", "rank", "route")):
            warnings.warn(
                f"error feedback starts at zero: the state is of rank {state['rank']} of {state['ranks']} ({state['route']}), "
                f"and this is rank {self.rank} of {self.ranks} ({self.route})",
                stacklevel=2,
            )
            kept = [None] * 2 * len(self._lanes)
        places = [feedback for lane in self._lanes for feedback in (lane.of_values, lane.of_mean)]
        sizes = [size for lane in self._lanes for size in (lane.size, lane.own.stop - lane.own.start)]
        if len(kept) != len(sizes) or not all(map(_is_kept, kept, sizes)):
            raise CheckpointError(
                f"what was not sent yet is damaged: kept must be float32 of {sizes} values, or None each"
            )
        for feedback, tensor in zip(places, kept, strict=True):
            feedback.kept = None if tensor is None else tensor.clone()

    def _facts(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "codec": self.codec.name,
            "route": self.route,
            "plain": list(self._stretches),
            "ranks": self.ranks,
            "rank": self.rank,
        }

    def _check(self, change: Tensor) -> None:
        if change.dtype != torch.float32 or change.shape != (self.size,):
            raise UserError(
                f"an exchange of {self.size} values takes a float32 tensor of shape ({self.size},), not {change.dtype} of "
                f"{tuple(change.shape)}"
            )
        if self._pending is not None and not self._pending.done():
            raise UserError("an exchange is on its way: call wait() of what start() returned before the next one")

    def _finish(self) -> None:
        if self._pending is not None:
            self._pending.wait()

    @torch.no_grad()
    def _run(self, change: Tensor, transport: Transport) -> Tensor:
        if self.ranks == 1:
            return change.clone()
        if not self.is_compared:
            self._compare(transport, change.device)
        if self.route == "all-reduce":
            return transport.all_reduce(change.clone(), self.purpose).div_(self.ranks)
        parts = zip(self._lanes, self._split(change), strict=True)
        packed = [lane.of_values.encode(part)[0] for lane, part in parts]
        by_route = self._gathered if self.route == "all-gather" else self._in_two_phases
        return self._joined(by_route(packed, transport))

    def _gathered(self, packed: list[Tensor], transport: Transport) -> list[Tensor]:
        """The means of the lanes, from everybody's messages."""
        found = transport.all_gather(torch.cat(packed), self.purpose)
        sizes = [len(part) for part in packed]
        messages = [row.split(sizes) for row in found]
        return [lane.mean([message[at] for message in messages], lane.size) for at, lane in enumerate(self._lanes)]

    def _in_two_phases(self, packed: list[Tensor], transport: Transport) -> list[Tensor]:
        """The means of the lanes, each piece from its owner."""
        by_owner = zip(*(lane.pieces(part) for lane, part in zip(self._lanes, packed, strict=True)), strict=True)
        outgoing = torch.cat([part for parts in by_owner for part in parts])
        found = transport.all_to_all(outgoing, [sum(sizes) for sizes in self._piece_bytes], self.purpose)
        messages = [row.split(self._piece_bytes[self.rank]) for row in found]
        answer = outgoing.new_zeros(max(map(sum, self._piece_bytes)))
        at = 0
        for place, lane in enumerate(self._lanes):
            mean = lane.mean([message[place] for message in messages], lane.own.stop - lane.own.start)
            coded, _ = lane.of_mean.encode(mean)
            answer[at : (at := at + len(coded))] = coded
        rows = transport.all_gather(answer, self.purpose)
        answers = [row[: sum(sizes)].split(sizes) for row, sizes in zip(rows, self._piece_bytes, strict=True)]
        return [
            lane.codec.decode(torch.cat([parts[place] for parts in answers]), lane.size)
            for place, lane in enumerate(self._lanes)
        ]

    def _split(self, values: Tensor) -> list[Tensor]:
        """The values of each lane: most, and those that travel apart."""
        if len(self._stretches) == 1:
            return [values, values[:0]] if not self._stretches[0][1] else [values[:0], values]
        parts = values.split([length for length, _ in self._stretches])
        pairs = list(zip(parts, self._stretches, strict=True))
        return [
            torch.cat([values[:0], *(part for part, (_, plain) in pairs if plain == lane)]) for lane in (False, True)
        ]

    def _joined(self, lanes: list[Tensor]) -> Tensor:
        """The inverse of `_split`."""
        rest = [
            iter(values.split([length for length, plain in self._stretches if plain == lane]))
            for lane, values in zip((False, True), lanes, strict=True)
        ]
        return torch.cat([next(rest[plain]) for _, plain in self._stretches])

    def _compare(self, transport: Transport, device: torch.device) -> None:
        """Compares the ranks' exchanges before their bytes would meet.

        Raises:
            UserError: they differ; raised on all ranks.
        """
        plain = hashlib.sha256(repr(self._stretches).encode()).hexdigest()[:8]
        card = f"{self.size} values, codec {self.codec.name!r}, route {self.route!r}, stretches {plain}"
        own = torch.frombuffer(bytearray(card.encode()[:_CARD].ljust(_CARD)), dtype=torch.uint8)
        found = transport.all_gather(own.to(device), "initialization")
        texts = [bytes(row.tolist()).decode(errors="replace").strip() for row in found]
        for rank, text in enumerate(texts):
            if text != texts[0]:
                raise UserError(f"the ranks' exchanges differ: rank 0 has {texts[0]}, and rank {rank} has {text}")
        self.is_compared = True


def check_feedback(state: object) -> None:
    """Checks that this is a state of an exchange, whatever it is of.

    Raises:
        CheckpointError: it is something else.
    """
    if not isinstance(state, Mapping) or not isinstance(state.get("kept"), list):
        raise CheckpointError("what was not sent yet is damaged: it must be the state_dict() of an exchange")
    if missing := [name for name in ("size", "codec", "route", "plain", "ranks", "rank") if name not in state]:
        raise CheckpointError(f"what was not sent yet is damaged: it has no {missing[0]}")


def _is_kept(kept: object, size: int) -> bool:
    return kept is None or (isinstance(kept, Tensor) and kept.dtype == torch.float32 and kept.shape == (size,))


def _stretches(plain: Sequence[slice], size: int, smaller: bool) -> list[tuple[int, bool]]:
    """The vector as stretches in order: (values, True if they travel apart).

    Args:
        plain: the stretches that travel apart.
        size: values of the vector.
        smaller: the codec has fewer than 16 bits per value; else all values travel together.

    Raises:
        UserError: stretches overlap or leave the vector.
    """
    found: list[tuple[int, bool]] = []
    at = 0
    for place in sorted(plain, key=lambda place: place.start or 0):
        start, stop = place.start or 0, size if place.stop is None else place.stop
        if place.step not in (None, 1) or not at <= start <= stop <= size:
            raise UserError(f"plain {place} overlaps another, leaves a vector of {size} values, or has a step")
        found += [(start - at, False), (stop - start, True)]
        at = stop
    found = [stretch for stretch in (*found, (size - at, False)) if stretch[0]]
    return found if smaller else [(size, False)]
