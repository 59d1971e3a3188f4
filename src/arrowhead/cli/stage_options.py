"""The flags of the commands that compute: each is a field of the dataclass that uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Group, Parameter

from arrowhead.bundle.export import ExportConfig
from arrowhead.bundle.publish import PublishConfig
from arrowhead.cli.options import Launch, Registry, Tracking, flags
from arrowhead.commands.advise_config import AdviseConfig
from arrowhead.commands.fetch import FetchConfig
from arrowhead.commands.label_changes import TableConfig
from arrowhead.commands.race_config import RaceConfig
from arrowhead.commands.relabel import ChangeConfig
from arrowhead.data.source_config import SourceConfig
from arrowhead.decode.pixels import (  # cyclopts looks the two up here
    Interpolation,  # noqa: F401
    PixelConfig,
    Resize,  # noqa: F401
)
from arrowhead.examine.config import ExamineConfig, ReportConfig
from arrowhead.examine.search import SearchConfig
from arrowhead.examine.suggest import SuggestConfig
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.extract import ExtractConfig
from arrowhead.features.golden_images import GoldenConfig
from arrowhead.features.networks import Pool, Triple  # noqa: F401  cyclopts looks them up here
from arrowhead.features.precision import Precision  # noqa: F401  likewise
from arrowhead.finetuning.augmentation import AugmentConfig
from arrowhead.finetuning.config import FinetuneConfig
from arrowhead.finetuning.pixel_cache import PixelCacheConfig
from arrowhead.inference.evaluate import EvaluateConfig
from arrowhead.inference.score_request import ScoreConfig
from arrowhead.runtime.jobs import ClusterConfig
from arrowhead.runtime.ray_cluster import LaunchConfig
from arrowhead.tracking.client import TrackingConfig
from arrowhead.tracking.registry import RegistryConfig
from arrowhead.training.config import TrainConfig
from arrowhead.training.grid import SweepConfig
from arrowhead.training.lr_finder import FinderConfig

# Commands that use only some fields of a dataclass hide the other flags, and refuse them like any
# flag that does not exist.


@dataclass(frozen=True, kw_only=True, slots=True)
class FinderHead(TrainConfig):
    """The training settings on which the learning rate depends."""

    l2: Annotated[float | Literal["auto"], Parameter(parse=False)] = "auto"
    rate: Annotated[float | Literal["auto"], Parameter(parse=False)] = "auto"
    best: Annotated[
        Literal["last", "valid_loss", "accuracy", "balanced_accuracy", "f1", "f2"],
        Parameter(parse=False),
    ] = "last"
    patience: Annotated[int, Parameter(parse=False)] = 0
    checkpoint_seconds: Annotated[float, Parameter(parse=False)] = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RaceFlags(RaceConfig):
    """The settings of a race: --bodies instead of --body."""

    body: Annotated[str, Parameter(parse=False)] = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadSource(SourceConfig):
    """How labels are read if no images are held out or left out."""

    valid_share: Annotated[float, Parameter(parse=False)] = 0.2
    drop: Annotated[str | None, Parameter(parse=False)] = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PlainPixels(PixelConfig):
    """How a file becomes the body's input, where a network is trained on augmented pixels."""

    views: int = 1
    """Views of each image in the store of the tuned body, the first one not augmented: the bundle
    is then calibrated for `--tta` with up to all others. Each costs a pass of the body."""
    augment: Annotated[Literal["side-on", "top-down", "none"], Parameter(parse=False)] = "side-on"
    augment_seed: Annotated[int, Parameter(parse=False)] = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentFlags(AugmentConfig):
    """How training images are augmented; --seed is that of the training."""

    seed: Annotated[int, Parameter(parse=False)] = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class FixesTable(TableConfig):
    """How a table of new labels is read; only the flag that is true by default has a --no- flag."""

    copies: Annotated[bool, Parameter(negative="--no-copies")] = True
    """Also relabel exact copies of an image (files with the same bytes)."""


Source = Annotated[SourceConfig, flags("Labels", 2)]
LabelSource = Annotated[ReadSource, flags("Labels", 2)]
Body = Annotated[BodyConfig, flags("Body", 3)]
Advise = Annotated[AdviseConfig, flags("Advice", 3)]
Race = Annotated[RaceFlags, flags("Race", 3)]
Pixels = Annotated[PixelConfig, flags("Pixels", 4)]
Extract = Annotated[ExtractConfig, flags("Extraction", 5)]
NamedExtract = Annotated[
    ExtractConfig, Parameter(name="extract", group=Group("Extraction", sort_key=5))
]
Golden = Annotated[
    GoldenConfig,
    Parameter(
        name="*", group=Group("Golden images", sort_key=6), negative_bool="no-", negative=None
    ),
]
Head = Annotated[TrainConfig, flags("Training", 6)]
HeadOfFinder = Annotated[FinderHead, flags("Training", 6)]
Finder = Annotated[FinderConfig, flags("LR finder", 7)]
NamedFinder = Annotated[
    FinderConfig, Parameter(name="lr-find", group=Group("LR finder", sort_key=7))
]
Sweep = Annotated[SweepConfig, flags("Many heads in one pass", 7)]
Finetune = Annotated[FinetuneConfig, flags("Fine-tuning", 6)]
Augment = Annotated[AugmentFlags, flags("Augmentation", 6)]
PixelCacheFlags = Annotated[PixelCacheConfig, flags("Pixel cache", 7)]
Squares = Annotated[PlainPixels, flags("Pixels", 4)]
Scores = Annotated[ScoreConfig, flags("Scores", 6)]
Evaluate = Annotated[EvaluateConfig, flags("Evaluation", 6)]
_REPORT = Parameter(name="*", group=Group("Report", sort_key=8), negative_bool="no-", negative=None)
Examine = Annotated[ExamineConfig, _REPORT]
Report = Annotated[ReportConfig, _REPORT]
Export = Annotated[ExportConfig, flags("Export", 6)]
Publish = Annotated[PublishConfig, flags("Publication", 6)]
Search = Annotated[SearchConfig, flags("Search", 6)]
Suggest = Annotated[SuggestConfig, flags("Suggestions", 6)]
Fetch = Annotated[FetchConfig, flags("Download", 6)]
Fixes = Annotated[FixesTable, flags("Table", 2)]
Change = Annotated[ChangeConfig, flags("Change", 3)]
ToCluster = Annotated[ClusterConfig, flags("Cluster", 8)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TunedImages:
    """The flags of a fine-tuning that say which images and which body."""

    source: Source = SourceConfig()
    body: Body = BodyConfig()
    pixels: Squares = PlainPixels()
    extract: NamedExtract = ExtractConfig()
    golden: Golden = GoldenConfig()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFlags:
    """The flags that say where a command runs, and where its run and model are recorded."""

    launch: Launch = LaunchConfig()
    tracking: Tracking = TrackingConfig()
    registry: Registry = RegistryConfig()
    again: bool = False
    """Train again although the same command has finished."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuning:
    """The flags of a fine-tuning that say how it trains."""

    config: Finetune = FinetuneConfig()
    augment: Augment = AugmentFlags()
    cache: PixelCacheFlags = PixelCacheConfig()
