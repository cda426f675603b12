"""Optimizers that make each matrix orthogonal, such as Muon, are refused for banks: a column has no rows to make orthogonal.

Others take a column as what it is. Adafactor's factors of [n, 1] are exact, Shampoo and SOAP precondition its one long side.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim.optimizer import Optimizer

from dist_ssn.errors import ShareError
from dist_ssn.sharing.columns import COLUMNS

_CHOOSES_ITSELF = "timm."  # its Muon takes AdamW for a parameter with a side of 1, unless its group says use_muon


def refuse_orthogonal(optimizer: Optimizer, banks: Iterable[nn.Module]) -> None:
    """Checks that no bank is trained by Muon or a relative, which would divide a bank's gradient by its norm.

    Args:
        optimizer: any.
        banks: of any models.

    Raises:
        ShareError: one is.
    """
    kind = type(optimizer)
    named = any("Muon" in base.__name__ or "Dion" in base.__name__ for base in kind.__mro__)
    if not named:
        return
    columns = {id(p): bank for bank in banks for name in COLUMNS if (p := bank._parameters.get(name)) is not None}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            bank: Any = columns.get(id(parameter))
            if bank is not None and _orthogonalizes(kind, group, optimizer.state.get(parameter, {})):
                raise ShareError(
                    f"{kind.__name__} makes matrices orthogonal, and the bank of {bank.weight_name(0)} is a list of values, not a "
                    f"matrix: give banks to AdamW, and {kind.__name__} the matrices that stay dense, or train materialize(model)"
                )


def _orthogonalizes(kind: type[Optimizer], group: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    """False for parameters that an optimizer of several algorithms trains by another one, as its group or its state says."""
    if "use_muon" in group:
        return bool(group["use_muon"])
    if "algorithm" in group:
        return str(group["algorithm"]).lower().endswith(("muon", "dion"))
    return not kind.__module__.startswith(_CHOOSES_ITSELF) and bool(state.get("use_muon", True))
