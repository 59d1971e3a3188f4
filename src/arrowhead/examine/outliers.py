"""The images of a store that are least like the training images, and least like their own class.

    features, block by block -> distances to a bank of training images (`evaluation.novelty`)
      -> k-th nearest other image: novelty; k-th nearest of its class, minus that of other classes

Unlike the novelty that `score` reports, the distance of a training image leaves out the image
itself and its exact copies, so that training images can be compared with the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.data.catalog import Catalog
from arrowhead.evaluation import novelty
from arrowhead.evaluation.novelty import NoveltyDetector
from arrowhead.examine.predictions import feature_blocks
from arrowhead.features.store import Store

if TYPE_CHECKING:
    import torch

SPLITS = ("train", "valid", "test")
FALSE_ALARMS = 0.05


@dataclass(frozen=True, kw_only=True, slots=True)
class Outliers:
    """How unlike the training images the N images of a catalog are.

    Attributes:
        distance: float32 (N,), distance to the k-th nearest other training image (see
            `evaluation.novelty`), 0 alike to 2 opposite; NaN for an image without a feature.
        class_gap: float32 (N,), distance to the k-th nearest other training image of its own class
            minus that of the other classes: above 0 for an image nearer to another class. NaN
            where that is not defined, and for all images if they may have several labels.
        threshold: The distance that 5 % of the validation images exceed; infinite with too few.
        novel: For each split up to `top` rows of the catalog, the largest distance first.
        unlike_class: Up to `top` rows of any split with a class_gap above 0, the largest first.
    """

    distance: NDArray[np.float32]
    class_gap: NDArray[np.float32]
    threshold: float
    novel: dict[str, NDArray[np.int64]]
    unlike_class: NDArray[np.int64]

    def table(self, catalog: Catalog) -> list[dict[str, Any]]:
        """One row per listed image for `tables.write_table`: the novel ones of each split, then
        those unlike their class.
        """
        lists = [("novel", row) for rows in self.novel.values() for row in rows.tolist()]
        lists += [("unlike its class", row) for row in self.unlike_class.tolist()]
        return [
            {
                "list": name,
                "path": catalog.paths[row],
                "split": catalog.splits[row],
                "labels": "|".join(catalog.labels[row]),
                "distance": _rounded(self.distance[row]),
                "class_gap": _rounded(self.class_gap[row]),
            }
            for name, row in lists
        ]


def _rounded(value: np.float32) -> float | None:
    """A number for a table, None instead of NaN."""
    return None if np.isnan(value) else round(float(value), 6)


def find_outliers(store: Store, top: int = 20) -> Outliers:
    """Find the images of a store that are least like its training images.

    Needs memory for a few numbers per image and a bank of up to 4,096 features. Distances come from
    the clean view.

    Args:
        store: A finished store with training images.
        top: Length of each list.
    """
    images = store.features(rows_only=True)
    train = np.flatnonzero(images.split == "train")
    bank = train[novelty.sample_bank_rows(images.image_id[train])]
    feature_MD = store.clean_features(images.row[bank])
    detector = NoveltyDetector.fit(feature_MD, np.zeros((0, feature_MD.shape[1]), np.float16))
    bank_label = None if images.multi else images.label[bank]
    distance_n, gap_n = np.full((2, len(images.row)), np.nan, np.float32)
    for block, feature_BD in feature_blocks(store, images.row):
        for start in range(0, len(feature_BD), novelty.BATCH_ROWS):
            part = slice(
                block.start + start, min(block.start + start + novelty.BATCH_ROWS, block.stop)
            )
            distance_n[part], gap_n[part] = _distances(
                detector,
                feature_BD[start : start + novelty.BATCH_ROWS],
                images.image_id[part],
                None if images.multi else images.label[part],
                images.image_id[bank],
                bank_label,
            )
    files = sum(shard["files"] for shard in store.manifest()["shards"])
    distance_N, gap_N = np.full((2, files), np.nan, np.float32)
    distance_N[images.row], gap_N[images.row] = distance_n, gap_n
    known = np.sort(distance_n[images.split == "valid"])
    rank = int(np.ceil((len(known) + 1) * (1 - FALSE_ALARMS)))
    return Outliers(
        distance=distance_N,
        class_gap=gap_N,
        threshold=float(known[rank - 1]) if rank <= len(known) else float("inf"),
        novel={
            split: _largest(distance_N, images.row[images.split == split], top)
            for split in SPLITS
            if (images.split == split).any()
        },
        unlike_class=_largest(gap_N, images.row[gap_n > 0], top),
    )


def _distances(
    detector: NoveltyDetector,
    feature_BD: NDArray[np.float16],
    id_B: NDArray[np.uint64],
    label_B: NDArray[Any] | None,
    bank_id_M: NDArray[np.uint64],
    bank_label_M: NDArray[Any] | None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Distances (B,) to the other images of the bank, and the gap (B,) between the classes."""
    import torch
    from torch.nn.functional import normalize

    feature = torch.from_numpy(feature_BD.astype(np.float32))
    cosine_BM = normalize((feature - detector.mean) / detector.deviation) @ detector.bank.float().T
    is_copy_BM = torch.from_numpy(id_B[:, None] == bank_id_M[None, :])
    cosine_BM = cosine_BM.masked_fill(is_copy_BM, -torch.inf)
    distance_B = _kth_distance(cosine_BM)
    if label_B is None or bank_label_M is None:
        return distance_B, np.full(len(id_B), np.nan, np.float32)
    is_own_BM = torch.from_numpy(label_B[:, None] == bank_label_M[None, :])
    own_B = _kth_distance(cosine_BM.masked_fill(~is_own_BM, -torch.inf))
    other_B = _kth_distance(cosine_BM.masked_fill(is_own_BM, -torch.inf))
    return distance_B, own_B - other_B


def _kth_distance(cosine_BM: torch.Tensor) -> NDArray[np.float32]:
    """The distance to the k-th nearest image: with fewer, to the farthest; with none, NaN.

    cosine_BM: -inf for images that do not count.
    """
    import torch

    nearest_BK = cosine_BM.topk(min(novelty.K, cosine_BM.shape[1]), dim=1).values
    kth_B = nearest_BK.masked_fill(nearest_BK.isinf(), torch.inf).amin(1)
    distance_B = (2 - 2 * kth_B).clamp(min=0).sqrt()
    result_B: NDArray[np.float32] = distance_B.where(kth_B.isfinite(), torch.nan).numpy()
    return result_B


def _largest(value_N: NDArray[np.float32], row_K: NDArray[np.int64], top: int) -> NDArray[np.int64]:
    """The rows with the largest values that are numbers, ties in the order of the rows."""
    row_K = row_K[np.isfinite(value_N[row_K])]
    return row_K[np.argsort(-value_N[row_K], kind="stable")[:top]]
