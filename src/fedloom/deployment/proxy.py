"""The HTTP proxy that a client's environment names, and connections through it.

It is configured as for curl: by ``HTTPS_PROXY`` or else ``ALL_PROXY``, and ``NO_PROXY`` has the hosts
that are reached without; a name in lower case counts before one in upper case. Unlike in curl, and as in
browsers, ``localhost`` and loopback addresses are always reached without: for the proxy they are its own
machine.

A tunnel is opened by CONNECT (RFC 9110, section 9.3.6) with credentials by Basic (RFC 7617). What travels
in it is not looked at here: TLS with the server begins inside, so the proxy cannot read it.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import os
import re
import socket
import time
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes
from urllib.request import getproxies_environment, proxy_bypass

from fedloom.deployment.processes import address
from fedloom.errors import ConnectionFailed, SettingsError, first_line
from fedloom.wire.envelope import printable

LONGEST = 8192
"""Bytes of the header with which a proxy may answer."""

PORT = 80
"""Of a proxy whose URL names none: that of ``http://``."""

SHOWN = 200
"""Characters of a stranger's words, or of a wrong value, in a message."""

ENCODED = "with @ : / ? # % in USER and PASSWORD written as %40 %3A %2F %3F %23 %25"

URL = re.compile(
    r"(?:(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://)?"
    r"(?:(?P<user>[^/?#\s\ud800-\udfff]*)@)?"
    r"(?:\[(?P<ipv6>[0-9A-Fa-f:.]+)\]|(?P<host>[^\s:/?#@\[\]]+))"
    r"(?::(?P<port>\d{1,5}))?/?"
)

STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})([^\r\n]*)")

CHALLENGE = re.compile(rb"^proxy-authenticate:([^\r\n]*)", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Proxy:
    """A proxy; as a string HOST:PORT, with no credentials.

    Attributes:
        host: Its name or address.
        port: Where it listens.
        credentials: Value of ``Proxy-Authorization``; empty for none.
    """

    host: str
    port: int
    credentials: str = field(default="", repr=False)

    def __str__(self) -> str:
        return address(self.host, self.port)

    def connect(self, host: str, port: int, timeout: float) -> socket.socket:
        """Return a connection to a port of a host, through this proxy.

        Args:
            host: Name or address; the proxy looks the name up.
            port: Of the host.
            timeout: Seconds until the proxy is reached, and again until it has answered.

        Raises:
            ConnectionFailed: The proxy cannot be reached, refuses, or does not answer as a proxy does.
        """
        target = address(host.encode("idna").decode(), port)
        try:
            connection = socket.create_connection((self.host, self.port), timeout)
        except (OSError, UnicodeError) as error:
            raise ConnectionFailed(
                f"nobody answers at the proxy at {self}: {first_line(error)}; is HTTPS_PROXY right?"
            ) from None
        with contextlib.ExitStack() as closing:
            closing.enter_context(connection)
            try:
                connection.sendall(self._request(target))
                header = _read_header(connection, timeout)
            except OSError as error:
                raise ConnectionFailed(
                    f"the proxy at {self} gave no answer when it was asked for {target}: {error}"
                ) from None
            self._require_opened(target, header)
            connection.settimeout(timeout)
            closing.pop_all()
        return connection

    def _request(self, target: str) -> bytes:
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        if self.credentials:
            lines.append(f"Proxy-Authorization: {self.credentials}")
        return "\r\n".join([*lines, "", ""]).encode()

    def _require_opened(self, target: str, header: bytes) -> None:
        """Check that the proxy says that it has opened a connection.

        Raises:
            ConnectionFailed: It does not.
        """
        found = STATUS.match(header)
        if found is None:
            raise ConnectionFailed(
                f"what listens at {self} is not an HTTP proxy: it answers "
                f"{_shown(header.splitlines()[0])!r}"
            )
        status, told = int(found[1]), _shown(found[1] + found[2])
        if status // 100 == 2:
            return
        if status == 407:
            raise ConnectionFailed(
                self._unauthorized(told, _shown(b",".join(CHALLENGE.findall(header))))
            )
        raise ConnectionFailed(
            f"the proxy at {self} opens no connection to {target}: {told}; is the server started, and "
            "does the proxy allow this host and port? Many allow port 443 alone"
        )

    def _unauthorized(self, told: str, offered: str) -> str:
        if offered and "basic" not in offered.lower():
            return (
                f"the proxy at {self} asks for credentials of a kind that is not supported here: {told} "
                f"({offered}); have its administrator allow Basic, or this machine without credentials"
            )
        does = "refuses the" if self.credentials else "asks for a"
        return (
            f"the proxy at {self} {does} user and password: {told}; set "
            f"HTTPS_PROXY=http://USER:PASSWORD@{self}, {ENCODED}"
        )


def find_proxy(host: str, port: int) -> Proxy | None:
    """Return the proxy by which a port of a host is reached; ``None`` for none.

    Raises:
        SettingsError: The environment names one that cannot be used.
    """
    named = getproxies_environment()
    name = "https" if "https" in named else "all"
    if name not in named or _is_loopback(host):
        return None
    if any(proxy_bypass(own) for own in (host, address(host, port))):
        return None
    return _read_url(f"{name.upper()}_PROXY", named[name])


def bypass_for_loopback() -> None:
    """Make HTTP clients of this process and its children reach this machine without a proxy."""
    known = getproxies_environment().get("no", "")
    if known != "*":
        os.environ["no_proxy"] = ",".join([*filter(None, [known]), "localhost", "127.0.0.1"])


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


def _read_url(name: str, url: str) -> Proxy:
    """Return the proxy of a URL.

    Raises:
        SettingsError: It is not a proxy URL, or of a kind that is not supported.
    """
    found = URL.fullmatch(url)
    port = int(found["port"] or PORT) if found else 0
    if found is None or not 0 < port < 1 << 16:
        raise _wrong(
            name,
            url,
            "it is not a URL of a proxy, such as http://proxy.example.org:3128 or "
            f"http://USER:PASSWORD@proxy.example.org:3128, {ENCODED}",
        )
    if (found["scheme"] or "http").lower() != "http":
        raise _wrong(
            name,
            url,
            "proxies are supported by http:// alone (TLS with the server begins inside of it); name one "
            "that is spoken to so, or the server in NO_PROXY if it can be reached without a proxy",
        )
    return Proxy(found["ipv6"] or found["host"], port, _credentials(found["user"]))


def _credentials(user: str | None) -> str:
    """Return the value of ``Proxy-Authorization`` for the user and password of a URL."""
    if not user:
        return ""
    name, _, password = user.partition(":")
    words = unquote_to_bytes(name) + b":" + unquote_to_bytes(password)
    return f"Basic {base64.b64encode(words).decode()}"


def _wrong(name: str, url: str, reason: str) -> SettingsError:
    """Return what says that a variable is wrong, without user and password."""
    public = re.sub(r"^([^:/?#@]*://)?.*@", r"\1***@", url, flags=re.DOTALL)
    return SettingsError([f"{name} is {printable(public)[:SHOWN]!r}: {reason}"], "the environment")


def _shown(words: bytes) -> str:
    return printable(words.decode("latin-1").strip())[:SHOWN]


def _read_header(connection: socket.socket, seconds: float) -> bytes:
    """Return the header of an HTTP response; what follows it, which is the server's, is left unread.

    Raises:
        OSError: It does not come in time, or is longer than is allowed.
    """
    end, header = time.monotonic() + seconds, bytearray()
    while not header.endswith((b"\r\n\r\n", b"\n\n")):
        if len(header) == LONGEST:
            raise OSError(f"its header has more than {LONGEST} bytes")
        if (left := end - time.monotonic()) <= 0:
            raise TimeoutError("timed out")
        connection.settimeout(left)
        if not (new := connection.recv(1)):
            raise ConnectionAbortedError("it closed the connection")
        header += new
    return bytes(header)
