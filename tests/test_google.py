"""gs://: names survive, changes are detected, short outages are retried.

The client is gcsfs. The server is a small one of ours for the requests of Google's JSON API that
are made (list, get, get with alt=media, upload on a condition, delete). Nothing here ran against
Google's servers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from arrowhead import ConfigError
from arrowhead.data import mirrors, reading, remote_folder, sources

ODD_NAMES = ("a b.jpg", "caf\u00e9 \U0001f415.jpg", "100%25+&.jpg", "q?generation=7.jpg")


class Bucket:
    """The objects of a bucket with their generations, and how often each request fails."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.unavailable: dict[str, int] = {}
        self.torn: dict[str, int] = {}
        self.asked: list[str] = []
        self._generation = 1_700_000_000_000_000

    def put(self, name: str, data: bytes) -> None:
        """Write an object: a new generation."""
        self._generation += 1
        self.objects[name] = data, self._generation

    def resource(self, name: str) -> dict[str, str]:
        """The metadata of an object as Google returns it (storage#object)."""
        data, generation = self.objects[name]
        md5 = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return {
            "kind": "storage#object",
            "bucket": "b",
            "name": name,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "md5Hash": md5,
            "etag": f"e{generation}",
            # The same for all, so that it shows no change; the age of a lock counts.
            "updated": now if name.endswith(".lock") else "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }


def _handler(bucket: Bucket) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            _, _, name = url.path.partition("/b/b/o")
            name = unquote(name.removeprefix("/"))
            bucket.asked.append(self.path)
            if "/b/b/o" not in url.path or (name and name not in bucket.objects):
                self._answer(404, b'{"error": {"code": 404, "message": "Not Found"}}')
            elif not name:
                self._list(query)
            elif bucket.unavailable.get(name, 0) > 0:
                bucket.unavailable[name] -= 1
                self._answer(503, b'{"error": {"code": 503, "message": "again, please"}}')
            elif query.get("alt") != "media":
                self._answer(200, json.dumps(bucket.resource(name)).encode())
            elif query.get("generation", "") not in ("", str(bucket.objects[name][1])):
                self._answer(404, b'{"error": {"code": 404, "message": "No such generation"}}')
            else:
                data = bucket.objects[name][0]
                first, _, last = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
                part = data[int(first or 0) : int(last) + 1 if last else None]
                truncated = bucket.torn.get(name, 0) > 0
                bucket.torn[name] = bucket.torn.get(name, 0) - 1
                self._answer(206 if first else 200, part, torn=truncated)

        def do_POST(self) -> None:
            """An upload of type media, on a condition."""
            url = urlsplit(self.path)
            query = {name: values[0] for name, values in parse_qs(url.query).items()}
            data = self.rfile.read(int(self.headers["Content-Length"]))
            name, wanted = query["name"], query.get("ifGenerationMatch")
            bucket.asked.append(self.path)
            if bucket.unavailable.get(name, 0) > 0:
                bucket.unavailable[name] -= 1
                self._answer(503, b'{"error": {"code": 503, "message": "again, please"}}')
            elif wanted not in (None, str(bucket.objects.get(name, (b"", 0))[1])):
                message = {"code": 412, "message": "conditionNotMet"}
                self._answer(412, json.dumps({"error": message}).encode())
            else:
                bucket.put(name, data)
                self._answer(200, json.dumps(bucket.resource(name)).encode())

        def do_DELETE(self) -> None:
            name = unquote(urlsplit(self.path).path.partition("/b/b/o/")[2])
            found = bucket.objects.pop(name, None)
            self._answer(404 if found is None else 204, b"")

        def _list(self, query: dict[str, str]) -> None:
            prefix = query.get("prefix", "")
            names = sorted(n for n in bucket.objects if n.startswith(prefix))
            start = int(query.get("pageToken", 0))
            below = []
            if query.get("delimiter"):
                below = sorted(
                    {n[: n.index("/", len(prefix)) + 1] for n in names if "/" in n[len(prefix) :]}
                )
                names = [n for n in names if "/" not in n[len(prefix) :]]
            page = [bucket.resource(name) for name in names[start : start + 3]]
            more = {"nextPageToken": str(start + 3)} if start + 3 < len(names) else {}
            self._answer(
                200,
                json.dumps(
                    {"kind": "storage#objects", "items": page, "prefixes": below} | more
                ).encode(),
            )

        def _answer(self, code: int, data: bytes, torn: bool = False) -> None:
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if torn else data)
            if torn:
                self.close_connection = True

        def log_message(self, *words: Any) -> None:
            """Nothing."""

    return Handler


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """An empty bucket `b`, and an environment in which gs://b leads to it."""
    pytest.importorskip("gcsfs")
    result = Bucket()
    with ThreadingHTTPServer(("127.0.0.1", 0), _handler(result)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield result
        server.shutdown()
        thread.join()


def test_class_folders_on_gs_are_listed_and_read(bucket: Bucket) -> None:
    keys = [f"d/cat/{name}" for name in ODD_NAMES] + [
        "d/dog/1.jpg",
        "d/dog/1.txt",
        "d/.git/x",
        "e/no.jpg",
    ]
    for key in keys:
        bucket.put(key, key.encode())
    catalog = sources.labelled_catalog("gs://b/d")
    assert catalog.paths == sorted([f"cat/{name}" for name in ODD_NAMES] + ["dog/1.jpg"])
    assert (catalog.classes, catalog.ignored) == (["cat", "dog"], 2)
    for row, path in enumerate(catalog.paths):
        assert catalog.read_file(row, 99) == (f"d/{path}".encode(), None)
    assert catalog.read_file(0, 2)[1] == f"too large: {catalog.sizes[0]} bytes, more than 2"
    assert sources.labelled_catalog("gs://b/d/").stamps.tolist() == catalog.stamps.tolist()
    with pytest.raises(ConfigError, match="holds nothing"):
        sources.labelled_catalog("gs://b/nowhere")


def test_an_object_that_was_overwritten_is_a_fault_even_with_equal_size_and_time(
    bucket: Bucket,
) -> None:
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        bucket.put(f"d/{name}", name.encode())
    before = sources.unlabelled_catalog("gs://b/d")
    bucket.put("d/1.jpg", b"other")
    bucket.put("d/2.jpg", b"longer than it was")
    del bucket.objects["d/3.jpg"]
    assert before.read_file(0, 99) == (b"", "changed: it was written again after it was listed")
    assert before.read_file(1, 99)[1] == "changed: it had 5 bytes when it was listed, now it has 18"
    assert before.read_file(2, 99) == (b"", "unreadable: No such file or directory")
    after = sources.unlabelled_catalog("gs://b/d")
    assert after.stamps[0] != before.stamps[0]
    assert after.read_file(0, 99) == (b"other", None)


def test_the_generation_that_was_checked_is_the_one_that_is_read(bucket: Bucket) -> None:
    bucket.put("d/1.jpg", b"first")
    reading.read_file("gs://b/d", "1.jpg", 99)
    generation = bucket.objects["d/1.jpg"][1]
    assert any(f"generation={generation}" in path for path in bucket.asked)


def test_short_outages_of_the_server_are_retried(bucket: Bucket) -> None:
    bucket.put("d/away.jpg", b"a" * 1000)
    bucket.put("d/torn.jpg", b"t" * 1000)
    catalog = sources.unlabelled_catalog("gs://b/d")
    bucket.unavailable["d/away.jpg"] = 1
    bucket.torn["d/torn.jpg"] = 1
    assert catalog.read_file(0, 9999) == (b"a" * 1000, None)
    assert catalog.read_file(1, 9999) == (b"t" * 1000, None)
    assert bucket.torn["d/torn.jpg"] < 0


def test_folder_on_gs_is_written_on_conditions_by_one_writer(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ARROWHEAD_CACHE_DIR", str(tmp_path / "one"))
    path = remote_folder.check_output(Path("gs://b/pets/store"), "store")
    bucket.put("pets/store/.lock", b'{"host": "another", "pid": 1}')
    with (
        pytest.raises(ConfigError, match="another Arrowhead command"),
        remote_folder.of(path).lock(),
    ):
        pass
    del bucket.objects["pets/store/.lock"]
    folder = remote_folder.of(path)
    with folder.lock():
        bucket.unavailable = {"pets/store/manifest.json": 2}
        with folder.atomic_write(path / "manifest.json", guarded=True) as draft:
            draft.write_text("first")
        with folder.atomic_write(path / "shards" / "a.arrow") as draft:
            draft.write_text("a")
        bucket.put("pets/store/manifest.json", b"of another")
        with (
            pytest.raises(ConfigError, match="was written by another command"),
            folder.atomic_write(path / "manifest.json", guarded=True) as draft,
        ):
            draft.write_text("second")
    assert {name: data for name, (data, _) in bucket.objects.items()} == {
        "pets/store/manifest.json": b"of another",
        "pets/store/shards/a.arrow": b"a",
    }
    folder.refresh()
    assert (path / "manifest.json").read_bytes() == b"of another"
    assert folder.names("shards") == {"a.arrow"} and folder.size() == 11
    monkeypatch.setenv("ARROWHEAD_CACHE_DIR", str(tmp_path / "another"))
    other = mirrors.here(path)
    remote_folder.of(other).fetch_all()
    assert (other / "shards" / "a.arrow").read_bytes() == b"a"
    remote_folder.of(other).remove(other / "shards" / "a.arrow")
    assert "pets/store/shards/a.arrow" not in bucket.objects
