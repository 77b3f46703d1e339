"""Envelopes: what is packed comes out, and what comes from anybody is checked."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.errors import MessageError
from fedloom.wire.envelope import Envelope, Joined, ReplyHeader, RequestHeader, WorkDone, seal

REPLY = ReplyHeader(run="a" * 32, began=1, client=2, round=3, number=4)
WORK = WorkDone(
    phase="train", flops=1e9, seconds=0.5, peak_memory=1, tokens=2, targets=3, examples=4, steps=5
)


@pytest.mark.parametrize(
    "header",
    [
        REPLY,
        REPLY.model_copy(update={"work": [WORK], "error": "it failed: ü"}),
        REPLY.model_copy(
            update={"joined": Joined(rows=3, held_out=0, model="0" * 64, version="1")}
        ),
        RequestHeader(
            kind="exchange", run="a" * 32, began=[-1, 3], client=0, request={"tensors": []}
        ),
        RequestHeader(
            kind="join", run="0f" * 16, began=[-1], client=1, experiment="x = 1", streams=True
        ),
    ],
)
@pytest.mark.parametrize("payload", [b"", b"content"])
def test_there_and_back(header, payload):
    envelope = seal(header, payload, lambda text: b"signed" + text[:3])
    back = Envelope.unpack(envelope.pack())
    assert back == envelope and back.payload == payload
    read = back.read(type(header))
    assert read.model_copy(update={"payload": ""}) == header


def test_a_strangers_words_move_no_cursor():
    said = REPLY.model_copy(update={"error": "löss ≥ 1\nsecond \x1b[2Jgone\r\x07"})
    assert seal(said).read(ReplyHeader).error == "löss ≥ 1\nsecond ?[2Jgone??"


def test_the_header_binds_the_payload():
    envelope = seal(REPLY, b"content")
    for other in (b"", b"Content"):
        with pytest.raises(MessageError, match="does not match the SHA-256 in its header"):
            Envelope(envelope.header, other).read(ReplyHeader)


@pytest.mark.parametrize(
    "change",
    [
        {"client": -1},
        {"client": 1.5},
        {"client": "2"},
        {"round": 1 << 70},
        {"run": "a" * 65},
        {"more": 1},
        {"error": "x" * 5000},
        {"work": [{}] * 17},
        {"work": [{**json.loads(WORK.model_dump_json()), "seconds": float("nan")}]},
        {"work": [{**json.loads(WORK.model_dump_json()), "seconds": 1e308}]},
        {"joined": {"rows": 0, "held_out": 0, "model": "", "version": ""}},
        {"joined": {"rows": 10**400, "held_out": 0, "model": "", "version": ""}},
        {"joined": {"rows": 2**40 + 1, "held_out": 0, "model": "", "version": ""}},
        {"joined": {"rows": 1, "held_out": 2**40 + 1, "model": "", "version": ""}},
        {"joined": {"rows": 1, "held_out": 0, "model": "x" * 65, "version": ""}},
        {"joined": {"rows": 1, "held_out": 0, "model": "", "version": "x" * 33}},
        *(
            {"work": [{**json.loads(WORK.model_dump_json()), name: 2**50 + 1}]}
            for name in ("tokens", "targets", "examples", "steps", "peak_memory")
        ),
    ],
)
def test_headers_of_another_form_are_refused(change):
    table = {**json.loads(REPLY.model_dump_json()), **change}
    with pytest.raises(MessageError, match="header is malformed"):
        Envelope(json.dumps(table).encode(), b"").read(ReplyHeader)


def test_what_a_client_calls_itself_moves_no_cursor():
    said = {"rows": 1, "held_out": 0, "model": "\x1b[2J", "version": "1\u202e2"}
    table = {**json.loads(REPLY.model_dump_json()), "joined": said}
    joined = Envelope(json.dumps(table).encode(), b"").read(ReplyHeader).joined
    assert (joined.model, joined.version) == ("?[2J", "1?2")


@pytest.mark.parametrize("run", ["../../x", "/etc", "a" * 31, "A" * 32, "a" * 32 + "\n", ""])
def test_a_server_names_no_folder_of_a_client_but_its_run(run):
    text = json.dumps({"kind": "join", "run": run, "began": [-1]}).encode()
    with pytest.raises(MessageError, match="header is malformed"):
        Envelope(text, b"").read(RequestHeader)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 50_000])
def test_what_is_no_header_is_refused(text):
    with pytest.raises(MessageError, match="header is malformed"):
        Envelope(text, b"").read(ReplyHeader)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 60))
def test_damaged_envelopes_are_refused_or_whole(noise, place):
    packed = bytearray(seal(REPLY, b"content", lambda text: b"sign").pack())
    packed[place : place + len(noise)] = noise
    for data in (bytes(packed), noise):
        try:
            envelope = Envelope.unpack(data)
            envelope.read(ReplyHeader)
        except MessageError:
            continue
        assert envelope.pack() == data
