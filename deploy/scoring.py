"""A bundle as a Ray Serve application, which deploy/kubernetes/ray-service.yaml runs.

    serve run deploy.scoring:build bundle=models:/dogs/1

bundle        a folder that all replicas can read, or an address (MLflow, object store) that each
              replica downloads
max_bytes     the largest image (default 20,000,000)

The routes are those of examples/serve.py, with the same `Predictor`. A replica checks the golden
images before it answers; it never becomes ready if its machine gives different results.
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


def build(args: dict[str, Any]) -> serve.Application:
    """Build the application; Ray Serve calls this with the application's `args`."""

    def make_routes() -> Any:
        # Runs on the replica, because neither a torch module nor a decoder process can be sent.
        with tempfile.TemporaryDirectory(prefix="arrowhead-bundle-") as scratch:
            predictor = Predictor(
                bundle_folder(str(args["bundle"]), TrackingConfig(), Path(scratch))
            )
        return routes(predictor, int(args.get("max_bytes", 20_000_000)))

    scorer: serve.Application = serve.deployment(name="scorer")(serve.ingress(make_routes)()).bind()
    return scorer
