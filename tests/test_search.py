"""The commands search and suggest, and stores of images without labels."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import AddMlflowDb, Command
from numpy.typing import NDArray
from PIL import Image

from arrowhead import ConfigError
from arrowhead.bundle import format as bundle_format
from arrowhead.cli.main import main
from arrowhead.data.catalog import Catalog
from arrowhead.examine import search, suggest
from arrowhead.examine.suggest import SuggestConfig
from arrowhead.features.recipe import Recipe
from arrowhead.features.shard_file import ShardRows
from arrowhead.features.store import Store

FLAGS = ["--body", "resnet18", "--weights", "random", "--size", "64"]
RECIPE = Recipe(
    body="resnet18",
    weights="0" * 64,
    pool="avg",
    width=8,
    size=64,
    resize="crop",
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
)


def make_store(
    path: Path, feature_ND: NDArray[Any], *, views: int = 1, faulty: tuple[int, ...] = ()
) -> Store:
    """An unlabelled store of these features in shards of three; other views are noise."""
    rng = np.random.default_rng(0)
    count, width = feature_ND.shape
    recipe = dataclasses.replace(RECIPE, width=width, views=views)
    recipe = dataclasses.replace(recipe, augment="none" if views == 1 else "side-on")
    store = Store.create(path, recipe, 3)
    paths = [f"{number:04}.jpg" for number in range(count)]
    names = []
    for start in range(0, count, 3):
        rows = range(start, min(start + 3, count))
        features = rng.normal(size=(len(rows), views, width)).astype(np.float16)
        features[:, 0] = feature_ND[rows.start : rows.stop]
        features[[row in faulty for row in rows]] = 0
        names.append(f"shard{start}")
        shard = ShardRows(
            paths=[paths[row] for row in rows],
            image_ids=[row.to_bytes(8, "big") + bytes(8) for row in rows],
            features=features,
            faults=["empty" if row in faulty else None for row in rows],
        )
        store.write_shard(names[-1], shard)
    catalog = Catalog(
        root="/data",
        paths=paths,
        sizes=np.zeros(count, np.int64),
        stamps=np.zeros(count, np.int64),
        labels=[()] * count,
        splits=["train"] * count,
    )
    store.commit(names, catalog.columns(), {})
    return store


def standardized(feature_ND: NDArray[Any]) -> NDArray[np.float64]:
    """Standardized unit vectors, computed in one piece."""
    feature_ND = feature_ND.astype(np.float64)
    unit_ND = (feature_ND - feature_ND.mean(0)) / feature_ND.std(0)
    return np.asarray(unit_ND / np.linalg.norm(unit_ND, axis=1, keepdims=True))


def run(*args: object, code: int = 0) -> None:
    """Run a command in this process."""
    with pytest.raises(SystemExit) as exit_info:
        main([*map(str, args)])
    assert exit_info.value.code == code


@pytest.fixture(scope="module")
def workdir(
    tmp_path_factory: pytest.TempPathFactory, image_folder: Path, add_mlflow_db: AddMlflowDb
) -> Path:
    """A folder with photos, a fit on some of them (out), and an unlabelled store of all (pool).

    The pool has two copies of every photo, and a file that is no image.
    """
    folder = add_mlflow_db(tmp_path_factory.mktemp("search"))
    shutil.copytree(image_folder, folder / "photos", ignore=shutil.ignore_patterns("new"))
    for copy in ("first", "second"):
        shutil.copytree(image_folder, folder / "all" / copy)
    (folder / "all" / "broken.jpg").write_bytes(b"no image")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("fit", "photos", "out", *FLAGS, "--epochs", "2", "--rate", "0.01", "--head", "linear")
        run("precompute", "all", "pool", "--unlabelled", *FLAGS, "--max-faults", "1")
    return folder


@pytest.fixture
def here(workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def fill_in(path: Path, label: str = "beads") -> None:
    """Fill in new_label in every row, as a person does."""
    rows = rows_of(path)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({**row, "new_label": row["new_label"] or label} for row in rows)


# ------------------------------------------------------------------------------- nearest


def test_blocks_give_the_same_neighbours_as_one_matrix_product(tmp_path: Path) -> None:
    feature_ND = np.random.default_rng(1).normal(3, 2, (50, 8)).astype(np.float16)
    faulty = (4, 17, 49)
    store = make_store(tmp_path / "store", feature_ND, views=2, faulty=faulty)
    clean = np.array([row for row in range(50) if row not in faulty])
    cosine = standardized(feature_ND[clean]) @ standardized(feature_ND[clean]).T
    row_QT, similarity_QT = search.most_similar(store, feature_ND[clean[:7]], 10)
    expected = np.argsort(-cosine[:7], axis=1)[:, :10]
    assert (row_QT == clean[expected]).all()
    assert similarity_QT == pytest.approx(np.take_along_axis(cosine[:7], expected, 1), abs=1e-4)


def test_more_neighbours_than_images_gives_every_image_without_a_fault(tmp_path: Path) -> None:
    feature_ND = np.random.default_rng(1).normal(size=(10, 8)).astype(np.float16)
    store = make_store(tmp_path / "store", feature_ND, faulty=(3,))
    row_QT, _ = search.most_similar(store, feature_ND[:1], 50)
    assert row_QT.shape == (1, 9)
    assert set(row_QT[0].tolist()) == set(range(10)) - {3}


def test_equally_similar_images_come_in_catalog_order(tmp_path: Path) -> None:
    feature_ND = np.random.default_rng(1).normal(size=(20, 8)).astype(np.float16)
    feature_ND[[2, 9, 15, 19]] = feature_ND[2]
    store = make_store(tmp_path / "store", feature_ND)
    row_QT, _ = search.most_similar(store, feature_ND[2:3], 4)
    assert row_QT[0].tolist() == [2, 9, 15, 19]


def test_a_store_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", np.zeros((2, 8)), faulty=(0, 1))
    with pytest.raises(ConfigError, match="no image that could be read"):
        search.most_similar(store, np.ones((1, 8)), 1)


def test_the_photos_most_similar_to_a_pet_show_the_same_kind_of_pet(photo_store: Path) -> None:
    store = Store(photo_store)
    known = store.features(rows_only=True)
    query = np.arange(0, len(known.row), 10)
    row_QT, _ = search.most_similar(store, store.clean_features(known.row[query]), 11)
    label_QT = np.asarray(known.label)[np.searchsorted(known.row, row_QT[:, 1:])]
    assert (label_QT == known.label[query][:, None]).mean() > 0.9


# ------------------------------------------------------------------------------- queries


def test_an_altered_copy_finds_its_original_first(
    photo_store: Path, dogscats: Path, here: Path, command: Command
) -> None:
    original = sorted((dogscats / "valid" / "dogs").iterdir())[3]
    photo = Image.open(original).convert("RGB")
    name = "größer und heller é.jpg"
    photo.resize((photo.width // 2, photo.height // 2)).save(here / name, quality=60)
    (query,) = command("search", photo_store, name, "--top", "3")["queries"]
    assert query["similar"][0]["path"] == f"valid/dogs/{original.name}"
    assert query["similar"][0]["similarity"] > 0.8
    assert not any(one["exact_copy"] for one in query["similar"])


def test_a_file_of_known_content_needs_no_decoding(
    workdir: Path, here: Path, command: Command
) -> None:
    shutil.copytree(workdir / "pool", "pool")
    Path("pool/body.safetensors").unlink()  # nothing can be decoded
    photo = sorted((workdir / "all" / "first" / "new").iterdir())[0]
    shutil.copy(photo, "elsewhere.jpg")
    (query,) = command("search", "pool", "elsewhere.jpg", "--top", "3")["queries"]
    assert [one["path"] for one in query["similar"] if one["exact_copy"]] == [
        f"first/new/{photo.name}",
        f"second/new/{photo.name}",
    ]
    assert query["path"] is None


def test_a_path_of_the_catalog_is_found_after_the_photos_are_gone(
    workdir: Path, here: Path, command: Command
) -> None:
    by_file = command("search", workdir / "pool", workdir / "all/first/new/photo-0001.jpg")
    shutil.copytree(workdir / "pool", "pool")
    by_path = command("search", "pool", "first/new/photo-0001.jpg")
    assert by_path["queries"][0]["similar"] == by_file["queries"][0]["similar"]
    assert by_path["queries"][0]["path"] == "first/new/photo-0001.jpg"
    found = [one["path"] for one in by_path["queries"][0]["similar"]]
    assert found[0] == "second/new/photo-0001.jpg"
    assert "first/new/photo-0001.jpg" not in found and len(found) == 20


def test_a_file_here_wins_over_another_image_of_the_same_path_in_the_store(
    workdir: Path, here: Path, command: Command
) -> None:
    (here / "first" / "new").mkdir(parents=True)
    other = "first/new/photo-0003.jpg"
    shutil.copy(workdir / "all" / other, "first/new/photo-0001.jpg")
    (query,) = command("search", workdir / "pool", "first/new/photo-0001.jpg")["queries"]
    assert query["similar"][0]["path"] == other and query["similar"][0]["exact_copy"]
    Image.new("RGB", (80, 80), (200, 10, 10)).save("first/new/photo-0001.jpg")
    command("search", workdir / "pool", "first/new/photo-0001.jpg")
    assert "another image than the one in the store; the file is used" in command.stderr


def test_files_that_cannot_be_read_are_named_and_the_others_answered(
    workdir: Path, here: Path, command: Command
) -> None:
    Path("page.jpg").write_text("<html>")
    names = ["page.jpg", "missing.jpg", "broken.jpg", "first/new/photo-0001.jpg"]
    result = command("search", workdir / "pool", *names, "--top", "2", code=3)
    assert result["counts"] == {"inputs": 4, "answered": 1, "faults": 3}
    faults = {one["query"]: one["fault"] for one in result["queries"]}
    assert "neither a file nor the path of an image" in faults["missing.jpg"]
    assert faults["broken.jpg"].startswith("in the store it has a fault: not an image")
    assert faults["page.jpg"].startswith("not an image")
    assert len(result["queries"][3]["similar"]) == 2
    assert all(f"{name}: {faults[name]}" in command.stderr for name in names[:3])
    assert "3 of 4 images could not be used" in command.stderr


def test_the_csv_holds_what_the_screen_shows(
    workdir: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, name = workdir / "out" / "store", "train/beads/beads-0010.jpg"
    run("search", store, name, "--top", "4", "--csv", "found.csv")
    rows = rows_of(here / "found.csv")
    assert [row["rank"] for row in rows] == ["1", "2", "3", "4"]
    assert {row["query"] for row in rows} == {name}
    shown = capsys.readouterr().out
    for row in rows:
        line = next(line for line in shown.splitlines() if row["path"] in line)
        cells = [row["rank"], f"{float(row['similarity']):.4f}"]
        assert line.split() == [*cells, row["path"], row["labels"], row["split"]]


def test_the_page_shows_the_pictures_and_escapes_names(workdir: Path, here: Path) -> None:
    name = "<b>&'\".jpg"
    shutil.copy(workdir / "all/first/new/photo-0001.jpg", name)
    run("search", workdir / "pool", name, "gone.jpg", "--top", "3", "--out", "found.html", code=3)
    text = (here / "found.html").read_text()
    assert text.count("data:image/webp;base64,") == 4  # the query and three others
    assert "<b>" not in text and "&lt;b&gt;" in text
    assert "first/new/photo-0001.jpg" in text and "exact copy" in text
    assert "neither a file nor the path of an image in the store" in text
    run("search", workdir / "pool", name, "--out", "found.txt", code=2)


def test_search_without_an_image_is_refused(workdir: Path, here: Path) -> None:
    run("search", workdir / "pool", code=2)
    run("search", workdir / "pool", "first/new/photo-0001.jpg", "--top", "0", code=2)


# ------------------------------------------------------------------- stores without labels


def test_an_unlabelled_store_lists_every_image_and_cannot_be_trained_on(
    workdir: Path, here: Path, command: Command
) -> None:
    info = command("features", "info", workdir / "pool")
    files = [file for file in (workdir / "all").rglob("*") if file.is_file()]
    assert info["images"] == len(files) and info["faults"] == {"not an image": 1}
    assert info["classes"] == []
    assert command("features", "verify", workdir / "pool")["findings"] == []
    run("train", workdir / "pool", "bundle", code=2)
    run("examine", workdir / "pool", workdir / "out" / "bundle", "report", code=2)
    run("lr-find", workdir / "pool", code=2)


def test_unlabelled_never_drops_the_labels_of_a_store(workdir: Path, here: Path) -> None:
    shutil.copytree(workdir / "out" / "store", "store")
    before = Store(Path("store")).read_catalog()["labels"]
    run("precompute", workdir / "all", "store", "--unlabelled", code=2)
    assert Store(Path("store")).read_catalog()["labels"] == before


def test_an_unlabelled_list_may_repeat_paths(
    workdir: Path, add_mlflow_db: AddMlflowDb, here: Path
) -> None:
    add_mlflow_db(here)
    photos = sorted((workdir / "all" / "first" / "new").iterdir())[:3]
    lines = [str(one) for one in (photos[2], photos[0], photos[2], photos[1])]
    Path("list.txt").write_text("\n".join(lines))
    run("precompute", "list.txt", "store", "--unlabelled", *FLAGS)
    assert Store(Path("store")).read_catalog()["paths"] == [one.name for one in photos]


# ------------------------------------------------------------------------------- suggest


def test_neither_known_images_nor_copies_are_suggested(
    workdir: Path, here: Path, command: Command
) -> None:
    result = command("suggest", workdir / "pool", workdir / "out" / "bundle", "--count", "500")
    paths = [one["path"] for one in result["suggestions"]]
    new = sorted(file.name for file in (workdir / "all" / "first" / "new").iterdir())
    assert sorted(paths) == [f"first/new/{name}" for name in new]
    assert f"there is no more to suggest than {len(new)} images" in command.stderr
    rows = rows_of(here / "suggest.csv")
    assert [row["path"] for row in rows] == paths
    assert {row["new_label"] for row in rows} == {""}
    assert {row["predicted"] for row in rows} <= {"baskets", "beads", "leaves"}


def test_the_bundle_is_less_certain_of_suggestions_than_of_other_images(
    workdir: Path, here: Path, command: Command
) -> None:
    bundle, store = bundle_format.load(workdir / "out" / "bundle"), Store(workdir / "pool")
    known = store.features(rows_only=True)
    free, _ = suggest.candidates(store.path, known, bundle)
    uncertainty = suggest.uncertainty(store, known.row[free], bundle)
    result = command("suggest", store.path, workdir / "out" / "bundle", "--count", "3")
    rows = list(store.find_paths([one["path"] for one in result["suggestions"]]).values())
    suggested = np.isin(known.row[free], rows)
    assert uncertainty[suggested].mean() > uncertainty[~suggested].mean()


def test_suggestions_are_unlike_each_other() -> None:
    rng = np.random.default_rng(0)
    kinds = np.eye(8, dtype=np.float32)[:5]
    unit = np.repeat(kinds, [40, 3, 2, 4, 1], axis=0)  # one kind has by far the most images
    unit = unit + rng.normal(0, 0.01, unit.shape).astype(np.float32)
    picked, size = suggest.spread(unit, 5)
    assert sorted(unit[picked].argmax(1).tolist()) == [0, 1, 2, 3, 4]
    assert sorted(size.tolist()) == [1, 2, 3, 4, 40]


def test_the_first_suggestions_show_both_kinds_of_pets(photo_store: Path) -> None:
    store = Store(photo_store)
    known = store.features(rows_only=True)
    picked = suggest.choose(store, known, np.arange(len(known.row)), None, 10)
    kinds = [one.path.split("/")[1] for one in picked]
    assert len(kinds) == 10 and min(kinds.count("cats"), kinds.count("dogs")) >= 3


def test_labels_that_a_person_has_filled_in_are_kept_and_not_suggested_again(
    workdir: Path, here: Path, command: Command
) -> None:
    first = command("suggest", workdir / "pool", "--count", "4")
    fill_in(here / "suggest.csv")
    labelled = rows_of(here / "suggest.csv")
    second = command("suggest", workdir / "pool", "--count", "6")
    rows = rows_of(here / "suggest.csv")
    assert rows[:4] == labelled and len(rows) == 10
    assert second["counts"]["kept"] == 4
    names = [Path(one["path"]).name for one in (*first["suggestions"], *second["suggestions"])]
    assert len(set(names)) == 10


def test_labels_of_images_that_the_store_lacks_are_kept_and_reported(tmp_path: Path) -> None:
    make_store(tmp_path / "store", np.random.default_rng(0).normal(size=(6, 8)))
    config = SuggestConfig(count=2, out=tmp_path / "suggest.csv")
    suggest.suggest(tmp_path / "store", None, config)
    fill_in(config.out)
    with config.out.open("a") as file:
        file.write("gone.jpg,,,,cats\n")
    notes = suggest.suggest(tmp_path / "store", None, config)["notes"]
    assert "1 row" in notes[0] and "does not hold: gone.jpg" in notes[0]
    assert "gone.jpg" in config.out.read_text()
    before = "path,predicted,probability,why,new_label\ngone.jpg,,,,cats\n"
    config.out.write_text(before)
    with pytest.raises(ConfigError, match="holds none of them, such as gone"):
        suggest.suggest(tmp_path / "store", None, config)
    assert config.out.read_text() == before


def test_when_everything_is_labelled_the_table_stays_as_it_is(tmp_path: Path) -> None:
    make_store(tmp_path / "store", np.random.default_rng(0).normal(size=(3, 8)))
    config = SuggestConfig(out=tmp_path / "suggest.csv")
    assert len(suggest.suggest(tmp_path / "store", None, config)["suggestions"]) == 3
    fill_in(config.out)
    labelled = rows_of(config.out)
    again = suggest.suggest(tmp_path / "store", None, config)
    assert again["suggestions"] == [] and rows_of(config.out) == labelled


def test_a_table_that_a_spreadsheet_saved_with_semicolons_is_kept_too(tmp_path: Path) -> None:
    path = tmp_path / "suggest.csv"
    path.write_bytes(
        "\ufeffpath;predicted;probability;why;new_label\r\n"
        "a,b.jpg;cat;0,5;x;\r\n"
        '"c d.jpg";cat;0,5;x;dog\r\n'.encode()
    )
    assert [(row["path"], row["new_label"]) for row in suggest.read_labelled_rows(path)] == [
        ("c d.jpg", "dog")
    ]


def test_another_table_is_not_replaced(workdir: Path, here: Path) -> None:
    Path("suggest.csv").write_text("path,label\na.jpg,cat\n")
    run("suggest", workdir / "pool", code=2)
    assert Path("suggest.csv").read_text() == "path,label\na.jpg,cat\n"


def test_the_same_request_writes_the_same_bytes(workdir: Path, here: Path) -> None:
    for name in ("a.csv", "b.csv"):
        run("suggest", workdir / "pool", workdir / "out" / "bundle", "--count", "5", "--out", name)
    assert Path("a.csv").read_bytes() == Path("b.csv").read_bytes()


def test_a_filled_in_table_trains_a_bundle_for_the_next_suggestions(
    workdir: Path, here: Path, add_mlflow_db: AddMlflowDb, capsys: pytest.CaptureFixture[str]
) -> None:
    add_mlflow_db(here)
    run("suggest", workdir / "pool", "--count", "12")
    fit = capsys.readouterr().out.splitlines()[-1].split()[1:]
    assert fit[0] == "fit"
    rows = rows_of(here / "suggest.csv")
    with (here / "suggest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows({**row, "new_label": "ab"[at % 2]} for at, row in enumerate(rows))
    run(*fit, "--epochs", "1", "--rate", "0.01", "--head", "linear")
    run("suggest", workdir / "pool", "OUT/bundle", "--count", "3")
    after = rows_of(here / "suggest.csv")
    assert len(after) == 15 and {row["predicted"] for row in after[12:]} <= {"a", "b"}


def test_a_bundle_of_another_recipe_and_a_labelled_store_are_refused(
    workdir: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(here / "other", np.zeros((3, 8)))
    run("suggest", "other", workdir / "out" / "bundle", code=2)
    assert "features of different recipes cannot be compared" in capsys.readouterr().err
    run("suggest", workdir / "out" / "store", workdir / "out" / "bundle", code=2)
    assert "--unlabelled" in capsys.readouterr().err
    assert not Path("suggest.csv").exists()


def test_with_several_labels_an_image_near_a_threshold_is_suggested(
    workdir: Path, here: Path, add_mlflow_db: AddMlflowDb, command: Command
) -> None:
    add_mlflow_db(here)
    photos = sorted((workdir / "photos").rglob("*.jpg"))
    lines = [f"{one},{one.parent.name}|seen" for one in photos]
    Path("tags.csv").write_text("\n".join(["path,tags", *lines]))
    run("fit", "tags.csv", "out", *FLAGS, "--epochs", "2", "--rate", "0.01", "--head", "linear")
    result = command("suggest", workdir / "pool", "out/bundle", "--count", "3")
    assert all("is near its threshold" in one["why"] for one in result["suggestions"])
    assert "--label-column new_label --multi-label" in command.stderr
    labels = command("search", "out/store", photos[0], "--top", "2")["queries"][0]["similar"]
    assert all("seen" in one["labels"] and len(one["labels"]) == 2 for one in labels)


def test_suggestions_are_printed_as_json(workdir: Path, here: Path, command: Command) -> None:
    result = command("suggest", workdir / "pool", "--count", "2", "--out", "a.csv")
    assert json.loads(json.dumps(result)) == result
    assert result["counts"]["suggested"] == 2 and result["files"] == ["a.csv"]
    assert [one["predicted"] for one in result["suggestions"]] == [None, None]
    with pytest.raises(ConfigError):
        SuggestConfig(count=0)


def test_suggest_replaces_no_table_with_other_columns(tmp_path):
    from arrowhead.examine import suggest

    table = tmp_path / "le.csv"
    for header in ("path,label,suggested,score,new_label", ",".join((*suggest.COLUMNS, "notes"))):
        table.write_text(f"{header}\na.jpg,cats,dogs,0.9,dogs\n")
        with pytest.raises(ConfigError, match="not a table of suggestions"):
            suggest.read_labelled_rows(table)
    table.write_text(",".join(suggest.COLUMNS) + "\na.jpg,cats,0.5,unsure,'90s\nb.jpg,x,1,y,\n")
    assert [row["new_label"] for row in suggest.read_labelled_rows(table)] == ["'90s"]


def test_search_writes_its_table_over_no_photo(image_folder, tmp_path, capsys):
    from arrowhead.cli.main import main

    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"kept")
    with pytest.raises(SystemExit) as exit_info:
        main(["search", str(tmp_path), "a.jpg", "--csv", str(photo)])
    assert exit_info.value.code == 2
    assert photo.read_bytes() == b"kept"
    assert ".csv" in capsys.readouterr().err
