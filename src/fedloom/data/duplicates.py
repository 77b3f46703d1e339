"""Near-duplicates between held-out and training rows: MinHash and LSH, then the sets themselves.

Source: Broder 1997, "On the resemblance and containment of documents"; the tables are datasketch's. LSH
finds most pairs above the threshold, not all; each that it finds is compared by its 3-grams, so that none
below the threshold is counted.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.data.examples import Example
from fedloom.data.splits import row_text
from fedloom.errors import DataError

WORDS = 3
"""Words of a shingle."""

PERMUTATIONS = 128
"""Hash functions of a signature: a standard error of about 0.05 of the similarity."""

SEED = 1
"""Of the hash functions; the same rows are found whatever the experiment's seed."""


def near_duplicates(
    held_out: Sequence[Example], train: Sequence[Example], threshold: float
) -> dict[int, int]:
    """Return, for each held-out row with a near-duplicate in training, the most similar training row.

    Args:
        held_out: Rows that are judged.
        train: Rows that are trained on.
        threshold: Jaccard similarity of the word 3-grams, in (0, 1].

    Returns:
        Position in ``held_out`` to position in ``train``.

    Raises:
        DataError: datasketch is not installed.
    """
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError as error:
        raise DataError(
            "data.near_duplicates needs datasketch: pip install 'fedloom[dedup]', or leave it out"
        ) from error
    judged, trained = ([shingles(row) for row in rows] for rows in (held_out, train))
    table = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    blank = MinHash(num_perm=PERMUTATIONS, seed=SEED)

    def signature(parts: frozenset[str]) -> MinHash:
        own = blank.copy()
        own.update_batch([part.encode("utf-8", "surrogatepass") for part in parts])
        return own

    for position, parts in enumerate(trained):
        table.insert(position, signature(parts))
    found: dict[int, int] = {}
    for position, parts in enumerate(judged):
        near = [(_similarity(parts, trained[i]), -i) for i in table.query(signature(parts))]
        best, place = max(near, default=(0.0, 0))
        if best >= threshold:
            found[position] = -place
    return found


def shingles(row: Example) -> frozenset[str]:
    """Return a row's word 3-grams, normalised; of a shorter text the whole."""
    words = row_text(row).split()
    count = max(1, len(words) - WORDS + 1)
    return frozenset(" ".join(words[i : i + WORDS]) for i in range(count))


def _similarity(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)
