"""The report in a real browser: no request, no error, no fault of accessibility, on any screen."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import AddMlflowDb, Command

pytestmark = pytest.mark.services

SMALL = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64"]
SIZES = {"wide": (1280, 900), "phone": (390, 844)}
HOSTILE = "=x <img src=http:&sol;&sol;127.0.0.1&sol;a.png onerror=alert(1)>.jpg"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by Playwright."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        # Only root in a container needs --no-sandbox; the page is our own.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, add_mlflow_db: AddMlflowDb) -> Path:
    return add_mlflow_db(tmp_path_factory.mktemp("page"))


@pytest.fixture
def page_file(
    workdir: Path, image_folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The report of a random backbone, which makes mistakes, on images with a hostile name."""
    monkeypatch.chdir(workdir)
    if not Path("report").exists():
        shutil.copytree(image_folder, "data", ignore=shutil.ignore_patterns("new"))
        for folder in Path("data/train").iterdir():  # enough held-out images to compare slices
            for file in sorted(folder.iterdir())[-10:]:
                file.rename(Path("data/valid", folder.name, file.name))
        first = min(Path("data/valid/beads").iterdir())
        first.rename(first.with_name(HOSTILE))
        # A copy of a training image with another label: a leak, and a label that is wrong.
        copied = min(Path("data/train/leaves").iterdir())
        shutil.copy(copied, "data/valid/beads/copied.jpg")
        command("fit", "data", "out", *SMALL, "--head", "linear", "--epochs", "2", "--rate", "0.01")
        command("examine", "out/store", "out/bundle", "report")
    return workdir / "report" / "report.html"


@pytest.fixture
def messages() -> list[str]:
    """What the console of the page says, and what the page asks from elsewhere."""
    return []


@pytest.fixture(params=[(size, theme) for size in SIZES for theme in ("light", "dark")], ids=str)
def page(
    request: pytest.FixtureRequest, browser: Any, page_file: Path, messages: list[str]
) -> Iterator[Any]:
    """The open report, at two sizes and in two themes."""
    size, theme = request.param
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=theme, accept_downloads=True
    )
    opened = context.new_page()
    opened.on("console", lambda message: messages.append(message.text))
    opened.on("pageerror", lambda error: messages.append(str(error)))

    def on_request(asked: Any) -> None:
        if not asked.url.startswith(("file:", "data:", "blob:")):
            messages.append(f"asked for {asked.url}")

    opened.on("request", on_request)
    opened.goto(page_file.as_uri())
    yield opened
    context.close()


def test_page_asks_nothing_and_reports_no_error(page, messages):
    page.wait_for_timeout(200)
    assert messages == []


def test_page_has_no_accessibility_violation(page):
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    summary = [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in found]
    assert summary == []


def test_page_never_scrolls_sideways(page):
    width, visible = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert width <= visible


def test_every_section_is_linked_and_there(page):
    links = page.eval_on_selector_all("nav.sections a", "all => all.map(a => a.hash.slice(1))")
    assert {"pictures", "mistakes", "charts", "about"} <= set(links)
    for anchor in links:
        assert page.locator(f"#{anchor}").is_visible()


def test_galleries_filter_and_sort(page):
    wrong = page.locator("#gallery .card:visible")
    assert wrong.count() > 0
    assert all(one.get_attribute("data-wrong") == "1" for one in wrong.all())
    page.get_by_role("button", name="Highest loss", exact=True).click()
    losses = [float(one.get_attribute("data-loss")) for one in wrong.all()]
    assert losses == sorted(losses, reverse=True)
    page.select_option("#gallery-class", "leaves")
    labels = {one.get_attribute("data-label") for one in wrong.all()}
    assert labels <= {'["leaves"]'}
    page.select_option("#gallery-sort", "probability")
    chances = [float(one.get_attribute("data-probability")) for one in wrong.all()]
    assert chances == sorted(chances)


def test_heatmaps_are_shown_only_when_asked_for(page):
    heat = page.locator("#gallery .card:visible .heat").first
    assert not heat.is_visible()
    page.locator("[data-heat-toggle]").first.click()
    assert heat.is_visible()
    page.locator("[data-heat-toggle]").first.click()
    assert not heat.is_visible()


def test_a_number_of_the_confusion_matrix_shows_its_pictures(page):
    cell = page.locator("button[data-pair]").first
    label, predicted = json.loads(cell.get_attribute("data-pair"))
    count = int(cell.inner_text())
    cell.click()
    shown = page.locator("#gallery .card:visible")
    assert 0 < shown.count() <= count
    for card in shown.all():
        assert json.loads(card.get_attribute("data-label")) == [label]
        assert json.loads(card.get_attribute("data-predicted")) == [predicted]


def test_a_slice_opens_its_mistakes_with_the_keyboard(page):
    from playwright.sync_api import expect

    buttons = page.locator("[data-slice]")
    assert buttons.count() > 1
    shown = page.locator("#slice-cards .card:visible")
    for button in (buttons.last, buttons.first):
        button.focus()
        page.keyboard.press("Enter")
        number = button.get_attribute("data-slice")
        entries = [card.get_attribute("data-slices").split() for card in shown.all()]
        places = [one.split(":") for names in entries for one in names]
        mine = [int(place) for name, place in places if name == number]
        assert mine == list(range(shown.count())) and mine
        assert shown.locator(".mark.wrong").count() == shown.count()
        assert page.locator('[data-slice][aria-pressed="true"]').count() == 1
        title = page.locator("#slice-title:focus")
        assert title.inner_text().endswith(button.inner_text())
        expect(title).to_be_in_viewport()  # the page scrolls smoothly


def test_ticked_labels_download_as_a_table_that_relabel_takes(page, command, tmp_path):
    download = page.locator("#download-fixes")
    assert download.is_disabled()
    card = page.locator("[data-fix]").first
    card.locator("[type=checkbox]").check()
    card.locator("[type=text]").fill("baskets")
    with page.expect_download() as downloading:
        download.click()
    downloading.value.save_as(tmp_path / "fixes.csv")
    with (tmp_path / "fixes.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["label"] == card.get_attribute("data-label")
    assert row["new_label"] == "baskets"
    result = command("relabel", "out/store", tmp_path / "fixes.csv", "--dry-run")
    assert result["labels"] >= 1


def test_pictures_enlarge_and_close_with_the_keyboard(page):
    first = page.locator("#gallery .card:visible .open").first
    first.focus()
    page.keyboard.press("Enter")
    dialog = page.locator("dialog")
    assert dialog.is_visible()
    before = dialog.locator(".full-path").inner_text()
    page.keyboard.press("ArrowRight")
    assert dialog.locator(".full-path").inner_text() != before
    assert dialog.locator(".stage img").first.evaluate("img => img.naturalWidth") > 0
    page.keyboard.press("Escape")
    assert not dialog.is_visible()


def test_pointing_at_the_map_shows_the_image(page):
    page.locator("#map circle").first.dispatch_event("pointerenter")
    tip = page.locator("#map .tip")
    assert tip.is_visible()
    assert "label" in tip.inner_text()
    box, visible = tip.bounding_box(), page.evaluate("innerWidth")
    assert box["x"] >= 0 and box["x"] + box["width"] <= visible
