"""Build the catalog of images in tar shards, Parquet files and Arrow files.

    train-000.tar, val/000.tar           WebDataset: .cls, .json or .txt files beside the images
    photos.tar                           a folder in a tar: its class folders give the labels
    data/train-00000-of-00003.parquet    rows with image bytes and a label
    train/data-00000-of-00001.arrow      what `datasets` saves with save_to_disk

Only headers are read: those of the tar's members, or the columns that hold no images. Containers of
one source are of one kind.
"""

from __future__ import annotations

import os
import posixpath
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from arrowhead.data import (
    container_labels,
    containers,
    listing,
    named_files,
    path_text,
    row_files,
    tar_index,
    walk,
)
from arrowhead.data.catalog import Catalog
from arrowhead.data.containers import Container, ContainerError
from arrowhead.data.row_files import RowFile
from arrowhead.data.source_config import SourceConfig
from arrowhead.data.table_parser import normalize_name
from arrowhead.data.tar_index import TarIndex, cell_text
from arrowhead.errors import ConfigError
from arrowhead.wording import pluralize

ALL_SUFFIXES = (*containers.SUFFIXES, *containers.COMPRESSED_SUFFIXES)
MAX_NOTED = 4  # containers that a note names
MAX_NAME_CHARS = 100  # of the name of an image in a row


@dataclass(slots=True)
class Rows:
    """The images of all containers.

    Attributes:
        root: The root of the containers.
        image_column: Of Parquet and Arrow files.
        paths, containers, offsets, sizes, stamps: As in `Catalog`.
        cells: Texts of each image by the name of the field.
        class_columns: Fields that `datasets` recorded as classes.
        notes: Sentences for the user.
        ignored: Number of files in tars that are no images.
    """

    root: str
    image_column: str = ""
    paths: list[str] = field(default_factory=list)
    containers: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    stamps: list[int] = field(default_factory=list)
    cells: list[dict[str, str]] = field(default_factory=list)
    class_columns: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    ignored: int = 0

    def catalog(
        self, labels: Sequence[tuple[str, ...]], splits: Sequence[str], keep: Iterable[int]
    ) -> Catalog:
        """The catalog of some of the rows, sorted by path."""
        order = sorted(keep, key=self.paths.__getitem__)
        at = np.array(order, np.int64)
        return Catalog(
            root=self.root,
            paths=[self.paths[row] for row in order],
            sizes=np.array(self.sizes, np.int64)[at],
            stamps=np.array(self.stamps, np.int64)[at],
            labels=[labels[row] for row in order],
            splits=[splits[row] for row in order],
            ignored=self.ignored + len(self.paths) - len(order),
            notes=tuple(self.notes),
            containers=[self.containers[row] for row in order],
            offsets=np.array(self.offsets, np.int64)[at],
            image_column=self.image_column,
        )


def is_container(source: str | Path) -> bool:
    """Whether a source is named like one container (also a compressed one) and is no folder."""
    return os.fspath(source).lower().endswith(ALL_SUFFIXES) and not Path(source).is_dir()


def is_possible_suffix(suffix: str) -> bool:
    """Whether files with this suffix in lower case may be containers, also compressed ones."""
    return any(one.endswith(suffix) for one in ALL_SUFFIXES)


def check_exists(source: str | Path) -> None:
    """Raise ConfigError for a container on the disk that does not exist, or is compressed."""
    find_containers(source)


def unlabelled_catalog(source: str | Path, config: SourceConfig) -> Catalog:
    """The catalog of all images in the containers of a source, without labels.

    Raises:
        ConfigError: The source is missing, empty or corrupt.
    """
    rows = _read_rows(source, config, labelled=False)
    count = len(rows.paths)
    return rows.catalog([()] * count, [""] * count, range(count))


def labelled_catalog(
    source: str | Path, config: SourceConfig
) -> tuple[Catalog, dict[tuple[str, tuple[str, ...]], str]]:
    """The catalog of the images with labels, and the first image of each pair of split and labels.

    Raises:
        ConfigError: The source is missing, empty or corrupt, or its labels cannot be told.
    """
    rows = _read_rows(source, config, labelled=True)
    if config.label_column is None and len(rows.class_columns) == 1:
        config = replace(config, label_column=next(iter(rows.class_columns)))
    labels, splits = container_labels.read_labels(
        str(source), rows.root, rows.paths, rows.containers, rows.cells, config, rows.notes
    )
    kept = [row for row, split in enumerate(splits) if split is not None]
    if len(kept) < len(labels):
        count = pluralize(len(labels) - len(kept), "image")
        rows.notes.append(f"{count} without a label or outside the splits: ignored")
    catalog = rows.catalog(labels, [split or "" for split in splits], kept)
    first: dict[tuple[str, tuple[str, ...]], str] = {}
    for path, names, split in zip(catalog.paths, catalog.labels, catalog.splits, strict=True):
        first.setdefault((split, names), path)
    return catalog, first


# -------------------------------------------------------------------------------- finding


def find_containers(source: str | Path) -> tuple[str, list[Container]]:
    """The root and the containers of a source: one container, or a folder of them.

    Raises:
        ConfigError: They are missing, compressed, or of several kinds.
    """
    if is_container(source):
        full = named_files.absolute_path(os.fspath(source))
        folder, _, leaf = (path_text.escape_path(part) for part in full.rpartition(b"/"))
        if leaf.lower().endswith(containers.COMPRESSED_SUFFIXES):
            raise tar_index.compressed_error(str(source))
        root = folder or "/"
        if not path_text.is_store_uri(root):
            root = path_text.escape_path(os.path.realpath(path_text.unescape_path(root)))
        try:
            return root, [containers.stat_container(root, leaf)]
        except ContainerError as error:
            raise ConfigError(
                f"{source} cannot be read: {error}.",
                "a folder of images or shards, or one tar, Parquet or Arrow file.",
                "check the spelling; to give several shards, give their folder, not a pattern.",
            ) from error
    root = path_text.resolve(source)
    files = listing.list_files(root, tuple(suffix.encode() for suffix in ALL_SUFFIXES))
    listed = zip(files.paths, files.sizes.tolist(), files.stamps.tolist(), strict=True)
    found = [
        Container(root=root, path=path, size=size, stamp=stamp)
        for path, size, stamp in listed
        if containers.kind_of(path) and not _is_cache(path)
    ]
    compressed = [
        path for path in files.paths if path.lower().endswith(containers.COMPRESSED_SUFFIXES)
    ]
    if compressed:
        raise tar_index.compressed_error(f"{root}/{compressed[0]}")
    kinds = sorted({containers.kind_of(one.path) for one in found})
    if len(kinds) > 1:
        counts = Counter(containers.kind_of(one.path) for one in found)
        shown = ", ".join(f"{counts[kind]} {kind}" for kind in kinds)
        raise ConfigError(
            f"{source} holds files of several kinds with images: {shown}.",
            "tar shards, or Parquet files, or Arrow files.",
            "give the folder of one kind, or one file.",
        )
    return root, found


def _is_cache(path: str) -> bool:
    """Whether an Arrow file is one that `datasets` keeps beside its data."""
    name = path.rpartition("/")[2]
    return name.startswith(("cache-", "tmp")) and name.endswith(".arrow")


def _read_rows(source: str | Path, config: SourceConfig, *, labelled: bool) -> Rows:
    """The images of all containers of a source."""
    root, found = find_containers(source)
    rows = Rows(root=root)
    if found and containers.kind_of(found[0].path) == "tar":
        _read_tars(rows, found, config)
    elif found:
        _read_row_files(rows, found, config, labelled=labelled)
    if not rows.paths:
        reasons = "; ".join(rows.notes)
        raise ConfigError(
            f"{source} holds no images{f' ({reasons})' if reasons else ''}.",
            "image files, tar shards, or Parquet or Arrow files with a column of images.",
            "check what is in its files.",
        )
    return rows


def _first_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NOTED} more" if len(names) > MAX_NOTED else ""
    return ", ".join(names[:MAX_NOTED]) + more


def _unreadable_error(container: Container, error: Exception) -> ConfigError:
    return ConfigError(
        f"{container.location} cannot be read: {error}.",
        "a complete tar, Parquet or Arrow file that does not change while it is read.",
        "copy it again, or leave it out.",
    )


# ----------------------------------------------------------------------------------- tars


def _read_tars(rows: Rows, found: list[Container], config: SourceConfig) -> None:
    """Add the images of tars."""
    keys = container_labels.wanted_names(config)

    def read(number: int) -> tuple[TarIndex, int, list[int]]:
        try:
            index = tar_index.index_tar(found[number], keys)
        except ContainerError as error:
            raise _unreadable_error(found[number], error) from error
        return index, 1, []

    tar_index.forget_unused()
    indexes = dict(walk.run_tasks(read, list(range(len(found)))))
    left_out: Counter[str] = Counter()
    damaged, unmarked = [], []
    for number, one in enumerate(found):
        index = indexes[number]
        left_out.update(index.left_out)
        if index.damage:
            whole = sum(image.offset + image.size <= one.size for image in index.images)
            rest = f"{pluralize(whole, 'whole image')} before that"
            damaged.append(f"{one.path}: {index.damage}, {rest}")
        if index.unmarked:
            unmarked.append(one.path)
        for image in index.images:
            rows.paths.append(f"{one.path}/{image.name}")
            rows.cells.append(dict(image.cells))
            rows.offsets.append(image.offset)
            rows.sizes.append(image.size)
        rows.containers += [one.path] * len(index.images)
        rows.stamps += [one.row_stamp] * len(index.images)
    rows.notes.append(f"{pluralize(len(found), 'tar')} with {pluralize(len(rows.paths), 'image')}")
    rows.notes += [f"cut off or damaged, what follows is lost: {text}" for text in damaged]
    if unmarked:
        rows.notes.append(f"without an end mark, may be cut off: {_first_names(unmarked)}")
    if left_out:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items()))
        rows.notes.append(f"ignored in the tars: {counts}")
    rows.ignored += left_out.total()


# ------------------------------------------------------------------------ Parquet and Arrow


def _read_row_files(
    rows: Rows, found: list[Container], config: SourceConfig, *, labelled: bool
) -> None:
    """Add the rows of Parquet or Arrow files."""
    known: list[tuple[Container, RowFile]] = []
    for one in found:
        try:
            known.append((one, row_files.describe(one)))
        except ContainerError as error:
            raise _unreadable_error(one, error) from error
    rows.image_column = _image_column(known, config)
    for one, file in known:
        columns = _cell_columns(file, rows.image_column, config) if labelled else []
        rows.class_columns |= file.class_names.keys() & set(columns)
        try:
            _add_row_file(rows, one, file, columns)
        except ContainerError as error:
            raise _unreadable_error(one, error) from error
        if file.damage:
            kept = pluralize(file.rows, "row")
            rows.notes.append(
                f"cut off or damaged, what follows is lost: {one.path}: {file.damage}, {kept}"
                " before that"
            )
    kind = "Parquet file" if containers.kind_of(found[0].path) == "parquet" else "Arrow file"
    count = pluralize(len(rows.paths), "row")
    rows.notes.insert(
        0, f"{pluralize(len(found), kind)} with {count}; images in column {rows.image_column}"
    )


def _image_column(known: list[tuple[Container, RowFile]], config: SourceConfig) -> str:
    """The column that holds the images in every file."""
    for one, file in known:
        candidates = file.image_columns
        if config.path_column is not None:
            candidates = [name for name in candidates if name == config.path_column]
        if len(candidates) != 1:
            raise ConfigError(
                f"{one.location} has"
                f" {'the columns ' + ', '.join(candidates) if candidates else 'no column'} that"
                f" can hold images; its columns are {', '.join(file.columns) or 'none'}.",
                "one column of images: binary, or a struct with a field `bytes`.",
                "name the column with --path-column.",
            )
        if candidates[0] != known[0][1].image_columns[0] and config.path_column is None:
            raise ConfigError(
                f"{one.location} has its images in column {candidates[0]}, {known[0][0].path} in"
                f" {known[0][1].image_columns[0]}.",
                "files of one data set, with the same columns.",
                "give the folder of one data set.",
            )
    return config.path_column or known[0][1].image_columns[0]


def _cell_columns(file: RowFile, image_column: str, config: SourceConfig) -> list[str]:
    """The columns of a file that may hold labels and splits."""
    wanted = container_labels.wanted_names(config)
    return [
        name
        for name in file.columns
        if name != image_column and (normalize_name(name) in wanted or name in file.class_names)
    ]


def _add_row_file(rows: Rows, one: Container, file: RowFile, columns: list[str]) -> None:
    """Add the rows of one file, with the cells of these columns."""
    width = len(str(max(file.rows - 1, 0)))
    path_column = file.path_columns.get(rows.image_column)
    read = [*columns, *([path_column] if path_column else [])]
    names: list[str] = []
    if read:
        for part in row_files.read_cells(one, read):
            found = part[path_column] if path_column else [None] * len(part[read[0]])
            names += [_leaf(name) for name in found]
            texts = [_class_texts(part[name], file.class_names.get(name)) for name in columns]
            cells = zip(*texts, strict=True) if texts else [()] * len(found)
            rows.cells += [dict(zip(columns, row, strict=True)) for row in cells]
    else:
        names = [""] * file.rows
        rows.cells += [{} for _ in names]
    if len(names) != file.rows:
        raise ContainerError(f"corrupt: it has {len(names)} rows, its header says {file.rows}")
    for row, name in enumerate(names):
        rows.paths.append(f"{one.path}/{row:0{width}}{name and '-' + name}")
    rows.containers += [one.path] * file.rows
    rows.offsets += range(file.rows)
    rows.sizes += [-1] * file.rows
    rows.stamps += [one.row_stamp] * file.rows


def _leaf(name: object) -> str:
    """The escaped name of an image's original file, without its folder; "" if it has none."""
    if not isinstance(name, str):
        return ""
    leaf = posixpath.basename(name.replace("\\", "/"))
    return path_text.escape_path(leaf[-MAX_NAME_CHARS:].encode("utf-8", "replace"))


def _class_texts(values: list[object], class_names: list[str] | None) -> list[str]:
    """Values of a column as cells of a table; numbers of classes as their names."""

    def name_of(value: object) -> object:
        if isinstance(value, list):
            return [name_of(item) for item in value]
        if class_names is not None and isinstance(value, int):
            return class_names[value] if 0 <= value < len(class_names) else None
        return value

    return [cell_text(name_of(value)) or "" for value in values]
