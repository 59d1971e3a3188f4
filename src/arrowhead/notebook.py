"""The Python API for notebooks, in three lines.

    images = Images.from_folder("data/dogscats")
    learn = Learner("resnet34", images)        # decodes every image once
    learn.fit(0.01, 3)                         # epoch, train loss, valid loss, accuracy

After that `learn.predict()`, `learn.lr_find()` and `learn.save(folder)` take seconds, because they
use the stored features.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import unfrozen
from arrowhead.bundle import format as bundle_format
from arrowhead.bundle import resolve
from arrowhead.commands import examine as commands_examine
from arrowhead.commands import precompute, train
from arrowhead.data import path_text, remote_folder, sources
from arrowhead.data.catalog import Catalog
from arrowhead.data.source_config import SourceConfig
from arrowhead.decode.pixels import PixelConfig
from arrowhead.errors import ConfigError
from arrowhead.examine import figures as examine_figures
from arrowhead.examine import mistakes, pictures, predictions
from arrowhead.examine.config import ExamineConfig
from arrowhead.examine.galleries import ImageRanking
from arrowhead.features import feature_config
from arrowhead.features.backbone import BodyConfig
from arrowhead.features.extract import ExtractConfig
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.features.store import Store
from arrowhead.inference.predictor import Predictor
from arrowhead.keyword_settings import (
    changed_fields,
    check_settings,
    python_refusals,
    replace_fields,
)
from arrowhead.printable import escape_control_chars
from arrowhead.reporting import run_context
from arrowhead.reporting.run_context import PrintingScreen, RunContext
from arrowhead.tracking.client import TrackingConfig
from arrowhead.training.config import TrainConfig
from arrowhead.training.lr_finder import Curve, FinderConfig
from arrowhead.training.study import Study
from arrowhead.training.trainer import TrainedHead

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn


class Images:
    """Labelled images. No file is opened before a Learner needs it."""

    def __init__(self, path: str, catalog: Catalog, source: SourceConfig = SourceConfig()) -> None:
        self.path, self.catalog, self.source = path, catalog, source
        self._store: Store | None = None

    @staticmethod
    def from_folder(path: str | Path, **source: Any) -> Images:
        """Images in PATH/train/<class> and PATH/valid/<class>, or in PATH/<class>.

        Args:
            path: A folder, an address such as s3://bucket/photos, a table, or tar, Parquet or Arrow
                files (see `sources.labelled_catalog`).
            source: Fields of `SourceConfig`, such as valid_share=0.3.

        Raises:
            ConfigError: The folder is missing or empty, or there are fewer than two classes.
        """
        with python_refusals():
            config = SourceConfig(**check_settings(source, SourceConfig))
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
        if self._store is not None:  # its labels may be corrected (`arrowhead relabel`)
            return list(self._store.manifest()["classes"])
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

        For images in an object store, their addresses; for images in a tar or Parquet file, the
        path of that file followed by the name of the image in it.
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
        are_files = not (self.catalog.containers or path_text.is_store_uri(self.catalog.root))
        return [Path(name) for name in shown] if are_files else shown


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
        body: The name of a network of torchvision, or of timm after timm/; or a BodyConfig.
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
        with python_refusals():
            options = check_settings(
                settings, BodyConfig, PixelConfig, ExtractConfig, exclude=("body",)
            )
            if not isinstance(images, Images):
                raise ConfigError(
                    f"images is {images!r}.", "Images.", "give Images.from_folder(PATH)."
                )
            body = BodyConfig(body=body) if isinstance(body, str) else body
            config = FeatureConfig(
                source=images.source,
                body=replace_fields(body, options),
                pixels=replace_fields(pixels or PixelConfig(), options),
                extract=replace_fields(ExtractConfig(), options),
            )
            given = {"body", *options, *changed_fields(body)}
            given |= {field.name for field in dataclasses.fields(pixels)} if pixels else set()
            self._config = TrainConfig(**check_settings({"head": head}, TrainConfig))
        self.images = images
        source = path_text.resolve(images.path)
        digest = hashlib.blake2b(path_text.unescape_path(source), digest_size=4).hexdigest()
        body_name = config.body.body.replace("/", "-")
        name = f"{source.rpartition('/')[2]}-{digest}-{body_name}"
        folder = Path(store or Path(".arrowhead", name))
        self._tracking = (
            TrackingConfig(tracking_uri=tracking_uri) if track or tracking_uri else None
        )
        self._context = RunContext(screen=PrintingScreen())
        self._trained: TrainedHead | None = None
        self._cached_predictor: Predictor | None = None
        self._cached_ranking: ImageRanking | None = None
        self._trained_from: int | None = None  # layer group; None: the body is frozen
        with python_refusals():
            folder = remote_folder.check_output(folder, "store")
            config = feature_config.complete_from_store(folder, config, given)
            sources.check_can_validate(images.path, images.catalog)
            precompute.precompute(images.path, folder, config, self._context)
        self._folder, self.store = folder, Store(folder)
        images._store = self.store

    @staticmethod
    def load(path: str | Path) -> Classifier:
        """Load the bundle at `path` for `predict`.

        Raises:
            ConfigError: There is no bundle.
            DataError: It is damaged, or this machine computes other results for its golden images.
        """
        with python_refusals():
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

    def unfreeze(self) -> None:
        """Let `fit` and `lr_find` train all layers from now on, on augmented images."""
        self.freeze_to(0)

    def freeze_to(self, group: int) -> None:
        """Let `fit` and `lr_find` train the layer groups from this number on; -1: only the head."""
        self._fitted()
        self._trained_from = group

    def freeze(self) -> None:
        """Let `fit` and `lr_find` train the head alone again, on stored features."""
        self._trained_from = None

    def fit(
        self, rate: float | Sequence[float], epochs: int, *, fresh: bool = False, **overrides: Any
    ) -> list[dict[str, float]]:
        """Train the head, by default at a constant learning rate; after `unfreeze` the body, too.

        Args:
            rate: The learning rate; after `unfreeze` also one for each layer group, from the first
                layers to the head: [1e-4, 1e-3, 1e-2].
            epochs: Passes over the training images; after `unfreeze`, with cycle_len, the number of
                cycles, as in fast.ai.
            fresh: Start with new weights; otherwise a second call continues from the first.
            overrides: Other fields of `TrainConfig`, such as schedule="one-cycle" or dropout=0.5;
                after `unfreeze` those of `FinetuneConfig` and `AugmentConfig`.

        Returns:
            One dict of metrics per epoch.
        """
        if self._trained_from is not None:
            return self._fit_unfrozen(rate, epochs, overrides)
        overrides.setdefault("schedule", "constant")
        with python_refusals(), self._run("fit") as context:
            before = self._config
            settings = check_settings({"rate": rate, "epochs": epochs} | overrides, TrainConfig)
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
        with python_refusals(), self._run("lr-find") as context:
            finder = FinderConfig(**check_settings(overrides, FinderConfig))
            if self._trained_from is None:
                curve = train.find_learning_rate(self.store.path, self._config, finder, context)
            else:
                settings = unfrozen.settings({"freeze_to": self._trained_from})
                curve = self._unfrozen().find_learning_rate(settings, finder, context)
        fields = {f.name: getattr(curve, f.name) for f in dataclasses.fields(curve)}
        drawn_curve = DrawnCurve(**fields)
        examine_figures.display(examine_figures.lr_figure(drawn_curve))
        return drawn_curve

    def _fit_unfrozen(
        self, rate: float | Sequence[float], epochs: int, overrides: dict[str, Any]
    ) -> list[dict[str, float]]:
        """Train the layer groups that are not frozen; the store is then that of the tuned body."""
        with python_refusals(), self._run("finetune") as context:
            given = overrides | {"freeze_to": self._trained_from}
            settings = unfrozen.settings(given, rate, epochs)
            store, self._trained, history = self._unfrozen().fit(settings, context)
        self.store = self.images._store = store
        self._close_predictor()
        return history

    def _unfrozen(self) -> unfrozen.Unfrozen:
        folder = self._folder.with_name(f"{self._folder.name}.unfrozen")
        return unfrozen.Unfrozen(self.store, self._fitted(), self._config, folder)

    def save(self, path: str | Path) -> dict[str, Any]:
        """Save the trained head and its body as a bundle for `arrowhead score`.

        An existing bundle is kept as PATH.previous.

        Returns:
            The bundle's metrics.
        """
        with python_refusals():
            out = resolve.check_output(Path(path))
            return train.save_bundle(self.store, self._config, self._fitted(), out, self._context)

    # ------------------------------------------------------------------------- looking

    def show_correct(self, count: int = 9) -> Figure:
        """Show validation images that are predicted right, drawn at random."""
        return self._show(self._ranking().at_random(correct=True)[:count], "Right, at random")

    def show_incorrect(self, count: int = 9) -> Figure:
        """Show validation images that are predicted wrong, drawn at random."""
        return self._show(self._ranking().at_random(correct=False)[:count], "Wrong, at random")

    def show_most_correct(self, class_name: str | None = None, count: int = 9) -> Figure:
        """Show the images of a class that are right with the highest probability.

        Without a class name, the most correct images of all classes, as many of each.
        """
        if class_name is None:
            index = self._ranking().of_all_classes(count, correct=True)
            return self._show(index, "Most correct")
        index = self._ranking().most_correct(self._class_index(class_name))
        return self._show(index[:count], f"Most correct {class_name}")

    def show_most_incorrect(self, class_name: str | None = None, count: int = 9) -> Figure:
        """Show the wrong images of a class whose label has the lowest probability.

        Without a class name, the most incorrect images of all classes, as many of each.
        """
        if class_name is None:
            index = self._ranking().of_all_classes(count, correct=False)
            return self._show(index, "Most incorrect")
        index = self._ranking().most_incorrect(self._class_index(class_name))
        return self._show(index[:count], f"Most incorrect {class_name}")

    def show_most_uncertain(self, count: int = 9) -> Figure:
        """Show the images nearest to another prediction."""
        return self._show(self._ranking().most_uncertain()[:count], "Most uncertain")

    def show_top_losses(self, count: int = 9) -> Figure:
        """Show the images with the highest loss."""
        return self._show(self._ranking().top_losses()[:count], "Highest loss")

    def plot_confusion(self) -> Figure:
        """Plot the confusion matrix of the validation images; returns the matplotlib figure."""
        counts_CC = self._confusion()
        figure = examine_figures.confusion_figure(counts_CC, self.images.classes)
        examine_figures.display(figure)
        return figure

    def most_confused(self, count: int = 10) -> list[tuple[str, str, int]]:
        """The most frequent mistakes: label, prediction, number of validation images."""
        pairs = mistakes.most_confused(self._confusion(), self.images.classes, count)
        return [(pair.label, pair.predicted, pair.images) for pair in pairs]

    def report(self, path: str | Path = "report") -> Path:
        """Write the report as `arrowhead examine` does, into the folder PATH; returns the page."""
        with python_refusals(), self._saved_bundle() as bundle:
            out = remote_folder.check_output(Path(path), "report")
            config = ExamineConfig()
            result = commands_examine.examine(self.store.path, bundle, out, config, self._context)
        return Path(result["report"])

    def _confusion(self) -> NDArray[np.int64]:
        with python_refusals():
            if self.images.catalog.multi:
                raise ConfigError(
                    "Images with several labels have no confusion matrix.",
                    "one label for each image.",
                    "call learn.report(), which counts missing and surplus labels.",
                )
            found = mistakes.evaluate(self._ranking().predictions)
        return np.array(found["confusion"], np.int64)

    def _class_index(self, name: str) -> int:
        with python_refusals():
            if name not in self.images.classes:
                raise ConfigError(
                    f"{name!r} is not a class.",
                    f"one of {', '.join(self.images.classes[:20])}.",
                    "check the name.",
                )
        return self.images.classes.index(name)

    def _show(self, index: NDArray[np.int64], title: str) -> Figure:
        """Show some images of the predictions; returns the matplotlib figure."""
        catalog = Catalog(**self.store.read_catalog())
        figure = pictures.gallery_figure(catalog, self._ranking().predictions, index, title)
        examine_figures.display(figure)
        return figure

    def _ranking(self) -> ImageRanking:
        """The validation images with the trained head's predictions, kept until the next `fit`."""
        if self._cached_ranking is None:
            with python_refusals(), self._saved_bundle() as bundle:
                loaded = bundle_format.load(bundle)
            self._cached_ranking = ImageRanking(predictions.predict(self.store, loaded))
        return self._cached_ranking

    @contextmanager
    def _saved_bundle(self) -> Iterator[Path]:
        """The trained head as a bundle in a temporary folder."""
        with tempfile.TemporaryDirectory(prefix="arrowhead-learner-") as scratch:
            bundle = Path(scratch) / "bundle"
            train.save_bundle(self.store, self._config, self._fitted(), bundle, RunContext())
            yield bundle

    @contextmanager
    def _run(self, name: str) -> Iterator[RunContext]:
        """The RunContext of a stage, with an MLflow run if tracking is on."""
        if self._tracking is None:
            yield self._context
            return
        from arrowhead.tracking import run as tracking_run

        with tracking_run.start(self._tracking, name, print_line=self._context.screen.print) as run:
            yield dataclasses.replace(self._context, run=run)

    def _predictor(self) -> Predictor:
        """A predictor with the trained head, kept until the next `fit`."""
        if self._cached_predictor is None:
            with self._saved_bundle() as bundle:
                self._cached_predictor = Predictor(bundle)
        return self._cached_predictor

    def _close_predictor(self) -> None:
        self._cached_ranking = None
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
        self.path = resolve.local_copy(path)
        self._predictor = Predictor(self.path)

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


__all__ = ["Answer", "Classifier", "Images", "Learner"]
