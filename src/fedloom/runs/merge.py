"""Merge finished adapters of one base model into one, with no round at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from fedloom.aggregation.merging import Merging, merged
from fedloom.display.untrusted_text import named
from fedloom.errors import ModelError, OutputError, first_line
from fedloom.models.mergeable_adapter import (
    MergeableAdapter,
    read_factors,
    read_mergeable,
    require_same_base,
    require_same_layers,
    write_merged,
)
from fedloom.models.model_card import Facts, base_facts, describe, versions
from fedloom.models.saved_adapter import CONFIG, PEFT_WEIGHTS
from fedloom.models.saved_facts import MOST_CLIENTS
from fedloom.privacy.statement import promises
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
        ModelError: A path is no LoRA adapter, two are not of one base model, task and form, or the rule
            is none of factors.
        OutputError: The target is not empty.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} is not empty; give another folder with --output")
    if not own.of_products and own.rule != "task_arithmetic":
        raise ModelError(
            f"{own.rule} in factor space would drop entries of the A that all adapters began with: use "
            "product space"
        )
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
    themselves, so that only adapters that began with one A belong there; A is averaged, and the scale is
    of B alone. What is no factor (a classifier) is averaged.

    The result is written beside the target, or in it where it is an empty folder, under another name that
    is removed whatever fails.

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
    with _new_folder(target) as part:
        write_merged(part, found, inputs.adapters[0])
        describe(part, _facts(Path(os.path.abspath(target)), inputs, own))
        record = _record(inputs, own, seed, lost)
        (part / RECORD).write_text(json.dumps(finite(record), indent=1) + "\n", encoding="utf-8")
        read_factors(read_mergeable(part))  # what is on the disk is what a reader takes
    return MergedAdapter(target, inputs, lost)


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder beside the target, or in it where it is there, whose files become the target's.

    Whatever fails, the folder is removed.

    Raises:
        OutputError: It cannot be written.
    """
    there, whole = target.is_dir(), Path(os.path.abspath(target))
    part = (whole if there else whole.parent) / f".{whole.name}.{os.getpid()}.part"
    try:
        part.mkdir()
    except OSError as error:
        raise OutputError(f"cannot write {part}: {error.strerror or error}") from error
    try:
        yield part
        if there:  # a folder that somebody may stand in is filled, not replaced
            for file in sorted(part.iterdir(), key=lambda file: file.name == CONFIG):
                os.replace(file, whole / file.name)
        else:
            os.replace(part, whole)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or first_line(error)
        raise OutputError(f"cannot write {target}: {why}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


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
        record = RunFolder(run).read_record(names.PARTITION) if run is not None else None
        if run is None or record is None:
            return None, f"the rows of {path} are not known, as it lies in no run folder"
        folder = Path(os.path.abspath(path))
        of_client = folder.parent == run / "clients"
        try:
            rows = [
                float(client["train"])
                for client in record["clients"]
                if not of_client or f"{client['client']:04d}" == folder.name
            ]
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ModelError(
                f"{run / names.PARTITION} has no rows of clients that can be read: give --weights"
            ) from None
        if not 0 < sum(rows) <= MOST_ROWS or min(rows) < 0:
            return None, f"{path} has no record of rows"
        found.append(sum(rows))
    return found, ""


def _facts(target: Path, inputs: MergeInputs, own: Merging) -> Facts:
    """Return what the card says: what all adapters have in common, and how they were merged."""
    adapters = inputs.adapters
    first, every = adapters[0], [adapter.facts or UNKNOWN_FACTS for adapter in adapters]
    told = [adapter.facts for adapter in adapters if adapter.facts]
    name, revision = first.base
    task = "classification" if first.record.get("task_type") == "SEQ_CLS" else "causal"
    objectives = list(
        dict.fromkeys(
            objective
            for facts in every
            for objective in facts.get("objectives") or [facts["objective"]]
        )
    )
    quantizations = {facts["quantization"] for facts in every} - {"none"}
    precise = any(facts["dtype"] == "float32" for facts in told) or not told
    return {
        "base": first.facts["base"] if first.facts else base_facts(name or "unknown", revision),
        "objective": objectives[0] if len(objectives) == 1 else "several",
        "objectives": objectives,
        "adapter": "lora",
        "precision": "fp32" if precise else "bf16",
        "quantization": min(quantizations, default="none"),
        "dtype": "float32" if precise else "bfloat16",
        "task": told[0]["task"] if told else task,
        "prompt": _common([facts["prompt"] for facts in every], UNKNOWN_PROMPT),
        "classes": told[0]["classes"] if told else [],
        "experiment": target.name,
        "client": None,
        "method": own.rule,
        "rounds": 0,
        "clients": min(MOST_CLIENTS, sum(facts["clients"] for facts in every)),
        "own_code": False,
        "tokenizer_of_base": True,
        "versions": versions(),
        "evaluation": None,
        "merged": len(adapters),
        "privacy": _promises(adapters),
    }


UNKNOWN_FACTS: Facts = {
    "objective": "unknown",
    "quantization": "none",
    "prompt": UNKNOWN_PROMPT,
    "clients": 1,
}
"""Of an adapter that another program wrote."""


def _common(values: Sequence[Any], otherwise: Any) -> Any:
    """Return the value that all are, if they are one."""
    return values[0] if all(value == values[0] for value in values) else otherwise


def _promises(adapters: Sequence[MergeableAdapter]) -> list[str]:
    """Return the sentences on privacy of each adapter under its name; none unless all have a promise."""
    said = [adapter.facts.get("privacy") or [] for adapter in adapters]
    if not all(map(promises, said)):
        return []
    return [
        f"{_name(adapter.folder)}: {sentence}"
        for adapter, own in zip(adapters, said, strict=True)
        for sentence in own
    ]


def _name(folder: Path) -> str:
    """Return the name of an adapter's folder, or of the run whose adapter it is."""
    whole = Path(os.path.abspath(folder))
    return named(whole.parent.name if whole.name == "adapter" else whole.name)


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
