"""What a client may have of its own where the output layer is: bottleneck, LM head, reward head.

``PersonalHead`` takes the output layer's place in a causal model, so the model's own forward pass and
``generate`` go through a client's parts and nothing else changes. The original output layer stays inside:
it is the reference model's, and it is what a low-rank head adds to. An output layer that shares its
weight with the embeddings is untied by the copy: the embeddings stay as they are.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fedloom.errors import ModelError
from fedloom.models.architecture import run_on_text
from fedloom.models.bottleneck import Bottleneck
from fedloom.randomness import derive_seed

HeadMode = Literal["full", "lowrank", "none"]
"""A copy of the output layer that is trained; a low-rank change to it; or the output layer as it is."""


FILE = "personal.safetensors"
"""A client's own parts, beside the adapter in its folder."""

OWN = "own."
"""How the names of a client's own parts begin, whatever the model calls its output layer."""


CLASSIFIERS = frozenset(
    {"score", "classifier", "pre_classifier", "pooler", "head", "classification_head"}
    | {"sequence_summary", "logits_proj"}
)
"""What models call the parts between their blocks and the classes."""


def is_own(name: str) -> bool:
    """Return whether a trained tensor belongs to a client's own parts."""
    return name.startswith(OWN)


def is_head(name: str) -> bool:
    """Return whether a trained tensor belongs to an output layer: a client's own or a classifier."""
    return is_own(name) or not CLASSIFIERS.isdisjoint(name.split("."))


@dataclass(frozen=True)
class PersonalModules:
    """Which parts a client's model has beside the adapter.

    Attributes:
        bottleneck: Width of the bottleneck adapter, 0 for none.
        head_mode: Its LM head.
        head_rank: Rank of a low-rank head.
        reward: Whether it has an explicit reward head.
    """

    bottleneck: int = 0
    head_mode: HeadMode = "none"
    head_rank: int = 8
    reward: bool = False

    def __bool__(self) -> bool:
        """Return whether there is any part."""
        return bool(self.bottleneck or self.head_mode != "none" or self.reward)


class LowRankHead(nn.Module):
    """The output layer's logits and U V z, with U at zero first."""

    def __init__(self, hidden: int, vocabulary: int, rank: int) -> None:
        """Make one of ``rank``."""
        super().__init__()
        self.down = nn.Linear(hidden, rank, bias=False)
        self.up = nn.Linear(rank, vocabulary, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, states: Tensor) -> Tensor:
        """Return ``(..., vocabulary)`` for ``(..., hidden)``."""
        return self.up(self.down(states))  # type: ignore[no-any-return]


class PersonalHead(nn.Module):
    """An output layer with a client's own parts; the original one while :attr:`off`.

    Attributes:
        parts: Which parts it has.
        original: The frozen output layer.
        states: ``(sequences, columns, hidden)``: what the heads read in the last pass, for
            :meth:`rewards`; ``None`` without a reward head.
        off: Whether it stands aside.
    """

    def __init__(self, original: nn.Linear, parts: PersonalModules) -> None:
        """Put ``parts`` around the output layer ``original``."""
        super().__init__()
        vocabulary, hidden = original.weight.shape
        self.parts = parts
        self.original = original
        self.bottleneck = Bottleneck(hidden, parts.bottleneck) if parts.bottleneck else None
        self.head: nn.Module | None = None
        if parts.head_mode == "full":
            self.head = nn.Linear(hidden, vocabulary, bias=original.bias is not None)
            self.head.load_state_dict(original.state_dict())
        elif parts.head_mode == "lowrank":
            self.head = LowRankHead(hidden, vocabulary, parts.head_rank)
        self.low_rank = parts.head_mode == "lowrank"  # its logits are added to the original's
        self.reward = nn.Linear(hidden, 1, bias=False) if parts.reward else None
        if self.reward is not None:
            nn.init.zeros_(self.reward.weight)
        self.states: Tensor | None = None
        self.off = False

    @property
    def weight(self) -> Tensor:
        """The original output layer's weight, for those who look for one in an output layer."""
        return self.original.weight

    @property
    def bias(self) -> Tensor | None:
        """The original output layer's bias, which some models keep beside it too."""
        return self.original.bias

    def forward(self, states: Tensor) -> Tensor:
        """Return ``(..., vocabulary)`` logits for ``(..., hidden)`` last hidden states."""
        if self.off:
            reference: Tensor = self.original(states)
            return reference
        states = self._narrowed(states)
        if self.reward is not None:
            self.states = states
        return self._logits(states)

    @property
    def trains_logits(self) -> bool:
        """Whether logits depend on a weight that is trained: all but the reward head's."""
        own = self.named_parameters()
        return any(p.requires_grad for name, p in own if not name.startswith("reward."))

    def read_out(self, states: Tensor) -> Tensor:
        """Return logits as :meth:`forward` does, keeping no states."""
        if self.off:
            reference: Tensor = self.original(states)
            return reference
        return self._logits(self._narrowed(states))

    def _narrowed(self, states: Tensor) -> Tensor:
        """Return what the heads read."""
        if not torch.is_autocast_enabled(states.device.type):
            states = states.float()  # own parts are; a backbone in bfloat16 is not
        return states if self.bottleneck is None else self.bottleneck(states)

    def _logits(self, states: Tensor) -> Tensor:
        own: Tensor | None = None if self.head is None else self.head(states)
        if own is not None and not self.low_rank:
            return own
        logits: Tensor = self.original(states.to(self.original.weight.dtype))
        return logits if own is None else logits + own

    def rewards(self, attention_mask: Tensor) -> Tensor:
        """Return ``(sequences,)`` float32 rewards of the last pass, read off each last token.

        Args:
            attention_mask: ``(sequences, length)`` of that pass; its last columns are those kept.
        """
        assert self.reward is not None and self.states is not None
        states, self.states = self.states, None
        last = attention_mask.sum(-1) - 1 - (attention_mask.shape[1] - states.shape[1])
        return self._rewards(states[torch.arange(len(states), device=states.device), last])

    def rewards_of(self, states: Tensor) -> Tensor:
        """Return ``(sequences,)`` float32 rewards for ``(sequences, hidden)`` states of last tokens."""
        return self._rewards(self._narrowed(states))

    def _rewards(self, states: Tensor) -> Tensor:
        assert self.reward is not None, "asked where there is a reward head"
        return F.linear(states, self.reward.weight)[:, 0].float()


def attach_personal(model: nn.Module, parts: PersonalModules, seed: int) -> PersonalHead:
    """Put a client's own parts, which change nothing yet, where a causal model's output layer is.

    Args:
        model: A Hugging Face causal model, inside PEFT or not; the parts are trained, the output layer
            stays frozen.
        parts: Which; at least one.
        seed: The experiment's seed.

    Raises:
        ModelError: The model has no output layer of the usual kind.
    """
    inner: Any = model
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    original = inner.get_output_embeddings()
    if not isinstance(original, nn.Linear):
        raise ModelError(
            f"{type(inner).__name__} has no linear output layer over its vocabulary: it cannot have "
            "personal heads"
        )
    with torch.random.fork_rng(devices=[]), torch.device(original.weight.device):
        torch.manual_seed(derive_seed(seed, "personal parts"))
        head = PersonalHead(original, parts)
    head.requires_grad_(True)
    original.requires_grad_(False)
    inner.set_output_embeddings(head)
    if parts.reward:
        _require_states(inner, head)
    return head


def _require_states(model: Any, head: PersonalHead) -> None:
    """Check that an output layer reads one state a token, as the reward head has to.

    Raises:
        ModelError: It does not.
    """
    if head.original.weight.is_meta:
        return
    row = run_on_text(model)
    states, head.states = head.states, None
    if states is None or states.shape[:-1] != row.shape:
        raise ModelError(
            f"{type(model).__name__} cannot have a reward head: its output layer does not read one state "
            f"a token ({None if states is None else tuple(states.shape)} for {tuple(row.shape)} tokens). "
            'Take an objective without one, such as "dpo" or "kto", or another model'
        )


def save_personal(head: PersonalHead, folder: Path) -> None:
    """Write a client's own parts into ``folder``, with what they are."""
    tensors = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in head.state_dict().items()
        if not name.startswith("original.")
    }
    metadata = {"parts": json.dumps(asdict(head.parts))}
    safetensors.torch.save_file(tensors, folder / FILE, metadata=metadata)


def saved_parts(folder: Path) -> PersonalModules:
    """Return which parts are in a client's folder; none where there is no file of them.

    Raises:
        ModelError: The file is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return PersonalModules()
    try:
        with safe_open(path, "pt") as file:
            return PersonalModules(**json.loads((file.metadata() or {})["parts"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path} is damaged or no file of a client's own parts: {error}"
        ) from error


def load_personal(head: PersonalHead, folder: Path) -> None:
    """Fill a client's own parts from its folder.

    Raises:
        ModelError: They are of another backbone; the tensors that differ are named.
    """
    path = folder / FILE
    saved = safetensors.torch.load_file(path)
    own = {n: t for n, t in head.state_dict().items() if not n.startswith("original.")}
    differing = [
        f"{name} is {_size(saved.get(name))} there, {_size(own.get(name))} here"
        for name in sorted(saved.keys() | own.keys())
        if _size(saved.get(name)) != _size(own.get(name))
    ]
    if differing:
        raise ModelError(f"{path} does not fit this model: {'; '.join(differing)}")
    head.load_state_dict(saved, strict=False)


def _size(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else " x ".join(map(str, tensor.shape))
