"""The cryptographic primitives of secure aggregation, all of the package cryptography."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedloom.errors import MessageError, SettingsError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

KEY_BYTES, SIGNATURE_BYTES, TAG_BYTES = 32, 64, 16
"""Bytes of every key, of a signature, and of what authenticates a ciphertext."""

_NAME = b"fedloom secure aggregation 1"


def require_cryptography() -> None:
    """Check that the package is there.

    Raises:
        SettingsError: It is not.
    """
    try:
        import cryptography.hazmat.primitives  # noqa: F401
    except ImportError:
        raise SettingsError(
            [
                "privacy.secure_aggregation = true needs the package cryptography: "
                "pip install 'fedloom[privacy]'"
            ]
        ) from None


@dataclass(frozen=True)
class Context:
    """What keys and signatures of one sum are bound to, so that none is of use in another.

    Attributes:
        run: Id of the run.
        round: The round, from 1.
        number: Which of the round's sums it is, from 0.
    """

    run: str
    round: int
    number: int

    def bound(self, purpose: str, *more: bytes | int) -> bytes:
        """Return the bytes of a purpose in this context, each part with its length."""
        parts: tuple[bytes | int, ...] = (
            purpose.encode(),
            self.run.encode(),
            self.round,
            self.number,
        )
        found = [_NAME]
        for part in (*parts, *more):
            own = part.to_bytes(8, "big") if isinstance(part, int) else part
            found.append(len(own).to_bytes(4, "big") + own)
        return b"".join(found)


def derived(secret: bytes, info: bytes, size: int = KEY_BYTES) -> bytes:
    """Return ``size`` bytes, up to 8,160, of HKDF-SHA256 (RFC 5869) under ``info``."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(hashes.SHA256(), size, salt=None, info=info).derive(secret)


def expanded(key: bytes, size: int) -> bytes:
    """Return ``size`` bytes of ChaCha20's keystream (RFC 8439) under a key that serves this alone."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

    return Cipher(algorithms.ChaCha20(key, bytes(16)), None).encryptor().update(bytes(size))


def public_key(private: bytes) -> bytes:
    """Return the X25519 public key (RFC 7748) of a private one."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agreed(private: bytes, public: bytes, info: bytes) -> bytes:
    """Return the key that two parties share: X25519, then HKDF-SHA256 under ``info``.

    Raises:
        MessageError: The other's public key has small order, and would make the key known to all.
    """
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    try:
        own, other = (
            X25519PrivateKey.from_private_bytes(private),
            X25519PublicKey.from_public_bytes(public),
        )
        return derived(own.exchange(other), info)
    except ValueError:
        raise MessageError("a public key for secure aggregation is none", "forged") from None


def sealed(key: bytes, text: bytes, bound: bytes) -> bytes:
    """Return ``text`` encrypted by ChaCha20-Poly1305 under a key that serves this alone."""
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    return ChaCha20Poly1305(key).encrypt(bytes(12), text, bound)


def opened(key: bytes, data: bytes, bound: bytes) -> bytes:
    """Return what :func:`sealed` encrypted.

    Raises:
        MessageError: It was made by another, for another, or for another run, round or sum.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), data, bound)
    except InvalidTag:
        raise MessageError(
            "encrypted shares are not of this client, run and round: they are refused", "forged"
        ) from None


def signing_key(private: bytes) -> Ed25519PrivateKey:
    """Return the Ed25519 key (RFC 8032) of 32 private bytes."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(private)


def identity_of(private: bytes) -> bytes:
    """Return the public half, 32 bytes, of a signing key."""
    return signing_key(private).public_key().public_bytes_raw()


def is_signed(public: bytes, signature: bytes, text: bytes) -> bool:
    """Return whether ``signature`` is that of the owner of ``public`` on ``text``."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, text)
    except (InvalidSignature, ValueError):
        return False
    return True


def commitment(context: Context, client: int, seed: bytes) -> bytes:
    """Return the SHA-256 by which a client commits to the seed of its self mask."""
    return hashlib.sha256(context.bound("commitment", client, seed)).digest()
