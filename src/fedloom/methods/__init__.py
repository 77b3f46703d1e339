"""One file, one algorithm: settings, server side and client side, and the paper it comes from."""

from __future__ import annotations

import inspect
from collections.abc import Set
from typing import get_args

from fedloom.errors import PluginError
from fedloom.methods.apfl import APFL, APFLSettings
from fedloom.methods.appa import APPA, APPASettings
from fedloom.methods.centralised import Centralised, CentralisedSettings
from fedloom.methods.contract.method import Method, Reveal
from fedloom.methods.declaration import Declaration
from fedloom.methods.distillation import DistillationMethod, DistillationSettings
from fedloom.methods.ditto import Ditto, DittoSettings
from fedloom.methods.fdlora import FDLoRA, FDLoRASettings
from fedloom.methods.fed_et import FedET, FedETSettings
from fedloom.methods.fed_sb import FedSB, FedSBSettings
from fedloom.methods.fedala import FedALA, FedALASettings
from fedloom.methods.fedamole import FedAMoLE, FedAMoLESettings
from fedloom.methods.fedavg import FedAvg, FedAvgSettings
from fedloom.methods.fedavg_ft import FedAvgFT, FedAvgFTSettings
from fedloom.methods.fedavgm import FedAvgM, FedAvgMSettings
from fedloom.methods.fedawa import FedAWA, FedAWASettings
from fedloom.methods.fedbis import FedBis, FedBisSettings
from fedloom.methods.fedbiscuit import FedBiscuit, FedBiscuitSettings
from fedloom.methods.fedbuff import FedBuff, FedBuffSettings
from fedloom.methods.feddat import FedDAT, FedDATSettings
from fedloom.methods.feddm import FedDM, FedDMSettings
from fedloom.methods.feddpa import FedDPA, FedDPASettings
from fedloom.methods.feddyn import FedDyn, FedDynSettings
from fedloom.methods.fedex_lora import FedExLoRA, FedExLoRASettings
from fedloom.methods.fedgrpo import FedGRPO, FedGRPOSettings
from fedloom.methods.fedkseed import FedKSeed, FedKSeedSettings
from fedloom.methods.fedlease import FedLEASE, FedLEASESettings
from fedloom.methods.fedmap import FedMAP, FedMAPSettings
from fedloom.methods.fedmoe import FedMoE, FedMoESettings
from fedloom.methods.fedmomentum import FedMomentum, FedMomentumSettings
from fedloom.methods.fednova import FedNova, FedNovaSettings
from fedloom.methods.fedopt import (
    FedAdagrad,
    FedAdagradSettings,
    FedAdam,
    FedAdamSettings,
    FedYogi,
    FedYogiSettings,
)
from fedloom.methods.fedpdpo import FedPDPO, FedPDPOSettings
from fedloom.methods.fedper import FedPer, FedPerSettings, FedRep, FedRepSettings
from fedloom.methods.fedprox import FedProx, FedProxSettings
from fedloom.methods.fedptr import FedPTR, FedPTRSettings
from fedloom.methods.fedrot_lora import FedRotLoRA, FedRotLoRASettings
from fedloom.methods.fedsa_lora import FedSALoRA, FedSALoRASettings, FFALoRA, FFALoRASettings
from fedloom.methods.fedspallm import FedSpaLLM, FedSpaLLMSettings
from fedloom.methods.fedsvd import FedSVD, FedSVDSettings
from fedloom.methods.flexlora import FlexLoRA, FlexLoRASettings
from fedloom.methods.flora import FLoRA, FLoRASettings
from fedloom.methods.hetlora import HetLoRA, HetLoRASettings
from fedloom.methods.hilora import HiLoRA, HiLoRASettings
from fedloom.methods.local_only import LocalOnly, LocalOnlySettings
from fedloom.methods.lora_a2 import LoRAA2, LoRAA2Settings
from fedloom.methods.lora_fair import LoRAFAIR, LoRAFAIRSettings
from fedloom.methods.moon import MOON, MOONSettings
from fedloom.methods.pfedme import PFedMe, PFedMeSettings
from fedloom.methods.random_projection import RandomProjection, RandomProjectionSettings
from fedloom.methods.ravan import Ravan, RavanSettings
from fedloom.methods.regmean import RegMean, RegMeanSettings
from fedloom.methods.rolora import RoLoRA, RoLoRASettings
from fedloom.methods.scaffold import Scaffold, ScaffoldSettings
from fedloom.methods.split import Split, SplitSettings
from fedloom.reports.sections.spec import problems
from fedloom.settings.plugins import Choices, undefined
from fedloom.settings.schema import NamedSettings
from fedloom.settings.suggestions import nearest

OURS: dict[str, tuple[type[NamedSettings], type[Method]]] = {
    "fedavg": (FedAvgSettings, FedAvg),
    "fedprox": (FedProxSettings, FedProx),
    "scaffold": (ScaffoldSettings, Scaffold),
    "feddyn": (FedDynSettings, FedDyn),
    "fednova": (FedNovaSettings, FedNova),
    "moon": (MOONSettings, MOON),
    "fedptr": (FedPTRSettings, FedPTR),
    "fedavgm": (FedAvgMSettings, FedAvgM),
    "fedadagrad": (FedAdagradSettings, FedAdagrad),
    "fedadam": (FedAdamSettings, FedAdam),
    "fedyogi": (FedYogiSettings, FedYogi),
    "fedawa": (FedAWASettings, FedAWA),
    "appa": (APPASettings, APPA),
    "fedbis": (FedBisSettings, FedBis),
    "fedbiscuit": (FedBiscuitSettings, FedBiscuit),
    "fedbuff": (FedBuffSettings, FedBuff),
    "regmean": (RegMeanSettings, RegMean),
    "lora_fair": (LoRAFAIRSettings, LoRAFAIR),
    "fedavg_ft": (FedAvgFTSettings, FedAvgFT),
    "fedpdpo": (FedPDPOSettings, FedPDPO),
    "fedper": (FedPerSettings, FedPer),
    "fedrep": (FedRepSettings, FedRep),
    "ditto": (DittoSettings, Ditto),
    "pfedme": (PFedMeSettings, PFedMe),
    "apfl": (APFLSettings, APFL),
    "fedala": (FedALASettings, FedALA),
    "fedmap": (FedMAPSettings, FedMAP),
    "feddat": (FedDATSettings, FedDAT),
    "feddpa": (FedDPASettings, FedDPA),
    "fdlora": (FDLoRASettings, FDLoRA),
    "fedsa_lora": (FedSALoRASettings, FedSALoRA),
    "ffa_lora": (FFALoRASettings, FFALoRA),
    "fedsvd": (FedSVDSettings, FedSVD),
    "rolora": (RoLoRASettings, RoLoRA),
    "fedrot_lora": (FedRotLoRASettings, FedRotLoRA),
    "hilora": (HiLoRASettings, HiLoRA),
    "lora_a2": (LoRAA2Settings, LoRAA2),
    "fedspallm": (FedSpaLLMSettings, FedSpaLLM),
    "fed_sb": (FedSBSettings, FedSB),
    "ravan": (RavanSettings, Ravan),
    "fedkseed": (FedKSeedSettings, FedKSeed),
    "random_projection": (RandomProjectionSettings, RandomProjection),
    "flora": (FLoRASettings, FLoRA),
    "fedex_lora": (FedExLoRASettings, FedExLoRA),
    "fedmomentum": (FedMomentumSettings, FedMomentum),
    "flexlora": (FlexLoRASettings, FlexLoRA),
    "hetlora": (HetLoRASettings, HetLoRA),
    "fedamole": (FedAMoLESettings, FedAMoLE),
    "fedlease": (FedLEASESettings, FedLEASE),
    "fedmoe": (FedMoESettings, FedMoE),
    "distillation": (DistillationSettings, DistillationMethod),
    "fed_et": (FedETSettings, FedET),
    "fedgrpo": (FedGRPOSettings, FedGRPO),
    "feddm": (FedDMSettings, FedDM),
    "split": (SplitSettings, Split),
    "centralised": (CentralisedSettings, Centralised),
    "local_only": (LocalOnlySettings, LocalOnly),
}


def _lacks(kind: type[Method]) -> list[str]:
    """Return which attributes a plug-in method lacks that fedloom's own define."""
    found = undefined(kind, ("declares", "reveals", "round", "handlers"), Method)
    if not isinstance(getattr(kind, "declares", None), Declaration | None):
        found.append("its declares must be a fedloom.methods.declaration.Declaration")
    reveals: object = getattr(kind, "reveals", frozenset())
    words = {*get_args(Reveal)}
    if not isinstance(reveals, property) and not (isinstance(reveals, Set) and reveals <= words):
        found.append(f"its reveals must be a set of some of {', '.join(sorted(words))}")
    for name in ("taken", "named_models"):
        if isinstance(getattr(kind, name), str):
            found.append(f'its {name} is a text: it must be a tuple of names, such as ("alpha",)')
            return found
    settings = getattr(kind, "Settings", NamedSettings).model_fields.keys() - {"name"}
    said = {*kind.taken, *kind.bounded, *kind.named_models}
    for name in sorted(said - settings):
        near = nearest(name, sorted(settings)) if settings else "it has no settings"
        found.append(
            f"{name!r} in its taken, bounded or named_models is none of its settings: {near}"
        )
    for name in sorted(settings - said):
        found.append(
            f"method.{name} is in none of its taken, bounded and named_models, by which clients decide "
            "whether they adopt it"
        )
    return found + problems(kind.sections)


METHODS = Choices("fedloom.methods", OURS, Method, _lacks)
"""Name in ``[method]`` to its settings and its class."""

DEFAULT = "fedavg"
"""The default method."""


def make_method(settings: NamedSettings) -> Method:
    """Return the method that ``settings`` describe.

    Raises:
        PluginError: Its class, which is not fedloom's, does not take them.
    """
    kind = METHODS[settings.name][1]
    if METHODS.is_foreign(settings.name):
        try:
            inspect.signature(kind).bind(settings)
        except TypeError as error:
            raise PluginError(
                f"method {settings.name}: {error}: it must define __init__(self, settings), which gets "
                "the settings of [method] and nothing else"
            ) from error
    return kind(settings)
