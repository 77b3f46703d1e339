"""Replies over HTTP, of which no more is taken than a reply may be.

Whoever answers may be broken or hostile: a reply has bounds in bytes, in seconds from the first byte sent
to the last one read, and in depth of its JSON. What is kept or shown of it holds no key.
"""

from __future__ import annotations

import json
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import httpcore
import httpx

from fedloom.data.json_rows import is_deep
from fedloom.data.safe_open import DEEPEST
from fedloom.display.untrusted_text import short
from fedloom.errors import JudgeError

LONGEST = 4 << 20
"""Bytes of a reply; a verdict of 512 tokens has some thousands."""

EXCERPT = 200
"""Characters that are shown of what somebody answered."""

SECRET = 8
"""Characters from which on a key is taken out of texts; a shorter one ("none", "test") is not a
secret."""


class ReplyError(Exception):
    """A reply that is none: too long, too late, broken off, or no JSON."""


@dataclass(frozen=True)
class Reply:
    """What somebody answered, within the bounds.

    Attributes:
        status: The HTTP status.
        headers: As they came, by name in small letters.
        content: The body, at most :data:`LONGEST` bytes.
    """

    status: int
    headers: Mapping[str, str]
    content: bytes

    def json(self) -> Any:
        """Return the body as JSON.

        Raises:
            ReplyError: It is none, or nested deeper than any reply.
        """
        try:
            text = self.content.decode()
            if is_deep(text):
                raise ReplyError(f"a reply that is nested deeper than {DEEPEST} brackets")
            return json.loads(text)
        except ValueError:  # no JSON, no UTF-8, or a number of thousands of digits
            raise ReplyError("a reply that is not JSON") from None


class Caller:
    """Sends requests with a key, several at once, and reads replies within bounds."""

    def __init__(
        self, seconds: float, key: str | None = None, transport: httpx.BaseTransport | None = None
    ) -> None:
        """Prepare a client; nothing is sent yet.

        Args:
            seconds: For one request in all: connecting, sending, and the whole reply.
            key: Sent as a bearer token, and taken out of all that is shown.
            transport: Instead of the network.

        Raises:
            JudgeError: No header can hold the key.
        """
        self._seconds, self._key = seconds, (key or "").strip()
        if not self._key.isascii() or not self._key.isprintable() or " " in self._key:
            raise JudgeError(
                "the judge's key holds blanks or characters that no HTTP header takes; set it anew"
            )
        headers = {"accept-encoding": "identity"}  # a packed reply may unpack to any size
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        self._clock = _Clock()
        self._client = httpx.Client(timeout=seconds, headers=headers, transport=transport)
        for own in (self._client._transport, *self._client._mounts.values()):  # proxies' too
            pool = getattr(own, "_pool", None)
            if pool is not None:
                pool._network_backend = _Backend(self._clock.left)
        weakref.finalize(
            self, self._client.close
        )  # connections are kept from one request to the next

    def __repr__(self) -> str:
        """Show no key."""
        return f"Caller({self._seconds:g} s)"

    def send(self, method: str, url: str, body: object = None) -> Reply:
        """Return the reply to a request.

        Raises:
            ReplyError: There is none within the bounds.
        """
        self._clock.start(self._seconds)
        try:
            with self._client.stream(method, url, json=body) as response:
                return Reply(response.status_code, dict(response.headers), self._read(response))
        except httpx.TimeoutException:
            raise ReplyError(f"no reply within {self._seconds:g} s") from None
        except (
            httpx.TransportError,
            OSError,
            ValueError,
        ) as error:  # of names that none can ask for
            raise ReplyError(self.shown(f"{type(error).__name__}: {error}")) from None

    def clean(self, text: str) -> str:
        """Return a text without the key, whoever has put it there."""
        return text.replace(self._key, "[key]") if len(self._key) >= SECRET else text

    def shown(self, text: str) -> str:
        """Return somebody's words as they are shown: the beginning, on one line, without the key."""
        return short(self.clean(text[: 4 * EXCERPT]), EXCERPT)

    def _read(self, response: httpx.Response) -> bytes:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise ReplyError("a reply that is packed, and was not to be")
        parts, size = [], 0
        for part in response.iter_raw():
            size += len(part)
            if size > LONGEST:
                raise ReplyError(f"a reply of more than {LONGEST >> 20} MiB")
            if self._clock.left() <= 0:
                raise ReplyError(f"no reply within {self._seconds:g} s")
            parts.append(part)
        return b"".join(parts)


class _Clock(threading.local):
    """Until when a thread's own request may take."""

    end = 0.0

    def start(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


class _Backend(httpcore.NetworkBackend):
    """Connections whose every step may take what is left of a request's seconds.

    httpx bounds each read by itself, so that a server which sends a byte a second is never late.
    """

    def __init__(self, left: Callable[[], float]) -> None:
        self._left, self._inner = left, httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        stream = self._inner.connect_tcp(
            host, port, max(self._left(), 0.001), local_address, socket_options
        )
        return _Stream(stream, self._left)


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream, left: Callable[[], float]) -> None:
        self._inner, self._left = inner, left

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        if self._left() <= 0:
            raise httpcore.ReadTimeout("the request's time is up")
        return self._inner.read(max_bytes, self._left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if self._left() <= 0:
            raise httpcore.WriteTimeout("the request's time is up")
        self._inner.write(buffer, self._left())

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        secured = self._inner.start_tls(ssl_context, server_hostname, max(self._left(), 0.001))
        return _Stream(secured, self._left)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)
