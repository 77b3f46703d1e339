"""Several saved folders in memory at once: LoRA adapters of one base model are on one copy of it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from fedloom.models.load import load_backbone
from fedloom.models.peft_backends import BITSANDBYTES, TORCHAO, without
from fedloom.models.saved import FolderKind, loading, put_on
from fedloom.models.saved_adapter import CONFIG, HARMLESS_STARTS, read_object


@dataclass(frozen=True)
class OnBase:
    """A saved folder, and the base model that it is put on.

    Attributes:
        folder: What was saved; none for the base model itself.
        kind: What it holds; ``"model"`` for the base model itself.
        base: Folder or Hub name of the base; of a whole model, the folder itself.
        revision: Branch, tag or commit on the Hub.
        dtype: Of the weights.
    """

    folder: Path | None
    kind: FolderKind
    base: str
    revision: str | None
    dtype: torch.dtype

    @property
    def shares(self) -> bool:
        """Whether it can be on a backbone with others: the base itself, and LoRA in PEFT's format.

        Not so what changes the frozen weights: biases that were trained, and ways to begin such as PiSSA.

        Raises:
            ModelError: Its configuration cannot be read.
        """
        if self.kind == "model":
            return True
        if self.kind != "peft" or self.folder is None:
            return False
        path = self.folder / CONFIG
        config = read_object(path, f"{path} is not a configuration of an adapter")
        return (
            config.get("peft_type") == "LORA"
            and not config.get("modules_to_save")
            and config.get("bias", "none") == "none"
            and config.get("init_lora_weights", True) in HARMLESS_STARTS
        )

    @property
    def backbone(self) -> tuple[str, str | None, torch.dtype]:
        """What says which backbone it is on."""
        return self.base, self.revision, self.dtype


class SavedTogether:
    """Models that answer one at a time, as they may share a backbone.

    Attributes:
        backbones: How many copies of base models are in memory.
    """

    def __init__(self, saved: Sequence[OnBase], device: torch.device) -> None:
        """Load them.

        Raises:
            ModelError: A base model cannot be loaded, or a folder is damaged or does not fit its own.
        """
        self._saved = tuple(saved)
        self._models: list[nn.Module] = []
        self._names: list[str | None] = []
        shared: dict[Any, nn.Module] = {}
        self.backbones = 0
        for number, one in enumerate(saved):
            model = shared.get(one.backbone) if one.shares else None
            if model is None:
                model, self.backbones = _backbone(one, device), self.backbones + 1
            name = None
            if one.kind != "model" and one.folder is not None:
                name = f"adapter{number}" if one.shares else None
                model = _attached(model, one, name).to(device)
            if one.shares:
                self._replace(shared.get(one.backbone), model)
                shared[one.backbone] = model
            self._models.append(model.eval())
            self._names.append(name)

    def _replace(self, before: nn.Module | None, model: nn.Module) -> None:
        """Have the base model itself answer through the adapters that were put on it later."""
        self._models = [model if own is before else own for own in self._models]

    @contextlib.contextmanager
    def active(self, number: int) -> Iterator[nn.Module]:
        """Yield a model, its adapter and no other one switched on, until the block ends."""
        model, name = self._models[number], self._names[number]
        own: Any = model
        with contextlib.ExitStack() as stack:
            if name is not None:
                own.set_adapter(name)
            elif self._saved[number].kind == "model" and isinstance(model, peft.PeftModel):
                stack.enter_context(own.disable_adapter())
            yield model


def _backbone(one: OnBase, device: torch.device) -> nn.Module:
    return load_backbone(
        one.base,
        revision=one.revision,
        dtype=one.dtype,
        pad_token_id=0,  # read of classifiers alone
        device=device,
    )


def _attached(model: nn.Module, one: OnBase, name: str | None) -> nn.Module:
    """Return a model with one more adapter, or a saved folder of another kind, on it."""
    assert one.folder is not None
    if name is None:
        with loading(one.folder, one.base):
            return put_on(model, one.folder, one.kind)
    with loading(one.folder, one.base), warnings.catch_warnings(), without(BITSANDBYTES, TORCHAO):
        warnings.simplefilter("ignore")
        if isinstance(model, peft.PeftModel):
            own: Any = model
            own.load_adapter(str(one.folder), adapter_name=name)
            return model
        peft_model: nn.Module = peft.PeftModel.from_pretrained(
            model, str(one.folder), adapter_name=name
        )
    return peft_model
