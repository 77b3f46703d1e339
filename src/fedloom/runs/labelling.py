"""Pairs of answers labelled by the selectors of a run, by majority; what DPO is then trained on.

Source: Wu et al. 2024, FedBis and FedBiscuit, https://arxiv.org/abs/2407.03038.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fedloom.aggregation.votes import Votes, votes
from fedloom.data.client_rows import TokenShare
from fedloom.data.examples import Preference
from fedloom.data.tokenize import NOTHING_LEFT, tokenize
from fedloom.data.unlabelled_pairs import UnlabelledPair, read_pairs
from fedloom.errors import DataError, ModelError
from fedloom.evaluation.held_out import HeldOut
from fedloom.experiment.experiment import Experiment
from fedloom.models.load import context_length
from fedloom.runs.adapter_paths import adapter_folder
from fedloom.runs.saved_models import load_saved
from fedloom.runs.token_rows import longest
from fedloom.storage.files import write_atomically
from fedloom.storage.run_folder import EXPERIMENT, SUMMARY, RunFolder
from fedloom.training.layout import tokens_per_pass


@dataclass(frozen=True)
class Labels:
    """What came of labelling.

    Attributes:
        selectors: How many voted.
        pairs: Pairs in the file.
        labelled: Pairs that were written.
        ties: Pairs left out as no answer has more votes.
        too_long: Pairs left out as both answers do not fit beside the question.
        unreadable: Pairs left out as the chat template has no place for them, or leaves no prompt.
        unanimous: Of those labelled, pairs on which all selectors agree.
        by_position: Share of pairs, over all selectors, that one answers by position, not by answer.
        agreement: Share of the labelled pairs whose winner is the file's chosen one, where it says one.
    """

    selectors: int
    pairs: int
    labelled: int
    ties: int
    too_long: int
    unreadable: int
    unanimous: int
    by_position: float
    agreement: float | None


def selectors_of(run: Path) -> tuple[Experiment, list[Path]]:
    """Return the experiment of a run whose adapters select, and their folders.

    Raises:
        OutputError: It is no run folder.
        ModelError: The run has not ended, its objective selects nothing, or an adapter is missing.
    """
    folder = RunFolder.existing(run)
    experiment = Experiment.from_toml(run / EXPERIMENT)
    if not experiment.compares:
        raise ModelError(
            f"{run} was trained with objective.name = {experiment.objective.name!r}, which says of no "
            'pair which answer is better: train one with objective.name = "selector"'
        )
    if not (run / SUMMARY).is_file():
        raise ModelError(
            f"{run} has not ended, and fewer selectors would vote than it trains: go on with it first, "
            f"fedloom run --resume {run}"
        )
    found, wanted = folder.named_adapters, getattr(experiment.method, "selectors", None)
    if wanted is not None and len(found) != wanted:
        raise ModelError(
            f"{run}/adapters has {len(found)} of method.selectors = {wanted} adapters: copy the whole "
            "folder, or run it anew"
        )
    return experiment, found or [adapter_folder(run)]


def label_pairs(
    run: Path,
    source: Path,
    target: Path,
    begin: Callable[[int], Callable[[int], None]] = lambda rows: lambda done: None,
) -> Labels:
    """Have the selectors of a run say which answer of each pair is better, and write what most say.

    The file that is written has a line for each pair with a majority: ``prompt``, ``chosen``,
    ``rejected``, and ``votes``, those for and against. ``data.source`` reads it.

    Args:
        run: Folder of a run with ``objective.name = "selector"``.
        source: The pairs; see ``data/unlabelled_pairs.py``.
        target: The file to write, JSON lines.
        begin: Called with the number of rows that are scored, pairs times selectors; returns a function
            that is called with the number of rows done.

    Raises:
        DataError: The pairs cannot be read, or none fits.
        ModelError: The run has no selectors.
        OutputError: The target cannot be written.
    """
    experiment, folders = selectors_of(run)
    pairs = read_pairs(source)
    done = begin(len(pairs) * len(folders))
    found = [_margins(experiment, folder, pairs, done) for folder in folders]
    places, too_long, _ = found[0]
    kept = [pairs[place] for place in places]
    said = votes(torch.stack([margins for *_, margins in found]))
    lines = [line for line in map(_line, kept, *_counts(said)) if line]
    write_atomically(target, "".join(lines).encode(), 0o644)
    return _labels(len(folders), len(pairs), too_long, kept, said)


def _margins(
    experiment: Experiment,
    folder: Path,
    pairs: Sequence[UnlabelledPair],
    done: Callable[[int], None],
) -> tuple[list[int], int, torch.Tensor]:
    """Return the places of pairs that fit, how many are too long, and margins for their first answers.

    Margins are ``(2, pairs)``, of both orders.

    Raises:
        DataError: None fits.
    """
    encoder, model = load_saved(experiment, (), folder)
    length = longest(
        experiment.evaluation.max_length or experiment.data.max_length, context_length(model.model)
    )
    rows = [Preference(own.row, own.prompt, own.first, own.second) for own in pairs]
    tokens = tokenize(rows, encoder, length, keep_alike=True)
    if not len(tokens):
        raise DataError(
            f"no pair fits into {length} tokens with the question, or none can be read "
            f"({tokens.dropped[0].reason}): the run's data.max_length says how many there may be"
        )
    size, most = experiment.evaluation.batch_size, tokens_per_pass(experiment.training, model)
    asked = HeldOut(TokenShare(tokens), "selection", 0.0, 0.0, size, done=done, tokens=most)
    with model.evaluating():
        long = sum(own.reason == NOTHING_LEFT for own in tokens.dropped)
        return tokens.index.tolist(), long, asked.margins(model)


def _counts(said: Votes) -> tuple[list[int], list[int]]:
    return said.first.tolist(), said.second.tolist()


def _line(pair: UnlabelledPair, first: int, second: int) -> str:
    """Return a labelled pair as JSON, empty where there is no majority."""
    if first == second:
        return ""
    answers = (pair.first, pair.second) if first > second else (pair.second, pair.first)
    row = {"prompt": pair.prompt, "chosen": answers[0], "rejected": answers[1]}
    counted = f"{max(first, second)}:{min(first, second)}"
    return json.dumps(row | {"votes": counted}, ensure_ascii=False) + "\n"


def _labels(
    selectors: int, pairs: int, too_long: int, kept: Sequence[UnlabelledPair], said: Votes
) -> Labels:
    winners = said.winners.tolist()
    known = [w for pair, w in zip(kept, winners, strict=True) if pair.labelled and w]
    most = torch.maximum(said.first, said.second)
    return Labels(
        selectors,
        pairs,
        sum(w != 0 for w in winners),
        sum(w == 0 for w in winners),
        too_long,
        pairs - len(kept) - too_long,
        int((most == selectors).sum()),
        said.by_position,
        sum(w > 0 for w in known) / len(known) if known else None,
    )
