"""The Flower app of a run on the server: the loop of rounds with clients on other machines."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedloom.deployment.flower_nodes import read_nodes
from fedloom.deployment.folders import ServerFolder
from fedloom.deployment.participants import chosen, known, requested_run
from fedloom.deployment.processes import only
from fedloom.deployment.run_requests import RunEvents, RunRequest, go_on, run_event_file
from fedloom.deployment.violations import FILE as VIOLATIONS
from fedloom.deployment.violations import ViolationLog
from fedloom.engines.flower.engine import FlowerEngine
from fedloom.engines.flower.inflation import ByteBudget, bound_arrays, bound_pulls
from fedloom.engines.flower.run_clients import RunClients
from fedloom.engines.flower.streams import Streams
from fedloom.engines.flower.transport import SMALL, FlowerTransport
from fedloom.errors import FedloomError, RoundFailed, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.federation.records import Participant
from fedloom.privacy.statement import of_settings
from fedloom.runs.new_folder import free_folder
from fedloom.runs.parent_process import end_with_parent
from fedloom.runs.result import Result
from fedloom.runs.run import resume_run, run_experiment
from fedloom.security.keys import read_key, sign
from fedloom.storage import run_folder as names
from fedloom.storage.run_folder import RunFolder

app = ServerApp()

ENDING = 30.0
"""Seconds to wait for a stopped run to end before the next one starts."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Execute the requested run, one at a time: a client holds the model of one run."""
    end_with_parent()
    path = Path(str(context.run_config["order"]))
    if not path.is_file():
        raise SettingsError(
            ["this app is started by `fedloom run EXPERIMENT.toml --engine flower`"],
            "the Flower app",
        )
    run_request = RunRequest.read(path)
    server_folder = ServerFolder(Path(run_request.home))
    os.chdir(run_request.cwd)
    os.umask(0o077)
    with (
        only("run", server_folder.playing, ENDING),
        RunEvents(run_event_file(server_folder, run_request.id)) as run_events,
    ):
        requested = _RequestedRun(grid, server_folder, run_request, run_events)
        try:
            result = requested.run()
        except FedloomError as error:
            run_events.emit("failed", text=str(error), exit_code=error.exit_code)
            raise
        except (
            SystemExit,
            KeyboardInterrupt,
        ):  # Flower ends the process of a stopped run in this way
            text = f"the run was stopped; {go_on(requested.folder)}"
            run_events.emit("failed", text=text, exit_code=RoundFailed.exit_code)
            raise
        except BaseException as error:
            run_events.emit("failed", text=f"{type(error).__name__}: {error}", exit_code=1)
            raise
        run_events.emit("finished", summary=result.summary_text)


class _RequestedRun:
    """Executes a run request.

    Attributes:
        folder: The run folder, once it is known.
    """

    def __init__(
        self,
        grid: Grid,
        server_folder: ServerFolder,
        run_request: RunRequest,
        run_events: RunEvents,
    ) -> None:
        self.grid, self.server_folder, self.run_request, self.run_events = (
            grid,
            server_folder,
            run_request,
            run_events,
        )
        self.folder = ""

    def run(self) -> Result:
        """Execute it to its end."""
        run_request = self.run_request
        if run_request.resume is not None:
            return self._resumed(Path(run_request.resume))
        experiment, participants = requested_run(self.server_folder, run_request)
        folder = free_folder(experiment).resolve()
        output = experiment.output.model_copy(update={"folder": str(folder)})
        experiment = replace(experiment, output=output)
        self._emit_folder(folder, experiment)
        with contextlib.closing(self._engine(experiment, participants)) as engine:
            return run_experiment(experiment, observer=self.run_events, remote=engine)

    def _resumed(self, folder: Path) -> Result:
        experiment = Experiment.from_toml(folder / names.EXPERIMENT)
        self._emit_folder(folder, experiment)
        participants = known(RunFolder.existing(folder).read_record(names.RUN))
        if participants is None:  # the run was stopped before its first round
            participants = chosen(experiment, self.server_folder.members())
        with contextlib.closing(self._engine(experiment, participants)) as engine:
            return resume_run(
                folder,
                from_round=self.run_request.from_round,
                fresh_clients=self.run_request.fresh_clients,
                observer=self.run_events,
                remote=engine,
            )

    def _emit_folder(self, folder: Path, experiment: Experiment) -> None:
        self.folder = str(folder)
        learnt = of_settings(experiment.privacy, elsewhere=True)
        self.run_events.emit("folder", folder=self.folder, privacy=learnt)

    def _engine(self, experiment: Experiment, participants: Sequence[Participant]) -> FlowerEngine:
        server_folder = self.server_folder
        run_clients = RunClients(
            server_folder.members,
            participants,
            experiment.clients.newcomers,
            owners=partial(read_nodes, server_folder.nodes),
            proven=not server_folder.serving().insecure,
        )
        watch = ViolationLog(
            server_folder.path / VIOLATIONS, number_of=lambda client: participants[client].number
        )
        return FlowerEngine(
            _transport(self.grid, server_folder),
            experiment.federation,
            run_clients,
            watch,
            attend=lambda attendance: self.run_events.emit("attendance", members=attendance),
        )


def _transport(grid: Grid, server_folder: ServerFolder) -> FlowerTransport:
    serving, budget = server_folder.serving(), ByteBudget(SMALL)
    bound_arrays(budget)
    runtime: Any = grid
    bound_pulls(runtime._runtime_client, budget)
    streams = partial(_open_streams, server_folder)
    if serving.insecure:
        return FlowerTransport(grid, open_streams=streams, budget=budget)
    certificate = server_folder.certificate.read_text()
    signing = partial(sign, read_key(server_folder.key))
    return FlowerTransport(grid, signing, certificate, streams, proven=True, budget=budget)


def _open_streams(server_folder: ServerFolder, run: str, patience: float) -> Streams:
    return Streams(server_folder.streams / run, patience)
