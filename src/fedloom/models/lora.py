"""LoRA on a frozen backbone, through PEFT, and its tensors by name.

Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models",
https://arxiv.org/abs/2106.09685. The tensors are read and written in place: PEFT's own state-dict
functions take milliseconds each time, a copy into the parameter microseconds.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from pydantic import Field
from safetensors import SafetensorError
from torch import Tensor, nn

from fedloom.accounting.flops import backward_flops, forward_flops
from fedloom.errors import ModelError
from fedloom.messages import Tensors
from fedloom.models.shape import is_linear, model_shape
from fedloom.randomness import derive_seed
from fedloom.settings import Settings


class AdapterSettings(Settings):
    """``[adapter]``: what is trained on the frozen backbone."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1)
    """Rank r of the two factors."""
    alpha: float = Field(default=16.0, gt=0)
    """The update is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the adapter's inputs set to zero while training."""
    targets: str | list[str] = "all-linear"
    """Layers that get an adapter: "all-linear", or names such as ["q_proj", "v_proj"]."""


class AdapterModel:
    """One frozen backbone with one adapter whose tensors are written in and read out.

    Calling it is the backbone's forward pass under the chosen precision. Every pass adds its
    derived FLOPs to :attr:`flops`, so nobody has to count who calls it.

    Attributes:
        model: The PEFT model.
        parameters: The trained tensors by their name in a PEFT folder, sorted by name.
        device: Where the model is.
        pad: Token id for padding.
        flops: FLOPs of all passes so far, derived from shapes.
    """

    def __init__(
        self,
        model: peft.PeftModel,
        pad: int,
        autocast: torch.dtype | None = None,
        checkpointed: bool = False,
    ) -> None:
        """Wrap a PEFT model.

        Args:
            model: With one adapter.
            pad: Token id for padding.
            autocast: Dtype of mixed precision, ``None`` for none.
            checkpointed: Whether gradient checkpointing repeats the forward pass.
        """
        self.model = model
        self.pad = pad
        self.autocast = autocast
        self.checkpointed = checkpointed
        self.device = next(model.parameters()).device
        trained = {_peft_name(n): p for n, p in model.named_parameters() if p.requires_grad}
        self.parameters: dict[str, nn.Parameter] = dict(sorted(trained.items()))
        self.shape = model_shape(model)
        self.flops = 0.0

    def __call__(self, *, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """Run the model; ``logits_to_keep`` limits the LM head to the last columns."""
        rows, length = input_ids.shape
        positions = int(options.get("logits_to_keep", 0)) or length
        forward = forward_flops(self.shape, rows, length, positions)
        self.flops += forward
        if torch.is_grad_enabled():
            self.flops += backward_flops(self.shape, rows, length, positions)
            self.flops += forward if self.checkpointed else 0.0
        with self._precision():
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **options)

    def read(self) -> Tensors:
        """Return copies of the trained tensors on the CPU."""
        return {n: p.detach().to("cpu", copy=True) for n, p in self.parameters.items()}

    def write(self, tensors: Tensors) -> None:
        """Copy ``tensors`` (all of them, same names and shapes) into the trained parameters."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Switch the adapter off: inside, the model is the frozen base model."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad(), self.model.disable_adapter():
            yield
        self.model.train(was_training)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch dropout and gradients off."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            yield
        self.model.train(was_training)

    def save(self, folder: Path) -> None:
        """Write a folder that ``PeftModel.from_pretrained`` loads."""
        self.model.save_pretrained(str(folder), save_embedding_layers=False)

    def _precision(self) -> Any:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, self.autocast)


def attach_lora(
    backbone: nn.Module, settings: AdapterSettings, *, classification: bool = False, seed: int = 0
) -> peft.PeftModel:
    """Put LoRA on the target layers; A is random from ``seed``, B zero, the backbone frozen.

    Args:
        backbone: A Hugging Face model with frozen weights.
        settings: Rank, alpha, dropout and targets.
        classification: Whether the output layer is a classification head, which is then trained too.
        seed: The experiment's seed.

    Raises:
        ModelError: No layer matches the targets; those that could are listed.
    """
    targets = settings.targets
    if targets != "all-linear":
        targets = [targets] if isinstance(targets, str) else targets
        _check_targets(backbone, targets)
    config = peft.LoraConfig(
        task_type="SEQ_CLS" if classification else "CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides by it, any number will do
        lora_dropout=settings.dropout,
        target_modules=targets,
    )
    with torch.random.fork_rng(devices=[]), _quiet_peft():
        torch.manual_seed(derive_seed(seed, "adapter"))
        return peft.get_peft_model(backbone, config)


def load_lora(backbone: nn.Module, folder: Path) -> peft.PeftModel:
    """Put a saved adapter on a backbone.

    Raises:
        ModelError: ``folder`` is no PEFT folder, or one for another model.
    """
    if not (folder / "adapter_config.json").is_file():
        raise ModelError(f"{folder} is no adapter: it has no adapter_config.json")
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{folder} has no adapter_model.safetensors; pickled weights are not read")
    try:
        with _quiet_peft():
            return peft.PeftModel.from_pretrained(backbone, str(folder), is_trainable=True)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the adapter {folder} does not fit this model: {reason}") from error


@contextmanager
def _quiet_peft() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT 0.21 reads a property that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        # Of a quantised backbone: PEFT could not merge the adapter into it, which nobody asks for.
        warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated", UserWarning)
        yield


def _peft_name(name: str) -> str:
    """Return a parameter's name as it stands in ``adapter_model.safetensors``."""
    return name.replace(".modules_to_save.default", "").replace(".default", "")


def _check_targets(backbone: nn.Module, targets: list[str]) -> None:
    linears = [name for name, module in backbone.named_modules() if is_linear(module)]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            leaves = sorted({re.sub(r".*\.", "", name) for name in linears})
            raise ModelError(
                f"adapter.targets {target!r} matches no linear layer of this model; "
                f'it has: {", ".join(leaves)} (or write "all-linear")'
            )
