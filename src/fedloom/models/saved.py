"""A saved folder of any kind on a backbone, as its model card says that it is loaded.

====================  ==================================================================================
``model``             a whole model: an export, or a sub-mixture; ``transformers`` alone
``peft``              an adapter; ``transformers`` and PEFT alone
``own parts``         an adapter with a client's own parts beside it, which PEFT does not know
``experts``           mixtures of LoRA experts, which no other library knows
``gguf``              a whole model in one file; llama.cpp
====================  ==================================================================================
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from torch import nn

from fedloom.errors import ModelError, first_line
from fedloom.models.experts import CONFIG, load_experts
from fedloom.models.heads import FILE, attach_personal, load_personal, saved_parts
from fedloom.models.load import load_backbone, load_tokenizer
from fedloom.models.peft_backends import BITSANDBYTES, TORCHAO, without

FolderKind = Literal["model", "peft", "own parts", "experts", "gguf"]

FACTS = "fedloom.json"
"""What is known of a saved folder, beside its weights: all that its card says."""

CLASSIFIER = "classifier.json"
"""Configuration of a classifier's base with the names of the classes, which PEFT does not save."""


def kind_of(folder: Path) -> FolderKind:
    """Return what a saved folder holds."""
    if (folder / CONFIG).is_file():
        return "experts"
    if not (folder / "adapter_config.json").is_file():
        return "gguf" if any(folder.glob("*.gguf")) else "model"
    return "own parts" if (folder / FILE).is_file() else "peft"


def put_on(backbone: nn.Module, folder: Path, kind: FolderKind) -> nn.Module:
    """Return a backbone with a saved folder on it.

    Args:
        backbone: As ``transformers`` loads it.
        folder: No whole model.
        kind: As what it is loaded; with own parts as ``"peft"``, it is loaded without them.
    """
    if kind == "experts":
        return load_experts(backbone, folder)[0]
    with warnings.catch_warnings(), without(BITSANDBYTES, TORCHAO):
        warnings.simplefilter("ignore")  # what they are about would show in what the model says
        model: nn.Module = peft.PeftModel.from_pretrained(backbone, str(folder))
    if kind == "own parts":
        head = attach_personal(model, saved_parts(folder), seed=0)
        load_personal(head, folder)
        head.requires_grad_(False)
    return model.eval()


@contextmanager
def loading(folder: Path, base: str) -> Iterator[None]:
    """Have whatever goes wrong as a saved folder is put on its base be one error; memory's pass.

    Raises:
        ModelError: The folder is damaged, or does not fit the base; both are named.
    """
    try:
        yield
    except (ModelError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # PEFT and a model's code raise whatever they like
        if "can't allocate memory" in str(error):
            raise
        raise ModelError(
            f"{folder} does not fit {base}, or is damaged: {first_line(error)}; give its base with "
            "--base-model, in Python base="
        ) from error


def load(folder: str | Path, base: str | None = None) -> tuple[Any, Any]:
    """Return the model of a saved causal folder of any kind, ready to generate, and its tokenizer.

    Args:
        folder: An adapter that a run left, or a client's own model.
        base: Folder or Hub name of the base model (default: as ``fedloom.json`` in the folder has it).

    Raises:
        ModelError: The folder or its base cannot be loaded, or nothing says which that is.
    """
    folder = Path(folder)
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        base, revision = base or str(facts["base"]["path"]), facts["base"]["revision"]
        dtype = torch.bfloat16 if facts["precision"] == "bf16" else torch.float32
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{folder} has no {FACTS} that can be read ({type(error).__name__}): give a folder that "
            "fedloom has written"
        ) from error
    tokenizer = load_tokenizer(base, revision)
    pad = int(tokenizer.pad_token_id)
    backbone = load_backbone(base, revision=revision, dtype=dtype, pad_token_id=pad)
    with loading(folder, base):
        return put_on(backbone, folder, kind_of(folder)), tokenizer
