"""A conversation with one or more models: each keeps its own history of the same questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.data.examples import Message
from fedloom.evaluation.generate import Ask
from fedloom.evaluation.streaming import Answer, Tell
from fedloom.randomness import derive_seed
from fedloom.serving.models import ReadyModels
from fedloom.serving.prompts import fitting


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_new_tokens: Of an answer, at most; and never more than half of a model's context.
        temperature: 0 to 2; 0 is greedy: each token is the most probable one.
        top_p: Above 0, at most 1: draws are from the fewest tokens whose probabilities add up to it.
        seed: Of the draws; the same conversation gives the same answers.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass
class Conversation:
    """What was said to several models, and what each of them answered.

    Attributes:
        models: Those that answer.
        sampling: How their answers are drawn.
        system: Instructions at the beginning; empty for none.
        history: By model, what was said since the beginning.
    """

    models: ReadyModels
    sampling: Sampling
    system: str = ""
    history: list[list[Message]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin with nothing said."""
        self.reset()

    def reset(self) -> None:
        """Forget all that was said, but for the system's instructions."""
        self.history = [[] for _ in self.models.all]

    @property
    def turns(self) -> int:
        """How many questions were asked since the beginning."""
        return sum(message["role"] == "user" for message in self.history[0])

    def prompt(self, number: int, question: str) -> tuple[list[int], int]:
        """Return the tokens that a model is asked with, and how many old messages did not fit.

        Raises:
            DataError: The model's chat template refuses the conversation.
        """
        ready = self.models.all[number]
        messages = [*self._opening(), *self.history[number], _said("user", question)]
        room = ready.context - self._longest(number)
        return fitting(ready.format, ready.encoder, messages, room)

    def ask(self, number: int, prompt: Sequence[int], tell: Tell) -> Answer:
        """Have one model answer a prompt of :meth:`prompt`; nothing is kept yet, see :meth:`keep`."""
        own = self.sampling
        seed = derive_seed(own.seed, "conversation", round=self.turns + 1)
        ask = Ask(tuple(prompt), own.temperature, seed, own.top_p)
        return self.models.answer(number, ask, self._longest(number), tell)

    def keep(self, question: str, answers: Sequence[str]) -> None:
        """Add a question and each model's answer to their histories."""
        for history, answer in zip(self.history, answers, strict=True):
            history += [_said("user", question), _said("assistant", answer)]

    def save(self, path: Path) -> None:
        """Write one line of JSON for each model: ``model`` and ``messages``, as data sources read them.

        Raises:
            OSError: The file is there already, or cannot be written.
        """
        with path.open("x", encoding="utf-8") as file:
            for ready, history in zip(self.models.all, self.history, strict=True):
                row: dict[str, Any] = {
                    "model": ready.name,
                    "messages": [*self._opening(), *history],
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _opening(self) -> list[Message]:
        return [_said("system", self.system)] if self.system else []

    def _longest(self, number: int) -> int:
        half = max(1, self.models.all[number].context // 2)
        return min(self.sampling.max_new_tokens, half)


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}
