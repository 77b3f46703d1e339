"""Mixtures of LoRA experts with a matrix of logits as the router, in which one has several places.

Source: Wang et al. 2025, FedLEASE, https://arxiv.org/abs/2509.15087, as in the authors' code. A layer has
n experts, of which the first is its client's own, and a router G of 2 n - 1 rows. For a token x, with
scaling s:

    p = softmax(G x),   the n largest of p are kept, and add up to 1,
    g_i is what is kept of slot i, and g_0 also that of slots n to 2 n - 2,
    y = W_0 x + sum_i g_i s B_i A_i drop(x)

so that a token passes 1 to n experts. With one expert it is LoRA.

Legend: n experts, r rank, N tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.models.expert_layers import ROUTER, ExpertLinear, factor_shapes


def slot_gates(logits: Tensor) -> Tensor:
    """Return ``(n, N)`` float32 weights of experts, each token's adding up to 1.

    Args:
        logits: ``(2 n - 1, N)``: of n experts, then n - 1 times of the first again.
    """
    count = (len(logits) + 1) // 2
    most, chosen = logits.float().softmax(0).topk(count, 0)
    kept = torch.zeros_like(logits, dtype=most.dtype).scatter(0, chosen, most / most.sum(0))
    return torch.cat([kept[:1] + kept[count:].sum(0, keepdim=True), kept[1:count]])


class RoutedLinear(ExpertLinear):
    """A linear layer with such a mixture beside it.

    Attributes:
        down: ``(2 n - 1 + n r, inputs)``: the router, then A of each expert.
        up: ``(outputs, n r)``: B of each expert.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., outputs)`` for ``(..., inputs)``."""
        y: Tensor = self.base_layer(x)
        if self.routing.off:
            return y
        x = x if torch.is_autocast_enabled(x.device.type) else x.to(self.down.dtype)
        shape, slots = x.shape[:-1], len(self.down) - self.up.shape[1]
        z = self.down @ x.reshape(-1, self.inputs).T
        values = z[slots:]
        if self.training and self.dropout:
            dropped = F.dropout(x, self.dropout).reshape(-1, self.inputs)
            values = self.down[slots:] @ dropped.T
        gates = slot_gates(z[:slots]).to(values.dtype)
        own = values.view(len(gates), self.rank, -1) * gates.unsqueeze(1)
        beside = F.linear(own.flatten(0, 1).T, self.up).view(*shape, self.outputs)
        return y + (self.scaling * beside).to(y.dtype)

    def read(self) -> dict[str, Tensor]:
        """Return the parts by name, each expert's under its id, as copies on the CPU."""
        down, up = (
            t.detach() if t.is_meta else t.detach().to("cpu", copy=True)
            for t in (self.down, self.up)
        )
        slots = len(down) - up.shape[1]
        found = {ROUTER: down[:slots]}
        factors = zip(
            torch.split(down[slots:], self.rank), torch.split(up, self.rank, 1), strict=True
        )
        for number, (a, b) in zip(self.ids, factors, strict=True):
            found |= {f"experts.{number}.A": a, f"experts.{number}.B": b}
        return {name: tensor.contiguous() for name, tensor in found.items()}

    def stacked(self, parts: Mapping[str, Tensor]) -> tuple[tuple[int, ...], Tensor, Tensor]:
        """Return the ids, ``down`` and ``up`` that are made of parts by name."""
        ids = tuple(sorted(int(name.split(".")[1]) for name in parts if name.endswith(".A")))
        down = [parts[ROUTER], *(parts[f"experts.{i}.A"] for i in ids)]
        return ids, torch.cat(down), torch.cat([parts[f"experts.{i}.B"] for i in ids], 1)

    def shapes(self, ids: Collection[int]) -> dict[str, tuple[int, int]]:
        """Return the shape of each part, with these experts."""
        router = (2 * len(ids) - 1, self.inputs)
        factors = factor_shapes(ids, (self.rank, self.inputs), (self.outputs, self.rank))
        return {ROUTER: router} | factors
