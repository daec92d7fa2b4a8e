"""The site of docs/: it builds without a warning, no link leads nowhere, no op is left out."""

from __future__ import annotations

import csv
import html
import inspect
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

from instructcore import cli, ops

ROOT = Path(__file__).resolve().parents[1]
OPS = [name for name in ops.__all__ if f"{name.rstrip('_')}_reference" in ops.__all__]


class Page(HTMLParser):
    """What a page can be entered by, and what it refers to."""

    def __init__(self, path: Path):
        super().__init__()
        self.text = path.read_text("utf-8")
        self.anchors, self.links = {""}, []
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name == "id":
                self.anchors.add(value)
            elif name in ("href", "src"):
                self.links.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> dict[Path, Page]:
    for module in ("mkdocs", "material"):
        pytest.importorskip(
            module, reason="mkdocs-material is not installed: pip install '.[docs]'"
        )
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.resolve(): Page(path) for path in out.rglob("*.html")}


def test_no_link_leads_nowhere(site):
    checked, broken = 0, []
    for path, page in site.items():
        if path.name == "404.html":  # its links begin at the root of whatever serves it
            continue
        for link in page.links:
            target, anchor = urldefrag(unquote(link))
            if urlsplit(target).scheme:
                continue
            found = (path.parent / target).resolve() if target else path
            known = site[found].anchors if found in site else {""}
            checked += 1
            if not found.is_file() or anchor not in known:
                broken.append(f"{path.name}: {link}")
    assert checked > 1000 and not broken


def test_nothing_is_loaded_from_elsewhere(site):
    for path, page in site.items():
        found = re.search(r'<(?:script|img|link)[^>]+(?:src|href)="(?:https?:)?//[^"]*"', page.text)
        assert not found, f"{path.name}: {found[0]}"


@pytest.mark.parametrize("op", OPS)
def test_op(site, op):
    (page,) = (page for path, page in site.items() if path.parts[-2:] == ("ops", f"{op}.html"))
    text = html.unescape(page.text)
    for name in inspect.signature(getattr(ops, op)).parameters:
        assert re.search(rf"<li>\s*(<p>)?<code>[^<]*\b{name}\b", text), f"{name} is not explained"
    assert {"args", "returns", "raises", "source", "reference"} <= page.anchors
    assert ("times" in page.anchors) == (f'src="{op}.png"' in text)


def test_every_measured_case_is_shown(site):
    shown = {cell for page in site.values() for cell in re.findall(r"<td>([^<]*)</td>", page.text)}
    for path in (ROOT / "bench" / "results").glob("*.csv"):
        for row in csv.DictReader(path.read_text("utf-8").splitlines()):
            if (ROOT / "instructcore" / "ops" / f"{row['op']}.py").exists():
                assert html.escape(row["case"]) in shown, f"{row['op']}: {row['case']}"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_command(site, command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "88")
    cli.main([command, "--help"])
    (page,) = (p for q, p in site.items() if q.parts[-2:] == ("commands", f"{command}.html"))
    assert capsys.readouterr().out.strip() in html.unescape(re.sub(r"<[^>]+>", "", page.text))
