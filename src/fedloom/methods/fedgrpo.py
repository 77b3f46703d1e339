"""FedGRPO: the server's policy answers public questions, and clients that know better grade its answers.

Source: FedGRPO (https://arxiv.org/abs/2602.12014), equations 5 to 9. A round:

1. with ``choose = "competence"``, a client that comes for the first time answers ``auxiliary`` labelled
   public questions by its own model, and says which of them it has right;
2. the server's policy draws G answers (``objective.group``) to each of ``questions`` public questions;
   for each the ``experts`` clients are asked that have most of its ``nearest`` auxiliary ones right;
3. they grade the answers by their rewards (``clients.groups.NAME.rewards``), against the answer of their
   own row where they have this question, else against what their own model answers;
4. the server standardises each client's grades over the answers of a question, takes the mean over its
   experts as the reward of an answer, and takes GRPO's steps. Nobody else trains the policy.

A client's own model is the adapter that the run starts from, fitted to its rows by their own answers
before its first grades (``expert_epochs``); it never travels, nor does any answer of it. A grade tells
whether an answer is that of a client's row, and so, by trying, what the row says: a client's ``[policy]``
must open ``grades``. A client that lies has no more say than any other expert.

**A reconstruction.** The paper's equations standardise an answer's rewards over its experts, by which
they add up to 0 and teach nothing; its code draws clients at random, has each grade answers of its own,
and gives all the same true reward. Here grades are standardised within a client
(``aggregation/expert_grades.py``), near questions are those with like tokens, and clients' models are
adapters of one backbone. With one expert that has every answer it is GRPO on the server.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from fedloom.accounting.traffic import ParameterTraffic, Traffic
from fedloom.aggregation.expert_grades import expert_rewards
from fedloom.data.client_rows import TokenShare
from fedloom.data.public import PublicRows
from fedloom.federation.protocol import Cohort, Replies, Round
from fedloom.methods.bases.answer_grades import (
    GRADES,
    RIGHT,
    GradeWire,
    competences,
    examination,
    experts_for,
    grades_of,
    policy_answers,
    policy_steps,
    prepare_expert,
    questions_of,
    right_answers,
)
from fedloom.methods.bases.parameter_averaging import ADAPTER, LEARNING_RATE
from fedloom.methods.contract.checks import optimizer_anew
from fedloom.methods.contract.client import Client, Handler
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import Method, Reveal
from fedloom.methods.declaration import TOGETHER, Absence, Declaration, no
from fedloom.reports.sections.spec import SectionSpec
from fedloom.rewards.functions import OURS
from fedloom.settings.schema import NamedSettings, Of
from fedloom.tensors import State, Tensors, by_client, join_parts, of_clients, part_of
from fedloom.wire.messages import Payload

COMPETENCE, GRADED, MEAN = "competence", "graded", "mean_grade"
"""In the rounds' details: each client's share of right auxiliary answers, how many questions it graded,
and its mean grade."""


class FedGRPOSettings(NamedSettings):
    """``[method] name = "fedgrpo"``."""

    name: Literal["fedgrpo"] = "fedgrpo"
    questions: int = Field(default=8, ge=1)
    """Public questions of a round, drawn anew; training.batch_size of them are one optimizer step."""
    experts: int = Field(default=2, ge=1)
    """M, clients that grade the answers to a question, at most (paper: 2)."""
    choose: Literal["random", "competence"] = "random"
    """Which: drawn at random, as the paper's code does, or those that know most about like questions, as
    the paper says, which needs public.labelled."""
    auxiliary: Annotated[int, Of("method.choose", ("competence",))] = Field(default=100, ge=1)
    """The first public rows, with their answers, by which competence is found (paper: about 100)."""
    nearest: Annotated[int, Of("method.choose", ("competence",))] = Field(default=20, ge=1)
    """L, those of them that are most like a question and say who is competent for it (paper: 20)."""
    right: Annotated[Literal["exact_match", "number"], Of("method.choose", ("competence",))] = (
        "exact_match"
    )
    """The reward that says which of a client's answers to them are right."""
    weighting: Annotated[Literal["alike", "competence"], Of("method.choose", ("competence",))] = (
        "alike"
    )
    """What a question's experts count in the mean of their grades: alike, or by their competence."""
    expert_epochs: int = Field(default=1, ge=0)
    """Passes over its rows by which a client's own model is fitted, once (0: it is what the run starts
    from)."""


class FedGRPO(Method):
    """The policy is trained on the server, by grades of clients."""

    declares = Declaration(
        "FedGRPO",
        "https://arxiv.org/abs/2602.12014",
        "reconstructed",
        "grades are standardised within each client; likeness of questions is by their tokens",
        "KD-FedLLM",
        "answers of the server's policy to public questions down, grades up",
        "a model of its own",
        secure_aggregation=no("which clients grade which answers is the server's choice"),
        client_privacy=no("a grade is not a change of parameters"),
        row_privacy=no("grades follow from the answers of rows, without noise"),
        asynchronous=TOGETHER,
        compression=no("no parameters travel"),
        absence=Absence(
            "a question is graded by those experts that answered; without any it is left out",
            "grades with the model that it kept; the server knows its competence",
            "is no expert",
        ),
        problem="the server has questions, and only clients know what is a good answer",
    )
    reveals: frozenset[Reveal] = frozenset({"grades"})
    needs_public = True
    shares_parameters = False
    taken = ("experts", "choose", "nearest", "right", "weighting")
    bounded = MappingProxyType(
        {"questions": "max_batch", "auxiliary": "max_rows", "expert_epochs": "max_steps"}
    )
    sections = tuple(
        SectionSpec("client_table", title, says, name)
        for title, says, name in (
            ("Questions graded", "Of the round, by each client.", GRADED),
            ("Mean grade", "Of the policy's answers, in the unit of its own rewards.", MEAN),
            ("Competence", "Share of auxiliary questions its own model has right.", COMPETENCE),
        )
    )

    def __init__(self, settings: FedGRPOSettings) -> None:
        """Keep the settings."""
        self.settings = settings

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also what is not enough to have answers generated, and experts chosen."""
        yield from super().check(view)
        yield from optimizer_anew(view, "makes the server's optimizer anew in every round")
        if view.objective_name not in ("", "grpo"):
            yield (
                f'method.name = "fedgrpo" has answers graded, not objective.name = '
                f'{view.objective_name!r}: use objective.name = "grpo"'
            )
        own, public = view.method, view.public
        if public is None or own.choose == "random":
            return
        if not public.labelled:
            yield (
                'method.choose = "competence" needs public rows with answers: set public.labelled = '
                'true, or method.choose = "random"'
            )
        if own.auxiliary >= public.rows:
            yield (
                f"method.auxiliary = {own.auxiliary} leaves no question of public.rows = {public.rows}: "
                "give fewer, or more public rows"
            )

    def initial_state(self, adapter: Tensors) -> State:
        """Return the policy that the run starts from; no competence is known."""
        return State(join_parts(adapter=adapter))

    def shared(self, state: State) -> Tensors:
        """Return the policy."""
        return part_of(state.tensors, ADAPTER)

    def traffic(self, adapter: Tensors) -> Traffic:
        """Return the most that a client is sent and sends in a round: all questions are its."""
        wire = self._wire
        answers = wire.questions * wire.group
        down = 4 * (wire.questions + answers * (1 + wire.longest))
        return ParameterTraffic(down, 4 * answers, self.declares.framework)

    def handlers(self) -> dict[str, Handler]:
        """Return the client side."""
        return {"examine": self._examine, "grade": self._grade}

    def round(self, state: State, cohort: Cohort) -> Round:
        """Find out who knows what, have the policy's answers graded, learn from the grades."""
        server, own, policy = self.server, self.settings, self.shared(state)
        right = by_client(state.tensors, RIGHT)
        unknown = tuple(client for client in cohort.clients if client not in right)
        if own.choose == "competence" and unknown:
            replies = yield examination(cohort, unknown, own.auxiliary)
            right |= {reply.client: reply.payload.tensors[RIGHT] for reply in replies}
        assert server.public is not None, "assembly gives public rows to methods that need them"
        questions = self._questions(server.public, server.seed, cohort.round)
        drawn = policy_answers(server, policy, questions, cohort.round)
        alike = [dict.fromkeys(cohort.clients, 1.0)] * len(questions)
        if own.choose == "competence":
            auxiliary = server.public.share.take(np.arange(own.auxiliary))
            known = {client: right[client] for client in cohort.clients if client in right}
            competence = competences(questions, auxiliary, known, own.nearest)
        else:
            competence = alike
        asked = experts_for(competence, own.experts, server.seed, cohort)
        replies = yield self._wire.exchange(cohort, asked, drawn)
        self._note(cohort, replies, right)
        graded = {reply.client: reply.payload.tensors[GRADES] for reply in replies}
        rewards = expert_rewards(
            graded, asked, competence if own.weighting == "competence" else alike
        )
        policy = policy_steps(server, policy, questions, drawn, rewards.float(), cohort)
        return State(join_parts(adapter=policy) | of_clients(RIGHT, right))

    def _questions(self, public: PublicRows, seed: int, round: int) -> TokenShare:
        own = self.settings
        first = own.auxiliary if own.choose == "competence" else 0
        return questions_of(public, seed, round, first, own.questions)

    @property
    def _wire(self) -> GradeWire:
        """The form of answers and grades on the server."""
        server = self.server
        assert server.public is not None, "assembly gives public rows to methods that need them"
        count = len(self._questions(server.public, server.seed, 1))
        return GradeWire.of(server.objective, count, server.width)

    def _note(self, cohort: Cohort, replies: Replies, right: Mapping[int, Tensor]) -> None:
        """Put into the round's details who graded what, and how."""
        grades = {reply.client: reply.payload.tensors[GRADES] for reply in replies}
        cohort.details[GRADED] = {str(client): len(own) for client, own in grades.items()}
        cohort.details[MEAN] = {str(c): float(own.double().mean()) for c, own in grades.items()}
        if self.settings.choose == "competence":
            cohort.details[COMPETENCE] = {
                str(c): float(own.double().mean()) for c, own in sorted(right.items())
            }

    def _examine(self, client: Client, payload: Payload) -> Payload:
        own = self.settings
        prepare_expert(client, payload.numbers[LEARNING_RATE.name], own.expert_epochs)
        return Payload({RIGHT: right_answers(client, own.auxiliary, OURS[own.right])})

    def _grade(self, client: Client, payload: Payload) -> Payload:
        assert client.public is not None, "the engine gives clients the public rows"
        questions = self._questions(client.public, client.seed, client.round)
        wire = GradeWire.of(client.objective, len(questions), client.width)
        places, answers = wire.unpack(payload.tensors)
        prepare_expert(client, payload.numbers[LEARNING_RATE.name], self.settings.expert_epochs)
        grades = grades_of(client, questions, places, answers)
        mean, spread = float(grades.double().mean()), float(grades.std(1).mean())
        return Payload({GRADES: grades}, metrics={"reward": mean, "reward_spread": spread})
