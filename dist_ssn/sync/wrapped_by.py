"""The DistributedDataParallel of a parameter, which torch does not give to a communication hook."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from dist_ssn.errors import UserError


def wrappers_of(parameter: Tensor) -> list[DistributedDataParallel]:
    """All living wrappers of a parameter's model; finding them takes about 0.1 s."""
    # By type(): asking some objects for their __class__ runs code of theirs.
    found = [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
    return [ddp for ddp in found if any(own is parameter for own in ddp.parameters())]


def name_in(wrappers: Sequence[DistributedDataParallel], parameter: Tensor) -> str:
    """Name of a parameter in the model of its wrapper; its shape without a wrapper."""
    for ddp in wrappers:
        for name, own in ddp.module.named_parameters():
            if own is parameter:
                return name
    return f"a parameter of shape {tuple(parameter.shape)}"


def group_of(
    wrappers: Sequence[DistributedDataParallel], parameter: Tensor, given: dist.ProcessGroup | None
) -> dist.ProcessGroup:
    """The process group over which the gradients of a parameter are averaged.

    Args:
        wrappers: of the parameter.
        parameter: named in messages.
        given: to `comm_hook`; None for that of the wrapper.

    Raises:
        UserError: it was given none, and there are several or none to choose from; or another one than the wrapper has.
    """
    found: list[Any] = [ddp.process_group for ddp in wrappers]
    groups = {tuple(dist.get_process_group_ranks(group)): group for group in found}
    name, ranks = name_in(wrappers, parameter), " and ".join(map(str, map(list, sorted(groups))))
    if given is not None:
        mine = dist.get_process_group_ranks(given)
        if groups and tuple(mine) not in groups:
            raise UserError(
                f"comm_hook was given a process group of ranks {mine}, and the DistributedDataParallel of {name} has one of ranks "
                f"{ranks}: leave group out"
            )
        return given
    if len(groups) != 1:
        many = f"{name} is in several DistributedDataParallels, of ranks {ranks}"
        none = f"comm_hook finds no DistributedDataParallel of {name}"
        raise UserError(
            f"{many if groups else none}: give comm_hook group=, the process group of the one with the hook"
        )
    return next(iter(groups.values()))
