"""A backup holds all that cannot be made again, and gives it back whole or not at all."""

import io
import json
import tarfile
import threading

import pytest
from typer.testing import CliRunner

from fedloom.commands.main import app
from fedloom.deployment.backup import back_up, is_encrypted, restore
from fedloom.deployment.folders import ServerFolder
from fedloom.errors import ConnectionFailed, IdentityError, OutputError, SettingsError
from fedloom.security import audit_log
from fedloom.security.audit_log import AuditLog, events, verify
from fedloom.security.certificates import make_authority
from fedloom.security.keys import make_key
from fedloom.storage.files import lock

DERIVED = {"flower.db", "nodes.toml", "server.toml", ".members.toml.lock"}


@pytest.fixture
def home(tmp_path):
    """A server's folder as a life leaves it, with a run and with what is not worth keeping."""
    own = ServerFolder(tmp_path / "server")
    make_authority(own.path, ["fed.example.org", "localhost"])
    for name in ("north", "south", "west"):
        own.members().allow(name, make_key(tmp_path / f"{name}.key").read_text())
    own.members().revoke("west")
    own.settings.write_text("[gateway]\nconnections = 99\n")
    log = AuditLog(own.path / "audit.jsonl")
    run = tmp_path / "runs" / "first"
    (run / "checkpoints" / "round-0001").mkdir(parents=True)
    (run / "summary.json").write_text("{}")
    (run / "checkpoints" / "round-0001" / "state.json").write_text('{"round": 1}')
    log.record("run_folder", run="a" * 32, folder=str(run))
    for name in ("flower.db", "nodes.toml", "server.toml"):
        (own.path / name).write_text("derived")
    return own


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_what_was_backed_up_is_there_again(home, tmp_path):
    target, again = tmp_path / "b" / "fed.backup", ServerFolder(tmp_path / "again")
    back_up(home, target)
    assert target.stat().st_mode & 0o777 == 0o600 and not is_encrypted(target)
    found = restore(target, again)
    assert (found.members, found.hosts[0], found.runs) == (2, "fed.example.org", [])
    before, after = content(home.path), content(again.path)
    assert after.keys() == before.keys() - DERIVED
    log = after.pop("audit.jsonl")
    assert log.startswith(before["audit.jsonl"]) and verify(again.path).lines == 2
    assert all(before[name] == kept for name, kept in after.items())
    assert all(path.stat().st_mode & 0o077 == 0 for path in [again.path, *again.path.iterdir()])
    assert [own.name for own in again.members().allowed] == ["north", "south"]


def test_runs_go_with_it_on_request_and_are_known_where_they_are_now(home, tmp_path):
    twin = tmp_path / "elsewhere" / "first"
    twin.mkdir(parents=True)
    (twin / "summary.json").write_text("[]")
    AuditLog(home.path / "audit.jsonl").record("run_folder", run="b" * 32, folder=str(twin))
    back_up(home, tmp_path / "fed.backup", runs=True)
    again = ServerFolder(tmp_path / "again")
    found = restore(tmp_path / "fed.backup", again)
    assert [path.relative_to(again.path).as_posix() for path in found.runs] == [
        "runs/first",
        "runs/first-2",
    ]
    assert content(found.runs[0]) == content(tmp_path / "runs" / "first")
    assert (found.runs[1] / "summary.json").read_text() == "[]"
    known = [event["folder"] for event in events(again.path, "run_folder")]
    assert known[-2:] == [str(path.resolve()) for path in found.runs]


def test_a_log_that_is_written_meanwhile_is_whole_in_it(home, tmp_path, monkeypatch):
    monkeypatch.setattr(audit_log, "LARGE", 20_000)
    log, over = AuditLog(home.path / "audit.jsonl"), threading.Event()

    def write():
        while not over.is_set():
            log.record("accepted", client=1)

    writing = threading.Thread(target=write)
    writing.start()
    try:
        for number in range(3):
            back_up(home, tmp_path / f"{number}.backup")
    finally:
        over.set()
        writing.join()
    for number in range(3):
        folder = tmp_path / f"again-{number}"
        restore(tmp_path / f"{number}.backup", ServerFolder(folder))
        assert verify(folder).lines > 1


def test_nothing_is_written_over(home, tmp_path):
    (tmp_path / "fed.backup").write_text("mine")
    with pytest.raises(OutputError, match="is there already"):
        back_up(home, tmp_path / "fed.backup")
    assert (tmp_path / "fed.backup").read_text() == "mine"
    back_up(home, tmp_path / "good.backup")
    with pytest.raises(SettingsError, match="holds something already"):
        restore(tmp_path / "good.backup", home)
    (tmp_path / "running").mkdir()
    with (
        lock(tmp_path / "running" / "server.pid"),
        pytest.raises(ConnectionFailed, match="runs in"),
    ):
        restore(tmp_path / "good.backup", ServerFolder(tmp_path / "running"))
    with pytest.raises(SettingsError, match=r"is not a server's folder: members.toml, ca.pem"):
        back_up(ServerFolder(tmp_path / "nowhere"), tmp_path / "none.backup")
    assert not (tmp_path / "none.backup").exists()


@pytest.mark.slow
def test_a_wrong_passphrase_is_said_and_nothing_made(home, tmp_path):
    back_up(home, tmp_path / "fed.backup", passphrase="right")
    again = ServerFolder(tmp_path / "again")
    for passphrase, words in (("wrong", "does not open"), (None, "is encrypted: a passphrase")):
        with pytest.raises(IdentityError, match=words):
            restore(tmp_path / "fed.backup", again, passphrase)
    assert not again.path.exists() and not list(tmp_path.glob(".again*"))


def test_damage_anywhere_is_seen(home, tmp_path):
    back_up(home, tmp_path / "fed.backup")
    whole = (tmp_path / "fed.backup").read_bytes()
    again = ServerFolder(tmp_path / "again")
    for cut in (0, 1, len(whole) // 3, 2 * len(whole) // 3):
        (tmp_path / "cut").write_bytes(whole[:cut])
        with pytest.raises(OutputError, match="cut"):
            restore(tmp_path / "cut", again)
    for place in range(20, len(whole) - 40, len(whole) // 10):
        (tmp_path / "bad").write_bytes(
            whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :]
        )
        with pytest.raises(OutputError):
            restore(tmp_path / "bad", again)
    assert not again.path.exists() and not list(tmp_path.glob(".again*"))


def archive(path, *entries):
    with tarfile.open(path, "w:gz") as file:
        for name, content, *kind in entries:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            if kind:
                entry.type, entry.linkname, entry.size = kind[0], "/etc/passwd", 0
            file.addfile(entry, io.BytesIO(content))
    return path


@pytest.mark.parametrize(
    "entry",
    [
        ("../members.toml", b""),
        ("/etc/passwd", b""),
        ("runs/../../x", b""),
        ("runs/a/./x", b""),
        ("flower/credentials", b""),
        ("members.toml", b"", tarfile.SYMTYPE),
        ("server.key", b"", tarfile.LNKTYPE),
        ("ca.pem", b"", tarfile.CHRTYPE),
        ("runs", b"", tarfile.DIRTYPE),
    ],
)
def test_nothing_is_taken_that_a_backup_does_not_hold(tmp_path, entry):
    path = archive(tmp_path / "evil", entry, ("manifest.json", b"{}"))
    with pytest.raises(OutputError, match="does not belong in a backup"):
        restore(path, ServerFolder(tmp_path / "again"))
    assert sorted(own.name for own in tmp_path.iterdir()) == ["evil"]


@pytest.mark.parametrize(
    ("manifest", "error", "words"),
    [
        ({"form": 2, "version": "9.1"}, SettingsError, "was made by fedloom 9.1: install that version"),
        ({"form": 1, "version": "1", "time": 1, "files": {}}, OutputError, "differ from its man"),
        ([], OutputError, "cannot be read"),
        ({"form": 1, "version": "1", "time": 1, "files": {}, "runs": {"..": "x"}}, OutputError, "name"),
    ],
)  # fmt: skip
def test_a_manifest_is_held_against_what_is_there(tmp_path, manifest, error, words):
    path = archive(
        tmp_path / "x", ("members.toml", b"x"), ("manifest.json", json.dumps(manifest).encode())
    )
    with pytest.raises(error, match=words):
        restore(path, ServerFolder(tmp_path / "again"))


@pytest.mark.slow
def test_the_commands(home, tmp_path):
    def call(*words, **options):
        return CliRunner().invoke(app, [str(word) for word in words], **options)

    secret = tmp_path / "secret"
    secret.write_text("correct horse\n")
    done = call("server", "backup", tmp_path / "a", "--home", home.path)
    assert done.exit_code == 0 and "8 files" not in done.output
    assert "holds the private keys" in done.output
    done = call(
        "server", "backup", tmp_path / "b", "--home", home.path, "--passphrase-file", secret
    )
    assert done.exit_code == 0 and "private keys" not in done.output
    done = call(
        "server", "restore", tmp_path / "b", "--home", tmp_path / "c", input="correct horse\n"
    )
    assert done.exit_code == 0 and "2 members are allowed" in done.output
    assert f"fedloom server start --home {tmp_path / 'c'}" in done.output
