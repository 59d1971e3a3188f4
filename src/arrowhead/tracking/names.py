"""Names of metrics, params and tags, as MLflow takes them on every store.

MLflow allows letters, digits and `_ - . / : space`, no name that is another file path (`a//b`,
`../a`), and 250 characters; colons not on Windows. Names hold what users call their classes, so any
other character is written `_xHH_`, its code point in hex, as SQL/XML (ISO 9075-14) does. Ordinary
names stay as they are, no two names become one (on MySQL neither, see `mlflow_names`), and
`original` gives the first one back.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping

MAX_NAME_CHARS = 250
_HASH_CHARS = 16
_TAIL = re.compile(rf"_xx[0-9a-f]{{{_HASH_CHARS}}}$")
_EMPTY = "_x00_"  # no other name is written with a zero in front
# What is written as its code: characters that are not allowed or that some databases take for the
# same as another (a blank at the end), slashes and dots that make a path of another name, and an
# underscore that would begin a code.
_ESCAPED = re.compile(
    r"""
      [^\w.\-/ ]                          # not MLflow's; a colon is not Windows'
    | [^\u0000-\uffff]                    # not of every database
    | ^[ ] | [ ]$                         # blanks at the ends
    | ^/ | /$ | (?<=/)/                   # an empty part of a path
    | (?:^|(?<=/))\.(?=\.?(?:/|$))        # the first dot of a part that is . or ..
    | ^\.(?=\.)                           # two dots at the beginning
    | _(?=x[0-9A-F])                      # what looks like a code
    """,
    re.VERBOSE,
)
# Among names that some databases take for the same (MySQL compares neither case nor accents), every
# capital and every letter beyond ASCII, too.
_DISTINCT = re.compile(_ESCAPED.pattern + r"| [A-Z] | [^\x00-\x7f]", re.VERBOSE)
_CODE = re.compile("_x([0-9A-F]+)_")


def mlflow_name(name: str) -> str:
    """The name under which MLflow keeps a metric, param or tag: at most 250 characters, different
    for different names. A longer one is cut off and ends with a hash of the full name.
    """
    encoded = _ESCAPED.sub(_code, name) or _EMPTY
    return shortened(encoded)


def mlflow_names(names: Iterable[str], taken: dict[str, str] | None = None) -> dict[str, str]:
    """`mlflow_name` of each of these, which are written together. Where some differ by case or
    accents only, such as Dog and dog, they are written so that no database takes one for the other.

    taken: for names that join those of earlier calls, the same dict in each call; it is filled. A
    name keeps the form of its first call.
    """
    there = list(dict.fromkeys(names))
    owners = {} if taken is None else taken  # by folded name: who stands for it as it is
    alike = Counter(map(_folded, there))
    for name in there:
        owners.setdefault(_folded(name), name if alike[_folded(name)] == 1 else "")
    return {
        name: mlflow_name(name) if owners.get(_folded(name)) == name else _apart(name, owners)
        for name in there
    }


def _apart(name: str, owners: Mapping[str, str]) -> str:
    """A form that no database takes for another name that is alike."""
    encoded = _DISTINCT.sub(_code, name)
    if encoded == name and (other := owners.get(_folded(name))) and other != name:
        encoded = re.sub("[a-z]", _code, name, count=1)  # `other` has the name without codes
    return shortened(encoded or _EMPTY)


def _folded(name: str) -> str:
    """A name as a database compares it that makes the fewest differences."""
    apart = unicodedata.normalize("NFKD", name).casefold()
    return "".join(one for one in apart if not unicodedata.combining(one))


def shortened(encoded: str) -> str:
    """A name of MLflow's alphabet within its limit."""
    if len(encoded) <= MAX_NAME_CHARS and not _TAIL.search(encoded):
        return encoded
    tail = "_xx" + hashlib.sha256(encoded.encode()).hexdigest()[:_HASH_CHARS]
    return encoded[: MAX_NAME_CHARS - len(tail)].rstrip("/. ") + tail


def is_shortened(encoded: str) -> bool:
    """Whether the name that MLflow has is only the beginning of the one it stands for."""
    return bool(_TAIL.search(encoded))


def original(encoded: str) -> str:
    """The name that `mlflow_name` was given, unless it was shortened."""
    if encoded == _EMPTY:
        return ""
    return _CODE.sub(lambda code: chr(int(code[1], 16)), encoded)


def _code(match: re.Match[str]) -> str:
    return f"_x{ord(match[0]):X}_"
