"""Checks of ``fedloom.json`` beside an adapter that somebody else wrote: types, lengths, known words.

Cards, lines of Python and configurations are made of these facts, so nothing but what fedloom writes is
taken from them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from fedloom.display.untrusted_text import named, quoted
from fedloom.errors import ModelError
from fedloom.models.model_card import DTYPES, LONGEST_NAME, PROMPT_FORMATS, Facts
from fedloom.models.quantize import Quantization

NAME = re.compile(r"\w[\w.+-]{0,99}")
"""An objective, a method or a kind of adapter; users' own objectives have the names of their classes."""

REVISION = re.compile(r"[\w.][\w./+-]{0,199}", re.ASCII)
"""A branch, tag or commit of the Hub."""

DIGEST = re.compile(r"[0-9a-f]{64}")

SURROGATE = re.compile("[\ud800-\udfff]")
"""Halves of a pair, which no encoding writes."""

LONGEST_PATH = 4096
"""Characters of a base model's name or path."""

LONGEST_SENTENCE = 10_000
"""Characters of a sentence on privacy."""

MOST_CLIENTS = 10**9

MOST_SENTENCES = 1000


def checked_facts(found: Mapping[str, Any], path: Path) -> Facts:
    """Return what a merged adapter's card takes of the facts of one that is merged, and nothing else.

    Args:
        found: Content of ``fedloom.json``.
        path: What messages call it.

    Returns:
        ``base``, ``objective``, ``adapter``, ``precision``, ``quantization``, ``dtype``, ``task``,
        ``prompt``, ``classes`` and ``clients`` (0 to 1e9), and ``privacy`` and ``objectives`` where they
        are there; see :func:`fedloom.models.model_card.card_text`.

    Raises:
        ModelError: One is missing or is none that fedloom writes; it is named.
    """
    facts: Facts = {}
    for key, is_one in CHECKS.items():
        if key in OPTIONAL and found.get(key) is None:
            continue
        if not is_one(found.get(key)):
            raise ModelError(
                f"{path}: {key} is {quoted(found.get(key), 60)}, which is none that fedloom writes: "
                "correct it, or delete the file, and what it says is taken for unknown"
            )
        facts[key] = found[key]
    return facts


def is_line(value: object, longest: int) -> bool:
    """Return whether a value is a text of 1 to ``longest`` characters on one line, all visible."""
    return isinstance(value, str) and 0 < len(value) <= longest and named(value) == value


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not SURROGATE.search(value)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def _is_base(value: object) -> bool:
    if not isinstance(value, dict) or type(value.get("hub")) is not bool:
        return False
    revision, digest, licence = (value.get(key) for key in ("revision", "sha256", "licence"))
    path, name = value.get("path"), value.get("name")
    return (
        isinstance(path, str)
        and is_line(path, LONGEST_PATH)
        and name == (path if value["hub"] else Path(path).name)
        and (revision is None or (isinstance(revision, str) and bool(REVISION.fullmatch(revision))))
        and (digest is None or (isinstance(digest, str) and bool(DIGEST.fullmatch(digest))))
        and (licence is None or is_line(licence, LONGEST_NAME))
        and value.keys() == {"path", "name", "hub", "revision", "sha256", "licence"}
    )


def _is_prompt(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"format", "example", "template"}
        and value["format"] in PROMPT_FORMATS
        and _is_text(value["example"])
        and (value["template"] is None or _is_text(value["template"]))
    )


def _is_privacy(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= MOST_SENTENCES
        and all(is_line(sentence, LONGEST_SENTENCE) for sentence in value)
    )


CHECKS: dict[str, Callable[[Any], bool]] = {
    "base": _is_base,
    "objective": _is_name,
    "objectives": lambda value: (
        isinstance(value, list) and bool(value) and all(map(_is_name, value))
    ),
    "adapter": _is_name,
    "precision": lambda value: value in DTYPES,
    "quantization": lambda value: value in get_args(Quantization),
    "dtype": lambda value: value in DTYPES.values(),
    "task": lambda value: value in ("causal", "classification"),
    "prompt": _is_prompt,
    "classes": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "clients": lambda value: type(value) is int and 0 <= value <= MOST_CLIENTS,
    "privacy": _is_privacy,
}
"""Whether a value is one that fedloom writes, by its key."""

OPTIONAL = ("objectives", "privacy")
