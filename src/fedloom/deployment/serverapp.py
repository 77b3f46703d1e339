"""What Flower starts on the server for each run: the loop of rounds, with clients on other machines."""

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
from fedloom.deployment.offences import FILE as OFFENCES
from fedloom.deployment.offences import OffenceLog
from fedloom.deployment.participants import chosen, known, ordered
from fedloom.deployment.processes import only
from fedloom.deployment.run_requests import RunEvents, RunRequest, go_on, run_event_file
from fedloom.engines.flower.engine import FlowerEngine
from fedloom.engines.flower.inflation import ByteBudget, bound_arrays, bound_pulls
from fedloom.engines.flower.run_clients import RunClients
from fedloom.engines.flower.streams import Streams
from fedloom.engines.flower.transport import SMALL, FlowerTransport
from fedloom.errors import FedloomError, RoundFailed, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.federation.records import Participant
from fedloom.runs.parent_process import end_with_parent
from fedloom.runs.result import Result
from fedloom.runs.run import free_folder, resume_run, run_experiment
from fedloom.security.keys import read_key, sign
from fedloom.storage import run_folder as names
from fedloom.storage.run_folder import RunFolder

app = ServerApp()

ENDING = 30.0
"""Seconds that a run which was stopped may take to end before the next begins."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Play the run that was ordered, as the only one: a client has the model of one run at a time."""
    end_with_parent()
    path = Path(str(context.run_config["order"]))
    if not path.is_file():
        raise SettingsError(
            ["this app is started by `fedloom run EXPERIMENT.toml --engine flower`"],
            "the Flower app",
        )
    order = RunRequest.read(path)
    home = ServerFolder(Path(order.home))
    os.chdir(order.cwd)
    os.umask(0o077)
    with only("run", home.playing, ENDING), RunEvents(run_event_file(home, order.id)) as news:
        play = _Play(grid, home, order, news)
        try:
            result = play.run()
        except FedloomError as error:
            news.tell("failed", text=str(error), exit_code=error.exit_code)
            raise
        except (SystemExit, KeyboardInterrupt):  # how Flower ends what plays a run that is stopped
            text = f"the run was stopped; {go_on(play.folder)}"
            news.tell("failed", text=text, exit_code=RoundFailed.exit_code)
            raise
        except BaseException as error:
            news.tell("failed", text=f"{type(error).__name__}: {error}", exit_code=1)
            raise
        news.tell("finished", summary=result.summary_text)


class _Play:
    """Plays what was ordered.

    Attributes:
        folder: The run folder, once it is known.
    """

    def __init__(self, grid: Grid, home: ServerFolder, order: RunRequest, news: RunEvents) -> None:
        self.grid, self.home, self.order, self.news = grid, home, order, news
        self.folder = ""

    def run(self) -> Result:
        """Play it to its end."""
        order = self.order
        if order.resume is not None:
            return self._resumed(Path(order.resume))
        experiment, participants = ordered(self.home, order)
        folder = free_folder(experiment).resolve()
        output = experiment.output.model_copy(update={"folder": str(folder)})
        experiment = replace(experiment, output=output)
        self._tell_folder(folder)
        with contextlib.closing(self._engine(experiment, participants)) as engine:
            return run_experiment(experiment, observer=self.news, remote=engine)

    def _resumed(self, folder: Path) -> Result:
        experiment = Experiment.from_toml(folder / names.EXPERIMENT)
        self._tell_folder(folder)
        participants = known(RunFolder.existing(folder).read_json(names.RUN))
        if participants is None:  # it was stopped before it began
            participants = chosen(experiment, self.home.members())
        with contextlib.closing(self._engine(experiment, participants)) as engine:
            return resume_run(
                folder,
                from_round=self.order.from_round,
                fresh_clients=self.order.fresh_clients,
                observer=self.news,
                remote=engine,
            )

    def _tell_folder(self, folder: Path) -> None:
        self.folder = str(folder)
        self.news.tell("folder", folder=self.folder)

    def _engine(self, experiment: Experiment, participants: Sequence[Participant]) -> FlowerEngine:
        home = self.home
        roster = RunClients(
            home.members,
            participants,
            experiment.clients.newcomers,
            owners=partial(read_nodes, home.nodes),
            proven=not home.serving().insecure,
        )
        watch = OffenceLog(
            home.path / OFFENCES, number_of=lambda client: participants[client].number
        )
        return FlowerEngine(
            _post(self.grid, home),
            experiment.federation,
            roster,
            watch,
            attend=lambda attendance: self.news.tell("attendance", members=attendance),
        )


def _post(grid: Grid, home: ServerFolder) -> FlowerTransport:
    serving, budget = home.serving(), ByteBudget(SMALL)
    bound_arrays(budget)
    runtime: Any = grid
    bound_pulls(runtime._runtime_client, budget)
    streams = partial(_open_streams, home)
    if serving.insecure:
        return FlowerTransport(grid, open_streams=streams, budget=budget)
    certificate = home.certificate.read_text()
    signing = partial(sign, read_key(home.key))
    return FlowerTransport(grid, signing, certificate, streams, proven=True, budget=budget)


def _open_streams(home: ServerFolder, run: str, patience: float) -> Streams:
    return Streams(home.streams / run, patience)
