"""With which standard deviation a weight was initialized: the usual formulas, recognized by a sample's root mean square.

Where one is recognized, a plan does not depend on the random seed, and ranks that seeded differently agree.
"""

from __future__ import annotations

import math

import torch
from torch import nn

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_USUAL_STD = (1.0, 0.02, 0.01)


def fans_of(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, int]:
    """(fan in, fan out) of one output number."""
    receptive = math.prod(shape[2:])
    fan_in, fan_out = shape[1] * receptive, shape[0] * receptive
    is_hugging_face = type(module).__name__ == "Conv1D"  # whose weight is (in, out)
    turned = is_hugging_face or isinstance(module, _TRANSPOSED)
    return (fan_out, fan_in) if turned else (fan_in, fan_out)


def init_std_of(
    parameter: nn.Parameter, module: nn.Module, fans: tuple[int, int], zero_row: int | None
) -> tuple[float, bool]:
    """The measured root mean square, snapped to the usual initialization that it is a sample of; whether there was none.

    Snapping makes the plan independent of the random seed, so that ranks that seeded differently agree: for the layer's own
    initialization in torch at any size, for other usual ones where the weight is large enough to tell them apart. What
    matches none is rounded to three digits, and does depend on the seed.
    """
    values, count = parameter.detach(), parameter.numel()
    blocks = values.reshape(-1).split(2**20)  # so that no float64 copy of a large weight is ever alive
    squares = float(torch.stack([block.double().square().sum() for block in blocks]).sum())
    if zero_row is not None and not values[zero_row].any():
        count -= values[zero_row].numel()
    measured = math.sqrt(squares / count)
    if not math.isfinite(measured):
        return measured, True
    default = _default_std(module, tuple(values.shape))
    if default is not None and _is_sample(values, measured, count, *default):
        return default[0], False
    fan_in, fan_out = fans
    # The packed projections of attention and LSTM have 3 and 4 blocks of rows.
    usual = [math.sqrt(v / f) for f in (fan_in, fan_out, fan_out / 3, fan_out / 4) for v in (1 / 3, 1.0, 2.0)]
    usual += [math.sqrt(2 / (fan_in + fan_out)), *_USUAL_STD]
    # Formulas for the same number may differ in its last bit: rounded, the first of them wins, whatever the sample.
    nearest = min(usual, key=lambda std: round(abs(std / measured - 1), 9))
    tolerance = max(0.005, 2 / math.sqrt(count))
    if abs(nearest / measured - 1) < tolerance:
        return nearest, False
    return float(f"{measured:.3g}"), True


def _default_std(module: nn.Module, shape: tuple[int, ...]) -> tuple[float, bool] | None:
    """(standard deviation, whether it is uniform) of what the layer's `reset_parameters` draws; None for unknown layers."""
    if isinstance(module, EMBEDDINGS):
        return 1.0, False
    if isinstance(module, nn.MultiheadAttention):
        return math.sqrt(2 / (shape[0] + shape[1])), True
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return math.sqrt(1 / 3 / module.hidden_size), True
    if isinstance(module, nn.Bilinear):
        return math.sqrt(1 / 3 / shape[1]), True
    if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
        return math.sqrt(1 / 3 / math.prod(shape[1:])), True
    return None


def _is_sample(values: torch.Tensor, measured: float, count: int, std: float, uniform: bool) -> bool:
    """Whether `count` numbers of root mean square `measured` can be drawn with `std`: within five standard errors of it."""
    error = math.sqrt((0.2 if uniform else 0.5) / count)
    if abs(measured / std - 1) > 5 * error:
        return False
    # A uniform sample never leaves its interval; one per cent is room for a weight that was rounded to bf16.
    return not uniform or max(abs(float(v)) for v in values.aminmax()) <= 1.01 * math.sqrt(3) * std
