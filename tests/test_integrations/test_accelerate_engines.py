"""Accelerate's plugins for FSDP2 and DeepSpeed on shared models: two processes, compared with one."""

from __future__ import annotations

import copy
import importlib.util
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dist_ssn import parameter_groups, share
from testing.ranks import run_ranks

accelerate = pytest.importorskip("accelerate")
pytest.importorskip("transformers")
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState  # noqa: E402

from tests.test_integrations.hugging_face import build, rows  # noqa: E402

BLOCKS = {"fsdp_version": 2, "auto_wrap_policy": "transformer_based_wrap"}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def join(rank: int, world_size: int, port: int) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")


def accelerator_of(kind: DistributedType, **plugin: Any) -> Any:
    """An Accelerator on CPUs that does as on GPUs.

    On CPUs it makes DDP of an FSDP plugin, and takes DeepSpeed's ranks for single processes.
    """
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = kind
    return accelerate.Accelerator(**plugin)


def model_of(parts: bool) -> nn.Module:
    """A GPT-2 in double precision, shared as a whole or each block by itself."""
    model: Any = build("GPT-2").double().eval()
    for part in model.transformer.h if parts else [model]:
        share(part, 0.3)
    return model


def batch(rank: int = 0, world_size: int = 1) -> dict[str, Tensor]:
    data = rows("GPT-2", 8)[rank::world_size]
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def whole(values: Tensor) -> Tensor:
    return values.full_tensor() if isinstance(values, DTensor) else values


def step(
    model: nn.Module, optimizer: Any, accelerator: Any, inputs: dict[str, Tensor], clip: float | None = None
) -> None:
    loss = model(**inputs).loss
    accelerator.backward(loss) if accelerator else loss.backward()
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad()


def fsdp2(rank: int, world_size: int, port: int, folder: str) -> list[tuple[list[str], float, float, float]]:
    """Names of the units, and the largest differences of gradients, of parameters after two steps, and after resuming."""
    join(rank, world_size, port)
    found = []
    for parts, options in (
        (False, {}),
        (True, {"activation_checkpointing": True, "cpu_ram_efficient_loading": False}),
    ):
        model = model_of(parts)
        alone = copy.deepcopy(model)
        plugin = accelerate.FullyShardedDataParallelPlugin(**BLOCKS | options)
        accelerator = accelerator_of(DistributedType.MULTI_GPU, fsdp_plugin=plugin)
        optimizers = [torch.optim.AdamW(parameter_groups(m, lr=1e-3)) for m in (model, alone)]
        prepared, optimizer = accelerator.prepare(model, optimizers[0])
        units = [name for name, module in prepared.named_modules() if hasattr(module, "set_requires_gradient_sync")]

        def apart(prepared: nn.Module = prepared, alone: nn.Module = alone, grad: bool = False) -> float:
            pairs = zip(prepared.parameters(), alone.parameters(), strict=True)
            values = [(p.grad, q.grad) if grad else (p.detach(), q.detach()) for p, q in pairs]
            return max(float((whole(p) - q).abs().max()) for p, q in values)  # type: ignore[arg-type]

        accelerator.backward(prepared(**batch(rank, world_size)).loss)
        alone(**batch()).loss.backward()
        gradients = apart(grad=True)
        optimizer.step()
        optimizers[1].step()
        optimizer.zero_grad()
        optimizers[1].zero_grad()
        where = f"{folder}/{len(found)}"
        accelerator.save_state(where)
        step(alone, optimizers[1], None, batch())
        trained = []
        for _ in range(2):
            step(prepared, optimizer, accelerator, batch(rank, world_size))
            trained.append(apart())
            accelerator.load_state(where)
        found.append((units, gradients, *trained))
    return found


@pytest.mark.distributed
@pytest.mark.skipif(accelerate.__version__.startswith("1.10."), reason="its load_state fails for a dense model, too")
@pytest.mark.filterwarnings("ignore:.*OMP_NUM_THREADS")
def test_fsdp2_with_its_block_wise_wrapping(tmp_path: Path) -> None:
    """Banks of the whole model, and of each block; with activation checkpointing; a saved state resumes."""
    results = run_ranks(fsdp2, 2, free_port(), str(tmp_path), group=False)
    for found in results:
        for units, *differences in found:
            assert {"", "transformer.h.0", "transformer.h.1"} <= set(units)
            assert max(differences) < 1e-10


def zero2(rank: int, world_size: int, port: int, folder: str) -> tuple[str, float, float]:
    join(rank, world_size, port)
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # is compiled at the start otherwise
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    model = model_of(False).float()
    alone = copy.deepcopy(model)
    plugin = accelerate.DeepSpeedPlugin(zero_stage=2, gradient_accumulation_steps=1, gradient_clipping=1.0)
    accelerator = accelerator_of(DistributedType.DEEPSPEED, deepspeed_plugin=plugin)
    accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 4
    # Adam would make full steps of the rounding errors that stand for gradients of zero.
    optimizers = [torch.optim.SGD(parameter_groups(m), lr=0.1, momentum=0.9) for m in (model, alone)]
    prepared, optimizer = accelerator.prepare(model, optimizers[0])

    def apart() -> float:
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        return max(float((p - q).detach().abs().max()) for p, q in pairs)

    for _ in range(3):
        step(prepared, optimizer, accelerator, batch(rank, world_size))
        step(alone, optimizers[1], None, batch(), 1.0)
    accelerator.save_state(folder)
    step(alone, optimizers[1], None, batch(), 1.0)
    trained = []
    for _ in range(2):
        step(prepared, optimizer, accelerator, batch(rank, world_size))
        trained.append(apart())
        accelerator.load_state(folder)
    return type(optimizer.optimizer).__name__, *trained


@pytest.mark.distributed
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_the_deepspeed_plugin_with_zero_2(tmp_path: Path) -> None:
    for kind, trained, resumed in run_ranks(zero2, 2, free_port(), str(tmp_path), group=False):
        assert kind == "DeepSpeedZeroOptimizer"
        assert max(trained, resumed) < 1e-5  # in single precision
