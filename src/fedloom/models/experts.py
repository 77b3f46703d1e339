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
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn

from fedloom.errors import ModelError
from fedloom.models.adapters import AdapterModel, AdapterSettings, target_layers
from fedloom.models.flop_shape import linear_widths, model_shape
from fedloom.randomness import derive_seed
from fedloom.tensors import Tensors

CONFIG = "expert_config.json"
FILE = "expert_model.safetensors"

FORMAT = "fedloom-experts-1"
KEPT_SETTINGS = ("rank", "alpha", "dropout", "top_k", "balance", "experts")

PROJECTION, SHARED_A, SHARED_B = "projection", "shared.A", "shared.B"

ROUTER = "router"
"""The matrix of logits of a linear router (``routed_experts.py``), in place of these three."""


@dataclass
class Routing:
    """What all layers of a model share in a pass.

    Attributes:
        off: Whether layers are as without experts.
        mask: ``(b, l)``, 1 for real tokens; ``None`` where all are.
        terms: The balance term of each sequence, ``(b,)`` from each layer of each pass with gradients.
        seen: What the last pass showed, by layer; ``None`` while nobody is :meth:`ExpertModel.watching`.
    """

    off: bool = False
    mask: Tensor | None = None
    terms: list[Tensor] = field(default_factory=list)
    seen: dict[str, Seen] | None = None


@dataclass
class Seen:
    """Sums over the real tokens of each sequence of a pass.

    Attributes:
        tokens: ``(b,)``, how many.
        token: ``(b, r)`` of P x.
        experts: ``(b, n, r)`` of A_e x.
        routed_tokens: ``(b, n)`` tokens that pass each expert.
    """

    tokens: Tensor
    token: Tensor
    experts: Tensor
    routed_tokens: Tensor


class ExpertLinear(nn.Module):
    """A linear layer with a mixture of LoRA experts beside it.

    Attributes:
        base_layer: The frozen layer.
        ids: Ids of its domain experts, ascending.
        down: ``((n + 2) r, inputs)``: P, A of the shared expert, A of each domain expert.
        up: ``(outputs, (n + 1) r)``: B of the shared expert, B of each domain expert.
    """

    def __init__(
        self,
        name: str,
        base: nn.Module,
        widths: tuple[int, int],
        settings: AdapterSettings,
        routing: Routing,
    ) -> None:
        """Put experts, none yet, beside ``base`` of ``widths`` (inputs, outputs)."""
        super().__init__()
        self.name, self.base_layer, self.routing = name, base, routing
        self.inputs, self.outputs = widths
        self.rank, self.scaling = settings.rank, settings.alpha / settings.rank
        self.top_k, self.dropout = settings.top_k, settings.dropout
        self.ids: tuple[int, ...] = ()
        device = next(base.parameters()).device
        self.down = nn.Parameter(torch.zeros(2 * self.rank, self.inputs, device=device))
        self.up = nn.Parameter(torch.zeros(self.outputs, self.rank, device=device))

    @property
    def weight(self) -> Any:
        """The frozen layer's weight."""
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., outputs)`` for ``(..., inputs)``."""
        y: Tensor = self.base_layer(x)
        if self.routing.off:
            return y
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(self.down.dtype)
        shape = x.shape[:-1]
        z = self.down @ x.reshape(-1, self.inputs).T
        values: Tensor | None = None
        if self.training and self.dropout:
            dropped = F.dropout(x, self.dropout).reshape(-1, self.inputs)
            values = self.down[self.rank :] @ dropped.T
        mask = self.routing.mask
        if mask is None or mask.shape != shape:
            mask = torch.ones(shape, device=z.device)
        gated = Gated.apply(z, values, mask, self.rank, self.top_k)  # type: ignore[no-untyped-call]
        weighted, balance, routed_tokens = gated
        if torch.is_grad_enabled():
            self.routing.terms.append(balance)
        if self.routing.seen is not None:
            self._note(z, mask, routed_tokens)
        beside = F.linear(weighted.T, self.up).view(*shape, self.outputs)
        return y + (self.scaling * beside).to(y.dtype)

    def _note(self, z: Tensor, mask: Tensor, routed_tokens: Tensor) -> None:
        """Keep what a pass shows."""
        assert self.routing.seen is not None, "somebody watches"
        rows, real = len(mask), mask.float()
        sums = (z.float().view(len(z), *mask.shape) * real).sum(-1).T
        self.routing.seen[self.name] = Seen(
            real.sum(-1),
            sums[:, : self.rank],
            sums[:, 2 * self.rank :].reshape(rows, -1, self.rank),
            routed_tokens.view(-1, *mask.shape).sum(-1).T,
        )

    def read(self) -> Tensors:
        """Return the parts by name, each expert's under its id, as copies on the CPU."""
        whole = [
            t.detach() if t.is_meta else t.detach().to("cpu", copy=True)
            for t in (self.down, self.up)
        ]
        down, up = torch.split(whole[0], self.rank), torch.split(whole[1], self.rank, 1)
        found = {PROJECTION: down[0], SHARED_A: down[1], SHARED_B: up[0]}
        for number, (a, b) in zip(self.ids, zip(down[2:], up[1:], strict=True), strict=True):
            found |= {f"experts.{number}.A": a, f"experts.{number}.B": b}
        return {name: tensor.contiguous() for name, tensor in found.items()}

    def stacked(self, parts: Mapping[str, Tensor]) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """Return the ids, ``down`` and ``up`` that are made of parts by name."""
        numbers = {int(name.split(".")[1]) for name in parts if name.startswith("experts.")}
        ids = tuple(sorted(numbers))
        down = [parts[PROJECTION], parts[SHARED_A], *(parts[f"experts.{i}.A"] for i in ids)]
        up = [parts[SHARED_B], *(parts[f"experts.{i}.B"] for i in ids)]
        return ids, torch.cat(down), torch.cat(up, 1)

    def shapes(self, ids: Collection[int]) -> dict[str, tuple[int, int]]:
        """Return the shape of each part, with these experts."""
        down, up = (self.rank, self.inputs), (self.outputs, self.rank)
        return {PROJECTION: down, SHARED_A: down, SHARED_B: up} | factor_shapes(ids, down, up)

    def fresh(self, experts: int, drawn: torch.Generator) -> dict[str, Tensor]:
        """Return parts that change nothing: A and P as LoRA draws A, B zero."""
        shapes = self.shapes(range(experts))
        return {name: drawn_part(name, shape, drawn) for name, shape in shapes.items()}


def factor_shapes(
    ids: Collection[int], down: tuple[int, int], up: tuple[int, int]
) -> dict[str, tuple[int, int]]:
    """Return the shapes of some experts' factors, by name."""
    return {f"experts.{i}.{f}": shape for i in ids for f, shape in (("A", down), ("B", up))}


def drawn_part(name: str, shape: tuple[int, int], drawn: torch.Generator) -> Tensor:
    """Return a part as it is at first: B zero, all others as LoRA draws A."""
    if name.endswith("B"):
        return torch.zeros(shape)
    return torch.nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=drawn)


class Gated(torch.autograd.Function):
    """From projected tokens to gated values, with the gradient written out.

    Autograd by itself would keep some twenty small tensors a layer and walk through them one by one,
    which costs more than the products between them. Tokens are the last dimension: with a handful of
    experts, sums and softmax over another one are many times faster. Both are in float32.

    Legend: N tokens, all sequences one after another.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, values: Tensor | None, mask: Tensor, rank: int, top_k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gate the values.

        Args:
            ctx: Where autograd keeps what the gradient needs.
            z: ``((n + 2) r, N)``: t, A_s x, and u_e of every expert.
            values: ``((n + 1) r, N)``: A_s drop(x) and A_e drop(x); ``None`` where nothing is dropped, as
                they are in ``z`` then.
            mask: ``(b, l)``, 1 for real tokens.
            rank: r.
            top_k: Experts that a token passes.

        Returns:
            ``((n + 1) r, N)`` gated values, the balance term of each sequence, ``(b,)``, and ``(n, N)``:
            1 where a real token passes an expert.
        """
        experts = z[2 * rank :].view(-1, rank, z.shape[1])
        count = len(experts)
        scores = (experts * z[:rank]).sum(1).float() / math.sqrt(rank)
        chances = scores.softmax(0)
        whole, gates = torch.ones_like(chances[:1]), chances
        if top_k < count:
            most, chosen = chances.topk(top_k, 0)
            whole = most.sum(0, keepdim=True)
            gates = torch.zeros_like(chances).scatter_(0, chosen, most / whole)
        real = mask.to(chances.dtype)
        share = (real / real.sum(-1, keepdim=True)).flatten()  # a token's, in its sequence's means
        routed_tokens = (gates > 0).to(chances.dtype)
        sequences = (count, *mask.shape)
        shares = (routed_tokens * share).view(sequences).sum(-1)
        balance = count * ((chances * share).view(sequences).sum(-1) * shares).sum(0)
        source = z[rank:] if values is None else values
        weighted = source.clone()
        weighted[rank:].view_as(experts).mul_(gates.unsqueeze(1).to(z.dtype))
        routed_tokens = routed_tokens * mask.flatten()
        ctx.save_for_backward(z, values, chances, gates, whole, share, shares)
        ctx.rank = rank
        ctx.mark_non_differentiable(routed_tokens)
        return weighted, balance, routed_tokens

    @staticmethod
    def backward(ctx: Any, grad: Tensor, of_balance: Tensor, _: Tensor) -> Any:
        """Return the gradients of ``z`` and of ``values``."""
        z, values, chances, gates, whole, share, shares = ctx.saved_tensors
        rank, count = ctx.rank, len(chances)
        experts = z[2 * rank :].view(count, rank, -1)
        own = experts if values is None else values[rank:].view_as(experts)
        of_gates = (grad[rank:].reshape(experts.shape) * own).sum(1).float()
        centred = of_gates - (of_gates * gates).sum(0, keepdim=True)
        of_chances = torch.where(gates > 0, centred / whole, 0.0)
        even = (count * of_balance * shares).unsqueeze(-1)
        of_chances += (even * share.view(1, len(of_balance), -1)).view_as(chances)
        of_scores = chances * (of_chances - (of_chances * chances).sum(0, keepdim=True))
        of_scores = (of_scores / math.sqrt(rank)).to(z.dtype).unsqueeze(1)
        of_token = (of_scores * experts).sum(0)
        of_experts = of_scores * z[:rank]
        of_values = grad.clone()
        gated = of_values[rank:].view_as(experts).mul_(gates.unsqueeze(1).to(z.dtype))
        if values is None:  # the values are the tokens' own projections
            gated += of_experts
            return torch.cat([of_token, of_values]), None, None, None, None
        nothing = torch.zeros_like(of_token)
        of_z = torch.cat([of_token, nothing, of_experts.reshape(-1, z.shape[1])])
        return of_z, of_values, None, None, None


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
    def _holding(self, tensors: Tensors) -> Iterator[None]:
        held = {name: layer.ids for name, layer in self.layers.items()}
        with super()._holding(tensors):
            yield
        for name, ids in held.items():
            self.layers[name].ids = ids

    @contextmanager
    def _without_adapter(self) -> Iterator[None]:
        self.routing.off = True
        try:
            yield
        finally:
            self.routing.off = False


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


def layer_kind(settings: AdapterSettings) -> type[ExpertLinear]:
    """Return the layer that a router needs."""
    if settings.router == "relevance":
        return ExpertLinear
    from fedloom.models.routed_experts import RoutedLinear  # which is made of what is here

    return RoutedLinear


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
    drawn = torch.Generator().manual_seed(derive_seed(seed, "experts"))
    for name in target_layers(backbone, settings):
        parent, _, leaf = name.rpartition(".")
        base: Any = backbone.get_submodule(name)
        layer = layer_kind(settings)(name, base, linear_widths(base), settings, routing)
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
