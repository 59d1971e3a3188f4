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
URL_ATTRIBUTES = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}


def build_site(directory: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the site's sources, with the pages that `make docs` generates."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copy(ROOT / "zensical.toml", folder)
    shutil.copytree(ROOT / "docs", folder / "docs")
    subprocess.run(
        [sys.executable, ROOT / "docs/make_reference.py", folder / "docs"], check=True, cwd=folder
    )
    return folder


@pytest.fixture(scope="module")
def site(sources: Path) -> Path:
    completed = build_site(sources)
    assert completed.returncode == 0, completed.stdout + completed.stderr
    assert "No issues found" in completed.stdout + completed.stderr
    return sources / "build" / "site"


def navigation_pages(nav: list[Any]) -> Iterator[str]:
    """Yield the pages of a navigation, with nested sections."""
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        else:
            for value in entry.values():
                yield from [value] if isinstance(value, str) else navigation_pages(value)


class ResourceParser(HTMLParser):
    """Collects the addresses that a browser loads to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag in URL_ATTRIBUTES and attributes.get("rel") not in (
            "canonical",
            "prev",
            "next",
            "edit",
        ):
            self.addresses.append(attributes.get(URL_ATTRIBUTES[tag]) or "")


def test_the_site_builds_without_a_warning_and_contains_every_page(site, sources):
    nav = tomllib.loads((sources / "zensical.toml").read_text())["project"]["nav"]
    pages = {str(page.relative_to(sources / "docs")) for page in (sources / "docs").rglob("*.md")}
    assert set(navigation_pages(nav)) == pages
    for page in pages:
        assert (site / page).with_suffix(".html").is_file(), page
    assert not list(site.rglob("*.py"))


@pytest.mark.parametrize("link", ["nowhere.md", "architecture.md#nowhere", "../README.md"])
def test_a_broken_link_fails_the_build(sources, site, link, tmp_path):
    shutil.copytree(sources, tmp_path / "broken", ignore=shutil.ignore_patterns("build", ".cache"))
    with (tmp_path / "broken/docs/index.md").open("a") as page:
        page.write(f"\n[somewhere]({link})\n")
    assert build_site(tmp_path / "broken").returncode != 0


def test_relative_links_and_images_of_every_page_exist(site):
    """This includes images and links written as HTML, which the build does not check."""
    for page in site.rglob("*.html"):
        text = page.read_text()
        for target in re.findall(r'(?:href|src)="([^"]+)"', text):
            path = target.partition("#")[0].partition("?")[0]
            if path and not re.match(r"[a-z]+:|/", path) and page.name != "404.html":
                assert (page.parent / path).exists(), (page.name, target)


def test_no_page_loads_anything_from_the_network(site):
    for page in site.rglob("*.html"):
        parser = ResourceParser()
        parser.feed(page.read_text())
        assert [
            address for address in parser.addresses if re.match(r"(https?:)?//", address)
        ] == [], page
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(https?:)?//", style.read_text()), style


def test_the_cli_reference_has_every_command_and_important_flags(sources):
    page = (sources / "docs/reference/cli.md").read_text()
    for name in command_line.app.resolved_commands():
        if not name.startswith("-"):
            assert f"## arrowhead {name}\n" in page, name
    for flag in ("--valid-share", "--rate", "--flag-novel", "--workers", "--max-faults"):
        assert f"`{flag}" in page


def test_the_python_reference_has_the_public_names_and_their_docstrings(sources):
    import arrowhead

    page = (sources / "docs/reference/python.md").read_text()
    for name in set(arrowhead.__all__) - {"__version__"}:
        assert f"## {name}\n" in page, name
    assert "float32 (n_valid, C): log-probabilities" in page
