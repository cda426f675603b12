"""Files: reading of untrusted files within bounds, and writing that replaces a file completely or not at all."""

from __future__ import annotations

import errno
import io
import json
import os
import stat
import struct
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dist_ssn.errors import UserError

MIB = 1 << 20
MOST_JSON = 64 * MIB
"""Bytes of the largest JSON file that is read; a plan of 100,000 weights has 50 MiB."""
MOST_HEADER = 16 * MIB
"""Bytes of the largest header of a safetensors file; 100 bytes name a tensor."""


def open_regular(path: Path) -> io.BufferedReader:
    """A regular file, opened to be read.

    Raises:
        ValueError: it is a pipe, a device or another thing whose end may never come.
        OSError: it cannot be opened.
    """
    # Trap: opening a pipe waits until a process writes to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise ValueError("it is not a regular file")
    return open(descriptor, "rb")


def read_text(path: Path, most: int = MOST_JSON) -> str:
    """The text of a regular file.

    Args:
        path: of the file.
        most: largest size that is read, in bytes.

    Raises:
        ValueError: it is no regular file, has more than `most` bytes, or is not UTF-8.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        # Trap: reading N bytes allocates N bytes, even if the file is small.
        content = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes, the most that is read")
    return content.decode("utf-8")


def read_json(path: Path, most: int = MOST_JSON) -> Any:
    """The JSON value in a file.

    Raises:
        ValueError: as `read_text`; or it is not JSON.
        OSError: it cannot be read.
    """
    return parse_json(read_text(path, most))


def parse_json(text: str) -> Any:
    """The JSON value of a text.

    Raises:
        ValueError: it is not JSON, nests too deep, or has a key twice in an object, of which one would be lost.
    """
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r:.80} is there twice")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; the library checks that each lies inside of the file.

    Raises:
        ValueError: the file is malformed.
        OSError: it cannot be read.
    """
    with open_regular(path) as file:
        start = file.read(8)
        size = os.fstat(file.fileno()).st_size
    header = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= header <= min(size - 8, MOST_HEADER):
        raise ValueError(
            f"its header should have {header} bytes, and the file has {size}, of which at most {MOST_HEADER} may be header"
        )
    try:
        return load_file(path)
    except (SafetensorError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        # The last four: dtypes that the library has and this torch does not, or shapes that torch rejects.
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def replace_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file like `replace_bytes`."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, content: bytes) -> None:
    """Writes a file that is, at every moment, either the former file or the complete new one.

    Raises:
        OSError: it cannot be written; the former file, if any, is untouched, and no partial file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Writes like `replace_text`, with an error for the user.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        replace_text(path, text)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from error
