"""Memory that training takes on a client with a given model; ``accounting/memory.py`` estimates it."""

from __future__ import annotations

from fedloom.accounting.memory import training_memory
from fedloom.data.batches import TokenShare
from fedloom.models.adapters import AdapterModel
from fedloom.models.cut import FrontHalf
from fedloom.models.quantize import Quantization, quantized_bytes
from fedloom.training.optimizers import TrainingSettings


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
