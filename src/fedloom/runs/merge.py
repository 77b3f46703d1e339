"""Merge finished adapters of one base model into one, with no round at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedloom.aggregation.merging import Merging, merged
from fedloom.errors import ModelError, OutputError
from fedloom.models.mergeable_adapter import (
    MergeableAdapter,
    read_factors,
    read_mergeable,
    require_same_base,
    require_same_layers,
    write_merged,
)
from fedloom.models.model_card import Facts, base_facts, describe, versions
from fedloom.models.saved_adapter import PEFT_WEIGHTS
from fedloom.randomness import generator
from fedloom.runs.adapter_paths import adapter_folder, run_of
from fedloom.runs.model_cards import UNKNOWN_PROMPT
from fedloom.storage import run_folder as names
from fedloom.storage.run_folder import RunFolder, finite

RECORD = "merge.json"
"""In the merged folder: rule, weights, what was merged, and what the rank loses."""

MOST_ROWS = 1e15


@dataclass(frozen=True)
class MergeInputs:
    """What is to be merged, checked as far as it can be without reading tensors.

    Attributes:
        adapters: In the order given.
        weights: One each.
        weighed_by: Where they are from, in words.
        rank: Of the result.
        doubts: What is not known of them, for the user.
    """

    adapters: tuple[MergeableAdapter, ...]
    weights: tuple[float, ...]
    weighed_by: str
    rank: int
    doubts: tuple[str, ...]


@dataclass(frozen=True)
class MergedAdapter:
    """What was written.

    Attributes:
        folder: Where.
        inputs: Of what.
        rank_error: Distance of the adapter at its rank to the merged products, over their norm; ``None``
            in factor space, which cuts nothing.
    """

    folder: Path
    inputs: MergeInputs
    rank_error: float | None


def merge_inputs(
    paths: Sequence[Path],
    target: Path,
    own: Merging,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
) -> MergeInputs:
    """Return what is to be merged; see :func:`merge_adapters`.

    Raises:
        ModelError: A path is no LoRA adapter, or two are not of one base model, task and form.
        OutputError: The target is not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} is not empty; give another folder with --output")
    if len(paths) < 2:
        raise ModelError(f"merging needs two adapters at least, and {len(paths)} is given")
    folders = [adapter_folder(path) for path in paths]
    places = [folder.resolve() for folder in folders]
    for place, folder in enumerate(folders):
        if places.index(places[place]) != place:
            raise ModelError(f"{folder} is given twice: give it more weight with --weights instead")
    adapters = tuple(read_mergeable(folder) for folder in folders)
    doubts = require_same_base(adapters)
    ranks = [adapter.rank for adapter in adapters]
    if not own.of_products and (len(set(ranks)) > 1 or rank not in (None, ranks[0])):
        raise ModelError(
            f"--space factors needs adapters of one rank, which the result has, and these are of ranks "
            f"{', '.join(map(str, ranks))}: use --space product"
        )
    if weights is None:
        found, by = _rows(paths)
        if found is None:
            doubts = [*doubts, f"all adapters weigh alike: {by}; --weights says otherwise"]
        weights, by = (found, "rows") if found is not None else ([1.0] * len(paths), "alike")
    else:
        by = "as given"
        _require_weights(weights, len(paths))
    return MergeInputs(adapters, tuple(weights), by, rank or max(ranks), tuple(doubts))


def merge_adapters(
    paths: Sequence[Path],
    target: Path,
    own: Merging,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    seed: int = 0,
) -> MergedAdapter:
    """Merge finished LoRA adapters into one, and write it as a PEFT folder.

    Each adapter counts with its scale (alpha / r), so they may differ in it and, in product space, in
    rank. Changes are the whole products B A, as all of them began at 0; in factor space they are A and B
    themselves, so that only adapters that began with one A belong there. What is no factor (a classifier)
    is averaged.

    Args:
        paths: Run folders, adapters in them, or other PEFT folders.
        target: The folder to write; it may exist if it is empty.
        own: The rule.
        weights: One each, at least 0 and not all 0 (default: rows that the runs trained on, where all are
            of runs; otherwise all alike).
        rank: Of the result (default: the largest that is merged).
        seed: Of DARE's random numbers.

    Raises:
        ModelError: A path is no LoRA adapter, two do not fit each other, or a file is damaged.
        OutputError: The target is not empty, or cannot be written.
    """
    inputs = merge_inputs(paths, target, own, weights, rank)
    tensors = [read_factors(adapter) for adapter in inputs.adapters]
    require_same_layers(inputs.adapters, tensors)

    def draws(place: int) -> np.random.Generator:
        return generator(seed, "merging", place)

    found, lost = merged(tensors, inputs.weights, None, own, draws, inputs.rank)
    part = target.with_name(f"{target.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        write_merged(part, found, inputs.adapters[0])
        describe(part, _facts(target, inputs, own))
        record = _record(inputs, own, seed, lost)
        (part / RECORD).write_text(json.dumps(finite(record), indent=1) + "\n", encoding="utf-8")
        read_factors(read_mergeable(part))  # what is on the disk is what a reader takes
        os.replace(part, target)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    return MergedAdapter(target, inputs, lost)


def _require_weights(weights: Sequence[float], count: int) -> None:
    if len(weights) != count:
        raise ModelError(
            f"--weights has {len(weights)} numbers for {count} adapters: give one each"
        )
    if not all(math.isfinite(own) and 0 <= own <= MOST_ROWS for own in weights) or not any(weights):
        listed = ",".join(f"{own:g}" for own in weights)
        raise ModelError(
            f"--weights {listed}: weights are from 0 to {MOST_ROWS:g}, and one at least is above 0"
        )


def _rows(paths: Sequence[Path]) -> tuple[list[float] | None, str]:
    """Return the rows that each adapter was trained on, or ``None`` and why they are not known."""
    found = []
    for path in paths:
        run = run_of(path)
        record = RunFolder(run).read_json(names.PARTITION) if run is not None else None
        if record is None:
            return None, f"the rows of {path} are not known, as it lies in no run folder"
        folder = Path(os.path.abspath(path))
        own = int(folder.name) if folder.parent.name == "clients" else None
        rows = [
            float(client["train"])
            for client in record["clients"]
            if own is None or client["client"] == own
        ]
        if not sum(rows) > 0:
            return None, f"{path} has no record of rows"
        found.append(sum(rows))
    return found, ""


def _facts(target: Path, inputs: MergeInputs, own: Merging) -> Facts:
    """Return what the card says: what all adapters have in common, and how they were merged."""
    first = inputs.adapters[0]
    known = next((adapter.facts for adapter in inputs.adapters if adapter.facts), None)
    if known is None:
        base, revision = first.base
        known = {
            "base": base_facts(base or "unknown", revision),
            "objective": "unknown",
            "adapter": "lora",
            "precision": "fp32",
            "quantization": "none",
            "dtype": "float32",
            "task": "classification" if first.record.get("task_type") == "SEQ_CLS" else "causal",
            "prompt": UNKNOWN_PROMPT,
            "classes": [],
        }
    privacy = [
        f"{adapter.folder}: {sentence}"
        for adapter in inputs.adapters
        for sentence in adapter.facts.get("privacy") or ()
    ]
    clients = sum(int(adapter.facts.get("clients") or 1) for adapter in inputs.adapters)
    return {
        **known,
        "experiment": target.name,
        "client": None,
        "method": own.rule,
        "rounds": 0,
        "clients": clients,
        "own_code": False,
        "tokenizer_of_base": True,
        "versions": versions(),
        "evaluation": None,
        "merged": len(inputs.adapters),
        "privacy": privacy,
    }


def _record(inputs: MergeInputs, own: Merging, seed: int, lost: float | None) -> dict[str, Any]:
    merged_from = [
        {
            "folder": str(adapter.folder),
            "sha256": hashlib.sha256((adapter.folder / PEFT_WEIGHTS).read_bytes()).hexdigest(),
            "rank": adapter.rank,
            "scale": adapter.scale,
            "weight": weight,
        }
        for adapter, weight in zip(inputs.adapters, inputs.weights, strict=True)
    ]
    return {
        "rule": own.rule,
        "density": own.share if own.rule != "task_arithmetic" else None,
        "scale": own.scale,
        "space": "product" if own.of_products else "factors",
        "seed": seed if own.rule == "dare" else None,
        "weighed_by": inputs.weighed_by,
        "rank": inputs.rank,
        "rank_error": lost,
        "merged": merged_from,
    }
