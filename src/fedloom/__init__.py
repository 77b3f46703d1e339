"""fedloom: fine-tune and align language models across parties whose data must not leave them.

The public names are loaded when first used, so ``import fedloom`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    from fedloom.commands.api import (
        ComparisonResult,
        compare,
        evaluate,
        export,
        partition,
        report,
        resume,
        run,
    )
    from fedloom.errors import FedloomError
    from fedloom.experiment.experiment import Experiment
    from fedloom.methods.contract.method import Method
    from fedloom.objectives.base import Objective
    from fedloom.runs.adapter_scores import HeldOutScores
    from fedloom.runs.result import Result

__version__ = "0.1.0"

_MODULES = {
    "ComparisonResult": "fedloom.commands.api",
    "Experiment": "fedloom.experiment.experiment",
    "FedloomError": "fedloom.errors",
    "HeldOutScores": "fedloom.runs.adapter_scores",
    "Method": "fedloom.methods.contract.method",
    "Objective": "fedloom.objectives.base",
    "Result": "fedloom.runs.result",
    "compare": "fedloom.commands.api",
    "evaluate": "fedloom.commands.api",
    "export": "fedloom.commands.api",
    "partition": "fedloom.commands.api",
    "report": "fedloom.commands.api",
    "resume": "fedloom.commands.api",
    "run": "fedloom.commands.api",
}

__all__ = [
    "ComparisonResult",
    "Experiment",
    "FedloomError",
    "HeldOutScores",
    "Method",
    "Objective",
    "Result",
    "__version__",
    "compare",
    "evaluate",
    "export",
    "partition",
    "report",
    "resume",
    "run",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the file it lives in."""
    if name in _MODULES:
        return getattr(_imported(_MODULES[name]), name)
    raise AttributeError(f"module 'fedloom' has no attribute {name!r}")


def _imported(name: str) -> ModuleType:
    from fedloom.accounting.garbage import without_collection

    with without_collection():
        return importlib.import_module(name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
