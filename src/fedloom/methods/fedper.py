"""FedPer and FedRep: the body is shared, the head stays with the client.

Sources: Arivazhagan et al. 2019, "Federated Learning with Personalization Layers",
https://arxiv.org/abs/1912.00818 (FedPer: body and head are trained together); Collins et al. 2021,
"Exploiting Shared Representations for Personalized Federated Learning", https://arxiv.org/abs/2102.07078,
algorithm 1 (FedRep: the head first with the body frozen, then the body with the head frozen).

The body is the adapter. The head is the classification head, or for a causal model an LM head of the
client's own; the original papers have a small classifier in its place.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field

from fedloom.methods.bases.personal_parts import KeepsParts, one_after_the_other
from fedloom.methods.contract.client import Client, Trainings
from fedloom.methods.contract.method import ADAPTERS_ALONE
from fedloom.methods.declaration import KEEPS_PARTS, averaging
from fedloom.models.heads import PersonalModules, is_head
from fedloom.settings.schema import NamedSettings, Of
from fedloom.training.results import LocalResult

CAUSAL = Of("head", ("causal",), "the head of this objective is its classifier")

LOW_RANK = Of("method.head_mode", ("lowrank",))


class FedPerSettings(NamedSettings):
    """``[method] name = "fedper"``."""

    name: Literal["fedper"] = "fedper"
    head_mode: Annotated[Literal["full", "lowrank"], CAUSAL] = "full"
    """Of causal models, a client's LM head: "full" or "lowrank"; see fedpdpo."""
    head_rank: Annotated[int, CAUSAL, LOW_RANK] = Field(default=8, ge=1)
    """Of a lowrank head."""


class FedRepSettings(FedPerSettings):
    """``[method] name = "fedrep"``."""

    name: Literal["fedrep"] = "fedrep"  # type: ignore[assignment]


class FedPer(KeepsParts):
    """Averages the body; body and head are trained together."""

    declares = averaging(
        "FedPer",
        "https://arxiv.org/abs/1912.00818",
        "adapted",
        "the head is that of a language model",
        travels="the adapter without the head, down and up",
        keeps="its head",
        absence=KEEPS_PARTS,
    )
    reveals = ADAPTERS_ALONE
    takes_merged_products = True
    taken = ("head_mode",)
    bounded = MappingProxyType({"head_rank": "max_rank"})

    def __init__(self, settings: FedPerSettings) -> None:
        """Keep the settings."""
        self.settings = settings

    @property
    def parts(self) -> PersonalModules:
        """The LM head of a causal model."""
        return PersonalModules(head_mode=self.settings.head_mode, head_rank=self.settings.head_rank)

    def keeps(self, name: str) -> bool:
        """Keep the head."""
        return is_head(name)


class FedRep(FedPer):
    """Averages the body; each client fits its head to it, then the body to its head."""

    declares = averaging(
        "FedRep",
        "https://arxiv.org/abs/2102.07078",
        "adapted",
        "the head is that of a language model",
        travels="the adapter without the head, down and up",
        keeps="its head",
        absence=KEEPS_PARTS,
    )
    trainings = 2

    def trainings_of(self, round: int, rounds: int) -> int:
        """Train the head and the body."""
        return 2

    def fit(self, client: Client, learning_rate: float) -> Trainings[LocalResult]:
        """Train the head, then the body, each for the whole of the client's work."""
        names = client.model.parameters
        own = [name for name in names if self.keeps(name)]
        common = [name for name in names if not self.keeps(name)]
        return one_after_the_other(client, learning_rate, own, common)
