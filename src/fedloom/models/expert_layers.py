"""Layers with a mixture of LoRA experts beside them; what they compute stands in ``experts.py``."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedloom.models.adapters import AdapterSettings
from fedloom.tensors import Tensors

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
        seen: What the last pass showed, by layer; ``None`` while nobody is ``ExpertModel.watching``.
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
