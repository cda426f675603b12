"""The page of concepts defines the words that messages and docstrings use."""

from __future__ import annotations

import re

import pytest

from dist_ssn.comm.ledger import PURPOSES
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


def test_every_purpose_of_the_ledger_is_named() -> None:
    assert not [purpose for purpose in PURPOSES if f"`{purpose}`" not in TEXT]


@pytest.mark.parametrize("name", ["bank", "step"])
def test_a_drawing_is_readable_where_it_is_small(name: str) -> None:
    """At 390 pixels a page is some 350 wide: letters of 12 units in a drawing of 380 stay above 11 pixels."""
    svg = (ROOT / "docs" / "assets" / f"{name}.drawing.svg").read_text()
    width = int(re.findall(r'viewBox="0 0 (\d+)', svg)[0])
    smallest = min(int(size) for size in re.findall(r"font-size: (\d+)px", svg))
    assert smallest * 350 / width > 11
    assert f"assets/{name}.drawing.svg" in TEXT
