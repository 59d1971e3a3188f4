"""What a process must find around it: a home and a user name, where a container has neither."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path


def complete() -> None:
    """Give this process, and those that it starts, HOME and USER where they are missing.

    A container may run under a user id without an entry in the password file. Python's `Path.home`
    then raises, and so do torch, matplotlib and Ray, which keep caches and tokens at home. The home
    is a temporary folder of this user's own.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(own_folder("home"))
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())


def own_folder(name: str) -> Path:
    """A temporary folder that nobody else may enter, the same for every command of this user."""
    folder = Path(tempfile.gettempdir()) / f"arrowhead-{name}-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
        if folder.is_dir() and facts.st_uid == os.getuid() and not facts.st_mode & 0o077:
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix=f"arrowhead-{name}-"))  # the name is taken by somebody else
