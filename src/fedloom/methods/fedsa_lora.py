"""FedSA-LoRA and FFA-LoRA: the two factors of LoRA are not treated alike.

Sources: Guo et al. 2024, "Selective Aggregation for Low-Rank Adaptation in Federated Learning",
https://arxiv.org/abs/2410.01463 (FedSA-LoRA: both factors are trained, A is averaged, B and the
classifier stay with the client); Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated
Learning", https://arxiv.org/abs/2403.12313 (FFA-LoRA: A stays at its random start everywhere, B alone
is trained and averaged, so the mean of the B is exactly the mean of the products).
"""

from __future__ import annotations

from typing import Literal

from fedloom.methods.bases.personal_parts import KeepsParts
from fedloom.methods.contract.client import Client, Trainings
from fedloom.methods.contract.method import ADAPTERS_ALONE
from fedloom.methods.declaration import averaging
from fedloom.models.heads import is_head
from fedloom.settings.schema import NamedSettings
from fedloom.training.results import LocalResult
from fedloom.training.settings import Work


class FedSALoRASettings(NamedSettings):
    """``[method] name = "fedsa_lora"``."""

    name: Literal["fedsa_lora"] = "fedsa_lora"


class FFALoRASettings(NamedSettings):
    """``[method] name = "ffa_lora"``."""

    name: Literal["ffa_lora"] = "ffa_lora"


class FedSALoRA(KeepsParts):
    """Averages A; B and the classifier are a client's own."""

    declares = averaging(
        "FedSA-LoRA",
        "https://arxiv.org/abs/2410.01463",
        "exact",
        "",
        travels="LoRA's A, down and up",
        keeps="its B",
    )
    reveals = ADAPTERS_ALONE
    two_factors = True

    def __init__(self, settings: FedSALoRASettings) -> None:
        """Take no settings beyond the name."""

    def keeps(self, name: str) -> bool:
        """Keep B and the head."""
        return ".lora_B." in name or is_head(name)


class FFALoRA(KeepsParts):
    """Averages B; A is the same everywhere and is never trained."""

    declares = averaging(
        "FFA-LoRA",
        "https://arxiv.org/abs/2403.12313",
        "exact",
        "",
        travels="LoRA's B, down and up; A stays as it was initialised",
    )
    reveals = ADAPTERS_ALONE
    two_factors = True

    personal = False

    def __init__(self, settings: FFALoRASettings) -> None:
        """Take no settings beyond the name."""

    def keeps(self, name: str) -> bool:
        """Leave A out of messages: every party makes the same from the seed."""
        return ".lora_A." in name

    def fit(self, client: Client, learning_rate: float) -> Trainings[LocalResult]:
        """Train B."""
        return client.training_steps(learning_rate, frozen=self._fixed(client))

    def personalise(self, client: Client, learning_rate: float, work: Work) -> None:
        """Train B."""
        client.train(learning_rate, purpose="settling ", frozen=self._fixed(client), work=work)

    def _fixed(self, client: Client) -> list[str]:
        return [name for name in client.model.parameters if self.keeps(name)]
