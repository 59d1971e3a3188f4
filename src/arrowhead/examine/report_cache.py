"""What a report measured of the originals, kept in the store for the next report.

    properties of images     by image id: the same content has the same properties
    near copies              by all that they depend on: the shards and the settings

Every training ends with a report of the same images. Reading, measuring and comparing them is most
of its work, and gives the same each time. STORE/report_cache.json holds at most the images that one
report measures, and is replaced by each report. It is sealed; if it is damaged, missing or of
another version, everything is measured again. A store in an object store has none.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import numpy as np

from arrowhead import fileio
from arrowhead.data.remote_folder import RemoteFolder
from arrowhead.errors import ConfigError, DataError
from arrowhead.examine import image_matching
from arrowhead.examine.duplicates import Duplicates
from arrowhead.examine.image_properties import PIXEL_PROPERTIES, Measured
from arrowhead.examine.near_copies import DuplicateConfig, DuplicatePair, NearCopies
from arrowhead.features.store import Store

FILE_NAME = "report_cache.json"
FORMAT = 1  # raise it when properties or the search for copies change
MAX_PAIRS = 50_000  # with more, copies are searched for again
SCHEMA = {"properties": dict, "copies?": {"key": str, "compared": int, "left": int, "pairs": list}}


class ReportCache:
    """The results of the last report of a store.

    Args:
        store: The store; nothing is read from it but the image ids and the manifest.
    """

    def __init__(self, store: Store) -> None:
        self._path = store.path / FILE_NAME
        self._is_local = not isinstance(store.files, RemoteFolder)
        self._id_N2 = store.image_ids()
        shards = [[shard["name"], shard["sha256"]] for shard in store.manifest()["shards"]]
        rule = [image_matching.MIN_WHOLE, image_matching.MIN_PART, asdict(DuplicateConfig())]
        self._key = hashlib.sha256(json.dumps([shards, rule]).encode()).hexdigest()
        self._content = self._read()

    def _read(self) -> dict[str, Any]:
        if self._is_local and self._path.is_file():
            with suppress(DataError, OSError):
                content = fileio.read_sealed(self._path, FORMAT, upgrade="", repair="")
                fileio.check_schema(content, SCHEMA, str(self._path), "")
                return content
        return {"properties": {}}

    def _id(self, row: int) -> str:
        first, second = self._id_N2[row].tolist()
        return f"{first:016x}{second:016x}"

    def properties(self, rows: list[int]) -> dict[int, Measured]:
        """The properties of those of some rows of the catalog that were measured before."""
        known = self._content["properties"]
        entries = {row: known.get(self._id(row)) for row in rows}
        return {
            row: Measured(entry[0], tuple(entry[1:]))
            for row, entry in entries.items()
            if entry and len(entry) == 1 + len(PIXEL_PROPERTIES)
        }

    def near_copies(self) -> NearCopies | None:
        """The copies found with the default settings; None if they must be searched for."""
        kept = self._content.get("copies")
        if not kept or kept["key"] != self._key:
            return None
        pairs = [
            DuplicatePair(
                one=int(one),
                other=int(other),
                feature_similarity=float(feature),
                pixel_similarity=float(pixels),
            )
            for one, other, feature, pixels in kept["pairs"]
        ]
        return NearCopies(pairs=pairs, compared=kept["compared"], not_compared=kept["left"])

    def write(self, measured: dict[int, Measured | None], duplicates: Duplicates | None) -> None:
        """Replace the results, if the store can be written.

        Args:
            measured: Properties by row of the catalog; unreadable files are left out.
            duplicates: The copies; those that could not be verified are searched for again.
        """
        content: dict[str, Any] = {"format": FORMAT, "properties": {}}
        for row, one in measured.items():
            if one is not None and np.isfinite(one.values).all():
                content["properties"][self._id(row)] = [one.format, *one.values]
        if duplicates and not duplicates.unverified and len(duplicates.pairs) <= MAX_PAIRS:
            pairs = [
                [pair.one, pair.other, pair.feature_similarity, pair.pixel_similarity]
                for pair in duplicates.pairs
            ]
            content["copies"] = {
                "key": self._key,
                "compared": duplicates.compared,
                "left": duplicates.not_compared,
                "pairs": pairs,
            }
        elif (kept := self._content.get("copies")) and not duplicates:
            content["copies"] = kept
        if self._is_local and content != {"format": FORMAT, **self._content}:
            with suppress(OSError, ConfigError):  # the store may be read-only
                fileio.write_sealed(self._path, content)
