"""Judges that are hostile servers on real sockets: what they send is bounded, sanitised and holds no key."""

import json
import socket
import threading
import time
from contextlib import suppress

import pytest

from fedloom.errors import JudgeError
from fedloom.evaluation.judges.base import Case
from fedloom.evaluation.judges.endpoint import EndpointJudge, EndpointSettings
from fedloom.evaluation.judges.http_client import LONGEST, Caller
from fedloom.evaluation.questions import Question

CASE = Case(Question("1", "What is two and two?"), ("four", "five"))
KEY = "sk-secret-0123456789"


@pytest.fixture
def hostile():
    """Start a server that writes what ``parts()`` yields to every request; counts bytes that it got rid of."""
    listening = []

    def start(parts):
        server = socket.create_server(("127.0.0.1", 0))
        listening.append(server)
        sent = [0]

        def serve():
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection):
            with connection, suppress(OSError):
                connection.recv(1 << 16)
                for part in parts():
                    connection.sendall(part)
                    sent[0] += len(part)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1 << 16):  # closed with something unread, it would be reset
                    pass

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}/v1", sent

    yield start
    for server in listening:
        server.close()


def judge(url, **settings):
    settings = {"backoff": 0.0, "retries": 0, "timeout": 5.0, **settings}
    return EndpointJudge(url, EndpointSettings(**settings), KEY)


def whole(body, status="200 OK"):
    head = f"HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    return lambda: [head.encode() + body]


def reply(content="no", usage=None):
    return json.dumps({"choices": [{"message": {"content": content}}], "usage": usage}).encode()


def drip(beginning):
    def parts():
        yield beginning
        while True:
            time.sleep(0.1)
            yield b"x"

    return parts


BEGINNINGS = {
    "body": b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n",
    "length": b"HTTP/1.1 200 OK\r\ncontent-length: 1",
    "header": b"HTTP/1.1 200 OK\r\nx-",
    "status": b"",
}


@pytest.mark.parametrize(
    "beginning",
    [
        pytest.param(text, id=name, marks=[] if name in ("body", "header") else pytest.mark.slow)
        for name, text in BEGINNINGS.items()
    ],
)
def test_a_reply_that_drips_ends_when_its_seconds_are_over(hostile, beginning):
    """A byte in a tenth of a second is in time for every read; a hundred thousand would take hours."""
    url, _ = hostile(drip(beginning))
    begun = time.monotonic()
    (found,) = judge(url, timeout=0.4).rate([CASE])
    assert found.reason == "no answer: no reply within 0.4 s"
    assert time.monotonic() - begun < 5
    with pytest.raises(JudgeError, match=r"no judge answers at .*: no reply within 0\.4 s"):
        judge(url, timeout=0.4).check()


@pytest.mark.parametrize("announced", [True, False])
def test_of_a_reply_of_three_gigabytes_little_is_read(hostile, announced):
    def parts():
        head = b"content-length: 3000000000\r\n" if announced else b""
        yield b"HTTP/1.1 200 OK\r\n" + head + b"\r\n"
        for _ in range(3000):
            yield bytes(1_000_000)

    url, sent = hostile(parts)
    (found,) = judge(url, timeout=60.0).rate([CASE])
    assert found.reason == "no answer: a reply of more than 4 MiB"
    assert sent[0] < LONGEST + 64e6  # what the sockets between hold


UNREADABLE = {
    "deep": (b"[" * 200_000, "a reply that is nested deeper than 100 brackets"),
    "deep, closed": (
        b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
        "a reply that is nested deeper than 100 brackets",
    ),
    "a number of 5,000 digits": (b'{"choices": ' + b"9" * 5000 + b"}", "a reply that is not JSON"),
    "no UTF-8": (b'{"choices": ["\xff"]}', "a reply that is not JSON"),
    "nothing": (b"", "a reply that is not JSON"),
    "choices are a number": (b'{"choices": 3}', "a reply without choices"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_is_no_reply_is_counted_under_its_reason(hostile, name):
    body, reason = UNREADABLE[name]
    (found,) = judge(hostile(whole(body))[0]).rate([CASE])
    assert found.scores is None and found.reason == f"no answer: {reason}"


def test_a_packed_reply_is_not_unpacked(hostile):
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\nabc"
    (found,) = judge(hostile(lambda: [head])[0]).rate([CASE])
    assert found.reason == "no answer: a reply that is packed, and was not to be"


@pytest.mark.parametrize(
    "tokens", [int("9" * 400), -1, True, 1.5, "7", None, [3]], ids=lambda v: f"{v!s:.6}"
)
def test_tokens_that_nobody_can_have_used_are_not_counted(hostile, tokens):
    usage = {"prompt_tokens": tokens, "completion_tokens": 7}
    endpoint = judge(hostile(whole(reply(usage=usage)))[0], reparse=0, price_in=1.0)
    endpoint.rate([CASE])
    costs = endpoint.costs()
    assert (costs["tokens_in"], costs["tokens_out"], costs["money"]) == (0, 7, 0.0)


@pytest.mark.parametrize("scores", ["9" * 400 + " 5", "1e999 5", "nan nan"])
def test_scores_beyond_all_measure_are_no_scores(hostile, scores):
    from fedloom.evaluation.judges.prompts import code

    body = reply(f"[[verdict-{code(CASE)}: {scores}]]")
    (found,) = judge(hostile(whole(body))[0], reparse=0).rate([CASE])
    assert found.scores is None


def test_an_error_is_shown_in_part_on_one_line_without_escapes_or_key(hostile):
    said = f"bad\x1b[2J\x07 key {KEY}\r\nsecond \u202eline ".encode() + b"\xff" + b"z" * 100_000
    with pytest.raises(JudgeError) as caught:
        judge(hostile(whole(said, "418 Teapot"))[0]).rate([CASE])
    text = str(caught.value)
    assert "(HTTP 418): bad\\x1b[2J\\x07 key [key] second \\u202eline" in text
    assert KEY not in text and "\x1b" not in text and "\n" not in text and len(text) < 400


def test_the_key_is_nowhere_even_when_it_is_sent_back(hostile, tmp_path):
    url, _ = hostile(whole(reply(f"your key is {KEY}, or so")))
    settings = EndpointSettings(retries=0, reparse=0, timeout=5.0)
    (found,) = EndpointJudge(url, settings, KEY, tmp_path).rate([CASE])
    assert found.raw == "your key is [key], or so"
    (kept,) = tmp_path.glob("*.json")
    assert json.loads(kept.read_text()) == {"text": "your key is [key], or so"}
    broken, _ = hostile(lambda: [f"HTTP/1.1 200 OK\r\n{KEY}\x00\r\n\r\n".encode()])
    (found,) = judge(broken).rate([CASE])
    assert found.scores is None and "RemoteProtocolError" in found.reason
    assert KEY not in found.reason and "\x00" not in found.reason


def test_no_redirect_takes_the_key_along(hostile):
    there, sent = hostile(whole(reply()))
    to = f"HTTP/1.1 307 Go\r\nlocation: {there}/chat/completions\r\ncontent-length: 0\r\n\r\n"
    with pytest.raises(JudgeError, match=r"does not take the request \(HTTP 307\)$"):
        judge(hostile(lambda: [to.encode()])[0]).rate([CASE])
    assert sent == [0]


@pytest.mark.parametrize("key", ["two words", "line\nend", "schl\u00fcssel"])
def test_a_key_that_no_header_takes_is_said_without_it(key):
    with pytest.raises(JudgeError, match="the judge's key holds blanks or characters") as caught:
        Caller(1.0, key)
    assert key not in str(caught.value)


def test_a_short_key_is_no_secret():
    """A key "1" would be taken out of every score."""
    assert Caller(1.0, "none").clean("none of them") == "none of them"
    assert Caller(1.0, " sk-secret-key \n").clean("a sk-secret-key b") == "a [key] b"


def test_a_proxys_connections_are_bounded_too(monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    client = Caller(1.0)._client
    backends = [own._pool._network_backend for own in client._mounts.values() if own is not None]
    assert backends and {type(own).__name__ for own in backends} == {"_Backend"}


def test_an_address_that_is_none_is_one_message():
    for url in ("http://a:x/v1", "http://host:99999999/v1", "http://a\x00b/v1"):
        with pytest.raises(JudgeError, match="is not an http or https address"):
            judge(url)
    with pytest.raises(JudgeError, match=r"no judge answers at http://a{70}\.org/v1"):
        judge(f"http://{'a' * 70}.org/v1").check()  # no name that can be asked for
