"""The server's certificate and the certificate authority that signs it.

The server proves itself by a certificate of the federation's own authority (``ca.pem``, which clients
are given). Keys of certificates are elliptic curves, P-256.
"""

from __future__ import annotations

import datetime
import ipaddress
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

from fedloom.display.untrusted_text import quoted
from fedloom.errors import IdentityError, first_line
from fedloom.security.keys import private_pem, read_bytes
from fedloom.storage.files import write_atomically

CA, CA_KEY = "ca.pem", "ca.key"
CERTIFICATE, KEY = "server.pem", "server.key"
DAYS = 365
LONGEST_HOST, LABEL = 253, r"[A-Za-z0-9*-]{1,63}"
"""Longest host name and longest label of one, in characters (RFC 1035, 2.3.4)."""


def make_authority(folder: Path, hosts: Sequence[str], days: int = DAYS) -> None:
    """Create the authority if there is none, and a new certificate of the server.

    Args:
        folder: Folder for both.
        hosts: Names and addresses by which clients reach the server.
        days: Validity of the certificate; the authority's is ten times as long.

    Raises:
        OutputError: They cannot be written.
        IdentityError: The existing authority cannot be read, or a host is not a name or address.
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
        write_atomically(folder / CA_KEY, private_pem(own))
        write_atomically(folder / CA, signed.public_bytes(pem.Encoding.PEM), mode=0o644)
    authority = read_certificate(folder / CA)
    try:
        signer: Any = pem.load_pem_private_key(read_bytes(folder / CA_KEY), None)
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
    write_atomically(folder / KEY, private_pem(key))
    write_atomically(folder / CERTIFICATE, signed.public_bytes(pem.Encoding.PEM), mode=0o644)


def read_certificate(path: Path) -> x509.Certificate:
    """Return the certificate in a file.

    Raises:
        IdentityError: The file is missing or may not be read.
    """
    try:
        return x509.load_pem_x509_certificate(read_bytes(path))
    except (OSError, ValueError) as error:
        raise IdentityError(
            f"no certificate can be read from {path}: {first_line(error)}; `fedloom certs` makes them"
        ) from None


def require_current(path: Path) -> None:
    """Check that a certificate is valid now.

    Raises:
        IdentityError: It has expired, is not valid yet, or is missing.
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


def hosts_of(certificate: str) -> list[str]:
    """Return the hosts that a certificate (PEM) is for.

    Raises:
        ValueError: It is not a certificate, or names no host.
    """
    own = x509.load_pem_x509_certificate(certificate.encode())
    found = [e.value for e in own.extensions if isinstance(e.value, x509.SubjectAlternativeName)]
    hosts = [str(name.value) for names in found for name in names]
    if not hosts:
        raise ValueError("the certificate names no host")
    return hosts


def issued_key(certificate: str, authority: x509.Certificate) -> ec.EllipticCurvePublicKey | None:
    """Return the public key in a certificate (PEM), if that authority issued it and it is valid now."""
    now = datetime.datetime.now(datetime.UTC)
    try:
        own = x509.load_pem_x509_certificate(certificate.encode())
        own.verify_directly_issued_by(authority)
        key = own.public_key()
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return None
    current = own.not_valid_before_utc <= now <= own.not_valid_after_utc
    return key if current and isinstance(key, ec.EllipticCurvePublicKey) else None


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        labels = host.removesuffix(".").split(".")
        if len(host) > LONGEST_HOST or not all(re.fullmatch(LABEL, label) for label in labels):
            raise IdentityError(
                f"{quoted(host, 80)} is not a name or address of a machine; give one such as "
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
