"""The Python API for notebooks, in three lines.

    images = Images.from_folder("data/dogscats")
    learn = Learner("resnet34", images)        # decodes every image once
    learn.fit(0.01, 3)                         # epoch, train loss, valid loss, accuracy

After that `learn.predict()`, `learn.lr_find()` and `learn.save(folder)` take seconds, because they
use the stored features.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import numbers
import os
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from arrowhead.bundle import resolve
from arrowhead.commands import precompute, train
from arrowhead.data import path_text, sources
from arrowhead.data.catalog import Catalog
from arrowhead.data.source_config import SourceConfig
from arrowhead.decode.pixels import PixelConfig
from arrowhead.errors import ConfigError, Refusal
from arrowhead.examine import figures as examine_figures
from arrowhead.features import feature_config
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.extract import ExtractConfig
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.features.store import Store
from arrowhead.inference.predictor import Predictor
from arrowhead.output_paths import check_output_folder
from arrowhead.printable import encodable_text, escape_control_chars
from arrowhead.reporting import run_context
from arrowhead.reporting.run_context import RunContext, SilentScreen
from arrowhead.tracking.client import TrackingConfig
from arrowhead.training.config import TrainConfig
from arrowhead.training.lr_finder import Curve, FinderConfig
from arrowhead.training.study import Study
from arrowhead.training.trainer import TrainedHead

if TYPE_CHECKING:
    from torch import nn


class _PrintingScreen(SilentScreen):
    """A screen that prints lines with `print`."""

    def say(self, line: str) -> None:
        """Print a line."""
        print(encodable_text(escape_control_chars(line)))  # noqa: T201


class Images:
    """Labelled images. No file is opened before a Learner needs it."""

    def __init__(self, path: str, catalog: Catalog, source: SourceConfig = SourceConfig()) -> None:
        self.path, self.catalog, self.source = path, catalog, source
        self._store: Store | None = None

    @staticmethod
    def from_folder(path: str | Path, **source: Any) -> Images:
        """Images in PATH/train/<class> and PATH/valid/<class>, or in PATH/<class>.

        Args:
            path: A folder, an address such as s3://bucket/photos, or a table (see
                `sources.labelled_catalog`).
            source: Fields of `SourceConfig`, such as valid_share=0.3.

        Raises:
            ConfigError: The folder is missing or empty, or there are fewer than two classes.
        """
        with _python_refusals():
            config = SourceConfig(**_check_settings(source, SourceConfig))
            return Images(os.fspath(path), sources.labelled_catalog(path, config), config)

    @staticmethod
    def from_table(table: str | Path, **source: Any) -> Images:
        """Images listed in a CSV or TSV file with their labels.

        Args:
            table: The file.
            source: Fields of `SourceConfig`, such as images="photos" (the folder that paths are
                relative to) or suffix=".jpg".

        Raises:
            ConfigError: As in `from_folder`.
        """
        return Images.from_folder(table, **source)

    def __repr__(self) -> str:
        """The number of images by split and class."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for split, names in zip(self.catalog.splits, self.catalog.labels, strict=True):
            counts[split or "no split yet"].update(names)
        lines = [f"Images({self.path!r}): {len(self.catalog)} images, {len(self.classes)} classes"]
        for split, by_class in counts.items():
            shown = ", ".join(f"{name} {count}" for name, count in sorted(by_class.items())[:12])
            lines.append(f"  {split}: {shown}{', …' * (len(by_class) > 12)}")
        return "\n".join(map(escape_control_chars, lines))

    @property
    def classes(self) -> list[str]:
        """Names of the classes; a label is an index into this list."""
        return self.catalog.classes

    @property
    def valid_labels(self) -> NDArray[np.int64] | NDArray[np.uint8]:
        """Labels of the readable validation images, in path order.

        If PATH has no folder valid/, they are known once a Learner has read the images.

        Returns:
            int64 (n_valid,); for images with several labels uint8 (n_valid, C), 1 where an image
            has the label.
        """
        if self._store is not None:
            return self._store.features("valid").label
        rows = zip(self.catalog.splits, self.catalog.labels, strict=True)
        valid = [names for split, names in rows if split == "valid"]
        if self.catalog.multi:
            return np.array([[name in names for name in self.classes] for names in valid], np.uint8)
        number = {name: i for i, name in enumerate(self.classes)}
        return np.array([number[names[0]] for names in valid], np.int64)

    @property
    def valid_paths(self) -> list[Path] | list[str]:
        """Paths of the readable validation images, in the order of `valid_labels`.

        For images in an object store, their addresses.
        """
        if self._store is None:
            rows = [i for i, split in enumerate(self.catalog.splits) if split == "valid"]
        else:
            rows = self._store.features("valid").row.tolist()
        names = [
            path_text.unescape_path(f"{self.catalog.root}/{self.catalog.paths[row]}")
            for row in rows
        ]
        shown = [os.fsdecode(name) for name in names]
        return (
            shown if path_text.is_store_uri(self.catalog.root) else [Path(name) for name in shown]
        )


@dataclass(frozen=True, slots=True)
class Answer:
    """The prediction for one image file.

    Attributes:
        path: The file.
        label: The most probable label.
        probability: Its probability.
        labels: The predicted labels: one, or any number if images may have several.
        probabilities: The probability of every class.
        fault: Why the file could not be read. All other attributes but `path` are then None.
    """

    path: str
    label: str | None = None
    probability: float | None = None
    labels: list[str] | None = None
    probabilities: dict[str, float] | None = None
    fault: str | None = None


class DrawnCurve(Curve):
    """An LR finder curve with a plot."""

    def plot(self) -> Any:
        """Plot the curve and its suggestions; returns the matplotlib figure."""
        figure = examine_figures.lr_figure(self)
        examine_figures.display(figure)
        return figure


class Learner:
    """A head that is trained on the features of a frozen body.

    Creating a Learner decodes all images that are not in the store yet. If the store exists,
    settings that you leave out are taken from it.

    Args:
        body: The name of a torchvision network, or a BodyConfig.
        images: The labelled images.
        store: Folder for the features. Default: a folder in .arrowhead/ of the current directory.
        head: "linear" or "lesson".
        pixels: How images are resized and augmented.
        track: Record every `fit` and `lr_find` in MLflow.
        tracking_uri: The MLflow store; implies `track`.
        settings: Fields of `BodyConfig`, `PixelConfig` and `ExtractConfig`, such as
            weights="weights.safetensors", size=128 or batch_size=256.
    """

    def __init__(
        self,
        body: str | BodyConfig,
        images: Images,
        *,
        store: str | Path | None = None,
        head: str = "lesson",
        pixels: PixelConfig | None = None,
        track: bool = False,
        tracking_uri: str | None = None,
        **settings: Any,
    ) -> None:
        with _python_refusals():
            options = _check_settings(
                settings, BodyConfig, PixelConfig, ExtractConfig, exclude=("body",)
            )
            if not isinstance(images, Images):
                raise ConfigError(
                    f"images is {images!r}.", "Images.", "give Images.from_folder(PATH)."
                )
            body = BodyConfig(body=body) if isinstance(body, str) else body
            config = FeatureConfig(
                source=images.source,
                body=_replace_fields(body, options),
                pixels=_replace_fields(pixels or PixelConfig(), options),
                extract=_replace_fields(ExtractConfig(), options),
            )
            given = {"body", *options, *_changed_fields(body)}
            given |= {field.name for field in dataclasses.fields(pixels)} if pixels else set()
            self._config = TrainConfig(**_check_settings({"head": head}, TrainConfig))
        self.images = images
        source = path_text.resolve(images.path)
        digest = hashlib.blake2b(path_text.unescape_path(source), digest_size=4).hexdigest()
        name = f"{source.rpartition('/')[2]}-{digest}-{config.body.body}"
        folder = Path(store) if store else Path(".arrowhead") / name
        self._tracking = (
            TrackingConfig(tracking_uri=tracking_uri) if track or tracking_uri else None
        )
        self._context = RunContext(screen=_PrintingScreen())
        self._trained: TrainedHead | None = None
        self._cached_predictor: Predictor | None = None
        with _python_refusals():
            config = feature_config.complete_from_store(folder, config, given)
            sources.check_can_validate(images.path, images.catalog)
            precompute.precompute(images.path, folder, config, self._context)
        self.store = images._store = Store(folder)

    @staticmethod
    def load(path: str | Path) -> Classifier:
        """Load the bundle at `path` for `predict`.

        Raises:
            ConfigError: There is no bundle.
            DataError: It is damaged, or this machine computes other results for its golden images.
        """
        with _python_refusals():
            return Classifier(Path(path))

    def __repr__(self) -> str:
        """Body, head, and the metrics of the kept epoch."""
        recipe = self.store.recipe
        status = "not fitted yet"
        if self._trained:
            last = self._trained.epochs[self._trained.epoch]
            status = ", ".join(f"{k} {v:.4f}" for k, v in last.items() if k != "epoch")
        return (
            f"Learner({recipe.body}, {self._config.head} head, {recipe.size} pixels,"
            f" {len(self.images.classes)} classes): {status}"
        )

    def fit(
        self, rate: float, epochs: int, *, fresh: bool = False, **overrides: Any
    ) -> list[dict[str, float]]:
        """Train the head, by default at a constant learning rate.

        Args:
            rate: The learning rate.
            epochs: Passes over the training images.
            fresh: Start with new weights; otherwise a second call continues from the first.
            overrides: Other fields of `TrainConfig`, such as schedule="one-cycle" or dropout=0.5.

        Returns:
            One dict of metrics per epoch.
        """
        overrides.setdefault("schedule", "constant")
        with _python_refusals(), self._run("fit") as context:
            before = self._config
            settings = _check_settings({"rate": rate, "epochs": epochs} | overrides, TrainConfig)
            self._config = dataclasses.replace(before, **settings)
            resume = self._trained and not fresh and before.head == self._config.head
            start = self._trained.state if resume and self._trained else None
            study = Study(head=self._config, initial_state=start)
            run_context.log_params(context, {f"train.{k}": v for k, v in settings.items()})
            result = train.run_study(self.store.path, study, context)
        self._trained = result.heads[0]
        self._close_predictor()
        return self._trained.epochs

    def predict(
        self, paths: Sequence[str | Path] | None = None
    ) -> NDArray[np.float32] | list[Answer]:
        """Predict the validation images, or the given files.

        Args:
            paths: Image files. A file that cannot be read gets a fault; the others are not
                affected.

        Returns:
            Without paths, float32 (n_valid, C): log-probabilities of the validation images, in path
            order. With paths, one `Answer` per file, with calibrated probabilities.
        """
        import torch

        if paths is not None:
            return predict_files(self._predictor(), paths)
        valid = self.store.features("valid")
        feature_ND = torch.from_numpy(valid.feature[:, 0].astype(np.float32))
        with torch.inference_mode():
            logit_NC = self._head()(feature_ND)
            log_NC = logit_NC.sigmoid().log() if valid.multi else logit_NC.log_softmax(1)
        return log_NC.numpy()  # type: ignore[no-any-return]

    def lr_find(self, **overrides: Any) -> DrawnCurve:
        """Measure the loss under a rising learning rate; suggest rates; plot in a notebook.

        Args:
            overrides: Fields of `FinderConfig`, such as low, high, steps, seeds.
        """
        with _python_refusals(), self._run("lr-find") as context:
            finder = FinderConfig(**_check_settings(overrides, FinderConfig))
            curve = train.find_learning_rate(self.store.path, self._config, finder, context)
        fields = {f.name: getattr(curve, f.name) for f in dataclasses.fields(curve)}
        drawn_curve = DrawnCurve(**fields)
        examine_figures.display(examine_figures.lr_figure(drawn_curve))
        return drawn_curve

    def save(self, path: str | Path) -> dict[str, Any]:
        """Save the trained head and its body as a bundle for `arrowhead score`.

        An existing bundle is kept as PATH.previous.

        Returns:
            The bundle's metrics.
        """
        with _python_refusals():
            out = check_output_folder(Path(path), "bundle")
            return train.save_bundle(self.store, self._config, self._fitted(), out, self._context)

    @contextmanager
    def _run(self, name: str) -> Iterator[RunContext]:
        """The RunContext of a stage, with an MLflow run if tracking is on."""
        if self._tracking is None:
            yield self._context
            return
        from arrowhead.tracking import run as tracking_run

        with tracking_run.start(self._tracking, name, say=self._context.screen.say) as run:
            yield dataclasses.replace(self._context, run=run)

    def _predictor(self) -> Predictor:
        """A predictor with the trained head, kept until the next `fit`."""
        if self._cached_predictor is None:
            self._fitted()
            with tempfile.TemporaryDirectory(prefix="arrowhead-learner-") as scratch:
                bundle = Path(scratch) / "bundle"
                quiet = RunContext()
                train.save_bundle(self.store, self._config, self._fitted(), bundle, quiet)
                self._cached_predictor = Predictor(bundle)
        return self._cached_predictor

    def _close_predictor(self) -> None:
        if self._cached_predictor:
            self._cached_predictor.close()
            self._cached_predictor = None

    def _fitted(self) -> TrainedHead:
        if self._trained is None:
            raise RuntimeError("call learn.fit(rate, epochs) first")
        return self._trained

    def _head(self) -> nn.Module:
        import torch

        from arrowhead.training import heads

        trained = {name: torch.tensor(value) for name, value in self._fitted().state.items()}
        width, classes = self.store.recipe.width, len(self.images.classes)
        return heads.restore_head(self._config.architecture, width, classes, trained)


class Classifier:
    """A loaded bundle: predicts labels and probabilities of image files."""

    def __init__(self, path: Path) -> None:
        resolve.check_exists(str(path))
        self.path, self._predictor = path, Predictor(path)

    def __repr__(self) -> str:
        """Body, head, classes and the saved metrics."""
        bundle = self._predictor.bundle
        metrics = {k: v for k, v in bundle.metrics.items() if k in ("accuracy", "f2_samples")}
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        described = f"{bundle.recipe.body}, {bundle.head} head, {len(self.classes)} classes"
        return f"Classifier({described}): {shown}"

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return self._predictor.bundle.classes

    def predict(self, paths: Sequence[str | Path]) -> list[Answer]:
        """Predict image files; a file that cannot be read gets a fault and affects no other."""
        return predict_files(self._predictor, paths)

    def close(self) -> None:
        """Stop the decoder process."""
        self._predictor.close()


def predict_files(predictor: Predictor, paths: Sequence[str | Path]) -> list[Answer]:
    """One answer per file, in order."""
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    contents, answers = [], {}
    for i, path in enumerate(files):
        try:
            contents.append((i, Path(path).read_bytes()))
        except OSError as error:
            answers[i] = Answer(str(path), fault=f"unreadable: {error.strerror}")
    predictions = predictor([content for _, content in contents])
    classes = np.array(predictor.bundle.classes, object)
    for row, (i, _) in enumerate(contents):
        path, fault = str(files[i]), predictions.faults[row]
        if fault:
            answers[i] = Answer(path, fault=fault)
            continue
        probability_C = predictions.probabilities[row]
        answers[i] = Answer(
            path,
            label=classes[probability_C.argmax()],
            probability=float(probability_C.max()),
            labels=list(classes[predictions.labels[row]]),
            probabilities=dict(zip(classes, probability_C.tolist(), strict=True)),
        )
    return [answers[i] for i in range(len(files))]


@contextmanager
def _python_refusals() -> Iterator[None]:
    """Inside this block, refusals name keyword arguments instead of flags."""
    try:
        yield
    except Refusal as error:
        parts = map(_flags_to_keywords, (error.found, error.wanted, error.do))
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


def _check_settings(
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


def _changed_fields(config: Any) -> set[str]:
    """Names of the fields that differ from their defaults."""
    return {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != f.default}


def _replace_fields(config: Any, settings: dict[str, Any]) -> Any:
    """The dataclass with those of the settings that are its fields."""
    names = {f.name for f in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in settings.items() if k in names})


__all__ = ["Answer", "Classifier", "Images", "Learner"]
