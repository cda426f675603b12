"""DeepSpeed's configuration: what contradicts itself, or would be wrong with a bank, is one sentence before anything starts."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_ssn
from dist_ssn.engines import engine_class
from dist_ssn.engines.deepspeed import settings_of
from dist_ssn.errors import ShareError, UserError
from testing.ranks import run_ranks


def made() -> nn.Module:
    torch.manual_seed(0)
    return dist_ssn.share(nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16)), 0.5)


@pytest.mark.parametrize(
    ("config", "stage", "clip_norm", "said"),
    [
        ({"zero_optimization": {"stage": 1}}, 2, None, "engine.stage is 2, and DeepSpeed's configuration says 1"),
        ({"zero_optimization": {"stage": 4}}, None, None, "ZeRO's stage must be 0, 1, 2 or 3, got 4"),
        ({"optimizer": {"type": "Adam"}}, None, None, "'optimizer', which does not work with a bank"),
        ({"scheduler": {"type": "WarmupLR"}}, None, None, "'scheduler', which does not work with a bank"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, 3, None, "'offload_param'"),
        ({"zero_optimization": {"zero_quantized_gradients": True}}, 3, None, "'zero_quantized_gradients'"),
        ({"gradient_accumulation_steps": 4}, None, None, "gradient_accumulation_steps: 4: leave it out"),
        ({"gradient_clipping": 2.0}, None, 1.0, "clip_norm is 1, and DeepSpeed's configuration says gradient_clipping: 2.0"),
        ("missing.json", None, None, "missing.json cannot be read"),
    ],
)  # fmt: skip
def test_a_bad_configuration_is_refused(config: Any, stage: int | None, clip_norm: float | None, said: str) -> None:
    with pytest.raises(UserError) as error:
        settings_of(made(), config, stage, clip_norm)
    assert said in str(error.value)


def test_a_file_that_is_not_an_object_is_refused(tmp_path: Path) -> None:
    for text, said in (("[1]", "must be a JSON object"), ("{", "cannot be read")):
        (tmp_path / "ds.json").write_text(text)
        with pytest.raises(UserError, match=said):
            settings_of(made(), tmp_path / "ds.json", None, None)


def test_the_users_settings_stay_and_the_bank_stays_gathered() -> None:
    model = made()
    settings = settings_of(model, {"zero_optimization": {"stage": 3, "reduce_bucket_size": 77}}, None, None)
    assert settings["zero_optimization"]["reduce_bucket_size"] == 77
    assert settings["zero_optimization"]["stage3_param_persistence_threshold"] > max(
        p.numel() for p in model.parameters()
    )
    assert json.loads(json.dumps(settings)) == settings


def _deepspeed(rank: int) -> Any:
    """DeepSpeed as a user's script has it, but for a collective of its own, whose compiler takes most of a minute."""
    os.environ["LOCAL_RANK"] = str(rank)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _zero_init(rank: int, world_size: int) -> str:
    deepspeed = _deepspeed(rank)
    deepspeed.init_distributed(dist_backend="gloo")
    with deepspeed.zero.Init():
        model = nn.Linear(8, 8)
    try:
        dist_ssn.share(model, 0.5)
    except ShareError as error:
        return str(error)
    return "shared"


def _own_script(rank: int, world_size: int, threshold: int) -> tuple[list[str], float]:
    deepspeed = _deepspeed(rank)
    model = made()
    zero = {"stage": 3, "stage3_param_persistence_threshold": threshold}
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "zero_allow_untested_optimizer": True}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            loss = engine(torch.ones(4, 16)).square().mean()
            engine.backward(loss)
            engine.step()
    return [str(w.message) for w in caught if "stage3_param" in str(w.message)], float(loss)


@pytest.mark.distributed
def test_zero_init_is_refused_and_a_small_threshold_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed", reason="pip install 'dist_ssn[deepspeed]'")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert "is partitioned by DeepSpeed (zero.Init" in run_ranks(_zero_init, 1)[0]
    size = max(p.numel() for p in made().parameters())
    (quiet, loss), (warned, same) = (run_ranks(_own_script, 2, threshold)[0] for threshold in (size + 1, 1))
    assert quiet == [] and len(warned) == 1
    assert f'"stage3_param_persistence_threshold": {size + 1}' in warned[0]
    assert same == pytest.approx(loss, rel=1e-6)


class Branches(nn.Module):
    """Layers that read one bank, in an order that depends on the step."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.left, self.right = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor, order: str) -> torch.Tensor:
        x = self.stem(x)
        for name in order.split():
            x = x + self.get_submodule(name)(x).tanh()
        return x


ORDERS = ("left right", "right left", "right", "left left right")


def _orders(rank: int, world_size: int, stage: int) -> float:
    """The difference to one process after steps that use the layers in other orders, or not at all, or twice."""
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank))
    data = torch.randn(len(ORDERS), 8, 8, generator=torch.Generator().manual_seed(1))
    alone, model = (dist_ssn.share(Branches(), 0.5, mapping="single") for _ in range(2))
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    engine = engine_class("deepspeed")(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=stage)
    for x, order in zip(data, ORDERS, strict=True):
        alone(x, order).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with engine.accumulating(True):
            engine.backward(engine.model(x[rank::world_size], order).square().mean())
        engine.step()
    found, expected = engine.gathered()[0], dict(alone.named_parameters())
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_order_in_which_layers_read_a_bank_may_change(stage: int) -> None:
    """Stage 3 notes the order of the first step, to gather ahead."""
    pytest.importorskip("deepspeed", reason="pip install 'dist_ssn[deepspeed]'")
    assert max(run_ranks(_orders, 2, stage)) <= 1e-5


def _after_a_kill(rank: int, world_size: int, folder: str) -> list[str]:
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank), TORCH_EXTENSIONS_DIR=folder)
    model = made()
    engine_class("deepspeed")(model, torch.optim.SGD(model.parameters(), lr=0.1))
    return sorted(path.name for path in Path(folder).rglob("*") if path.is_file())


@pytest.mark.distributed
def test_a_lock_that_a_killed_job_left_is_not_waited_for(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="pip install 'dist_ssn[deepspeed]'")
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "lock").touch()
    assert run_ranks(_after_a_kill, 1, str(tmp_path)) == [["lock"]]
