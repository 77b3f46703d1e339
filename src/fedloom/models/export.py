"""A client's model as ``transformers`` loads it: adapter merged, own head in place, tokenizer beside.

Without a bottleneck adapter that is an ordinary model folder. A bottleneck is not part of any
architecture that ``transformers`` knows, so the folder then has a file of code (``exported_modeling.py``)
that needs ``trust_remote_code=True``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedloom.errors import ModelError
from fedloom.models.adapters import AdapterModel
from fedloom.models.architecture import one_weight
from fedloom.models.heads import LowRankHead, PersonalHead

CODE = "modeling_personal.py"


def export_causal(model: AdapterModel, tokenizer: Any, folder: Path) -> bool:
    """Write the model that ``model`` holds; return whether loading it needs ``trust_remote_code``.

    Args:
        model: A causal model; it is used up: its adapter is merged into its backbone.
        tokenizer: Saved beside.
        folder: Where to; made if it is not connected.

    Raises:
        ModelError: The adapter cannot be merged (prompt tuning, a quantised backbone), or transformers
            would not load the model by itself.
    """
    own = model.own
    _require_loadable(model.model)
    inner = _merged(model)
    if own is None:
        _save(inner, tokenizer, folder)
        return False
    weight, bias = _output_layer(own)
    if own.bottleneck is None:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        layer.weight = _parameter(weight)
        if bias is not None:
            layer.bias = _parameter(bias)
        inner.set_output_embeddings(layer)
        inner.config.tie_word_embeddings = False
        _save(inner, tokenizer, folder)
        return False
    _save_personal(inner, own, weight, bias, tokenizer, folder, reward=False)
    return True


def export_reward(model: AdapterModel, tokenizer: Any, folder: Path) -> None:
    """Write the explicit reward as a model for sequence classification with one output.

    Args:
        model: A causal model with a reward head; it is used up.
        tokenizer: Saved beside.
        folder: Where to; made if it is not connected.

    Raises:
        ModelError: There is no reward head, or the adapter cannot be merged.
    """
    own = model.own
    if own is None or own.reward is None:
        raise ModelError(
            'this model has no explicit reward head: train with objective.name = "pdpo" or "pkto"'
        )
    inner = _merged(model)
    _save_personal(inner, own, own.reward.weight, None, tokenizer, folder, reward=True)


def _require_loadable(model: Any) -> None:
    """Check that transformers loads a model of its own configuration, which may be a part of a whole's.

    Raises:
        ModelError: It does not.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    factories: tuple[Any, ...] = (AutoModelForCausalLM, AutoModelForSequenceClassification)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not any(type(inner.config) in factory._model_mapping for factory in factories):
        raise ModelError(
            f"a merged {type(inner).__name__} cannot be loaded by transformers: it is the text part of a "
            f"model, and AutoModelForCausalLM knows no {inner.config.model_type!r}. Use the adapter on "
            "the whole checkpoint"
        )


def _merged(model: AdapterModel) -> Any:
    peft_model: Any = model.model
    if not hasattr(peft_model, "merge_and_unload"):
        why = f": {model.unmergeable}" if model.unmergeable else ""
        raise ModelError(f"this kind of adapter cannot be merged into its model{why}")
    if both := one_weight(peft_model):
        raise ModelError(
            f"this adapter cannot be merged into its model: {both[0]} and {both[1]} have one weight, and "
            "what is added to one would be added to the other. Use the adapter on its base model"
        )
    try:
        return peft_model.merge_and_unload()
    except (AttributeError, ValueError, NotImplementedError) as error:
        raise ModelError(f"this adapter cannot be merged into its model: {error}") from error


def _output_layer(own: PersonalHead) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of the layer that gives a client's logits."""
    original: Any = own.original
    if own.head is None:
        return original.weight, original.bias
    if isinstance(own.head, LowRankHead):
        delta = own.head.up.weight @ own.head.down.weight
        return original.weight + delta.to(original.weight.dtype), original.bias
    full: Any = own.head
    return full.weight, full.bias


def _parameter(tensor: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor.detach().clone(), requires_grad=False)


def _save_personal(
    inner: Any,
    own: PersonalHead,
    weight: Tensor,
    bias: Tensor | None,
    tokenizer: Any,
    folder: Path,
    *,
    reward: bool,
) -> None:
    """Save the backbone with ``exported_modeling.py``'s head; the code and where it is go along."""
    from fedloom.models import exported_modeling

    head = exported_modeling.Head(
        weight.shape[1], weight.shape[0], own.parts.bottleneck, bias is not None
    )
    head.output.weight = _parameter(weight)
    if bias is not None:
        head.output.bias = _parameter(bias)
    if own.bottleneck is not None:
        head.down, head.up = own.bottleneck.down, own.bottleneck.up
    inner.set_output_embeddings(head.to(weight.device))
    config = inner.config
    config.tie_word_embeddings = False
    config.personal = {
        "hidden": weight.shape[1],
        "outputs": weight.shape[0],
        "bottleneck": own.parts.bottleneck,
        "bias": bias is not None,
    }
    task = "SequenceClassification" if reward else "CausalLM"
    config.auto_map = {f"AutoModelFor{task}": f"modeling_personal.PersonalFor{task}"}
    config.architectures = [f"PersonalFor{task}"]
    backbone = type(inner).__name__
    _save(inner, tokenizer, folder)
    code = Path(exported_modeling.__file__).read_text(encoding="utf-8")
    line = "from transformers import LlamaForCausalLM as Backbone"
    (folder / CODE).write_text(code.replace(line, line.replace("LlamaForCausalLM", backbone)))
    _set_architecture(folder, config.architectures)


def _save(inner: Any, tokenizer: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    inner.config.use_cache = True
    inner.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _set_architecture(folder: Path, architectures: list[str]) -> None:
    """Name our class in the configuration, where ``save_pretrained`` names the backbone's."""
    import json

    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "architectures": architectures}, indent=2) + "\n")
