"""DeepSpeed, ZeRO stages 0 to 3: only the banks and the model's own parameters are in its flat buffers.

Source: Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]  # torch documents it there
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dist_ssn.comm.meter import purpose
from dist_ssn.engines.base import Engine
from dist_ssn.engines.overlap.delay import without_delay
from dist_ssn.engines.whole_state import OptimizerState, load_whole_state, whole_state
from dist_ssn.engines.world.divergence import require_one_plan
from dist_ssn.errors import UserError
from dist_ssn.sharing.bases import frozen_beside

_REFUSED = {
    "optimizer": "the engine takes the optimizer as an argument, so that it holds the banks: make it before",
    "scheduler": "the engine takes the scheduler as an argument",
    "compression_training": "it changes layers' weights, which are generated here",
}
_REFUSED_ZERO = {
    "offload_param": "it removes a bank between two layers that read it",
    "zero_quantized_weights": "it has no CPU path, and was not tried with a bank",
    "zero_quantized_gradients": "it has no CPU path, and was not tried with a bank",
    "zero_hpz_partition_size": "it was not tried with a bank",
}


class DeepSpeedEngine(Engine):
    """Trains a model by `deepspeed.initialize`.

    Args:
        model: see `Engine`.
        optimizer: see `Engine`.
        scheduler: see `Engine`.
        clip_norm: see `Engine`.
        config: the user's own DeepSpeed configuration, a dict or the path of a JSON file.
        stage: ZeRO's stage, 0 to 3; None: that of the configuration, or 1.

    Raises:
        UserError: DeepSpeed is not installed; options and configuration contradict each other, or would train wrongly.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        scheduler: LRScheduler | None = None,
        clip_norm: float | None = None,
        config: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        stage: int | None = None,
    ) -> None:
        super().__init__(model, optimizer, scheduler=scheduler, clip_norm=clip_norm)
        settings = settings_of(model, config, stage, clip_norm)
        deepspeed = _deepspeed(next(model.parameters()).device)
        self.stage: int = settings["zero_optimization"]["stage"]
        self.replicated = self.stage < 3
        self.clip_norm = settings["gradient_clipping"] or None
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        with purpose("initialization"):
            require_one_plan(model)
            with _left_out(frozen_beside(model).values()):
                self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        self.model = self._engine

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Surrounds forward and backward of one micro-batch."""
        self._engine.set_gradient_accumulation_boundary(last)
        with purpose("parameters"):
            yield

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Computes the gradients of a micro-batch.

        Args:
            loss: scalar, the mean over this process's samples, divided by the number of micro-batches.
            last: it is the step's last micro-batch.

        Raises:
            UserError: a gradient grows more than once at stage 2 or 3, which send it as soon as it grows.
        """
        try:
            with purpose("gradients"):
                self._engine.backward(loss)
        except AssertionError as error:
            raise UserError(
                f"DeepSpeed at stage {self.stage} cannot reduce these gradients ({error or 'its own assertion failed'}); a bank "
                "that several reentrant checkpoints read grows more than once: checkpoint with use_reentrant=False, or use "
                "engine.stage 0 or 1"
            ) from error

    def step(self) -> Tensor | None:
        """Clips by the global norm, updates the parameters, and gathers partitioned ones; see `Engine.step`."""
        with purpose("parameters"):
            self._engine.step()
        if self.stage == 3:
            # Trap (DeepSpeed 0.19): a parameter without a gradient in a step would get its previous gradient once more.
            self._engine.optimizer.grad_partitions_flat_buffer.zero_()
        if self.scheduler is not None:
            self.scheduler.step()
        norm = self._engine.get_global_grad_norm()  # None at stage 0
        return torch.as_tensor(norm) if self.clip_norm and norm is not None else None

    def gathered(self) -> tuple[dict[str, Tensor], OptimizerState]:
        """Whole parameters (the master copies, in fp32) and optimizer state; from stage 1 on, one collective per tensor."""
        if not self.stage:
            return whole_state(self.module, self.optimizer)
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        self._link()
        # Entries with one element per parameter, and the others ("step"), which are equal for all parameters.
        elementwise, plain = set[str](), dict[str, Any]()
        for flat in self._flat():
            for key, value in self.optimizer.state[flat].items():
                if _is_elementwise(value, flat):
                    elementwise.add(key)
                elif value is not None:
                    plain[key] = value
        parameters: dict[str, Tensor] = {}
        state: OptimizerState = {}
        for name, parameter in self.module.named_parameters():
            parameters[name] = parameter.detach().cpu()
            if parameter.requires_grad:
                shape = getattr(parameter, "ds_shape", parameter.shape)
                parameters[name] = safe_get_full_fp32_param(parameter).detach().reshape(shape).cpu()  # pyright: ignore
                found = {key: safe_get_full_optimizer_state(parameter, key) for key in sorted(elementwise)}
                state[name] = {
                    key: value.detach().reshape(shape).cpu() for key, value in found.items() if value is not None
                }
                state[name] |= {key: copy.deepcopy(value) for key, value in plain.items()}
        return parameters, state

    def kept(self) -> dict[str, Tensor]:
        """See `Engine.kept`; at stage 3, partitioned parameters are gathered."""
        from deepspeed import zero

        with zero.GatheredParameters(list(frozen_beside(self.module).values()), enabled=self.stage == 3):
            return {name: value.clone() for name, value in super().kept().items()}

    def scatter(self, parameters: dict[str, Tensor], optimizer: OptimizerState) -> None:
        """Loads this process's part of the whole tensors."""
        if not self.stage:
            return load_whole_state(self.module, self.optimizer, parameters, optimizer)
        from deepspeed import utils, zero

        optimizer = without_delay(optimizer)
        keys = {
            key
            for name, entries in optimizer.items()
            for key, value in entries.items()
            if _is_elementwise(value, parameters[name])
        }
        plain = {key: value for entries in optimizer.values() for key, value in entries.items() if key not in keys}
        for flat in self._flat():  # before its first step the optimizer has no such entries
            entries = self.optimizer.state[flat]
            entries.update({key: torch.zeros_like(flat) for key in keys - entries.keys()})
            entries.update({key: value.clone() if isinstance(value, Tensor) else value for key, value in plain.items()})
        self._link()
        for name, parameter in self.module.named_parameters():
            with zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.stage == 3), torch.no_grad():
                parameter.copy_(parameters[name])
            if not parameter.requires_grad:
                continue
            # Trap: at stage 3, DeepSpeed (0.19) cannot set a whole tensor that does not divide by the number of processes.
            kind = "local" if self.stage == 3 else "full"
            set_parameter = getattr(utils, f"safe_set_{kind}_fp32_param")
            set_state = getattr(utils, f"safe_set_{kind}_optimizer_state")
            set_parameter(parameter, self._part(parameters[name], parameter))
            for key in sorted(keys & optimizer.get(name, {}).keys()):
                set_state(parameter, self._part(optimizer[name][key], parameter), key)

    def _part(self, value: Tensor, parameter: Tensor) -> Tensor:
        """The tensor that DeepSpeed sets on this process: at stage 3 its part, padded to the size of all parts."""
        value = value.to(parameter.device, torch.float32)
        if self.stage < 3:
            return value
        size = parameter.ds_tensor.numel()  # pyright: ignore[reportAttributeAccessIssue]
        padded = torch.zeros(size * self.world_size, device=parameter.device)
        padded[: value.numel()] = value.reshape(-1)
        return padded[size * self.rank :][:size]

    def _flat(self) -> list[Tensor]:
        """This process's parts of the master copies, which are the keys of the optimizer's state."""
        inner = self._engine.optimizer
        return inner.fp32_partitioned_groups_flat if self.stage == 3 else inner.single_partition_of_fp32_groups

    def _link(self) -> None:
        """Connects each parameter with its part of the optimizer's state.

        Trap: DeepSpeed (0.19) does this after the first step of its first parameter group, possibly before the others have state.
        """
        if self.stage in (1, 2):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


@contextmanager
def _left_out(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Has DeepSpeed not broadcast these parameters at its start, which all processes have already.

    It leaves out those with an attribute of its own layers. Stage 3 broadcasts them nevertheless, before it shards them.
    """
    marked = list(parameters)
    for parameter in marked:
        parameter.ds_optim_param = True  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for parameter in marked:
            del parameter.ds_optim_param  # pyright: ignore[reportAttributeAccessIssue]


def _is_elementwise(value: Any, parameter: Tensor) -> bool:
    """True if the optimizer's entry has one element for each of the parameter's."""
    return isinstance(value, Tensor) and value.ndim > 0 and value.numel() == parameter.numel()


def settings_of(
    model: nn.Module,
    config: str | os.PathLike[str] | Mapping[str, Any] | None,
    stage: int | None,
    clip_norm: float | None,
) -> dict[str, Any]:
    """DeepSpeed's configuration: the user's, with the settings that the banks need.

    Args:
        model: gives the sizes.
        config: the user's, a dict or the path of a JSON file.
        stage: ZeRO's, or None.
        clip_norm: of the engine, or None.

    Raises:
        UserError: it cannot be read, contradicts `stage` or `clip_norm`, or has a setting that does not work with banks.
    """
    settings = _read(config)
    zero = dict(settings.get("zero_optimization") or {})
    if stage is not None and zero.get("stage", stage) != stage:
        raise UserError(
            f"engine.stage is {stage}, and DeepSpeed's configuration says {zero['stage']}: leave one of them out"
        )
    zero["stage"] = zero.get("stage", 1 if stage is None else stage)
    if zero["stage"] not in range(4):
        raise UserError(f"ZeRO's stage must be 0, 1, 2 or 3, got {zero['stage']!r}")
    _refuse(settings, zero)
    clipping = settings.get("gradient_clipping", clip_norm or 0.0)
    if clipping == "auto":
        clipping = clip_norm or 0.0
    if clip_norm is not None and clipping != clip_norm:
        raise UserError(
            f"clip_norm is {clip_norm:g}, and DeepSpeed's configuration says gradient_clipping: {clipping}: leave one of them out"
        )
    # Stage 3 keeps parameters up to this size gathered from one step to the next. A bank must stay gathered, because layers read it
    # many times, also in backward.
    largest = max((p.numel() for p in model.parameters()), default=0) + 1
    whole = sum(p.numel() for p in model.parameters()) + 1
    for key, least in (("stage3_param_persistence_threshold", largest), ("stage3_model_persistence_threshold", whole)):
        zero[key] = max(least, zero[key] if isinstance(zero.get(key), int) else 0)
    return {
        **({} if "train_batch_size" in settings else {"train_micro_batch_size_per_gpu": 1}),
        "zero_allow_untested_optimizer": True,
        **settings,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clipping,
        "zero_optimization": zero,
    }


def _refuse(settings: Mapping[str, Any], zero: Mapping[str, Any]) -> None:
    """Refuses settings that do not work with a bank or that the training loop makes itself."""
    for refused, found in ((_REFUSED, settings), (_REFUSED_ZERO, zero)):
        for name in sorted(refused.keys() & found.keys()):
            off = (None, False, 1, {})  # 1 is a partition of one process
            if found[name] is not True and found[name] in off:
                continue
            raise UserError(f"DeepSpeed's configuration has {name!r}, which does not work with a bank: {refused[name]}")
    if settings.get("gradient_accumulation_steps", 1) not in (1, "auto"):
        raise UserError(
            f"DeepSpeed's configuration says gradient_accumulation_steps: {settings['gradient_accumulation_steps']}: "
            "leave it out, because the training loop marks a step's last micro-batch (accumulation, in a recipe)"
        )


def _read(config: str | os.PathLike[str] | Mapping[str, Any] | None) -> dict[str, Any]:
    if config is None or isinstance(config, Mapping):
        return dict(config or {})
    try:
        found = json.loads(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"DeepSpeed's configuration {os.fspath(config)} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"DeepSpeed's configuration {os.fspath(config)} must be a JSON object, such as {{}}")
    return found


def _deepspeed(device: torch.device) -> Any:
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
    try:
        import deepspeed
        from deepspeed.utils import logger
    except ImportError as error:
        raise UserError(f"engine 'deepspeed' needs DeepSpeed ({error}): pip install 'dist_ssn[deepspeed]'") from None
    logger.setLevel(logging.WARNING)
    if device.type == "cpu":
        # Trap: at its start DeepSpeed compiles an op for inference, which training never calls. A job that is killed during this
        # leaves a lock in torch's folder of extensions, for which every later job waits for ever.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
