"""Rows to Arrow files and back.

    rows of one chunk      path, image_id, view, feature, fault
      -> write_shard       one Arrow IPC file, whole or absent
    all shards             named by the manifest, their hashes checked
      -> Store.features    float16 (N, D), gathered from the memory maps

    store/
      store.json           format, recipe, fingerprint, chunk size
      catalog-<hash>.arrow paths, stamps, labels and splits; immutable
      body.safetensors     the weights that made the features
      shards/<name>.arrow  immutable
      golden/<id>.img      a few of the photos, for bundles to check machines by
      digests/<name>       sha256 of each shard, and of the pending catalog
      manifest.json        what is complete: catalog, shards, their hashes; replaced atomically
      catalog.arrow        another name of the newest catalog, for people

A file gets its own name only when it is whole. What is done is read off the disk, so a
stopped run goes on without a journal. Whoever reads starts at the manifest: what it names never
changes, so a reader sees the last whole state or the next one. No file is given to Arrow before
its bytes are compared with their sha256: a flipped bit can end the process in there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import fileio, output_paths
from arrowhead.errors import ConfigError, DataError
from arrowhead.features import catalog_file, shard_file, store_format
from arrowhead.features.recipe import Recipe
from arrowhead.features.shard_file import Rows
from arrowhead.features.store_format import (
    DIGEST,
    EXTRACT_AGAIN,
    FORMAT,
    GOLDEN,
    HEAD,
    MANIFEST,
    REPAIR,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """Labelled features of one split, or of all; well images only, in catalog order; n rows.

    feature: float16 (n, V, D); label: int64 (n,), numbers of `classes`, where every image of the
    store has one label; else uint8 (n, C), 1 where the image has the label; row: int64 (n,), rows
    of the catalog; image_id: uint64 (n,), the first 8 bytes of the image id, big endian; split: str
    (n,), train, valid or test.
    """

    feature: NDArray[np.float16]
    label: NDArray[np.int64] | NDArray[np.uint8]
    row: NDArray[np.int64]
    image_id: NDArray[np.uint64]
    split: NDArray[np.str_]

    @property
    def multi(self) -> bool:
        """Whether an image may have several labels, or none."""
        return self.label.ndim == 2


class Store:
    """A directory of features made in one way. Open an existing one, or `create` it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._vouched: set[str] = set()  # files whose bytes were those of this sha256
        self._manifest: tuple[tuple[int, ...], dict[str, Any]] | None = None
        if not (path / "store.json").is_file():
            inner = path / "store"  # `path` is what fit was given as OUT
            found = (inner / "store.json").is_file()
            raise ConfigError(
                f"{path} is not a feature store: it has no store.json.",
                "a folder written by `arrowhead precompute`, or the store in the OUT of `fit`.",
                f"name {inner}." if found else f"run `arrowhead precompute DATA {path}` first.",
            )
        output_paths.must_be_text(path)
        head = store_format.read_sealed(path / "store.json")
        fileio.must_fit(head, HEAD, str(path / "store.json"), REPAIR)
        self.recipe = Recipe.from_dict(head.get("recipe", {}), str(path / "store.json"))
        self.chunk_size = int(head["chunk_size"])

    @staticmethod
    def create(path: Path, recipe: Recipe, chunk_size: int) -> Store:
        """The store at `path` for this recipe: made, or opened if it is already there.

        Raises ConfigError, naming the first differing field, if it was made in another way.
        """
        if (path / "store.json").is_file():
            store = Store(path)
            store.recipe.must_equal(recipe, str(path), "this run")
            return store
        output_paths.check_folder(path, "store")
        head = {"recipe": dataclasses.asdict(recipe), "chunk_size": chunk_size}
        head |= {"format": FORMAT, "fingerprint": recipe.fingerprint}
        fileio.write_sealed(path / "store.json", head)
        return Store(path)

    def locked(
        self, say: Callable[[str], None] = fileio.warn_of_locks
    ) -> AbstractContextManager[None]:
        """One writer at a time; ConfigError if another process is writing here."""
        return fileio.locked(self.path, say)

    @property
    def weights(self) -> Path:
        """Where the body's weights lie."""
        return self.path / "body.safetensors"

    def shard(self, name: str) -> Path:
        """Where the shard of that name lies, or would lie."""
        return self.path / "shards" / f"{name}.arrow"

    def on_disk(self) -> list[str]:
        """Names of all whole shards, live or left over from an earlier catalog."""
        return sorted(path.stem for path in (self.path / "shards").glob("*.arrow"))

    def write(self, name: str, rows: Rows) -> None:
        """Write the shard of that name, and what vouches for it until a manifest does."""
        shard_file.write_shard(self.shard(name), rows, self.recipe)
        self._note_digest(self.shard(name))

    def read(self, name: str, *, check: bool = False) -> Rows:
        """The rows of the shard of that name, its bytes compared with their sha256 first.

        check: compare the content with the digest inside, too. DataError if either differs.
        """
        self._vouch(self.shard(name), self._named().get(name))
        return shard_file.read_shard(self.shard(name), self.recipe, check=check)

    @property
    def pending(self) -> Path:
        """Where the catalog of the extraction that is under way lies, or would lie."""
        return self.path / "pending.arrow"

    def write_pending(self, columns: Mapping[str, Any]) -> None:
        """Write the catalog of an extraction (`columns` as `write_catalog` takes them)."""
        catalog_file.write_catalog(self.pending, columns)
        self._note_digest(self.pending)

    def read_pending(self) -> dict[str, Any]:
        """What `write_pending` wrote; DataError if it has changed, or nothing vouches for it."""
        digest = self._noted_digest(self.pending)
        if digest is None:
            raise DataError(
                f"Nothing vouches for {self.pending}: its digest is missing.",
                f"its sha256 in {self._digest_file(self.pending)}.",
                "run the same precompute again.",
            )
        self._vouch(self.pending, digest)
        return catalog_file.read_catalog(self.pending)

    def drop_pending(self) -> None:
        """The extraction is complete."""
        self.pending.unlink()
        self._digest_file(self.pending).unlink(missing_ok=True)

    def _digest_file(self, path: Path) -> Path:
        return self.path / "digests" / path.stem

    def _note_digest(self, path: Path) -> None:
        with fileio.draft(self._digest_file(path)) as temporary:
            temporary.write_text(fileio.sha256(path) + "\n")

    def _noted_digest(self, path: Path) -> str | None:
        try:
            found = self._digest_file(path).read_text(errors="replace").strip()
        except FileNotFoundError:
            return None
        return found if DIGEST.fullmatch(found) else "not a sha256"

    def examine_leftovers(self) -> None:
        """Examine every shard that neither a manifest nor a digest vouches for, all in one go.

        Raises DataError for the first whose content is not what was written.
        """
        named, there = self._named(), self.on_disk()
        paths = [self.shard(name) for name in there if name not in named]
        self._examine([path for path in paths if self._noted_digest(path) is None])

    def _examine(self, paths: Sequence[Path]) -> None:
        new = [path for path in paths if path.name not in self._vouched]
        shard_file.examine(new)
        for path in new:
            self._vouched.add(path.name)
            with suppress(OSError, ConfigError):  # a store that may only be read
                self._note_digest(path)

    def _named(self) -> dict[str, str]:
        """sha256 by name of the manifest's shards; {} without a manifest."""
        if not (self.path / "manifest.json").is_file():
            return {}
        return {one["name"]: one["sha256"] for one in self.manifest()["shards"]}

    def _vouch(self, path: Path, digest: str | None) -> None:
        """Compare a file with its sha256 before anything parses it, once per store object.

        digest: None for a shard that no manifest names; what was noted when it was written is
        taken, and of a shard that an older version wrote its content is examined.
        """
        witness = "the manifest"
        if digest is None:
            digest, witness = self._noted_digest(path), str(self._digest_file(path))
        if digest is None:
            self._examine([path] if path.is_file() else [])
        elif f"{path.name} {digest}" not in self._vouched:
            fileio.must_hash_to(path, digest, witness=witness, repair=EXTRACT_AGAIN)
            self._vouched.add(f"{path.name} {digest}")

    def manifest(self) -> dict[str, Any]:
        """What is complete; ConfigError before the first complete run."""
        if not (self.path / "manifest.json").is_file():
            raise ConfigError(
                f"{self.path} has no manifest: its extraction never finished.",
                "a finished store.",
                f"run the same `{self._extraction()}` (or `fit`) again, with its flags of the"
                " source: it goes on where it stopped.",
            )
        file = self.path / "manifest.json"
        facts = file.stat()
        stamp = facts.st_ino, facts.st_size, facts.st_mtime_ns
        if self._manifest is None or self._manifest[0] != stamp:
            content = store_format.read_sealed(file)
            fileio.must_fit(content, MANIFEST, str(file), REPAIR)
            self._manifest = stamp, content
        return self._manifest[1]

    def _extraction(self) -> str:
        """The command that made this unfinished store, as far as it is known."""
        images = "IMAGES"
        with suppress(ConfigError, DataError, OSError):  # stopped before it noted its images
            columns = self.read_pending() if self.pending.is_file() else {}
            images = columns.get("source") or columns.get("root") or images
        return shlex.join(["arrowhead", "precompute", images, str(self.path)])

    def intact(self) -> dict[str, str]:
        """sha256 by name of the manifest's shards that are on the disk; {} before the first one.

        Raises DataError if one has changed: rows are looked up in them, and a new manifest would
        vouch for it. A missing shard is no error here: it is extracted again.
        """
        if not (self.path / "manifest.json").is_file():
            return {}
        named = {shard["name"]: shard["sha256"] for shard in self.manifest()["shards"]}
        there = {name: digest for name, digest in named.items() if self.shard(name).is_file()}
        for name, digest in there.items():
            self._vouch(self.shard(name), digest)
        return there

    def golden_file(self, name: str) -> Path:
        """Where the photo of that image id (32 hex digits) lies, or would lie."""
        return self.path / "golden" / f"{name}.img"

    def golden(self) -> dict[bytes, bytes] | None:
        """The photos that were kept, by image id; without those that are missing or have changed.

        None for a store that says nothing of them: of an older version, or unfinished.
        """
        finished = (self.path / "manifest.json").is_file()
        names = self.manifest().get("golden") if finished else None
        if names is None:
            return None
        found = {}
        for name in names:
            with suppress(OSError):
                data = self.golden_file(name).read_bytes()
                if hashlib.blake2b(data, digest_size=16).hexdigest() == name:
                    found[bytes.fromhex(name)] = data
        return found

    def complete(
        self,
        names: Sequence[str],
        columns: Mapping[str, Any],
        intact: Mapping[str, str],
        golden: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Write the catalog (`columns` as `read_catalog` gives them) and the manifest of these
        shards; the store is now readable.

        intact: digests that are known already, as `intact` gave them. golden: names of the photos
        that were kept; others in their folder are removed. Raises DataError if another
        shard differs from what was written.
        """
        entries = []
        for name in names:
            rows = self.read(name, check=name not in intact)
            kinds = Counter(fault.partition(":")[0] for fault in rows.faults if fault)
            entries.append(
                {
                    "name": name,
                    "files": len(rows.paths),
                    "faults": kinds.total(),
                    "kinds": dict(kinds),
                    "bytes": self.shard(name).stat().st_size,
                    "sha256": intact.get(name) or fileio.sha256(self.shard(name)),
                }
            )
        catalog = self._keep_catalog(columns) | {"tries": int(columns["tries"].sum())}
        classes = sorted({name for names in columns["labels"] for name in names})
        manifest = {"format": FORMAT, "classes": classes, "catalog": catalog, "shards": entries}
        manifest["golden"] = list(golden)
        fileio.write_sealed(self.path / "manifest.json", manifest)
        with fileio.draft(self.path / "catalog.arrow") as draft_file:
            shutil.copyfile(self.path / catalog["name"], draft_file)
        for file in self.spare_golden(golden):
            file.unlink()
        return manifest

    def spare_golden(self, names: Sequence[str]) -> list[Path]:
        """Photos that were kept once and are not among `names`; none if their folder is a link."""
        folder = self.path / "golden"
        there = [] if folder.is_symlink() else sorted(folder.glob("*.img"))
        return [file for file in there if GOLDEN.fullmatch(file.stem) and file.stem not in names]

    def _keep_catalog(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """Write a catalog under the name its content gives it."""
        new = fileio.draft_path(self.path / "catalog")
        try:
            catalog_file.write_catalog(new, columns)
            digest = fileio.sha256(new)
            kept = self.path / f"catalog-{digest[:16]}.arrow"
            os.replace(new, kept)
        finally:
            new.unlink(missing_ok=True)
        return {"name": kept.name, "sha256": digest}

    def verify(self) -> None:
        """Compare every file the manifest names with its hash; DataError for the first misfit."""
        self._vouched.clear()
        for path, digest in self.hashes().items():
            self._vouch(path, digest)

    def hashes(self) -> dict[Path, str]:
        """sha256 of every file the manifest names."""
        manifest = self.manifest()
        expected = {self.path / manifest["catalog"]["name"]: manifest["catalog"]["sha256"]}
        return expected | {self.shard(one["name"]): one["sha256"] for one in manifest["shards"]}

    def rows(self) -> Iterator[Rows]:
        """The complete shards, in catalog order, memory-mapped.

        Raises DataError where they do not hold one row for every file of the catalog.
        """
        manifest = self.manifest()
        files, first = catalog_file.catalog_table(self._catalog_of(manifest)).num_rows, 0
        for shard in manifest["shards"]:
            rows = self.read(shard["name"])
            first += len(rows.paths)
            if first > files:
                break
            yield rows
        if first != files:
            raise self._of_other_numbers(files)

    def read_catalog(self) -> dict[str, Any]:
        """The columns of the manifest's catalog: the fields of `catalog.Catalog`."""
        return catalog_file.read_catalog(self._catalog_of(self.manifest()))

    def _catalog_of(self, manifest: Mapping[str, Any]) -> Path:
        """The manifest's catalog, compared with its hash."""
        named = manifest["catalog"]
        path = self.path / str(named["name"])
        self._vouch(path, named["sha256"])
        return path

    def _tables(self, manifest: Mapping[str, Any]) -> Iterator[Any]:
        """The tables of the manifest's shards, in catalog order, memory-mapped."""
        for one in manifest["shards"]:
            self._vouch(self.shard(one["name"]), one["sha256"])
            yield shard_file.shard_table(self.shard(one["name"]), self.recipe)

    def maps(self) -> list[NDArray[np.float16]]:
        """The features of every shard where they lie, memory-mapped: float16 (R, V, D) each, in
        catalog order, zero where faulty.
        """
        return [
            shard_file.feature_column(table, self.recipe) for table in self._tables(self.manifest())
        ]

    def clean_features(self, row_M: NDArray[np.int64]) -> NDArray[np.float16]:
        """float16 (M, D): the clean view of these rows of the catalog, which ascend."""
        parts, first = [], 0
        for shard in self.maps():
            here = row_M[(row_M >= first) & (row_M < first + len(shard))] - first
            parts.append(shard[here, 0])
            first += len(shard)
        return np.concatenate(parts)

    def features(self, split: str | None = None, *, mapped: bool = False) -> Features:
        """Features and labels of one split, or of every image; those with a fault are left out.

        Takes the memory of what it returns: shards are mapped one at a time, and copied from there.
        mapped: leave `feature` empty, (n, V, 0): `row` finds them in `maps`.
        """
        manifest = self.manifest()
        table = catalog_file.catalog_table(self._catalog_of(manifest))
        split_N = catalog_file.split_column(table)
        asked = np.ones(len(split_N), bool) if split is None else split_N == split
        # As many rows as the split has: its faults are not counted before they are met.
        most, views = int(asked.sum()), self.recipe.views
        feature = np.empty((most, views, 0 if mapped else self.recipe.width), np.float16)
        row, image_id = np.empty(most, np.int64), np.empty(most, np.uint64)
        done = first = 0
        for rows in self._tables(manifest):
            well = np.asarray(rows["fault"].is_null())[::views]
            if first + len(well) > len(asked):
                break
            mine = np.flatnonzero(well & asked[first : first + len(well)])
            here = slice(done, done + len(mine))
            whole = shard_file.feature_column(rows, self.recipe)[:, :, : feature.shape[2]]
            if len(mine) == len(whole):
                feature[here] = whole
            else:
                whole.take(mine, axis=0, out=feature[here], mode="clip")  # "raise" copies twice
            row[here] = first + mine
            image_id[here] = shard_file.id_column(rows)[::views][mine]
            done, first = here.stop, first + len(well)
        if first != len(asked):
            raise self._of_other_numbers(len(asked))
        row = row[:done]
        return Features(
            feature=feature[:done],
            label=catalog_file.label_column(table, manifest["classes"], row),
            row=row,
            image_id=image_id[:done],
            split=split_N[row],
        )

    def _of_other_numbers(self, files: int) -> DataError:
        return DataError(
            f"{self.path} has a catalog of {files} files, and shards of other numbers.",
            "one row of a shard for every file of the catalog.",
            "run the same precompute again, or extract again into a new store.",
        )
