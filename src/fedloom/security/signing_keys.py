"""Keys by which a client signs in secure aggregation, each certified by the client's own key for one run.

The protocol signs with Ed25519; members of a federation have keys on P-384. So a client derives an
Ed25519 key for each run from its own key, and signs with the latter that it is its own, as this client of
this run. Others who know the fingerprint of its own key can check that, whoever passes it on.
"""

from __future__ import annotations

import base64
import hashlib

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedloom.security.keys import is_signed, public_key, secret_bytes, sign

NAME = "fedloom secure aggregation signing key 1"

PUBLIC_BYTES = 32
"""Bytes of a public Ed25519 key."""


def signing_secret(key: ec.EllipticCurvePrivateKey, run: str) -> bytes:
    """Return the 32 private bytes of a client's Ed25519 key for a run; only the owner of ``key`` can."""
    return secret_bytes(key, NAME, run)


def certificate(
    key: ec.EllipticCurvePrivateKey, run: str, client: int, member: int
) -> tuple[bytes, bytes]:
    """Return a client's public Ed25519 key for a run, 32 bytes, and the signature of its own key on it.

    Args:
        key: The client's own.
        run: Id of the run.
        client: Its number in the run.
        member: Its number as a member of the federation.
    """
    public = Ed25519PrivateKey.from_private_bytes(signing_secret(key, run)).public_key()
    own = public.public_bytes_raw()
    return own, sign(key, _certified(run, client, member, own))


def is_certified(
    line: str, run: str, client: int, member: int, public: bytes, signature: bytes
) -> bool:
    """Return whether the owner of a key, as a line of OpenSSH, says that ``public`` is its key for a run.

    Raises:
        IdentityError: The line holds no key of a client.
    """
    text = _certified(run, client, member, public)
    return len(public) == PUBLIC_BYTES and is_signed(public_key(line), text, signature)


def fingerprint(line: str) -> str:
    """Return the SHA-256 of a public key in a line of OpenSSH, as ``ssh-keygen -l`` writes it.

    Raises:
        IdentityError: It is none.
    """
    form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    content = base64.b64decode(public_key(line).public_bytes(*form).split()[1])
    digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
    return f"SHA256:{digest.rstrip('=')}"


def _certified(run: str, client: int, member: int, public: bytes) -> bytes:
    return "\n".join((NAME, run, str(client), str(member), public.hex())).encode()
