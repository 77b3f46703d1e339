"""PEFT without bitsandbytes, where no layer of a model can be one of its.

PEFT imports bitsandbytes wherever it is installed, as it is imported itself and as it puts LoRA on a
model, and that takes a second of every run. A model has layers of it only if something has imported it
before, as loading a quantised model does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

NAME = "bitsandbytes"


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """Let bitsandbytes count as not installed, unless it is imported already."""
    if NAME in sys.modules:
        yield
        return
    sys.modules[NAME] = None  # type: ignore[assignment]
    _forget()
    try:
        yield
    finally:
        del sys.modules[NAME]
        _forget()


def _forget() -> None:
    """Have PEFT and transformers find out again whether it is there: they remember it for good."""
    for module in ("peft.import_utils", "transformers.utils.import_utils"):
        for name, found in list(vars(sys.modules.get(module, object)).items()):
            if ("bnb" in name or NAME in name) and hasattr(found, "cache_clear"):
                found.cache_clear()
