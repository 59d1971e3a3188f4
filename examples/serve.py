"""A bundle behind HTTP, on this machine only unless told otherwise. FastAPI and uvicorn come with
MLflow, which Arrowhead needs anyway.

    python examples/serve.py out/bundle
    curl --data-binary @photo.jpg http://127.0.0.1:8000/predict

There is no login and no encryption: put it behind something that has both before giving it a
--host that others can reach.
"""

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import compress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool

from arrowhead.predict import Predictor


def serve(predictor: Predictor, most: int) -> FastAPI:
    """most: bytes of an image; a longer body is refused before it is all here."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        predictor.close()

    app = FastAPI(title="Arrowhead", lifespan=life)
    classes = predictor.bundle.classes

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        """The encoded image is the body; its labels are the answer."""
        image = bytearray()
        async for piece in request.stream():
            image += piece
            if len(image) > most:
                raise HTTPException(413, f"too large: more than {most} bytes")
        made = await run_in_threadpool(predictor, [bytes(image)])
        if made.faults[0]:
            raise HTTPException(422, made.faults[0])
        chances = dict(zip(classes, made.probabilities[0].tolist(), strict=True))
        label = max(chances, key=chances.__getitem__)
        return {
            "label": label,
            "probability": chances[label],
            "labels": list(compress(classes, made.given[0])),
            "probabilities": chances,
        }

    return app


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    flags.add_argument("bundle", type=Path, help="what `arrowhead fit` wrote: OUT/bundle")
    flags.add_argument("--host", default="127.0.0.1")
    flags.add_argument("--port", type=int, default=8000)
    flags.add_argument("--max-bytes", type=int, default=20_000_000, help="of an image")
    asked = flags.parse_args()
    uvicorn.run(serve(Predictor(asked.bundle), asked.max_bytes), host=asked.host, port=asked.port)
