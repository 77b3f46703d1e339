"""Texts to token ids with the characters that each token stands for.

A text that a template wrote is tokenised without further special tokens, as ``apply_chat_template`` does;
plain text gets those that the tokenizer adds. Control tokens in somebody's text are encoded as that text,
as ``apply_chat_template(sanitize_control_tokens=True)`` does.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.data.chat import Rendered, Span


@dataclass(frozen=True)
class Tokens:
    """Token ids and which characters each stands for."""

    ids: list[int]
    offsets: list[Span]


@dataclass(frozen=True)
class TextTokens:
    """Tokenises rendered texts.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
    """

    tokenizer: Any

    def of(self, texts: Sequence[Rendered]) -> list[Tokens]:
        """Tokenise texts in two batches: those that a template wrote and those that it did not."""
        found = {i: self._in_pieces(text) for i, text in enumerate(texts) if text.literals}
        for chat in (False, True):
            own = [i for i, text in enumerate(texts) if text.chat is chat and i not in found]
            batch = self._tokens([texts[i].text for i in own], special=not chat)
            found |= dict(zip(own, batch, strict=True))
        return [found[i] for i in range(len(texts))]

    def _tokens(self, texts: Sequence[str], *, special: bool) -> list[Tokens]:
        if not texts:
            return []
        fast = bool(self.tokenizer.is_fast)
        batch = self.tokenizer(
            list(texts), add_special_tokens=special, return_offsets_mapping=fast, verbose=False
        )
        given = batch["input_ids"]
        offsets = batch["offset_mapping"] if fast else map(self._offsets, texts, given)
        found = [Tokens(list(i), list(o)) for i, o in zip(given, offsets, strict=True)]
        if not special:
            return found
        twice = [self.tokenizer.bos_token_id] * 2  # a text that was rendered beforehand
        return [Tokens(t.ids[1:], t.offsets[1:]) if t.ids[:2] == twice else t for t in found]

    def _in_pieces(self, rendered: Rendered) -> Tokens:
        """Tokenise a text in which control tokens are somebody's text: piece by piece."""
        ids: list[int] = []
        if (
            not rendered.chat
            and self.tokenizer.bos_token_id in self.tokenizer("x")["input_ids"][:1]
        ):
            ids.append(self.tokenizer.bos_token_id)
        offsets: list[Span] = [(0, 0)] * len(ids)
        last = 0
        for start, end in (*rendered.literals, (len(rendered.text), len(rendered.text))):
            piece = self._tokens_within(rendered.text, last, start)
            literal = self._literal(rendered.text[start:end]) if end > start else []
            ids += [*piece.ids, *literal]
            offsets += [*piece.offsets, *[(start, end)] * len(literal)]
            last = end
        return Tokens(ids, offsets)

    def _tokens_within(self, text: str, start: int, end: int) -> Tokens:
        """Tokenise a part of a text: some tokenizers put a blank before whatever stands first."""
        if start == end:
            return Tokens([], [])
        lead = self.tokenizer.encode("\n", add_special_tokens=False) if start else []
        before = "\n" if start else ""
        (found,) = self._tokens([before + text[start:end]], special=False)
        if found.ids[: len(lead)] != lead:
            (found,), lead, before = self._tokens([text[start:end]], special=False), [], ""
        shift = start - len(before)
        return Tokens(
            found.ids[len(lead) :], [(a + shift, b + shift) for a, b in found.offsets[len(lead) :]]
        )

    def _literal(self, text: str) -> list[int]:
        """Return a control token's name as the tokens of plain text within another text."""
        lead = self._plain_ids("\n")
        ids = self._plain_ids("\n" + text)
        return ids[len(lead) :] if ids[: len(lead)] == lead else self._plain_ids(text)

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

    def _offsets(self, text: str, ids: Sequence[int]) -> list[Span]:
        """Return where tokens stand, for tokenizers that do not say: by the text of each beginning."""
        own = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        before = next((n for n in range(len(ids)) if list(ids[n : n + len(own)]) == own), 0)
        ends = [len(self.tokenizer.decode(own[:n])) for n in range(len(own) + 1)]
        spans = [(min(a, len(text)), min(b, len(text))) for a, b in itertools.pairwise(ends)]
        return [(0, 0)] * before + spans + [(0, 0)] * (len(ids) - before - len(own))

    def shared(self, own: str, there: str) -> int:
        """Return how many characters two texts share from their beginning, in whole tokens."""
        first, second = self.of([Rendered(own, chat=True), Rendered(there, chat=True)])
        shared = common_prefix(first.ids, second.ids)
        return second.offsets[shared - 1][1] if shared else 0


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens two sequences share from their beginning."""
    count = min(len(left), len(right))
    if left[:count] == right[:count]:
        return count
    return next(i for i in range(count) if left[i] != right[i])
