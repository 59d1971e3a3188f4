"""One table of images: its columns found, its rows read."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from arrowhead.data import exclusions, layouts, named_files, path_text
from arrowhead.data.source_config import SourceConfig
from arrowhead.errors import ConfigError

TABLES = {".csv": ",", ".tsv": "\t"}
DELIMITERS = ",;\t|"
# Names of columns, letters and digits only. Those of an earlier row are preferred.
PATHS = (
    {"path", "filepath", "filepaths", "imagepath", "imgpath"},
    {"filename", "file", "image", "img", "imagename", "imgname", "imagefile", "photo", "picture"},
    {"id", "imageid", "imgid", "fileid", "name"},
)
LABELS = (
    {"label", "labels", "tags"},
    {"class", "classes", "classname", "classlabel", "labelname", "category", "categoryname"}
    | {"target", "y", "breed", "species"},
)
SPLIT_COLUMNS = ("split", "subset", "set", "dataset", "partition", "phase")
TRUE = {"true", "t", "yes", "y", "1", "1.0"}
FALSE = {"false", "f", "no", "n", "0", "0.0"}
SAMPLE_ROWS = 100
SAMPLE_BYTES = 2**16  # of a table, to know its encoding by; a multiple of 4
_COMMENTS = re.compile(r"(?:[ \t]*#[^\n]*\n)+")  # lines above a header
_ITEM = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"|([^\s,\[\]'\"][^,\[\]'\"]*)")


def decoded(source: str, content: bytes) -> str:
    """The text of a table; bytes that are not UTF-8 become surrogates."""
    if content.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")) or _is_utf_32(content):
        raise ConfigError(
            f"{source} is UTF-32, which is not read.",
            "a table in UTF-8 or UTF-16.",
            "save it again as CSV in UTF-8.",
        )
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        code = "utf-16"
    elif b"\0" not in content:
        return content.decode("utf-8-sig", "surrogateescape")
    elif not (code := _utf_16(content)):
        raise _holds_nul(source)
    try:
        text = content.decode(code)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source} looks like UTF-16 but is torn: {error.reason} at byte {error.start}.",
            "a table in UTF-8 or UTF-16.",
            "save it again as CSV in UTF-8.",
        ) from error
    if "\0" in text:
        raise _holds_nul(source)
    return text


def _utf_16(content: bytes) -> str:
    """The UTF-16 that a text with NUL bytes and without a byte order mark is in; "" for none.

    Its line breaks tell, in any script: each is one aligned unit of two bytes. Letters do not: in
    Chinese few bytes are 0, and those of U+4E00 in one order are the letter N in the other.
    """
    start = content[:SAMPLE_BYTES]
    unit = np.frombuffer(start[: len(start) & ~1], "<u2")
    little, big = int((unit == 0x000A).sum()), int((unit == 0x0A00).sum())
    if 2 * max(little, big) > start.count(b"\n"):
        return "utf-16-le" if little > big else "utf-16-be"
    if 3 * start.count(b"\0") > len(start):  # one line of Latin letters
        even, odd = start[::2].count(b"\0"), start[1::2].count(b"\0")
        return "utf-16-le" if odd > even else "utf-16-be"
    return ""


def _is_utf_32(content: bytes) -> bool:
    """Whether a text without a byte order mark is UTF-32: no other text is valid as that."""
    start = content[:SAMPLE_BYTES]
    for code in ("utf-32-le", "utf-32-be") if len(start) > 3 and b"\0" in start else ():
        try:
            start[: len(start) & ~3].decode(code)
        except UnicodeDecodeError:
            continue
        return True
    return start.count(b"\0\0\0") * 5 > len(start)


def _holds_nul(source: str) -> ConfigError:
    return ConfigError(
        f"{source} holds NUL bytes: it is no text in UTF-8 or UTF-16.",
        "a table or list as text, in UTF-8 or UTF-16.",
        "save it again as CSV in UTF-8, or write one path per line.",
    )


def _is_image_name(cell: str) -> bool:
    return cell.lower().encode("utf-8", "surrogateescape").endswith(exclusions.IMAGES)


def _plain(name: str) -> str:
    """A column's name without case, spaces and signs."""
    return "".join(char for char in name.casefold() if char.isalnum())


def refused(source: str, line: int, what: str) -> ConfigError:
    """The refusal of one line of a table."""
    return ConfigError(
        f"{source}, line {line}: it {what}.",
        "a path and its labels in every line, as many cells as the header has.",
        "mend the line; quote a cell that holds the separator or a line break.",
    )


def _no_split(where: str, what: str) -> ConfigError:
    return ConfigError(
        f"{where}: it has {what}, not train, val or test (nor yes or no in every line).",
        "one of train, val and test in every line of that column, or yes or no in every line.",
        "write these words; in a table without the column a share is drawn for validation.",
    )


class Sheet:
    """A table's text with what its columns mean: positions of path, label and splits."""

    def __init__(self, source: str, text: str, delimiter: str, header_line: int) -> None:
        self.source, self._text, self._delimiter = source, text, delimiter
        self._header_line = header_line
        self._torn: ConfigError | None = None  # a header that is no CSV with this delimiter
        try:
            header = next(self._numbered(), (1, []))[1]
        except ConfigError as error:
            self._torn, header = error, []
        self.names = [cell.strip() for cell in header]
        self.path = 0
        self.label: int | None = None
        self.splits: list[int] = []

    @staticmethod
    def of(
        source: str, content: bytes, config: SourceConfig, labelled: bool, notes: list[str]
    ) -> Sheet:
        """The sheet with its columns found; how they were is noted."""
        text = decoded(source, content)
        delimiters, skipped = TABLES[source[-4:].lower()] + DELIMITERS, 0
        if match := re.match(r"sep=(.)\r?\n", text):  # how Excel is told
            delimiters, skipped = match[1], match.end()
        starts = [skipped]
        if match := _COMMENTS.match(text, skipped):  # or a header whose first name begins with #
            starts.append(match.end())
        sheets = [
            Sheet(source, text[start:], delimiter, 1 + text.count("\n", 0, start))
            for start in starts
            for delimiter in dict.fromkeys(delimiters)
        ]
        sheet = next((one for one in sheets if one._fits(config, labelled)), None)
        if sheet is None:  # that which has most columns is refused, unless its cells tell more
            sheet = max(sheets, key=lambda one: len(one.names))
        sheet._find(config, labelled, notes, by_cells=True)
        try:
            text.encode()
        except UnicodeEncodeError:
            notes.append(f"{source} is not UTF-8: labels with other bytes are read as Windows-1252")
        return sheet

    def _fits(self, config: SourceConfig, labelled: bool) -> bool:
        """Whether the names of the columns alone say what is needed."""
        try:
            self._find(config, labelled, [], by_cells=False)
        except ConfigError:
            return False
        return True

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Each row below the header with the number of the line that it starts in."""
        for line, row in itertools.islice(self._numbered(), 1, None):
            if not any(map(str.strip, row)):  # spreadsheets leave rows of nothing
                continue
            if len(row) != len(self.names):
                what = f"has {len(row)} cells, the header {len(self.names)}"
                raise refused(self.source, line, what)
            yield line, row

    def _numbered(self) -> Iterator[tuple[int, list[str]]]:
        """The rows with the numbers of their first lines: quoted ones may take several."""
        reader: Any = csv.reader(
            io.StringIO(self._text, newline=""), delimiter=self._delimiter, strict=True
        )
        start = self._header_line
        try:
            for row in reader:
                yield start, row
                start = reader.line_num + self._header_line
        except csv.Error as error:
            raise refused(self.source, start, f"is no CSV: {error}") from error

    def _find(
        self, config: SourceConfig, labelled: bool, notes: list[str], *, by_cells: bool
    ) -> None:
        """Find the columns; ConfigError if they are not there or several could be meant."""
        if self._torn:
            raise self._torn
        if self.names and _is_image_name(self.names[0]):
            raise ConfigError(
                f"the first line of {self.source} is an image ({self.names[0]}), no header.",
                "the columns' names in the first line, such as path,label.",
                "write such a line above it.",
            )
        path = self._named("--path-column", config.path_column)
        label = self._named("--label-column", config.label_column)
        split = self._named("--split-column", config.split_column) if labelled else None
        self.splits = [] if split is None else [split]
        taken = {label, split}
        if path is None:
            path = self._guess(PATHS, taken, "--path-column")
        if path is None and by_cells:
            path = self._column_of_images(taken)
        if path is None:
            raise self._missing("which column names the images", "--path-column")
        self.path = path
        if not labelled:
            self._say(notes, config, [(path, "names the images", {"path"})])
            return
        if split is None and by_cells:
            self.splits = self._split_columns(taken | {path})
        if label is None:
            label = self._guess(LABELS, {path, *self.splits}, "--label-column")
        if label is None:  # the only column that is left
            rest = [at for at in range(len(self.names)) if at not in (path, *self.splits)]
            label = rest[0] if len(rest) == 1 else None
        if label is None:
            raise self._missing("which column holds the labels", "--label-column")
        self.label = label
        said = [(path, "names the images", {"path"}), (label, "the labels", {"label", "labels"})]
        self._say(notes, config, said)

    def _say(
        self, notes: list[str], config: SourceConfig, said: list[tuple[int, str, set[str]]]
    ) -> None:
        """Note the columns, if one of them was guessed."""
        asked = {config.path_column, config.label_column}
        if any(_plain(self.names[at]) not in usual for at, _, usual in said) and asked == {None}:
            words = ", ".join(f"column {self.names[at]} {what}" for at, what, _ in said)
            notes.append(f"guessed: {words} (--path-column, --label-column)")

    def _named(self, flag: str, name: str | None) -> int | None:
        """The column that a flag names."""
        if name is None:
            return None
        places = [at for at, one in enumerate(self.names) if one == name]
        places = places or [at for at, one in enumerate(self.names) if _plain(one) == _plain(name)]
        if len(places) != 1:
            raise self._missing(f"{len(places) or 'no'} columns that are {name}", flag)
        return places[0]

    def _guess(
        self, tiers: Sequence[set[str]], taken: Iterable[int | None], flag: str
    ) -> int | None:
        """The column that has one of these names."""
        taken = set(taken)
        for names in tiers:
            places = [
                at for at, one in enumerate(self.names) if _plain(one) in names and at not in taken
            ]
            if len(places) > 1:
                found = " and ".join(self.names[at] for at in places)
                raise self._missing(f"{found}, which could both be meant", flag)
            if places:
                return places[0]
        return None

    def _column_of_images(self, taken: Iterable[int | None]) -> int | None:
        """The only column whose cells end as names of images do."""
        rows = [row for _, row in itertools.islice(self.rows(), SAMPLE_ROWS)]
        found = [
            at
            for at in range(len(self.names))
            if at not in set(taken)
            and sum(
                row[at].lower().encode("utf-8", "replace").endswith(exclusions.IMAGES)
                for row in rows
            )
            > 0.9 * len(rows)
        ]
        return found[0] if len(found) == 1 and rows else None

    def _split_columns(self, taken: Iterable[int | None]) -> list[int]:
        """The columns that say which images train: by their names, and those that are not called
        so by their words, too. Several together only as yes and no (is_valid, is_test).
        """
        plain = [_plain(name) for name in self.names]
        if plain.count("split") > 1:
            raise self._missing("several columns that are split", "--split-column")
        if "split" in plain:
            return [plain.index("split")]
        free = [at for at in range(len(plain)) if at not in set(taken)]
        meant = {at: meaning[0] for at in free if (meaning := _boolean_meaning(plain[at]))}
        if len(set(meant.values())) < len(meant):
            found = " and ".join(self.names[at] for at in meant)
            raise self._missing(f"{found}, which could both be meant", "--split-column")
        if meant:
            return [at for at in meant if len(meant) == 1 or meant[at] != "train"]
        for at in free:
            if plain[at] in SPLIT_COLUMNS:
                words = {row[at].strip() for _, row in self.rows()} - {""}
                if words and all(map(layouts.role, words)):
                    return [at]
        return []

    def _missing(self, what: str, flag: str) -> ConfigError:
        return ConfigError(
            f"the first line of {self.source} names the columns"
            f" {', '.join(self.names) or '(none)'}; asked for: {what}.",
            "one column of paths (path, image, filename …), one of labels (label, class …), and"
            " split if you like.",
            f"name the column with {flag}; other columns do no harm.",
        )

    def splitter(self, notes: list[str]) -> Callable[[int, list[str]], str]:
        """Gives the split of each row (line, cells)."""
        meanings: dict[int, tuple[str, str] | None] = {}
        blank: dict[int, str] = {}
        for at in self.splits:
            cells = [row[at].strip().casefold() for _, row in self.rows()]
            words = set(cells) - {""}
            meanings[at] = None
            if words and words <= TRUE | FALSE:
                meaning = _boolean_meaning(_plain(self.names[at])) or ("valid", "train")
                meanings[at] = meaning
                yes, no = (layouts.WORK[part] for part in meaning)
                # Who writes only one of the two words means the other where nothing is written.
                if words <= TRUE or words <= FALSE:
                    blank[at] = meaning[words <= TRUE]
                notes.append(f"column {self.names[at]}: yes {yes}, no {no}")
            else:
                _say_unusual_words(self.source, self.names[at], words, notes)
            if words and (count := cells.count("")):
                which = f"column {self.names[at]}: an empty cell"
                does = layouts.WORK[blank[at]] if at in blank else "is drawn (--valid-share)"
                notes.append(f"{which} {does} ({count} lines)")

        def split_of(line: int, row: list[str]) -> str:
            found = set()
            for at, meaning in meanings.items():
                word = row[at].strip()
                part = layouts.role(word)
                if word and meaning:
                    part = meaning[word.casefold() not in TRUE]
                elif word and part is None:
                    raise _no_split(f"{self.source}, line {line}", f"{word!r} as {self.names[at]}")
                found.add(part or blank.get(at, ""))
            found -= {"train", ""} if len(found - {"train", ""}) else set()
            if len(found) > 1 and "" not in found:
                raise refused(self.source, line, "is to validate and to test")
            return max(found, default="")

        return split_of

    def labeller(
        self, config: SourceConfig, notes: list[str]
    ) -> Callable[[int, list[str]], tuple[str, ...]]:
        """Gives the labels of each row (line, cells)."""
        at = self.label
        assert at is not None
        cells = {row[at].strip() for _, row in self.rows()}
        given_cells = cells - {""}
        lists = bool(given_cells) and all(re.fullmatch(r"\[.*\]", x, re.S) for x in given_cells)
        tags = _plain(self.names[at]) == "tags" and config.label_separator != ""
        several = lists or tags or config.multi_label or bool(config.label_separator)
        separator = ""
        if several and not lists:
            given = config.label_separator
            separator = given or next((c for c in "|;," if any(c in x for x in cells)), " ")
        known = {cell: _names(cell, separator, lists) for cell in cells}
        if several:
            most = max(map(len, known.values()), default=0)
            _say_several(self.names[at], separator, lists, most, config, notes)
        elif example := _looks_like_several(cells):
            notes.append(
                f"column {self.names[at]} looks as if it held several labels ({example!r}); each"
                " cell is taken for one label: if not so, say --multi-label"
            )

        def labels_of(line: int, row: list[str]) -> tuple[str, ...]:
            if not (names := known[row[at].strip()]) and not lists:
                raise refused(self.source, line, "has no label")
            return names

        return labels_of


def _boolean_meaning(plain: str) -> tuple[str, str] | None:
    """What yes and no mean in a column such as isvalid; None for other names."""
    part = layouts.role(plain.removeprefix("is")) if plain.startswith("is") else None
    if part == "train":
        return "train", "valid"
    return (part, "train") if part else None


def _names(cell: str, separator: str, lists: bool) -> tuple[str, ...]:
    """The labels in a cell, sorted, each once; separator "": one label."""
    parts = [cell]
    if lists:
        parts = [re.sub(r"\\(.)", r"\1", a or b or c) for a, b, c in _ITEM.findall(cell[1:-1])]
    elif separator:
        parts = cell.split(separator)
    names = {named_files.windows_1252(name.strip()) for name in parts}
    return tuple(
        sorted(path_text.escape_path(n.encode("utf-8", "surrogateescape")) for n in names if n)
    )


def _say_several(
    name: str, separator: str, lists: bool, most: int, config: SourceConfig, notes: list[str]
) -> None:
    between = "as lists" if lists else f"separated by {separator!r}"
    if most > 1:
        notes.append(f"column {name}: up to {most} labels for each image, {between}")
    elif config.multi_label or config.label_separator:
        raise ConfigError(
            f"several labels were asked for, but column {name} has one in every cell, {between}.",
            "some images with several labels.",
            "say what stands between them with --label-separator, or leave --multi-label out.",
        )
    else:
        notes.append(f"column {name} has one label for each image")


USUAL_SPLITS = {"train", "training", "val", "valid", "validation", "test"}


def _say_unusual_words(source: str, name: str, words: set[str], notes: list[str]) -> None:
    """Say how the words of a column that splits are read, where that could surprise. Raises
    ConfigError for a held-out part beside a validation part: it may be meant to test.
    """
    valid = sorted(word for word in words if layouts.role(word) == "valid")
    held_out = next((word for word in valid if word.startswith("hold")), None)
    if held_out and (others := [word for word in valid if not word.startswith("hold")]):
        what = f"{held_out!r} beside {others[0]!r} as {name}: it may mean test or validation"
        raise _no_split(source, what)
    parts = {word: part for word in sorted(words - USUAL_SPLITS) if (part := layouts.role(word))}
    if parts:
        said = ", ".join(f"{word} {layouts.WORK[part]}" for word, part in parts.items())
        notes.append(f"column {name}: {said}")


def _looks_like_several(cells: set[str]) -> str | None:
    """A cell that seems to hold several labels: the same few words in many combinations."""
    for separator in ("|", ";", ",", " "):
        parts = {cell: [one.strip() for one in cell.split(separator)] for cell in cells}
        several = sorted(cell for cell, words in parts.items() if len(words) > 1)
        words = {word for one in parts.values() for word in one if word}
        if len(several) > 2 and len(words) < len(cells):
            return several[0]
    return None
