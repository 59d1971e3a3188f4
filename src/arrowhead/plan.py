"""Folders and tables of images to a catalog, and the catalog to chunks.

    a folder or a table    names and sizes; no image is opened
      -> catalog           one row per file, sorted by path: path, size, stamp, labels, split
      -> chunks            runs of neighbouring rows, cut where a path's own hash says so

Everything after the listing is arithmetic: who extracts what is a function of the catalog
alone, so any number of workers, at any time, agree on it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import os
import posixpath
import unicodedata
import zlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import ConfigError, files

SPLITS = ("train", "valid", "test")
TABLES = {".csv": ",", ".tsv": "\t"}
LISTS = (".txt", ".lst")
# First place where each pair of split and labels was seen, in words.
Places = dict[tuple[str, tuple[str, ...]], str]


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Where labels and splits come from when folders do not say, and how a table is read."""

    valid_share: float = 0.2
    """Share of images held out for validation, 0 to 1, when DATA does not say which validate.
    Drawn from each file's content, so copies of one image never fall on both sides."""
    images: str | None = None
    """Folder or address that the paths in a CSV or TSV start from; its own folder if not given."""
    suffix: str = ""
    """Added to every path in a CSV or TSV that names images without it, such as .jpg."""
    label_separator: str = " "
    """Stands between several labels of one image in a CSV or TSV. An empty one means one label
    each, which may hold spaces."""

    def __post_init__(self) -> None:
        if not 0 < self.valid_share < 1:
            raise ConfigError(
                f"--valid-share is {self.valid_share}.",
                "a share of the images, more than 0 and less than 1.",
                "give a share such as 0.2.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalog:
    """One row per file, sorted by path; N rows.

    root: text of the resolved folder, or a URI; paths: text of each path below it (see
    `files.text`); sizes: int64 (N,) bytes, -1 where the file could not be looked at; stamps: int64
    (N,), see `files`; labels: tuples of class names, sorted, empty without labels; splits: train,
    valid, test, or "" until it is drawn; tries: uint8 (N,), how often a file that could not be read
    became readable later: part of its shard's name; ignored: number of files seen and left out
    (hidden files, system files, files outside any class folder); empty: class folders without an
    image, such as train/fox.
    """

    root: str
    paths: list[str]
    sizes: NDArray[np.int64]
    stamps: NDArray[np.int64]
    labels: list[tuple[str, ...]]
    splits: list[str]
    tries: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))
    ignored: int = 0
    empty: tuple[str, ...] = ()

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
        return {
            name.name: getattr(self, name.name) for name in fields(self) if name.name != "empty"
        }

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

    source: ROOT/{train,valid[,test]}/<class>/… or ROOT/<class>/…, on a disk or in a store; or a
    .csv or .tsv file with the columns path, labels (or label) and, if you like, split. Where the
    split is not given it is "", to be drawn with `drawn` once the contents have been read.
    teaches: whether a classifier is to be trained on it; else any classes and splits will do.
    Raises ConfigError for a source that is missing, empty or torn, for one class, classes unknown
    to the train split, and class names that differ only in case or Unicode form.
    """
    catalog, places = _table(source, config) if is_table(source) else _tree(files.resolve(source))
    if teaches:
        _must_teach(str(source), places)
    return catalog


def unlabelled(source: str | Path, config: SourceConfig = SourceConfig()) -> Catalog:
    """Every file below a folder, whatever the folders are called, sorted by path; or every path in
    a table (.csv, .tsv: a column `path`) or a list (.txt, .lst: a path per line), in its order, as
    often as it is named there.

    No labels, no splits. Raises ConfigError for a source that is missing, empty or torn.
    """
    if is_table(source):
        return _listed(source, config)
    root = files.resolve(source)
    found = files.listing(root)
    _must_have_images(root, len(found.paths))
    return Catalog(
        root=root,
        paths=found.paths,
        sizes=found.sizes,
        stamps=found.stamps,
        labels=[()] * len(found.paths),
        splits=[""] * len(found.paths),
        ignored=found.ignored,
    )


def must_be_there(source: str | Path) -> None:
    """ConfigError for a folder, table or list that is not on the disk; one in an object store is
    not asked for.
    """
    root = files.resolve(source)
    if is_table(source):
        _content(str(source), _absolute(os.fspath(source)))
    elif not files.in_store(root):
        files.must_be_folder(root)


def _tree(root: str) -> tuple[Catalog, Places]:
    """The catalog of a tree of class folders."""
    found = files.listing(root)
    paths, count = found.paths, len(found.paths)
    bare = [folder.split("/") for folder in found.folders]
    tops = {folder[0] for folder in bare}
    tops |= {name for name, *_ in _folders(paths, "")}
    has_splits = "train" in tops
    _must_be_laid_out(root, tops)
    labels: list[tuple[str, ...]] = [()] * count
    splits = [""] * count
    places: Places = {}
    for split in SPLITS if has_splits else ("",):
        above = f"{split}/" if split else ""
        for name, first, last in _folders(paths, above):
            labels[first:last] = [(name,)] * (last - first)
            splits[first:last] = [split] * (last - first)
            places[split, (name,)] = above + name
    depth = 2 if has_splits else 1
    empty = {"/".join(folder[:depth]) for folder in bare if len(folder) >= depth}
    if has_splits:
        empty = {folder for folder in empty if folder.partition("/")[0] in SPLITS}
    sizes, stamps = found.sizes, found.stamps
    if () in set(labels):
        inside = [names != () for names in labels]
        paths = list(itertools.compress(paths, inside))
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
    ), places


def _folders(paths: list[str], above: str) -> Iterator[tuple[str, int, int]]:
    """Name and rows (from, to) of each folder that stands in `above`, which ends in / or is ""."""
    row = bisect_left(paths, above)
    while row < len(paths) and paths[row].startswith(above):
        name, slash, _ = paths[row][len(above) :].partition("/")
        # Sorted: what lies in a folder stands together. 0 is the character after /.
        end = bisect_left(paths, f"{above}{name}0", row) if slash else row + 1
        if slash:
            yield name, row, end
        row = end


# --------------------------------------------------------------------------------- tables


def is_table(source: str | Path) -> bool:
    """Whether a source is a table or list of images, by its name, and not a folder."""
    name = os.fspath(source)
    return name.lower().endswith((*TABLES, *LISTS)) and not Path(name).is_dir()


def _listed(source: str | Path, config: SourceConfig) -> Catalog:
    """The catalog of a table or list of images without labels, in its order."""
    table = _absolute(os.fspath(source))
    base = _absolute(config.images) if config.images else table.rpartition(b"/")[0]
    if os.fspath(source).lower().endswith(LISTS):
        rows: Iterable[tuple[int, bytes]] = enumerate(_lines(str(source), table, config.suffix), 1)
    else:
        rows = ((line, path) for line, path, *_ in _rows(str(source), table, config, False))
    lines: dict[bytes, int] = {}
    named: list[bytes] = []
    for line, path in rows:
        if path:
            named.append(_joined(base, path))
            lines.setdefault(named[-1], line)
    root, top, order, sizes, stamps = _found(str(source), base, lines)
    at = {path: row for row, path in enumerate(order)}
    paths = [files.text(full[top:]) for full in named]
    row = np.fromiter((at[path] for path in paths), np.int64, len(paths))
    return Catalog(
        root=root,
        paths=paths,
        sizes=sizes[row],
        stamps=stamps[row],
        labels=[()] * len(paths),
        splits=[""] * len(paths),
    )


def _lines(source: str, table: bytes, suffix: str) -> Iterator[bytes]:
    """The path in each line of a list, with its suffix; b"" for an empty line."""
    for line in _content(source, table).removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        path = line.removesuffix(b"\r")
        if b"\0" in path:
            raise ConfigError(
                f"{source} holds NUL bytes: it is no list of paths.",
                "a path in each line.",
                "write one path per line; names with line breaks fit into a CSV.",
            )
        yield path + suffix.encode("utf-8", "surrogateescape") if path.strip() else b""


def _table(source: str | Path, config: SourceConfig) -> tuple[Catalog, Places]:
    """The catalog of a CSV or TSV file."""
    if os.fspath(source).lower().endswith(LISTS):
        raise ConfigError(
            f"{source} is a list of paths: it has no labels.",
            "a folder with one folder per class, or a .csv or .tsv with the columns path, labels.",
            "write the labels beside the paths.",
        )
    table = _absolute(os.fspath(source))
    base = _absolute(config.images) if config.images else table.rpartition(b"/")[0]
    lines: dict[bytes, int] = {}
    labels: list[tuple[str, ...]] = []
    splits: list[str] = []
    places: Places = {}
    for line, path, names, split in _rows(str(source), table, config, True):
        full = _joined(base, path)
        if (before := lines.setdefault(full, line)) != line:
            raise ConfigError(
                f"{source} names {files.text(path)} twice, in lines {before} and {line}.",
                "one line for each image.",
                "take one of them out; several labels of an image stand in one line.",
            )
        labels.append(names)
        splits.append(split)
        places.setdefault((split, names), f"line {line}")
    root, top, paths, sizes, stamps = _found(str(source), base, lines)
    shown = [files.text(full[top:]) for full in lines]
    order = sorted(range(len(shown)), key=shown.__getitem__)
    catalog = Catalog(
        root=root,
        paths=paths,
        sizes=sizes,
        stamps=stamps,
        labels=[labels[row] for row in order],
        splits=[splits[row] for row in order],
    )
    return catalog, places


def _found(
    source: str, base: bytes, lines: Mapping[bytes, int]
) -> tuple[str, int, list[str], NDArray[np.int64], NDArray[np.int64]]:
    """Of the files that a table or list names (full path: line): the root that holds them, the
    length of its part of their paths, and sorted: paths below it, sizes, stamps.
    """
    _must_have_images(source, len(lines))
    top = _common(source, base, lines)
    root = files.text(top[:-1] if files.in_store(files.text(top)) else os.path.realpath(top))
    paths = sorted(files.text(full[len(top) :]) for full in lines)
    sizes, stamps = files.look(root, paths)
    if not (sizes >= 0).any():
        raise ConfigError(
            f"none of the {len(paths)} files that {source} names is there, such as"
            f" {files.text(next(iter(lines)))}.",
            "paths of image files, from its own folder on.",
            "give their folder with --images (in score --base), or what the paths lack at the end"
            " with --suffix.",
        )
    return root, len(top), paths, sizes, stamps


def _content(source: str, table: bytes) -> bytes:
    """The bytes of a table or list."""
    folder, _, leaf = table.rpartition(b"/")
    content, fault = files.read(files.text(folder or b"/"), files.text(leaf), 2**31)
    if fault:
        raise ConfigError(
            f"{source} cannot be read: {fault}.",
            "a folder of images, or a table of them with the columns path and labels.",
            "check the spelling.",
        )
    return content


def _rows(
    source: str, table: bytes, config: SourceConfig, labelled: bool
) -> Iterator[tuple[int, bytes, tuple[str, ...], str]]:
    """Line number, path with its suffix, labels and split of each row of a table."""
    decoded = io.StringIO(
        _content(source, table).decode("utf-8-sig", "surrogateescape"), newline=""
    )
    reader = csv.reader(decoded, delimiter=TABLES[source[-4:].lower()], strict=True)
    numbered = _numbered(source, reader)
    columns = [cell.strip().lower() for cell in next(numbered, (1, []))[1]]
    path_at, label_at, split_at = _columns(source, columns, labelled)
    known: dict[str, tuple[str, ...]] = {}
    for line, row in numbered:
        if not row:
            continue
        if len(row) != len(columns):
            raise _refused(source, line, f"has {len(row)} cells, the header {len(columns)}")
        if not row[path_at] or "\0" in row[path_at]:
            raise _refused(source, line, "has no path, or one that no file can have")
        names: tuple[str, ...] = ()
        if label_at is not None and not (names := known.get(row[label_at], ())):
            names = known[row[label_at]] = _names(row[label_at], config.label_separator)
            if not names:
                raise _refused(source, line, "has no label")
        split = row[split_at].strip() if split_at is not None else ""
        if split not in ("", *SPLITS):
            raise _refused(source, line, f"has the split {split!r}, not train, valid or test")
        path = (row[path_at] + config.suffix).encode("utf-8", "surrogateescape")
        yield line, path, names, split


def _numbered(source: str, reader: Any) -> Iterator[tuple[int, list[str]]]:
    """The rows with the numbers of the lines that they start in: quoted ones may take several."""
    start = 1
    try:
        for row in reader:
            yield start, row
            start = reader.line_num + 1
    except csv.Error as error:
        raise _refused(source, start, f"is no CSV: {error}") from error


def _columns(source: str, columns: list[str], labelled: bool) -> tuple[int, int | None, int | None]:
    """Where path, labels and split stand; None: not asked for, or not there."""
    named = {"path": ["path"], "labels": ["labels", "label"], "split": ["split"]}
    found = {
        key: [at for at, name in enumerate(columns) if name in names]
        for key, names in named.items()
    }
    need = ("path", "labels") if labelled else ("path",)
    if any(len(at) > 1 for at in found.values()) or any(not found[key] for key in need):
        raise ConfigError(
            f"the first line of {source} names the columns {', '.join(columns) or '(none)'}.",
            f"{' and '.join(need)}, each once{', and split if you like' if labelled else ''}.",
            "name them in the first line; other columns do no harm.",
        )
    path, labels, split = (found[key][0] if found[key] else None for key in named)
    assert path is not None
    return path, labels if labelled else None, split if labelled else None


def _refused(source: str, line: int, what: str) -> ConfigError:
    return ConfigError(
        f"{source}, line {line}: it {what}.",
        "a path and its labels in every line, as many cells as the header has.",
        "mend the line; quote a cell that holds the separator or a line break.",
    )


def _names(cell: str, separator: str) -> tuple[str, ...]:
    """The labels in a cell, sorted, each once."""
    names = {name.strip() for name in (cell.split(separator) if separator else [cell])}
    return tuple(sorted(files.text(n.encode("utf-8", "surrogateescape")) for n in names if n))


def _absolute(name: str) -> bytes:
    """A folder or file as a path from the top, or as a URI."""
    if files.in_store(name):
        return files.raw(files.resolve(name))
    # Not what a link leads to: paths start where the table lies.
    return posixpath.normpath(os.fsencode(Path(name).absolute()))


def _joined(base: bytes, path: bytes) -> bytes:
    """A path of a table from the top, . and .. worked out."""
    odd = path[:1] == b"/" or path[-1:] in (b"/", b".") or b"./" in path or b"//" in path
    if not odd:
        return base.rstrip(b"/") + b"/" + path
    origin, below = _origin(base)
    if files.in_store(shown := files.text(path)):
        origin, below = _origin(files.raw(files.resolve(shown)))
        path = b""
    return origin + b"/" + posixpath.normpath(posixpath.join(b"/" + below, path)).lstrip(b"/")


def _origin(full: bytes) -> tuple[bytes, bytes]:
    """The store of a URI, such as s3://bucket (b"" on a disk), and the path in it."""
    if not files.in_store(files.text(full)):
        return b"", full
    scheme, _, rest = full.partition(b"://")
    store, slash, path = rest.partition(b"/")
    return scheme + b"://" + store, slash + path


def _common(source: str, base: bytes, lines: Mapping[bytes, int]) -> bytes:
    """The folder that holds all paths, ending in /: the base, unless one leaves it."""
    first, last = min(lines), max(lines)  # what these two share, all share
    top = base.rstrip(b"/") + b"/"
    if first.startswith(top) and last.startswith(top):
        return top
    if _origin(first)[0] != _origin(last)[0]:
        raise ConfigError(
            f"{source} names files in several places: {files.text(first)} in line {lines[first]},"
            f" {files.text(last)} in line {lines[last]}.",
            "files on one disk or in one bucket.",
            "split the table, or copy the files together; --images says where paths start.",
        )
    alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    shared = bytes(byte for byte, _ in alike)
    return shared[: shared.rindex(b"/") + 1]


# ------------------------------------------------------------------------------- refusals


def _must_have_images(root: str, count: int) -> None:
    if count == 0:
        raise ConfigError(
            f"{root} holds no images.",
            "image files, in train/<class>/ and valid/<class>/, in <class>/, or loose for scoring.",
            "put images there, or give the folder above or below it.",
        )


def _must_be_laid_out(root: str, tops: set[str]) -> None:
    """Folders of splits that are not quite so would become classes."""
    if "train" in tops and "valid" not in tops:
        raise ConfigError(
            f"{root} has train/ but no valid/.",
            "both, with one folder per class in each; or one folder per class and no train/.",
            f"make {root}/valid, or give {root}/train: a share of it is then held out.",
        )
    whole = "train" in tops
    odd = sorted(top for top in tops if _alike(top) in SPLITS and not (whole and top in SPLITS))
    if odd and (whole or len(odd) == len(tops)):
        raise ConfigError(
            f"{root} has {', '.join(f'{top}/' for top in odd)}"
            f" {'beside' if whole else 'but no'} train/.",
            "train/ and valid/, in small letters, with one folder per class in each.",
            "rename the folders, or give the one that holds the class folders.",
        )


def _must_teach(source: str, places: Places) -> None:
    _must_have_images(source, len(places))
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
        raise ConfigError(
            f"{source} has one class, {next(iter(where))!r}.",
            "two classes or more: a classifier chooses between them.",
            "add images of something else beside it.",
        )
    splits = {split for split, _ in places}
    if splits <= {"train", "test"}:
        raise ConfigError(
            f"{source} has no image in the split valid.",
            "train and valid; or no splits: a share is then held out.",
            "mark some images valid, or leave the split out.",
        )
    taught = {name for split, names in places if split in ("train", "") for name in names}
    if unknown := sorted(set(where) - taught):
        raise ConfigError(
            f"{source} has no images of {', '.join(unknown)} in train.",
            "every class of valid and test also in train.",
            "move some of its images to train, or remove or rename that class.",
        )


def _alike(name: str) -> str:
    """What names share that differ in case or Unicode form: a canonical caseless match (UAX 21)."""
    plain = files.raw(name).decode("utf-8", "surrogateescape")
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", plain).casefold())


# -------------------------------------------------------------------------- arithmetic


def drawn(catalog: Catalog, image_ids: Sequence[bytes], valid_share: float) -> Catalog:
    """The catalog with the splits that were "" drawn from the image ids (16 bytes each)."""
    limit = int(valid_share * 2**64)
    splits = [
        split or ("valid" if int.from_bytes(image_id[:8], "big") < limit else "train")
        for split, image_id in zip(catalog.splits, image_ids, strict=True)
    ]
    return replace(catalog, splits=splits)


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
