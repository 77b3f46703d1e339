"""What a model is, found out by asking it: causal or not, tied or not, which of its layers read text.

Configurations name the same thing in many ways, and some name it wrongly; what a model does with a few
tokens is the same for all. Configurations are hints here.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedloom.errors import ModelError
from fedloom.models.configuration import text_part, vocabulary

PROBED_TOKENS = 8
"""Length of a row that a model is asked about."""

CHANGED = 1e-3
"""Share of the spread of logits by which those of a causal model never change."""

TOWERS = ("vision_config", "audio_config", "image_config", "speech_config")
"""Sections of a configuration by which a model reads more than text."""

TOWER_NAMES = ("vision", "visual", "audio", "image", "speech", "multi_modal", "mm_projector")
"""Within the names of modules that read no text; asked only of a model without weights."""

POSITIONS = ("pos", "wpe")
"""Within the names of tables that are looked up by position."""

OWN_HEADS = ("score", "classifier")
"""What PEFT takes for the head of a classifier by itself."""

DROPOUT = ("dropout", "pdrop", "drop_rate")
"""Within the names of attributes that hold a probability of dropout."""


@torch.no_grad()
def require_causal(model: nn.Module, path: str) -> None:
    """Check that what a model says of a token does not depend on later tokens.

    Args:
        model: With an LM head and weights, on its device.
        path: Its name in the message.

    Raises:
        ModelError: It does: the model is an encoder, and its loss as a causal model would be a leak.
    """
    row = _probe(model)
    other = row.clone()
    other[0, -1] = row[0, 0]
    first, second = (_logits(model, ids)[0, :-1].float() for ids in (row, other))
    if (first - second).abs().max() > CHANGED * first.std():
        raise ModelError(
            f"{path} is no causal language model ({type(model).__name__}): what it says of a token "
            "depends on tokens that come later. Take a decoder; an encoder can be trained with "
            'objective.name = "classification"'
        )


@torch.no_grad()
def text_layers(model: nn.Module) -> set[str] | None:
    """Return the names of the modules that run when a model reads text.

    Returns:
        ``None`` where a model reads nothing else. Of one without weights, which cannot always be run,
        those that are not named as what reads something else.
    """
    if not _reads_more(model):
        return None
    if next(model.parameters()).is_meta:
        return {n for n, _ in model.named_modules() if not any(own in n for own in TOWER_NAMES)}
    row = _probe(model)
    ran: set[str] = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
        for name, module in model.named_modules()
    ]
    try:
        _logits(model, row)
    finally:
        for hook in hooks:
            hook.remove()
    return ran


def needs_names(model: nn.Module) -> bool:
    """Return whether "all linear layers" would be too many: some route tokens, or read no text."""
    return _reads_more(model) or any(is_router(module) for module in model.modules())


def _reads_more(model: nn.Module) -> bool:
    """Return whether a model reads more than text, by its configuration."""
    return any(getattr(model.config, tower, None) is not None for tower in TOWERS)


@torch.no_grad()
def pads_left(model: nn.Module, pad: int) -> bool:
    """Return whether a model answers alike with padding before a row, as it must in a batch.

    Recurrent models carry padding on in their state.

    Args:
        model: Causal, with weights.
        pad: Token id to pad with.
    """
    row = _probe(model)
    padding = torch.full_like(row, pad)
    ids = torch.cat([padding, row], dim=1)
    mask = torch.cat([torch.zeros_like(row), torch.ones_like(row)], dim=1)
    padded, alone = _last_logits(model, ids, mask), _last_logits(model, row, torch.ones_like(row))
    return bool((padded - alone).abs().max() <= CHANGED * alone.std())


@torch.no_grad()
def positions(model: Any) -> int | None:
    """Return for how many tokens a model has embeddings of positions, by looking what a row looks up.

    Returns:
        ``None`` where it looks up none, or has no weights.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    tables = [
        module.weight
        for name, module in base.named_modules()
        if isinstance(module, nn.Embedding) and any(own in name.lower() for own in POSITIONS)
    ]
    if not tables or tables[0].is_meta:
        return None
    row = _probe(base)
    pad = getattr(base.get_input_embeddings(), "padding_idx", None)
    if pad is not None:
        row[row == pad] = row[0, -1]  # some count no positions of padding
    was_training = base.training
    base.eval()
    try:
        with _Lookups() as lookups:
            getattr(base, base.base_model_prefix, base)(
                input_ids=row, attention_mask=torch.ones_like(row)
            )
    finally:
        base.train(was_training)
    room = [
        rows - int(found.min())
        for rows, found in lookups.seen
        if len(found) == row.shape[1] and int(found.max() - found.min()) == len(found) - 1
    ]
    return min(room, default=None)


class _Lookups(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the rows of every table that is looked up inside, and which of these are.

    Attributes:
        seen: Rows and the different indices, ascending, of each lookup.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[int, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.embedding.default:
            self.seen.append((len(args[0]), args[1].unique()))
        return func(*args, **(kwargs or {}))


def head_parts(model: Any) -> list[str]:
    """Return the modules with weights that a classifier has between its blocks and its classes, by name.

    A checkpoint without a classifier has none of them, so they are trained and travel whole.
    """
    prefix = str(getattr(model, "base_model_prefix", ""))
    if not hasattr(model, prefix):
        return []
    return [
        name
        for name, module in model.named_modules()
        if (name and "." not in name and name != prefix)
        or (name.startswith(f"{prefix}.") and name.endswith(".pooler"))
        if next(module.parameters(), None) is not None
    ]


def has_long_head(model: Any) -> bool:
    """Return whether a classifier's head is more than what PEFT takes for one."""
    return not set(head_parts(model)) <= set(OWN_HEADS)


def is_router(module: nn.Module) -> bool:
    """Return whether a linear layer chooses experts: it returns more than its product with the input."""
    kind = type(module)
    return isinstance(module, nn.Linear) and kind is not nn.Linear and "Router" in kind.__name__


def is_tied(model: nn.Module) -> bool:
    """Return whether a model's output layer shares its weight with the input embeddings."""
    output, inputs = _ends(model)
    return output is not None and inputs is not None and output.weight is inputs.weight


def untie(model: nn.Module) -> None:
    """Give the output layer, under an adapter or not, a weight of its own, equal to the embeddings'."""
    if not is_tied(model):
        return
    output, inputs = _ends(model)
    weight = inputs.weight.detach().clone()
    bare = output.get_base_layer() if hasattr(output, "get_base_layer") else output
    bare.weight = nn.Parameter(weight, requires_grad=False)
    config: Any = model.config
    for own in {id(c): c for c in (config, text_part(config))}.values():
        own.tie_word_embeddings = False


def switch_dropout_off(model: nn.Module) -> None:
    """Set every probability of dropout in a model to 0; adapters that are put on it have their own."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and any(part in name for part in DROPOUT):
                setattr(module, name, 0.0)


def _ends(model: Any) -> tuple[Any, Any]:
    """Return output layer and input embeddings, ``None`` for one that is not there."""
    try:
        output, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None, None
    return (
        output if hasattr(output, "weight") else None,
        inputs if hasattr(inputs, "weight") else None,
    )


def _probe(model: nn.Module) -> Tensor:
    """Return ``(1, tokens)`` different ids that the model knows."""
    config: Any = model.config
    size = vocabulary(config, PROBED_TOKENS)
    ids = torch.arange(PROBED_TOKENS) * max(1, size // PROBED_TOKENS) % size
    return ids.unsqueeze(0).to(next(model.parameters()).device)


def _last_logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    options = {"position_ids": positions} if "position_ids" in _accepted(model) else {}
    return _logits(model, ids, mask, **options)[0, -1].float()


def _accepted(model: Any) -> set[str]:
    """Return the names of what a model's forward pass takes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(base.forward).parameters)


def _logits(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Tensor) -> Tensor:
    """Return a model's logits without dropout, of rows without padding where there is no mask."""
    mask = torch.ones_like(ids) if mask is None else mask
    was_training = model.training
    model.eval()
    try:
        logits: Tensor = model(input_ids=ids, attention_mask=mask, **options).logits
    finally:
        model.train(was_training)
    return logits
