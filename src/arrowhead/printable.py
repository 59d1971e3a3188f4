"""Text that is safe on any terminal: control characters escaped, unencodable ones replaced."""

from __future__ import annotations

import sys
from unicodedata import category

# Characters of our own messages, for terminals and logs that are not UTF-8. Others are escaped.
ASCII_REPLACEMENTS = str.maketrans(
    {"±": "+-", "…": "...", "→": "->", "≤": "<=", "≥": ">="}
    | dict(zip("·×÷—–•“”‘’│┃╭╮╰╯─━╌╸╺█░", "-x/--*\"\"''||++++-----#.", strict=True))
)
ENCODING_ERRORS = "arrowhead.plain"  # name of the error handler `_handle_encode_error`


def escape_control_chars(text: str) -> str:
    r"""Escape control characters as \xNN or \uNNNN.

    These are C0 and C1 controls, line and paragraph separators, and the marks that change the
    direction of text. Other Unicode is kept. A lone surrogate (a byte of a file name that is not
    UTF-8) is written as that byte.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or not _is_control(c) else _escape_char(c) for c in text)


def _is_control(character: str) -> bool:
    # Other format characters (joiners in emoji and Indic scripts) are part of ordinary text, and so
    # are the spaces that isprintable() rejects.
    if character == "\t":
        return False
    if character in "\u061c\u200e\u200f" or "\u202a" <= character <= "\u202e":
        return True
    return "\u2066" <= character <= "\u2069" or category(character) in ("Cc", "Cs", "Zl", "Zp")


def _escape_char(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _handle_encode_error(error: UnicodeError) -> tuple[str, int]:
    """Codecs error handler: replace characters that the encoding does not have."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    bad = error.object[error.start : error.end]
    replaced = (c if c.isascii() else _escape_char(c) for c in bad.translate(ASCII_REPLACEMENTS))
    return "".join(replaced), error.end


def escape_unencodable_output() -> None:
    """Let stdout and stderr accept any text: replace or escape what they cannot encode."""
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):  # replaced streams may lack it
            reconfigure(errors=ENCODING_ERRORS)


def encodable_text(text: str) -> str:
    """Replace what stdout cannot encode, as `escape_unencodable_output` does."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, ENCODING_ERRORS).decode(encoding)
