"""The training and validation images of a bundle, recognized by content.

A head is right more often about its training images than about others, so metrics on them are too
good. The bundle stores the first 8 bytes of their image ids (BLAKE2b-128 of the file); an image
that is scored is recognized by them under any name and path.
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
    """Ids of the training and of the validation images: each uint64 (n,), ascending, the first 8
    bytes of the image id, big endian (see `features.store.Features`).
    """

    train: NDArray[np.uint64]
    valid: NDArray[np.uint64]

    @staticmethod
    def from_ids(train: NDArray[np.uint64], valid: NDArray[np.uint64]) -> KnownImages:
        """Sort ids and drop duplicates."""
        return KnownImages(np.unique(train), np.unique(valid))

    def lookup(self, image_ids: Sequence[bytes]) -> NDArray[np.uint8]:
        """NEW, VALIDATED or TRAINED for each image id of 16 bytes, uint8 (N,)."""
        byte_N16 = np.frombuffer(b"".join(image_ids), np.uint8).reshape(-1, 16)
        id_N = np.ascontiguousarray(byte_N16[:, :8]).view(">u8").ravel().astype(np.uint64)
        return self.lookup_ids(id_N)

    def lookup_ids(self, id_N: NDArray[np.uint64]) -> NDArray[np.uint8]:
        """The same for the first 8 bytes of image ids, uint64 (N,) (see `features.store`)."""
        use_N = np.full(len(id_N), NEW, np.uint8)
        use_N[_is_in_sorted(id_N, self.valid)] = VALIDATED
        use_N[_is_in_sorted(id_N, self.train)] = TRAINED
        return use_N

    def tensors(self) -> dict[str, NDArray[np.uint64]]:
        """The arrays by name, to be saved as safetensors."""
        return {"train": self.train, "valid": self.valid}

    @staticmethod
    def from_tensors(tensors: Mapping[str, NDArray[Any]]) -> KnownImages:
        """Restore from `tensors`; raises ValueError for arrays of another form."""
        valid_form = tensors.keys() == {"train", "valid"} and all(
            one.ndim == 1 and one.dtype == np.uint64 and (one[1:] > one[:-1]).all()
            for one in tensors.values()
        )
        if not valid_form:
            raise ValueError("not two ascending lists of image ids")
        return KnownImages(tensors["train"], tensors["valid"])


def _is_in_sorted(id_N: NDArray[np.uint64], id_M: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Like `np.isin`, without its sort: `id_M` ascends already."""
    if not len(id_M):
        return np.zeros(len(id_N), bool)
    position_N = np.minimum(np.searchsorted(id_M, id_N), len(id_M) - 1)
    is_member_N: NDArray[np.bool_] = id_M[position_N] == id_N
    return is_member_N
