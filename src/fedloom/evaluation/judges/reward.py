"""A judge that is a reward model: it scores each answer by itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fedloom.evaluation.judges.base import Case, Verdict
from fedloom.evaluation.reward_models import load_reward_model


class RewardJudge:
    """Scores answers with a reward model; its scores have no scale of their own but their order."""

    compares = False
    scale = (-math.inf, math.inf)

    def __init__(self, path: str, device: torch.device | None = None) -> None:
        """Load the judge.

        Args:
            path: Folder of a run of a reward model, of its adapter, or of an export of it.
            device: Where it runs (default: CPU).

        Raises:
            ModelError: There is no such model.
        """
        self.scorer = load_reward_model(path, device)
        self.name = self.scorer.name
        self.asked = 0

    def check(self) -> None:
        """It was loaded when it was made."""

    def rate(self, cases: Sequence[Case]) -> list[Verdict]:
        """Return one verdict a case; a case that the chat template has no place for has no scores."""
        self.asked += len(cases)
        found = [self.scorer.of_answers(case.question.text, case.answers) for case in cases]
        return [
            Verdict(None, "abstained: the chat template refuses it")
            if scores is None
            else Verdict(tuple(scores))
            for scores in found
        ]

    def costs(self) -> dict[str, float]:
        """Return how often it was asked."""
        return {"requests": float(self.asked)}
