"""Texts to token ids with the characters that each token stands for.

A text that a template wrote is tokenised without further special tokens, as ``apply_chat_template`` does;
plain text gets those that the tokenizer adds. Control tokens in somebody's text are encoded as that text,
as ``apply_chat_template(sanitize_control_tokens=True)`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

from fedloom.data.chat import Rendered, RenderingError, Span
from fedloom.data.rows import common_prefix


@dataclass(frozen=True)
class Tokens:
    """Token ids and which characters each stands for, ``None`` where the tokenizer does not say."""

    ids: list[int]
    offsets: Sequence[Span] | None


@dataclass(frozen=True)
class _Offsets(Sequence[Span]):
    """Characters of each token, looked up where they are asked for: few are, of tokens by the million.

    A token that stands for no text has ``(0, 0)``, as in ``offset_mapping``.
    """

    encoding: Any
    places: range

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, place: int) -> Span: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Span]: ...
    def __getitem__(self, place: int | slice) -> Span | Sequence[Span]:
        if isinstance(place, slice):
            return _Offsets(self.encoding, self.places[place])
        return self.encoding.token_to_chars(self.places[place]) or (0, 0)


@dataclass(frozen=True)
class TextTokens:
    """Tokenises rendered texts.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
    """

    tokenizer: Any

    def of(self, texts: Sequence[Rendered]) -> list[Tokens]:
        """Tokenise texts in two batches: those that a template wrote and those that it did not.

        Raises:
            RenderingError: A text cannot be tokenised without a control token of somebody's making.
        """
        found = {i: self._in_pieces(text) for i, text in enumerate(texts) if text.literals}
        for chat in (False, True):
            own = [i for i, text in enumerate(texts) if text.chat is chat and i not in found]
            batch = self._tokens([texts[i].text for i in own], special=not chat)
            found |= dict(zip(own, batch, strict=True))
        return [found[i] for i in range(len(texts))]

    @cached_property
    def begins(self) -> bool:
        """Whether the tokenizer puts a start token before a text."""
        return self.tokenizer.bos_token_id in self.tokenizer("x")["input_ids"][:1]

    def _tokens(self, texts: Sequence[str], *, special: bool) -> list[Tokens]:
        if not texts:
            return []
        batch = self.tokenizer(
            list(texts),
            add_special_tokens=special,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        encodings = batch.encodings or [None] * len(texts)
        found = [
            Tokens(ids, None if own is None else _Offsets(own, range(len(ids))))
            for ids, own in zip(batch["input_ids"], encodings, strict=True)
        ]
        if not special:
            return found
        twice = [self.tokenizer.bos_token_id] * 2  # a text that was rendered beforehand
        return [_without_first(own) if own.ids[:2] == twice else own for own in found]

    def _in_pieces(self, rendered: Rendered) -> Tokens:
        """Tokenise a text in which control tokens are somebody's text: piece by piece."""
        ids: list[int] = []
        if not rendered.chat and self.begins:
            ids.append(self.tokenizer.bos_token_id)
        offsets: list[Span] = [(0, 0)] * len(ids)
        last = 0
        for start, end in (*rendered.literals, (len(rendered.text), len(rendered.text))):
            piece = self._tokens_within(rendered.text, last, start)
            literal = self.literal(rendered.text[start:end]) if end > start else []
            ids += [*piece.ids, *literal]
            offsets += [*(piece.offsets or ()), *[(start, end)] * len(literal)]
            last = end
        return Tokens(ids, offsets if self.tokenizer.is_fast else None)

    def _tokens_within(self, text: str, start: int, end: int) -> Tokens:
        """Tokenise a part of a text: some tokenizers put a blank before whatever stands first."""
        if start == end:
            return Tokens([], [])
        lead = self.tokenizer.encode("\n", add_special_tokens=False) if start else []
        before = "\n" if start else ""
        (found,) = self._tokens([before + text[start:end]], special=False)
        if found.ids[: len(lead)] != lead:
            (found,), lead, before = self._tokens([text[start:end]], special=False), [], ""
        if found.offsets is None:
            return Tokens(found.ids[len(lead) :], None)
        shift = start - len(before)
        return Tokens(
            found.ids[len(lead) :], [(a + shift, b + shift) for a, b in found.offsets[len(lead) :]]
        )

    def literal(self, text: str) -> list[int]:
        """Return a control token's name as the tokens of plain text within another text.

        Raises:
            RenderingError: The tokenizer makes the control token of it in any case.
        """
        lead = self._plain_ids("\n")
        ids = self._plain_ids("\n" + text)
        ids = ids[len(lead) :] if ids[: len(lead)] == lead else self._plain_ids(text)
        if self.tokenizer.convert_tokens_to_ids(text) in ids:
            raise RenderingError(f"this tokenizer cannot write {text!r} as text")
        return ids

    def _plain_ids(self, text: str) -> list[int]:
        """Return a text's tokens, none of them an added one."""
        if not self.tokenizer.is_fast:
            own: list[int] = self.tokenizer.encode(
                text, add_special_tokens=False, split_special_tokens=True
            )
            return own
        backend = self.tokenizer.backend_tokenizer
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        parts = [text]
        if backend.pre_tokenizer is not None:
            parts = [part for part, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for part in parts for token in backend.model.tokenize(part)]

    def shared(self, own: str, there: str) -> int:
        """Return how many characters two texts share from their beginning, in whole tokens."""
        first, second = self.of([Rendered(own, chat=True), Rendered(there, chat=True)])
        shared = common_prefix(first.ids, second.ids)
        return second.offsets[shared - 1][1] if shared and second.offsets is not None else 0


def _without_first(tokens: Tokens) -> Tokens:
    return Tokens(tokens.ids[1:], None if tokens.offsets is None else tokens.offsets[1:])
