"""The page of concepts defines the words that messages and docstrings use."""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest

from dist_ssn.baselines import CONTROLS
from dist_ssn.comm.ledger import PURPOSES
from dist_ssn.plan.mapping import MAPPINGS
from dist_ssn.plan.rules import SLOT_MORPHS
from tests.test_docs.markdown import ROOT

TEXT = (ROOT / "docs" / "concepts.md").read_text()
WORDS = (
    *("weight", "bank", "group", "slot", "template", "morph", "coefficients", "gains", "difference", "scale", "chunk"),
    *("budget", "own parameters", "left out", "mapping", "plan", "uses", "control", "dense", "teacher", "fingerprint"),
    *("forward", "backward", "all-reduce", "optimizer", "anchor", "read-only", "engine", "rank", "segment", "delay"),
    *("ledger", "collective", "purpose", "signs of life", "divergence", "cluster file", "lab", "recipe", "run"),
)


@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_defined(word: str) -> None:
    """A definition begins with the word in bold."""
    bold = " ".join(re.findall(r"\*\*([^*]+)\*\*", TEXT)).lower()
    assert re.search(rf"\b{word}\b", bold)


@pytest.mark.parametrize("names", [PURPOSES, MAPPINGS, CONTROLS, [morph.removesuffix("-up") for morph in SLOT_MORPHS]])
def test_every_name_of_a_registry_is_there(names: Iterable[str]) -> None:
    assert not [name for name in names if not re.search(rf"`{name}(?::N)?`", TEXT)]


@pytest.mark.parametrize("name", ["bank", "step"])
def test_a_drawing_is_readable_where_it_is_small(name: str) -> None:
    """At 390 pixels a page is some 350 wide: letters of 12 units in a drawing of 380 stay above 11 pixels."""
    svg = (ROOT / "docs" / "assets" / f"{name}.drawing.svg").read_text()
    width = int(re.findall(r'viewBox="0 0 (\d+)', svg)[0])
    smallest = min(int(size) for size in re.findall(r"font-size: (\d+)px", svg))
    assert smallest * 350 / width > 11
    assert f"assets/{name}.drawing.svg" in TEXT
