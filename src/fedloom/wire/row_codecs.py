"""Encodings of rows of numbers: float32, 16 bits, or int8 with a scale for every row.

Rows are tokens (activations, gradients) or scored positions (logits). ``int8`` rounds each row to 255
levels between minus and plus its largest magnitude, which travels beside it as a float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedloom.tensors import Tensors
from fedloom.wire.schema import TensorSpec

Encoding = Literal["fp32", "bf16", "fp16", "int8"]

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}

LEVELS = 127
"""Of int8, on either side of zero."""


def row_specs(
    name: str, rows: int, width: int, encoding: Encoding, *, ragged: bool = False
) -> tuple[TensorSpec, ...]:
    """Return the specs of ``rows`` rows (at most, where ``ragged``) of ``width`` numbers."""
    values = TensorSpec(name, (rows, width), DTYPES[encoding], ragged)
    if encoding != "int8":
        return (values,)
    return (values, TensorSpec(f"{name}_scale", (rows,), torch.float32, ragged))


def pack_rows(name: str, rows: Tensor, encoding: Encoding) -> Tensors:
    """Return ``(rows, width)`` float32 as the tensors that are sent under ``name``."""
    rows = rows.detach().float().cpu()
    if encoding != "int8":
        return {name: rows.to(DTYPES[encoding])}
    scale = rows.abs().amax(-1) / LEVELS if rows.shape[-1] else rows.new_zeros(len(rows))
    levels = rows / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)
    return {name: levels.round().to(torch.int8), f"{name}_scale": scale}


def unpack_rows(name: str, tensors: Tensors, encoding: Encoding) -> Tensor:
    """Return what :func:`pack_rows` packed, ``(rows, width)`` float32."""
    rows = tensors[name].float()
    return rows if encoding != "int8" else rows * tensors[f"{name}_scale"].unsqueeze(-1)
