"""One flipped bit anywhere in any kind of file is reported: never wrong rows, never a crash."""

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

BEFORE = Path(__file__).parent / "written_before"
FLAGS = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "64", "--chunk-size", "8"]


@pytest.fixture(scope="module")
def made(tmp_path_factory, tracked) -> Path:
    """A finished store, one that was stopped, a bundle, a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tracked(tmp_path_factory.mktemp("made")))
        with pytest.raises(SystemExit) as ended:
            main(["precompute", str(BEFORE / "images"), "store", *FLAGS])
        assert ended.value.code == 0
        shutil.copytree("store", "stopped")
        stopped = Store(Path("stopped").absolute())
        stopped.write_pending(stopped.read_catalog())
        (stopped.path / "manifest.json").unlink()
        ids = np.arange(5, dtype=np.uint64)
        full = replace(
            bundle_format.load(BEFORE / "bundle"), known_images=KnownImages.from_ids(ids, ids + ids)
        )
        bundle_format.save(full, Path("bundle"))
        tensors = {"a": torch.arange(20.0), "b": torch.ones(3, 3, dtype=torch.int64)}
        draft = checkpoint.draft_path(Path("place"))
        checkpoint.write(draft, tensors, {"key": "key", "number": 3})
        draft.rename("place/epoch-3")
        return Path.cwd()


@pytest.fixture
def folders(made, tmp_path, monkeypatch) -> dict[str, Path]:
    """Copies of them."""
    monkeypatch.chdir(tmp_path)
    names = ("store", "stopped", "bundle", "place")
    return {name: Path(shutil.copytree(made / name, tmp_path / name)) for name in names}


KINDS = {"store": "store", "stopped": "store", "bundle": "bundle", "place": "checkpoint"}
UNREAD = {".lock", "catalog.arrow"}


def outcomes(folder: Path, kind: str, flips: list[tuple[str, int]]) -> Counter[str]:
    """What came of each flip: of those that end the process, which signal it was."""
    result, left, died = Counter[str](), list(flips), 0
    while left:
        command = [sys.executable, Path(__file__).with_name("flipper.py"), kind, folder]
        pipe = subprocess.PIPE
        with forks.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as child:
            lines, errors = child.communicate("".join(json.dumps(one) + "\n" for one in left))
        output = [json.loads(line) for line in lines.splitlines()]
        assert output and output[0] == "ready", errors
        result.update(output[1:])
        left = left[len(output) - 1 :]
        if left:
            result[f"the process ended with {child.returncode} at {left.pop(0)}"] += 1
            died += 1
            assert died < 20, result
    return result


def flips(folder: Path, count: int) -> list[tuple[str, int]]:
    """As many in each kind of file as in any other, at drawn places; the ends of files, too."""
    draw, result = random.Random(7), []
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name not in UNREAD)
    kinds: dict[str, list[Path]] = {}
    for file in files:
        inside = file.relative_to(folder)
        kind = inside.name if inside.parent == Path() else inside.suffix
        kinds.setdefault(str(inside.parent / kind), []).append(file)
    for trials in kinds.values():
        for _ in range(count):
            file = draw.choice(trials)
            bits = 8 * file.stat().st_size
            end = draw.choice([bits, bits, min(bits, 8 * 2000)])
            bit = draw.randrange(end)
            result.append((str(file.relative_to(folder)), draw.choice([bit, bits - 1 - bit])))
    return result


def must_be_told(folders: dict[str, Path], count: int) -> None:
    for name, kind in KINDS.items():
        result = outcomes(folders[name], kind, flips(folders[name], count))
        assert set(result) <= {"DataError", "same"}, (name, result)
        assert result["DataError"] > result["same"], (name, result)


def test_a_flipped_bit_anywhere_is_detected_or_harmless(folders):
    must_be_told(folders, 15)


@pytest.mark.chaos
def test_a_flipped_bit_at_any_of_many_places_is_detected_or_harmless(folders):
    must_be_told(folders, 500)


# ------------------------------------------------------------------------ well-sealed nonsense


DEEP = json.loads("[" * 900 + "]" * 900)
NONSENSE = [None, "text", -1, 0, 2.5, True, [], ["x"], {}, {"x": 1}, DEEP]


def spoiled(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The document with each key, at any depth, absent or of another kind."""
    for key, value in document.items():
        yield f"no {key}", {name: one for name, one in document.items() if name != key}
        for other in NONSENSE:
            if type(other) is not type(value):
                yield f"{key} {str(other)[:20]}", document | {key: other}
        inner = value[0] if isinstance(value, list) and value else value
        if isinstance(inner, dict):
            for words, one in spoiled(inner):
                yield f"{key}.{words}", document | {key: one if inner is value else [one]}


@pytest.mark.parametrize("paper", ["store/store.json", "store/manifest.json", "bundle/bundle.json"])
def test_well_sealed_nonsense_is_refused_and_nothing_else_is_raised(paper, folders):
    path = Path(paper).absolute()
    full = fileio.read_json(path)
    del full["seal"]
    refused = 0
    for words, document in spoiled(full):
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
            assert path.parent.name in error.found, words
            refused += 1
    assert refused > 50
    fileio.write_sealed(path, full)


@pytest.mark.parametrize("text", ["[" * 200_000, "[" * 200_000 + "]" * 200_000, "7", "[]", "null"])
def test_a_paper_that_nests_or_is_something_else_is_refused(text, folders):
    for path in ("store/store.json", "store/manifest.json", "bundle/bundle.json"):
        Path(path).write_text(text)
    for read in (
        lambda: inspect.verify(Path("store")),
        lambda: bundle_format.load(Path("bundle")),
    ):
        with pytest.raises(DataError):
            read()


def test_names_in_a_manifest_that_lead_out_of_the_store_are_refused(folders):
    path = folders["store"] / "manifest.json"
    full = fileio.read_json(path)
    del full["seal"]
    stolen = shutil.copy(folders["store"] / full["catalog"]["name"], "stolen.arrow")
    for name in ("../stolen.arrow", str(Path(stolen).absolute()), "catalog-../stolen.arrow"):
        fileio.write_sealed(path, full | {"catalog": full["catalog"] | {"name": name}})
        with pytest.raises(DataError, match=r"catalog\.name"):
            Store(folders["store"]).verify()
    for name in ("../../stolen", "..", "/etc/passwd", "a/b", ""):
        shards = [full["shards"][0] | {"name": name}, *full["shards"][1:]]
        fileio.write_sealed(path, full | {"shards": shards})
        with pytest.raises(DataError, match=r"shards\[0\]\.name"):
            inspect.gc(folders["store"], remove=True)


def test_gc_removes_nothing_at_the_other_end_of_a_link(folders):
    store, elsewhere = folders["store"], folders["store"].parent / "elsewhere"
    (store / "shards").rename(elsewhere)
    shutil.copy(next(elsewhere.glob("*.arrow")), elsewhere / "0123.arrow")
    (store / "shards").symlink_to(elsewhere)
    assert len(Store(store).features().row) == 24  # reading through a link is fine
    before = sorted(elsewhere.iterdir())
    with pytest.raises(ConfigError, match="is a link"):
        inspect.gc(store, remove=True)
    assert sorted(elsewhere.iterdir()) == before
