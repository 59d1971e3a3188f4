"""A local S3 server (moto's) for tests."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest


def start_s3_server() -> Iterator[str]:
    """Yield the address of a local S3 server, and end it afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-p", str(port)]
    environment = subprocess.DEVNULL
    with subprocess.Popen(command, stdout=environment, stderr=environment) as process:
        try:
            for _ in range(600):
                assert process.poll() is None
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def s3_bucket(server: str, monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """An empty bucket as a boto3 resource, and environment variables that point to it."""
    boto3 = pytest.importorskip("boto3")
    for variable in [variable for variable in os.environ if variable.startswith("AWS_")]:
        monkeypatch.delenv(variable)
    for variable, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(variable, value)
    result = boto3.resource("s3").Bucket(f"b{abs(hash(name))}")
    result.create()
    return result
