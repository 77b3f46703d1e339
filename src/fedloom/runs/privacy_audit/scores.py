"""Scores of rows under a released adapter, calibrated by the reference model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedloom.data.client_rows import TokenShare
from fedloom.data.examples import Example, Feedback, Labelled, Preference
from fedloom.errors import DataError
from fedloom.experiment.experiment import Experiment
from fedloom.models.adapters import AdapterModel
from fedloom.models.load import context_length
from fedloom.objectives import make_objective
from fedloom.objectives.base import Objective
from fedloom.objectives.logps import completion_logps
from fedloom.runs.initial_adapter import find_start
from fedloom.runs.partitioning import PartitionedData
from fedloom.runs.saved_models import load_saved
from fedloom.runs.token_rows import TokenReader
from fedloom.training.layout import Budget
from fedloom.training.passes import Layout
from fedloom.training.references import add_reference_logps


@dataclass(frozen=True)
class RowScores:
    """What each row scores, higher where it seems to have been trained on.

    Attributes:
        rows: ``(n,)`` positions of the rows that could be tokenised.
        scores: By name of the score, ``(n,)``; the first is the main one.
    """

    rows: NDArray[np.int64]
    scores: dict[str, NDArray[np.float64]]


class Scorer:
    """A released adapter and its reference, loaded once, that score rows."""

    def __init__(
        self,
        experiment: Experiment,
        division: PartitionedData,
        adapter: Path,
        objective: Objective | None = None,
    ) -> None:
        """Load both.

        Args:
            experiment: Of the run that made the adapter.
            division: Has the names of classes.
            adapter: A PEFT folder.
            objective: The run's own, where it was not one of the settings.

        Raises:
            ModelError: ``adapter`` is not a PEFT folder, or one for another model.
        """
        self.experiment = experiment
        self.objective = objective or make_objective(experiment.objective)
        self.start = None
        start = find_start(experiment)
        if start is not None and experiment.reference == "start":
            path = start.shared if isinstance(start.shared, Path) else None
            self.start = load_saved(experiment, division.classes, path)[1].read()
        encoder, self.model = load_saved(experiment, division.classes, adapter)
        context = context_length(self.model.model)
        self.reader = TokenReader(
            experiment, division, self.objective, encoder, self.model, context
        )

    def score(self, rows: Sequence[Example]) -> RowScores:
        """Score rows, all of one kind.

        Raises:
            DataError: None could be tokenised, or a label is none of the model's.
        """
        tokens = self.reader.tokens(rows, self.reader.max_length)
        if not len(tokens):
            raise DataError("none of the rows to attack with could be tokenised")
        share = TokenShare(tokens)
        budget = Budget(self.experiment.evaluation.batch_size, self.reader.pass_tokens)
        if isinstance(rows[0], Labelled):
            with self.model.evaluating():
                own = _label_logps(self.model, share, budget)
            return RowScores(tokens.index, {"log-probability of the label": own})
        share = add_reference_logps(self.model, share, budget, self.start)
        assert share.reference_logps is not None
        with self.model.evaluating():
            logps = _logps(self.model, share, budget)
        ratios = (logps - share.reference_logps).double().view(-1, tokens.width).numpy()
        beta = self.objective.beta
        if isinstance(rows[0], Preference):
            return RowScores(
                tokens.index,
                {
                    "reward margin": beta * (ratios[:, 0] - ratios[:, 1]),
                    "log-ratio of chosen": ratios[:, 0],
                    "log-ratio of rejected": -ratios[:, 1],
                },
            )
        if isinstance(rows[0], Feedback):
            signs = np.where(tokens.labels > 0, 1.0, -1.0)
            return RowScores(tokens.index, {"signed reward": beta * signs * ratios[:, 0]})
        return RowScores(tokens.index, {"log-ratio of the answer": ratios[:, 0]})


def _logps(model: AdapterModel, share: TokenShare, budget: Budget) -> Tensor:
    """Return ``(sequences,)`` summed log-probs, in the order of the sequences."""
    tokens = share.tokens
    found = torch.zeros(len(tokens), tokens.width)
    for indices, batch in Layout(model, share, budget).everything():
        own = completion_logps(model, batch.sequences).cpu()
        found[torch.from_numpy(indices)] = own.view(tokens.width, -1).T
    return found.reshape(-1)


def _label_logps(model: AdapterModel, share: TokenShare, budget: Budget) -> NDArray[np.float64]:
    """Return ``(rows,)`` log-probabilities of the rows' classes."""
    found = np.zeros(len(share))
    for indices, batch in Layout(model, share, budget).everything():
        sequences = batch.sequences
        output = model(input_ids=sequences.input_ids, attention_mask=sequences.attention_mask)
        logps = output.logits.float().log_softmax(-1)
        assert batch.labels is not None
        found[indices] = logps.gather(1, batch.labels[:, None])[:, 0].double().cpu().numpy()
    return found
