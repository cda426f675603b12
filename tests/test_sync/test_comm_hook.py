"""The hook on torch's DDP: what it sends, that nothing is lost between buckets, and its state in checkpoints."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dist_ssn
from dist_ssn.comm import CommMeter
from dist_ssn.errors import CheckpointError, UserError
from dist_ssn.sync.codecs import CODECS
from dist_ssn.sync.routes import lanes_of
from testing.ranks import run_ranks
from tests.test_sync.test_states_and_faults import gathered

STEPS = 8
MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "static": {"static_graph": True},
    "unused": {"find_unused_parameters": True},
}
LOSS = {"none": 0.0, "fp16": 1e-4, "bf16": 1e-3, "int8": 1e-3, "int4": 1e-2, "bins2": 0.1, "sparse": 0.6}
"""Largest distance of the loss from that without a hook, after `STEPS` steps from 4.3 to about 2.6."""


class Net(nn.Module):
    """Layers that are used in another order than they are made in: DDP's second buckets are not its first ones."""

    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last, self.first, self.middle = nn.Linear(128, 8), nn.Linear(64, 128), nn.Linear(128, 128)
        self.never = nn.Linear(80, 80) if unused else None

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).tanh()).tanh())


def batches(rank: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(16, 64, generator=generator).to(dtype) for _ in range(2 * STEPS)]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 2 * batch[:, :8]).square().mean()


class Run:
    """A model under DDP, with a hook or none."""

    def __init__(
        self, codec: str | None, *, start: nn.Module | None = None, bucket: float = 0.04, **options: Any
    ) -> None:
        route, dtype = options.pop("route", "auto"), options.pop("dtype", torch.float32)
        group = options.pop("group", None)
        model = Net(unused="find_unused_parameters" in options) if start is None else copy.deepcopy(start)
        self.model = model.to(dtype)
        self.ddp = DistributedDataParallel(self.model, bucket_cap_mb=bucket, **options)
        self.state: Any = None
        if codec is not None:
            self.state, hook = dist_ssn.comm_hook(codec, group=group, route=route)
            self.ddp.register_comm_hook(self.state, hook)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def steps(self, data: list[Tensor], accumulated: int = 1) -> Run:
        for number, batch in enumerate(data, 1):
            with self.ddp.no_sync() if number % accumulated else nullcontext():
                loss_of(self.ddp, batch).backward()
            if number % accumulated == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()
        return self

    def values(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def _modes(rank: int, n: int) -> dict[tuple[str, str], Any]:
    data = batches(rank)
    found = {}
    for mode, options in MODES.items():
        accumulated = 2 if mode == "plain" else 1
        for codec in (None, *CODECS):
            if mode in ("plain", "unused") or codec in (None, "none", "int8"):
                run = Run(codec, **options).steps(data[:STEPS], accumulated)
                found[mode, codec] = (run.values(), loss_of(run.model, data[0]).item())
    return found


def _types(rank: int, n: int) -> dict[str, Any]:
    found = {}
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        data = batches(rank, dtype)[:STEPS]
        for codec in (None, "none", "int8"):
            run = Run(codec, dtype=dtype).steps(data)
            found[f"{dtype} {codec}"] = run.values()
    return found


def _nothing_is_lost(rank: int, n: int) -> None:
    """Of each parameter: n means and what all ranks still keep are the sum of all ranks' gradients, also where buckets change."""
    data = batches(rank)
    for codec, route in itertools.product(("int8", "bins2"), ("all-gather", "two-phase")):
        run = Run(codec, route=route)
        alone = Net()
        wanted = [torch.zeros(p.shape, dtype=torch.float64) for p in alone.parameters()]
        total = copy.deepcopy(wanted)
        for batch in data[:3]:
            loss_of(alone, batch).backward()
            loss_of(run.ddp, batch).backward()
            for model, sums in ((alone, wanted), (run.model, total)):
                for parameter, so_far in zip(model.parameters(), sums, strict=True):
                    assert parameter.grad is not None
                    so_far += parameter.grad.double()
                    parameter.grad = None
        state = run.state
        assert len(state._exchanges) > 1
        assert {number for key in state._exchanges for number, _ in key} == set(range(6)) and not state._moved
        for key, exchange in state._exchanges.items():
            for (number, size), unsent in zip(key, exchange.unsent().split([size for _, size in key]), strict=True):
                place = next(i for i, p in enumerate(run.model.parameters()) if p is state._parameters[number])
                assert size == wanted[place].numel()
                total[place] += unsent.view(total[place].shape)
        for so_far, sums in zip(total, wanted, strict=True):
            missing = torch.stack([so_far, sums])
            dist.all_reduce(missing)
            torch.testing.assert_close(missing[0], missing[1], rtol=0, atol=1e-5)


def _buckets_changed(rank: int, n: int) -> bool:
    """True if DDP's buckets after the first step are not the first ones, which the test above needs."""
    seen = []

    def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        seen.append((bucket.index(), [p.numel() for p in bucket.parameters()]))
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    hook.__annotations__.clear()
    run = Run(None)
    run.ddp.register_comm_hook(None, hook)
    run.steps(batches(rank)[:2])
    half = len(seen) // 2
    return [sizes for _, sizes in seen[:half]] != [sizes for _, sizes in seen[half:]]


def _checkpoints(rank: int, n: int) -> None:
    data = batches(rank)
    for codec, route, bucket in (("int8", "auto", 25), ("sparse", "auto", 25), ("bins2", "two-phase", 25)):
        whole = Run(codec, route=route, bucket=bucket).steps(data[:4])
        saved = pickle.loads(pickle.dumps(whole.state.state_dict()))
        resumed = Run(codec, route=route, bucket=bucket, start=whole.model)
        resumed.state.load_state_dict(saved)
        assert str(resumed.state.state_dict()) == str(saved)
        without = Run(codec, route=route, bucket=bucket, start=whole.model).steps(data[4:8])
        whole.steps(data[4:8])
        resumed.steps(data[4:8])
        assert torch.equal(whole.values(), resumed.values()), codec
        assert not torch.equal(whole.values(), without.values()), codec
    half = Run("int8").steps(data[:4])
    if rank:  # the others do not compare again
        half.state.load_state_dict(half.state.state_dict())
    assert len({str(values.tolist()) for values in gathered(half.steps(data[4:8]).values())}) == 1
    other = Run("int8")
    with pytest.raises(
        CheckpointError, match="of codec 'bins2', and this hook has 'int8': make the hook with the state's"
    ):
        other.state.load_state_dict(saved)
    with pytest.raises(UserError, match=r"save its state_dict\(\), on each rank"):
        pickle.dumps(other.state)


def _bytes(rank: int, n: int) -> None:
    for codec in CODECS:
        run = Run(codec, bucket=25).steps(batches(rank)[:2])
        with CommMeter() as meter:
            run.steps(batches(rank)[:1])
        sizes = [p.numel() for p in run.model.parameters()]
        lanes = lanes_of(CODECS[codec], sum(sizes), sum(size for size in sizes if size < 4096))
        wanted = sum(kind.packed_bytes(values) for kind, values in lanes)
        assert meter.totals("gradients").logical_bytes == meter.totals().logical_bytes == wanted, codec


def _wrong_use(rank: int, n: int) -> list[str]:
    found = []

    def said(call: Callable[[], Any]) -> None:
        with pytest.raises((RuntimeError, UserError)) as error:
            call()
        found.append(str(error.value))

    run = Run("int8")
    said(lambda: run.ddp.register_comm_hook(*dist_ssn.comm_hook("int8")))
    said(lambda: Run("int4" if rank else "int8").steps(batches(rank)[:1]))
    return found


def _all(rank: int, n: int) -> dict[str, Any]:
    _nothing_is_lost(rank, n)
    _checkpoints(rank, n)
    _bytes(rank, n)
    return {
        "changed": _buckets_changed(rank, n),
        "modes": _modes(rank, n),
        "types": _types(rank, n),
        "wrong": _wrong_use(rank, n),
    }


@pytest.mark.distributed
def test_the_hook() -> None:
    """One start of the ranks for all checks, since it takes long."""
    ranks = run_ranks(_all, 2)
    assert ranks[0]["changed"]
    modes = ranks[0]["modes"]
    for (mode, codec), (values, loss) in modes.items():
        assert torch.equal(values, ranks[1]["modes"][mode, codec][0]), (mode, codec)
        if codec is not None:
            plain = modes[mode, None]
            assert abs(loss - plain[1]) <= LOSS[codec], (mode, codec, loss, plain[1])
            assert torch.equal(values, plain[0]) == (codec == "none"), (mode, codec)
    types = ranks[0]["types"]
    for what, values in types.items():
        assert torch.equal(values, ranks[1]["types"][what]), what
        plain = types[what.replace("int8", "None").replace("none", "None")]
        tolerance = 0 if "none" in what else 1e-3 if "64" in what else 2e-2
        torch.testing.assert_close(values, plain, rtol=0, atol=tolerance)
    for twice, differ in (rank["wrong"] for rank in ranks):
        assert "register_comm_hook" in twice
        assert "the ranks' exchanges differ: rank 0 has" in differ


class Phases(nn.Module):
    """Complex parameters beside real ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.real, self.phases = nn.Linear(64, 8), nn.Parameter(torch.randn(80, 8, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.real(x) * self.phases.mean(0).abs()


class Words(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.last = nn.Embedding(10, 8, sparse=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.words(x[:, 0].abs().long() % 10))


def _kinds_of_gradients(rank: int, n: int) -> tuple[dict[str, dict[str | None, Tensor]], str]:
    """Gradients of one step by codec, and what is said of those that cannot be coded."""
    batch, found = batches(rank)[0], {}
    for kind, codecs in ((Phases, (None, "none", "int8")), (Words, (None, "none"))):
        found[kind.__name__] = {}
        for codec in codecs:
            ddp = DistributedDataParallel(kind())
            if codec is not None:
                ddp.register_comm_hook(*dist_ssn.comm_hook(codec))
            loss_of(ddp, batch).backward()
            gradients = [p.grad.to_dense() for p in ddp.parameters() if p.grad is not None]
            found[kind.__name__][codec] = torch.cat([g.cfloat().flatten() for g in gradients])
    ddp = DistributedDataParallel(Words())
    ddp.register_comm_hook(*dist_ssn.comm_hook("int8"))
    with pytest.raises(UserError) as error:
        loss_of(ddp, batch).backward()
    return found, str(error.value)


@pytest.mark.distributed
@pytest.mark.skipif(torch.__version__ < "2.9", reason="its gloo takes no complex numbers")
def test_complex_gradients_are_coded_and_sparse_ones_refused() -> None:
    for found, said in run_ranks(_kinds_of_gradients, 2):
        for gradients in found.values():
            assert torch.equal(gradients["none"], gradients[None])
        plain, coded = found["Phases"][None], found["Phases"]["int8"]
        assert plain.imag.norm() > 0 and 0 < (coded - plain).norm() < 0.02 * plain.norm()
        assert said == (
            "comm_hook: words.weight has sparse gradients, which codec 'int8' does not take: make its layer with sparse=False, or "
            "take codec 'none'"
        )


def _islands(rank: int, n: int) -> tuple[dict[str, Tensor], list[str]]:
    """Values after some steps of DDP over ranks {0, 1} and {2, 3}, and what is said of wrong groups."""
    islands = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine, data = islands[rank // 2], batches(rank)[:3]
    run = Run("int8", process_group=mine).steps(data)
    found = {
        "plain": Run(None, process_group=mine).steps(data).values(),
        "none": Run("none", process_group=mine).steps(data).values(),
        "int8": run.values(),
        "given": Run("int8", process_group=mine, group=mine).steps(data).values(),
    }
    said = []
    other = Run("int8", group=dist.group.WORLD, process_group=mine)
    with pytest.raises(UserError) as error:
        other.steps(data[:1])
    said.append(str(error.value))
    everywhere = Run(None)
    everywhere.ddp.register_comm_hook(run.state, dist_ssn.comm_hook("int8")[1])
    with pytest.raises(UserError) as error:
        everywhere.steps(data[:1])
    said.append(str(error.value))
    inner = Run("int8", process_group=mine)
    around = DistributedDataParallel(inner.model)
    with pytest.raises(UserError) as error:
        inner.steps(data[:1])
    said.append(str(error.value))
    del around
    return found, said


@pytest.mark.distributed
def test_gradients_are_averaged_over_the_process_group_of_ddp() -> None:
    ranks = run_ranks(_islands, 4)
    for rank, (found, _) in enumerate(ranks):
        for what, values in found.items():
            assert torch.equal(values, ranks[rank ^ 1][0][what]), what
            assert not torch.equal(values, ranks[rank ^ 2][0][what]), what
        assert torch.equal(found["none"], found["plain"]) and torch.equal(found["int8"], found["given"])
        torch.testing.assert_close(found["int8"], found["plain"], rtol=0, atol=1e-3)
    wrong, shared, several = ranks[0][1]
    assert wrong == (
        "comm_hook was given a process group of ranks [0, 1, 2, 3], and the DistributedDataParallel of last.weight has one of "
        "ranks [0, 1]: leave group out"
    )
    assert shared == "one comm_hook serves models of one process group: make a comm_hook for each model"
    assert several == (
        "last.weight is in several DistributedDataParallels, of ranks [0, 1] and [0, 1, 2, 3]: give comm_hook group=, the process "
        "group of the one with the hook"
    )


def _other_models(rank: int, n: int) -> list[str]:
    data, said = batches(rank), []
    saved = Run("int8").steps(data[:2]).state.state_dict()
    smaller = {**saved, "buckets": saved["buckets"][:1]}
    wider = Net()
    wider.middle, wider.last = nn.Linear(128, 144), nn.Linear(144, 8)
    spoiled = copy.deepcopy(saved)
    spoiled["buckets"][0][1]["kept"][0] = torch.zeros(3)
    for state, model in ((saved, wider), (smaller, None), (spoiled, None)):
        run = Run("int8", start=model)
        run.state.load_state_dict(state)
        with pytest.raises(CheckpointError) as error:
            run.steps(data[:1])
        said.append(str(error.value))
    run = Run("int8", start=wider)
    with pytest.raises(CheckpointError):
        run.state.load_state_dict({**saved, "codec": "int4"})
    run.steps(data[:2])  # nothing was loaded
    return said


@pytest.mark.distributed
def test_a_state_of_another_model_is_said_in_the_first_backward() -> None:
    for wider, smaller, spoiled in run_ranks(_other_models, 2):
        assert wider == (
            "the state of comm_hook is of another model: in the place of last.weight, which has 1,152 values, it has 1,024 values; "
            "load the state that was saved with this model, or go on without it, with feedback at zero"
        )
        assert "which has" in smaller and "values, it has none; load the state" in smaller
        assert spoiled.startswith("what was not sent yet is damaged: kept must be float32 of")


@pytest.mark.parametrize(
    ("state", "said"),
    [
        (
            None,
            "this is no state of comm_hook, but of type NoneType: load what its state_dict() returned, on each rank",
        ),
        ({}, "this is no state of comm_hook, but of type dict"),
        ({"codec": "int8"}, "this is no state of comm_hook, but of type dict"),
        ({"codec": "int8", "buckets": 3}, "the state of comm_hook is damaged: buckets must be a list"),
        ({"codec": "int8", "buckets": [3]}, "the state of comm_hook is damaged: bucket 0 must be (number, size)"),
        (
            {"codec": "int8", "buckets": [([(0, 4)], {})]},
            "what was not sent yet is damaged: it must be the state_dict()",
        ),
        ({"codec": "int8", "buckets": [([(0, "4")], {"kept": []})]}, "the state of comm_hook is damaged: bucket 0"),
        ({"codec": "int8", "buckets": [([(0, 4)], {"kept": []})]}, "what was not sent yet is damaged: it has no size"),
    ],
)
def test_what_is_no_state_is_said(state: Any, said: str) -> None:
    hook, _ = dist_ssn.comm_hook("int8")
    with pytest.raises(CheckpointError) as error:
        hook.load_state_dict(state)
    assert str(error.value).startswith(said)


def test_an_unknown_codec_is_said_before_anything_starts() -> None:
    with pytest.raises(UserError, match=r"unknown codec 'int9': known are .*did you mean 'int8'"):
        dist_ssn.comm_hook("int9")
    with pytest.raises(UserError, match="unknown route 'ring'"):
        dist_ssn.comm_hook("int8", route="ring")
    codecs: list[Any] = [["int8"], {"int8": 1}]
    for codec in codecs:
        with pytest.raises(UserError, match="unknown codec"):
            dist_ssn.comm_hook(codec)
    group: Any = "gloo"
    with pytest.raises(UserError, match=r"group must be a torch\.distributed process group .* got str"):
        dist_ssn.comm_hook("int8", group=group)
