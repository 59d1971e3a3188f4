"""A bundle as a Ray Serve application: what deploy/kubernetes/ray-service.yaml runs.

    serve run deploy.scoring:build bundle=models:/dogs/1

bundle        a folder that replicas see; or an address in MLflow or a store, which each fetches
max_bytes     of an image (default 20,000,000)

The routes are those of examples/serve.py, in front of the same `Predictor`. A replica replays the
golden images before it answers; one whose machine sees them differently never becomes ready.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ray import serve

from arrowhead.bundle.resolve import bundle_folder
from arrowhead.inference.predictor import Predictor
from arrowhead.tracking.client import TrackingConfig
from examples.serve import serve as routes


def build(asked: dict[str, Any]) -> serve.Application:
    """Ray Serve calls this with the `args` of the application."""

    def ready() -> Any:
        # On the replica: neither a network of torch nor a decoder's process can travel.
        with tempfile.TemporaryDirectory(prefix="arrowhead-bundle-") as scratch:
            predictor = Predictor(
                bundle_folder(str(asked["bundle"]), TrackingConfig(), Path(scratch))
            )
        return routes(predictor, int(asked.get("max_bytes", 20_000_000)))

    made: serve.Application = serve.deployment(name="scorer")(serve.ingress(ready)()).bind()
    return made
