"""Mixtures of LoRA experts beside frozen linear layers, with the experts themselves as the router.

Source: Zhang et al. 2024, FedAMoLE, https://arxiv.org/abs/2411.19128, as in the authors' code
(``specs/methods.md`` 5.1). A layer has a token projection P, a shared expert that every token passes, and
any number of domain experts, known by their ids. For a token x, with rank r and scaling s:

    t = P x,  u_e = A_e x,  p = softmax_e(<u_e, t> / sqrt(r)),  g = the k largest of p, adding up to 1
    y = W_0 x + s B_s A_s drop(x) + sum_e g_e s B_e A_e drop(x)

so there is no router beside P and the experts' own down-projections, and it works for any number of
them. The balance term of a sequence is n sum_e mean(p_e) f_e, with f_e the share of its tokens that
expert e is among the k of; padding counts in neither. It is a mean over sequences (at the paper's batch
of one that is the paper's), so it does not depend on how a batch is cut.

All down-projections are one product and all up-projections another: a token's gates are zero for the
experts it does not pass.

Legend: b sequences, l columns, n experts, r rank.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fedloom.errors import ModelError
from fedloom.models.adapters import AdapterModel, AdapterSettings, target_layers
from fedloom.models.expert_layers import (
    PROJECTION,
    ROUTER,
    ExpertLinear,
    Routing,
    Seen,
)
from fedloom.models.flop_shape import linear_widths, model_shape, without_adapter
from fedloom.models.routed_experts import RoutedLinear
from fedloom.randomness import derive_seed
from fedloom.tensors import Tensors

CONFIG = "expert_config.json"
FILE = "expert_model.safetensors"

FORMAT = "fedloom-experts-1"
KEPT_SETTINGS = ("rank", "alpha", "dropout", "top_k", "balance", "experts")


class ExpertModel(AdapterModel):
    """A frozen backbone with mixtures of LoRA experts, which are read and written by layer and id.

    Attributes:
        layers: The layers with experts, by name.
        settings: Rank, scale, top-k, weight of the balance term.
    """

    unmergeable = (
        "which experts a token passes depends on the token, so no one weight does the same"
    )
    alone = True

    def __init__(
        self,
        model: nn.Module,
        settings: AdapterSettings,
        pad: int,
        autocast: torch.dtype | None = None,
        checkpointed: bool = False,
    ) -> None:
        """Wrap what :func:`attach_experts` made."""
        self.layers = {m.name: m for m in model.modules() if isinstance(m, ExpertLinear)}
        self.settings = settings
        self.routing = next(iter(self.layers.values())).routing
        super().__init__(model, pad, autocast, checkpointed)  # type: ignore[arg-type]

    @property
    def scaling(self) -> float:
        """What the product of an expert's factors is multiplied by, alpha / rank."""
        return self.settings.alpha / self.settings.rank

    def _run(self, input_ids: Tensor, real: Tensor, **options: Any) -> Any:
        """Run the model; see :class:`AdapterModel`."""
        self.routing.mask = real
        try:
            return super()._run(input_ids, real, **options)
        finally:
            self.routing.mask = None

    def penalty(self) -> Tensor | None:
        """Return the weighted balance term of the passes since it was last asked for, and forget them.

        Summed over layers, mean over the sequences of these passes.
        """
        terms, self.routing.terms = self.routing.terms, []
        if not terms:
            return None
        sequences = sum(map(len, terms)) / len(self.layers)
        return self.settings.balance * torch.cat(terms).sum() / sequences

    @contextmanager
    def watching(self) -> Iterator[dict[str, Seen]]:
        """Inside, keep what the last pass showed of tokens and experts, by layer."""
        self.routing.seen = {}
        try:
            yield self.routing.seen
        finally:
            self.routing.seen = None

    def read(self) -> Tensors:
        """Return copies of all experts: ``LAYER.projection``, ``LAYER.experts.3.A`` and so on."""
        return {
            f"{name}.{part}": tensor
            for name, layer in self.layers.items()
            for part, tensor in layer.read().items()
        }

    def write(self, tensors: Tensors) -> None:
        """Write experts by layer and id; each layer holds those that are there, and no others."""
        changed: dict[str, nn.Parameter] = {}
        parts = by_layer(tensors, self.layers)
        for name, layer in self.layers.items():
            ids, down, up = layer.stacked(parts[name])
            for leaf, tensor in (("down", down), ("up", up)):
                own: nn.Parameter = getattr(layer, leaf)
                if own.shape == tensor.shape:
                    with torch.no_grad():
                        own.copy_(tensor)
                else:
                    changed[f"{name}.{leaf}"] = nn.Parameter(tensor.to(self.device, copy=True))
            layer.ids = ids
        if changed:
            self.hold(changed | {n: p for n, p in self.parameters.items() if n not in changed})
            self.shape = model_shape(self.model)

    def save(self, folder: Path) -> None:
        """Write a folder that :func:`load_experts` reads; no other library knows such an adapter."""
        folder.mkdir(parents=True, exist_ok=True)
        config: Any = self.model.config
        record = {
            "format": FORMAT,
            "base_model": config.name_or_path,
            **{name: getattr(self.settings, name) for name in KEPT_SETTINGS},
            **({} if self.settings.router == "relevance" else {"router": self.settings.router}),
            "layers": {name: list(layer.ids) for name, layer in self.layers.items()},
        }
        (folder / CONFIG).write_text(json.dumps(record, indent=2) + "\n")
        safetensors.torch.save_file(self.read(), folder / FILE)

    @contextmanager
    def holding(self, tensors: Tensors) -> Iterator[None]:
        """Inside, the trained tensors and the experts are these; afterwards those as before."""
        held = {name: layer.ids for name, layer in self.layers.items()}
        try:
            with super().holding(tensors):
                yield
        finally:
            for name, ids in held.items():
                self.layers[name].ids = ids

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        """Inside, no experts work and none count, whoever's they are."""
        self.routing.off, shape = True, self.shape
        self.shape = without_adapter(shape, parts=self.own is not None)
        try:
            yield
        finally:
            self.routing.off, self.shape = False, shape


def by_layer(tensors: Tensors, layers: Collection[str]) -> dict[str, dict[str, Tensor]]:
    """Return the parts of each layer, by their names inside it."""
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for name, tensor in tensors.items():
        layer, part = split_name(name)
        parts[layer][part] = tensor
    return parts


def split_name(name: str) -> tuple[str, str]:
    """Return the layer and the part that a tensor's name is made of.

    Raises:
        ValueError: It is the name of no part of a mixture of experts.
    """
    for marker in (".experts.", ".shared.", f".{PROJECTION}", f".{ROUTER}"):
        at = name.rfind(marker)
        if at >= 0:
            return name[:at], name[at + 1 :]
    raise ValueError(f"{name!r} names no part of a mixture of experts")


def attach_experts(backbone: nn.Module, settings: AdapterSettings, *, seed: int = 0) -> nn.Module:
    """Put experts, which change nothing yet, beside layers of a frozen backbone.

    Args:
        backbone: A Hugging Face causal model with frozen weights.
        settings: Rank, targets, and how many experts a layer has.
        seed: The experiment's seed.

    Raises:
        ModelError: No layer matches the targets.
    """
    routing = Routing()
    kind = ExpertLinear if settings.router == "relevance" else RoutedLinear
    drawn = torch.Generator().manual_seed(derive_seed(seed, "experts"))
    for name in target_layers(backbone, settings):
        parent, _, leaf = name.rpartition(".")
        base: Any = backbone.get_submodule(name)
        layer = kind(name, base, linear_widths(base), settings, routing)
        layer.ids, down, up = layer.stacked(layer.fresh(settings.experts, drawn))
        layer.down = nn.Parameter(down.to(layer.down.device))
        layer.up = nn.Parameter(up.to(layer.up.device))
        setattr(backbone.get_submodule(parent), leaf, layer)
    return backbone


def is_expert_folder(folder: Path) -> bool:
    """Return whether a folder holds experts."""
    return (folder / CONFIG).is_file()


def load_experts(backbone: nn.Module, folder: Path) -> tuple[nn.Module, AdapterSettings]:
    """Put saved experts on a backbone.

    Raises:
        ModelError: The folder is damaged, lacks experts that it names, holds others, or is for another
            model; each difference is named.
    """
    try:
        record = json.loads((folder / CONFIG).read_text())
        named = {name: tuple(ids) for name, ids in record["layers"].items()}
        tensors = safetensors.torch.load_file(folder / FILE)
        settings = AdapterSettings(
            kind="experts",
            targets=list(named),
            router=record.get("router", "relevance"),
            **{name: record[name] for name in KEPT_SETTINGS},
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ModelError(f"{folder} is not a folder of experts, or damaged: {error}") from error
    model = attach_experts(backbone, settings)
    wrapped = ExpertModel(model, settings, 0)
    expected = {
        f"{name}.{part}": shape
        for name, ids in named.items()
        for part, shape in wrapped.layers[name].shapes(ids).items()
    }
    _require_same(folder, expected, tensors.keys())
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise ModelError(
                f"{folder} does not fit this model: {name} is {tuple(tensor.shape)} there, "
                f"{expected[name]} here"
            )
    wrapped.write(tensors)
    return model, settings


def _require_same(folder: Path, named: Collection[str], held: Collection[str]) -> None:
    missing, extra = sorted(set(named) - set(held)), sorted(set(held) - set(named))
    if missing or extra:
        parts = [f"lacks {', '.join(missing[:3])}"] if missing else []
        parts += [f"holds {', '.join(extra[:3])}, which it does not name"] if extra else []
        raise ModelError(
            f"{folder / FILE} {' and '.join(parts)} ({len(missing) + len(extra)} in all)"
        )
