"""Saved reward models that score answers: for judging, and as a reward of generated answers.

A reward model is what a run with ``objective.name = "reward_model"`` leaves: an adapter on a model for
sequence classification with one output, or that model exported whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedloom.accounting.flops import ModelShape, forward_flops
from fedloom.data.chat import RenderingError
from fedloom.data.encode import TextEncoder
from fedloom.data.examples import Instruction, Text
from fedloom.errors import ModelError
from fedloom.evaluation.generate import load_encoder
from fedloom.models.flop_shape import model_shape
from fedloom.models.load import context_length, fingerprint, load_backbone
from fedloom.models.saved import FACTS, kind_of, loading, put_on
from fedloom.models.saved_facts import checked_facts
from fedloom.objectives.reward_model import RewardModel

TOGETHER = 16
"""Texts that are scored in one pass at most."""


@dataclass(frozen=True)
class RewardScorer:
    """A reward model, and how texts are read for it.

    Attributes:
        name: Of its folder.
        encoder: Of its base's tokenizer.
        model: For sequence classification, with one output.
        chat: Whether it was trained on conversations, not on plain texts.
    """

    name: str
    encoder: TextEncoder
    model: nn.Module
    chat: bool

    def of_tokens(self, texts: Sequence[Sequence[int]]) -> list[float]:
        """Return the reward of each text, a prompt and its answer as token ids; finite.

        A text that is longer than the model's context loses its start.

        Raises:
            ModelError: A reward is not finite.
        """
        longest, rewards = context_length(self.model), list[float]()
        for start in range(0, len(texts), TOGETHER):
            rewards += self._pass([[*own][-longest:] for own in texts[start : start + TOGETHER]])
        if not all(map(math.isfinite, rewards)):
            raise ModelError(f"the reward model {self.name} gives a reward that is not finite")
        return rewards

    def of_answers(self, question: str, answers: Sequence[str]) -> list[float] | None:
        """Return the reward of each answer to a question, ``None`` where they cannot be rendered."""
        prompt: Text = ({"role": "user", "content": question},) if self.chat else question
        rows = [Instruction(0, prompt, self._answer(own)) for own in answers]
        texts = list[list[int]]()
        for encoded in self.encoder.examples(rows):
            if isinstance(encoded, RenderingError):
                return None
            texts.append([*encoded.prompt, *encoded.completions[0]])
        return self.of_tokens(texts)

    def _answer(self, text: str) -> Text:
        return ({"role": "assistant", "content": text},) if self.chat else text

    def flops(self, texts: Sequence[Sequence[int]]) -> float:
        """Return the FLOPs of :meth:`of_tokens`, derived from shapes."""
        longest = context_length(self.model)
        lengths = [min(len(own), longest) for own in texts]
        passes = (lengths[i : i + TOGETHER] for i in range(0, len(lengths), TOGETHER))
        return sum(forward_flops(self.shape, len(own), max(own), 1) for own in passes)

    @cached_property
    def shape(self) -> ModelShape:
        """The matrix products of the model."""
        return model_shape(self.model)

    @torch.no_grad()
    def _pass(self, texts: Sequence[list[int]]) -> list[float]:
        pad, most = int(self.encoder.tokenizer.pad_token_id), max(map(len, texts))
        ids = torch.tensor([own + [pad] * (most - len(own)) for own in texts])
        mask = torch.tensor([[1] * len(own) + [0] * (most - len(own)) for own in texts])
        model: Any = self.model
        device = next(model.parameters()).device
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        rewards: list[float] = logits[:, 0].float().tolist()
        return rewards


def is_reward_model(path: Path) -> bool:
    """Return whether a folder, of a run or of what one saved, holds a reward model."""
    try:
        facts = json.loads((saved_folder(path) / FACTS).read_text(encoding="utf-8"))
        outputs = list(RewardModel.outputs)
        return bool(facts["task"] == "classification" and facts["classes"] == outputs)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def saved_folder(path: Path) -> Path:
    """Return the folder of a model: of a run, that of its global adapter."""
    return path if (path / FACTS).is_file() else path / "adapter"


def reward_model_digest(path: str) -> str:
    """Return SHA-256 over a reward model's weights and facts; over its name where it is not here."""
    return fingerprint(str(saved_folder(Path(path))))


def load_reward_model(path: str, device: torch.device | None = None) -> RewardScorer:
    """Load a reward model; the same one is loaded once.

    Args:
        path: Folder of a run, of its adapter, or of an export (``fedloom export``).
        device: Where it runs (default: CPU).

    Raises:
        ModelError: It is none, or its base cannot be loaded.
    """
    folder = saved_folder(Path(path))
    if not is_reward_model(folder):
        raise ModelError(
            f"{path} is no reward model: give the folder of a run with objective.name = "
            '"reward_model" that has ended, or of its adapter'
        )
    changed = (folder / FACTS).stat().st_mtime_ns
    return _loaded(folder.resolve(), changed, str(device or "cpu"))


@lru_cache(maxsize=4)
def _loaded(folder: Path, changed: int, device: str) -> RewardScorer:
    """Load what a folder held when its facts were last written."""
    whole = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    facts, kind = checked_facts(whole, folder / FACTS), kind_of(folder)
    base, revision = facts["base"]["path"], facts["base"]["revision"]
    if kind == "model":
        base, revision = str(folder), None
    encoder = load_encoder(base, revision)
    dtype = torch.bfloat16 if facts["dtype"] == "bfloat16" else torch.float32
    model: nn.Module = load_backbone(
        base,
        revision=revision,
        classes=RewardModel.outputs,
        dtype=dtype,
        pad_token_id=int(encoder.tokenizer.pad_token_id),
        device=torch.device(device),
    )
    if kind != "model":
        with loading(folder, base):
            model = put_on(model, folder, kind)
    name = folder.parent.name if folder.name == "adapter" else folder.name
    return RewardScorer(name, encoder, model.eval(), facts["prompt"]["format"] == "chat")
