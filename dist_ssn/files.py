"""Files: reading of untrusted files within bounds, and writing that replaces a file completely or not at all."""

from __future__ import annotations

import json
import os
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


def read_text(path: Path, most: int = MOST_JSON) -> str:
    """The text of a regular file.

    Args:
        path: of the file.
        most: largest size that is read, in bytes.

    Raises:
        ValueError: it is no regular file, has more than `most` bytes, or is not UTF-8.
        OSError: it cannot be read.
    """
    # Trap: opening a pipe waits until a process writes to it.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        if not path.is_file():
            raise ValueError("it is not a regular file")
        # Trap: reading N bytes allocates N bytes, even if the file is small.
        content = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes, the most that is read")
    return content.decode()


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
        ValueError: it is not JSON, or nests too deep.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; the library checks that each lies inside of the file.

    Raises:
        ValueError: the file is malformed.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
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
    """Writes a UTF-8 text file that is, at every moment, either the former file or the complete new one.

    Raises:
        OSError: it cannot be written; the former file, if any, is untouched, and no partial file is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
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
