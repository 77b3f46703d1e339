"""Conversations under a chat template: their text, and where the answers in it begin and end.

Which characters are trained on is found by the template's ``{% generation %}`` blocks where it has them,
else by rendering the conversation up to each turn. A border is taken only where the text around it is the
same in both renderings; a conversation without one is refused, never cut elsewhere.

Control tokens (special tokens, and added tokens that the template writes) that stand in somebody's text
are found, so that they can be encoded as that text.
"""

from __future__ import annotations

import datetime
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedloom.data.examples import Message
from fedloom.data.sources import ControlTokens, TrainOn
from fedloom.errors import first_line

CLOCK = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = "4711"
"""A content that a template is asked to render."""

PRIVATE_USE = (0xF0000, 0x100000)
"""Where the characters that mark places in a conversation are taken from, while it is rendered."""

REASONED = "</think>"
"""What stands between the reasoning and the answer, in the content of an answer."""

LAST = '; train on the last answer alone (data.train_on = "last_answer") where it is a prompt that moves'

TYPES = ("text", "function", "object", "string", "number", "integer", "boolean", "array", "null")
"""Values of ``type`` that say what something is, in parts, calls and JSON schemas."""

NO_ANSWER = "no answer of the assistant in the completion"

Span = tuple[int, int]
Messages = tuple[Message, ...]
Tools = Sequence[Mapping[str, Any]]


class RenderingError(Exception):
    """A conversation that the template refuses, or whose borders cannot be trusted."""


@dataclass(frozen=True)
class Rendered:
    """A text, and what is known of its characters.

    Attributes:
        text: As it is tokenised.
        spans: What is trained on.
        prompt: The prompt as a text of its own, where ``text`` begins with it.
        literals: Where control tokens stand in somebody's text.
        chat: Whether the template wrote it, special tokens and all.
        closed: Whether nothing is added behind it that is trained on, and no token before its spans.
    """

    text: str
    spans: tuple[Span, ...] = ()
    prompt: str | None = None
    literals: tuple[Span, ...] = ()
    chat: bool = False
    closed: bool = False

    @property
    def open_ended(self) -> bool:
        """Whether what is trained on reaches the end of the text, and goes on there."""
        return bool(self.spans) and self.spans[-1][1] == len(self.text) and not self.closed


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template.

    Attributes:
        tokenizer: A Hugging Face tokenizer.
        control_tokens: Whether control tokens in somebody's text are text, or control tokens.
        date: What the template's clock says.
    """

    tokenizer: Any
    control_tokens: ControlTokens
    date: datetime.date

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
        written = literal_text(written)
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

    def source(self, tools: Tools) -> str:
        """Return the chat template with its clock stopped.

        Raises:
            RenderingError: Its clock is asked for a form that the template makes up.
        """
        own: str = self.tokenizer.get_chat_template(tools=list(tools) or None)
        own = CLOCK.sub(lambda match: repr(self.date.strftime(match[2])), own)
        if "strftime_now(" in own:
            raise RenderingError(
                "the chat template asks for the time in a form that it makes up, so that its clock "
                "cannot be stopped"
            )
        return own

    @cached_property
    def takes_parts(self) -> bool:
        """Whether contents must be lists of parts, as those of models that see are."""
        asked = [{"role": "user", "content": PROBE}]
        try:
            return PROBE not in self._rendered(asked, (), opened=True)[0]
        except RenderingError:
            return True

    def render(self, messages: Messages, tools: Tools, *, opened: bool) -> tuple[str, list[Span]]:
        """Return a conversation as the template renders it, and its generation blocks.

        Args:
            messages: The conversation.
            tools: What the assistant may call, as JSON schemas.
            opened: Whether the assistant's next turn is opened.

        Raises:
            RenderingError: The template refuses it.
        """
        own = [
            {
                name: self._content(value) if name == "content" else value
                for name, value in message.items()
                if value is not None
            }
            for message in messages
        ]
        return self._rendered(own, tools, opened=opened)

    def _content(self, content: Any) -> Any:
        """Return a content as the template takes it: a text, or one part of text."""
        text = _joined_text(content)
        return [{"type": "text", "text": text}] if self.takes_parts else text

    def _rendered(
        self, own: list[dict[str, Any]], tools: Tools, *, opened: bool
    ) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.source(tools)
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
            reason = first_line(error)
            raise RenderingError(f"the chat template refuses it: {reason}") from error
        texts, spans = found
        return str(texts[0]), [(int(start), int(end)) for start, end in (spans[0] if spans else ())]


class Chat:
    """A conversation under a template, and where things are in its text."""

    def __init__(
        self, template: ChatTemplate, messages: Messages, tools: Tools, *, opened: bool = False
    ) -> None:
        """Render it, with the assistant's next turn opened or not."""
        self.template, self.messages, self.tools, self.opened = template, messages, tools, opened
        self.text, self.blocks = template.render(messages, tools, opened=opened)
        self._before: dict[int, Chat] = {}

    def before(self, number: int) -> Chat:
        """Return what stands before message ``number``, with that opened, as generation has it."""
        if number not in self._before:
            messages = self.messages[:number]
            self._before[number] = Chat(self.template, messages, self.tools, opened=True)
        return self._before[number]

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
        everything = (*self.messages, *self.tools)
        if any(self.template.control.search(name) for own in everything for name in _names(own)):
            raise RenderingError("a key in its tool calls or tools holds a control token")
        if not any(self._pattern(own).search(text) for own, text in self._texts):
            return ()
        if self._places is None:
            raise RenderingError(
                "control tokens of this tokenizer stand in its text, and the chat template changes that "
                "text so that they are not found again"
            )
        found = (self.template.control.match(self.text, at) for at in self._places[1])
        return tuple(match.span() for match in found if match)

    @property
    def _texts(self) -> Iterator[tuple[Mapping[str, Any], str]]:
        """Every text of every message and tool, with the one that it is of."""
        joined = ({**own, "content": _text_of(own)} for own in self.messages)
        for own in (*joined, *self.tools):
            texts: list[str] = []
            _map_strings(own, lambda text, kept=texts: kept.append(text) or text)
            yield from ((own, text) for text in texts)

    def _pattern(self, own: Mapping[str, Any]) -> re.Pattern[str]:
        """Return what is a control token in a message or tool.

        The assistant may write added tokens of its template, such as those around reasoning.
        """
        answer = own.get("role") == "assistant"
        return self.template.special if answer else self.template.control

    @cached_property
    def _places(self) -> tuple[Mapping[int, int], list[int]] | None:
        """Where contents end and literals begin, by characters of private use put there and rendered.

        ``None`` where the text is another one with them than without.
        """
        contents = [_text_of(message) for message in self.messages]
        literal, ending = _marks(self.text, contents, len(self.messages))
        marked = []
        for number, message in enumerate(self.messages):
            own = self._with_literals({**message, "content": contents[number]}, literal)
            if (contents[number] or "").strip():
                own = {**own, "content": _ended(own["content"], chr(ending + number))}
            marked.append(own)
        tools = [self._with_literals(tool, literal) for tool in self.tools]
        try:
            text, _ = self.template.render(tuple(marked), tools, opened=self.opened)
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
class Answers:
    """Finds what is trained on of a conversation.

    Attributes:
        template: Renders it.
        train_on: Of the completion: every answer of the assistant, the last one, or everything.
        shared: Returns how many characters two texts share from their beginning, in whole tokens.
        stops: Names of the tokens at which generation stops.
    """

    template: ChatTemplate
    train_on: TrainOn
    shared: Callable[[str, str], int]
    stops: tuple[str, ...]

    def find(self, prompt: Messages, completion: Messages, tools: Tools) -> Rendered:
        """Return a conversation and what of it is trained on.

        Raises:
            RenderingError: The template refuses it, leaves something out, or its borders are not found.
        """
        messages = prompt + completion
        answers = [i for i in range(len(prompt), len(messages)) if _is_answer(messages[i])]
        if not answers:
            raise RenderingError(NO_ANSWER)
        whole = Chat(self.template, messages, tools)
        _require_tools(self.template, messages, tools)
        chosen = answers[-1:] if self.train_on == "last_answer" else answers
        spans = self._spans(whole, chosen, len(prompt))
        if len(chosen) == 1 and spans and chosen[0]:
            opened = whole.before(chosen[0])
            if _is_moved(opened, whole, chosen[0] - 1):
                joined = _joined(opened, whole, spans[0][0])
                return _complete(joined, messages, chosen)
        before = whole.text[: spans[0][0]] if spans else None
        found = Rendered(whole.text, spans, before or None, whole.literals, chat=True)
        return _complete(found, messages, chosen)

    def _spans(self, whole: Chat, chosen: Sequence[int], border: int) -> tuple[Span, ...]:
        """Return what is trained on, without spans in which nothing stands."""
        if self.train_on == "completion":
            spans: tuple[Span, ...] = ((self._start(whole, border), len(whole.text)),)
        else:
            spans = self._generated(whole, chosen[0], len(chosen)) or tuple(
                self._answer(whole, number) for number in chosen
            )
        return tuple((start, end) for start, end in spans if end > start)

    def _generated(self, whole: Chat, first: int, count: int) -> tuple[Span, ...]:
        """Return the template's own generation blocks from the message ``first`` on, and their ends.

        None where there are fewer than answers: then they do not say what is generated.
        """
        if not GENERATION.search(self.template.source(whole.tools)):
            return ()
        before = 0
        if first:
            before = len(whole.before(first).blocks)
        blocks = whole.blocks[before:]
        if len(blocks) < count:
            return ()
        return tuple((start, self._with_stop(whole.text, end)) for start, end in blocks)

    def _with_stop(self, text: str, end: int) -> int:
        """Return the end of a block with the stop token right behind it, if it has none itself."""
        if any(text[:end].rstrip().endswith(stop) for stop in self.stops):
            return end
        return end + next((len(stop) for stop in self.stops if text.startswith(stop, end)), 0)

    def _answer(self, whole: Chat, number: int) -> Span:
        """Return where an answer of the assistant begins and ends in the whole."""
        start = self._start(whole, number)
        if number == len(whole.messages) - 1:
            return start, len(whole.text)
        end = self._border(
            Chat(self.template, whole.messages[: number + 1], whole.tools), whole, number
        )
        if end is None:
            raise RenderingError(
                f"where message {number + 1} ends cannot be told from the chat template, which renders "
                "it otherwise when more follows; train on the last answer alone (data.train_on = "
                '"last_answer")'
            )
        return start, end

    def _start(self, whole: Chat, number: int) -> int:
        """Return where the model takes over to write message ``number`` of the whole."""
        if not number:
            raise RenderingError("it begins with the assistant, and nothing stands before that")
        start = self._border(whole.before(number), whole, number - 1)
        if start is None:
            raise RenderingError(
                f"where message {number + 1} begins cannot be told from the chat template, which renders "
                "what stands before it otherwise when it follows"
            )
        return start

    def _border(self, part: Chat, whole: Chat, last: int) -> int | None:
        """Return where the end of ``part``, whose last message is ``last``, lies in the whole.

        The whole begins with the part; or what the part has behind the content of its last message stands
        there in the whole too, or as many of its tokens as do. ``None`` where neither holds.
        """
        if whole.text.startswith(part.text):
            return len(part.text)
        if last not in part.ends or last not in whole.ends:
            return None
        own, there = part.text[part.ends[last] :], whole.text[whole.ends[last] :]
        shared = len(own) if there.startswith(own) else self.shared(own, there)
        return whole.ends[last] + shared if shared else None


def _is_moved(opened: Chat, whole: Chat, last: int) -> bool:
    """Return whether a template renders what stands before an answer otherwise once that is there.

    Not what it opens the answer with: that is the template's to leave out.
    """
    if whole.text.startswith(opened.text):
        return False
    if last not in opened.ends or last not in whole.ends:
        return True
    return opened.text[: opened.ends[last]] != whole.text[: whole.ends[last]]


def _joined(opened: Chat, whole: Chat, start: int) -> Rendered:
    """Return a prompt as generation has it, and after it what the whole has from ``start`` on.

    What is trained is what is asked at generation, where a template moves the prompt about.
    """
    shift = len(opened.text) - start
    literals = [(a + shift, b + shift) for a, b in whole.literals if a >= start]
    text = opened.text + whole.text[start:]
    spans = ((len(opened.text), len(text)),)
    return Rendered(text, spans, opened.text, (*opened.literals, *literals), chat=True)


def _complete(rendered: Rendered, messages: Messages, chosen: Sequence[int]) -> Rendered:
    """Return a rendered conversation in which everything stands that was said.

    Of an answer the template may leave out the reasoning, but of the last one that is trained on.

    Raises:
        RenderingError: Something is left out or changed.
    """
    for number, message in enumerate(messages):
        said = _joined_text(message.get("content") or "").strip()
        if _is_answer(message) and number != chosen[-1] and said not in rendered.text:
            said = said.rpartition(REASONED)[2].strip()
        if said not in rendered.text and " ".join(said.split()) not in rendered.text:
            raise RenderingError(
                f"the chat template leaves out or changes what message {number + 1} "
                f"({message['role']}) says{LAST if len(chosen) > 1 else ''}"
            )
        for call in message.get("tool_calls") or ():
            if call["function"]["name"] not in rendered.text:
                raise RenderingError(
                    f"the chat template leaves out the tool calls of message {number + 1}"
                )
    return rendered


def _require_tools(template: ChatTemplate, messages: Messages, tools: Tools) -> None:
    """Refuse tools that the template does not write.

    Raises:
        RenderingError: The text is the same without them.
    """
    if tools and template.render(messages, tools, opened=False) == template.render(
        messages, (), opened=False
    ):
        raise RenderingError("the chat template writes no tools, and the row has some")


def _is_answer(message: Message) -> bool:
    return bool(message["role"] == "assistant")


def _text_of(message: Message) -> str | None:
    """Return a message's text, ``None`` where it has no content."""
    content = message.get("content")
    return None if content is None else _joined_text(content)


def _ended(content: str, mark: str) -> str:
    """Put a mark behind a content, before the blanks at its end, which templates may trim."""
    body = content.rstrip()
    return body + mark + content[len(body) :]


def _joined_text(content: Any) -> str:
    """Return a content as one text."""
    if isinstance(content, str):
        return content
    return "".join(str(part["text"]) for part in content if isinstance(part.get("text"), str))


def _map_strings(value: Any, change: Any, *, within: bool = False) -> Any:
    """Return a message or tool with every text in it changed, but for a message's own role."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            name: own
            if (name == "role" and not within) or (name == "type" and own in TYPES)
            else _map_strings(own, change, within=True)
            for name, own in value.items()
        }
    if isinstance(value, list | tuple):
        return [_map_strings(own, change, within=True) for own in value]
    return value


def _names(value: Any) -> Iterator[str]:
    """Yield every key in a message or tool."""
    if isinstance(value, Mapping):
        yield from map(str, value)
        yield from (name for own in value.values() for name in _names(own))
    elif isinstance(value, list | tuple):
        yield from (name for own in value for name in _names(own))


def literal_text(template: str) -> str:
    """Return what a template writes by itself: its text, and the text constants in its expressions."""
    template = re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)
    code = re.compile(r"\{\{.*?\}\}|\{%.*?%\}", re.DOTALL)
    constant = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
    key = re.compile(r"\[\s*(['\"])\w+\1\s*\]")  # m['content'] is written, and nothing of it
    inside = [
        text for found in code.findall(template) for text in constant.findall(key.sub("", found))
    ]
    return "\0".join([*code.split(template), *inside])


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
