"""Runs that W&B keeps on disk (`wandb/offline-run-…/run-….wandb`), as rows for the comparing table.

Such a file is a log in LevelDB's format: after seven bytes that say whose it is, blocks of 32 KiB, in which each piece of a
record has a header of its own (checksum, length, and whether it is whole, the first, a middle or the last). Records are W&B's
protocol buffers.
"""

from __future__ import annotations

import importlib
import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_ssn.errors import UserError

MOST = 512 << 20
"""Bytes of the largest file that is read."""
_MAGIC = b":W&B"
_START, _BLOCK, _HEADER = 7, 32_768, struct.Struct("<IHB")
_WHOLE, _LAST = 1, 4


def offline_files(path: Path) -> list[Path]:
    """The logs that `path` means: itself, that of an offline run's folder, or those of all such runs in a folder `wandb`."""
    if path.suffix == ".wandb":
        return [path]
    for pattern in ("run-*.wandb", "offline-run-*/run-*.wandb", "wandb/offline-run-*/run-*.wandb"):
        if found := sorted(path.glob(pattern)):
            return found
    return []


def read_offline(file: Path) -> dict[str, Any]:
    """The row of a run that `dist-ssn train` logged to W&B, with its history of evaluations.

    A log that a kill cut short is read up to there.

    Raises:
        UserError: wandb is not installed; the file is not W&B's, or too large; or the run in it has not ended.
    """
    try:
        records: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    except ImportError:
        raise UserError(f"wandb is not installed, which reads {file}: run `pip install dist_ssn[wandb]`") from None
    from google.protobuf.message import DecodeError

    row: dict[str, Any] = {"history": []}
    try:
        for record in _records(_content(file)):
            parsed = records.Record.FromString(record)
            kind = parsed.WhichOneof("record_type")
            if kind == "summary":
                told = [item for item in parsed.summary.update if item.key and not item.key.startswith("_")]
                row |= {item.key: json.loads(item.value_json) for item in told}  # without W&B's own, as _runtime
            elif kind == "history":
                logged = {item.key or "/".join(item.nested_key): item.value_json for item in parsed.history.item}
                if "validation_loss" in logged:
                    row["history"].append(_evaluation(logged))
                    row |= {key: json.loads(logged[key]) for key in ("seconds", "exposed_seconds") if key in logged}
    except (OSError, ValueError, DecodeError, KeyError) as error:
        raise UserError(f"{file} is not a W&B offline run of dist-ssn train ({error})") from None
    if "name" not in row:
        raise UserError(
            f"the run in {file} has not ended: W&B has no summary of it, as dist-ssn train writes at the end"
        )
    return row


def _evaluation(logged: dict[str, str]) -> dict[str, Any]:
    """A point of a row's history."""
    kept = [key for key in logged if key in ("seconds", "ring_bytes") or key.startswith("validation_")]
    return {"step": json.loads(logged["_step"]), **{key: json.loads(logged[key]) for key in kept}}


def _content(file: Path) -> bytes:
    """Raises: ValueError, when the file is too large or not W&B's; OSError."""
    size = file.stat().st_size
    if size > MOST:
        raise ValueError(f"it has {size} bytes, and at most {MOST} are read")
    content = file.read_bytes()
    if not content.startswith(_MAGIC):
        raise ValueError(f"it begins with {content[:4]!r} instead of {_MAGIC!r}")
    return content


def _records(content: bytes) -> Iterator[bytes]:
    """Records up to the first piece that is not whole."""
    at, record = _START, b""
    while at + _HEADER.size <= len(content):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER.size:  # the rest of a block that has no room for a header
            at += left
            continue
        checksum, length, kind = _HEADER.unpack_from(content, at)
        at += _HEADER.size
        piece = content[at : at + length]
        if len(piece) < length or zlib.crc32(bytes([kind]) + piece) != checksum:
            return
        record, at = record + piece, at + length
        if kind in (_WHOLE, _LAST):
            yield record
            record = b""
