"""Wide ResNet for small images: pre-activation blocks in three stages.

Shapes: B images, C channels, H × W pixels.

Source: Zagoruyko & Komodakis 2016, https://arxiv.org/abs/1605.07146; He et al. 2015, https://arxiv.org/abs/1502.01852 (initial
weights).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from dist_ssn.errors import RecipeError, unknown_choice

NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    # Eight groups of channels divide every width of this network. The result does not depend on the split of a batch over ranks.
    "group": lambda channels: nn.GroupNorm(8, channels),
}


class Block(nn.Module):
    """Two times norm → ReLU → 3×3 convolution, with a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H / stride, W / stride)."""
        active = F.relu(self.norm1(x))
        beside = x if self.shortcut is None else self.shortcut(active)
        return beside + self.conv2(F.relu(self.norm2(self.conv1(active))))


class WideResNet(nn.Module):
    """Wide ResNet: images (B, C, H, W) → logits (B, classes); `first` is the number of channels of its first stage."""

    def __init__(
        self,
        blocks: int,
        first: int,
        classes: int,
        channels: int,
        stem_stride: int,
        norm: Callable[[int], nn.Module],
    ):
        super().__init__()

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            rest = (Block(outputs, outputs, 1, norm) for _ in range(blocks - 1))
            return nn.Sequential(Block(inputs, outputs, stride, norm), *rest)

        self.stem = nn.Conv2d(channels, 16, 3, stem_stride, padding=1, bias=False)
        self.stage1 = stage(16, first, 1)
        self.stage2 = stage(first, 2 * first, 2)
        self.stage3 = stage(2 * first, 4 * first, 2)
        self.norm = norm(4 * first)
        self.head = nn.Linear(4 * first, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) → logits (B, classes)."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.head(F.relu(self.norm(x)).mean((2, 3)))


def build_wide_resnet(
    depth: int = 22, width: int = 2, classes: int = 10, channels: int = 1, stem_stride: int = 1, norm: str = "batch"
) -> nn.Module:
    """A Wide ResNet, called WRN-depth-width in the paper.

    Args:
        depth: number of convolutions on the longest path, 6 n + 4.
        width: multiplier of the channels; the three stages have 16, 32 and 64 times it.
        classes: number of classes.
        channels: channels of the images, C.
        stem_stride: stride of the first convolution; 2 divides the compute by 4, for quick runs.
        norm: batch, or group (8 groups).

    Raises:
        RecipeError: a size is out of range, or the norm is unknown.
    """
    if depth < 10 or (depth - 4) % 6:
        raise RecipeError(f"wide_resnet: depth must be 6 n + 4, such as 10, 16, 22 or 28, got {depth}")
    for name, size in {"width": width, "classes": classes, "channels": channels, "stem_stride": stem_stride}.items():
        if size < 1:
            raise RecipeError(f"wide_resnet: {name} must be at least 1, got {size}")
    if norm not in NORMS:
        raise RecipeError(f"wide_resnet: {unknown_choice('norm', norm, NORMS)}")
    return WideResNet((depth - 4) // 6, 16 * width, classes, channels, stem_stride, NORMS[norm])
