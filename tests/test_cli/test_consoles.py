"""Consoles of any encoding, and files in UTF-8 whatever the console has."""

from __future__ import annotations

import ast
import io
import json
import sys
from pathlib import Path

import pytest

from dist_ssn.cli.entry import main

ROOT = Path(__file__).parents[2]
SMALL = (
    *("--config", "quickstart", "--steps=1", "--batch_size=2", "--evaluate_batches=1", "--schedule.warmup=0"),
    "--data.limit=20000",
    '--model_args={"layers": 1, "width": 16, "heads": 2, "context": 8}',
)


def said(arguments: list[str], encoding: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Stdout and stderr of a command line on consoles of this encoding, which refuse what they cannot show."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        code = main(arguments)
    written = b"".join(stream.buffer.getvalue() for stream in streams)  # type: ignore[attr-defined]
    assert code == 0, written
    return written.decode(encoding)


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "cp437", "utf-8"])
def test_no_console_ends_a_command(tmp_path: Path, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    plan = said(["plan", *SMALL, f"--picture={tmp_path}/plan.png"], encoding, monkeypatch)
    assert "weight" in plan
    name = "läuft-×" if encoding == "utf-8" else "run"
    text = said(["train", *SMALL, f"--output={tmp_path}", f"--name={name}"], encoding, monkeypatch)
    assert "validation loss" in text
    text = said(["report", f"{tmp_path}/{name}", f"--output={tmp_path}/page"], encoding, monkeypatch)
    assert "wrote" in text
    for file in (tmp_path / "page/index.html", tmp_path / "page/report.md", tmp_path / name / "summary.json"):
        assert file.read_bytes().decode("utf-8")
    assert json.loads((tmp_path / name / "recipe.json").read_text(encoding="utf-8"))["name"] == name


def test_a_name_that_is_no_text_ends_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder's name in Latin-1, on a console in UTF-8."""
    folder = tmp_path / b"l\xe4uft".decode("utf-8", "surrogateescape")
    said(["train", *SMALL, f"--output={folder}"], "utf-8", monkeypatch)
    assert "wrote" in said(["report", str(folder), f"--output={folder}/page"], "utf-8", monkeypatch)


def calls_without_encoding(source: str) -> list[int]:
    """Lines with a call that opens a file as text in the encoding of the locale."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        constants = [part.value for part in node.args if isinstance(part, ast.Constant)]
        constants += [
            word.value.value for word in node.keywords if word.arg == "mode" and isinstance(word.value, ast.Constant)
        ]
        binary = any(isinstance(value, str) and len(value) <= 3 and "b" in value for value in constants)
        of_os = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) in ("os", "tarfile", "gzip")
        reads = name in ("write_text", "read_text") and (isinstance(node.func, ast.Attribute))
        opens = name in ("open", "fdopen") and not binary and not of_os
        if (reads or opens) and not any(word.arg == "encoding" for word in node.keywords):
            lines.append(node.lineno)
    return lines


def test_calls_without_an_encoding_are_found() -> None:
    source = """path.read_text()
open(path)
path.open("a")
open(path, "rb")
os.open(path, 0)
path.write_text(x, encoding="utf-8")
"""
    assert calls_without_encoding(source) == [1, 2, 3]


@pytest.mark.parametrize("folder", ["dist_ssn", "benchmarks/documents"])
def test_every_text_file_has_its_encoding(folder: str) -> None:
    found = {
        f"{file.relative_to(ROOT)}:{line}"
        for file in (ROOT / folder).rglob("*.py")
        for line in calls_without_encoding(file.read_text(encoding="utf-8"))
    }
    assert found == set()
