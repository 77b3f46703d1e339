"""The frozen weights under LoRA's factors, for methods that move them between rounds.

A change is kept apart and added to the weights as they were loaded, so moving a model twice is
exact, moving it back costs nothing, and the reference model stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
from torch import Tensor, nn

from fedloom.tensors import Tensors

MOVED = "moved."
"""How the names of changes begin: ``moved.LAYER``, ``(outputs, inputs)`` float32."""


class FrozenWeights:
    """The weights that LoRA's factors are beside.

    Attributes:
        changes: What they are moved by now; empty where they are as they were loaded.
    """

    def __init__(self, model: nn.Module) -> None:
        """Look at a PEFT model; one without LoRA has none."""
        self.changes: Tensors = {}
        self._model = model
        self._layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if hasattr(module, "lora_A")
        }
        self._loaded: dict[str, nn.Parameter] = {}

    def move(self, changes: Tensors) -> None:
        """Let the weights be those that were loaded plus ``changes``, by name; without one, as loaded."""
        for name in self.changes.keys() - changes.keys():
            self._bare(name).weight = self._loaded[name]
        for name, change in changes.items():
            if change is not self.changes.get(name):
                bare = self._bare(name)
                loaded = self._loaded.setdefault(name, bare.weight)
                own = change.T if self._layer(name).fan_in_fan_out else change
                moved = (loaded.float() + own.to(loaded.device)).to(loaded.dtype)
                # A parameter of its own: blocks may have one in common (Zamba), and each its own factors.
                bare.weight = nn.Parameter(moved, requires_grad=False)
        self.changes = dict(changes)

    @contextmanager
    def as_loaded(self) -> Iterator[None]:
        """Inside, the weights are those that were loaded."""
        moved = {name: self._bare(name).weight for name in self.changes}
        for name in moved:
            self._bare(name).weight = self._loaded[name]
        try:
            yield
        finally:
            for name, weight in moved.items():
                self._bare(name).weight = weight

    def read(self) -> Tensors:
        """Return the weights as they are now by their layers' names, ``(outputs, inputs)`` float32."""
        return {name: self._straight(name, self._bare(name).weight) for name in self._layers}

    @contextmanager
    def with_gradients(self) -> Iterator[Callable[[], Tensors]]:
        """Inside, backward passes leave gradients of the weights; yield what reads them as :meth:`read`.

        Without dropout, of adapter and backbone alike.
        """
        weights = {name: self._bare(name).weight for name in self._layers}
        training = [module for module in self._model.modules() if module.training]
        self._model.eval()
        for weight in weights.values():
            weight.requires_grad_(True)
        try:
            yield lambda: {name: self._straight(name, w.grad) for name, w in weights.items()}
        finally:
            for weight in weights.values():
                weight.requires_grad_(False).grad = None
            for module in training:
                module.training = True

    def _straight(self, name: str, weight: Tensor) -> Tensor:
        own = weight.T if self._layer(name).fan_in_fan_out else weight
        return own.detach().float().cpu().clone()

    def save(self, model: peft.PeftModel, folder: Path) -> None:
        """Write the layers themselves, factors merged into them, in PEFT's format for whole layers.

        A LoRA folder could not hold moved weights; this one loads the same way.
        """
        before: Any = model.peft_config["default"]
        targets = [name.removeprefix("base_model.model.") for name in self._layers]
        config = peft.LNTuningConfig(
            task_type=before.task_type,
            base_model_name_or_path=before.base_model_name_or_path,
            target_modules=targets,
            modules_to_save=None if before.task_type == "SEQ_CLS" else before.modules_to_save,
            inference_mode=True,
        )
        tensors = {}
        for name, layer in self._layers.items():
            base = layer.get_base_layer()
            whole = base.weight.float() + layer.get_delta_weight("default")
            tensors[f"{name}.ln_tuning_layers.weight"] = whole.to(base.weight.dtype)
            if getattr(base, "bias", None) is not None:
                tensors[f"{name}.ln_tuning_layers.bias"] = base.bias
        for name, parameter in model.named_parameters():
            if ".modules_to_save.default." in name:
                tensors[name.replace(".modules_to_save.default", "")] = parameter
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        safetensors.torch.save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            folder / "adapter_model.safetensors",
            metadata={"format": "pt"},
        )

    def _layer(self, name: str) -> Any:
        return self._layers[name.removeprefix(MOVED)]

    def _bare(self, name: str) -> Any:
        """Return the linear layer itself, under its factors."""
        return self._layer(name).get_base_layer()


def products(factors: Tensors, scaling: float) -> Tensors:
    """Return what LoRA's factors add to the frozen weights: ``moved.LAYER`` to s B A, float32.

    Args:
        factors: A, ``(rank, inputs)``, and B, ``(outputs, rank)``, by their names in a PEFT folder.
        scaling: s, alpha / rank of the configuration.
    """
    return {
        MOVED + name.partition(".lora_A.")[0]: scaling
        * (factors[name.replace(".lora_A.", ".lora_B.")].float() @ down.float())
        for name, down in factors.items()
        if ".lora_A." in name
    }
