"""Saved LoRA adapters that are to be merged: what folders say, their tensors, and the result's folder.

Nothing in a folder is trusted: its configuration is read as plain JSON, its tensors from safetensors
alone, and names, shapes and numbers are checked. What would make another function of the same tensors is
refused, or must be the same in all of them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open

from fedloom.aggregation.lora import A, B, factor_pairs
from fedloom.display.untrusted_text import quoted
from fedloom.errors import ModelError, first_line
from fedloom.models.heads import FILE as PERSONAL
from fedloom.models.load import fingerprint
from fedloom.models.model_card import base_facts
from fedloom.models.saved import CLASSIFIER, FACTS
from fedloom.models.saved_adapter import (
    CONFIG,
    HARMLESS_STARTS,
    NO_FUNCTION,
    PEFT_WEIGHTS,
    read_object,
)
from fedloom.models.saved_facts import LONGEST_PATH, REVISION, checked_facts, is_line
from fedloom.tensors import Tensors, is_finite

BEYOND_PRODUCTS = (
    "use_dora",
    "lora_bias",
    "alpha_pattern",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
)
"""What makes of an adapter more than a product B A with one scale in each layer."""

LARGEST_RANK = 65536

LARGEST_ALPHA = 1e9


@dataclass(frozen=True)
class MergeableAdapter:
    """A PEFT folder of LoRA factors.

    Attributes:
        folder: Where it is.
        record: Its configuration.
        facts: What fedloom knows of it beside (``fedloom.json``), checked; empty where another made it.
    """

    folder: Path
    record: Mapping[str, Any]
    facts: Mapping[str, Any]

    @property
    def rank(self) -> int:
        """Rows of every factor A."""
        return int(self.record["r"])

    @property
    def scale(self) -> float:
        """What PEFT multiplies the product B A by."""
        rank = self.rank
        whole = math.sqrt(rank) if self.record.get("use_rslora") else rank
        return float(self.record["lora_alpha"]) / whole

    @property
    def base(self) -> tuple[str | None, str | None]:
        """The base model that it names, and that one's revision."""
        name, revision = (self.record.get(k) for k in ("base_model_name_or_path", "revision"))
        return name if isinstance(name, str) else None, revision if isinstance(
            revision, str
        ) else None


def read_mergeable(folder: Path) -> MergeableAdapter:
    """Read what a folder says of its adapter.

    Raises:
        ModelError: It has none of LoRA whose layers are products with one scale, or has parts beside; or
            its ``fedloom.json`` holds what fedloom does not write, or names another base model.
    """
    record = _json(folder, CONFIG)
    kind = record.get("peft_type")
    if kind != "LORA":
        raise ModelError(
            f"{folder} cannot be merged: its peft_type is {quoted(kind, 60)}, and merging is of LORA"
        )
    if not (folder / PEFT_WEIGHTS).is_file():
        raise ModelError(
            f"{folder} has no {PEFT_WEIGHTS}; pickled weights are not read: save it with PEFT's "
            "save_pretrained(folder)"
        )
    if (folder / PERSONAL).is_file():
        raise ModelError(
            f"{folder} holds parts of a client's own ({PERSONAL}), which cannot be merged: merge the "
            "global adapter of its run"
        )
    for key in BEYOND_PRODUCTS:
        if record.get(key):
            raise ModelError(
                f"{folder} was made with {key} = {quoted(record[key], 60)}: it is more than a product "
                "B A with one scale, which is what can be merged"
            )
    if record.get("init_lora_weights", True) not in HARMLESS_STARTS:
        raise ModelError(
            f"{folder} was initialised by {quoted(record['init_lora_weights'], 60)}, which changes the "
            "frozen weights: save it with PEFT's path_initial_model_for_weight_conversion"
        )
    rank, alpha = record.get("r"), record.get("lora_alpha")
    if type(rank) is not int or not 1 <= rank <= LARGEST_RANK:
        raise ModelError(f"{folder / CONFIG}: r = {quoted(rank, 60)} is no rank of LoRA")
    number = alpha if isinstance(alpha, int | float) and not isinstance(alpha, bool) else 0
    if not 0 < number <= LARGEST_ALPHA:
        raise ModelError(
            f"{folder / CONFIG}: lora_alpha = {quoted(alpha, 60)} is not above 0 and at most "
            f"{LARGEST_ALPHA:g}"
        )
    own = MergeableAdapter(folder, record, {})
    name, revision = own.base
    if name is not None and not is_line(name, LONGEST_PATH):
        raise ModelError(
            f"{folder / CONFIG}: base_model_name_or_path = {quoted(name, 60)} is no name of a model"
        )
    if revision is not None and not REVISION.fullmatch(revision):
        raise ModelError(f"{folder / CONFIG}: revision = {quoted(revision, 60)} is none of the Hub")
    return MergeableAdapter(folder, record, _facts(own))


def _facts(adapter: MergeableAdapter) -> Mapping[str, Any]:
    """Return the checked facts of an adapter, whose base is the one that its configuration names.

    Raises:
        ModelError: They are none, or they are of another base, by path, revision and SHA-256.
    """
    folder, (name, revision) = adapter.folder, adapter.base
    if not (folder / FACTS).is_file():
        return {}
    facts = checked_facts(_json(folder, FACTS), folder / FACTS)
    kind = adapter.record.get("task_type")
    if (facts["task"] == "classification") != (kind == "SEQ_CLS"):
        raise ModelError(
            f"{folder}: {FACTS} says that its task is {facts['task']}, and {CONFIG} that it is "
            f"{quoted(kind, 60)}: delete the one file or correct the other"
        )
    base = facts["base"]
    if (base["path"], base["revision"]) == (name, revision):
        return facts
    digest = fingerprint(name) if name is not None and os.path.isdir(name) else None
    if name is None or digest is None or digest != base["sha256"]:
        pinned = f" at {base['revision']}" if base["revision"] else ""
        raise ModelError(
            f"{folder}: {FACTS} says that its base model is {quoted(base['path'], 200)}{pinned}, and "
            f"{CONFIG} that it is {_named(adapter, None)}: delete the one file or correct the other"
        )
    return {**facts, "base": base_facts(name, revision, digest)}


def require_same_base(adapters: Sequence[MergeableAdapter]) -> list[str]:
    """Check that adapters are of one base model and task, by what they say; return what is not known.

    Raises:
        ModelError: Two of them say otherwise; both, and what they say, are named.
    """
    doubts = []
    for first, other in combinations(adapters, 2):
        digests = [own.facts["base"]["sha256"] if own.facts else None for own in (first, other)]
        one, two = digests if all(digests) else [own.base for own in (first, other)]
        if one != two:
            raise ModelError(
                f"{first.folder} and {other.folder} are of different base models: "
                f"{_named(first, digests[0])} and {_named(other, digests[1])}"
            )
        for key in ("task", "classes"):
            if first.facts and other.facts and first.facts.get(key) != other.facts.get(key):
                raise ModelError(
                    f"{first.folder} and {other.folder} differ in their {key}: "
                    f"{quoted(first.facts.get(key), 60)} and {quoted(other.facts.get(key), 60)}"
                )
        for key in sorted((first.record.keys() | other.record.keys()) - NO_FUNCTION):
            here, there = first.record.get(key), other.record.get(key)
            if here != there and (here or there):
                raise ModelError(
                    f"{first.folder} and {other.folder} were made with other settings: {key} is "
                    f"{quoted(here, 60)} and {quoted(there, 60)}"
                )
    if len({own.base for own in adapters}) > 1:
        doubts.append(
            "the adapters name their base model differently, and are taken for one by the SHA-256 in "
            f"their {FACTS}; the result names {_named(adapters[0], None)}"
        )
    if any(own.base[0] is None for own in adapters):
        doubts.append(
            "not all adapters say which base model they are of; only their layers are compared"
        )
    return doubts


def read_factors(adapter: MergeableAdapter) -> Tensors:
    """Return the tensors of a folder in float32, with B times the scale: products are what is added.

    Raises:
        ModelError: The file is damaged, a tensor is no factor of the rank, or numbers are not finite.
    """
    path, found = adapter.folder / PEFT_WEIGHTS, {}
    try:
        with safe_open(path, "pt") as content:
            for name in sorted(content.keys()):
                tensor = content.get_tensor(name)
                if not tensor.is_floating_point() or "lora_embedding" in name:
                    raise ModelError(
                        f"{path}: {quoted(name, 120)} is {tensor.dtype} of embeddings or of no weight, "
                        "which cannot be merged"
                    )
                found[name] = tensor.float()
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"{path} is damaged: {first_line(error)}") from error
    pairs = factor_pairs(found)
    factors = {name for pair in pairs.values() for name in pair}
    if not pairs or any(B in name and name not in factors for name in found):
        raise ModelError(f"{path} does not hold both factors A and B of each layer")
    for a, b in pairs.values():
        shapes = [tuple(found[name].shape) if name in found else () for name in (a, b)]
        if [len(own) for own in shapes] != [2, 2] or (shapes[0][0], shapes[1][1]) != (
            adapter.rank,
        ) * 2:
            raise ModelError(
                f"{path}: {quoted(a, 120)} and its B have shapes {shapes[0]} and {shapes[1]}, which are "
                f"not those of factors of rank {adapter.rank}"
            )
        found[b] = found[b] * adapter.scale
    for name, tensor in found.items():
        if not is_finite(tensor):
            raise ModelError(
                f"{path}: {quoted(name, 120)} holds numbers that are not finite; its training had "
                "diverged"
            )
    return found


def require_same_layers(adapters: Sequence[MergeableAdapter], tensors: Sequence[Tensors]) -> None:
    """Check that adapters are on the same layers, of the same widths.

    Raises:
        ModelError: They are not; one that differs is named.
    """
    for adapter, own in zip(adapters[1:], tensors[1:], strict=True):
        for name in sorted(tensors[0].keys() | own.keys()):
            widths = [
                _width(name, kept[name].shape) if name in kept else None
                for kept in (tensors[0], own)
            ]
            if widths[0] != widths[1]:
                raise ModelError(
                    f"{adapters[0].folder} and {adapter.folder} are not on the same layers: "
                    f"{quoted(name, 120)} is {_size(widths[0])} and {_size(widths[1])}"
                )


def write_merged(folder: Path, merged: Tensors, like: MergeableAdapter) -> None:
    """Write a PEFT folder whose products, with PEFT's scale, are those of ``merged``.

    Args:
        folder: Empty.
        merged: Factors whose products are whole; see :func:`read_factors`.
        like: Whose configuration and scale it has; the rank is that of the factors.

    Raises:
        OSError: A file cannot be written.
    """
    rank = next(len(merged[a]) for a in factor_pairs(merged))
    whole = math.sqrt(rank) if like.record.get("use_rslora") else rank
    tensors = {
        name: (t / like.scale if B in name else t).contiguous() for name, t in merged.items()
    }
    safetensors.torch.save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    content = {
        **like.record,
        "r": rank,
        "lora_alpha": like.scale * whole,
        "init_lora_weights": True,
    }
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")
    if (like.folder / CLASSIFIER).is_file():
        (folder / CLASSIFIER).write_bytes((like.folder / CLASSIFIER).read_bytes())


def _json(folder: Path, file: str) -> dict[str, Any]:
    return read_object(folder / file, f"{folder} is not an adapter: {file}")


def _named(adapter: MergeableAdapter, digest: object) -> str:
    name, revision = adapter.base
    pinned = f" at {revision}" if revision else ""
    known = f" (SHA-256 {str(digest)[:12]})" if digest else ""
    return f"{quoted(name, 200)}{pinned}{known}"


def _width(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return what does not depend on the rank."""
    if A in name:
        return (shape[1],)
    return (shape[0],) if B in name else tuple(shape)


def _size(width: tuple[int, ...] | None) -> str:
    return "not there" if width is None else " x ".join(map(str, width)) + " wide"
