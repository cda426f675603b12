"""Local updates that go on from a state, and workers that fail: all raise together, or one is left out by name."""

from __future__ import annotations

import gc
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dist_ssn import CommMeter, LocalUpdates, share
from dist_ssn.errors import CheckpointError, UserError
from dist_ssn.sharing.bank import Bank
from testing.ranks import run_ranks
from tests.test_sync.test_local_updates import Tied, adam, batch, flat, loss_of, sgd

distributed = pytest.mark.distributed


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, n: int, first: int, last: int) -> None:
    for step in range(first, last + 1):
        optimizer.zero_grad()
        loss_of(model, batch(step, rank, n)).backward()
        optimizer.step()


def through_a_file(content: Any) -> Any:
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def raised(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    return str(caught.value)


# ---------------------------------------------------------------- states


def test_a_state_in_memory_is_a_copy_and_has_counters() -> None:
    """Rolled back in the same process; the outer momentum and integer buffers come back, too."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None)).double()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def train(first: int, last: int) -> list[Tensor]:
        for step in range(first, last):
            optimizer.zero_grad()
            model(
                torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
            ).square().sum().backward()
            optimizer.step()
        return [value.clone() for value in model.state_dict().values()]

    with LocalUpdates(model, optimizer, every=2) as local:
        train(0, 5)
        state = local.state_dict()
        once = train(5, 9)
        local.load_state_dict(state)
        twice = train(5, 9)
        local.load_state_dict(state)
        thrice = train(5, 9)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(once, twice, thrice, strict=True))
    with (
        LocalUpdates(model, optimizer, every=2, outer="average") as local,
        pytest.warns(UserWarning, match=r"lr 0\.7 \(not 1"),
    ):
        local.load_state_dict(state)


@pytest.mark.parametrize("step", [None, "3", 2.5, -1, True])
def test_a_restart_needs_a_number_of_steps(step: Any) -> None:
    """A round would never end after step 2.5."""
    model = nn.Linear(4, 4)
    with LocalUpdates(model, sgd(model), every=4) as local:
        assert "step must be a whole number of steps, at least 0" in raised(lambda: local.restart(step))


def test_other_settings_than_those_of_a_state_are_said() -> None:
    model = nn.Linear(4, 4)
    optimizer = sgd(model)
    with LocalUpdates(model, optimizer, every=4) as local:
        state = through_a_file(local.state_dict())
    with LocalUpdates(model, optimizer, every=6, warmup=2) as local:
        with pytest.warns(UserWarning, match=r"every 6 \(not 4\), warmup 2 \(not 0\)$"):
            local.load_state_dict(state)
        del state["settings"]  # as states before 2026-11-29
        local.load_state_dict(state)


def test_a_state_has_no_buffers_that_say_what_a_bank_is() -> None:
    """They are integers, as counters are, and a state would put those of another model in their place."""
    model = share(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), 0.5, keep=True)
    with LocalUpdates(model, torch.optim.SGD(model.parameters(), 0.1), every=2) as local:
        state = local.state_dict()
    assert list(state["own_buffers"]) == ["1.num_batches_tracked"]


def _resumed(rank: int, n: int, at: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Parameters after 12 steps: undisturbed, and gone on from this worker's state after step `at`."""
    model, states = Tied(torch.float32), None
    optimizer = adam(model)
    with LocalUpdates(model, optimizer, **options) as local:
        steps(model, optimizer, rank, n, 1, at)
        states = through_a_file([local.state_dict(), optimizer.state_dict()])
        steps(model, optimizer, rank, n, at + 1, 12)
    whole = flat(model)
    model = Tied(torch.float32)
    optimizer = adam(model)
    with LocalUpdates(model, optimizer, **options) as local:
        local.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
        steps(model, optimizer, rank, n, at + 1, 12)
    return whole, flat(model)


def _from_the_first(rank: int, n: int, **options: Any) -> tuple[list[str], Tensor]:
    """Warnings and parameters of workers that all go on from the state of the first."""
    model = Tied(torch.float32)
    optimizer = adam(model)
    with LocalUpdates(model, optimizer, every=4, **options) as local:
        steps(model, optimizer, rank, n, 1, 6)
        states = [through_a_file(local.state_dict())]
        dist.broadcast_object_list(states)
    with LocalUpdates(model, optimizer, every=4, **options) as local, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        local.load_state_dict(states[0])
        steps(model, optimizer, rank, n, 7, 12)
    return [str(warning.message) for warning in caught], flat(model)


STATES = [
    ("in a round", 6, {"every": 4}),
    ("in a round, four bits", 6, {"every": 4, "codec": "int4"}),
    ("at a round's end", 8, {"every": 4, "codec": "int4", "outer": "average"}),
    ("in a round, late", 6, {"every": 4, "codec": "int8", "delay": 1}),
    ("at a round's end, late", 8, {"every": 4, "delay": 1}),
    ("warming up", 2, {"every": 4, "delay": 1, "warmup": 3}),
]


def _states(rank: int, n: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: _resumed(rank, n, at, **options) for name, at, options in STATES}
    found["of the first"] = _from_the_first(rank, n, codec="int4")
    found["of the first, late"] = _from_the_first(rank, n, delay=1)
    return found


@distributed
def test_going_on_from_a_state_equals_undisturbed_training() -> None:
    ranks = run_ranks(_states, 2)
    for name, _, _ in STATES:
        whole, resumed = ranks[0][name]
        assert torch.equal(whole, resumed), name
        assert torch.equal(ranks[1][name][1], resumed), name
    for name in ("of the first", "of the first, late"):
        assert ranks[0][name][0] == []
        (warning,) = ranks[1][name][0]
        assert warning == (
            "this state is worker 0's of 2, and this is worker 1 of 2: it goes on from the anchor, and its feedback starts at zero"
        )
        assert torch.equal(ranks[0][name][1], ranks[1][name][1])


def test_a_state_of_something_else_is_refused_whole() -> None:
    model = Tied()
    model.register_buffer("cache", torch.zeros(2))
    with LocalUpdates(model, sgd(model), every=4) as local:
        state, before = local.state_dict(), flat(model)
        for change, sentence in (
            ({"format": 7}, "this is no state of LocalUpdates that this version reads (format 7, needed is 1)"),
            ({"step": True}, "the state of LocalUpdates is damaged: step must be of type int"),
            (
                {"plan": "abc"},
                "the state of LocalUpdates is of another plan (abc, the model's is dense): share the model with",
            ),
            (
                {"shapes": state["shapes"] | {"norm.weight": [5]}},
                "of another model: norm.weight has the shape (5,) there and (4,) here",
            ),
            ({"shapes": {}}, "of another model: first.weight has the shape no place there and (4, 4) here"),
            ({"shapes": dict(reversed(state["shapes"].items()))}, "its parameters have another order"),
            ({"anchor": [torch.zeros(3)]}, "is damaged: its anchor must have [28] elements"),
            ({"parameters": [torch.zeros(16)]}, "is damaged: its parameters must have [16, 4, 4, 4] elements"),
            ({"start": [torch.zeros(16)] * 4}, "is damaged: its start must have [16, 4, 4, 4] elements"),
            ({"outer": {}}, "is damaged: outer must be the state_dict() of an optimizer"),
            ({"sent": {"mean": torch.zeros(3)}}, "is damaged: sent must have a mean of 28 values, norms, left_out"),
            ({"settings": None}, "is damaged: settings must be of type dict"),
            (
                {"own_buffers": {"cache": torch.zeros(9)}},
                "of another model: the buffer cache has the shape (9,) there and (2,) here",
            ),
            (
                {"outer_class": "Adam"},
                "was saved with the outer optimizer Adam, and this one is SGD: give the same outer",
            ),
        ):
            with pytest.raises(CheckpointError) as caught:
                local.load_state_dict(state | change)
            assert sentence in str(caught.value)
        assert torch.equal(flat(model), before)


# ---------------------------------------------------------------- faults


def _pair(rank: int, n: int, **options: Any) -> tuple[Tied, torch.optim.Optimizer, LocalUpdates]:
    model = Tied()
    optimizer = adam(model)
    return model, optimizer, LocalUpdates(model, optimizer, **options)


def _spoiled(rank: int, n: int, value: float) -> tuple[list[str], Tensor, bool, list[float]]:
    """The last worker's parameters get `value` before the end of the first of three rounds."""
    model, optimizer, local = _pair(rank, n, every=2, outer="average")
    with local, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(model, optimizer, rank, n, 1, 1)
        if rank == n - 1:
            with torch.no_grad():
                model.first.weight.fill_(value)
        start = flat(Tied())
        optimizer.zero_grad()
        loss_of(model, batch(2, rank, n)).backward()
        optimizer.step()
        after = flat(model)
        steps(model, optimizer, rank, n, 3, 6)
        assert local.last is not None
        return [str(w.message) for w in caught], after - start, bool(flat(model).isfinite().all()), [*local.last.norms]


def _apart(rank: int, n: int) -> str:
    """The last worker synchronizes where the others end a round."""
    model, optimizer, local = _pair(rank, n, every=2)
    try:
        if rank == n - 1:
            steps(model, optimizer, rank, n, 1, 1)
            return raised(local.synchronize)
        return raised(lambda: steps(model, optimizer, rank, n, 1, 2))
    finally:
        local.close()


def _forgotten(rank: int, n: int) -> list[str]:
    """Warnings of those that are never closed: in a round, with a mean on its way, at a round's end; and with such states."""
    found = []
    states: list[Any] = []
    for last, delay in ((3, 0), (2, 1), (2, 0), (0, 0), (1, 0)):
        model, optimizer, local = _pair(rank, n, every=2, delay=delay)
        steps(model, optimizer, rank, n, 1, last)
        if last < 2:  # the first state is in a round, the last one at its end
            local.load_state_dict(states[0 if last == 0 else -1])
        else:
            states.append(local.state_dict())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del model, optimizer, local
            gc.collect()
        found += [str(warning.message) for warning in caught]
    return found


def _flipped(rank: int, n: int) -> str:
    model, optimizer, local = _pair(rank, n, every=2)
    steps(model, optimizer, rank, n, 1, 1)
    if rank == n - 1:
        local._replica.anchor.flats[0][3] += 1e-9
    try:
        return raised(lambda: steps(model, optimizer, rank, n, 2, 2))
    finally:
        local.close()


def _changed(rank: int, n: int) -> list[str]:
    """Errors: values loaded too late, a second optimizer; and calls inside of `anchored`."""
    model, optimizer, local = _pair(rank, n, every=2)
    if rank == 0:
        model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    found = [raised(lambda: steps(model, optimizer, rank, n, 1, 2))]
    local.close()
    found.append(raised(local.__enter__))
    model = Tied()
    first, *others = [p for p in model.parameters() if p.requires_grad]
    pair = torch.optim.SGD([first], 0.1), torch.optim.SGD(others, 0.1)
    with LocalUpdates(model, pair[0], every=1), LocalUpdates(model, pair[1], every=1):
        steps(model, pair[1], rank, n, 1, 1)
        pair[0].step()
    assert len({tuple(one) for one in gathered(flat(model).tolist())}) == 1
    local = LocalUpdates(model, pair[0], every=2)
    steps(model, pair[1], rank, n, 1, 1)
    pair[0].step()
    found.append(raised(pair[0].step))
    local.close()
    model, optimizer, local = _pair(rank, n, every=2)
    with local.anchored():
        found += [raised(action) for action in (optimizer.step, local.synchronize, local.state_dict)]
    local.close()
    return found


def gathered(value: Any) -> list[Any]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _thawed(rank: int, n: int) -> list[str]:
    """The last worker's optimizer gets a parameter; its model gets another dtype, and a parameter another shape."""

    def resized(model: nn.Module) -> None:
        model.norm.bias.data = torch.zeros(1)  # pyright: ignore

    changes: tuple[Callable[[Any, Any], Any], ...] = (
        lambda model, optimizer: optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]}),
        lambda model, optimizer: model.half(),
        lambda model, optimizer: resized(model),
    )
    found = []
    for change in changes:
        model, optimizer, local = _pair(rank, n, every=2)
        steps(model, optimizer, rank, n, 1, 1)
        if rank == n - 1:
            change(model, optimizer)
        found.append(raised(local.synchronize))
        local.close()
    return found


def _all_lost(rank: int, n: int) -> str:
    model, optimizer, local = _pair(rank, n, every=2)
    steps(model, optimizer, rank, n, 1, 1)
    with torch.no_grad():
        model.norm.bias.fill_(torch.inf)
    try:
        with warnings.catch_warnings(record=True):
            return raised(lambda: steps(model, optimizer, rank, n, 2, 2))
    finally:
        local.close()


def _differ(rank: int, n: int) -> list[str]:
    other = Tied()
    other.norm = nn.LayerNorm(4, bias=rank == 0, dtype=torch.float64)
    mine = nn.Linear(2, 2)
    return [
        raised(lambda: _pair(rank, n, every=2 + rank)),
        raised(lambda: LocalUpdates(other, sgd(other))),
        raised(lambda: LocalUpdates(mine, sgd(mine), every=0 if rank else 2)),
    ]


def _wrapped(rank: int, n: int) -> list[str]:
    model = Tied()
    optimizer = adam(model)
    wrapper = DistributedDataParallel(model)
    found = [raised(lambda: LocalUpdates(wrapper, optimizer))]
    local = LocalUpdates(model, optimizer)
    found.append(raised(lambda: wrapper(batch(0, rank, n))))
    local.close()
    wrapper(batch(0, rank, n))
    return found


class Normed(nn.Module):
    mask: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf, 0.1]))
        self.register_buffer("count", torch.tensor([True, False]))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layer(x))


def _buffers(rank: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Running means in a round, and after it; the mask; the flags; bytes of the buffers' exchange.

    A look at the anchor in the round changes nothing.
    """
    model = Normed()
    with torch.no_grad():
        model.mask[2] += rank
        model.count.fill_(rank == 1)
    optimizer = sgd(model)
    with LocalUpdates(model, optimizer, every=2, outer="average") as local:
        steps(model, optimizer, rank, n, 1, 2)
        between, before = model.norm.running_mean.clone(), flat(model)  # pyright: ignore
        with torch.no_grad():
            model.layer.weight += 1
        with local.anchored():
            common = model.norm.running_mean.clone()  # pyright: ignore
            assert torch.equal(flat(model), before)
        assert torch.equal(model.norm.running_mean, between)  # pyright: ignore
        with torch.no_grad():
            assert torch.equal(model.layer.weight - 1, before[:16].view(4, 4) + 1 - 1)
            model.layer.weight.copy_(before[:16].view(4, 4))
        with CommMeter() as meter:
            local.synchronize()
    assert model.norm.running_mean is not None and torch.equal(model.norm.running_mean, common)
    return between, model.norm.running_mean, model.mask, model.count, meter.totals().logical_bytes


def _counted(rank: int, n: int) -> dict[str, tuple[int, int, int]]:
    found = {}
    for codec in ("none", "int4"):
        model, optimizer, local = _pair(rank, n, every=2, codec=codec)
        with local:
            steps(model, optimizer, rank, n, 1, 2)  # the first exchange also compares the ranks' settings
            with CommMeter() as meter:
                steps(model, optimizer, rank, n, 3, 8)
            purposes = {row["purpose"] for row in meter.ledger.rows()}
            assert purposes == {"synchronization"}
            found[codec] = (meter.totals().logical_bytes, local.exchange.packed_bytes, local._replica.anchor.size)
    return found


def _faults(rank: int, n: int) -> dict[str, Any]:
    return {
        "nan": _spoiled(rank, n, torch.nan),
        "large": _spoiled(rank, n, 100.0),
        "apart": _apart(rank, n),
        "forgotten": _forgotten(rank, n),
        "flipped": _flipped(rank, n),
        "thawed": _thawed(rank, n),
        "changed": _changed(rank, n),
        "all lost": _all_lost(rank, n),
        "differ": _differ(rank, n),
        "wrapped": _wrapped(rank, n),
        "buffers": _buffers(rank, n),
        "counted": _counted(rank, n),
    }


@distributed
def test_faults_are_named_on_all_ranks() -> None:
    ranks = run_ranks(_faults, 2)
    first, second = ranks
    reasons = {
        "nan": "a change that is not finite",
        "large": "a change of norm 400, more than 10 × the median of 0.0888",
    }
    for found in ranks:
        for fault, reason in reasons.items():
            (warning,), change, finite, norms = found[fault]
            assert warning.startswith(f"rank 1 sent {reason} after step 2")
            assert warning.endswith("it is left out, and goes on from the others' mean")
            assert finite and len(norms) == 2 and all(norm > 0 for norm in norms)
            assert torch.equal(change, first[fault][1])
        assert found["apart"] == (
            "the workers are not at the same place: rank 0 ends a round after step 2, rank 1 calls synchronize() after step 1; all "
            "must take the same number of optimizer steps (data of unequal length, a GradScaler that skips a step on one rank, or "
            "a state loaded on one rank only break this) and call synchronize() and anchored() together"
        )
        assert [message.partition(" after its")[0] for message in found["forgotten"]] == [
            "LocalUpdates ended 1 step",
            "LocalUpdates ended 0 steps",
            "LocalUpdates ended 1 step",
        ]
        assert found["flipped"].startswith("after step 2 the anchor on rank 1 differs from that on the others")
        assert found["all lost"].startswith("after step 2 no worker's change is finite")
        assert found["differ"][0].startswith("the settings of local updates on rank 1 differ from those on the others")
        assert found["differ"][1].startswith("the trained parameters on rank 1 differ from those on the others")
        assert found["wrapped"][0].startswith("DistributedDataParallel averages over rank")
        assert found["wrapped"][1].startswith("this forward runs in a DistributedDataParallel")
        late = "inside of anchored() would be lost"
        others = found["changed"][1:]
        assert "was closed" in others[0] and "give each optimizer a LocalUpdates of its own" in others[1]
        assert all(late in message for message in others[2:]) and len(others) == 5
        assert "the anchor on rank 1 differs" in found["changed"][0]
        assert "values were set there before the first forward" in found["changed"][0]
    assert all("changed after local updates began" in message for message in second["thawed"])
    assert all(message.startswith("rank 1 cannot take part in the synchroni") for message in first["thawed"])
    assert second["differ"][2] == "every must be a whole number of steps, at least 1, got 0"
    assert first["differ"][2].startswith("rank 1 cannot begin local updates")
    # A change by the first worker's two steps alone, within float32.
    alone, optimizer = Tied(), None
    optimizer = adam(alone)
    steps(alone, optimizer, 0, 2, 1, 2)
    assert (first["nan"][1] - (flat(alone) - flat(Tied()))).abs().max() < 1e-6
    assert torch.equal(first["nan"][1], first["large"][1])
    _check_buffers(*(found["buffers"] for found in ranks))
    for handed, packed, size in (found["counted"][codec] for found in ranks for codec in ("none", "int4")):
        assert handed == 3 * (packed + 6 * 8)
        assert packed in (4 * size, (2 + 12 // 2) + (2 + 16 // 2))  # a bias, a norm's gain and bias; and a matrix


def _check_buffers(first: Any, second: Any) -> None:
    assert not torch.equal(first[0], second[0])  # local in a round
    assert torch.equal(first[1], second[1])
    torch.testing.assert_close(first[1], (first[0] + second[0]) / 2)
    for found in (first, second):
        assert torch.equal(found[2], torch.tensor([0.0, -torch.inf, 0.1]))  # rank 0's, bit for bit
        assert not found[3].any()
        assert found[4] == 6 * 8 + 4 * (4 + 4 + 3 + 1 + 1)  # and a count of the element that is not finite


# ---------------------------------------------------------------- one process


def test_one_worker_takes_the_outer_step_alone() -> None:
    model, optimizer = Tied(), None
    optimizer = sgd(model)
    with LocalUpdates(model, optimizer, every=3, outer="average", outer_rate=0.5) as local:
        start = flat(model)
        plain = Tied()
        steps(plain, sgd(plain), 0, 1, 1, 3)
        steps(model, optimizer, 0, 1, 1, 3)
        torch.testing.assert_close(flat(model), (start + flat(plain)) / 2, rtol=0, atol=1e-7)
        assert local.last is not None and local.last.agreement is None
    steps(model, optimizer, 0, 1, 4, 6)
    assert local.step == 3  # the block is left


def test_what_travels_in_16_bits() -> None:
    """Gains, coefficients, biases and norms; banks, differences and matrices are for the codec. Tied parameters travel once."""
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 64), nn.Linear(64, 32))
    share(model, 0.2, exclude=["3"], morph="offset:templates=2,gains=true,rank=2")
    banks = [module for module in model.modules() if isinstance(module, Bank)]
    with LocalUpdates(model, sgd(model)) as local:
        names = {t.name.rpartition(".")[2]: t.plain for t in local._replica.anchor.trained}
        (plain,) = local._replica.anchor.plain
    assert not any(names[name] for name in ("bank", "differences"))
    small = sum(p.numel() for bank in banks for p in (bank.coefficients, bank.gains) if p is not None)
    assert small and plain.stop - plain.start == small + 64 + 2 * 64 + 64 + 32
    assert plain.stop == sum(p.numel() for p in model.parameters())


def test_an_exception_does_not_synchronize() -> None:
    model = Tied()
    optimizer = sgd(model)
    with pytest.raises(KeyError), LocalUpdates(model, optimizer, every=3) as local:
        steps(model, optimizer, 0, 1, 1, 2)
        before = flat(model)
        raise KeyError
    assert torch.equal(flat(model), before) and local.last is None
    LocalUpdates(model, optimizer).close()  # the optimizer is free again


def test_a_round_of_one_worker_keeps_its_16_bits() -> None:
    """A difference of two 16-bit numbers may need more than 16 bits."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = sgd(model)
    with LocalUpdates(model, optimizer, every=1, outer="average"):
        with torch.no_grad():
            model.weight.fill_(0.00393676757812)
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        assert model.weight.item() == torch.tensor(0.00393676757812, dtype=torch.bfloat16).item()


def test_small_outer_steps_of_16_bits_add_up() -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=2**-8)
    with LocalUpdates(model, optimizer, every=1, outer="average", outer_rate=0.25):
        for _ in range(8):
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step()
    assert model.weight.item() == 1 - 8 * 2**-10  # each of the steps alone is below what 16 bits resolve at 1


class FakeDeepSpeed(nn.Linear):
    pass


FakeDeepSpeed.__module__ = "deepspeed.runtime.engine"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"every": 0}, "every must be a whole number of steps, at least 1, got 0"),
        ({"every": 2.5}, "every must be a whole number of steps, at least 1, got 2.5"),
        ({"every": True}, "every must be a whole number of steps, at least 1, got True"),
        ({"warmup": -1}, "warmup must be a whole number of steps, at least 0, got -1"),
        ({"delay": 2}, "delay must be 0 (apply a round's mean at its end) or 1 (at the end of the next round), got 2"),
        ({"outlier": 1}, "outlier must be a multiple of the median norm above 1, or None, got 1"),
        ({"codec": "int5"}, "unknown codec 'int5'"),
        ({"codec": ["int4"]}, "unknown codec \"['int4']\""),
        (
            {"outer": "nestrov"},
            "unknown outer optimizer 'nestrov': known are average, nesterov; did you mean 'nesterov'?",
        ),
        ({"outer": 3}, "outer must be 'average' or 'nesterov', a torch optimizer, or a function that makes one"),
        (
            {"outer": lambda tensors: None},
            "outer made NoneType, and must make a torch optimizer over the list of tensors",
        ),
        ({"outer_rate": 0}, "outer_rate must be a number above 0, or None for the default, got 0"),
        (
            {"outer_momentum": 1.0},
            "outer_momentum must be a number at least 0 and below 1, or None for the default, got 1.0",
        ),
        ({"outer": "average", "outer_momentum": 0.5}, "outer_momentum goes with outer 'nesterov', not with 'average'"),
        ({"outer": torch.optim.SGD, "outer_rate": 0.5}, "outer_rate goes with outer 'nesterov' or 'average'"),
        ({"group": "all"}, "LocalUpdates got a group, but torch.distributed is not initialized"),
    ],
)
def test_settings_that_cannot_be(options: dict[str, Any], sentence: str) -> None:
    model = Tied()
    assert sentence in raised(lambda: LocalUpdates(model, sgd(model), **options))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("SGD", {"lr": 0.3, "momentum": 0.5, "nesterov": True}),
        ("Adam", {"lr": 0.2, "betas": (0.5, 0.9), "decoupled_weight_decay": True}),
        ("AdamW", {"lr": 0.2, "weight_decay": 0.1, "amsgrad": True}),  # whose defaults have one that it does not take
        ("RMSprop", {"lr": 0.2, "centered": True}),
    ],
)
def test_an_outer_optimizer_is_made_again_with_its_settings(name: str, settings: dict[str, Any]) -> None:
    def settings_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}

    given, model = getattr(torch.optim, name)([torch.zeros(1)], **settings), Tied()
    with LocalUpdates(model, sgd(model), outer=given) as local:
        assert type(local.outer) is type(given) and settings_of(local.outer) == settings_of(given)


def test_models_and_optimizers_that_cannot_be() -> None:
    model, other = Tied(), nn.Linear(2, 2)
    optimizer = sgd(model)
    wide = FakeDeepSpeed(2, 2)
    assert "do not work with DeepSpeed" in raised(lambda: LocalUpdates(wide, sgd(wide)))
    assert "the optimizer holds 4 of 4 parameters that are not the model's" in raised(
        lambda: LocalUpdates(other, optimizer)
    )
    assert "needs a model and a torch optimizer of it, in this order, got Tied and LambdaLR" in raised(
        lambda: LocalUpdates(model, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0))  # type: ignore[arg-type]
    )
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert "trains no parameter of the model" in raised(
        lambda: LocalUpdates(frozen, torch.optim.SGD(frozen.parameters()))
    )
    with LocalUpdates(model, optimizer):
        assert "another LocalUpdates averages after the steps of this SGD already" in raised(
            lambda: LocalUpdates(model, optimizer)
        )
