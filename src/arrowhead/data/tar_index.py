"""The images of a tar and what stands beside them, as WebDataset writes it.

    cat/001.jpg  cat/001.cls  cat/001.json      members of one sample: the name up to the first dot
      -> TarImage("cat/001.jpg", offset, size, {"cls": "3", "label": "cat"})

An index is kept in the user's cache, by the place, size and stamp of the tar, so that a thousand
shards are listed again without reading any of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arrowhead import fileio
from arrowhead.data import exclusions, path_text, tar_headers
from arrowhead.data.containers import COMPRESSED_SIGNATURES, BlockReader, Container
from arrowhead.data.table_parser import normalize_name
from arrowhead.errors import ConfigError

FORMAT = 1  # of an index in the cache
CACHE_VARIABLE = "ARROWHEAD_CACHE_DIR"
MAX_UNUSED_DAYS = 60  # then an index is removed from the cache
# Bytes of a label, and of the JSON beside an image; longer ones are not read.
TEXT_LIMITS = {b"cls": 1000, b"txt": 4000, b"json": 2**20}
MAX_LABEL_CHARS = 1000


@dataclass(frozen=True, slots=True)
class TarImage:
    """An image in a tar.

    Attributes:
        name: Its escaped name in the tar.
        offset, size: Where its bytes are.
        cells: Texts beside it: "cls" and "txt" are the content of such files; other keys are keys
            of a .json file.
    """

    name: str
    offset: int
    size: int
    cells: Mapping[str, str]


@dataclass(slots=True)
class TarIndex:
    """The images of a tar, in the order of their names.

    Attributes:
        images: As above.
        damage: Why its end is missing, as the end of a sentence; "" for a complete tar.
        unmarked: Whether it ends without an end mark.
        left_out: Number of other members, by kind.
    """

    images: list[TarImage]
    damage: str = ""
    unmarked: bool = False
    left_out: Counter[str] = field(default_factory=Counter)


def index_tar(container: Container, keys: frozenset[str]) -> TarIndex:
    """The index of a tar, from the cache if it is there.

    Args:
        container: The tar, as listed.
        keys: Normalized names of the keys of .json files to take over (see
            `table_parser.normalize_name`).

    Raises:
        ConfigError: It is compressed.
        ContainerError: It cannot be read, or has changed since it was listed.
    """
    cached = _cache_path(container, keys)
    if cached is not None and (index := _read_cached(cached)) is not None:
        return index
    reader = BlockReader(container)
    if reader.read_at(0, 8).startswith(COMPRESSED_SIGNATURES):
        raise compressed_error(container.location)
    content = tar_headers.read_tar(reader.read_at, container.size, _is_label)
    if container.size == 0:
        content.damage = "it is empty"
    index = _index_members(content, keys)
    if cached is not None:
        _write_cached(cached, index)
    return index


def compressed_error(location: str) -> ConfigError:
    """The refusal of a tar that is compressed as a whole."""
    return ConfigError(
        f"{location} is a compressed tar: it can only be read from its start.",
        "a tar without compression, in which every image has its place (images are compressed"
        " themselves).",
        "unpack it with gunzip, unxz or unzstd, which leaves a .tar; or unpack the tar, too.",
    )


def _is_label(name: bytes, size: int) -> bool:
    return size <= TEXT_LIMITS.get(name.rpartition(b".")[2].lower(), -1)


def _is_image(ending: bytes) -> bool:
    """Whether the rest of a name is nothing but the suffix of an image."""
    return b"." + ending in exclusions.IMAGE_SUFFIXES


def split_key(name: bytes) -> tuple[bytes, bytes]:
    """The key of a member's sample and the rest of its name in lower case (WebDataset's rule)."""
    folder, slash, leaf = name.rpartition(b"/")
    key, _, ending = leaf.partition(b".")
    return folder + slash + key, ending.lower()


def _index_members(content: tar_headers.TarContent, keys: frozenset[str]) -> TarIndex:
    """Sort the members of a tar into images and what stands beside them."""
    left_out = Counter(content.left_out)
    cells: dict[bytes, dict[str, str]] = {}
    for name, text in content.texts.items():
        key, _ = split_key(name)
        kind = name.rpartition(b".")[2].lower()
        found = _cells_of(kind, text, keys)
        if found is None:
            left_out["broken .json files"] += 1
        else:
            cells.setdefault(key, {}).update(found)
    images = []
    plain = {
        key for name in content.members for key, ending in [split_key(name)] if _is_image(ending)
    }
    for name, member in content.members.items():
        key, ending = split_key(name)
        if any(part[:1] == b"." or part in exclusions.SYSTEM_FILES for part in name.split(b"/")):
            left_out["hidden or system files"] += 1
        elif name.lower().endswith(exclusions.IMAGE_SUFFIXES):
            row = cells.get(key, {})
            if row and key in plain and not _is_image(ending):
                left_out["further images of a sample, such as masks (001.seg.png)"] += 1
                continue
            image = TarImage(path_text.escape_path(name), member.offset, member.size, row)
            images.append(image)
        elif name.rpartition(b".")[2].lower() not in TEXT_LIMITS:
            left_out["files that are neither images nor labels"] += 1
    images.sort(key=lambda image: image.name)
    return TarIndex(images, content.damage, content.unmarked, +left_out)


def _cells_of(kind: bytes, text: bytes, keys: frozenset[str]) -> dict[str, str] | None:
    """What a file beside an image says; None for broken JSON."""
    if kind != b"json":
        plain = text.decode("utf-8-sig", "surrogateescape").strip().strip("\0")
        return {kind.decode(): plain} if len(plain) <= MAX_LABEL_CHARS else {}
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(content, dict):
        return {}
    found = {key: cell_text(value) for key, value in content.items() if normalize_name(key) in keys}
    return {key: cell for key, cell in found.items() if cell is not None}


def cell_text(value: Any) -> str | None:
    """A value as a cell of a table; None if it is no label."""
    if value is None:
        return ""
    if isinstance(value, list):
        items = [cell_text(item) for item in value]
        if any(item is None or isinstance(value[at], list) for at, item in enumerate(items)):
            return None
        quoted = [str(item).replace("\\", "\\\\").replace('"', '\\"') for item in items]
        text = "[" + ", ".join(f'"{item}"' for item in quoted) + "]"
    elif isinstance(value, str):
        text = value
    elif isinstance(value, bool | int | float):
        text = str(int(value)) if isinstance(value, float) and value.is_integer() else repr(value)
    else:
        return None
    return text if len(text) <= MAX_LABEL_CHARS else None


# ---------------------------------------------------------------------------------- cache


def _cache_path(container: Container, keys: frozenset[str]) -> Path | None:
    """The file in the cache that holds the index of a tar; None without a cache."""
    top = os.environ.get(CACHE_VARIABLE)
    if top == "":
        return None
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # no home
        return None
    folder = Path(top) if top else Path(base) / "arrowhead"
    key = json.dumps([FORMAT, container.location, container.row_stamp, sorted(keys)])
    name = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return folder / "tar-index" / f"{name}.json"


def _read_cached(path: Path) -> TarIndex | None:
    """An index from the cache; None if it is not there, or not as it was written."""
    try:
        digest, _, text = path.read_bytes().partition(b"\n")
        if digest.decode() != hashlib.blake2b(text, digest_size=16).hexdigest():
            return None
        content = json.loads(text)
        os.utime(path)
    except (OSError, ValueError):
        return None
    images = [TarImage(*image) for image in content["images"]]
    return TarIndex(images, content["damage"], content["unmarked"], Counter(content["left_out"]))


def _write_cached(path: Path, index: TarIndex) -> None:
    """Keep an index; a cache that cannot be written is no error."""
    text = json.dumps(
        {
            "images": [[one.name, one.offset, one.size, one.cells] for one in index.images],
            "damage": index.damage,
            "unmarked": index.unmarked,
            "left_out": index.left_out,
        }
    ).encode()
    digest = hashlib.blake2b(text, digest_size=16).hexdigest().encode()
    with suppress(OSError, ConfigError), fileio.atomic_write(path) as draft:
        draft.write_bytes(digest + b"\n" + text)


def forget_unused() -> None:
    """Remove the indexes from the cache that were not used for a long time."""
    some = _cache_path(Container(root="/", path="x", size=0, stamp=0), frozenset())
    oldest = time.time() - MAX_UNUSED_DAYS * 86400
    with suppress(OSError):
        for path in some.parent.glob("*.json") if some else ():
            if path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)
