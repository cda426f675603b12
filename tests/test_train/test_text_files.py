"""Text as data: what is read, how much of it, and that nothing is left out without a word."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ssn.engines import World
from dist_ssn.errors import DataError
from dist_ssn.train.build import build
from dist_ssn.train.data import load_task
from dist_ssn.train.data.text import read_text_bytes
from dist_ssn.train.recipe.read import load_recipe
from dist_ssn.train.recipe.sections import DataConfig

TEXT = "the quick brown fox\n" * 40
CHINESE = "春眠不觉晓处处闻啼鸟夜来风雨声花落知多少" * 40  # no space and no line's end: no NUL in UTF-16


def notes_of(path: object) -> str:
    return " | ".join(load_task(DataConfig(path=str(path)), context=4).notes)


def test_a_folder_says_what_is_left_out_of_it_and_why(tmp_path: Path) -> None:
    (tmp_path / "t/sub").mkdir(parents=True)
    (tmp_path / "t/.git").mkdir()
    for name in ("t/a.txt", "t/.hidden", "t/.git/config", "big.txt", "t/sub/z.txt"):
        (tmp_path / name).write_text(TEXT)
    (tmp_path / "t/marked.txt").write_bytes(TEXT.encode("utf-16"))
    (tmp_path / "t/big-endian.txt").write_bytes(TEXT.encode("utf-16-be"))
    (tmp_path / "t/four.txt").write_bytes(TEXT.encode("utf-32"))
    (tmp_path / "t/short.txt").write_bytes("春".encode("utf-16"))
    (tmp_path / "t/empty.txt").touch()
    (tmp_path / "t/c.txt").symlink_to(tmp_path / "big.txt")
    (tmp_path / "t/more").symlink_to(tmp_path)
    (tmp_path / "t/nothing").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "t/pipe")
    read = read_text_bytes(str(tmp_path / "t"), None)
    assert bytes(read.content) == 2 * TEXT.encode() and not read.doubtful
    assert dict(read.left_out) == {
        ".git": "hidden",
        ".hidden": "hidden",
        "marked.txt": "text in UTF-16",
        "short.txt": "text in UTF-16",
        "four.txt": "text in UTF-32",
        "big-endian.txt": "binary, or text in UTF-16 (it has NUL bytes)",
        "empty.txt": "empty",
        "c.txt": "a link",
        "more": "a link",
        "nothing": "a link",
        "pipe": "a pipe or a device, not a file",
    }
    note = notes_of(tmp_path / "t")
    assert note.startswith("data.path: 11 of 13 files of ") and note.endswith(", and 1 more and 2 hidden")
    assert "c.txt (a link)" in note and "empty.txt (empty)" in note


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "latin-1"])
def test_bytes_that_are_not_utf8_are_trained_on_with_a_sentence(tmp_path: Path, encoding: str) -> None:
    content = ("schöne Grüße " * 40 if encoding == "latin-1" else CHINESE).encode(encoding)
    assert b"\0" not in content
    (tmp_path / "a.txt").write_bytes(content)
    assert "a.txt is not text in UTF-8, and the bytes are trained on as they are" in notes_of(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text(TEXT + "schöne Grüße", encoding="utf-8")
    assert notes_of(tmp_path / "b.txt") == ""


@settings(max_examples=60, deadline=None)
@given(text=st.text(min_size=50, max_size=400), cut=st.integers(30, 300), marked=st.booleans())
def test_text_in_utf8_is_never_doubted(
    tmp_path_factory: pytest.TempPathFactory, text: str, cut: int, marked: bool
) -> None:
    content = text.replace("\0", "").encode("utf-8-sig" if marked else "utf-8") + b"." * 30
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_bytes(content)
    for limit in (None, cut):  # a limit may cut a character
        read = read_text_bytes(str(file), limit)
        assert bytes(read.content) == content[:limit] and not read.notes("a")


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("pipe", "for it is a pipe or a device, not a file: give a text file"),
        ("utf-16", "for it is text in UTF-16: convert it to UTF-8 first"),
        ("link", r"there is no text in .* \(c.txt \(a link\) left out\)"),
        ("glob", r"left out\): give a text file"),
    ],
)
def test_one_thing_that_is_no_text_is_refused_at_once(tmp_path: Path, kind: str, sentence: str) -> None:
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "utf-16":
        path.write_bytes(CHINESE.encode("utf-16"))
    else:
        path.mkdir()
        (path / "c.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match=sentence) as caught:
        notes_of(f"{path}/*" if kind == "glob" else path)
    assert "\n" not in str(caught.value)


def test_a_glob_says_what_it_passes_over(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/b.txt").write_text(TEXT)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "again.txt").symlink_to(tmp_path / "a.txt")  # its text is there
    assert "1 of 2 files" in notes_of(f"{tmp_path}/*") and "sub (a folder)" in notes_of(f"{tmp_path}/*")
    assert notes_of(f"{tmp_path}/**/*.txt") == ""


def test_a_folder_that_may_not_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "a.txt").write_text(TEXT)
    scan = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"secret cannot be read \(Permission denied\)"):
        notes_of(tmp_path)


def test_a_limit_is_all_that_is_read_or_kept(tmp_path: Path) -> None:
    """A sparse file of 671 MiB, of which 100 kB are wanted."""
    file = tmp_path / "big.txt"
    file.write_bytes(b"a" * 200_000)
    os.truncate(file, 671 << 20)
    tracemalloc.start()
    try:
        task = load_task(DataConfig(path=str(file), limit=100_000), context=4)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert task.train_size * 4 < 90_000 and task.notes == ()


def test_a_large_text_is_kept_once(tmp_path: Path) -> None:
    file = tmp_path / "big.txt"
    file.write_bytes(b"a" * (32 << 20))
    tracemalloc.start()
    try:
        load_task(DataConfig(path=str(file)), context=4)
        assert tracemalloc.get_traced_memory()[1] < 48 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_says_it_once(tmp_path: Path, rank: int, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").touch()
    small = ["model_args={layers: 1, width: 16, heads: 2, context: 8}", "batch_size=2", "share.budget=50%"]
    recipe = load_recipe(None, [*small, f"data.path={tmp_path}"])
    build(recipe, World(rank=rank, world_size=2, device=torch.device("cpu"), local_rank=rank))
    said = [str(warning.message) for warning in recwarn if "data.path" in str(warning.message)]
    assert len(said) == 1 - rank and all("b.txt (empty)" in sentence for sentence in said)


@pytest.mark.parametrize("fold", [0, 1, 9])
def test_folds_are_parts_of_the_text(tmp_path: Path, fold: int) -> None:
    content = np.arange(1, 201, dtype=np.uint8)
    (tmp_path / "a.txt").write_bytes(content.tobytes())
    task = load_task(DataConfig(path=str(tmp_path / "a.txt"), fold=fold), context=4)
    first = 200 - 20 * (fold + 1)
    assert np.array_equal(task.held_out, content[first : first + 20])  # pyright: ignore[reportAttributeAccessIssue]
    assert np.array_equal(task.train, np.delete(content, slice(first, first + 20)))  # pyright: ignore[reportAttributeAccessIssue]
