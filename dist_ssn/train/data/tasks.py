"""Tasks: sampling, augmentation, loss and metrics. Nothing here reads a file.

Shapes: B samples, T bytes of context, V vocabulary, C channels, H × W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_ssn.errors import DataError

Images = tuple[np.ndarray, np.ndarray]
"""uint8 (N, C, H, W), and labels int64 (N,)."""

# The first value of every generator's seed stands for its purpose, so that no two purposes draw the same numbers.
_ORDER, _AUGMENT, _WINDOWS = 1, 2, 3


@dataclass(frozen=True)
class Hints:
    """Facts of the data that a model needs, such as {"classes": 10, "channels": 1, "size": 28}."""

    model_hints: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Task(ABC):
    """Training and validation data, with their loss and metrics.

    Args:
        name: the data's name.
        seed: of order and augmentation.
        model_hints: arguments for a model's builder.
        notes: sentences for the user before a run, such as which files were left out.
    """

    kind: ClassVar[str]
    name: str
    seed: int
    model_hints: dict[str, Any]
    notes: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    @abstractmethod
    def train_size(self) -> int:
        """Number of samples in an epoch (of text: windows that do not overlap)."""

    @property
    @abstractmethod
    def validation_size(self) -> int:
        """Number of held-out samples (of text: windows that do not overlap)."""

    @abstractmethod
    def _train_batch(self, step: int, batch_size: int, part: slice) -> tuple[Tensor, Tensor]:
        """The slice `part` of the whole batch of a step."""

    @abstractmethod
    def _validation_batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """The held-out samples with these indices."""

    @abstractmethod
    def metrics(self, outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        """Sums over a batch, and their "count". Means are sums over batches and ranks, divided by the summed count."""

    def batch(
        self, step: int, batch_size: int, rank: int = 0, world_size: int = 1, accumulation: int = 1, micro: int = 0
    ) -> tuple[Tensor, Tensor]:
        """One rank's share of one micro-batch: a pure function of the arguments and the seed.

        The whole batch is cut into `accumulation` micro-batches, and each of these into one part per rank.

        Args:
            step: number of the step, from 0.
            batch_size: samples in the step, over all ranks and micro-batches.
            rank: this rank.
            world_size: number of ranks.
            accumulation: number of micro-batches.
            micro: number of the micro-batch, from 0.

        Returns:
            Inputs and targets of batch_size / (world_size × accumulation) samples, on the CPU.

        Raises:
            DataError: the batch cannot be split evenly, or is larger than the data.
        """
        share, rest = divmod(batch_size, world_size * accumulation)
        if rest or share < 1:
            raise DataError(
                f"a batch of {batch_size} samples cannot be split evenly over {world_size} processes × {accumulation} "
                f"micro-batches: it must be a multiple of {world_size * accumulation}"
            )
        if batch_size > self.train_size:
            raise DataError(
                f"{self.name} has {self.train_size} training samples, too few for a batch of {batch_size}: use more "
                "data or a smaller batch_size"
            )
        first = (micro * world_size + rank) * share
        return self._train_batch(step, batch_size, slice(first, first + share))

    def validation(
        self, batch_size: int, rank: int = 0, world_size: int = 1, limit: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One rank's share of the held-out samples; each sample is in exactly one rank's share, once.

        Every rank gets the same number of batches, none of them empty, so that collectives in a forward pass match.

        Args:
            batch_size: samples in a batch, over all ranks.
            rank: this rank.
            world_size: number of ranks.
            limit: largest number of batches; their samples are spread evenly over all held-out samples; None: all.

        Raises:
            DataError: there are fewer samples than ranks.
        """
        samples = self.validation_size
        if samples < world_size:
            raise DataError(
                f"{self.name} holds out {samples} samples for validation, too few for {world_size} processes: "
                "use more data or a larger data.validation"
            )
        used = samples if limit is None else max(world_size, min(samples, limit * batch_size))
        chosen = np.arange(used) * samples // used
        batches = max(1, min(-(-used // batch_size), used // world_size))
        return self._validation_parts(chosen, batches, rank, world_size)

    def _validation_parts(
        self, chosen: np.ndarray, batches: int, rank: int, world_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for whole in np.array_split(chosen, batches):
            yield self._validation_batch(np.array_split(whole, world_size)[rank])

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        """Mean cross entropy in nats (of text: per byte) as a scalar.

        Args:
            outputs: logits (B, classes) or (B, T, V), or an object that has them as `.logits`.
            targets: (B,) or (B, T).
        """
        logits = logits_of(outputs, targets)
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


@dataclass(frozen=True, eq=False)
class LanguageTask(Task):
    """Predict the next byte of a text.

    Args:
        train: the text's bytes for training (N,) as uint8.
        held_out: those for validation, likewise.
        context: bytes in a window, T.
    """

    kind: ClassVar[str] = "language"
    train: np.ndarray = field(repr=False)
    held_out: np.ndarray = field(repr=False)
    context: int = 128

    def __post_init__(self) -> None:
        needed = self.context + 1
        for part, content in (("training", self.train), ("validation", self.held_out)):
            if len(content) < needed:
                raise DataError(
                    f"the {part} part of {self.name} has {len(content)} bytes, but a context of {self.context} needs "
                    f"at least {needed}: use more text, a smaller context or another data.validation"
                )

    @property
    def train_size(self) -> int:
        """Number of windows that do not overlap."""
        return (len(self.train) - 1) // self.context

    @property
    def validation_size(self) -> int:
        """Number of held-out windows that do not overlap."""
        return (len(self.held_out) - 1) // self.context

    def _train_batch(self, step: int, batch_size: int, part: slice) -> tuple[Tensor, Tensor]:
        # Every rank draws the starts of the whole batch (microseconds) and takes its part.
        generator = np.random.default_rng((_WINDOWS, self.seed, step))
        return self._windows(self.train, generator.integers(0, len(self.train) - self.context, batch_size)[part])

    def _validation_batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return self._windows(self.held_out, indices * self.context)

    def _windows(self, content: np.ndarray, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        windows = torch.from_numpy(content[starts[:, None] + np.arange(self.context + 1)]).long()
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def metrics(self, outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        """Sums over a batch: loss in nats; count: bytes."""
        return _sums(self.loss(outputs, targets), targets)


@dataclass(frozen=True, eq=False)
class ClassificationTask(Task):
    """Predict the class of an image.

    Args:
        images: for training, (N, C, H, W) as uint8.
        labels: of these images, (N,) as int64.
        held_out_images: for validation, (N, C, H, W) as uint8.
        held_out_labels: of these images, (N,) as int64.
        shift: training images are moved by up to this number of pixels in each direction.
        flip: training images are mirrored with a probability of 1/2.
    """

    kind: ClassVar[str] = "classification"
    images: np.ndarray = field(repr=False)
    labels: np.ndarray = field(repr=False)
    held_out_images: np.ndarray = field(repr=False)
    held_out_labels: np.ndarray = field(repr=False)
    shift: int = 0
    flip: bool = False
    mean: Tensor = field(init=False, repr=False)
    deviation: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not len(self.images) or not len(self.held_out_images):
            raise DataError(f"{self.name} has no images: at least one to train on and one to hold out are needed")
        # 10,000 images give the mean and deviation of each channel to three digits.
        sample = torch.tensor(self.images[:10_000], dtype=torch.float32)
        deviation, mean = torch.std_mean(sample, dim=(0, 2, 3), correction=0, keepdim=True)
        object.__setattr__(self, "mean", mean[0])
        object.__setattr__(self, "deviation", deviation[0].clamp(min=1e-3))

    @property
    def train_size(self) -> int:
        """Number of training images."""
        return len(self.images)

    @property
    def validation_size(self) -> int:
        """Number of held-out images."""
        return len(self.held_out_images)

    def _train_batch(self, step: int, batch_size: int, part: slice) -> tuple[Tensor, Tensor]:
        chosen = self._order(step * batch_size + part.start, step * batch_size + part.stop)
        images = self.images[chosen]
        if self.shift or self.flip:
            # Drawn for the whole batch, so that a sample's augmentation does not depend on the number of ranks.
            generator = np.random.default_rng((_AUGMENT, self.seed, step))
            moves = generator.integers(0, 2 * self.shift + 1, (batch_size, 2))[part]
            mirrored = generator.integers(0, 2 if self.flip else 1, batch_size)[part] == 1
            images = _augment(images, self.shift, moves, mirrored)
        return self._tensors(images, self.labels[chosen])

    def _order(self, start: int, stop: int) -> np.ndarray:
        """Indices of the samples `start` to `stop` in the endless sequence of epochs, each of which is a new permutation."""
        size = self.train_size
        first, last = start // size, (stop - 1) // size
        epochs = [
            np.random.default_rng((_ORDER, self.seed, epoch)).permutation(size) for epoch in range(first, last + 1)
        ]
        return np.concatenate(epochs)[start - first * size : stop - first * size]

    def _validation_batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        return self._tensors(self.held_out_images[indices], self.held_out_labels[indices])

    def _tensors(self, images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        return (torch.from_numpy(images).float() - self.mean) / self.deviation, torch.from_numpy(labels)

    def metrics(self, outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        """Sums over a batch: loss in nats; accuracy: correctly classified images; count: images."""
        right = (logits_of(outputs, targets).argmax(-1) == targets).sum(dtype=torch.float64)
        return _sums(self.loss(outputs, targets), targets) | {"accuracy": right}


def _augment(images: np.ndarray, shift: int, moves: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """Moves each image (B, C, H, W) by moves (B, 2) − shift pixels, filled with black, and mirrors those of `mirrored` (B,)."""
    height, width = images.shape[-2:]
    padded = np.pad(images, ((0, 0), (0, 0), (shift, shift), (shift, shift)))
    rows = moves[:, 0, None] + np.arange(height)
    columns = moves[:, 1, None] + np.where(mirrored[:, None], np.arange(width)[::-1], np.arange(width))
    samples = np.arange(len(images))
    # Advanced indices around the slice of channels put the channels last: (B, H, W, C).
    moved = padded[samples[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return np.ascontiguousarray(moved.transpose(0, 3, 1, 2))


def logits_of(outputs: Any, targets: Tensor) -> Tensor:
    """A model's logits (…, classes) for its targets (…).

    Args:
        outputs: logits, or an object that has them as `.logits`.
        targets: gives the shape.

    Raises:
        DataError: `outputs` has no logits of that shape.
    """
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != targets.shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(
            f"the model's output must be logits, a row of classes for each of the targets {tuple(targets.shape)}, "
            f"got {got}"
        )
    return logits


def _sums(mean: Tensor, targets: Tensor) -> dict[str, Tensor]:
    count = torch.tensor(targets.numel(), dtype=torch.float64, device=targets.device)
    return {"loss": mean.detach().double() * count, "count": count}
