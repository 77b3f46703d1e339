"""Layouts: which columns sets have, by kind, and how an example's own columns are made of them.

One table, :data:`FAMILIES`. A layout is a prompt, an answer and what is said of it, each by one of the
names that are common for it; the first that fits a file is taken, and all its rows are read by it. The
order is that of the table: TRL's names first, then conversations, then the others.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedloom.data.rows import Row, as_list

TRL = {"prompt", "completion", "chosen", "rejected", "messages"}
"""TRL's names of prompt and answers: what stands there is put together as it is."""

Slot = tuple["Part", ...]
"""Alternatives, of which a layout has one."""


@dataclass(frozen=True)
class Part:
    """Columns that are one part of a layout.

    Attributes:
        columns: Our name to theirs.
        optional: Columns that go with them where they are there.
        between: Our name of a column to what stands between the answers in it, of which the first is
            taken (``data.answers_between`` comes before it).
    """

    columns: tuple[tuple[str, str], ...]
    optional: tuple[str, ...] = ()
    between: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Layout:
    """A prompt, answers and what is said of them, by the names of a file's columns."""

    parts: tuple[Part, ...]

    @cached_property
    def columns(self) -> dict[str, str]:
        """Our name to theirs."""
        return {ours: theirs for part in self.parts for ours, theirs in part.columns}

    @cached_property
    def optional(self) -> tuple[str, ...]:
        """Columns of the prompt that a row may have."""
        return tuple(name for part in self.parts for name in part.optional)

    @cached_property
    def between(self) -> dict[str, str]:
        """Our name of a column that holds several answers to what stands between them."""
        return {ours: sign for part in self.parts for ours, sign in part.between}

    def name(self, there: Sequence[str] = ()) -> str:
        """Return its columns, with those optional ones that are ``there``: "question/answer"."""
        found: list[str] = []
        for part in self.parts:
            found += [theirs for _, theirs in part.columns]
            found += [name for name in part.optional if name in there]
        return "/".join(found)

    def missing(self, there: Sequence[str]) -> list[str]:
        """Return the columns of it that are not there."""
        return [theirs for theirs in self.columns.values() if theirs not in there]

    def ours(self, row: Row, *, exact: bool = False) -> dict[str, Any]:
        """Return a row's part of the example under our names; what the row lacks is left out.

        Args:
            row: Columns.
            exact: The prompt was made by a template and is left as it is.
        """
        found = {ours: row[theirs] for ours, theirs in self.columns.items() if theirs in row}
        texts = {theirs for ours, theirs in self.columns.items() if ours in ("prompt", *ANSWERED)}
        if not exact and isinstance(found.get("prompt"), str) and not texts <= TRL:
            more = [str(row[name]) for name in self.optional if row.get(name)]
            found["prompt"] = _prompt([found["prompt"], *more], found)
        return found


def _prompt(parts: list[str], answers: Mapping[str, Any]) -> str:
    """Return the parts of a prompt with an empty line between them and a line's end after them.

    The line's end is left out where there is white space between prompt and answer as it is, and where an
    answer is a conversation: the prompt is then a turn of it.
    """
    whole = "\n\n".join(parts)
    given = [one for name in ANSWERED for one in _several(answers.get(name)) if one is not None]
    texts = [one for one in given if isinstance(one, str)]
    apart = whole[-1:].isspace() or all(text[:1].isspace() for text in texts)
    return whole if apart or not whole or len(texts) < len(given) else whole + "\n"


def _several(value: Any) -> Sequence[Any]:
    value = as_list(value)
    return value if isinstance(value, list | tuple) else [value]


ANSWERED = ("completion", "chosen", "rejected", "first", "second", "answers")
"""Our names of what may follow a prompt."""


def _named(ours: str, *theirs: str) -> Slot:
    return tuple(Part(((ours, name),)) for name in theirs)


def _two(*pairs: tuple[str, str]) -> Slot:
    return tuple(Part((("first", one), ("second", other))) for one, other in pairs)


PROMPTS = (
    *_named("prompt", "prompt"),
    Part((("prompt", "instruction"),), ("input", "context")),
    *_named("prompt", "question", "query", "problem", "input", "inputs"),
)
"""Columns that may be the prompt; an instruction has its input or context beside it."""

NOTHING = (Part(()),)
"""No column: no prompt, or one that is found in the answers."""

COMPLETIONS = _named("completion", "completion")
ANSWERS = _named(
    "completion", "response", "output", "answer", "answers", "solution", "target", "targets"
)
"""Columns that may be the answer, beside TRL's; a list holds several that would do."""

CHATS = (*_named("messages", "messages"), *_named("messages", "conversations"))

LABELS = _named("label", "label", "kto_tag", "final_label", "feedback", "thumbs", "rating", "score")
"""Columns that may say whether an answer is desirable."""

PAIRS = (Part((("chosen", "chosen"), ("rejected", "rejected"))),)

MATCHING = (
    Part(
        (
            ("chosen", "answer_matching_behavior"),
            ("rejected", "answer_not_matching_behavior"),
        )
    ),
)
"""Model-written evaluations of personas (Perez et al. 2022, https://arxiv.org/abs/2212.09251)."""

TRUTHFUL = (
    Part(
        (
            ("prompt", "Question"),
            ("chosen", "Best Answer"),
            ("rejected", "Incorrect Answers"),
        ),
        between=(("rejected", ";"),),
    ),
)
"""TruthfulQA's table (Lin et al. 2021, https://arxiv.org/abs/2109.07958)."""

TWO = _two(
    ("output_1", "output_2"),
    ("response_1", "response_2"),
    ("response1", "response2"),
    ("answer_1", "answer_2"),
    ("completion_1", "completion_2"),
    ("response_a", "response_b"),
    ("answer_a", "answer_b"),
    ("completion_a", "completion_b"),
    ("conversation_a", "conversation_b"),
    ("response_0", "response_1"),
)
"""Columns of two answers of which something else says which is better."""

VERDICTS = (
    *_named("best", "label", "winner", "chosen", "best", "better_response_id"),
    *_named("graded", "preference"),
    Part((("score_first", "score_1"), ("score_second", "score_2"))),
    Part((("score_first", "score_a"), ("score_second", "score_b"))),
    Part(
        (("vote_1", "annotator1"), ("vote_2", "annotator2"), ("vote_3", "annotator3")),
    ),
)
"""Columns that may say which of two answers is better; of three annotators the majority does. In
AlpacaEval's ``preference`` and PandaLM's annotators 0 is a tie."""

SEVERAL = _named("answers", "responses", "completions", "answers", "choices", "outputs")
BEST = (
    *_named("best", "chosen", "best", "label"),
    *_named("scores", "scores", "ratings"),
)
"""Columns that may say which of a list of answers is the best, by its place or by scores."""

CLASSES = _named("label", "label", "labels", "category", "intent")

NAMED = {
    "PROMPT": PROMPTS,
    "ANSWER": ANSWERS,
    "LABEL": LABELS,
    "PAIR": TWO,
    "VERDICT": VERDICTS,
    "LIST": SEVERAL,
    "BEST": BEST,
}
"""Slots that messages call by a word."""

FAMILIES: dict[str, tuple[tuple[Slot, ...], ...]] = {
    "instruction": (
        (PROMPTS, COMPLETIONS),
        (COMPLETIONS,),
        (CHATS,),
        (PROMPTS, ANSWERS),
        (_named("text", "text"),),
    ),
    "preference": (
        (PROMPTS[:1], PAIRS),
        (CHATS, PAIRS),
        (PROMPTS[1:], PAIRS),
        (PAIRS,),
        (PROMPTS, MATCHING),
        (TRUTHFUL,),
        (PROMPTS, TWO, VERDICTS),
        (PROMPTS, SEVERAL, BEST),
        (TWO, VERDICTS),
    ),
    "feedback": (
        (PROMPTS, COMPLETIONS, LABELS),
        (CHATS, LABELS),
        (PROMPTS, ANSWERS, LABELS),
    ),
    "labelled": ((_named("text", "text", "sentence"), CLASSES),),
}
"""Of each kind: families of layouts, each one alternative of every slot, in the order of preference."""

LAYOUTS: dict[str, tuple[Layout, ...]] = {
    kind: tuple(Layout(parts) for slots in families for parts in itertools.product(*slots))
    for kind, families in FAMILIES.items()
}
"""Every layout of each kind, the first that fits a file is taken."""


@dataclass(frozen=True)
class Recognised:
    """A file's layout.

    Attributes:
        layout: By which its rows are read.
        name: Its columns, as the user is told.
        others: Names of layouts that would fit as well and use a column that this one leaves.
    """

    layout: Layout
    name: str
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return it in words."""
        also = f" ({' and '.join(self.others)} would fit as well)" if self.others else ""
        return f"layout {self.name}{also}"


def recognise(kind: str, there: Sequence[str], explicit: Sequence[str] = ()) -> Recognised | None:
    """Return the layout of a file, ``None`` where none fits.

    Args:
        kind: instruction, preference, feedback or labelled.
        there: Its columns, after data.columns and data.template.
        explicit: Our names that these two settings give: a layout with all of them is preferred.
    """
    fitting = [layout for layout in LAYOUTS[kind] if not layout.missing(there)]
    if not fitting:
        return None
    meant = set(explicit) & {name for layout in fitting for name in layout.columns.values()}
    first = next(
        (one for one in fitting if meant <= {*one.columns.values(), *one.optional}), fitting[0]
    )
    used = {*first.columns.values(), *first.optional}
    others = [] if explicit else [one for one in fitting if not set(one.columns.values()) <= used]
    shown = [] if not others else [others[0].name(there)]
    return Recognised(first, first.name(there), tuple(shown))


def nearest(kind: str, there: Sequence[str]) -> Layout | None:
    """Return the layout of which fewest columns are missing, ``None`` where none is there."""
    partly = [one for one in LAYOUTS[kind] if len(one.missing(there)) < len(one.columns)]
    return min(partly, key=lambda one: len(one.missing(there)), default=None)


def other_kinds(kind: str, there: Sequence[str]) -> dict[str, Recognised]:
    """Return the kinds that have a layout with these columns, ``kind`` left out."""
    found = {other: recognise(other, there) for other in LAYOUTS if other != kind}
    return {other: one for other, one in found.items() if one is not None}


def in_words(kind: str) -> str:
    """Return the layouts of a kind as a message lists them, a line each, and the names in capitals."""
    lines = dict.fromkeys(" + ".join(map(_slot, slots)) for slots in FAMILIES[kind])
    named = {word: slot for word, slot in NAMED.items() if any(word in line for line in lines)}
    lines |= dict.fromkeys(f"{word}: {', '.join(_names(slot))}" for word, slot in named.items())
    return "\n".join(f"  {line}" for line in lines)


def _slot(slot: Slot) -> str:
    words = [word for word, named in NAMED.items() if slot[-1] == named[-1] and len(slot) > 1]
    return words[0] if words else " or ".join(_names(slot))


def _names(slot: Slot) -> Iterator[str]:
    for part in slot:
        extra = f" (+{'/'.join(part.optional)})" if part.optional else ""
        yield "+".join(theirs for _, theirs in part.columns) + extra
