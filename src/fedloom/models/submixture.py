"""A part of the experts that a backbone has itself: a client's sub-mixture, trained whole.

For backbones whose blocks hold a router and a stack of experts, as ``transformers`` lays out Mixtral,
Qwen's and OLMoE: the router's weight has a row for each expert, and the experts' weights are stacks of
three dimensions. A sub-mixture has some of these rows and slices and is an ordinary, smaller model of
the same kind: its router knows no other experts, so what it computes is what such a model would.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.errors import ModelError
from fedloom.models.adapters import AdapterModel
from fedloom.models.flop_shape import expert_blocks
from fedloom.tensors import Tensors

COUNTS = ("num_local_experts", "num_experts")
"""What configurations call the number of experts."""


class SubMixtureModel(AdapterModel):
    """A frozen backbone whose own experts and routers are trained, all of them or some.

    Attributes:
        blocks: Names of the blocks with experts, in order.
        experts: Experts of a block in the backbone as it was loaded.
        top_k: Experts that a token passes.
    """

    unmergeable = "a sub-mixture is a model by itself, with fewer experts than the backbone"

    def __init__(
        self,
        model: nn.Module,
        pad: int,
        autocast: torch.dtype | None = None,
        checkpointed: bool = False,
    ) -> None:
        """Wrap what :func:`attach_submixture` returned."""
        found = expert_blocks(model)
        self._parts = found
        self.blocks = tuple(found)
        first = next(iter(found.values()))
        self.experts, self.top_k = len(first.gate.weight), int(first.gate.top_k)
        self._seen: list[Tensor] | None = None
        self._mask: Tensor | None = None
        for block in found.values():
            block.gate.register_forward_hook(self._note)
        super().__init__(model, pad, autocast, checkpointed)  # type: ignore[arg-type]
        self._loaded = {
            name: nn.Parameter(parameter.detach().clone(), requires_grad=False)
            for name, parameter in self.parameters.items()
        }
        self._shape_loaded = self.shape

    def _run(self, input_ids: Tensor, real: Tensor, **options: Any) -> Any:
        """Run the model; see :class:`AdapterModel`."""
        self._mask = real
        return super()._run(input_ids, real, **options)

    def hold(self, parameters: dict[str, nn.Parameter]) -> None:
        """Compute with these from now on, however many experts they are; see :class:`AdapterModel`."""
        super().hold(parameters)
        for block in self._parts.values():
            block.gate.num_experts = block.experts.num_experts = len(block.gate.weight)

    @contextmanager
    def counting(self) -> Iterator[list[Tensor]]:
        """Inside, collect ``(blocks of the pass, held)`` numbers of real tokens that pass each expert.

        One tensor ``(held,)`` a block and pass, in the order in which they are run.
        """
        self._seen = []
        try:
            yield self._seen
        finally:
            self._seen = None

    def save(self, folder: Path) -> None:
        """Write a model that ``transformers`` loads, with as many experts as are held."""
        config: Any = self.model.config
        name = next(name for name in COUNTS if hasattr(config, name))
        before = getattr(config, name), config.use_cache
        setattr(config, name, len(next(iter(self._parts.values())).gate.weight))
        config.use_cache = True  # off while it is trained; who loads it generates
        try:
            anyone: Any = self.model
            anyone.save_pretrained(str(folder))
        finally:
            setattr(config, name, before[0])
            config.use_cache = before[1]

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        """Inside, the experts are those that were loaded, all of them, and count as such."""
        own, shape = self.parameters, self.shape
        self.hold(self._loaded)
        self.shape = self._shape_loaded
        try:
            yield
        finally:
            self.hold(own)
            self.shape = shape

    def _note(self, gate: Any, inputs: Any, output: Any) -> None:
        if self._seen is None:
            return
        chosen = output[-1]  # (tokens, k)
        real = self._mask.flatten().bool() if self._mask is not None else slice(None)
        self._seen.append(torch.bincount(chosen[real].flatten(), minlength=len(gate.weight)).cpu())


def attach_submixture(backbone: nn.Module) -> nn.Module:
    """Let a frozen backbone's own experts and routers be trained.

    Raises:
        ModelError: It has no experts, or none in a known layout, or not everywhere the same number.
    """
    blocks = expert_blocks(backbone)
    if not blocks or not all(hasattr(block.gate, "weight") for block in blocks.values()):
        config: Any = backbone.config
        raise ModelError(
            'adapter.kind = "submixture" trains the experts that a backbone has itself, as Mixtral, '
            f"Qwen's and OLMoE have; this model is {config.model_type!r} and has none"
        )
    counts = {len(block.gate.weight) for block in blocks.values()}
    if len(counts) > 1:
        raise ModelError(f"blocks have different numbers of experts: {sorted(counts)}")
    for block in blocks.values():
        for parameter in (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj):
            parameter.data = parameter.data.float()  # small steps are lost in half precision
            parameter.requires_grad_(True)
    return backbone


def part_of_experts(tensors: Tensors, blocks: tuple[str, ...], held: Tensor) -> Tensors:
    """Return the slices of ``tensors`` that belong to held experts.

    Args:
        tensors: Stacks of all experts, by name.
        blocks: Their order.
        held: ``(blocks, n)`` ids.
    """
    return {name: tensor[held[block_number(name, blocks)]] for name, tensor in tensors.items()}


def block_number(name: str, blocks: tuple[str, ...]) -> int:
    """Return the place of the block that a tensor belongs to."""
    return next(number for number, block in enumerate(blocks) if name.startswith(f"{block}."))
