"""Models that bring Python code of their own (``trust_remote_code``): always refused, never imported."""

from __future__ import annotations

import json
from pathlib import Path

from fedloom.errors import ModelError

AUTO_MAP = "auto_map"
"""Where a configuration names classes that lie beside the weights."""

CONFIGURATIONS = ("config.json", "tokenizer_config.json", "processor_config.json")
"""Files of a model's folder that may name code."""


def require_no_code(path: str) -> None:
    """Check that a model's folder names no code of its own, by its configurations as plain JSON.

    Raises:
        ModelError: It does; nothing of it has been imported.
    """
    for name in CONFIGURATIONS:
        try:
            content = json.loads((Path(path) / name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # absent, or for the loader to complain about
            continue
        if isinstance(content, dict) and AUTO_MAP in content:
            raise needs_code(path)


def needs_code(path: str) -> ModelError:
    """Return the refusal of a model that brings code of its own."""
    return ModelError(
        f"the model {path} needs code of its own, which is never run; take one whose architecture "
        f"transformers knows ({AUTO_MAP} in its configuration names the code)"
    )


def asks_to_run_code(error: Exception) -> bool:
    """Return whether a loader fails since it may not run what comes with a model on the Hub."""
    return "trust_remote_code" in str(error)
