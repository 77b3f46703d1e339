"""Batches of answers that a policy generates and that are rewarded: what GRPO trains on.

Prompts are drawn as rows are for any training, and each optimizer batch is generated when it is due, by
the model as it is then. Each answer has draws of its own, from (seed, purpose, client, round), the
step and its place, so it depends on no other answer. In the passes of training a prompt is read once for
its group, where the model allows that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from fedloom.data.batch import Batch, Rollouts
from fedloom.data.batching import epoch_batches
from fedloom.data.client_rows import Indices, TokenShare
from fedloom.data.encode import TextEncoder
from fedloom.data.token_set import TokenSet
from fedloom.errors import ModelError
from fedloom.evaluation.generate import Ask, BatchSupport, prompt_length, sample_tokens
from fedloom.evaluation.reward_models import RewardScorer, load_reward_model
from fedloom.models.adapters import AdapterModel
from fedloom.objectives.base import Generation
from fedloom.objectives.logps import completion_token_logps
from fedloom.randomness import derive_seed
from fedloom.rewards.functions import MODEL, Reward, reward
from fedloom.tensors import Tensors
from fedloom.training.layout import budget_of
from fedloom.training.passes import Layout
from fedloom.training.settings import TrainingSettings
from fedloom.training.steps import Making, batch_order

TOGETHER = 256
"""Answers that are generated at a time at most."""


@dataclass(frozen=True)
class RolloutMaker:
    """Makes batches of generated answers; see :class:`fedloom.training.steps.BatchMaker`.

    Attributes:
        encoder: Of the client's model.
        generation: How answers are generated.
        rewards: What they are rewarded for, with a factor each.
        start: What the reference model has for an adapter, ``None`` for the base model.
        models: Reward models, with a factor each.
    """

    encoder: TextEncoder
    generation: Generation
    rewards: Sequence[tuple[Reward, float]]
    start: Tensors | None
    models: Sequence[tuple[RewardScorer, float]] = ()

    @classmethod
    def of(
        cls,
        encoder: TextEncoder,
        generation: Generation,
        own: Sequence[str] | None,
        start: Tensors | None,
        device: torch.device | None = None,
    ) -> RolloutMaker:
        """Return the maker of a client.

        Args:
            encoder: Of its model.
            generation: How the objective has answers generated.
            own: Names of the client's own rewards, of equal weight (default: the objective's).
            start: What the reference model has for an adapter.
            device: Where reward models run (default: CPU).

        Raises:
            SettingsError: There is no such reward.
            ModelError: There is no such reward model, or it reads other tokens than the policy writes.
        """
        names, weights = generation.rewards, generation.weights
        if own is not None:
            names, weights = tuple(own), (1.0,) * len(own)
        weighted = list(zip(names, weights, strict=True))
        return cls(
            encoder,
            generation,
            [(reward(name), own) for name, own in weighted if not name.startswith(MODEL)],
            start,
            [
                (_reward_model(name, encoder, device), own)
                for name, own in weighted
                if name.startswith(MODEL)
            ],
        )

    def batches(
        self, model: AdapterModel, share: TokenShare, settings: TrainingSettings, making: Making
    ) -> Iterator[list[Batch]]:
        """Yield each optimizer batch: ``batch_size`` prompts with a group of answers each."""
        work, iterations = making.work, self.generation.iterations
        order = batch_order(settings, making.seed, making.purpose, making.client, making.round)
        left = None if work.steps is None else -(-work.steps // iterations)
        drawn = epoch_batches(
            len(share), settings.batch_size, order, epochs=work.epochs, steps=left
        )
        with model.evaluating():
            support = BatchSupport.of(model.model, self.encoder, several=True)
        made = 0
        for step, indices in enumerate(drawn, 1):
            parts = self._batch(model, share, settings, making, indices, step, support)
            for _ in range(iterations):
                if work.steps is not None and made >= work.steps:
                    return
                yield parts
                made += 1

    def _batch(
        self,
        model: AdapterModel,
        share: TokenShare,
        settings: TrainingSettings,
        making: Making,
        indices: Indices,
        step: int,
        support: BatchSupport,
    ) -> list[Batch]:
        """Return the passes over the answers to the prompts at ``indices``."""
        own, size = self.generation, self.generation.group
        read = [share.tokens.sequence(int(i)) for i in indices]
        longest = prompt_length(model.model, own.max_new_tokens)
        prompts = [sequence[:before][-longest:].tolist() for sequence, before in read]
        asks = [
            Ask(tuple(prompt), own.temperature, self._seed(making, step, place, k))
            for place, prompt in enumerate(prompts)
            for k in range(size)
        ]
        answers = sample_tokens(model, self.encoder, asks, own.max_new_tokens, TOGETHER, support)
        rewards = torch.tensor(self._rewarded(model, read, prompts, answers)).view(-1, size)
        advantages, spreads = own.advantages(rewards)
        kept = np.arange(rewards.numel())
        if own.keeps is not None:  # of all prompts, where not all are trained on
            making.report("reward", float(rewards.double().mean()), rewards.numel())
            kept = own.keeps(rewards).flatten().nonzero()[:, 0].numpy()
        if not len(kept):
            return []
        facts = (advantages.flatten(), rewards.flatten(), spreads.repeat_interleave(size))
        known = Rollouts(*(fact[torch.from_numpy(kept)] for fact in facts))
        rows = np.repeat(share.tokens.rows[indices], size)[kept]
        tokens = _token_set(rows, [list(asks[i].prompt) for i in kept], [answers[i] for i in kept])
        layout = Layout(model, TokenShare(tokens), budget_of(settings, model))
        parts = [_with(layout.batch(part), known, part) for part in layout.passes(_all(tokens))]
        return self._scored(model, parts, making)

    def _seed(self, making: Making, step: int, place: int, number: int) -> int:
        purpose = f"{making.purpose}answers {step} {place} {number}"
        return derive_seed(making.seed, purpose, making.client, making.round)

    def _rewarded(
        self,
        model: AdapterModel,
        read: Sequence[tuple[np.ndarray[tuple[int], np.dtype[np.int32]], int]],
        prompts: Sequence[list[int]],
        answers: Sequence[list[int]],
    ) -> list[float]:
        """Return the weighted sum of the rewards of each answer; count reward models' FLOPs."""
        decode = partial(self.encoder.tokenizer.batch_decode, skip_special_tokens=True)
        asked = decode(list(prompts))
        references = decode([sequence[before:].tolist() for sequence, before in read])
        size = self.generation.group
        found = [
            sum(
                weight * own(asked[i // size], answer.strip(), references[i // size].strip())
                for own, weight in self.rewards
            )
            for i, answer in enumerate(decode(list(answers)))
        ]
        texts = [
            [*prompts[i // size], *answer]
            for i, answer in enumerate(answers if self.models else ())
        ]
        for scorer, weight in self.models:
            model.flops += scorer.flops(texts)
            own_rewards = scorer.of_tokens(texts)
            found = [a + weight * b for a, b in zip(found, own_rewards, strict=True)]
        return found

    def _scored(self, model: AdapterModel, parts: list[Batch], making: Making) -> list[Batch]:
        """Return passes with the log-probs of their tokens that their loss needs beside its own."""
        if making.again or self.generation.iterations > 1:
            with model.evaluating():
                found = [self._logps(model, part) for part in parts]
            parts = [_knowing(p, old_logps=own) for p, own in zip(parts, found, strict=True)]
        if self.generation.reference:
            with model.reference(self.start):
                found = [self._logps(model, part) for part in parts]
            parts = [_knowing(p, reference_logps=own) for p, own in zip(parts, found, strict=True)]
        return parts

    def _logps(self, model: AdapterModel, part: Batch) -> Tensor:
        return completion_token_logps(model, part.sequences, self.generation.temperature)[0]


def _reward_model(name: str, encoder: TextEncoder, device: torch.device | None) -> RewardScorer:
    """Return the reward model of a reward's name.

    Raises:
        ModelError: It is none, or reads other tokens than the policy writes.
    """
    found = load_reward_model(name.removeprefix(MODEL), device)
    if found.encoder.tokenizer.get_vocab() != encoder.tokenizer.get_vocab():
        raise ModelError(
            f"objective.rewards: the reward model {found.name} has another vocabulary than the model "
            "that generates: train it on one with the same tokenizer"
        )
    return found


def _all(tokens: TokenSet) -> Indices:
    return np.arange(len(tokens))


def _with(part: Batch, known: Rollouts, groups: Sequence[Indices]) -> Batch:
    """Return a pass over some answers with what is known of these."""
    places = torch.from_numpy(np.concatenate(groups))
    device = part.sequences.input_ids.device
    own = [t[places].to(device) for t in (known.advantages, known.rewards, known.spreads)]
    return replace(part, rollouts=Rollouts(*own))


def _knowing(part: Batch, **logps: Tensor) -> Batch:
    assert part.rollouts is not None, "they are generated"
    return replace(part, rollouts=replace(part.rollouts, **logps))


def _token_set(
    rows: Indices, prompts: Sequence[list[int]], answers: Sequence[list[int]]
) -> TokenSet:
    """Return prompts, each with an answer to it, as rows that are trained on."""
    count = len(rows)
    before = np.array([len(prompt) for prompt in prompts], np.int64)
    behind = np.array([len(answer) for answer in answers], np.int64)
    trained = np.repeat(np.tile([False, True], count), np.stack([before, behind], 1).reshape(-1))
    pairs = zip(prompts, answers, strict=True)
    return TokenSet(
        width=1,
        index=np.arange(count),
        rows=rows,
        tokens=np.array([token for pair in pairs for own in pair for token in own], np.int32),
        trained=trained,
        starts=np.concatenate([[0], np.cumsum(before + behind)]).astype(np.int64),
        prompts=before,
        cut=np.zeros((count, 2), np.int64),
        escaped=np.zeros(count, np.bool_),
        labels=np.full(count, -1, np.int64),
        dropped=(),
    )
