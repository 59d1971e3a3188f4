"""Folders and tables of images to a catalog, and the catalog to chunks.

    a folder or a table    names and sizes; no image is opened
      -> catalog           one row per file, sorted by path: path, size, stamp, labels, split
      -> chunks            runs of neighbouring rows, cut where a path's own hash says so

Everything after the listing is arithmetic: who extracts what is a function of the catalog
alone, so any number of workers, at any time, agree on it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import ConfigError, files, layouts, named_files, tables
from arrowhead.tables import SourceConfig
from arrowhead.wording import counted

# First place where each pair of split and labels was seen, in words.
Places = dict[tuple[str, tuple[str, ...]], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalog:
    """One row per file, sorted by path; N rows.

    root: text of the resolved folder, or a URI; paths: text of each path below it (see
    `files.text`); sizes: int64 (N,) bytes, -1 where the file could not be looked at; stamps: int64
    (N,), see `files`; labels: tuples of class names, sorted, empty without labels; splits: train,
    valid, test, or "" until it is drawn; tries: uint8 (N,), how often a file that could not be read
    became readable later: part of its shard's name; ignored: number of files seen and left out
    (hidden files, system files, sidecars, files outside any class folder); source: text of the
    table that names the files, "" where a folder is listed; empty: class folders without an image,
    such as train/fox; notes: how the source was read, sentences for a person.
    """

    root: str
    paths: list[str]
    sizes: NDArray[np.int64]
    stamps: NDArray[np.int64]
    labels: list[tuple[str, ...]]
    splits: list[str]
    tries: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    ignored: int = 0
    source: str = ""
    empty: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.tries) == 0:
            object.__setattr__(self, "tries", np.zeros(len(self.paths), np.uint8))

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def classes(self) -> list[str]:
        """Names of the classes, sorted: position is the label's number."""
        return sorted({name for names in set(self.labels) for name in names})

    @property
    def multi(self) -> bool:
        """Whether any image has more than one label."""
        return any(len(names) > 1 for names in set(self.labels))

    def part(self, rows: range) -> Catalog:
        """Some of its rows, as a catalog of their own."""
        here = slice(rows.start, rows.stop)
        names = ("paths", "sizes", "stamps", "labels", "splits", "tries")
        return replace(self, **{name: getattr(self, name)[here] for name in names})

    def read(self, row: int, max_bytes: int) -> tuple[bytes, str | None]:
        """A row's bytes and None, or no bytes and the fault: also if it changed since the listing.

        May be called from many threads at once.
        """
        size, stamp = int(self.sizes[row]), int(self.stamps[row])
        return files.read(self.root, self.paths[row], max_bytes, size, stamp)

    def columns(self) -> dict[str, Any]:
        """The fields by name, as `shards.write_catalog` takes them."""
        said = ("empty", "notes")
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in said}

    def digest(self) -> str:
        """Hash of what is in the catalog, whoever lists it and wherever the root lies."""
        total = hashlib.blake2b(digest_size=16)
        rows = zip(self.paths, self.sizes.tolist(), self.labels, self.splits, strict=True)
        while part := "".join(map(repr, itertools.islice(rows, 4096))):
            total.update(part.encode())
        return total.hexdigest()


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
        catalog, places = _tree(files.resolve(source))
        _must_need_no_table(source, config)
    if teaches and "train" in (given := set(catalog.splits)) and "valid" not in given:
        splits = [split.replace("train", "") for split in catalog.splits]
        places = {(split.replace("train", ""), names): at for (split, names), at in places.items()}
        note = "no image is marked for validation: a share of train is held out (--valid-share)"
        catalog = replace(catalog, splits=splits, notes=(*catalog.notes, note))
    if teaches:
        _must_teach(str(source), catalog, places)
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
    return files.text(named_files.absolute(str(table)))


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
    root = files.resolve(source)
    found = files.listing(root)
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


def _catalog(rows: tables.Rows, order: Sequence[int]) -> Catalog:
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
    root = files.resolve(source)
    if tables.is_table(source):
        tables.must_be_readable(source)
    elif not files.in_store(root):
        files.must_be_folder(root)


def _tree(root: str) -> tuple[Catalog, Places]:
    """The catalog of a tree of class folders."""
    found = files.listing(root)
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


def _left_out(found: files.Listing) -> tuple[str, ...]:
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


def _must_teach(source: str, catalog: Catalog, places: Places) -> None:
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
    if max(Counter(_rarest(free)).values(), default=0) < 2:
        raise ConfigError(
            f"{source} has {counted(len(free), 'image')} to draw from and no class with a second"
            " one: none can be held out for validation.",
            "two images or more of some class (better 20 of each), or a split val.",
            "add images, or put some into val/<class>/ (in a table: a column split).",
        )


def _rarest(labels_K: Sequence[tuple[str, ...]]) -> list[str]:
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
    plain = files.raw(name).decode("utf-8", "surrogateescape")
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", plain).casefold())


# -------------------------------------------------------------------------- arithmetic


def drawn(
    catalog: Catalog,
    image_ids: Sequence[bytes],
    valid_share: float,
    faulty: Sequence[bool] | None = None,
) -> Catalog:
    """The catalog with the splits that were "" drawn, class by class, from the image ids.

    image_ids: 16 bytes each, a hash of the content; faulty: which rows have no image (they go to
    train and count nowhere). Of each class the images with the lowest ids validate, as many as the
    share, rounded, but at least one; one stays in train. So a few images more move few others. The
    copies of an image stay together, with those whose split was given, too: a copy of a test image
    is tested. An image with several labels counts for the rarest of them.
    """
    free_N = np.array([split == "" for split in catalog.splits], bool)
    well_N = free_N if faulty is None else free_N & ~np.array(faulty, bool)
    splits = [split or "train" for split in catalog.splits]
    key_N = np.frombuffer(b"".join(image_ids), ">u8").reshape(-1, 2)[:, 0]
    row_M = np.flatnonzero(well_N)
    key_K, first_K, image_M, count_K = np.unique(
        key_N[row_M], return_index=True, return_inverse=True, return_counts=True
    )
    given_N = np.array(catalog.splits)
    valid_K = np.isin(key_K, key_N[given_N == "valid"])
    fixed_K = valid_K | np.isin(key_K, key_N[given_N == "train"])
    test_K = ~fixed_K & np.isin(key_K, key_N[given_N == "test"])
    fixed_K |= test_K
    labels_K = [catalog.labels[row] for row in row_M[first_K].tolist()]
    for at in np.flatnonzero(count_K[image_M] > 1).tolist():  # copies may be labelled differently
        image = int(image_M[at])
        labels_K[image] = tuple(sorted({*labels_K[image], *catalog.labels[row_M[at]]}))
    rarest_K = _rarest(labels_K)
    strata: dict[str, list[int]] = {}
    for image in np.flatnonzero(~fixed_K).tolist():
        strata.setdefault(rarest_K[image], []).append(image)
    for images in strata.values():
        _hold_out(images, count_K, valid_share, valid_K)
    taught = {
        name for names in set(itertools.compress(labels_K, ~(valid_K | test_K))) for name in names
    } | {
        name
        for names in set(itertools.compress(catalog.labels, given_N == "train"))
        for name in names
    }
    for image in np.flatnonzero(valid_K & ~fixed_K)[::-1].tolist():  # each class must be taught
        if not taught.issuperset(labels_K[image]):
            taught.update(labels_K[image])
            valid_K[image] = False
    for split, chosen_K in (("valid", valid_K), ("test", test_K)):
        for row in row_M[chosen_K[image_M]].tolist():
            splits[row] = split
    return replace(catalog, splits=splits)


def _hold_out(
    images: list[int], count_K: NDArray[np.int64], share: float, valid_K: NDArray[np.bool_]
) -> None:
    """Mark those of a class's images (by number, in order) that validate."""
    wanted = max(1, math.floor(share * int(count_K[images].sum()) + 0.5))
    taken: list[int] = []
    for image in images:
        if wanted < 1 or len(taken) + 1 == len(images):
            break
        if count_K[image] <= wanted:
            taken.append(image)
            wanted -= int(count_K[image])
    if not taken and len(images) > 1:  # all have more copies than are wanted
        taken = [min(images, key=lambda image: int(count_K[image]))]
    valid_K[taken] = True


def chunks(paths: Sequence[str], size: int) -> list[range]:
    """Runs of rows over all of them, `size` long on average; only the last is shorter than half.

    A row ends its run when the CRC-32 of its path is the smallest of all rows up to size/2 away.
    Nothing further off counts: a file added or removed moves borders up to that far away, so it
    changes three chunks at most, and every other shard stays as it is.
    """
    if not paths:
        return []
    reach = size // 2
    codes = np.fromiter(map(zlib.crc32, map(str.encode, paths)), np.int64, len(paths))
    codes = (codes << 20) + np.arange(len(codes)) % 2**20  # no two neighbours alike
    lowest = np.pad(codes, reach, constant_values=np.iinfo(np.int64).max)
    width, full = 1, 2 * reach + 1
    while width < full:  # lowest of `width` rows from each row on; two such windows make a longer
        step = min(width, full - width)
        lowest = np.minimum(lowest[:-step], lowest[step:])
        width += step
    ends = np.flatnonzero(codes == lowest) + 1
    borders = [0, *ends[(ends > reach) & (ends < len(paths))].tolist(), len(paths)]
    return [range(start, stop) for start, stop in itertools.pairwise(borders)]


def chunk_name(catalog: Catalog, rows: range, fingerprint: str) -> str:
    """Name of the shard that holds these rows: a hash of the files' stamps and the recipe.

    Size and stamp count: a file replaced under its old name belongs to another shard. So does one
    that could be read at last, which leaves no trace in either: that is what `tries` is for.
    """
    here = slice(rows.start, rows.stop)
    columns = (catalog.sizes[here], catalog.stamps[here], catalog.tries[here])
    stamps = zip(*(column.tolist() for column in columns), strict=True)
    lines = [
        f"{path}\t{size}\t{stamp}\n" if not tries else f"{path}\t{size}\t{stamp}\t{tries}\n"
        for path, (size, stamp, tries) in zip(catalog.paths[here], stamps, strict=True)
    ]
    total = hashlib.blake2b(fingerprint.encode(), digest_size=12)
    total.update("".join(lines).encode())
    return total.hexdigest()


def share(count: int, rank: int, world: int) -> range:
    """The rows of one worker out of `count`: a run of neighbours, sizes at most one apart."""
    return range(count * rank // world, count * (rank + 1) // world)
