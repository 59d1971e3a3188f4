"""Score files: any program can read them, and changed bytes are never read."""

from __future__ import annotations

import csv
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pandas
import polars
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from conftest import Command, MakeBundle

from arrowhead import ConfigError, DataError, fileio, spreadsheet
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle.format import Bundle
from arrowhead.cli.main import main
from arrowhead.data import sources
from arrowhead.data.source_config import SourceConfig
from arrowhead.features import catalog_file
from arrowhead.features.extract import ExtractConfig
from arrowhead.features.recipe import Recipe
from arrowhead.inference import layout, score, score_request, scores_io, summary, verify
from arrowhead.inference.score_request import ScoreConfig, ScoreRequest
from arrowhead.inference.scores_io import Scores
from arrowhead.runtime.task_queue import TaskQueue
from arrowhead.runtime.worker import Worker

UNUSUAL_NAMES = [
    "$10_",
    "a_b$",
    "=1+1",
    "<b>x",
    "a.b",
    'q"uote',
    "s p a c e",
    "貓",
    "קשת",
    "🐈",
    "x" * 200,
]
RECIPE = Recipe(
    body="resnet18",
    weights="0" * 64,
    pool="avg",
    width=512,
    size=64,
    resize="crop",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
COUNTS = dict.fromkeys(("decoded", "looked_up", "skipped", "reused", "faults", "novel"), 0)


def score_directly(path: Path, images: Path, out: Path, **config: object) -> ScoreRequest:
    """Score like the command, in this process, without MLflow and progress display."""
    loaded, extract_config = bundle_format.load(path), ExtractConfig(chunk_size=4)
    score_config = ScoreConfig(**config)  # type: ignore[arg-type]
    request = score_request.prepare(
        out, path, loaded, sources.unlabelled_catalog(images), score_config, 4
    )
    worker = Worker(
        0, 1, "cpu", 1, TaskQueue(request.unfinished_parts()).next_task, lambda report: None
    )
    score.score(worker, request, extract_config)
    result = summary.summarize(request, loaded)
    counts = COUNTS | {"inputs": sum(map(len, request.part_rows))}
    folders = result.folders and result.folders.to_dict()
    score.write_summary(request, {"counts": counts, "folders": folders}, loaded)
    return request


@pytest.fixture(scope="module")
def images(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 images of three classes and one empty file."""
    folder = tmp_path_factory.mktemp("images") / "images"
    for name in ("baskets", "beads", "leaves"):
        (folder / name).mkdir(parents=True)
        for file in sorted((image_folder / "valid" / name).iterdir())[:4]:
            shutil.copy(file, folder / name)
    (folder / "beads" / "empty.jpg").touch()
    return folder


@pytest.fixture(scope="module")
def finished_scores(
    make_bundle: MakeBundle, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Finished scores, to be read or copied."""
    out = tmp_path_factory.mktemp("scores") / "scores"
    score_directly(make_bundle(), images, out, probabilities=True)
    return out


@pytest.fixture
def scores_copy(finished_scores: Path, tmp_path: Path) -> Path:
    """A copy of the finished scores, to be damaged."""
    shutil.copytree(finished_scores, tmp_path / "scores")
    return tmp_path / "scores"


def flip_random_bit(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


# ------------------------------------------------------------------------------- readers


def test_every_reader_opens_the_folder_of_parts(finished_scores: Path, images: Path) -> None:
    folder = str(finished_scores / "parts")
    paths = sources.unlabelled_catalog(images).paths
    assert len(list((finished_scores / "parts").iterdir())) > 2
    assert pandas.read_parquet(folder)["path"].tolist() == paths
    assert polars.read_parquet(folder)["path"].to_list() == paths
    rows = duckdb.sql(f"select path from read_parquet('{folder}/*.parquet') order by path")
    assert [path for (path,) in rows.fetchall()] == paths
    assert pyarrow.dataset.dataset(folder).to_table()["path"].to_pylist() == paths


def test_every_reader_gets_probabilities_by_class_name(finished_scores: Path) -> None:
    folder, names = str(finished_scores / "parts"), ["baskets", "beads", "leaves"]
    table = polars.read_parquet(folder)
    assert [field.name for field in table["probabilities"].dtype.fields] == names  # type: ignore[attr-defined]
    ours = table["probabilities"].to_list()
    assert pandas.read_parquet(folder)["probabilities"].tolist() == ours
    (sums,) = duckdb.sql(
        "select sum(probabilities.baskets + probabilities.beads + probabilities.leaves)"
        f" from read_parquet('{folder}/*.parquet')"
    ).fetchall()
    assert sums[0] == pytest.approx(12, abs=1e-4)
    part = next((finished_scores / "parts").iterdir())
    assert json.loads(pq.read_schema(part).metadata[b"arrowhead.classes"]) == names
    # A faulty row has none, and the others are those of the best label.
    assert [one is None for one in ours] == table["fault"].is_not_null().to_list()
    for row in table.drop_nulls("label").iter_rows(named=True):
        assert row["probabilities"][row["label"]] == row["probability"]


def test_unusual_names_and_a_thousand_classes_are_ordinary_fields(tmp_path: Path) -> None:
    classes = UNUSUAL_NAMES + [f"class {number}" for number in range(1000)]
    rng = np.random.default_rng(0)
    prob = rng.dirichlet(np.ones(len(classes)), 6).astype(np.float32)
    scores = Scores(
        classes=classes,
        paths=[f"{n}.jpg" for n in range(6)],
        image_ids=[bytes(16)] * 6,
        faults=[None] * 6,
        top_index=np.argsort(-prob, axis=1)[:, :3],
        probability=prob,
        all_probabilities=True,
    )
    path = tmp_path / "parts" / "part-000000.parquet"
    scores_io.write_scores(path, scores, {})
    rows = polars.read_parquet(path.parent)["probabilities"].struct.unnest()
    assert rows.columns == classes
    np.testing.assert_array_equal(rows.to_numpy(), prob)
    ours = scores_io.read_columns(path, ["probabilities"])["probabilities"]
    assert list(ours[0]) == classes
    pandas_rows = pandas.read_parquet(path.parent)["probabilities"]
    assert list(pandas_rows[0].values()) == prob[0].tolist()
    (result,) = duckdb.sql(f"select probabilities from read_parquet('{path}') limit 1").fetchall()
    assert list(result[0]) == classes


# ----------------------------------------------------------------------------- damage


def test_flipped_bit_in_a_part_is_detected_and_only_that_part_is_rewritten(
    make_bundle: MakeBundle, images: Path, tmp_path: Path
) -> None:
    path, out, rng = make_bundle(), tmp_path / "scores", random.Random(5)
    score_directly(path, images, out)
    before = {part.name: part.read_bytes() for part in (out / "parts").iterdir()}
    first, *others = sorted(before)
    for name in others:
        flip_random_bit(out / "parts" / name, rng)
        assert any(name in problem for problem in verify.verify(out)["problems"])
    request = score_directly(path, images, out)
    assert request.damaged_parts == others and len(others) > 1
    assert first not in request.damaged_parts
    assert {part.name: part.read_bytes() for part in (out / "parts").iterdir()} == before
    assert verify.verify(out)["problems"] == []


def test_part_is_hashed_before_it_is_parsed(scores_copy: Path) -> None:
    """Any flipped bit leads to a refusal, never to rows or a crash in Parquet's reader."""
    part = min((scores_copy / "parts").iterdir())
    output = scores_io.read_journal(layout.journal_dir(scores_copy))[0][0]
    content, rng = part.read_bytes(), random.Random(1)
    for _ in range(300):
        flip_random_bit(part, rng)
        with pytest.raises(DataError, match="sha256 differs"):
            scores_io.read_columns(part, ["path"], output.sha256)
        part.write_bytes(content)
    assert scores_io.read_columns(part, ["path"], output.sha256)["path"]


def test_other_readers_detect_a_flipped_page_by_its_checksum(scores_copy: Path) -> None:
    part = min((scores_copy / "parts").iterdir())
    column = pq.read_metadata(part).row_group(0).column(0)
    content = bytearray(part.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 5] ^= 1
    part.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(part, page_checksum_verification=True)


@pytest.mark.parametrize("harm", ["lost", "swapped", "stranger", "inputs", "cut"])
def test_verify_names_damaged_files(scores_copy: Path, harm: str) -> None:
    first, second, *_ = sorted((scores_copy / "parts").iterdir())
    assert verify.verify(scores_copy)["problems"] == []
    if harm == "lost":
        first.unlink()
    elif harm == "swapped":
        one, two = first.read_bytes(), second.read_bytes()
        first.write_bytes(two)
        second.write_bytes(one)
    elif harm == "stranger":
        shutil.copy(first, first.with_name("part-000099.parquet"))
    elif harm == "inputs":
        flip_random_bit(scores_copy / "inputs.arrow", random.Random(0))
    else:
        first.write_bytes(first.read_bytes()[:-9])
    problems = verify.verify(scores_copy)["problems"]
    name = {"stranger": "part-000099", "inputs": "inputs.arrow"}.get(harm, first.name)
    assert any(name in problem for problem in problems)
    assert len(problems) == (2 if harm == "swapped" else 1)


def test_verify_detects_a_flipped_bit_in_every_machine_readable_file(
    make_bundle: MakeBundle, images: Path, tmp_path: Path, command: Command
) -> None:
    """Except figures, which no program reads, and the journal, whose lines have checksums."""
    out = tmp_path / "scores"
    for words in ([], ["--csv"]):  # the second command only writes the table
        command("score", make_bundle(), images, out, *words, code=3)
    assert verify.verify(out)["problems"] == []
    rng = random.Random(3)
    files = [file for file in out.rglob("*") if file.is_file() and file.suffix != ".png"]
    files = [file for file in files if file.parent.name != "journal" and file.name != ".lock"]
    assert {"scores.csv", "request.json", "score.json", "inputs.arrow"} < {f.name for f in files}
    for file in files:
        content = file.read_bytes()
        for _ in range(8):
            flip_random_bit(file, rng)
            try:
                (problem,) = verify.verify(out)["problems"]
            except DataError as error:
                problem = error.found
            assert file.name in problem
            file.write_bytes(content)


def test_verify_refuses_scores_with_an_invalid_summary(scores_copy: Path, tmp_path: Path) -> None:
    content = json.loads((scores_copy / "score.json").read_text())
    content["counts"]["inputs"] += 1
    (scores_copy / "score.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"score\.json has changed"):
        verify.verify(scores_copy)
    (scores_copy / "score.json").unlink()
    with pytest.raises(ConfigError, match="never finished"):
        verify.verify(scores_copy)
    with pytest.raises(ConfigError, match="holds no scores"):
        verify.verify(tmp_path)


def test_invalid_content_with_valid_checksums_is_refused(
    scores_copy: Path, make_bundle: MakeBundle, images: Path
) -> None:
    """Files with valid checksums that Arrowhead does not write: no traceback, no path outside."""
    content = json.loads((scores_copy / "score.json").read_text())
    del content["seal"]
    part = content["parts"][0]
    for change in (
        {"parts": [part | {"name": "../../etc/passwd"}]},
        {"parts": [part | {"rows": "4"}]},
        {"parts": {}},
        {"counts": []},
        {"inputs_sha256": None},
    ):
        fileio.write_sealed(scores_copy / "score.json", content | change)
        with pytest.raises(DataError, match="not what Arrowhead writes"):
            verify.verify(scores_copy)
    content = json.loads((scores_copy / "request.json").read_text())
    del content["seal"]
    path, config = make_bundle(), ScoreConfig(probabilities=True)
    loaded, catalog = bundle_format.load(path), sources.unlabelled_catalog(images)
    for runs in ([[0]], [["0", "13"]], 7, [[0, 10**15]], [[0, 4]], [[0, 9], [4, 13]]):
        fileio.write_sealed(scores_copy / "request.json", content | {"runs": runs})
        with pytest.raises(DataError):
            score_request.prepare(scores_copy, path, loaded, catalog, config, 4)
    line = {"number": 0, "rows": 1, "bytes": 1, "sha256": "x", "inputs": "y", "faults": {}}
    (scores_copy / "journal" / "x.jsonl").write_bytes(
        b"[" * 200_000 + b"\n" + json.dumps(line | {"seal": "z"}).encode() + b"\n7\nnull\n{}\n"
    )
    assert len(scores_io.read_journal(scores_copy / "journal")) > 2


@pytest.mark.parametrize("words", [["scores", "verify"], ["score", "verify"]])
def test_verify_command_reports_its_findings(
    scores_copy: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([*words, str(scores_copy)])
    assert exit_info.value.code == 0 and "13 rows" in capsys.readouterr().out
    flip_random_bit(min((scores_copy / "parts").iterdir()), random.Random(0))
    with pytest.raises(SystemExit) as exit_info:
        main([*words, str(scores_copy), "--json"])
    assert exit_info.value.code == 4
    assert "part-000000" in json.loads(capsys.readouterr().out)["problems"][0]


def test_part_without_a_complete_journal_line_is_rewritten(
    make_bundle: MakeBundle, images: Path, tmp_path: Path
) -> None:
    """As a kill leaves it: the last line incomplete, or the part without its line."""
    path, out = make_bundle(), tmp_path / "scores"
    score_directly(path, images, out)
    before = {part.name: part.read_bytes() for part in (out / "parts").iterdir()}
    (journal,) = layout.journal_dir(out).iterdir()
    lines = journal.read_bytes().splitlines(keepends=True)
    line = json.loads(lines[0])
    line["rows"] += 1  # its checksum no longer matches
    journal.write_bytes(json.dumps(line).encode() + b"\n" + b"".join(lines[1:-1]) + lines[-1][:-20])
    (out / "parts" / ".part-000001.parquet.abcd.draft").write_bytes(b"half")
    config = ScoreConfig()
    request = score_request.prepare(
        out, path, bundle_format.load(path), sources.unlabelled_catalog(images), config, 4
    )
    assert request.unfinished_parts() == [0, len(lines) - 1] and request.damaged_parts == []
    score_directly(path, images, out)
    assert {part.name: part.read_bytes() for part in (out / "parts").iterdir()} == before


def test_scores_in_the_old_layout_are_refused_and_left_unchanged(
    finished_scores: Path, make_bundle: MakeBundle, images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "old"
    shutil.copytree(finished_scores / "parts", out)
    (out / "request.json").write_text("{}")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    for action in (lambda: score_directly(make_bundle(), images, out), lambda: verify.verify(out)):
        with pytest.raises(ConfigError, match="older Arrowhead"):
            action()
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


# ------------------------------------------------------------------- folders named after classes


@pytest.mark.parametrize("split", ["", "valid/"])
def test_folders_named_after_classes_give_an_accuracy(
    split: str, make_bundle: MakeBundle, images: Path, tmp_path: Path
) -> None:
    shutil.copytree(images, tmp_path / "photos" / split)
    request = score_directly(make_bundle(), tmp_path / "photos", tmp_path / "scores")
    rows = polars.read_parquet(tmp_path / "scores" / "parts").drop_nulls("label")
    right = sum(path.split("/")[-2] == label for path, label in rows[["path", "label"]].rows())
    output = json.loads((request.output_dir / "score.json").read_text())["folders"]
    assert (output["images"], output["right"]) == (12, right)
    low, high = output["accuracy_interval"]
    assert 0 <= low < right / 12 < high <= 1


def test_folders_with_other_names_give_no_accuracy(
    make_bundle: MakeBundle, images: Path, tmp_path: Path
) -> None:
    shutil.copytree(images, tmp_path / "photos")
    (tmp_path / "photos" / "beads").rename(tmp_path / "photos" / "unsorted")
    request = score_directly(make_bundle(), tmp_path / "photos", tmp_path / "scores")
    assert json.loads((request.output_dir / "score.json").read_text())["folders"] is None


# -------------------------------------------------------------------------------- spreadsheets


def test_csv_names_are_never_formulas_or_escape_sequences(
    make_bundle: MakeBundle, image_folder: Path, tmp_path: Path
) -> None:
    photo = next((image_folder / "new").iterdir())
    (tmp_path / "photos").mkdir()
    names = [
        "=1+1.jpg",
        "+2.jpg",
        "-3.jpg",
        "@4.jpg",
        "'5.jpg",
        "\x1b[31mred.jpg",
        "a\n=6.jpg",
        "ok.jpg",
    ]
    for name in names:
        shutil.copy(photo, tmp_path / "photos" / name)
    classes = ["=cmd|'/c calc'!A1", "beads", "-x"]
    path = tmp_path / "bundle"
    bundle_format.save(replace(bundle_format.load(make_bundle()), classes=classes), path)
    request = score_directly(path, tmp_path / "photos", tmp_path / "scores", probabilities=True)
    table = score.write_csv(request, bundle_format.load(path))
    content = table.read_bytes()
    assert b"\x1b" not in content and content.count(b"\n") == content.count(b"\r\n") == 9
    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        assert not any(value.startswith(("=", "+", "-", "@")) for value in line.values() if value)
    exact = polars.read_parquet(tmp_path / "scores" / "parts")
    for line, row in zip(lines, exact.to_dicts(), strict=True):
        assert line["path"].removeprefix("'") == row["path"]
        assert line["label"].removeprefix("'") == row["label"]
        for name in classes:
            assert float(line[f"probability.{name}"]) == row["probabilities"][name]


def test_multi_label_csv_can_be_read_back_as_a_table_of_images(
    images: Path, tmp_path: Path
) -> None:
    classes = ["sea, sand", "b|c", 'say "x" y']
    catalog = sources.unlabelled_catalog(images / "leaves")
    count, out = len(catalog), tmp_path / "scores"
    labels = np.array([[1, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0]], bool)
    scores = Scores(
        classes=classes,
        paths=catalog.paths,
        image_ids=[bytes(16)] * count,
        faults=[None] * count,
        top_index=np.zeros((count, 1), int),
        probability=np.full((count, 3), 0.4, np.float32),
        labels=labels,
    )
    part = layout.parts_dir(out) / scores_io.part_name(0)
    scores_io.write_scores(part, scores, {})
    catalog_file.write_catalog(layout.inputs_path(out), catalog.columns())
    written = scores_io.describe_part(part, 0, rows=count, inputs="", faults={})
    scores_io.replace_journal(layout.journal_dir(out), [written])
    result = Bundle(
        recipe=RECIPE,
        classes=classes,
        head="linear",
        temperature=1.0,
        multi=True,
        body_state={},
        head_state={},
        metrics={},
        lineage={},
    )
    config = ScoreConfig()
    request = ScoreRequest(output_dir=out, bundle=out, config=config, part_rows=[range(count)])
    table = score.write_csv(request, result)
    source = SourceConfig(images=str(images / "leaves"), label_column="labels")
    read_back = sources.labelled_catalog(table, source, for_training=False)
    assert read_back.paths == catalog.paths
    names = np.array(classes)
    assert read_back.labels == [tuple(sorted(names[row].tolist())) for row in labels]


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("=1", "'=1"),
        ("\t=1", "'\t=1"),
        (" =1", "' =1"),
        ("＝1", "'＝1"),
        ("'a", "''a"),
        ("plain", "plain"),
        ("a=1", "a=1"),
        ("", ""),
        ("\u202egpj.exe", "\\u202egpj.exe"),
    ],
)
def test_csv_field_is_text_to_a_spreadsheet(text: str, written: str) -> None:
    assert spreadsheet.safe_cell(text) == written


def test_csv_numbers_stay_numbers() -> None:
    assert [spreadsheet.safe_cell(one) for one in (-0.5, None, 3)] == [-0.5, None, 3]
