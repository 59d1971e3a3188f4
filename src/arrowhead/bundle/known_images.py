"""Which images a bundle was made of: trained on, or validated with; by content, not by name.

A head is right more often about the images that it learned from than about any others. With the
first 8 bytes of their image ids (BLAKE2b-128 of the file) in the bundle, an image that is scored
can be told from those, whatever it is called and wherever it lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NEW, VALIDATED, TRAINED = 0, 1, 2


@dataclass(frozen=True, slots=True)
class KnownImages:
    """uint64 (n,), ascending: first 8 bytes of image ids, big endian, as `Features` has
    them; of the training and of the validation images.
    """

    train: NDArray[np.uint64]
    valid: NDArray[np.uint64]

    @staticmethod
    def of(train: NDArray[np.uint64], valid: NDArray[np.uint64]) -> KnownImages:
        """From ids in any order."""
        return KnownImages(np.unique(train), np.unique(valid))

    def use(self, image_ids: Sequence[bytes]) -> NDArray[np.uint8]:
        """(N,) NEW, VALIDATED or TRAINED for images of these ids (16 bytes each)."""
        joined = np.frombuffer(b"".join(image_ids), np.uint8).reshape(-1, 16)
        id_N = np.ascontiguousarray(joined[:, :8]).view(">u8").ravel().astype(np.uint64)
        use_N = np.full(len(id_N), NEW, np.uint8)
        use_N[_among(id_N, self.valid)] = VALIDATED
        use_N[_among(id_N, self.train)] = TRAINED
        return use_N

    def tensors(self) -> dict[str, NDArray[np.uint64]]:
        """As safetensors holds them."""
        return {"train": self.train, "valid": self.valid}

    @staticmethod
    def from_tensors(tensors: Mapping[str, NDArray[Any]]) -> KnownImages:
        """As `tensors` gave them. Raises ValueError for others."""
        fine = tensors.keys() == {"train", "valid"} and all(
            one.ndim == 1 and one.dtype == np.uint64 and (one[1:] > one[:-1]).all()
            for one in tensors.values()
        )
        if not fine:
            raise ValueError("not two lists of image ids, ascending")
        return KnownImages(tensors["train"], tensors["valid"])


def _among(id_N: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which of them are among the ascending `known`."""
    if not len(known):
        return np.zeros(len(id_N), bool)
    at_N = np.minimum(np.searchsorted(known, id_N), len(known) - 1)
    found_N: NDArray[np.bool_] = known[at_N] == id_N
    return found_N
