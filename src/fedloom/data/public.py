"""Public rows: a set that every party of a federation has, beside its private ones.

They come from a source of their own, labelled or not, of this domain or another; or a part of the
training rows is given away before the rest is dealt to clients. They share nothing with the held-out
set: no text, no group (``data.group``) and, unless half of them do, no prompt; see ``splits.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from fedloom.accounting.quantities import human_count
from fedloom.data.client_rows import TokenShare
from fedloom.data.examples import (
    Choice,
    Example,
    Feedback,
    Instruction,
    Kind,
    Labelled,
    Preference,
    plain_text,
)
from fedloom.data.loading import load_examples
from fedloom.data.row_accounting import Account
from fedloom.data.sources import BUILTIN_PREFIX, ControlTokens, DataSettings
from fedloom.data.splits import group_key, normalised, row_key
from fedloom.errors import DataError
from fedloom.settings.schema import Of, Settings

NO_LABEL = ""
"""Label of a text whose class nobody knows."""


PUBLIC = Of("public rows", (True,), "this method has no public rows")


class PublicSettings(Settings):
    """``[public]``: rows that every party has, for methods that need them."""

    source: Annotated[str | list[str] | None, PUBLIC] = None
    """Like data.source (default: rows are taken out of the training rows before these are dealt)."""
    rows: Annotated[int, PUBLIC] = Field(default=256, ge=1)
    """How many there are, drawn from the seed."""
    labelled: Annotated[bool, PUBLIC] = False
    """Whether their labels (for causal models: their completions as the truth) may be learnt from."""
    kind: Annotated[Kind | None, PUBLIC] = None
    """Kind of the source, where it is not data.kind: plain texts are "instruction"."""
    columns: Annotated[dict[str, str], PUBLIC] = {}
    """As data.columns, for this source."""
    template: Annotated[str | None, PUBLIC] = None
    """As data.template, for this source."""
    ambiguous: Annotated[Literal["drop", "keep"] | None, PUBLIC] = None
    """As data.ambiguous, for this source (default: data.ambiguous)."""
    control_tokens: Annotated[ControlTokens | None, PUBLIC] = None
    """As data.control_tokens, for these rows (default: data.control_tokens)."""
    max_length: Annotated[int | None, PUBLIC] = Field(default=None, ge=2)
    """As data.max_length, for these rows (default: data.max_length)."""

    def contradictions(self) -> list[str]:
        """Return what in these settings cannot both be meant."""
        if self.source is not None:
            return []
        return [
            f"public.{name} is of public.source, which is not given"
            for name in ("kind", "columns", "template", "ambiguous")
            if getattr(self, name)
        ]


@dataclass(frozen=True)
class PublicRows:
    """Public rows under one tokenizer.

    Attributes:
        share: The rows.
        labelled: Whether what is true of them may be learnt from.
        width: Classes or vocabulary that knowledge about them is over.
    """

    share: TokenShare
    labelled: bool
    width: int


def take_public(
    train: Sequence[Example],
    test: Sequence[Example],
    settings: PublicSettings,
    rng: np.random.Generator,
    column: str | None = None,
) -> tuple[list[Example], list[Example]]:
    """Take public rows out of the training rows; none of them is in the held-out set.

    Rows with the same prompt are taken together, but for those of the last prompt that is needed: what is
    public is trained on by all, and no client can then be judged by the rest.

    Args:
        train: Training rows.
        test: The global held-out set.
        settings: How many.
        rng: Draws them.
        column: ``data.group``.

    Returns:
        The public rows and the training rows that are left.

    Raises:
        DataError: Too few rows.
    """
    shared, _ = _judged_too(train, test, column)
    candidates = [i for i, own in enumerate(shared) if not own]
    if settings.rows >= len(candidates):
        raise DataError(
            f"public.rows = {settings.rows}: there are {len(candidates)} training rows to take them "
            "from, and clients need some; take fewer or name a public.source"
        )
    prompts: dict[bytes, list[int]] = {}
    for i in candidates:
        prompts.setdefault(group_key(train[i]), []).append(i)
    groups = list(prompts.values())
    order = [i for number in rng.permutation(len(groups)) for i in groups[number]]
    drawn = sorted(order[: settings.rows])
    taken = set(drawn)
    return [train[i] for i in drawn], [row for i, row in enumerate(train) if i not in taken]


def read_public(
    settings: PublicSettings, data: DataSettings, test: Sequence[Example], rng: np.random.Generator
) -> tuple[list[Example], Account, tuple[str, ...]]:
    """Read public rows from their own source.

    Returns:
        The rows, what became of all that were read, and warnings.

    Raises:
        DataError: It cannot be read, is empty, or shares texts, groups or prompts with the held-out set.
    """
    assert settings.source is not None, "read_public is for a source of its own"
    first = settings.source if isinstance(settings.source, str) else settings.source[0]
    kind = settings.kind or (None if first.startswith(BUILTIN_PREFIX) else data.kind)
    own = DataSettings(
        source=settings.source,
        kind=kind,
        columns=settings.columns or data.columns,
        template=settings.template,
        values=data.values if kind == data.kind else {},
        ambiguous=settings.ambiguous or data.ambiguous,
        builtin_rows=data.builtin_rows,
    )
    loaded = load_examples(own, rng, hold_out=False)
    rows = loaded.train
    if not rows:
        raise DataError(f"public.source {settings.source!r} holds no row; the public set is empty")
    judged, alike = _judged_too(rows, test, data.group)
    shared = [row for row, own in zip(rows, judged, strict=True) if own]
    if shared:
        numbers = ", ".join(str(row.row) for row in shared[:5])
        raise DataError(
            f"public.source {settings.source!r} shares {len(shared)} of its {len(rows)} rows with the "
            f"held-out set, by text, prompt or data.group (rows {numbers}"
            f"{', ...' if len(shared) > 5 else ''}): what is judged would be learnt from; take them out "
            "of either"
        )
    drawn = rng.permutation(len(rows))[: settings.rows]
    assert loaded.account is not None, "it was read here"
    account = loaded.account.dropping(
        {"over public.rows": len(rows) - len(drawn)}, trained=0, public=len(drawn)
    )
    warnings = (
        (
            f"{human_count(alike)} of the {human_count(len(rows))} rows of public.source have "
            "the prompt of a row of the "
            "held-out set: as half of them or more have, only equal texts are looked for",
        )
        if alike
        else ()
    )
    return [rows[i] for i in sorted(drawn.tolist())], account, warnings


def _judged_too(
    rows: Sequence[Example], test: Sequence[Example], column: str | None
) -> tuple[list[bool], int]:
    """Return which rows have the text, the group or the prompt of a held-out row.

    Prompts are compared where one of two rows has no group. Where half of the rows or more have the
    prompt of a held-out row, as with one prompt for all, it says nothing.

    Returns:
        Of each row whether it has, and how many have a prompt for which they are not counted.
    """
    texts = {normalised(text_of(row)) for row in test}
    whole = {row_key(row) for row in test}
    grouped = [row for row in test if column is not None and column in row.columns]
    groups = {group_key(row, column) for row in grouped}
    every = {group_key(row) for row in test}
    others = {group_key(row) for row in test if column is None or column not in row.columns}
    same, by_prompt = [], []
    for row in rows:
        has_group = column is not None and column in row.columns
        equal = normalised(text_of(row)) in texts or row_key(row) in whole
        same.append(equal or (has_group and group_key(row, column) in groups))
        by_prompt.append(group_key(row) in (others if has_group else every))
    if 2 * sum(by_prompt) >= len(rows):
        more = sum(prompt and not own for own, prompt in zip(same, by_prompt, strict=True))
        return same, more
    return [own or prompt for own, prompt in zip(same, by_prompt, strict=True)], 0


def as_task(rows: Sequence[Example], classes: Sequence[str], *, labelled: bool) -> list[Example]:
    """Return public rows as the task needs them: texts with a class or without, or completions.

    Args:
        rows: Of any kind.
        classes: The class names of a classification task; empty for a causal model.
        labelled: Whether labels are kept.

    Raises:
        DataError: A label is none of the classes.
    """
    if not classes:
        return [_continued(row) for row in rows]
    texts = []
    for row in rows:
        label = row.label if labelled and isinstance(row, Labelled) else NO_LABEL
        if labelled and label not in classes:
            raise DataError(
                f"public row {row.row} has the class {label!r}, which is none of the {len(classes)} that "
                "clients have; give rows of the same classes, or public.labelled = false"
            )
        texts.append(Labelled(row.row, text_of(row), label, row.columns))
    return list(texts)


def text_of(example: Example) -> str:
    """Return everything an example says as one text."""
    match example:
        case Labelled(text=text):
            return text
        case Preference(prompt=prompt, chosen=chosen):
            return plain_text(prompt) + plain_text(chosen)
        case (
            Instruction(prompt=prompt, completion=completion)
            | Feedback(prompt=prompt, completion=completion)
        ):
            return plain_text(prompt) + plain_text(completion)
        case Choice(prompt=prompt, choices=choices, right=right):
            return plain_text(prompt) + choices[right]


def _continued(row: Example) -> Example:
    """Return a row with one completion: a text is all completion."""
    match row:
        case Labelled(text=text):
            return Instruction(row.row, "", text, row.columns)
        case Preference(prompt=prompt, chosen=chosen):
            return Instruction(row.row, prompt, chosen, row.columns, tools=row.tools)
        case Feedback(prompt=prompt, completion=completion):
            return Instruction(row.row, prompt, completion, row.columns, tools=row.tools)
    return row
