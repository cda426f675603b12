"""Counter of every collective of torch.distributed, including those that DDP's C++ reducer issues.

Each call of a collective, from Python or C++, goes through one operator of PyTorch's dispatcher (`c10d::allreduce_` and
its siblings). The meter registers a kernel for these operators under the key `BackendSelect`, which is part of every
call and sits directly above the backend's own kernel: the kernel records the bytes and passes the call on. So the meter may be
entered before or after the process group or DDP is made, and counts any process group, any backend and any thread. Collectives
that never reach the dispatcher (a process group written in Python, mpi4py) are not seen: their callers call `book(...)`.

Purposes of collectives outside of `with purpose(...)`:
- in backward, and on threads of the backend (which run the later rounds of a communication hook): gradients, except
  DDP's all-reduce of an int32 map of the unused parameters, which is "other" and comes with find_unused_parameters;
- in DDP's constructor (broadcast of parameters and buffers, comparison of the shapes), and when DDP sends the other
  ranks its new buckets before the second step: initialization;
- when DDP broadcasts buffers before a forward: buffers;
- when FSDP2 gathers parameters, before a forward or for a backward: parameters;
- else: other.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from dist_ssn.comm import in_flight
from dist_ssn.comm.ledger import Ledger, Row, Totals, check_purpose
from dist_ssn.errors import UserError
from dist_ssn.torch_private import (
    DDP_METHODS,
    DDP_SOURCE,
    END_OF_BACKWARD,
    FSDP_COLLECTIVES,
    at_end_of_backward,
    graph_task_id,
)

# operator -> (the collective's name in the ledger, the argument that holds this rank's input)
OPERATORS: dict[str, tuple[str, str | None]] = {
    "allreduce_": ("all_reduce", "tensors"),
    "allreduce_coalesced_": ("all_reduce", "tensors"),
    "broadcast_": ("broadcast", "tensors"),
    "reduce_": ("reduce", "tensors"),
    "allgather_": ("all_gather", "input_tensors"),
    "_allgather_base_": ("all_gather", "input_tensor"),
    "allgather_coalesced_": ("all_gather", "input_list"),
    "allgather_into_tensor_coalesced_": ("all_gather", "inputs"),
    "reduce_scatter_": ("reduce_scatter", "input_tensors"),
    "_reduce_scatter_base_": ("reduce_scatter", "input_tensor"),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", "inputs"),
    "gather_": ("gather", "input_tensors"),
    "gather_into_tensor_": ("gather", "input_tensor"),  # from torch 2.14 on
    "scatter_": ("scatter", "input_tensors"),
    "alltoall_": ("all_to_all", "input_tensors"),
    "alltoall_base_": ("all_to_all", "input"),
    "send": ("send", "tensors"),
    "recv_": ("recv", None),
    "recv_any_source_": ("recv", None),
    "barrier": ("barrier", None),
    "monitored_barrier_": ("barrier", None),
}

_lock = threading.Lock()
_library: torch.library.Library | None = None
_meters: tuple[CommMeter, ...] = ()
_scopes: dict[int, tuple[str, ...]] = {}  # thread -> purposes, the innermost last
_waits: set[int] = set()  # backward's graph tasks whose wait at the end is being measured
_beside: set[int] = set()  # threads whose collectives nobody waits for here


@contextmanager
def purpose(name: str) -> Iterator[None]:
    """Attributes the collectives that this thread issues inside to `name`, in every active meter.

    Backward on a CUDA device runs on a thread of autograd. There, the purpose set by the thread that entered the meter
    applies.

    Raises:
        UserError: the name is not in PURPOSES.
    """
    check_purpose(name)
    thread = threading.get_ident()
    outer = _scopes.get(thread, ())
    _scopes[thread] = (*outer, name)
    try:
        yield
    finally:
        if outer:
            _scopes[thread] = outer
        else:
            # A thread's id is used again: leave nothing behind for the next thread.
            del _scopes[thread]


def book(collective: str, purpose: str, payload: int, process_group_size: int, *, exposed: float | None = None) -> None:
    """Books a collective that the meters cannot see, in every active meter.

    Args:
        collective: as in `Ledger.add`.
        purpose: as in `Ledger.add`.
        payload: bytes, as in `Ledger.add`.
        process_group_size: as in `Ledger.add`.
        exposed: seconds that the caller has waited; None if unknown.

    Raises:
        UserError: the collective or the purpose is unknown.
    """
    for meter in _meters:
        row = meter.ledger.add(collective, purpose, payload, process_group_size, exposed=exposed is not None)
        meter.ledger.add_times(row, exposed=exposed or 0.0)


class CommMeter:
    """Counts the bytes of every collective that this rank issues inside of `with CommMeter() as meter:`.

    Without torch.distributed, or in one process, it counts zero. Meters may be nested; each has its own ledger. A meter
    costs some 0.04 ms per collective, and adds no synchronization. A thread of the backend books an operation's seconds,
    possibly an instant after the caller goes on; leaving the block waits until every completed operation is booked.
    """

    def __init__(self) -> None:
        self.ledger = Ledger()
        self._thread = threading.get_ident()
        self._unbooked: set[torch.futures.Future] = set()  # of operations whose seconds are not in the ledger yet

    def __enter__(self) -> CommMeter:
        global _meters
        if dist.is_available():
            _install()
        with _lock:
            if self in _meters:
                raise UserError("this CommMeter is counting already: leave its `with` block first, or make another")
            self._thread = threading.get_ident()
            _meters = (*_meters, self)
        return self

    def __exit__(self, *exception: object) -> None:
        global _meters
        with _lock:
            _meters = tuple(meter for meter in _meters if meter is not self)
        # Completed operations will be booked in an instant. The others may never complete, and are not waited for.
        give_up = time.monotonic() + 1
        while any(future.done() for future in tuple(self._unbooked)) and time.monotonic() < give_up:
            time.sleep(1e-4)

    def purpose(self, name: str) -> AbstractContextManager[None]:
        """Attributes the collectives inside to `name`, as the module's `purpose` does."""
        return purpose(name)

    def totals(self, purpose: str | None = None) -> Totals:
        """The ledger's totals, for one purpose or for everything."""
        return self.ledger.totals(purpose)

    def report(self) -> str:
        """One line: total bytes and operations, then each purpose's share."""
        total = self.ledger.totals()
        parts: dict[str, float] = {}
        for row in self.ledger.rows():
            parts[row["purpose"]] = parts.get(row["purpose"], 0) + row["logical_bytes"]
        line = f"{total.operations} collectives, {_human(total.logical_bytes)} logical, {_human(total.ring_bytes)} ring"
        if total.operations and total.seconds is not None:
            line += f", {total.seconds:.3f} s"
        if total.operations and total.exposed_seconds is not None:
            line += f" ({total.exposed_seconds:.3f} s waited)"
        if parts:
            line += ": " + ", ".join(f"{name} {_human(size)}" for name, size in parts.items())
        return line


def _human(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} GB"


def waited(collective: str, purpose: str, seconds: float) -> None:
    """Books, in every active meter, seconds in which this thread waited for collectives that another one had issued `beside` it."""
    for meter in _meters:
        meter.ledger.add_wait(collective, purpose, seconds)


@contextmanager
def beside() -> Iterator[None]:
    """Marks the collectives that this thread issues inside as travelling beside the training; who waits for them calls `waited`."""
    thread = threading.get_ident()
    _beside.add(thread)
    try:
        yield
    finally:
        _beside.discard(thread)


def _nbytes(value: Any) -> int:
    """Bytes of a tensor or of nested lists of tensors; a sparse tensor counts its indices and values."""
    if isinstance(value, (list, tuple)):
        return sum(map(_nbytes, value))
    if value.is_sparse:
        return value._indices().nbytes + value._values().nbytes
    return value.numel() * value.element_size()


def _first(value: Any) -> torch.Tensor | None:
    while isinstance(value, (list, tuple)):
        if not value:
            return None
        value = value[0]
    return value


def _install() -> None:
    """Registers the counting kernels, once per process.

    They stay registered: removing a kernel while another thread is inside it is not safe. Without an active meter
    they only pass the call on. The names of the operators are internal to PyTorch (tried with 2.8 to 2.14): a test fails when
    PyTorch has one that OPERATORS lacks.
    """
    global _library
    with _lock:
        if _library is None:
            library = torch.library.Library("c10d", "IMPL")
            for name in OPERATORS:
                if hasattr(torch.ops.c10d, name):
                    library.impl(name, _kernel(name), "BackendSelect", with_keyset=True)
            _library = library


def _kernel(name: str) -> Callable[..., Any]:
    operator = getattr(torch.ops.c10d, name).default
    collective, payload = OPERATORS[name]
    position = {argument.name: i for i, argument in enumerate(operator._schema.arguments)}
    group_at, async_at, payload_at = position["process_group"], position.get("async_op"), position.get(payload or "")

    def kernel(keyset: torch.DispatchKeySet, *args: Any) -> Any:
        keyset = keyset.remove(torch.DispatchKey.BackendSelect)
        meters = _meters
        if not meters:
            return operator.redispatch(keyset, *args)
        data = args[payload_at] if payload_at is not None else ()
        size, tensor = _nbytes(data), _first(data)
        process_group_size = dist.ProcessGroup.unbox(args[group_at]).size()
        task = graph_task_id()
        purposes = [_purpose_of(meter, collective, tensor, task) for meter in meters]
        start = time.perf_counter()
        operation = in_flight.started(collective, purposes[-1])
        try:
            result = operator.redispatch(keyset, *args)
        except RuntimeError:
            in_flight.ended(operation, failed=True)
            raise
        future = _future(result, tensor)
        if future is None:
            in_flight.ended(operation)  # its end cannot be observed
        timed = future is not None
        # Trap: the dispatcher leaves out trailing arguments that have their default, and async_op's is True.
        waits = timed and async_at is not None and async_at < len(args) and not args[async_at]
        reduces = END_OF_BACKWARD and timed and task != -1 and collective == "all_reduce" and not waits
        known = waits or reduces or (timed and threading.get_ident() in _beside)
        booked = []
        for meter, name in zip(meters, purposes, strict=True):
            row = meter.ledger.add(collective, name, size, process_group_size, timed=timed, exposed=known)
            booked.append((meter.ledger, row))

        def done(completed: torch.futures.Future) -> None:
            seconds = time.perf_counter() - start
            for ledger, row in booked:
                ledger.add_times(row, seconds=seconds, exposed=seconds if waits else 0.0)
            for meter in meters:
                meter._unbooked.discard(future)
            in_flight.ended(operation, failed=_has_failed(completed))

        if future is not None:
            for meter in meters:
                meter._unbooked.add(future)
            future.add_done_callback(done)
        if reduces:
            _expose_at_end_of_backward(task, booked)
        return result

    return kernel


def _future(result: Any, tensor: torch.Tensor | None) -> torch.futures.Future | None:
    """The future that completes with the operation; None where only a synchronization would tell."""
    work = result[-1] if isinstance(result, tuple) else result
    # CUDA: the future is complete as soon as the work is queued.
    if work is None or (tensor is not None and tensor.device.type != "cpu"):
        return None
    try:
        return dist.Work.unbox(work).get_future()
    except RuntimeError:  # not implemented for gloo's send, recv and reduce-scatter
        return None


def _has_failed(future: torch.futures.Future) -> bool:
    try:
        future.value()
    except RuntimeError:  # the error itself is raised where the result is waited for
        return True
    return False


def _expose_at_end_of_backward(task: int, booked: list[tuple[Ledger, Row]]) -> None:
    """Books the seconds that backward waits for its all-reduces after its last gradient is computed.

    DDP's reducer waits in a callback that autograd runs at the end of backward. Ours is queued before it, at the
    first all-reduce, and queues a second one behind it.
    With static_graph, DDP's first step waits before both, and counts as zero.
    """
    if task in _waits:
        # One wait for all operations of this backward: the first one carries it.
        return
    _waits.add(task)

    def before() -> None:
        start = time.perf_counter()

        def after() -> None:
            _waits.discard(task)
            for ledger, row in booked:
                ledger.add_times(row, exposed=time.perf_counter() - start)

        at_end_of_backward(after)

    at_end_of_backward(before)


def _purpose_of(meter: CommMeter, collective: str, tensor: torch.Tensor | None, task: int) -> str:
    scopes = _scopes.get(threading.get_ident())
    if scopes:
        return scopes[-1]
    # A thread that Python did not start belongs to autograd or to a backend, and works for the meter's own thread.
    foreign = type(threading.current_thread()).__name__ == "_DummyThread"
    if task != -1 or foreign:
        scopes = _scopes.get(meter._thread) if foreign else None
        if scopes:
            return scopes[-1]
        if collective == "all_gather":  # no gradient is gathered, but what FSDP2 has sharded
            return "parameters"
        is_map = collective == "all_reduce" and tensor is not None and tensor.dtype == torch.int32
        return "other" if is_map else "gradients"
    return _caller_purpose()


def _caller_purpose() -> str:
    """Purpose of a collective outside of backward: that of the DDP or FSDP2 function on the stack; "other" if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename == DDP_SOURCE and frame.f_code.co_name in DDP_METHODS:
            return DDP_METHODS[frame.f_code.co_name]
        if frame.f_globals.get("__name__") == FSDP_COLLECTIVES:
            return "parameters"
        frame = frame.f_back
    return "other"
