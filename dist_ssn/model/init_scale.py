"""The standard deviation a weight was initialized with: usual formulas, recognized by the values' root mean square.

It is data, and may depend on the random seed. What decides on a plan is `settled_scale.settled_stds`, which does not.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from dist_ssn.torch_private import CONVOLUTION

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_USUAL_STD = (1.0, 0.02, 0.01)

_LARGE, _STRETCH = 2**22, 2**12
"""Elements of a weight that is summed up in stretches, and of a stretch."""


def fans_of(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """Fan in and fan out of a weight.

    Args:
        module: the layer that holds the weight.
        shape: the weight's shape; its first two dimensions are outputs and inputs, unless the layer stores them transposed.
    """
    receptive = math.prod(shape[2:])
    fan_in, fan_out = shape[1] * receptive, shape[0] * receptive
    is_hugging_face = type(module).__name__ == "Conv1D"  # whose weight is (in, out)
    is_transposed = is_hugging_face or isinstance(module, _TRANSPOSED)
    return (fan_out, fan_in) if is_transposed else (fan_in, fan_out)


def init_std_of(
    parameter: nn.Parameter, module: nn.Module, fans: tuple[int, int], zero_row: int | None
) -> tuple[float, bool]:
    """Standard deviation of a weight's initialization, and whether it had to be measured.

    The root mean square of the values is compared with the usual initializations. The layer's own initialization in torch is
    recognized at any size, others only where the weight is large enough to distinguish them. A recognized one gives its exact
    standard deviation, which does not depend on the random seed, so ranks with different seeds agree. Otherwise the measured
    value is rounded to three digits and does depend on the seed.

    Args:
        parameter: the weight, with its initial values.
        module: the layer that holds it.
        fans: (fan in, fan out).
        zero_row: a row that is left out of the measurement if it is zero (an embedding's `padding_idx`).

    Returns:
        (standard deviation, True if no usual initialization was recognized).
    """
    values, count = parameter.detach(), parameter.numel()
    squares = _sum_of_squares(values)
    if zero_row is not None and not values[zero_row].any():
        count -= values[zero_row].numel()
    measured = math.sqrt(squares / count)
    if not math.isfinite(measured):
        return measured, True
    default = default_std(module, tuple(values.shape))
    if default is not None and _is_sample(values, measured, count, *default):
        return default[0], False
    fan_in, fan_out = fans
    # The packed projections of attention and LSTM have 3 and 4 blocks of rows.
    usual = [math.sqrt(v / f) for f in (fan_in, fan_out, fan_out / 3, fan_out / 4) for v in (1 / 3, 1.0, 2.0)]
    usual += [math.sqrt(2 / (fan_in + fan_out)), *_USUAL_STD]
    # Formulas for the same value may differ in its last bit: rounded, the first of them wins, whatever the sample.
    nearest = min(usual, key=lambda std: round(abs(std / measured - 1), 9))
    tolerance = max(0.005, 2 / math.sqrt(count))
    if abs(nearest / measured - 1) < tolerance:
        return nearest, False
    return float(f"{measured:.3g}"), True


def _sum_of_squares(values: torch.Tensor) -> float:
    """Without a copy of the weight. A large one is summed up in stretches of its own dtype, then in float64: it is faster."""
    if values.numel() < _LARGE or values.dtype.itemsize < 4 or not values.is_contiguous():
        return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
    flat, whole = values.view(-1), values.numel() // _STRETCH * _STRETCH
    norms = torch.linalg.vector_norm(flat[:whole].view(-1, _STRETCH), dim=1).double()
    return float(norms.square().sum()) + float(torch.linalg.vector_norm(flat[whole:], dtype=torch.float64)) ** 2


def default_std(module: nn.Module, shape: tuple[int, ...]) -> tuple[float, bool] | None:
    """Standard deviation of the layer's `reset_parameters`, and True if it draws uniformly; None for unknown layers."""
    if isinstance(module, EMBEDDINGS):
        return 1.0, False
    if isinstance(module, nn.MultiheadAttention):
        return math.sqrt(2 / (shape[0] + shape[1])), True
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return math.sqrt(1 / 3 / module.hidden_size), True
    if isinstance(module, nn.Bilinear):
        return math.sqrt(1 / 3 / shape[1]), True
    if isinstance(module, (nn.Linear, *CONVOLUTION)):
        return math.sqrt(1 / 3 / math.prod(shape[1:])), True
    return None


def _is_sample(values: torch.Tensor, measured: float, count: int, std: float, uniform: bool) -> bool:
    """True if `count` values of root mean square `measured` can be a sample of `std`: within five standard errors of it."""
    error = math.sqrt((0.2 if uniform else 0.5) / count)
    if abs(measured / std - 1) > 5 * error:
        return False
    # A uniform sample never leaves its interval; one per cent is room for a weight that was rounded to bf16.
    return not uniform or max(abs(float(v)) for v in values.aminmax()) <= 1.01 * math.sqrt(3) * std


def assumed_std(module: nn.Module, shape: tuple[int, ...], fans: tuple[int, int], model: nn.Module) -> float:
    """Standard deviation of a weight that has no values yet, because it is on the meta device.

    It is the model's `config.initializer_range`, which models of `transformers` have, else the layer's own default, else 1/√fan in.
    """
    named = getattr(getattr(model, "config", None), "initializer_range", None)
    if isinstance(named, float) and 0 < named < math.inf:
        return named
    default = default_std(module, shape)
    return default[0] if default is not None else fans[0] ** -0.5
