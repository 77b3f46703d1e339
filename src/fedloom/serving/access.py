"""Who may ask the server: keys, names of hosts, and pages of other sites.

A page of any site can have a browser ask servers on its user's own machine. Such requests carry an
``Origin``; and where a site points its name at 127.0.0.1 (DNS rebinding), a ``Host`` that is that name.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Protocol

from fedloom.display.untrusted_text import short
from fedloom.serving.requests import RequestError

HOST = re.compile(r"(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::[0-9]{1,5})?")
"""Of a header: a name or an address, with or without a port."""

BEARER = "bearer "

ASKED = re.compile(r"[\w, -]{1,1000}", re.ASCII)
"""Names of headers, of which a browser asks whether a page may send them."""


class Headers(Protocol):
    """Headers of a request by name, whatever the case of its letters."""

    def get(self, name: str, /) -> Any:
        """Return the first one of a name, if there is one."""


@dataclass(frozen=True)
class Access:
    """What a request must have to be answered.

    Attributes:
        key: Sent as ``Authorization: Bearer KEY``; none is asked for where it is empty.
        hosts: Names beside ``localhost`` by which the server is called.
        origins: Sites whose pages may ask, such as ``http://localhost:3000``.
    """

    key: str = ""
    hosts: Collection[str] = ()
    origins: Collection[str] = ()

    def check(self, headers: Headers, address: str, *, preflight: bool = False) -> None:
        """Check the headers of a request.

        Args:
            headers: Of the request.
            address: The server's own address in this connection.
            preflight: Whether a browser asks what it may ask; that has no key.

        Raises:
            RequestError: It may not be answered.
        """
        host = headers.get("Host") or ""
        if not self._is_own(host, address):
            raise RequestError(
                403,
                f"the Host {short(host, 100)!r} is none of this server's: call it by its address, or "
                "start it with --allow-host NAME",
            )
        origin = headers.get("Origin")
        if origin is not None and origin not in self.origins:
            raise RequestError(
                403,
                f"pages of {short(origin, 100)!r} may not ask: start the server with --allow-origin "
                "ORIGIN",
            )
        site = (headers.get("Sec-Fetch-Site") or "none").lower()
        if origin is None and site not in ("none", "same-origin"):
            raise RequestError(403, "pages of other sites may not ask")
        if self.key and not preflight and not self._has_key(headers.get("Authorization") or ""):
            raise RequestError(
                401, "Incorrect API key provided", code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    def shared_with(self, origin: str | None, asked: str | None = None) -> dict[str, str]:
        """Return the headers by which a browser lets a page of an allowed site read the reply.

        Args:
            origin: Of the page.
            asked: ``Access-Control-Request-Headers``: what it would send; OpenAI's client in a browser
                sends some of its own.
        """
        if origin is None or origin not in self.origins:
            return {}
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Headers": (
                asked if asked and ASKED.fullmatch(asked) else "Authorization, Content-Type"
            ),
            "Access-Control-Allow-Methods": "GET, POST",
            "Vary": "Origin",
        }

    def _is_own(self, host: str, address: str) -> bool:
        found = HOST.fullmatch(host)
        if found is None:
            return False
        name = (found["six"] or found["name"]).lower().removesuffix(".")
        if name == "localhost" or name in self.hosts:
            return True
        try:
            own = _address(name)
        except ValueError:
            return False
        return own.is_loopback or own == _address(address.partition("%")[0])

    def _has_key(self, sent: str) -> bool:
        if sent[: len(BEARER)].lower() != BEARER:
            return False
        return hmac.compare_digest(sent[len(BEARER) :].strip().encode(), self.key.encode())


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return an address; one of version 4 that a socket of version 6 has is itself.

    Raises:
        ValueError: It is none.
    """
    own = ipaddress.ip_address(text)
    return (own.ipv4_mapped or own) if isinstance(own, ipaddress.IPv6Address) else own
