"""Models of further tasks, as a user would write them. A recipe names them by import path."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_ssn.train.models.gpt import build_gpt
from dist_ssn.train.models.wide_resnet import NORMS, WideResNet


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


def narrow_wide_resnet(first: int, depth: int, stem_stride: int, classes: int = 10, channels: int = 1) -> nn.Module:
    """A Wide ResNet that may be narrower than width 1: `first` is the number of channels of its first stage."""
    return WideResNet((depth - 4) // 6, first, classes, channels, stem_stride, NORMS["batch"])


def blocks(layers: int, width: int, heads: int) -> nn.ModuleList:
    """A transformer's encoder, (B, T, width) → the same, block by block."""
    settings = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
    return nn.ModuleList(nn.TransformerEncoderLayer(width, heads, 4 * width, **settings) for _ in range(layers))


class VisionTransformer(nn.Module):
    """Maps an image to `outputs` values, from the mean over its encoded patches (arXiv 2010.11929)."""

    def __init__(self, outputs: int, channels: int, size: int, patch: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2, width))
        self.blocks = blocks(layers, width, heads)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) → logits (B, outputs)."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean(1)))


class ImageText(nn.Module):
    """Scores each of a set of captions for an image, by the cosine of two encoders' outputs (arXiv 2103.00020).

    Args:
        captions: Texts; the model reads their bytes.
        image: images (B, C, H, W) → (B, outputs).
        layers, width, heads: Size of the captions' encoder.
    """

    captions: Tensor

    def __init__(
        self,
        captions: Sequence[str],
        image: VisionTransformer,
        layers: int,
        width: int,
        heads: int,
        outputs: int,
    ) -> None:
        super().__init__()
        read = [torch.tensor(list(caption.encode())) for caption in captions]
        padded = nn.utils.rnn.pad_sequence(read, batch_first=True)  # with byte 0, which no caption has
        self.register_buffer("captions", padded, persistent=False)
        self.image = image
        self.embedding = nn.Embedding(128, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, padded.shape[1], width))
        self.blocks = blocks(layers, width, heads)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)
        self.scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) → logits (B, captions)."""
        padding = self.captions == 0
        x = self.embedding(self.captions) + self.positions
        for block in self.blocks:
            x = block(x, src_key_padding_mask=padding)
        read = ~padding[..., None]
        texts = self.head((self.norm(x) * read).sum(1) / read.sum(1))
        return self.scale.exp() * F.normalize(self.image(images), dim=-1) @ F.normalize(texts, dim=-1).T


def lstm(vocabulary: int = 256, width: int = 128, layers: int = 2, context: int = 128) -> nn.Module:
    """Builds the LSTM. `context` is the number of bytes in a window of the data; the model does not need it."""
    return RecurrentText(vocabulary, width, layers)


def gpt_in_double(
    vocabulary: int = 256, layers: int = 2, width: int = 128, heads: int = 4, context: int = 64
) -> nn.Module:
    """Builds a recipe's GPT in float64, so that the order of sums does not show in a loss."""
    return build_gpt(vocabulary, layers, width, heads, context).double()


def vit(
    classes: int, channels: int, size: int, patch: int = 4, layers: int = 4, width: int = 64, heads: int = 4
) -> nn.Module:
    return VisionTransformer(classes, channels, size, patch, layers, width, heads)


def image_text(
    captions: Sequence[str],
    channels: int,
    size: int,
    patch: int = 4,
    layers: int = 2,
    width: int = 64,
    text_width: int = 48,
    heads: int = 4,
) -> nn.Module:
    image = VisionTransformer(width, channels, size, patch, layers, width, heads)
    return ImageText(captions, image, layers, text_width, heads, outputs=width)


def mlp(classes: int, channels: int, size: int, width: int = 256, layers: int = 3) -> nn.Module:
    """Builds an MLP that classifies an image through `layers` hidden layers."""
    widths = [channels * size**2, *[width] * layers]
    hidden = [part for pair in itertools.pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, classes))
