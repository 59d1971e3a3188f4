"""The documentation site: complete, built from this checkout; no page loads from the network."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from arrowhead.cli import main as command_line

ROOT = Path(__file__).resolve().parents[1]
LOADS = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}


def build(place: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(words, cwd=place, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the site is made of, with the pages that `make docs` writes."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copy(ROOT / "zensical.toml", folder)
    shutil.copytree(ROOT / "docs", folder / "docs")
    subprocess.run(
        [sys.executable, ROOT / "docs/make_reference.py", folder / "docs"], check=True, cwd=folder
    )
    return folder


@pytest.fixture(scope="module")
def site(sources: Path) -> Path:
    built = build(sources)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "No issues found" in built.stdout + built.stderr
    return sources / "build" / "site"


def listed(nav: list[Any]) -> Iterator[str]:
    """The pages in a navigation, sections within sections."""
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else listed(value)


class Loaded(HTMLParser):
    """What a browser fetches by itself to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in LOADS and given.get("rel") not in ("canonical", "prev", "next", "edit"):
            self.addresses.append(given.get(LOADS[tag]) or "")


def test_the_site_builds_without_a_warning_and_holds_every_page(site, sources):
    nav = tomllib.loads((sources / "zensical.toml").read_text())["project"]["nav"]
    pages = {str(page.relative_to(sources / "docs")) for page in (sources / "docs").rglob("*.md")}
    assert set(listed(nav)) == pages
    for page in pages:
        assert (site / page).with_suffix(".html").is_file(), page
    assert not list(site.rglob("*.py"))


@pytest.mark.parametrize("link", ["nowhere.md", "architecture.md#nowhere", "../README.md"])
def test_a_broken_link_fails_the_build(sources, site, link, tmp_path):
    shutil.copytree(sources, tmp_path / "broken", ignore=shutil.ignore_patterns("build", ".cache"))
    with (tmp_path / "broken/docs/index.md").open("a") as page:
        page.write(f"\n[somewhere]({link})\n")
    assert build(tmp_path / "broken").returncode != 0


def test_links_of_a_page_to_pictures_and_pages_lead_somewhere(site):
    """Pictures, and links written as HTML, which the build does not look at."""
    for page in site.rglob("*.html"):
        text = page.read_text()
        for target in re.findall(r'(?:href|src)="([^"]+)"', text):
            path = target.partition("#")[0].partition("?")[0]
            if path and not re.match(r"[a-z]+:|/", path) and page.name != "404.html":
                assert (page.parent / path).exists(), (page.name, target)


def test_no_page_loads_anything_from_the_network(site):
    for page in site.rglob("*.html"):
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert [a for a in loaded.addresses if re.match(r"(https?:)?//", a)] == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", style.read_text()), style


def test_the_page_of_commands_has_every_command_and_flag(sources):
    page = (sources / "docs/reference/cli.md").read_text()
    for name in command_line.app.resolved_commands():
        if not name.startswith("-"):
            assert f"## arrowhead {name}\n" in page, name
    for flag in ("--valid-share", "--rate", "--flag-novel", "--workers", "--max-faults"):
        assert f"`{flag}" in page


def test_the_page_of_python_has_the_public_names_with_their_docstrings(sources):
    import arrowhead

    page = (sources / "docs/reference/python.md").read_text()
    for name in set(arrowhead.__all__) - {"__version__"}:
        assert f"## {name}\n" in page, name
    assert "float32 (n_valid, C): log-probabilities" in page
