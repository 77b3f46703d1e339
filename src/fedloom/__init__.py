"""fedloom: fine-tune and align language models across parties whose data must not leave them.

The public names are loaded when first used, so ``import fedloom`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedloom.errors import FedloomError
    from fedloom.experiment import Experiment
    from fedloom.objectives.base import Objective
    from fedloom.runner import RunResult, run
    from fedloom.runner import resume_run as resume

__version__ = "0.1.0"

_HOMES = {
    "Experiment": ("fedloom.experiment", "Experiment"),
    "FedloomError": ("fedloom.errors", "FedloomError"),
    "Objective": ("fedloom.objectives.base", "Objective"),
    "RunResult": ("fedloom.runner", "RunResult"),
    "resume": ("fedloom.runner", "resume_run"),
    "run": ("fedloom.runner", "run"),
}

__all__ = ["Experiment", "FedloomError", "Objective", "RunResult", "__version__", "resume", "run"]


def __getattr__(name: str) -> Any:
    """Load a public name from the file it lives in."""
    if name in _HOMES:
        module, own = _HOMES[name]
        return getattr(importlib.import_module(module), own)
    raise AttributeError(f"module 'fedloom' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
