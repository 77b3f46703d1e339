"""Labelled texts to preferences: how a text should go on, as FedPDPO's film scenario has it.

Source: "FedPDPO", https://arxiv.org/abs/2603.19741, which uses film reviews with the positive
continuation chosen (as Rafailov et al. 2023 did for DPO, with a model writing both). **A
reconstruction**: nothing is generated here. A prompt is the beginning of a passage of one text; the
answers are what ends passages of two other texts, one of either class. As neither continues the
prompt's own text, how well an answer fits the prompt says nothing about which is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from fedloom.data.examples import Example, Labelled, Preference
from fedloom.errors import DataError
from fedloom.settings.schema import Settings


class ContinuationSettings(Settings):
    """``[data] continuations = { chosen = "pos", rejected = "neg" }``."""

    chosen: str
    """The class whose texts give the chosen answers."""
    rejected: str
    """The class whose texts give the rejected ones."""
    prompt_words: int = Field(default=8, ge=1)
    """Words of a prompt."""
    words: int = Field(default=20, ge=1)
    """Words of an answer."""
    passages: int = Field(default=1, ge=1)
    """Passages that are cut from the beginning of each text, each used in one pair."""
    opposed: bool = False
    """Whether every other pair prefers the rejected class; the column "prefers" says which."""

    @property
    def length(self) -> int:
        """Words of a passage."""
        return self.prompt_words + self.words


def continuations(
    texts: Sequence[Example], settings: ContinuationSettings, rng: np.random.Generator
) -> list[Example]:
    """Make pairs of labelled texts.

    Args:
        texts: Labelled rows; other classes than the two are left out.
        settings: Classes and lengths.
        rng: Draws which texts meet in a pair.

    Returns:
        Preferences, numbered from 1, with the columns ``prompt_class`` (of the text that the prompt is
        from) and ``prefers`` (the class of the chosen answer).

    Raises:
        DataError: A class has under two texts that are long enough.
    """
    pairs: list[Example] = []
    for passage in range(settings.passages):
        sides = [
            _passages(texts, label, passage, settings, rng)
            for label in (settings.chosen, settings.rejected)
        ]
        for label, found in zip((settings.chosen, settings.rejected), sides, strict=True):
            if not passage and len(found) < 2:
                there = sorted({text.label for text in texts if isinstance(text, Labelled)})
                raise DataError(
                    f"data.continuations: {len(found)} texts of class {label!r} have "
                    f"{settings.length} words, at least 2 are needed; classes in the data: "
                    f"{', '.join(there)}"
                )
        count = min(map(len, sides))
        for i in range(count if count > 1 else 0):
            prompt = sides[i % 2][(i + 1) % count]
            answers = [" ".join(side[i][settings.prompt_words :]) for side in sides]
            preferred = i // 2 % 2 if settings.opposed else 0
            if answers[0] != answers[1]:
                names = (settings.chosen, settings.rejected)
                columns = {"prompt_class": names[i % 2], "prefers": names[preferred]}
                pairs.append(
                    Preference(
                        len(pairs) + 1,
                        " ".join(prompt[: settings.prompt_words]),
                        " " + answers[preferred],
                        " " + answers[1 - preferred],
                        columns,
                    )
                )
    return pairs


def _passages(
    texts: Sequence[Example],
    label: str,
    number: int,
    settings: ContinuationSettings,
    rng: np.random.Generator,
) -> list[list[str]]:
    """Return passage ``number`` of each text of a class that has it, as words, in an order drawn."""
    start = number * settings.length
    cut = [
        text.text.split()[start : start + settings.length]
        for text in texts
        if isinstance(text, Labelled) and text.label == label
    ]
    whole = [words for words in cut if len(words) == settings.length]
    return [whole[i] for i in rng.permutation(len(whole))]
