"""The map of the house names files, folders and functions that exist, and every folder of the package."""

from __future__ import annotations

import re

from tests.test_docs.markdown import ROOT

TEXT = (ROOT / "docs" / "architecture.md").read_text()


def test_every_path_exists() -> None:
    paths = set(re.findall(r"`([\w/]+(?:/|\.py|\.yaml))`", TEXT)) - {"summary.json"}
    assert len(paths) > 30
    assert not [path for path in paths if not (ROOT / path).exists()]


def test_every_function_is_in_its_file() -> None:
    found = re.findall(r"`([\w/]+\.py)` · `(\w+)`", TEXT)
    assert len(found) > 20
    assert not [
        (path, name)
        for path, name in found
        if not re.search(rf"^\s*(?:def|class) {name}\b", (ROOT / path).read_text(), re.M)
    ]


def test_every_folder_of_the_package_is_named() -> None:
    package = ROOT / "dist_ssn"
    folders = {path.parent.relative_to(ROOT) for path in package.rglob("__init__.py")} - {package.relative_to(ROOT)}
    assert not [str(folder) for folder in folders if f"`{folder}/`" not in TEXT]


def test_the_rows_have_the_order_of_the_layers() -> None:
    """Names that share a layer may come in any order."""
    layers = (ROOT / ".importlinter").read_text().partition("layers =\n")[2].partition("\n\n")[0]
    expected = [sorted(line.replace("|", " ").split()) for line in layers.splitlines()]
    rows = re.findall(r"^\|[^|]*\| `dist_ssn/(\w+)(?:/|\.py)`", TEXT, re.M)
    assert [sorted(rows[start:end]) for start, end in _cuts(expected)] == expected


def _cuts(layers: list[list[str]]) -> list[tuple[int, int]]:
    """Where each layer's names begin and end in a list of all names."""
    ends = [sum(map(len, layers[: index + 1])) for index in range(len(layers))]
    return list(zip([0, *ends], ends, strict=False))
