"""The frozen backbone in 8 or 4 bits, so that a larger one fits; the adapter stays in full precision.

On a GPU: bitsandbytes (LLM.int8, Dettmers et al. 2022, https://arxiv.org/abs/2208.07339; 4-bit NF4 as in
QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314). On a CPU: torch's own int8 weight-only
quantisation (torchao), one scale a row. The output layer and embeddings are left as they are.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import nn

from fedloom.errors import ModelError

Quantization = Literal["none", "int8", "int4"]

EXTRA = 'pip install "fedloom[quantization]"'

KEPT = ("lm_head", "score", "embed_out", "classifier")
"""Output layers, which keep their precision."""


def check_quantization(kind: Quantization, device: torch.device) -> None:
    """Say before anything is loaded that a device cannot do what is asked.

    Raises:
        ModelError: 4 bits without a GPU, a device without any quantisation, or a missing library.
    """
    if kind == "none":
        return
    if device.type not in ("cuda", "cpu"):
        raise ModelError(
            f'model.quantization = "{kind}" works on cuda and cpu, not on {device.type}'
        )
    if kind == "int4" and device.type == "cpu":
        raise ModelError(
            'model.quantization = "int4" needs a GPU (bitsandbytes NF4); on a CPU use "int8"'
        )
    _import("bitsandbytes" if device.type == "cuda" else "torchao.quantization", kind)


def loading_options(kind: Quantization, device: torch.device) -> dict[str, Any]:
    """Return what ``from_pretrained`` needs to quantise while it loads (GPU); nothing elsewhere."""
    if kind == "none" or device.type != "cuda":
        return {}
    from transformers import BitsAndBytesConfig

    config: Any = BitsAndBytesConfig
    chosen = (
        config(load_in_8bit=True)
        if kind == "int8"
        else config(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    )
    return {"quantization_config": chosen, "device_map": {"": device}}


def quantize_loaded(model: nn.Module, kind: Quantization, device: torch.device) -> nn.Module:
    """Quantise the linear layers of a loaded model in place (CPU); return it."""
    if kind == "none" or device.type != "cpu":
        return model
    torchao = _import("torchao.quantization", kind)

    def inside(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and name.rpartition(".")[2] not in KEPT

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao announces changes of its next version
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=inside)
    return model


def quantized_bytes(model: nn.Module, kind: Quantization) -> int:
    """Return the bytes of a model's frozen weights under a quantisation, from their shapes."""
    total = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            continue
        inside = parameter.dim() == 2 and ".weight" in name and not _is_kept(name)
        size = (
            {"int8": 1.0, "int4": 0.5}.get(kind, parameter.element_size())
            if inside
            else (parameter.element_size())
        )
        total += int(parameter.numel() * size)
    return total


def _is_kept(name: str) -> bool:
    """Return whether a weight keeps its precision: embeddings and output layers."""
    return any(part in KEPT or part.startswith(("embed", "wte", "wpe")) for part in name.split("."))


def _import(module: str, kind: Quantization) -> Any:
    import importlib

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ModelError(
            f'model.quantization = "{kind}" needs {package}, which is not installed: {EXTRA}'
        ) from error
