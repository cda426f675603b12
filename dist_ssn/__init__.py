"""dist_ssn: train neural networks over slow networks by generating their weights from a few small banks.

model = dist_ssn.share(model, 0.1)                                   # 10 % of the weights' parameters, before the optimizer
optimizer = torch.optim.AdamW(dist_ssn.parameter_groups(model, lr=1e-3))
model = torch.nn.parallel.DistributedDataParallel(model)             # sends a tenth
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dist_ssn.comm.meter import CommMeter
    from dist_ssn.mapping_search import search
    from dist_ssn.plan import Morph, Plan, make_plan
    from dist_ssn.sharing.attach import share
    from dist_ssn.sharing.bank_set import shared_plan
    from dist_ssn.sharing.generation import set_generation
    from dist_ssn.sharing.initialize import initialize
    from dist_ssn.sharing.materialize import materialize
    from dist_ssn.sharing.optimizer_groups import parameter_groups
    from dist_ssn.sharing.parts import freeze, parameters_of, unfreeze
    from dist_ssn.sharing.plan_of import plan_of
    from dist_ssn.sharing.saved import load, merge, save
    from dist_ssn.sharing.summary import summary
    from dist_ssn.sync.comm_hook import comm_hook
    from dist_ssn.sync.local_updates import LocalUpdates

__all__ = [
    "CommMeter",
    "LocalUpdates",
    "Morph",
    "Plan",
    "comm_hook",
    "freeze",
    "initialize",
    "load",
    "make_plan",
    "materialize",
    "merge",
    "parameter_groups",
    "parameters_of",
    "plan_of",
    "save",
    "search",
    "set_generation",
    "share",
    "shared_plan",
    "summary",
    "unfreeze",
]
__version__ = "0.1.0"

# Imported on first use: torch takes a second, for which `dist-ssn --help` should not wait.
_PLACES = {
    "CommMeter": "dist_ssn.comm.meter",
    "LocalUpdates": "dist_ssn.sync.local_updates",
    "Morph": "dist_ssn.plan",
    "Plan": "dist_ssn.plan",
    "comm_hook": "dist_ssn.sync.comm_hook",
    "freeze": "dist_ssn.sharing.parts",
    "initialize": "dist_ssn.sharing.initialize",
    "load": "dist_ssn.sharing.saved",
    "make_plan": "dist_ssn.plan",
    "materialize": "dist_ssn.sharing.materialize",
    "merge": "dist_ssn.sharing.saved",
    "parameter_groups": "dist_ssn.sharing.optimizer_groups",
    "parameters_of": "dist_ssn.sharing.parts",
    "plan_of": "dist_ssn.sharing.plan_of",
    "save": "dist_ssn.sharing.saved",
    "search": "dist_ssn.mapping_search",
    "set_generation": "dist_ssn.sharing.generation",
    "share": "dist_ssn.sharing.attach",
    "shared_plan": "dist_ssn.sharing.bank_set",
    "summary": "dist_ssn.sharing.summary",
    "unfreeze": "dist_ssn.sharing.parts",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_PLACES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
