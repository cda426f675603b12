"""The site of the docs: it is built strictly, loads nothing from elsewhere, has all names and keys, answers in three clicks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from urllib.parse import urldefrag

import pytest

import dist_ssn
from dist_ssn import errors
from dist_ssn.cluster.file import cluster_keys
from dist_ssn.engines import ENGINES
from dist_ssn.train.recipe.keys import recipe_keys
from scripts.docs_hook import commands, rendered
from tests.test_docs.markdown import ROOT, helped

LOADED = re.compile(r"""(?:\ssrc=|url\(|<link[^>]*\shref=|import\()\s*["']?(https?:)?//""")
"""What a browser fetches by itself from another place; links that a reader follows are not among it."""


@pytest.mark.processes
@pytest.mark.timeout(600)
def test_the_site(tmp_path: Path) -> None:
    """One build for all checks, since it takes long."""
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    texts = {str(path.relative_to(site)): path.read_text() for path in site.rglob("*.html")}
    styles = {str(path.relative_to(site)): path.read_text() for path in site.rglob("*.css")}
    assert not {name: found[0] for name, text in (texts | styles).items() if (found := LOADED.search(text))}
    _check_reference(texts)
    _check_ten_questions(texts)
    assert not [name for name, text in texts.items() if "<!-- python" in text or "<!-- generated" in text]


def _ids(text: str) -> set[str]:
    return set(re.findall(r'\sid="([^"]+)"', text))


def _check_reference(texts: dict[str, str]) -> None:
    """Every public name, engine, error, recipe key, cluster key and command has a place in the reference."""
    exceptions = [
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)
    ]
    names = {f"dist_ssn.{name}" for name in dist_ssn.__all__}
    names |= {f"dist_ssn.errors.{name}" for name in exceptions}
    names |= {place.partition(":")[2] for place in ENGINES.values()}
    found = _ids(texts["reference/api.html"])
    found |= {name.rpartition(".")[2] for name in found}
    assert names <= found, names - found
    for page, keys in (("recipe-keys", recipe_keys()), ("cluster-keys", cluster_keys())):
        assert not {key.name for key in keys} - _ids(texts[f"reference/{page}.html"])
    shown = re.sub(r"<[^>]+>", "", texts["reference/command-line.html"])
    assert not [words for words in commands() if f"usage: {' '.join(['dist-ssn', *words])}" not in shown]


def _check_ten_questions(texts: dict[str, str]) -> None:
    """Each click of each path is a link in the text of the page before it; on one page, in its table of contents."""
    items = re.findall(r"<li>\s*(?:<p>)?<strong>(.*?)</strong>(.*?)</li>", _article(texts["ten-questions.html"]), re.S)
    assert len(items) == 10
    for question, path in items:
        stops = re.findall(r'href="([^"]+)"', path)
        assert stops[0] == "index.html", question
        assert 2 <= len(stops) <= 4, question  # three clicks
        for here, there in pairwise(stops):
            page, (target, anchor) = urldefrag(here)[0], urldefrag(there)
            on_page = re.findall(r'href="([^"]+)"', texts[page] if page == target else _article(texts[page]))
            assert (target, anchor) in {_resolved(link, page) for link in on_page}, (
                f"{question}: {here} has no link to {there}"
            )
            assert not anchor or anchor in _ids(texts[target]), f"{question}: {there}"


def _resolved(link: str, page: str) -> tuple[str, str]:
    """(page, anchor) that a link on `page` leads to."""
    target, anchor = urldefrag(link)
    return os.path.normpath(os.path.join(os.path.dirname(page), target)) if target else page, anchor


def _article(text: str) -> str:
    return text.partition("<article")[2].partition("</article>")[0]


@pytest.mark.processes
def test_commands_are_those_that_the_program_lists() -> None:
    found = commands()
    assert ("train",) in found
    assert ("plan",) in found
    assert all(helped(" ".join(["dist-ssn", *words])) for words in found)


def test_links_out_of_the_docs_become_paths() -> None:
    page = ROOT / "docs" / "guides" / "page.md"
    assert rendered("see [facts](../../clusters/README.md)", page) == "see facts (`clusters/README.md`)"
    assert rendered("see [`clusters/`](../../clusters)", page) == "see `clusters/`"
    assert rendered("[how](../../CONTRIBUTING.md#a-morph)", page) == "[how](../contributing.md#a-morph)"
    assert rendered("[quality](../results/quality.md#2)", page) == "[quality](../results/quality.md#2)"
    assert rendered("[paper](https://arxiv.org/abs/2006.10598)", page) == "[paper](https://arxiv.org/abs/2006.10598)"
    assert rendered("```text\n[facts](../../clusters/README.md)\n```\n", page).startswith("```text\n[facts](")
    assert rendered("<!-- python\nx = 1\n-->\ntext\n", page) == "text\n"
