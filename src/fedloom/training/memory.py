"""Memory on a client: what training takes at most, and what to do where it does not suffice."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import TypeVar

import torch

from fedloom.accounting.memory import training_memory
from fedloom.data.batches import TokenShare
from fedloom.models.adapters import AdapterModel
from fedloom.models.cut import FrontHalf
from fedloom.models.quantize import Quantization, quantized_bytes
from fedloom.training.optimizers import TrainingSettings

LOG = logging.getLogger(__name__)
Result = TypeVar("Result")


def fitting(work: Callable[[int], Result], size: int, who: str) -> Result:
    """Return ``work(size)``, begun again with half the size for as long as memory does not suffice.

    Args:
        work: What is to be done, so many examples at a time; leaves nothing behind where it fails.
        size: Examples at a time, to begin with.
        who: Of whom the warning speaks.

    Raises:
        MemoryError: One example does not fit.
    """
    while True:
        try:
            return work(size)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise MemoryError("not even one example at a time fits into memory") from error
        size = max(1, size // 2)
        LOG.warning(
            "%s: out of memory; begins again with %d example%s at a time, and the same results up to "
            "rounding: training.micro_batch_size = %d says so from the start",
            who,
            size,
            "s" if size > 1 else "",
            size,
        )
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory does not suffice, on a GPU or here."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def asked_for(error: BaseException) -> str:
    """Return how much was asked for when memory did not suffice, as the error says it, or nothing."""
    found = re.search(r"allocate (?:(\d+) bytes|([\d.]+ [KMGT]iB))", str(error))
    if found is None:
        return ""
    amount = f"{int(found[1]) / 1e9:.1f} GB" if found[1] else found[2]
    return f" ({amount} were asked for at once)"


def client_memory(
    model: AdapterModel, share: TokenShare, training: TrainingSettings, quantization: Quantization
) -> float:
    """Return bytes that training on ``share`` takes at most, derived.

    Args:
        model: What the client computes with, whole or its front half; it may be empty (on ``meta``).
        share: The client's rows; the longest sets the size of a batch.
        training: Batch size, optimizer and precision.
        quantization: Of the frozen weights.
    """
    sequences = min(training.micro_batch, len(share)) * share.tokens.width
    tokens = sequences * (int(share.tokens.lengths.max()) + model.virtual_tokens)
    headless = isinstance(model, FrontHalf) and model.ending is None
    return training_memory(
        model.shape,
        weights=quantized_bytes(model.model, quantization),
        trained=sum(p.numel() for p in model.parameters.values()),
        optimizer=training.optimizer,
        tokens=tokens,
        head_positions=0 if headless else tokens,
        element=2 if training.precision == "bf16" else 4,
    )
