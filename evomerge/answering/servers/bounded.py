"""Bounds of a reply: the whole of it arrives within the request's timeout, and is not endless.

The timeout of an HTTP client is for each read, so that a server which sends a byte now and then
holds a request for ever. Here a clock starts with the request, redirects included. It and the
count of bytes belong to the thread, because a request is sent and read by one thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import Any

LARGEST = 32 * 2**20  # bytes of a reply: a list of 300,000 models has 25 MB
BEGAN = "evomerge.began"


class OversizedReply(Exception):
    """A reply that is larger than any answer, or that could be once it is unpacked."""


class _Bounds(threading.local):
    """What is left to the request that this thread is waiting for."""

    deadline = float("inf")  # a time.monotonic()
    room = LARGEST

    def left(self, timeout: float | None) -> float:
        """The seconds that one operation may take. Raises TimeoutError."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the whole reply did not arrive in time")
        return left if timeout is None else min(left, timeout)

    def take(self, size: int) -> None:
        """Count bytes that have arrived. Raises OversizedReply."""
        self.room -= size
        if self.room < 0:
            raise OversizedReply(f"the reply is larger than {LARGEST // 2**20} MB")


_BOUNDS = _Bounds()


class BoundedStream:
    """A network stream of httpcore that reads and writes within the bounds."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data: bytes = self._stream.read(max_bytes, _BOUNDS.left(timeout))
        _BOUNDS.take(len(data))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _BOUNDS.left(timeout))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> BoundedStream:
        left = _BOUNDS.left(timeout)
        return BoundedStream(self._stream.start_tls(ssl_context, server_hostname, left))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class BoundedBackend:
    """A network backend of httpcore whose streams are bounded."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, **options: Any
    ) -> BoundedStream:
        left = _BOUNDS.left(timeout)
        return BoundedStream(self._backend.connect_tcp(host, port, timeout=left, **options))

    def connect_unix_socket(
        self, path: str, timeout: float | None = None, **options: Any
    ) -> BoundedStream:
        left = _BOUNDS.left(timeout)
        return BoundedStream(self._backend.connect_unix_socket(path, timeout=left, **options))

    def sleep(self, seconds: float) -> None:
        self._backend.sleep(seconds)


_contexts: dict[Any, Any] = {}  # TLS contexts by the kind of client that made them


def bounded_http(make_client: Any) -> Any:
    """An HTTP client as openai makes it, with bounds; `make_client` is DefaultHttpxClient.

    httpx takes no network backend, so its pools are given one; test_server_bounds.py notices if
    they are no longer where they were.
    """
    hooks = {"request": [_begin], "response": [_check_encoding]}
    # `True`: a client reads the certificates, which takes longer than its requests
    client = make_client(event_hooks=hooks, verify=_contexts.get(make_client, True))
    transports: Iterable[Any] = [client._transport, *client._mounts.values()]
    for transport in transports:
        if transport is not None:  # a host that no proxy is used for
            pool = transport._pool
            pool._network_backend = BoundedBackend(pool._network_backend)
    _contexts[make_client] = client._transport._pool._ssl_context
    return client


def _begin(request: Any) -> None:
    """Start the clock; a redirect, which inherits the extensions, goes on with it."""
    timeout = request.extensions["timeout"]["read"]
    began = request.extensions.setdefault(BEGAN, time.monotonic())
    _BOUNDS.deadline = float("inf") if timeout is None else began + timeout
    _BOUNDS.room = LARGEST
    request.headers["Accept-Encoding"] = "identity"  # a few packed bytes can be gigabytes


def _check_encoding(response: Any) -> None:
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise OversizedReply(f"the reply is packed ({encoding[:20]}), which was not asked for")
