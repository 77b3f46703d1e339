"""LoRA's two factors as the linear layers that they are."""

from __future__ import annotations

from peft.tuners.lora.layer import LoraLayer
from torch import nn

from fedloom.models.adapters import AdapterModel


def lora_factors(model: AdapterModel) -> dict[str, nn.Module]:
    """Return the linear layer of each factor by its tensor's name, where both are plain products.

    A variant of LoRA (DoRA) uses its factors in other ways too; those of embeddings and of stacks of
    experts are no linear layers.
    """
    found: dict[str, nn.Module] = {}
    for name, layer in model.model.named_modules():
        if not isinstance(layer, LoraLayer) or getattr(layer, "lora_variant", None):
            continue
        for factor in ("lora_A", "lora_B"):
            own = dict(getattr(layer, factor).items()).get("default")
            if type(own) is nn.Linear and own.bias is None:
                found[f"{name}.{factor}.weight"] = own
    return found
