"""FedEx-LoRA: A and B are averaged, and what that loses is added to the backbone.

Source: Singhal et al. 2024, "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of
Large Language Models", https://arxiv.org/abs/2410.09432. What is lost is mean(B A) - mean(B) mean(A),
exactly, as factors of rank (K + 1) r for K clients of rank r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fedloom.aggregation.lora import residual
from fedloom.aggregation.means import weighted_mean
from fedloom.federation.protocol import Cohort
from fedloom.methods.bases.backbone_additions import BackboneAdditions
from fedloom.methods.contract.averaging import note_averaging_error
from fedloom.methods.contract.method import ADAPTERS_ALONE
from fedloom.methods.declaration import adding_to_backbone
from fedloom.settings.schema import NamedSettings
from fedloom.tensors import Tensors
from fedloom.wire.messages import Reply


class FedExLoRASettings(NamedSettings):
    """``[method] name = "fedex_lora"``."""

    name: Literal["fedex_lora"] = "fedex_lora"


class FedExLoRA(BackboneAdditions):
    """Averages the factors; the backbone takes what that loses."""

    declares = adding_to_backbone(
        "FedEx-LoRA",
        "https://arxiv.org/abs/2410.09432",
        "exact",
        "",
        travels="adapter down and up, then factors of the residual down",
    )
    reveals = ADAPTERS_ALONE

    def __init__(self, settings: FedExLoRASettings) -> None:
        """Take no settings beyond the name."""

    def combined(self, replies: Sequence[Reply], cohort: Cohort) -> tuple[Tensors, Tensors]:
        """Average, and say what that loses: in the record, and as factors."""
        weights = [reply.payload.numbers["examples"] for reply in replies]
        adapters = [reply.payload.tensors for reply in replies]
        note_averaging_error(replies, cohort)
        return weighted_mean(adapters, weights), residual(adapters, weights)

    def stacked(self) -> int:
        """Return the cohort's, and the mean's."""
        return self.server.cohort + 1
