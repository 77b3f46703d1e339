"""The matrix products of a model, read off its modules, for ``accounting/flops.py``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from fedloom.accounting.flops import LinearShape, ModelShape
from fedloom.models.architecture import is_linear, text_layers
from fedloom.models.configuration import HEADS, WIDTH, number, text_part
from fedloom.models.heads import LowRankHead, PersonalHead

SHARED_INPUTS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("gate", "router", "gate_up_proj"),
    ("q_a_proj", "q_proj", "kv_a_proj_with_mqa"),
)
"""Layers of a block that read one input: a gradient flows into it for all of them or for none."""

ATTENTION_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "out_lin", "wo", "o")
"""What an attention module's output projection is called; its other layers feed attention."""

QUERIES = ("q_proj", "query", "query_proj", "q_lin", "q")
"""Layers that make queries alone."""

NO_PRODUCTS = ("Rwkv", "Lightning", "Linear")
"""Within the names of modules called attention that multiply no queries with keys."""

MLP_INPUTS = ("dense_h_to_4h", "fc_in", "fc1", "gate_proj", "up_proj", "gate_up_proj")
"""Layers by which an MLP reads; in a parallel block what they read is what attention reads."""

ALL_EXPERTS = ("Llama4TextExperts",)
"""Stacks of experts that every token passes whole, to be weighted by the router."""

STACKS = ("gate_up_proj", "down_proj")
"""Weights of all experts of a block, each in one parameter."""

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
    def parent(self) -> str:
        return self.name.rpartition(".")[0]

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
    read = text_layers(model)
    attentions = _attentions(model, read)
    *linears, output = _in_order(_layers(model, read), attentions)
    own = next((m for m in model.modules() if isinstance(m, PersonalHead)), None)
    if blocks is not None:
        linears = [layer for layer in linears if layer.block in blocks]
        attentions = {n: w for n, w in attentions.items() if (block_of(n) or 0) in blocks}
    linears, pooling = _pooling(linears) if is_pooled(model) else (linears, ())
    first = next((layer for layer in linears if layer.adapted), None)
    if gradient_enters:
        reached = tuple(replace(x.shape, reached=True, input_gradient=True) for x in linears)
        crossed = sum(attentions.values())
    elif first is None:
        reached = tuple(replace(x.shape, reached=False, input_gradient=False) for x in linears)
        crossed = 0
    else:
        feeds = first.parent in attentions and first.leaf not in ATTENTION_OUTPUTS
        beside = feeds and _is_parallel(model, first.block)
        position = linears.index(first)
        reached = tuple(
            _reached(layer, i, first, position, beside) for i, layer in enumerate(linears)
        )
        lowest = 0 if block_of(first.name) is None else first.block + (not feeds)
        crossed = sum(w for n, w in attentions.items() if (block_of(n) or 0) >= lowest)
    return ModelShape(
        reached,
        attention_width=sum(attentions.values()),
        attention_width_reached=crossed,
        once=(*_made_once(model), *_whole_changes(model)),
        again=tuple(replace(x, rank=0) for x in reached if x.rank) if _drops(model) else (),
        pooled=is_pooled(model),
        **_encoder(model),
        **_heads(own, output.shape, pooling, enters=gradient_enters or first is not None),
    )


def without_adapter(shape: ModelShape, *, parts: bool) -> ModelShape:
    """Return the shape of a forward pass in which the adapter does nothing.

    Args:
        shape: That of the model with its adapter.
        parts: Whether a client's own parts lie before the output layer, which do nothing either.
    """

    def alone(linears: tuple[LinearShape, ...]) -> tuple[LinearShape, ...]:
        return tuple(replace(x, rank=0, router=0) for x in linears)

    return replace(
        shape,
        linears=alone(shape.linears),
        head=alone((shape.head,))[0],
        before_head=() if parts else alone(shape.before_head),
        reward=None,
        encoder=(),
        encoded=0,
        once=(),
        again=(),
    )


def is_pooled(model: nn.Module) -> bool:
    """Return whether a classifier's head reads one position of each row, as those of encoders do.

    The others apply their head, ``score``, to all positions and take one of what comes out.
    """
    names = {leaf for name, _ in model.named_modules() for leaf in name.split(".")[-1:]}
    return "classifier" in names and "lm_head" not in names


def _pooling(layers: list[_Layer]) -> tuple[list[_Layer], tuple[LinearShape, ...]]:
    """Part layers from those between the blocks and the output layer, which that one position passes."""
    inside = [place for place, layer in enumerate(layers) if block_of(layer.name) is not None]
    end = inside[-1] + 1 if inside else len(layers)
    return layers[:end], tuple(layer.shape for layer in layers[end:])


def uncounted(model: nn.Module) -> list[str]:
    """Return the classes of a backbone's modules that compute with weights and are no matrix products.

    Recurrent and convolutional layers: what they compute beside linear layers is not in a model's shape.
    """
    counted, read = (nn.Embedding, PersonalHead), text_layers(model)
    names = {
        type(module).__name__
        for name, module in model.named_modules()
        if any(p.ndim > 1 for p in module._parameters.values() if p is not None)
        and (read is None or name in read)
        and not any(part in name for part in BESIDE)
        and not (is_linear(module) or isinstance(module, counted))
        and not (_is_stack(module) or _is_router(module) or hasattr(module, "base_layer"))
        and "Embedding" not in type(module).__name__
    }
    return sorted(names)


def _attentions(model: nn.Module, read: set[str] | None) -> dict[str, int]:
    """Return the attention modules that read text, by name, and the width of each.

    Half of what queries and keys, and what values have together; equal in most models.
    """
    found = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if "Attention" not in kind or any(part in kind for part in NO_PRODUCTS):
            continue
        if read is not None and name not in read:
            continue
        linears = {leaf: _base(own) for leaf, own in module.named_children()}
        linears = {leaf: own for leaf, own in linears.items() if is_linear(own)}
        if linears:
            found[_clean(name)] = _attention_width(module, linears, model.config)
    return found


def _attention_width(module: Any, linears: dict[str, nn.Module], config: Any) -> int:
    output = next((linears[leaf] for leaf in ATTENTION_OUTPUTS if leaf in linears), None)
    if output is not None:
        values = linear_widths(output)[0]
        keys: int | None = getattr(module, "qk_head_dim", None)
        each: int | None = getattr(module, "v_head_dim", None)
        return (values + values // each * keys) // 2 if keys and each else values
    queries = next((linears[leaf] for leaf in QUERIES if leaf in linears), None)
    if queries is not None:
        return linear_widths(queries)[1]
    text = text_part(config)
    heads = number(text, HEADS, 1)
    return number(text, ("head_dim",), 0) * heads or number(text, WIDTH, 1)


def _in_order(layers: list[_Layer], attentions: dict[str, int]) -> list[_Layer]:
    """Return layers as they run: some models register an attention's output before its inputs."""
    ordered = list(layers)
    for parent in attentions:
        places = [place for place, layer in enumerate(layers) if layer.parent == parent]
        own = sorted((layers[i] for i in places), key=lambda layer: layer.leaf in ATTENTION_OUTPUTS)
        for place, layer in zip(places, own, strict=True):
            ordered[place] = layer
    return ordered


def _is_parallel(model: nn.Module, block: int) -> bool:
    """Return whether attention and MLP of a block read the same, and are added up."""
    text = text_part(model.config)
    if any(getattr(text, name, False) for name in ("use_parallel_residual", "parallel_attn")):
        return True
    for name, module in model.named_modules():
        if re.search(rf"\.{block}$", name) and any(m for m in module.children()):
            norms = [m for m in module.children() if "Norm" in type(m).__name__]
            return len(norms) == 1
    return False


def _made_once(model: nn.Module) -> tuple[LinearShape, ...]:
    """Return the products of LoRA's factors beside a stack of experts or a router, made once a pass."""
    found = []
    for module in model.modules():
        if not isinstance(module, ParamWrapper) or "default" not in module.lora_A:
            continue
        factors: Any = module.lora_A["default"].weight, module.lora_B["default"].weight
        (rows, inputs), outputs = factors[0].shape, len(factors[1])
        down, up = (bool(factor.requires_grad) for factor in factors)
        shape = LinearShape(rows, inputs * outputs, input_gradient=down, trained=up)
        found.append(replace(shape, reached=down or up))
        if _is_stack(_base(module)):  # PEFT makes it twice: the first time to look at its size
            found.append(replace(shape, reached=False))
    return tuple(found)


def _whole_changes(model: nn.Module) -> Iterator[LinearShape]:
    """Yield the products by which DoRA makes each layer's whole change, for its norms: B (A I)."""
    for module in _with_magnitudes(model):
        rank, inputs = module.lora_A["default"].weight.shape
        outputs = len(module.lora_B["default"].weight)
        yield LinearShape(inputs, inputs * rank, reached=False)
        yield LinearShape(rank, inputs * outputs, reached=False)


def _drops(model: nn.Module) -> bool:
    """Return whether DoRA applies layers a second time in training, to inputs with dropout."""
    own = next(_with_magnitudes(model), None)
    return own is not None and isinstance(own.lora_dropout["default"], nn.Dropout)


def _with_magnitudes(model: nn.Module) -> Iterator[Any]:
    return (
        own for own in model.modules() if "default" in getattr(own, "lora_magnitude_vector", ())
    )


def _base(module: Any) -> nn.Module:
    """Return the layer of the backbone that an adapter is around."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module  # type: ignore[no-any-return]


def _clean(name: str) -> str:
    """Return a module's name without those of adapters around it."""
    name = re.sub(r"\.(modules_to_save|ln_tuning_layers)\.default$", "", name)
    return re.sub(r"(\.base_layer)+(?=$|\.)", "", name)


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


def _reached(
    layer: _Layer, index: int, first: _Layer, position: int, parallel: bool
) -> LinearShape:
    """Mark how far the backward pass goes; ``first`` is the lowest layer with an adapter."""
    beside = parallel and layer.block == first.block and layer.leaf in MLP_INPUTS
    if layer.source == first.source or beside:
        return replace(layer.shape, reached=layer.adapted, input_gradient=False)
    beyond = index > position
    return replace(layer.shape, reached=beyond, input_gradient=beyond)


def _heads(
    own: PersonalHead | None,
    output: LinearShape,
    pooling: tuple[LinearShape, ...],
    *,
    enters: bool,
) -> dict[str, Any]:
    """Return the shapes behind the blocks; ``enters`` says whether a gradient must reach the blocks."""
    if own is None:
        passed, flows = [], enters
        for shape in pooling:
            inside = flows or shape.trained or (shape.rank > 0 and shape.up_trained)
            passed.append(replace(shape, reached=inside, input_gradient=flows))
            flows = inside
        return {"head": replace(output, input_gradient=flows), "before_head": tuple(passed)}
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


def _layers(model: nn.Module, read: set[str] | None) -> list[_Layer]:
    """Return every linear layer in order, the output layer last; not a client's own parts.

    Of a model that reads more than text those modules alone that ``read`` names.
    """
    modules = dict(model.named_modules())
    own = [f"{name}." for name, module in modules.items() if isinstance(module, PersonalHead)]
    layers = []
    for name, module in modules.items():
        if any(part in name for part in BESIDE):
            continue
        if _is_stack(module):
            layers += _stacked_layers(name, module, modules)
        if _is_router(module):
            layers.append(_router_layer(name, module, modules))
        if not is_linear(module) or (read is not None and name not in read):
            continue
        if any(name.startswith(prefix) and name != f"{prefix}original" for prefix in own):
            continue
        if name.endswith(".base_layer") and f"{name[:-11]}.ln_tuning_layers" in modules:
            continue  # a layer that is trained whole: its copy computes, not itself
        clean = _clean(name)
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
    return all(getattr(getattr(experts, name, None), "ndim", 0) == 3 for name in STACKS)


def _is_router(module: Any) -> bool:
    """Return whether a module that is not a linear layer chooses experts by a matrix of weights."""
    weight = module._parameters.get("weight")
    kind = type(module).__name__
    named = "Router" in kind or "Gate" in kind
    return named and weight is not None and weight.ndim == 2 and not isinstance(module, nn.Linear)


def _stacked_layers(name: str, experts: Any, modules: dict[str, nn.Module]) -> list[_Layer]:
    """Return the experts that a token passes as if they were one."""
    clean = _clean(name)
    times = _passed(clean, experts, modules)
    found = []
    for leaf in STACKS:
        weight = getattr(experts, leaf)
        outputs, inputs = weight.shape[-2:]
        trained = bool(weight.requires_grad) or leaf in _factored(clean, modules)
        shape = LinearShape(inputs, times * outputs, trained=trained)
        found.append(_Layer(f"{clean.rpartition('.')[0]}.{leaf}", shape, trained))
    return found


def _router_layer(name: str, router: Any, modules: dict[str, nn.Module]) -> _Layer:
    outputs, inputs = router.weight.shape
    clean = _clean(name)
    trained = bool(router.weight.requires_grad) or "weight" in _factored(clean, modules)
    return _Layer(clean, LinearShape(inputs, outputs, trained=trained), trained)


def _passed(name: str, experts: Any, modules: dict[str, nn.Module]) -> int:
    """Return how many experts of a stack a token passes."""
    if type(experts).__name__ in ALL_EXPERTS:
        return len(experts.gate_up_proj)
    block = name.rpartition(".")[0]
    for own, module in modules.items():
        chosen = getattr(module, "top_k", None)
        if own.startswith(f"{block}.") and isinstance(chosen, int):
            return chosen
    chosen = getattr(modules[block], "top_k", None)
    return chosen if isinstance(chosen, int) else 1


def _factored(name: str, modules: dict[str, nn.Module]) -> set[str]:
    """Return which parameters of a module have LoRA's factors beside them that are trained."""
    found, module = set(), modules.get(name)
    while module is not None and hasattr(module, "base_layer"):
        if isinstance(module, ParamWrapper) and any(
            _wanted(module, factor) for factor in ("lora_A", "lora_B")
        ):
            found.add(module.parameter_name)
        module = module.base_layer  # type: ignore[assignment]
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


def linear_widths(module: Any) -> tuple[int, int]:
    """Return the inputs and outputs of a linear layer."""
    inputs, outputs = module.weight.shape[:: 1 if type(module).__name__ == "Conv1D" else -1]
    return int(inputs), int(outputs)
