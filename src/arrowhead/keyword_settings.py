"""Settings as keyword arguments: checked against dataclasses, and named so in refusals."""

from __future__ import annotations

import dataclasses
import difflib
import numbers
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from arrowhead.data import mirrors
from arrowhead.errors import ConfigError, Refusal


@contextmanager
def python_refusals() -> Iterator[None]:
    """Inside this block, refusals name keyword arguments instead of flags."""
    try:
        yield
    except Refusal as error:
        shown = map(mirrors.show, (error.found, error.wanted, error.do))
        parts = map(_flags_to_keywords, shown)
        raise type(error)(*parts) from None


# A flag, with its value if that is clearly not a word of the sentence.
_FLAG = re.compile(
    r"--([a-z][a-z\d-]*)(?: (\d[\d.e-]*\d|\d|[A-Z]{2,}[\w.]*|random|auto|linear|last))?"
)


def _flags_to_keywords(text: str) -> str:
    """The text with every flag replaced by the keyword argument, such as `size=128`."""

    def keyword(flag: re.Match[str]) -> str:
        value = flag[2] or ""
        quoted = value if not value or value[0].isdigit() else f'"{value}"'
        return f"{flag[1].replace('-', '_')}={quoted}"

    return _FLAG.sub(keyword, text)


def check_settings(
    given: dict[str, Any], *configs: Any, exclude: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Check keyword arguments against the fields of dataclasses.

    Args:
        given: Names and values.
        configs: The dataclasses.
        exclude: Fields that are not allowed.

    Returns:
        The settings, with paths as text and numbers of NumPy as Python's.

    Raises:
        ConfigError: A name or type does not match.
    """
    hints = {
        f.name: get_type_hints(config)[f.name]
        for config in configs
        for f in dataclasses.fields(config)
        if f.name not in exclude
    }
    settings = {}
    for name, value in given.items():
        if name not in hints:
            close = difflib.get_close_matches(name, hints, 1)
            raise ConfigError(
                f"{name}= is not a setting of this call.",
                f"one of {', '.join(sorted(hints))}.",
                f"did you mean {close[0]}=?" if close else "leave it out.",
            )
        types = _allowed_types(hints[name])
        settings[name] = _to_python(value)
        if not any(_matches(settings[name], one) for one in types):
            allowed = " or ".join(dict.fromkeys(map(_type_name, types)))
            raise ConfigError(f"{name}={value!r}.", f"{allowed}.", f"give another {name}=.")
    return settings


def _to_python(value: Any) -> Any:
    """The value, with paths as text and numbers of NumPy as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if isinstance(value, np.generic) else value


def _allowed_types(hint: Any) -> list[Any]:
    """The types of a type hint, and the single values of a Literal."""
    if get_origin(hint) in (Union, UnionType, Literal):
        return [one for part in get_args(hint) for one in _allowed_types(part)]
    return [get_origin(hint) or hint]


def _matches(value: Any, allowed: Any) -> bool:
    """Whether a value has the allowed type, or is the allowed value."""
    if allowed in (int, float):
        number = numbers.Integral if allowed is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, allowed) if isinstance(allowed, type) else value == allowed


def _type_name(allowed: Any) -> str:
    """A type or value as words for a refusal."""
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    names |= {NoneType: "None", tuple: "three numbers"}
    return names.get(allowed, repr(allowed))


def changed_fields(config: Any) -> set[str]:
    """Names of the fields that differ from their defaults."""
    return {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}


def replace_fields(config: Any, settings: dict[str, Any]) -> Any:
    """The dataclass with those of the settings that are its fields."""
    names = {f.name for f in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in settings.items() if k in names})
