"""Examples and prompts to token ids: what is prompt, what is trained on, and where an answer ends."""

from __future__ import annotations

import datetime
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter
from typing import Any

from fedloom.data.chat import Answers, Chat, ChatTemplate, Messages, Rendered, RenderingError, Tools
from fedloom.data.examples import (
    Choice,
    Example,
    Feedback,
    Instruction,
    Labelled,
    Preference,
    Text,
)
from fedloom.data.rows import common_prefix
from fedloom.data.selection import LETTERS, both_orders
from fedloom.data.sources import TEMPLATE_DATE, ControlTokens, TrainOn
from fedloom.data.text_tokens import TextTokens, Tokens
from fedloom.errors import DataError

SLOW = (
    "this tokenizer does not say which characters its tokens stand for, so that one of several answers "
    'cannot be told apart: a tokenizer.json is needed, or data.train_on = "last_answer"'
)


@dataclass(frozen=True)
class Encoded:
    """An example's tokens, not cut yet.

    Attributes:
        prompt: Tokens that all of its sequences begin with.
        completions: What follows in each.
        masks: Which tokens of each completion are trained on.
        escaped: Whether control tokens stand in its text, encoded as text.
    """

    prompt: list[int]
    completions: list[list[int]]
    masks: list[list[bool]]
    escaped: bool = False


@dataclass(frozen=True)
class TextEncoder:
    """How a tokenizer reads examples and prompts.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
        stops: Tokens at which generation stops; empty for the tokenizer's end token.
        train_on: Of the completion: every answer of the assistant, the last one, or everything.
        control_tokens: Whether control tokens in somebody's text are text, or control tokens.
        date: What a template's clock says.
        compares: Whether a pair is read as the question which of its answers is better, in both orders
            (``selection.py``).
    """

    tokenizer: Any
    stops: tuple[int, ...] = ()
    train_on: TrainOn = "all_answers"
    control_tokens: ControlTokens = "text"
    date: datetime.date = field(default=TEMPLATE_DATE)
    compares: bool = False

    @cached_property
    def template(self) -> ChatTemplate:
        """How conversations are rendered."""
        return ChatTemplate(self.tokenizer, self.control_tokens, self.date)

    @cached_property
    def texts(self) -> TextTokens:
        """How texts are tokenised."""
        return TextTokens(self.tokenizer)

    @cached_property
    def answers(self) -> Answers:
        """How answers are found in conversations."""
        stops = tuple(self.tokenizer.convert_ids_to_tokens(list(self.stop_ids)))
        return Answers(self.template, self.train_on, self.texts.shared, stops)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens at which generation stops, ascending."""
        own = self.tokenizer.eos_token_id
        return tuple(sorted({*self.stops, *(() if own is None else (own,))}))

    @cached_property
    def identity(self) -> str:
        """Everything beside the texts that tokens depend on."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = (
            backend.to_str() if backend else repr(sorted(self.tokenizer.get_vocab().items()))
        )
        template = getattr(self.tokenizer, "chat_template", None)
        ends = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.stop_ids)
        settings = (self.train_on, self.control_tokens, self.date.isoformat(), self.compares)
        return repr((vocabulary, template, ends, settings))

    def prompt(self, prompt: Text, tools: Tools = ()) -> list[int]:
        """Return a prompt's tokens, to be continued by the model; never none at all.

        Raises:
            DataError: The template refuses the conversation.
        """
        try:
            (rendered,) = self._checked([self._prompt(prompt, tools)])
        except RenderingError as error:
            raise DataError(f"the prompt cannot be rendered: {error}") from error
        row = self.texts.of([rendered])[0].ids
        if not rendered.chat and len(row) > 1 and row[-1] == self.tokenizer.eos_token_id:
            row = row[:-1]  # of a tokenizer that ends every text
        return row or self._opening()

    def prompt_text(self, prompt: Text, tools: Tools = ()) -> str:
        """Return a prompt as the text that the model continues.

        Raises:
            DataError: The template refuses the conversation.
        """
        try:
            return self._prompt(prompt, tools).text
        except RenderingError as error:
            raise DataError(f"the prompt cannot be rendered: {error}") from error

    def examples(self, examples: Sequence[Example]) -> list[Encoded | RenderingError]:
        """Return each example's tokens, or why it has none; all texts are tokenised together."""
        rendered: list[list[Rendered] | RenderingError] = []
        for example in examples:
            try:
                rendered.append(self._checked(self._rendered(example)))
            except RenderingError as error:
                rendered.append(error)
        texts = [one for own in rendered if isinstance(own, list) for one in own]
        wholes = iter(self.texts.of(texts))
        asked = dict.fromkeys(_prompt_of(text) for text in texts if text.prompt)  # a pair's is one
        prompts = dict(zip(asked, self.texts.of(list(asked)), strict=True))
        result: list[Encoded | RenderingError] = []
        for example, own in zip(examples, rendered, strict=True):
            if isinstance(own, RenderingError):
                result.append(own)
                continue
            read = [
                (one, next(wholes), prompts[_prompt_of(one)].ids if one.prompt else None)
                for one in own
            ]
            try:
                sequences = [self._sequence(*one) for one in read]
            except RenderingError as error:
                result.append(error)
                continue
            if isinstance(example, Labelled):
                ids = [sequence.tokens.ids for sequence in sequences]
                masks = [[False] * len(row) for row in ids]
                result.append(Encoded([], ids, masks, bool(own[0].literals)))
            else:
                result.append(self._divided(sequences))
        return result

    def _sequence(self, rendered: Rendered, tokens: Tokens, prompt: list[int] | None) -> _Sequence:
        """Return a sequence; a tokenizer may have ended a plain text by itself.

        Raises:
            RenderingError: Which tokens are trained on cannot be told.
        """
        added = False
        if tokens.offsets is None:
            if len(rendered.spans) > 1 or (rendered.spans and not rendered.open_ended):
                raise RenderingError(SLOW)
        else:
            added = bool(tokens.ids) and not rendered.chat and tokens.offsets[-1] == (0, 0)
        begins = self.texts.begins and not rendered.chat
        ended = added and tokens.ids[-1] in self.stop_ids
        return _Sequence(rendered, tokens, prompt, ended, begins)

    def _divided(self, sequences: list[_Sequence]) -> Encoded:
        """Divide an example's sequences where the first token that is trained on stands in any."""
        if any(sequence.start is None for sequence in sequences):  # nothing is left to train on
            none: list[list[int]] = [[] for _ in sequences]
            return Encoded(sequences[0].tokens.ids, none, [[] for _ in sequences])
        shared = min(
            *(sequence.start or 0 for sequence in sequences),
            *(
                common_prefix(sequences[0].tokens.ids, sequence.tokens.ids)
                for sequence in sequences[1:]
            ),
            len(sequences[0].tokens.ids),
        )
        prompt = sequences[0].tokens.ids[:shared]
        # after one prompt all answers begin with the token at which any does, as in TRL
        begin = min(sequence.start or 0 for sequence in sequences)
        alike = len({sequence.rendered.prompt for sequence in sequences}) == 1
        completions, masks = [], []
        for sequence in sequences:
            completion = sequence.tokens.ids[shared:]
            mask = sequence.trained_from(begin if alike else sequence.start or 0)[shared:]
            if sequence.rendered.open_ended and not self._ends(sequence):
                end = self._end()
                completion += end
                mask += [True] * len(end)
            completions.append(completion)
            masks.append(mask)
        escaped = any(sequence.rendered.literals for sequence in sequences)
        return Encoded(prompt or self._opening(), completions, masks, escaped)

    def _ends(self, sequence: _Sequence) -> bool:
        """Return whether a sequence's last token, but for blanks, is one at which generation stops."""
        for token in reversed(sequence.tokens.ids):
            if token in self.stop_ids:
                return True
            if self.tokenizer.decode([token]).strip():
                return False
        return False

    def _end(self) -> list[int]:
        own = self.tokenizer.eos_token_id
        return [own] if own is not None else list(self.stop_ids[:1])

    def _opening(self) -> list[int]:
        """Return what stands before a completion without a prompt: its first token needs one."""
        own = self.tokenizer.bos_token_id
        return self._end() if own is None else [own]

    def _checked(self, rendered: list[Rendered]) -> list[Rendered]:
        """Return rendered texts whose literals can be written as text."""
        for one in rendered:
            for start, end in one.literals:
                self.texts.literal(one.text[start:end])
        return rendered

    def _rendered(self, example: Example) -> list[Rendered]:
        match example:
            case Labelled(text=text):
                return [self._plain(text)]
            case Preference() if self.compares:
                return [
                    replace(self._plain(question + letter, len(question), question), closed=True)
                    for question, letter in zip(both_orders(example), LETTERS, strict=True)
                ]
            case Preference(prompt=prompt, chosen=chosen, rejected=rejected):
                completions: list[Text] = [chosen, rejected]
            case Choice(prompt=prompt, choices=choices):
                completions = list(choices)
            case (
                Instruction(prompt=prompt, completion=completion)
                | Feedback(prompt=prompt, completion=completion)
            ):
                completions = [completion]
        tools = example.tools
        if isinstance(prompt, str) and all(isinstance(one, str) for one in completions):
            return [self._plain(prompt + str(one), len(prompt), prompt) for one in completions]
        opening = _as_messages(prompt, "user")
        return [
            self.answers.find(opening, _as_messages(one, "assistant"), tools) for one in completions
        ]

    def _plain(self, text: str, border: int = 0, prompt: str | None = None) -> Rendered:
        end = self.tokenizer.eos_token
        if prompt is not None and end and len(text) > border and text.endswith(end):
            text = text.removesuffix(end)  # the end is written as a token
        literals = tuple(match.span() for match in self.template.special.finditer(text))
        spans = ((border, len(text)),) if len(text) > border else ()
        return Rendered(text, spans, prompt or None, literals)

    def _prompt(self, prompt: Text, tools: Tools) -> Rendered:
        if isinstance(prompt, str) or not prompt:
            return self._plain(str(prompt or ""))
        chat = Chat(self.template, prompt, tools, opened=True)
        return Rendered(chat.text, (), None, chat.literals, chat=True)


@dataclass(frozen=True)
class _Sequence:
    """A rendered text with its tokens, and those of its prompt alone."""

    rendered: Rendered
    tokens: Tokens
    prompt: list[int] | None
    added_end: bool
    begins: bool

    @cached_property
    def mask(self) -> list[bool]:
        """Which tokens have a character that is trained on."""
        offsets, count = self.tokens.offsets, len(self.tokens.ids)
        if offsets is None:  # all that follows the prompt, by the tokens that both begin with
            start = int(self.begins)
            if self.prompt is not None:
                start = common_prefix(self.prompt, self.tokens.ids)
            return [bool(self.rendered.spans) and number >= start for number in range(count)]
        mask = [False] * count
        last = len(offsets)
        while last and offsets[last - 1] == (0, 0):  # special tokens behind the text
            last -= 1
        for start, end in self.rendered.spans:
            first = bisect_right(offsets, start, hi=last, key=itemgetter(1))
            after = bisect_left(offsets, end, lo=first, hi=last, key=itemgetter(0))
            while after < last and offsets[after] == (end, end):  # blanks that offsets leave out
                after += 1
            mask[first:after] = [True] * (after - first)
        if self.added_end and True in mask and not self.rendered.closed:
            mask[-1] = True
        return mask

    @cached_property
    def start(self) -> int | None:
        """The first token that is trained on; where tokens of prompt and whole differ, that one."""
        if True not in self.mask:
            return None
        first = self.mask.index(True)
        return (
            first
            if self.prompt is None or self.rendered.closed
            else min(first, common_prefix(self.prompt, self.tokens.ids))
        )

    def trained_from(self, begin: int) -> list[bool]:
        """Return the mask, with what stands between ``begin`` and the first token in it."""
        first = self.mask.index(True)
        return [*self.mask[:begin], *[True] * (first - begin), *self.mask[first:]]


def _prompt_of(rendered: Rendered) -> Rendered:
    """Return the prompt of a rendered text as a text of its own."""
    prompt = rendered.prompt or ""
    literals = tuple(span for span in rendered.literals if span[1] <= len(prompt))
    return Rendered(prompt, (), None, literals, rendered.chat)


def _as_messages(text: Text, role: str) -> Messages:
    if isinstance(text, str):
        return ({"role": role, "content": text},) if text else ()
    return text
