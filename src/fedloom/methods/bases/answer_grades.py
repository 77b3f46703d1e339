"""Answers of a server's policy to public questions, and clients' grades of them, for FedGRPO.

What travels and is checked, who grades what, how a client grades, and how the server learns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedloom.accounting.costs import SERVER
from fedloom.aggregation.expert_grades import assigned, nearest
from fedloom.data.client_rows import Indices, TokenShare
from fedloom.data.public import PublicRows
from fedloom.errors import MessageError
from fedloom.evaluation.rollouts import Drawn, GradedAnswers, RolloutMaker
from fedloom.federation.protocol import Cohort
from fedloom.methods.bases.parameter_averaging import ADAPTER, LEARNING_RATE
from fedloom.methods.contract.client import Client
from fedloom.methods.contract.method import ServerSide
from fedloom.objectives.base import Objective
from fedloom.objectives.sft import SFT
from fedloom.randomness import generator
from fedloom.rewards.functions import RewardFunction
from fedloom.tensors import Tensors, is_finite
from fedloom.training.settings import Work
from fedloom.training.steps import BatchMaker, Making, train_locally
from fedloom.wire.messages import Exchange, Payload, encode
from fedloom.wire.schema import Schema, TensorSpec

QUESTIONS, LENGTHS, TOKENS, GRADES, RIGHT = "questions", "lengths", "tokens", "grades", "right"
"""Names in payloads: places of questions in the round's, how many tokens each answer has, and these, one
after another; a client's grades of them, and which labelled questions its own model has right."""

POLICY = "policy "
"""Purpose of the server's draws."""


@dataclass(frozen=True)
class GradeWire:
    """The form in which answers to some of a round's questions, and grades of them, travel.

    Attributes:
        questions: Of the round.
        group: Answers to each.
        longest: Tokens of an answer at most.
        width: Tokens of the vocabulary.
    """

    questions: int
    group: int
    longest: int
    width: int

    @classmethod
    def of(cls, objective: Objective, questions: int, width: int) -> GradeWire:
        """Return that of so many questions, under an objective with answers."""
        generation = objective.generation
        assert generation is not None, "the method's check demands an objective with answers"
        return cls(questions, generation.group, generation.max_new_tokens, width)

    @property
    def sent(self) -> tuple[TensorSpec, ...]:
        """What a client is sent."""
        answers = self.questions * self.group
        return (
            TensorSpec(QUESTIONS, (self.questions,), torch.int32, ragged=True),
            TensorSpec(LENGTHS, (self.questions, self.group), torch.int32, ragged=True),
            TensorSpec(TOKENS, (answers * self.longest,), torch.int32, ragged=True),
        )

    @property
    def replied(self) -> tuple[TensorSpec, ...]:
        """What it replies."""
        shape = (self.questions, self.group)
        return (TensorSpec(GRADES, shape, torch.float32, ragged=True),)

    def pack(self, places: Sequence[int], drawn: Drawn) -> Tensors:
        """Return the answers to the questions at ``places``, ascending, as they travel."""
        answers = drawn.take(places).answers
        lengths = torch.tensor([len(answer) for answer in answers], dtype=torch.int32)
        return {
            QUESTIONS: torch.tensor(list(places), dtype=torch.int32),
            LENGTHS: lengths.view(-1, self.group),
            TOKENS: torch.tensor([t for answer in answers for t in answer], dtype=torch.int32),
        }

    def unpack(self, tensors: Tensors) -> tuple[list[int], list[list[int]]]:
        """Return places and answers of a request, which fits its schema.

        Raises:
            MessageError: It holds no answers to some of the round's questions.
        """
        places, lengths = tensors[QUESTIONS].tolist(), tensors[LENGTHS].flatten().tolist()
        tokens = tensors[TOKENS]
        rising = all(a < b for a, b in zip([-1, *places], [*places, self.questions], strict=True))
        whole = len(lengths) == len(places) * self.group and sum(lengths) == len(tokens)
        if not places or not rising or not whole:
            raise MessageError("answers: they are not those to some of the round's questions")
        if min(lengths) < 1 or max(lengths) > self.longest:
            raise MessageError(f"answers: one has not 1 to {self.longest} tokens", "out_of_range")
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.width:
            raise MessageError(
                f"answers: a token is none of the {self.width} of the vocabulary", "out_of_range"
            )
        return places, [part.tolist() for part in torch.split(tokens, lengths)]

    def exchange(
        self, cohort: Cohort, asked: Mapping[int, Sequence[int]], drawn: Drawn
    ) -> Exchange:
        """Return the exchange in which each client grades the answers to its questions."""
        rate = {LEARNING_RATE.name: cohort.learning_rate}
        request = Schema(self.sent, (LEARNING_RATE,))
        requests = {
            client: encode(Payload(self.pack(places, drawn), rate), request)
            for client, places in asked.items()
        }
        return Exchange(
            "grade",
            cohort.round,
            request,
            Schema(self.replied, metrics=cohort.reported),
            requests,
            lambda client, payload: self.check(len(asked[client]), payload.tensors),
        )

    def check(self, asked: int, tensors: Tensors) -> None:
        """Check a client's grades of the answers to so many questions.

        Raises:
            MessageError: They are not one for each answer, or not finite.
        """
        grades = tensors[GRADES]
        if len(grades) != asked:
            raise MessageError(f"grades: {len(grades)} questions, {asked} were asked about")
        if not is_finite(grades):
            raise MessageError("grades: they are not finite", "not_finite")


def examination(cohort: Cohort, clients: tuple[int, ...], count: int) -> Exchange:
    """Return the exchange in which clients say which of the first public rows they have right."""
    reply = Schema((TensorSpec(RIGHT, (count,), torch.bool),))
    sent = Payload(numbers={LEARNING_RATE.name: cohort.learning_rate})
    request = Schema(numbers=(LEARNING_RATE,))
    return Exchange.broadcast("examine", cohort.round, clients, sent, request, reply)


def right_answers(client: Client, count: int, reward: RewardFunction) -> Tensor:
    """Return ``(count,)`` bool: which of the first public rows a client's model has right.

    Args:
        client: Its model holds what answers.
        count: How many.
        reward: 1 for an answer that is right.
    """
    public, maker = client.public, rollouts_of(client.maker)
    assert public is not None, "the engine gives clients the public rows"
    rows = np.arange(count)
    answers = maker.texts(maker.greedy(client.model, public.share, rows))
    truths = maker.texts(maker.read(client.model, public.share, rows)[1])
    pairs = zip(answers, truths, strict=True)
    return torch.tensor([reward("", answer, truth) == 1 for answer, truth in pairs])


def competences(
    questions: TokenShare, auxiliary: TokenShare, right: Mapping[int, Tensor], near: int
) -> list[dict[int, float]]:
    """Return of each question, by client, the share of the nearest auxiliary ones that it has right.

    Args:
        questions: Of a round.
        auxiliary: With known answers.
        right: By client ``(auxiliary,)`` bool.
        near: L, how many of them count.
    """
    texts = prompts_of(auxiliary)
    places = [nearest(text, texts, near) for text in prompts_of(questions)]
    return [{c: float(own[near].double().mean()) for c, own in right.items()} for near in places]


def experts_for(
    competence: Sequence[Mapping[int, float]], count: int, seed: int, cohort: Cohort
) -> dict[int, list[int]]:
    """Return the questions that each client grades, at most ``count`` clients a question."""
    draws = {
        client: generator(seed, "experts", client, cohort.round).random(len(competence)).tolist()
        for client in cohort.clients
    }
    return assigned(competence, draws, count)


def rollouts_of(maker: BatchMaker | None) -> RolloutMaker:
    """Return what has answers generated, which the objective of the method needs."""
    assert isinstance(maker, RolloutMaker), "the method's check demands an objective with answers"
    return maker


def questions_of(public: PublicRows, seed: int, round: int, first: int, count: int) -> TokenShare:
    """Return the public questions of a round, the same for every party.

    Args:
        public: All public rows.
        seed: The experiment's.
        round: From 1.
        first: Rows before this one are not among them.
        count: How many at most.
    """
    others = len(public.share) - first
    drawn = generator(seed, "questions", round=round)
    chosen = drawn.choice(others, min(count, others), replace=False)
    return public.share.take(np.sort(chosen) + first)


def prompts_of(share: TokenShare) -> list[list[int]]:
    """Return the tokens of the prompt of each row."""
    read = [share.tokens.sequence(number) for number in range(len(share))]
    return [sequence[:before].tolist() for sequence, before in read]


def prepare_expert(client: Client, rate: float, epochs: int) -> None:
    """Write the client's own model into ``client.model``; the first time, fit it to the client's rows.

    Args:
        client: It keeps the model.
        rate: Learning rate.
        epochs: Passes over its rows, by their own answers; 0 leaves the model as the run starts.
    """
    if ADAPTER in client.store or not epochs:
        client.model.write(client.store.get(ADAPTER, client.initial))
        return
    client.model.write(client.initial)
    client.last = train_locally(
        client.model,
        client.share,
        SFT(),
        client.training,
        learning_rate=rate,
        seed=client.seed,
        client=client.id,
        round=client.round,
        work=Work(epochs=epochs),
        purpose="expert ",
        on_step=client.on_step,
    )
    client.store[ADAPTER] = client.model.read()


def references_of(client: Client, questions: TokenShare, places: Indices) -> list[list[int]]:
    """Return the tokens that a client's rewards compare answers with, of each question.

    They are those of its own row with the very question, else the likeliest answer of what its model
    holds.
    """
    own, maker = client.share.tokens, rollouts_of(client.maker)
    known: dict[bytes, list[int]] = {}
    for number in range(len(own)):
        sequence, before = own.sequence(number)
        known.setdefault(sequence[:before].tobytes(), sequence[before:].tolist())
    asked = [questions.tokens.sequence(int(place)) for place in places]
    found = [known.get(sequence[:before].tobytes()) for sequence, before in asked]
    unknown = [i for i, reference in enumerate(found) if reference is None]
    if unknown and maker.rewards:
        answers = maker.greedy(client.model, questions, places[unknown])
        found = [*found]
        for i, answer in zip(unknown, answers, strict=True):
            found[i] = answer
    return [reference or [] for reference in found]


def grades_of(
    client: Client, questions: TokenShare, places: Sequence[int], answers: list[list[int]]
) -> Tensor:
    """Return ``(places, G)`` float32: the client's rewards of answers to some questions."""
    maker, own = rollouts_of(client.maker), np.array(places)
    prompts, _ = maker.read(client.model, questions, own)
    drawn = Drawn(
        questions.tokens.rows[own], prompts, references_of(client, questions, own), answers
    )
    return maker.rewarded(client.model, drawn)


def policy_answers(server: ServerSide, policy: Tensors, questions: TokenShare, round: int) -> Drawn:
    """Return answers of the server's policy to the questions of a round; count what they cost."""
    making = Making(server.seed, SERVER, round, POLICY, Work(epochs=1), again=True)
    with server.ledger.measure(round, SERVER, "train") as cost:
        before = server.model.flops
        server.model.write(policy)
        every = np.arange(len(questions))
        drawn = rollouts_of(server.maker).drawn(server.model, questions, making, every)
        cost.flops = server.model.flops - before
    return drawn


def policy_steps(
    server: ServerSide,
    policy: Tensors,
    questions: TokenShare,
    drawn: Drawn,
    rewards: Tensor,
    cohort: Cohort,
) -> Tensors:
    """Return the policy after steps on the answers to those questions whose answers differ in reward.

    Args:
        server: Its model, objective and settings of training.
        policy: That answered.
        questions: Of the round.
        drawn: Its answers to them.
        rewards: ``(questions, G)`` float32.
        cohort: Of the round.
    """
    kept = (rewards.amax(1) > rewards.amin(1)).nonzero()[:, 0]
    if not len(kept):
        return policy
    maker = rollouts_of(server.maker)
    with server.ledger.measure(cohort.round, SERVER, "train") as cost:
        before = server.model.flops
        server.model.write(policy)
        result = server.train(
            questions,
            server.objective,
            cohort,
            work=Work(epochs=1),
            purpose=POLICY,
            maker=GradedAnswers(maker, drawn.take(kept.tolist()), rewards[kept]),
        )
        cost.flops = server.model.flops - before
        cost.tokens, cost.examples, cost.steps = result.tokens, result.examples, result.steps
    return server.model.read()
