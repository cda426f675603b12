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
