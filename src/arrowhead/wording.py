"""How numbers of things, and commands to be pasted, are written in lines for people.

counted   a number and its word: 1 image, 2 images
command   a command line that a shell reads back as the same words
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterable

_PLAIN_IN_DOUBLE_QUOTES = re.compile(r'[^"$`\\!]*')  # ! calls up old commands where one types


def counted(count: int, word: str, several: str | None = None) -> str:
    """The number with its word, which gets an s beside any number but 1; several: another plural.

    A word may have others before it ("golden image"), and none after.
    """
    return f"{count} {word if count == 1 else several or word + 's'}"


def command(words: Iterable[object]) -> str:
    """The words as a line for a POSIX shell, each quoted where it has to be.

    A word with ' in it stands in double quotes where nothing in it has a meaning there, which is
    shorter. One with control characters, marks that turn the direction of text, bytes that are not
    UTF-8, or letters that standard output cannot encode is written as $'…' (bash, zsh, ksh, POSIX
    2024): shown on a screen it can still be pasted.
    """
    return " ".join(_quoted(str(word)) for word in words)


def _is_shown(character: str) -> bool:
    """Whether standard output shows a character as it is."""
    try:
        character.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return character.isprintable() or character == "\u00a0"


def _quoted(word: str) -> str:
    if not all(map(_is_shown, word)):
        return "$'" + "".join(map(_in_dollar_quotes, word)) + "'"
    if "'" in word and _PLAIN_IN_DOUBLE_QUOTES.fullmatch(word):
        return f'"{word}"'
    return shlex.quote(word)


def _in_dollar_quotes(character: str) -> str:
    named = {"\n": r"\n", "\t": r"\t", "\r": r"\r", "'": r"\'", "\\": r"\\"}
    if character in named:
        return named[character]
    if _is_shown(character):
        return character
    # Three octal digits at most belong to an escape; of \x some shells take more than two.
    return "".join(f"\\{byte:03o}" for byte in character.encode("utf-8", "surrogateescape"))
