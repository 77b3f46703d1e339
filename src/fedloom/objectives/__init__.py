"""What a client minimises. Pure losses and thin classes, one file each."""

from __future__ import annotations

from fedloom.objectives.apo import APODown, APODownSettings, APOZero, APOZeroSettings
from fedloom.objectives.base import Objective
from fedloom.objectives.bco import BCO, BCOSettings
from fedloom.objectives.classification import Classification, ClassificationSettings
from fedloom.objectives.cpo import CPO, CPOSettings
from fedloom.objectives.dpo import DPO, DPOSettings
from fedloom.objectives.grpo import GRPO, GRPOSettings
from fedloom.objectives.ipo import IPO, IPOSettings
from fedloom.objectives.kto import KTO, KTOSettings
from fedloom.objectives.orpo import ORPO, ORPOSettings
from fedloom.objectives.pdpo import PDPO, PDPOSettings
from fedloom.objectives.pkto import PKTO, PKTOSettings
from fedloom.objectives.rejection_sampling import RejectionSampling, RejectionSamplingSettings
from fedloom.objectives.reward_model import RewardModel, RewardModelSettings
from fedloom.objectives.robust_dpo import RobustDPO, RobustDPOSettings
from fedloom.objectives.rpo import RPO, RPOSettings
from fedloom.objectives.selector import Selector, SelectorSettings
from fedloom.objectives.sft import SFT, SFTSettings
from fedloom.objectives.simpo import SimPO, SimPOSettings
from fedloom.settings.plugins import Choices, undefined
from fedloom.settings.schema import NamedSettings

OURS: dict[str, tuple[type[NamedSettings], type[Objective]]] = {
    "sft": (SFTSettings, SFT),
    "classification": (ClassificationSettings, Classification),
    "dpo": (DPOSettings, DPO),
    "robust_dpo": (RobustDPOSettings, RobustDPO),
    "rpo": (RPOSettings, RPO),
    "apo_zero": (APOZeroSettings, APOZero),
    "apo_down": (APODownSettings, APODown),
    "cpo": (CPOSettings, CPO),
    "ipo": (IPOSettings, IPO),
    "simpo": (SimPOSettings, SimPO),
    "orpo": (ORPOSettings, ORPO),
    "reward_model": (RewardModelSettings, RewardModel),
    "selector": (SelectorSettings, Selector),
    "kto": (KTOSettings, KTO),
    "bco": (BCOSettings, BCO),
    "pdpo": (PDPOSettings, PDPO),
    "pkto": (PKTOSettings, PKTO),
    "rejection_sampling": (RejectionSamplingSettings, RejectionSampling),
    "grpo": (GRPOSettings, GRPO),
}

OBJECTIVES = Choices(
    "fedloom.objectives", OURS, Objective, lambda kind: undefined(kind, ["loss"], Objective)
)
"""Name in ``[objective]`` to its settings and its class."""


def make_objective(settings: NamedSettings) -> Objective:
    """Return the objective that ``settings`` describe."""
    return OBJECTIVES[settings.name][1](settings)  # type: ignore[call-arg]
