"""Captions of Fashion-MNIST's images: the object, its brightness, and its texture, such as "a dark, patterned ankle boot".

The captions are generated from an image's label and from the mean and deviation of its pixels. A model chooses among all captions
for each image, as in retrieval. The loss of an image does not depend on other images, so ranks need not exchange captions.
"""

from __future__ import annotations

from itertools import product

import numpy as np

NAMES = (
    *("t-shirt", "pair of trousers", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
TONES, TEXTURES = ("dark", "medium", "bright"), ("plain", "patterned")
CAPTIONS = tuple(f"a {tone}, {texture} {name}" for name, tone, texture in product(NAMES, TONES, TEXTURES))
# Near the terciles of the mean brightness, and the median of its deviation, over the training images.
_TONE_STARTS, _PATTERN_START = (127.0, 171.0), 61.0


def caption_indices(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Index in CAPTIONS of each image's caption; black pixels are background and do not count.

    Args:
        images: (N, 1, H, W) as uint8.
        labels: (N,), Fashion-MNIST's classes.

    Returns:
        Indices (N,) as int64.
    """
    pixels = images.reshape(len(images), -1)
    shown = np.maximum(np.count_nonzero(pixels, axis=1), 1)
    # uint32 holds the sum of 28 × 28 squares of bytes, and takes less than float64.
    mean = pixels.sum(1, dtype=np.uint32) / shown
    square = np.square(pixels, dtype=np.uint32).sum(1) / shown
    tone = np.searchsorted(_TONE_STARTS, mean, side="right")
    patterned = square - mean**2 >= _PATTERN_START**2
    return (labels * len(TONES) + tone) * len(TEXTURES) + patterned
