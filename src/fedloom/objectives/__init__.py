"""What a client minimises: SFT, classification, DPO, KTO. Pure losses and thin classes, one file each."""

from __future__ import annotations

from fedloom.objectives.base import Objective
from fedloom.objectives.classification import Classification, ClassificationSettings
from fedloom.objectives.dpo import DPO, DPOSettings
from fedloom.objectives.kto import KTO, KTOSettings
from fedloom.objectives.sft import SFT, SFTSettings

ObjectiveSettings = SFTSettings | ClassificationSettings | DPOSettings | KTOSettings

OBJECTIVES: dict[str, tuple[type[ObjectiveSettings], type[Objective]]] = {
    "sft": (SFTSettings, SFT),
    "classification": (ClassificationSettings, Classification),
    "dpo": (DPOSettings, DPO),
    "kto": (KTOSettings, KTO),
}
"""Name in ``[objective]`` to its settings and its class."""


def make_objective(settings: ObjectiveSettings) -> Objective:
    """Return the objective that ``settings`` describe."""
    return OBJECTIVES[settings.name][1](settings)  # type: ignore[call-arg]
