"""Score one model on one held-out set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from fedloom.data.batch import Batch
from fedloom.data.client_rows import TokenShare
from fedloom.data.encode import TextEncoder
from fedloom.evaluation.generate import continue_tokens
from fedloom.evaluation.metrics import (
    answer_scores,
    choice_metrics,
    exact_scores,
    feedback_metrics,
    instruction_metrics,
    labelled_metrics,
    of_answers,
    of_pairs,
    of_rows,
    preference_metrics,
    reward_metrics,
    rewards,
    selection_metrics,
)
from fedloom.models.adapters import AdapterModel
from fedloom.objectives.logps import (
    completion_logps,
    completion_rewards,
    completion_token_logps,
)
from fedloom.objectives.rewards import outcomes
from fedloom.objectives.selector import letter_margins
from fedloom.settings.schema import Of, Settings
from fedloom.statistics.intervals import SHARE, Sample
from fedloom.tensors import Tensors
from fedloom.training.layout import Budget
from fedloom.training.passes import Layout
from fedloom.training.reference_cache import ReferenceCache
from fedloom.training.references import add_reference_logps

KEPT = Of("keeps the best", (True,), "evaluation.load_best_model_at_end is not set")


class EvaluationSettings(Settings):
    """``[evaluation]``: when and on what states are judged."""

    every: int = Field(default=1, ge=1)
    """Rounds between evaluations; the start and the last round are always evaluated."""
    max_examples: int = Field(default=512, ge=1)
    """Most examples of the global held-out set that are used (drawn once from the seed)."""
    per_client: bool = True
    """Whether each client's own held-out rows are judged too."""
    client_max_examples: Annotated[
        int, Of("judges clients", (True,), "no client is judged by rows of its own")
    ] = Field(default=64, ge=1)
    """Most held-out rows of a client that are used."""
    batch_size: int = Field(default=32, ge=1)
    """Held-out examples in one forward pass at most; training.tokens_per_pass bounds its tokens."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens of a held-out prompt and completion together (default: data.max_length)."""
    samples: Annotated[int, Of("head", ("causal",), "a classifier answers no prompts")] = Field(
        default=6, ge=0
    )
    """Held-out prompts answered before and after, for the report (causal models only)."""
    max_new_tokens: Annotated[int, Of("generates", (True,), "nothing is generated")] = Field(
        default=48, ge=1
    )
    """Length of those answers, and of those that are judged, in tokens."""
    judged_by: Literal["loss", "rouge_l", "exact_match"] = "loss"
    """Of instructions: the loss of the completion, or of the model's own greedy answer ROUGE-L, or
    whether it is the completion."""
    load_best_model_at_end: bool = False
    """Whether the run's adapter is that of the round with the best held-out metric, not of the last."""
    metric_for_best_model: Annotated[str | None, KEPT] = None
    """That metric, on the global held-out set (default: the headline one). Where its name ends with loss,
    lower is better."""
    early_stopping_patience: int | None = Field(default=None, ge=1)
    """Evaluations in a row without a better metric after which the run ends; the best round's adapter is
    kept (default: all rounds are made)."""
    early_stopping_threshold: Annotated[
        float, Of("stops early", (True,), "evaluation.early_stopping_patience is not set")
    ] = Field(default=0.0, ge=0)
    """What a metric has to be better by to count as better there."""

    @property
    def best_round_by(self) -> str | None:
        """The setting by which the best round's adapter is kept, ``None`` where the last one's is."""
        if self.early_stopping_patience is not None:
            return "evaluation.early_stopping_patience"
        return "evaluation.load_best_model_at_end" if self.load_best_model_at_end else None


@dataclass(frozen=True)
class Answering:
    """How a model's own answers to held-out prompts are made and judged.

    Attributes:
        encoder: Of the model's tokenizer.
        max_new_tokens: Most tokens of an answer.
        accepted: Answers that are right, for each row as it was before tokenising.
    """

    encoder: TextEncoder
    max_new_tokens: int
    accepted: Sequence[tuple[str, ...]]


ANSWERS = {"answer": ("rouge_l", answer_scores), "exact": ("exact_match", exact_scores)}
"""Kinds that are judged by a model's own answers: the metric, and what scores them by accepted ones."""

Scored = tuple[dict[str, float], Sample | None]
"""Metrics, and what each row added to the headline one."""


@dataclass
class HeldOut:
    """A held-out set of one kind; reference log-probs are computed once, when first needed.

    Attributes:
        share: The tokenised rows.
        kind: Kind of example.
        beta: Scale of implicit rewards.
        gamma: Scale of explicit ones.
        batch_size: Examples in one forward pass at most.
        answering: How own answers are made and judged, where they are.
        start: What the reference model has for an adapter, where it is not the base model.
        done: Called with the number of rows of each batch that was scored.
        tokens: Tokens in one forward pass at most; ``None`` for any number.
        references: Where log-probs under reference models are kept.
    """

    share: TokenShare
    kind: str
    beta: float
    gamma: float
    batch_size: int
    answering: Answering | None = None
    start: Tensors | None = None
    done: Callable[[int], None] = lambda rows: None
    tokens: int | None = None
    references: ReferenceCache | None = None
    _last: tuple[str, Scored] = ("", ({}, None))

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.share)

    def score(self, model: AdapterModel) -> dict[str, float]:
        """Return the metrics of the adapter that ``model`` holds; see ``metrics.py``.

        Asked again about the same adapter, as when all clients are still alike, it answers from memory.
        """
        digest = model.digest()
        if digest != self._last[0]:
            self._last = digest, self._score(model)
        return dict(self._last[1][0])

    @property
    def sample(self) -> Sample | None:
        """What each row added to the headline metric when a model was last scored; ``None`` before."""
        return self._last[1][1]

    def _score(self, model: AdapterModel) -> Scored:
        if self.kind in ("preference", "feedback") and self.share.reference_logps is None:
            self.share = add_reference_logps(
                model, self.share, self.budget, self.start, self.references
            )
        with model.evaluating():
            if self.kind == "labelled":
                return self._labelled(model)
            if self.kind == "instruction":
                return self._instruction(model)
            if self.kind == "choice":
                return self._choice(model)
            if self.kind == "selection":
                margins = self.margins(model)
                own = outcomes(margins.double().mean(0))
                return selection_metrics(margins), of_rows("selection_accuracy", own, bounds=SHARE)
            if self.kind == "reward":
                return self._scored(model)
            if self.answering is not None:
                return self._answers(model, self.answering)
            return self._rewards(model)

    @property
    def budget(self) -> Budget:
        """What a forward pass holds at most."""
        return Budget(self.batch_size, self.tokens)

    def _batches(self, model: AdapterModel) -> Iterator[tuple[np.ndarray, Batch]]:
        for indices, batch in Layout(model, self.share, self.budget).everything():
            yield indices, batch
            self.done(len(indices))

    def _labelled(self, model: AdapterModel) -> Scored:
        logits, labels, places = [], [], []
        for indices, batch in self._batches(model):
            sequences = batch.sequences
            output = model(input_ids=sequences.input_ids, attention_mask=sequences.attention_mask)
            logits.append(output.logits.float().cpu())
            assert batch.labels is not None
            labels.append(batch.labels.cpu())
            places.append(torch.from_numpy(indices))
        found, known = torch.cat(logits), torch.cat(labels)
        right = torch.zeros(len(known))
        right[torch.cat(places)] = (found.argmax(-1) == known).float()
        return labelled_metrics(found, known), of_rows("accuracy", right, bounds=SHARE)

    def _instruction(self, model: AdapterModel) -> Scored:
        parts, rows = [], torch.zeros(2, len(self.share), dtype=torch.float64)
        for indices, batch in self._batches(model):
            parts.append(completion_token_logps(model, batch.sequences))
            own, mask = (part.double().cpu() for part in parts[-1][:2])
            rows[:, torch.from_numpy(indices)] = torch.stack([-(own * mask).sum(-1), mask.sum(-1)])
        logps, masks, corrects = (
            torch.cat([p[i].reshape(-1).cpu() for p in parts]) for i in range(3)
        )
        return instruction_metrics(logps, masks, corrects), of_rows("loss", rows[0], rows[1])

    def _choice(self, model: AdapterModel) -> Scored:
        tokens = self.share.tokens
        logps = torch.zeros(tokens.width, len(tokens))
        for indices, batch in self._batches(model):
            scores = completion_logps(model, batch.sequences)
            logps[:, torch.from_numpy(indices)] = scores.cpu().view(tokens.width, -1)
        lengths = torch.from_numpy(tokens.completion_lengths).view(-1, tokens.width).T
        right = torch.from_numpy(tokens.labels)
        won = ((-logps / lengths).double().argmin(0) == right).float()
        return choice_metrics(logps.T, lengths.T, right), of_rows("accuracy", won, bounds=SHARE)

    def margins(self, model: AdapterModel) -> torch.Tensor:
        """Return ``(2, pairs)`` margins of a selector; see :func:`letter_margins`."""
        found = torch.zeros(2, len(self.share))
        for indices, batch in self._batches(model):
            found[:, torch.from_numpy(indices)] = letter_margins(model, batch.sequences).cpu()
        return found

    def _scored(self, model: AdapterModel) -> Scored:
        tokens = self.share.tokens
        found = torch.zeros(2, len(tokens))
        for indices, batch in self._batches(model):
            sequences = batch.sequences
            output = model(input_ids=sequences.input_ids, attention_mask=sequences.attention_mask)
            found[:, torch.from_numpy(indices)] = output.logits[:, 0].float().cpu().view(2, -1)
        lengths = torch.from_numpy(tokens.completion_lengths).view(-1, 2).T
        won = outcomes(found[0].double() - found[1].double())
        metrics = reward_metrics(found[0], found[1], (lengths[0], lengths[1]))
        return metrics, of_rows("reward_accuracy", won, bounds=SHARE)

    def _answers(self, model: AdapterModel, answering: Answering) -> Scored:
        tokens = self.share.tokens
        prompts = [s[:n].tolist() for s, n in map(tokens.sequence, range(len(tokens)))]
        answers = continue_tokens(
            model, answering.encoder, prompts, answering.max_new_tokens, self.batch_size
        )
        accepted = [answering.accepted[i] for i in tokens.index]
        name, judge = ANSWERS[self.kind]
        scores = judge(answers, accepted)
        return {name: sum(scores) / len(scores)}, of_rows(name, scores, bounds=SHARE)

    def _rewards(self, model: AdapterModel) -> Scored:
        tokens = self.share.tokens
        logps = torch.zeros(tokens.width, len(tokens))
        explicit = torch.zeros_like(logps) if model.has_reward else None
        for indices, batch in self._batches(model):
            rows = torch.from_numpy(indices)
            if explicit is None:
                scores = completion_logps(model, batch.sequences)
            else:
                scores, extra = completion_rewards(model, batch.sequences)
                explicit[:, rows] = extra.cpu().view(tokens.width, -1)
            logps[:, rows] = scores.cpu().view(tokens.width, -1)
        assert self.share.reference_logps is not None
        reference = self.share.reference_logps.view(-1, tokens.width).T
        if self.kind == "feedback":
            desirable = torch.from_numpy(tokens.labels).bool()
            own = None if explicit is None else explicit[0]
            whole = rewards(logps[0] - reference[0], self.beta, own, self.gamma)
            metrics = feedback_metrics(
                logps[0], reference[0], desirable, self.beta, own, self.gamma
            )
            return metrics, of_answers(whole, desirable)
        completions = torch.from_numpy(tokens.completion_lengths).view(-1, 2).T
        ratios = logps - reference
        gap = None if explicit is None else explicit[0] - explicit[1]
        metrics = preference_metrics(
            logps[0],
            logps[1],
            reference[0],
            reference[1],
            (completions[0], completions[1]),
            self.beta,
            None if explicit is None else (explicit[0], explicit[1]),
            self.gamma,
        )
        return metrics, of_pairs(rewards(ratios[0] - ratios[1], self.beta, gap, self.gamma))
