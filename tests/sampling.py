"""What the slow suite tries of that which the full one does whole: a sample drawn by the commit's hash."""

import random
import subprocess
from functools import cache
from pathlib import Path

import pytest


@cache
def commit():
    """The hash of the commit that is tested, or nothing where there is no Git."""
    words = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(
            words, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def drawn(*purpose):
    """A generator that is another one with every commit, and the same in every run of one."""
    return random.Random(" ".join(map(str, (commit(), *purpose))))


def sampled(items, count):
    """Parameters of a full test, so many of which are in the slow suite too (marker ``sample``)."""
    items = list(items)
    slow = drawn(*items).sample(range(len(items)), count)
    both = [pytest.mark.slow, pytest.mark.sample]
    return [
        pytest.param(item, marks=[pytest.mark.full, *both * (place in slow)])
        for place, item in enumerate(items)
    ]


def every(step, items):
    """Parameters of which each so many-th is in the default suite, and the others are in the slow one."""
    return [
        pytest.param(item, marks=[pytest.mark.slow] if place % step else [])
        for place, item in enumerate(items)
    ]


def tries(slow, full):
    """The parameters of a test that tries less in the slow suite than in the full one."""
    marks = (pytest.mark.slow, pytest.mark.full)
    return [
        pytest.param(*(own if isinstance(own, tuple) else (own,)), marks=mark)
        for own, mark in zip((slow, full), marks, strict=True)
    ]
