"""Texts and chats to token ids: what is prompt, what is trained on, and where an answer ends.

A conversation is rendered by the tokenizer's chat template and tokenised without further special
tokens, as ``apply_chat_template(tokenize=True)`` does; plain text gets those that the tokenizer adds.
Which tokens are trained on is found in the rendered text: by the template's ``{% generation %}`` blocks
where it has them, else by rendering the conversation up to each turn. A border is taken only where the
text around it is the same in both renderings; a conversation without one is refused, never cut elsewhere.

Control tokens (special tokens, and added tokens that the template writes) that stand in somebody's text
are encoded as that text, as ``apply_chat_template(sanitize_control_tokens=True)`` does.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fedloom.data.examples import (
    Choice,
    Example,
    Feedback,
    Instruction,
    Labelled,
    Message,
    Preference,
    Text,
)
from fedloom.data.sources import TEMPLATE_DATE, ControlTokens, TrainOn
from fedloom.errors import DataError

CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PRIVATE_USE = (0xF0000, 0x100000)
"""Where the characters that mark places in a conversation are taken from, while it is rendered."""

NO_ANSWER = "no answer of the assistant in the completion"

Span = tuple[int, int]
Messages = tuple[Message, ...]
Tools = Sequence[Mapping[str, Any]]


class RenderingError(Exception):
    """A conversation that the template refuses, or whose borders cannot be trusted."""


@dataclass(frozen=True)
class Encoded:
    """An example's tokens, not cut yet.

    Attributes:
        prompt: Tokens that all of its sequences begin with.
        completions: What follows in each.
        masks: Which tokens of each completion are trained on.
    """

    prompt: list[int]
    completions: list[list[int]]
    masks: list[list[bool]]


@dataclass(frozen=True)
class _Rendered:
    """A text, and what is known of its characters.

    Attributes:
        text: As it is tokenised.
        spans: What is trained on.
        prompt: The prompt as a text of its own, where ``text`` begins with it.
        literals: Where control tokens stand in somebody's text.
        chat: Whether the template wrote it, special tokens and all.
    """

    text: str
    spans: tuple[Span, ...] = ()
    prompt: str | None = None
    literals: tuple[Span, ...] = ()
    chat: bool = False


@dataclass(frozen=True)
class TextEncoder:
    """How a tokenizer reads examples and prompts.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
        stops: Tokens at which generation stops; empty for the tokenizer's end token.
        train_on: Of the completion: every answer of the assistant, the last one, or everything.
        control_tokens: Whether control tokens in somebody's text are text, or control tokens.
        date: What a template's clock says.
    """

    tokenizer: Any
    stops: tuple[int, ...] = ()
    train_on: TrainOn = "all_answers"
    control_tokens: ControlTokens = "text"
    date: datetime.date = field(default=TEMPLATE_DATE)

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
        settings = (self.train_on, self.control_tokens, self.date.isoformat())
        return repr((vocabulary, template, ends, settings))

    def prompt(self, prompt: Text, tools: Tools = ()) -> list[int]:
        """Return a prompt's tokens, to be continued by the model; never none at all.

        Raises:
            DataError: The template refuses the conversation.
        """
        try:
            rendered = self._prompt(prompt, tools)
        except RenderingError as error:
            raise DataError(f"the prompt cannot be rendered: {error}") from error
        row = self._ids([rendered])[0].ids
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
        rendered: list[list[_Rendered] | RenderingError] = []
        for example in examples:
            try:
                rendered.append(self._rendered(example))
            except RenderingError as error:
                rendered.append(error)
        texts = [one for own in rendered if isinstance(own, list) for one in own]
        wholes = iter(self._ids(texts))
        prompts = iter(self._ids([_prompt_of(text) for text in texts if text.prompt]))
        result: list[Encoded | RenderingError] = []
        for example, own in zip(examples, rendered, strict=True):
            if isinstance(own, RenderingError):
                result.append(own)
                continue
            sequences = [
                self._sequence(one, next(wholes), next(prompts).ids if one.prompt else None)
                for one in own
            ]
            if isinstance(example, Labelled):
                ids = [sequence.tokens.ids for sequence in sequences]
                result.append(Encoded([], ids, [[False] * len(row) for row in ids]))
            else:
                result.append(self._divided(sequences))
        return result

    def _sequence(
        self, rendered: _Rendered, tokens: _Tokens, prompt: list[int] | None
    ) -> _Sequence:
        """Return a sequence; a tokenizer may have ended a plain text by itself."""
        added = bool(tokens.ids) and not rendered.chat and tokens.offsets[-1] == (0, 0)
        return _Sequence(rendered, tokens, prompt, added and tokens.ids[-1] in self.stop_ids)

    def _divided(self, sequences: list[_Sequence]) -> Encoded:
        """Divide an example's sequences where the first token that is trained on stands in any."""
        if any(sequence.start is None for sequence in sequences):  # nothing is left to train on
            none: list[list[int]] = [[] for _ in sequences]
            return Encoded(sequences[0].tokens.ids, none, [[] for _ in sequences])
        shared = min(
            *(sequence.start or 0 for sequence in sequences),
            *(_common(sequences[0].tokens.ids, sequence.tokens.ids) for sequence in sequences[1:]),
            len(sequences[0].tokens.ids),
        )
        prompt = sequences[0].tokens.ids[:shared]
        completions, masks = [], []
        for sequence in sequences:
            completion = sequence.tokens.ids[shared:]
            mask = sequence.mask[shared:]
            first = (sequence.start or 0) - shared
            mask[:first] = [True] * first
            if mask and mask[-1] and not self._ends(sequence):
                end = self._end()
                completion += end
                mask += [True] * len(end)
            completions.append(completion)
            masks.append(mask)
        return Encoded(prompt or self._opening(), completions, masks)

    def _ends(self, sequence: _Sequence) -> bool:
        """Return whether a sequence's last token, but for blanks, is one at which generation stops."""
        text, tokens = sequence.rendered.text, sequence.tokens
        for token, (start, end) in zip(reversed(tokens.ids), reversed(tokens.offsets), strict=True):
            if token in self.stop_ids:
                return True
            if start < end and not text[start:end].isspace():
                return False
        return False

    def _end(self) -> list[int]:
        own = self.tokenizer.eos_token_id
        return [own] if own is not None else list(self.stop_ids[:1])

    def _opening(self) -> list[int]:
        """Return what stands before a completion without a prompt: its first token needs one."""
        own = self.tokenizer.bos_token_id
        return self._end() if own is None else [own]

    def _rendered(self, example: Example) -> list[_Rendered]:
        match example:
            case Labelled(text=text):
                return [self._plain(text)]
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
            self._conversation(opening, _as_messages(one, "assistant"), tools)
            for one in completions
        ]

    def _plain(self, text: str, border: int = 0, prompt: str | None = None) -> _Rendered:
        end = self.tokenizer.eos_token
        if prompt is not None and end and len(text) > border and text.endswith(end):
            text = text.removesuffix(end)  # the end is written as a token
        literals = tuple(match.span() for match in self.special.finditer(text))
        spans = ((border, len(text)),) if len(text) > border else ()
        return _Rendered(text, spans, prompt or None, literals)

    def _prompt(self, prompt: Text, tools: Tools) -> _Rendered:
        if isinstance(prompt, str) or not prompt:
            return self._plain(str(prompt or ""))
        chat = _Chat(self, prompt, tools, opened=True)
        return _Rendered(chat.text, (), None, chat.literals, chat=True)

    def _conversation(self, prompt: Messages, completion: Messages, tools: Tools) -> _Rendered:
        """Return a conversation and what of it is trained on."""
        messages = prompt + completion
        answers = [i for i in range(len(prompt), len(messages)) if _is_answer(messages[i])]
        if not answers:
            raise RenderingError(NO_ANSWER)
        whole = _Chat(self, messages, tools)
        chosen = answers[-1:] if self.train_on == "last_answer" else answers
        if self.train_on == "completion":
            spans: tuple[Span, ...] = ((self._start(whole, len(prompt)), len(whole.text)),)
        elif GENERATION.search(self.template(tools)):
            spans = self._generated(whole, chosen[0])
        else:
            spans = tuple(self._answer(whole, i) for i in chosen)
        spans = tuple((start, end) for start, end in spans if end > start)
        if len(chosen) == 1 and spans and prompt:
            opened = _Chat(self, messages[: chosen[0]], tools, opened=True)
            if not whole.text.startswith(opened.text):
                return _joined(opened, whole, spans[0][0])
        before = whole.text[: spans[0][0]] if spans else None
        return _Rendered(whole.text, spans, before or None, whole.literals, chat=True)

    def _generated(self, whole: _Chat, first: int) -> tuple[Span, ...]:
        """Return the template's own generation blocks, from the message ``first`` on."""
        before = (
            len(_Chat(self, whole.messages[:first], whole.tools, opened=True).blocks)
            if first
            else 0
        )
        if len(whole.blocks) <= before:
            raise RenderingError(
                "the chat template's {% generation %} blocks do not hold the answers that are trained on"
            )
        return tuple(whole.blocks[before:])

    def _answer(self, whole: _Chat, number: int) -> Span:
        """Return where an answer of the assistant begins and ends in the whole."""
        start = self._start(whole, number)
        if number == len(whole.messages) - 1:
            return start, len(whole.text)
        end = self._border(_Chat(self, whole.messages[: number + 1], whole.tools), whole, number)
        if end is None:
            raise RenderingError(
                f"where message {number + 1} ends cannot be told from the chat template, which renders "
                "it otherwise when more follows; train on the last answer alone (data.train_on = "
                '"last_answer")'
            )
        return start, end

    def _start(self, whole: _Chat, number: int) -> int:
        """Return where the model takes over to write message ``number`` of the whole."""
        if not number:
            raise RenderingError("it begins with the assistant, and nothing stands before that")
        opened = _Chat(self, whole.messages[:number], whole.tools, opened=True)
        start = self._border(opened, whole, number - 1)
        if start is None:
            raise RenderingError(
                f"where message {number + 1} begins cannot be told from the chat template, which renders "
                "what stands before it otherwise when it follows"
            )
        return start

    def _border(self, part: _Chat, whole: _Chat, last: int) -> int | None:
        """Return where the end of ``part``, whose last message is ``last``, lies in the whole.

        The whole begins with the part; or what the part has behind the content of its last message stands
        there in the whole too, or as many of its tokens as do. ``None`` where neither holds.
        """
        if whole.text.startswith(part.text):
            return len(part.text)
        if last not in part.ends or last not in whole.ends:
            return None
        own, there = part.text[part.ends[last] :], whole.text[whole.ends[last] :]
        shared = len(own) if there.startswith(own) else self._shared_text(own, there)
        return whole.ends[last] + shared if shared else None

    def _shared_text(self, own: str, there: str) -> int:
        """Return how many characters two texts share from their beginning, in whole tokens."""
        first, second = self._ids([_Rendered(own, chat=True), _Rendered(there, chat=True)])
        shared = _common(first.ids, second.ids)
        return second.offsets[shared - 1][1] if shared else 0

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Finds special tokens in a text."""
        added = self.tokenizer.added_tokens_decoder.values()
        return _any_of(token.content for token in added if token.special and self._guarded)

    @cached_property
    def control(self) -> re.Pattern[str]:
        """Finds special tokens and added tokens that a chat template writes."""
        written = self.tokenizer.chat_template or ""
        written = "\0".join(written.values()) if isinstance(written, dict) else written
        added = self.tokenizer.added_tokens_decoder.values()
        return _any_of(
            token.content
            for token in added
            if self._guarded
            and (token.special or (not token.content.isspace() and token.content in written))
        )

    @property
    def _guarded(self) -> bool:
        return self.control_tokens == "text"

    def template(self, tools: Tools) -> str:
        """Return the chat template with its clock stopped."""
        own: str = self.tokenizer.get_chat_template(tools=list(tools) or None)
        return CLOCK.sub(lambda match: repr(self.date.strftime(match[2])), own)

    def render(self, messages: Messages, tools: Tools, *, opened: bool) -> tuple[str, list[Span]]:
        """Return a conversation as the template renders it, and its generation blocks.

        Args:
            messages: The conversation.
            tools: What the assistant may call, as JSON schemas.
            opened: Whether the assistant's next turn is opened.

        Raises:
            RenderingError: The template refuses it.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        own = [{name: value for name, value in m.items() if value is not None} for m in messages]
        template = self.template(tools)
        try:
            found: Any = render_jinja_template(
                [own],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=template,
                return_assistant_tokens_mask=bool(GENERATION.search(template)),
                add_generation_prompt=opened,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # a template raises whatever it likes, on purpose or not
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RenderingError(f"the chat template refuses it: {reason}") from error
        texts, spans = found
        return str(texts[0]), [(int(start), int(end)) for start, end in (spans[0] if spans else ())]

    def _ids(self, texts: Sequence[_Rendered]) -> list[_Tokens]:
        """Tokenise texts in two batches, those that a template wrote and those that it did not."""
        found: dict[int, _Tokens] = {}
        for chat in (False, True):
            own = [i for i, text in enumerate(texts) if text.chat is chat]
            if not own:
                continue
            batch = self.tokenizer(
                [texts[i].text for i in own],
                add_special_tokens=not chat,
                return_offsets_mapping=bool(self.tokenizer.is_fast),
                verbose=False,
            )
            for place, i in enumerate(own):
                ids = list(batch["input_ids"][place])
                offsets = (
                    [(int(a), int(b)) for a, b in batch["offset_mapping"][place]]
                    if self.tokenizer.is_fast
                    else self._offsets(texts[i].text, ids)
                )
                if not chat and len(ids) > 1 and ids[0] == ids[1] == self.tokenizer.bos_token_id:
                    ids, offsets = ids[1:], offsets[1:]  # the text was rendered beforehand
                found[i] = self._as_text(texts[i], _Tokens(ids, offsets))
        return [found[i] for i in range(len(texts))]

    def _as_text(self, rendered: _Rendered, tokens: _Tokens) -> _Tokens:
        """Replace control tokens where they are somebody's text."""
        if not rendered.literals:
            return tokens
        ids: list[int] = []
        offsets: list[Span] = []
        for token, (start, end) in zip(tokens.ids, tokens.offsets, strict=True):
            own = [s for s in rendered.literals if s[0] < end and start < s[1]]
            if own and token in self._added:
                text = self._text_ids(rendered.text[start:end])
                ids += text
                offsets += [(start, end)] * len(text)
            else:
                ids.append(token)
                offsets.append((start, end))
        return _Tokens(ids, offsets)

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self.tokenizer.added_tokens_decoder)

    def _text_ids(self, text: str) -> list[int]:
        """Return a control token's name as the tokens of plain text."""
        ids = self._after_newline(text)
        if self._added.isdisjoint(ids):
            return ids
        return [  # an added token that is no special one: the tokenizer finds it in any text
            *self._after_newline(text[:1]),
            *self._after_newline(text[1:]),
        ]

    def _after_newline(self, text: str) -> list[int]:
        """Return the tokens of a text that stands within another: without a blank put before it."""
        lead = self.tokenizer.encode("\n", add_special_tokens=False)
        ids: list[int] = self.tokenizer.encode(
            "\n" + text, add_special_tokens=False, split_special_tokens=True
        )
        if ids[: len(lead)] == lead:
            return ids[len(lead) :]
        own: list[int] = self.tokenizer.encode(
            text, add_special_tokens=False, split_special_tokens=True
        )
        return own

    def _offsets(self, text: str, ids: Sequence[int]) -> list[Span]:
        """Return where tokens stand, for tokenizers that do not say: by the text of each beginning."""
        ends = [len(self.tokenizer.decode(ids[:n])) for n in range(len(ids) + 1)]
        return [(min(a, len(text)), min(b, len(text))) for a, b in itertools.pairwise(ends)]


class _Chat:
    """A conversation under a template, and where things are in its text."""

    def __init__(
        self, encoder: TextEncoder, messages: Messages, tools: Tools, *, opened: bool = False
    ) -> None:
        """Render it, with the assistant's next turn opened or not."""
        self.encoder, self.messages, self.tools, self.opened = encoder, messages, tools, opened
        self.text, self.blocks = encoder.render(messages, tools, opened=opened)

    @property
    def ends(self) -> Mapping[int, int]:
        """Message to where its content ends; those that are found again once."""
        return self._places[0] if self._places else {}

    @property
    def literals(self) -> tuple[Span, ...]:
        """Where control tokens stand in somebody's text.

        Raises:
            RenderingError: There are some, and the template changes the text that they are in.
        """
        if not any(self._pattern(own).search(text) for own, text in self._texts):
            return ()
        if self._places is None:
            raise RenderingError(
                "control tokens of this tokenizer stand in its text, and the chat template changes that "
                "text so that they are not found again"
            )
        found = (self.encoder.control.match(self.text, at) for at in self._places[1])
        return tuple(match.span() for match in found if match)

    @property
    def _texts(self) -> Iterator[tuple[Mapping[str, Any], str]]:
        """Every text of every message and tool, with the one that it is of."""
        for own in (*self.messages, *self.tools):
            texts: list[str] = []
            _map_strings(own, lambda text, kept=texts: kept.append(text) or text)
            yield from ((own, text) for text in texts)

    def _pattern(self, own: Mapping[str, Any]) -> re.Pattern[str]:
        """Return what is a control token in a message or tool.

        The assistant may write added tokens of its template, such as those around reasoning.
        """
        answer = own.get("role") == "assistant"
        return self.encoder.special if answer else self.encoder.control

    @cached_property
    def _places(self) -> tuple[Mapping[int, int], list[int]] | None:
        """Where contents end and literals begin, by characters of private use put there and rendered.

        ``None`` where the text is another one with them than without.
        """
        contents = [_text_of(message) for message in self.messages]
        literal, ending = _marks(self.text, contents, len(self.messages))
        marked = []
        for number, message in enumerate(self.messages):
            own = self._with_literals(message, literal)
            if (contents[number] or "").strip():
                own = {**own, "content": _ended(own["content"], chr(ending + number))}
            marked.append(own)
        tools = [self._with_literals(tool, literal) for tool in self.tools]
        try:
            text, _ = self.encoder.render(tuple(marked), tools, opened=self.opened)
        except RenderingError:
            return None
        clean, found = _unmarked(text, literal, ending + len(self.messages))
        if clean != self.text:
            return None
        count = Counter(mark for mark, _ in found)
        ends = {mark - ending: at for mark, at in found if mark >= ending and count[mark] == 1}
        return ends, [at for mark, at in found if mark == ord(literal)]

    def _with_literals(self, own: Mapping[str, Any], mark: str) -> dict[str, Any]:
        """Return a message or tool with a mark before each control token in its texts."""
        pattern = self._pattern(own)
        marked: dict[str, Any] = _map_strings(
            own, lambda text: pattern.sub(lambda match: mark + match[0], text)
        )
        return marked


@dataclass(frozen=True)
class _Tokens:
    """Token ids and which characters each stands for."""

    ids: list[int]
    offsets: list[Span]


@dataclass(frozen=True)
class _Sequence:
    """A rendered text with its tokens, and those of its prompt alone."""

    rendered: _Rendered
    tokens: _Tokens
    prompt: list[int] | None
    added_end: bool

    @cached_property
    def mask(self) -> list[bool]:
        """Which tokens have a character that is trained on."""
        mask = [False] * len(self.tokens.ids)
        spans = iter(self.rendered.spans)
        span = next(spans, None)
        for number, (start, end) in enumerate(self.tokens.offsets):
            while span is not None and start >= span[1]:
                span = next(spans, None)
            if span is None:
                break
            mask[number] = end > span[0] and start < end
        if self.added_end and True in mask:
            mask[-1] = True
        return mask

    @cached_property
    def start(self) -> int | None:
        """The first token that is trained on; where tokens of prompt and whole differ, that one."""
        if True not in self.mask:
            return None
        first = self.mask.index(True)
        return first if self.prompt is None else min(first, _common(self.prompt, self.tokens.ids))


def _joined(opened: _Chat, whole: _Chat, start: int) -> _Rendered:
    """Return a prompt as it is rendered for generation, and after it what the whole has from ``start`` on.

    A template may render what stands before an answer otherwise once that is there; what is trained is what
    is asked at generation.
    """
    shift = len(opened.text) - start
    literals = [(a + shift, b + shift) for a, b in whole.literals if a >= start]
    text = opened.text + whole.text[start:]
    spans = ((len(opened.text), len(text)),)
    return _Rendered(text, spans, opened.text, (*opened.literals, *literals), chat=True)


def _prompt_of(rendered: _Rendered) -> _Rendered:
    """Return the prompt of a rendered text as a text of its own."""
    prompt = rendered.prompt or ""
    literals = tuple(span for span in rendered.literals if span[1] <= len(prompt))
    return _Rendered(prompt, (), None, literals, rendered.chat)


def _as_messages(text: Text, role: str) -> Messages:
    if isinstance(text, str):
        return ({"role": role, "content": text},) if text else ()
    return text


def _is_answer(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def _text_of(message: Message) -> str | None:
    """Return a message's text, of its last part where it has several."""
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return content
    texts = [str(part["text"]) for part in content if isinstance(part.get("text"), str)]
    return texts[-1] if texts else None


def _ended(content: Any, mark: str) -> Any:
    """Put a mark behind a content, before the blanks at its end, which templates may trim."""
    if isinstance(content, str):
        body = content.rstrip()
        return body + mark + content[len(body) :]
    last = max(i for i, part in enumerate(content) if isinstance(part.get("text"), str))
    return [
        {**part, "text": _ended(part["text"], mark)} if i == last else part
        for i, part in enumerate(content)
    ]


def _map_strings(value: Any, change: Any) -> Any:
    """Return a message or tool with every text in it changed, but for its role and kinds."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            name: own if name in ("role", "type") else _map_strings(own, change)
            for name, own in value.items()
        }
    if isinstance(value, list | tuple):
        return [_map_strings(own, change) for own in value]
    return value


def _marks(text: str, contents: Sequence[str | None], count: int) -> tuple[str, int]:
    """Return the mark of a literal and the number of the first end mark, none of them in the text."""
    for base in PRIVATE_USE:
        used = range(base, base + count + 1)
        if not any(ord(c) in used for own in (text, *contents) for c in own or ""):
            return chr(base), base + 1
    raise RenderingError("it holds characters of both planes of private use (U+F0000, U+100000)")


def _unmarked(text: str, literal: str, end: int) -> tuple[str, list[tuple[int, int]]]:
    """Return a text without marks, and each mark's number with where it stood in that text."""
    clean: list[str] = []
    found = []
    length = last = 0
    for match in re.finditer(f"[{literal}-{chr(end)}]", text):
        clean.append(text[last : match.start()])
        length += match.start() - last
        last = match.end()
        found.append((ord(match[0]), length))
    return "".join([*clean, text[last:]]), found


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of tokens, longer ones first; of none, one that never matches."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    for position, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return position
    return min(len(left), len(right))
