"""What a judge is, what it is shown, and what counts as a verdict.

A judge sees a case: a question and one or more answers in an order that somebody else chose. It gives
one score an answer or none at all: an answer that cannot be read, is out of range, or was not given
is counted under its reason and never becomes a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fedloom.evaluation.questions import Question


@dataclass(frozen=True)
class Case:
    """What a judge is shown at once.

    Attributes:
        question: The question, with its reference where there is one.
        answers: In the order in which they are shown.
        seed: Of the judge's own draws and of the marks around the answers.
    """

    question: Question
    answers: tuple[str, ...]
    seed: int = 0


@dataclass(frozen=True)
class Verdict:
    """What came of a case.

    Attributes:
        scores: One an answer, in the order shown; ``None`` where there is no usable verdict.
        reason: Why there is none: "unparsable", "out of range", "abstained: ...", "no answer: ...".
        raw: What the judge said, for the record.
    """

    scores: tuple[float, ...] | None
    reason: str = ""
    raw: str = ""


class Judge(Protocol):
    """Scores answers."""

    @property
    def name(self) -> str:
        """What it is called in reports."""
        ...

    @property
    def compares(self) -> bool:
        """Whether it sees all answers of a question at once, so that their order matters."""
        ...

    @property
    def scale(self) -> tuple[float, float]:
        """Lowest and highest score it may give."""
        ...

    def check(self) -> None:
        """Make sure before anything is answered that the judge can be asked.

        Raises:
            JudgeError: It cannot.
        """
        ...

    def rate(self, cases: Sequence[Case]) -> list[Verdict]:
        """Return one verdict a case, in order.

        Raises:
            JudgeError: The judge cannot work at all (a wrong key, no server).
        """
        ...

    def costs(self) -> dict[str, float]:
        """Return what it has used so far: requests, tokens, money; empty for judges that are free."""
        ...
