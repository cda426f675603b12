"""How many processes train one model: each engine in its own file, so that an optional dependency stays in it."""

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
"""name → module:class. A module is imported when its engine is asked for."""


def engine_class(name: str) -> type[Engine]:
    """The class of an engine, a key of `ENGINES`."""
    module, _, attribute = ENGINES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


__all__ = ["ENGINES", "DDPEngine", "Engine", "OptimizerState", "World", "check_equal", "engine_class", "init_world"]
