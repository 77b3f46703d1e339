"""What ``fedloom data show`` prints: a row as the tokens that are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from rich.console import Group
from rich.text import Text

from fedloom.data.encode import TextEncoder
from fedloom.data.examples import Example, Feedback, Labelled, Preference
from fedloom.data.stored_rows import joined
from fedloom.data.token_set import TokenSet
from fedloom.data.tokenize import tokenize
from fedloom.display.untrusted_text import named, placed
from fedloom.errors import DataError
from fedloom.evaluation.generate import load_encoder
from fedloom.experiment.experiment import Experiment
from fedloom.models.load import context_of
from fedloom.runs.model_building import model_folder
from fedloom.runs.partitioning import partition_data
from fedloom.runs.token_rows import longest

PROMPT, TRAINED, SPECIAL = "grey50", "green", "bold magenta"
UNBOUNDED = 1 << 30
"""A number of tokens above that of any row."""

BORDER = "\u2502"
"""Stands between tokens."""


def show_row(experiment: Experiment, number: int) -> Group:
    """Return an example as its tokens, before and after truncation.

    Args:
        experiment: Names the rows and the model.
        number: Which of the training examples, from 0 on, client by client.

    Raises:
        DataError: There is no such example, or rows are with the clients.
        ModelError: The tokenizer cannot be loaded.
    """
    if experiment.data.is_private:
        raise DataError(
            'data.source = "clients": rows are with the clients; each sees its own with '
            "fedloom client check"
        )
    division = partition_data(experiment)
    examples = joined(list(division.train.values()))
    if not 0 <= number < len(examples):
        raise DataError(
            f"--row {number}: there are {len(examples)} training examples; give 0 to {len(examples) - 1}"
        )
    owners = np.repeat(list(division.train), [len(rows) for rows in division.train.values()])
    client, example = int(owners[number]), examples[number]
    place = placed(*division.place(client, example.row))
    path = model_folder(experiment.model.path)
    encoder = load_encoder(
        path, experiment.model.revision, experiment.data, compares=experiment.compares
    )
    context = context_of(path, experiment.model.revision)
    length = longest(experiment.data.max_length, context)
    whole = tokenize([example], encoder, UNBOUNDED, division.classes, keep_alike=True)
    alike = experiment.data.ambiguous == "keep"
    cut = tokenize([example], encoder, length, division.classes, keep_alike=alike)
    kind = type(example).__name__.lower()
    lines = [
        Text(f"example {number} of {len(examples)}, {kind}, {place}"),
        *(Text(named(layout), style="dim") for layout in division.loaded.layouts),
        Text(f"as {experiment.model.path} reads it", style="dim"),
        _legend(example),
    ]
    if not len(whole):
        lines.append(Text(f"it is left out: {whole.dropped[0].reason}", style="yellow"))
        return Group(*lines)
    lines += _sequences(example, whole, encoder)
    return Group(*lines, *_truncated(example, cut, encoder, length))


def _truncated(
    example: Example, cut: TokenSet, encoder: TextEncoder, length: int
) -> Sequence[Text]:
    """Return what truncation does to an example; nothing where it is short enough.

    Args:
        example: As it was read.
        cut: It alone, truncated; empty where it cannot be.
        encoder: Of the model.
        length: ``data.max_length``, in tokens.
    """
    if not len(cut):
        told = f"it is left out: {cut.dropped[0].reason} (data.max_length = {length})"
        return [Text(told, style="yellow")]
    if not cut.cut.any():
        return []
    lost = cut.cut.sum(axis=0)
    told = (
        f"\ncut to data.max_length = {length}: {lost[0]} tokens of the prompt's start, "
        f"{lost[1]} of the answer's end"
    )
    return [Text(told, style="yellow"), *_sequences(example, cut, encoder)]


def _legend(example: Example) -> Text:
    if isinstance(example, Labelled):
        return Text.assemble("class ", (named(example.label), TRAINED))
    parts: list[Any] = [
        ("prompt", PROMPT),
        "  ",
        ("trained on", TRAINED),
        "  ",
        ("special", SPECIAL),
    ]
    if isinstance(example, Feedback):
        parts.append("  desirable" if example.desirable else "  undesirable")
    return Text.assemble(*parts)


def _sequences(example: Example, tokens: TokenSet, encoder: TextEncoder) -> list[Text]:
    """Return each sequence of an example, under a heading."""
    lines = []
    for number, name in enumerate(_names(example)):
        ids, mask = tokens.sequence(number)[0].tolist(), tokens.mask(number).tolist()
        trained = "" if isinstance(example, Labelled) else f", {sum(mask)} trained on"
        lines.append(Text(f"\n{name}: {len(ids)} tokens{trained}", style="bold"))
        lines.append(_coloured(ids, mask, encoder))
    return lines


def _names(example: Example) -> Sequence[str]:
    if isinstance(example, Preference):
        return ("chosen", "rejected")
    return ("text",) if isinstance(example, Labelled) else ("prompt and completion",)


def _coloured(ids: list[int], mask: list[bool], encoder: TextEncoder) -> Text:
    special = set(encoder.tokenizer.added_tokens_decoder)
    text = Text()
    before = False
    for place, (token, counts, piece) in enumerate(
        zip(ids, mask, _pieces(ids, encoder.tokenizer), strict=True)
    ):
        if place:
            text.append(BORDER if counts == before else f"{BORDER}{BORDER}", style="dim")
        before = counts
        style = SPECIAL if token in special else TRAINED if counts else PROMPT
        text.append(
            named(piece), style=f"{style} underline" if token in special and counts else style
        )
    return text


def _pieces(ids: Sequence[int], tokenizer: Any) -> Iterator[str]:
    """Yield each token's text, with the blank before it that is left out of a first token's."""
    for place, token in enumerate(ids):
        before = tokenizer.decode(ids[max(0, place - 4) : place])
        both = tokenizer.decode(ids[max(0, place - 4) : place + 1])
        if both.startswith(before):
            yield both[len(before) :]
        else:  # a character of several tokens is whole with the last of them
            yield tokenizer.decode([token])
