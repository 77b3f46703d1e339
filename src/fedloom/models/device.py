"""The device that computes."""

from __future__ import annotations

import os

import torch

from fedloom.errors import ModelError, first_line


def choose_device(name: str) -> torch.device:
    """Return the device a setting names; "auto" is a GPU where there is one.

    Raises:
        ModelError: There is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise ModelError(
            f'training.device {name!r}: {reason}; "auto" takes what there is'
        ) from error
    if device.type == "cuda":  # the same bits need these two on a GPU
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    return device
