"""Sums of two-digit numbers: rows whose answers can be checked, and texts to train a model on beforehand.

The texts are of somebody who counts one too many more often than not. A model that has read them can add,
and mostly does not say what it could: rewards of its answers tell it which of the two is wanted.

There are 8,100 sums of two numbers from 10 to 99. One half of them, the same always, is for the texts
that the model "tiny:sums" is made of; rows of ``builtin:sums`` are of the other half and each is there
once, so that no held-out sum has been seen in any training.
"""

from __future__ import annotations

import numpy as np

from fedloom.data.examples import Example, Instruction
from fedloom.errors import DataError
from fedloom.randomness import generator

LEAST, MOST = 10, 99

RIGHT = 0.31
"""Share of right answers in the texts of the model, which has seen both and takes the commoner one."""

Sum = tuple[int, int]


def halves() -> tuple[list[Sum], list[Sum]]:
    """Return the sums of the model's texts, and those of the rows, both in an order drawn once."""
    numbers = range(LEAST, MOST + 1)
    every = [(a, b) for a in numbers for b in numbers]
    order = generator(0, "halves of the sums").permutation(len(every))
    drawn = [every[place] for place in order.tolist()]
    return drawn[::2], drawn[1::2]


def sum_examples(count: int, rng: np.random.Generator) -> list[Example]:
    """Return different sums, "12+33=" with "045"; the column ``carry`` says whether units carry.

    Args:
        count: At least 1.
        rng: Draws them.

    Raises:
        DataError: There are not so many.
    """
    there = halves()[1]
    if count > len(there):
        raise DataError(
            f"data.builtin_rows = {count}: builtin:sums has {len(there)} different sums; give fewer"
        )
    rows: list[Example] = []
    for row, place in enumerate(rng.choice(len(there), count, replace=False).tolist()):
        a, b = there[place]
        carry = "carry" if a % 10 + b % 10 > 9 else "none"
        rows.append(Instruction(row, f"{a}+{b}=", f"{a + b:03d}", {"carry": carry}))
    return rows


def sum_texts(rng: np.random.Generator, count: int) -> list[str]:
    """Return texts of sums of the model's half, of whose answers most are one too many."""
    there, texts = halves()[0], []
    for place in rng.integers(len(there), size=count).tolist():
        a, b = there[place]
        texts.append(f"{a}+{b}={a + b + int(rng.random() >= RIGHT):03d}")
    return texts
