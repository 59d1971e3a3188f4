"""Find the columns of a table of images and parse its rows."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from arrowhead.data import exclusions, layouts, named_files, path_text
from arrowhead.data.source_config import SourceConfig
from arrowhead.errors import ConfigError

TABLE_DELIMITERS = {".csv": ",", ".tsv": "\t"}
DELIMITERS = ",;\t|"
# Normalized names of columns (see `normalize_name`). Earlier sets are preferred.
PATH_COLUMNS = (
    {"path", "filepath", "filepaths", "imagepath", "imgpath"},
    {"filename", "file", "image", "img", "imagename", "imgname", "imagefile", "photo", "picture"},
    {"id", "imageid", "imgid", "fileid", "name"},
)
LABEL_COLUMNS = (
    {"label", "labels", "tags"},
    {"class", "classes", "classname", "classlabel", "labelname", "category", "categoryname"}
    | {"target", "y", "breed", "species"},
)
SPLIT_COLUMNS = ("split", "subset", "set", "dataset", "partition", "phase")
TRUE_WORDS = {"true", "t", "yes", "y", "1", "1.0"}
FALSE_WORDS = {"false", "f", "no", "n", "0", "0.0"}
SAMPLE_ROWS = 100
SAMPLE_BYTES = 2**16  # to detect the encoding of a table; a multiple of 4
_COMMENTS = re.compile(r"(?:[ \t]*#[^\n]*\n)+")  # comment lines above a header
EMPTY_LIST = re.compile(r"\[\s*\]|\{\s*\}|\(\s*\)")
# What pandas, JSON and spreadsheets write for a missing value.
MISSING_WORDS = frozenset(("nan", "none", "null", "na", "n/a", "#n/a", "<na>"))
_ITEM = re.compile(r"'((?:[^'\\]|\\.)*)'|\"((?:[^\"\\]|\\.)*)\"|([^\s,\[\]'\"][^,\[\]'\"]*)")


def decode_text(source: str, content: bytes) -> str:
    """Decode a table; bytes that are not UTF-8 become surrogates."""
    if content.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")) or _is_utf_32(content):
        raise ConfigError(
            f"{source} is UTF-32, which Arrowhead does not read.",
            "a table in UTF-8 or UTF-16.",
            "save it again as CSV in UTF-8.",
        )
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        code = "utf-16"
    elif b"\0" not in content:
        return content.decode("utf-8-sig", "surrogateescape")
    elif not (code := _detect_utf_16(content)):
        raise _nul_bytes_error(source)
    try:
        text = content.decode(code)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{source} looks like UTF-16 but is corrupt: {error.reason} at byte {error.start}.",
            "a table in UTF-8 or UTF-16.",
            "save it again as CSV in UTF-8.",
        ) from error
    if "\0" in text:
        raise _nul_bytes_error(source)
    return text


def _detect_utf_16(content: bytes) -> str:
    """The byte order of UTF-16 text without a byte order mark; "" if it is not UTF-16.

    Detected by line breaks, which are one aligned pair of bytes in any script. Letters are no help:
    in Chinese few bytes are 0, and U+4E00 is the letter N in the other byte order.
    """
    start = content[:SAMPLE_BYTES]
    unit = np.frombuffer(start[: len(start) & ~1], "<u2")
    little, big = int((unit == 0x000A).sum()), int((unit == 0x0A00).sum())
    if 2 * max(little, big) > start.count(b"\n"):
        return "utf-16-le" if little > big else "utf-16-be"
    if 3 * start.count(b"\0") > len(start):  # a single line of Latin letters
        even, odd = start[::2].count(b"\0"), start[1::2].count(b"\0")
        return "utf-16-le" if odd > even else "utf-16-be"
    return ""


def _is_utf_32(content: bytes) -> bool:
    """Whether text without a byte order mark is UTF-32; other text is not valid UTF-32."""
    start = content[:SAMPLE_BYTES]
    for code in ("utf-32-le", "utf-32-be") if len(start) > 3 and b"\0" in start else ():
        try:
            start[: len(start) & ~3].decode(code)
        except UnicodeDecodeError:
            continue
        return True
    return start.count(b"\0\0\0") * 5 > len(start)


def _nul_bytes_error(source: str) -> ConfigError:
    return ConfigError(
        f"{source} holds NUL bytes: it is not text in UTF-8 or UTF-16.",
        "a table or list as text, in UTF-8 or UTF-16.",
        "save it again as CSV in UTF-8, or write one path per line.",
    )


def _is_image_name(cell: str) -> bool:
    return cell.lower().encode("utf-8", "surrogateescape").endswith(exclusions.IMAGE_SUFFIXES)


def normalize_name(name: str) -> str:
    """A column's name in lower case, letters and digits only."""
    return "".join(char for char in name.casefold() if char.isalnum())


def line_error(source: str, line: int, what: str) -> ConfigError:
    """The refusal of one line of a table; what: a verb phrase, such as "has no path"."""
    return ConfigError(
        f"{source}, line {line}: it {what}.",
        "a path and its labels in every line, as many cells as the header has.",
        "fix the line; quote a cell that holds the separator or a line break.",
    )


def _split_word_error(where: str, what: str) -> ConfigError:
    return ConfigError(
        f"{where}: it has {what}, not train, val or test (nor yes or no in every line).",
        "one of train, val and test in every line of that column, or yes or no in every line.",
        "write these words; in a table without the column a share is drawn for validation.",
    )


class TableParser:
    """The text of a table and the roles of its columns.

    Attributes:
        source: The table, for messages.
        names: The header.
        path: Index of the column of paths.
        label: Index of the column of labels, None without labels.
        splits: Indices of the columns that determine the split.
    """

    def __init__(self, source: str, text: str, delimiter: str, header_line: int) -> None:
        self.source, self._text, self._delimiter = source, text, delimiter
        self._place = f"the first line of {source}"  # where the columns are named
        self._header_line = header_line
        self._header_error: ConfigError | None = None  # the header is not valid CSV
        try:
            header = next(self._numbered_rows(), (1, []))[1]
        except ConfigError as error:
            self._header_error, header = error, []
        self.names = [cell.strip() for cell in header]
        self.path = 0
        self.label: int | None = None
        self.splits: list[int] = []

    @staticmethod
    def parse(
        source: str, content: bytes, config: SourceConfig, labelled: bool, notes: list[str]
    ) -> TableParser:
        """Detect encoding, delimiter and columns of a table; guesses are appended to `notes`."""
        text = decode_text(source, content)
        parsers = TableParser._candidates(source, text)
        parser = next((each for each in parsers if each._has_columns(config, labelled)), None)
        if parser is None:  # look at the cells, too
            parser = TableParser._widest(parsers)
        parser.find_columns(config, labelled, notes, by_cells=True)
        try:
            text.encode()
        except UnicodeEncodeError:
            notes.append(f"{source} is not UTF-8: labels with other bytes are read as Windows-1252")
        return parser

    @staticmethod
    def parse_cells(source: str, content: bytes) -> TableParser:
        """Detect encoding and delimiter of a table, without finding the roles of its columns."""
        parser = TableParser._widest(TableParser._candidates(source, decode_text(source, content)))
        if parser._header_error:
            raise parser._header_error
        return parser

    @staticmethod
    def _candidates(source: str, text: str) -> list[TableParser]:
        """A parser for each delimiter and each line that may be the header."""
        delimiters, skipped = TABLE_DELIMITERS[source[-4:].lower()] + DELIMITERS, 0
        if match := re.match(r"sep=(.)\r?\n", text):  # Excel's declaration of the delimiter
            delimiters, skipped = match[1], match.end()
        starts = [skipped]
        if match := _COMMENTS.match(text, skipped):  # may also be a header that starts with #
            starts.append(match.end())
        return [
            TableParser(source, text[start:], delimiter, 1 + text.count("\n", 0, start))
            for start in starts
            for delimiter in dict.fromkeys(delimiters)
        ]

    @staticmethod
    def _widest(parsers: Sequence[TableParser]) -> TableParser:
        """The parser that sees most columns."""
        return max(parsers, key=lambda each: len(each.names))

    def _has_columns(self, config: SourceConfig, labelled: bool) -> bool:
        """Whether the header alone determines the columns."""
        try:
            self.find_columns(config, labelled, [], by_cells=False)
        except ConfigError:
            return False
        return True

    def row_place(self, line: int) -> str:
        """Where the row of this line is, for messages."""
        return f"{self.source}, line {line}"

    def row_error(self, line: int, what: str) -> ConfigError:
        """The refusal of a row; what: a verb phrase, such as "has no path"."""
        return line_error(self.source, line, what)

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield each row below the header, with the number of its first line."""
        for line, row in itertools.islice(self._numbered_rows(), 1, None):
            if not any(map(str.strip, row)):  # spreadsheets write empty rows
                continue
            if len(row) != len(self.names):
                what = f"has {len(row)} cells, the header {len(self.names)}"
                raise self.row_error(line, what)
            yield line, row

    def _numbered_rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yield all rows with the number of their first line; quoted cells may span lines."""
        reader: Any = csv.reader(
            io.StringIO(self._text, newline=""), delimiter=self._delimiter, strict=True
        )
        start = self._header_line
        try:
            for row in reader:
                yield start, row
                start = reader.line_num + self._header_line
        except csv.Error as error:
            raise line_error(self.source, start, f"is not valid CSV: {error}") from error

    def find_columns(
        self, config: SourceConfig, labelled: bool, notes: list[str], *, by_cells: bool
    ) -> None:
        """Find the columns; ConfigError if one is missing or ambiguous.

        by_cells: also look at the cells, not only at the header.
        """
        if self._header_error:
            raise self._header_error
        if self.names and _is_image_name(self.names[0]):
            raise ConfigError(
                f"{self._place} is an image ({self.names[0]}), not a header.",
                "the columns' names in the first line, such as path,label.",
                "write such a line above it.",
            )
        path = self._column_from_flag("--path-column", config.path_column)
        label = self._column_from_flag("--label-column", config.label_column)
        split = self._column_from_flag("--split-column", config.split_column) if labelled else None
        self.splits = [] if split is None else [split]
        used = {label, split}
        if path is None:
            path = self._column_by_name(PATH_COLUMNS, used, "--path-column")
        if path is None and by_cells:
            path = self._column_by_cells(used)
        if path is None:
            raise self._column_error("which column names the images", "--path-column")
        self.path = path
        if not labelled:
            self._note_guesses(notes, config, [(path, "names the images", {"path"})])
            return
        if split is None and by_cells:
            self.splits = self._split_columns(used | {path})
        if label is None:
            label = self._column_by_name(LABEL_COLUMNS, {path, *self.splits}, "--label-column")
        if label is None:  # the only remaining column
            rest = [
                column for column in range(len(self.names)) if column not in (path, *self.splits)
            ]
            label = rest[0] if len(rest) == 1 else None
        if label is None:
            raise self._column_error("which column holds the labels", "--label-column")
        self.label = label
        roles = [(path, "names the images", {"path"}), (label, "the labels", {"label", "labels"})]
        self._note_guesses(notes, config, roles)

    def _note_guesses(
        self, notes: list[str], config: SourceConfig, roles: list[tuple[int, str, set[str]]]
    ) -> None:
        """Note the columns if one was guessed; roles: (column, verb phrase, clear names)."""
        if config.path_column is not None or config.label_column is not None:
            return
        if any(normalize_name(self.names[column]) not in clear for column, _, clear in roles):
            listed = ", ".join(f"column {self.names[column]} {what}" for column, what, _ in roles)
            notes.append(f"guessed: {listed} (--path-column, --label-column)")

    def _column_from_flag(self, flag: str, name: str | None) -> int | None:
        """The column that the user named with a flag."""
        if name is None:
            return None
        columns = [column for column, header in enumerate(self.names) if header == name]
        columns = columns or [
            column
            for column, header in enumerate(self.names)
            if normalize_name(header) == normalize_name(name)
        ]
        if len(columns) != 1:
            raise self._column_error(f"{len(columns) or 'no'} columns that are {name}", flag)
        return columns[0]

    def find_column(self, name: str) -> int | None:
        """The column with this name, or the only one that differs only in case and signs."""
        try:
            return self._column_from_flag("", name)
        except ConfigError:
            return None

    def _column_by_name(
        self, tiers: Sequence[set[str]], used: Iterable[int | None], flag: str
    ) -> int | None:
        """The only column that has a name of the first set that occurs."""
        used = set(used)
        for names in tiers:
            columns = [
                column
                for column, header in enumerate(self.names)
                if normalize_name(header) in names and column not in used
            ]
            if len(columns) > 1:
                candidates = " and ".join(self.names[column] for column in columns)
                raise self._column_error(f"{candidates}, which could both be meant", flag)
            if columns:
                return columns[0]
        return None

    def _column_by_cells(self, used: Iterable[int | None]) -> int | None:
        """The only column whose cells are names of image files."""
        rows = [row for _, row in itertools.islice(self.rows(), SAMPLE_ROWS)]
        columns = [
            column
            for column in range(len(self.names))
            if column not in set(used)
            and sum(_is_image_name(row[column]) for row in rows) > 0.9 * len(rows)
        ]
        return columns[0] if len(columns) == 1 and rows else None

    def _split_columns(self, used: Iterable[int | None]) -> list[int]:
        """The columns that determine the split: one called split, boolean ones such as is_valid
        and is_test, or one with a name such as subset whose cells are all names of splits.
        """
        normalized = [normalize_name(name) for name in self.names]
        if normalized.count("split") > 1:
            raise self._column_error("several columns that are split", "--split-column")
        if "split" in normalized:
            return [normalized.index("split")]
        free = [column for column in range(len(normalized)) if column not in set(used)]
        parts_by_column = {
            column: meaning[0]
            for column in free
            if (meaning := _boolean_meaning(normalized[column]))
        }
        if len(set(parts_by_column.values())) < len(parts_by_column):
            candidates = " and ".join(self.names[column] for column in parts_by_column)
            raise self._column_error(f"{candidates}, which could both be meant", "--split-column")
        if parts_by_column:
            return [
                column
                for column in parts_by_column
                if len(parts_by_column) == 1 or parts_by_column[column] != "train"
            ]
        for column in free:
            if normalized[column] in SPLIT_COLUMNS:
                words = {row[column].strip() for _, row in self.rows()} - {""}
                if words and all(map(layouts.split_role, words)):
                    return [column]
        return []

    def _column_error(self, what: str, flag: str) -> ConfigError:
        return ConfigError(
            f"{self._place} names the columns"
            f" {', '.join(self.names) or '(none)'}; asked for: {what}.",
            "one column of paths (path, image, filename …), one of labels (label, class …), and"
            " optionally split.",
            f"name the column with {flag}; other columns are ignored.",
        )

    def split_reader(self, notes: list[str]) -> Callable[[int, list[str]], str]:
        """A function that returns the split of a row, given its line and cells."""
        meanings: dict[int, tuple[str, str] | None] = {}
        blank: dict[int, str] = {}
        for column in self.splits:
            cells = [row[column].strip().casefold() for _, row in self.rows()]
            words = set(cells) - {""}
            meanings[column] = None
            if words and words <= TRUE_WORDS | FALSE_WORDS:
                meaning = _boolean_meaning(normalize_name(self.names[column])) or (
                    "valid",
                    "train",
                )
                meanings[column] = meaning
                yes, no = (layouts.SPLIT_VERBS[part] for part in meaning)
                # If only one of the two words occurs, an empty cell means the other.
                if words <= TRUE_WORDS or words <= FALSE_WORDS:
                    blank[column] = meaning[words <= TRUE_WORDS]
                notes.append(f"column {self.names[column]}: yes {yes}, no {no}")
            else:
                _note_split_words(self.source, self.names[column], words, notes)
            if words and (count := cells.count("")):
                which = f"column {self.names[column]}: an empty cell"
                does = (
                    layouts.SPLIT_VERBS[blank[column]]
                    if column in blank
                    else "is drawn (--valid-share)"
                )
                notes.append(f"{which} {does} ({count} lines)")

        def split_of(line: int, row: list[str]) -> str:
            parts = set()
            for column, meaning in meanings.items():
                word = row[column].strip()
                part = layouts.split_role(word)
                if word and meaning:
                    part = meaning[word.casefold() not in TRUE_WORDS]
                elif word and part is None:
                    raise _split_word_error(
                        self.row_place(line), f"{word!r} as {self.names[column]}"
                    )
                parts.add(part or blank.get(column, ""))
            parts -= {"train", ""} if len(parts - {"train", ""}) else set()
            if len(parts) > 1 and "" not in parts:
                raise self.row_error(line, "is in both the validation and the test split")
            return max(parts, default="")

        return split_of

    def label_reader(
        self, config: SourceConfig, notes: list[str]
    ) -> Callable[[int, list[str]], tuple[str, ...]]:
        """A function that returns the labels of a row, given its line and cells."""
        column = self.label
        assert column is not None
        cells = {row[column].strip() for _, row in self.rows()}
        nonempty = cells - {""}
        filled = {cell for cell in nonempty if not is_empty_list(cell)}
        are_lists = bool(nonempty) and all(re.fullmatch(r"\[.*\]", x, re.S) for x in filled)
        if note := missing_words_note(self.names[column], filled):
            notes.append(note)
        is_tags_column = (
            normalize_name(self.names[column]) == "tags" and config.label_separator != ""
        )
        is_multi_label = (
            are_lists or is_tags_column or config.multi_label or bool(config.label_separator)
        )
        separator = ""
        if is_multi_label and not are_lists:
            given = config.label_separator
            separator = given or next((c for c in "|;," if any(c in x for x in cells)), " ")
        labels_by_cell = {cell: _parse_labels(cell, separator, are_lists) for cell in cells}
        if is_multi_label:
            max_labels = max(map(len, labels_by_cell.values()), default=0)
            _note_multi_label(self.names[column], separator, are_lists, max_labels, config, notes)
        elif example := _find_multi_label_cell(cells):
            notes.append(
                f"column {self.names[column]} looks as if it held several labels ({example!r});"
                " each cell is read as one label; for several give --multi-label"
            )

        def labels_of(line: int, row: list[str]) -> tuple[str, ...]:
            cell = row[column].strip()
            names = labels_by_cell[cell]
            if not names and not are_lists and not (is_multi_label and is_empty_list(cell)):
                raise self.row_error(line, "has no label")
            return names

        return labels_of


def _boolean_meaning(normalized: str) -> tuple[str, str] | None:
    """The splits that yes and no mean in a column such as isvalid; None for other names."""
    part = (
        layouts.split_role(normalized.removeprefix("is")) if normalized.startswith("is") else None
    )
    if part == "train":
        return "train", "valid"
    return (part, "train") if part else None


def is_empty_list(cell: str) -> bool:
    """Whether a cell is a list without labels: [], {} or (), also with spaces inside.

    This is how programs write that an image has none, and never a class. A word such as nan or None
    may be a class, so it is one; `missing_words_note` tells.
    """
    return EMPTY_LIST.fullmatch(cell.strip()) is not None


def missing_words_note(name: str, cells: Collection[str]) -> str | None:
    """A note on cells that are words for a missing value, which are read as labels."""
    words = sorted(cell for cell in cells if cell.casefold() in MISSING_WORDS)
    if not words:
        return None
    shown = " and ".join(map(repr, words))
    verb = "are classes" if len(words) > 1 else "is a class"
    return (
        f"column {name}: {shown} {verb} like any other; if a program wrote that for a missing"
        " label, remove these rows"
    )


def split_labels(cell: str, separator: str, is_list: bool) -> list[str]:
    """The labels in a cell as they are written, without empty ones; separator "": one label.

    An empty list has none, whatever the separator.
    """
    if is_empty_list(cell):
        return []
    parts = [cell]
    if is_list:
        parts = [re.sub(r"\\(.)", r"\1", a or b or c) for a, b, c in _ITEM.findall(cell[1:-1])]
    elif separator:
        parts = cell.split(separator)
    return [name for part in parts if (name := part.strip())]


def escape_label(name: str) -> str:
    """A label as catalogs hold it: safe to print; bytes that are not UTF-8 are Windows-1252."""
    decoded = named_files.decode_windows_1252(name)
    return path_text.escape_path(decoded.encode("utf-8", "surrogateescape"))


def _parse_labels(cell: str, separator: str, are_lists: bool) -> tuple[str, ...]:
    """The labels in a cell, sorted and unique; separator "": one label."""
    return tuple(sorted(set(map(escape_label, split_labels(cell, separator, are_lists)))))


def _note_multi_label(
    name: str,
    separator: str,
    are_lists: bool,
    max_labels: int,
    config: SourceConfig,
    notes: list[str],
) -> None:
    form = "as lists" if are_lists else f"separated by {separator!r}"
    if max_labels > 1:
        notes.append(f"column {name}: up to {max_labels} labels for each image, {form}")
    elif config.multi_label or config.label_separator:
        raise ConfigError(
            f"several labels were asked for, but column {name} has one in every cell, {form}.",
            "some images with several labels.",
            "give the separator with --label-separator, or remove --multi-label.",
        )
    else:
        notes.append(f"column {name} has one label for each image")


COMMON_SPLIT_WORDS = {"train", "training", "val", "valid", "validation", "test"}


def _note_split_words(source: str, name: str, words: set[str], notes: list[str]) -> None:
    """Note how less common names of splits are read.

    Raises:
        ConfigError: A held-out split beside a validation split: it may be the test split.
    """
    valid = sorted(word for word in words if layouts.split_role(word) == "valid")
    held_out = next((word for word in valid if word.startswith("hold")), None)
    if held_out and (others := [word for word in valid if not word.startswith("hold")]):
        what = f"{held_out!r} beside {others[0]!r} as {name}: it may mean test or validation"
        raise _split_word_error(source, what)
    parts = {
        word: part
        for word in sorted(words - COMMON_SPLIT_WORDS)
        if (part := layouts.split_role(word))
    }
    if parts:
        said = ", ".join(f"{word} {layouts.SPLIT_VERBS[part]}" for word, part in parts.items())
        notes.append(f"column {name}: {said}")


def _find_multi_label_cell(cells: set[str]) -> str | None:
    """A cell that seems to hold several labels: few words occur in many combinations."""
    for separator in ("|", ";", ",", " "):
        labels = {cell: [label.strip() for label in cell.split(separator)] for cell in cells}
        multi_label_cells = sorted(cell for cell, names in labels.items() if len(names) > 1)
        distinct = {name for names in labels.values() for name in names if name}
        if len(multi_label_cells) > 2 and len(distinct) < len(cells):
            return multi_label_cells[0]
    return None
