"""Figures of a run for TensorBoard, Weights & Biases, MLflow or trackio, by accelerate's names for them.

Each is an optional extra. They get the settings and, of each round, the numbers of its line in
``rounds.jsonl``; what they would gather by themselves (console, code, git, user, use of the machine)
is switched off, and so are MLflow's reports of how it is used. Nothing is sent anywhere that
``[output] trackers`` of whoever starts the run does not name: clients of a federation never take that
setting from a server.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from fedloom.accounting.costs import REPEATED
from fedloom.errors import SettingsError
from fedloom.federation.records import RoundRecord
from fedloom.storage.files import write_atomically
from fedloom.storage.run_folder import TRACKED


class Tracker(Protocol):
    """Takes the numbers of one round."""

    def log(self, numbers: Mapping[str, float], round: int) -> None:
        """Record ``numbers`` for ``round``."""
        ...

    def close(self) -> None:
        """Flush what is buffered."""
        ...


class TensorBoard:
    """Event files under ``FOLDER/events``."""

    def __init__(
        self, folder: Path, name: str, settings: Mapping[str, Any], *, resumed: bool = False
    ) -> None:
        """Open an event file."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "events"))

    def log(self, numbers: Mapping[str, float], round: int) -> None:
        """Write one scalar for each number."""
        for key, value in numbers.items():
            self._writer.add_scalar(key, value, round)

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WeightsAndBiases:
    """A run in the project ``fedloom`` of the account that ``wandb`` is logged in to."""

    def __init__(
        self, folder: Path, name: str, settings: Mapping[str, Any], *, resumed: bool = False
    ) -> None:
        """Start a run, or go on with the earlier one where the run is resumed."""
        import wandb

        earlier = kept_ids(folder).get("wandb") if resumed else None
        numbers_only = wandb.Settings(
            console="off",
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
        )
        self._run: Any = wandb.init(
            project="fedloom",
            name=name,
            dir=str(folder),
            config=dict(settings),
            settings=numbers_only,
            **({"id": earlier, "resume": "allow"} if earlier else {}),
        )
        keep_id(folder, "wandb", self._run.id)

    def log(self, numbers: Mapping[str, float], round: int) -> None:
        """Log one step."""
        self._run.log(dict(numbers), step=round)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


MLFLOW_TAGS = {
    "mlflow.user": "",
    "mlflow.source.name": "fedloom",
    "mlflow.source.git.commit": "",
    "mlflow.source.git.branch": "",
    "mlflow.source.git.repoURL": "",
}
"""Stand in for what MLflow would put there: who is logged in, the program's path, and its repository."""


class MLflow:
    """A run in the tracking store that ``mlflow`` is set up for."""

    def __init__(
        self, folder: Path, name: str, settings: Mapping[str, Any], *, resumed: bool = False
    ) -> None:
        """Start a run, or go on with the earlier one where the run is resumed and the store has it."""
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # it is read when mlflow is imported
        import mlflow

        self._mlflow: Any = mlflow
        run: Any = None
        if earlier := kept_ids(folder).get("mlflow") if resumed else None:
            with contextlib.suppress(mlflow.exceptions.MlflowException):
                run = mlflow.start_run(run_id=earlier, log_system_metrics=False)
        if run is None:
            run = mlflow.start_run(run_name=name, tags=dict(MLFLOW_TAGS), log_system_metrics=False)
        keep_id(folder, "mlflow", run.info.run_id)
        mlflow.log_dict(dict(settings), "experiment.json")

    def log(self, numbers: Mapping[str, float], round: int) -> None:
        """Log one step."""
        self._mlflow.log_metrics(dict(numbers), step=round)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class Trackio:
    """A run in the project ``fedloom`` of trackio: on this machine, unless it is set up for a Space."""

    def __init__(
        self, folder: Path, name: str, settings: Mapping[str, Any], *, resumed: bool = False
    ) -> None:
        """Start a run, or go on with the newest of this name where the run is resumed."""
        import trackio

        self._run: Any = trackio.init(
            project="fedloom",
            name=name,
            config=dict(settings),
            resume="allow" if resumed else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, numbers: Mapping[str, float], round: int) -> None:
        """Log one step."""
        self._run.log(dict(numbers), step=round)

    def close(self) -> None:
        """End the run."""
        self._run.finish()


def kept_ids(folder: Path) -> dict[str, str]:
    """Return the ids that services gave a run before, by tracker; none where they cannot be read."""
    try:
        found = json.loads((folder / TRACKED).read_text()).items()
    except (OSError, ValueError, AttributeError):
        return {}
    return {tracker: given for tracker, given in found if isinstance(given, str)}


def keep_id(folder: Path, tracker: str, given: str) -> None:
    """Write the id that a tracker's service gave a run beside those of other trackers.

    Raises:
        OutputError: It cannot be written.
    """
    table = {**kept_ids(folder), tracker: given}
    write_atomically(folder / TRACKED, json.dumps(table, indent=2).encode(), mode=0o644)


TRACKERS: dict[str, Any] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def open_trackers(
    names: Sequence[str],
    folder: Path,
    name: str,
    settings: Mapping[str, Any],
    *,
    resumed: bool = False,
) -> list[Tracker]:
    """Open the trackers that ``[output] trackers`` names.

    Args:
        names: Of the trackers.
        folder: Of the run.
        name: Of the experiment.
        settings: The experiment's, as a table.
        resumed: Whether the run goes on that was begun before.

    Raises:
        SettingsError: A tracker's package is not installed.
    """
    trackers: list[Tracker] = []
    missing = []
    for tracker in names:
        try:
            trackers.append(TRACKERS[tracker](folder, name, settings, resumed=resumed))
        except ImportError:
            missing.append(
                f'output.trackers: {tracker} is not installed; pip install "fedloom[{tracker}]"'
            )
    if missing:
        raise SettingsError(missing)
    return trackers


def round_numbers(record: RoundRecord) -> dict[str, float]:
    """Return the finite numbers of a round's record, under ``train/``, ``held_out/`` and ``cost/``."""
    numbers = {f"train/{name}": value for name, value in record.train.items()}
    if record.evaluation is not None:
        numbers |= {f"held_out/{name}": v for name, v in record.evaluation.metrics.items()}
    costs = [cost for cost in record.costs if cost.phase != REPEATED]
    numbers["cost/bytes_up"] = float(sum(cost.bytes_up for cost in costs))
    numbers["cost/bytes_down"] = float(sum(cost.bytes_down for cost in costs))
    numbers["cost/flops"] = sum(cost.flops for cost in costs)
    numbers["cost/seconds"] = record.seconds
    return {name: value for name, value in numbers.items() if math.isfinite(value)}
