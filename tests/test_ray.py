"""A real Ray Train group of two gives what one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

FLAGS = ["--body", "resnet18", "--weights", "random", "--size", "64", "--extract.chunk-size", "16"]


PROGRAM = """
import json, sys
from arrowhead import cli
for words in json.loads(sys.argv[1]):
    try:
        cli.main(words)
    except SystemExit as ended:
        assert ended.code == 0, (words, ended.code)
"""


def arrowhead(folder: Path, *commands: Sequence[object]) -> list[dict[str, Any]]:
    """The results of commands that share a process, and with it a Ray: that takes half a minute."""
    home = {"HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    words = json.dumps([[*map(str, command), "--json"] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, words],
        cwd=folder,
        env=os.environ | home,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == len(commands)
    return results


@pytest.fixture(scope="module")
def both(tmp_path_factory, drawn, tracked) -> tuple[Path, dict[str, Any], dict[str, Any]]:
    """The same fit with the lesson's head in this process's way and on two Ray workers; `one` and
    `two`: new images scored either way, with the bundle of the first.
    """
    folder = tracked(tmp_path_factory.mktemp("ray"))
    flags = [*FLAGS, "--head", "lesson", "--dropout", "0.25", "--epochs", "3", "--batch-size", "13"]
    flags += ["--rate", "0.01"]  # what the finder says on two workers: tests/test_lr_finder.py
    score = [
        "score",
        "alone/bundle",
        drawn / "new",
        "--features",
        "--flag-novel",
        "--probabilities",
    ]
    results = []
    for fitted, scored, more in (("alone", "one", []), ("group", "two", ["--workers", "2"])):
        fit = ["fit", drawn, fitted, *flags, *more]
        results.append(arrowhead(folder, fit, [*score, scored, "--chunk-size", "8", *more])[0])
    return folder, *results


def shard_bytes(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (store / "shards").iterdir()}


def test_two_workers_write_the_same_shards_as_one_process(both):
    folder, alone, group = both
    expected = shard_bytes(folder / "alone" / "store")
    assert len(expected) > 2
    assert shard_bytes(folder / "group" / "store") == expected
    assert group["counts"] == alone["counts"]
    manifests = [
        (folder / out / "store" / "manifest.json").read_bytes() for out in ("alone", "group")
    ]
    assert manifests[0] == manifests[1]


def test_two_workers_reach_the_same_figures_in_every_epoch(both):
    """The lesson's head: batch norm and dropout are those of the global batch; 13 rows a step."""
    _, alone, group = both
    assert len(group["epochs"]) == 3
    for one, two in zip(alone["epochs"], group["epochs"], strict=True):
        assert two == pytest.approx(one, rel=1e-4)


def test_two_workers_score_the_same(both):
    folder, _, _ = both
    parts = sorted((folder / "one").glob("*.parquet"))
    assert len(parts) > 1
    for part in parts:
        assert (folder / "two" / part.name).read_bytes() == part.read_bytes()


def test_the_token_of_a_ray_of_our_own_is_for_its_owner_only(both):
    folder, _, _ = both
    assert (folder / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
