"""Labels and splits of images in containers.

001.cls, 001.json, 001.txt      beside an image of a tar; the first kind that occurs counts
columns of a Parquet file       as those of a table
cat/001.jpg in a tar            without any of these: the class folders in the tar, or the tar's
name (cat.tar)
train-000.tar, val/0.parquet    the split, unless a field says it
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from arrowhead.data import containers, layouts, reading
from arrowhead.data.records import read_records, wanted_names
from arrowhead.data.source_config import SourceConfig
from arrowhead.data.table_parser import LABEL_COLUMNS, normalize_name
from arrowhead.errors import ConfigError
from arrowhead.wording import pluralize

__all__ = ["read_labels", "wanted_names"]

# Files beside shards with the names of the classes, in the order of their numbers.
NAME_FILES = ("classnames.txt", "class_names.txt", "classes.txt", "labels.txt", "names.txt")
NAME_FILES_JSON = ("classnames.json", "class_names.json", "classes.json")
MAX_NAMES_BYTES = 2**24
MIN_CAPTIONS = 20  # different texts, from which on they can be captions
_SHARD_NUMBER = re.compile(r"(?:.*[-_. ])?\d+(?:-of-\d+)?")

Labels = list[tuple[str, ...]]


def read_labels(
    source: str,
    root: str,
    paths: Sequence[str],
    places: Sequence[str],
    cells: Sequence[dict[str, str]],
    config: SourceConfig,
    notes: list[str],
) -> tuple[Labels, list[str | None]]:
    """The labels and splits of images.

    Args:
        source: Where they come from, for messages.
        root: The root of the containers.
        paths: Path of each image.
        places: Path of each image's container.
        cells: Texts of each image by the name of the field.
        config: Which fields hold labels and splits.
        notes: What was guessed is appended here.

    Returns:
        Class names of each image; and its split, "" if it is to be drawn, None if the image is to
        be left out.

    Raises:
        ConfigError: The labels cannot be told.
    """
    by_container = _splits_by_name(source, sorted(set(places)), notes)
    names = _label_fields(source, cells, config)
    if not names:
        if containers.kind_of(places[0]) != "tar" or config.label_column is not None:
            raise _no_labels_error(source, cells, config)
        return _labels_by_folder(source, paths, places, by_container, notes)
    if names[0] == "txt" and config.label_column is None and _are_captions(cells):
        if not any(
            "/" in path[len(place) + 1 :] for path, place in zip(paths, places, strict=True)
        ):
            raise _captions_error(source, cells)
        return _labels_by_folder(source, paths, places, by_container, notes)
    if names[0] == "cls":
        cells = _with_class_names(source, root, places, cells, notes)
    records = [
        [path, *(row.get(name, "") for name in names)]
        for path, row in zip(paths, cells, strict=True)
    ]
    chosen = replace(config, label_column=names[0]) if config.label_column is None else config
    labels, splits = read_records(source, ["path", *names], records, chosen, notes)
    result: list[str | None] = [by_container[place] for place in places]
    if splits is not None:
        result = list(splits)
    no_list = not any(row.get(names[0], "").startswith("[") for row in cells)
    for row, found in enumerate(labels):
        if not found and (no_list or not cells[row].get(names[0], "")):
            result[row] = None
    return labels, result


def _label_fields(source: str, cells: Sequence[dict[str, str]], config: SourceConfig) -> list[str]:
    """The field of the labels, followed by the others; [] if there is none."""
    present = {name for row in cells for name, text in row.items() if text}
    fields = sorted(present - {"cls", "txt"})
    if config.label_column is not None:
        given = normalize_name(config.label_column)
        named = [name for name in sorted(present) if normalize_name(name) == given]
        named = [name for name in named if name == config.label_column] or named
        return [*named[:1], *(name for name in fields if name not in named)] if named else []
    if "cls" in present:
        return ["cls", *fields]
    for tier in LABEL_COLUMNS:
        found = [name for name in fields if normalize_name(name) in tier]
        if len(found) > 1:
            raise _several_labels_error(source, found)
        if found:
            return [*found, *(name for name in fields if name not in found)]
    return ["txt", *fields] if "txt" in present else []


def _several_labels_error(source: str, found: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{source} has several columns that can hold the labels: {', '.join(found)}.",
        "one column of labels.",
        "name it with --label-column.",
    )


def _no_labels_error(
    source: str, cells: Sequence[dict[str, str]], config: SourceConfig
) -> ConfigError:
    present = sorted({name for row in cells for name, text in row.items() if text})
    flag = f" named {config.label_column}" if config.label_column is not None else ""
    return ConfigError(
        f"{source} has no labels{flag}; what can be one there: {', '.join(present) or 'nothing'}.",
        "a column such as label or class; in a tar .cls, .json or .txt beside each image, or class"
        " folders.",
        "name the column with --label-column. To label images with a bundle use `arrowhead score`.",
    )


def _are_captions(cells: Sequence[dict[str, str]]) -> bool:
    """Whether the .txt files beside the images have too many different texts for classes."""
    texts = [row["txt"] for row in cells if row.get("txt")]
    return len(set(texts)) >= MIN_CAPTIONS and 2 * len(set(texts)) > len(texts)


def _captions_error(source: str, cells: Sequence[dict[str, str]]) -> ConfigError:
    texts = [row["txt"] for row in cells if row.get("txt")]
    return ConfigError(
        f"{source} has .txt files that look like captions: {len(set(texts))} different texts for"
        f" {pluralize(len(texts), 'image')}.",
        "labels: .cls files, .json files with the key label, or .txt files with class names.",
        "name a key of the .json files with --label-column; --label-column txt reads them all the"
        " same.",
    )


# ------------------------------------------------------------------------- names of classes


def _with_class_names(
    source: str,
    root: str,
    places: Sequence[str],
    cells: Sequence[dict[str, str]],
    notes: list[str],
) -> list[dict[str, str]]:
    """Replace the numbers in .cls files by names, if a file beside the shards has them."""
    numbers = {text for row in cells if (text := row.get("cls", ""))}
    if not all(text.isdecimal() and len(text) < 10 for text in numbers):
        return list(cells)
    folders = sorted({place.rpartition("/")[0] for place in places})
    found = _read_names(root, list(dict.fromkeys(["", *folders])))
    if found is None:
        notes.append(
            "the .cls files hold numbers: classes are named after them (a file classnames.txt"
            " beside the shards, with a name in each line, would name them)"
        )
        return list(cells)
    name, names = found
    missing = sorted(int(number) for number in numbers if int(number) >= len(names))
    if missing:
        raise ConfigError(
            f"{source} has the class {missing[0]} in a .cls file, but {name} has"
            f" {pluralize(len(names), 'name')} (the first is that of class 0).",
            "a name for each class.",
            f"complete {name}, or remove it: classes are then named by their numbers.",
        )
    notes.append(f"names of the classes from {name}")
    return [row | {"cls": names[int(row["cls"])]} if row.get("cls") else dict(row) for row in cells]


def _read_names(root: str, folders: Sequence[str]) -> tuple[str, list[str]] | None:
    """The first file of names in some folders, and the names."""
    for folder in folders:
        for leaf in (*NAME_FILES, *NAME_FILES_JSON):
            path = f"{folder}/{leaf}" if folder else leaf
            data, fault = reading.read_file(root, path, MAX_NAMES_BYTES)
            if fault:
                continue
            text = data.decode("utf-8-sig", "surrogateescape")
            names = _names_in_json(text) if leaf.endswith(".json") else text.splitlines()
            while names and not names[-1].strip():
                names.pop()
            if names and all(name.strip() for name in names):
                return path, [name.strip() for name in names]
    return None


def _names_in_json(text: str) -> list[str]:
    """The names in a list, or in an object by number; [] for other JSON."""
    try:
        content = json.loads(text)
        if isinstance(content, dict):
            content = [content[str(number)] for number in range(len(content))]
    except (ValueError, KeyError, RecursionError):
        return []
    is_list = isinstance(content, list) and all(isinstance(name, str) for name in content)
    return list(content) if is_list else []


# --------------------------------------------------------------------------------- splits


def _splits_by_name(source: str, places: Sequence[str], notes: list[str]) -> dict[str, str]:
    """The split of each container by its name; "" if names say nothing."""
    roles = {place: split_of_name(place) for place in places}
    given = {role for role in roles.values() if role}
    if len(given) < 2:  # one split, or none: nothing to divide
        if given and "" in roles.values():
            raise _partial_splits_error(source, roles)
        return dict.fromkeys(places, "")
    if "train" not in given or "" in roles.values():
        raise _partial_splits_error(source, roles)
    counts = Counter(roles.values())
    shown = (
        f"{role} from {pluralize(counts[role], 'file')}" for role in layouts.SPLITS if role in given
    )
    notes.append(f"splits by name: {', '.join(shown)}")
    return roles


def split_of_name(path: str) -> str:
    """train, valid or test if the name of a container, or else of a folder above it, says so."""
    for part in reversed(path.split("/")):
        words = re.split(r"[^a-z]+", part.casefold())
        roles = {role for word in words if (role := layouts.split_role(word))}
        if len(roles) == 1:
            return roles.pop()
        if roles:
            return ""
    return ""


def _partial_splits_error(source: str, roles: dict[str, str]) -> ConfigError:
    examples = {role: place for place, role in reversed(roles.items())}
    shown = ", ".join(f"{place} ({role or 'no split'})" for role, place in examples.items())
    return ConfigError(
        f"{source} has files of some splits only: {shown}.",
        "train and val (or test) in the name of every file or of its folder, or in none.",
        "rename them, or give the folder or file of one split: a share is then held out.",
    )


# -------------------------------------------------------------------------------- folders


def _labels_by_folder(
    source: str,
    paths: Sequence[str],
    places: Sequence[str],
    by_container: dict[str, str],
    notes: list[str],
) -> tuple[Labels, list[str | None]]:
    """Labels from the folders in tars, as if they were unpacked; or from the names of the tars."""
    inner = [path[len(place) + 1 :] for path, place in zip(paths, places, strict=True)]
    while True:  # tar cf photos.tar photos/ puts everything into one folder
        tops = {name.split("/")[0] if name.count("/") > 1 else "" for name in inner}
        if len(tops) != 1 or tops == {""}:
            break
        inner = [name.partition("/")[2] for name in inner]
    virtual = []
    for name, place in zip(inner, places, strict=True):
        stem = Path(place).stem
        if "/" not in name and not _SHARD_NUMBER.fullmatch(stem) and len(by_container) > 1:
            name = f"{stem}/{name}"  # one tar per class
        role = by_container[place]
        if role and layouts.split_role(name.split("/")[0]) is None:
            name = f"{role}/{name}"
        virtual.append(name)
    if not any("/" in name for name in virtual):
        raise _no_labels_error(source, [], SourceConfig())
    order = sorted(range(len(virtual)), key=virtual.__getitem__)
    ordered = [virtual[row] for row in order]
    layout = layouts.read_layout(source, ordered, [])
    labels: Labels = [()] * len(paths)
    splits: list[str | None] = [None] * len(paths)
    for above, split in layout.splits.items():
        for name, first, last in layouts.iter_folders(ordered, above):
            for row in order[first:last]:
                labels[row], splits[row] = (name,), split
    notes += layout.notes
    return labels, splits
