"""What a user names becomes a bundle's folder: a path, a registered model, a URI."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from arrowhead import fileio
from arrowhead.bundle import format as bundle_format
from arrowhead.data import path_text, reading
from arrowhead.errors import DataError
from arrowhead.tracking import registry
from arrowhead.tracking.client import TrackingConfig


def must_be_there(address: str) -> None:
    """ConfigError for a folder without a bundle; what is in a store is not asked for."""
    if address.startswith(("models:/", "runs:/")) or path_text.in_store(
        root := path_text.resolve(address)
    ):
        return
    if not (Path(os.fsdecode(path_text.unescape_path(root))) / "bundle.json").is_file():
        raise bundle_format.no_bundle(address)


def bundle_folder(address: str, config: TrackingConfig, scratch: Path) -> Path:
    """The folder of the bundle that a user named.

    address: a folder, which is returned as it is; else a model in the tracking store, as
    `registry.opened` takes it, or a URI such as s3://bucket/bundle. Of these every file that
    bundle.json names is fetched into scratch/bundle and compared with its hash: that folder is
    whole or absent, and an older one there is replaced. Raises ConfigError if there is no bundle,
    DataError if it is torn, of another format, or wants to write elsewhere.
    """
    if Path(address).is_dir():
        return Path(address)
    if address.startswith(("models:/", "runs:/")):
        return _fetched(registry.opened(address, config), address, scratch / "bundle")
    root = path_text.resolve(address)
    if path_text.in_store(root):
        return _fetched(partial(reading.fetch, root), address, scratch / "bundle")
    return Path(os.fsdecode(path_text.unescape_path(root))) if "://" in address else Path(address)


def _fetched(fetch: registry.Fetch, address: str, target: Path) -> Path:
    with fileio.draft_folder(target) as folder:
        try:
            fetch("bundle.json", folder / "bundle.json")
        except FileNotFoundError as error:
            raise bundle_format.no_bundle(address) from error
        for name, digest in bundle_format.read_content(folder / "bundle.json", address)[
            "sha256"
        ].items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                fetch(name, folder / name)
            except FileNotFoundError as error:
                raise DataError(
                    f"{address} is not whole: {name} is missing.",
                    "every file that bundle.json names.",
                    "copy the bundle there again, or train again.",
                ) from error
            bundle_format.must_be_file(folder / name, digest, f"{address}/{name}")
    return target
