"""Makes the tables and figures of README and docs from the lines under `benchmarks/results`.

    python -m benchmarks.documents            # `make report`
    python -m benchmarks.documents --check    # changes nothing; fails if a document differs from the lines

A document holds each table between two marks, `<!-- results: NAME -->` and `<!-- /results -->`; NAME is one of TABLES.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.documents import costs, growing, ladder, quality, runs, searches, sizes, transfer
from benchmarks.documents.figures import FIGURES

ROOT = Path(__file__).parents[2]
TABLES: dict[str, Callable[[], str]] = {
    **quality.TABLES,
    **sizes.TABLES,
    **searches.TABLES,
    **runs.TABLES,
    **costs.TABLES,
    **ladder.TABLES,
    **growing.TABLES,
    **transfer.TABLES,
}
_MARKED = re.compile(r"(<!-- results: (?P<name>[a-z0-9-]+) -->\n).*?(<!-- /results -->)", re.DOTALL)


def filled(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """The document `text` with its tables made anew.

    Args:
        text: Markdown with marks.
        tables: name of a table → the function that makes it.

    Raises:
        KeyError: A mark names a table that is not in `tables`.
    """
    return _MARKED.sub(lambda found: f"{found[1]}{tables[found['name']]()}\n{found[3]}", text)


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def stale(write: bool) -> list[Path]:
    """Documents and figures that differ from the results.

    Args:
        write: Also makes them anew.
    """
    found = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        if (made := filled(text, TABLES)) != text:
            found.append(path)
            if write:
                path.write_text(made, encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        for name, draw in FIGURES.items():
            path, made = ROOT / "docs" / name, Path(folder) / name
            draw(made)
            if not path.exists() or path.read_bytes() != made.read_bytes():
                found.append(path)
                if write:
                    path.write_bytes(made.read_bytes())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if anything would")
    arguments = parser.parse_args()
    for path in (found := stale(write=not arguments.check)):
        print(f"{path.relative_to(ROOT)}: {'is not what the results say' if arguments.check else 'made anew'}")
    sys.exit(int(arguments.check and bool(found)))


if __name__ == "__main__":
    main()
