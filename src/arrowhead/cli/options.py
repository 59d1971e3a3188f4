"""The flags that commands share, and how flags are made of dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.tracking.client import TrackingConfig
from arrowhead.tracking.registry import RegistryConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """How the result is printed."""

    json: Annotated[bool, Parameter(negative="")] = False
    """Print the result as one JSON object on standard output; all other output goes to stderr."""


# Commands that use only some fields of a dataclass hide the other flags, and refuse them like any
# flag that does not exist.


@dataclass(frozen=True, kw_only=True, slots=True)
class WatchedTracking(TrackingConfig):
    """Where to find runs."""

    run_name: Annotated[str | None, Parameter(parse=False)] = None
    system_metrics: Annotated[bool, Parameter(parse=False)] = True


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingStore(WatchedTracking):
    """The tracking store from which models are read."""

    experiment: Annotated[str, Parameter(parse=False)] = "arrowhead"


Data = Annotated[
    str,
    Parameter(
        help="Images: a folder or URI (s3://…, gs://…) with train/CLASS/… and val/CLASS/…, or with"
        " CLASS/…; a table (.csv, .tsv) with columns such as path, label and, optionally, split; or"
        " tar, Parquet or Arrow files with images, or a folder of them."
    ),
]
StorePath = Annotated[
    Path,
    Parameter(
        help="Feature store: a folder (or its URI) written by `precompute`, or OUT/store of `fit`."
    ),
]
BundlePath = Annotated[
    Path,
    Parameter(help="Folder or URI for the bundle; an existing one is kept as BUNDLE.previous."),
]
BundleAddress = Annotated[
    str,
    Parameter(
        help="Bundle: a folder written by `fit` or `train`; the URI of one (s3://…, gs://…); or a"
        " model in MLflow (models:/NAME@ALIAS, models:/NAME/3, runs:/RUN/model)."
    ),
]


def flags(group: str, key: int) -> Any:
    """The fields of a dataclass as flags, under this heading of the help."""
    return Parameter(name="*", group=Group(group, sort_key=key))


Launch = Annotated[LaunchConfig, flags("Workers", 8)]
# negative: booleans that are true by default get a --no- flag.
_TRACKING = Parameter(name="*", negative=None, group=Group("Tracking", sort_key=9))
Tracking = Annotated[TrackingConfig, _TRACKING]
Watched = Annotated[WatchedTracking, _TRACKING]
Models = Annotated[TrackingStore, _TRACKING]
Registry = Annotated[RegistryConfig, _TRACKING]
Out = Annotated[Output, flags("Output", 10)]
