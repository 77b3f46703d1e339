"""Builds backbones and adapters of an experiment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedloom.accounting.cores import available_cores
from fedloom.data.builtin import pretraining_texts
from fedloom.data.encode import TextEncoder
from fedloom.data.sums import sum_texts
from fedloom.errors import ModelError, OutputError
from fedloom.evaluation.generate import load_encoder
from fedloom.experiment.experiment import Experiment
from fedloom.federation.participants import ClientsSettings
from fedloom.methods import METHODS, make_method
from fedloom.methods.contract.method import ModelSpec
from fedloom.models.adapters import AdapterModel, attach_adapter, load_adapter
from fedloom.models.architecture import switch_dropout_off
from fedloom.models.consistency import require_tokens
from fedloom.models.device import choose_device
from fedloom.models.experts import ExpertModel, attach_experts, is_expert_folder, load_experts
from fedloom.models.heads import PersonalModules, attach_personal, load_personal, saved_parts
from fedloom.models.load import MADE, TINY_SUMS, empty_backbone, load_backbone
from fedloom.models.submixture import SubMixtureModel, attach_submixture
from fedloom.models.tiny import TinyRecipe, tiny_model
from fedloom.objectives.base import Objective
from fedloom.randomness import generator
from fedloom.storage.cache import cache_folder
from fedloom.training.settings import TrainingSettings

TINY_TEXTS = 4000
"""Generated texts that the tiny model is trained on."""

SUM_TEXTS = 8000
"""The same of the model of sums."""

SUMS = TinyRecipe(vocabulary=259, context=64, steps=600, batch=64, after="=")
"""It reads each digit as a token, and is trained on what stands behind the sign of equality."""

SMALL_MODEL = 50_000_000
"""Parameters below which one CPU thread is faster than several (measured on 2 cores)."""


def of_server(experiment: Experiment) -> Experiment:
    """Return the experiment with the model and rank of the server, where a method gives it its own."""
    spec = ModelSpec(experiment.model.path, experiment.adapter.rank)
    own = make_method(experiment.method).server_model(spec)
    return experiment if own == spec else with_model(experiment, *own)


def client_base(experiment: Experiment, client: int) -> str:
    """Return the backbone of a client, as the experiment names it."""
    groups = experiment.clients.groups.values()
    own = (group.model for group in groups if client in group.clients)
    return next(own, None) or experiment.model.path


def with_model(experiment: Experiment, path: str, rank: int) -> Experiment:
    """Return the experiment of a party that has this model and rank; it knows of no other groups."""
    adapter = experiment.adapter
    changed: dict[str, float] = {"rank": rank}
    if METHODS[experiment.method.name][1].mixed_ranks:  # who shares factors scales them alike
        changed["alpha"] = adapter.alpha_at(rank)
    return replace(
        experiment,
        model=experiment.model.model_copy(update={"path": path}),
        adapter=adapter.model_copy(update=changed),
        clients=ClientsSettings(),
    )


def model_folder(path: str, stage: Callable[[str], None] = lambda text: None) -> str:
    """Return where a model is: as it is named, or the folder of the tiny one, which is made first.

    Raises:
        OutputError: That folder cannot be written.
    """
    if path not in MADE:
        return path
    recipe = None
    if path == TINY_SUMS:
        texts, recipe = sum_texts(generator(0, "sums"), SUM_TEXTS), SUMS
    else:
        texts = pretraining_texts(generator(0, "tiny"), TINY_TEXTS)
    stage("preparing the tiny model (made once, up to a minute)")
    try:
        return str(tiny_model(cache_folder(), texts, recipe))
    except OSError as error:
        raise OutputError(
            f"cannot keep the tiny model in {cache_folder()}: {error.strerror}; set the variable "
            "FEDLOOM_CACHE to a folder that can be written"
        ) from error


def prepare_model(
    experiment: Experiment,
    classes: tuple[str, ...],
    stage: Callable[[str], None],
    *,
    empty: bool = False,
) -> tuple[str, TextEncoder, torch.nn.Module]:
    """Return the backbone's path, how texts are read for it and the backbone itself, on its device."""
    path = model_folder(experiment.model.path, stage)
    stage(f"loading {experiment.model.path}")
    encoder = load_encoder(
        path, experiment.model.revision, experiment.data, compares=experiment.compares
    )
    pad = encoder.tokenizer.pad_token_id
    backbone = backbone_of(experiment, path, classes, pad, empty=empty)
    require_tokens(backbone, encoder.tokenizer, path)
    _set_threads(experiment.training, sum(p.numel() for p in backbone.parameters()))
    return path, encoder, backbone


def backbone_of(
    experiment: Experiment,
    path: str,
    classes: tuple[str, ...],
    pad: int,
    *,
    blocks: int | None = None,
    empty: bool = False,
) -> torch.nn.Module:
    """Load a backbone, or its first blocks, as the experiment says; or build it without weights."""
    dtype = torch.bfloat16 if experiment.training.precision == "bf16" else torch.float32
    revision = experiment.model.revision
    if empty:
        return empty_backbone(
            path, revision=revision, classes=classes, dtype=dtype, pad_token_id=pad, blocks=blocks
        )
    return load_backbone(
        path,
        revision=revision,
        classes=classes,
        dtype=dtype,
        pad_token_id=pad,
        seed=experiment.federation.seed,
        quantization=experiment.model.quantization,
        device=choose_device(experiment.training.device),
        blocks=blocks,
    )


def build_model(
    experiment: Experiment,
    objective: Objective,
    classes: tuple[str, ...],
    stage: Callable[[str], None],
    adapter: Path | None = None,
    *,
    empty: bool = False,
) -> tuple[str, TextEncoder, AdapterModel]:
    """Return the path of a backbone, how texts are read for it, and it with its adapter."""
    classification = objective.head == "classification"
    classes = classes if classification else ()
    path, encoder, backbone = prepare_model(experiment, classes, stage, empty=empty)
    dropout = experiment.model.dropout
    if dropout is None:
        dropout = not objective.needs_reference and experiment.privacy.unit != "row"
    if not dropout:
        switch_dropout_off(backbone)
    if experiment.training.gradient_checkpointing:
        anyone: Any = backbone
        anyone.activation_checkpointing_enable()
    parts = make_method(experiment.method).parts
    parts = (
        replace(parts, reward=objective.needs_reward) if not classification else PersonalModules()
    )
    pad = encoder.tokenizer.pad_token_id
    autocast = torch.bfloat16 if experiment.training.precision == "bf16" else None
    checkpointed = experiment.training.gradient_checkpointing
    if experiment.adapter.kind == "submixture":
        if classification or parts or adapter is not None:
            raise ModelError(
                'adapter.kind = "submixture" goes with causal objectives, without own heads of '
                "clients; what it saves is a whole model: give that as model.path"
            )
        whole = attach_submixture(backbone)
        return path, encoder, SubMixtureModel(whole, pad, autocast, checkpointed)
    if experiment.adapter.kind == "experts" or (adapter and is_expert_folder(adapter)):
        settings = experiment.adapter
        if classification or parts:
            raise ModelError(
                'adapter.kind = "experts" goes with causal objectives, and without own heads of clients'
            )
        if adapter is not None:
            backbone, settings = load_experts(backbone, adapter)
        else:
            backbone = attach_experts(backbone, settings, seed=experiment.federation.seed)
        experts = ExpertModel(backbone, settings, pad, autocast, checkpointed)
        return path, encoder, experts
    model = _with_peft(experiment, backbone, parts, adapter, classification=classification)
    return path, encoder, AdapterModel(model, pad, autocast, checkpointed)


def _with_peft(
    experiment: Experiment,
    backbone: Any,
    parts: PersonalModules,
    adapter: Path | None,
    *,
    classification: bool,
) -> Any:
    """Return a backbone with PEFT's adapter and the clients' own parts, new or saved in ``adapter``."""
    seed = experiment.federation.seed
    if adapter is not None:
        model, parts = load_adapter(backbone, adapter), saved_parts(adapter)
    else:
        model = attach_adapter(
            backbone, experiment.adapter, classification=classification, seed=seed
        )
    if parts:
        head = attach_personal(model, parts, seed)
        if adapter is not None:
            load_personal(head, adapter)
    return model


def _set_threads(settings: TrainingSettings, parameters: int) -> None:
    default = 1 if parameters < SMALL_MODEL else available_cores()
    torch.set_num_threads(settings.threads or default)
