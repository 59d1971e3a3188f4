"""A bundle, as MLflow serves it.

    column `image`       bytes of encoded images
    or `path`            where they lie, if the host allows it
      -> decoder         in its own process, kept running between requests
      -> body, head      as `score` does
      -> columns         label, probability, labels, probabilities

MLflow runs this file itself (a "model from code": nothing is pickled); no other room imports it.
`tracking` puts it into the model beside the bundle.

Paths come from whoever asks, files from the host. So they are read only if the host's environment
has ARROWHEAD_SERVE_PATHS when the model is loaded: a folder, or a URI, and nothing that lies
elsewhere is opened.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import pandas  # type: ignore[import-untyped]
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from numpy.typing import NDArray

BATCH = 32


class Served(PythonModel):  # type: ignore[misc]  # mlflow has no types
    """Encoded images in, labels out."""

    def load_context(self, context: Any) -> None:
        """Load the bundle, and replay its golden images: a machine that sees them differently
        raises DataError instead of serving.
        """
        import torch

        from arrowhead import bundle, extract, files, score
        from arrowhead.guard import GuardedDecoder

        self._bundle = bundle.load(Path(context.artifacts["bundle"]))
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
        self._body, self._head = self._bundle.make_body(device), self._bundle.make_head(device)
        threads = len(os.sched_getaffinity(0))
        drift = bundle.replay(self._bundle, self._body, self._head, device, threads)
        bundle.must_agree(drift, score.ScoreConfig().max_drift)
        self._decoder = GuardedDecoder(
            extract.pixels_of(score.one_view(self._bundle.recipe)),
            batch_size=BATCH,
            threads=threads,
            device=0 if torch.cuda.is_available() else None,
        )
        self._turn = threading.Lock()
        root = os.environ.get("ARROWHEAD_SERVE_PATHS")
        self._root = files.resolve(root) if root else None

    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """A row per row of `model_input`, which has the column `image` or `path`."""
        from arrowhead import bundle

        images = self._images(model_input)
        with self._turn:  # one decoder, whatever the server's threads
            parts = [self._features(images[at : at + BATCH]) for at in range(0, len(images), BATCH)]
        feature_ND = np.concatenate(parts)
        made = self._bundle
        chance_NC = bundle.probabilities(self._head, feature_ND, made.temperature, multi=made.multi)
        seen_N: Any = np.isfinite(feature_ND).all(axis=1).tolist()
        best = chance_NC.argmax(1).tolist()
        given = made.given(chance_NC).tolist()
        labels = [made.classes[i] if fine else None for i, fine in zip(best, seen_N, strict=True)]
        return pandas.DataFrame(
            {
                # pandas' own text type would make a None NaN, which is no JSON.
                "label": pandas.Series(labels, dtype=object, index=model_input.index),
                "probability": chance_NC.max(1).astype(np.float64),
                "labels": [list(compress(made.classes, row)) for row in given],
                "probabilities": list(chance_NC.astype(np.float64)),
            },
            index=model_input.index,
        )

    def _images(self, rows: pandas.DataFrame) -> list[bytes]:
        """The bytes of each row's image, none where they cannot be had: that row gets no label."""
        given = [name for name in ("image", "path") if name in rows and rows[name].notna().any()]
        if given == ["image"]:
            return [bytes(one) if there else b"" for one, there in _cells(rows["image"])]
        if given == ["path"] and self._root is not None:
            return [
                self._read(self._root, one) if there else b"" for one, there in _cells(rows["path"])
            ]
        if given == ["path"]:
            found = "the rows have paths, and this server opens no files"
        else:
            found = f"the rows have {' and '.join(given) or 'no image'}"
        raise MlflowException.invalid_parameter_value(
            f"{found}. Send the column `image` (the bytes of encoded images) or, where the host was"
            " started with ARROWHEAD_SERVE_PATHS=FOLDER, `path`; one of the two, filled."
        )

    @staticmethod
    def _read(root: str, path: str) -> bytes:
        """The file at a path, as score parts write it: below the root, or whole."""
        from arrowhead import extract, files

        most = extract.ExtractConfig().max_bytes
        if files.in_store(root):
            return files.read(root, path, most)[0]
        top = files.raw(root)
        file = os.path.realpath(os.path.join(top, files.raw(path)))
        if os.path.commonpath([top, file]) != top:
            raise MlflowException.invalid_parameter_value(
                f"{path} is not below the folder that this server may read."
            )
        return files.read(root, files.text(os.path.relpath(file, top)), most)[0]

    def _features(self, images: Sequence[bytes]) -> NDArray[np.float32]:
        """float32 (N, D), NaN where an image cannot be decoded; as `bundle.features` gives them."""
        import torch

        made = self._decoder(images, [bytes(16)] * len(images))
        view = torch.from_numpy(made.views[0]).permute(0, 3, 1, 2)
        out = self._body(view)[: len(images)].cpu().numpy()
        feature_ND: NDArray[np.float32] = out.astype(np.float16).astype(np.float32)
        feature_ND[[fault is not None for fault in made.faults]] = np.nan
        return feature_ND


def _cells(column: pandas.Series) -> Iterator[tuple[Any, bool]]:
    """Each value of a column, and whether there is one: None may have become NaN."""
    return zip(column, column.notna(), strict=True)


set_model(Served())
