"""Stores, bundles and reports in an object store: moto's S3 server behind a proxy with faults."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import AddMlflowDb, Command, MakeBundle
from faulty_proxy import FaultyProxy
from s3_server import s3_bucket, start_s3_server

from arrowhead import ConfigError, Images, Learner
from arrowhead.bundle import resolve
from arrowhead.cli.main import main
from arrowhead.data import mirror_space, mirrors, object_writes, remote_folder
from arrowhead.data.object_writes import ABSENT, ConditionFailedError
from arrowhead.tracking.client import TrackingConfig

RECIPE = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", "32"]
PRECOMPUTE = [*RECIPE, "--chunk-size", "16", "--workers", "0"]


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultyProxy]:
    pytest.importorskip("s3fs")
    for server in start_s3_server():
        proxy = FaultyProxy(server)
        yield proxy
        proxy.close()


@pytest.fixture
def bucket(
    proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, request: Any, tmp_path: Path
) -> Any:
    proxy.rule, proxy.done = lambda method, path: "", []
    monkeypatch.setenv("ARROWHEAD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(object_writes, "RETRY_DELAYS_SECONDS", (0.1, 0.1))
    return s3_bucket(proxy.address, monkeypatch, request.node.name)


def once(fault: str, method: str, part: str) -> Callable[[str, str], str]:
    """A rule: the first request of this method, with this in its path, has the fault."""
    left, lock = [fault], threading.Lock()

    def rule(given: str, path: str) -> str:
        with lock:
            return left.pop() if given == method and part in path and left else ""

    return rule


def contents(bucket: Any, prefix: str) -> dict[str, bytes]:
    objects = bucket.objects.filter(Prefix=f"{prefix}/")
    return {one.key.removeprefix(f"{prefix}/"): one.get()["Body"].read() for one in objects}


def files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


# ------------------------------------------------------------------------------- addresses


def test_path_in_a_mirror_names_its_address_on_every_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ARROWHEAD_CACHE_DIR", str(tmp_path))
    folder = mirrors.mirror_of(Path("s3://bucket/a b/store"))  # Path makes s3:/bucket of it
    assert mirrors.uri_of(folder) == "s3://bucket/a b/store"
    assert mirrors.uri_of(tmp_path) is None
    monkeypatch.setenv("ARROWHEAD_CACHE_DIR", str(tmp_path / "another"))
    assert mirrors.here(folder) == mirrors.mirror_of("s3://bucket/a b/store") != folder
    shown = mirrors.show(f"{folder}/x, '{folder}' file://{folder}/report.html")
    assert shown == (
        f"s3://bucket/a b/store/x, 's3://bucket/a b/store' file://{folder}/report.html"
    )
    assert mirrors.mirror_of("file:///data/out%20put") == Path("/data/out put")


@pytest.mark.parametrize(
    "address", ["s3://bucket", "s3://user:hidden@bucket/x", "ftp://host/x", "s3://bucket/../x"]
)
def test_address_that_no_folder_can_have_is_refused(address: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        mirrors.mirror_of(address)
    assert "hidden" not in str(refusal.value)


def test_refusals_name_the_address_the_cause_and_the_fix(
    bucket: Any, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"s3://no-such-bucket/x .*no such bucket"):
        remote_folder.check_output(Path("s3://no-such-bucket/x"), "store")
    bucket.put_object(Key="photos/cat/1.jpg", Body=b"x")
    with pytest.raises(ConfigError, match="not of a feature store, such as cat"):
        remote_folder.check_output(Path(f"s3://{bucket.name}/photos"), "store")
    proxy.rule = lambda method, path: "403" if method == "PUT" else ""
    with pytest.raises(ConfigError, match=r"access is denied(?s:.*)give these credentials"):
        remote_folder.check_output(Path(f"s3://{bucket.name}/x"), "store")
    proxy.rule = lambda method, path: ""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(ConfigError, match=r"there are no credentials(?s:.*)AWS_PROFILE"):
        remote_folder.check_output(Path(f"s3://{bucket.name}/x"), "store")


# --------------------------------------------------------------------------------- objects


@pytest.mark.parametrize("fault", ["503", "slow", "cut upload", "cut answer"])
def test_upload_survives_a_fault_and_is_whole_or_absent(
    bucket: Any, proxy: FaultyProxy, tmp_path: Path, fault: str
) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(300_000))
    uri = f"s3://{bucket.name}/x"
    proxy.rule = once(fault, "PUT", "/x/object")
    etag = object_writes.write(uri, "object", file, ABSENT)
    assert [fault for *_, fault in proxy.done if fault]
    assert contents(bucket, "x") == {"object": bytes(300_000)}
    file.write_bytes(b"next")
    for other in (ABSENT, "0" * 32):
        with pytest.raises(ConditionFailedError):
            object_writes.write(uri, "object", file, other)
    object_writes.write(uri, "object", file, etag)
    assert contents(bucket, "x") == {"object": b"next"}


@pytest.mark.parametrize("fault", ["503", "cut download"])
def test_download_survives_a_fault(
    bucket: Any, proxy: FaultyProxy, tmp_path: Path, fault: str
) -> None:
    bucket.put_object(Key="x/object", Body=b"y" * 300_000)
    proxy.rule = once(fault, "GET", "/x/object")
    object_writes.read(f"s3://{bucket.name}/x", "object", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"y" * 300_000


def test_large_file_is_absent_until_all_its_parts_are_there(
    bucket: Any, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from arrowhead.data import object_versions

    monkeypatch.setattr(object_versions, "PART_BYTES", 5 * 2**20)
    file = tmp_path / "large"
    file.write_bytes(b"z" * (11 * 2**20))
    proxy.rule = lambda method, path: "403" if "partNumber=3" in path else ""
    with pytest.raises(ConfigError, match="denied"):
        object_writes.write(f"s3://{bucket.name}/x", "large", file)
    assert contents(bucket, "x") == {} and list(bucket.multipart_uploads.all()) == []
    proxy.rule = once("cut upload", "PUT", "partNumber=2")
    object_writes.write(f"s3://{bucket.name}/x", "large", file)
    assert contents(bucket, "x")["large"] == file.read_bytes()


# --------------------------------------------------------------------------------- folders


def test_second_writer_is_refused_and_a_dead_one_replaced(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address = f"s3://{bucket.name}/store"
    one = remote_folder.of(mirrors.mirror_of(address))
    monkeypatch.setenv("ARROWHEAD_CACHE_DIR", str(tmp_path / "another machine"))
    other = remote_folder.of(mirrors.mirror_of(address))
    with one.lock():
        refused = pytest.raises(ConfigError, match=f"{address} is being written by another")
        with refused, other.lock():
            pass
    with other.lock():
        pass
    lock = {"host": remote_folder.socket.gethostname(), "pid": 2**22 + 1}  # above Linux's largest
    bucket.put_object(Key="store/.lock", Body=json.dumps(lock).encode())
    with other.lock():
        pass
    assert contents(bucket, "store") == {}


def test_command_that_stood_still_leaves_the_lock_of_its_successor(bucket: Any) -> None:
    folder = remote_folder.of(mirrors.mirror_of(f"s3://{bucket.name}/store"))
    with folder.lock():
        bucket.put_object(Key="store/.lock", Body=b"of another")
    assert contents(bucket, "store") == {".lock": b"of another"}


def test_changed_file_of_an_address_is_fetched_again(bucket: Any) -> None:
    folder = remote_folder.of(mirrors.mirror_of(f"s3://{bucket.name}/store"))
    path = folder.path / "body.safetensors"
    for content in (b"one", b"two"):
        bucket.put_object(Key="store/body.safetensors", Body=content)
        folder.fetch_changed(path)
        assert path.read_bytes() == content
    bucket.Object("store/body.safetensors").delete()
    folder.fetch_changed(path)
    assert not path.exists()


def test_cache_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ARROWHEAD_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be written(?s:.*)set ARROWHEAD_CACHE_DIR"):
        mirror_space.hold(mirrors.mirror_of("s3://bucket/store"))


def test_manifest_that_another_wrote_meanwhile_is_not_replaced(bucket: Any) -> None:
    folder = remote_folder.of(mirrors.mirror_of(f"s3://{bucket.name}/store"))
    with folder.lock():
        bucket.put_object(Key="store/manifest.json", Body=b"of another")
        with (
            pytest.raises(ConfigError, match="was written by another command"),
            folder.atomic_write(folder.path / "manifest.json", guarded=True) as draft,
        ):
            draft.write_text("ours")
    assert contents(bucket, "store") == {"manifest.json": b"of another"}
    assert not (folder.path / "manifest.json").exists()


# ------------------------------------------------------------------------ stores and bundles


@pytest.fixture
def workdir(add_mlflow_db: AddMlflowDb, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The working directory, with an empty mlflow.db."""
    monkeypatch.chdir(add_mlflow_db(tmp_path))
    return tmp_path


@pytest.fixture(scope="module")
def few(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 images of two classes."""
    folder = tmp_path_factory.mktemp("few")
    for name in ("baskets", "beads"):
        (folder / name).mkdir()
        for photo in sorted(image_folder.glob(f"*/{name}/*.jpg"))[:24]:
            shutil.copy(photo, folder / name / f"{photo.parent.parent.name}-{photo.name}")
    return folder


def test_store_in_a_bucket_has_the_bytes_of_one_on_a_disk(
    bucket: Any, proxy: FaultyProxy, few: Path, command: Command, workdir: Path
) -> None:
    address = f"s3://{bucket.name}/store"
    command("precompute", few, "store", *PRECOMPUTE)
    rules = [
        once("503", "PUT", "/digests/"),
        once("cut upload", "PUT", "/shards/"),
        once("cut answer", "PUT", "/manifest.json"),
        once("slow", "GET", "list-type=2"),
    ]
    proxy.rule = lambda method, path: next(filter(None, (r(method, path) for r in rules)), "")
    result = command("precompute", few, address, *PRECOMPUTE)
    assert result["store"] == address and str(workdir) not in command.stderr
    assert {fault for *_, fault in proxy.done} == {"", "503", "cut upload", "cut answer", "slow"}
    assert contents(bucket, "store") == files(workdir / "store")
    assert command("features", "info", address)["features"] == 48
    # A damaged object is found, although the copy here is intact.
    shard = next(key for key in contents(bucket, "store") if key.startswith("shards/"))
    bucket.put_object(Key=f"store/{shard}", Body=b"damaged")
    assert f"{address}/{shard}" in str(command("features", "verify", address, code=4))


@pytest.mark.slow
def test_training_from_a_bucket_to_a_bucket_gives_the_bundle_of_a_disk(
    bucket: Any,
    proxy: FaultyProxy,
    few: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    workdir: Path,
    with_reports: None,
) -> None:
    address, bundle = f"s3://{bucket.name}/store", f"s3://{bucket.name}/bundle"
    command("precompute", few, "store", *PRECOMPUTE)
    for name, data in files(workdir / "store").items():
        bucket.put_object(Key=f"store/{name}", Body=data)
    proxy.rule = once("cut download", "GET", "/shards/")
    result = command("train", address, bundle, "--no-report", "--workers", "0")
    assert (result["bundle"], result["store"]) == (bundle, address)
    command("train", "store", "bundle", "--no-report", "--workers", "0")
    ours, theirs = contents(bucket, "bundle"), files(workdir / "bundle")
    assert ours.keys() == theirs.keys()
    assert ours["weights.safetensors"] == theirs["weights.safetensors"]
    # Again from another machine, with nothing in its cache: the bundle is replaced, and kept.
    monkeypatch.setenv("ARROWHEAD_CACHE_DIR", str(workdir / "another machine"))
    command("train", address, bundle, "--seed", "1", "--epochs", "3", "--workers", "0")
    assert "replaces the bundle" in command.stderr
    assert contents(bucket, "bundle.previous") == ours
    assert {"report.html", "report.json"} <= contents(bucket, "bundle.report").keys()
    command("bundle", "verify", bundle)


@pytest.mark.slow
def test_every_result_of_a_bundle_or_store_can_be_written_to_an_address(
    bucket: Any, few: Path, command: Command, make_bundle: MakeBundle, workdir: Path
) -> None:
    pytest.importorskip("onnx")
    root, bundle = f"s3://{bucket.name}/x", make_bundle()
    exported = command("export", bundle, f"{root}/model.onnx")
    assert exported["file"] == f"{root}/model.onnx" and exported["files"] == [exported["file"]]
    command("export", bundle, "model.onnx")
    assert contents(bucket, "x").keys() == {"model.onnx"}
    for _ in range(2):  # the second one replaces the first
        command("publish", bundle, f"{root}/published")
    assert {"arrowhead.json", "README.md", "bundle/bundle.json"} <= contents(
        bucket, "x/published"
    ).keys()
    command("score", f"{root}/published/bundle", few, f"{root}/scores", "--workers", "0")
    command("precompute", few, f"{root}/store", *PRECOMPUTE, "--unlabelled")
    photo = next(few.rglob("*.jpg"))
    csv, page = f"{root}/similar.csv", f"{root}/similar.html"
    found = command("search", f"{root}/store", photo, "--csv", csv, "--out", page)
    assert found["files"] == [csv, page]
    suggest = ["suggest", f"{root}/store", "--count", "4", "--out", f"{root}/label.csv"]
    assert command(*suggest)["files"] == [f"{root}/label.csv"]
    # What was filled in on another machine is kept.
    table = bucket.Object("x/label.csv").get()["Body"].read().decode("utf-8-sig").splitlines()
    bucket.put_object(Key="x/label.csv", Body="\n".join([table[0], table[1] + "cat"]).encode())
    assert command(*suggest)["counts"]["kept"] == 1
    assert {"similar.csv", "similar.html", "label.csv"} <= contents(bucket, "x").keys()
    with pytest.raises(AssertionError, match="writes it to a disk only"):
        command("finetune", few, f"{root}/tuned")


@pytest.mark.slow
def test_learner_writes_to_and_loads_from_addresses(
    bucket: Any, few: Path, monkeypatch: pytest.MonkeyPatch, workdir: Path
) -> None:
    root = f"s3://{bucket.name}/python"
    images = Images.from_folder(few)
    settings: dict[str, Any] = {"weights": "random", "size": 32, "store": f"{root}/store"}
    learn = Learner("shufflenet_v2_x0_5", images, **settings)
    learn.fit(0.01, 1)
    learn.save(f"{root}/bundle")
    assert {"store/manifest.json", "bundle/bundle.json"} <= contents(bucket, "python").keys()
    monkeypatch.setenv("ARROWHEAD_CACHE_DIR", str(workdir / "another machine"))
    classifier = Learner.load(f"{root}/bundle")
    (answer,) = classifier.predict(next(few.rglob("*.jpg")))  # type: ignore[arg-type]
    classifier.close()
    assert answer.label in images.classes
    with pytest.raises(ConfigError, match=f"no bundle at {root}/nothing|{root}/nothing"):
        Learner.load(f"{root}/nothing")


@pytest.mark.slow
def test_race_in_a_bucket_is_continued_by_another_machine(
    bucket: Any,
    few: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    workdir: Path,
) -> None:
    out = f"s3://{bucket.name}/race"
    bodies = "shufflenet_v2_x0_5=random,mnasnet0_5=random"
    race = ["race", few, out, "--bodies", bodies, "--size", "32", "--share", "1", "--workers", "0"]
    first = command(*race)
    assert f"{out}/race.json" in first["files"]
    assert json.loads(contents(bucket, "race")["race.json"])["verdict"] == first["verdict"]
    monkeypatch.setenv("ARROWHEAD_CACHE_DIR", str(workdir / "another machine"))
    assert command(*race)["bodies"] == first["bodies"]


@pytest.mark.slow
def test_bundle_being_replaced_is_the_old_one_or_the_new_one(
    bucket: Any, proxy: FaultyProxy, make_bundle: MakeBundle, tmp_path: Path
) -> None:
    """The store refuses every write from one on, as if the writer was killed there."""
    address = f"s3://{bucket.name}/bundle"
    folder = mirrors.mirror_of(address)
    old, new = (make_bundle(head) for head in ("linear", "lesson"))
    found = []
    for writes in range(8):
        bucket.objects.all().delete()
        for name, data in files(old).items():
            bucket.put_object(Key=f"bundle/{name}", Body=data)
        shutil.rmtree(folder, ignore_errors=True)
        remote_folder.check_output(Path(address), "bundle")
        resolve.refresh_mirror(folder)
        assert files(folder) == files(old)
        shutil.rmtree(folder)
        shutil.copytree(new, folder)
        left = [True] * writes

        proxy.rule = lambda method, path, left=left: (
            "403" if method == "PUT" and not (left and left.pop()) else ""
        )
        hashes = json.loads((new / "bundle.json").read_text())["sha256"]
        with suppress(ConfigError):
            remote_folder.of(folder).publish("bundle.json", hashes)
        proxy.rule = lambda method, path: ""
        read = files(resolve.bundle_folder(address, TrackingConfig(), tmp_path / str(writes)))
        found.append(read == files(new))
        assert found[-1] or read == files(old)
    assert not found[0] and found[-1] and sorted(found) == found
    assert contents(bucket, "bundle") == files(new)


@pytest.mark.slow
def test_killed_extraction_is_continued_by_two_workers_on_another_machine(
    bucket: Any,
    proxy: FaultyProxy,
    few: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    workdir: Path,
) -> None:
    address = f"s3://{bucket.name}/store"
    command("precompute", few, "store", *PRECOMPUTE)
    shards = {name for name in files(workdir / "store") if name.startswith("shards/")}
    # From the second shard on the store takes ten seconds for each: time to kill the command.
    seen: list[str] = []

    def rule(method: str, path: str) -> str:
        if method == "PUT" and "/shards/" in path:
            seen.append(path)
            time.sleep(10 * (len(seen) > 1))
        return ""

    proxy.rule = rule
    words = [sys.executable, "-m", "arrowhead", "precompute", str(few), address, *PRECOMPUTE]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as process:
        while len(seen) < 2:
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
    proxy.rule = lambda method, path: ""
    done = {name for name in contents(bucket, "store") if name.startswith("shards/")}
    assert 0 < len(done) < len(shards) and "manifest.json" not in contents(bucket, "store")
    monkeypatch.setenv("ARROWHEAD_CACHE_DIR", str(workdir / "another machine"))
    result = command("precompute", few, address, *PRECOMPUTE[:-2], "--workers", "2")
    assert result["counts"]["skipped"] > 0 < result["counts"]["decoded"]
    assert contents(bucket, "store") == files(workdir / "store")


@pytest.mark.slow
def test_scores_in_a_bucket_equal_those_on_a_disk_and_are_continued(
    bucket: Any,
    proxy: FaultyProxy,
    few: Path,
    make_bundle: MakeBundle,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    workdir: Path,
) -> None:
    bundle, out = f"s3://{bucket.name}/bundle", f"s3://{bucket.name}/scores"
    saved = make_bundle("linear")
    for name, data in files(saved).items():
        bucket.put_object(Key=f"bundle/{name}", Body=data)
    score = ["--chunk-size", "16", "--workers", "0"]
    command("score", saved, few, "scores", *score)
    proxy.rule = lambda method, path: "403" if "/parts/part-000001" in path else ""
    with pytest.raises(SystemExit) as ended:
        main(["score", bundle, str(few), out, *score])
    refusal = capsys.readouterr().err
    assert ended.value.code == 2 and "access is denied" in refusal
    assert f"{out}/parts/part-000001" in refusal
    assert "score.json" not in contents(bucket, "scores")
    proxy.rule = once("cut upload", "PUT", "/parts/")
    monkeypatch.setenv("ARROWHEAD_CACHE_DIR", str(workdir / "another machine"))
    result = command("score", bundle, few, out, *score)
    assert result["counts"]["skipped"] > 0 and result["out"] == out
    ours, theirs = contents(bucket, "scores"), files(workdir / "scores")
    for name in [name for name in theirs if name.startswith("parts/")] + ["inputs.arrow"]:
        assert ours[name] == theirs[name]
    assert command("scores", "verify", out)["problems"] == []
    bucket.put_object(Key="scores/parts/part-000000.parquet", Body=b"damaged")
    command("scores", "verify", out, code=4)
    result = command("evaluate", bundle, few, f"s3://{bucket.name}/evaluation", "--workers", "0")
    assert "evaluation.json" in contents(bucket, "evaluation") and result["metrics"]


def test_model_of_mlflow_is_no_address_of_an_object_store(
    bucket: Any, few: Path, capsys: pytest.CaptureFixture[str], workdir: Path
) -> None:
    with pytest.raises(SystemExit):
        main(["score", "models:/none@champion", str(few), f"s3://{bucket.name}/x", "--workers=0"])
    assert "No model is registered as none" in capsys.readouterr().err


def test_mirrors_stay_below_their_limit_and_those_in_use_stay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ARROWHEAD_CACHE_DIR", str(tmp_path))
    old, new, used = (mirrors.mirror_of(f"s3://bucket/{name}") for name in ("old", "new", "used"))
    for age, folder in ((1, old), (0, new), (2, used)):
        (folder / "shards").mkdir(parents=True)
        (folder / "shards" / "one.arrow").write_bytes(bytes(1000))
        mark = mirror_space.mark_of(folder)
        mark.parent.mkdir(parents=True)
        mark.touch()
        os.utime(mark, (1e9 - age, 1e9 - age))
    mirror_space.hold(used)
    os.utime(mirror_space.mark_of(used), (1, 1))
    monkeypatch.setenv("ARROWHEAD_MIRROR_GB", str(2000 / 1e9))
    mirror_space.make_room()
    here = [folder for folder in (old, new, used) if (folder / "shards" / "one.arrow").exists()]
    assert here == [new, used]
