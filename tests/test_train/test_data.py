from __future__ import annotations

import gzip
import io
import math
import os
import pickle
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dist_ssn.errors import DataError
from dist_ssn.train.data import DATA, ClassificationTask, LanguageTask, Task, data_hints, load_task
from dist_ssn.train.data.captions import CAPTIONS
from dist_ssn.train.data.sources import FASHION_MNIST_FOLDER
from dist_ssn.train.recipe.sections import DataConfig


def numbered_images(count: int = 40, held_out: int = 13, **options) -> ClassificationTask:
    """A task whose labels are the samples' numbers, to see which sample is where."""
    random = np.random.default_rng(0)
    return ClassificationTask(
        "numbered",
        options.pop("seed", 0),
        {},
        images=random.integers(0, 256, (count, 3, 6, 6), dtype=np.uint8),
        labels=np.arange(count),
        held_out_images=random.integers(0, 256, (held_out, 3, 6, 6), dtype=np.uint8),
        held_out_labels=np.arange(held_out),
        **options,
    )


def numbered_text(size: int = 4000, context: int = 16, seed: int = 0) -> LanguageTask:
    content = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    return LanguageTask(
        "numbered", seed, {}, train=content[: size * 9 // 10], held_out=content[size * 9 // 10 :], context=context
    )


TASKS = [numbered_text(), numbered_images(), numbered_images(shift=2, flip=True)]


# ------------------------------------------------------------------------------------------------ which sample, where


@pytest.mark.parametrize("task", TASKS, ids=["text", "images", "augmented"])
@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 2), (3, 2), (12, 1)])
def test_ranks_see_one_processes_batch_in_order(task: Task, world_size: int, accumulation: int) -> None:
    for step in (0, 1, 7):
        whole = task.batch(step, 12)
        parts = [
            task.batch(step, 12, rank, world_size, accumulation, micro)
            for micro in range(accumulation)
            for rank in range(world_size)
        ]
        for together, alone in zip(zip(*parts, strict=True), whole, strict=True):
            assert torch.equal(torch.cat(together), alone)


@pytest.mark.parametrize("task", TASKS, ids=["text", "images", "augmented"])
def test_a_batch_depends_on_seed_and_step_alone(task: Task) -> None:
    first = [task.batch(step, 8) for step in range(6)]
    again = {step: replace(task).batch(step, 8) for step in (5, 2, 0)}  # a new task, another order: a resumed run
    for step, (inputs, targets) in again.items():
        assert torch.equal(inputs, first[step][0]) and torch.equal(targets, first[step][1])
    assert not torch.equal(first[0][0], first[1][0])
    assert not torch.equal(replace(task, seed=1).batch(0, 8)[0], first[0][0])


@pytest.mark.parametrize("batch_size", [7, 8, 40])
def test_every_epoch_has_every_image_once(batch_size: int) -> None:
    """40 images in batches of 7: batches run over the end of an epoch, and nothing is lost or doubled there."""
    task = numbered_images(40)
    row = torch.cat([task.batch(step, batch_size)[1] for step in range(4 * 40 // batch_size + 1)])
    epochs = [row[start : start + 40].tolist() for start in range(0, 120, 40)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(40))


def test_images_come_with_their_labels_and_are_normalized() -> None:
    task = numbered_images(500)
    images, labels = task.batch(3, 16)
    raw = torch.from_numpy(task.images)[labels].float()
    everything = torch.from_numpy(task.images).double()
    for channel in range(3):
        mean, deviation = everything[:, channel].mean(), everything[:, channel].std(correction=0)
        torch.testing.assert_close(images[:, channel].double(), (raw[:, channel].double() - mean) / deviation)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64 and images.is_contiguous()


def test_text_windows_are_the_text_and_its_next_bytes() -> None:
    task = numbered_text()
    inputs, targets = task.batch(5, 32)
    assert inputs.shape == targets.shape == (32, 16) and inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    text = task.train.tobytes()
    for window, end in zip(inputs, targets[:, -1], strict=True):
        assert bytes([*window.tolist(), int(end)]) in text
    assert len({tuple(window) for window in inputs.tolist()}) > 28  # random starts


def test_shortest_possible_text_is_used_to_its_last_byte() -> None:
    task = LanguageTask(
        "x", 0, {}, train=np.arange(9, dtype=np.uint8), held_out=np.arange(9, dtype=np.uint8), context=8
    )
    assert (task.train_size, task.validation_size) == (1, 1)
    assert task.batch(0, 1)[1].tolist() == [list(range(1, 9))]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 4, 5, 13, 100])
def test_validation_sees_each_sample_once(world_size: int, batch_size: int) -> None:
    task = numbered_images(held_out=13)
    ranks = [list(task.validation(batch_size, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1  # equally many, so that no rank waits for another
    assert all(len(targets) for batches in ranks for _, targets in batches)
    assert sorted(int(label) for batches in ranks for _, labels in batches for label in labels) == list(range(13))
    largest = max(sum(len(batches[i][1]) for batches in ranks) for i in range(len(ranks[0])))
    assert largest <= max(batch_size, 2 * world_size)


def test_validation_limit_is_spread_over_all() -> None:
    task = numbered_images(held_out=100)
    labels = torch.cat([labels for _, labels in task.validation(5, limit=2)])
    assert labels.tolist() == list(range(0, 100, 10))
    assert sum(len(labels) for _, labels in task.validation(5, limit=1000)) == 100


def test_validation_of_text_is_every_whole_window() -> None:
    task = numbered_text()
    windows = torch.cat([targets for _, targets in task.validation(3)])
    assert windows.flatten().tolist() == task.held_out[1 : 1 + 16 * task.validation_size].tolist()
    assert 16 * (task.validation_size + 1) + 1 > len(task.held_out)


def test_too_few_samples() -> None:
    with pytest.raises(DataError, match="numbered has 40 training samples, too few for a batch of 41: use more"):
        numbered_images(40).batch(0, 41)
    with pytest.raises(DataError, match=r"holds out 3 samples for validation, too few for 4 processes"):
        numbered_images(held_out=3).validation(8, 0, 4)
    with pytest.raises(DataError, match="no images"):
        numbered_images(0)
    with pytest.raises(DataError, match=r"a batch of 9 samples .* 2 processes × 2 micro-batches: .* a multiple of 4"):
        numbered_images().batch(0, 9, 0, 2, 2, 0)


# ------------------------------------------------------------------------------------------------------- augmentation


def test_augmentation_shifts_and_mirrors() -> None:
    """Each image is found among all the shifts and mirrorings of its original, written out one by one."""
    shift = 2
    task = numbered_images(40, shift=shift, flip=True)
    images, labels = task.batch(0, 40)
    raw = (images * task.deviation + task.mean).round().numpy()
    found = []
    for image, label in zip(raw, labels.tolist(), strict=True):
        padded = np.pad(task.images[label], ((0, 0), (shift, shift), (shift, shift))).astype(np.float32)
        matches = [
            (down, right, mirrored)
            for down in range(5)
            for right in range(5)
            for mirrored in (False, True)
            if np.array_equal(padded[:, down : down + 6, right : right + 6][..., :: -1 if mirrored else 1], image)
        ]
        assert len(matches) == 1
        found += matches
    down, right, mirrored = zip(*found, strict=True)
    assert set(down) == set(right) == set(range(5)) and 8 < sum(mirrored) < 32
    assert not torch.equal(task.batch(1, 40)[0][labels.argsort()], images[labels.argsort()])


def test_validation_is_not_augmented() -> None:
    plain, augmented = numbered_images(), numbered_images(shift=2, flip=True)
    for one, other in zip(plain.validation(5), augmented.validation(5), strict=True):
        assert torch.equal(one[0], other[0])


def test_fetching_a_batch_is_quick() -> None:
    """A training step on such images takes some 400 ms on a core; a batch of them a small part of that."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (10_000, 3, 32, 32), dtype=np.uint8)
    labels = np.zeros(10_000, dtype=np.int64)
    task = ClassificationTask("x", 0, {}, images, labels, images[:1], labels[:1], shift=4, flip=True)
    times = []
    for step in range(10):
        began = time.perf_counter()
        task.batch(step, 128)
        times.append(time.perf_counter() - began)
    assert min(times) < 0.06


# --------------------------------------------------------------------------------------------------- loss and metrics


def test_loss_and_metrics_of_images() -> None:
    task = numbered_images()
    logits = torch.randn(6, 10, requires_grad=True)
    targets = torch.tensor([0, 1, 2, 3, 4, 5])
    by_hand = -torch.stack([logits[i].log_softmax(0)[i] for i in range(6)]).mean()
    torch.testing.assert_close(task.loss(logits, targets), by_hand)
    sums = task.metrics(logits, targets)
    assert sums["accuracy"].item() == (logits.argmax(1) == targets).sum() and sums["count"].item() == 6
    assert sums["loss"].item() == pytest.approx(6 * by_hand.item()) and not sums["loss"].requires_grad


def test_metrics_add_up_over_batches() -> None:
    task = numbered_text()
    logits, targets = torch.randn(6, 16, 256), torch.randint(256, (6, 16))
    whole = task.metrics(logits, targets)
    parts = [task.metrics(logits[rows], targets[rows]) for rows in (slice(0, 1), slice(1, 6))]
    assert whole.keys() == {"loss", "count"} and whole["count"].item() == 96
    for key, value in whole.items():
        assert sum(part[key] for part in parts).item() == pytest.approx(value.item())  # pyright: ignore
    by_hand = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    assert (whole["loss"] / whole["count"]).item() == pytest.approx(by_hand.item())
    torch.testing.assert_close(task.loss(torch.zeros(6, 16, 256), targets), torch.tensor(math.log(256)))


def test_outputs_may_have_logits_inside() -> None:
    logits, targets = torch.randn(2, 16, 256), torch.randint(256, (2, 16))
    task = numbered_text()
    assert torch.equal(task.loss(SimpleNamespace(logits=logits), targets), task.loss(logits, targets))


@pytest.mark.parametrize("outputs", [torch.randn(6), torch.randn(5, 10), torch.randn(6, 4, 10), (torch.randn(6, 10),)])
def test_outputs_of_a_wrong_shape(outputs: object) -> None:
    with pytest.raises(DataError, match=r"must be logits, a row of classes for each of the targets \(6,\), got"):
        numbered_images().loss(outputs, torch.zeros(6, dtype=torch.long))


# --------------------------------------------------------------------------------------------------------------- text


def text_of(path: object, **options) -> LanguageTask:
    task = load_task(DataConfig(path=str(path), **options), context=4)
    assert isinstance(task, LanguageTask)
    return task


def everything(task: LanguageTask) -> bytes:
    return task.train.tobytes() + task.held_out.tobytes()


def test_default_text_is_in_every_python() -> None:
    task = load_task(DataConfig())
    assert isinstance(task, LanguageTask) and task.context == 128
    assert b"statement" in everything(task) and len(everything(task)) > 300_000
    assert len(task.held_out) == len(everything(task)) // 10
    assert task.model_hints == {"vocabulary": 256, "context": 128} == data_hints(DataConfig()).model_hints


def test_text_from_a_file_holds_out_the_end(tmp_path: Path) -> None:
    text = bytes(range(1, 101))
    (tmp_path / "a.txt").write_bytes(text)
    task = text_of(tmp_path / "a.txt", validation=0.25)
    assert task.train.tobytes() == text[:75] and task.held_out.tobytes() == text[75:]
    assert everything(text_of(tmp_path / "a.txt", limit=60)) == text[:60]


def test_text_from_a_folder_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.py", "a.txt", "c.txt", ".git/config", "b/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"<{name}>" * 5)
    (tmp_path / "b/binary").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "link").symlink_to(tmp_path / "a.txt")
    (tmp_path / "round").symlink_to(tmp_path)
    wanted = "".join(f"<{name}>" * 5 for name in ("a.txt", "b/1.py", "b/2.txt", "c.txt"))
    assert everything(text_of(tmp_path, validation=0.5)) == wanted.encode()
    globbed = everything(text_of(f"{tmp_path}/**/*.txt", validation=0.5)).decode()
    assert globbed == "".join(f"<{name}>" * 5 for name in ("a.txt", "b/2.txt", "c.txt"))


def test_wrong_texts(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "short").write_bytes(b"0123456789")
    (tmp_path / "binary").write_bytes(b"\0" * 1000)
    (tmp_path / "folder").mkdir()
    for path, wanted in (
        (tmp_path / "no.txt", "no.txt' does not exist in "),
        (tmp_path / "*.txt", r"there is no text in '.*\*.txt': give a text file, a folder of them, or a glob"),
        (tmp_path / "empty", "empty cannot be trained on, for it is empty: give a text file"),
        (tmp_path / "folder", "there is no text in"),
        (tmp_path / "binary", r"for it is binary, or text in UTF-16 .it has NUL bytes.: give a text file in UTF-8"),
        (tmp_path / "short", "the validation part of .* has 1 bytes, but a context of 4 needs at least 5"),
    ):
        with pytest.raises(DataError, match=wanted) as caught:
            text_of(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"the training part of .* has 1 bytes, but a context of 4 needs at least 5"):
        text_of(tmp_path / "short", validation=0.9)
    with pytest.raises(DataError, match="the context must be a whole number of bytes, at least 1, got 'x'"):
        load_task(DataConfig(), context="x")  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------------------------- images


def test_digits() -> None:
    task = load_task(DataConfig(name="digits"), seed=3)
    assert isinstance(task, ClassificationTask) and (task.train_size, task.validation_size) == (1618, 179)
    images, labels = task.batch(0, 64)
    assert images.shape == (64, 1, 8, 8) and 0 <= labels.min() <= labels.max() <= 9
    assert images.abs().mean() > 0.5 and (task.shift, task.flip) == (1, False)
    other = load_task(DataConfig(name="digits", augment=False, limit=100), seed=4)
    assert isinstance(other, ClassificationTask) and (other.train_size, other.shift) == (100, 0)
    assert np.array_equal(task.held_out_labels, other.held_out_labels)  # the same for every seed
    joined = np.concatenate([task.images, task.held_out_images])
    assert len(np.unique(joined.reshape(1797, -1), axis=0)) == 1797  # no sample is on both sides


@pytest.mark.parametrize("name", ["digits", "text"])
def test_each_sample_is_held_out_in_one_fold(name: str) -> None:
    folds = [load_task(DataConfig(name=name, fold=fold, limit=2000 if name == "text" else None)) for fold in range(10)]
    if name == "digits":
        held_out = [task.held_out_images.reshape(179, -1) for task in folds]
        assert len(np.unique(np.concatenate(held_out), axis=0)) == 1790
    else:
        held_out = [task.held_out for task in folds]
        assert np.array_equal(np.concatenate(held_out[::-1]), np.concatenate([folds[0].train, folds[0].held_out]))
    for task in folds[1:]:
        assert task.train_size == folds[0].train_size and task.validation_size == folds[0].validation_size


def test_a_fold_that_is_not_there(fashion: Path) -> None:
    for name, wanted in (
        ("digits", "digits has 10 whole parts of 0.1 of its 1797 samples, the folds 0 to 9, got 10"),
        ("text", "text has 10 whole parts"),
        ("fashion_mnist", "data.fold: fashion_mnist has a test set of its own"),
    ):
        with pytest.raises(DataError, match=wanted):
            load_task(DataConfig(name=name, fold=10, path=str(fashion) if "fashion" in name else None))


def write_idx(path: Path, array: np.ndarray, packed: bool = True) -> None:
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, dtype=">u4").tobytes()
    content = header + array.astype(np.uint8).tobytes()
    if packed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for part, count, packed in (("train", 30, True), ("t10k", 8, False)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", random.integers(0, 256, (count, 28, 28)), packed)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", np.arange(count) % 10, packed)
    return tmp_path


def test_fashion_mnist_from_a_folder(fashion: Path) -> None:
    task = load_task(DataConfig(name="fashion_mnist", path=str(fashion)))
    assert isinstance(task, ClassificationTask) and (task.train_size, task.validation_size) == (30, 8)
    assert task.images.shape == (30, 1, 28, 28) and task.labels.tolist() == [i % 10 for i in range(30)]
    assert np.array_equal(task.images[:, 0], np.random.default_rng(0).integers(0, 256, (30, 28, 28)))
    assert task.batch(0, 4)[0].shape == (4, 1, 28, 28) and (task.shift, task.flip) == (2, True)


@pytest.mark.skipif(not Path(FASHION_MNIST_FOLDER).exists(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian() -> None:
    task = load_task(DataConfig(name="fashion_mnist"))
    assert isinstance(task, ClassificationTask) and (task.train_size, task.validation_size) == (60_000, 10_000)
    assert np.bincount(task.labels).tolist() == [6000] * 10
    # the published mean and deviation are 0.2860 and 0.3530
    assert task.mean.item() / 255 == pytest.approx(0.286, abs=0.003)
    assert task.deviation.item() / 255 == pytest.approx(0.353, abs=0.003)


def test_a_caption_says_what_its_image_shows(fashion: Path) -> None:
    pixels = np.zeros((4, 28, 28), dtype=np.uint8)
    pixels[0, :10] = 100  # a dark thing of one shade, on black
    pixels[1, :10] = 200
    pixels[2, :10, ::2], pixels[2, :10, 1::2] = 60, 250  # stripes, between dark and bright
    write_idx(fashion / "train-images-idx3-ubyte", pixels)
    write_idx(fashion / "train-labels-idx1-ubyte", np.array([1, 9, 0, 8]))
    task = load_task(DataConfig(name="fashion_captions", path=str(fashion)))
    assert isinstance(task, ClassificationTask)
    assert [task.model_hints["captions"][number] for number in task.labels] == [
        "a dark, plain pair of trousers",
        "a bright, plain ankle boot",
        "a medium, patterned t-shirt",
        "a dark, plain bag",  # nothing is seen
    ]


def test_wrong_fashion_mnist(fashion: Path) -> None:
    def fails(wanted: str) -> None:
        with pytest.raises(DataError, match=wanted) as caught:
            load_task(DataConfig(name="fashion_mnist", path=str(fashion)))
        assert "\n" not in str(caught.value)

    images, labels = fashion / "train-images-idx3-ubyte.gz", fashion / "train-labels-idx1-ubyte"
    whole = images.read_bytes()
    images.write_bytes(whole[:-100])
    fails("train-images-idx3-ubyte.gz cannot be read .* get the file again")
    images.write_bytes(b"no gzip")
    fails("train-images-idx3-ubyte.gz cannot be read")
    images.write_bytes(gzip.compress(gzip.decompress(whole)[:-1]))
    fails("is not a complete IDX file of 3 dimensions")
    images.write_bytes(gzip.compress(b""))
    fails("is not a complete IDX file of 3 dimensions")
    images.write_bytes(whole)
    write_idx(labels, np.zeros(29))
    fails("the training files have 30 images but 29 labels")
    write_idx(labels, np.arange(30))
    fails("the training labels go from 0 to 29, but there are 10 classes")
    images.unlink()
    fails("no train-images-idx3-ubyte.gz in .*: run apt-get install dataset-fashion-mnist, or set data.path")


# -------------------------------------------------------------------------------------------------------------- CIFAR


def cifar_files(name: str, binary: bool) -> dict[str, bytes]:
    """Files as in the official archives, with two images in each."""
    random = np.random.default_rng(0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"] if name == "cifar10" else ["train", "test"]
    files = {}
    for number, file in enumerate(names):
        pixels = random.integers(0, 256, (2, 3072), dtype=np.uint8)
        coarse, labels = [9, 8], [number, number + 1]
        if binary:
            columns = [labels] if name == "cifar10" else [coarse, labels]
            rows = np.concatenate([np.array(columns, dtype=np.uint8).T, pixels], axis=1)
            files[f"{file}.bin"] = rows.tobytes()
        else:
            keys = {b"labels": labels} if name == "cifar10" else {b"fine_labels": labels, b"coarse_labels": coarse}
            files[file] = pickle.dumps({b"batch_label": b"x", b"data": pixels, b"filenames": [b"a", b"b"], **keys})
    return files


FOLDERS = {
    ("cifar10", True): "cifar-10-batches-bin",
    ("cifar10", False): "cifar-10-batches-py",
    ("cifar100", True): "cifar-100-binary",
    ("cifar100", False): "cifar-100-python",
}


def write_cifar(folder: Path, name: str, binary: bool, packed: bool = False) -> Path:
    files = cifar_files(name, binary)
    if packed:
        with tarfile.open(folder / "archive.tar.gz", "w:gz") as archive:
            for file, content in files.items():
                member = tarfile.TarInfo(f"{FOLDERS[name, binary]}/{file}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return folder / "archive.tar.gz"
    (folder / FOLDERS[name, binary]).mkdir()
    for file, content in files.items():
        (folder / FOLDERS[name, binary] / file).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("form", ["archive", "its folder", "the folder above"])
def test_cifar(tmp_path: Path, name: str, binary: bool, form: str) -> None:
    path = write_cifar(tmp_path, name, binary, packed=form == "archive")
    if form == "its folder":
        path /= FOLDERS[name, binary]
    task = load_task(DataConfig(name=name, path=str(path)))
    assert isinstance(task, ClassificationTask)
    assert task.model_hints == {"classes": 10 if name == "cifar10" else 100, "channels": 3, "size": 32}
    wanted = [0, 1, 1, 2, 2, 3, 3, 4, 4, 5] if name == "cifar10" else [0, 1]
    assert task.labels.tolist() == wanted and task.held_out_labels.tolist() == [wanted[-2] + 1, wanted[-1] + 1]
    first = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    assert np.array_equal(task.images[:2], first.reshape(2, 3, 32, 32))  # first all of red, row by row
    images, labels = task.batch(0, 2)
    assert images.shape == (2, 3, 32, 32) and images.dtype == torch.float32 and labels.dtype == torch.int64


def pickled_by_python_2(pixels: np.ndarray, labels: list[int]) -> bytes:
    """A batch as the official files have it: protocol 2 with Python 2's byte strings, which no Python 3 writes."""

    def string(content: bytes) -> bytes:
        return b"T" + len(content).to_bytes(4, "little") + content

    rows, columns = (f"I{size}\n".encode() for size in pixels.shape)
    dtype = b"cnumpy\ndtype\n(" + string(b"u1") + b"I0\nI1\ntR(I3\n" + string(b"|") + b"NNNI-1\nI-1\nI0\ntb"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt" + string(b"b") + b"tR"
    array = empty + b"(I1\n(" + rows + columns + b"t" + dtype + b"I00\n" + string(pixels.tobytes()) + b"tb"
    numbers = b"".join(f"I{label}\n".encode() for label in labels)
    return b"\x80\x02}(" + string(b"data") + array + string(b"labels") + b"(" + numbers + b"l" + b"u."


def test_cifar_pickles_of_python_2(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path, "cifar10", binary=False)
    pixels = np.random.default_rng(5).integers(0, 256, (3, 3072), dtype=np.uint8)
    (folder / "cifar-10-batches-py/data_batch_1").write_bytes(pickled_by_python_2(pixels, [7, 8, 9]))
    task = load_task(DataConfig(name="cifar10", path=str(folder)))
    assert isinstance(task, ClassificationTask) and task.labels[:3].tolist() == [7, 8, 9]
    assert np.array_equal(task.images[:3], pixels.reshape(3, 3, 32, 32))


class Evil:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path, "cifar10", binary=False)
    evil = pickle.dumps({b"data": Evil(str(tmp_path / "made")), b"labels": [1]})
    (folder / "cifar-10-batches-py/data_batch_3").write_bytes(evil)
    with pytest.raises(DataError, match=r"data_batch_3 is not an official CIFAR file: .* it names \w+\.mkdir"):
        load_task(DataConfig(name="cifar10", path=str(folder)))
    assert not (tmp_path / "made").exists()
    pickle.loads(evil)
    assert (tmp_path / "made").exists()  # so it would have run


def test_wrong_cifar(tmp_path: Path) -> None:
    folder = write_cifar(tmp_path, "cifar10", binary=True) / "cifar-10-batches-bin"

    def fails(wanted: str, path: Path = folder) -> None:
        with pytest.raises(DataError, match=wanted) as caught:
            load_task(DataConfig(name="cifar10", path=str(path)))
        assert "\n" not in str(caught.value)

    file = folder / "data_batch_2.bin"
    whole = file.read_bytes()
    for content in (whole[:-1], b""):
        file.write_bytes(content)
        fails(rf"data_batch_2.bin has {len(content)} bytes, not a multiple of 3073")
    file.write_bytes(b"\x0a" + whole[1:])
    fails("the training labels go from 0 to 10, but there are 10 classes")
    file.unlink()
    fails("no data_batch_2.bin or data_batch_2 in .*: set data.path to the official archive")
    for content, wanted in (
        (pickle.dumps({b"data": np.zeros((2, 3072), dtype=np.uint8), b"labels": [1, 2, 3]}), r"shape \(3, 3072\)"),
        (pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [1, 2]}), r"bytes of shape \(2, 3072\)"),
        (pickle.dumps({b"labels": [1, 2]}), "data_batch_2 is not a complete CIFAR file"),
        (pickle.dumps([1]), "data_batch_2 is not a complete CIFAR file"),
        (b"\x80\x04garbage", "data_batch_2 is not a"),
        (b"", "data_batch_2 is not a complete CIFAR file"),
    ):
        (folder / "data_batch_2").write_bytes(content)
        fails(wanted)
    (tmp_path / "x.tar.gz").write_bytes(b"no archive")
    fails("x.tar.gz cannot be read .* get the archive again", tmp_path / "x.tar.gz")
    fails("no data_batch_1.bin", tmp_path / "nowhere")


@pytest.mark.parametrize("packing", ["gz", "bz2", "xz"])
def test_a_damaged_archive_is_refused_or_holds_the_same(tmp_path: Path, packing: str) -> None:
    """Any flipped byte, and any missing end: the checksum is behind the last file, and behind the archive's own end."""
    path = tmp_path / "archive"
    with tarfile.open(path, f"w:{packing}") as archive:
        for file, content in cifar_files("cifar100", True).items():
            member = tarfile.TarInfo(f"cifar-100-binary/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    whole = path.read_bytes()
    config = DataConfig(name="cifar100", path=str(path))
    task = load_task(config)
    assert isinstance(task, ClassificationTask)
    places = [*range(12), *np.random.default_rng(0).integers(0, len(whole), 60).tolist(), *range(-9, 0)]
    damaged = [
        whole[: place % len(whole)] + bytes([whole[place] ^ 16]) + whole[place % len(whole) + 1 :] for place in places
    ]
    damaged += [whole[:size] for size in (len(whole) - 1, len(whole) - 8, len(whole) // 2, 5)]
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            other = load_task(config)
        except DataError as error:
            refused += 1
            assert "\n" not in str(error)
        else:  # a time or a name in the header
            assert isinstance(other, ClassificationTask) and np.array_equal(other.images, task.images)
            assert np.array_equal(other.labels, task.labels)
    assert refused >= len(damaged) - 10


def test_a_pipe_among_the_files_does_not_hang(fashion: Path) -> None:
    (fashion / "train-images-idx3-ubyte.gz").unlink()
    os.mkfifo(fashion / "train-images-idx3-ubyte.gz")
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz cannot be read \(it is not a regular file\)"):
        load_task(DataConfig(name="fashion_mnist", path=str(fashion)))


def test_hints_need_no_files_and_are_what_tasks_have() -> None:
    assert {name: data_hints(DataConfig(name=name), context=7).model_hints for name in DATA} == {
        "text": {"vocabulary": 256, "context": 7},
        "digits": {"classes": 10, "channels": 1, "size": 8},
        "fashion_mnist": {"classes": 10, "channels": 1, "size": 28},
        "fashion_captions": {"classes": 60, "captions": CAPTIONS, "channels": 1, "size": 28},
        "cifar10": {"classes": 10, "channels": 3, "size": 32},
        "cifar100": {"classes": 100, "channels": 3, "size": 32},
    }
    assert load_task(DataConfig(name="digits")).model_hints == data_hints(DataConfig(name="digits")).model_hints
