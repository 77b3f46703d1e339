"""How a client proves its key at the gateway, before anything else that it sends is read.

Inside TLS the server sends the first message: a nonce that it has drawn. The client answers with one
claim: what the connection is for, and a signature with its key over the nonce, the server's certificate
as the client was shown it, the purpose and the run. The server replies whether it admits the client.

The nonce makes a claim worthless at any other time, the certificate's hash (the channel binding
``tls-server-end-point``, RFC 5929) at any other server: one that passes on the nonce of another server
gets a signature that names its own certificate. This was chosen over certificates of clients (mutual TLS)
because a client keeps the one key whose public half is registered and needs nothing back that expires;
because an unauthenticated peer costs at most one verification of a signature; and because a refused
client gets a reason in words, which a TLS alert cannot carry.

Nothing here reads or writes a socket.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import Field, ValidationError

from fedloom.errors import IdentityError
from fedloom.security.keys import is_signed, public_key, public_line, sign
from fedloom.settings.schema import Settings
from fedloom.wire.envelope import PROTOCOL

MAGIC = b"fedloom gateway %d\n" % PROTOCOL
NONCE = 32
"""Bytes of a nonce, drawn from the system's source of randomness."""

SERVER_NONCE_FRAME = len(MAGIC) + NONCE

LENGTH = struct.Struct("<H")
"""Length prefix of a claim and of the answer to it."""

LONGEST = 1024
"""Bytes of the longest claim; one of this package has about 700."""

OUT_OF_DATE, AHEAD = 300, 4
"""Seconds by which a client's clock may be behind the server's, and ahead of it.

The proof does not depend on it; but logs of both sides could not be compared otherwise.
"""

FOREIGN = "it does not begin as a fedloom client does"

Purpose = Literal["register", "fleet", "stream"]
"""Purpose of a connection: registration, calls of Flower's Fleet interface, or messages of a run."""


class Claim(Settings):
    """The claim of a client: its key, the purpose, and a signature."""

    key: str = Field(max_length=300, pattern="^ecdsa-sha2-nistp(256|384|521) [A-Za-z0-9+/=]+$")
    """Its public key as one line of OpenSSH."""
    purpose: Purpose
    run: str = Field(default="", pattern="^([0-9a-f]{32})?$")
    """The run whose messages are to be streamed; empty for the other purposes."""
    home: str = Field(pattern="^[0-9a-f]{32}$")
    """Id of the client's folder."""
    time: float
    """Its clock, in seconds since 1970."""
    signature: str = Field(max_length=256, pattern="^([0-9a-f]{2})*$")

    def require_proof(self, nonce: bytes, certificate: bytes) -> None:
        """Check the signature, and that the clocks of both sides agree.

        Args:
            nonce: The one that was sent over this connection.
            certificate: The server's, in DER; empty where there is no TLS.

        Raises:
            IdentityError: It was signed by another key, for another server or connection; or the clock is
                wrong.
        """
        behind = time.time() - self.time
        if not -AHEAD <= behind <= OUT_OF_DATE:  # NaN is in no range
            where, allowed = ("behind", OUT_OF_DATE) if behind > 0 else ("ahead of", AHEAD)
            raise IdentityError(
                f"its clock is {abs(behind):.1f} seconds {where} the server's, {allowed} are allowed: "
                "set the clock that is wrong"
            )
        words = (self.key, self.purpose, self.run, self.home)
        content = _signed(nonce, certificate, words, self.time)
        if not is_signed(public_key(self.key), content, bytes.fromhex(self.signature)):
            raise IdentityError(
                "the signature does not verify with the key that it names, for this server"
            )


@dataclass(frozen=True)
class Distrust:
    """Message of a client that refuses the server: the reason, without the client's identity."""

    reason: str


def make_claim(
    key: ec.EllipticCurvePrivateKey,
    nonce: bytes,
    certificate: bytes,
    purpose: Purpose,
    home: str,
    run: str = "",
) -> bytes:
    """Return the frame of a client's claim; arguments as of :class:`Claim`."""
    line, moment = public_line(key), time.time()
    signature = sign(key, _signed(nonce, certificate, (line, purpose, run, home), moment)).hex()
    claim = Claim(key=line, purpose=purpose, run=run, home=home, time=moment, signature=signature)
    return frame(claim.model_dump(mode="json"))


def make_distrust(reason: str) -> bytes:
    """Return the frame of a client that does not trust the server."""
    return frame({"distrust": reason[:200]})


def read_claim(content: bytes) -> Claim | Distrust:
    """Return the content of the first frame of an unauthenticated peer.

    Raises:
        IdentityError: It is not a frame of this package.
    """
    try:
        table = json.loads(content)
        if isinstance(table, dict) and isinstance(table.get("distrust"), str):
            return Distrust(table["distrust"][:200])
        return Claim.model_validate(table)
    except (ValueError, RecursionError, ValidationError):
        raise IdentityError(FOREIGN) from None


def nonce_of(received: bytes) -> bytes | None:
    """Return the nonce in a server's first message, or ``None`` for another protocol version."""
    return received[len(MAGIC) :] if received.startswith(MAGIC) else None


def protocol_of(received: bytes) -> int | None:
    """Return the protocol version in a gateway's first message, or ``None`` where it is not a gateway."""
    found = re.match(rb"fedloom gateway (\d{1,4})\n", received)
    return int(found[1]) if found else None


def frame(table: dict[str, Any]) -> bytes:
    """Return a small table of plain values with its length before it."""
    content = json.dumps(table).encode()
    return LENGTH.pack(len(content)) + content


def _signed(nonce: bytes, certificate: bytes, words: Sequence[str], moment: float) -> bytes:
    binding = hashlib.sha256(certificate).hexdigest() if certificate else "no TLS"
    all_words = ("fedloom gateway claim 2", nonce.hex(), binding, *words, repr(moment))
    return "\n".join(all_words).encode()
