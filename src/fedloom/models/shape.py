"""The matrix products of a model, read off its modules, for ``accounting/flops.py``."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fedloom.accounting.flops import LinearShape, ModelShape
from fedloom.models.heads import LowRankHead, PersonalHead

SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("gate", "gate_up_proj"),
)
"""Layers of a block that read one input: a gradient flows into it for all of them or for none."""

ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "query")
"""Layers that feed attention: where one of them is adapted, the backward pass crosses attention."""


PROMPT_ENCODER = "prompt_encoder"

BESIDE = ("lora_", "original_module", PROMPT_ENCODER)
"""Within names of linear layers that are not the backbone's."""


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
    *linears, output = _layers(model)
    own = next((m for m in model.modules() if isinstance(m, PersonalHead)), None)
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
        crossed, enters = count, True
    else:
        first = next((layer for layer in linears if layer.adapted), None)
        enters = first is not None
        if first is None:
            reached = tuple(replace(x.shape, reached=False, input_gradient=False) for x in linears)
            crossed = 0
        else:
            position = linears.index(first)
            reached = tuple(_reached(layer, i, first, position) for i, layer in enumerate(linears))
            crossed = count - first.block - (0 if first.leaf in ATTENTION_INPUTS else 1)
    return ModelShape(
        reached,
        attention_layers=count,
        attention_layers_reached=crossed,
        attention_width=width,
        **_encoder(model),
        **_heads(own, output.shape, enters=enters),
    )


def _encoder(model: nn.Module) -> dict[str, Any]:
    """Return the layers that virtual tokens pass, and how many of these there are."""
    layers = [
        LinearShape(*linear_widths(m), input_gradient=True, trained=True)
        for name, m in model.named_modules()
        if PROMPT_ENCODER in name and is_linear(m)
    ]
    if not layers:
        return {}
    peft_config: Any = getattr(model, "peft_config", {})
    return {"encoder": tuple(layers), "encoded": int(peft_config["default"].num_virtual_tokens)}


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


def _heads(own: PersonalHead | None, output: LinearShape, *, enters: bool) -> dict[str, Any]:
    """Return the shapes behind the blocks; ``enters`` says whether a gradient must reach the blocks."""
    if own is None:
        return {"head": replace(output, input_gradient=enters)}
    before: tuple[LinearShape, ...] = ()
    reward, inside = None, enters  # whether a gradient must reach what the heads read
    if own.bottleneck is not None:
        down, up = (_own_shape(layer, enters) for layer in (own.bottleneck.down, own.bottleneck.up))
        inside = enters or down.trained or up.trained
        before = (replace(down, reached=inside), replace(up, reached=inside, input_gradient=inside))
    head = replace(output, input_gradient=inside)
    if isinstance(own.head, LowRankHead):
        down, up = _own_shape(own.head.down, inside), _own_shape(own.head.up, inside)
        head = replace(head, rank=down.outputs, down_trained=down.trained, up_trained=up.trained)
    elif own.head is not None:
        head = _own_shape(own.head, inside)
    if own.reward is not None:
        reward = _own_shape(own.reward, inside)
    return {"head": head, "before_head": before, "reward": reward}


def _own_shape(layer: Any, input_gradient: bool) -> LinearShape:
    weight = layer.weight
    return LinearShape(
        weight.shape[1],
        weight.shape[0],
        input_gradient=input_gradient,
        trained=bool(weight.requires_grad),
    )


def _layers(model: nn.Module) -> list[_Layer]:
    """Return every linear layer in order, the output layer last; not a client's own parts."""
    modules = dict(model.named_modules())
    own = [f"{name}." for name, module in modules.items() if isinstance(module, PersonalHead)]
    layers = []
    stacks = expert_blocks(model)
    for name, module in modules.items():
        if name in stacks:
            layers += _stacked_layers(name, module)
        if not is_linear(module) or any(part in name for part in BESIDE):
            continue
        if any(name.startswith(prefix) and name != f"{prefix}original" for prefix in own):
            continue
        if name.endswith(".base_layer") and f"{name[:-11]}.ln_tuning_layers" in modules:
            continue  # a layer that is trained whole: its copy computes, not itself
        clean = re.sub(r"\.(base_layer|(modules_to_save|ln_tuning_layers)\.default)$", "", name)
        weight: Any = module.weight
        inputs, outputs = linear_widths(module)
        owner: Any = modules[clean]
        rank, router = _ranks(owner)
        experts = router > 0 and bool(owner.down.requires_grad)
        factors = [rank > 0 and (experts or _wanted(owner, f)) for f in ("lora_A", "lora_B")]
        shape = LinearShape(
            inputs,
            outputs,
            rank,
            trained=bool(weight.requires_grad),
            down_trained=factors[0],
            up_trained=factors[1],
            router=router,
        )
        layers.append(
            _Layer(clean, shape, any(factors) or shape.trained or _wanted(owner, "ia3_l"))
        )
    return layers


def expert_blocks(model: nn.Module) -> dict[str, Any]:
    """Return the blocks of a backbone that hold a router and a stack of experts, by name, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if _is_stack(getattr(module, "experts", None))
        and hasattr(getattr(module, "gate", None), "top_k")
    }


def _is_stack(experts: Any) -> bool:
    return all(
        getattr(getattr(experts, name, None), "ndim", 0) == 3
        for name in ("gate_up_proj", "down_proj")
    )


def _stacked_layers(name: str, block: Any) -> list[_Layer]:
    """Return a block's router, and the experts that a token passes as if they were one."""
    experts, top_k = block.experts, int(block.gate.top_k)
    parts = {"gate": (1, block.gate.weight)}
    parts |= {leaf: (top_k, getattr(experts, leaf)) for leaf in ("gate_up_proj", "down_proj")}
    found = []
    for leaf, (times, weight) in parts.items():
        outputs, inputs = weight.shape[-2:]
        trained = bool(weight.requires_grad)
        shape = LinearShape(inputs, times * outputs, trained=trained)
        found.append(_Layer(f"{name}.{leaf}", shape, trained))
    return found


def _ranks(owner: Any) -> tuple[int, int]:
    """Return the rank of the factors beside a layer, and the rows of A that route tokens only."""
    if "default" in getattr(owner, "lora_A", {}):
        return len(owner.lora_A["default"].weight), 0
    if not hasattr(owner, "down"):
        return 0, 0
    rank = owner.up.shape[1]
    # Dropout makes the values another product than the tokens' embeddings.
    return rank, len(owner.down) if owner.dropout else len(owner.down) - rank


def _wanted(owner: Any, part: str) -> bool:
    """Return whether a layer has a part of PEFT's that is being trained."""
    found = getattr(owner, part, {})
    own: Any = dict(found.items()).get("default")
    return own is not None and any(p.requires_grad for p in _parameters(own))


def _parameters(own: Any) -> list[nn.Parameter]:
    return [own] if isinstance(own, nn.Parameter) else list(own.parameters())


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer (``Conv1D`` is GPT-2's, with its weight transposed)."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linear_widths(module: Any) -> tuple[int, int]:
    """Return the inputs and outputs of a linear layer."""
    inputs, outputs = module.weight.shape[:: 1 if type(module).__name__ == "Conv1D" else -1]
    return int(inputs), int(outputs)


def _number(config: Any, names: tuple[str, ...], default: int) -> int:
    return next((int(v) for v in (getattr(config, name, None) for name in names) if v), default)
