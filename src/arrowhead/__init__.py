"""Arrowhead: a folder of images becomes a trained, examined, deployable classifier.

Each image is decoded once; every experiment after that takes seconds. Importing this
package runs nothing heavy: `Images` and `Learner` bring torch when they are first named.
"""

# `python -m arrowhead`, without -P, puts the folder we stand in before all others. It may be one of
# data, whose `numpy.py` or `typing.py` would be run: out with it, before anything is imported.
import sys

if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    del sys.path[0]

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arrowhead.learner import Images, Learner

__version__ = "0.1.0"
__all__ = ["ConfigError", "DataError", "Images", "Learner", "LostError", "__version__"]


class Refusal(Exception):
    """A request that cannot be carried out, said in three parts.

    found: what was there; wanted: what should have been; do: what to change.
    """

    def __init__(self, found: str, wanted: str, do: str) -> None:
        super().__init__(found, wanted, do)  # all three in args: it must survive pickling
        self.found, self.wanted, self.do = found, wanted, do

    def __str__(self) -> str:
        return f"{self.found}\n  wanted  {self.wanted}\n  do      {self.do}"

    def _render_traceback_(self) -> list[str]:
        """For notebooks, which show these lines instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(Refusal):
    """What was asked cannot be: change the request (exit code 2)."""


class DataError(Refusal):
    """The files are not what they should be: mend or replace them (exit code 4)."""


class LostError(Refusal):
    """What ran the work is gone; the same command goes on with what is left (exit code 130)."""


def __getattr__(name: str) -> Any:
    if name in ("Images", "Learner"):
        from arrowhead import learner

        return getattr(learner, name)
    raise AttributeError(f"module 'arrowhead' has no attribute '{name}'")
