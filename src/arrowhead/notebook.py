"""The lesson's three lines.

    images = Images.from_folder("data/dogscats")
    learn = Learner("resnet34", images)        # decodes every image once
    learn.fit(0.01, 3)                         # epoch, train loss, valid loss, accuracy

After that `learn.predict()`, `learn.lr_find()` and `learn.save(folder)` take seconds: they work
on the stored features.
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
from arrowhead.output_paths import check_folder
from arrowhead.printable import encodable, visible
from arrowhead.reporting import run_context
from arrowhead.reporting.run_context import RunContext, Silence
from arrowhead.tracking.client import TrackingConfig
from arrowhead.training.config import TrainConfig
from arrowhead.training.lr_finder import Curve, FinderConfig
from arrowhead.training.study import Study
from arrowhead.training.trainer import Trained

if TYPE_CHECKING:
    from torch import nn


class _Notebook(Silence):
    """A screen that prints."""

    def say(self, line: str) -> None:
        """Print it."""
        print(encodable(visible(line)))  # noqa: T201


class Images:
    """Labelled images; nothing is opened before a Learner needs it."""

    def __init__(self, path: str, catalog: Catalog, source: SourceConfig = SourceConfig()) -> None:
        self.path, self.catalog, self.source = path, catalog, source
        self._store: Store | None = None

    @staticmethod
    def from_folder(path: str | Path, **source: Any) -> Images:
        """Images below PATH/train/<class> and PATH/valid/<class>, or PATH/<class>.

        PATH may be an address such as s3://bucket/photos, or a table (see `sources.labelled`).
        source: fields of `SourceConfig`, such as valid_share=0.3. Raises ConfigError for a missing
        or empty folder, or fewer than two classes.
        """
        with _python_words():
            config = SourceConfig(**_settings(source, SourceConfig))
            return Images(os.fspath(path), sources.labelled(path, config), config)

    @staticmethod
    def from_table(table: str | Path, **source: Any) -> Images:
        """Images that a CSV or TSV file names, with their labels.

        source: fields of `SourceConfig`, such as images="photos" (where the paths begin) or
        suffix=".jpg". Raises ConfigError as `from_folder` does.
        """
        return Images.from_folder(table, **source)

    def __repr__(self) -> str:
        """How many images there are, by split and class."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for split, names in zip(self.catalog.splits, self.catalog.labels, strict=True):
            counts[split or "no split yet"].update(names)
        lines = [f"Images({self.path!r}): {len(self.catalog)} images, {len(self.classes)} classes"]
        for split, held in counts.items():
            shown = ", ".join(f"{name} {count}" for name, count in sorted(held.items())[:12])
            lines.append(f"  {split}: {shown}{', …' * (len(held) > 12)}")
        return "\n".join(map(visible, lines))

    @property
    def classes(self) -> list[str]:
        """Names of the classes; their positions are the labels."""
        return self.catalog.classes

    @property
    def valid_labels(self) -> NDArray[np.int64] | NDArray[np.uint8]:
        """int64 (n_valid,): labels of the readable validation images, in path order; uint8
        (n_valid, C), 1 where an image has the label, if images have several.

        Where PATH has no valid/, they are known once a Learner has read the images.
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
        """Files of the readable validation images, in the order of `valid_labels`; in an object
        store their addresses.
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
        return shown if path_text.in_store(self.catalog.root) else [Path(name) for name in shown]


@dataclass(frozen=True, slots=True)
class Answer:
    """What an image file was given: its most probable label, the labels it has (several, or none,
    where images may have several), every class's probability. None, each, at a fault.
    """

    path: str
    label: str | None = None
    probability: float | None = None
    labels: list[str] | None = None
    probabilities: dict[str, float] | None = None
    fault: str | None = None


class DrawnCurve(Curve):
    """A curve that can be drawn."""

    def plot(self) -> Any:
        """The curve and its suggestions as a matplotlib figure; shown where a notebook can."""
        figure = examine_figures.lr_figure(self)
        examine_figures.display(figure)
        return figure


class Learner:
    """A head on a body that stays as it is.

    body: torchvision's name, or a BodyConfig; images: `Images`; store: folder for the features,
    by default in .arrowhead/ of the working directory; head: linear or lesson (the default here).
    Opening it decodes what the store does not hold yet; on a store that is there, settings that are
    left out are the store's own. track: record every `fit` and `lr_find` in
    MLflow; tracking_uri: there (it implies track). settings: fields of `BodyConfig`, `PixelConfig`
    and `ExtractConfig`, such as weights="weights.safetensors", size=128 or batch_size=256.
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
        with _python_words():
            asked = _settings(settings, BodyConfig, PixelConfig, ExtractConfig, but=("body",))
            if not isinstance(images, Images):
                raise ConfigError(
                    f"images is {images!r}.", "Images.", "give Images.from_folder(PATH)."
                )
            body = BodyConfig(body=body) if isinstance(body, str) else body
            how = FeatureConfig(
                source=images.source,
                body=_with(body, asked),
                pixels=_with(pixels or PixelConfig(), asked),
                extract=_with(ExtractConfig(), asked),
            )
            given = {"body", *asked, *_changed(body)}
            given |= {one.name for one in dataclasses.fields(pixels)} if pixels else set()
            self._config = TrainConfig(**_settings({"head": head}, TrainConfig))
        self.images = images
        origin = path_text.resolve(images.path)
        place = hashlib.blake2b(path_text.unescape_path(origin), digest_size=4).hexdigest()
        own = Path(".arrowhead") / f"{origin.rpartition('/')[2]}-{place}-{how.body.body}"
        folder = Path(store) if store else own
        self._tracking = (
            TrackingConfig(tracking_uri=tracking_uri) if track or tracking_uri else None
        )
        self._context = RunContext(screen=_Notebook())
        self._trained: Trained | None = None
        self._ready: Predictor | None = None
        with _python_words():
            how = feature_config.as_in_store(folder, how, given)
            sources.must_validate(images.path, images.catalog)
            precompute.precompute(images.path, folder, how, self._context)
        self.store = images._store = Store(folder)

    @staticmethod
    def load(path: str | Path) -> Classifier:
        """The bundle at `path`, ready to `predict`. Raises ConfigError if there is none, DataError
        if it is damaged or this machine sees its golden images differently.
        """
        with _python_words():
            return Classifier(Path(path))

    def __repr__(self) -> str:
        """Body, head, and the last epoch's figures."""
        recipe = self.store.recipe
        told = "not fitted yet"
        if self._trained:
            last = self._trained.epochs[self._trained.epoch]
            told = ", ".join(f"{k} {v:.4f}" for k, v in last.items() if k != "epoch")
        return (
            f"Learner({recipe.body}, {self._config.head} head, {recipe.size} pixels,"
            f" {len(self.images.classes)} classes): {told}"
        )

    def fit(
        self, rate: float, epochs: int, *, fresh: bool = False, **overrides: Any
    ) -> list[dict[str, float]]:
        """Train the head, at a constant rate as in the lesson; one dict of figures per epoch.

        A second call goes on with the weights of the first, unless fresh. overrides: other fields
        of `TrainConfig`, such as schedule="one-cycle" or dropout=0.5.
        """
        overrides.setdefault("schedule", "constant")
        with _python_words(), self._run("fit") as context:
            before = self._config
            now = _settings({"rate": rate, "epochs": epochs} | overrides, TrainConfig)
            self._config = dataclasses.replace(before, **now)
            on = self._trained and not fresh and before.head == self._config.head
            start = self._trained.state if on and self._trained else None
            asked = Study(head=self._config, start=start)
            run_context.params(context, {f"train.{k}": v for k, v in now.items()})
            made = train.learn(self.store.path, asked, context)
        self._trained = made.heads[0]
        self._close()
        return self._trained.epochs

    def predict(
        self, paths: Sequence[str | Path] | None = None
    ) -> NDArray[np.float32] | list[Answer]:
        """float32 (n_valid, C): log-probabilities of the validation images, in path order.

        With paths: what each of these image files is given, with calibrated probabilities (see
        `Answer`); a bad file has a fault and spoils no other.
        """
        import torch

        if paths is not None:
            return answers(self._predictor(), paths)
        valid = self.store.features("valid")
        feature_ND = torch.from_numpy(valid.feature[:, 0].astype(np.float32))
        with torch.inference_mode():
            logit_NC = self._head()(feature_ND)
            log_NC = logit_NC.sigmoid().log() if valid.multi else logit_NC.log_softmax(1)
        return log_NC.numpy()  # type: ignore[no-any-return]

    def lr_find(self, **overrides: Any) -> DrawnCurve:
        """The loss under a rising rate, and the rates it suggests; drawn in a notebook.

        overrides: fields of `FinderConfig`, such as low, high, steps, seeds.
        """
        with _python_words(), self._run("lr-find") as context:
            finder = FinderConfig(**_settings(overrides, FinderConfig))
            curve = train.find_rate(self.store.path, self._config, finder, context)
        drawn = DrawnCurve(**{f.name: getattr(curve, f.name) for f in dataclasses.fields(curve)})
        examine_figures.display(examine_figures.lr_figure(drawn))
        return drawn

    def save(self, path: str | Path) -> dict[str, Any]:
        """Save the trained head and its body as a bundle for `arrowhead score`; its metrics. A
        bundle that is there is kept as PATH.previous.
        """
        with _python_words():
            out = check_folder(Path(path), "bundle")
            return train.save(self.store, self._config, self._fitted(), out, self._context)

    @contextmanager
    def _run(self, name: str) -> Iterator[RunContext]:
        """What a stage is run with: with a run of its own, where that was asked for."""
        if self._tracking is None:
            yield self._context
            return
        from arrowhead.tracking import run as tracking_run

        with tracking_run.start(self._tracking, name, say=self._context.screen.say) as run:
            yield dataclasses.replace(self._context, run=run)

    def _predictor(self) -> Predictor:
        """The trained head with its body, held ready until it is trained on."""
        if self._ready is None:
            self._fitted()
            with tempfile.TemporaryDirectory(prefix="arrowhead-learner-") as scratch:
                place = Path(scratch) / "bundle"
                quiet = RunContext()
                train.save(self.store, self._config, self._fitted(), place, quiet)
                self._ready = Predictor(place)
        return self._ready

    def _close(self) -> None:
        if self._ready:
            self._ready.close()
            self._ready = None

    def _fitted(self) -> Trained:
        if self._trained is None:
            raise RuntimeError("call learn.fit(rate, epochs) first")
        return self._trained

    def _head(self) -> nn.Module:
        import torch

        from arrowhead.training import heads

        trained = {name: torch.tensor(value) for name, value in self._fitted().state.items()}
        width, classes = self.store.recipe.width, len(self.images.classes)
        return heads.restore(self._config.architecture, width, classes, trained)


class Classifier:
    """A bundle held ready: files in, labels and probabilities out."""

    def __init__(self, path: Path) -> None:
        resolve.must_be_there(str(path))
        self.path, self._ready = path, Predictor(path)

    def __repr__(self) -> str:
        """Body, head, classes and the figures it was saved with."""
        held = self._ready.bundle
        figures = {k: v for k, v in held.metrics.items() if k in ("accuracy", "f2_samples")}
        told = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        return (
            f"Classifier({held.recipe.body}, {held.head} head, {len(self.classes)} classes): {told}"
        )

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""
        return self._ready.bundle.classes

    def predict(self, paths: Sequence[str | Path]) -> list[Answer]:
        """What each of these image files is given; a bad file has a fault and spoils no other."""
        return answers(self._ready, paths)

    def close(self) -> None:
        """End the decoder's process."""
        self._ready.close()


def answers(ready: Predictor, paths: Sequence[str | Path]) -> list[Answer]:
    """What a bundle gives these files, in their order."""
    named = [paths] if isinstance(paths, str | Path) else list(paths)
    contents, made = [], {}
    for at, path in enumerate(named):
        try:
            contents.append((at, Path(path).read_bytes()))
        except OSError as error:
            made[at] = Answer(str(path), fault=f"unreadable: {error.strerror}")
    found = ready([content for _, content in contents])
    classes = np.array(ready.bundle.classes, object)
    for row, (at, _) in enumerate(contents):
        path, fault = str(named[at]), found.faults[row]
        if fault:
            made[at] = Answer(path, fault=fault)
            continue
        chance_C = found.probabilities[row]
        made[at] = Answer(
            path,
            label=classes[chance_C.argmax()],
            probability=float(chance_C.max()),
            labels=list(classes[found.given[row]]),
            probabilities=dict(zip(classes, chance_C.tolist(), strict=True)),
        )
    return [made[at] for at in range(len(named))]


@contextmanager
def _python_words() -> Iterator[None]:
    """Refusals speak of keyword arguments, not of flags."""
    try:
        yield
    except Refusal as error:
        words = map(_as_keywords, (error.found, error.wanted, error.do))
        raise type(error)(*words) from None


# A flag, and what is given to it where that is clearly no word of the sentence.
_FLAG = re.compile(
    r"--([a-z][a-z\d-]*)(?: (\d[\d.e-]*\d|\d|[A-Z]{2,}[\w.]*|random|auto|linear|last))?"
)


def _as_keywords(text: str) -> str:
    """A line with flags as the keyword arguments that they are in Python."""

    def keyword(flag: re.Match[str]) -> str:
        value = flag[2] or ""
        quoted = value if not value or value[0].isdigit() else f'"{value}"'
        return f"{flag[1].replace('-', '_')}={quoted}"

    return _FLAG.sub(keyword, text)


def _settings(given: dict[str, Any], *kinds: Any, but: tuple[str, ...] = ()) -> dict[str, Any]:
    """Keyword arguments, whose names and types must be those of fields of these dataclasses.

    but: fields that are not meant. Raises ConfigError for any other name or type.
    """
    hints = {
        f.name: get_type_hints(kind)[f.name]
        for kind in kinds
        for f in dataclasses.fields(kind)
        if f.name not in but
    }
    made = {}
    for name, value in given.items():
        if name not in hints:
            close = difflib.get_close_matches(name, hints, 1)
            raise ConfigError(
                f"{name}= is no setting here.",
                f"one of {', '.join(sorted(hints))}.",
                f"did you mean {close[0]}=?" if close else "leave it out.",
            )
        kinds_of = _kinds(hints[name])
        made[name] = _plain_value(value)
        if not any(_is_a(made[name], kind) for kind in kinds_of):
            words = " or ".join(dict.fromkeys(map(_kind_words, kinds_of)))
            raise ConfigError(f"{name}={value!r}.", f"{words}.", f"give another {name}=.")
    return made


def _plain_value(value: Any) -> Any:
    """Paths as text, numbers of NumPy as Python's."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if isinstance(value, np.generic) else value


def _kinds(hint: Any) -> list[Any]:
    """The kinds of values that a type stands for: classes, and single values of a Literal."""
    if get_origin(hint) in (Union, UnionType, Literal):
        return [kind for part in get_args(hint) for kind in _kinds(part)]
    return [get_origin(hint) or hint]


def _is_a(value: Any, kind: Any) -> bool:
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, kind) if isinstance(kind, type) else value == kind


def _kind_words(kind: Any) -> str:
    known = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
    known |= {NoneType: "None", tuple: "three numbers"}
    return known.get(kind, repr(kind))


def _changed(config: Any) -> set[str]:
    """Names of the fields that are not at their defaults."""
    every = dataclasses.fields(config)
    return {one.name for one in every if getattr(config, one.name) != one.default}


def _with(config: Any, settings: dict[str, Any]) -> Any:
    """A dataclass with those of the settings that are its own."""
    own = {f.name for f in dataclasses.fields(config)}
    return dataclasses.replace(config, **{k: v for k, v in settings.items() if k in own})


__all__ = ["Answer", "Classifier", "Images", "Learner"]
