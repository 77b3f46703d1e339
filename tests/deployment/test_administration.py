"""Commands and the server that they speak with: over a socket, and with words where there is none."""

import os
import threading

import httpx
import pytest

from fedloom.deployment import administration
from fedloom.deployment.administration import SOCKET, ControlSocket, ask, require_own
from fedloom.deployment.flower_control import _said
from fedloom.deployment.folders import ServerFolder
from fedloom.errors import ConnectionFailed, FedloomError, SettingsError
from fedloom.storage.files import lock
from fedloom.wire.framing import connect, write_frame


@pytest.fixture
def home(tmp_path):
    own = ServerFolder(tmp_path / "server")
    own.path.mkdir()
    return own


@pytest.fixture
def answering(home):
    def refuse(asked):
        raise SettingsError(["it is wrong"], "the command")

    def fail(asked):
        raise KeyError("x")

    handlers = {"double": lambda asked: 2 * asked["n"], "refuse": refuse, "fail": fail}
    own = ControlSocket(home.path / SOCKET, handlers)
    yield home
    own.close()


def test_a_question_is_answered(answering):
    assert ask(answering, "double", n=21) == 42
    socket_file = answering.path / SOCKET
    assert socket_file.stat().st_mode & 0o077 == 0
    assert socket_file.parent.stat().st_mode & 0o077 == 0


def test_what_is_wrong_is_told_with_its_exit_code(answering):
    with pytest.raises(FedloomError, match="it is wrong") as told:
        ask(answering, "refuse")
    assert told.value.exit_code == 2
    with pytest.raises(FedloomError, match="KeyError: 'x'"):
        ask(answering, "fail")
    with pytest.raises(FedloomError, match="KeyError: 'nothing'"):
        ask(answering, "nothing")
    assert ask(answering, "double", n=1) == 2


def test_who_says_nothing_or_nonsense_keeps_nobody_waiting(answering):
    with connect(answering.path / SOCKET), connect(answering.path / SOCKET) as other:
        write_frame(other, b"no json")
        other.sendall(b"\xff" * 8)
        assert ask(answering, "double", n=3) == 6


def test_without_a_server_it_is_said_what_to_do(home, tmp_path):
    with pytest.raises(
        ConnectionFailed, match=f"no server runs in {home.path}: `fedloom server start"
    ):
        ask(home, "status")
    with pytest.raises(ConnectionFailed, match=r"no server was started in .*none"):
        ask(ServerFolder(tmp_path / "none"), "status")
    with lock(home.lock), pytest.raises(ConnectionFailed, match="is starting or ending"):
        ask(home, "status")


def test_a_server_that_hangs_is_said_to(home, monkeypatch):
    monkeypatch.setattr(administration, "TIMEOUT", 0.2)
    release = threading.Event()
    own = ControlSocket(home.path / SOCKET, {"hang": lambda asked: release.wait(10)})
    with pytest.raises(ConnectionFailed, match=r"gave no answer within 0 s"):
        ask(home, "hang")
    release.set()
    own.close()


def test_another_users_server_is_named_with_its_user(home, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: home.path.stat().st_uid + 54321)
    with pytest.raises(
        ConnectionFailed, match=r"is \w+'s and this is user \d+: .* `sudo -u \w+ fedloom"
    ):
        require_own(home.path)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    require_own(home.path)  # root may


def test_a_folder_that_cannot_be_looked_into_is_told(monkeypatch, home):
    def stat(self, **options):
        raise PermissionError

    monkeypatch.setattr(type(home.path), "stat", stat)
    with pytest.raises(ConnectionFailed, match="run this command as the server's user"):
        require_own(home.path)


def test_a_socket_ends_with_its_server(home):
    own = ControlSocket(home.path / SOCKET, {})
    own.close()
    assert not (home.path / SOCKET).exists()
    with pytest.raises(ConnectionFailed, match="no server runs"):
        ask(home, "status")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"code": 7, "detail": "The run is over."}', "The run is over."),
        (b'{"code": 7, "detail": "No such run", "extra": "run 3"}', "No such run. run 3"),
        (b'{"detail": [{"loc": ["body"]}]}', '{"detail": [{"loc": ["body"]}]}'),
        (b"[" * 100_000, "[" * 399 + "\u2026"),
        (b"\x1b[2Jgone\nsecond", "\\x1b[2Jgone second"),
        (b"", "Conflict"),
    ],
)
def test_what_flower_refuses_is_told_in_its_words_and_not_as_json(body, words):
    assert _said(httpx.Response(409, content=body)) == words


def test_a_run_to_stop_that_is_none_is_told_with_those_that_are(home, call):
    runs = [{"id": "abcdef0123", "name": "mine"}]
    own = ControlSocket(home.path / SOCKET, {"stop": lambda a: [], "runs": lambda a: runs})
    try:
        code, out = call("stop", "xyz", "--home", home.path)
        assert code == 2 and "no run is called 'xyz'; under way or waiting: mine (abcdef01)" in out
        assert call("stop", "--home", home.path) == (0, "stopped 0 runs\n")
    finally:
        own.close()
