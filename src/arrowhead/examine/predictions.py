"""What a bundle predicts for the images of a feature store, without decoding any of them.

    features, block by block -> head -> a few numbers per image (`Predictions`)
    held-out images          -> also the probability of every class

An image is *held out* if the bundle was not trained on it: it is in the validation or test split,
and the bundle does not list its content among its training images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.bundle.format import Bundle
from arrowhead.bundle.known_images import TRAINED
from arrowhead.errors import ConfigError
from arrowhead.evaluation.metrics import log_sum_exp
from arrowhead.features.store import Features, Store

if TYPE_CHECKING:
    from torch import nn

BLOCK_ROWS = 4096
MAX_NAMES = 5  # of classes, in a message


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """Predictions for the n images of a store that could be read, in catalog order.

    Attributes:
        classes: The C class names of the bundle.
        row: int64 (n,), rows of the catalog.
        image_id: uint64 (n,), the first 8 bytes of the image ids.
        split: str (n,): train, valid or test.
        held_out: bool (n,), whether the bundle was not trained on the image.
        label: int64 (n,), or uint8 (n, C) where images may have several labels.
        predicted: The same for the predictions.
        correct: bool (n,). With several labels: whether all of them are right.
        confidence: float32 (n,), the probability of the predicted class. With several labels, of
            the least certain decision.
        label_probability: float32 (n,), the probability of the label. With several labels, of the
            right answer to the label that the head gets most wrong.
        margin: float32 (n,), how far the probabilities are from another prediction (see
            `Bundle.margin`).
        loss: float32 (n,) in nats, of the calibrated probabilities. With several labels the mean.
        held_out_logits: float32 (m, C), the head's logits of the m held-out images.
        bundle: The bundle, whose temperature and thresholds turn logits into predictions.
    """

    classes: list[str]
    row: NDArray[np.int64]
    image_id: NDArray[np.uint64]
    split: NDArray[np.str_]
    held_out: NDArray[np.bool_]
    label: NDArray[Any]
    predicted: NDArray[Any]
    correct: NDArray[np.bool_]
    confidence: NDArray[np.float32]
    label_probability: NDArray[np.float32]
    margin: NDArray[np.float32]
    loss: NDArray[np.float32]
    held_out_logits: NDArray[np.float32]
    bundle: Bundle

    def __len__(self) -> int:
        return len(self.row)

    @property
    def multi(self) -> bool:
        """Whether images may have several labels."""
        return self.label.ndim == 2

    def held_out_probabilities(self) -> NDArray[np.float32]:
        """Calibrated probabilities of the held-out images, float32 (m, C)."""
        return _probabilities(self.held_out_logits, self.bundle)[0]

    def names(self, label_of_image: Any) -> list[str]:
        """The class names of one image's label or labels (an entry of `label` or `predicted`)."""
        indices = np.flatnonzero(label_of_image) if self.multi else [int(label_of_image)]
        return [self.classes[index] for index in indices]


def predict(store: Store, bundle: Bundle) -> Predictions:
    """Run a bundle's head on the stored features of all images.

    Raises:
        ConfigError: The store has another recipe, or labels that the bundle does not know.
    """
    recipe = bundle.recipe.single_view()
    store.recipe.single_view().require_equal(recipe, str(store.path), "the bundle")
    images = store.features(rows_only=True)
    label = _labels_of_bundle(store, images, bundle)
    held_out = np.isin(images.split, ["valid", "test"])
    if bundle.known_images:
        held_out &= bundle.known_images.lookup_ids(images.image_id) != TRAINED
    count = len(images.row)
    predicted = np.zeros(label.shape, label.dtype)
    correct = np.zeros(count, bool)
    confidence, label_probability, margin, loss = np.zeros((4, count), np.float32)
    logits = np.zeros((int(held_out.sum()), len(bundle.classes)), np.float32)
    first_logit, head = 0, bundle.make_head()
    for block, feature_BD in feature_blocks(store, images.row):
        logit_BC = _logits(head, feature_BD)
        prob_BC, log_prob_BC, log_other_BC = _probabilities(logit_BC, bundle)
        decision_BC = bundle.predict_labels(prob_BC)
        margin[block] = bundle.margin(prob_BC)
        if bundle.multi:
            truth_BC = label[block] > 0
            predicted[block] = decision_BC
            correct[block] = (decision_BC == truth_BC).all(1)
            confidence[block] = np.where(decision_BC, prob_BC, 1 - prob_BC).min(1)
            label_probability[block] = np.where(truth_BC, prob_BC, 1 - prob_BC).min(1)
            loss[block] = -np.where(truth_BC, log_prob_BC, log_other_BC).mean(1)
        else:
            label_B1 = label[block, None]
            predicted[block] = prob_BC.argmax(1)
            correct[block] = predicted[block] == label[block]
            confidence[block] = prob_BC.max(1)
            label_probability[block] = np.take_along_axis(prob_BC, label_B1, 1)[:, 0]
            loss[block] = -np.take_along_axis(log_prob_BC, label_B1, 1)[:, 0]
        kept_MC = logit_BC[held_out[block]]
        logits[first_logit : first_logit + len(kept_MC)] = kept_MC
        first_logit += len(kept_MC)
    return Predictions(
        classes=bundle.classes,
        row=images.row,
        image_id=images.image_id,
        split=images.split,
        held_out=held_out,
        label=label,
        predicted=predicted,
        correct=correct,
        confidence=confidence,
        label_probability=label_probability,
        margin=margin,
        loss=loss,
        held_out_logits=logits,
        bundle=bundle,
    )


def feature_blocks(
    store: Store, row: NDArray[np.int64]
) -> Iterator[tuple[slice, NDArray[np.float16]]]:
    """Yield the clean features of catalog rows, block by block, from the memory-mapped shards.

    Args:
        store: The store.
        row: int64 (n,), ascending.

    Yields:
        Positions in `row`, and their features, float16 (b, D).
    """
    first = 0
    for shard in store.mapped_features():
        start, stop = np.searchsorted(row, [first, first + len(shard)])
        for begin in range(start, stop, BLOCK_ROWS):
            block = slice(begin, min(begin + BLOCK_ROWS, int(stop)))
            yield block, shard[row[block] - first, 0]
        first += len(shard)


def _labels_of_bundle(store: Store, images: Features, bundle: Bundle) -> NDArray[Any]:
    """The labels as indices of the bundle's classes, (n,) or (n, C)."""
    classes = store.manifest()["classes"]
    if not classes:
        raise ConfigError(
            f"{store.path} has no labels: it was made with --unlabelled.",
            "the store that the bundle was trained on, or one with the same classes.",
            f"see what to label with `arrowhead suggest {store.path} BUNDLE`, or predict with"
            " `arrowhead score`.",
        )
    unknown = sorted(set(classes) - set(bundle.classes))
    if unknown or (images.multi and not bundle.multi):
        names = ", ".join(unknown[:MAX_NAMES])
        more = f" and {len(unknown) - MAX_NAMES} more" if len(unknown) > MAX_NAMES else ""
        raise ConfigError(
            f"{store.path} has labels that the bundle does not know: {names}{more}."
            if unknown
            else f"{store.path} has images with several labels; the bundle predicts exactly one.",
            "the store that the bundle was trained on, or one with the same classes.",
            "train a bundle on this store: arrowhead train STORE BUNDLE.",
        )
    position = np.array([bundle.classes.index(name) for name in classes], np.int64)
    if not bundle.multi:
        label_N: NDArray[np.int64] = position[images.label]
        return label_N
    label_NC = np.zeros((len(images.row), len(bundle.classes)), np.uint8)
    if images.multi:
        label_NC[:, position] = images.label
    else:  # a store in which each image happens to have one label
        label_NC[np.arange(len(images.row)), position[images.label]] = 1
    return label_NC


def _logits(head: nn.Module, feature_BD: NDArray[np.float16]) -> NDArray[np.float32]:
    import torch

    with torch.inference_mode():
        logit_BC: NDArray[np.float32] = head(
            torch.from_numpy(feature_BD.astype(np.float32))
        ).numpy()
    return logit_BC


def _probabilities(
    logit_BC: NDArray[np.float32], bundle: Bundle
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64]]:
    """Calibrated probabilities (B, C), their logs, and with several labels the logs of 1 - p."""
    z_BC = logit_BC.astype(np.float64) / bundle.temperature
    if bundle.multi:
        log_prob_BC, log_other_BC = -np.logaddexp(0, -z_BC), -np.logaddexp(0, z_BC)
    else:
        log_prob_BC = z_BC - log_sum_exp(z_BC)[:, None]
        log_other_BC = log_prob_BC
    return np.exp(log_prob_BC).astype(np.float32), log_prob_BC, log_other_BC
