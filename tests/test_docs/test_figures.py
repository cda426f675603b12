"""Measured figures in pages written by hand are those of the results pages, whose tables are made from the results files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.test_docs.markdown import FENCE, README, ROOT, name_of

DOCS = ROOT / "docs"
NO_RESULTS = {"2.8", "2.14", "3.10", "3.13", "5.0", "5.24", "1.10", "1.15", "2.6", "2.0", "2006.10598"}
"""Versions and a paper's number."""
ROUNDED = {"12.8"}
"""Millions of parameters, which the tables have to the last."""
PAGES = (README, *(DOCS / f"{name}.md" for name in ("index", "choose-a-budget", "faq", "concepts")))
MEASURED = "\n".join(path.read_text() for path in (*(DOCS / "results").glob("*.md"), DOCS / "guides" / "search.md"))


def figures(text: str) -> set[str]:
    """Numbers with a decimal point outside of code."""
    prose = re.sub(r"`[^`\n]*`|\]\([^)]*\)", "", FENCE.sub("", text))
    return set(re.findall(r"(?<![\w.])\d+\.\d+(?![\w.])", prose.replace(",", "")))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_figure_was_measured(page: Path) -> None:
    assert not figures(page.read_text()) - figures(MEASURED) - NO_RESULTS - ROUNDED


def test_figures() -> None:
    assert figures("loss 1.202, +5.6 % `lr=0.1` [t](a.md#1.5) v2.13.1") == {"1.202", "5.6"}
