"""Arrowhead: a folder of images becomes a trained, evaluated, deployable classifier.

Each image is decoded once; every experiment after that takes seconds. Importing this package is
fast: torch is imported when `Images` or `Learner` is first used.
"""

# Without -P, `python -m arrowhead` puts the current folder first on sys.path. It may be a folder of
# data, and a `numpy.py` or `typing.py` in it would be run. So remove it before importing anything.
import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    del sys.path[0]

from typing import TYPE_CHECKING, Any

from arrowhead.errors import ConfigError, DataError, LostError, Refusal

if TYPE_CHECKING:
    from arrowhead.notebook import Images, Learner

__version__ = "0.1.0"
__all__ = ["ConfigError", "DataError", "Images", "Learner", "LostError", "Refusal", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("Images", "Learner"):
        from arrowhead import notebook

        return getattr(notebook, name)
    raise AttributeError(f"module 'arrowhead' has no attribute '{name}'")
