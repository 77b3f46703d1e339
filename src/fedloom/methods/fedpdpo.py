"""FedPDPO: a shared LoRA, and heads and a bottleneck adapter that never leave the client.

Source: "FedPDPO", https://arxiv.org/abs/2603.19741. What the paper says: a frozen backbone with LoRA,
which is "the only part shared"; personal to each client a bottleneck adapter, an LLM head and a reward
head. **A reconstruction** where it could not be read: weights of the mean (rows, as in FedAvg), one
bottleneck between the backbone and both heads, its width, and the order of training. The loss is
``pdpo`` (its own file says what is reconstructed in it); ``dpo`` or ``kto`` leave the reward head out.

A low-rank head is ours, for models whose output layer is large: it adds U V z to the output layer's
logits.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field

from fedloom.methods.bases.personal_parts import KeepsParts, one_after_the_other
from fedloom.methods.contract.client import Client, Trainings
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ADAPTERS_ALONE
from fedloom.methods.declaration import KEEPS_PARTS, averaging
from fedloom.models.heads import HeadMode, PersonalModules, is_own
from fedloom.settings.schema import NamedSettings, Of
from fedloom.training.results import LocalResult


class FedPDPOSettings(NamedSettings):
    """``[method] name = "fedpdpo"``."""

    name: Literal["fedpdpo"] = "fedpdpo"
    bottleneck: int = Field(default=64, ge=0)
    """Width of a client's bottleneck adapter; 0 for none (ablation)."""
    head_mode: HeadMode = "full"
    """A client's LM head: "full", a copy of the output layer (its size in memory, for every client);
    "lowrank", a low-rank change of it; "none" (ablation)."""
    head_rank: Annotated[int, Of("method.head_mode", ("lowrank",))] = Field(default=8, ge=1)
    """Of a lowrank head."""
    schedule: Literal["joint", "alternating"] = "joint"
    """joint: everything at once. alternating: a client's own parts first with the LoRA frozen, then
    the LoRA with them frozen, each for the whole of the client's work."""


class FedPDPO(KeepsParts):
    """Averages the adapter; a client's own parts stay with it."""

    declares = averaging(
        "FedPDPO",
        "https://arxiv.org/abs/2603.19741",
        "reconstructed",
        "weights of the mean, one bottleneck before both heads, order of training",
        keeps="head, reward head and bottleneck",
        absence=KEEPS_PARTS,
    )
    reveals = ADAPTERS_ALONE
    takes_merged_products = True
    taken = ("head_mode", "schedule")
    bounded = MappingProxyType({"bottleneck": "max_width", "head_rank": "max_rank"})

    def __init__(self, settings: FedPDPOSettings) -> None:
        """Keep the settings."""
        self.settings = settings
        self.trainings = 2 if settings.schedule == "alternating" else 1

    @classmethod
    def check(cls, view: ExperimentView) -> Iterator[str]:
        """Yield also that there must be a vocabulary."""
        yield from super().check(view)
        if view.objective is not None and view.objective.head != "causal":
            yield (
                f"method.name = {view.name!r} gives clients heads over a vocabulary, and "
                f"objective.name = {view.objective_name!r} has one over classes; "
                "fedper and fedrep keep that one"
            )

    @property
    def parts(self) -> PersonalModules:
        """Bottleneck and LM head; the objective asks for the reward head."""
        own = self.settings
        return PersonalModules(own.bottleneck, own.head_mode, own.head_rank)

    def trainings_of(self, round: int, rounds: int) -> int:
        """Train jointly, or a client's own parts and the adapter in turns."""
        return self.trainings

    def keeps(self, name: str) -> bool:
        """Keep whatever is not the adapter's."""
        return is_own(name)

    def fit(self, client: Client, learning_rate: float) -> Trainings[LocalResult]:
        """Train jointly, or in turns."""
        names = client.model.parameters
        own = [name for name in names if self.keeps(name)]
        if self.settings.schedule == "joint" or not own:
            return client.training_steps(learning_rate)
        common = [name for name in names if not self.keeps(name)]
        return one_after_the_other(client, learning_rate, own, common)
