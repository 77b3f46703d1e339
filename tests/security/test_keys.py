"""Keys, certificates, and who is let in."""

import datetime
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509

from fedloom.deployment.folders import ServerFolder
from fedloom.deployment.server import has_expired
from fedloom.errors import IdentityError, OutputError
from fedloom.security.audit_log import AuditLog, events
from fedloom.security.certificates import (
    hosts_of,
    issued_key,
    make_authority,
    read_certificate,
    require_current,
)
from fedloom.security.keys import is_signed, make_key, public_line, read_key, secret_number, sign


def test_hosts_of_a_certificate(tmp_path):
    make_authority(tmp_path, ["localhost", "10.0.0.7"])
    assert hosts_of((tmp_path / "server.pem").read_text()) == ["localhost", "10.0.0.7"]
    with pytest.raises(ValueError, match="names no host"):
        hosts_of((tmp_path / "ca.pem").read_text())
    with pytest.raises(ValueError, match="PEM"):
        hosts_of("no certificate")


def test_a_secret_number_is_of_one_key_and_its_words(tmp_path):
    one, two = (read_key(make_key(tmp_path / name).with_suffix("")) for name in "ab")
    number = secret_number(one, "run", "message")
    assert number == secret_number(one, "run", "message") and 0 <= number < 1 << 63
    others = secret_number(two, "run", "message"), secret_number(one, "run", "other message")
    assert len({number, *others, secret_number(one, "other run", "message")}) == 4


def test_a_signature_is_of_one_key_and_one_content(tmp_path):
    for name in ("a", "b"):
        make_key(tmp_path / f"{name}.key")
    one, two = (read_key(tmp_path / f"{name}.key") for name in ("a", "b"))
    signature = sign(one, b"content")
    assert is_signed(one.public_key(), b"content", signature)
    assert not is_signed(one.public_key(), b"Content", signature)
    assert not is_signed(two.public_key(), b"content", signature)
    assert not is_signed(one.public_key(), b"content", b"")


def test_a_key_is_its_owners_alone_and_never_written_over(tmp_path):
    path = tmp_path / "client.key"
    public = make_key(path)
    assert path.stat().st_mode & 0o777 == 0o600 and public.stat().st_mode & 0o777 == 0o644
    assert public.read_text().strip() == public_line(read_key(path))
    with pytest.raises(OutputError, match="never written over"):
        make_key(path)


@pytest.mark.parametrize("content", [b"", b"no key", b"-----BEGIN OPENSSH PRIVATE KEY-----\nx"])
def test_what_is_no_key_is_refused(tmp_path, content):
    path = tmp_path / "client.key"
    path.write_bytes(content)
    with pytest.raises(IdentityError, match="`fedloom keys new` makes one"):
        read_key(path)
    with pytest.raises(IdentityError, match="no key can be read"):
        read_key(tmp_path / "absent.key")


@pytest.fixture
def closed(monkeypatch):
    """Have files and folders that another user owns be closed to us, whoever runs the tests."""

    def close(files, folders=()):
        def stat(path, **options):
            if any(own in path.parents for own in folders):
                raise PermissionError(13, "Permission denied")
            return SimpleNamespace(st_uid=4_000_001 if path in {*files, *folders} else os.geteuid())

        def read(path):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "stat", stat)
        monkeypatch.setattr(Path, "read_bytes", read)

    return close


@pytest.mark.parametrize("read", [read_key, read_certificate])
def test_a_file_of_another_user_is_said_to_be(tmp_path, closed, read):
    path, here = tmp_path / "server" / "own", os.geteuid()
    closed([path])
    with pytest.raises(IdentityError) as found:
        read(path)
    text = str(found.value)
    assert text.startswith(
        f"{path} cannot be read: {path} belongs to user 4000001, and this runs as "
    )
    assert f"(user {here}); `chown -R {here} {path}`, or run it as user 4000001" in text
    assert "\n" not in text


def test_a_folder_of_another_user_is_said_to_be(tmp_path, closed):
    folder = tmp_path / "server"
    closed([], [folder])
    with pytest.raises(
        IdentityError, match=f"own cannot be read: {folder} belongs to user 4000001"
    ):
        read_key(folder / "own")


def test_a_file_of_ones_own_that_is_closed_is_said_to_be(tmp_path, closed):
    closed([])
    with pytest.raises(IdentityError, match=r"though .*own belongs to .*; see its mode"):
        read_key(tmp_path / "own")


def test_the_authority_vouches_for_its_server_alone(tmp_path):
    for name in ("one", "two"):
        make_authority(tmp_path / name, ["localhost"])
    one, two = (tmp_path / name for name in ("one", "two"))
    own = (one / "server.pem").read_text()
    key = issued_key(own, read_certificate(one / "ca.pem"))
    assert is_signed(key, b"x", sign(read_key(one / "server.key"), b"x"))
    assert issued_key(own, read_certificate(two / "ca.pem")) is None
    assert issued_key("nonsense", read_certificate(one / "ca.pem")) is None


def test_a_new_certificate_keeps_the_authority(tmp_path):
    make_authority(tmp_path, ["localhost"])
    before = [(tmp_path / name).read_bytes() for name in ("ca.pem", "server.pem")]
    make_authority(tmp_path, ["fed.example.org", "192.0.2.7", "::1"], days=30)
    after = [(tmp_path / name).read_bytes() for name in ("ca.pem", "server.pem")]
    assert before[0] == after[0] and before[1] != after[1]
    own = read_certificate(tmp_path / "server.pem")
    names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fed.example.org"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["192.0.2.7", "::1"]
    left = own.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(days=29) < left < datetime.timedelta(days=31)
    assert (tmp_path / "ca.key").stat().st_mode & 0o777 == 0o600
    with pytest.raises(IdentityError, match="'a b' is not a name or address"):
        make_authority(tmp_path, ["a b"])


@pytest.mark.parametrize(
    "host", ["", ".", "a..b", "a_b", "x" * 64, "a." * 130, "schl\u00fcssel.de"]
)
def test_a_host_that_is_none_is_told_before_anything_is_written(tmp_path, host):
    with pytest.raises(
        IdentityError, match=r"is not a name or address of a machine; give one such as"
    ):
        make_authority(tmp_path / "new", [host, "localhost"])
    assert not (tmp_path / "new").exists()


def test_the_log_says_that_the_certificate_has_expired(tmp_path):
    home, log = ServerFolder(tmp_path), AuditLog(tmp_path / "audit.jsonl")
    make_authority(tmp_path, ["localhost"])
    assert not has_expired(home, log) and not log.path.exists()
    make_authority(tmp_path, ["localhost"], days=0)
    assert has_expired(home, log)
    (line,) = events(log.path, "expired")
    assert "has expired on" in line["reason"]


def test_an_expired_certificate_is_named(tmp_path):
    make_authority(tmp_path, ["localhost"], days=0)
    with pytest.raises(IdentityError, match=r"has expired on .* `fedloom certs` makes a new one"):
        require_current(tmp_path / "server.pem")
    assert (
        issued_key((tmp_path / "server.pem").read_text(), read_certificate(tmp_path / "ca.pem"))
        is None
    )
