"""Build the catalog of a folder, a table or shards of images.

No image is opened. Everything that follows, such as chunks and splits, is a function of the catalog
alone, so that any number of workers agree on it.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from arrowhead.data import (
    container_source,
    drop_list,
    layouts,
    listing,
    named_files,
    path_text,
    tables,
)
from arrowhead.data.catalog import Catalog
from arrowhead.data.source_config import SourceConfig
from arrowhead.data.tables import TableRows
from arrowhead.data.walk import Listing
from arrowhead.errors import ConfigError
from arrowhead.wording import pluralize

# Where each pair of split and labels occurs first, for messages.
FirstSeen = dict[tuple[str, tuple[str, ...]], str]


# -------------------------------------------------------------------- folders and tables


def labelled_catalog(
    source: str | Path, config: SourceConfig = SourceConfig(), *, for_training: bool = True
) -> Catalog:
    """The catalog of images with labels.

    A split that the source does not give is "", to be drawn with `splits.draw_splits` once the
    images have been read; so is validation if only train, or train and test, are given.

    Args:
        source: Class folders, or splits with class folders in them (see `layouts`), on a disk or in
            a store; a .csv or .tsv file (see `tables`); a tar, Parquet or Arrow file, or a folder
            of these (see `container_source`).
        config: How labels and splits are read.
        for_training: Whether to check that a classifier can be trained on it.

    Raises:
        ConfigError: The source is missing, empty or corrupt; or, for training, it has one class,
            classes without train images, or class names that differ only in case or Unicode form.
    """
    if tables.is_table(source):
        catalog, first_seen = _catalog_of_table(source, config)
        catalog = replace(catalog, source=_table_location(source))
    elif container_source.is_container(source):
        _refuse_table_settings(source, config, allowed=CONTAINER_SETTINGS)
        catalog, first_seen = container_source.labelled_catalog(source, config)
    else:
        root = path_text.resolve(source)
        files = listing.list_files(root)
        if _has_containers(files):
            _refuse_table_settings(source, config, allowed=CONTAINER_SETTINGS)
            catalog, first_seen = container_source.labelled_catalog(source, config)
        else:
            catalog, first_seen = _catalog_of_folder(root, files)
            _refuse_table_settings(source, config)
    if config.drop is not None:
        catalog = drop_list.leave_out(catalog, config.drop)
        left = set(zip(catalog.splits, catalog.labels, strict=True))
        first_seen = {key: place for key, place in first_seen.items() if key in left}
    if for_training and "train" in (given := set(catalog.splits)) and "valid" not in given:
        splits = [split.replace("train", "") for split in catalog.splits]
        first_seen = {
            (split.replace("train", ""), names): at for (split, names), at in first_seen.items()
        }
        note = "no image is marked for validation: a share of train is held out (--valid-share)"
        catalog = replace(catalog, splits=splits, notes=(*catalog.notes, note))
    if for_training:
        _check_trainable(str(source), catalog, first_seen)
    return catalog


TABLE_SETTINGS = (  # fields of SourceConfig that apply to tables only
    "images",
    "suffix",
    "path_column",
    "label_column",
    "split_column",
    "multi_label",
    "label_separator",
)


CONTAINER_SETTINGS = (  # those that apply to tar, Parquet and Arrow files, too
    "path_column",
    "label_column",
    "split_column",
    "multi_label",
    "label_separator",
)


def _has_containers(files: Listing) -> bool:
    """Whether a folder has no image files, but tar, Parquet or Arrow files."""
    return not files.paths and any(map(container_source.is_possible_suffix, files.sidecars))


def _refuse_table_settings(
    source: str | Path,
    config: SourceConfig,
    base_flag: str = "--images",
    allowed: Sequence[str] = (),
) -> None:
    """Raise ConfigError if a setting for tables is given with another source, where it has no
    effect.
    """
    plain = SourceConfig()
    for name in TABLE_SETTINGS:
        if name not in allowed and getattr(config, name) != getattr(plain, name):
            flag = base_flag if name == "images" else "--" + name.replace("_", "-")
            raise ConfigError(
                f"{source} is {'no table' if allowed else 'a folder'}; {flag} says how a table is"
                " read.",
                "a table of images, or a folder without that flag.",
                f"leave {flag} out, or give the table in the place of the folder.",
            )


def _table_location(table: str | Path) -> str:
    """The escaped absolute path of a table."""
    return path_text.escape_path(named_files.absolute_path(str(table)))


def unlabelled_catalog(
    source: str | Path,
    config: SourceConfig = SourceConfig(),
    *,
    base_flag: str = "--images",
    distinct: bool = False,
) -> Catalog:
    """The catalog of images without labels and splits.

    Args:
        source: A folder: every file below it, sorted by path. A table (.csv, .tsv) or list
            (.txt, .lst: a path per line): every path, in its order, with repetitions. Or shards
            (see `container_source`): every image in them, sorted by path.
        config: How a table is read.
        base_flag: The command's flag for the field `images`.
        distinct: Sort the paths of a table too, and list each only once.

    Raises:
        ConfigError: The source is missing, empty or corrupt, or settings for tables are given with
            a folder.
    """
    catalog = _list_unlabelled(source, config, base_flag, distinct)
    return catalog if config.drop is None else drop_list.leave_out(catalog, config.drop)


def _list_unlabelled(
    source: str | Path, config: SourceConfig, base_flag: str, distinct: bool
) -> Catalog:
    """As `unlabelled_catalog`, with all images."""
    if tables.is_table(source):
        rows = tables.read_table(source, config, labelled=False)
        order: Sequence[int] = range(len(rows.paths))
        if distinct:
            first = {path: row for row, path in reversed(list(enumerate(rows.paths)))}
            order = [first[path] for path in sorted(first)]
        return replace(_catalog_from_rows(rows, order), source=_table_location(source))
    if container_source.is_container(source):
        _refuse_table_settings(source, config, base_flag, CONTAINER_SETTINGS)
        return container_source.unlabelled_catalog(source, config)
    root = path_text.resolve(source)
    files = listing.list_files(root)
    if _has_containers(files):
        _refuse_table_settings(source, config, base_flag, CONTAINER_SETTINGS)
        return container_source.unlabelled_catalog(source, config)
    _check_has_images(root, len(files.paths), files.ignored)
    _refuse_table_settings(source, config, base_flag)
    return Catalog(
        root=root,
        paths=files.paths,
        sizes=files.sizes,
        stamps=files.stamps,
        labels=[()] * len(files.paths),
        splits=[""] * len(files.paths),
        ignored=files.ignored,
        notes=_exclusion_notes(files),
    )


def _catalog_of_table(source: str | Path, config: SourceConfig) -> tuple[Catalog, FirstSeen]:
    """The catalog of a CSV or TSV file, and the first line of each pair of split and labels."""
    if tables.is_list(source):
        raise ConfigError(
            f"{source} is a list of paths: it has no labels.",
            "a folder with one folder per class, or a .csv or .tsv with the columns path, label.",
            "write the labels beside the paths.",
        )
    rows = tables.read_table(source, config, labelled=True)
    first_seen: FirstSeen = {}
    for split, names, line in zip(rows.splits, rows.labels, rows.lines, strict=True):
        first_seen.setdefault((split, names), f"line {line}")
    return _catalog_from_rows(
        rows, sorted(range(len(rows.paths)), key=rows.paths.__getitem__)
    ), first_seen


def _catalog_from_rows(rows: TableRows, order: Sequence[int]) -> Catalog:
    """The rows of a table as a catalog, in this order."""
    at = np.array(order, np.int64)
    return Catalog(
        root=rows.root,
        paths=[rows.paths[row] for row in order],
        sizes=rows.sizes[at],
        stamps=rows.stamps[at],
        labels=[rows.labels[row] for row in order],
        splits=[rows.splits[row] for row in order],
        notes=rows.notes,
    )


def check_exists(source: str | Path) -> None:
    """Raise ConfigError for a folder, table or list that does not exist on the disk. Object stores
    are not checked.
    """
    root = path_text.resolve(source)
    if tables.is_table(source):
        tables.check_readable(source)
    elif container_source.is_container(source):
        container_source.check_exists(source)
    elif not path_text.is_store_uri(root):
        listing.check_folder(root)


def _catalog_of_folder(root: str, files: Listing) -> tuple[Catalog, FirstSeen]:
    """The catalog of class folders, and the folder of each pair of split and labels."""
    paths, count = files.paths, len(files.paths)
    layout = layouts.read_layout(root, paths, files.folders)
    labels: list[tuple[str, ...]] = [()] * count
    splits = [""] * count
    first_seen: FirstSeen = {}
    for above, split in layout.splits.items():
        for name, first, last in layouts.iter_folders(paths, above):
            labels[first:last] = [(name,)] * (last - first)
            splits[first:last] = [split] * (last - first)
            first_seen[split, (name,)] = above + name
    depth = 1 + max(above.count("/") for above in layout.splits)
    bare = [folder.split("/") for folder in files.folders]
    empty = {"/".join(folder[:depth]) for folder in bare if len(folder) >= depth}
    empty = {folder for folder in empty if folder.startswith(tuple(layout.splits))}
    sizes, stamps, notes = files.sizes, files.stamps, [*layout.notes, *_exclusion_notes(files)]
    if () in set(labels):
        in_class_folder = [names != () for names in labels]
        paths = list(itertools.compress(paths, in_class_folder))
        if not paths:
            raise _no_class_folders_error(root, count)
        notes.append(f"ignored: {pluralize(count - len(paths), 'file')} outside the class folders")
        labels = list(itertools.compress(labels, in_class_folder))
        splits = list(itertools.compress(splits, in_class_folder))
        sizes, stamps = sizes[in_class_folder], stamps[in_class_folder]
    return Catalog(
        root=root,
        paths=paths,
        sizes=sizes,
        stamps=stamps,
        labels=labels,
        splits=splits,
        ignored=files.ignored + count - len(paths),
        empty_folders=tuple(sorted(empty - set(first_seen.values()))),
        notes=tuple(notes),
    ), first_seen


def _exclusion_notes(files: Listing) -> tuple[str, ...]:
    """Notes on files that were ignored, in case the user misses them."""
    notes = []
    if files.sidecars:
        counts = sorted(files.sidecars.items(), key=lambda pair: (-pair[1], pair[0]))
        kinds = [f"{count} {suffix}" for suffix, count in counts[:5]]
        kinds += [f"{sum(n for _, n in counts[5:])} of other kinds"] if len(counts) > 5 else []
        notes.append(f"{', '.join(kinds)}: not images by name and content, ignored")
    if hidden := files.ignored - sum(files.sidecars.values()):
        notes.append(f"{hidden} hidden or system files: ignored")
    own = [name for name in files.own if not name.rpartition("/")[2].startswith(".")]
    if own:
        more = f" and {len(own) - 6} more" if len(own) > 6 else ""
        notes.append(f"ignored, written by Arrowhead or MLflow: {', '.join(own[:6])}{more}")
    return tuple(notes)


# ------------------------------------------------------------------------------- refusals


def _check_has_images(root: str, count: int, ignored: int = 0) -> None:
    if count == 0:
        raise ConfigError(
            f"{root} holds no images{f' ({ignored} other files)' if ignored else ''}.",
            "image files, in train/<class>/ and val/<class>/, in <class>/, or loose for scoring.",
            "put images there, or give the folder above or below it.",
        )


def _no_class_folders_error(root: str, count: int) -> ConfigError:
    return ConfigError(
        f"{root} holds {pluralize(count, 'image')} without a class folder: they have no labels.",
        "one folder per class, such as cat/ and dog/; or a table (.csv) with the columns path and"
        " label.",
        "move the images into class folders, or write such a table. To label loose images with a"
        " bundle use `arrowhead score`.",
    )


def _check_trainable(source: str, catalog: Catalog, first_seen: FirstSeen) -> None:
    _check_has_images(source, len(first_seen), catalog.ignored)
    where: dict[str, str] = {}
    for (_, names), place in first_seen.items():
        for name in names:
            where.setdefault(name, place)
    twins: dict[str, str] = {}
    for name in sorted(where):
        if (twin := twins.setdefault(canonical_name(name), name)) != name:
            raise ConfigError(
                f"{source} has two classes that look alike: {twin!a} ({where[twin]}) and"
                f" {name!a} ({where[name]}).",
                "names that differ in more than case or the Unicode form of a letter.",
                "rename one, so that both are the same class or clearly not.",
            )
    if len(where) < 2:
        only = next(iter(where))
        inner = [name for name, *_ in layouts.iter_folders(catalog.paths, f"{only}/")]
        raise ConfigError(
            f"{source} has one class, {only!r}.",
            "two classes or more: a classifier chooses between them.",
            f"give {source.rstrip('/')}/{only}, which holds {', '.join(inner[:4])}."
            if len(inner) > 1
            else "add images of something else beside it.",
        )
    train_classes = {
        name for split, names in first_seen if split in ("train", "") for name in names
    }
    if unknown := sorted(set(where) - train_classes):
        raise ConfigError(
            f"{source} has no images of {', '.join(unknown)} in train.",
            "every class of valid and test also in train.",
            "move some of its images to train, or remove or rename that class.",
        )


def check_can_validate(source: str | Path, catalog: Catalog) -> None:
    """Raise ConfigError if no validation split is given or can be drawn, as each class has only one
    image.
    """
    if "valid" in catalog.splits:
        return
    free = [
        names for names, split in zip(catalog.labels, catalog.splits, strict=True) if split == ""
    ]
    if max(Counter(rarest_labels(free)).values(), default=0) < 2:
        raise ConfigError(
            f"{source} has {pluralize(len(free), 'image')} to draw from and no class with a second"
            " one: none can be held out for validation.",
            "two images or more of some class (better 20 of each), or a split val.",
            "add images, or put some into val/<class>/ (in a table: a column split).",
        )


def rarest_labels(labels_K: Sequence[tuple[str, ...]]) -> list[str]:
    """The rarest label of each image, by which it is stratified."""
    frequency: Counter[str] = Counter()
    for names, count in Counter(labels_K).items():
        frequency.update(dict.fromkeys(names, count))
    rarest = {
        names: min(names, key=lambda name: (frequency[name], name), default="")
        for names in set(labels_K)
    }
    return [rarest[names] for names in labels_K]


def canonical_name(name: str) -> str:
    """The same for names that differ in case or Unicode form only (canonical caseless, UAX 21)."""
    plain = path_text.unescape_path(name).decode("utf-8", "surrogateescape")
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", plain).casefold())
