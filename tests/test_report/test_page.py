"""The report's page: what it shows, to a browser of any width and to people who do not see; hostile names are text."""

from __future__ import annotations

import html
import html.parser
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from dist_ssn.report import report
from dist_ssn.report.compare import modelled
from tests.test_report.test_report import row

HOSTILE = '<script>alert("1")</script>|`x`'
BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


class Tags(html.parser.HTMLParser):
    """All start tags with their attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of two runs, one of which has a name that means something to a browser."""
    base = tmp_path_factory.mktemp("report")
    for name, per_step in ((HOSTILE, 1000), ("dense twin of a name that is long enough to need a second line", 90_000)):
        made = base / f"run-{per_step}"
        made.mkdir()
        content = {"rows": [row(name, per_step)], "ring_bytes_by_purpose": {"gradients": 40 * per_step, "metrics": 8}}
        ledger = [{"purpose": "gradients", "exposed_seconds": 2.0}]
        (made / "summary.json").write_text(json.dumps({**content, "ledger": ledger, "seconds": 8.0}))
    report([base], base / "page", Console(file=io.StringIO()))
    return base / "page"


def test_the_page_needs_nothing_and_runs_nothing(folder: Path) -> None:
    page = Tags((folder / "index.html").read_text())
    names = [tag for tag, _ in page.tags]
    assert "script" not in names and "link" not in names
    assert HOSTILE in page.text
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 6 and all((folder / str(name)).is_file() for name in pictures)
    assert {file.name for file in folder.iterdir()} == {*pictures, "index.html", "report.md"}


def test_the_page_can_be_heard(folder: Path) -> None:
    page = Tags((folder / "index.html").read_text())
    assert ("html", {"lang": "en"}) in page.tags
    assert [tag for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)] == ["h1"]
    for tag, attributes in page.tags:
        if tag == "img":
            assert "ends at 1.750 after" in str(attributes["alt"])
        if tag == "th":
            assert attributes["scope"] in ("col", "row")
    assert sum(tag == "caption" for tag, _ in page.tags) == sum(tag == "table" for tag, _ in page.tags) == 2


def test_markdown_has_the_same_tables(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines[:4]}) == 1
    assert "<script>" not in text.replace("\\<", "")
    assert text.count("![") == 6 and "gradients" in text


def test_time_at_another_bandwidth_by_hand() -> None:
    run = {**row("one", 1_000_000), "seconds": 8.0, "exposed_seconds": 2.0}
    # Of 8 s at step 40, three quarters are compute; 40 MB at 8 Mbit/s take 40 s.
    assert modelled(run, 8)["history"][-1]["seconds"] == pytest.approx(6 + 40)
    assert run["history"][-1]["seconds"] == 8


PROBE = """<iframe id="f" src="index.html" style="width:{width}px;height:3000px;border:0"></iframe><script>
f.onload = () => {{ const page = f.contentDocument; const images = [...page.images];
document.title = JSON.stringify({{wide: page.documentElement.scrollWidth, images: images.map(i => i.naturalWidth)}}); }}
</script>"""


@pytest.mark.processes
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_all_of_it(folder: Path, tmp_path: Path, width: int) -> None:
    shutil.copytree(folder, tmp_path / "page")
    probe = tmp_path / "page" / "probe.html"
    probe.write_text(PROBE.format(width=width))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--host-rules=MAP * ~NOTFOUND",
    ]
    options += [
        f"--user-data-dir={tmp_path}/profile",
        f"--window-size={max(width, 500)},3000",
        "--virtual-time-budget=5000",
    ]
    command = [str(BROWSER), *options, "--dump-dom", probe.as_uri()]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r"<title>(.*?)</title>", shown)
    assert found is not None, shown
    told = json.loads(html.unescape(found[1]))
    assert told["wide"] <= width
    assert len(told["images"]) == 6 and all(told["images"])
