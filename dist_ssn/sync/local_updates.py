"""`LocalUpdates`: workers train apart, and average their changes every few steps."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dist_ssn.comm.meter import purpose
from dist_ssn.errors import UserError
from dist_ssn.sharing.bases import kept_fingerprints
from dist_ssn.sync.anchor import Anchor
from dist_ssn.sync.changes import Changes
from dist_ssn.sync.codecs import Codec
from dist_ssn.sync.exchange import Exchange
from dist_ssn.sync.fingerprints import digest, halves
from dist_ssn.sync.hooks import watch_forwards, watch_loads, watch_steps
from dist_ssn.sync.islands import LeaderExchange
from dist_ssn.sync.outer import Factory, check_outer, outer_optimizer
from dist_ssn.sync.outliers import left_out
from dist_ssn.sync.replica import Replica
from dist_ssn.sync.reports import (
    ANCHORED,
    ROUND,
    SYNCHRONIZE,
    Report,
    exchange_reports,
    require_agreement,
    require_same,
)
from dist_ssn.sync.sent import Round, Sent
from dist_ssn.sync.settings import (
    check_kinds,
    check_settings,
    check_steps,
    device_of,
    forget_what_is_not_finite,
    held,
    innermost,
    taking_part,
)
from dist_ssn.sync.start import came_too_late, forms_of, send_from_first, workers_of
from dist_ssn.sync.state import FORMAT, changed, check_state, on_device, outer_settings, plan_of, shapes_of
from dist_ssn.sync.trained import Trained, check_model, require_own_steps, trained_parameters, unwrapped
from dist_ssn.sync.transport import Transport

_Method = TypeVar("_Method", bound=Callable[..., Any])


def _as_values(method: _Method) -> _Method:
    """Runs a method without gradients, and outside of an inference mode that it is called in: its tensors are changed later."""

    @functools.wraps(method)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return method(*arguments, **options)

    return wrapped  # pyright: ignore[reportReturnType]


class LocalUpdates:
    """Trains one model on several workers that take `every` steps apart, and then average what they have changed.

    A *round* is `every` steps of the optimizer on each worker. At its end a worker's change, anchor - parameters, is averaged over
    all workers, the outer optimizer takes a step on the anchor with the mean as its gradient, and all go on from the anchor::

        with dist_ssn.LocalUpdates(model, optimizer, every=16, codec="int4") as local:
            for inputs, targets in data:
                loss(model(inputs), targets).backward()
                optimizer.step()                         # ends a round after steps 16, 32, ...
                optimizer.zero_grad()
        torch.save(model.state_dict(), "model.pt")       # leaving the block has synchronized

    Call `torch.distributed.init_process_group` first. At the start, all workers get the first one's parameters and buffers. A step
    that ends no round sends nothing, and does nothing but count. Leaving the block, except by an exception, synchronizes; without
    the block, call `synchronize` and `close`.

    Args:
        model: shared or dense, on its device. DDP or FSDP2 only over an island, see `group`.
        optimizer: of this worker; its state stays this worker's own.
        every: steps in a round.
        outer: "nesterov", "average", a torch optimizer, whose class and settings are used, or a function that makes one from a list
            of tensors.
        outer_rate: learning rate of a named outer optimizer; None for 0.7 ("nesterov") or 1 ("average").
        outer_momentum: momentum of "nesterov"; None for 0.6.
        codec: of the changes; see `dist_ssn.sync.codecs.CODECS`. Gains, coefficients, biases and norms have slices of their own, of
            at least 4 bits.
        delay: 0, or 1: the mean change of a round travels during the next one, and is applied at its end. A worker goes on from
            the anchor less its own change that is not in the anchor yet, so that each change counts once.
        group: the processes that average their changes; None for all. With islands it has one process of each island, and
            `model` is wrapped by DDP over the processes of the island, or sharded over them by FSDP2.
        warmup: number of first steps after each of which the parameters are averaged plainly, whatever the other settings are.
        outlier: a worker whose change has a norm above this multiple of the workers' median is left out of the round, with a
            warning on all workers. None leaves out only changes that are not finite.
        route: of the exchange; see `dist_ssn.sync.exchange.Exchange`.

    Raises:
        UserError: a setting is impossible, the model or the optimizer cannot take part, or the workers differ. All workers raise
            it, before anything of the model is sent.

    Source: Stich 2018, arXiv 1805.09767; Lin et al. 2018, arXiv 1808.07217; Douillard et al. 2023, arXiv 2311.08105.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        every: int = 16,
        outer: str | Optimizer | Factory = "nesterov",
        outer_rate: float | None = None,
        outer_momentum: float | None = None,
        codec: str | Codec = "none",
        delay: int = 0,
        group: dist.ProcessGroup | Transport | None = None,
        warmup: int = 0,
        outlier: float | None = 10.0,
        route: str = "auto",
    ) -> None:
        self.step = 0
        """Number of the optimizer's steps."""
        self.last: Round | None = None
        """The last exchange whose mean has arrived; None before the first."""
        self.on_arrival: Callable[[Round], object] | None = None
        """Is called with each exchange whose mean has arrived: with a delay, two may arrive after one step."""
        self._apart = 0
        """Steps since the last exchange."""
        self.every, self.warmup, self.delay, self.outlier = every, warmup, delay, outlier
        self._sent: Sent | None = None
        check_kinds(model, optimizer)
        self._workers = workers_of(group, device_of(model))
        failure, facts, kept = None, [], {}
        try:
            check_model(model)
            self.model, island, self._sharded = unwrapped(model, group)
            self._workers = workers_of(group, device_of(model), island, self._sharded)
            check_settings(every, warmup, delay, outlier)
            check_outer(outer, outer_rate, outer_momentum)
            self.optimizer = innermost(optimizer)
            require_own_steps(self.optimizer, group)
            trained = trained_parameters(self.model, self.optimizer)
            self._taking_part = taking_part(self.optimizer)
            anchor = Anchor(trained)
            exchange = Exchange(anchor.size, codec, group=group, route=route, plain=anchor.plain)
            self.exchange = exchange if island is None or self._sharded else LeaderExchange(exchange, island)
            """Exchange of changes; `packed_bytes` of it are what this process hands to collectives in a round."""
            self.outer = outer_optimizer(outer, anchor.flats, outer_rate, outer_momentum)
            """The outer optimizer. Its learning rate may be changed between rounds, in the same way on all workers."""
            kept = kept_fingerprints(self.model)
            facts = self._facts(trained, kept)
        except Exception as error:  # of this process; `require_same` raises it
            failure = error
        with torch.no_grad(), purpose("initialization"):
            require_same(facts, self._workers, failure)
            send_from_first(self.model, self._workers)
            self._replica = Replica(self.model, anchor)
        self._changes = Changes(self.model, anchor.trained, every, kept)
        """Changes of the model that are no steps of the optimizer."""
        self._is_new = True
        """True as long as values that are set are those that all go on from."""
        self._is_anchored = self._is_closed = False
        self._hooks = self._watch(model)
        held.add(self.optimizer)

    def _facts(self, trained: Sequence[Trained], kept: object) -> list[object]:
        """What all workers must begin with alike, in the order of `reports.FACTS`."""
        settings = (self.every, self.warmup, self.delay, self.outlier)
        return [
            (*settings, self.exchange.codec.name, self.exchange.route, self.outer),
            [(t.name, t.values.shape, t.values.dtype, t.plain) for t in trained],
            forms_of(self.model),
            plan_of(self.model),
            kept,
        ]

    def _watch(self, called: nn.Module) -> list[Any]:
        """The hooks by which steps, forwards and loads are seen; `called` is the model as it was given, wrapped or not."""
        return [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
            watch_forwards(self.model, called, self._begin),
            *watch_loads(self.model, self._replica.anchor.trained, self._before_load),
            watch_steps(self._changes),
        ]

    def _begin(self) -> None:
        """Takes the values before the first forward for those that all go on from; the next report compares them.

        Values that change from then on, such as those of an embedding with a `max_norm`, count as training.
        """
        if self._is_new:
            self._is_new = False
            _as_values(self._replica.take)()
            self._changes.forget_loads()

    def _before_step(self, *_: object) -> None:
        self._require_own_values("a step of the optimizer")
        if self._changes.has_loads:
            self._begin()  # a forward of a part of the model, or a compiled one, is not seen
        self._is_new = False
        self._changes.before_step()

    def _before_load(self, *_: object) -> None:
        if not self._is_anchored:  # the end of anchored() puts back all values
            self._changes.before_load()

    def _require_own_values(self, action: str) -> None:
        """Raises `UserError` inside of `anchored`."""
        if self._is_anchored:
            raise UserError(f"{action} inside of anchored() would be lost: do it before or after that block")

    def _after_step(self, *_: object) -> None:
        self.step += 1
        self._apart += 1
        self._changes.after_step()
        warm = self.step <= self.warmup
        if warm or (self.step - self.warmup) % self.every == 0:
            with purpose("synchronization"):  # not around all: an ordinary step only counts
                self._meet(plain=warm, late=self.delay > 0 and not warm)

    @_as_values
    def synchronize(self) -> bool:
        """Averages whatever the workers have changed since the last round, and the buffers, so that all hold the same model.

        Call it on all workers at the same step: before an evaluation or a checkpoint of the model, and at the end if the block
        is not left. Where nothing has changed, only some bytes travel. Rounds end after the same steps as without it. With a
        delay, the mean that is on its way is applied first; then nothing is on its way.

        Returns:
            True if a worker had changed something since the last round, or a mean was on its way.

        Raises:
            UserError: a worker cannot take part, or is at another step, or its anchor differs. All workers raise it.
        """
        self._require_own_values("synchronize()")
        with purpose("synchronization"):
            on_its_way = self._sent is not None
            moved = self._meet(asked=True)
            self._replica.buffers.average(self._workers)
        return moved or on_its_way

    @_as_values
    def _meet(self, *, asked: bool = False, plain: bool = False, late: bool = False) -> bool:
        """One exchange.

        Args:
            asked: by `synchronize`.
            plain: all go on from the mean of their parameters; the outer optimizer takes no step.
            late: the mean is applied in the next exchange.

        Returns:
            True if a worker had changed something.
        """
        self._begin()
        self._changes.settle_loads()
        change = None if (problem := self._problem()) else self._replica.change()
        norm = 0.0 if change is None else float(torch.linalg.vector_norm(change, dtype=torch.float64))
        norms = tuple(report.norm for report in self._report(SYNCHRONIZE if asked else ROUND, norm, problem))
        assert change is not None  # a problem has been raised
        if self._sent is not None:
            self._apply(self._sent)
            self._sent = None
        if not asked or any(norms):
            out = self._leave_out(norms, change)
            # In a thread only where there is something to compute meanwhile.
            wait = self.exchange.start(change).wait if late else partial(self.exchange.average, change)
            sent = Sent(wait, None, norms, out, self.step, is_whole=not asked)
            if late:
                self._sent = sent
            else:
                self._apply(sent, plain)
        self._replica.go_on(change if late else None)
        self._apart = 0
        return any(norms)

    def _report(self, call: int, norm: float, problem: str | None) -> list[Report]:
        """The reports of all workers, which are at the same place and hold the same values.

        Args:
            call: what this worker does; see `Report`.
            norm: of its change.
            problem: the reason why it cannot take part; None if it can.
        """
        if too_late := came_too_late(self._workers):
            raise UserError(too_late)
        anchor = self._replica.anchor.fingerprint()
        others = self._changes.others(read_all=call != ROUND)
        mine = Report(self.step, call, problem is not None, norm, halves(digest(anchor, others)))
        reports = exchange_reports(mine, self._workers)
        require_agreement(reports, self._workers, problem, anchor, others)
        return reports

    def _problem(self) -> str | None:
        """The reason why this worker cannot take part in an exchange; None if it can."""
        if taking_part(self.optimizer) != self._taking_part:
            return (
                "the optimizer's parameters, their shapes or dtypes, or which of them are trained, changed after local updates "
                "began: make a new LocalUpdates after parameters are added, frozen, unfrozen, resized or of another dtype"
            )
        return self._changes.problem(self._apart) or self._replica.buffers.problem()

    def _leave_out(self, norms: tuple[float, ...], change: Tensor) -> tuple[int, ...]:
        """The places of the workers that this exchange leaves out; a worker that is among them sends zeros."""
        found = left_out(norms, self.outlier)
        ranks = self._workers.ranks
        for place, reason in found.items():
            warnings.warn(
                f"rank {ranks[place]} {reason} after step {self.step}: it is left out, and goes on from the others' mean",
                stacklevel=2,
            )
        if len(found) == len(norms):
            raise UserError(
                f"after step {self.step} no worker's change is finite: go on from the last checkpoint with a lower learning rate, "
                "a warm-up or clipping"
            )
        if self._workers.place in found:
            change.zero_()
            forget_what_is_not_finite(self.optimizer)
        return tuple(found)

    def _apply(self, sent: Sent, plain: bool = False) -> None:
        """Takes the outer step with a mean change, which is waited for."""
        mean = sent.arrived()
        is_said = (
            not self._sharded and (sent.is_whole or self.exchange.codec.is_exact) and not self.exchange.codec.is_rough
        )
        self.last = Round(sent.step, sent.norms, sent.left_out, sent.agreement() if is_said else None)
        if self.on_arrival is not None:
            self.on_arrival(self.last)
        anchor = self._replica.anchor
        for flat, gradient in zip(anchor.flats, anchor.gradients(mean), strict=True):
            if plain:
                flat.sub_(gradient)
            else:
                flat.grad = gradient
        if not plain:
            self.outer.step()
            self.outer.zero_grad(set_to_none=True)

    @_as_values
    def state_dict(self) -> dict[str, Any]:
        """This worker's state: anchor, outer state, feedback, position, and its progress in a round that is not over.

        Nothing is sent. Each worker has its own: its feedback and its progress. With each worker's own state, and the state of its
        optimizer, training continues exactly, also in the middle of a round.

        Raises:
            UserError: inside of `anchored`.
        """
        self._require_own_values("state_dict()")
        return {
            "format": FORMAT,
            "plan": plan_of(self.model),
            "shapes": shapes_of(self._replica.anchor),
            "workers": self._workers.count,
            "place": self._workers.place,
            "step": self.step,
            "outer_class": type(self.outer).__name__,
            "outer": copy.deepcopy(self.outer.state_dict()),
            "settings": self._settings(),
            "feedback": self.exchange.state_dict(),
            **self._replica.state_dict(own_start=self._sent is not None),
            "sent": {} if self._sent is None else self._sent.state(),
        }

    @_as_values
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a `state_dict`; it sets the model's trained parameters, too.

        The state of another worker, or of another number of workers, goes on from the anchor: feedback, and progress in a round
        that was not over, start at zero, with a warning. Load on all workers states of the same step.

        Raises:
            CheckpointError: the state is of another model, plan or outer optimizer. Nothing is loaded then.
            UserError: inside of `anchored`.
        """
        self._require_own_values("load_state_dict()")
        check_state(state, self.model, self._replica, self.outer)
        self._is_new = False
        self._changes.forget_loads()
        mine = (self._workers.count, self._workers.place) == (state["workers"], state["place"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one of ours says the same, below
            self.exchange.load_state_dict(on_device(state["feedback"], self._workers.device))
        self.step, self._apart = state["step"], 0
        self._replica.load_common(state)
        if others := changed(state.get("settings", {}), self._settings()):
            warnings.warn(f"local updates go on with other settings than those of the state: {others}", stacklevel=2)
        if others := outer_settings(self.outer, state["outer"]):
            warnings.warn(f"the outer optimizer goes on with the settings of the state: {others}", stacklevel=2)
        self.outer.load_state_dict(copy.deepcopy(state["outer"]))
        self._sent = Sent.of_state(state["sent"], self._workers.device) if state["sent"] else None
        if not mine:
            warnings.warn(
                f"this state is worker {state['place']}'s of {state['workers']}, and this is worker {self._workers.place} of "
                f"{self._workers.count}: it goes on from the anchor, and its feedback starts at zero",
                stacklevel=2,
            )
            return
        self._replica.load_own(state)
        if state["parameters"]:
            self._apart = max(1, (self.step - self.warmup) % self.every)

    def _settings(self) -> dict[str, Any]:
        return {"every": self.every, "warmup": self.warmup, "delay": self.delay}

    @_as_values
    def restart(self, step: int) -> None:
        """Begins a first round at the model's current parameters and buffers, which all workers must hold alike.

        The outer optimizer and what a codec has kept start anew, as they belong to the former values.

        Args:
            step: number of steps that were made.

        Raises:
            UserError: step is no whole number of at least 0.
        """
        check_steps("step", step, 0)
        self.exchange.forget()
        self.outer.state.clear()
        self.step, self._apart, self._sent = step, 0, None
        self._replica = Replica(self.model, self._replica.anchor)
        self._changes.begin()
        self._is_new = True

    @contextmanager
    def anchored(self) -> Iterator[None]:
        """Inside the block, the model has the anchor's parameters and the mean of the workers' buffers: all hold the same model.

        It is for evaluations in a round: training goes on as if it had not been there. A report and the buffers are sent; nothing
        without floating-point buffers. All workers enter it together. A step of the optimizer, `synchronize`, `state_dict` and
        `load_state_dict` inside raise `UserError`.

        Raises:
            UserError: a worker does something else, or cannot take part. All workers raise it.
        """
        self._require_own_values("anchored()")
        with purpose("metrics"):
            put_back = self._enter_anchor()
        self._is_anchored = True
        try:
            yield
        finally:
            self._is_anchored = False
            put_back()

    @_as_values
    def _enter_anchor(self) -> Callable[[], None]:
        """Gives the model the anchor; the function that is returned puts back what it had."""
        self._begin()
        if self._replica.buffers.base:
            self._report(ANCHORED, 0.0, self._problem())
        return _as_values(self._replica.as_anchor(self._workers))

    def close(self) -> None:
        """Ends local updates without another exchange; the optimizer's steps are ordinary again. A second call does nothing."""
        self._is_closed = True
        for hook in self._hooks:
            hook.remove()
        held.discard(self.optimizer)

    def __del__(self) -> None:
        # After a constructor that raised there is no _is_closed.
        if (
            not getattr(self, "_is_closed", True)
            and self._workers.count > 1
            and (self._apart or self._sent is not None)
        ):
            warnings.warn(
                f"LocalUpdates ended {self._apart} step{'s' * (self._apart != 1)} after its last exchange, so the workers hold "
                "different models: call synchronize() and close(), or leave its with block, before the model is used",
                stacklevel=2,
            )

    def __enter__(self) -> LocalUpdates:
        if self._is_closed:
            raise UserError("this LocalUpdates was closed, and counts no steps any more: make a new one")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.synchronize()
        finally:
            self.close()
