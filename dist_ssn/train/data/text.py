"""Text files as bytes: one file, a folder of them, or a glob. What is left out is said, and why."""

from __future__ import annotations

import codecs
import glob
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dist_ssn.errors import DataError
from dist_ssn.files import MIB, open_regular

_BEGIN = 8192  # bytes in which a NUL makes a file binary
_MARKS = {
    codecs.BOM_UTF32_LE: "text in UTF-32",  # begins as UTF-16's does
    codecs.BOM_UTF32_BE: "text in UTF-32",
    codecs.BOM_UTF16_LE: "text in UTF-16",
    codecs.BOM_UTF16_BE: "text in UTF-16",
}
_MOST_NAMES = 8
_HIDDEN = "hidden"


@dataclass
class Text:
    """Bytes of all files.

    Args:
        content: of the files that were read, one after the other.
        read: number of these files.
        left_out: (name, reason) of each file that was found and not read.
        doubtful: names of files that were read and are not UTF-8.
    """

    content: bytearray = field(default_factory=bytearray)
    read: int = 0
    left_out: list[tuple[str, str]] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)

    @property
    def array(self) -> np.ndarray:
        """The bytes (N,) as uint8, not copied."""
        return np.frombuffer(self.content, dtype=np.uint8)

    def notes(self, path: str | None) -> tuple[str, ...]:
        """Sentences on files that were left out, or that are not UTF-8."""
        notes = []
        if self.left_out:
            files = self.read + len(self.left_out)
            notes.append(
                f"data.path: {len(self.left_out)} of {files} files of {path!r} are left out: {self._reasons()}"
            )
        if self.doubtful:
            notes.append(
                f"data.path: {_listed(self.doubtful)} {'is' if len(self.doubtful) == 1 else 'are'} not text in UTF-8, and "
                "the bytes are trained on as they are: convert it first (iconv -t UTF-8), if it is text in UTF-16 or Latin-1"
            )
        return tuple(notes)

    def _reasons(self) -> str:
        named = [f"{name} ({reason})" for name, reason in self.left_out if reason != _HIDDEN]
        hidden = sum(reason == _HIDDEN for _, reason in self.left_out)
        parts = [_listed(named)] if named else []
        return " and ".join([*parts, f"{hidden} hidden"] if hidden else parts)


def read_text_bytes(path: str | None, limit: int | None) -> Text:
    """The bytes of the text at `path`, and what was left out of it.

    Args:
        path: file, folder or glob; None: the text of pydoc_data.topics.
        limit: largest number of bytes; no more than these are read, or kept in memory.

    Raises:
        DataError: there is no text, or a file cannot be read.
    """
    text = Text()
    for name, file, reason in _found(path):
        if limit is not None and len(text.content) >= limit:
            break
        reason = reason or _append(text, name, file, limit)
        if reason is None:
            text.read += 1
        elif name == path:
            raise DataError(f"data.path: {name} cannot be trained on, for it is {reason}: {_remedy(reason)}")
        else:
            text.left_out.append((name, reason))
    if not text.content:
        why = f" ({text._reasons()} left out)" if text.left_out else ""
        raise DataError(f"data.path: there is no text in {path!r}{why}: give a text file, a folder of them, or a glob")
    return text


def _remedy(reason: str) -> str:
    if reason in _MARKS.values():
        return "convert it to UTF-8 first (iconv -t UTF-8)"
    return "give a text file in UTF-8, a folder of them, or a glob"


def _append(text: Text, name: str, file: Path, limit: int | None) -> str | None:
    """Appends a file's bytes, up to the limit; returns why the file is left out, or None."""
    start, decoder = len(text.content), codecs.getincrementaldecoder("utf-8")()
    is_utf8 = True
    try:
        with open_regular(file) as stream:
            while limit is None or len(text.content) < limit:
                piece = stream.read(MIB if limit is None else min(MIB, limit - len(text.content)))
                if len(text.content) == start and (reason := _why_not(piece + stream.peek(4)[:4])):
                    return reason
                try:
                    is_utf8 = is_utf8 and b"\0" not in piece and decoder.decode(piece, final=not piece) is not None
                except UnicodeDecodeError:
                    is_utf8 = False
                if not piece:
                    break
                text.content += piece
    except ValueError:
        return "a pipe or a device, not a file"
    except OSError as error:
        raise DataError(f"data.path: {file} cannot be read ({error.strerror})") from None
    if len(text.content) == start:
        return "empty"
    if not is_utf8:
        text.doubtful.append(name)
    return None


def _why_not(begin: bytes) -> str | None:
    """Why a file that begins with these bytes is not trained on; None if it is."""
    for mark, kind in _MARKS.items():
        if begin.startswith(mark):
            return kind
    return "binary, or text in UTF-16 (it has NUL bytes)" if b"\0" in begin[:_BEGIN] else None


def _listed(names: list[str]) -> str:
    more = f", and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def _found(path: str | None) -> Iterator[tuple[str, Path, str | None]]:
    """(name for people, file, why it is left out or None), in an order that is the same on every machine."""
    if path is None:
        module = importlib.util.find_spec("pydoc_data.topics")
        if module is None or module.origin is None or not module.origin.endswith(".py"):
            raise DataError("this Python comes without the text of pydoc_data.topics: set data.path to a text file")
        yield module.origin, Path(module.origin), None
        return
    where = Path(path).expanduser()
    if where.is_dir():
        yield from _in_folder(where)
    elif where.exists():
        yield path, where, None
    elif not glob.has_magic(path):
        raise DataError(f"data.path: {path!r} does not exist in {Path.cwd()}")
    else:
        yield from _globbed(str(where))


def _in_folder(folder: Path) -> Iterator[tuple[str, Path, str | None]]:
    """Every file below a folder; hidden ones and links, of files and of folders, are left out."""

    def refuse(error: OSError) -> None:
        raise DataError(f"data.path: {error.filename} cannot be read ({error.strerror})")

    found: dict[Path, str | None] = {}
    for root, folders, files in os.walk(folder, onerror=refuse):
        for name in (*files, *folders):
            file = Path(root, name)
            is_folder = name in folders and not file.is_symlink()
            if not is_folder or name.startswith("."):
                found[file.relative_to(folder)] = (
                    _HIDDEN if name.startswith(".") else "a link" if file.is_symlink() else None
                )
        folders[:] = [name for name in folders if not name.startswith(".")]
    for name in sorted(found, key=Path.as_posix):
        yield name.as_posix(), folder / name, found[name]


def _globbed(pattern: str) -> Iterator[tuple[str, Path, str | None]]:
    """The files that a glob matches, each once: a link can lead to the same file many times."""
    seen = set()
    for name in sorted(glob.glob(pattern, recursive=True)):
        real = os.path.realpath(name)
        if os.path.isdir(name):
            if "**" not in pattern:
                yield name, Path(name), "a folder"
        elif not os.path.exists(name):
            yield name, Path(name), "a link to nothing"
        elif real not in seen:
            seen.add(real)
            yield name, Path(name), None
