"""The transfers: a model, the data that it is trained on first, the data that it is fine-tuned on, and the methods.

Images are those of Fashion-MNIST, padded to 32 × 32 and averaged to 16 × 16, and of scikit-learn's digits, each pixel four times.
"""

from __future__ import annotations

import dataclasses
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.transfer.methods import GPT, VIT, WIDE_RESNET, Methods
from dist_ssn.train.data import ClassificationTask, Task, load_task
from dist_ssn.train.models import build_model
from dist_ssn.train.recipe.sections import DataConfig

CONTEXT = 64
"""Bytes in a window of text."""


@dataclass(frozen=True)
class Transfer:
    """One transfer.

    Args:
        build: the model, from the task that it is trained on first.
        before: data of the pretraining.
        after: data of the fine-tuning.
        methods: see `Methods`.
        head: name of the layer that is drawn anew before the fine-tuning; every method trains it whole.
        batch: samples in a step.
        evaluated: batches of the validation.
        pretraining_steps: number of steps of the pretraining.
        pretraining_lr: its learning rate.
        steps: number of steps of the fine-tuning.
    """

    build: Callable[[Task], nn.Module]
    before: Callable[[], Task]
    after: Callable[[], Task]
    methods: Methods
    head: str | None = None
    batch: int = 32
    evaluated: int = 32
    pretraining_steps: int = 2000
    pretraining_lr: float = 3e-3
    steps: int = 150


def _text(path: str) -> Callable[[], Task]:
    """Text below the standard library's folder."""

    def load() -> Task:
        file = Path(sysconfig.get_paths()["stdlib"]) / path
        return load_task(DataConfig(name="text", path=str(file)), context=CONTEXT, seed=0)

    return load


def _sixteen(images: np.ndarray) -> np.ndarray:
    """Images (N, C, H, W) as uint8 in 16 × 16 pixels: those of 8 × 8 repeated, those of 28 × 28 padded and averaged."""
    if images.shape[-1] == 8:
        return images.repeat(2, axis=2).repeat(2, axis=3)
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2))).astype(np.float32)
    return padded.reshape(*images.shape[:2], 16, 2, 16, 2).mean((3, 5)).astype(np.uint8)


def _images(name: Any, classes: Sequence[int] = range(10)) -> Callable[[], Task]:
    """A data set of images, 16 × 16, of some classes only, which are counted from 0."""

    def load() -> Task:
        whole = load_task(DataConfig(name=name, augment=False, validation=0.3), seed=0)  # digits have no test set
        assert isinstance(whole, ClassificationTask)
        mine, held_out = np.isin(whole.labels, classes), np.isin(whole.held_out_labels, classes)
        return dataclasses.replace(
            whole,
            images=_sixteen(whole.images[mine]),
            labels=whole.labels[mine] - min(classes),
            held_out_images=_sixteen(whole.held_out_images[held_out]),
            held_out_labels=whole.held_out_labels[held_out] - min(classes),
            model_hints={"classes": len(classes), "channels": 1, "size": 16},
        )

    return load


def _gpt(task: Task) -> nn.Module:
    return build_model("gpt", {"layers": 2, "width": 128, "heads": 4, "context": CONTEXT}, task)


def _wide_resnet(task: Task) -> nn.Module:
    classes = task.model_hints["classes"]
    return build_model("wide_resnet", {"depth": 16, "width": 1, "norm": "group", "classes": classes}, task)


class _Vit(nn.Module):
    """A small ViT of `transformers`, from its config: images (B, 1, 16, 16) → logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        sizes: dict[str, Any] = {
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "intermediate_size": 128,
        }
        image: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_channels": 1, "num_labels": 10}
        whole = ViTForImageClassification(
            ViTConfig(**sizes, **image, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        )
        self.vit, self.classifier = whole.vit, whole.classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.vit(images).last_hidden_state[:, 0])


_GPT = Transfer(
    _gpt, _text("*.py"), _text("pydoc_data/topics.py"), GPT, batch=8, evaluated=16, pretraining_steps=1000, steps=120
)
TRANSFERS: dict[str, Transfer] = {
    "gpt": _GPT,
    "gpt, 10,000 steps": dataclasses.replace(_GPT, pretraining_steps=10_000),
    "wide resnet": Transfer(
        _wide_resnet,
        _images("fashion_mnist", range(5)),
        _images("fashion_mnist", range(5, 10)),
        WIDE_RESNET,
        head="head",
    ),
    "vit": Transfer(
        lambda _: _Vit(),
        _images("fashion_mnist"),
        _images("digits"),
        VIT,
        head="classifier",
        evaluated=16,
        pretraining_steps=4000,
        pretraining_lr=1e-3,
    ),
}
"""By name."""
