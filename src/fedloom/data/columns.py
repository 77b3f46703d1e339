"""Rows to examples: the column conventions of TRL, and what is wrong with a row that has others.

A row is a dictionary as it was read. ``RowError`` says why it gives no example; the caller counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fedloom.data.examples import (
    Example,
    Feedback,
    Instruction,
    Labelled,
    Message,
    Preference,
    Text,
)

Row = Mapping[str, Any]

TURN = "\n\nAssistant:"
"""Where an answer begins in dialogues written as plain text (the layout of HH-RLHF)."""

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "system": "system",
    "user": "user",
    "assistant": "assistant",
}
"""Roles, with the names of the ShareGPT layout."""

LONGEST_COLUMN = 200
"""Characters; a column with more is text, not something to divide clients by."""

MISSING = (None, "")
"""What stands where an answer of a pair is not there."""

SIDES = ("chosen", "rejected", "output_1", "output_2")

REQUIRED = {
    "instruction": (("completion",), ("messages",), ("conversations",), ("text",)),
    "preference": (("chosen", "rejected"), ("output_1", "output_2", "label")),
    "feedback": (("prompt", "completion", "label"), ("messages", "label")),
    "labelled": (("text", "label"),),
}
"""Columns of each kind; any one of the alternatives will do."""


class RowError(Exception):
    """A row that gives no example, and why; ``counted`` rows are dropped without being malformed."""

    def __init__(self, reason: str, *, malformed: bool = True) -> None:
        """Keep the reason."""
        super().__init__(reason)
        self.malformed = malformed


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


def first_answers(row: dict[str, Any], between: str | None) -> dict[str, Any]:
    """Return a row with one answer on either side: the first of a list or of a text cut there."""
    found: dict[str, Any] = {name: row[name] for name in ("chosen", "rejected") if name in row}
    for name, answer in found.items():
        found[name] = _answers(answer)[0]
        if isinstance(answer, str) and between:
            found[name] = answer.split(between, 1)[0]
    return {**row, **found}


def fill_template(template: str, row: Row) -> str:
    """Replace ``{name}`` by the row's column; ``{{`` and ``}}`` are braces, nothing else is read."""

    def value(match: re.Match[str]) -> str:
        if match[0] in ("{{", "}}"):
            return match[0][0]
        if match[1] not in row:
            raise RowError(f"column {match[1]!r} of the template is missing")
        return str(row[match[1]])

    return re.sub(r"\{\{|\}\}|\{([^{}]+)\}", value, template)


def template_columns(template: str) -> list[str]:
    """Return the columns that a template names."""
    names = re.findall(r"\{\{|\}\}|\{([^{}]+)\}", template)
    return [name for name in names if name]


def make_example(kind: str, number: int, row: Row) -> Example:
    """Return the example of a row under our names.

    Args:
        kind: instruction, preference, feedback or labelled.
        number: Its row number, kept for messages.
        row: Columns; those that are not part of the example are kept for partitions.

    Raises:
        RowError: The row gives none.
    """
    extra = {
        name: str(value)
        for name, value in row.items()
        if isinstance(value, str | int | float | bool)
        and name not in ("prompt", "completion", "text")
        and len(str(value)) <= LONGEST_COLUMN
    }
    if kind == "instruction":
        return _instruction(number, row, extra)
    if kind == "preference":
        return _preference(number, row, extra)
    if kind == "feedback":
        extra.pop("label", None)
        return _feedback(number, row, extra)
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise RowError(f"label must be a class name or number, got {label!r}")
    extra.pop("label", None)
    return Labelled(number, _string(row, "text"), str(label), extra)


def _instruction(number: int, row: Row, extra: dict[str, str]) -> Instruction:
    if "completion" in row:
        first, *others = _answers(row["completion"])
        own = _text({"completion": first}, "completion")
        return Instruction(number, _text(row, "prompt", ""), own, extra, tuple(others))
    if "messages" in row or "conversations" in row:
        prompt, completion = _last_answer(_messages(row))
        return Instruction(number, prompt, completion, extra)
    return Instruction(number, "", _string(row, "text"), extra)


def _answers(value: Any) -> list[Any]:
    """Return what an answer's column holds as a list: several texts are several answers."""
    value = value.tolist() if hasattr(value, "tolist") else value
    several = isinstance(value, list) and value and all(isinstance(text, str) for text in value)
    return value if several else [value]


def _preference(number: int, row: Row, extra: dict[str, str]) -> Preference:
    row = _judged_outputs(row) if "output_1" in row and "chosen" not in row else row
    extra = {name: value for name, value in extra.items() if name not in SIDES}
    missing = [name for name in ("chosen", "rejected") if row.get(name) in MISSING]
    if missing:
        raise RowError(f"{' and '.join(missing)} missing", malformed=len(missing) == 2)
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if chosen == rejected:
        raise RowError("chosen equals rejected", malformed=False)
    if "prompt" in row:
        prompt = _text(row, "prompt", "")
    elif "messages" in row or "conversations" in row:
        prompt = _messages(row)
    else:
        prompt, chosen, rejected = extract_prompt(chosen, rejected)
    if not chosen or not rejected:
        raise RowError("one answer is the beginning of the other", malformed=False)
    return Preference(number, prompt, chosen, rejected, extra)


def _judged_outputs(row: Row) -> dict[str, Any]:
    """Return a row of two outputs and which is better (LLMBar, AlpacaEval) as chosen and rejected."""
    label = row.get("label")
    if label not in (1, 2) or isinstance(label, bool):
        raise RowError(f"label must say which output is better, 1 or 2, got {_shown(label)}")
    result = {name: value for name, value in row.items() if name not in ("output_1", "output_2")}
    if "prompt" not in row:
        parts = [row[name] for name in ("instruction", "input") if row.get(name)]
        result["prompt"] = "\n\n".join(map(str, parts)) + "\n"
    return result | {"chosen": row[f"output_{label}"], "rejected": row.get(f"output_{3 - label}")}


def pair_or_feedback(number: int, row: Row) -> list[Example]:
    """Return a pair or, where it is none, the single answers that are in it.

    A pair with one answer missing becomes the other answer; one whose answers are alike becomes two
    rows, desirable and undesirable.

    Raises:
        RowError: There is no answer, or no prompt to be found before the only one.
    """
    given = [name for name in ("chosen", "rejected") if row.get(name) not in MISSING]
    if len(given) == 2 and row["chosen"] != row["rejected"]:
        return [make_example("preference", number, row)]
    rows: list[Example] = []
    for name in given:
        answer = _text(row, name)
        prompt: Text = _text(row, "prompt", "") if "prompt" in row else ""
        if "prompt" not in row:
            prompt, answer = _cut_last_answer(answer)
        single = {**row, "prompt": prompt, "completion": answer, "label": name == "chosen"}
        rows.append(make_example("feedback", number, _without_sides(single)))
    if not rows:
        raise RowError("chosen and rejected missing")
    return rows


def _cut_last_answer(text: Text) -> tuple[Text, Text]:
    """Cut a dialogue before its last answer."""
    if not isinstance(text, str):
        return _last_answer(text)
    turn = text.rfind(TURN)
    if turn < 0:
        raise RowError("no prompt: it cannot be told from a single answer", malformed=False)
    return text[: turn + len(TURN)], text[turn + len(TURN) :]


def _without_sides(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in SIDES}


def _feedback(number: int, row: Row, extra: dict[str, str]) -> Feedback:
    desirable = _truth(row.get("label"))
    if "completion" in row:
        return Feedback(
            number, _text(row, "prompt", ""), _text(row, "completion"), desirable, extra
        )
    prompt, completion = _last_answer(_messages(row))
    return Feedback(number, prompt, completion, desirable, extra)


def extract_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Take what two answers have in common at their start for the prompt.

    Conversations are cut at the first message that differs, as in TRL. Plain text is cut after the
    last "Assistant:" turn within the common part if there is one, else at the first character that
    differs (before the space in front of it), as in TRL.
    """
    common = 0
    for left, right in zip(chosen, rejected, strict=False):
        if left != right:
            break
        common += 1
    if isinstance(chosen, str) and isinstance(rejected, str):
        turn = chosen.rfind(TURN, 0, common)
        if turn >= 0:
            common = turn + len(TURN)
        elif common and chosen[common - 1] == " ":
            common -= 1
    return chosen[:common], chosen[common:], rejected[common:]


def _truth(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if value in (0, 1):
        return bool(value)
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "0", "1"):
        return value.strip().lower() in ("true", "1")
    raise RowError(f"label must be true or false, got {value!r}")


def _text(row: Row, name: str, default: str | None = None) -> Text:
    value = row.get(name, default)
    if isinstance(value, list | tuple) or hasattr(value, "tolist"):
        return _checked_messages(value, name)
    if isinstance(value, dict):
        return _checked_messages([value], name)
    return _string({name: value}, name, empty=default is not None)


def _string(row: Row, name: str, *, empty: bool = False) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise RowError(f"{name} must be text, got {_shown(value)}")
    if not value.strip() and not empty:
        raise RowError(f"{name} is empty")
    return value


def _messages(row: Row) -> tuple[Message, ...]:
    name = "messages" if "messages" in row else "conversations"
    return _checked_messages(row.get(name), name)


def _checked_messages(value: Any, name: str) -> tuple[Message, ...]:
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, list | tuple) or not value:
        raise RowError(f"{name} must be a list of messages, got {_shown(value)}")
    return tuple(_message(item, name) for item in value)


def _message(item: Any, name: str) -> Message:
    if not isinstance(item, dict):
        raise RowError(f"{name} must hold messages with role and content, got {_shown(item)}")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if role not in ROLES or not isinstance(content, str):
        raise RowError(f"{name} must hold messages with role and content, got {_shown(item)}")
    return {"role": ROLES[role], "content": content}


def _last_answer(messages: tuple[Message, ...]) -> tuple[Text, Text]:
    """Cut a conversation before its last assistant message, which is the completion."""
    if messages[-1]["role"] != "assistant":
        raise RowError("the last message must be the assistant's")
    return messages[:-1], messages[-1:]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
