"""Examples to token ids, once, with the truncation rule stated; cached on disk.

Every example becomes one sequence (two for a pair): the prompt's tokens, then the completion's, of which
``encode.py`` says which are trained on.

Truncation to ``max_length`` tokens keeps the completion and drops the prompt's start (a leading
``<s>`` stays); a completion that alone is too long loses its end; a sample without a trained token
left is dropped and counted. Both sides of a pair keep the same prompt tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from fedloom.data.chat import RenderingError
from fedloom.data.encode import Encoded, TextEncoder
from fedloom.data.examples import Choice, Example, Feedback, Labelled, Preference
from fedloom.errors import OutputError
from fedloom.storage.files import write_atomically

FORMAT = "fedloom-tokens-4"
"""Changes whenever this file would give other tokens for the same input."""

TOGETHER = 1024
"""Examples that are tokenised together."""

NOTHING_LEFT = "no completion token left"
NO_PROMPT = "no token before the completion"
ALIKE = "answers alike within data.max_length"


@dataclass(frozen=True)
class Untokenized:
    """An example of which no tokens are trained on.

    Attributes:
        position: Where it stood in what was tokenised.
        row: Its row number in the data.
        reason: Why.
        malformed: Whether the row itself is at fault.
    """

    position: int
    row: int
    reason: str
    malformed: bool = False


@dataclass(frozen=True)
class TokenSet:
    """Tokenised examples of one kind, ragged rows in flat arrays.

    Attributes:
        width: Sequences an example has: 2 for pairs (chosen, rejected), one a choice, else 1.
        index: ``(examples,)`` position of each example in what was tokenised (some were dropped).
        rows: ``(examples,)`` row number in the data.
        tokens: ``(total,)`` int32, all sequences one after another.
        trained: ``(total,)`` bool, true on the tokens whose log-prob counts.
        starts: ``(examples * width + 1,)`` where each sequence begins.
        prompts: ``(examples * width,)`` number of tokens before the first that counts, in each sequence.
        cut: ``(examples * width, 2)`` tokens that ``max_length`` cut from prompt and completion.
        escaped: ``(examples,)`` bool, true where control tokens stand in the text, encoded as text.
        labels: ``(examples,)`` class id, number of the right choice, or 1 for desirable and 0 for not; -1
            where there is none.
        dropped: The examples of which nothing is trained on.
    """

    width: int
    index: NDArray[np.int64]
    rows: NDArray[np.int64]
    tokens: NDArray[np.int32]
    trained: NDArray[np.bool_]
    starts: NDArray[np.int64]
    prompts: NDArray[np.int64]
    cut: NDArray[np.int64]
    escaped: NDArray[np.bool_]
    labels: NDArray[np.int64]
    dropped: tuple[Untokenized, ...]

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.index)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """``(examples,)`` tokens of the longest sequence of each example."""
        lengths = np.diff(self.starts).reshape(-1, self.width)
        return lengths.max(axis=1) if len(lengths) else np.zeros(0, np.int64)

    @property
    def completion_lengths(self) -> NDArray[np.int64]:
        """``(sequences,)`` tokens that count in each sequence."""
        before = np.concatenate([[0], np.cumsum(self.trained)])
        return np.diff(before[self.starts]).astype(np.int64)

    def costs(self, *, shared_prompts: bool = False) -> NDArray[np.int64]:
        """Return ``(examples,)`` places that each example takes in a pass of rows as long as itself.

        Args:
            shared_prompts: Whether what all its sequences begin with is read once
                (:meth:`common_starts`).
        """
        padded: NDArray[np.int64] = self.lengths * self.width
        if not shared_prompts or self.width == 1:
            return padded
        whole = np.diff(self.starts).reshape(-1, self.width).sum(1)
        once: NDArray[np.int64] = whole - (self.width - 1) * self.common_starts
        return once

    @cached_property
    def common_starts(self) -> NDArray[np.int64]:
        """``(examples,)`` tokens that all sequences of an example begin with.

        At least one token of each is beyond them.
        """
        found = np.zeros(len(self), np.int64)
        for example in range(len(self)):
            own = [self.sequence(example * self.width + i)[0] for i in range(self.width)]
            found[example] = common_start(own)
        return found

    @cached_property
    def prompt_numbers(self) -> NDArray[np.int64]:
        """``(examples,)`` the same number for examples whose prompts have the same tokens."""
        known: dict[bytes, int] = {}
        found = np.zeros(len(self), np.int64)
        for example in range(len(self)):
            tokens, prompt = self.sequence(example * self.width)
            found[example] = known.setdefault(tokens[:prompt].tobytes(), len(known))
        return found

    def paired(self, others: TokenSet) -> TokenSet:
        """Return these examples with two sequences each: their own, and that of ``others`` in its place.

        Args:
            others: As many examples, of one sequence each as these.
        """
        count, numbers = len(self), np.arange(2 * len(self)).reshape(2, -1).T.reshape(-1)
        lengths = np.concatenate([np.diff(self.starts), np.diff(others.starts)])
        starts = np.concatenate([self.starts[:-1], len(self.tokens) + others.starts[:-1]])
        order = [np.arange(starts[n], starts[n] + lengths[n]) for n in numbers]
        places = np.concatenate(order) if count else np.zeros(0, np.int64)

        def both(name: str) -> NDArray[Any]:
            return np.concatenate([getattr(self, name), getattr(others, name)])

        return replace(
            self,
            width=2,
            tokens=both("tokens")[places],
            trained=both("trained")[places],
            starts=np.concatenate([[0], np.cumsum(lengths[numbers])]).astype(np.int64),
            prompts=both("prompts")[numbers],
            cut=both("cut")[numbers],
        )

    def sequence(self, number: int) -> tuple[NDArray[np.int32], int]:
        """Return the tokens of sequence ``number`` and how many of them are prompt."""
        return self.tokens[self.starts[number] : self.starts[number + 1]], int(self.prompts[number])

    def mask(self, number: int) -> NDArray[np.bool_]:
        """Return which tokens of sequence ``number`` count."""
        return self.trained[self.starts[number] : self.starts[number + 1]]

    def take(self, positions: NDArray[np.int64]) -> TokenSet:
        """Return the examples at ``positions`` (in this set), in that order."""
        numbers = (positions[:, None] * self.width + np.arange(self.width)).reshape(-1)
        parts = [self.sequence(int(number))[0] for number in numbers]
        starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
        masks = [self.mask(int(number)) for number in numbers]
        return replace(
            self,
            index=self.index[positions],
            rows=self.rows[positions],
            tokens=np.concatenate(parts) if parts else np.zeros(0, np.int32),
            trained=np.concatenate(masks) if masks else np.zeros(0, np.bool_),
            starts=starts,
            prompts=self.prompts[numbers],
            cut=self.cut[numbers],
            escaped=self.escaped[positions],
            labels=self.labels[positions],
        )


def common_start(sequences: Sequence[NDArray[np.int32]]) -> int:
    """Return how many tokens all sequences begin with; at least one token of each is beyond them."""
    most = min(map(len, sequences)) - 1
    first = sequences[0][:most]
    alike = np.logical_and.reduce([own[:most] == first for own in sequences])
    return most if alike.all() else int(alike.argmin())


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
    if cache is None:
        return _tokenize(examples, encoder, max_length, classes, keep_alike)
    file = cache / f"{_key(examples, encoder, max_length, classes, keep_alike)}.safetensors"
    found = _read(file)
    if found is None:
        found = _tokenize(examples, encoder, max_length, classes, keep_alike)
        _write(file, found)
    return found


def fit(
    prompt: Sequence[int], completions: Sequence[Sequence[int]], max_length: int, bos: int | None
) -> tuple[list[int], list[list[int]]]:
    """Cut a prompt and its completions to ``max_length`` tokens; see the module's rule.

    Returns:
        The prompt's tokens that are left (at least one) and the completions' (may be empty).
    """
    kept = [list(completion[: max_length - 1]) for completion in completions]
    room = max_length - max(len(completion) for completion in kept)
    if len(prompt) <= room:
        return list(prompt), kept
    if bos is not None and prompt[0] == bos and room > 1:
        return [bos, *prompt[len(prompt) - room + 1 :]], kept
    return list(prompt[len(prompt) - room :]), kept


def _tokenize(
    examples: Sequence[Example],
    encoder: TextEncoder,
    max_length: int,
    classes: Sequence[str],
    keep_alike: bool,
) -> TokenSet:
    width = _width(examples[0]) if examples else 1
    ids = {name: number for number, name in enumerate(classes)}
    bos = encoder.tokenizer.bos_token_id
    index, rows, labels, prompts, cut, escaped = [], [], [], [], [], []
    parts: list[NDArray[np.int32]] = []
    masks: list[NDArray[np.bool_]] = []
    dropped: list[Untokenized] = []
    for position, (example, encoded) in enumerate(
        zip(examples, _encoded(examples, encoder), strict=True)
    ):
        if isinstance(encoded, RenderingError):
            dropped.append(Untokenized(position, example.row, str(encoded), malformed=True))
            continue
        if isinstance(example, Labelled):
            prompt, completions = encoded.completions[0][:max_length], list[list[int]]([[]])
            whole = (len(encoded.completions[0]), [0])
            trained: list[list[bool]] = [[]]
        else:
            prompt, completions = encoded.prompt, encoded.completions
            whole = (len(prompt), [len(completion) for completion in completions])
            if prompt:
                prompt, completions = fit(prompt, completions, max_length, bos)
            kept = zip(encoded.masks, completions, strict=True)
            trained = [mask[: len(completion)] for mask, completion in kept]
        reason = _useless(example, prompt, completions, trained, keep_alike)
        if reason:
            dropped.append(Untokenized(position, example.row, reason))
            continue
        index.append(position)
        rows.append(example.row)
        labels.append(_label(example, ids))
        escaped.append(encoded.escaped)
        for completion, mask, length in zip(completions, trained, whole[1], strict=True):
            parts.append(np.array([*prompt, *completion], np.int32))
            masks.append(np.array([False] * len(prompt) + mask, np.bool_))
            prompts.append(len(prompt))
            cut.append((whole[0] - len(prompt), length - len(completion)))
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    return TokenSet(
        width,
        np.array(index, np.int64),
        np.array(rows, np.int64),
        np.concatenate(parts) if parts else np.zeros(0, np.int32),
        np.concatenate(masks) if masks else np.zeros(0, np.bool_),
        starts.astype(np.int64),
        np.array(prompts, np.int64),
        np.array(cut, np.int64).reshape(-1, 2),
        np.array(escaped, np.bool_),
        np.array(labels, np.int64),
        tuple(dropped),
    )


def _encoded(
    examples: Sequence[Example], encoder: TextEncoder
) -> Iterator[Encoded | RenderingError]:
    """Yield each example's tokens, some examples tokenised together: texts take more room than tokens."""
    for start in range(0, len(examples), TOGETHER):
        yield from encoder.examples(examples[start : start + TOGETHER])


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


def _key(
    examples: Sequence[Example],
    encoder: TextEncoder,
    max_length: int,
    classes: Sequence[str],
    keep_alike: bool,
) -> str:
    settings = f"{FORMAT}|{max_length}|{list(classes)}|{keep_alike}|{encoder.identity}"
    digest = hashlib.sha256(settings.encode("utf-8", "surrogatepass"))
    for example in examples:
        digest.update(repr(example).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _read(file: Path) -> TokenSet | None:
    try:
        arrays = safetensors.numpy.load_file(file)
        return TokenSet(
            width=int(arrays["width"][0]),
            index=arrays["index"],
            rows=arrays["rows"],
            tokens=arrays["tokens"],
            trained=arrays["trained"],
            starts=arrays["starts"],
            prompts=arrays["prompts"],
            cut=arrays["cut"],
            escaped=arrays["escaped"],
            labels=arrays["labels"],
            dropped=tuple(Untokenized(**lost) for lost in json.loads(arrays["dropped"].tobytes())),
        )
    except Exception:  # a cache that is absent, torn or foreign is simply made again
        return None


def _write(file: Path, tokens: TokenSet) -> None:
    names = ("index", "rows", "tokens", "trained", "starts", "prompts", "cut", "escaped", "labels")
    arrays = {name: getattr(tokens, name) for name in names}
    arrays["width"] = np.array([tokens.width])
    lost = json.dumps([asdict(one) for one in tokens.dropped])
    arrays["dropped"] = np.frombuffer(lost.encode(), np.uint8)
    with contextlib.suppress(OutputError):  # without a cache it costs time, nothing else
        write_atomically(file, safetensors.numpy.save(arrays))  # its owner's: tokens are the rows
