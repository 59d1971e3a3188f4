"""`arrowhead advise`: what to do with the images of a store, tried on a sample."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arrowhead import ConfigError
from arrowhead.commands.advise_config import AdviseConfig
from arrowhead.reporting import advice
from arrowhead.training import extrapolation
from arrowhead.training.extrapolation import Forecast, MeasuredCurve


def measured(error: Any, images: int = 4_000, seed: int = 0) -> MeasuredCurve:
    """A learning curve whose images are wrong at random, three draws."""
    sizes = np.array([40.0, 80, 160, 400, 800])
    rng = np.random.default_rng(seed)
    right = (rng.random((3, len(sizes), images)) > error(sizes)[:, None]).astype(float)
    return MeasuredCurve(sizes, right.mean(0), right.mean(2).T)


def test_a_power_law_is_continued_within_its_interval():
    def error(images: Any) -> Any:
        return 0.02 + 1.2 * images**-0.5

    ahead = extrapolation.extrapolate(measured(error), [800, 1600, 3200])
    for one in ahead:
        assert one.low - 1e-9 <= error(800.0) - error(float(one.images)) <= one.high + 1e-9
    assert ahead[0].gain == 0
    assert 0 < ahead[1].gain < ahead[2].gain


def test_a_flat_curve_promises_nothing_from_more_labels():
    ahead = extrapolation.extrapolate(measured(lambda n: 0.1 + 0 * n, 500), [800, 1600, 3200])
    assert ahead[1].gain < 0.01
    text = advice.sentences([option("frozen head", 0, None), option("x", -1, 0.5)], ahead, PLAN)
    assert "More labels would probably change little" in text


PLAN: dict[str, Any] = {
    "epochs": 3,
    "one_epoch_seconds": 60.0,
    "budget": 30.0,
    "images": 1000,
    "train_images": 250,
    "is_sample": True,
}


def option(name: str, points: float, p: float | None, seconds: float = 60.0) -> dict[str, Any]:
    return {
        "name": name,
        "accuracy": 0.9 + points / 100,
        "half_width": 0.02,
        "images": 400,
        "points": points,
        "points_half_width": 1.0,
        "p": p,
        "seconds": seconds,
    }


@pytest.mark.parametrize(
    ("options", "choice", "words"),
    [
        ([("2 cached views", 0.8, 0.3), ("fine-tuned, 3 epochs", 1.1, 0.06)], 0, "Keep the frozen"),
        ([("2 cached views", 1.8, 0.01), ("fine-tuned, 3 epochs", 1.1, 0.06)], 1, "Store 2 cached"),
        ([("2 cached views", 1.8, 0.01), ("fine-tuned, 3 epochs", 3, 0.001)], 2, "Fine-tune (3"),
        ([("2 cached views", -2.0, 0.01), ("8 cached views", -1, 0.6)], 0, "Keep the frozen"),
    ],
)
def test_only_what_is_better_by_more_than_chance_is_advised(options, choice, words):
    lines = [option("frozen head", 0, None), *(option(*one) for one in options)]
    assert advice.choose(lines) is lines[choice]
    ahead = [Forecast(n * 100, 0.9 + n / 1000, n / 1000 - 0.001, 0.0, 0.01) for n in (1, 2, 4)]
    text = advice.sentences(lines, ahead, PLAN)
    assert words in text
    assert "with 2 times as many" in text


def test_a_budget_below_one_epoch_is_said_with_what_it_takes():
    lines = [option("frozen head", 0, None), option("2 cached views", 0.1, 0.9)]
    text = advice.sentences(lines, [], PLAN | {"epochs": 0, "budget": 0.5})
    assert "does not fit into 0.5 minutes: one epoch takes 60 s (--budget)" in text


@pytest.mark.parametrize("setting", [{"budget": 0}, {"trial_images": 3}, {"folds": 1}])
def test_settings_that_cannot_be_are_refused_by_their_flag(setting):
    with pytest.raises(ConfigError, match="--" + next(iter(setting)).replace("_", "-")):
        AdviseConfig(**setting)


@pytest.mark.slow
def test_every_way_is_tried_on_the_same_images_and_a_second_run_trains_nothing_again(
    image_folder, add_mlflow_db, tmp_path, monkeypatch, capsys
):
    from arrowhead.cli.main import main

    monkeypatch.chdir(add_mlflow_db(tmp_path))
    photos = tmp_path / "photos"
    shutil.copytree(image_folder, photos)

    def command(*words: str) -> tuple[dict[str, Any], str]:
        with pytest.raises(SystemExit) as exit_info:
            main([*words, "--json"])
        printed = capsys.readouterr()
        assert exit_info.value.code == 0, printed.err
        return json.loads(printed.out), printed.err

    body = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64"]
    command("precompute", str(photos), "store", *body)
    flags = ["--trial-images", "36", "--folds", "2"]
    result, shown = command("advise", "store", *flags)
    names = [one["name"] for one in result["options"]]
    assert names[:4] == ["frozen head", "2 cached views", "4 cached views", "8 cached views"]
    assert names[4].startswith("fine-tuned, ")
    assert all(one["seconds"] > 0 and one["images"] > 10 for one in result["options"])
    assert result["advice"] in shown
    sizes = [one["images"] for one in result["learning_curve"]]
    assert sizes == sorted(sizes)
    trials = {path: path.stat().st_mtime_ns for path in Path("store.advice/trial").glob("*.json")}
    assert len(trials) == 2
    photos.rename(tmp_path / "moved")
    with pytest.raises(SystemExit) as exit_info:
        main(["advise", "store", *flags, "--out", "elsewhere"])
    assert exit_info.value.code == 2
    assert "arrowhead advise STORE DATA" in capsys.readouterr().err
    again, _ = command("advise", "store", str(tmp_path / "moved"), *flags)
    assert {path: path.stat().st_mtime_ns for path in trials} == trials
    assert [one["accuracy"] for one in again["options"]] == [
        one["accuracy"] for one in result["options"]
    ]
    none, _ = command("advise", "store", str(tmp_path / "moved"), *flags, "--budget", "0.0001")
    assert "does not fit" in none["advice"]
