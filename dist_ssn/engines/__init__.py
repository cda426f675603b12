"""Engines: training of one model on many processes. Each engine is in its own file, which alone imports its dependency."""

from __future__ import annotations

import importlib

from dist_ssn.engines.base import Engine, OptimizerState
from dist_ssn.engines.ddp import DDPEngine
from dist_ssn.engines.world.divergence import check_equal
from dist_ssn.engines.world.join import World, init_world

ENGINES = {
    "ddp": "dist_ssn.engines.ddp:DDPEngine",
    "fsdp": "dist_ssn.engines.fsdp:FSDPEngine",
    "deepspeed": "dist_ssn.engines.deepspeed:DeepSpeedEngine",
    "mpi": "dist_ssn.engines.mpi:MPIEngine",
}
"""Name → module:class. A module is imported when its engine is used."""


def engine_class(name: str) -> type[Engine]:
    """The class of an engine, a key of `ENGINES`."""
    module, _, attribute = ENGINES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


__all__ = ["ENGINES", "DDPEngine", "Engine", "OptimizerState", "World", "check_equal", "engine_class", "init_world"]
