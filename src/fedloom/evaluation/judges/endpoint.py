"""A judge behind HTTP: any endpoint that speaks OpenAI's chat completions.

The key comes from an environment variable and goes into a header, nowhere else: not into files, logs,
messages or the cache, not even where the endpoint sends it back. Replies are cached by content, so
repeating an evaluation costs nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import httpx
import tenacity
from pydantic import Field

from fedloom.errors import JudgeError, OutputError
from fedloom.evaluation.judges.base import Case, Verdict
from fedloom.evaluation.judges.http_client import Caller, Reply, ReplyError
from fedloom.evaluation.judges.parsing import parse_judgelm, parse_marked
from fedloom.evaluation.judges.prompts import judgelm_prompt, marked_prompt
from fedloom.settings.schema import Settings
from fedloom.storage.files import write_atomically

KEY = "FEDLOOM_JUDGE_KEY"
"""Environment variable that holds the endpoint's key."""

REFUSED = (401, 403)
PASSING = (408, 409, 429)
"""Statuses below 500 that may be gone on the next try."""

MOST_TOKENS = 10**9
"""Tokens that one request may be said to have used; whoever says more is not believed."""

HOPELESS = 5
"""Requests in a row without any answer, the first among them, after which the endpoint is given up."""


class EndpointSettings(Settings):
    """How an endpoint is asked; part of ``[judging]``."""

    model: str = "judge"
    """Model name that is sent to the endpoint."""
    form: Literal["marked", "judgelm"] = "marked"
    """How it is asked: "marked" for general models, "judgelm" for a JudgeLM that is served."""
    temperature: float = Field(default=0.2, ge=0)
    """Of the judge's answers (2502.14187: 0.2)."""
    max_new_tokens: int = Field(default=512, ge=1)
    """Length of the judge's answer."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds for one request in all, to the last byte of its reply."""
    retries: int = Field(default=4, ge=0)
    """Tries after the first when the endpoint is busy, broken or silent."""
    backoff: float = Field(default=1.0, ge=0)
    """Seconds before the first of them; doubled each time, at most 60. Retry-After is obeyed."""
    reparse: int = Field(default=2, ge=0, le=2)
    """Times a verdict that cannot be read is asked for again, before it counts as unparsable."""
    concurrency: int = Field(default=4, ge=1)
    """Requests under way at once."""
    price_in: float = Field(default=0.0, ge=0)
    """Money for a million prompt tokens, for the cost in the report."""
    price_out: float = Field(default=0.0, ge=0)
    """Money for a million answer tokens."""


class _Passing(Exception):
    """A failure that another try may mend."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


@dataclass
class _Usage:
    requests: int = 0
    cached: int = 0
    tries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    answered: int = 0
    silent: int = 0
    last: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)


class EndpointJudge:
    """Asks over HTTP, several cases at once; verdicts come back in the order of the cases."""

    compares = True
    scale = (1.0, 10.0)

    def __init__(
        self,
        url: str,
        settings: EndpointSettings,
        key: str | None = None,
        cache: Path | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """Prepare the client; nothing is sent yet.

        Args:
            url: Base of the API, such as ``http://localhost:8000/v1``.
            settings: How it is asked.
            key: Sent as a bearer token.
            cache: Folder of replies; ``None`` for no cache.
            transport: Instead of the network.

        Raises:
            JudgeError: The URL is none, or holds a password; or no header can hold the key.
        """
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise JudgeError(f"{url!r} is not an http or https address: {error}") from None
        if parsed.scheme not in ("http", "https") or not parsed.host or (parsed.port or 0) > 65535:
            raise JudgeError(f"{url!r} is not an http or https address")
        if parsed.userinfo:
            raise JudgeError(f"give the judge's key in {KEY}, not within its address")
        port = f":{parsed.port}" if parsed.port else ""
        self.name = f"{settings.model}@{parsed.host}{port}"
        self.url = f"{url.rstrip('/').removesuffix('/chat/completions')}/chat/completions"
        self.settings, self.cache = settings, cache
        self.caller = Caller(settings.timeout, key, transport)
        self.usage = _Usage()

    def check(self) -> None:
        """Ask for the list of models: free, and enough to meet a server and to show the key.

        Raises:
            JudgeError: Nobody answers, or the key is refused.
        """
        try:
            reply = self.caller.send("GET", f"{self.url.removesuffix('/chat/completions')}/models")
        except ReplyError as error:
            raise JudgeError(f"no judge answers at {self.url}: {error}") from None
        if reply.status in REFUSED:
            raise self._refused(reply.status)

    def rate(self, cases: Sequence[Case]) -> list[Verdict]:
        """Return one verdict a case, whatever the order in which replies arrive.

        Raises:
            JudgeError: The key is refused, the request is wrong, or nothing ever answers.
        """
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            futures = [pool.submit(self._rate, case) for case in cases]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def costs(self) -> dict[str, float]:
        """Return requests, replies from the cache, tries, tokens and money."""
        used, settings = self.usage, self.settings
        money = (used.tokens_in * settings.price_in + used.tokens_out * settings.price_out) / 1e6
        return {
            "requests": used.requests,
            "from_cache": used.cached,
            "tries": used.tries,
            "tokens_in": used.tokens_in,
            "tokens_out": used.tokens_out,
            "money": money,
        }

    def _rate(self, case: Case) -> Verdict:
        """Ask until there is a verdict or the tries are used up."""
        verdict = Verdict(None, "unparsable")
        for attempt in range(self.settings.reparse + 1):
            body = {
                "model": self.settings.model,
                "messages": self._messages(case),
                "temperature": self.settings.temperature,
                "max_tokens": self.settings.max_new_tokens,
                "seed": (case.seed + attempt) % 2**31,
            }
            try:
                text = self._text(body)
            except _Passing as error:
                return self._silence(str(error))
            verdict = self._parse(text, case)
            if verdict.scores is not None:
                return verdict
        return verdict

    def _messages(self, case: Case) -> list[dict[str, str]]:
        if self.settings.form == "judgelm":
            return [{"role": "user", "content": judgelm_prompt(case)}]
        return marked_prompt(case)

    def _parse(self, text: str, case: Case) -> Verdict:
        if self.settings.form == "judgelm":
            return parse_judgelm(text, len(case.answers), self.scale)
        return parse_marked(text, case, self.scale)

    def _silence(self, reason: str) -> Verdict:
        """Count a case without an answer; give up on an endpoint that has never answered."""
        with self.usage.lock:
            self.usage.silent += 1
            self.usage.last = reason
            hopeless = not self.usage.answered and self.usage.silent >= HOPELESS
        if hopeless:
            raise JudgeError(f"the judge at {self.url} gives no answer: {reason}")
        return Verdict(None, f"no answer: {reason}")

    def _text(self, body: dict[str, Any]) -> str:
        """Return the reply to a request, from the cache where it is there."""
        place = self._place(body)
        cached = _read(place) if place else None
        with self.usage.lock:
            self.usage.requests += 1
            self.usage.cached += cached is not None
        if cached is not None:
            return cached
        reply = self._retrying(lambda: self._post(body))
        text = self.caller.clean(_content(reply))
        usage = reply.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        with self.usage.lock:
            self.usage.answered += 1
            self.usage.tokens_in += _count(usage.get("prompt_tokens"))
            self.usage.tokens_out += _count(usage.get("completion_tokens"))
        if place is not None:
            _write(place, text)
        return text

    def _retrying(self, call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        settings = self.settings
        doubled = tenacity.wait_exponential(settings.backoff, max=60)

        def pause(state: tenacity.RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            after = error.after if isinstance(error, _Passing) else None
            return min(after, 60.0) if after is not None else doubled(state)

        return tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(_Passing),
            stop=tenacity.stop_after_attempt(settings.retries + 1),
            wait=pause,
            reraise=True,
        )(call)

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        """Send one request.

        Raises:
            _Passing: It may go better next time.
            JudgeError: It will not.
        """
        with self.usage.lock:
            self.usage.tries += 1
        try:
            answered = self.caller.send("POST", self.url, body)
            self._require_taken(answered)
            reply = answered.json()
        except ReplyError as error:
            raise _Passing(str(error)) from None
        if not isinstance(reply, dict) or not isinstance(reply.get("choices"), list):
            raise _Passing("a reply without choices")
        return reply

    def _require_taken(self, reply: Reply) -> None:
        """Raise what a status means that is not a success; see :meth:`_post`."""
        if reply.status in REFUSED:
            raise self._refused(reply.status)
        if reply.status in PASSING or reply.status >= 500:
            raise _Passing(f"HTTP {reply.status}", _seconds(reply.headers.get("retry-after")))
        if reply.status >= 300:
            said = self.caller.shown(reply.content.decode(errors="replace"))
            raise JudgeError(
                f"the judge at {self.url} does not take the request (HTTP {reply.status})"
                f"{': ' if said else ''}{said}"
            )

    def _refused(self, status: int) -> JudgeError:
        return JudgeError(f"the judge at {self.url} refuses the key (HTTP {status}); set {KEY}")

    def _place(self, body: dict[str, Any]) -> Path | None:
        if self.cache is None:
            return None
        text = json.dumps([self.url, body], sort_keys=True)
        return self.cache / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def _content(reply: dict[str, Any]) -> str:
    """Return what the judge said; empty where it said nothing."""
    try:
        text = reply["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return ""
    return text if isinstance(text, str) else ""


def _count(value: object) -> int:
    """Return a number of tokens as it was told; 0 for what can be none."""
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else 0


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text)) if text is not None else None  # NaN is 0
    except ValueError:
        return None  # a date: the ordinary pause will do


def _read(place: Path) -> str | None:
    try:
        text = json.loads(place.read_text(encoding="utf-8"))["text"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return None
    return text if isinstance(text, str) else None


def _write(place: Path, text: str) -> None:
    with contextlib.suppress(OutputError):  # without a cache it costs money, nothing else
        write_atomically(place, json.dumps({"text": text}).encode())
