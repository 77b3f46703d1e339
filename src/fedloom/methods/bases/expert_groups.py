"""LoRA experts of groups of clients: what clients trained alone, and the mixture that a group is sent.

In a group's mixture its own expert is the first, and the others follow in the order of their groups, so
that one router serves all its members.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from fedloom.aggregation.clusters import average_linkage, cosine_distances, silhouette_groups
from fedloom.aggregation.means import weighted_mean
from fedloom.methods.bases.client_groups import nearest_group
from fedloom.models.expert_layers import ROUTER
from fedloom.models.experts import ExpertModel
from fedloom.tensors import Tensors, by_client, join_parts, part_of
from fedloom.wire.messages import Reply

ALONE, EXPERT = "alone", "expert"
"""Before the name of a tensor and a client's id: what it trained alone. Before a group: its expert and
router."""

OWN = ".experts.0."
"""In the names of the first expert of a mixture."""


def own_expert(mixture: Tensors) -> Tensors:
    """Return the first expert of a mixture."""
    return {name: tensor for name, tensor in mixture.items() if OWN in name}


def trained_part(mixture: Tensors) -> Tensors:
    """Return the first expert and the router."""
    return {n: t for n, t in mixture.items() if OWN in n or n.endswith(f".{ROUTER}")}


def single(mixture: Tensors) -> Tensors:
    """Return the mixture of the first expert alone, whose router has one row."""
    return {n: t[:1] if n.endswith(f".{ROUTER}") else t for n, t in trained_part(mixture).items()}


def mixture(tensors: Tensors, group: int) -> Tensors:
    """Return the mixture of a group; empty where there are no groups yet."""
    count = len({name.split("/")[1] for name in tensors if name.startswith(f"{EXPERT}/")})
    found = part_of(tensors, f"{EXPERT}/{group:03d}")
    others = [own for own in range(count) if own != group]
    for place, other in enumerate(others, 1):
        for name, tensor in own_expert(part_of(tensors, f"{EXPERT}/{other:03d}")).items():
            found[name.replace(OWN, f".experts.{place}.")] = tensor
    return dict(sorted(found.items()))


def kept_alone(replies: Iterable[Reply]) -> Tensors:
    """Return what clients trained alone, as the state keeps it."""
    return {
        f"{ALONE}/{name}/{reply.client:06d}": tensor
        for reply in replies
        for name, tensor in reply.payload.tensors.items()
    }


def alone_of(tensors: Tensors, names: Iterable[str], client: int) -> Tensors:
    """Return what a client trained alone."""
    return {name: tensors[f"{ALONE}/{name}/{client:06d}"] for name in names}


def without_down(tensors: Tensors) -> Tensors:
    """Return B of what clients trained alone."""
    return {n: t for n, t in tensors.items() if n.startswith(f"{ALONE}/") and n[:-7].endswith(".B")}


def factors_of(tensors: Tensors) -> dict[int, list[Tensor]]:
    """Return by client the B that it trained alone, of all layers in one order."""
    names = sorted({name[len(ALONE) + 1 : -7] for name in without_down(tensors)})
    found: dict[int, list[Tensor]] = {}
    for name in names:
        for client, tensor in by_client(tensors, f"{ALONE}/{name}").items():
            found.setdefault(client, []).append(tensor)
    return found


def formed(tensors: Tensors, fixed: int, most: int) -> dict[int, int]:
    """Return the groups of all that trained alone, from the distances of their B.

    Args:
        tensors: Of the state.
        fixed: Number of groups; 0: that of the best silhouette.
        most: Groups at most, where it is not fixed.
    """
    factors = factors_of(tensors)
    apart, count = cosine_distances(factors), min(fixed, len(factors))
    labels = average_linkage(apart, count) if count else silhouette_groups(apart, most)
    return dict(zip(sorted(factors), labels, strict=True))


def first_experts(tensors: Tensors, groups: Mapping[int, int], drawn: Tensors) -> Tensors:
    """Return each group's expert, the mean of what its members trained alone, and the drawn router.

    Args:
        tensors: Of the state.
        groups: The group of each client that trained alone, from 0 on without a gap.
        drawn: A mixture of as many experts as there may be, as it is initialised.
    """
    found: Tensors = {}
    count = len(set(groups.values()))
    router = {n: t[: 2 * count - 1] for n, t in drawn.items() if n.endswith(ROUTER)}
    for group in range(count):
        members = [client for client, own in groups.items() if own == group]
        adapters = [alone_of(tensors, own_expert(drawn), client) for client in members]
        expert = weighted_mean(adapters, [1.0] * len(members))
        found |= join_parts(**{f"{EXPERT}/{group:03d}": {**expert, **router}})
    return found


def nearest(
    tensors: Tensors, groups: Mapping[int, int], clients: Collection[int]
) -> dict[int, int]:
    """Return the group of each of some clients whose members' B are nearest on average."""
    factors = factors_of(tensors)
    places, distances = sorted(factors), cosine_distances(factors)
    rows = {client: distances[places.index(client)].tolist() for client in clients}
    return {
        client: nearest_group(dict(zip(places, own, strict=True)), groups)
        for client, own in rows.items()
    }


class OthersHeld:
    """Hooks around the steps of a training that moves the router and the first expert alone.

    A gradient that is masked counts in no norm that ``training.max_grad_norm`` bounds; what momentum and
    weight decay would move is put back.
    """

    def __init__(self, model: ExpertModel) -> None:
        """Keep what the model holds of the other experts."""
        rank = model.settings.rank
        self._start: dict[str, Tensor] = {}
        self._held: dict[str, tuple[slice, slice]] = {}
        for name, parameter in model.parameters.items():
            experts = len(next(iter(model.layers.values())).ids)
            first = len(parameter) - (experts - 1) * rank
            down = name.endswith(".down")
            place = (slice(first, None), slice(None)) if down else (slice(None), slice(rank, None))
            self._held[name] = place
            self._start[name] = parameter.detach()[place].clone()

    def before(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Mask the gradients."""
        for name, place in self._held.items():
            gradient = parameters[name].grad
            if gradient is not None:
                gradient[place] = 0

    def after(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Put back what is not trained."""
        with torch.no_grad():
            for name, place in self._held.items():
                parameters[name][place] = self._start[name]
