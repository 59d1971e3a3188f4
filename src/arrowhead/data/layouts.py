"""What the folders of a data set mean: which are splits, which are classes.

    train/<class>/… val/<class>/… [test/<class>/…]     splits, under any of their usual names
    train/<class>/… [test/<class>/…]                   no validation: a share of train is drawn
    <class>/…                                          no splits: a share of each class is drawn

A folder is only read as a split when there are class folders in it: `train` beside `plane` and
`bus`, each with images, is a class. Where both could be meant it is refused.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from arrowhead.errors import ConfigError
from arrowhead.wording import counted

SPLITS = ("train", "valid", "test")
WORK = {"train": "trains", "valid": "validates", "test": "tests"}
_ROLE = re.compile(
    r"(?:(?:data|images?|imgs?)[ _.-])?"
    r"(?:(?P<train>train(?:ing)?|trn)"
    r"|(?P<valid>val(?:id(?:ation|ate)?)?|dev|eval(?:uation)?|hold[ _.-]?out)"
    r"|(?P<test>test(?:ing)?))"
    r"(?:[ _.-]?(?:set|data|split|images?|imgs?|folder|dir))*(?:[ _.-]?20\d\d)?"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Where class folders stand.

    splits: split by the folder that it is in ("train/": "train"), in path order; {"": ""} without
    splits; "" as split: a share is to be drawn. notes: sentences for a person.
    """

    splits: dict[str, str]
    notes: tuple[str, ...] = ()


def role(word: str) -> str | None:
    """train, valid or test for any usual name of a split, in any case; None for other words."""
    match = _ROLE.fullmatch(unicodedata.normalize("NFKC", word).strip().casefold())
    return match.lastgroup if match else None


def _named_so(
    paths: Sequence[str], bare: Sequence[str], tops: dict[str, int], roles: dict[str, str]
) -> dict[str, str]:
    """Roles of folders such as seg_train/ and seg_test/, or 1-train/ and 2-val/: a name of a split
    is a part of theirs, and train has two or more class folders, which the others have, too.
    """
    found = dict(roles)
    for top in tops:
        words = re.split(r"[^a-z]+", unicodedata.normalize("NFKC", top).casefold())
        parts = {part for word in words if (part := role(word))}
        if top not in found and len(parts) == 1:
            found[top] = parts.pop()
    trains = [top for top, part in found.items() if part == "train"]
    others = [top for top, part in found.items() if part != "train"]
    if len(trains) != 1 or not others:
        return roles
    taught = set(_inner(paths, bare, trains[0]))
    alike = (taught & set(_inner(paths, bare, top)) for top in others)
    if len(taught) < 2 or not any(len(names) > 1 for names in alike):
        return roles
    return dict(sorted(found.items()))


def _like_splits(paths: Sequence[str], bare: Sequence[str], tops: dict[str, int]) -> str | None:
    """What to say where all folders hold the same folders, as tr/cat, tr/dog, va/cat and va/dog."""
    inner = [_inner(paths, bare, top) for top in sorted(tops) if tops[top]]
    if len(inner) < 2 or len(inner[0]) < 2 or any(one != inner[0] for one in inner):
        return None
    named = _listed(sorted(top for top in tops if tops[top]))
    if all(map(role, inner[0])):
        words = f"the folders {_listed(inner[0])} in each of them do not split"
        return f"{named} are the classes; {words} (<split>/<class>/ would)"
    return (
        f"{named} are taken for classes, though each holds {_listed(inner[0])}: if these are the"
        " classes, call the upper folders train and val"
    )


def folders(paths: Sequence[str], above: str) -> Iterator[tuple[str, int, int]]:
    """Name and rows (from, to) of each folder that stands in `above`, which ends in / or is "".

    paths: sorted.
    """
    row = bisect_left(paths, above)
    while row < len(paths) and paths[row].startswith(above):
        name, slash, _ = paths[row][len(above) :].partition("/")
        # Sorted: what lies in a folder stands together. 0 is the character after /.
        end = bisect_left(paths, f"{above}{name}0", row) if slash else row + 1
        if slash:
            yield name, row, end
        row = end


def read(root: str, paths: Sequence[str], bare: Sequence[str]) -> Layout:
    """What the folders below a root mean.

    paths: of all files, sorted; bare: folders that hold no file of their own. Raises ConfigError
    where that cannot be told.
    """
    tops = {name: last - first for name, first, last in folders(paths, "")}
    for folder in bare:
        tops.setdefault(folder.partition("/")[0], 0)
    roles = {top: part for top in sorted(tops) if (part := role(top))}
    roles = _named_so(paths, bare, tops, roles)
    inner = {top: _inner(paths, bare, top) for top in roles}
    trains = [top for top, part in roles.items() if part == "train"]
    if not any(inner[top] for top in trains):
        layout = _classes(root, paths, tops, roles, inner)
        said = _like_splits(paths, bare, tops)
        return replace(layout, notes=(*layout.notes, said)) if said else layout
    by_split: dict[str, str] = {}
    for top, part in roles.items():
        if part in by_split:
            raise _refused(
                f"{by_split[part]}/ and {top}/, which both say {part}",
                "one folder for each of train, validation and test",
            )
        by_split[part] = top
    return _splits(root, paths, tops, by_split, inner)


def _inner(paths: Sequence[str], bare: Sequence[str], top: str) -> list[str]:
    """Names of the folders in a top folder, with and without images."""
    found = {name for name, *_ in folders(paths, f"{top}/")}
    return sorted(found | {one.split("/")[1] for one in bare if one.startswith(f"{top}/")})


def _classes(
    root: str,
    paths: Sequence[str],
    tops: dict[str, int],
    roles: dict[str, str],
    inner: dict[str, list[str]],
) -> Layout:
    """Folders are classes: none that says train has class folders in it."""
    names = ", ".join(f"{top}/" for top in roles)
    trains = [top for top, part in roles.items() if part == "train"]
    if roles and not trains and len(roles) == len(tops):
        raise _refused(
            f"{root} has {names} but no train/", "train/, with one folder per class in it"
        )
    if trains and (len(roles) == len(tops) or len(roles) > 1):
        count = sum(tops[top] for top in roles if not inner[top])
        raise ConfigError(
            f"{root} has {names} and {counted(count, 'image')} without a class folder in there.",
            "one folder per class in each, such as train/cat/ and train/dog/.",
            "put the images into class folders, or name them and their labels in a table"
            " (.csv: path, label, split).",
        )
    why = "it holds images itself" if trains else "there is no train/ beside it"
    return Layout(
        splits={"": ""}, notes=tuple(f"{top}/ is taken for a class: {why}" for top in roles)
    )


def _splits(
    root: str,
    paths: Sequence[str],
    tops: dict[str, int],
    by_split: dict[str, str],
    inner: dict[str, list[str]],
) -> Layout:
    """Folders are splits: the one that says train has class folders in it."""
    train, valid, test = (by_split.get(part) for part in SPLITS)
    others = [top for top in tops if top not in by_split.values() and tops[top]]
    if not (valid or test) and others:
        raise ConfigError(
            f"{root} has {train}/ with folders in it, beside {_listed(others)}: is {train} a split"
            " or a class?",
            "train/ and val/ (or test/), with one folder per class in each; or class folders only.",
            f"give {root}/{train} to train on what is in it, or rename {train}/ if it is a class.",
        )
    if valid and not (tops[valid] and inner[valid]):
        raise ConfigError(
            f"{root} has {valid}/ with {counted(tops[valid], 'image')} and no class folder in it:"
            " nothing can be validated.",
            f"one folder per class in {valid}/, as in {train}/.",
            f"sort its images into class folders, or take {valid}/ out: a share of {train}/ is"
            " then held out.",
        )
    notes, used = [], {}
    if test and not inner[test]:
        notes.append(f"{test}/ has no class folders: left out: {counted(tops[test], 'file')}")
        test = None
    for part, top in zip(SPLITS, (train, valid, test), strict=True):
        if top:
            used[f"{top}/"] = part
    said = (f"{top} {WORK[part]} ({counted(tops[top[:-1]], 'file')})" for top, part in used.items())
    notes.insert(0, f"splits: {', '.join(said)}")
    if not valid:
        notes.append(f"no validation folder: a share of {train}/ is held out (--valid-share)")
        used = {top: part.replace("train", "") for top, part in used.items()}
    if others:
        notes.append(f"{_listed(sorted(others))} beside the splits: left out")
    return Layout(splits=dict(sorted(used.items())), notes=tuple(notes))


def _listed(tops: Sequence[str]) -> str:
    more = f" and {len(tops) - 5} more" if len(tops) > 5 else ""
    return ", ".join(f"{top}/" for top in tops[:5]) + more


def _refused(found: str, wanted: str) -> ConfigError:
    return ConfigError(
        f"{found}.",
        f"{wanted}.",
        "rename or move the folders, or give the one that holds the class folders.",
    )
