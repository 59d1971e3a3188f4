"""Variables every process needs: a home and a user name, even where a container has neither."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path


def ensure_home_and_user() -> None:
    """Set HOME and USER for this process and its children where they are missing.

    A container may run under a user id without an entry in the password file. Python's `Path.home`
    then raises, and so do torch, matplotlib and Ray, which keep caches and tokens at home. The home
    becomes a temporary folder that only this user may enter.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(private_temp_folder("home"))
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())


def private_temp_folder(name: str) -> Path:
    """A temporary folder that only this user may enter, the same for every command."""
    folder = Path(tempfile.gettempdir()) / f"arrowhead-{name}-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        stat = folder.lstat()
        if folder.is_dir() and stat.st_uid == os.getuid() and not stat.st_mode & 0o077:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix=f"arrowhead-{name}-"))  # another user has taken the name
