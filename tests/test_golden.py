"""Golden images: a store keeps a few photos, so it suffices to train, score and export."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from pathlib import Path

import pytest

from arrowhead import fileio
from arrowhead.bundle import format as bundle_format
from arrowhead.cli.main import main
from arrowhead.features import catalog_file, inspect
from arrowhead.features.store import Store
from arrowhead.inference.predictor import Predictor

WRITTEN_BEFORE = Path(__file__).parent / "written_before"
BODY = ["--body", "shufflenet_v2_x0_5", "--weights", "random", "--size", 64]
TRAIN = ["--epochs", 2, "--rate", 0.01]


@pytest.fixture(scope="module")
def original(tmp_path_factory, add_mlflow_db) -> Path:
    """A folder with photos and their feature store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(add_mlflow_db(tmp_path_factory.mktemp("made")))
        shutil.copytree(WRITTEN_BEFORE / "images", "photos")
        with pytest.raises(SystemExit) as exit_info:
            main(["precompute", "photos", "store", *map(str, BODY)])
        assert exit_info.value.code == 0
        return Path.cwd()


@pytest.fixture
def workdir(original, tmp_path, monkeypatch) -> Path:
    """A copy of the folder, as the working directory."""
    shutil.copytree(original, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def read_photos(folder: Path) -> set[bytes]:
    return {file.read_bytes() for file in folder.rglob("*.jpg")}


def test_a_store_without_its_photos_suffices_to_train_score_and_export(workdir, command):
    shutil.copytree("photos/valid", "new")
    photo_bytes = read_photos(Path("photos"))
    shutil.rmtree("photos")
    command("train", "store", "bundle", *TRAIN)
    golden = bundle_format.load(Path("bundle")).golden
    assert len(golden) == 6  # as many as there are validation images
    assert {one.data for one in golden} <= photo_bytes
    result = command("score", "bundle", "new", "scores")
    assert (result["drift"]["images"], result["drift"]["changed"]) == (6, 0)
    assert command("export", "bundle", "model.onnx")["images"] == 6


def test_the_choice_of_golden_images_depends_only_on_their_content(workdir, command):
    first = Store(workdir / "store").manifest()["golden"]
    assert len(first) == 18  # four of a class in each part, or as many as there are
    for number, file in enumerate(sorted(Path("photos").rglob("*.jpg"), reverse=True)):
        file.rename(file.with_name(f"{number}.jpg"))
    command("precompute", "photos", "again", *BODY)
    assert Store(workdir / "again").manifest()["golden"] == first
    for name in first:
        data = Store(workdir / "again").golden_path(name).read_bytes()
        assert hashlib.blake2b(data, digest_size=16).hexdigest() == name


def test_for_a_store_without_golden_images_unchanged_photos_are_used(workdir, command):
    """As version 0.1.0 wrote it. One photo changed, with size and time as they were."""
    shutil.copytree(WRITTEN_BEFORE / "store", "old")
    catalog = Store(workdir / "old").read_catalog()
    shutil.copytree(WRITTEN_BEFORE / "images", "images")
    for path, stamp in zip(catalog["paths"], catalog["stamps"], strict=True):
        os.utime(Path("images") / path, ns=(int(stamp), int(stamp)))
    valid = [path for path in catalog["paths"] if path.startswith("valid/")]
    changed = Path("images") / valid[0]
    status, data = changed.stat(), bytearray(changed.read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    os.utime(changed, ns=(status.st_mtime_ns, status.st_mtime_ns))
    catalog_file.write_catalog(workdir / "moved.arrow", catalog | {"root": str(workdir / "images")})
    digest = fileio.sha256(workdir / "moved.arrow")
    manifest = Store(workdir / "old").manifest()
    manifest["catalog"] |= {"name": f"catalog-{digest[:16]}.arrow", "sha256": digest}
    shutil.move("moved.arrow", workdir / "old" / manifest["catalog"]["name"])
    fileio.write_sealed(workdir / "old" / "manifest.json", manifest)
    command("train", "old", "bundle", *TRAIN)
    golden = {one.data for one in bundle_format.load(Path("bundle")).golden}
    assert golden == {(Path("images") / path).read_bytes() for path in valid[1:]}


def test_with_no_golden_images_no_photo_is_copied_and_this_is_reported(workdir, command, capsys):
    command("train", "store", "none", *TRAIN, "--no-golden-images")
    assert bundle_format.load(Path("none")).golden == []
    command("precompute", "photos", "store", *BODY, "--no-golden-images")
    assert list(Path("store/golden").iterdir()) == []
    assert Store(workdir / "store").load_golden() == {}
    command("train", "store", "bundle", *TRAIN)
    assert "No golden images" in command.stderr
    photo_bytes = read_photos(Path("photos"))
    for folder in ("store", "bundle", "none"):
        assert not [
            f for f in Path(folder).rglob("*") if f.is_file() and f.read_bytes() in photo_bytes
        ]
    result = command("score", "bundle", "photos", "scores")
    assert result["drift"]["images"] == 0
    assert "has no golden images" in command.stderr
    with pytest.raises(SystemExit) as exit_info:
        main(["bundle", "verify", "bundle"])
    assert exit_info.value.code == 0
    assert "has no golden images" in capsys.readouterr().out


def test_a_damaged_golden_image_is_detected_and_a_missing_one_is_permitted(workdir, command):
    names = Store(workdir / "store").manifest()["golden"]
    damaged, missing = (Store(workdir / "store").golden_path(name) for name in names[:2])
    damaged.write_bytes(damaged.read_bytes() + b"\0")
    missing.unlink()
    assert [(one.kind, Path(one.path)) for one in inspect.verify(workdir / "store")] == [
        ("changed", damaged)
    ]
    command("train", "store", "bundle", *TRAIN)
    assert len(bundle_format.load(Path("bundle")).golden) == 4
    damaged.unlink()
    command("precompute", "photos", "store", *BODY)  # both are copied again
    assert not any(one.damage for one in inspect.verify(workdir / "store"))
    assert Store(workdir / "store").manifest()["golden"] == names


def test_a_predictor_warns_if_a_bundle_without_golden_images_cannot_be_verified(
    make_bundle, tmp_path
):
    bare = dataclasses.replace(bundle_format.load(make_bundle()), golden=[])
    bundle_format.save(bare, tmp_path / "bare")
    with pytest.warns(UserWarning, match="has no golden images"):
        Predictor(tmp_path / "bare").close()
