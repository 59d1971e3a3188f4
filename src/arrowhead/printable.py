"""Text that every terminal takes: control characters written out, any encoding."""

from __future__ import annotations

import sys
from unicodedata import category

# What our own lines hold, for terminals and logs that are not UTF-8. Anything else is escaped.
PLAIN = str.maketrans(
    {"±": "+-", "…": "...", "→": "->", "≤": "<=", "≥": ">="}
    | dict(zip("·×÷—–•“”‘’│┃╭╮╰╯─━╌╸╺█░", "-x/--*\"\"''||++++-----#.", strict=True))
)
ENCODING_ERRORS = "arrowhead.plain"  # name of the error handler below


def visible(text: str) -> str:
    r"""The text with control characters written out as \xNN or \uNNNN: C0 and C1 controls, line
    and paragraph separators, and the marks that turn the direction of what follows.

    Other Unicode stays as it is. A lone surrogate, which stands for a byte of a file's name that
    is not UTF-8, is written as that byte.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or not _steers(c) else _escaped(c) for c in text)


def _steers(character: str) -> bool:
    # Format characters other than the direction marks (joiners in emoji and Indic scripts) are part
    # of ordinary text; so are spaces that isprintable does not count.
    if character == "\t":
        return False
    if character in "\u061c\u200e\u200f" or "\u202a" <= character <= "\u202e":
        return True
    return "\u2066" <= character <= "\u2069" or category(character) in ("Cc", "Cs", "Zl", "Zp")


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _plain(error: UnicodeError) -> tuple[str, int]:
    """For the codecs module: what is written for characters that an encoding does not have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    bad = error.object[error.start : error.end]
    made = (c if c.isascii() else _escaped(c) for c in bad.translate(PLAIN))
    return "".join(made), error.end


def take_any_text() -> None:
    """Let standard output and standard error take any text, whatever their encoding is."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # some stand-ins have none
            reconfigure(errors=ENCODING_ERRORS)


def encodable(text: str) -> str:
    """The text with what standard output cannot encode replaced, as `take_any_text` does."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, ENCODING_ERRORS).decode(encoding)
