"""Examples to token ids, once; cached on disk.

Every example becomes one sequence (two for a pair): the prompt's tokens, then the completion's, of which
``encode.py`` says which are trained on.

They are cut to ``max_length`` (``truncation.py``); an example without a trained token left is dropped and
counted.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedloom.data.chat import RenderingError
from fedloom.data.encode import Encoded, TextEncoder
from fedloom.data.examples import Choice, Example, Feedback, Labelled, Preference
from fedloom.data.stored_rows import StoredRows, digests
from fedloom.data.token_file import read_tokens, write_tokens
from fedloom.data.token_set import TokenSet, Untokenized, join
from fedloom.data.truncation import truncate
from fedloom.errors import OutputError
from fedloom.storage.cache import make_room, touch

FORMAT = "fedloom-tokens-6"
"""Changes whenever this file would give other tokens for the same input."""

TOGETHER = 1024
"""Examples that are tokenised together."""

MOST_BYTES = 4 * 1024**3
"""Of all files of a cache together; those that were read longest ago go first."""

MARGIN = "margin"
"""Column of pairs: what the reward of the chosen answer is to lead by."""

LARGEST_MARGIN = 1e6

NOTHING_LEFT = "no completion token left"
NO_PROMPT = "no token before the completion"
ALIKE = "answers alike within data.max_length"


def tokenize(
    examples: Sequence[Example],
    encoder: TextEncoder,
    max_length: int,
    classes: Sequence[str] = (),
    cache: Path | None = None,
    *,
    keep_alike: bool = False,
) -> TokenSet:
    """Tokenise examples of one kind.

    Args:
        examples: All of one kind.
        encoder: Reads texts.
        max_length: Tokens a sequence may have, at least 2.
        classes: Class names in the order of their ids, for labelled examples.
        cache: Folder to keep the result in, found again by content; ``None`` keeps nothing.
        keep_alike: Whether pairs are kept whose answers do not differ within ``max_length``.

    Returns:
        The examples that have a completion token, in order.
    """
    width = _width(examples[0]) if examples else 1

    def parts() -> Iterator[TokenSet]:
        """Yield some examples after others: texts take more room than tokens."""
        rows = iter(examples)
        for start in range(0, len(examples), TOGETHER):
            some = list(itertools.islice(rows, TOGETHER))
            yield _part(some, start, width, encoder, max_length, classes, keep_alike)

    if cache is None:
        return join(list(parts()), width)
    stored = isinstance(examples, StoredRows)
    file = cache / f"{_key(examples, encoder, max_length, classes, keep_alike)}.tokens"
    found = read_tokens(file, mapped=stored)
    if found is None:
        try:
            write_tokens(file, parts())
        except OutputError as error:
            if stored:
                raise OutputError(
                    f"data.streaming keeps the tokens of all rows on disk: {error}; set the variable "
                    "FEDLOOM_CACHE to a folder with room for them"
                ) from error
            return join(list(parts()), width)  # the cache costs time, nothing else
        found = read_tokens(file, mapped=stored)
    else:
        touch(file)
    if not stored:  # files of rows that stay in theirs are needed together, however large
        make_room(cache, MOST_BYTES, file)
    if found is not None:
        return found
    if stored:
        raise OutputError(
            f"{file} is not what was written there a moment ago; look at the disk, or set the variable "
            "FEDLOOM_CACHE to a folder on another one"
        )
    return join(list(parts()), width)


def _part(
    examples: Sequence[Example],
    start: int,
    width: int,
    encoder: TextEncoder,
    max_length: int,
    classes: Sequence[str],
    keep_alike: bool,
) -> TokenSet:
    """Return the tokens of some examples, of which the first stood at ``start``."""
    ids = {name: number for number, name in enumerate(classes)}
    bos = encoder.tokenizer.bos_token_id
    index, rows, labels, prompts, cut, escaped = [], [], [], [], [], []
    margins = list[float | None]()
    tokens, counts, lengths = list[int](), bytearray(), [0]
    dropped: list[Untokenized] = []
    for position, (example, encoded) in enumerate(
        zip(examples, encoder.examples(examples), strict=True), start
    ):
        if isinstance(encoded, RenderingError):
            dropped.append(Untokenized(position, example.row, str(encoded), malformed=True))
            continue
        text, answers = _whole(example, encoded)
        prompt, completions = text[:max_length], answers
        if text and not isinstance(example, Labelled):
            prompt, completions = truncate(text, answers, max_length, bos)
        kept = zip(encoded.masks, completions, strict=True)
        trained = [mask[: len(completion)] for mask, completion in kept]
        reason = _useless(example, prompt, completions, trained, keep_alike)
        if reason:
            dropped.append(Untokenized(position, example.row, reason))
            continue
        index.append(position)
        rows.append(example.row)
        labels.append(_label(example, ids))
        margins.append(_margin(example))
        escaped.append(encoded.escaped)
        for completion, mask, answer in zip(completions, trained, answers, strict=True):
            tokens += prompt
            tokens += completion
            counts += bytes(len(prompt)) + bytes(mask)
            lengths.append(len(prompt) + len(completion))
            prompts.append(len(prompt))
            cut.append((len(text) - len(prompt), len(answer) - len(completion)))
    return TokenSet(
        width,
        np.array(index, np.int64),
        np.array(rows, np.int64),
        np.array(tokens, np.int32),
        np.frombuffer(bytes(counts), np.bool_),
        np.cumsum(lengths).astype(np.int64),
        np.array(prompts, np.int64),
        np.array(cut, np.int64).reshape(-1, 2),
        np.array(escaped, np.bool_),
        np.array(labels, np.int64),
        tuple(dropped),
        margins=_known(margins),
    )


def _whole(example: Example, encoded: Encoded) -> tuple[list[int], list[list[int]]]:
    """Return the tokens of prompt and answers before any is cut; a labelled text is a prompt alone."""
    if isinstance(example, Labelled):
        return encoded.completions[0], [[]]
    return encoded.prompt, encoded.completions


def _useless(
    example: Example,
    prompt: list[int],
    completions: list[list[int]],
    trained: list[list[bool]],
    keep_alike: bool,
) -> str:
    """Return why nothing can be learnt of an example's tokens; empty where something can."""
    if not prompt:
        return NOTHING_LEFT if isinstance(example, Labelled) else NO_PROMPT
    if isinstance(example, Labelled):
        return ""
    if not all(any(mask) for mask in trained):
        return NOTHING_LEFT
    alike = completions[0] == completions[-1] and trained[0] == trained[-1]
    return ALIKE if isinstance(example, Preference) and alike and not keep_alike else ""


def _width(example: Example) -> int:
    if isinstance(example, Choice):
        return len(example.choices)
    return 2 if isinstance(example, Preference) else 1


def _label(example: Example, ids: dict[str, int]) -> int:
    if isinstance(example, Labelled):
        return ids.get(example.label, -1)
    if isinstance(example, Choice):
        return example.right
    return int(example.desirable) if isinstance(example, Feedback) else -1


def _margin(example: Example) -> float | None:
    """Return what a pair's column margin says, ``None`` where it has none, NaN for no usable number."""
    said = example.columns.get(MARGIN) if isinstance(example, Preference) else None
    if said is None:
        return None
    try:
        found = float(said)
    except ValueError:
        return math.nan
    return found if abs(found) <= LARGEST_MARGIN else math.nan


def _known(margins: Sequence[float | None]) -> NDArray[np.float64] | None:
    """Return margins, 0 where a pair has none; ``None`` where no pair has one."""
    if all(own is None for own in margins):
        return None
    return np.array([0.0 if own is None else own for own in margins], np.float64)


def _key(
    examples: Sequence[Example],
    encoder: TextEncoder,
    max_length: int,
    classes: Sequence[str],
    keep_alike: bool,
) -> str:
    settings = f"{FORMAT}|{max_length}|{list(classes)}|{keep_alike}|{encoder.identity}"
    digest = hashlib.sha256(settings.encode("utf-8", "surrogatepass"))
    for own in digests(examples):
        digest.update(own)
    return digest.hexdigest()
