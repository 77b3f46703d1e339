"""Held-out metrics, pure: tensors in, numbers out, and what each row adds to the headline one.

The headline metric of each kind of example is in :data:`PRIMARY_METRICS`; what each name means, with its
formula, unit and range, stands in ``reports/glossary.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.errors import ModelError
from fedloom.objectives.rewards import outcomes
from fedloom.rewards.functions import exact_match
from fedloom.statistics.intervals import SHARE, UNBOUNDED, Sample
from fedloom.wire.schema import NumberSpec, amount, fraction, score


@dataclass(frozen=True)
class PrimaryMetric:
    """The metric a kind of example is judged by.

    Attributes:
        name: Its key among the metrics.
        higher_is_better: Its direction.
        help: One line that says what it is.
    """

    name: str
    higher_is_better: bool
    help: str


PRIMARY_METRICS = {
    "instruction": PrimaryMetric(
        "loss", False, "mean negative log-likelihood of a held-out completion token, in nats"
    ),
    "preference": PrimaryMetric(
        "preference_accuracy",
        True,
        "share of held-out pairs whose chosen answer has the higher reward: the implicit one, that is, "
        "it gained more log-probability over the base model than the rejected one, and where there is an "
        "explicit reward head both together (ties count half: 0.5 at the start by definition)",
    ),
    "selection": PrimaryMetric(
        "selection_accuracy",
        True,
        "share of held-out pairs whose chosen answer the selector says is better, asked in both orders "
        "and the two margins added (ties count half)",
    ),
    "reward": PrimaryMetric(
        "reward_accuracy",
        True,
        "share of held-out pairs whose chosen answer the reward model gives the higher reward (ties "
        "count half)",
    ),
    "feedback": PrimaryMetric(
        "feedback_auc",
        True,
        "chance that a held-out desirable answer has a higher implicit reward than an undesirable one "
        "(ties count half: 0.5 at the start by definition)",
    ),
    "labelled": PrimaryMetric("accuracy", True, "share of held-out texts whose class is predicted"),
    "choice": PrimaryMetric(
        "accuracy",
        True,
        "share of held-out rows whose right completion has the lowest mean loss a token of all there are",
    ),
    "answer": PrimaryMetric(
        "rouge_l",
        True,
        "mean ROUGE-L (F1) of greedy answers to held-out prompts, each against the nearest accepted one",
    ),
    "exact": PrimaryMetric(
        "exact_match", True, "share of held-out prompts whose greedy answer is an accepted one"
    ),
}


METRICS: dict[str, tuple[NumberSpec, ...]] = {
    "instruction": (amount("loss"), amount("perplexity", 1e12), fraction("token_accuracy")),
    "preference": (
        *map(fraction, ("preference_accuracy", "implicit_accuracy", "explicit_accuracy")),
        *map(fraction, ("likelihood_accuracy", "longer_accuracy", "normalised_accuracy")),
        score("reward_margin"),
        amount("loss"),
    ),
    "selection": (
        *map(fraction, ("selection_accuracy", "single_order_accuracy", "first_chosen")),
        amount("loss"),
    ),
    "reward": (
        *map(fraction, ("reward_accuracy", "longer_accuracy")),
        score("reward_margin"),
        amount("loss"),
    ),
    "feedback": (
        *map(fraction, ("feedback_auc", "implicit_auc", "explicit_auc")),
        score("reward_desirable"),
        score("reward_undesirable"),
    ),
    "labelled": (fraction("accuracy"), amount("loss")),
    "choice": (fraction("accuracy"), amount("loss")),
    "answer": (fraction("rouge_l"),),
    "exact": (fraction("exact_match"),),
}
"""Names and ranges of what the functions below return, by kind of example."""

HELD_OUT = amount("held_out", 2.0**40)
"""Rows that a client has judged."""


def instruction_metrics(token_logps: Tensor, mask: Tensor, correct: Tensor) -> dict[str, float]:
    """Return loss, perplexity and token accuracy, all ``(sequences, length)`` under ``mask``."""
    tokens = mask.sum()
    loss = float(-(token_logps * mask).double().sum() / tokens)
    return {
        "loss": loss,
        "perplexity": float(torch.tensor(loss).exp()),
        "token_accuracy": float((correct & mask).sum() / tokens),
    }


def rewards(log_ratios: Tensor, beta: float, explicit: Tensor | None, gamma: float) -> Tensor:
    """Return beta times the log-ratios, plus gamma times explicit rewards, ``(rows,)`` each, float64.

    This is the reward of training too (DPO, KTO and those that add a reward head). Given differences of
    log-ratios and of explicit rewards, it is the difference of rewards.

    Args:
        log_ratios: ``(rows,)`` log pi - log pi_ref, in nats.
        beta: Scale of the implicit reward, above 0.
        explicit: ``(rows,)`` outputs of the reward head; ``None`` without one.
        gamma: Scale of the explicit reward, at least 0.
    """
    implicit = beta * log_ratios.double()
    return implicit if explicit is None else implicit + gamma * explicit.double()


def preference_metrics(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    lengths: tuple[Tensor, Tensor],
    beta: float,
    explicit: tuple[Tensor, Tensor] | None = None,
    gamma: float = 0.0,
) -> dict[str, float]:
    """Return the metrics of held-out pairs.

    Args:
        chosen: ``(pairs,)`` log pi(y+|x), summed over the completion's tokens, in nats.
        rejected: ``(pairs,)`` the same of y-.
        reference_chosen: ``(pairs,)`` log pi_ref(y+|x).
        reference_rejected: ``(pairs,)`` log pi_ref(y-|x).
        lengths: Completion tokens of y+ and y-, ``(pairs,)`` each, at least 1.
        beta: Scale of the implicit reward, above 0.
        explicit: Outputs of the reward head for y+ and y-, ``(pairs,)`` each; ``None`` without one.
        gamma: Scale of the explicit reward, at least 0.

    Returns:
        ``preference_accuracy`` (implicit reward, ties count half), ``likelihood_accuracy`` (the policy
        itself gives the chosen answer the higher probability), ``normalised_accuracy`` (the same of
        mean log-probs a token, as SimPO and ORPO reward them: length does not count), ``longer_accuracy``
        (the rule that the longer answer is the chosen one: no model is asked, all must beat it),
        ``reward_margin`` (mean difference of the rewards, as in training) and ``loss`` (the DPO loss at
        ``beta``). With explicit rewards ``preference_accuracy``, ``reward_margin`` and ``loss`` are those
        of both rewards together, and ``implicit_accuracy`` and ``explicit_accuracy`` of either alone.
    """
    margin = ((chosen - reference_chosen) - (rejected - reference_rejected)).double()
    own = None if explicit is None else (explicit[0] - explicit[1]).double()
    whole = rewards(margin, beta, own, gamma)
    alone = {} if own is None else {"implicit_accuracy": won(margin), "explicit_accuracy": won(own)}
    return {
        "preference_accuracy": won(whole),
        **alone,
        "likelihood_accuracy": won((chosen - rejected).double()),
        "longer_accuracy": won((lengths[0] - lengths[1]).double()),
        "normalised_accuracy": won((chosen / lengths[0] - rejected / lengths[1]).double()),
        "reward_margin": float(whole.mean()),
        "loss": float(-F.logsigmoid(whole).mean()),
    }


def selection_metrics(margins: Tensor) -> dict[str, float]:
    """Return the metrics of held-out pairs under a selector.

    Args:
        margins: ``(2, pairs)`` logit of the right letter minus that of the other; in the first row the
            chosen answer came first.

    Returns:
        ``selection_accuracy`` (of both orders together, ties count half), ``single_order_accuracy`` (of
        each order by itself), ``first_chosen`` (share of questions in which the first answer was said
        to be better: 0.5 where positions do not matter), and ``loss``, the mean cross-entropy over both
        letters.
    """
    whole = margins.double()
    return {
        "selection_accuracy": won(whole.mean(0)),
        "single_order_accuracy": won(whole.view(-1)),
        "first_chosen": won(torch.cat([whole[0], -whole[1]])),
        "loss": float(-F.logsigmoid(whole).mean()),
    }


def reward_metrics(
    chosen: Tensor, rejected: Tensor, lengths: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """Judge a reward model by pairs.

    Args:
        chosen: ``(pairs,)`` rewards of the chosen answers.
        rejected: ``(pairs,)`` those of the rejected ones.
        lengths: ``(pairs,)`` tokens of both.

    Returns:
        ``reward_accuracy`` (ties count half), ``reward_margin``, ``longer_accuracy`` (of the rule that
        the longer answer is the chosen one) and ``loss``, the mean of -log sigmoid(margin).
    """
    margins = chosen.double() - rejected.double()
    return {
        "reward_accuracy": won(margins),
        "longer_accuracy": won((lengths[0] - lengths[1]).double()),
        "reward_margin": float(margins.mean()),
        "loss": float(-F.logsigmoid(margins).mean()),
    }


def feedback_metrics(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    beta: float = 0.1,
    explicit: Tensor | None = None,
    gamma: float = 0.0,
) -> dict[str, float]:
    """Return the metrics of held-out single answers, which are of their rewards.

    Args:
        policy: ``(rows,)`` log pi(y|x), summed over the completion's tokens, in nats.
        reference: ``(rows,)`` log pi_ref(y|x).
        desirable: ``(rows,)`` whether the answer is desirable.
        beta: Scale of the implicit reward, above 0.
        explicit: ``(rows,)`` outputs of the reward head; ``None`` without one.
        gamma: Scale of the explicit reward, at least 0.

    Returns:
        ``feedback_auc`` (0.5 where one class is missing) and the mean reward of either class, as in
        training (0 where it is missing). With explicit rewards these are of both rewards together, and
        ``implicit_auc`` and ``explicit_auc`` of either alone.
    """
    ratios = (policy - reference).double()
    whole, alone = rewards(ratios, beta, explicit, gamma), {}
    if explicit is not None:
        alone = {
            "implicit_auc": _auc(ratios, desirable),
            "explicit_auc": _auc(explicit.double(), desirable),
        }
    good, bad = whole[desirable], whole[~desirable]
    return {
        "feedback_auc": _auc(whole, desirable),
        **alone,
        "reward_desirable": float(good.mean()) if len(good) else 0.0,
        "reward_undesirable": float(bad.mean()) if len(bad) else 0.0,
    }


def labelled_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return accuracy and cross-entropy of ``(examples, classes)`` logits."""
    correct = (logits.argmax(1) == labels).double().mean()
    return {"accuracy": float(correct), "loss": float(F.cross_entropy(logits.double(), labels))}


def choice_metrics(logps: Tensor, lengths: Tensor, right: Tensor) -> dict[str, float]:
    """Judge rows by the log-probs of all completions there are.

    Args:
        logps: ``(rows, choices)``, summed over tokens, in nats.
        lengths: ``(rows, choices)``, tokens of each.
        right: ``(rows,)``, which is right.

    Returns:
        ``accuracy`` and ``loss``, the mean loss of a token of the right one.
    """
    losses = (-logps / lengths).double()
    correct = (losses.argmin(1) == right).double().mean()
    return {"accuracy": float(correct), "loss": float(losses.gather(1, right[:, None]).mean())}


def answer_scores(answers: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[float]:
    """Return the ROUGE-L of each answer, against the one of its accepted answers nearest to it.

    Lin 2004, "ROUGE: A Package for Automatic Evaluation of Summaries", as the library rouge-score
    computes it, words not stemmed.

    Raises:
        ModelError: The library is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ModelError(
            'evaluation.judged_by = "rouge_l" needs rouge-score, which is not installed: '
            'pip install "fedloom[rouge]"'
        ) from error
    scorer = RougeScorer(["rougeL"])
    return [
        float(scorer.score_multi(list(own), answer)["rougeL"].fmeasure)
        for answer, own in zip(answers, accepted, strict=True)
    ]


def exact_scores(answers: Sequence[str], accepted: Sequence[Sequence[str]]) -> list[float]:
    """Return 1 for each answer that is an accepted one, but for white space around them, else 0."""
    return [
        max((exact_match("", answer, right) for right in own), default=0.0)
        for answer, own in zip(answers, accepted, strict=True)
    ]


def _auc(scores: Tensor, desirable: Tensor) -> float:
    good, bad = scores[desirable], scores[~desirable]
    return won(good[:, None] - bad[None, :]) if len(good) and len(bad) else 0.5


def won(margins: Tensor) -> float:
    """Return the share of margins above 0, ties half."""
    return float(outcomes(margins).mean())


def of_rows(
    metric: str,
    totals: Tensor | Sequence[float],
    weights: Tensor | None = None,
    bounds: tuple[float, float] = UNBOUNDED,
) -> Sample:
    """Return what each row adds to a metric; see :class:`Sample`.

    Args:
        metric: Its name.
        totals: ``(rows,)``.
        weights: ``(rows,)``; 1 each if ``None``.
        bounds: Of a row's total over its weight.
    """
    own = [float(value) for value in totals]
    return Sample(
        metric,
        tuple(own),
        tuple(weights.tolist()) if weights is not None else (1.0,) * len(own),
        (),
        bounds,
    )


def of_pairs(scores: Tensor) -> Sample:
    """Return what pairs add to their accuracy, by the difference of their rewards, ``(pairs,)``."""
    return of_rows("preference_accuracy", outcomes(scores), bounds=SHARE)


def of_answers(scores: Tensor, desirable: Tensor) -> Sample | None:
    """Return what answers add to the area under the ROC curve of their rewards, each ``(rows,)``.

    An answer adds the share of the other class that stands on the right side of it (DeLong et al. 1988);
    ``None`` where one class is missing.
    """
    good, bad = scores[desirable], scores[~desirable]
    if not len(good) or not len(bad):
        return None
    beats = outcomes(good[:, None] - bad[None, :])
    totals = torch.empty(len(scores), dtype=torch.float64)
    totals[desirable], totals[~desirable] = beats.mean(1), beats.mean(0)
    groups = tuple(int(label) for label in desirable)
    return Sample("feedback_auc", tuple(totals.tolist()), (1.0,) * len(scores), groups, SHARE)
