"""`comm_hook`: the codecs as a communication hook of torch's DistributedDataParallel.

Source: https://docs.pytorch.org/docs/stable/ddp_comm_hooks.html
"""

# Trap: no `from __future__ import annotations` here, because DDP compares the hook's annotations with the classes themselves.
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]

from dist_ssn.errors import UserError
from dist_ssn.sync.codecs import SLICE, find_codec
from dist_ssn.sync.exchange import Exchange
from dist_ssn.sync.hook_state import Key, buckets_of, check_numbers
from dist_ssn.sync.routes import check_route
from dist_ssn.sync.transport import GroupTransport, Transport
from dist_ssn.sync.worker import Worker
from dist_ssn.sync.wrapped_by import group_of, name_in, wrappers_of


class CommHookState:
    """State of a hook between steps: for each bucket the gradients that were not sent yet.

    DDP cuts its buckets anew after the first step. A parameter has the number at which the hook first met it, which is the same in
    every process and after every start, and a bucket is the set of its numbers. What was not sent of a bucket that is no more goes
    to the buckets that have its parameters now.

    Args:
        codec: a name in `CODECS`.
        group: the process group that DDP has; None: it is found in the first backward.
        route: one of `routes.ROUTES`.

    Raises:
        UserError: there is no such codec, route or group.
    """

    def __init__(self, codec: str, group: dist.ProcessGroup | None = None, route: str = "auto") -> None:
        self.codec, self.route = find_codec(codec), route
        if group is not None and not isinstance(group, dist.ProcessGroup):
            raise UserError(
                f"group must be a torch.distributed process group that this process is in, or None, got {type(group).__name__}"
            )
        self._given, self._group = group, group
        self._of_group: dict[int, Tensor] = {}  # parameters whose gradients are averaged over it, by id
        check_route(route, self.codec)
        self._worker = Worker()
        self._transport: Transport | None = None
        self._numbers: dict[int, int] = {}  # of parameters, by id
        self._parameters: list[Tensor] = []  # by number; they are held, so that ids stay theirs
        self._exchanges: dict[Key, Exchange] = {}
        self._compared: set[Key] = set()  # before a load, which only some ranks may do
        self._moved: dict[int, Tensor] = {}  # what was not sent of parameters whose bucket is no more
        self._loaded: list[tuple[Key, dict[str, Any]]] = []  # not in use yet
        self._sizes_loaded: dict[int, int] = {}  # by number, until a backward has compared them

    def reduce(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Averages a bucket's gradients over the ranks, beside backward."""
        buffer, parameters = bucket.buffer(), bucket.parameters()
        self._find_group(parameters[0])
        if self.codec.is_exact:
            mean = buffer.div_(dist.get_world_size(self._group))
            work: Any = dist.all_reduce(mean, group=self._group, async_op=True)
            return work.get_future().then(lambda future: future.value()[0])
        if buffer.layout != torch.strided:
            raise UserError(
                f"comm_hook: {_name(parameters[0])} has sparse gradients, which codec {self.codec.name!r} does not take: make its "
                "layer with sparse=False, or take codec 'none'"
            )
        sizes = [_values(parameter) for parameter in parameters]
        if sum(sizes) != buffer.numel():
            raise UserError(
                f"comm_hook: a bucket of {buffer.numel()} values has parameters of {sum(sizes)}, the first is "
                f"{_name(parameters[0])}: take codec 'none'"
            )
        numbers = [self._number(parameter) for parameter in parameters]
        if self._transport is None:
            transport = GroupTransport(self._group)
            # On CUDA the collectives run in order on a stream anyway; on CPU they get a thread and an order of their own.
            self._transport = transport if buffer.is_cuda else transport.twin()
        if self._sizes_loaded:
            self._take_loaded(bucket, numbers, sizes)
        if buffer.is_cuda:
            done: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device])
            done.set_result(self._average(buffer, numbers, sizes))
            return done
        return _torch_future(self._worker.submit(lambda: self._average(buffer, numbers, sizes)))

    def state_dict(self) -> dict[str, Any]:
        """The gradients that this rank has not sent yet, between two steps; each rank saves its own."""
        buckets = [(key, exchange.state_dict()) for key, exchange in self._exchanges.items()]
        return {"codec": self.codec.name, "buckets": buckets + self._loaded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues with what was not sent; a state of another rank, or of another number of ranks, starts at zero and warns.

        Raises:
            CheckpointError: the state is of another codec, or it is damaged; the next backward raises it for a state of another
                model.
        """
        self._loaded = buckets_of(state, self.codec)
        self._sizes_loaded = {number: size for key, _ in self._loaded for number, size in key}
        self._compared |= {key for key, exchange in self._exchanges.items() if exchange.is_compared}
        self._exchanges.clear()
        self._moved.clear()

    def __reduce__(self) -> Any:
        raise UserError("a comm_hook's state cannot be pickled or copied: save its state_dict(), on each rank")

    def _find_group(self, parameter: Tensor) -> None:
        """Finds the process group of the DDP that has this parameter, at the first sight of it."""
        if id(parameter) in self._of_group:
            return
        wrappers = wrappers_of(parameter)
        group = group_of(wrappers, parameter, self._given)
        if self._group is None:
            self._group = group
        elif dist.get_process_group_ranks(group) != dist.get_process_group_ranks(self._group):
            raise UserError("one comm_hook serves models of one process group: make a comm_hook for each model")
        self._of_group |= {id(own): own for own in (parameter, *(own for ddp in wrappers for own in ddp.parameters()))}

    def _number(self, parameter: Tensor) -> int:
        if id(parameter) not in self._numbers:
            self._numbers[id(parameter)] = len(self._parameters)
            self._parameters.append(parameter)
        return self._numbers[id(parameter)]

    def _take_loaded(self, bucket: GradBucket, numbers: Sequence[int], sizes: Sequence[int]) -> None:
        """Compares what was loaded with this bucket, and takes it into use; until the end of the first backward."""
        for parameter, number, size in zip(bucket.parameters(), numbers, sizes, strict=True):
            if self._sizes_loaded.get(number) != size:
                check_numbers(self._sizes_loaded, number, size, _name(parameter))
        while self._loaded:
            old, state = self._loaded.pop()
            self._exchanges[old] = self._made(old)
            self._exchanges[old].load_state_dict(state)
        if bucket.is_last():
            self._sizes_loaded.clear()

    def _average(self, buffer: Tensor, numbers: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Replaces the buffer's gradients by means; parameters are coded in the order of their numbers."""
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        parts = buffer.split(list(sizes))
        exchange = self._exchange_of(tuple((numbers[at], sizes[at]) for at in order), buffer.device)
        mean = exchange.average(torch.cat([parts[at].float() for at in order]))
        for at, part in zip(order, mean.split([sizes[at] for at in order]), strict=True):
            parts[at].copy_(part)
        return buffer

    def _exchange_of(self, key: Key, device: torch.device) -> Exchange:
        if key not in self._exchanges:
            numbers = {number for number, _ in key}
            for old in [old for old in self._exchanges if numbers.intersection(number for number, _ in old)]:
                unsent = self._exchanges.pop(old).unsent().split([size for _, size in old])
                self._moved.update(zip([number for number, _ in old], unsent, strict=True))
            self._exchanges[key] = exchange = self._made(key)
            if self._moved:
                parts = [self._moved.pop(number, torch.zeros(size)).to(device) for number, size in key]
                exchange.add_unsent(torch.cat(parts))
        return self._exchanges[key]

    def _made(self, key: Key) -> Exchange:
        plain, at = [], 0
        for _, size in key:
            if size < SLICE:
                plain.append(slice(at, at + size))
            at += size
        made = Exchange(at, self.codec, group=self._transport, route=self.route, plain=plain, purpose="gradients")
        made.is_compared |= key in self._compared
        return made


def comm_hook(
    codec: str = "int8", *, group: dist.ProcessGroup | None = None, route: str = "auto"
) -> tuple[CommHookState, Callable[[CommHookState, GradBucket], torch.futures.Future[Tensor]]]:
    """A communication hook that sends gradients in a codec, with error feedback: `model.register_comm_hook(*comm_hook("int8"))`.

    Parameters of fewer than 4,096 values have slices of their own, of at least 4 bits. Gradients of any floating-point or
    complex type are coded as float32; with codec "none" they are summed in their own type. All ranks get the same bits.

    With a loss scale, what was not sent keeps the scale at which it was computed.

    Args:
        codec: a name in `dist_ssn.sync.codecs.CODECS`.
        group: the process group that DDP has; None: it is found in the first backward.
        route: see `dist_ssn.sync.routes`.

    Returns:
        (state, hook). `state.state_dict()` and `state.load_state_dict()` are for checkpoints, on each rank.

    Raises:
        UserError: there is no such codec, route or group.
    """
    return CommHookState(codec, group, route), CommHookState.reduce


def _values(parameter: Tensor) -> int:
    """Number of values of a parameter in DDP's bucket, which has complex ones as real and imaginary parts."""
    return parameter.numel() * (2 if parameter.is_complex() else 1)


def _name(parameter: Tensor) -> str:
    return name_in(wrappers_of(parameter), parameter)


def _torch_future(handed: Future) -> torch.futures.Future[Tensor]:
    """The same result as a future of torch; an exception becomes one of its `wait`, also in C++."""
    future: torch.futures.Future[Any] = torch.futures.Future()
    handed.add_done_callback(lambda done: future.set_result(done.exception() or done.result()))

    def result(done: torch.futures.Future[Any]) -> Tensor:
        if isinstance(done.value(), BaseException):
            raise done.value()
        return done.value()

    return future.then(result)
