"""Cut a language model after a block: the first blocks on a client, the rest on the server.

One function for Llama-, Qwen- and GPT-2-style models. A half is an :class:`AdapterModel` over the blocks
it has, with the names the whole model gives them, so two halves' adapters together are the whole's.
A client's half is loaded with its own blocks alone; the server's is a view of its whole model, which
it evaluates with.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import peft
import torch
from torch import Tensor, nn

from fedloom.accounting.flops import backward_flops, forward_flops
from fedloom.data.batch import Predicting, Sequences
from fedloom.errors import ModelError
from fedloom.models.adapters import AdapterModel
from fedloom.models.configuration import keep_blocks
from fedloom.models.flop_shape import block_of, model_shape


@dataclass(frozen=True)
class ArchitectureLayout:
    """Where an architecture keeps its parts, inside its base model.

    Attributes:
        blocks: The list of blocks.
        norm: What follows the last block.
        before: What changes the embeddings before the first block, beside the embeddings themselves.
    """

    blocks: str
    norm: str
    before: tuple[str, ...] = ()


LLAMA = ArchitectureLayout("layers", "norm")

ARCHITECTURE_LAYOUTS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gpt2": ArchitectureLayout("h", "ln_f", ("wpe", "drop")),
}
"""By ``model_type`` of the configuration."""


def check_split_point(config: Any, cut: int) -> ArchitectureLayout:
    """Return the anatomy of a model that can be cut after block ``cut`` (from 1).

    Raises:
        ModelError: The architecture is not known, or there is no such cut.
    """
    if config.model_type not in ARCHITECTURE_LAYOUTS:
        raise ModelError(
            f"a {config.model_type!r} model cannot be cut in two, as method.cut asks: known are "
            f"{', '.join(sorted(ARCHITECTURE_LAYOUTS))}; name a model of these as model.path"
        )
    count = int(config.num_hidden_layers)
    if not 1 <= cut <= count - 1:
        raise ModelError(
            f"method.cut = {cut}: this model has {count} blocks, so it can be cut after 1 to {count - 1}"
        )
    return ARCHITECTURE_LAYOUTS[config.model_type]


class ClientPart(AdapterModel):
    """What a client holds: embeddings and first blocks, and with ``tail`` the norm and the head.

    Calling it gives the activations after its last block.
    """

    whole_batches = True
    head = None

    def __init__(
        self, model: peft.PeftModel, pad: int, *, tail: bool, autocast: torch.dtype | None = None
    ) -> None:
        """Wrap a model that was loaded with the client's blocks alone.

        Args:
            model: With an adapter; its output layer is dropped where there is no tail.
            pad: Token id for padding.
            tail: Whether the head is here (U-shape).
            autocast: Dtype of mixed precision, ``None`` for none.
        """
        super().__init__(model, pad, autocast)
        whole = _hugging_face(model)
        base = getattr(whole, whole.base_model_prefix)
        layout = ARCHITECTURE_LAYOUTS[whole.config.model_type]
        self.blocks = _without(base, {layout.norm: nn.Identity()})
        self.ending = ModelHead(self, getattr(base, layout.norm), _head(whole)) if tail else None
        if not tail:
            kept = {n: p for n, p in self.parameters.items() if block_of(n) is not None}
            self.parameters = kept
            _drop_head(whole)
            setattr(base, layout.norm, nn.Identity())

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """Return ``(rows, length, hidden)`` activations after the client's last block."""
        self.count(input_ids.shape[0], input_ids.shape[1], 0)
        with self._precision():
            return self.blocks(
                input_ids=input_ids, attention_mask=attention_mask
            ).last_hidden_state.float()


class ServerPart(AdapterModel):
    """What the server holds: the last blocks, the norm and the head of its whole model."""

    head = None

    def __init__(self, whole: AdapterModel, cut: int, *, tail: bool) -> None:
        """View the blocks after ``cut`` of ``whole``; computing with one changes the other's adapter.

        Args:
            whole: The server's model.
            cut: Blocks that are not here.
            tail: Whether norm and head are the client's (U-shape).

        Raises:
            ModelError: This model cannot be cut there.
        """
        super().__init__(whole.model, whole.pad, whole.autocast, whole.checkpointed)
        model = _hugging_face(whole.model)
        layout = check_split_point(model.config, cut)
        base = getattr(model, model.base_model_prefix)
        count = int(model.config.num_hidden_layers)
        self.shape = model_shape(whole.model, range(cut, count), gradient_enters=True)
        self.parameters = {
            name: parameter
            for name, parameter in self.parameters.items()
            if _is_after(name, cut, tail=tail)
        }
        own: dict[str, nn.Module] = {
            layout.blocks: nn.ModuleList(getattr(base, layout.blocks)[cut:])
        }
        own |= {name: _NOTHING[name] for name in layout.before}
        norm = getattr(base, layout.norm)
        own[layout.norm] = nn.Identity()
        self.blocks = _without(base, own)
        self.blocks.config = copy.deepcopy(model.config)
        keep_blocks(self.blocks.config, range(cut, count))
        self.ending = None if tail else ModelHead(self, norm, _head(model))

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """Return ``(rows, length, hidden)``: ``input_ids`` are the activations of a front half."""
        self.count(input_ids.shape[0], input_ids.shape[1], 0)
        with self._precision():
            return self.blocks(
                inputs_embeds=input_ids, attention_mask=attention_mask
            ).last_hidden_state.float()


class ModelHead:
    """The norm and the head: from the activations after the last block to logits.

    Set :attr:`hidden`, then hand it to an objective as its model.

    Attributes:
        hidden: ``(rows, length, hidden)`` activations after the last block.
        last: ``(rows,)`` column that a classification head reads, ``None`` for an LM head.
    """

    def __init__(self, half: AdapterModel, norm: nn.Module, head: nn.Module) -> None:
        """Take the modules of ``half``, which counts the FLOPs."""
        self.half, self.norm, self.head = half, norm, head
        self.hidden = torch.zeros(0)
        self.last: Tensor | None = None

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """Return an output with ``.logits``, as a whole Hugging Face model would."""
        hidden = self.hidden
        if kept := int(options.get("logits_to_keep", 0)):
            hidden = hidden[:, -kept:]
        self.count(hidden.shape[:-1].numel())
        with self.half._precision():
            logits = self.head(self.norm(hidden))
        if (
            self.last is not None
        ):  # all positions, then one of each row: as transformers does, bit for bit
            logits = logits[torch.arange(len(logits), device=logits.device), self.last]
        return SimpleNamespace(logits=logits)

    def predicting(self, sequences: Sequences) -> Predicting:
        """Return what the head reads where it predicts completion tokens, as a whole model would."""
        sources = sequences.reading.sources
        self.count(len(sources))
        with self.half._precision():
            states = self.norm(self.hidden).flatten(0, 1)[sources]
        weight: Any = self.head.weight
        trained = any(parameter.requires_grad for parameter in self.head.parameters())
        return Predicting(states, self._logits, len(weight), trained)

    def _logits(self, states: Tensor) -> Tensor:
        with self.half._precision():
            return self.head(states)  # type: ignore[no-any-return]

    def count(self, positions: int) -> None:
        """Add the FLOPs of the head at so many positions, and of its backward pass if there is one."""
        shape = self.half.shape
        self.half.flops += forward_flops(shape, 1, 0, positions)
        if torch.is_grad_enabled():
            self.half.flops += backward_flops(shape, 1, 0, positions)


def last_tokens(input_ids: Tensor, pad: int) -> Tensor:
    """Return ``(rows,)``: the rightmost column that is not padding, which transformers classifies by."""
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    return (columns * (input_ids != pad)).argmax(-1)


class _Zero(nn.Module):
    """Stands for position embeddings where the activations have them already."""

    def forward(self, positions: Tensor) -> Tensor:
        """Return a zero that adds to anything."""
        return torch.zeros((), device=positions.device)


_NOTHING: dict[str, nn.Module] = {"wpe": _Zero(), "drop": nn.Identity()}


def _is_after(name: str, cut: int, *, tail: bool) -> bool:
    """Return whether a trained tensor is the server's: of a later block, or of its head."""
    block = block_of(name)
    return not tail if block is None else block >= cut


def _without(base: Any, own: dict[str, nn.Module]) -> Any:
    """Return a view of a base model with some of its parts replaced; all others are shared."""
    view = copy.copy(base)
    view._modules = {**base._modules, **own}
    return view


def _hugging_face(model: peft.PeftModel) -> Any:
    return model.get_base_model()


def _head(model: Any) -> nn.Module:
    head: nn.Module = model.score if hasattr(model, "score") else model.lm_head
    return head


def _drop_head(model: Any) -> None:
    setattr(model, "score" if hasattr(model, "score") else "lm_head", nn.Identity())
