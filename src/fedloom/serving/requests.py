"""Requests to the server, read as OpenAI's API has them; what is not served is refused by name.

Source: https://platform.openai.com/docs/api-reference (chat completions, completions).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from fedloom.data.examples import Message
from fedloom.data.json_rows import is_deep
from fedloom.display.untrusted_text import quoted, short

MOST_MESSAGES = 2000
MOST_STOPS = 4
LONGEST_STOP = 500
SHOWN = 80
"""Characters of a wrong value that a message repeats."""

COMPLETION_TOKENS = 16
"""Tokens of a completion where the request does not say, as in OpenAI's API."""


class RequestError(Exception):
    """A request that is not served.

    Attributes:
        status: Of HTTP.
        param: The field that is wrong, if one is.
        code: What a program tells it by, if OpenAI has a code for it.
        headers: That go with the reply.
    """

    def __init__(
        self,
        status: int,
        text: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Say what is wrong and what to do."""
        super().__init__(text)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI's clients read it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


class _Fields(BaseModel):
    """Fields of a request; types as JSON has them, and no others."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


FieldsT = TypeVar("FieldsT", bound=_Fields)


class _StreamOptions(_Fields):
    include_usage: bool = False
    include_obfuscation: bool = False


class _ResponseFormat(_Fields):
    type: Literal["text"]


class _TextPart(_Fields):
    type: Literal["text"]
    text: str


class _Message(_Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_TextPart]
    name: str | None = None
    refusal: None = None


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class _Sampled(_Fields):
    """What both kinds of requests have."""

    model: str | None = Field(default=None, max_length=512)
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Annotated[
        list[Annotated[str, Field(max_length=LONGEST_STOP)]] | None,
        BeforeValidator(_as_list),
        Field(max_length=MOST_STOPS),
    ] = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: Literal[1] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None


class _Chat(_Sampled):
    messages: list[_Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: Literal[False] | None = None
    response_format: _ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None


class _Completion(_Sampled):
    prompt: str | list[str] | list[int]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None


@dataclass(frozen=True)
class Request:
    """A request whose fields are what they may be.

    Attributes:
        model: Name of the model, if it says one.
        prompt: Messages, a text, or token ids.
        max_tokens: Of the answer, if it says so.
        temperature: 0 to 2.
        top_p: Above 0, at most 1.
        seed: Of the draws, if it says one.
        stop: Texts that end the answer.
        streamed: Whether the answer is sent piece by piece.
        usage: Whether the number of tokens is sent at the end of those.
    """

    model: str | None
    prompt: tuple[Message, ...] | str | tuple[int, ...]
    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]
    streamed: bool
    usage: bool

    @property
    def is_chat(self) -> bool:
        """Whether it is a conversation."""
        return isinstance(self.prompt, tuple) and isinstance(self.prompt[0], Mapping)


def parsed(content: bytes) -> dict[str, Any]:
    """Return the JSON object of a request's body.

    Raises:
        RequestError: It is none, is nested too deeply, or has numbers or characters that JSON has not.
    """
    try:
        text = content.decode()
        if is_deep(text):
            raise ValueError("it is nested too deeply")
        found = json.loads(text, parse_constant=_no_number)
        json.dumps(found, ensure_ascii=False).encode()  # halves of pairs, which no text has
    except (ValueError, RecursionError) as error:
        raise RequestError(
            400, f"the body is not JSON in UTF-8: {short(str(error), 200)}"
        ) from None
    if not isinstance(found, dict):
        raise RequestError(400, f"the body must be a JSON object, not {quoted(found, SHOWN)}")
    return found


def chat_request(body: Mapping[str, Any]) -> Request:
    """Return a request for the next message of a conversation.

    Raises:
        RequestError: A field is missing, wrong, or for something that is not served; it is named.
    """
    found = _checked(_Chat, body)
    if found.messages[-1].role != "user":
        raise RequestError(400, "the last message must be the user's", "messages")
    messages = tuple(
        {"role": "system" if own.role == "developer" else own.role, "content": _text(own)}
        for own in found.messages
    )
    return _request(found, messages, found.max_completion_tokens or found.max_tokens)


def completion_request(body: Mapping[str, Any]) -> Request:
    """Return a request for how a text goes on.

    Raises:
        RequestError: As of :func:`chat_request`.
    """
    found = _checked(_Completion, body)
    prompt: str | tuple[int, ...]
    match found.prompt:
        case str() as text:
            prompt = text
        case [str() as text]:
            prompt = text
        case [int(), *_] as ids:
            prompt = tuple(token for token in ids if isinstance(token, int))
        case _:
            raise RequestError(400, "prompt must be one text, or a list of token ids", "prompt")
    return _request(found, prompt, found.max_tokens or COMPLETION_TOKENS)


def _request(
    found: _Sampled, prompt: tuple[Message, ...] | str | tuple[int, ...], max_tokens: int | None
) -> Request:
    if found.stream_options is not None and not found.stream:
        raise RequestError(400, "stream_options are for stream = true alone", "stream_options")
    return Request(
        found.model,
        prompt,
        max_tokens,
        1.0 if found.temperature is None else found.temperature,
        1.0 if found.top_p is None else found.top_p,
        found.seed,
        tuple(stop for stop in found.stop or () if stop),
        bool(found.stream),
        found.stream_options is not None and found.stream_options.include_usage,
    )


def _checked(kind: type[FieldsT], body: Mapping[str, Any]) -> FieldsT:
    """Return the fields of a request.

    Raises:
        RequestError: Of what is wrong, the first.
    """
    try:
        return kind.model_validate(dict(body))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
    param = short(".".join(str(part) for part in first["loc"][:3]), SHOWN)
    field = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        raise RequestError(400, f"Unrecognized request argument supplied: {param}", param) from None
    if first["type"] == "missing":
        raise RequestError(400, f"Missing required parameter: '{param}'", param) from None
    text = f"{param}: {first['msg']}, and it is {quoted(first['input'], SHOWN)}"
    if field in NOT_SERVED:
        text = f"{field} is not served here: leave it out ({text})"
    raise RequestError(400, short(text, 400), param) from None


NOT_SERVED = (
    "n", "best_of", "echo", "suffix", "logprobs", "frequency_penalty", "presence_penalty",
    "logit_bias", "response_format", "tools", "store",
)  # fmt: skip
"""Fields of which only the value that changes nothing is taken."""


def _text(message: _Message) -> str:
    content = message.content
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")
