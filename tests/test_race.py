"""`arrowhead race`: backbones compared on a sample of the images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import AddMlflowDb

from arrowhead import ConfigError
from arrowhead.commands import race, race_config
from arrowhead.commands.race_config import RaceConfig
from arrowhead.data import sample, sources
from arrowhead.data.source_config import SourceConfig
from arrowhead.features.store import Store
from arrowhead.training import body_comparison
from arrowhead.training.body_comparison import HeldOut

BODIES = "shufflenet_v2_x0_5=random,mobilenet_v3_small=random"
FLAGS = ["--size", "32"]


@pytest.fixture(scope="module")
def photos(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 different images of three classes, below train/ only."""
    folder = tmp_path_factory.mktemp("race") / "photos"
    originals = sorted((image_folder / "train").rglob("*.jpg"))
    for number in range(240):
        original = originals[number % len(originals)]
        target = folder / original.parent.name / f"{number:03}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(original.read_bytes() + number.to_bytes(2, "big"))
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory, add_mlflow_db: AddMlflowDb) -> Path:
    return add_mlflow_db(tmp_path_factory.mktemp("raced"))


@pytest.fixture(autouse=True)
def _run_in_workdir(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workdir)


@pytest.fixture(scope="module")
def raced(photos: Path, workdir: Path) -> Path:
    from arrowhead.cli.main import main

    out = workdir / "out"
    with pytest.raises(SystemExit) as exit_info:
        main(["race", str(photos), str(out), "--bodies", BODIES, *FLAGS])
    assert exit_info.value.code == 0
    return out


@pytest.mark.slow
def test_race_ranks_bodies_on_the_same_images_and_measures_their_speed(raced):
    result = json.loads((raced / "race.json").read_text())
    first, second = result["bodies"]
    assert 200 <= result["images"] <= 203
    assert first["images"] == second["images"] == result["images"]
    assert first["accuracy"] >= second["accuracy"]
    assert second["behind_points"] == pytest.approx(100 * (first["accuracy"] - second["accuracy"]))
    assert min(first["images_per_second"], second["images_per_second"]) > 0
    assert {one["body"]: one["width"] for one in result["bodies"]} == {
        "shufflenet_v2_x0_5": 1024,
        "mobilenet_v3_small": 1024,
    }
    assert first["body"] in result["verdict"]


@pytest.mark.slow
def test_fit_decodes_only_what_the_race_has_not_and_a_second_race_keeps_it(raced, photos, command):
    folder = raced / "mobilenet_v3_small"
    result = command("fit", photos, folder, "--no-report", "--epochs", 1)
    before = json.loads((raced / "race.json").read_text())
    assert result["counts"]["decoded"] == 240 - before["images"]
    result = command("race", photos, raced, "--bodies", BODIES, *FLAGS)
    assert len(Store(folder / "store").read_catalog()["paths"]) == 240
    assert {k: result[k] for k in before} == before


def test_a_larger_sample_contains_a_smaller_one_and_every_class(photos):
    catalog = sources.labelled_catalog(str(photos), SourceConfig())
    small = sample.draw_sample(catalog, 0.1, per_class=5)
    large = sample.draw_sample(catalog, 0.4, per_class=5)
    assert set(small.paths) < set(large.paths) < set(catalog.paths)
    assert 3 * 8 <= len(small) <= 3 * 9
    assert small.classes == catalog.classes
    assert len(sample.draw_sample(catalog, 0.01, per_class=5)) == 3 * 5
    assert sample.draw_sample(catalog, 1.0, per_class=5).paths == catalog.paths


def held_out(correct: list[int]) -> HeldOut:
    return HeldOut(key=np.arange(len(correct), dtype=np.uint64), correct=np.array(correct, float))


def test_bodies_that_differ_in_a_few_images_are_told_apart_only_if_all_favour_one():
    base = [1] * 80 + [0] * 20
    better = [1] * 92 + [0] * 8
    mixed = [0] * 6 + [1] * 74 + [1] * 8 + [0] * 12
    certain, uncertain = body_comparison.compare(
        held_out(better), [held_out(base), held_out(mixed)]
    )
    assert certain.points == pytest.approx(12)
    spread = np.std([0] * 80 + [1] * 12 + [0] * 8, ddof=1)
    assert certain.half_width == pytest.approx(196 * spread / 10, rel=1e-3)
    assert certain.p == pytest.approx(2 * 2 * 0.5**12)  # McNemar of 12 to 0, twice by Holm
    assert certain.is_certain
    assert uncertain.points == pytest.approx(10)
    tie = body_comparison.compare(held_out(base), [held_out(mixed)])[0]
    assert not tie.is_certain


def line(body: str, speed: float | None) -> dict[str, Any]:
    return {"body": body, "images_per_second": speed}


@pytest.mark.parametrize(
    ("speeds", "p", "verdict"),
    [
        ((10.0, 30.0), 0.01, "a is better than b by 1.2 ± 0.4 points and takes 3.0 times as long."),
        ((30.0, 10.0), 0.01, "a is better than b by 1.2 ± 0.4 points and is 3.0 times as fast."),
        ((None, 10.0), 0.01, "a is better than b by 1.2 ± 0.4 points."),
        (
            (10.0, 30.0),
            0.2,
            "a is not certainly better than b. Of these, b is the fastest: 3.0 times as fast as a.",
        ),
        ((30.0, 10.0), 0.2, "a is not certainly better than b; more images (--share) would tell"),
    ],
)
def test_the_verdict_names_what_is_better_by_how_much_and_what_it_costs(speeds, p, verdict):
    difference = body_comparison.Difference(points=1.2, half_width=0.4, p=p)
    lines = [line("a", speeds[0]), line("b", speeds[1])]
    assert race.verdict(lines, [difference]).startswith(verdict)


@pytest.mark.parametrize(
    ("bodies", "found"),
    [
        ("resnet34", "is one body"),
        ("resnet34,resnet34=random", "occurs twice"),
    ],
)
def test_a_race_of_one_body_is_refused(bodies, found, tmp_path):
    with pytest.raises(ConfigError, match=found):
        race_config.entries(RaceConfig(bodies=bodies), tmp_path)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--bodies", "resnet18=random,squeezenet1_1=random"], "squeezenet1_1"),
        (["--bodies", "resnet34,resnet43"], "resnet43"),
        (["--bodies", BODIES, "--share", "0"], "--share"),
        (["--bodies", BODIES, "--body", "resnet34"], "--body"),
    ],
)
def test_bad_flags_are_refused_before_any_work(photos, tmp_path, capsys, flags, named):
    from arrowhead.cli.main import main

    with pytest.raises(SystemExit) as exit_info:
        main(["race", str(photos), str(tmp_path / "out"), *flags, *FLAGS])
    assert exit_info.value.code == 2
    assert named in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*/store/shards"))
