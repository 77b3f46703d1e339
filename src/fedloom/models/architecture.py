"""What a model is, found out by asking it: causal or not, tied or not, on which layers adapters learn.

Configurations name the same thing in many ways, and some name it wrongly; what a model does with a few
tokens is the same for all. Configurations are hints here.
"""

from __future__ import annotations

import inspect
import re
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fedloom.errors import ModelError, first_line
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

DROPOUT = ("dropout", "pdrop", "drop_rate", "layerdrop")
"""Within the names of attributes that hold a probability of dropout."""

NOISE = "jitter"
"""Within the names of attributes of a router that hold the width of its noise in training."""

MULTIPLES = "chunk_length"
"""Within the names of attributes of a configuration that a row's length is a multiple of in training."""


NO_TOKEN = -1
"""A number that no token has."""


@torch.no_grad()
def require_causal(model: nn.Module, path: str) -> None:
    """Check that a model reads rows of text, and says nothing of a token that depends on later ones.

    Args:
        model: With an LM head and weights, on its device.
        path: Its name in the message.

    Raises:
        ModelError: It is not a causal language model, so its loss as one would be a leak; or it does not
            run on rows of text alone, in a batch, of any length.
    """
    row = _probe(model)
    other = row.clone()
    other[0, -1] = row[0, 0]
    kind = type(model).__name__
    ids = torch.cat([row, other, row])
    mask = torch.ones_like(ids)
    mask[2, PROBED_TOKENS // 2 :] = 0
    try:
        logits = _logits(model, ids, mask).float()
        alone = _logits(model, row[:, : PROBED_TOKENS // 2])[0].float()
        _require_any_length(model)
    except Exception as error:  # a model's code raises whatever it likes
        raise ModelError(
            f"{path} cannot be trained on rows of text alone ({kind}): {first_line(error)}. Take a "
            "causal language model that reads text and nothing else"
        ) from error
    if logits.shape[:2] != ids.shape:
        raise ModelError(
            f"{path} is not a causal language model of one text ({kind}): for {ids.shape[0]} rows of "
            f"{ids.shape[1]} tokens it returns logits of shape {tuple(logits.shape)}. Take a causal "
            "language model that reads text"
        )
    first, second, padded = logits[:, :-1]
    changed = CHANGED * first.std()
    if not (first - second).abs().max() <= changed:
        raise ModelError(
            f"{path} is not a causal language model ({kind}): what it says of a token "
            "depends on tokens that come later. Take a decoder; an encoder can be trained with "
            'objective.name = "classification"'
        )
    others = [alone]
    if next(model.parameters()).dtype != torch.float32:
        # a router may choose otherwise where sums are cut otherwise: the row in the same pass, not padded
        others.append(first[: len(alone)])
    if not min((own - padded[: len(alone)]).abs().max() for own in others) <= changed:
        raise ModelError(
            f"{path} cannot be trained on rows of different lengths ({kind}): what it says of a row "
            "depends on the padding after it. Take another model"
        )


def _require_any_length(model: Any) -> None:
    """Run a row of a length in training that is not a multiple of what the configuration may ask for."""
    lengths = [
        value
        for name, value in model.config.to_dict().items()
        if MULTIPLES in name and isinstance(value, int)
    ]
    if lengths:
        _logits(model, _probe(model, max(lengths) + 1), training=True)


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


def _reads_more(model: nn.Module) -> bool:
    """Return whether a model reads more than text, by its configuration."""
    return any(getattr(model.config, tower, None) is not None for tower in TOWERS)


def adaptable_layers(model: nn.Module) -> set[str]:
    """Return the names of the linear layers on which an adapter acts, and learns from text.

    Left out are layers that do not run on text (towers, cross-attention), whose weight the model uses by
    itself, whose output is not their product with the input (routers, layers of groups), and that no
    gradient reaches (what chooses the positions to attend to).

    Args:
        model: A frozen model; where one without weights cannot be run, only routers are left out.

    Raises:
        ModelError: It does not run on a row of text.
    """
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    probed: list[tuple[str, Tensor]] = []

    def watch(name: str) -> Any:
        def add_nothing(module: Any, inputs: Any, output: Any) -> Tensor | None:
            if not _is_product(module, inputs, output):
                return None
            nothing = torch.zeros_like(output, requires_grad=True)
            probed.append((name, nothing))
            return output + nothing  # type: ignore[no-any-return]

        return add_nothing

    hooks = [module.register_forward_hook(watch(name)) for name, module in linear.items()]
    row = _ended(model, _probe(model))
    try:
        with torch.enable_grad():
            total = _logits(model, row, training=True).sum()
            gradients = torch.autograd.grad(total, [own for _, own in probed], allow_unused=True)
    except Exception as error:  # a model's code raises whatever it likes
        if row.device.type == "meta":
            return {name for name, module in linear.items() if not is_router(module)}
        raise _untrainable(model, error) from error
    finally:
        for hook in hooks:
            hook.remove()
    reached = {
        name for (name, _), gradient in zip(probed, gradients, strict=True) if gradient is not None
    }
    # Of experts that are modules of their own, a row passes some.
    kinds = {_of_any_expert(name) for name in reached}
    return {name for name in linear if name in reached or _of_any_expert(name) in kinds}


def _untrainable(model: nn.Module, error: Exception) -> ModelError:
    """Return what a user is told of a model that does not run on a row of text."""
    config: Any = model.config
    start = getattr(config, "decoder_start_token_id", None)
    if getattr(config, "is_encoder_decoder", False) and start is None:
        return ModelError(
            f"{type(model).__name__} cannot be trained: its configuration does not say with which token "
            "its decoder starts; set decoder_start_token_id in its config.json (T5's is its pad_token_id)"
        )
    return ModelError(
        f"{type(model).__name__} cannot be trained on a row of text: {first_line(error)}; take another "
        "model"
    )


def _of_any_expert(name: str) -> str:
    """Return a layer's name without the number of the expert that it is in."""
    return re.sub(r"(expert\w*)\.\d+\.", r"\1.", name)


def _is_product(module: Any, inputs: tuple[Any, ...], output: Any) -> bool:
    """Return whether what a linear layer returned is its product with its input."""
    if not isinstance(output, Tensor) or not inputs or not output.is_floating_point():
        return False
    given, weight = inputs[0], module.weight
    if output.shape[:-1] != given.shape[:-1]:
        return False
    usual = type(module).forward is nn.Linear.forward or not isinstance(module, nn.Linear)
    if (
        usual or weight.is_meta or weight.dtype != given.dtype
    ):  # a quantised layer has a pass of its own
        return True
    with torch.no_grad():
        expected = F.linear(given, weight, module.bias)
    return expected.shape == output.shape and torch.allclose(expected, output, atol=1e-3, rtol=1e-3)


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
def reads_padding(model: nn.Module) -> bool:
    """Return whether a classifier needs to be told what rows are padded with.

    Most decoders read the last token that their configuration does not call padding; some do not run
    without such a token (BART). What reads another token reads that of its own embeddings, if any.

    Args:
        model: With a classification head and weights.

    Raises:
        ModelError: It does not run on a row of text.
    """
    config: Any = model.config
    config = config.get_text_config()
    before, row = getattr(config, "pad_token_id", None), _ended(model, _probe(model))
    if before is None:
        return True
    said = []
    try:
        for pad in (int(row[0, -1]), NO_TOKEN):
            config.pad_token_id = pad
            said.append(_logits(model, row))
    except Exception as error:  # a model's code raises whatever it likes
        raise _untrainable(model, error) from error
    finally:
        config.pad_token_id = before
    return not torch.equal(*said)


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


@torch.no_grad()
def run_on_text(model: nn.Module) -> Tensor:
    """Run a model on a row of text, for those who look at a part of it; return it, ``(1, tokens)``."""
    row = _probe(model)
    _logits(model, row)
    return row


@torch.no_grad()
def uses_cache(model: nn.Module, pad: int, *, batched: bool) -> bool:
    """Return whether a model goes on with a row alike with and without a cache of what it has read.

    Args:
        model: Causal, with weights.
        pad: Token id to pad with.
        batched: Whether shorter rows are padded on the left.

    Raises:
        ModelError: It does not go on with a row at all.
    """
    run: Any = getattr(model, "generate", None)
    row = _probe(model)
    mask = torch.ones_like(row)
    if batched:
        row, mask = row.repeat(2, 1), mask.repeat(2, 1)
        row[1, :-2], mask[1, :-2] = pad, 0
    options = {"attention_mask": mask, "pad_token_id": pad, "do_sample": False}
    options |= {"max_new_tokens": 3, "min_new_tokens": 3}
    try:
        without = run(input_ids=row, use_cache=False, **options)
    except Exception as error:  # a model's code raises whatever it likes
        raise ModelError(
            f"{type(model).__name__} does not generate text: {first_line(error)}; set "
            "evaluation.samples = 0, or take another model"
        ) from error
    try:
        return bool(torch.equal(without, run(input_ids=row, use_cache=True, **options)))
    except Exception:  # as above
        return False


def is_router(module: nn.Module) -> bool:
    """Return whether a linear layer chooses experts, by its name; of a model that cannot be run."""
    kind = type(module)
    return isinstance(module, nn.Linear) and kind is not nn.Linear and "Router" in kind.__name__


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer (``Conv1D`` is GPT-2's, with its weight transposed)."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_tied(model: nn.Module) -> bool:
    """Return whether a model's output layer shares its weight with the input embeddings."""
    output, inputs = _ends(model)
    return output is not None and inputs is not None and output.weight is inputs.weight


def one_weight(model: nn.Module) -> tuple[str, str] | None:
    """Return two linear layers that have one weight in common, as Zamba has; ``None`` without such."""
    found: dict[int, str] = {}
    for name, module in model.named_modules():
        if is_linear(module):
            first = found.setdefault(id(module.weight), name)
            if first != name:
                return first, name
    return None


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
    """Set every probability of dropout in a model to 0; adapters that are put on it have their own.

    Routers with noise in training stay as they are in evaluation: what holds the noise's width can say
    something of evaluation too (PhiMoE).

    Raises:
        ModelError: What it says in training still differs from what it says otherwise.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and any(part in name for part in DROPOUT):
                setattr(module, name, 0.0)
        if any(NOISE in name and value for name, value in vars(module).items()):
            module.eval()
            module.train = partial(_as_it_is, module)  # type: ignore[method-assign]
    row = _probe(model)
    if row.device.type == "meta":
        return
    with torch.no_grad():
        still, training = _logits(model, row), _logits(model, row, training=True)
    spread = (
        still.float().std() if still.numel() > 1 else still.float().abs().max()
    )  # of one reward
    if not (still - training).abs().max() <= CHANGED * spread:
        raise ModelError(
            f"{type(model).__name__} says something else in training than otherwise, with dropout "
            "switched off: a reference would be another model than the one that is trained. Take another "
            'model, or an objective without a reference ("sft", "simpo", "orpo", "cpo")'
        )


def _as_it_is(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stand for ``train`` of a module that stays in evaluation."""
    return module


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


def _probe(model: nn.Module, length: int = PROBED_TOKENS) -> Tensor:
    """Return ``(1, length)`` ids that the model knows, different ones as far as it knows so many."""
    config: Any = model.config
    embeddings = _ends(model)[1]
    known = [
        int(size)
        for size in (
            vocabulary(config, 0),
            None if embeddings is None else embeddings.weight.shape[0],
        )
        if size
    ]
    size = min(known, default=PROBED_TOKENS)
    ids = torch.arange(length) * max(1, size // length) % size
    return ids.unsqueeze(0).to(next(model.parameters()).device)


def _ended(model: Any, row: Tensor) -> Tensor:
    """Return a row that ends as texts do: some classifiers read the state at the end token (BART)."""
    end = getattr(text_part(model.config), "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < vocabulary(model.config, 0):
        row = torch.where(row == end, row[:, 1:2], row)
        row[0, -1] = end
    return row


def _last_logits(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    options: dict[str, Any] = {}
    if "position_ids" in _accepted(model):
        options = {"position_ids": positions}
    return _logits(model, ids, mask, **options)[0, -1].float()


def _accepted(model: Any) -> set[str]:
    """Return the names of what a model's forward pass takes."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return set(inspect.signature(base.forward).parameters)


def _logits(
    model: Any,
    ids: Tensor,
    mask: Tensor | None = None,
    *,
    training: bool = False,
    **options: Any,
) -> Tensor:
    """Return a model's logits, of rows without padding where there is no mask."""
    mask = torch.ones_like(ids) if mask is None else mask
    was_training = model.training
    devices = [ids.device] if ids.device.type == "cuda" else []
    model.train(training)
    try:
        with torch.random.fork_rng(devices=devices):  # dropout draws
            logits: Tensor = model(input_ids=ids, attention_mask=mask, **options).logits
    finally:
        model.train(was_training)
    return logits
