"""Requests to replies, in the form of OpenAI's API; nothing here knows of sockets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fedloom.errors import DataError
from fedloom.evaluation.generate import Ask
from fedloom.evaluation.streaming import Answer
from fedloom.randomness import derive_seed
from fedloom.serving.models import ReadyModel, ReadyModels
from fedloom.serving.requests import Request, RequestError

Send = Callable[[Mapping[str, Any]], None]
"""Sends one piece of a streamed answer; what it raises ends the answer."""


@dataclass(frozen=True)
class _Prepared:
    """A request with its model and tokens."""

    number: int
    ready: ReadyModel
    request: Request
    ask: Ask
    longest: int
    head: dict[str, Any]


class Answers:
    """Answers requests, one at a time; more wait, and more than those are refused."""

    def __init__(self, models: ReadyModels, waiting: int, longest: int, seed: int) -> None:
        """Take models in memory.

        Args:
            models: Those that are served.
            waiting: Requests that wait for their turn at most.
            longest: Tokens of an answer at most.
            seed: Of the draws of requests that name none; each of them gets another one by its number.
        """
        self.models, self.longest, self.seed = models, longest, seed
        self._turn, self._places = threading.Lock(), threading.Semaphore(waiting + 1)
        self._count, self._counting = 0, threading.Lock()

    def listed(self) -> dict[str, Any]:
        """Return the reply to ``GET /v1/models``."""
        return {"object": "list", "data": [_described(ready) for ready in self.models.all]}

    def model(self, name: str) -> dict[str, Any]:
        """Return the reply to ``GET /v1/models/NAME``.

        Raises:
            RequestError: There is no such model.
        """
        return _described(self.models.all[self._find(name)])

    def whole(self, request: Request, alive: Callable[[], None]) -> dict[str, Any]:
        """Return the reply to a request that is not streamed.

        Args:
            request: What is asked.
            alive: Called with each piece; raises where nobody waits for the answer any more.

        Raises:
            RequestError: The model or its context does not allow it, or too many wait.
        """
        prepared = self._prepared(request)
        with self._my_turn():
            answer = self._answer(prepared, lambda piece: alive())
        if request.is_chat:
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            choice: dict[str, Any] = {"index": 0, "message": message}
        else:
            choice = {"index": 0, "text": answer.text}
        choice |= {"logprobs": None, "finish_reason": answer.reason}
        usage = _usage(prepared, answer)
        return {**prepared.head, "choices": [choice], "usage": usage}

    @contextmanager
    def streamed(self, request: Request) -> Iterator[Callable[[Send], None]]:
        """Wait for a request's turn and yield what sends the pieces of its answer, to be called once.

        All that can be refused is refused before anything is sent.

        Raises:
            RequestError: As of :meth:`whole`.
        """
        prepared = self._prepared(request)
        head = prepared.head
        if request.is_chat:
            head = {**head, "object": "chat.completion.chunk"}

        def run(send: Send) -> None:
            if request.is_chat:
                send({**head, "choices": [_delta({"role": "assistant", "content": ""})]})
            answer = self._answer(
                prepared, lambda piece: send({**head, "choices": [_piece(request, piece)]})
            )
            send({**head, "choices": [_piece(request, None, answer.reason)]})
            if request.usage:
                send({**head, "choices": [], "usage": _usage(prepared, answer)})

        with self._my_turn():
            yield run

    def _prepared(self, request: Request) -> _Prepared:
        number = self._find(request.model)
        ready = self.models.all[number]
        tokens = self._tokens(ready, request)
        if len(tokens) >= ready.context:
            raise RequestError(
                400,
                f"This model's maximum context length is {ready.context} tokens, and the prompt has "
                f"{len(tokens)}: shorten it",
                "messages" if request.is_chat else "prompt",
                "context_length_exceeded",
            )
        longest = min(request.max_tokens or self.longest, self.longest, ready.context - len(tokens))
        own, asked = self._number(), request.seed
        seed = derive_seed(self.seed if asked is None else asked, "request",
                           round=own if asked is None else -1)  # fmt: skip
        ask = Ask(tuple(tokens), request.temperature, seed, request.top_p)
        head = {
            "id": f"{'chatcmpl' if request.is_chat else 'cmpl'}-{own}",
            "object": "chat.completion" if request.is_chat else "text_completion",
            "created": int(time.time()),
            "model": ready.name,
        }
        return _Prepared(number, ready, request, ask, longest, head)

    def _tokens(self, ready: ReadyModel, request: Request) -> list[int]:
        """Return a request's prompt as tokens.

        Raises:
            RequestError: The chat template refuses it, or a token id is none of the model's.
        """
        prompt = request.prompt
        if isinstance(prompt, str):
            return ready.encoder.prompt(prompt)
        if request.is_chat:
            messages = [message for message in prompt if isinstance(message, Mapping)]
            try:
                return ready.format.tokens(ready.encoder, messages)
            except DataError as error:
                raise RequestError(400, str(error), "messages") from None
        tokens = [token for token in prompt if isinstance(token, int)]
        if any(not 0 <= token < ready.vocabulary for token in tokens):
            text = f"token ids are from 0 to {ready.vocabulary - 1}"
            raise RequestError(400, text, "prompt")
        return tokens

    def _answer(self, prepared: _Prepared, tell: Callable[[str], None]) -> Answer:
        return self.models.answer(
            prepared.number, prepared.ask, prepared.longest, tell,
            stop=prepared.request.stop, trim=prepared.request.is_chat,
        )  # fmt: skip

    def _find(self, name: str | None) -> int:
        names = [ready.name for ready in self.models.all]
        if name is None and len(names) == 1:
            return 0
        if name not in names:
            text = f"The model {name!r} does not exist; there are {', '.join(names)}"
            if name is None:
                text = f"Missing required parameter: 'model'; there are {', '.join(names)}"
            raise RequestError(404 if name else 400, text, "model", "model_not_found")
        return names.index(name)

    @contextmanager
    def _my_turn(self) -> Iterator[None]:
        """Wait until no other request is answered.

        Raises:
            RequestError: Too many wait already.
        """
        if not self._places.acquire(blocking=False):
            raise RequestError(
                429, "too many requests wait: try again later", None, "rate_limit_exceeded",
                {"Retry-After": "1"},
            )  # fmt: skip
        try:
            with self._turn:
                yield
        finally:
            self._places.release()

    def _number(self) -> int:
        with self._counting:
            self._count += 1
            return self._count


def _described(ready: ReadyModel) -> dict[str, Any]:
    return {
        "id": ready.name, "object": "model", "created": ready.created, "owned_by": "fedloom",
        "max_model_len": ready.context,
    }  # fmt: skip


def _usage(prepared: _Prepared, answer: Answer) -> dict[str, int]:
    asked = len(prepared.ask.prompt)
    return {
        "prompt_tokens": asked,
        "completion_tokens": answer.tokens,
        "total_tokens": asked + answer.tokens,
    }


def _piece(request: Request, piece: str | None, reason: str | None = None) -> dict[str, Any]:
    if request.is_chat:
        return _delta({} if piece is None else {"content": piece}, reason)
    return {"index": 0, "text": piece or "", "logprobs": None, "finish_reason": reason}


def _delta(delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
