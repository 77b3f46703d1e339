"""Models with a saved adapter, for evaluation and export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fedloom.data.client_rows import TokenShare
from fedloom.data.encode import TextEncoder
from fedloom.evaluation.held_out import HeldOut
from fedloom.experiment.experiment import Experiment
from fedloom.models.adapters import AdapterModel
from fedloom.models.load import context_length
from fedloom.objectives import make_objective
from fedloom.runs.model_building import build_model, of_server
from fedloom.runs.partitioning import PartitionedData
from fedloom.runs.token_rows import TokenReader
from fedloom.training.references import add_reference_logps


def assemble_saved(
    experiment: Experiment,
    division: PartitionedData,
    adapter: Path | None,
    start: Path | None = None,
) -> tuple[AdapterModel, HeldOut]:
    """Return the backbone with a saved adapter (or a fresh one, which is the base model), and the set.

    Args:
        experiment: The settings.
        division: Has the held-out rows.
        adapter: A PEFT folder.
        start: That of the reference model, where it is not the base model.

    Raises:
        ModelError: A folder is not a PEFT folder, or one for another model.
    """
    experiment = of_server(experiment)
    objective = make_objective(experiment.objective)
    scored: TokenShare | None = None
    if start is not None and division.judged in ("preference", "feedback"):
        encoder, model = load_saved(experiment, division.classes, start)
        reader = TokenReader(
            experiment, division, objective, encoder, model, context_length(model.model)
        )
        held_out = reader.held_out(division.test)
        own = model.read()
        scored = add_reference_logps(model, held_out.share, held_out.budget, own)
    encoder, model = load_saved(experiment, division.classes, adapter)
    reader = TokenReader(
        experiment, division, objective, encoder, model, context_length(model.model)
    )
    held_out = reader.held_out(division.test)
    return model, held_out if scored is None else replace(held_out, share=scored)


def load_saved(
    experiment: Experiment, classes: tuple[str, ...], adapter: Path | None
) -> tuple[TextEncoder, AdapterModel]:
    """Return how texts are read and the backbone with a saved adapter and own parts, or fresh ones.

    Raises:
        ModelError: ``adapter`` is not a PEFT folder, or one for another model.
    """
    objective = make_objective(experiment.objective)
    built = build_model(of_server(experiment), objective, classes, lambda text: None, adapter)
    return built[1], built[2]
