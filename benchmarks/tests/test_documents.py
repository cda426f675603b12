"""What README and docs say was measured is what the results files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.documents.__main__ import ROOT, TABLES, documents, filled
from benchmarks.documents.figures import FIGURES
from benchmarks.markdown import bold_least, grid, middle, short
from benchmarks.result_files import latest


@pytest.mark.processes
@pytest.mark.parametrize("path", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_table_is_that_of_the_results(path) -> None:
    text = path.read_text()
    assert filled(text, TABLES) == text, "a table was typed, or the results have changed: make report"


def test_a_table_is_put_between_its_marks_and_nothing_else_changes() -> None:
    text = "above\n<!-- results: one -->\nold\n<!-- /results -->\nbetween\n<!-- results: two -->\n<!-- /results -->\nbelow\n"
    made = filled(text, {"one": lambda: "1", "two": lambda: "2"})
    assert made == (
        "above\n<!-- results: one -->\n1\n<!-- /results -->\nbetween\n<!-- results: two -->\n2\n<!-- /results -->\nbelow\n"
    )
    assert filled(made, {"one": lambda: "1", "two": lambda: "2"}) == made
    with pytest.raises(KeyError, match="one"):
        filled(text, {})


def test_numbers_are_written_as_in_the_docs() -> None:
    assert grid(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
    assert middle([3.0, 1.0, 2.0]) == "2 (1-3)"
    assert [short(rate) for rate in (0.012, 3e-3, 0.2)] == ["1.2e-2", "3e-3", "0.2"]
    assert bold_least([2.0, 1.0], str) == ["2.0", "**1.0**"]


def test_the_same_lines_draw_the_same_figure(tmp_path: Path) -> None:
    for name, draw in FIGURES.items():
        for folder in ("one", "two"):
            (tmp_path / folder).mkdir(exist_ok=True)
            draw(tmp_path / folder / name)
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_last_measurement_of_a_cell_counts() -> None:
    lines = [{"cell": 1, "value": 1}, {"cell": 2, "value": 2}, {"cell": 1, "value": 3}]
    assert [line["value"] for line in latest(lines, ("cell",)).values()] == [3, 2]
