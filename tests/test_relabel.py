"""Corrected labels: no image is decoded, they stay when images are listed again, can be undone."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from arrowhead import ConfigError, DataError, spreadsheet
from arrowhead.commands import finetune
from arrowhead.commands import train as commands_train
from arrowhead.data import label_fixes, splits
from arrowhead.data.catalog import Catalog
from arrowhead.features import corrections, inspect
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.corrections import Correction
from arrowhead.features.store import Store
from arrowhead.training.config import TrainConfig
from arrowhead.training.study import Study

FLAGS = ["--body", "resnet18", "--weights", "random", "--size", "64", "--chunk-size", "16"]
Fix = Callable[..., Path]


@pytest.fixture(scope="module", autouse=True)
def _shared_tracking_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One MLflow store for all tests here, because creating its schema takes seconds."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("tracking") / "mlflow.db"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}")
        yield


@pytest.fixture(scope="module")
def original(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ (class folders without splits) and the finished store/ of them."""
    from arrowhead.cli.main import main

    folder = tmp_path_factory.mktemp("original")
    for number, photo in enumerate(sorted((image_folder / "train").rglob("*.jpg"))):
        target = folder / "data" / photo.parent.name / f"{number:02}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(photo, target)
    beads = sorted((folder / "data" / "beads").iterdir())
    shutil.copy2(beads[-1], folder / "data" / "leaves" / "copy.jpg")
    with pytest.raises(SystemExit) as exit_info:
        main(["precompute", str(folder / "data"), str(folder / "store"), *FLAGS])
    assert exit_info.value.code == 0
    return folder


@pytest.fixture
def data(original: Path, tmp_path: Path) -> Path:
    """A copy of the images, to be changed."""
    shutil.copytree(original / "data", tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def store(original: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the store, in the current folder; its root is that of the copied images."""
    weights = "body.safetensors"  # large, and nothing here changes them
    shutil.copytree(original / "store", tmp_path / "store", ignore=shutil.ignore_patterns(weights))
    os.link(original / "store" / weights, tmp_path / "store" / weights)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "store"


@pytest.fixture
def fix(tmp_path: Path) -> Fix:
    """A function that writes a table of new labels: `fix({path: label})`."""

    def write(labels: dict[str, str], *, header: str = "path,new_label") -> Path:
        with spreadsheet.open_csv(tmp_path / "fixes.csv", header.split(",")) as table:
            for path, label in labels.items():
                table.row([path, label])
        return tmp_path / "fixes.csv"

    return write


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """A function that runs a command that is refused; returns what it says, in one line."""

    def run(*args: object, code: int = 2) -> str:
        from arrowhead.cli.main import main

        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main([*map(str, args)])
        said = capsys.readouterr().err
        assert exit_info.value.code == code, said
        return " ".join(said.split())

    return run


def labels(store: Path) -> dict[str, str]:
    catalog = Catalog(**Store(store).read_catalog())
    return {
        path: "|".join(names) for path, names in zip(catalog.paths, catalog.labels, strict=True)
    }


def split_by_content(store: Path) -> dict[bytes, str]:
    catalog = Catalog(**Store(store).read_catalog())
    image_ids, _ = corrections.image_ids_and_faults(Store(store))
    return dict(zip(image_ids, catalog.splits, strict=True))


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def train_paths(store: Path, name: str) -> list[str]:
    """Paths of the training images of a class; none has a copy."""
    catalog = Catalog(**Store(store).read_catalog())
    rows = zip(catalog.paths, catalog.labels, catalog.splits, strict=True)
    found = [path for path, names, split in rows if names == (name,) and split == "train"]
    return [path for path in found if not path.endswith(("copy.jpg", "beads/47.jpg"))]


def copies(store: Path) -> list[str]:
    """The paths of the image that is in beads/ and in leaves/."""
    image_ids, _ = corrections.image_ids_and_faults(Store(store))
    paths = Catalog(**Store(store).read_catalog()).paths
    return [path for path, one in zip(paths, image_ids, strict=True) if image_ids.count(one) > 1]


# ------------------------------------------------------------------------------ relabel


def test_labels_change_and_neither_features_nor_splits(store, command, fix):
    before, files, split = labels(store), contents(store / "shards"), split_by_content(store)
    first, second = train_paths(store, "beads")[:2]
    result = command("relabel", store, fix({first: "leaves", second: "baskets"}), "--by", "Ada")
    assert labels(store) == before | {first: "leaves", second: "baskets"}
    assert contents(store / "shards") == files
    assert split_by_content(store) == split
    assert (result["labels"], result["change"], result["by"]) == (2, 1, "Ada")
    assert result["moves"] == {"beads -> baskets": 1, "beads -> leaves": 1}
    assert not [one for one in inspect.verify(store) if one.damage]


def test_fine_tuning_keeps_a_store_whose_labels_were_corrected(store, command, fix, tmp_path):
    out = tmp_path / "tuned"
    for name in ("store", "store.tuned"):
        shutil.copytree(store, out / name)
    command("relabel", out / "store.tuned", fix({train_paths(store, "beads")[0]: "leaves"}))
    changed = labels(out / "store.tuned")
    recipe = dataclasses.replace(Store(store).recipe, size=96)
    body = BodyConfig(body=recipe.body, weights=str(store / "body.safetensors"))
    for _ in range(2):
        assert finetune.tuned_store(out / "store", body, recipe) == out / "store.tuned"
    assert sorted(path.name for path in out.iterdir()) == ["store", "store.tuned.corrected"]
    assert labels(out / "store.tuned.corrected") == changed


def test_same_table_again_changes_nothing(store, command, fix):
    table = fix({train_paths(store, "beads")[0]: "leaves"})
    command("relabel", store, table)
    manifest = (store / "manifest.json").read_bytes()
    result = command("relabel", store, table)
    assert (result["labels"], result["unchanged"], result["change"]) == (0, 1, None)
    assert (store / "manifest.json").read_bytes() == manifest


def test_only_rows_of_the_table_count_as_unchanged(store, command, fix):
    in_beads, in_leaves = copies(store)
    result = command("relabel", store, fix({in_beads: "leaves"}))  # its copy has this label
    assert (result["labels"], result["unchanged"]) == (1, 0)
    assert command("relabel", store, fix({in_leaves: "leaves"}))["unchanged"] == 1


def test_history_says_who_when_and_why(store, command, fix):
    first, second = train_paths(store, "beads")[:2]
    command("relabel", store, fix({first: "leaves"}), "--by", "Ada", "--reason", "a leaf")
    path = store.parent / "reasons.csv"
    path.write_text(f"path,new_label,reason\n{second},leaves,green\n")
    command("relabel", store, path, "--by", "Bob", "--reason", "unused")
    history = corrections.read_history(Store(store))
    assert [(one.path, one.by, one.reason, one.old, one.new) for one in history] == [
        (first, "Ada", "a leaf", ("beads",), ("leaves",)),
        (second, "Bob", "green", ("beads",), ("leaves",)),
    ]
    assert all(one.when.endswith("Z") and len(one.when) == 20 for one in history)
    shown = command("relabel", store, "--history")
    assert [one["change"] for one in shown["changes"]] == [1, 2]
    assert inspect.info(store)["corrections"] == {"labels": 2, "changes": [1, 2]}


def test_dry_run_writes_nothing(store, command, fix):
    files = contents(store)
    result = command("relabel", store, fix({train_paths(store, "beads")[0]: "leaves"}), "--dry-run")
    assert result["labels"] == 1
    assert contents(store) == files


def test_class_can_be_renamed_and_the_old_one_vanishes(store, command, fix):
    rename = {path: "stones" for path, label in labels(store).items() if label == "beads"}
    result = command("relabel", store, fix(rename), "--new-classes", "--no-copies")
    assert Store(store).manifest()["classes"] == ["baskets", "leaves", "stones"]
    assert (result["new_classes"], result["gone_classes"]) == (["stones"], ["beads"])
    assert "beads is no class any more" in command.stderr


def test_copies_are_relabelled_together_unless_asked_not_to(store, command, fix):
    in_beads, in_leaves = copies(store)
    result = command("relabel", store, fix({in_beads: "baskets"}))
    assert (labels(store)[in_beads], labels(store)[in_leaves]) == ("baskets", "baskets")
    assert result["copies"] == 1
    assert "--no-copies" in command.stderr
    command("relabel", store, "--undo")
    command("relabel", store, fix({in_beads: "baskets"}), "--no-copies")
    assert (labels(store)[in_beads], labels(store)[in_leaves]) == ("baskets", "leaves")
    command("precompute", store.parent / "data", store)
    assert (labels(store)[in_beads], labels(store)[in_leaves]) == ("baskets", "leaves")


def test_copies_that_contradict_each_other_are_put_right_and_split_as_before(
    store, data, command, fix
):
    in_beads, in_leaves = copies(store)
    split = split_by_content(store)
    command("relabel", store, fix({in_leaves: "beads"}))
    assert (labels(store)[in_beads], labels(store)[in_leaves]) == ("beads", "beads")
    assert command("relabel", store, "--history")["changes"][0]["labels"] == 1
    command("precompute", data, store)
    assert (labels(store)[in_beads], labels(store)[in_leaves]) == ("beads", "beads")
    assert split_by_content(store) == split
    assert "1 label is a correction" in command.stderr


def test_suggestions_can_all_be_taken(store, command, fix):
    path = train_paths(store, "beads")[0]
    table = fix({path: "leaves"}, header="path,suggested")
    assert command("relabel", store, table, "--column", "suggested")["labels"] == 1


# --------------------------------------------------------- images that are listed again


def test_corrections_and_splits_stay_when_images_are_listed_again(store, data, command, fix):
    split, fixes = split_by_content(store), {}
    for name, other in (("beads", "leaves"), ("leaves", "baskets"), ("baskets", "beads")):
        valid = [path for path, label in labels(store).items() if label == name]
        fixes |= dict.fromkeys([*train_paths(store, name)[:5], valid[0]], other)
    command("relabel", store, fix(fixes))
    relabelled = labels(store)
    result = command("precompute", data, store)
    assert result["counts"]["decoded"] == 0
    assert labels(store) == relabelled
    assert split_by_content(store) == split
    assert f"{len(fixes)} labels are corrections (arrowhead relabel" in command.stderr


def test_corrected_file_in_its_right_folder_agrees_and_moves_no_image_between_splits(
    store, data, command, fix
):
    split = split_by_content(store)
    moved = train_paths(store, "beads")[:6]
    command("relabel", store, fix(dict.fromkeys(moved, "leaves")))
    for path in moved:
        (data / path).rename(data / "leaves" / f"was-{Path(path).name}")
    command("precompute", data, store)
    assert all(labels(store)[f"leaves/was-{Path(path).name}"] == "leaves" for path in moved)
    assert "are corrections" not in command.stderr
    assert split_by_content(store) == split


def test_third_label_of_the_source_wins_and_is_said(store, data, command, fix):
    path = train_paths(store, "beads")[0]
    command("relabel", store, fix({path: "leaves"}))
    (data / path).rename(data / "baskets" / "third.jpg")
    command("precompute", data, store)
    assert labels(store)["baskets/third.jpg"] == "baskets"
    assert "baskets/third.jpg (corrected from beads to leaves, now baskets)" in command.stderr
    (data / "baskets" / "third.jpg").rename(data / path)  # back: the correction holds again
    command("precompute", data, store)
    assert labels(store)[path] == "leaves"


def test_correction_follows_a_renamed_file_and_leaves_another_image_alone(
    store, data, command, fix
):
    first, second = train_paths(store, "beads")[:2]
    command("relabel", store, fix({first: "leaves", second: "leaves"}))
    (data / first).rename(data / "beads" / "renamed.jpg")
    shutil.copy(data / "baskets" / "00.jpg", data / second)
    command("precompute", data, store)
    assert labels(store)["beads/renamed.jpg"] == "leaves"
    assert labels(store)[second] == "beads"
    assert (
        f"1 file with a corrected label is another image now; the label of the source is used: "
        f"{second}" in command.stderr
    )


def test_new_class_keeps_an_image_in_train_when_others_are_added(store, data, command, fix):
    path = train_paths(store, "beads")[0]
    command("relabel", store, fix({path: "fox"}), "--new-classes")
    for other in train_paths(store, "beads"):  # now the only one that could be drawn from
        (data / other).unlink()
    command("precompute", data, store)
    catalog = Catalog(**Store(store).read_catalog())
    assert catalog.splits[catalog.paths.index(path)] == "train"


def test_drawn_split_keeps_every_needed_label_in_train():
    ids = [bytes([n]) * 16 for n in range(4)]
    catalog = Catalog(
        root="/",
        paths=[*"abcd"],
        sizes=[1] * 4,
        stamps=[1] * 4,
        labels=[("x",)] * 4,
        splits=[""] * 4,
    )
    assert splits.draw_splits(catalog, ids, 0.25).splits == ["valid", "train", "train", "train"]
    needed = [("y",), ("x",), ("x",), ("x",)]
    result = splits.draw_splits(catalog, ids, 0.25, trained_labels=needed)
    assert result.splits == ["train"] * 4


# --------------------------------------------------------------------------------- undo


def test_changes_are_undone_one_by_one(store, command, fix, refuse):
    before = labels(store)
    path, other = train_paths(store, "beads")[:2]
    command("relabel", store, fix({path: "leaves"}))
    between = labels(store)
    command("relabel", store, fix({path: "baskets", other: "leaves"}))
    command("relabel", store, "--undo", "--by", "Eve")
    assert labels(store) == between
    command("relabel", store, "--undo")
    assert labels(store) == before
    assert "no correction left to undo" in refuse("relabel", store, "--undo")
    assert [one.undone_by for one in corrections.read_history(Store(store)) if one.change == 2] == [
        "Eve",
        "Eve",
    ]
    command("precompute", store.parent / "data", store)
    assert labels(store) == before


def test_undo_gives_what_the_source_says_today(store, data, command, fix):
    path = train_paths(store, "beads")[0]
    command("relabel", store, fix({path: "leaves"}))
    (data / path).rename(data / "leaves" / "moved.jpg")
    command("precompute", data, store)
    command("relabel", store, "--undo")
    assert labels(store)["leaves/moved.jpg"] == "leaves"
    undone = labels(store)
    command("precompute", data, store)
    assert labels(store) == undone


def test_any_order_of_corrections_gives_what_was_asked_and_undoes_exactly():
    generator = random.Random(5)
    for _ in range(300):
        count, classes = generator.randint(1, 4), [("a",), ("b",), ("c",)]
        catalog = Catalog(
            root="/",
            paths=[f"{n}" for n in range(count)],
            sizes=[0] * count,
            stamps=[0] * count,
            labels=[generator.choice(classes) for _ in range(count)],
            splits=["train"] * count,
        )
        image_ids = [bytes([generator.randint(0, 1)]) * 16 for _ in range(count)]
        history: list[Correction] = []
        states = [catalog.labels]
        for change in range(1, 5):
            row, to = generator.randrange(count), generator.choice(classes)
            with_copies = generator.random() < 0.5
            rows = [n for n in range(count) if with_copies and image_ids[n] == image_ids[row]]
            now = states[-1]
            history += [
                Correction(
                    change=change,
                    when="",
                    by="",
                    reason="",
                    path=catalog.paths[n],
                    image_id=image_ids[n],
                    old=now[n],
                    new=to,
                    copies=with_copies,
                )
                for n in sorted({row, *rows})
                if now[n] != to or any(now[m] != to for m in rows)
            ]
            states.append(corrections.correct_labels(catalog, image_ids, history).labels)
            changed = {row, *rows}
            assert states[-1] == [to if n in changed else now[n] for n in range(count)]
        for change in range(4, -1, -1):
            kept = [one for one in history if one.change <= change]
            result = corrections.correct_labels(catalog, image_ids, kept)
            assert result.labels == states[change]
            assert result.before == catalog.labels


# ------------------------------------------------------------------------------ refusals


def test_unknown_paths_are_refused_with_the_closest(store, fix, refuse):
    files = contents(store)
    path = train_paths(store, "beads")[0]
    said = refuse("relabel", store, fix({path: "leaves", f"photos/{path}": "leaves"}))
    assert f"line 3: photos/{path} (in the store: {path}" in said
    assert contents(store) == files


def test_table_of_another_store_is_refused_as_such(store, fix, refuse):
    said = refuse("relabel", store, fix({"cats/1.jpg": "leaves"}))
    assert "none of the 1 image that" in said
    assert str(store.parent / "data") in said or "the store holds images of" in said


def test_the_only_label_of_an_image_cannot_be_taken_away(store, fix, refuse):
    path, before = train_paths(store, "beads")[0], labels(store)
    for empty in ("[]", "{ }"):
        said = refuse("relabel", store, fix({path: empty}))
        assert "gives no label in line 2, where each image of the store has one" in said
    assert labels(store) == before


def test_images_of_another_folder_are_announced_before_they_replace_those_of_a_store(
    store, data, command
):
    other = data.with_name("other")
    shutil.copytree(data, other)
    first = next(other.glob("beads/*.jpg"))
    first.unlink()
    result = command("precompute", other, store)
    said = command.stderr
    gone = f"of {other} replace them: 1 are not among these, such as beads/{first.name}"
    assert gone in said and said.index(gone) < said.index("decoded")
    assert result["counts"]["decoded"] == 0
    command("precompute", other, store)
    assert "replace them" not in command.stderr


def test_unknown_column_and_empty_tables_are_refused(store, fix, refuse):
    path = train_paths(store, "beads")[0]
    said = refuse("relabel", store, fix({path: "leaves"}, header="path,suggested"))
    assert "has no column new_label" in said
    assert "--column suggested" in said
    assert "column new_label is empty in all of them" in refuse("relabel", store, fix({path: ""}))
    assert "has no row below its header" in refuse("relabel", store, fix({}))


def test_misspelt_labels_are_refused_and_new_classes_need_a_flag(store, fix, refuse):
    path = train_paths(store, "beads")[0]
    said = refuse("relabel", store, fix({path: "Leaf"}))
    assert "'Leaf' in line 2 (did you mean 'leaves'?)" in said
    assert "--new-classes" in said
    said = refuse("relabel", store, fix({path: "Leaves"}), "--new-classes")
    assert "look alike: 'Leaves' and 'leaves'" in said


def test_rows_made_for_other_labels_are_refused_together(store, command, refuse):
    path, other = train_paths(store, "beads")[:2]
    table = store.parent / "old.csv"
    table.write_text(f"path,label,new_label\n{path},beads,leaves\n{other},baskets,leaves\n")
    said = refuse("relabel", store, table)
    assert f"line 3: {other} is beads, not baskets" in said
    assert labels(store)[path] == "beads"
    table.write_text(f"path,label,new_label\n{path},baskets,beads\n")  # has the new label already
    assert command("relabel", store, table)["unchanged"] == 1


def test_contradictions_are_refused(store, fix, refuse):
    in_beads, in_leaves = copies(store)
    said = refuse("relabel", store, fix({in_beads: "baskets", in_leaves: "leaves"}))
    assert "name copies of one image" in said
    assert "--no-copies" in said
    table = store.parent / "twice.csv"
    table.write_text(f"path,new_label\n{in_beads},baskets\n{in_beads},leaves\n")
    assert "lines 2 and 3 name the same image" in refuse("relabel", store, table)


def test_too_few_classes_are_refused(store, fix, refuse):
    everything = dict.fromkeys(labels(store), "beads")
    assert "the store has one class, beads" in refuse("relabel", store, fix(everything))
    catalog = Catalog(**Store(store).read_catalog())
    valid = catalog.paths[catalog.splits.index("valid")]
    said = refuse("relabel", store, fix({valid: "fox"}), "--new-classes")
    assert "no image of fox is in the training split" in said


def test_flags_of_another_action_are_refused(store, fix, refuse):
    assert "none was asked for" in refuse("relabel", store)
    assert "several were asked for" in refuse("relabel", store, "--undo", "--history")
    assert "--reason has no effect with --undo" in refuse(
        "relabel", store, "--undo", "--reason", "x"
    )


def test_store_that_is_being_written_is_refused(store, fix, refuse):
    with Store(store).lock():
        said = refuse("relabel", store, fix({train_paths(store, "beads")[0]: "leaves"}))
    assert "is being written by another Arrowhead command" in said


# -------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    "cell",
    ["a/=1.jpg", "'=1.jpg", "/data/a/=1.jpg", "a\\=1.jpg", " a/=1.jpg ", "./a/=1.jpg"],
)
def test_paths_are_found_as_people_write_them(cell):
    row_by_path = {"a/=1.jpg": 0, "=1.jpg": 0, "=2.jpg": 1}
    assert label_fixes.find_row(row_by_path, "/data", cell) == 0


def test_formula_escapes_are_undone_exactly():
    for text in ("=1", "-x", "'z", "''", "plain", "it's", " =1", "ü", ""):
        assert spreadsheet.original_text(spreadsheet.safe_cell(text)) == text
    assert spreadsheet.original_text("'quoted") == "'quoted"  # not an escape of ours
    row_by_path = {"'z.jpg": 3}
    assert label_fixes.find_row(row_by_path, "/data", "''z.jpg") == 3
    assert label_fixes.find_row(row_by_path, "/data", "'z.jpg") == 3


@pytest.mark.parametrize(
    ("name", "encoding", "delimiter"),
    [("a.csv", "utf-8-sig", ";"), ("a.csv", "utf-16", "\t"), ("a.tsv", "utf-8", "\t")],
)
def test_tables_are_read_as_spreadsheets_save_them(tmp_path, name, encoding, delimiter):
    with (tmp_path / name).open("w", encoding=encoding, newline="") as file:
        table = csv.writer(file, delimiter=delimiter)
        table.writerows([["Path", "Score", "New label"], ["a.jpg", "0,5", "cats"], ["b", "", ""]])
    fixes = label_fixes.read_fixes(tmp_path / name, "new_label")
    assert (fixes.paths, fixes.new, fixes.skipped) == (["a.jpg"], ["cats"], 1)


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("sun|sea", ("sea", "sun")),
        ("hot dog", ("hot dog",)),
        ("['sea', 'hot dog']", ("hot dog", "sea")),
        ("[]", ()),
        ("{ }", ()),
        ("a|b", ("a|b",)),
    ],
)
def test_several_labels_are_read_like_those_of_tables(tmp_path, cell, expected):
    (tmp_path / "a.csv").write_text(f'path,new_label\na.jpg,"{cell}"\n')
    fixes = label_fixes.read_fixes(tmp_path / "a.csv", "new_label")
    classes = ["sun", "sea", "hot dog", "a|b"]
    parse = label_fixes.label_parser(fixes, classes, multi=True, separator=None)
    assert parse(fixes.new[0]) == expected


def test_images_with_several_labels_are_relabelled(original, tmp_path, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = sorted((original / "data").rglob("[0-9]*.jpg"))[:24]
    rows = [f"{path},{path.parent.name}{'|dark' * (n % 2)}" for n, path in enumerate(photos)]
    (tmp_path / "tags.csv").write_text("\n".join(["path,tags", *rows]) + "\n")
    command("precompute", "tags.csv", "store", *FLAGS)
    paths = list(labels(tmp_path / "store"))
    (tmp_path / "fixes.csv").write_text(f"path,new_label\n{paths[0]},dark|baskets\n{paths[1]},[]\n")
    command("relabel", "store", "fixes.csv")
    command("precompute", "tags.csv", "store")
    assert [labels(tmp_path / "store")[path] for path in paths[:2]] == ["baskets|dark", ""]


# ------------------------------------------------------------------ files, kills, damage

# Forks, so that the imports are done once: child n is killed at its n-th call of the system.
KILLER = """
import os, shutil, signal, traceback
from pathlib import Path
import pyarrow
from arrowhead.commands import relabel
from arrowhead.commands.label_changes import TableConfig
from arrowhead.features import corrections_file, store
from arrowhead.reporting.run_context import SilentScreen

pyarrow.array([1])  # imports the rest

def count_down(name, left):
    original = getattr(os, name)
    def call(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if name != "fsync":  # slow; a killed process loses nothing that it has written
            return original(*args, **options)
    setattr(os, name, call)

status = None
for moment in range(1, 100):
    without = shutil.ignore_patterns("body.safetensors")  # large
    shutil.copytree("store", f"store{moment}", ignore=without)
    if os.fork() == 0:
        left = [moment]
        for name in ("replace", "fsync", "open"):
            count_down(name, left)
        try:
            change = relabel.ChangeConfig(by="x")
            relabel.relabel(
                Path(f"store{moment}"), "fixes.csv", TableConfig(), change, SilentScreen()
            )
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.wait()[1])
    print(status)
    if status == 0:
        break
"""


def test_kill_at_any_moment_leaves_labels_and_history_of_before_or_after(store, fix):
    path = train_paths(store, "beads")[0]
    fix({path: "leaves"})
    arguments = [sys.executable, "-P", "-c", KILLER]
    run = subprocess.run(arguments, check=True, capture_output=True, text=True)
    statuses = [int(line) for line in run.stdout.split()]
    assert statuses[-1] == 0, run.stderr
    assert set(statuses[:-1]) == {-signal.SIGKILL}, run.stderr
    seen = []
    for moment, status in enumerate(statuses, 1):
        left = Path(f"store{moment}")
        history = corrections.read_history(Store(left))
        assert labels(left)[path] == ("leaves" if history else "beads")
        Store(left).verify()
        catalog = Catalog(**Store(left).read_catalog())
        assert catalog.classes == Store(left).manifest()["classes"]
        seen.append((status == 0, bool(history)))
    assert set(seen) == {(False, False), (False, True), (True, True)}


def test_reader_with_the_manifest_of_before_keeps_its_labels(store, command, fix):
    reader = Store(store)
    before = reader.read_catalog()["labels"]
    manifest = reader.manifest()
    command("relabel", store, fix({train_paths(store, "beads")[0]: "leaves"}))
    old = (store / manifest["catalog"]["name"]).read_bytes()
    assert hashlib.sha256(old).hexdigest() == manifest["catalog"]["sha256"]
    assert reader.read_catalog()["labels"] != before


def test_history_survives_a_deleted_manifest_and_damage_is_found(store, data, command, fix, refuse):
    path = train_paths(store, "beads")[0]
    command("relabel", store, fix({path: "leaves"}))
    (store / "manifest.json").unlink()
    command("precompute", data, store)
    assert labels(store)[path] == "leaves"
    file = store / Store(store).manifest()["corrections"]["name"]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert [one.path for one in inspect.verify(store) if one.damage] == [str(file)]
    with pytest.raises(DataError, match="differs from the manifest"):
        corrections.read_history(Store(store))
    refuse("precompute", data, store, code=4)


def test_gc_removes_only_histories_of_before(store, command, fix):
    first, second = train_paths(store, "beads")[:2]
    command("relabel", store, fix({first: "leaves"}))
    command("relabel", store, fix({second: "leaves"}))
    assert len(list(store.glob("corrections-*.arrow"))) == 2
    inspect.gc(store, remove=True)
    assert [one.path for one in corrections.read_history(Store(store))] == [first, second]
    assert len(list(store.glob("corrections-*.arrow"))) == 1


# ------------------------------------------------------------------------------ training


def test_training_after_relabel_equals_training_on_a_corrected_table(
    original, tmp_path, command, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    photos = sorted((original / "data").rglob("[0-9]*.jpg"))
    right = {path: path.parent.name for path in photos}
    wrong = right | {path: "leaves" for path in photos if path.stem in ("01", "02", "03", "25")}

    def write(name: str, labels: dict[Path, str]) -> None:
        rows = [
            f"{path},{label},{'val' if n % 4 == 3 else 'train'}"
            for n, (path, label) in enumerate(labels.items())
        ]
        Path(name).write_text("\n".join(["path,label,split", *rows]) + "\n")

    write("right.csv", right)
    write("wrong.csv", wrong)
    expected = command("fit", "right.csv", "right", *FLAGS[:6])
    first = command("fit", "wrong.csv", "wrong", *FLAGS[:6])
    fixes = [f"{path},{label}" for path, label in right.items() if wrong[path] != label]
    Path("fixes.csv").write_text("\n".join(["path,new_label", *fixes]) + "\n")
    command("relabel", "wrong/store", "fixes.csv")
    result = command("train", "wrong/store", "wrong/bundle")
    assert result["metrics"] == expected["metrics"]
    assert result["metrics"] != first["metrics"]
    assert labels(Path("wrong/store")) == labels(Path("right/store"))
    lineage = json.loads(Path("wrong/bundle/bundle.json").read_text())["lineage"]
    assert lineage["corrections"] == [1]
    again = command("fit", "wrong.csv", "wrong", *FLAGS[:6])  # lists the wrong labels again
    assert again["metrics"] == expected["metrics"]


def test_labels_of_every_moment_can_be_told_for_the_same_images(store, data, command, fix):
    path, other = train_paths(store, "beads")[:2]
    command("relabel", store, fix({path: "leaves"}))
    command("relabel", store, fix({other: "baskets"}))
    (data / path).rename(data / "leaves" / "moved.jpg")
    command("precompute", data, store)
    paths = Store(store).read_catalog()["paths"]

    def at(changes: list[int]) -> list[tuple[str, ...]]:
        found = dict(zip(paths, corrections.labels_with(Store(store), changes), strict=True))
        return [found["leaves/moved.jpg"], found[other]]

    assert at([]) == [("beads",), ("beads",)]
    assert at([1]) == [("leaves",), ("beads",)]
    assert at([1, 2]) == [("leaves",), ("baskets",)]
    assert corrections.labels_with(Store(store), [1, 2]) == Store(store).read_catalog()["labels"]


def test_training_is_refused_if_labels_change_meanwhile(store, command, fix, monkeypatch):
    table, build = fix({train_paths(store, "beads")[0]: "leaves"}), commands_train.write_bundle

    def relabel_first(*args, **options):
        command("relabel", store, table)
        return build(*args, **options)

    monkeypatch.setattr(commands_train, "write_bundle", relabel_first)
    study = Study(head=TrainConfig(head="logistic"))
    with pytest.raises(ConfigError, match="were changed during the training"):
        commands_train.train_bundle(store, store.parent / "bundle", study, _context())
    assert not (store.parent / "bundle").exists()


def _context():
    from arrowhead.reporting.run_context import RunContext

    return RunContext()


def test_learner_uses_the_corrected_classes(store, data, command, fix):
    from arrowhead import Images, Learner

    command("relabel", store, fix({train_paths(store, "beads")[0]: "fox"}), "--new-classes")
    images = Images.from_folder(data)
    learn = Learner("resnet18", images, store=store, head="linear")
    assert learn.images.classes == ["baskets", "beads", "fox", "leaves"]
    assert len(learn.fit(0.1, 1)) == 1
    assert learn.predict().shape == (len(images.valid_labels), 4)


def test_table_that_is_missing_is_refused_with_the_columns_that_it_should_have(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        label_fixes.read_fixes(tmp_path / "label_errors.csv", "new_label")
    assert "the columns path and new_label" in str(caught.value)
