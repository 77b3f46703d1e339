"""The matrix products of a model, read off its modules, for ``accounting/flops.py``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fedloom.accounting.flops import LinearShape, ModelShape

SHARED_INPUTS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Layers of a block that read one input: a gradient flows into it for all of them or for none."""

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "query")
"""Layers that feed attention: where one of them is adapted, the backward pass crosses attention."""


@dataclass(frozen=True)
class _Layer:
    name: str
    shape: LinearShape
    adapted: bool = False

    @property
    def block(self) -> int:
        return block_of(self.name) or 0

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def source(self) -> tuple[int, object]:
        """What the layer reads: equal for layers that read the same tensor."""
        group = next((names for names in SHARED_INPUTS if self.leaf in names), self.name)
        return self.block, group


def model_shape(
    model: nn.Module, blocks: range | None = None, *, gradient_enters: bool = False
) -> ModelShape:
    """Return the shapes of all matrix products, and which of them the backward pass reaches.

    Modules are taken to run in the order in which they are registered, as they do in the
    decoder-only models of ``transformers``.

    Args:
        model: A PEFT model over a Hugging Face backbone.
        blocks: Only these of its blocks (default: all).
        gradient_enters: Whether what the first block reads wants a gradient (virtual tokens, the
            activations of another party).
    """
    config: Any = model.config
    *linears, head = _layers(model)
    count = _number(config, ("num_hidden_layers", "n_layer"), 1)
    heads = _number(config, ("num_attention_heads", "n_head"), 1)
    width = _number(config, ("head_dim",), 0) * heads or _number(
        config, ("hidden_size", "n_embd"), 1
    )
    if blocks is not None:
        linears = [layer for layer in linears if layer.block in blocks]
        count = len(blocks)
    if gradient_enters:
        reached = tuple(replace(x.shape, reached=True, input_gradient=True) for x in linears)
        return ModelShape(reached, head.shape, count, count, width)
    first = next((layer for layer in linears if layer.adapted), None)
    if first is None:
        frozen = tuple(replace(x.shape, reached=False, input_gradient=False) for x in linears)
        return ModelShape(frozen, replace(head.shape, input_gradient=False), count, 0, width)
    position = linears.index(first)
    shapes = tuple(_reached(layer, i, first, position) for i, layer in enumerate(linears))
    crossed = count - first.block - (0 if first.leaf in ATTENTION_INPUTS else 1)
    return ModelShape(shapes, head.shape, count, crossed, width)


def block_of(name: str) -> int | None:
    """Return the index of the block a module's name lies in, ``None`` outside the blocks."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def _reached(layer: _Layer, index: int, first: _Layer, position: int) -> LinearShape:
    """Mark how far the backward pass goes; ``first`` is the lowest layer with an adapter."""
    if layer.source == first.source:
        return replace(layer.shape, reached=layer.adapted, input_gradient=False)
    beyond = index > position
    return replace(layer.shape, reached=beyond, input_gradient=beyond)


def _layers(model: nn.Module) -> list[_Layer]:
    """Return every linear layer in order, the output layer last."""
    modules = dict(model.named_modules())
    layers = []
    for name, module in modules.items():
        if not is_linear(module) or "lora_" in name or "original_module" in name:
            continue
        if name.endswith(".base_layer") and f"{name[:-11]}.ln_tuning_layers" in modules:
            continue  # a layer that is trained whole: its copy computes, not itself
        clean = re.sub(r"\.(base_layer|(modules_to_save|ln_tuning_layers)\.default)$", "", name)
        weight: Any = module.weight
        inputs, outputs = weight.shape if type(module).__name__ == "Conv1D" else weight.shape[::-1]
        owner: Any = modules[clean]
        rank = int(getattr(owner, "r", {}).get("default", 0)) if hasattr(owner, "lora_A") else 0
        shape = LinearShape(int(inputs), int(outputs), rank, trained=bool(weight.requires_grad))
        layers.append(_Layer(clean, shape, rank > 0 or shape.trained or hasattr(owner, "ia3_l")))
    return layers


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer (``Conv1D`` is GPT-2's, with its weight transposed)."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _number(config: Any, names: tuple[str, ...], default: int) -> int:
    return next((int(v) for v in (getattr(config, name, None) for name in names) if v), default)
