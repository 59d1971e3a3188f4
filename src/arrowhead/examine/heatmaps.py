"""Where the network looked: heat maps of the positions that a class's logit comes from.

    encoded images         decoded as for scoring, so a map shows the pixels that the network saw
      -> feature map       (B, K, h, w), before the network pools it
      -> Heatmap           (h, w), and where it lies in the upright image
      -> overlay_png       a small transparent picture, to be stretched over the photo

A linear head on average pooling gives class activation maps (Zhou et al. 2016, arXiv:1512.04150):
the head is applied at every position, and the mean over the positions, plus the head's bias, is the
logit. For any other head or pooling, Grad-CAM (Selvaraju et al. 2017, arXiv:1610.02391) weights the
channels by the gradient of the logit.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from arrowhead.bundle import replay
from arrowhead.bundle.format import Bundle
from arrowhead.decode import geometry
from arrowhead.decode import headers as decode_headers
from arrowhead.decode.pixels import CROPPED_UPRIGHT, Header
from arrowhead.features import extract
from arrowhead.features.feature_maps import FeatureMaps, feature_maps
from arrowhead.features.recipe import Recipe
from arrowhead.features.split_maps import SplitMaps

if TYPE_CHECKING:
    from torch import Tensor, nn

Box = tuple[float, float, float, float]
Method = Literal["CAM", "Grad-CAM"]
LINEAR_HEAD = ["Standardize", "Dropout", "Linear"]
BATCH_SIZE = 16
OVERLAY_PIXELS = 64
LEVELS = 31  # steps of color on each side of zero
MAX_ALPHA = 190  # of 255: the photo stays visible
# Yellow to red for, blue against: told apart with any kind of color blindness.
FOR_COLORS, AGAINST_COLORS = ((255, 220, 40), (225, 0, 60)), ((120, 170, 255), (20, 50, 210))


@dataclass(frozen=True, slots=True)
class Heatmap:
    """Which positions of an image speak for a class.

    Attributes:
        map: float32 (h, w), contributions to the logit; of the upright image, the top row first.
            CAM: signed, relative to the average training image; their mean plus the head's bias
            is the logit. Grad-CAM: >= 0.
        box: (left, top, right, bottom) of what the network saw of the upright image, as shares of
            its width and height. With resize pad it begins below 0 and ends above 1.
        extent: Where the map lies in the box along both axes, as shares; see `FeatureMaps.extent`.
        method: How it was computed.
        class_index: The explained class.
        logit: The logit of this class, as scoring computes it, before temperature.
    """

    map: NDArray[np.float32]
    box: Box
    extent: tuple[float, float]
    method: Method
    class_index: int
    logit: float


def explain(
    bundle: Bundle, images: Sequence[bytes], classes: Sequence[int] | None = None
) -> list[Heatmap | None]:
    """Compute one heat map per image.

    To explain several classes of an image, give the image several times: it is decoded once.

    Args:
        bundle: The classifier.
        images: Encoded images.
        classes: The class to explain in each image; None: the one with the highest logit.

    Returns:
        One per image; None where the image cannot be decoded or its features are not finite.

    Raises:
        ConfigError: If the bundle's network has no feature map.
    """
    with open_explainer(bundle) as explain_images:
        return explain_images(images, classes)


@contextmanager
def open_explainer(
    bundle: Bundle,
) -> Iterator[Callable[[Sequence[bytes], Sequence[int] | None], list[Heatmap | None]]]:
    """Load a bundle once to explain images in several calls.

    Yields:
        A function of images and classes that returns what `explain` does.

    Raises:
        ConfigError: If the bundle's network has no feature map.
    """
    import torch

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    threads = len(os.sched_getaffinity(0))
    maps, head = feature_maps(bundle.make_body(device)), bundle.make_head(device)
    with replay.clean_decoder(bundle.recipe, device, threads, BATCH_SIZE) as decode:
        yield lambda images, classes: _explain(bundle.recipe, maps, head, decode, images, classes)


def _explain(
    recipe: Recipe,
    maps: FeatureMaps | SplitMaps,
    head: nn.Module,
    decode: Callable[[Sequence[bytes], Sequence[bytes]], Any],
    images: Sequence[bytes],
    classes: Sequence[int] | None,
) -> list[Heatmap | None]:
    """One heat map per image; see `explain`."""
    import torch

    rows: dict[bytes, list[int]] = {}
    for row, data in enumerate(images):
        rows.setdefault(data, []).append(row)
    different = list(rows)
    results: list[Heatmap | None] = [None] * len(images)
    for first in range(0, len(different), BATCH_SIZE):
        batch = different[first : first + BATCH_SIZE]
        pixels = decode(batch, [bytes(16)] * len(batch))
        view_BCHW = torch.as_tensor(pixels.views[0]).permute(0, 3, 1, 2)
        outputs = _Outputs(maps, head, view_BCHW)
        usable = [i for i, fault in enumerate(pixels.faults) if not fault and outputs.is_finite(i)]
        boxes = {i: _box(recipe, batch[i]) for i in usable}
        # In each turn one class of every image: Grad-CAM then needs one backward pass for all.
        for turn in range(max(len(rows[data]) for data in batch)):
            asked = {i: rows[batch[i]][turn] for i in usable if turn < len(rows[batch[i]])}
            wanted = {} if classes is None else {i: classes[row] for i, row in asked.items()}
            found = outputs.heatmaps(boxes, wanted)
            for i, row in asked.items():
                results[row] = found[i]
    return results


class _Outputs:
    """The feature maps and logits of a batch, and the heat maps computed from them.

    maps: the body; head: as `Bundle.make_head`; view_BCHW: uint8 pixels.
    """

    def __init__(self, maps: FeatureMaps | SplitMaps, head: nn.Module, view_BCHW: Tensor) -> None:
        import torch

        self._head = head
        self._map_BKhw, self._feature_BD = maps(view_BCHW)
        self._extent = maps.extent(self._map_BKhw.shape[2], view_BCHW.shape[2])
        # Scoring rounds features to float16, and so does the map, that the sum stays exact.
        self._rounded_BD = self._feature_BD.detach().half().float()
        with torch.no_grad():
            self._logit_BC = head(self._rounded_BD).cpu()
        is_linear = [type(layer).__name__ for layer in head.children()] == LINEAR_HEAD
        self._method: Method = "CAM" if maps.averaged and is_linear else "Grad-CAM"

    def is_finite(self, row: int) -> bool:
        """Whether the features of an image are finite."""
        return bool(self._rounded_BD[row].isfinite().all())

    def heatmaps(self, boxes: Mapping[int, Box], classes: Mapping[int, int]) -> dict[int, Heatmap]:
        """Heat maps of the images that have a box; classes: by row, by default the predicted."""
        class_B = self._logit_BC.argmax(1)
        for row, class_index in classes.items():
            class_B[row] = class_index
        compute = self._cam if self._method == "CAM" else self._grad_cam
        map_Bhw = compute(class_B.to(self._map_BKhw.device)).cpu().numpy().astype(np.float32)
        return {
            row: Heatmap(
                map=map_Bhw[row],
                box=box,
                extent=self._extent,
                method=self._method,
                class_index=(class_index := int(class_B[row])),
                logit=float(self._logit_BC[row, class_index]),
            )
            for row, box in boxes.items()
        }

    def _cam(self, class_B: Tensor) -> Tensor:
        """The head applied at every position, without its bias: (B, h, w)."""
        import torch

        standardize, _, linear = cast("nn.Sequential", self._head)
        rounding_BD = self._rounded_BD - self._feature_BD.detach()
        map_BhwK = (self._map_BKhw.detach() + rounding_BD[:, :, None, None]).permute(0, 2, 3, 1)
        weight_BK = linear.get_parameter("weight").detach()[class_B].double()
        return torch.einsum("bhwk,bk->bhw", standardize(map_BhwK.double()), weight_BK)

    def _grad_cam(self, class_B: Tensor) -> Tensor:
        """The positive part of the channels' sum, weighted by the logit's gradient: (B, h, w)."""
        import torch

        logit_BC = self._head(self._feature_BD)
        total = logit_BC.gather(1, class_B[:, None]).sum()
        (grad_BKhw,) = torch.autograd.grad(total, self._map_BKhw, retain_graph=True)
        weight_BK = grad_BKhw.sum((2, 3))
        return torch.einsum("bkhw,bk->bhw", self._map_BKhw.detach(), weight_BK).relu()


def _box(recipe: Recipe, data: bytes) -> Box:
    """The part of the upright image that the network saw. data: an image that was decoded."""
    config = extract.make_pixel_config(recipe.single_view())
    header = decode_headers.read_header(data, config)
    assert isinstance(header, Header), header
    upright = recipe.decoder == CROPPED_UPRIGHT
    return geometry.upright_box(config, header, crops_upright=upright)


def overlay_png(heatmap: Heatmap) -> bytes:
    """Draw a map as a transparent PNG: the stronger a position, the less of the photo is seen.

    Yellow to red: for the class; blue: against it. Strengths are relative to the map's strongest
    position. Stretch the picture to the heat map's `box` over the photo.

    Returns:
        A PNG file of 64 x 64 pixels with a palette, 1 to 3 kB.
    """
    from PIL import Image

    map_hw = heatmap.map / max(float(np.abs(heatmap.map).max()), 1e-12)
    # What lies in the box but not in the map continues the map's edge.
    height, width = map_hw.shape
    padded = Image.fromarray(np.pad(map_hw, ((height, height), (width, width)), mode="edge"))
    first, last = heatmap.extent
    start, end = 1 - first / (last - first), 1 + (1 - first) / (last - first)
    smooth = padded.resize(
        (OVERLAY_PIXELS, OVERLAY_PIXELS),
        Image.Resampling.BICUBIC,
        box=(start * width, start * height, end * width, end * height),
    )
    level = np.rint(np.asarray(smooth).clip(-1, 1) * LEVELS).astype(np.int16) + LEVELS
    picture = Image.fromarray(level.astype(np.uint8), mode="P")
    steps = np.abs(np.arange(-LEVELS, LEVELS + 1)) / LEVELS
    pairs = [AGAINST_COLORS] * LEVELS + [FOR_COLORS] * (LEVELS + 1)
    weak, strong = np.array(pairs, np.float64).transpose(1, 0, 2)
    colors = weak + (strong - weak) * steps[:, None]
    picture.putpalette(np.rint(colors).astype(np.uint8).tobytes())
    alphas = np.rint(MAX_ALPHA * steps**1.5).astype(np.uint8)
    file = io.BytesIO()
    picture.save(file, "PNG", transparency=alphas.tobytes(), optimize=True)
    return file.getvalue()
