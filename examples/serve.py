"""A bundle behind HTTP, on this machine only unless told otherwise. FastAPI and uvicorn come with
MLflow, which Arrowhead needs anyway.

    python examples/serve.py out/bundle
    curl --data-binary @photo.jpg http://127.0.0.1:8000/predict
    curl -F file=@photo.jpg http://127.0.0.1:8000/predict

Memory is bounded by --max-requests times --max-bytes: further requests are answered 503 until one
is done. A client that is slower than --seconds with its request is answered 408, or hung up on.
SIGTERM finishes what is in hand, for five seconds at most. There is no login and no encryption: put
it behind something that has both before giving it a --host that others can reach.
"""

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.message import Message
from email.parser import BytesHeaderParser
from itertools import compress
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from uvicorn.protocols.http.h11_impl import H11Protocol

from arrowhead.inference.predictor import Predictor

FORM_BYTES = 10_000  # that a form may have besides its file
CONNECTIONS = 256


def serve(predictor: Predictor, most: int, *, requests: int = 16, seconds: float = 20.0) -> FastAPI:
    """The routes. most: bytes of an image; a longer body is refused before it is all here.
    requests: how many are read and answered at a time. seconds: that a body may take.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        predictor.close()

    app = FastAPI(title="Arrowhead", lifespan=life)
    classes = predictor.bundle.classes
    places = asyncio.Semaphore(requests)

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        """The encoded image is the body, or the file of a form; its labels are the answer."""
        if places.locked():
            raise HTTPException(503, "busy: try again", {"Retry-After": "1"})
        async with places:
            image = await encoded(request, most, seconds)
            made = await run_in_threadpool(predictor, [image])
        if made.faults[0]:
            raise HTTPException(422, made.faults[0])
        probabilities = dict(zip(classes, made.probabilities[0].tolist(), strict=True))
        label = max(probabilities, key=probabilities.__getitem__)
        return {
            "label": label,
            "probability": probabilities[label],
            "labels": list(compress(classes, made.labels[0])),
            "probabilities": probabilities,
        }

    return app


async def encoded(request: Request, most: int, seconds: float) -> bytes:
    """The image of a request, read in time and no further than it may be long."""
    kind = request.headers.get("content-type", "")
    is_form = kind.lower().startswith("multipart/form-data")
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > most + is_form * FORM_BYTES:
                    raise HTTPException(413, f"too large: more than {most} bytes")
    except TimeoutError as error:
        raise HTTPException(408, f"too slow: not here in {seconds:.0f} s") from error
    image = uploaded(bytes(body), kind) if is_form else bytes(body)
    if len(image) > most:
        raise HTTPException(413, f"too large: more than {most} bytes")
    return image


def uploaded(body: bytes, kind: str) -> bytes:
    """The one file of a form (RFC 7578). kind: its Content-Type, which names the boundary."""
    header = Message()
    header["Content-Type"] = kind
    boundary = str(header.get_param("boundary", "")).encode("latin-1", "replace")
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary)
    if not boundary or len(parts) < 3 or not parts[-1].startswith(b"--"):
        raise HTTPException(400, "a form that breaks off, or has no boundary")
    files = []
    for part in parts[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        if BytesHeaderParser().parsebytes(head.lstrip()).get_filename() is not None:
            files.append(content)
    if len(files) != 1:
        raise HTTPException(400, f"a form with {len(files)} files: give one, as `curl -F file=@…`")
    return files[0]


def impatient(seconds: float) -> type[H11Protocol]:
    """uvicorn's HTTP, which hangs up on who has not sent the head of a request after so long:
    by itself it waits for it for ever.
    """

    class Impatient(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.loop.call_later(seconds, self.look)

        def look(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()
            elif not self.transport.is_closing():
                self.loop.call_later(seconds, self.look)

    return Impatient


if __name__ == "__main__":
    flags = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    flags.add_argument("bundle", type=Path, help="what `arrowhead fit` wrote: OUT/bundle")
    flags.add_argument("--host", default="127.0.0.1")
    flags.add_argument("--port", type=int, default=8000)
    flags.add_argument("--max-bytes", type=int, default=20_000_000, help="of an image")
    flags.add_argument("--max-requests", type=int, default=16, help="at a time")
    flags.add_argument(
        "--seconds", type=float, default=20.0, help="that a request may take to come"
    )
    given = flags.parse_args()
    uvicorn.run(
        serve(
            Predictor(given.bundle),
            given.max_bytes,
            requests=given.max_requests,
            seconds=given.seconds,
        ),
        host=given.host,
        port=given.port,
        http=impatient(given.seconds),
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=5,
    )
