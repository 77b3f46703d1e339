"""Keys and signatures: a client authenticates with its private key, whose public key the server has.

Keys of clients are elliptic curves, P-384, as Flower requires.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import pwd
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec

from fedloom.errors import IdentityError, OutputError, first_line
from fedloom.storage.files import write_atomically

ALGORITHM = ec.ECDSA(hashes.SHA384())


def make_key(path: Path) -> Path:
    """Create a client's key at ``path`` and its public key beside it; return the latter's path.

    Raises:
        OutputError: The file exists already, or cannot be written.
    """
    if path.exists():
        raise OutputError(f"{path} is there already; a key is never written over")
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.OpenSSH, pem.NoEncryption())
    public = key.public_key().public_bytes(pem.Encoding.OpenSSH, pem.PublicFormat.OpenSSH)
    write_atomically(path, private)
    write_atomically(path.with_suffix(".pub"), public + b"\n", mode=0o644)
    return path.with_suffix(".pub")


def read_key(path: Path, maker: str = "fedloom keys new") -> ec.EllipticCurvePrivateKey:
    """Return the private key in a file, a client's or the server's.

    Args:
        path: The file.
        maker: The command that makes such a key.

    Raises:
        IdentityError: It is missing, may not be read, or is of another kind.
    """
    try:
        content = read_bytes(path)
        load = pem.load_ssh_private_key if b"OPENSSH" in content else pem.load_pem_private_key
        key = load(content, None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityError(
            f"no key can be read from {path}: {first_line(error)}; `{maker}` makes one"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{path} holds a key of another kind; `{maker}` makes one")
    return key


def sign(key: ec.EllipticCurvePrivateKey, content: bytes) -> bytes:
    """Return a signature (ECDSA with SHA-384)."""
    return key.sign(content, ALGORITHM)


def secret_number(key: ec.EllipticCurvePrivateKey, *words: str) -> int:
    """Return a number in [0, 2**63) that only the owner of the key can derive from ``words``.

    Source: HMAC (RFC 2104) with SHA-256, keyed by the private key.
    """
    return int.from_bytes(secret_bytes(key, "fedloom secret number", *words)[:8], "big") >> 1


def secret_bytes(key: ec.EllipticCurvePrivateKey, *words: str) -> bytes:
    """Return 32 bytes that only the owner of the key can derive from ``words``, as above."""
    own = key.private_numbers().private_value.to_bytes(48, "big")
    return hmac.digest(own, "|".join(words).encode(), "sha256")


def is_signed(key: ec.EllipticCurvePublicKey, content: bytes, signature: bytes) -> bool:
    """Return whether a signature verifies with a public key over a content."""
    try:
        key.verify(signature, content, ALGORITHM)
    except InvalidSignature:
        return False
    return True


def public_pem(line: str) -> bytes:
    """Return a public key, given as a line of OpenSSH, in PEM.

    Raises:
        IdentityError: It is none of this kind.
    """
    return public_key(line).public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)


def public_line(key: ec.EllipticCurvePrivateKey) -> str:
    """Return the public key of a private key as a line in OpenSSH format."""
    public = key.public_key()
    return public.public_bytes(pem.Encoding.OpenSSH, pem.PublicFormat.OpenSSH).decode()


def public_key(line: str) -> ec.EllipticCurvePublicKey:
    """Return the public key in a line of OpenSSH.

    Raises:
        IdentityError: It is none, or of another kind.
    """
    try:
        key = pem.load_ssh_public_key(line.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        if "PRIVATE KEY" in line:
            raise IdentityError(
                "this is a private key, which stays with its owner: give NAME.pub, which `fedloom keys "
                "new` writes beside it"
            ) from error
        raise IdentityError(
            "this is not a public key of OpenSSH, as `fedloom keys new` writes one to NAME.pub"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise IdentityError("the public key is of another kind; `fedloom keys new` makes one")
    return key


def read_bytes(path: Path) -> bytes:
    """Return what is in a file.

    Raises:
        IdentityError: It may not be read; what to do differs from a missing file.
        OSError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except PermissionError:
        raise IdentityError(_whose(path)) from None


def _whose(path: Path) -> str:
    """Return why a file may not be read: the owner of the file or of a parent folder, and what to do."""
    closed = path
    while True:
        with contextlib.suppress(PermissionError):
            owner = closed.stat().st_uid
            break
        closed = closed.parent
    number = os.geteuid()
    here, there = _user(number), _user(owner)
    if owner == number:
        return (
            f"{path} cannot be read, though {closed} belongs to {here}, as this does; see its mode"
        )
    return (
        f"{path} cannot be read: {closed} belongs to {there}, and this runs as {here}; "
        f"`chown -R {number} {closed}`, or run it as {there}"
    )


def _user(number: int) -> str:
    """Return a user's number, and its name where it has one."""
    with contextlib.suppress(KeyError):
        return f"{pwd.getpwuid(number).pw_name} (user {number})"
    return f"user {number}"


def private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """Return a private key as PEM, not encrypted."""
    return key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
