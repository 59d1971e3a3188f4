"""Exceptions for requests that cannot be carried out; their message has three parts."""

from __future__ import annotations


class Refusal(Exception):
    """A request that cannot be carried out.

    Args:
        found: What Arrowhead found.
        wanted: What it expected instead.
        do: What you can do about it.
    """

    def __init__(self, found: str, wanted: str, do: str) -> None:
        super().__init__(found, wanted, do)  # pickling rebuilds the exception from its args
        self.found, self.wanted, self.do = found, wanted, do

    def __str__(self) -> str:
        return f"{self.found}\n  wanted  {self.wanted}\n  do      {self.do}"

    def _render_traceback_(self) -> list[str]:
        """Lines that IPython shows instead of a traceback."""
        return [f"{type(self).__name__}: {self}"]


class ConfigError(Refusal):
    """The request is invalid: change it (exit code 2)."""


class DataError(Refusal):
    """Input files are missing, corrupt or changed: repair or replace them (exit code 4)."""


class LostError(Refusal):
    """A process or machine that did the work was lost; the same command resumes (exit code 130)."""
