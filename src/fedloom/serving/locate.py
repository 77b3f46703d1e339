"""What a user names, a run folder or a saved folder, and the model that is meant by it.

Nothing in a folder is trusted: ``fedloom.json`` is checked key by key, of PEFT's configuration only kinds
that fedloom knows are put on a model, and weights are read from safetensors alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedloom.display.untrusted_text import named, quoted, short
from fedloom.errors import ModelError, OutputError
from fedloom.models.load import fingerprint
from fedloom.models.saved import FACTS, FolderKind, kind_of
from fedloom.models.saved_adapter import CONFIG, KINDS, PEFT_WEIGHTS, read_object
from fedloom.models.saved_facts import REVISION, checked_facts, is_line
from fedloom.runs.export import adapter_of
from fedloom.storage import run_folder as names
from fedloom.storage.run_folder import RunFolder

LONGEST_NAME = 100
"""Characters of a model's name as clients of a server give it."""

BASE = "base"
"""Instead of a folder: the base model itself."""


@dataclass(frozen=True)
class Located:
    """A model that can be loaded.

    Attributes:
        name: What it is called: the name of the run, or of the folder.
        folder: Where it was saved; none for a base model itself.
        kind: What the folder holds.
        base: Folder or Hub name of the base model; of a whole model, the folder.
        revision: Of the base on the Hub.
        tokenizer: Where its tokenizer is, and that one's revision.
        precise: Whether it is loaded in float32, not bfloat16.
        prompt: ``format``, ``example`` and ``template`` of its prompts, as its card has them.
    """

    name: str
    folder: Path | None
    kind: FolderKind
    base: str
    revision: str | None
    tokenizer: tuple[str, str | None]
    precise: bool
    prompt: Mapping[str, Any]


def locate(path: Path, client: int | None = None, base: str | None = None) -> Located:
    """Return the model that a folder stands for.

    Args:
        path: A run folder, or what ``fedloom run`` and ``fedloom export`` save: an adapter, a model; or a
            PEFT folder of somebody else's.
        client: Of a run folder, whose own model (default: the global one).
        base: Folder or Hub name of the base model (default: as the folder has it).

    Raises:
        OutputError: There is no such folder, or no such model in it.
        ModelError: It is no model that answers in words, it does not say on which base it is, or where
            that was there is another one now.
    """
    folder, name = path, path.resolve().name
    if (path / names.EXPERIMENT).is_file():
        folder = adapter_of(RunFolder.existing(path), client)
        name += "" if client is None else f"-client-{client}"
    elif client is not None:
        raise OutputError(f"{path} is not a run folder, so it has no client {client}")
    if not folder.is_dir():
        raise OutputError(f"there is no folder {folder}: give a run folder, or a saved adapter")
    kind = kind_of(folder)
    if kind == "gguf":
        raise ModelError(f"{folder} is for llama.cpp, which loads it: llama-server -m FILE.gguf")
    if kind == "model" and not (folder / "config.json").is_file():
        raise OutputError(
            f"{folder} is neither a run folder (it has no {names.EXPERIMENT}) nor a saved adapter or "
            f"model (no {CONFIG}, no config.json)"
        )
    facts = _facts(folder)
    if facts is not None and facts["task"] != "causal":
        raise ModelError(
            f"{path} is a classifier, which does not answer in words; fedloom evaluate scores it"
        )
    if kind in ("peft", "own parts"):
        _require_known(folder)
    where, revision = _base_of(folder, kind, facts, base)
    return Located(
        short(named(name), LONGEST_NAME),
        folder,
        kind,
        where,
        revision,
        _tokenizer_of(folder, kind, facts) or (where, revision),
        precise=facts is None or facts["precision"] != "bf16",
        prompt={"format": "unknown"} if facts is None else facts["prompt"],
    )


def base_alone(of: Located) -> Located:
    """Return the base model that a saved adapter is on, as a model of its own.

    Raises:
        ModelError: It is a whole model.
    """
    if of.kind == "model":
        raise ModelError(
            f"{of.name} is a whole model: name its base model's folder instead of {BASE}"
        )
    return Located(BASE, None, "model", of.base, of.revision, of.tokenizer, of.precise, of.prompt)


def _facts(folder: Path) -> dict[str, Any] | None:
    path = folder / FACTS
    if not path.is_file():
        return None
    return checked_facts(read_object(path, f"{path} is not what fedloom writes"), path)


def _require_known(folder: Path) -> None:
    """Check that PEFT makes of a configuration what fedloom makes of it, and reads safetensors.

    Raises:
        ModelError: It would not.
    """
    path = folder / CONFIG
    record = read_object(path, f"{path} is not a configuration of an adapter")
    if record.get("peft_type") not in KINDS:
        raise ModelError(
            f"{path}: peft_type is {quoted(record.get('peft_type'), 60)}; it is one of {', '.join(KINDS)}"
        )
    if not (folder / PEFT_WEIGHTS).is_file():  # PEFT would read pickled ones
        raise ModelError(f"{folder} has no {PEFT_WEIGHTS}: save the adapter with safetensors")


def _tokenizer_of(
    folder: Path, kind: FolderKind, facts: Mapping[str, Any] | None
) -> tuple[str, str | None] | None:
    """Return where the tokenizer of a whole model is, if that was saved without one."""
    if kind != "model" or facts is None or (folder / "tokenizer_config.json").is_file():
        return None
    return facts["base"]["path"], facts["base"]["revision"]


def _base_of(
    folder: Path, kind: FolderKind, facts: Mapping[str, Any] | None, base: str | None
) -> tuple[str, str | None]:
    """Return folder or Hub name of the base model, and its revision."""
    if kind == "model":
        if base is not None:
            raise ModelError(f"{folder} is a whole model: leave --base-model out")
        return str(folder), None
    if base is not None:
        return base, None
    if facts is not None:
        _require_same_base(folder, facts["base"])
        return facts["base"]["path"], facts["base"]["revision"]
    record = read_object(folder / CONFIG, f"{folder / CONFIG} is not a configuration")
    found, revision = record.get("base_model_name_or_path"), record.get("revision")
    if not isinstance(found, str) or not is_line(found, 4096):
        raise ModelError(
            f"{folder} does not say on which base model it is: give it with --base-model"
        )
    known = isinstance(revision, str) and bool(REVISION.fullmatch(revision))
    return found, revision if known else None


def _require_same_base(folder: Path, base: Mapping[str, Any]) -> None:
    """Check that the folder which a base model is said to lie in holds that one, as far as is known.

    Raises:
        ModelError: It holds another model, by the SHA-256.
    """
    path, digest = base["path"], base["sha256"]
    if digest is not None and os.path.isdir(path) and fingerprint(path) != digest:
        raise ModelError(
            f"{folder}: its base model has another SHA-256 than {path}, where it is said to be; give its "
            f"folder with --base-model, or {path} if that is meant"
        )
