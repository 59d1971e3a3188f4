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
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import ConfigError, DataError, fileio, targets

FORMAT = 2
REPAIR = (
    "restore the file from a copy, or delete it and run the same precompute again: features that"
    " are there are not decoded again."
)
COLUMNS = ("path", "image_id", "view", "feature", "fault")  # of a shard
EXTRACT_AGAIN = (
    "delete the file and run the same precompute again: only its images are decoded again."
)


# ------------------------------------------------------------------------- shapes of papers


def _positive(value: Any) -> bool:
    return type(value) is int and value > 0


def _triple(value: Any) -> bool:
    fits = isinstance(value, list | tuple) and len(value) == 3
    return fits and {type(one) for one in value} <= {int, float}


DIGEST = re.compile("[0-9a-f]{64}")
NAME = re.compile("[0-9a-z]+")  # of a shard: no way out of its folder
RECIPE = {
    **dict.fromkeys(("body", "weights", "pool", "resize", "interpolation", "augment"), str),
    **dict.fromkeys(("dtype", "decoder"), str),
    **dict.fromkeys(("width", "size", "views"), _positive),
    **dict.fromkeys(("format", "augment_seed"), int),
    **dict.fromkeys(("mean", "std"), _triple),
    "antialias": bool,
}
GOLDEN = re.compile("[0-9a-f]{32}")  # an image id
HEAD = {"recipe": dict, "chunk_size": _positive}
MANIFEST = {
    "classes": [str],
    "catalog": {
        "name": re.compile(r"catalog-[0-9a-f]+\.arrow"),
        "sha256": DIGEST,
        "tries": int,
    },
    "shards": [
        {"name": NAME, "files": _positive, "faults": int, "kinds": {str: int}, "bytes": int}
        | {"sha256": DIGEST}
    ],
    "golden?": [GOLDEN],  # absent in what version 0.1.0 wrote
}


# ------------------------------------------------------------------------------ recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a feature was made. Features of unequal recipes are never mixed."""

    format: int = FORMAT
    body: str
    """torchvision's name of the network."""
    weights: str
    """sha256 of the body's tensors, whichever file they came from."""
    pool: str
    """avg, max or concat (both): from the last feature map to one row."""
    width: int
    """D, numbers per feature."""
    size: int
    """Side of the square the body sees, in pixels."""
    resize: str
    """crop (shorter side to 8/7 of size, middle cut out), squash, or pad."""
    interpolation: str = "linear"
    antialias: bool = True
    mean: tuple[float, float, float]
    """Per channel, of pixels scaled to 0..1."""
    std: tuple[float, float, float]
    views: int = 1
    """Rows per image: view 0 is clean, the others augmented."""
    augment: str = "none"
    """Policy of the augmented views."""
    augment_seed: int = 0
    dtype: str = "float16"
    decoder: str = "dali"
    """Who decodes, and where a turned photo's middle is (`decode.RULES`)."""

    def json(self) -> str:
        """Canonical: sorted keys, no spaces."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @property
    def fingerprint(self) -> str:
        """16 hex digits that stand for the recipe."""
        return hashlib.blake2b(self.json().encode(), digest_size=8).hexdigest()

    @staticmethod
    def from_dict(fields: Mapping[str, Any], where: str) -> Recipe:
        """The recipe in `fields`, read from `where`; DataError if it is of another format."""
        known = {field.name for field in dataclasses.fields(Recipe)}
        if fields.get("format") != FORMAT or set(fields) != known:
            raise DataError(
                f"{where} holds a recipe of format {fields.get('format')}.",
                f"format {FORMAT}, with the fields this version knows.",
                "use the Arrowhead version that wrote it, or extract again into a new store.",
            )
        fileio.must_fit(fields, RECIPE, f"the recipe in {where}", "extract again into a new store.")
        triples = {name: tuple(fields[name]) for name in ("mean", "std")}
        return Recipe(**{**fields, **triples})

    def must_equal(self, other: Recipe, ours: str, theirs: str) -> None:
        """Refuse to mix features of this recipe (in `ours`) with those of `other` (`theirs`)."""
        for field in dataclasses.fields(Recipe):
            mine, its = getattr(self, field.name), getattr(other, field.name)
            if mine != its:
                raise ConfigError(
                    f"{ours} was made with {field.name} = {mine}, {theirs} with {its}.",
                    "one recipe: features made in two ways cannot be compared.",
                    f"ask for {field.name} = {mine}, or write to another place.",
                )


# --------------------------------------------------------------------- tables of features


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The rows of one chunk: R files x V views, in catalog order, views of a file together.

    paths: R; image_ids: R of 16 bytes; features: float16 (R, V, D), zero where faulty;
    faults: R, None when the image is well.
    """

    paths: Sequence[str]
    image_ids: Sequence[bytes]
    features: NDArray[np.float16]
    faults: Sequence[str | None]


def write_shard(path: Path, rows: Rows, recipe: Recipe) -> None:
    """One Arrow IPC file; columns path, image_id, view, feature, fault."""
    import pyarrow as pa

    files, views, width = rows.features.shape
    faults = [fault for fault in rows.faults for _ in range(views)]
    absent = pa.array([fault is not None for fault in faults], pa.bool_())
    table = pa.table(
        {
            "path": pa.array([path for path in rows.paths for _ in range(views)], pa.string()),
            "image_id": pa.array([i for i in rows.image_ids for _ in range(views)], pa.binary(16)),
            "view": pa.array(np.tile(np.arange(views, dtype=np.uint8), files)),
            "feature": pa.FixedSizeListArray.from_arrays(
                pa.array(rows.features.reshape(-1)), width, mask=absent
            ),
            "fault": pa.array(faults, pa.string()),
        }
    )
    notes = {"arrowhead.recipe": recipe.json(), "arrowhead.digest": _digest(rows, recipe)}
    write_arrow(path, table.replace_schema_metadata(notes))


def _digest(rows: Rows, recipe: Recipe) -> str:
    """Hash of a shard's content: vouches for a shard that no manifest names yet."""
    total = hashlib.blake2b(recipe.json().encode(), digest_size=16)
    total.update(json.dumps([list(rows.paths), list(rows.faults)]).encode())
    total.update(b"".join(rows.image_ids))
    for row, fault in zip(rows.features, rows.faults, strict=True):
        if fault is None:
            total.update(row.tobytes())
    return total.hexdigest()


def write_arrow(path: Path, table: Any) -> None:
    """A pyarrow table as one record batch in one Arrow IPC file, whole or absent."""
    import pyarrow as pa

    with (
        fileio.draft(path) as sketch,
        pa.OSFile(str(sketch), "wb") as file,
        pa.ipc.new_file(file, table.schema) as sink,
    ):
        sink.write_table(table.combine_chunks())


def read_arrow(path: Path) -> Any:
    """The memory-mapped pyarrow table of an Arrow IPC file; DataError if it is not one.

    Arrow can end the process over a flipped bit: compare the file's hash first.
    """
    import pyarrow as pa

    try:
        must_be_plain(path, _footer(path))
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        table.validate(full=True)  # offsets and text: a hash vouches for nonsense, too
        return table
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            f"{path} cannot be read: {error}.",
            "an Arrow file written by Arrowhead.",
            "delete the file and run precompute again: only its images are decoded again.",
        ) from error


def _footer(path: Path) -> bytes:
    """The end of an Arrow file, where its schema is; b"" if that is no such file."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 10))
        size = int.from_bytes(file.read(4), "little")
        if not 0 < size <= end - 10:
            return b""
        file.seek(end - 10 - size)
        return file.read(size)


def must_be_plain(path: Path, schema: bytes) -> None:
    """DataError for a file with extension types, before Arrow looks at it.

    Who registers such a type says what runs when it is opened or read. Ray Train brings Ray Data's,
    and those unpickle: a column `path` of theirs would run whatever the file's maker likes.
    """
    if b"ARROW:extension" in schema:
        raise DataError(
            f"{path} holds columns of an extension type.",
            "plain Arrow types, as Arrowhead writes them: reading others can run code.",
            "do not use it; ask where it comes from.",
        )


def read_shard(path: Path, recipe: Recipe, *, check: bool = False) -> Rows:
    """The rows of a shard; its features are a view of the memory map, nothing is copied.

    check: compare the content with the digest inside. DataError if they differ.
    """
    table = _shard_table(path, recipe)
    views = recipe.views
    rows = Rows(
        paths=table["path"].to_pylist()[::views],
        image_ids=table["image_id"].to_pylist()[::views],
        features=_feature_column(table, recipe),
        faults=table["fault"].to_pylist()[::views],
    )
    digest = table.schema.metadata.get(b"arrowhead.digest", b"").decode()
    if check and digest != _digest(rows, recipe):
        raise DataError(
            f"{path} differs from the digest inside it: its bytes have changed since they were"
            " written.",
            "the bytes that Arrowhead wrote.",
            EXTRACT_AGAIN,
        )
    return rows


def _shard_table(path: Path, recipe: Recipe) -> Any:
    """The memory-mapped pyarrow table of a shard made by this recipe."""
    import pyarrow as pa

    table = read_arrow(path)
    made = Recipe.from_dict(_recipe_note(table), str(path))
    made.must_equal(recipe, str(path), "the store")
    kinds = [
        pa.string(),
        pa.binary(16),
        pa.uint8(),
        pa.list_(pa.float16(), made.width),
        pa.string(),
    ]
    if (tuple(table.column_names), table.schema.types) != (COLUMNS, kinds):
        found = ", ".join(f"{one.name} {one.type}" for one in table.schema)
        raise DataError(
            f"{path} has the columns {found}.",
            f"{', '.join(COLUMNS)}, of the types that precompute writes.",
            "delete the file and run precompute again: only its images are decoded again.",
        )
    return table


def _recipe_note(table: Any) -> dict[str, Any]:
    try:
        fields = json.loads((table.schema.metadata or {}).get(b"arrowhead.recipe", b"{}"))
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _feature_column(table: Any, recipe: Recipe) -> NDArray[np.float16]:
    """float16 (R, V, D): a view of the memory map, zero where faulty."""
    flat = _whole(table["feature"]).values.to_numpy(zero_copy_only=True)
    feature: NDArray[np.float16] = flat.reshape(-1, recipe.views, recipe.width)
    return feature


def _id_column(table: Any) -> NDArray[np.uint64]:
    """uint64 (rows of the shard,): the first 8 bytes of every image id, big endian."""
    ids = _whole(table["image_id"])
    words = np.frombuffer(ids.buffers()[1], ">u8").reshape(-1, 2)
    return words[ids.offset : ids.offset + len(ids), 0].astype(np.uint64)


def _whole(column: Any) -> Any:
    """A column as one array; what Arrowhead writes is one already, and combining would copy it."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


# ------------------------------------------------------------------------------- store


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
        targets.must_be_text(path)
        head = _read_sealed(path / "store.json")
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
        targets.check_folder(path, "store")
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
        write_shard(self.shard(name), rows, self.recipe)
        self._note_digest(self.shard(name))

    def read(self, name: str, *, check: bool = False) -> Rows:
        """The rows of the shard of that name, its bytes compared with their sha256 first.

        check: compare the content with the digest inside, too. DataError if either differs.
        """
        self._vouch(self.shard(name), self._named().get(name))
        return read_shard(self.shard(name), self.recipe, check=check)

    @property
    def pending(self) -> Path:
        """Where the catalog of the extraction that is under way lies, or would lie."""
        return self.path / "pending.arrow"

    def write_pending(self, columns: Mapping[str, Any]) -> None:
        """Write the catalog of an extraction (`columns` as `write_catalog` takes them)."""
        write_catalog(self.pending, columns)
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
        return read_catalog(self.pending)

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
        _examine(new)
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
            content = _read_sealed(file)
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
        with fileio.draft(self.path / "catalog.arrow") as sketch:
            shutil.copyfile(self.path / catalog["name"], sketch)
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
            write_catalog(new, columns)
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
        files, first = _catalog_table(self._catalog_of(manifest)).num_rows, 0
        for shard in manifest["shards"]:
            rows = self.read(shard["name"])
            first += len(rows.paths)
            if first > files:
                break
            yield rows
        if first != files:
            raise self._of_other_numbers(files)

    def read_catalog(self) -> dict[str, Any]:
        """The columns of the manifest's catalog: the fields of `plan.Catalog`."""
        return read_catalog(self._catalog_of(self.manifest()))

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
            yield _shard_table(self.shard(one["name"]), self.recipe)

    def maps(self) -> list[NDArray[np.float16]]:
        """The features of every shard where they lie, memory-mapped: float16 (R, V, D) each, in
        catalog order, zero where faulty.
        """
        return [_feature_column(table, self.recipe) for table in self._tables(self.manifest())]

    def features(self, split: str | None = None, *, mapped: bool = False) -> Features:
        """Features and labels of one split, or of every image; those with a fault are left out.

        Takes the memory of what it returns: shards are mapped one at a time, and copied from there.
        mapped: leave `feature` empty, (n, V, 0): `row` finds them in `maps`.
        """
        manifest = self.manifest()
        table = _catalog_table(self._catalog_of(manifest))
        split_N = _split_column(table)
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
            whole = _feature_column(rows, self.recipe)[:, :, : feature.shape[2]]
            if len(mine) == len(whole):
                feature[here] = whole
            else:
                whole.take(mine, axis=0, out=feature[here], mode="clip")  # "raise" copies twice
            row[here] = first + mine
            image_id[here] = _id_column(rows)[::views][mine]
            done, first = here.stop, first + len(well)
        if first != len(asked):
            raise self._of_other_numbers(len(asked))
        row = row[:done]
        return Features(
            feature=feature[:done],
            label=_label_column(table, manifest["classes"], row),
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


def must_be_intact(path: Path, digest: str) -> None:
    """DataError if a file of a store is missing or its bytes are not those of this sha256."""
    fileio.must_hash_to(path, digest, witness="the manifest", repair=EXTRACT_AGAIN)


def _read_sealed(path: Path) -> dict[str, Any]:
    return fileio.read_sealed(
        path,
        FORMAT,
        upgrade="extract again into a new store",
        repair=REPAIR,
    )


def _examine(paths: Sequence[Path]) -> None:
    """DataError for the first shard whose content is not what its digest inside was made of.

    In a process of its own, since Arrow can end one over a flipped bit. Shards that older versions
    left when they were stopped are the only ones that nothing else vouches for.
    """
    if not paths:
        return
    code = (
        "import os, sys; from pathlib import Path; from arrowhead import shards\n"
        "for name in sys.stdin.buffer.read().split(bytes(1)):\n"
        "    path = Path(os.fsdecode(name))\n"
        "    made = shards._recipe_note(shards.read_arrow(path))\n"
        "    recipe = shards.Recipe.from_dict(made, str(path))\n"
        "    shards.read_shard(path, recipe, check=True)\n"
        "    print(flush=True)\n"
    )
    ended = subprocess.run(  # noqa: S603 - ourselves
        [sys.executable, "-P", "-c", code],
        input=bytes(1).join(map(os.fsencode, paths)),
        capture_output=True,
        check=False,
    )
    if ended.returncode:
        bad = paths[len(ended.stdout.splitlines())]
        raise DataError(
            f"{bad} has changed since it was written: reading it ends with {ended.returncode}.",
            "the bytes that Arrowhead wrote.",
            EXTRACT_AGAIN,
        )


def write_folds(path: Path, columns: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Out-of-fold probabilities as an Arrow file: path, labels, fold, probability
    (float32 of every class, in the order of `arrowhead.classes`); notes as JSON in the metadata.
    fold and probability are null where the fold is below 0.
    """
    import pyarrow as pa

    chance_NC = np.ascontiguousarray(columns["probability"], np.float32)
    flat, none_N = pa.array(chance_NC.ravel(), pa.float32()), columns["fold"] < 0
    table = pa.table(
        {
            "path": pa.array(columns["path"], pa.string()),
            "labels": pa.array([list(one) for one in columns["labels"]], pa.list_(pa.string())),
            "fold": pa.array(columns["fold"], pa.int32(), mask=none_N),
            "probability": pa.FixedSizeListArray.from_arrays(
                flat, chance_NC.shape[1], mask=pa.array(none_N)
            ),
        }
    )
    marks = {f"arrowhead.{name}": json.dumps(value) for name, value in notes.items()}
    write_arrow(path, table.replace_schema_metadata(marks))


def write_catalog(path: Path, columns: Mapping[str, Any]) -> None:
    """A catalog as an Arrow file: path, size, stamp, labels, split, tries; its root as metadata."""
    import pyarrow as pa

    table = pa.table(
        {
            "path": pa.array(columns["paths"], pa.string()),
            "size": pa.array(columns["sizes"], pa.int64()),
            "stamp": pa.array(columns["stamps"], pa.int64()),
            "labels": pa.array([list(names) for names in columns["labels"]], pa.list_(pa.string())),
            "split": pa.array(columns["splits"], pa.string()).dictionary_encode(),
            "tries": pa.array(columns["tries"], pa.uint8()),
        }
    )
    root = {"arrowhead.root": columns["root"], "arrowhead.ignored": str(columns["ignored"])}
    if columns.get("source"):
        root["arrowhead.source"] = columns["source"]
    write_arrow(path, table.replace_schema_metadata(root))


def read_catalog(path: Path, rows: range | None = None) -> dict[str, Any]:
    """The columns that `write_catalog` wrote, as the fields of `plan.Catalog`; some rows of them,
    or all.
    """
    table = _catalog_table(path)
    if rows is not None:
        table = table.slice(rows.start, len(rows))
    return {
        "root": table.schema.metadata[b"arrowhead.root"].decode(),
        "paths": table["path"].to_pylist(),
        "sizes": table["size"].to_numpy(),
        "stamps": table["stamp"].to_numpy(),
        "labels": [tuple(names) for names in table["labels"].to_pylist()],
        "splits": table["split"].to_pylist(),
        "tries": table["tries"].to_numpy(),
        "ignored": int(table.schema.metadata[b"arrowhead.ignored"]),
        "source": table.schema.metadata.get(b"arrowhead.source", b"").decode(),
    }


def _catalog_table(path: Path) -> Any:
    """The memory-mapped pyarrow table of a catalog; DataError if it is of another shape."""
    import pyarrow as pa

    table = read_arrow(path)
    kinds = {
        "path": pa.string(),
        "size": pa.int64(),
        "stamp": pa.int64(),
        "labels": pa.list_(pa.string()),
        "split": pa.dictionary(pa.int32(), pa.string()),
        "tries": pa.uint8(),
    }
    notes = table.schema.metadata or {}
    fits = dict(zip(table.column_names, table.schema.types, strict=True)) == kinds
    fits &= not any(column.null_count for column in table.columns)
    if not (fits and b"arrowhead.root" in notes and notes.get(b"arrowhead.ignored", b"").isdigit()):
        raise DataError(
            f"{path} is not a catalog as Arrowhead writes it: {table.schema.to_string()[:300]}",
            f"the columns {', '.join(kinds)}, without gaps; root and ignored in the metadata.",
            REPAIR,
        )
    return table


def _split_column(table: Any) -> NDArray[np.str_]:
    """The splits of a catalog's table, str (N,)."""
    column = _whole(table["split"])
    names = np.array(column.dictionary.to_pylist(), np.str_)
    split_N: NDArray[np.str_] = names[column.indices.to_numpy()]
    return split_N


def _label_column(
    table: Any, classes: Sequence[str], row: NDArray[np.int64]
) -> NDArray[np.int64] | NDArray[np.uint8]:
    """The labels of some rows of a catalog's table, as `Features` holds them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = _whole(table["labels"])
    ends = column.offsets.to_numpy()
    known = pa.array(classes, pa.string())
    number = pc.index_in(column.values, value_set=known).to_numpy(zero_copy_only=False)
    number, count = number[ends[0] : ends[-1]], np.diff(ends)
    if np.isnan(number.astype(np.float64)).any():
        raise DataError(
            "The store's catalog has labels that are not among the classes of its manifest.",
            f"the classes {', '.join(classes[:5])} and so on.",
            "run the same precompute again, or extract again into a new store.",
        )
    if (count == 1).all():
        only: NDArray[np.int64] = number[row].astype(np.int64)
        return only
    place = np.full(len(count), -1)
    place[row] = np.arange(len(row))
    owner = np.repeat(place, count)
    label = np.zeros((len(row), len(classes)), np.uint8)
    label[owner[owner >= 0], number[owner >= 0]] = 1
    return label
