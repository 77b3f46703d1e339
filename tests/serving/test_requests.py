"""What requests may hold, and who may send them."""

import json

import pytest

from fedloom.serving.access import Access
from fedloom.serving.requests import RequestError, chat_request, completion_request, parsed

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
PARTS = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
PICTURE = [{"type": "image_url", "image_url": {"url": "http://x/y.png"}}]


def test_what_clients_send_is_read():
    found = chat_request(
        {
            "model": "m",
            "messages": [
                {"role": "developer", "content": "Be short."},
                {"role": "user", "content": PARTS},
            ],
            "max_completion_tokens": 5, "temperature": 0, "top_p": 0.5, "seed": -1, "stop": "x",
            "stream": True, "stream_options": {"include_usage": True}, "n": 1, "user": "me",
            "frequency_penalty": 0, "logit_bias": {}, "response_format": {"type": "text"}, "tools": [],
        }
    )  # fmt: skip
    assert found.prompt[0] == {"role": "system", "content": "Be short."}
    assert found.prompt[1] == {"role": "user", "content": "Hello"}
    assert (found.max_tokens, found.temperature, found.top_p, found.seed) == (5, 0, 0.5, -1)
    assert found.stop == ("x",) and found.streamed and found.usage and found.is_chat


def test_defaults_are_those_of_openai():
    found = chat_request(HELLO)
    assert (found.temperature, found.top_p, found.max_tokens, found.seed) == (1.0, 1.0, None, None)
    assert found.stop == () and not found.streamed
    plain = completion_request({"prompt": ["Hello"]})
    assert (plain.prompt, plain.max_tokens, plain.is_chat) == ("Hello", 16, False)
    assert completion_request({"prompt": [1, 2]}).prompt == (1, 2)


@pytest.mark.parametrize(
    ("changed", "param", "words"),
    [
        ({"messages": None}, "messages", "valid list"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages", "the user's"),
        ({"messages": [{"role": "user", "content": PICTURE}]}, "messages.0.content", ""),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'system'"),
        ({"messages": [{"role": "user", "content": "x", "weight": 1}]}, "messages.0.weight", "Unrec"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2, and it is 2.5"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"temperature": True}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": ["a" * 501]}, "stop.0", "at most 500"),
        ({"n": 2}, "n", "n is not served here: leave it out"),
        ({"tools": [{}]}, "tools", "tools is not served"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "not served"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not served"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream = true"),
        ({"best": 1}, "best", "Unrecognized request argument supplied: best"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(changed, param, words):
    with pytest.raises(RequestError) as refused:
        chat_request({**HELLO, **changed})
    error = refused.value.body()["error"]
    assert refused.value.status == 400 and error["type"] == "invalid_request_error"
    assert error["param"].startswith(param) and words in error["message"]


@pytest.mark.parametrize("prompt", [[], [["a"]], ["a", "b"], [1, "a"], {"a": 1}, None])
def test_a_completion_is_of_one_prompt(prompt):
    with pytest.raises(RequestError) as refused:
        completion_request({"prompt": prompt})
    assert refused.value.param.startswith("prompt")


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b"\xff", b'{"a": NaN}', b'{"a": "\\ud800"}', b"[" * 5000, b'{"a":' + b"9" * 9999 + b"}"],
    ids=["empty", "list", "open", "bytes", "nan", "half", "deep", "long"],
)  # fmt: skip
def test_a_body_is_an_object_of_json(body):
    with pytest.raises(RequestError) as refused:
        parsed(body)
    assert refused.value.status == 400 and len(str(refused.value)) < 400


def test_a_body_that_is_one_is_read():
    assert parsed(json.dumps(HELLO).encode()) == HELLO


OPEN = Access()
KEY = Access(key="k" * 20, hosts={"models.example"}, origins={"http://localhost:3000"})


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST.", "10.0.0.5"],
)
def test_own_names_are_let_in(host):
    OPEN.check({"Host": host}, "10.0.0.5")


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.6", "", "a b",
             "localhost:8000@evil.example", "[::1", "models.example"],
)  # fmt: skip
def test_other_names_are_refused(host):
    """A page whose site's name points at this machine (DNS rebinding) sends that name."""
    with pytest.raises(RequestError, match="--allow-host") as refused:
        OPEN.check({"Host": host}, "10.0.0.5")
    assert refused.value.status == 403


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://localhost:3001"},
     {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}],
)  # fmt: skip
def test_pages_of_other_sites_are_refused(headers):
    for access in (OPEN, KEY):
        with pytest.raises(RequestError, match="may not ask"):
            access.check(
                {"Host": "localhost", "Authorization": f"Bearer {KEY.key}", **headers}, "::1"
            )
        assert access.shared_with(headers.get("Origin")) == {}


def test_keys_hosts_and_origins_that_are_allowed():
    good = {
        "Host": "models.example:80",
        "Origin": "http://localhost:3000",
        "Sec-Fetch-Site": "cross-site",
    }
    KEY.check({**good, "Authorization": f"bearer {KEY.key}"}, "::1")
    KEY.check(good, "::1", preflight=True)
    shared = KEY.shared_with("http://localhost:3000")
    assert shared["Access-Control-Allow-Origin"] == "http://localhost:3000"
    for wrong in (
        {},
        {"Authorization": KEY.key},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer kké"},
    ):
        with pytest.raises(RequestError, match="API key") as refused:
            KEY.check({**good, **wrong}, "::1")
        assert refused.value.status == 401
