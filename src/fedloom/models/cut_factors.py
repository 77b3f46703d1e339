"""LoRA whose first factors are cut out of the frozen weights, which keep the rest (PiSSA, OLoRA).

A frozen weight W becomes W - s B0 A0 with the first factors B0 and A0 beside it, so that nothing changes
at first. The cut follows from the weights and the setting alone: each party makes it by itself, and
factors that are averaged are beside the same rest everywhere. What is saved is beside the whole W:
s B A - s B0 A0 is a plain LoRA of twice the rank, as PEFT converts it
(https://huggingface.co/docs/peft/developer_guides/lora, "PiSSA").
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from fedloom.aggregation.lora import factor_pairs
from fedloom.errors import ModelError
from fedloom.tensors import Tensors

CUT = ("pissa", "olora")
"""Values of PEFT's ``init_lora_weights`` with which frozen weights change."""


def require_own_weights(backbone: nn.Module, layers: list[str], kind: str, rank: int) -> None:
    """Check that no weight would be cut twice, in fewer bits than float32, or into more than it has.

    Args:
        backbone: A Hugging Face model.
        layers: The full names of those that get factors.
        kind: The setting's value, for the message.
        rank: Of the factors, from 1.

    Raises:
        ModelError: Two layers have a weight in common, it is not float32, or the rank is above its
            smaller side, so that PEFT would cut out smaller factors than it reads again.
    """
    opening = f'adapter.init_lora_weights = "{kind}" cuts factors out of frozen weights: '
    seen: dict[int, str] = {}
    for name in layers:
        weight = _weight(backbone, name)
        if id(weight) in seen:
            raise ModelError(
                f"{opening}{name} and {seen[id(weight)]} have theirs in common; name one of them as "
                'adapter.targets, or use "default"'
            )
        if weight.dtype != torch.float32:
            raise ModelError(
                f"{opening}{name} is {weight.dtype}, in which the rest would be rounded; use "
                'training.precision = "fp32" without quantisation, or "default"'
            )
        seen[id(weight)] = name
    shapes = {name: tuple(_weight(backbone, name).shape) for name in layers}
    name = min(layers, key=lambda name: min(shapes[name]))
    if rank > (least := min(shapes[name])):
        raise ModelError(
            f"{opening}{name} is {' x '.join(map(str, shapes[name]))}, which has no factors of rank "
            f"{rank}; use a rank of "
            f"at most {least}, or name other layers as adapter.targets"
        )


def _weight(backbone: nn.Module, layer: str) -> Any:
    return backbone.get_submodule(layer).weight


def save_beside_whole(folder: Path, first: Tensors) -> None:
    """Make of a saved folder with factors beside the rest one with factors beside the whole weights.

    Args:
        folder: As PEFT has just written it; both files are replaced.
        first: The first factors by their names there; others are not read.
    """
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    record = json.loads(config.read_text(encoding="utf-8"))
    record["init_lora_weights"], rank = True, record["r"]
    record["r"] = 2 * rank
    record["lora_alpha"] *= math.sqrt(2) if record.get("use_rslora") else 2
    safetensors.torch.save_file(
        beside_whole(safetensors.torch.load_file(weights), first),
        weights,
        metadata={"format": "pt"},
    )
    config.write_text(json.dumps(record, indent=2, sort_keys=True), encoding="utf-8")


def beside_whole(adapter: Tensors, first: Tensors) -> Tensors:
    """Return factors whose product is B A - B0 A0, of twice the rank; the rest stays as it is.

    Args:
        adapter: A ``(rank, inputs)`` and B ``(outputs, rank)`` by name.
        first: A0 and B0 by the same names.
    """
    found = dict(adapter)
    for a, b in factor_pairs(adapter).values():
        found[a] = torch.cat([adapter[a], -first[a].to(adapter[a].dtype)])
        found[b] = torch.cat([adapter[b], first[b].to(adapter[b].dtype)], 1)
    return found
