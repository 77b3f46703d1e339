"""Rows to examples: the columns of a layout under our names, and what is wrong with a row.

A row is a dictionary as it was read. ``RowError`` says why it gives no example; the caller counts.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedloom.data.examples import (
    Example,
    Feedback,
    Instruction,
    Labelled,
    Message,
    Preference,
    Text,
    Tools,
)
from fedloom.data.labels import (
    Values,
    best_of,
    better,
    by_scores,
    desirable,
    majority,
    number_of,
    require_margin,
)
from fedloom.data.layouts import Layout, recognise
from fedloom.data.messages import MEDIA, all_answers, checked_messages, checked_tools, last_answer
from fedloom.data.rows import Row, RowError, as_list, common_prefix, shown

TURN = "\n\nAssistant:"
"""Where an answer begins in dialogues written as plain text (the layout of HH-RLHF)."""

LONGEST_COLUMN = 200
"""Characters; a column with more is text, not something to divide clients by."""

MISSING = (None, "")
"""What stands where an answer of a pair is not there."""

PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
"""What of a template is not text: a column in braces, or two braces, which are one."""

TEXTS = (
    "prompt",
    "completion",
    "text",
    "chosen",
    "rejected",
    "first",
    "second",
    "answers",
    "messages",
)
"""Our names of what is part of an example, and nothing to divide clients by."""

PAIR = ("chosen", "rejected")

SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("score_1", "score_2"),
    ("score_a", "score_b"),
)
"""Columns with how good the answers of a pair were found."""


@dataclass(frozen=True)
class Reading:
    """How the rows of a file are read.

    Attributes:
        layout: Of its columns, after data.columns and data.template.
        values: ``data.values``: what labels mean.
        min_margin: ``data.min_margin``: scores that are closer are a tie.
        exact: The prompt was made by ``data.template``.
        between: ``data.answers_between``: what stands between several answers in one text.
        theirs: ``data.columns``: our name to the user's.
    """

    layout: Layout
    values: Values = field(default_factory=dict)
    min_margin: float | None = None
    exact: bool = False
    between: str | None = None
    theirs: Mapping[str, str] = field(default_factory=dict)

    def column(self, ours: str) -> str:
        """Return the column of a row, after data.columns, that is one of ours."""
        return self.layout.columns.get(ours, ours)

    def named(self, ours: str) -> str:
        """Return what the user calls one of our columns, for messages."""
        return self.theirs.get(self.column(ours), self.column(ours))

    def first_of(self, answer: Any, ours: str) -> Any:
        """Return one answer: the first of a list or of a text that holds several."""
        between = self.between or self.layout.between.get(ours)
        if isinstance(answer, str) and between:
            return answer.split(between, 1)[0]
        return _answers(answer)[0]


def renamed(row: Row, columns: Mapping[str, str], template: str | None) -> dict[str, Any]:
    """Return a row under our names.

    Args:
        row: As read.
        columns: Our name to theirs.
        template: Makes the prompt from their columns, ``"Question: {question}"``.
    """
    theirs = set(columns.values())
    result = {name: value for name, value in row.items() if name not in theirs}
    for ours, their in columns.items():
        if their not in row:
            raise RowError(f"column {their!r} is missing")
        result[ours] = row[their]
    if template is not None:
        result["prompt"] = fill_template(template, row)
    return result


def fill_template(template: str, row: Row) -> str:
    """Replace ``{name}`` by the row's column; ``{{`` and ``}}`` are braces, nothing else is read."""

    def value(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        if match[1] not in row:
            raise RowError(f"column {match[1]!r} of the template is missing")
        return str(row[match[1]])

    return PLACEHOLDER.sub(value, template)


def template_columns(template: str) -> list[str]:
    """Return the columns that a template names."""
    return [name for name in PLACEHOLDER.findall(template) if name]


def template_texts(template: str) -> list[str]:
    """Return the texts before, between and after the columns of a template, as they are filled in."""
    texts, end = [""], 0
    for match in PLACEHOLDER.finditer(template):
        texts[-1] += template[end : match.start()]
        end = match.end()
        if match[1]:
            texts.append("")
        else:
            texts[-1] += match[0][0]
    texts[-1] += template[end:]
    return texts


def reading_of(kind: str, row: Row) -> Reading:
    """Return how a single row is read, by the layout that it has.

    Raises:
        RowError: It has none of this kind.
    """
    found = recognise(kind, list(row))
    if found is None:
        raise RowError(f"no layout of {kind} data: {', '.join(map(str, row)) or 'no column'}")
    return Reading(found.layout)


def make_example(kind: str, number: int, row: Row, reading: Reading | None = None) -> Example:
    """Return the example of a row.

    Args:
        kind: instruction, preference, feedback or labelled.
        number: Its row number, kept for messages.
        row: Columns, after data.columns; those that are not part of the example are kept for partitions.
        reading: Of its file (default: by what this row has).

    Raises:
        RowError: The row gives none.
    """
    reading = reading or reading_of(kind, row)
    own, extra = _own(kind, row, reading)
    if kind == "instruction":
        return _instruction(number, row, own, extra, reading)
    if kind == "preference":
        return _preference(number, row, own, extra, reading)
    if kind == "feedback":
        return _feedback(number, row, own, extra, reading)
    label = own["label"]
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise RowError(
            f"{reading.named('label')} must be a class name or number, got {shown(label)}"
        )
    return Labelled(number, _string(own, "text", reading.named("text")), str(label), extra)


def pair_or_feedback(number: int, row: Row, reading: Reading | None = None) -> list[Example]:
    """Return a pair or, where it is none, the single answers that are in it.

    A pair with one answer missing becomes the other answer; one whose answers are alike becomes two
    rows, desirable and undesirable.

    Raises:
        RowError: There is no answer, or no prompt to be found before the only one.
    """
    reading = reading or reading_of("preference", {"chosen": None, "rejected": None, **row})
    own, extra = _own("preference", row, reading)
    chosen, rejected = _sides(row, own, reading)
    sides = {"chosen": chosen, "rejected": rejected}
    given = [name for name in sides if sides[name] not in MISSING]
    if len(given) == 2 and chosen != rejected:
        return [make_example("preference", number, row, reading)]
    rows: list[Example] = []
    for name in given:
        prompt: Text
        answer = _text(sides, name, reading.named(name))
        if "prompt" in own or "messages" in own:
            prompt, (answer,) = _one_form(_prompt(row, own, reading), [answer], [name])
        else:
            prompt, answer = _cut_last_answer(answer)
        tools = _tools(row, prompt, answer)
        rows.append(Feedback(number, prompt, answer, name == "chosen", extra, tools))
    if not rows:
        raise RowError("chosen and rejected missing")
    return rows


def extract_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Take what two answers have in common at their start for the prompt.

    Conversations are cut at the first message that differs, as in TRL. Plain text is cut after the
    last "Assistant:" turn within the common part if there is one, else at the first character that
    differs (before the space in front of it), as in TRL.
    """
    common = common_prefix(chosen, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        turn = chosen.rfind(TURN, 0, common)
        if turn >= 0:
            common = turn + len(TURN)
        elif common and chosen[common - 1] == " ":
            common -= 1
    return chosen[:common], chosen[common:], rejected[common:]


def margins(there: Sequence[str]) -> tuple[str, str] | None:
    """Return the columns with the scores of two answers, ``None`` where there are none."""
    return next((pair for pair in SCORES if set(pair) <= set(there)), None)


def _own(kind: str, row: Row, reading: Reading) -> tuple[dict[str, Any], dict[str, str]]:
    """Return a row's part of the example under our names, and its columns for partitions."""
    columns = reading.layout.columns
    needed = {ours: theirs for ours, theirs in columns.items() if ours not in PAIR}
    missing = [reading.named(ours) for ours, theirs in needed.items() if theirs not in row]
    if missing:
        raise RowError(f"{' and '.join(missing)} missing")
    texts = {theirs for ours, theirs in columns.items() if ours in TEXTS}
    texts |= {*reading.layout.optional, "prompt", "completion", "text"}
    texts |= {"label"} if kind in ("feedback", "labelled") else {"chosen", "rejected"}
    if str(row.get("tools")).lstrip()[:1] in ("[", "{"):
        texts.add("tools")  # JSON schemas; beside plain text a column of this name is anything
    extra = {
        name: str(value)
        for name, value in row.items()
        if isinstance(value, str | int | float | bool)
        and name not in texts
        and len(str(value)) <= LONGEST_COLUMN
    }
    return reading.layout.ours(row, exact=reading.exact), extra


def _instruction(
    number: int, row: Row, own: dict[str, Any], extra: dict[str, str], reading: Reading
) -> Instruction:
    if "text" in own:
        return Instruction(number, "", _string(own, "text", reading.named("text")), extra)
    prompt: Text
    if "messages" in own:
        messages, name = _messages(row, own, reading), reading.named("messages")
        prompt, completion = all_answers(messages, name)
        return Instruction(number, prompt, completion, extra, tools=_tools(row, completion))
    name = reading.named("completion")
    first, *others = _answers(own["completion"])
    given = _text({name: first}, name, name)
    prompt, (answer,) = _one_form(_prompt(row, own, reading), [given], [name])
    return Instruction(number, prompt, answer, extra, tuple(others), _tools(row, prompt, answer))


def _answers(value: Any) -> list[Any]:
    """Return what an answer's column holds as a list: several texts are several answers."""
    value = as_list(value)
    several = isinstance(value, list) and value and all(isinstance(text, str) for text in value)
    return value if several else [value]


def _preference(
    number: int, row: Row, own: dict[str, Any], extra: dict[str, str], reading: Reading
) -> Preference:
    sides = dict(zip(PAIR, _sides(row, own, reading), strict=True))
    missing = [name for name in PAIR if sides[name] in MISSING]
    if missing:
        raise RowError(f"{' and '.join(missing)} missing", malformed=len(missing) == 2)
    names = [reading.named(name) for name in PAIR]
    chosen, rejected = (_text(sides, ours, name) for ours, name in zip(PAIR, names, strict=True))
    if chosen == rejected:
        raise RowError("chosen equals rejected", malformed=False)
    if "prompt" in own or "messages" in own:
        prompt, (chosen, rejected) = _one_form(
            _prompt(row, own, reading), [chosen, rejected], names
        )
    else:
        prompt, chosen, rejected = extract_prompt(chosen, rejected)
    if not chosen or not rejected:
        raise RowError("one answer is the beginning of the other", malformed=False)
    tools = _tools(row, prompt, chosen, rejected)
    return Preference(number, prompt, chosen, rejected, extra, tools)


def _sides(row: Row, own: dict[str, Any], reading: Reading) -> tuple[Any, Any]:
    """Return the better and the worse of a row's answers, as they stand there.

    Raises:
        RowError: They are a tie, there is no verdict, or it is not understood.
    """
    if "answers" in own:
        answers = as_list(own["answers"])
        if not isinstance(answers, list | tuple) or len(answers) < 2:
            what = reading.named("answers")
            raise RowError(f"{what} must be a list of at least 2 answers, got {shown(answers)}")
    elif "first" in own:
        answers = [own["first"], own["second"]]
    else:
        answers = [own.get(name) for name in PAIR]
    best, worst = _places(row, own, answers, reading)
    return reading.first_of(answers[best], "chosen"), reading.first_of(answers[worst], "rejected")


def _places(
    row: Row, own: dict[str, Any], answers: Sequence[Any], reading: Reading
) -> tuple[int, int]:
    """Return which of the answers is chosen and which rejected."""
    names, margin, label = reading.layout.columns, reading.min_margin, reading.named("best")
    if "scores" in own:
        return by_scores(own["scores"], len(answers), margin, reading.named("scores"))
    if "score_first" in own:
        scores = [own["score_first"], own["score_second"]]
        columns = f"{reading.named('score_first')} and {reading.named('score_second')}"
        return by_scores(scores, 2, margin, columns)
    if "first" in own:
        pair = (names["first"], names["second"])
        if "vote_1" in own:
            votes = [ours for ours in names if ours.startswith("vote")]
            label = ", ".join(map(reading.named, votes))
            best = majority([own[ours] for ours in votes], reading.values, pair, label)
        elif "graded" in own:
            label = reading.named("graded")
            best = better(own["graded"], pair, reading.values, label, zero_ties=True)
        else:
            best = better(own["best"], pair, reading.values, label)
    elif "answers" in own and len(answers) == 2 and reading.values:
        best = better(own["best"], ("1", "2"), reading.values, label)
    elif "answers" in own:
        best = best_of(own["best"], answers, label)
    else:
        best = 0
    _require_margin(row, best, reading)
    return best, 1 if best == 0 else 0


def _require_margin(row: Row, best: int, reading: Reading) -> None:
    """Refuse a pair with scores beside it that are closer than data.min_margin."""
    columns, margin = margins(list(row)), reading.min_margin
    if margin is None or columns is None:
        return
    scores = [number_of(row[name]) for name in columns]
    if scores[0] is None or scores[1] is None:
        names = " and ".join(map(reading.named, columns))
        wrong = row[columns[scores.index(None)]]
        raise RowError(f"{names} must be numbers, got {shown(wrong)}")
    require_margin((scores[0] - scores[1]) * (-1 if best else 1), margin)


def _cut_last_answer(text: Text) -> tuple[Text, Text]:
    """Cut a dialogue before its last answer."""
    if not isinstance(text, str):
        return last_answer(text)
    turn = text.rfind(TURN)
    if turn < 0:
        raise RowError("no prompt: it cannot be told from a single answer", malformed=False)
    return text[: turn + len(TURN)], text[turn + len(TURN) :]


def _feedback(
    number: int, row: Row, own: dict[str, Any], extra: dict[str, str], reading: Reading
) -> Feedback:
    label = desirable(own["label"], reading.values, reading.named("label"))
    prompt: Text
    completion: Text
    if "messages" in own:
        prompt, completion = last_answer(_messages(row, own, reading), reading.named("messages"))
    else:
        name = reading.named("completion")
        answer = _text({name: own["completion"]}, name, name)
        prompt, (completion,) = _one_form(_prompt(row, own, reading), [answer], [name])
    return Feedback(number, prompt, completion, label, extra, _tools(row, prompt, completion))


def _one_form(
    prompt: Text, answers: Sequence[Text], names: Sequence[str]
) -> tuple[Text, list[Text]]:
    """Return prompt and answers as texts or all as messages, and what is the prompt's in it alone.

    Raises:
        RowError: An answer's last message is not the assistant's or is empty, or an answer is a whole
            conversation without the prompt.
    """
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers):
        return prompt, list(answers)
    chats = [
        ({"role": "assistant", "content": answer},) if isinstance(answer, str) else answer
        for answer in answers
    ]
    for chat, name in zip(chats, names, strict=True):
        last_answer(chat, name)
    whole = all(chat[0]["role"] != "assistant" for chat in chats)
    if isinstance(prompt, str) and not whole:
        prompt = ({"role": "user", "content": prompt},) if prompt else ()
    elif isinstance(prompt, str):
        start = _shared_start(chats)
        if prompt and prompt not in [message["content"] for message in start]:
            raise RowError(f"{' and '.join(names)} hold conversations without the prompt")
        prompt = start
        chats = [chat[len(start) :] for chat in chats]
    elif prompt and all(chat[: len(prompt)] == prompt for chat in chats):
        chats = [chat[len(prompt) :] for chat in chats]
    return prompt, list(chats)


def _shared_start(chats: Sequence[tuple[Message, ...]]) -> tuple[Message, ...]:
    """Return the messages that conversations begin with alike, each one's last left out."""
    start = chats[0][:-1]
    for chat in chats[1:]:
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(start, chat, strict=False))
        start = tuple(message for message, _ in same)
    return start


def _prompt(row: Row, own: dict[str, Any], reading: Reading) -> Text:
    """Return the prompt, which may be a conversation."""
    if "messages" in own:
        return _messages(row, own, reading)
    return _text(own, "prompt", reading.named("prompt"), empty=True) if "prompt" in own else ""


def _text(own: Mapping[str, Any], ours: str, name: str, *, empty: bool = False) -> Text:
    value = as_list(own[ours])
    if isinstance(value, list | tuple | dict):
        return checked_messages(value, name)
    return _string(own, ours, name, empty=empty)


def _string(own: Mapping[str, Any], ours: str, name: str, *, empty: bool = False) -> str:
    value = own[ours]
    if not isinstance(value, str):
        raise RowError(f"{name} must be text, got {shown(value)}", cause=f"{name} must be text")
    if not value.strip() and not empty:
        raise RowError(f"{name} is empty")
    return value


def _messages(row: Row, own: dict[str, Any], reading: Reading) -> tuple[Message, ...]:
    """Return a conversation; what stands beside ShareGPT's as ``system`` comes first."""
    name = reading.named("messages")
    messages = checked_messages(own["messages"], name)
    for key in MEDIA:
        if as_list(row.get(key)):
            raise RowError(f"{key} beside {name}; fedloom trains text")
    system = row.get("system")
    beside = (
        reading.column("messages") == "conversations" and isinstance(system, str) and system.strip()
    )
    if beside and messages[0]["role"] != "system":
        return ({"role": "system", "content": system}, *messages)
    return messages


def _tools(row: Row, *texts: Text) -> Tools:
    """Return the tools of a conversation; beside plain text a column of this name is something else."""
    if "tools" not in row or all(isinstance(text, str) for text in texts):
        return ()
    return checked_tools(row["tools"])
