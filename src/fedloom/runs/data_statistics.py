"""What the rows of an experiment are like, as the record that ``fedloom data stats`` shows.

Lengths are those of the experiment's own tokenizer and ``data.max_length``; the tokens are kept in the
cache folder, where a run finds them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.data.contamination import Contamination, contaminated
from fedloom.data.examples import Example
from fedloom.data.loading import DataSource
from fedloom.data.row_accounting import cuts_of
from fedloom.data.splits import group_keys, row_keys, row_text
from fedloom.data.stored_rows import joined, label_texts
from fedloom.data.text_statistics import (
    Shared,
    length_bins,
    length_summary,
    main_script,
    matrix_of,
    shared,
)
from fedloom.data.token_set import TokenSet
from fedloom.data.tokenize import tokenize
from fedloom.errors import DataError
from fedloom.evaluation.generate import load_encoder
from fedloom.experiment.experiment import Experiment
from fedloom.models.load import context_of
from fedloom.runs.model_building import model_folder
from fedloom.runs.partitioning import PartitionedData, partition_data
from fedloom.runs.records import partition_record
from fedloom.runs.token_rows import longest
from fedloom.storage.cache import cache_folder

MOST_SHOWN = 40
"""Clients of whom every two are compared in a picture; of more the largest overlaps are named."""

LARGEST = 10
"""Overlaps that are named."""


def data_statistics(experiment: Experiment, source: DataSource | None = None) -> dict[str, Any]:
    """Return what an experiment's rows are like, as plain JSON.

    Args:
        experiment: Names the rows, the clients and the model whose tokenizer counts.
        source: A user's own source of examples instead of the one in the settings.

    Raises:
        DataError: The rows cannot be read or dealt, or are with the clients.
        ModelError: The tokenizer cannot be loaded.
    """
    require_here(experiment)
    division = partition_data(experiment, source)
    trained = joined(list(division.train.values()))
    found = contaminated(trained, division.test, [], experiment.data.decontamination_words)
    return {
        "name": experiment.name,
        "kind": "feedback" if division.feedback is not None else division.loaded.kind,
        "model": experiment.model.path,
        "layouts": list(division.loaded.layouts),
        "accounts": division.accounts.to_record(),
        "warnings": list(division.accounts.warnings),
        "partition": partition_record(experiment, division),
        "labels": _counted({c: _labels(rows) for c, rows in division.train.items()}, "label"),
        "scripts": _counted(
            {c: map(_script, rows) for c, rows in division.train.items()}, "script"
        ),
        "lengths": _lengths(experiment, division, trained),
        "overlaps": _overlaps(division),
        "contamination": _contamination(found, division),
    }


def require_here(experiment: Experiment) -> None:
    """Refuse an experiment whose rows are on other machines.

    Raises:
        DataError: They are.
    """
    if experiment.data.is_private:
        raise DataError(
            'data.source = "clients": rows are with the clients; each sees its own with '
            "fedloom client check"
        )


def _script(row: Example) -> str:
    return main_script(row_text(row))


def _labels(rows: Sequence[Example]) -> list[str]:
    """Return the class, or the judgement, of each row; nothing where rows have none."""
    names = {"True": "desirable", "False": "undesirable"}
    single = [text for text in label_texts(rows) if text is not None]
    judged = set(single) <= names.keys()
    return [names[text] for text in single] if judged else single


def _counted(found: Mapping[int, Any], column: str) -> dict[str, Any] | None:
    """Return counts by client as a partition's record has them, ``None`` where nothing is counted."""
    counts = {client: Counter(values) for client, values in found.items()}
    every = sum(counts.values(), Counter[str]())
    if not every:
        return None
    values = sorted(every, key=lambda value: (-every[value], value))
    return {
        "column": column,
        "values": values,
        "clients": [
            {"client": client, "counts": {value: own[value] for value in values}}
            for client, own in counts.items()
        ],
    }


def _lengths(
    experiment: Experiment, division: PartitionedData, trained: Sequence[Example]
) -> dict[str, Any]:
    """Return lengths in tokens, before truncation, and what is cut."""
    path, revision = model_folder(experiment.model.path), experiment.model.revision
    encoder = load_encoder(path, revision, experiment.data, compares=experiment.compares)
    length = longest(experiment.data.max_length, context_of(path, revision))
    alike, cache = experiment.data.ambiguous == "keep", cache_folder() / "tokens"
    tokens = tokenize(trained, encoder, length, division.classes, cache, keep_alike=alike)
    judged = tokenize(division.test, encoder, length, division.classes, cache, keep_alike=alike)
    ends = np.cumsum([0, *map(len, division.train.values())])
    kept = np.searchsorted(tokens.index, ends)
    whole = whole_lengths(tokens)
    by_client = [
        {"client": client, "cut": dict(cut.__dict__), **length_summary(whole[start:end])}
        for client, cut, start, end in zip(
            division.train, cuts_of(tokens, kept), kept[:-1], kept[1:], strict=True
        )
    ]
    return {
        "max_length": length,
        "train": {"bins": length_bins(whole), **length_summary(whole)},
        "test": {
            "bins": length_bins(whole_lengths(judged)),
            **length_summary(whole_lengths(judged)),
        },
        "clients": by_client,
        "longer_chosen": _longer_chosen(tokens) if division.loaded.kind == "preference" else None,
        "untokenised": dict(Counter(one.reason for one in (*tokens.dropped, *judged.dropped))),
    }


def _sequence_lengths(tokens: TokenSet) -> NDArray[np.int64]:
    """Return ``(examples, sequences)`` tokens before truncation."""
    lengths: NDArray[np.int64] = np.diff(tokens.starts) + tokens.cut.sum(axis=1)
    return lengths.reshape(-1, tokens.width)


def whole_lengths(tokens: TokenSet) -> NDArray[np.int64]:
    """Return ``(examples,)`` tokens of the longest sequence of each, before truncation."""
    lengths = _sequence_lengths(tokens)
    return lengths.max(axis=1) if len(lengths) else np.zeros(0, np.int64)


def _longer_chosen(tokens: TokenSet) -> dict[str, int] | None:
    """Return in how many pairs the chosen answer has more tokens than the rejected one, and fewer."""
    if tokens.width != 2:
        return None
    chosen, rejected = _sequence_lengths(tokens).T
    longer, shorter = int((chosen > rejected).sum()), int((chosen < rejected).sum())
    return {"pairs": len(tokens), "longer": longer, "shorter": shorter}


def _overlaps(division: PartitionedData) -> dict[str, Any]:
    """Return what clients have in common with each other, and with the global held-out set."""
    rows = shared({client: row_keys(own).tolist() for client, own in division.train.items()})
    prompts = {client: group_keys(own).tolist() for client, own in division.train.items()}
    judged_rows, judged_prompts = set(row_keys(division.test)), set(group_keys(division.test))
    return {
        "rows": _shared(rows),
        "prompts": _shared(shared(prompts)),
        "with_test": [
            {
                "client": client,
                "rows": int(np.isin(row_keys(own), list(judged_rows)).sum()),
                "prompts": int(np.isin(group_keys(own), list(judged_prompts)).sum()),
            }
            for client, own in division.train.items()
        ],
    }


def _shared(found: Shared) -> dict[str, Any]:
    """Return what clients have in common as plain JSON."""
    clients = list(found.distinct)
    largest = sorted(found.pairs.items(), key=lambda own: (-own[1], own[0]))[:LARGEST]
    return {
        "distinct": found.all,
        "twice": found.twice,
        "clients": clients,
        "largest": [{"clients": list(pair), "shared": count} for pair, count in largest],
        "matrix": matrix_of(found, clients) if 2 <= len(clients) <= MOST_SHOWN else None,
    }


def _contamination(found: Contamination, division: PartitionedData) -> dict[str, Any]:
    """Return which clients have rows that share a passage with the global held-out set."""
    ends = np.cumsum([0, *map(len, division.train.values())])
    counts = np.diff(np.searchsorted(np.array(found.rows, np.int64), ends)).tolist()
    return {
        "words": found.words,
        "rows": len(found.rows),
        "of": found.of,
        "common": found.common,
        "passage": found.first and found.first[1],
        "clients": [
            {"client": client, "rows": count}
            for client, count in zip(division.train, counts, strict=True)
        ],
    }
