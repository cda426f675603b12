"""How many processes train one model: each engine in its own file, so that an optional dependency stays in it."""

from __future__ import annotations

from dist_ssn.engines.ddp import DDPEngine
from dist_ssn.engines.protocol import Engine, OptimizerState
from dist_ssn.engines.world import World, init_world

__all__ = ["DDPEngine", "Engine", "OptimizerState", "World", "init_world"]
