"""What `benchmarks.quality` trains: for each task the settings of its recipe, and a dense model as small as a 10 % bank."""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]
_ADAMW: Settings = {"optimizer.name": "adamw", "optimizer.weight_decay": 0.1}
_TEXT: Settings = {"data.name": "text", "batch_size": 16, "steps": 500, "schedule.warmup": 50, "evaluate_every": 250}
_IMAGES: Settings = {
    **{"data.name": "fashion_mnist", "data.limit": 10_000, "batch_size": 128, "steps": 312, "schedule.warmup": 20},
    **{"evaluate_every": 312, "evaluate_batches": 78},
}

TASKS: dict[str, Settings] = {
    "gpt": {
        **_TEXT,
        **_ADAMW,
        "model": "gpt",
        "model_args": {"layers": 4, "width": 128, "heads": 4, "context": 128},
        "evaluate_batches": 20,
    },
    "wrn": {
        **_IMAGES,
        "model": "wide_resnet",
        "model_args": {"depth": 16, "width": 2, "stem_stride": 2},
        "optimizer.name": "sgd",
        "optimizer.weight_decay": 5e-4,
        "clip_norm": None,
    },
    "lstm": {
        **_TEXT,
        **_ADAMW,
        "model": "benchmarks.models.lstm",
        "model_args": {"layers": 2, "width": 128, "context": 64},
        "evaluate_batches": 40,
    },
    "vit": {
        **_IMAGES,
        **_ADAMW,
        "model": "benchmarks.models.vit",
        "model_args": {"layers": 4, "width": 64, "heads": 4, "patch": 4},
    },
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
    # Small enough to try many rates: what a budget does to the best rate.
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
EQUAL: dict[str, Settings] = {
    "gpt": {"layers": 4, "width": 40, "heads": 4, "context": 128},
    "gpt-wide": {"layers": 4, "width": 80, "heads": 4, "context": 64},
    "wrn": {"depth": 10, "width": 1, "stem_stride": 2},
    "lstm": {"layers": 2, "width": 33, "context": 64},
    "vit": {"layers": 4, "width": 21, "heads": 3, "patch": 4},
}
"""`model_args` of dense models with at least as many parameters as the 10 % budget leaves."""
