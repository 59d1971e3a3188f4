"""Tell splits from classes by the folder names of a data set.

    train/<class>/… val/<class>/… [test/<class>/…]     splits, under any common name
    train/<class>/… [test/<class>/…]                   no validation: a share of train is drawn
    <class>/…                                          no splits: a share of each class is drawn

A folder is a split only if it contains class folders: `train` beside `plane` and `bus`, each with
images, is a class. Ambiguous layouts are refused.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from arrowhead.errors import ConfigError
from arrowhead.wording import pluralize

SPLITS = ("train", "valid", "test")
SPLIT_VERBS = {"train": "trains", "valid": "validates", "test": "tests"}
_SPLIT_NAME = re.compile(
    r"(?:(?:data|images?|imgs?)[ _.-])?"
    r"(?:(?P<train>train(?:ing)?|trn)"
    r"|(?P<valid>val(?:id(?:ation|ate)?)?|dev|eval(?:uation)?|hold[ _.-]?out)"
    r"|(?P<test>test(?:ing)?))"
    r"(?:[ _.-]?(?:set|data|split|images?|imgs?|folder|dir))*(?:[ _.-]?20\d\d)?"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where the class folders are.

    Attributes:
        splits: Split of each parent of class folders ("train/": "train"), in path order; {"": ""}
            without splits. The split "" means that a share is to be drawn.
        notes: Sentences for the user.
    """

    splits: dict[str, str]
    notes: tuple[str, ...] = ()


def split_role(word: str) -> str | None:
    """train, valid or test for a common name of a split, in any case; None for other words."""
    match = _SPLIT_NAME.fullmatch(unicodedata.normalize("NFKC", word).strip().casefold())
    return match.lastgroup if match else None


def _roles_by_name_part(
    paths: Sequence[str], bare: Sequence[str], tops: dict[str, int], roles: dict[str, str]
) -> dict[str, str]:
    """Add the splits of folders such as seg_train/ and seg_test/, or 1-train/ and 2-val/.

    Part of the name is a split, and the train folder shares at least two class folders with
    another one.

    Args:
        paths: All files, sorted.
        bare: Folders that hold no file directly.
        tops: Number of files in each top-level folder.
        roles: Split of each top-level folder whose whole name is one.
    """
    splits_by_folder = dict(roles)
    for top in tops:
        words = re.split(r"[^a-z]+", unicodedata.normalize("NFKC", top).casefold())
        parts = {part for word in words if (part := split_role(word))}
        if top not in splits_by_folder and len(parts) == 1:
            splits_by_folder[top] = parts.pop()
    trains = [top for top, part in splits_by_folder.items() if part == "train"]
    others = [top for top, part in splits_by_folder.items() if part != "train"]
    if len(trains) != 1 or not others:
        return roles
    train_classes = set(_subfolders(paths, bare, trains[0]))
    shared = (train_classes & set(_subfolders(paths, bare, top)) for top in others)
    if len(train_classes) < 2 or not any(len(names) > 1 for names in shared):
        return roles
    return dict(sorted(splits_by_folder.items()))


def _note_possible_splits(
    paths: Sequence[str], bare: Sequence[str], tops: dict[str, int]
) -> str | None:
    """A note if all folders contain the same subfolders, as tr/cat, tr/dog, va/cat and va/dog."""
    inner = [_subfolders(paths, bare, top) for top in sorted(tops) if tops[top]]
    if len(inner) < 2 or len(inner[0]) < 2 or any(names != inner[0] for names in inner):
        return None
    named = _join_names(sorted(top for top in tops if tops[top]))
    if all(map(split_role, inner[0])):
        advice = f"the folders {_join_names(inner[0])} in each of them are not used as splits"
        return f"{named} are the classes; {advice} (<split>/<class>/ would be)"
    return (
        f"{named} are read as classes, though each holds {_join_names(inner[0])}: if these are"
        " the classes, rename the upper folders to train and val"
    )


def iter_folders(paths: Sequence[str], parent: str) -> Iterator[tuple[str, int, int]]:
    """Yield name, first row and end row of each folder in a parent folder.

    Args:
        paths: All files, sorted.
        parent: The parent folder, which ends in /; "" for the root.
    """
    row = bisect_left(paths, parent)
    while row < len(paths) and paths[row].startswith(parent):
        name, slash, _ = paths[row][len(parent) :].partition("/")
        # The files of a folder are consecutive; 0 is the character after /.
        end = bisect_left(paths, f"{parent}{name}0", row) if slash else row + 1
        if slash:
            yield name, row, end
        row = end


def read_layout(root: str, paths: Sequence[str], bare: Sequence[str]) -> Layout:
    """Find the splits and class folders below a root.

    Args:
        root: The root, for messages.
        paths: All files below it, sorted.
        bare: Folders that hold no file directly.

    Raises:
        ConfigError: The layout is ambiguous.
    """
    tops = {name: last - first for name, first, last in iter_folders(paths, "")}
    for folder in bare:
        tops.setdefault(folder.partition("/")[0], 0)
    roles = {top: part for top in sorted(tops) if (part := split_role(top))}
    roles = _roles_by_name_part(paths, bare, tops, roles)
    inner = {top: _subfolders(paths, bare, top) for top in roles}
    trains = [top for top, part in roles.items() if part == "train"]
    if not any(inner[top] for top in trains):
        layout = _class_layout(root, paths, tops, roles, inner)
        note = _note_possible_splits(paths, bare, tops)
        return replace(layout, notes=(*layout.notes, note)) if note else layout
    by_split: dict[str, str] = {}
    for top, part in roles.items():
        if part in by_split:
            raise _layout_error(
                f"{by_split[part]}/ and {top}/ both mean {part}",
                "one folder for each of train, validation and test",
            )
        by_split[part] = top
    return _split_layout(root, paths, tops, by_split, inner)


def _subfolders(paths: Sequence[str], bare: Sequence[str], top: str) -> list[str]:
    """Names of the folders in a top-level folder, with and without images."""
    names = {name for name, *_ in iter_folders(paths, f"{top}/")}
    return sorted(names | {folder.split("/")[1] for folder in bare if folder.startswith(f"{top}/")})


def _class_layout(
    root: str,
    paths: Sequence[str],
    tops: dict[str, int],
    roles: dict[str, str],
    inner: dict[str, list[str]],
) -> Layout:
    """The layout if top-level folders are classes: no train folder contains class folders."""
    names = ", ".join(f"{top}/" for top in roles)
    trains = [top for top, part in roles.items() if part == "train"]
    if roles and not trains and len(roles) == len(tops):
        raise _layout_error(
            f"{root} has {names} but no train/", "train/, with one folder per class in it"
        )
    if trains and (len(roles) == len(tops) or len(roles) > 1):
        count = sum(tops[top] for top in roles if not inner[top])
        raise ConfigError(
            f"{root} has {names} and {pluralize(count, 'image')} without a class folder inside.",
            "one folder per class in each, such as train/cat/ and train/dog/.",
            "put the images into class folders, or name them and their labels in a table"
            " (.csv: path, label, split).",
        )
    reason = "it holds images itself" if trains else "there is no train/ beside it"
    return Layout(
        splits={"": ""}, notes=tuple(f"{top}/ is read as a class: {reason}" for top in roles)
    )


def _split_layout(
    root: str,
    paths: Sequence[str],
    tops: dict[str, int],
    by_split: dict[str, str],
    inner: dict[str, list[str]],
) -> Layout:
    """The layout if top-level folders are splits: the train folder contains class folders."""
    train, valid, test = (by_split.get(part) for part in SPLITS)
    others = [top for top in tops if top not in by_split.values() and tops[top]]
    if not (valid or test) and others:
        raise ConfigError(
            f"{root} has {train}/ with folders in it, beside {_join_names(others)}: is {train} a"
            " split or a class?",
            "train/ and val/ (or test/), with one folder per class in each; or class folders only.",
            f"give {root}/{train} to train on what is in it, or rename {train}/ if it is a class.",
        )
    if valid and not (tops[valid] and inner[valid]):
        raise ConfigError(
            f"{root} has {valid}/ with {pluralize(tops[valid], 'image')} and no class folder in it:"
            " nothing can be validated.",
            f"one folder per class in {valid}/, as in {train}/.",
            f"sort its images into class folders, or remove {valid}/: a share of {train}/ is"
            " then held out.",
        )
    notes, used = [], {}
    if test and not inner[test]:
        notes.append(f"{test}/ has no class folders: ignored: {pluralize(tops[test], 'file')}")
        test = None
    for part, top in zip(SPLITS, (train, valid, test), strict=True):
        if top:
            used[f"{top}/"] = part
    descriptions = (
        f"{top} {SPLIT_VERBS[part]} ({pluralize(tops[top[:-1]], 'file')})"
        for top, part in used.items()
    )
    notes.insert(0, f"splits: {', '.join(descriptions)}")
    if not valid:
        notes.append(f"no validation folder: a share of {train}/ is held out (--valid-share)")
        used = {top: part.replace("train", "") for top, part in used.items()}
    if others:
        notes.append(f"{_join_names(sorted(others))} beside the splits: ignored")
    return Layout(splits=dict(sorted(used.items())), notes=tuple(notes))


def _join_names(tops: Sequence[str]) -> str:
    more = f" and {len(tops) - 5} more" if len(tops) > 5 else ""
    return ", ".join(f"{top}/" for top in tops[:5]) + more


def _layout_error(found: str, wanted: str) -> ConfigError:
    return ConfigError(
        f"{found}.",
        f"{wanted}.",
        "rename or move the folders, or give the one that holds the class folders.",
    )
