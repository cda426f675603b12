"""The official archives of CIFAR-10 and CIFAR-100, in both of their versions."""

from __future__ import annotations

import io
import lzma
import pickle
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dist_ssn.errors import DataError
from dist_ssn.files import MIB
from dist_ssn.train.data.tasks import Images

_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class _Cifar:
    """Files of the official archives; both versions have the same bytes, as pickles or as plain records.

    Args:
        train: names of the training files, without the ".bin" of the binary version.
        test: names of the test files, likewise.
        labels: bytes of labels before an image in the binary version; the last one is the (fine) class.
        key: the labels' key in the pickled version.
        folders: names of the folders in the archives.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html
    """

    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: int
    key: bytes
    folders: tuple[str, str]


_CIFAR = {
    "cifar10": _Cifar(
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test=("test_batch",),
        labels=1,
        key=b"labels",
        folders=("cifar-10-batches-bin", "cifar-10-batches-py"),
    ),
    "cifar100": _Cifar(
        train=("train",),
        test=("test",),
        labels=2,
        key=b"fine_labels",
        folders=("cifar-100-binary", "cifar-100-python"),
    ),
}


def read_cifar(name: str, path: str | None) -> tuple[Images, Images]:
    """Training and test images of "cifar10" or "cifar100".

    Args:
        name: "cifar10" or "cifar100".
        path: of the archive, or of its unpacked folder; None: the current folder.

    Raises:
        DataError: a file is missing or damaged; the message names it.
    """
    layout = _CIFAR[name]
    files = _files(name, path, layout)

    def part(names: tuple[str, ...]) -> Images:
        pieces = [
            _records(files[f"{file}.bin"], f"{file}.bin", layout)
            if f"{file}.bin" in files
            else _unpickled(files[file], file, layout)
            for file in names
        ]
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
        return pixels.reshape(-1, 3, 32, 32), labels

    return part(layout.train), part(layout.test)


def _files(data: str, path: str | None, layout: _Cifar) -> dict[str, bytes]:
    """File name → content, from a folder or from the packed archive; each file in one of the two versions."""
    plain = [*layout.train, *layout.test]
    wanted = {*plain, *(f"{name}.bin" for name in plain)}
    files: dict[str, bytes] = {}
    where = Path(path or ".").expanduser()
    try:
        if where.is_file():
            with tarfile.open(where) as archive:
                for member in archive:
                    name = Path(member.name).name
                    if name in wanted and member.isfile() and (stream := archive.extractfile(member)):
                        files[name] = stream.read()
                # The checksum of gzip (bz2, xz) is behind the archive's own end, and is compared by who reads that far.
                while archive.fileobj is not None and archive.fileobj.read(MIB):
                    pass
        else:
            for folder in (where, *(where / name for name in layout.folders)):
                for name in sorted(wanted - set(files)):
                    if (folder / name).is_file():
                        files[name] = (folder / name).read_bytes()
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{data}: {where} cannot be read ({reason}): get the archive again") from None
    for name in plain:
        if name not in files and f"{name}.bin" not in files:
            raise DataError(
                f"{data}: there is no {name}.bin or {name} in {where}: set data.path to the official archive "
                "(.tar.gz), or to the folder that it unpacks to"
            )
    return files


def _records(content: bytes, name: str, layout: _Cifar) -> Images:
    record = layout.labels + _PIXELS
    if not content or len(content) % record:
        raise DataError(f"{name} has {len(content)} bytes, not a multiple of {record}: the file is incomplete")
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, record)
    return records[:, layout.labels :], records[:, layout.labels - 1].astype(np.int64)


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that can make only plain containers, text, numbers and numpy arrays.

    A pickle runs code through the functions that it names. Only three functions are allowed, all of which make arrays.
    """

    ALLOWED: ClassVar[dict[str, Any]] = {
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "_reconstruct": np.empty(0).__reduce__()[0],
    }
    MODULES = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """The allowed function of this name."""
        if module_name in self.MODULES and global_name in self.ALLOWED:
            return self.ALLOWED[global_name]
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}")


def _unpickled(content: bytes, name: str, layout: _Cifar) -> Images:
    try:
        # The files were written by Python 2: its text arrives as bytes.
        batch = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        pixels = batch[b"data"]
        labels = np.asarray(batch[layout.key], dtype=np.int64)
    except pickle.UnpicklingError as error:
        raise DataError(f"{name} is not an official CIFAR file: a pickle of arrays was expected, but {error}") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(f"{name} is not a complete CIFAR file ({type(error).__name__}: {error})") from None
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape != (len(labels), _PIXELS):
        raise DataError(f"{name}: data must be bytes of shape ({len(labels)}, {_PIXELS}), one row for each label")
    return pixels, labels
