"""Folders and tables of images to a catalog, and the catalog to chunks.

    a folder or a table    names and sizes; no image is opened
      -> catalog           one row per file, sorted by path: path, size, stamp, labels, split
      -> chunks            runs of neighbouring rows, cut where a path's own hash says so

Everything after the listing is arithmetic: who extracts what is a function of the catalog
alone, so any number of workers, at any time, agree on it.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from arrowhead.data import layouts, listing, named_files, path_text, tables
from arrowhead.data.catalog import Catalog
from arrowhead.data.source_config import SourceConfig
from arrowhead.data.tables import Rows
from arrowhead.data.walk import Listing
from arrowhead.errors import ConfigError
from arrowhead.wording import counted

# First place where each pair of split and labels was seen, in words.
Places = dict[tuple[str, tuple[str, ...]], str]


# -------------------------------------------------------------------- folders and tables


def labelled(
    source: str | Path, config: SourceConfig = SourceConfig(), *, teaches: bool = True
) -> Catalog:
    """Images with labels.

    source: class folders, or splits with class folders in them (see `layouts`), on a disk or in a
    store; or a .csv or .tsv file (see `tables`). Where the split is not given it is "", to be drawn
    with `drawn` once the contents have been read; so is a validation part where only train, or
    train and test, are given.
    teaches: whether a classifier is to be trained on it; else any classes and splits will do.
    Raises ConfigError for a source that is missing, empty or torn, for one class, classes unknown
    to the train split, and class names that differ only in case or Unicode form.
    """
    if tables.is_table(source):
        catalog, places = _table(source, config)
        catalog = replace(catalog, source=_shown(source))
    else:
        catalog, places = _tree(path_text.resolve(source))
        _must_need_no_table(source, config)
    if teaches and "train" in (given := set(catalog.splits)) and "valid" not in given:
        splits = [split.replace("train", "") for split in catalog.splits]
        places = {(split.replace("train", ""), names): at for (split, names), at in places.items()}
        note = "no image is marked for validation: a share of train is held out (--valid-share)"
        catalog = replace(catalog, splits=splits, notes=(*catalog.notes, note))
    if teaches:
        _check_trainable(str(source), catalog, places)
    return catalog


OF_TABLES = (  # settings of a source that a folder does not have
    "images",
    "suffix",
    "path_column",
    "label_column",
    "split_column",
    "multi_label",
    "label_separator",
)


def _must_need_no_table(
    source: str | Path, config: SourceConfig, base_flag: str = "--images"
) -> None:
    """ConfigError for a setting of tables beside a folder, where it would do nothing."""
    plain = SourceConfig()
    for name in OF_TABLES:
        if getattr(config, name) != getattr(plain, name):
            flag = base_flag if name == "images" else "--" + name.replace("_", "-")
            raise ConfigError(
                f"{source} is a folder; {flag} says how a table is read.",
                "a table of images, or a folder without that flag.",
                f"leave {flag} out, or give the table in the place of the folder.",
            )


def _shown(table: str | Path) -> str:
    """The text of where a table lies."""
    return path_text.escape_path(named_files.absolute(str(table)))


def unlabelled(
    source: str | Path, config: SourceConfig = SourceConfig(), *, base_flag: str = "--images"
) -> Catalog:
    """Every file below a folder, whatever the folders are called, sorted by path; or every path in
    a table (.csv, .tsv) or a list (.txt, .lst: a path per line), in its order, as often as it is
    named there.

    No labels, no splits. Raises ConfigError for a source that is missing, empty or torn, and for
    settings of tables beside a folder. base_flag: what the verb calls the field `images`.
    """
    if tables.is_table(source):
        rows = tables.read(source, config, labelled=False)
        return replace(_catalog(rows, range(len(rows.paths))), source=_shown(source))
    root = path_text.resolve(source)
    found = listing.listing(root)
    _must_have_images(root, len(found.paths), found.ignored)
    _must_need_no_table(source, config, base_flag)
    return Catalog(
        root=root,
        paths=found.paths,
        sizes=found.sizes,
        stamps=found.stamps,
        labels=[()] * len(found.paths),
        splits=[""] * len(found.paths),
        ignored=found.ignored,
        notes=_left_out(found),
    )


def _table(source: str | Path, config: SourceConfig) -> tuple[Catalog, Places]:
    """The catalog of a CSV or TSV file."""
    if tables.is_list(source):
        raise ConfigError(
            f"{source} is a list of paths: it has no labels.",
            "a folder with one folder per class, or a .csv or .tsv with the columns path, label.",
            "write the labels beside the paths.",
        )
    rows = tables.read(source, config, labelled=True)
    places: Places = {}
    for split, names, line in zip(rows.splits, rows.labels, rows.lines, strict=True):
        places.setdefault((split, names), f"line {line}")
    return _catalog(rows, sorted(range(len(rows.paths)), key=rows.paths.__getitem__)), places


def _catalog(rows: Rows, order: Sequence[int]) -> Catalog:
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


def must_be_there(source: str | Path) -> None:
    """ConfigError for a folder, table or list that is not on the disk; one in an object store is
    not asked for.
    """
    root = path_text.resolve(source)
    if tables.is_table(source):
        tables.must_be_readable(source)
    elif not path_text.in_store(root):
        listing.must_be_folder(root)


def _tree(root: str) -> tuple[Catalog, Places]:
    """The catalog of a tree of class folders."""
    found = listing.listing(root)
    paths, count = found.paths, len(found.paths)
    layout = layouts.read(root, paths, found.folders)
    labels: list[tuple[str, ...]] = [()] * count
    splits = [""] * count
    places: Places = {}
    for above, split in layout.splits.items():
        for name, first, last in layouts.folders(paths, above):
            labels[first:last] = [(name,)] * (last - first)
            splits[first:last] = [split] * (last - first)
            places[split, (name,)] = above + name
    depth = 1 + max(above.count("/") for above in layout.splits)
    bare = [folder.split("/") for folder in found.folders]
    empty = {"/".join(folder[:depth]) for folder in bare if len(folder) >= depth}
    empty = {folder for folder in empty if folder.startswith(tuple(layout.splits))}
    sizes, stamps, notes = found.sizes, found.stamps, [*layout.notes, *_left_out(found)]
    if () in set(labels):
        inside = [names != () for names in labels]
        paths = list(itertools.compress(paths, inside))
        if not paths:
            raise _loose(root, count)
        notes.append(f"ignored: {counted(count - len(paths), 'file')} outside the class folders")
        labels = list(itertools.compress(labels, inside))
        splits = list(itertools.compress(splits, inside))
        sizes, stamps = sizes[inside], stamps[inside]
    return Catalog(
        root=root,
        paths=paths,
        sizes=sizes,
        stamps=stamps,
        labels=labels,
        splits=splits,
        ignored=found.ignored + count - len(paths),
        empty=tuple(sorted(empty - set(places.values()))),
        notes=tuple(notes),
    ), places


def _left_out(found: Listing) -> tuple[str, ...]:
    """What a listing left out though it may be missed, in words."""
    notes = []
    if found.sidecars:
        counts = sorted(found.sidecars.items(), key=lambda pair: (-pair[1], pair[0]))
        words = [f"{count} {ending}" for ending, count in counts[:5]]
        words += [f"{sum(n for _, n in counts[5:])} of other kinds"] if len(counts) > 5 else []
        notes.append(f"{', '.join(words)}: not images by name and content, ignored")
    if hidden := found.ignored - sum(found.sidecars.values()):
        notes.append(f"{hidden} hidden or system files: ignored")
    own = [name for name in found.own if not name.rpartition("/")[2].startswith(".")]
    if own:
        more = f" and {len(own) - 6} more" if len(own) > 6 else ""
        notes.append(f"left out, written by Arrowhead or MLflow: {', '.join(own[:6])}{more}")
    return tuple(notes)


# ------------------------------------------------------------------------------- refusals


def _must_have_images(root: str, count: int, ignored: int = 0) -> None:
    if count == 0:
        raise ConfigError(
            f"{root} holds no images{f' ({ignored} other files)' if ignored else ''}.",
            "image files, in train/<class>/ and val/<class>/, in <class>/, or loose for scoring.",
            "put images there, or give the folder above or below it.",
        )


def _loose(root: str, count: int) -> ConfigError:
    return ConfigError(
        f"{root} holds {counted(count, 'image')} without a class folder: nothing says what they"
        " show.",
        "one folder per class, such as cat/ and dog/; or a table (.csv) with the columns path and"
        " label.",
        "move the images into class folders, or write such a table. To label loose images with a"
        " bundle use `arrowhead score`.",
    )


def _check_trainable(source: str, catalog: Catalog, places: Places) -> None:
    _must_have_images(source, len(places), catalog.ignored)
    where: dict[str, str] = {}
    for (_, names), place in places.items():
        for name in names:
            where.setdefault(name, place)
    twins: dict[str, str] = {}
    for name in sorted(where):
        if (twin := twins.setdefault(_alike(name), name)) != name:
            raise ConfigError(
                f"{source} has two classes that look alike: {twin!a} ({where[twin]}) and"
                f" {name!a} ({where[name]}).",
                "names that differ in more than case or the Unicode form of a letter.",
                "rename one, so that both are the same class or clearly not.",
            )
    if len(where) < 2:
        only = next(iter(where))
        inner = [name for name, *_ in layouts.folders(catalog.paths, f"{only}/")]
        raise ConfigError(
            f"{source} has one class, {only!r}.",
            "two classes or more: a classifier chooses between them.",
            f"give {source.rstrip('/')}/{only}, which holds {', '.join(inner[:4])}."
            if len(inner) > 1
            else "add images of something else beside it.",
        )
    taught = {name for split, names in places if split in ("train", "") for name in names}
    if unknown := sorted(set(where) - taught):
        raise ConfigError(
            f"{source} has no images of {', '.join(unknown)} in train.",
            "every class of valid and test also in train.",
            "move some of its images to train, or remove or rename that class.",
        )


def must_validate(source: str | Path, catalog: Catalog) -> None:
    """ConfigError for a labelled catalog of which no image can validate, however it is drawn: none
    is marked for it, and each class has one image only.
    """
    if "valid" in catalog.splits:
        return
    free = [
        names for names, split in zip(catalog.labels, catalog.splits, strict=True) if split == ""
    ]
    if max(Counter(rarest(free)).values(), default=0) < 2:
        raise ConfigError(
            f"{source} has {counted(len(free), 'image')} to draw from and no class with a second"
            " one: none can be held out for validation.",
            "two images or more of some class (better 20 of each), or a split val.",
            "add images, or put some into val/<class>/ (in a table: a column split).",
        )


def rarest(labels_K: Sequence[tuple[str, ...]]) -> list[str]:
    """The class that each image counts for: the rarest of its labels."""
    number: Counter[str] = Counter()
    for names, count in Counter(labels_K).items():
        number.update(dict.fromkeys(names, count))
    rarest = {
        names: min(names, key=lambda name: (number[name], name), default="")
        for names in set(labels_K)
    }
    return [rarest[names] for names in labels_K]


def _alike(name: str) -> str:
    """What names share that differ in case or Unicode form: a canonical caseless match (UAX 21)."""
    plain = path_text.unescape_path(name).decode("utf-8", "surrogateescape")
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", plain).casefold())
