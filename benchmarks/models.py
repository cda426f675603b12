"""Models of further tasks, as a user would write them: a recipe names them by import path."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RecurrentText(nn.Module):
    """Predicts the next byte with an LSTM."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) → logits (B, T, V)."""
        return self.head(self.lstm(self.embedding(tokens))[0])


class VisionTransformer(nn.Module):
    """Names an image from its patches: a transformer's encoder with a mean over the patches (arXiv 2010.11929)."""

    def __init__(self, classes: int, channels: int, size: int, patch: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        settings = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, **settings) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) → logits (B, classes)."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean(1)))


def lstm(vocabulary: int = 256, width: int = 128, layers: int = 2, context: int = 128) -> nn.Module:
    """`context` is for the data alone: how many bytes are in a window."""
    return RecurrentText(vocabulary, width, layers)


def vit(
    classes: int, channels: int, size: int, patch: int = 4, layers: int = 4, width: int = 64, heads: int = 4
) -> nn.Module:
    return VisionTransformer(classes, channels, size, patch, layers, width, heads)
