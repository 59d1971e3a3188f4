"""The lesson's three lines.

    images = Images.from_folder("data/dogscats")
    learn = Learner("resnet34", images)        # decodes every image once
    learn.fit(0.01, 3)                         # epoch, train loss, valid loss, accuracy

After that `learn.predict()`, `learn.lr_find()` and `learn.save(folder)` take seconds: they work
on the stored features.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead import account, files, pipeline, plan, report
from arrowhead.decode import PixelConfig
from arrowhead.features import FeatureConfig
from arrowhead.lr_finder import Curve, FinderConfig
from arrowhead.model import BodyConfig
from arrowhead.plan import Catalog
from arrowhead.screen import encodable, visible
from arrowhead.shards import Store
from arrowhead.study import Study
from arrowhead.train import TrainConfig, Trained

if TYPE_CHECKING:
    from torch import nn


class _Notebook(account.Silence):
    """A screen that prints."""

    def say(self, line: str) -> None:
        """Print it."""
        print(encodable(visible(line)))  # noqa: T201


class Images:
    """Labelled images; nothing is opened before a Learner needs it."""

    def __init__(self, path: str, catalog: Catalog) -> None:
        self.path, self.catalog = path, catalog
        self._store: Store | None = None

    @staticmethod
    def from_folder(path: str | Path) -> Images:
        """Images below PATH/train/<class> and PATH/valid/<class>, or PATH/<class>.

        PATH may be an address such as s3://bucket/photos, or a table (see `plan.labelled`).
        Raises ConfigError for a missing or empty folder, or fewer than two classes.
        """
        return Images(os.fspath(path), plan.labelled(path))

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
        names = [files.raw(f"{self.catalog.root}/{self.catalog.paths[row]}") for row in rows]
        shown = [os.fsdecode(name) for name in names]
        return shown if files.in_store(self.catalog.root) else [Path(name) for name in shown]


class Learner:
    """A head on a body that stays as it is.

    body: torchvision's name, or a BodyConfig; images: `Images`; store: folder for the features,
    by default in .arrowhead/ of the working directory; head: linear or lesson (the default here).
    Opening it decodes what the store does not hold yet.
    """

    def __init__(
        self,
        body: str | BodyConfig,
        images: Images,
        *,
        store: str | Path | None = None,
        head: str = "lesson",
        pixels: PixelConfig = PixelConfig(),
    ) -> None:
        body = BodyConfig(body=body) if isinstance(body, str) else body
        self.images = images
        origin = files.resolve(images.path)
        place = hashlib.blake2b(files.raw(origin), digest_size=4).hexdigest()
        own = Path(".arrowhead") / f"{origin.rpartition('/')[2]}-{place}-{body.body}"
        folder = Path(store) if store else own
        self._config = TrainConfig(head=head)  # type: ignore[arg-type]
        self._means = account.Means(screen=_Notebook())
        settings = FeatureConfig(body=body, pixels=pixels)
        pipeline.precompute(images.path, folder, settings, self._means)
        self.store = images._store = Store(folder)
        self._trained: Trained | None = None

    def fit(self, rate: float, epochs: int, **knobs: Any) -> list[dict[str, float]]:
        """Train a fresh head, at a constant rate as in the lesson; one dict of figures per epoch.

        knobs: other fields of `TrainConfig`, such as schedule="one-cycle" or dropout=0.5.
        """
        knobs.setdefault("schedule", "constant")
        self._config = dataclasses.replace(self._config, rate=rate, epochs=epochs, **knobs)
        made = pipeline.learn(self.store.path, Study(head=self._config), self._means)
        self._trained = made.heads[0]
        return self._trained.epochs

    def predict(self) -> NDArray[np.float32]:
        """float32 (n_valid, C): log-probabilities of the validation images, in path order."""
        import torch

        valid = self.store.features("valid")
        feature_ND = torch.from_numpy(valid.feature[:, 0].astype(np.float32))
        with torch.inference_mode():
            logit_NC = self._head()(feature_ND)
            log_NC = logit_NC.sigmoid().log() if valid.multi else logit_NC.log_softmax(1)
        return log_NC.numpy()  # type: ignore[no-any-return]

    def lr_find(self, **knobs: Any) -> Curve:
        """The loss under a rising rate, and the rates it suggests; drawn in a notebook.

        knobs: fields of `FinderConfig`, such as low, high, steps, seeds.
        """
        finder = FinderConfig(**knobs)
        curve = pipeline.find_rate(self.store.path, self._config, finder, self._means)
        report.display(report.lr_figure(curve))
        return curve

    def save(self, path: str | Path) -> dict[str, Any]:
        """Save the trained head and its body as a bundle for `arrowhead score`; its metrics."""
        return pipeline.save(self.store, self._config, self._fitted(), Path(path), self._means)

    def _fitted(self) -> Trained:
        if self._trained is None:
            raise RuntimeError("call learn.fit(rate, epochs) first")
        return self._trained

    def _head(self) -> nn.Module:
        import torch

        from arrowhead import heads

        trained = {name: torch.tensor(value) for name, value in self._fitted().state.items()}
        width, classes = self.store.recipe.width, len(self.images.classes)
        return heads.restore(self._config.head, width, classes, trained)


__all__ = ["Images", "Learner"]
