"""One answer, told as it is generated: piece by piece, until it ends, is stopped or is long enough.

The pieces put together are the answer that :func:`fedloom.evaluation.generate.generate` gives to the same
:class:`~fedloom.evaluation.generate.Ask`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedloom.data.encode import TextEncoder
from fedloom.evaluation.generate import Ask, continue_rows

INCOMPLETE = "\ufffd"
"""What a decoder writes for the beginning of a character whose other bytes are still to come."""

Tell = Callable[[str], None]
"""Takes the next piece of an answer; what it raises ends the answer, and is raised."""


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        text: Without what it was stopped by.
        tokens: How many were generated, those that stopped it among them.
        reason: ``"stop"``: the model ended it, or a text of ``stop`` did; ``"length"``: the bound did.
    """

    text: str
    tokens: int
    reason: Literal["stop", "length"]


def stream(
    model: nn.Module,
    encoder: TextEncoder,
    ask: Ask,
    max_new_tokens: int,
    tell: Tell,
    *,
    cached: bool,
    stop: Sequence[str] = (),
    trim: bool = True,
) -> Answer:
    """Answer one prompt, and tell of the answer as it grows.

    Args:
        model: Causal, in evaluation mode.
        encoder: Of that model.
        ask: The prompt, which leaves ``max_new_tokens`` of the model's context free.
        max_new_tokens: Tokens of the answer at most, above 0.
        tell: Is given the pieces; none is empty.
        cached: Whether the model goes on alike with a cache of what it has read.
        stop: Texts that end an answer and are not part of it.
        trim: Leave blanks at both ends of the answer out.
    """
    pieces = Pieces(encoder.tokenizer, tuple(stop), trim)
    ends, before = set(encoder.stop_ids), len(ask.prompt)
    heard: list[int] = []

    def observe(rows: Tensor, scores: Any, **options: Any) -> Tensor:
        token = int(rows[0, -1])
        heard.append(token)
        if token not in ends and (piece := pieces.add(token)):
            tell(piece)
        return torch.tensor([pieces.stopped], device=rows.device)

    output = continue_rows(
        model, encoder, [list(ask.prompt)], [ask], max_new_tokens, cached, observe
    )
    if rest := pieces.finish():
        tell(rest)
    count = output.shape[1] - before
    ended = pieces.stopped or bool(heard and heard[-1] in ends)
    return Answer(pieces.told, count, "stop" if ended else "length")


@dataclass
class Pieces:
    """Makes text of tokens one by one, and holds back what may still change or be cut off.

    Attributes:
        tokenizer: Decodes them; special tokens are left out.
        stop: Texts that end the answer.
        trim: Whether blanks at both ends are left out.
        told: What was returned so far.
        stopped: Whether one of ``stop`` was found.
    """

    tokenizer: Any
    stop: tuple[str, ...] = ()
    trim: bool = True
    told: str = ""
    stopped: bool = False
    _tokens: list[int] = field(default_factory=list)
    _context: int = 0
    _decoded: int = 0
    _held: str = ""

    def add(self, token: int) -> str:
        """Return what can be told after one more token, which may be nothing."""
        self._tokens.append(token)
        # a token's text may depend on the one before it, so that is decoded with it both times
        known = self._decode(self._tokens[self._context : self._decoded])
        text = self._decode(self._tokens[self._context :])
        if text.endswith(INCOMPLETE):
            return ""
        self._context, self._decoded = self._decoded, len(self._tokens)
        return self._release(text[len(known) :])

    def finish(self) -> str:
        """Return what was held back, at the end of an answer."""
        if self.stopped:
            return ""
        known = self._decode(self._tokens[self._context : self._decoded])
        self._held += self._decode(self._tokens[self._context :])[len(known) :]
        self._decoded = self._context = len(self._tokens)
        rest, self._held = self._cut(self._held), ""
        return self._told(rest.rstrip() if self.trim else rest)

    def _decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _release(self, text: str) -> str:
        self._held = self._cut(self._held + text)
        ready = len(self._held)
        if not self.stopped:
            ready -= max((_begun(self._held, stop) for stop in self.stop), default=0)
        if self.trim:
            ready = len(self._held[:ready].rstrip())
        piece, self._held = self._held[:ready], self._held[ready:]
        return self._told(piece)

    def _cut(self, text: str) -> str:
        """Return a text up to the first of ``stop`` in it, and note that there is one."""
        places = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(places)
        return text[: min(places)] if places else text

    def _told(self, piece: str) -> str:
        if self.trim and not self.told:
            piece = piece.lstrip()
        self.told += piece
        return piece


def _begun(text: str, stop: str) -> int:
    """Return how many characters at the end of a text are the beginning of another."""
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
