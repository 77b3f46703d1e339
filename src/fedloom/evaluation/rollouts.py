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
class Drawn:
    """Answers to some prompts, a group to each.

    Attributes:
        rows: ``(prompts,)`` row numbers in the data.
        prompts: Tokens of each prompt.
        references: Of each prompt the tokens that rewards compare with.
        answers: Tokens of each answer, those to one prompt together.
    """

    rows: Indices
    prompts: Sequence[list[int]]
    references: Sequence[list[int]]
    answers: Sequence[list[int]]

    def take(self, places: Sequence[int]) -> Drawn:
        """Return some of the prompts with their answers, in this order."""
        size = len(self.answers) // max(1, len(self.prompts))
        return Drawn(
            self.rows[list(places)],
            [self.prompts[i] for i in places],
            [self.references[i] for i in places],
            [self.answers[i * size + k] for i in places for k in range(size)],
        )


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

    def drawn(
        self,
        model: AdapterModel,
        share: TokenShare,
        making: Making,
        indices: Indices,
        step: int = 1,
    ) -> Drawn:
        """Return answers to the prompts at ``indices``, a group each, by the model as it is.

        Args:
            model: That answers.
            share: Its prompts; references are the completions.
            making: What draws come from.
            indices: Rows.
            step: Which batch of the training it is, for its draws.
        """
        with model.evaluating():
            support = BatchSupport.of(model.model, self.encoder, several=True)
        return self._drawn(model, share, making, indices, step, support)

    def greedy(self, model: AdapterModel, share: TokenShare, indices: Indices) -> list[list[int]]:
        """Return the tokens of the likeliest answer to each of the prompts at ``indices``."""
        prompts, _ = self.read(model, share, indices)
        most = self.generation.max_new_tokens
        asks = [Ask(tuple(prompt)) for prompt in prompts]
        return sample_tokens(model, self.encoder, asks, most, TOGETHER)

    def texts(self, answers: Sequence[Sequence[int]]) -> list[str]:
        """Return answers as rewards read them: without tokens that end them, and blanks around."""
        decode = self.encoder.tokenizer.batch_decode
        return [text.strip() for text in decode([*map(list, answers)], skip_special_tokens=True)]

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
            answered = self._drawn(model, share, making, indices, step, support)
            rewards = self.rewarded(model, answered)
            parts = self.passes(model, settings, making, answered, rewards)
            for _ in range(iterations):
                if work.steps is not None and made >= work.steps:
                    return
                yield parts
                made += 1

    def read(
        self, model: AdapterModel, share: TokenShare, indices: Indices
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Return the prompts at ``indices``, as much of them as is read, and their completions."""
        read = [share.tokens.sequence(int(i)) for i in indices]
        longest = prompt_length(model.model, self.generation.max_new_tokens)
        prompts = [sequence[:before][-longest:].tolist() for sequence, before in read]
        return prompts, [sequence[before:].tolist() for sequence, before in read]

    def _drawn(
        self,
        model: AdapterModel,
        share: TokenShare,
        making: Making,
        indices: Indices,
        step: int,
        support: BatchSupport,
    ) -> Drawn:
        prompts, references = self.read(model, share, indices)
        asks = [
            Ask(tuple(prompt), self.generation.temperature, self._seed(making, step, place, k))
            for place, prompt in enumerate(prompts)
            for k in range(self.generation.group)
        ]
        most = self.generation.max_new_tokens
        answers = sample_tokens(model, self.encoder, asks, most, TOGETHER, support)
        return Drawn(share.tokens.rows[indices], prompts, references, answers)

    def passes(
        self,
        model: AdapterModel,
        settings: TrainingSettings,
        making: Making,
        drawn: Drawn,
        rewards: Tensor,
    ) -> list[Batch]:
        """Return the passes over answers, with their advantages.

        Args:
            model: That is trained.
            settings: What a pass holds.
            making: Of the training.
            drawn: The answers.
            rewards: ``(prompts, group)``.
        """
        own, size = self.generation, self.generation.group
        advantages, spreads = own.advantages(rewards)
        kept = np.arange(rewards.numel())
        if own.keeps is not None:  # of all prompts, where not all are trained on
            making.report("reward", float(rewards.double().mean()), rewards.numel())
            kept = own.keeps(rewards).flatten().nonzero()[:, 0].numpy()
        if not len(kept):
            return []
        facts = (advantages.flatten(), rewards.flatten(), spreads.repeat_interleave(size))
        known = Rollouts(*(fact[torch.from_numpy(kept)] for fact in facts))
        rows = np.repeat(drawn.rows, size)[kept]
        prompts, answers = drawn.prompts, drawn.answers
        tokens = _token_set(
            rows, [prompts[int(i) // size] for i in kept], [answers[int(i)] for i in kept]
        )
        layout = Layout(model, TokenShare(tokens), budget_of(settings, model))
        parts = [_with(layout.batch(part), known, part) for part in layout.passes(_all(tokens))]
        return self._scored(model, parts, making)

    def _seed(self, making: Making, step: int, place: int, number: int) -> int:
        purpose = f"{making.purpose}answers {step} {place} {number}"
        return derive_seed(making.seed, purpose, making.client, making.round)

    def rewarded(self, model: AdapterModel, drawn: Drawn) -> Tensor:
        """Return ``(prompts, group)``: the weighted sum of the rewards of each answer.

        FLOPs of reward models are counted as the model's.
        """
        decode = partial(self.encoder.tokenizer.batch_decode, skip_special_tokens=True)
        prompts, answers, size = drawn.prompts, drawn.answers, self.generation.group
        asked, references = decode(list(prompts)), self.texts(drawn.references)
        found = [
            sum(
                weight * own(asked[i // size], answer, references[i // size])
                for own, weight in self.rewards
            )
            for i, answer in enumerate(self.texts(answers))
        ]
        texts = [
            [*prompts[i // size], *answer]
            for i, answer in enumerate(answers if self.models else ())
        ]
        for scorer, weight in self.models:
            model.flops += scorer.flops(texts)
            own_rewards = scorer.of_tokens(texts)
            found = [a + weight * b for a, b in zip(found, own_rewards, strict=True)]
        return torch.tensor(found).view(-1, size)

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


@dataclass(frozen=True)
class GradedAnswers:
    """Makes optimizer batches of answers whose rewards are known already.

    Attributes:
        maker: Makes passes of them.
        drawn: The answers.
        rewards: ``(prompts, group)`` float32.
    """

    maker: RolloutMaker
    drawn: Drawn
    rewards: Tensor

    def batches(
        self, model: AdapterModel, share: TokenShare, settings: TrainingSettings, making: Making
    ) -> Iterator[list[Batch]]:
        """Yield each, all with log-probs of the policy that ``model`` holds before the first step."""
        making = replace(making, again=True)
        order = batch_order(settings, making.seed, making.purpose, making.client, making.round)
        made = []
        for places in epoch_batches(len(self.rewards), settings.batch_size, order, epochs=1):
            drawn, rewards = self.drawn.take(places.tolist()), self.rewards[places]
            made.append(self.maker.passes(model, settings, making, drawn, rewards))
        for parts in made:
            for _ in range(self.maker.generation.iterations):
                yield parts


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
