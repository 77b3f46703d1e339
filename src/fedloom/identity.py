"""Who is who between machines: an authority, the server's certificate, clients' keys.

The server proves itself by a certificate of the federation's own authority (``ca.pem``, which clients
are given), a client by its private key, whose public half the server knows. Keys are elliptic curves:
P-256 for certificates, P-384 for clients (what Flower asks for).
"""

from __future__ import annotations

import contextlib
import datetime
import hmac
import ipaddress
import os
import pwd
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedloom.errors import IdentityError, OutputError, first_line
from fedloom.files import write_whole
from fedloom.shown import quoted

CA, CA_KEY = "ca.pem", "ca.key"
CERTIFICATE, KEY = "server.pem", "server.key"
DAYS = 365
LONGEST_HOST, LABEL = 253, r"[A-Za-z0-9*-]{1,63}"
"""Characters of a machine's name in all, and what stands between its dots (RFC 1035, 2.3.4)."""
ALGORITHM = ec.ECDSA(hashes.SHA384())


def make_authority(folder: Path, hosts: Sequence[str], days: int = DAYS) -> None:
    """Make an authority, unless it is there, and a new certificate of the server.

    Args:
        folder: Where they go.
        hosts: Names and addresses by which clients reach the server.
        days: That the certificate is good for; the authority is for ten times as long.

    Raises:
        OutputError: They cannot be written.
        IdentityError: The authority that is there cannot be read, or a host is no name or address.
    """
    names = x509.SubjectAlternativeName([_alternative(host) for host in hosts])
    now = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=5)
    if not (folder / CA).exists():
        own = ec.generate_private_key(ec.SECP256R1())
        name = _name("fedloom federation")
        builder = _certificate(name, name, own, now, days * 10)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(x509.BasicConstraints(True, 0), True)
        builder = builder.add_extension(usage, True)
        subject = x509.SubjectKeyIdentifier.from_public_key(own.public_key())
        signed = builder.add_extension(subject, False).sign(own, hashes.SHA256())
        write_whole(folder / CA_KEY, _private_pem(own))
        write_whole(folder / CA, signed.public_bytes(pem.Encoding.PEM), mode=0o644)
    authority = read_certificate(folder / CA)
    try:
        signer: Any = pem.load_pem_private_key(_read(folder / CA_KEY), None)
    except (OSError, ValueError, TypeError) as error:
        raise IdentityError(
            f"the authority's key {folder / CA_KEY} cannot be read: {first_line(error)}"
        ) from None
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _certificate(_name(hosts[0]), authority.subject, key, now, days)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    builder = builder.add_extension(names, False).add_extension(issuer, False)
    builder = builder.add_extension(purpose, False)
    builder = builder.add_extension(x509.BasicConstraints(False, None), True)
    signed = builder.sign(signer, hashes.SHA256())
    write_whole(folder / KEY, _private_pem(key))
    write_whole(folder / CERTIFICATE, signed.public_bytes(pem.Encoding.PEM), mode=0o644)


def make_key(path: Path) -> Path:
    """Make a client's key at ``path`` and its public half beside it; return the latter's path.

    Raises:
        OutputError: One is there already, or it cannot be written.
    """
    if path.exists():
        raise OutputError(f"{path} is there already; a key is never written over")
    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.OpenSSH, pem.NoEncryption())
    public = key.public_key().public_bytes(pem.Encoding.OpenSSH, pem.PublicFormat.OpenSSH)
    write_whole(path, private)
    write_whole(path.with_suffix(".pub"), public + b"\n", mode=0o644)
    return path.with_suffix(".pub")


def read_key(path: Path, maker: str = "fedloom keys new") -> ec.EllipticCurvePrivateKey:
    """Return the private key in a file, a client's or the server's.

    Args:
        path: The file.
        maker: The command that makes such a key.

    Raises:
        IdentityError: There is none, it may not be read, or it is of another kind.
    """
    try:
        content = _read(path)
        load = pem.load_ssh_private_key if b"OPENSSH" in content else pem.load_pem_private_key
        key = load(content, None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityError(
            f"no key can be read from {path}: {first_line(error)}; `{maker}` makes one"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise IdentityError(f"{path} holds a key of another kind; `{maker}` makes one")
    return key


def read_certificate(path: Path) -> x509.Certificate:
    """Return the certificate in a file.

    Raises:
        IdentityError: There is none, or it may not be read.
    """
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except (OSError, ValueError) as error:
        raise IdentityError(
            f"no certificate can be read from {path}: {first_line(error)}; `fedloom certs` makes them"
        ) from None


def require_current(path: Path) -> None:
    """Check that a certificate is in force.

    Raises:
        IdentityError: It has expired, or is not in force yet; or there is none.
    """
    certificate, now = read_certificate(path), datetime.datetime.now(datetime.UTC)
    if now > certificate.not_valid_after_utc:
        raise IdentityError(
            f"the certificate {path} has expired on {certificate.not_valid_after_utc:%Y-%m-%d}; "
            "`fedloom certs` makes a new one of the same authority"
        )
    if now < certificate.not_valid_before_utc:
        raise IdentityError(
            f"the certificate {path} is not in force before {certificate.not_valid_before_utc:%Y-%m-%d}; "
            "is this machine's clock right?"
        )


def sign(key: ec.EllipticCurvePrivateKey, content: bytes) -> bytes:
    """Return a signature (ECDSA with SHA-384)."""
    return key.sign(content, ALGORITHM)


def secret_number(key: ec.EllipticCurvePrivateKey, *words: str) -> int:
    """Return a number in [0, 2**63) that only who has the private key can tell from its words.

    Source: HMAC (RFC 2104) with SHA-256, keyed by the private key.
    """
    own = key.private_numbers().private_value.to_bytes(48, "big")
    text = "|".join(("fedloom secret number", *words))
    return int.from_bytes(hmac.digest(own, text.encode(), "sha256")[:8], "big") >> 1


def is_signed(key: ec.EllipticCurvePublicKey, content: bytes, signature: bytes) -> bool:
    """Return whether a signature is one of that key over that content."""
    try:
        key.verify(signature, content, ALGORITHM)
    except InvalidSignature:
        return False
    return True


def hosts_of(certificate: str) -> list[str]:
    """Return the hosts that a certificate (PEM) is for.

    Raises:
        ValueError: It is no certificate, or for none.
    """
    own = x509.load_pem_x509_certificate(certificate.encode())
    found = [e.value for e in own.extensions if isinstance(e.value, x509.SubjectAlternativeName)]
    hosts = [str(name.value) for names in found for name in names]
    if not hosts:
        raise ValueError("the certificate names no host")
    return hosts


def issued_key(certificate: str, authority: x509.Certificate) -> ec.EllipticCurvePublicKey | None:
    """Return the public key in a certificate (PEM), if that authority issued it and it is in force."""
    now = datetime.datetime.now(datetime.UTC)
    try:
        own = x509.load_pem_x509_certificate(certificate.encode())
        own.verify_directly_issued_by(authority)
        key = own.public_key()
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return None
    current = own.not_valid_before_utc <= now <= own.not_valid_after_utc
    return key if current and isinstance(key, ec.EllipticCurvePublicKey) else None


def public_pem(line: str) -> bytes:
    """Return a public key, given as a line of OpenSSH, in PEM.

    Raises:
        IdentityError: It is none of this kind.
    """
    return public_key(line).public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)


def public_line(key: ec.EllipticCurvePrivateKey) -> str:
    """Return the public half of a key as a line of OpenSSH."""
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
            "this is no public key of OpenSSH, as `fedloom keys new` writes one to NAME.pub"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise IdentityError("the public key is of another kind; `fedloom keys new` makes one")
    return key


def _read(path: Path) -> bytes:
    """Return what is in a file.

    Raises:
        IdentityError: It may not be read: what to do differs from where there is none.
        OSError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except PermissionError:
        raise IdentityError(_whose(path)) from None


def _whose(path: Path) -> str:
    """Return why a file may not be read: whose it is, or a folder that it lies in, and what to do."""
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


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        labels = host.removesuffix(".").split(".")
        if len(host) > LONGEST_HOST or not all(re.fullmatch(LABEL, label) for label in labels):
            raise IdentityError(
                f"{quoted(host, 80)} is no name or address of a machine; give one such as "
                "fed.example.org or 192.0.2.7"
            ) from None
        return x509.DNSName(host)


def _certificate(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    start: datetime.datetime,
    days: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=days))
    )


def _private_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
