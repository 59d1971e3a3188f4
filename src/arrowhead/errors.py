"""Refusals: requests that cannot be carried out, said in three parts."""

from __future__ import annotations


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
