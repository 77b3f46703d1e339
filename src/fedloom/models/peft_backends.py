"""PEFT without bitsandbytes and torchao, where no layer of a model can be one of theirs.

PEFT imports bitsandbytes wherever it is installed, as it is imported itself and as it puts LoRA on a
model, and then torchao as well; either takes a second of every run. A model has layers of theirs only if
something has imported them before, as loading a quantised model does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

BITSANDBYTES, TORCHAO = "bitsandbytes", "torchao"


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Let packages count as not installed, those that are not imported already."""
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    _forget(hidden)
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        _forget(hidden)


def _forget(names: list[str]) -> None:
    """Have PEFT and transformers find out again whether they are there: they remember it for good."""
    told = [*names, *(["bnb"] if BITSANDBYTES in names else [])]
    for module in ("peft.import_utils", "transformers.utils.import_utils"):
        for name, found in list(vars(sys.modules.get(module, object)).items()):
            if any(own in name for own in told) and hasattr(found, "cache_clear"):
                found.cache_clear()
