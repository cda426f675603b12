"""Sources of data: readers of local files, by name. Nothing is downloaded, and no file can run code."""

from __future__ import annotations

import dataclasses
import gzip
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dist_ssn.errors import DataError
from dist_ssn.files import open_regular
from dist_ssn.train.data.captions import CAPTIONS, caption_indices
from dist_ssn.train.data.cifar import read_cifar
from dist_ssn.train.data.tasks import ClassificationTask, Hints, Images, LanguageTask, Task
from dist_ssn.train.data.text import read_text_bytes

if TYPE_CHECKING:
    from dist_ssn.train.recipe.sections import DataConfig

DEFAULT_CONTEXT = 128
FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"
FASHION_MNIST_COMMAND = "apt-get install dataset-fashion-mnist"
# Digits have no test set. The held-out samples do not depend on the run's seed, so that runs can be compared.
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Source:
    """A kind of data.

    Args:
        hints: arguments for a model's builder, known before a file is read.
        load: (config, context, seed) → Task.
    """

    hints: dict[str, Any]
    load: Callable[[DataConfig, int, int], Task]


def load_task(config: DataConfig, *, context: int | None = None, seed: int = 0) -> Task:
    """Reads the data.

    Args:
        config: the recipe's section `data`.
        context: bytes that a model of text sees at once; None: 128. Images ignore it.
        seed: of the order of the samples and of their augmentation.

    Raises:
        DataError: the data is unknown, missing, malformed or too small.
    """
    source = DATA[config.name]
    if context is not None and (not isinstance(context, int) or context < 1):
        raise DataError(f"the context must be a whole number of bytes, at least 1, got {context!r}")
    return source.load(config, DEFAULT_CONTEXT if context is None else context, seed)


def data_hints(config: DataConfig, *, context: int | None = None) -> Hints:
    """Arguments for a model's builder, without reading the data (a plan does not need the files)."""
    hints = dict(DATA[config.name].hints)
    if "vocabulary" in hints:
        hints["context"] = DEFAULT_CONTEXT if context is None else context
    return Hints(hints)


def _held_out(config: DataConfig, samples: int) -> slice:
    """The samples that the recipe holds out, of a data set without a test set.

    Raises:
        DataError: there is no such fold.
    """
    size = int(samples * config.validation)
    first = samples - (config.fold + 1) * size
    if first < 0:
        raise DataError(
            f"data.fold: {config.name} has {samples // size} whole parts of {config.validation:g} of its {samples} samples, "
            f"the folds 0 to {samples // size - 1}, got {config.fold}"
        )
    return slice(first, first + size)


# ---------------------------------------------------------------------------------------------------------------- text


def _load_text(config: DataConfig, context: int, seed: int) -> Task:
    text = read_text_bytes(config.path, config.limit)
    content = text.array
    part = _held_out(config, len(content))
    # The usual fold is at the end: nothing is copied then.
    train = content[: part.start] if part.stop == len(content) else np.delete(content, part)
    hints = data_hints(config, context=context).model_hints
    where = config.path or "pydoc_data.topics"
    return LanguageTask(
        f"the text {where!r}",
        seed,
        hints,
        train=train,
        held_out=content[part],
        context=context,
        notes=text.notes(config.path),
    )


# -------------------------------------------------------------------------------------------------------------- images


def _images_task(
    config: DataConfig, seed: int, train: Images, held_out: Images, hints: dict[str, Any], shift: int, flip: bool
) -> ClassificationTask:
    if config.fold and config.name != "digits":
        raise DataError(f"data.fold: {config.name} has a test set of its own, so nothing else is held out")
    for part, (images, labels) in (("training", train), ("test", held_out)):
        if len(images) != len(labels):
            raise DataError(f"{config.name}: the {part} files have {len(images)} images but {len(labels)} labels")
        if len(labels) and not 0 <= labels.min() <= labels.max() < hints["classes"]:
            raise DataError(
                f"{config.name}: the {part} labels go from {labels.min()} to {labels.max()}, but there are "
                f"{hints['classes']} classes, from 0"
            )
    return ClassificationTask(
        config.name,
        seed,
        dict(hints),
        images=train[0][: config.limit],
        labels=train[1][: config.limit],
        held_out_images=held_out[0],
        held_out_labels=held_out[1],
        shift=shift if config.augment else 0,
        flip=flip and config.augment,
    )


def _load_digits(config: DataConfig, context: int, seed: int) -> Task:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(digits.target))
    images = digits.images[order][:, None].astype(np.uint8)
    labels = digits.target[order].astype(np.int64)
    part = _held_out(config, len(labels))
    train = np.delete(images, part, axis=0), np.delete(labels, part)
    return _images_task(config, seed, train, (images[part], labels[part]), DATA["digits"].hints, shift=1, flip=False)


def _load_fashion_mnist(config: DataConfig, context: int, seed: int) -> ClassificationTask:
    folder = Path(config.path or FASHION_MNIST_FOLDER).expanduser()

    def part(name: str) -> Images:
        images = _read_idx(folder / f"{name}-images-idx3-ubyte", dimensions=3)[:, None]
        return images, _read_idx(folder / f"{name}-labels-idx1-ubyte", dimensions=1).astype(np.int64)

    hints = DATA["fashion_mnist"].hints
    return _images_task(config, seed, part("train"), part("t10k"), hints, shift=2, flip=True)


def _load_fashion_captions(config: DataConfig, context: int, seed: int) -> Task:
    shown = _load_fashion_mnist(config, context, seed)
    return dataclasses.replace(
        shown,
        model_hints=dict(DATA["fashion_captions"].hints),
        labels=caption_indices(shown.images, shown.labels),
        held_out_labels=caption_indices(shown.held_out_images, shown.held_out_labels),
    )


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An array of bytes in the IDX format of MNIST, packed or not.

    Source: http://yann.lecun.com/exdb/mnist, "The IDX file format".
    """
    packed = path.with_name(f"{path.name}.gz")
    file = packed if packed.exists() else path
    try:
        with open_regular(file) as stream:
            content = gzip.decompress(stream.read()) if file == packed else stream.read()
    except FileNotFoundError:
        raise DataError(
            f"fashion_mnist: there is no {packed.name} in {path.parent}: run {FASHION_MNIST_COMMAND}, or set data.path "
            "to the folder that has the four files"
        ) from None
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"fashion_mnist: {file} cannot be read ({error}): get the file again") from None
    header = 4 + 4 * dimensions
    shape = tuple(int(size) for size in np.frombuffer(content[4 : header - header % 4], dtype=">u4")[:dimensions])
    if content[:4] != bytes((0, 0, 8, dimensions)) or len(content) != header + int(np.prod(shape)):
        raise DataError(
            f"fashion_mnist: {path} is not a complete IDX file of {dimensions} dimensions of bytes: get the file again"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _load_cifar(config: DataConfig, context: int, seed: int) -> Task:
    train, held_out = read_cifar(config.name, config.path)
    return _images_task(config, seed, train, held_out, DATA[config.name].hints, shift=4, flip=True)


DATA: dict[str, Source] = {
    "text": Source({"vocabulary": 256, "context": DEFAULT_CONTEXT}, _load_text),
    "digits": Source({"classes": 10, "channels": 1, "size": 8}, _load_digits),
    "fashion_mnist": Source({"classes": 10, "channels": 1, "size": 28}, _load_fashion_mnist),
    "fashion_captions": Source(
        {"classes": len(CAPTIONS), "captions": CAPTIONS, "channels": 1, "size": 28}, _load_fashion_captions
    ),
    "cifar10": Source({"classes": 10, "channels": 3, "size": 32}, _load_cifar),
    "cifar100": Source({"classes": 100, "channels": 3, "size": 32}, _load_cifar),
}
