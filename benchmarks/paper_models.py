"""Small models of the paper's experiments that neither `dist_ssn` nor `transformers` has, as their users would write them.

Shapes: B samples, C channels, H × W pixels, T bytes of text, N captions.

Source: Plummer et al., arXiv 2006.10598, section 4, for the choice of models; each class names its own source.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BYTES = 256


class DenseBlock(nn.Module):
    """Bottleneck layers, each of which adds `growth` channels to all that came before."""

    def __init__(self, inputs: int, layers: int, growth: int):
        super().__init__()
        self.layers = nn.ModuleList(self._layer(inputs + growth * index, growth) for index in range(layers))

    @staticmethod
    def _layer(inputs: int, growth: int) -> nn.Sequential:
        narrow = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        wide = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        return nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(), narrow, nn.BatchNorm2d(4 * growth), nn.ReLU(), wide)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class DenseNet(nn.Module):
    """DenseNet-BC with three blocks (arXiv 1608.06993): images (B, C, H, W) → logits (B, classes)."""

    def __init__(self, layers: int, growth: int, classes: int = 10, channels: int = 1):
        super().__init__()
        width = 2 * growth
        parts: list[nn.Module] = [nn.Conv2d(channels, width, 3, 2, padding=1, bias=False)]
        for block in range(3):
            parts.append(DenseBlock(width, layers, growth))
            width += growth * layers
            parts += [nn.BatchNorm2d(width), nn.ReLU()]
            if block < 2:
                parts += [nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
                width //= 2
        self.features, self.head = nn.Sequential(*parts), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).mean((2, 3)))


class MixedConv(nn.Module):
    """A 3×3 convolution whose kernel is a mixture of its stage's templates."""

    def __init__(self, templates: nn.Parameter):
        super().__init__()
        self.templates = templates
        self.coefficients = nn.Parameter(torch.empty(1, len(templates)))
        nn.init.orthogonal_(self.coefficients)

    def forward(self, x: Tensor) -> Tensor:
        kernel = (self.coefficients.view(-1, 1, 1, 1, 1) * self.templates).sum(0)
        return F.conv2d(x, kernel, padding=1)


class SharedBlock(nn.Module):
    """Pre-activation block with two mixed convolutions; the first of a stage has one of its own, with stride."""

    def __init__(self, inputs: int, outputs: int, stride: int, templates: nn.Parameter):
        super().__init__()
        first = inputs != outputs or stride > 1
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        own = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.conv1, self.conv2 = own if first else MixedConv(templates), MixedConv(templates)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if first else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        beside = x if self.shortcut is None else self.shortcut(active)
        return beside + self.conv2(F.relu(self.norm2(self.conv1(active))))


class SharedWideResNet(nn.Module):
    """SWRN: a Wide ResNet whose stages mix templates themselves (Savarese & Maire, arXiv 1902.09701).

    Images (B, C, H, W) → logits (B, classes).

    Args:
        blocks: in each of the three stages.
        width: channels of the first stage; the others have two and four times as many.
        templates: in each stage.
    """

    def __init__(self, blocks: int, width: int, templates: int, classes: int = 10, channels: int = 1):
        super().__init__()
        sizes = [width, 2 * width, 4 * width]
        self.stem = nn.Conv2d(channels, width, 3, 2, padding=1, bias=False)
        stages, inputs = [], width
        for index, outputs in enumerate(sizes):
            common = nn.Parameter(torch.empty(templates, outputs, outputs, 3, 3))
            for template in common:
                nn.init.kaiming_normal_(template)
            for block in range(blocks):
                stages.append(SharedBlock(inputs, outputs, 2 if index and not block else 1, common))
                inputs = outputs
        self.stages, self.norm = nn.Sequential(*stages), nn.BatchNorm2d(inputs)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.stages(self.stem(images)))).mean((2, 3)))


class Reader(nn.Module):
    """A bi-LSTM reader: where in a passage is the span that a question asks for (after BiDAF, arXiv 1611.01603).

    Passages (B, T) and questions (B, Q) of bytes → logits (B, 2, T) of the span's first and last byte.
    """

    def __init__(self, width: int):
        super().__init__()
        self.embedding = nn.Embedding(_BYTES, width)
        self.encoder = nn.LSTM(width, width, batch_first=True, bidirectional=True)
        self.reader = nn.LSTM(6 * width, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, 2)

    def forward(self, passages: Tensor, questions: Tensor) -> Tensor:
        passage, question = (self.encoder(self.embedding(text))[0] for text in (passages, questions))
        attention = (passage @ question.transpose(1, 2) / passage.shape[-1] ** 0.5).softmax(-1)
        asked = attention @ question
        return self.head(self.reader(torch.cat([passage, asked, passage * asked], -1))[0]).transpose(1, 2)


class AdaptiveRetrieval(nn.Module):
    """Scores captions for an image; each caption filters the image's regions first (after ADAPT, Wehrmann et al., AAAI 2020).

    Images (B, C, H, W) → logits (B, N).

    Args:
        captions: texts; the model reads their bytes.
        width: of both encoders' outputs.
    """

    captions: Tensor

    def __init__(self, captions: Sequence[str], width: int, channels: int = 1):
        super().__init__()
        read = [torch.tensor(list(caption.encode())) for caption in captions]
        self.register_buffer("captions", nn.utils.rnn.pad_sequence(read, batch_first=True), persistent=False)
        sizes = [channels, width // 2, width, width]
        convolutions = [
            nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
            for inputs, outputs in itertools.pairwise(sizes)
        ]
        self.regions = nn.Sequential(*convolutions, nn.Conv2d(width, width, 1))
        self.embedding = nn.Embedding(128, width)
        self.text = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)
        self.gain, self.shift = nn.Linear(width, width), nn.Linear(width, width)
        self.scale = nn.Parameter(torch.tensor(10.0).log())

    def forward(self, images: Tensor) -> Tensor:
        regions = self.regions(images).flatten(2).transpose(1, 2)  # (B, R, width)
        there = (self.captions != 0)[..., None]
        texts = (self.text(self.embedding(self.captions))[0] * there).sum(1) / there.sum(1)  # (N, width)
        filtered = F.relu((1 + self.gain(texts))[:, None, None] * regions + self.shift(texts)[:, None, None])
        seen = F.normalize(filtered.mean(2), dim=-1)  # (N, B, width)
        return self.scale.exp() * torch.einsum("nbw,nw->bn", seen, F.normalize(texts, dim=-1))
