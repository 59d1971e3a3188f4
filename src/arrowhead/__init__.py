"""Arrowhead: a folder of images becomes a trained, evaluated, deployable classifier.

Each image is decoded once; every experiment after that takes seconds. Importing this
package runs nothing heavy: `Images` and `Learner` bring torch when they are first named.
"""

# `python -m arrowhead`, without -P, puts the folder we stand in before all others. It may be one of
# data, whose `numpy.py` or `typing.py` would be run: out with it, before anything is imported.
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
