"""Releases that the project works with: pyproject.toml, `make test-versions` and the page of versions say the same."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reference" / "versions.md").read_text(encoding="utf-8")
SCRIPT = (ROOT / "scripts" / "test_versions.sh").read_text(encoding="utf-8")


def requirements() -> dict[str, SpecifierSet]:
    """Name → the releases that pyproject.toml allows, of dependencies and extras."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return {name: SpecifierSet(allowed) for name, allowed in re.findall(r'"([A-Za-z][\w-]*)([>=<]+\d[^";]*)[";]', text)}


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_the_oldest_releases_are_the_lower_bounds() -> None:
    oldest = dict(line.split("==") for line in lines((ROOT / "scripts" / "oldest.txt").read_text(encoding="utf-8")))
    allowed = requirements()
    named = {"torch", "numpy", "scikit-learn", "safetensors", "pydantic", "PyYAML", "rich", "matplotlib"}
    assert named | {"transformers", "accelerate", "peft", "lightning"} <= oldest.keys()
    for name, release in oldest.items():
        bounds = [Version(s.version) for s in allowed[name] if s.operator == ">="]
        assert bounds == [Version(release)], name


def test_the_oldest_and_the_newest_torch_are_those_of_the_page() -> None:
    torch = requirements()["torch"]
    oldest, newest = (re.search(rf"^{which}=([\d.]+)@python", SCRIPT, re.M) for which in ("oldest", "newest"))
    assert oldest and newest
    tried = re.findall(r"^\| (\d+\.\d+\.\d+) \|", PAGE, re.M)
    assert {oldest[1], newest[1]} <= set(tried) and all(torch.contains(release) for release in tried)
    major, minor, *_ = Version(newest[1]).release
    assert not torch.contains(f"{major}.{minor + 1}.0")


def test_every_minor_release_of_torch_and_python_is_named() -> None:
    rows = re.findall(r"^\| (\d+)\.(\d+)\.\d+ \| 3\.(\d+)\.\d+ \|", PAGE, re.M)
    releases = sorted({(int(major), int(minor)) for major, minor, _ in rows})
    not_run = PAGE.partition("## What was not run")[2].partition("## ")[0]
    for minor in range(releases[0][1], releases[-1][1] + 1):
        assert (2, minor) in releases or f"PyTorch 2.{minor}" in not_run, minor
    pythons = sorted({int(python) for *_, python in rows})
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| 3.{pythons[0]} to 3.{pythons[-1]} | 2.{releases[0][1]} to 2.{releases[-1][1]} |" in readme
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert pythons == [int(minor) for minor in re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', text)]
