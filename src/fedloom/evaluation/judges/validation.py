"""Judges are measured before they are believed: their accuracy on pairs that people have judged.

Layouts that are read: LLMBar (Zeng et al. 2023, https://arxiv.org/abs/2310.07641: ``input, output_1,
output_2, label``) and PandaLM (Wang et al. 2023, https://arxiv.org/abs/2306.05087: ``instruction, input,
response1, response2, annotator1..3``). Every pair is shown in both orders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedloom.data.files import read_file
from fedloom.data.labels import majority
from fedloom.data.layouts import LAYOUTS
from fedloom.data.rows import RowError
from fedloom.errors import DataError
from fedloom.evaluation.judge_statistics import Estimate, bootstrap
from fedloom.evaluation.judges.base import Case, Judge
from fedloom.evaluation.questions import Question
from fedloom.evaluation.verdicts import Begin, rate_all
from fedloom.randomness import derive_seed

NAMES = ("output_1/output_2/label", "response1/response2/annotator1/annotator2/annotator3")
JUDGED = tuple(layout for layout in LAYOUTS["preference"] if layout.name() in NAMES)
"""Layouts of pairs that people have judged (LLMBar, PandaLM), without the prompt."""


@dataclass(frozen=True)
class JudgedPair:
    """A pair of answers and which of them people found better.

    Attributes:
        question: What was asked.
        first: One answer.
        second: The other.
        better: 1 or 2.
    """

    question: Question
    first: str
    second: str
    better: int


@dataclass(frozen=True)
class AuditSet:
    """Pairs of one file.

    Attributes:
        name: Of the file.
        pairs: Those on which people agree that one is better.
        undecided: Pairs on which they do not, left out.
        malformed: Rows that could not be read, left out.
    """

    name: str
    pairs: tuple[JudgedPair, ...]
    undecided: int = 0
    malformed: int = 0


@dataclass(frozen=True)
class AuditResult:
    """How a judge does on one set.

    Attributes:
        name: The set's name.
        pairs: Pairs that it was asked about.
        scored: Pairs with a usable verdict in both orders; the others are counted, never scored.
        accuracy: Over the scored ones, by the mean of both orders; a tie counts half.
        consistent: Share of the scored ones with the same winner in both orders.
        tied: Share of the scored ones with equal means.
        longer_wins: Accuracy of "the longer answer is better" on all pairs.
        reasons: Verdicts without scores, by reason.
    """

    name: str
    pairs: int
    scored: int
    accuracy: Estimate
    consistent: Estimate
    tied: Estimate
    longer_wins: Estimate
    reasons: dict[str, int]


def read_audit_sets(path: Path, limit: int | None = None) -> list[AuditSet]:
    """Read labelled pairs from a file, or from all files of a known layout below a folder.

    Args:
        path: File or folder.
        limit: Most pairs of each set, drawn evenly over the file.

    Raises:
        DataError: Nothing of a known layout is there.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*.jsonl*") if p.is_file())
    sets = [found for found in (_read_set(file) for file in files) if found is not None]
    if not sets:
        raise DataError(
            f"{path} holds no judged pairs: they need output_1, output_2 and label (LLMBar) or "
            "response1, response2 and annotator1 to annotator3 (PandaLM)"
        )
    return [_limited(one, limit) for one in sets]


def audit(
    judge: Judge, one: AuditSet, seed: int, begin: Begin = lambda total: lambda count: None
) -> AuditResult:
    """Show every pair of a set in both orders to a judge and compare it with people.

    Args:
        judge: Who scores.
        one: The pairs.
        seed: Of the judge's draws.
        begin: Told how many cases there are; what it returns is called with those that are done.
    """
    cases = [
        Case(pair.question, answers, derive_seed(seed, "judge", i, order))
        for i, pair in enumerate(one.pairs)
        for order, answers in enumerate([(pair.first, pair.second), (pair.second, pair.first)])
    ]
    verdicts = rate_all(judge, cases, begin)
    reasons = Counter(verdict.reason for verdict in verdicts if verdict.scores is None)
    right, same, tied = [], [], []
    for i, pair in enumerate(one.pairs):
        ahead, behind = verdicts[2 * i].scores, verdicts[2 * i + 1].scores
        if ahead is None or behind is None:
            continue
        margins = (ahead[0] - ahead[1], behind[1] - behind[0])
        mean = sum(margins) / 2 if all(np.isfinite(margins)) else 0.0
        right.append(0.5 if mean == 0 else float((mean > 0) == (pair.better == 1)))
        same.append(margins[0] * margins[1] > 0)
        tied.append(mean == 0)
    rng = np.random.default_rng(derive_seed(seed, "bootstrap"))
    return AuditResult(
        one.name,
        len(one.pairs),
        len(right),
        bootstrap(right, rng),
        bootstrap(list(map(float, same)), rng),
        bootstrap(list(map(float, tied)), rng),
        longer_wins(one.pairs, rng),
        dict(sorted(reasons.items())),
    )


def longer_wins(pairs: Sequence[JudgedPair], rng: np.random.Generator) -> Estimate:
    """Return the accuracy of "the longer answer is better"; equal lengths count half."""
    right = []
    for pair in pairs:
        margin = len(pair.first) - len(pair.second)
        right.append(0.5 if margin == 0 else float((margin > 0) == (pair.better == 1)))
    return bootstrap(right, rng)


def _read_set(file: Path) -> AuditSet | None:
    """Return a file's pairs, or ``None`` where its first row has another layout."""
    pairs: list[JudgedPair] = []
    undecided = malformed = 0
    for place, (number, row) in enumerate(read_file(file)):
        layout = _layout(row)
        if layout is None:
            if not place:
                return None
            malformed += 1
            continue
        question, first, second, better = layout
        if not isinstance(first, str) or not isinstance(second, str):
            malformed += 1
        elif better not in (1, 2):
            undecided += 1
        else:
            pairs.append(JudgedPair(Question(str(number), question), first, second, better))
    name = f"{file.parent.name}/{file.name.partition('.')[0]}"
    return AuditSet(name, tuple(pairs), undecided, malformed) if pairs else None


def _layout(row: Any) -> tuple[str, Any, Any, int] | None:
    """Return what was asked, both answers and which is better (0: people do not say)."""
    columns = list(row) if isinstance(row, dict) else []
    layout = next((one for one in JUDGED if not one.missing(columns)), None)
    if layout is None:
        return None
    own = layout.ours(row)
    votes = [own[name] for name in layout.columns if name.startswith(("best", "vote"))]
    names = (layout.columns["first"], layout.columns["second"])
    try:
        better = 1 + majority(votes, {}, names, "label")
    except RowError:
        better = 0
    return _asked(row), own["first"], own["second"], better


def _asked(row: dict[str, Any]) -> str:
    parts = [row.get("instruction"), row.get("input")]
    return "\n\n".join(part for part in parts if isinstance(part, str) and part.strip())


def _limited(one: AuditSet, limit: int | None) -> AuditSet:
    if limit is None or len(one.pairs) <= limit:
        return one
    places = np.linspace(0, len(one.pairs) - 1, limit).round().astype(int)
    return AuditSet(one.name, tuple(one.pairs[i] for i in places), one.undecided, one.malformed)
