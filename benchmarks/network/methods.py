"""`dist-ssn` with a DDP engine that synchronizes by another method: baselines, for dense models and for banks.

    torchrun … benchmarks/network/methods.py powersgd:2 train --config …

`powersgd:RANK`, `local:PERIOD` (post-local SGD), `diloco:PERIOD`, `demo:K`. Checkpoints do not hold a method's own state
(error feedback, the outer momentum), and each process evaluates its own model. So a run should end on a whole period.
"""

from __future__ import annotations

import math
import sys
from functools import cache
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel

from dist_ssn import engines
from dist_ssn.cli.entry import main
from dist_ssn.comm import purpose
from dist_ssn.engines import DDPEngine

START = 5
"""Steps of plain averaging before PowerSGD and post-local SGD begin."""


class Method(DDPEngine):
    """A method of synchronization. `number` is its parameter, behind the colon."""

    number: ClassVar[int]

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]


class PowerSGD(Method):
    """PowerSGD of rank `number`, by PyTorch's hook (Vogels et al., arXiv 1905.13727).

    All in one bucket: the hook's later rounds are started by gloo's threads, in any order of the buckets.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "bucket_mb": 1024})
        assert isinstance(self.model, DistributedDataParallel)
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=self.number, start_powerSGD_iter=START, min_compression_rate=1
        )
        self.model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)


class PostLocalSGD(Method):
    """Post-local SGD: averages all models every `number` steps, by PyTorch's hook and averager (Lin et al., arXiv 1808.07217).

    `dist_ssn.LocalUpdates` gives the same with SGD. With Adam it does not: its first steps average parameters, and each process
    keeps moments of its own gradients.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        assert isinstance(self.model, DistributedDataParallel)
        state = post_localSGD_hook.PostLocalSGDState(None, None, START, post_local_gradient_allreduce=False)
        self.model.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
        self._averager = PeriodicModelAverager(self.number, START)
        self.optimizer.register_step_post_hook(self._average)  # the averager leaves out what has no gradient any more

    def _average(self, *_: object) -> None:
        with purpose("parameters"):
            self._averager.average_parameters(self.parameters())


class DiLoCo(Method):
    """DiLoCo: `number` local steps of the recipe's optimizer, then one Nesterov step on the mean change of all processes.

    By `dist_ssn.LocalUpdates`. Douillard et al., arXiv 2311.08105; the outer rate and momentum are the paper's.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        sync = {"every": self.number, "outer": "nesterov", "outer_rate": 0.7, "outer_momentum": 0.9, "outlier": None}
        super().__init__(*arguments, **{**options, "sync": sync})


class DeMo(Method):
    """DeMo: sends the `number` largest cosine coefficients of each chunk of the momentum, and keeps the rest.

    Peng et al., arXiv 2411.19870. Chunks of at most 64 numbers in each dimension; the sign of the mean of all is the update. The
    recipe's optimizer must be SGD without momentum. Values travel as 4 bytes, places as 2.
    """

    DECAY = 0.999

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "clip_norm": None})  # signs have the norm that they have
        self.model = self.module
        self._momenta = [torch.zeros_like(parameter) for parameter in self.parameters()]

    @torch.no_grad()
    def step(self) -> Tensor | None:
        values, places, shapes = [], [], []
        for parameter, momentum in zip(self.parameters(), self._momenta, strict=True):
            assert parameter.grad is not None
            momentum.mul_(self.DECAY).add_(parameter.grad)
            coefficients = cosines(momentum)
            place = coefficients.abs().topk(min(self.number, coefficients.shape[1])).indices
            value = coefficients.gather(1, place)
            momentum.sub_(from_cosines(torch.zeros_like(coefficients).scatter_(1, place, value), momentum.shape))
            values.append(value)
            places.append(place)
            shapes.append(coefficients.shape)
        for parameter, mean in zip(self.parameters(), self._mean(values, places, shapes), strict=True):
            parameter.grad = mean.sign_()
        return super().step()

    def _mean(self, values: list[Tensor], places: list[Tensor], shapes: list[torch.Size]) -> list[Tensor]:
        """Mean of the messages of all processes, as updates in the parameters' shapes."""
        flat = torch.cat([value.flatten() for value in values])
        where = torch.cat([place.flatten() for place in places]).to(torch.int16)
        all_values = flat.new_empty(self.world_size * flat.numel())
        all_places = where.new_empty(all_values.shape)
        with purpose("gradients"):
            dist.all_gather_into_tensor(all_values, flat)
            dist.all_gather_into_tensor(all_places.view(torch.uint8), where.view(torch.uint8))
        sizes = [value.numel() for value in values]
        sums = [flat.new_zeros(shape) for shape in shapes]
        for rank in range(self.world_size):
            part = slice(rank * flat.numel(), (rank + 1) * flat.numel())
            theirs = all_values[part].split(sizes), all_places[part].long().split(sizes)
            for total, value, place, mine in zip(sums, *theirs, values, strict=True):
                total.scatter_add_(1, place.view_as(mine), value.view_as(mine))
        return [
            from_cosines(total / self.world_size, momentum.shape)
            for total, momentum in zip(sums, self._momenta, strict=True)
        ]


@cache
def basis(size: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II): rows are frequencies."""
    n = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(torch.outer(n, n + 0.5) * (math.pi / size)) * math.sqrt(2 / size)
    rows[0] /= math.sqrt(2)
    return rows.float()


def chunk_of(size: int) -> int:
    """The largest divisor up to 64."""
    return max(divisor for divisor in range(1, 65) if size % divisor == 0)


def cosines(values: Tensor) -> Tensor:
    """Cosine transform of each chunk of a vector or matrix (others are flattened to a matrix), [chunks, elements of a chunk]."""
    matrix = values.flatten(1) if values.dim() > 1 else values[None]
    high, wide = (chunk_of(size) for size in matrix.shape)
    chunks = matrix.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).transpose(1, 2)
    return (basis(high) @ chunks @ basis(wide).T).flatten(2).flatten(0, 1)


def from_cosines(coefficients: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of `cosines`."""
    rows, columns = (shape[0], shape[1:].numel()) if len(shape) > 1 else (1, shape[0])
    high, wide = chunk_of(rows), chunk_of(columns)
    chunks = coefficients.view(rows // high, columns // wide, high, wide)
    return (basis(high).T @ chunks @ basis(wide)).transpose(1, 2).reshape(shape)


METHODS: dict[str, type[Method]] = {"powersgd": PowerSGD, "local": PostLocalSGD, "diloco": DiLoCo, "demo": DeMo}


def method(text: str) -> type[Method]:
    """The engine that "name:number" names.

    Raises:
        ValueError: No such method; the message lists the known ones.
    """
    name, _, number = text.partition(":")
    if name not in METHODS or not number.isdigit() or number == "0":
        raise ValueError(
            f"no method is called {text!r}: there are {', '.join(f'{known}:N' for known in METHODS)}, N from 1"
        )
    return type(METHODS[name].__name__, (METHODS[name],), {"number": int(number)})


if __name__ == "__main__":
    try:
        Chosen = method("".join(sys.argv[1:2]))
    except ValueError as error:
        sys.exit(str(error))
    del sys.argv[1]
    sys.modules["methods"] = sys.modules["__main__"]
    engines.ENGINES["ddp"] = "methods:Chosen"
    sys.exit(main())
