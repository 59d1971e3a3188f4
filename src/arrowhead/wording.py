"""Format counts ("2 images") and shell commands to paste, for messages."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable, Sequence

_SAFE_IN_DOUBLE_QUOTES = re.compile(r'[^"$`\\!]*')  # ! expands history in interactive shells


def pluralize(count: int, word: str, plural: str | None = None) -> str:
    """A count with its noun, such as "1 image" or "2 images"; `plural` if it is not noun + s."""
    return f"{count} {word if count == 1 else plural or word + 's'}"


def join_first(items: Sequence[str], shown: int = 5, separator: str = "; ") -> str:
    """The first items, and how many more there are, such as "a; b; and 3 more"."""
    more = [f"and {len(items) - shown} more"] if len(items) > shown else []
    return separator.join([*items[:shown], *more])


def shell_command(words: Iterable[object]) -> str:
    """A command line for a POSIX shell, each word quoted if necessary.

    Words that cannot be printed as they are (control characters, bytes that are not UTF-8, letters
    that stdout cannot encode) are written as $'…' (bash, zsh, ksh, POSIX 2024), so that you can
    still copy and paste the line. `shlex.join` keeps such characters.
    """
    return " ".join(_quote(str(word)) for word in words)


def _is_printed_as_is(character: str) -> bool:
    """Whether stdout shows a character as it is."""
    try:
        character.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return character.isprintable() or character == "\u00a0"


def _quote(word: str) -> str:
    if not all(map(_is_printed_as_is, word)):
        return "$'" + "".join(map(_escape_in_dollar_quotes, word)) + "'"
    if "'" in word and _SAFE_IN_DOUBLE_QUOTES.fullmatch(word):
        return f'"{word}"'
    return shlex.quote(word)


def _escape_in_dollar_quotes(character: str) -> str:
    short_escapes = {"\n": r"\n", "\t": r"\t", "\r": r"\r", "'": r"\'", "\\": r"\\"}
    if character in short_escapes:
        return short_escapes[character]
    if _is_printed_as_is(character):
        return character
    # An octal escape has at most three digits; after \x some shells read more than two.
    return "".join(f"\\{byte:03o}" for byte in character.encode("utf-8", "surrogateescape"))
