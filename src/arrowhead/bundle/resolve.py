"""Resolve what the user names (a path, a registered model, a URI) to a bundle's folder."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path

from arrowhead import fileio
from arrowhead.bundle import format as bundle_format
from arrowhead.data import mirrors, path_text, reading, remote_folder
from arrowhead.errors import DataError
from arrowhead.tracking import registry
from arrowhead.tracking.client import TrackingConfig


def check_exists(address: str) -> None:
    """Raise ConfigError for a local folder without a bundle; remote addresses are not checked."""
    if address.startswith(("models:/", "runs:/")) or path_text.is_store_uri(
        root := path_text.resolve(address)
    ):
        return
    if not (Path(os.fsdecode(path_text.unescape_path(root))) / "bundle.json").is_file():
        raise bundle_format.no_bundle_error(address)


def check_output(path: Path) -> Path:
    """Check where a bundle will be written, and the bundle that it replaces be kept.

    Args:
        path: A folder or address, as the user gave it.

    Returns:
        The folder, for an address its mirror.
    """
    path = remote_folder.check_output(path, "bundle")
    previous = remote_folder.check_output(path.with_name(f"{path.name}.previous"), "bundle")
    for folder in (path, previous):
        refresh_mirror(folder)
    return path


def local_copy(path: Path) -> Path:
    """The folder of a bundle that a Python program loads, for an address its mirror."""
    folder = remote_folder.local(path)
    refresh_mirror(folder)
    check_exists(str(folder))
    return folder


def bundle_folder(address: str, config: TrackingConfig, scratch: Path) -> Path:
    """The folder of a bundle, downloaded if it is not local.

    Args:
        address: A local folder, which is returned unchanged; a model in the tracking store (see
            `registry.model_files`); or a URI such as s3://bucket/bundle.
        config: The tracking store.
        scratch: A remote bundle is downloaded to scratch/bundle, atomically; an older one there is
            replaced. Each file is checked against its hash.

    Raises:
        ConfigError: If there is no bundle.
        DataError: If it is damaged, of another format, or names files outside its folder.
    """
    if Path(address).is_dir():
        return Path(address)
    if address.startswith(("models:/", "runs:/")):
        return _download(registry.model_files(address, config), address, scratch / "bundle")
    root = path_text.resolve(address)
    if path_text.is_store_uri(root):
        return _download(partial(reading.download_file, root), address, scratch / "bundle")
    return Path(os.fsdecode(path_text.unescape_path(root))) if "://" in address else Path(address)


def folder_here(path: Path) -> Path:
    """A bundle's folder on the machine of a worker, which may have another mirror of its address
    than the driver, or none yet.
    """
    folder = mirrors.here(path)
    if folder != path or not path.is_dir():
        refresh_mirror(folder)
    return folder


def refresh_mirror(path: Path) -> None:
    """Fetch the bundle of a mirror that a command will replace, or remove one that the store does
    not have any more. Does nothing for a path on a disk.
    """
    if (uri := mirrors.uri_of(path)) is None:
        return
    folder = remote_folder.of(path)
    if not folder.note_version("bundle.json"):
        shutil.rmtree(path, ignore_errors=True)
        return
    folder.fetch_all()
    try:
        content = bundle_format.read_bundle_json(path / "bundle.json", uri)
        for name, digest in content["sha256"].items():
            bundle_format.check_sha256(path / name, digest, f"{uri}/{name}")
    except DataError:  # it is being replaced, or was when its writer was killed
        _download(partial(reading.download_file, path_text.resolve(uri)), uri, path)


def _download(fetch: registry.Fetch, address: str, target: Path) -> Path:
    with fileio.atomic_folder(target) as folder:
        try:
            fetch("bundle.json", folder / "bundle.json")
        except FileNotFoundError as error:
            raise bundle_format.no_bundle_error(address) from error
        content = bundle_format.read_bundle_json(folder / "bundle.json", address)
        for name, digest in content["sha256"].items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                _fetch_file(fetch, name, folder / name, digest, address)
            except (FileNotFoundError, DataError):
                try:  # the bundle was replaced a moment ago
                    staged = remote_folder.staged_key(digest)
                    _fetch_file(fetch, staged, folder / name, digest, address)
                except (FileNotFoundError, DataError):
                    _fetch_file(fetch, name, folder / name, digest, address)
    return target


def _fetch_file(fetch: registry.Fetch, name: str, target: Path, digest: str, address: str) -> None:
    """Fetch a file of a bundle and compare its hash."""
    try:
        fetch(name, target)
    except FileNotFoundError as error:
        raise DataError(
            f"{address} is incomplete: {name} is missing.",
            "every file that bundle.json names.",
            "copy the bundle there again, or train again.",
        ) from error
    bundle_format.check_sha256(target, digest, f"{address}/{name}")
