"""FedMomentum: the main part of the mean of products stays in the factors, the rest goes to the backbone.

Source: FedMomentum, 2026, https://arxiv.org/abs/2603.08014; a reconstruction after its abstract and a
third party's code, as no official code was found. The server decomposes the mean of the clients'
products, P = sum_k p_k B_k A_k = U S V^T. The first r singular values, their roots on either side, are
the next factors; those from there up to the share ``kept`` of the energy are added to the backbone, and
what is beyond is dropped. FLoRA would add all of P to the backbone and begin with fresh factors;
FlexLoRA would drop all beyond r.

In place of the paper's randomised decomposition there is the exact one of stacked factors, which costs
less. No optimizer state goes on, in spite of the name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import Field

from fedloom.aggregation.lora import rank_of, stacked
from fedloom.aggregation.lora_coordinates import with_rest
from fedloom.aggregation.means import weighted_mean
from fedloom.federation.protocol import Cohort
from fedloom.methods.bases.backbone_additions import BackboneAdditions
from fedloom.methods.contract.checks import optimizer_anew
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE
from fedloom.methods.declaration import adding_to_backbone
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import Tensors
from fedloom.wire.messages import Reply


class FedMomentumSettings(NamedSettings):
    """``[method] name = "fedmomentum"``."""

    name: Literal["fedmomentum"] = "fedmomentum"
    kept: float = Field(default=0.9999, ge=0, le=1)
    """Share of the squared singular values' sum that is kept, in the factors and the backbone together; 0
    adds nothing to the backbone, as FlexLoRA."""


class FedMomentum(BackboneAdditions):
    """Keeps the first singular values in the factors; the backbone takes the next ones."""

    declares = adding_to_backbone(
        "FedMomentum",
        "https://arxiv.org/abs/2603.08014",
        "reconstructed",
        "an exact decomposition in place of a randomised one",
        travels="adapter down and up, then factors of the rest down",
    )
    reveals = ADAPTERS_ALONE
    taken = ("kept",)

    def __init__(self, settings: FedMomentumSettings) -> None:
        """Keep the share."""
        self.energy = settings.kept

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also that no optimizer can go on in other coordinates."""
        yield from super().check(view)
        yield from optimizer_anew(view, "changes the coordinates of both factors between rounds")

    def combined(self, replies: Sequence[Reply], cohort: Cohort) -> tuple[Tensors, Tensors]:
        """Decompose; beyond the rank of the mean, A keeps the clients' mean rows, beside zeros in B."""
        weights = [reply.payload.numbers["examples"] for reply in replies]
        adapters = [reply.payload.tensors for reply in replies]
        mean = weighted_mean(adapters, weights)
        whole = stacked(adapters, [weight / sum(weights) for weight in weights])
        return with_rest(whole, rank_of(mean), self.energy, mean)

    def stacked(self) -> int:
        """Return the most: what the factors of one rank leave of a cohort's."""
        return max(1, self.server.cohort - 1)
