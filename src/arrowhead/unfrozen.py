"""Fine-tuning for `notebook.Learner`: from a store and a head to the store of the tuned body.

The results of a fine-tuning are again a store and a head on it, so all that a Learner does with
them (predict, show, save, lr_find, train the head again) stays as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arrowhead.bundle import body_file
from arrowhead.bundle import format as bundle_format
from arrowhead.commands import finetune, pixel_cache, precompute, train
from arrowhead.commands.finetune import FinetuneSettings
from arrowhead.commands.tuned_choice import Base
from arrowhead.data.catalog import Catalog
from arrowhead.features import extract
from arrowhead.features.feature_config import FeatureConfig
from arrowhead.features.store import Store
from arrowhead.finetuning import lr_finder
from arrowhead.finetuning.augmentation import AugmentConfig
from arrowhead.finetuning.config import FinetuneConfig
from arrowhead.keyword_settings import check_settings, replace_fields
from arrowhead.reporting.run_context import RunContext
from arrowhead.runtime import launch
from arrowhead.training import checkpoint
from arrowhead.training.config import TrainConfig
from arrowhead.training.lr_finder import Curve, FinderConfig
from arrowhead.training.trainer import TrainedHead


def settings(
    given: dict[str, Any], rate: float | Sequence[float] | None = None, epochs: int | None = None
) -> FinetuneSettings:
    """The settings of a fine-tuning from those of `Learner.fit`.

    given: fields of `FinetuneConfig` and `AugmentConfig`; with cycle_len, `epochs` counts cycles.
    """
    given = check_settings(given, FinetuneConfig, AugmentConfig)
    if rate is not None:
        rates = rate if isinstance(rate, Sequence) else [rate]
        given["rates"] = ",".join(str(float(one)) for one in rates)
    if epochs is not None:
        length, factor = given.get("cycle_len"), given.get("cycle_mult", 1)
        if length:
            given.setdefault("schedule", "cosine")
            epochs = sum(length * factor**number for number in range(epochs))
        given["epochs"] = epochs
    seed = {"seed": given["seed"]} if "seed" in given else {}
    return FinetuneSettings(
        config=replace_fields(FinetuneConfig(), given),
        augment=replace_fields(AugmentConfig(), given | seed),
    )


@dataclass(frozen=True, slots=True)
class Unfrozen:
    """A network that is to be trained as a whole.

    Attributes:
        store: The features of its body.
        head: Its head, trained on them.
        config: How the head was trained.
        folder: Where the pixel cache and the results are.
    """

    store: Store
    head: TrainedHead
    config: TrainConfig
    folder: Path

    def fit(
        self, settings: FinetuneSettings, context: RunContext
    ) -> tuple[Store, TrainedHead, list[dict[str, float]]]:
        """Fine-tune; the store of the tuned body, its head, and the metrics of each epoch."""
        with self._base() as base:
            catalog, images = self._cache_pixels(settings, context)
            recipe = base.bundle.recipe.single_view()
            request, trained = finetune.train_network(self.folder, base, recipe, settings, context)
            body = finetune.write_body(self.folder, base, recipe, request, trained)
        config = body_file.body_config(recipe, body)
        path = finetune.tuned_store(self.folder / "store", config, recipe)
        precompute.precompute(catalog, path, dataclasses.replace(images, body=config), context)
        checkpoint.remove_finished(train.checkpoint_dir_of(self.folder / "bundle"), trained["key"])
        history = trained["history"]
        head = TrainedHead(state=trained["head"], epochs=history, epoch=trained["kept"])
        return Store(path), head, history

    def find_learning_rate(
        self, settings: FinetuneSettings, finder: FinderConfig, context: RunContext
    ) -> Curve:
        """Run the range test for the rate of the head; the others keep their ratio to it.

        The network is a copy: the weights stay as they are, bit for bit.
        """
        with self._base() as base:
            self._cache_pixels(settings, context)
            request = finetune.make_request(
                self.folder, base, base.bundle.recipe.single_view(), settings
            )
        plain = launch.run(
            lr_finder.run_lr_finder,
            self.folder / "pixels",
            train.checkpoint_dir_of(self.folder / "bundle"),
            request,
            finder,
            config=context.launch,
        )
        return Curve.from_plain(plain)

    @contextlib.contextmanager
    def _base(self) -> Iterator[Base]:
        """The network as a bundle in a temporary folder."""
        with tempfile.TemporaryDirectory(prefix="arrowhead-unfrozen-") as scratch:
            path = Path(scratch) / "bundle"
            train.save_bundle(self.store, self.config, self.head, path)
            yield Base(path, bundle_format.load(path), self.store.path)

    def _cache_pixels(
        self, settings: FinetuneSettings, context: RunContext
    ) -> tuple[Catalog, FeatureConfig]:
        """Decode the images of the store into the pixel cache; its catalog and settings."""
        catalog = Catalog(**self.store.read_catalog())
        pixels: Any = extract.make_pixel_config(self.store.recipe.single_view())
        images = FeatureConfig(pixels=pixels)
        pixel_cache.build_pixel_cache(
            catalog, self.folder / "pixels", images, settings.cache, context
        )
        return catalog, images
