"""A flipped bit anywhere in any kind of file is detected: never wrong data, never a crash."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
import torch

from arrowhead import ConfigError, DataError, fileio
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle.known_images import KnownImages
from arrowhead.cli.main import main
from arrowhead.features import inspect
from arrowhead.features.store import Store
from arrowhead.training import checkpoint

WRITTEN_BEFORE = Path(__file__).parent / "written_before"
FLAGS = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64", "--chunk-size", "8"]


@pytest.fixture(scope="module")
def originals(tmp_path_factory, add_mlflow_db) -> Path:
    """A folder with a finished store, an interrupted store, a bundle and a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(add_mlflow_db(tmp_path_factory.mktemp("made")))
        with pytest.raises(SystemExit) as exit_info:
            main(["precompute", str(WRITTEN_BEFORE / "images"), "store", *FLAGS])
        assert exit_info.value.code == 0
        shutil.copytree("store", "stopped")
        stopped = Store(Path("stopped").absolute())
        stopped.write_pending(stopped.read_catalog())
        (stopped.path / "manifest.json").unlink()
        ids = np.arange(5, dtype=np.uint64)
        bundle = replace(
            bundle_format.load(WRITTEN_BEFORE / "bundle"),
            known_images=KnownImages.from_ids(ids, ids + ids),
        )
        bundle_format.save(bundle, Path("bundle"))
        tensors = {"a": torch.arange(20.0), "b": torch.ones(3, 3, dtype=torch.int64)}
        draft = checkpoint.draft_path(Path("place"))
        checkpoint.write(draft, tensors, {"key": "key", "number": 3})
        draft.rename("place/epoch-3")
        return Path.cwd()


@pytest.fixture
def folders(originals, tmp_path, monkeypatch) -> dict[str, Path]:
    """Copies of the original folders by name, in the working directory."""
    monkeypatch.chdir(tmp_path)
    names = ("store", "stopped", "bundle", "place")
    return {name: Path(shutil.copytree(originals / name, tmp_path / name)) for name in names}


KINDS = {"store": "store", "stopped": "store", "bundle": "bundle", "place": "checkpoint"}
NEVER_READ = {".lock", "catalog.arrow"}


def outcomes(folder: Path, kind: str, flips: list[tuple[str, int]]) -> Counter[str]:
    """Count the outcomes of the flips; for a crash, the outcome has the exit code."""
    result, pending, crashes = Counter[str](), list(flips), 0
    while pending:
        command = [sys.executable, Path(__file__).with_name("flipper.py"), kind, folder]
        pipe = subprocess.PIPE
        with forks.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as child:
            lines, errors = child.communicate("".join(json.dumps(one) + "\n" for one in pending))
        output = [json.loads(line) for line in lines.splitlines()]
        assert output and output[0] == "ready", errors
        result.update(output[1:])
        pending = pending[len(output) - 1 :]
        if pending:
            result[f"the process ended with {child.returncode} at {pending.pop(0)}"] += 1
            crashes += 1
            assert crashes < 20, result
    return result


def random_flips(folder: Path, count: int) -> list[tuple[str, int]]:
    """Random bits, `count` per kind of file, more often near the start and end of a file."""
    rng, result = random.Random(7), []
    files = sorted(
        file for file in folder.rglob("*") if file.is_file() and file.name not in NEVER_READ
    )
    files_by_kind: dict[str, list[Path]] = {}
    for file in files:
        relative = file.relative_to(folder)
        kind = relative.name if relative.parent == Path() else relative.suffix
        files_by_kind.setdefault(str(relative.parent / kind), []).append(file)
    for candidates in files_by_kind.values():
        for _ in range(count):
            file = rng.choice(candidates)
            bits = 8 * file.stat().st_size
            limit = rng.choice([bits, bits, min(bits, 8 * 2000)])
            bit = rng.randrange(limit)
            result.append((str(file.relative_to(folder)), rng.choice([bit, bits - 1 - bit])))
    return result


def check_flips_are_detected(folders: dict[str, Path], count: int) -> None:
    for name, kind in KINDS.items():
        result = outcomes(folders[name], kind, random_flips(folders[name], count))
        assert set(result) <= {"DataError", "same"}, (name, result)
        assert result["DataError"] > result["same"], (name, result)


def test_a_flipped_bit_anywhere_is_detected_or_harmless(folders):
    check_flips_are_detected(folders, 15)


@pytest.mark.chaos
def test_many_flipped_bits_are_each_detected_or_harmless(folders):
    check_flips_are_detected(folders, 500)


# ------------------------------------------------------- documents with a valid seal, but wrong


DEEP = json.loads("[" * 900 + "]" * 900)
WRONG_VALUES = [None, "text", -1, 0, 2.5, True, [], ["x"], {}, {"x": 1}, DEEP]


def corrupted_documents(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield copies of the document with each key, at any depth, removed or of another type."""
    for key, value in document.items():
        yield f"no {key}", {name: one for name, one in document.items() if name != key}
        for other in WRONG_VALUES:
            if type(other) is not type(value):
                yield f"{key} {str(other)[:20]}", document | {key: other}
        inner = value[0] if isinstance(value, list) and value else value
        if isinstance(inner, dict):
            for description, one in corrupted_documents(inner):
                yield f"{key}.{description}", document | {key: one if inner is value else [one]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "document_path", ["store/store.json", "store/manifest.json", "bundle/bundle.json"]
)
def test_sealed_documents_with_wrong_values_are_refused(document_path, folders):
    path = Path(document_path).absolute()
    original = fileio.read_json(path)
    del original["seal"]
    refused = 0
    for description, document in corrupted_documents(original):
        fileio.write_sealed(path, document)
        try:
            if path.parent.name == "bundle":
                bundle_format.info(path.parent)
                bundle_format.load(path.parent)
            else:
                inspect.verify(path.parent)
                inspect.info(path.parent)
                Store(path.parent).features()
        except (DataError, ConfigError) as error:
            assert path.parent.name in error.found, description
            refused += 1
    assert refused > 50
    fileio.write_sealed(path, original)


@pytest.mark.parametrize("text", ["[" * 200_000, "[" * 200_000 + "]" * 200_000, "7", "[]", "null"])
def test_a_document_that_is_nested_deeply_or_not_an_object_is_refused(text, folders):
    for path in ("store/store.json", "store/manifest.json", "bundle/bundle.json"):
        Path(path).write_text(text)
    for read in (
        lambda: inspect.verify(Path("store")),
        lambda: bundle_format.load(Path("bundle")),
    ):
        with pytest.raises(DataError):
            read()


def test_names_in_a_manifest_that_point_outside_the_store_are_refused(folders):
    path = folders["store"] / "manifest.json"
    original = fileio.read_json(path)
    del original["seal"]
    outside_file = shutil.copy(folders["store"] / original["catalog"]["name"], "stolen.arrow")
    for name in ("../stolen.arrow", str(Path(outside_file).absolute()), "catalog-../stolen.arrow"):
        fileio.write_sealed(path, original | {"catalog": original["catalog"] | {"name": name}})
        with pytest.raises(DataError, match=r"catalog\.name"):
            Store(folders["store"]).verify()
    for name in ("../../stolen", "..", "/etc/passwd", "a/b", ""):
        shards = [original["shards"][0] | {"name": name}, *original["shards"][1:]]
        fileio.write_sealed(path, original | {"shards": shards})
        with pytest.raises(DataError, match=r"shards\[0\]\.name"):
            inspect.gc(folders["store"], remove=True)


def test_gc_removes_nothing_behind_a_symlink(folders):
    store, elsewhere = folders["store"], folders["store"].parent / "elsewhere"
    (store / "shards").rename(elsewhere)
    shutil.copy(next(elsewhere.glob("*.arrow")), elsewhere / "0123.arrow")
    (store / "shards").symlink_to(elsewhere)
    assert len(Store(store).features().row) == 24  # reading through a link is fine
    before = sorted(elsewhere.iterdir())
    with pytest.raises(ConfigError, match="is a link"):
        inspect.gc(store, remove=True)
    assert sorted(elsewhere.iterdir()) == before
