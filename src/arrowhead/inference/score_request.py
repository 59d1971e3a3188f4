"""The request of a scoring: settings, images, output folder, and which parts are done.

prepare                -> ScoreRequest    checks the settings, or continues a stopped scoring
request.read_tables    the finished parts, one after another
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from arrowhead import fileio, output_paths
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle import tta
from arrowhead.bundle.format import Bundle
from arrowhead.data import chunks, mirrors, remote_folder
from arrowhead.data.catalog import Catalog
from arrowhead.data.remote_folder import LocalFolder
from arrowhead.errors import ConfigError, DataError
from arrowhead.features import catalog_file
from arrowhead.features.store import Store
from arrowhead.inference import layout, scores_io
from arrowhead.inference.scores_io import Part

# Faults that may be gone when the same command runs again.
TRANSIENT_FAULTS = ("changed", "unreadable", "decoder_crash")
# How another request differs, for keys of request.json that are not flags.
REQUEST_WORDS = {
    "bundle": "of another bundle",
    "images": "of images in another folder",
    "inputs": "of other images (by their names, sizes or times)",
}
SCORE_AGAIN = "delete that folder and score again, or give another OUT."


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreConfig:
    """What is written for each image."""

    top_k: int = 5
    """Labels listed per image, most probable first (at most the number of classes)."""
    probabilities: bool = False
    """Also write the probability of every class, as a struct with a field for each."""
    features: bool = False
    """Also write the body's features, for search, clustering or plots."""
    raw: bool = False
    """Write uncalibrated probabilities, without the bundle's temperature."""
    flag_novel: bool = False
    """Also write `novel`: whether the image's novelty is above the threshold of --false-alarms."""
    false_alarms: float = 0.05
    """Share of images like the training images that --flag-novel may mark by mistake, 0 to 1."""
    tta: int = 0
    """Test-time augmentation: average the clean view of an image and this many augmented ones. The
    bundle must be trained on a store with as many (precompute --views), which calibrates it for
    that."""
    csv: bool = False
    """Also write OUT/scores.csv: path, image_id, label, probability, novelty, fault, and with
    --probabilities a column for every class. A text that a spreadsheet would run as a formula gets
    a ' in front."""
    store: Path | None = None
    """Feature store of the same recipe: images whose features it holds are not decoded."""
    path_column: str | None = None
    """Column of a table with the images' paths. Default: path, image, filename, id … Of a Parquet
    or Arrow file: the column with the images."""
    base: str | None = None
    """Folder or URI that the paths in a list or table are relative to. Default: the folder of the
    list or table."""
    suffix: str = ""
    """Appended to every path in a list or table that names images without it, such as .jpg."""
    max_drift: float = 0.005
    """Refuse to score if a golden image's feature here differs by more than this cosine distance
    from the one on the machine that made the bundle. Another decoder differs by at most 0.003,
    another resize rule or standard deviation by 0.1 and more (bench/drift.py)."""
    max_pixels: int = 100_000_000
    """Images whose header claims more pixels are refused before they are decoded."""
    max_scans: int = 100
    """JPEGs with more scans are refused before they are decoded (a progressive JPEG usually has
    10)."""

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ConfigError(f"--top-k is {self.top_k}.", "1 or more.", "give e.g. 5.")
        if self.tta < 0:
            raise ConfigError(f"--tta is {self.tta}.", "0 or more.", "give e.g. 3.")
        if not 0 < self.false_alarms < 1:
            raise ConfigError(
                f"--false-alarms is {self.false_alarms}.",
                "a share of the images, more than 0 and less than 1.",
                "give e.g. 0.05.",
            )
        if self.false_alarms != 0.05 and not self.flag_novel:
            raise ConfigError(
                f"--false-alarms {self.false_alarms:g} has no --flag-novel.",
                "--flag-novel, whose threshold it sets.",
                "add --flag-novel, or leave --false-alarms out.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRequest:
    """A validated scoring: what is scored, with which settings, and where the scores go."""

    output_dir: Path
    bundle: Path
    config: ScoreConfig
    part_rows: list[range]
    """For each part, its rows in inputs.arrow."""
    damaged_parts: list[str] = field(default_factory=list)
    """File names of parts that have changed since they were written; they are scored again."""

    @property
    def files(self) -> LocalFolder:
        """Carries the files of scores in an object store."""
        return remote_folder.of(self.output_dir)

    def here(self) -> ScoreRequest:
        """This request on the machine of a worker: in its own mirrors, with the images' list."""
        if not remote_folder.of(self.output_dir).is_remote:
            return self
        store = self.config.store and mirrors.here(self.config.store)
        request = replace(
            self, output_dir=mirrors.here(self.output_dir), config=replace(self.config, store=store)
        )
        request.files.refresh()
        layout.parts_dir(request.output_dir).mkdir(exist_ok=True)
        layout.journal_dir(request.output_dir).mkdir(exist_ok=True)
        return request

    def part_path(self, number: int) -> Path:
        """The Parquet file of a part."""
        return layout.parts_dir(self.output_dir) / scores_io.part_name(number)

    def part_files(self, number: int) -> Catalog:
        """The images of a part."""
        inputs = layout.inputs_path(self.output_dir)
        return Catalog(**catalog_file.read_catalog(inputs, self.part_rows[number]))

    def finished_parts(self) -> dict[int, Part]:
        """The finished parts by number."""
        journal = scores_io.read_journal(layout.journal_dir(self.output_dir))
        return _match_with_files(layout.parts_dir(self.output_dir), journal)

    def unfinished_parts(self) -> list[int]:
        """Numbers of the parts to score: not in the journal, or with transient faults."""
        journal = scores_io.read_journal(layout.journal_dir(self.output_dir))
        return [
            number
            for number in range(len(self.part_rows))
            if all(_has_transient_faults(part) for part in journal.get(number, []))
        ]

    def read_columns(self, columns: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
        """Read some columns of every part as lists (see `read_tables`)."""
        return (table.to_pydict() for table, _ in self.read_tables(columns))

    def read_tables(self, columns: Sequence[str]) -> Iterator[tuple[Any, Catalog]]:
        """Read some columns of every part as a pyarrow table, with the images of the part.

        Parts come in the order of the inputs. Raises DataError if a part is missing, has changed,
        or does not hold its images in order.
        """
        finished = self.finished_parts()
        for number in range(len(self.part_rows)):
            path, part = self.part_path(number), finished.get(number)
            if part is None:
                raise _wrong_files_error(path)
            files = self.part_files(number)
            table = scores_io.read_table(path, ["path", *columns], part.sha256)
            if table["path"].to_pylist() != files.paths:
                raise _wrong_files_error(path)
            yield table, files


def _has_transient_faults(part: Part) -> bool:
    return any(part.faults.get(kind) for kind in TRANSIENT_FAULTS)


def _match_with_files(parts_dir: Path, journal: Mapping[int, Sequence[Part]]) -> dict[int, Part]:
    """Of several journal records of one part, choose the one that describes the file."""
    matched = {}
    for number, records in journal.items():
        if len(records) > 1:
            records = [part for part in records if part.is_intact(parts_dir)]
        if records:
            matched[number] = records[-1]
    return matched


def _wrong_files_error(path: Path) -> DataError:
    return DataError(
        f"{path} does not hold the files it should.",
        "one row per file, in the order of the files.",
        "delete that file and run the same command again.",
    )


def prepare(
    out: Path, path: Path, bundle: Bundle, catalog: Catalog, config: ScoreConfig, chunk_size: int
) -> ScoreRequest:
    """Prepare the folder `out` for scoring, or for continuing the same scoring.

    Args:
        out: the scores folder, new or with scores of the same request.
        path: the folder of `bundle`.
        bundle: scores the images.
        catalog: the images.
        config: what is written.
        chunk_size: typical number of images per part.

    Raises:
        ConfigError: `out` holds other scores, the bundle has no novelty detector to flag with, or
            the store has another recipe.
        DataError: a file of the store or of the scores has changed.
    """
    _check_config(path, bundle, config)
    settings = {
        "bundle": bundle_format.fingerprint(path),
        "images": catalog.root,
        "inputs": catalog.digest(),
        "top_k": config.top_k,
        "probabilities": config.probabilities,
        "features": config.features,
        "raw": config.raw,
        "flag_novel": config.flag_novel,
        "false_alarms": config.false_alarms if config.flag_novel else None,
        "chunk_size": chunk_size,
        "tta": config.tta or None,  # absent in requests of older versions
    }
    request_path = out / "request.json"
    layout.check_layout(out)
    is_new = not request_path.is_file()
    if is_new:
        output_paths.check_output_folder(out, "scores")
        part_rows = chunks.split_into_chunks(catalog.paths, chunk_size)
    else:
        part_rows = _read_part_rows(out, settings, len(catalog))
    # The number of ignored files does not affect the scores, so it must not change this file.
    catalog_file.write_catalog(layout.inputs_path(out), replace(catalog, ignored=0).columns())
    if is_new:
        settings["runs"] = [[rows.start, rows.stop] for rows in part_rows]
        fileio.write_sealed(request_path, settings | {"format": scores_io.FORMAT})
    damaged = _discard_unusable_parts(out, catalog, part_rows)
    # Absolute paths, because workers start in another working directory.
    store = config.store and config.store.absolute()
    return ScoreRequest(
        output_dir=out.absolute(),
        bundle=path.absolute(),
        config=replace(config, store=store),
        part_rows=part_rows,
        damaged_parts=damaged,
    )


def _check_config(path: Path, bundle: Bundle, config: ScoreConfig) -> None:
    """Raise ConfigError if the bundle at `path`, or the store, does not fit the settings."""
    if config.flag_novel and not bundle.novelty:
        raise ConfigError(
            f"{path} does not know its training images: it was saved without them.",
            "a bundle that `fit` or `train` made, for --flag-novel.",
            "leave --flag-novel out, or train again.",
        )
    tta.with_views(bundle, config.tta, path)
    if config.store:
        store = Store(config.store)
        tta.require_views(store.recipe, bundle.recipe, config.tta, config.store)
        store_recipe, bundle_recipe = store.recipe.single_view(), bundle.recipe.single_view()
        store_recipe.require_equal(bundle_recipe, str(config.store), str(path))
        store.intact_shards()


def _read_part_rows(out: Path, settings: Mapping[str, Any], images: int) -> list[range]:
    """The rows of each part as request.json has them.

    Raises ConfigError if `out` holds scores with other settings, DataError if the parts do not
    cover every image once.
    """
    request_path = out / "request.json"
    content = read_request(request_path)
    differing = [key for key in settings if content.get(key) != settings[key]]
    if differing:
        flag = f"with another setting of --{differing[0].replace('_', '-')}"
        raise ConfigError(
            f"{out} holds scores of another request: {REQUEST_WORDS.get(differing[0], flag)}.",
            "the same bundle, images and settings, to continue; or a new folder.",
            "give another OUT, or delete that folder.",
        )
    part_rows = [range(*ends) for ends in content["runs"]]
    stops = [0, *(rows.stop for rows in part_rows)]
    if [rows.start for rows in part_rows] != stops[:-1] or stops[-1] != images:
        raise DataError(
            f"{request_path} does not divide the inputs into parts without gaps or overlaps.",
            "each input in one part.",
            SCORE_AGAIN,
        )
    return part_rows


def read_request(path: Path) -> dict[str, Any]:
    """Read request.json."""
    content = fileio.read_sealed(
        path, scores_io.FORMAT, upgrade="score into a new folder", repair=SCORE_AGAIN
    )
    fileio.check_schema(content, scores_io.REQUEST_SCHEMA, str(path), SCORE_AGAIN)
    return content


def _discard_unusable_parts(out: Path, catalog: Catalog, part_rows: list[range]) -> list[str]:
    """Keep only intact parts of these images in `out` and its journal; names of damaged parts.

    Drafts of a run that was killed are removed, too.
    """
    parts_dir = layout.parts_dir(out)
    journal = scores_io.read_journal(layout.journal_dir(out))
    intact, damaged = [], []
    for number, rows in enumerate(part_rows):
        path = parts_dir / scores_io.part_name(number)
        inputs = layout.hash_inputs(catalog.subset(rows)) if number in journal else ""
        current = [part for part in journal.get(number, []) if part.inputs == inputs]
        if part := next((part for part in current if part.is_intact(parts_dir)), None):
            intact.append(part)
            continue
        if current and path.is_file():
            damaged.append(path.name)
        path.unlink(missing_ok=True)
    for draft in parts_dir.glob(".part-*.draft"):
        draft.unlink(missing_ok=True)
    scores_io.replace_journal(layout.journal_dir(out), intact)
    return damaged


def update_csv_digest(out: Path) -> None:
    """Record in score.json, which exists, the sha256 of a scores.csv that was written again."""
    path, digest = out / "score.json", csv_digest(out)
    content = read_score(path)
    if content.get("csv_sha256") != digest:
        fileio.write_sealed(path, content | {"csv_sha256": digest})


def csv_digest(out: Path) -> str | None:
    """The sha256 of scores.csv, None if there is none."""
    return fileio.sha256(layout.csv_path(out)) if layout.csv_path(out).is_file() else None


def read_score(path: Path) -> dict[str, Any]:
    """Read score.json."""
    repair = "delete it and run the same score command again: the parts are kept."
    content = fileio.read_sealed(
        path, scores_io.FORMAT, upgrade="score again into a new folder", repair=repair
    )
    fileio.check_schema(content, scores_io.SCORE_SCHEMA, str(path), repair)
    return content
