"""Stores from end to end: nothing is lost, wrong or computed twice."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forks
import numpy as np
import pytest
from conftest import Command

from arrowhead import ConfigError, DataError, fileio
from arrowhead.cli.main import main
from arrowhead.features import inspect, shard_file, store_format
from arrowhead.features.store import Store

FLAGS = ["--body", "resnet18", "--weights", "random", "--size", "64", "--chunk-size", "16"]


@pytest.fixture(scope="module")
def original(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ (72 synthetic images in train/ and valid/) and the finished store/ of them."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(image_folder, folder / "data", ignore=shutil.ignore_patterns("new"))
    with pytest.raises(SystemExit) as exit_info:
        main(["precompute", str(folder / "data"), str(folder / "store"), *FLAGS])
    assert exit_info.value.code == 0
    return folder


@pytest.fixture(scope="module", autouse=True)
def _shared_tracking_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One MLflow store for all tests here, because creating its schema takes seconds."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("tracking") / "mlflow.db"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}")
        yield


@pytest.fixture(autouse=True)
def _change_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def data(original: Path, tmp_path: Path) -> Path:
    """A copy of the images, to be changed; names, bytes and timestamps as in the original."""
    shutil.copytree(original / "data", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def store(original: Path, tmp_path: Path) -> Path:
    """A copy of the finished store."""
    shutil.copytree(original / "store", tmp_path / "store")
    return tmp_path / "store"


def features_by_path(path: Path) -> dict[str, np.ndarray]:
    return {
        name: np.array(feature)
        for rows in Store(path).shards()
        for name, feature, fault in zip(rows.paths, rows.features, rows.faults, strict=True)
        if fault is None
    }


def work_counts(result: dict[str, Any]) -> tuple[int, int, int]:
    counts = result["counts"]
    assert counts["inputs"] == counts["features"] + counts["faults"] + counts["ignored"]
    assert counts["features"] == counts["decoded"] + counts["looked_up"] + counts["skipped"]
    return counts["decoded"], counts["looked_up"], counts["skipped"]


# ------------------------------------------------------------------------ incremental


def test_second_run_skips_everything(store, data, command):
    assert work_counts(command("precompute", data, store, *FLAGS)) == (0, 0, 72)


def test_only_added_images_are_decoded(store, data, command, image_folder):
    before = features_by_path(store)
    for number, photo in enumerate(sorted((image_folder / "new").iterdir())[:2]):
        shutil.copy(photo, data / "train" / "beads" / f"more{number}.jpg")
    decoded, looked_up, skipped = work_counts(command("precompute", data, store, *FLAGS))
    assert decoded == 2
    assert skipped > 0
    assert looked_up <= 3 * 24  # at most three chunks change their borders
    after = features_by_path(store)
    assert len(after) == 74
    assert all((after[path] == feature).all() for path, feature in before.items())


def test_renamed_class_is_looked_up_not_decoded(store, data, command):
    before = features_by_path(store)
    for split in ("train", "valid"):
        (data / split / "leaves").rename(data / split / "ferns")
    result = command("precompute", data, store, *FLAGS)
    assert work_counts(result)[0] == 0
    assert result["classes"] == ["baskets", "beads", "ferns"]
    after = features_by_path(store)
    for path, feature in before.items():
        assert (after[path.replace("/leaves/", "/ferns/")] == feature).all()


def test_touched_image_is_looked_up_and_changed_image_is_decoded(
    store, data, command, image_folder
):
    names = sorted((data / "train" / "beads").iterdir())[:2]
    os.utime(names[0], (1, 1))
    assert work_counts(command("precompute", data, store, *FLAGS))[0] == 0
    other = sorted((image_folder / "new").iterdir())[0].read_bytes()
    status = names[1].stat()
    names[1].write_bytes(other)
    assert names[1].stat().st_mtime_ns != status.st_mtime_ns
    before = features_by_path(store)
    assert work_counts(command("precompute", data, store, *FLAGS))[0] == 1
    path = str(names[1].relative_to(data))
    assert (features_by_path(store)[path] != before[path]).any()


def test_copy_of_an_image_is_looked_up(store, data, command):
    photo = sorted((data / "train" / "beads").iterdir())[0]
    shutil.copy(photo, photo.with_name("copy.jpg"))
    assert work_counts(command("precompute", data, store, *FLAGS))[0] == 0
    after = features_by_path(store)
    assert (after["train/beads/copy.jpg"] == after[str(photo.relative_to(data))]).all()


def test_copies_in_one_run_get_the_same_feature(data, command, tmp_path):
    photo = sorted((data / "train" / "beads").iterdir())[0]
    shutil.copy(photo, data / "valid" / "beads" / "copy.jpg")
    work_counts(command("precompute", data, "fresh", *FLAGS))
    after = features_by_path(tmp_path / "fresh")
    assert (after["valid/beads/copy.jpg"] == after[str(photo.relative_to(data))]).all()


def test_removed_images_leave_no_row(store, data, command):
    removed = sorted((data / "train" / "beads").iterdir())[:3]
    for photo in removed:
        photo.unlink()
    assert work_counts(command("precompute", data, store, *FLAGS))[0] == 0
    assert not {str(photo.relative_to(data)) for photo in removed} & features_by_path(store).keys()


def test_store_of_the_older_crop_rule_keeps_its_recipe(store, data, command, tmp_path):
    newest = Store(store).recipe
    older = dataclasses.replace(newest, decoder="dali")
    Store.create(tmp_path / "old", older, Store(store).chunk_size)
    result = command("precompute", data, "old", *FLAGS)
    assert newest.decoder == "dali-upright"
    assert result["fingerprint"] == older.fingerprint != newest.fingerprint
    new, old = features_by_path(store), features_by_path(tmp_path / "old")
    # None of the images has an EXIF rotation.
    assert all((old[path] == feature).all() for path, feature in new.items())


def test_unreadable_file_is_retried_by_the_next_run(data, command, monkeypatch):
    """A changed permission or a remounted disk changes neither size nor mtime."""
    victim = sorted((data / "train" / "beads").iterdir())[0]
    original_open, unreadable = os.open, [True]

    def failing_open(path: Any, *rest: Any, **more: Any) -> int:
        if unreadable[0] and os.fsencode(path).endswith(os.fsencode(victim.name)):
            raise OSError(5, "Input/output error")
        return original_open(path, *rest, **more)

    monkeypatch.setattr(os, "open", failing_open)
    first = command("precompute", data, "s", *FLAGS, "--max-faults", "5")
    assert first["faults"] == [
        {
            "path": str(victim.relative_to(data)),
            "fault": "unreadable: Input/output error",
        }
    ]
    second = command("precompute", data, "s", *FLAGS, "--max-faults", "5")
    assert work_counts(second) == (0, 0, 71)
    unreadable[0] = False
    third = command("precompute", data, "s", *FLAGS)
    assert work_counts(third)[0] == 1
    assert third["counts"]["faults"] == 0
    assert work_counts(command("precompute", data, "s", *FLAGS)) == (0, 0, 72)


@pytest.mark.slow
def test_file_that_crashed_the_decoder_is_retried_by_the_next_run(
    data, command, monkeypatch, tmp_path
):
    """The crash may depend on the state of the machine; the program below simulates that."""
    victim = sorted((data / "train" / "beads").iterdir())[0]
    victim.write_bytes(victim.read_bytes() + b"mark")
    (tmp_path / "sick").mkdir()
    (tmp_path / "sick" / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if sys.argv[0] == '-c':\n"
        "    from arrowhead.decode import headers\n"
        "    read_header = headers.read_header\n"
        "    headers.read_header = lambda data, config: (\n"
        "        os._exit(7) if data.endswith(b'mark') else read_header(data, config))\n"
    )
    with monkeypatch.context() as broken:
        broken.setenv("PYTHONPATH", str(tmp_path / "sick"))
        first = command("precompute", data, "s", *FLAGS, "--max-faults", "5")
        again = command("precompute", data, "s", *FLAGS, "--max-faults", "5")
    crash = {"path": str(victim.relative_to(data)), "fault": "decoder_crash: exit code 7"}
    assert first["faults"] == again["faults"] == [crash]
    assert work_counts(again)[0] == 0
    recovered = command("precompute", data, "s", *FLAGS)
    assert work_counts(recovered)[0] == 1
    assert recovered["counts"]["faults"] == 0
    assert work_counts(command("precompute", data, "s", *FLAGS)) == (0, 0, 72)


def test_faulty_files_are_rows_and_too_many_give_exit_code_3(store, data, command):
    (data / "train" / "beads" / "page.jpg").write_text("<html>not found</html>")
    (data / "train" / "beads" / "empty.jpg").touch()
    (data / ".DS_Store").touch()
    result = command("precompute", data, store, *FLAGS, code=3)
    counts = result["counts"]
    assert (counts["inputs"], counts["features"], counts["faults"], counts["ignored"]) == (
        75,
        72,
        2,
        1,
    )
    assert [fault["fault"].partition(":")[0] for fault in result["faults"]] == [
        "empty",
        "not an image",
    ]
    assert result["fault_kinds"] == {"empty": 1, "not an image": 1}
    work_counts(command("precompute", data, store, *FLAGS, "--max-faults", "2"))


def test_precompute_ended_by_faults_reports_their_kinds_and_files(store, data, capsys):
    (data / "train" / "beads" / "page.jpg").write_text("<html>not found</html>")
    (data / "train" / "beads" / "empty.jpg").touch()
    with pytest.raises(SystemExit) as exit_info:
        main(["precompute", str(data), str(store), *FLAGS])
    assert exit_info.value.code == 3
    output = " ".join("".join(capsys.readouterr()).split())
    assert (
        "not read: 1 empty, 1 not an image (train/beads/empty.jpg, train/beads/page.jpg)" in output
    )
    assert f"the rows of {store / 'shards'} whose column fault is filled" in output


# --------------------------------------------------------------------------- readers


READER = """
import sys, time
from pathlib import Path
from arrowhead import ConfigError, DataError
from arrowhead.features.store import Store
path, seen = Path(sys.argv[1]), {}
while not Path(sys.argv[2]).exists():
    try:
        store = Store(path)
        manifest = store.manifest()
    except (ConfigError, DataError) as error:
        assert not seen, f"a finished store vanished: {error}"
        assert "no store.json" in error.found or "no manifest" in error.found, error
        continue
    store.verify()
    rows = sum(len(store.features(split).row) for split in ("train", "valid"))
    seen[rows] = seen.get(rows, 0) + 1
print(sorted(seen))
"""


@pytest.mark.slow
def test_polling_reader_sees_only_complete_sets(data, command, tmp_path, image_folder):
    finished = tmp_path / "done"
    reading = [sys.executable, "-c", READER, str(tmp_path / "store"), str(finished)]
    reader = forks.Popen(reading, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        command("precompute", data, "store", *FLAGS)
        for number, photo in enumerate(sorted((image_folder / "new").iterdir())[:3]):
            shutil.copy(photo, data / "train" / "beads" / f"more{number}.jpg")
            command("precompute", data, "store", *FLAGS)
    finally:
        finished.touch()
    out, err = reader.communicate(timeout=300)
    assert reader.returncode == 0, err
    assert set(json.loads(out)) <= {72, 73, 74, 75}, out
    assert len(json.loads(out)) > 1, "the reader saw nothing change"


# ------------------------------------------------------------------ stopped and damaged


@pytest.mark.slow
def test_shards_of_a_killed_run_are_verified_before_reuse(data, command, tmp_path):
    work_counts(command("precompute", data, "s", *FLAGS))
    (tmp_path / "s" / "manifest.json").unlink()  # as if killed before writing it
    shard = sorted((tmp_path / "s" / "shards").glob("*.arrow"))[0]
    rows = shard_file.read_shard(shard, Store(tmp_path / "s").recipe)
    at = shard.read_bytes().index(np.ascontiguousarray(rows.features[0]).tobytes())
    full = bytearray(shard.read_bytes())
    full[at] ^= 1
    shard.write_bytes(full)
    with pytest.raises(SystemExit) as exit_info:
        main(["precompute", str(data), "s", *FLAGS])
    assert exit_info.value.code == 4
    shard.unlink()
    result = command("precompute", data, "s", *FLAGS)
    assert work_counts(result)[0] == len(rows.paths)


def test_concurrent_run_on_one_store_is_refused(store, data, capsys):
    with Store(store).lock(), pytest.raises(SystemExit) as exit_info:
        main(["precompute", str(data), str(store), *FLAGS])
    assert exit_info.value.code == 2
    assert "being written by another" in capsys.readouterr().err


@pytest.mark.slow
def test_full_disk_is_a_clear_error_and_the_next_run_resumes(data, command, tmp_path):
    """RLIMIT_FSIZE simulates the full disk: the third and later shards do not fit."""
    code = (
        "import resource, sys, threading, time\n"
        "from pathlib import Path\n"
        "from arrowhead.cli.main import main\n"
        "def fill():\n"
        "    while len(list(Path('s/shards').glob('*.arrow'))) < 2: time.sleep(0.001)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))\n"
        "threading.Thread(target=fill, daemon=True).start()\n"
        "main(sys.argv[1:])\n"
    )
    arguments = ["precompute", str(data), "s", *FLAGS]
    completed = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert completed.returncode == 2, completed.stderr
    output = completed.stderr.splitlines()[-3:]
    assert output[0].startswith("arrowhead: ") and output[0].endswith(
        "cannot be written: File too large."
    )
    assert "run the same command again" in output[2]
    assert not (tmp_path / "s" / "manifest.json").exists()
    assert not list((tmp_path / "s").rglob("*.draft"))
    shards = list((tmp_path / "s" / "shards").glob("*.arrow"))
    assert len(shards) >= 2
    result = command(*arguments)
    assert work_counts(result)[2] > 0
    assert sum(work_counts(result)) == 72


# --------------------------------------------------------------------------- inventory


def verify_findings(command: Command, store: Path, code: int = 0) -> dict[str, str]:
    result = command("features", "verify", store, code=code)["findings"]
    return {Path(one["path"]).name: one["kind"] for one in result}


def test_info_reports_the_contents_of_a_store(store, command):
    contents = command("features", "info", store)
    assert (contents["images"], contents["features"], contents["faults"]) == (72, 72, {})
    assert contents["classes"] == ["baskets", "beads", "leaves"]
    assert sum(sum(counts.values()) for counts in contents["by_class"].values()) == 72
    assert contents["recipe"]["body"] == "resnet18"
    assert contents["distinct"] == 72


def test_info_is_readable_text_without_json(store, capsys):
    with pytest.raises(SystemExit):
        main(["features", "info", str(store)])
    shown = capsys.readouterr().out
    assert "72 images = 72 features + 0 faults" in shown
    assert "baskets" in shown


def test_verify_accepts_an_intact_store(store, command):
    assert verify_findings(command, store) == {}


def test_verify_reports_flipped_missing_and_leftover_files_and_repairs_nothing(store, command):
    names = [one["name"] for one in Store(store).manifest()["shards"]]
    flipped, missing = (Store(store).shard_path(name) for name in names[:2])
    full = bytearray(flipped.read_bytes())
    full[len(full) // 2] ^= 1
    flipped.write_bytes(full)
    missing.unlink()
    draft = store / "shards" / f".{names[2]}.arrow.0123abcd.draft"
    draft.write_bytes(b"half")
    stray = store / "shards" / "0123.arrow"
    shutil.copy(Store(store).shard_path(names[2]), stray)
    body = bytearray((store / "body.safetensors").read_bytes())
    body[-1] ^= 1
    (store / "body.safetensors").write_bytes(body)
    digest = store / "digests" / names[3]
    digest.write_text("")
    before = {file: file.read_bytes() for file in store.rglob("*") if file.is_file()}
    assert verify_findings(command, store, code=4) == {
        digest.name: "changed",
        flipped.name: "changed",
        missing.name: "missing",
        "body.safetensors": "changed",
        draft.name: "draft",
        stray.name: "leftover",
    }
    after = {file: file.read_bytes() for file in store.rglob("*") if file.is_file()}
    assert {f: b for f, b in after.items() if f.name != ".lock"} == {
        f: b for f, b in before.items() if f.name != ".lock"
    }


def test_verify_reports_rows_with_valid_hashes_that_are_not_in_the_catalog(store, command):
    """A shard listed twice in a manifest with a valid checksum: hashes fit, rows do not."""
    manifest = Store(store).manifest()
    manifest["shards"].append(manifest["shards"][0])
    fileio.write_sealed(store / "manifest.json", manifest)
    assert "misfit" in verify_findings(command, store, code=4).values()
    with pytest.raises(DataError, match="shards hold another number"):
        inspect.info(store)


def test_store_of_a_newer_format_is_refused_and_left_unchanged(store, capsys):
    head = fileio.read_json(store / "store.json")
    fileio.write_json(store / "store.json", head | {"format": store_format.FORMAT + 1})
    for verb in ("info", "verify", "gc"):
        with pytest.raises(SystemExit) as exit_info:
            main(["features", verb, str(store)])
        assert exit_info.value.code == 4
        assert f"of format {store_format.FORMAT + 1}" in capsys.readouterr().err


def test_gc_removes_unreferenced_files_only_with_yes(store, data, command):
    (data / "train" / "leaves").rename(data / "train" / "ferns")
    (data / "valid" / "leaves").rename(data / "valid" / "ferns")
    command("precompute", data, store, *FLAGS)
    draft = store / "shards" / ".x.arrow.0123abcd.draft"
    draft.write_bytes(b"half")
    dry_run = command("features", "gc", store)["findings"]
    assert draft.exists()
    assert all(Path(one["path"]).exists() for one in dry_run)
    assert {one["kind"] for one in dry_run} == {"draft", "leftover"}
    removed = command("features", "gc", store, "--yes")["findings"]
    assert removed == dry_run
    assert not any(Path(one["path"]).exists() for one in removed)
    assert verify_findings(command, store) == {}
    assert work_counts(command("precompute", data, store, *FLAGS)) == (0, 0, 72)


def test_gc_keeps_shards_that_a_stopped_extraction_will_reuse(store, data, command, image_folder):
    shutil.copy(sorted((image_folder / "new").iterdir())[0], data / "train" / "beads" / "more.jpg")
    old = {path.name for path in (store / "shards").glob("*.arrow")}
    manifest = (store / "manifest.json").read_bytes()
    command("precompute", data, store, *FLAGS)
    new = {path.name for path in (store / "shards").glob("*.arrow")} - old
    (store / "manifest.json").write_bytes(manifest)  # as if killed before writing the manifest
    shutil.copy(store / "catalog.arrow", store / "pending.arrow")
    kept = {Path(one["path"]).name for one in command("features", "gc", store, "--yes")["findings"]}
    assert not kept & new
    assert work_counts(command("precompute", data, store, *FLAGS))[0] == 0


def test_gc_of_an_unfinished_or_locked_store_is_refused(store, capsys):
    from arrowhead.features import inspect

    with Store(store).lock(), pytest.raises(ConfigError, match="being written"):
        inspect.gc(store, remove=True)
    (store / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="no manifest"):
        inspect.gc(store, remove=True)


@pytest.mark.parametrize(
    "words", [["features", "info"], ["features", "verify"], ["lr-find"], ["train"]], ids=" ".join
)
def test_unfinished_store_is_refused_with_the_command_that_finishes_it(
    store, capsys, tmp_path, words
):
    result = Store(store)
    result.write_pending(listed := result.read_catalog())
    (store / "manifest.json").unlink()
    target = [str(tmp_path / "bundle")] if words == ["train"] else []
    with pytest.raises(SystemExit) as exit_info:
        main([*words, str(store), *target])
    assert exit_info.value.code == 2
    output = " ".join(capsys.readouterr().err.split())
    assert "its extraction never finished" in output
    assert f"arrowhead precompute {listed['root']} {store}" in output


# ------------------------------------------------------------------------------ memory


PEAK = """
import os, re, sys, threading, time
from pathlib import Path
import psutil
from arrowhead.cli.main import main

peak = 0
def held(pid):
    try:
        if pid != os.getpid() and b"process.serve" not in Path(f"/proc/{pid}/cmdline").read_bytes():
            return 0  # a child that is not yet another program: these are its parent's pages
        words = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # gone
        return 0
    return sum(int(size) for size in re.findall(r"Rss(?:Anon|Shmem):\\s+(\\d+)", words))

def watch():
    global peak
    me = psutil.Process()
    while True:
        pids = [me.pid, *(one.pid for one in me.children(recursive=True))]
        peak = max(peak, sum(map(held, pids)))
        time.sleep(0.1)

threading.Thread(target=watch, daemon=True).start()
peaks = []
for folder in ("few", "many"):
    peak = 0
    try:
        main(["precompute", folder, f"{folder}-store", *sys.argv[1:]])
    except SystemExit as ended:
        assert not ended.code, ended
    peaks.append(peak)
print(*peaks, file=sys.stderr)
"""


@pytest.mark.slow
def test_memory_use_does_not_grow_with_the_number_of_images(image_folder, tmp_path):
    """160 more images cost at most 120 MB; if anything kept their files, it would be 320 MB.

    The measure is what a command and its decoder hold at one time. Mapped files (1 GB of libraries)
    do not count: how much of them is in memory is the kernel's choice.
    """
    photos = sorted(image_folder.glob("train/*/*.jpg"))
    for folder, count in (("few", 80), ("many", 240)):
        for label in ("a", "b"):
            (tmp_path / folder / label).mkdir(parents=True)
        for number in range(count):
            # After the end of the image: other bytes, so that nothing is looked up, and a hole of
            # 2 MB, which costs no room on the disk.
            with (tmp_path / folder / "ab"[number % 2] / f"{number}.jpg").open("wb") as file:
                file.write(photos[number % len(photos)].read_bytes())
                file.write(f"{folder}{number}".encode())
                file.truncate(file.tell() + 2**21)
    arguments = [*FLAGS, "--batch-size", "2"]  # fewer files on their way at a time than `few` are
    # What is freed goes back to the kernel at once: what is counted is what is held.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
    completed = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert completed.returncode == 0, completed.stderr
    few, many = (int(peak) / 1024 for peak in completed.stderr.split()[-2:])
    print(f"{few:.0f} and {many:.0f} MB")
    assert many - few < 120, (few, many)
