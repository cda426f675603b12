"""Tasks of `benchmarks.quality.run`: settings of each recipe, and dense models as small as a bank."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

Settings = dict[str, Any]
_ADAMW: Settings = {"optimizer.name": "adamw", "optimizer.weight_decay": 0.1}
_TEXT: Settings = {"data.name": "text", "batch_size": 16, "steps": 500, "schedule.warmup": 50, "evaluate_every": 250}
_IMAGES: Settings = {
    **{"data.name": "fashion_mnist", "data.limit": 10_000, "batch_size": 128, "steps": 312, "schedule.warmup": 20},
    **{"evaluate_every": 312, "evaluate_batches": 78},
}
_GPT: Settings = {
    **_TEXT,
    **_ADAMW,
    "model": "gpt",
    "model_args": {"layers": 4, "width": 128, "heads": 4, "context": 128},
    "evaluate_batches": 20,
}
_LSTM: Settings = {
    **_TEXT,
    **_ADAMW,
    "model": "benchmarks.models.lstm",
    "model_args": {"layers": 2, "width": 128, "context": 64},
    "evaluate_batches": 40,
}

TASKS: dict[str, Settings] = {
    "gpt": _GPT,
    "wrn": {
        **_IMAGES,
        "model": "wide_resnet",
        "model_args": {"depth": 16, "width": 2, "stem_stride": 2},
        "optimizer.name": "sgd",
        "optimizer.weight_decay": 5e-4,
        "clip_norm": None,
    },
    "lstm": _LSTM,
    "vit": {
        **_IMAGES,
        **_ADAMW,
        "model": "benchmarks.models.vit",
        "model_args": {"layers": 4, "width": 64, "heads": 4, "patch": 4},
    },
    # Two modalities: the right one of 60 generated captions for an image of Fashion-MNIST.
    "captions": {
        **_IMAGES,
        **_ADAMW,
        **{"data.name": "fashion_captions", "batch_size": 64, "evaluate_batches": 80},
        "model": "benchmarks.models.image_text",
        "model_args": {"layers": 2, "width": 64, "text_width": 48, "heads": 4, "patch": 4},
    },
    # A seed is a fold of the cross-validation, too.
    "digits": {
        **_ADAMW,
        **{"data.name": "digits", "batch_size": 64, "steps": 500, "schedule.warmup": 20, "evaluate_every": 500},
        "model": "benchmarks.models.mlp",
        "model_args": {"layers": 3, "width": 256},
    },
    # 4.7 MB of text, the modules of this Python's standard library: a run of 2,000 steps reads about as many bytes.
    "gpt-python": {**_GPT, "data.path": str(Path(sysconfig.get_path("stdlib")) / "*.py")},
    # Ten times as many weights as "gpt" and "lstm", on the same data.
    "gpt-large": {**_GPT, "model_args": {"layers": 8, "width": 288, "heads": 8, "context": 128}},
    "lstm-large": {**_LSTM, "model_args": {"layers": 2, "width": 440, "context": 64}},
    # So few tokens per step that on a slow network a step is all waiting.
    "gpt-wide": {
        **_TEXT,
        **_ADAMW,
        "model": "gpt",
        "model_args": {"layers": 4, "width": 256, "heads": 4, "context": 64},
        "steps": 1500,
        "batch_size": 4,
        "evaluate_batches": 100,
    },
    # Small enough for many learning rates: how the best one depends on the budget.
    "gpt-small": {
        **_TEXT,
        "model": "gpt",
        "model_args": {"layers": 2, "width": 64, "heads": 4, "context": 64},
        "steps": 250,
        "optimizer.weight_decay": 0.0,
        "schedule.warmup": 25,
        "evaluate_batches": 20,
    },
}
EQUAL: dict[float, dict[str, Settings]] = {
    0.1: {
        "gpt": {"layers": 4, "width": 40, "heads": 4, "context": 128},
        "gpt-python": {"layers": 4, "width": 40, "heads": 4, "context": 128},
        "gpt-wide": {"layers": 4, "width": 80, "heads": 4, "context": 64},
        "gpt-large": {"layers": 4, "width": 128, "heads": 4, "context": 128},
        "wrn": {"depth": 10, "width": 1, "stem_stride": 2},
        "lstm": {"layers": 2, "width": 33, "context": 64},
        "lstm-large": {"layers": 2, "width": 131, "context": 64},
        "vit": {"layers": 4, "width": 21, "heads": 3, "patch": 4},
        "captions": {"layers": 2, "width": 20, "text_width": 16, "heads": 2, "patch": 4},
        "digits": {"layers": 3, "width": 72},
    },
    0.02: {
        "gpt": {"layers": 4, "width": 20, "heads": 4, "context": 128},
        "lstm": {"layers": 2, "width": 12, "context": 64},
        "vit": {"layers": 4, "width": 12, "heads": 4, "patch": 4},
        "captions": {"layers": 2, "width": 12, "text_width": 8, "heads": 4, "patch": 4},
        "digits": {"layers": 3, "width": 29},
    },
}
"""budget → task → `model_args` of a narrower dense model with at least as many parameters as the budget leaves."""
SHALLOW: dict[float, dict[str, Settings]] = {
    0.1: {
        "gpt": {"layers": 1, "width": 76, "heads": 4, "context": 128},
        "lstm": {"layers": 1, "width": 42, "context": 64},
        "vit": {"layers": 1, "width": 42, "heads": 2, "patch": 4},
        "captions": {"layers": 1, "width": 28, "text_width": 20, "heads": 4, "patch": 4},
        "digits": {"layers": 1, "width": 211},
    },
    0.02: {
        "gpt": {"layers": 1, "width": 32, "heads": 4, "context": 128},
        "lstm": {"layers": 1, "width": 14, "context": 64},
        "vit": {"layers": 1, "width": 22, "heads": 2, "patch": 4},
        "captions": {"layers": 1, "width": 14, "text_width": 10, "heads": 2, "patch": 4},
        "digits": {"layers": 1, "width": 51},
    },
}
"""The same, with the fewest layers instead."""
WIDER: dict[str, Settings] = {
    "gpt": {"layers": 4, "width": 192, "heads": 4, "context": 128},
    "lstm": {"layers": 2, "width": 256, "context": 64},
    "vit": {"layers": 4, "width": 128, "heads": 4, "patch": 4},
    "captions": {"layers": 2, "width": 128, "text_width": 96, "heads": 4, "patch": 4},
    "digits": {"layers": 3, "width": 512},
}
"""`model_args` of wider models, whose banks are as small as the usual model's 10 % bank."""
