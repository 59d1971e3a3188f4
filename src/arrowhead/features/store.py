"""The feature store: a directory of features with one recipe, and its files.

    rows of one chunk      path, image_id, view, feature, fault
      -> write_shard       one Arrow IPC file, complete or not at all
    all shards             listed in the manifest, their hashes checked
      -> Store.features    float16 (N, V, D), gathered from the memory-mapped shards

    store/
      store.json           format, recipe, fingerprint, chunk size
      catalog-<hash>.arrow paths, stamps, labels and splits; immutable
      corrections-<hash>.arrow  every label that was corrected (`features.corrections`); immutable
      body.safetensors     the weights that made the features
      shards/<name>.arrow  immutable
      golden/<id>.img      copies of a few photos, with which bundles check other machines
      digests/<name>       sha256 of each shard, and of the pending catalog
      pending.arrow        the catalog of an extraction that has not finished
      manifest.json        what is complete: catalog, corrections, shards, their hashes; replaced
                           atomically
      catalog.arrow        a copy of the current catalog under a fixed name, for people
      report_cache.json    what the last report measured of the originals (`examine.report_cache`)

A file gets its name only when it is complete, so the files on the disk show what is done, and a
stopped run continues without a journal. Readers start at the manifest. The files that it lists
never change, so a reader sees either the previous complete state or the next one, which
memory-mapped data sets of other libraries do not promise. Arrow opens no file before its sha256 is
compared: a flipped bit can crash it.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from arrowhead import fileio, output_paths
from arrowhead.data import remote_folder
from arrowhead.errors import ConfigError, DataError
from arrowhead.features import catalog_file, corrections_file, shard_file, store_format
from arrowhead.features.recipe import Recipe
from arrowhead.features.shard_file import PIXEL_DTYPE, ShardRows
from arrowhead.features.store_format import (
    EXTRACT_AGAIN,
    FORMAT,
    IMAGE_ID,
    MANIFEST_SCHEMA,
    REPAIR,
    RESTORE_CORRECTIONS,
    SHA256,
    STORE_SCHEMA,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """Features with labels, of one split or of all; n images without a fault, in catalog order.

    Attributes:
        feature: float16 (n, V, D), D numbers for each of V views of an image.
        label: int64 (n,), indices of the manifest's classes, if every image of the store has one
            label; else uint8 (n, C), 1 where the image has the label.
        row: int64 (n,), rows of the catalog.
        image_id: uint64 (n,), the first 8 bytes of the image id, big endian.
        split: str (n,): train, valid or test.
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
    """A directory of features with the same recipe. Opens an existing one; `create` makes it.

    `files` carries the files of a store in an object store (`data.remote_folder`).
    """

    dtype = "float16"
    """That of the recipes of such stores."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = remote_folder.of(path)
        self.files.refresh()
        self._checked: set[str] = set()  # files whose sha256 (or content) was found right
        self._manifest: tuple[tuple[int, ...], dict[str, Any]] | None = None
        if not (path / "store.json").is_file():
            raise ConfigError(
                f"{path} is not a feature store: it has no store.json.",
                "a folder written by `arrowhead precompute`, or the store in the OUT of `fit`.",
                store_format.suggest_store(path),
            )
        output_paths.check_utf8(path)
        content = store_format.read_sealed(path / "store.json")
        fileio.check_schema(content, STORE_SCHEMA, str(path / "store.json"), REPAIR)
        self.recipe = Recipe.from_dict(content.get("recipe", {}), str(path / "store.json"))
        if self.recipe.dtype != self.dtype:
            raise ConfigError(
                f"{path} holds numbers of type {self.recipe.dtype}: it is"
                f" {'a pixel cache' if self.recipe.dtype == PIXEL_DTYPE else 'a feature store'}.",
                f"a folder with numbers of type {self.dtype}.",
                "give the store in the OUT of `precompute`, `fit` or `finetune`.",
            )
        self.chunk_size = int(content["chunk_size"])
        self.weights_origin: dict[str, str] | None = content.get("weights")

    @classmethod
    def create(
        cls, path: Path, recipe: Recipe, chunk_size: int, origin: dict[str, str] | None = None
    ) -> Self:
        """Create the store at `path` for this recipe, or open it if it exists.

        origin: source and license of the weights, for people.

        Raises ConfigError if it exists with another recipe.
        """
        files = remote_folder.of(path)
        files.refresh()
        if (path / "store.json").is_file():
            store = cls(path)
            store.recipe.require_equal(recipe, str(path), "this run")
            return store
        output_paths.check_output_folder(path, "store")
        content: dict[str, Any] = {"recipe": recipe.to_dict(), "chunk_size": chunk_size}
        content |= {"weights": origin} if origin else {}
        content |= {"format": FORMAT, "fingerprint": recipe.fingerprint}
        with files.atomic_write(path / "store.json", guarded=True) as draft:
            draft.write_text(fileio.sealed(content))
        return cls(path)

    def lock(
        self, warn: Callable[[str], None] = fileio.warn_no_locks
    ) -> AbstractContextManager[None]:
        """Lock the store for writing; raises ConfigError if another process is writing to it.

        warn: called with a sentence if the file system has no locks.
        """
        return self.files.lock(warn)

    @property
    def weights_path(self) -> Path:
        """The file of the body's weights."""
        return self.path / "body.safetensors"

    def shard_path(self, name: str) -> Path:
        """The file of a shard, which may not exist yet."""
        return self.path / "shards" / f"{name}.arrow"

    def shard_names(self) -> list[str]:
        """Names of all shards on the disk, including those left over from an earlier catalog."""
        names = map(Path, self.files.names("shards"))
        return sorted(one.stem for one in names if one.suffix == ".arrow" and one.name[0] != ".")

    def fetch_shards(self, names: Iterable[str]) -> None:
        """Fetch shards of a store in an object store that will be read."""
        self.files.fetch(self.shard_path(name) for name in names)

    def write_shard(self, name: str, rows: ShardRows) -> None:
        """Write a shard, and its sha256 into digests/ until a manifest lists it."""
        shard_file.write_shard(self.shard_path(name), rows, self.recipe)
        self._record_hash(self.shard_path(name))  # before the shard: its name means that it is done
        self.files.upload(self.shard_path(name))

    def read_shard(self, name: str, *, check: bool = False) -> ShardRows:
        """Read a shard after comparing its sha256.

        check: also compare the content with the hash in its metadata. Raises DataError if either
        differs.
        """
        self._check_hash(self.shard_path(name), self._manifest_hashes().get(name))
        return shard_file.read_shard(self.shard_path(name), self.recipe, check=check)

    @property
    def pending_path(self) -> Path:
        """The catalog of an unfinished extraction, which may not exist."""
        return self.path / "pending.arrow"

    def write_pending(self, columns: Mapping[str, Any]) -> None:
        """Write the catalog of an extraction that starts; `columns`: see `Catalog.columns`."""
        catalog_file.write_catalog(self.pending_path, columns)
        self._record_hash(self.pending_path)
        self.files.upload(self.pending_path)

    def read_pending(self) -> dict[str, Any]:
        """Read what `write_pending` wrote; raises DataError if it has changed."""
        digest = self._recorded_hash(self.pending_path)
        if digest is None:
            raise DataError(
                f"{self.pending_path} cannot be checked: its recorded sha256 is missing.",
                f"its sha256 in {self._hash_path(self.pending_path)}.",
                "run the same precompute again.",
            )
        self._check_hash(self.pending_path, digest)
        return catalog_file.read_catalog(self.pending_path)

    def delete_pending(self) -> None:
        """Delete the pending catalog of an extraction that is complete."""
        self.files.remove(self.pending_path)
        self.files.remove(self._hash_path(self.pending_path))

    def _hash_path(self, path: Path) -> Path:
        return self.path / "digests" / path.stem

    def _record_hash(self, path: Path) -> None:
        with self.files.atomic_write(self._hash_path(path)) as temporary:
            temporary.write_text(fileio.sha256(path) + "\n")

    def _recorded_hash(self, path: Path) -> str | None:
        self.files.fetch([self._hash_path(path)])
        try:
            digest = self._hash_path(path).read_text(errors="replace").strip()
        except FileNotFoundError:
            return None
        return digest if SHA256.fullmatch(digest) else "not a sha256"

    def check_unlisted_shards(self) -> None:
        """Check the content of every shard whose sha256 is recorded nowhere, in one subprocess.

        Raises DataError for the first shard whose content has changed.
        """
        listed = self._manifest_hashes()
        paths = [self.shard_path(name) for name in self.shard_names() if name not in listed]
        self.files.refresh("digests")
        self._check_content([path for path in paths if self._recorded_hash(path) is None])

    def _check_content(self, paths: Sequence[Path]) -> None:
        unchecked = [path for path in paths if path.name not in self._checked]
        self.files.fetch(unchecked)
        shard_file.check_content(unchecked)
        for path in unchecked:
            self._checked.add(path.name)
            with suppress(OSError, ConfigError):  # the store may be read-only
                self._record_hash(path)

    def _manifest_hashes(self) -> dict[str, str]:
        """sha256 by name of the manifest's shards; {} without a manifest."""
        if not (self.path / "manifest.json").is_file():
            return {}
        return {shard["name"]: shard["sha256"] for shard in self.manifest()["shards"]}

    def _check_hash(self, path: Path, digest: str | None) -> None:
        """Compare a file with its sha256 before it is parsed, once per `Store` object.

        digest: None for a shard that is not in the manifest; then the sha256 recorded when it was
        written is used, or for a shard of an older version the hash in its metadata.
        """
        witness = "the manifest"
        if digest is None:
            digest, witness = self._recorded_hash(path), str(self._hash_path(path))
        if digest is None:
            self._check_content([path] if path.is_file() else [])
        elif f"{path.name} {digest}" not in self._checked or not path.is_file():
            self.files.check_sha256(path, digest, recorded_in=witness, repair=EXTRACT_AGAIN)
            self._checked.add(f"{path.name} {digest}")

    def manifest(self) -> dict[str, Any]:
        """The manifest, read again when its file changes.

        Raises ConfigError if no extraction has finished yet.
        """
        if not (self.path / "manifest.json").is_file():
            raise ConfigError(
                f"{self.path} has no manifest: its extraction never finished.",
                "a finished store.",
                f"run the same `{self._extraction_command()}` (or `fit`) again, with the same flags"
                " for the source: it continues where it stopped.",
            )
        file = self.path / "manifest.json"
        status = file.stat()
        stamp = status.st_ino, status.st_size, status.st_mtime_ns
        if self._manifest is None or self._manifest[0] != stamp:
            content = store_format.read_sealed(file)
            fileio.check_schema(content, MANIFEST_SCHEMA, str(file), REPAIR)
            self._manifest = stamp, content
        return self._manifest[1]

    def _extraction_command(self) -> str:
        """The command that made this unfinished store, as far as it can be reconstructed."""
        images = "IMAGES"
        with suppress(ConfigError, DataError, OSError):  # stopped before it recorded its images
            columns = self.read_pending() if self.pending_path.is_file() else {}
            images = columns.get("source") or columns.get("root") or images
        return shlex.join(["arrowhead", "precompute", images, str(self.path)])

    def intact_shards(self) -> dict[str, str]:
        """sha256 by name of those shards in the manifest that exist; {} without a manifest.

        Raises DataError if one has changed, since its features would be reused and listed in a new
        manifest. A missing shard is no error: it is extracted again.
        """
        there = {*self.shard_names()}
        existing = {name: sha for name, sha in self._manifest_hashes().items() if name in there}
        self.fetch_shards(existing)
        for name, digest in existing.items():
            self._check_hash(self.shard_path(name), digest)
        return existing

    def golden_path(self, name: str) -> Path:
        """The file of a golden image, named by its image id (32 hex digits); may not exist."""
        return self.path / "golden" / f"{name}.img"

    def load_golden(self) -> dict[bytes, bytes] | None:
        """The golden images by image id, without those that are missing or have changed.

        None if the manifest has no list of them: the store is unfinished or of an older version.
        """
        finished = (self.path / "manifest.json").is_file()
        names = self.manifest().get("golden") if finished else None
        if names is None:
            return None
        images = {}
        self.files.fetch(self.golden_path(name) for name in names)
        for name in names:
            with suppress(OSError):
                data = self.golden_path(name).read_bytes()
                if hashlib.blake2b(data, digest_size=16).hexdigest() == name:
                    images[bytes.fromhex(name)] = data
        return images

    def commit(
        self,
        names: Sequence[str],
        columns: Mapping[str, Any],
        intact: Mapping[str, str],
        golden: Sequence[str] = (),
        corrections: Mapping[str, Sequence[Any]] | None = None,
    ) -> dict[str, Any]:
        """Write the catalog and the manifest; from then on readers see these shards.

        Args:
            names: the shards, in catalog order.
            columns: the catalog, see `Catalog.columns`.
            intact: hashes that are known already, from `intact_shards`.
            golden: names of the golden images; other files in their folder are removed.
            corrections: the history of corrected labels, see `read_corrections`.

        Returns:
            The manifest.

        Raises:
            DataError: the content of a shard that is not in `intact` has changed.
        """
        entries = []
        self.fetch_shards(names)
        for name in names:
            rows = self.read_shard(name, check=name not in intact)
            kinds = Counter(fault.partition(":")[0] for fault in rows.faults if fault)
            entries.append(
                {
                    "name": name,
                    "files": len(rows.paths),
                    "faults": kinds.total(),
                    "kinds": dict(kinds),
                    "bytes": self.shard_path(name).stat().st_size,
                    "sha256": intact.get(name) or fileio.sha256(self.shard_path(name)),
                }
            )
        manifest = {"format": FORMAT, "shards": entries, "golden": list(golden)}
        manifest = self._publish(manifest, columns, corrections)
        for file in self.unused_golden(golden):
            self.files.remove(file)
        return manifest

    def commit_labels(
        self, columns: Mapping[str, Any], corrections: Mapping[str, Sequence[Any]]
    ) -> dict[str, Any]:
        """Write the catalog with other labels, the history that they come from, and the manifest.

        Nothing else changes. The manifest names catalog and history, so readers see both as they
        were before, or both as they are now. Args and result: see `commit`.
        """
        return self._publish(self.manifest(), columns, corrections)

    def _publish(
        self,
        manifest: Mapping[str, Any],
        columns: Mapping[str, Any],
        corrections: Mapping[str, Sequence[Any]] | None,
    ) -> dict[str, Any]:
        """Write the manifest with this catalog and history; see `commit`."""
        catalog = self._write_hashed(
            "catalog", lambda file: catalog_file.write_catalog(file, columns)
        )
        published = dict(manifest)
        published["catalog"] = catalog | {"tries": int(columns["tries"].sum())}
        published["classes"] = sorted({name for names in columns["labels"] for name in names})
        published.pop("corrections", None)
        if corrections and corrections["path"]:
            published["corrections"] = self._write_hashed(
                "corrections", lambda file: corrections_file.write_corrections(file, corrections)
            )
        with self.files.atomic_write(self.path / "manifest.json", guarded=True) as temporary:
            temporary.write_text(fileio.sealed(published))
        with self.files.atomic_write(self.path / "catalog.arrow") as temporary:
            shutil.copyfile(self.path / catalog["name"], temporary)
        return published

    def read_corrections(self) -> dict[str, list[Any]]:
        """Read the history of corrected labels, by column (see `corrections_file`); {} if none.

        In a store without a manifest it comes from the newest intact history, so that repairing a
        manifest (by deleting it) loses no correction.

        Raises:
            DataError: The history is missing or has changed.
        """
        if not (self.path / "manifest.json").is_file():
            return corrections_file.read_newest(self.path)
        entry = self.manifest().get("corrections")
        if entry is None:
            return {}
        path = self.path / entry["name"]
        fileio.check_sha256(
            path, entry["sha256"], recorded_in="the manifest", repair=RESTORE_CORRECTIONS
        )
        return corrections_file.read_corrections(path)

    def unused_golden(self, names: Sequence[str]) -> list[Path]:
        """Golden images that are not among `names`; none if their folder is a symbolic link."""
        folder = self.path / "golden"
        files = [] if folder.is_symlink() else sorted(map(Path, self.files.names("golden")))
        images = [file for file in files if IMAGE_ID.fullmatch(file.stem) and file.suffix == ".img"]
        return [folder / file for file in images if file.stem not in names]

    def _write_hashed(self, stem: str, write: Callable[[Path], None]) -> dict[str, Any]:
        """Write an Arrow file under a name that contains its hash; the manifest's entry for it."""
        temporary = fileio.draft_path(self.path / stem)
        try:
            write(temporary)
            digest = fileio.sha256(temporary)
            path = self.path / f"{stem}-{digest[:16]}.arrow"
            os.replace(temporary, path)
            self.files.upload(path)
        finally:
            temporary.unlink(missing_ok=True)
        return {"name": path.name, "sha256": digest}

    def verify(self) -> None:
        """Compare every file in the manifest with its hash; DataError for the first difference."""
        self._checked.clear()
        hashes = self.expected_hashes()
        self.files.fetch(hashes)
        for path, digest in hashes.items():
            self._check_hash(path, digest)

    def expected_hashes(self) -> dict[Path, str]:
        """The manifest's sha256 of its catalog and of every shard."""
        catalog = self.manifest()["catalog"]
        return {self.path / catalog["name"]: catalog["sha256"]} | {
            self.shard_path(name): digest for name, digest in self._manifest_hashes().items()
        }

    def shards(self) -> Iterator[ShardRows]:
        """Read the manifest's shards one by one, in catalog order, memory-mapped.

        Raises DataError if they do not hold one row for every image of the catalog.
        """
        manifest = self.manifest()
        images, done = catalog_file.catalog_table(self._catalog_path(manifest)).num_rows, 0
        self.fetch_shards(shard["name"] for shard in manifest["shards"])
        for shard in manifest["shards"]:
            rows = self.read_shard(shard["name"])
            done += len(rows.paths)
            if done > images:
                break
            yield rows
        if done != images:
            raise self._row_count_error(images)

    def read_catalog(self, row_M: NDArray[np.int64] | None = None) -> dict[str, Any]:
        """Read the manifest's catalog, or only some rows of it, as the fields of `Catalog`."""
        return catalog_file.read_catalog(self._catalog_path(self.manifest()), row_M)

    def find_paths(self, paths: Sequence[str]) -> dict[str, int]:
        """The rows of those of these escaped paths that are in the catalog."""
        table = catalog_file.catalog_table(self._catalog_path(self.manifest()))
        return catalog_file.find_paths(table, paths)

    def fault(self, row: int) -> str | None:
        """Why the image of a row has no features; None if it has."""
        for shard in self.shards():
            if row < len(shard.faults):
                return shard.faults[row]
            row -= len(shard.faults)
        raise IndexError(f"the catalog has no row {row}")

    def _catalog_path(self, manifest: Mapping[str, Any]) -> Path:
        """The file of the manifest's catalog, after comparing its hash."""
        catalog = manifest["catalog"]
        path = self.path / str(catalog["name"])
        self._check_hash(path, catalog["sha256"])
        return path

    def _tables(self, manifest: Mapping[str, Any]) -> Iterator[Any]:
        """The tables of the manifest's shards, in catalog order, memory-mapped."""
        self.fetch_shards(shard["name"] for shard in manifest["shards"])
        for shard in manifest["shards"]:
            self._check_hash(self.shard_path(shard["name"]), shard["sha256"])
            yield shard_file.shard_table(self.shard_path(shard["name"]), self.recipe)

    def mapped_features(self) -> list[NDArray[np.float16]]:
        """The memory-mapped features of every shard, float16 (R, V, D) each, in catalog order.

        An image with a fault has zeros.
        """
        return [
            shard_file.feature_column(table, self.recipe) for table in self._tables(self.manifest())
        ]

    def clean_features(self, row_M: NDArray[np.int64]) -> NDArray[np.float16]:
        """The features of view 0 of some rows of the catalog, float16 (M, D).

        row_M: in ascending order. A row with a fault gives zeros.
        """
        parts, first = [], 0
        for shard in self.mapped_features():
            index = row_M[(row_M >= first) & (row_M < first + len(shard))] - first
            parts.append(shard[index, 0])
            first += len(shard)
        return np.concatenate(parts)

    def image_ids(self) -> NDArray[np.uint64]:
        """The whole image id of every row of the catalog, uint64 (N, 2), big endian."""
        parts = [
            shard_file.whole_id_column(table)[:: self.recipe.views]
            for table in self._tables(self.manifest())
        ]
        return np.concatenate(parts) if parts else np.zeros((0, 2), np.uint64)

    def features(self, split: str | None = None, *, rows_only: bool = False) -> Features:
        """Load features and labels of one split, or of all images, without those with a fault.

        This needs no more memory than the result: shards are mapped and copied one at a time.

        Args:
            split: train, valid or test; None for all.
            rows_only: leave `feature` empty, (n, V, 0); `row` finds the features in
                `mapped_features`.
        """
        manifest = self.manifest()
        table = catalog_file.catalog_table(self._catalog_path(manifest))
        split_N = catalog_file.split_column(table)
        selected_N = np.ones(len(split_N), bool) if split is None else split_N == split
        # Room for the whole split: how many of its images have a fault is not known yet.
        max_rows, views = int(selected_N.sum()), self.recipe.views
        feature = np.empty((max_rows, views, 0 if rows_only else self.recipe.width), self.dtype)
        row, image_id = np.empty(max_rows, np.int64), np.empty(max_rows, np.uint64)
        done = first = 0
        for shard in self._tables(manifest):
            without_fault = np.asarray(shard["fault"].is_null())[::views]
            if first + len(without_fault) > len(selected_N):
                break
            index = np.flatnonzero(without_fault & selected_N[first : first + len(without_fault)])
            target = slice(done, done + len(index))
            shard_feature = shard_file.feature_column(shard, self.recipe)
            shard_feature = shard_feature[:, :, : feature.shape[2]]
            if len(index) == len(shard_feature):
                feature[target] = shard_feature
            else:  # mode "raise" would copy twice
                shard_feature.take(index, axis=0, out=feature[target], mode="clip")
            row[target] = first + index
            image_id[target] = shard_file.id_column(shard)[::views][index]
            done, first = target.stop, first + len(without_fault)
        if first != len(selected_N):
            raise self._row_count_error(len(selected_N))
        row = row[:done]
        return Features(
            feature=feature[:done],
            label=catalog_file.label_column(table, manifest["classes"], row),
            row=row,
            image_id=image_id[:done],
            split=split_N[row],
        )

    def _row_count_error(self, images: int) -> DataError:
        return DataError(
            f"{self.path} has a catalog of {images} files, but its shards hold another number.",
            "one row of a shard for every file of the catalog.",
            "run the same precompute again, or extract again into a new store.",
        )
