"""Banks and differences are columns, [n, 1]: a rule such as "two dimensions decay" treats them as the weights that they replace.

Version 0.1.0 had them flat, [n]. What was saved then is brought into today's shape here: state dicts, pickles, and the state of
optimizers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import TypeVar

from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from dist_ssn.errors import ShareError

COLUMNS = ("bank", "differences")
"""Names of the parameters that are columns. Gains and coefficients are flat, and don't decay, as norms' weights don't."""
_Tensor = TypeVar("_Tensor", bound=Tensor)


def shape_of(name: str, numel: int) -> tuple[int, ...]:
    """Shape of a bank's parameter.

    Args:
        name: of the parameter in its bank.
        numel: number of its elements.
    """
    return (numel, 1) if name in COLUMNS else (numel,)


def as_column(tensor: _Tensor, like: Iterable[int]) -> _Tensor:
    """`tensor` as a column, if it is flat and belongs to one; any other tensor itself.

    Args:
        tensor: as it was saved; a DTensor keeps its placement.
        like: shape of the parameter that it belongs to.
    """
    return tensor.unsqueeze(1) if tuple(tensor.shape) == tuple(like)[:-1] and tuple(like)[1:] == (1,) else tensor  # type: ignore[return-value]


def load_flat(state: MutableMapping[str, Tensor], wanted: Mapping[str, Iterable[int]]) -> None:
    """Turns the flat entries of a state dict of version 0.1.0 into columns, in place.

    Args:
        state: tensors by name; entries of other shapes, and of other names, stay.
        wanted: shapes of a model's tensors, by name.
    """
    for name, shape in wanted.items():
        if name.rpartition(".")[2] in COLUMNS and isinstance(found := state.get(name), Tensor):
            state[name] = as_column(found, shape)


def unpickle_flat(parameters: Mapping[str, nn.Parameter | None]) -> None:
    """Turns flat parameters into columns, in place: optimizers that were pickled with them hold the same parameters.

    Args:
        parameters: of a bank, by name.
    """
    for name in COLUMNS:
        parameter = parameters.get(name)
        if parameter is not None and parameter.ndim == 1:
            parameter.data = parameter.data.unsqueeze(1)


def load_flat_state(optimizer: Optimizer, sources: Iterable[nn.Module]) -> None:
    """Turns the flat entries of an optimizer's state into columns, after it was loaded and before a step.

    Args:
        optimizer: any.
        sources: banks.

    Raises:
        ShareError: the optimizer treats matrices and vectors differently, so that their states differ, too.
    """
    for source in sources:
        for name in COLUMNS:
            parameter = source._parameters.get(name)
            entries = optimizer.state.get(parameter) if parameter is not None else None
            if not entries:
                continue
            assert parameter is not None
            flat = [key for key, value in entries.items() if isinstance(value, Tensor) and value.ndim == 1]
            changed = {key: as_column(entries[key], parameter.shape) for key in flat}
            if "Adafactor" in type(optimizer).__name__ and any(changed[key] is not entries[key] for key in flat):
                raise ShareError(
                    f"the state of this {type(optimizer).__name__} is of a version that had flat banks, and is another for "
                    "matrices: load the model only, and begin with a new optimizer"
                )
            entries.update(changed)
