"""Serve a bundle over HTTP, on this machine only unless you set --host. FastAPI and uvicorn come
with MLflow, which Arrowhead needs anyway.

    python examples/serve.py out/bundle
    curl --data-binary @photo.jpg http://127.0.0.1:8000/predict
    curl -F file=@photo.jpg http://127.0.0.1:8000/predict

Memory is bounded by --max-requests times --max-bytes: further requests get status 503 until one is
done. A client that needs more than --seconds to send its request gets status 408, or is
disconnected. After SIGTERM, open requests have five seconds to finish. There is no login and no
encryption: put a proxy with both in front before you choose a --host that others can reach.
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

MAX_FORM_OVERHEAD_BYTES = 10_000  # of a form, besides its file
MAX_CONNECTIONS = 256


def serve(
    predictor: Predictor, max_bytes: int, *, max_requests: int = 16, seconds: float = 20.0
) -> FastAPI:
    """Build the app with its routes.

    Args:
        max_bytes: The largest image; a longer body is refused before all of it is read.
        max_requests: How many requests are read and answered at a time.
        seconds: How long a client may take to send the body.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        predictor.close()

    app = FastAPI(title="Arrowhead", lifespan=lifespan)
    classes = predictor.bundle.classes
    semaphore = asyncio.Semaphore(max_requests)

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        """Predict the labels of an encoded image, which is the body or the file of a form."""
        if semaphore.locked():
            raise HTTPException(503, "busy: try again", {"Retry-After": "1"})
        async with semaphore:
            image = await read_image(request, max_bytes, seconds)
            prediction = await run_in_threadpool(predictor, [image])
        if prediction.faults[0]:
            raise HTTPException(422, prediction.faults[0])
        probabilities = dict(zip(classes, prediction.probabilities[0].tolist(), strict=True))
        label = max(probabilities, key=probabilities.__getitem__)
        return {
            "label": label,
            "probability": probabilities[label],
            "labels": list(compress(classes, prediction.labels[0])),
            "probabilities": probabilities,
        }

    return app


async def read_image(request: Request, max_bytes: int, seconds: float) -> bytes:
    """Read the image of a request, with a limit on its size and on the time."""
    content_type = request.headers.get("content-type", "")
    is_form = content_type.lower().startswith("multipart/form-data")
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes + is_form * MAX_FORM_OVERHEAD_BYTES:
                    raise HTTPException(413, f"too large: more than {max_bytes} bytes")
    except TimeoutError as error:
        raise HTTPException(408, f"too slow: not complete after {seconds:.0f} s") from error
    image = file_of_form(bytes(body), content_type) if is_form else bytes(body)
    if len(image) > max_bytes:
        raise HTTPException(413, f"too large: more than {max_bytes} bytes")
    return image


def file_of_form(body: bytes, content_type: str) -> bytes:
    """The only file of a form (RFC 7578); `content_type` names the boundary."""
    header = Message()
    header["Content-Type"] = content_type
    boundary = str(header.get_param("boundary", "")).encode("latin-1", "replace")
    parts = (b"\r\n" + body).split(b"\r\n--" + boundary)
    if not boundary or len(parts) < 3 or not parts[-1].startswith(b"--"):
        raise HTTPException(400, "the form is incomplete or has no boundary")
    files = []
    for part in parts[1:-1]:
        head, _, content = part.partition(b"\r\n\r\n")
        if BytesHeaderParser().parsebytes(head.lstrip()).get_filename() is not None:
            files.append(content)
    if len(files) != 1:
        raise HTTPException(
            400, f"the form has {len(files)} files: send one, as with `curl -F file=@…`"
        )
    return files[0]


def http_with_timeout(seconds: float) -> type[H11Protocol]:
    """uvicorn's HTTP protocol with a timeout: it disconnects a client that does not send the head
    of a request. uvicorn itself waits for it without limit.
    """

    class HttpWithTimeout(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.loop.call_later(seconds, self.check)

        def check(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()
            elif not self.transport.is_closing():
                self.loop.call_later(seconds, self.check)

    return HttpWithTimeout


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("bundle", type=Path, help="the bundle that `arrowhead fit` wrote")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max-bytes", type=int, default=20_000_000, help="the largest image")
    parser.add_argument("--max-requests", type=int, default=16, help="requests at a time")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="time for a client to send its request"
    )
    args = parser.parse_args()
    uvicorn.run(
        serve(
            Predictor(args.bundle),
            args.max_bytes,
            max_requests=args.max_requests,
            seconds=args.seconds,
        ),
        host=args.host,
        port=args.port,
        http=http_with_timeout(args.seconds),
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=5,
    )
