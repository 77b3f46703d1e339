"""What Flower starts on the server for each run: the loop of rounds, with clients on other machines."""

from __future__ import annotations

import contextlib
import os
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedloom.deployment.children import only
from fedloom.deployment.homes import ServerHome
from fedloom.deployment.offences import FILE as OFFENCES
from fedloom.deployment.offences import OffenceLog
from fedloom.deployment.orders import News, Order, go_on
from fedloom.deployment.server import registered
from fedloom.engines.flower import FlowerEngine
from fedloom.engines.inflation import ByteBudget, bound_arrays, bound_pulls
from fedloom.engines.post import SMALL, Post
from fedloom.engines.roster import Roster
from fedloom.engines.streams import Streams
from fedloom.errors import FedloomError, RoundFailed, SettingsError
from fedloom.experiment import Experiment
from fedloom.identity import read_key, sign
from fedloom.report import run_folder as names
from fedloom.runner import RunResult, resume_run, run_experiment

app = ServerApp()

ENDING = 30.0
"""Seconds that a run which was stopped may take to end before the next begins."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Play the run that was ordered, as the only one: a client has the model of one run at a time."""
    path = Path(str(context.run_config["order"]))
    if not path.is_file():
        raise SettingsError(
            ["this app is started by `fedloom run EXPERIMENT.toml --engine flower`"],
            "the Flower app",
        )
    order = Order.read(path)
    os.chdir(order.cwd)
    with contextlib.closing(News(path.with_suffix(".jsonl"))) as news:
        try:
            with only("run", ServerHome(Path(order.home)).playing, ENDING):
                result = _play(grid, order, news)
        except FedloomError as error:
            news.tell("failed", text=str(error), exit_code=error.exit_code)
            raise
        except (SystemExit, KeyboardInterrupt):  # how Flower ends what plays a run that is stopped
            text = f"the run was stopped; {go_on(order.folder)}"
            news.tell("failed", text=text, exit_code=RoundFailed.exit_code)
            raise
        except BaseException as error:
            news.tell("failed", text=f"{type(error).__name__}: {error}", exit_code=1)
            raise
        news.tell("finished", summary=result.summary_text)


def _play(grid: Grid, order: Order, news: News) -> RunResult:
    home, folder = ServerHome(Path(order.home)), Path(order.folder)
    file = Path(order.experiment) if order.experiment else folder / names.EXPERIMENT
    experiment = Experiment.from_toml(file)
    roster = Roster(home.members, experiment.clients.newcomers, owners=partial(_owners, home))
    watch = OffenceLog(home.path / OFFENCES)
    engine = FlowerEngine(_post(grid, home), experiment.federation, roster, watch)
    try:
        if order.experiment is None:
            return resume_run(folder, from_round=order.from_round, observer=news, remote=engine)
        return run_experiment(experiment, observer=news, remote=engine)
    finally:
        engine.close()


def _post(grid: Grid, home: ServerHome) -> Post:
    serving, budget = home.serving(), ByteBudget(SMALL)
    bound_arrays(budget)
    runtime: Any = grid
    bound_pulls(runtime._runtime_client, budget)
    streams = partial(_open_streams, home)
    if serving.insecure:
        return Post(grid, open_streams=streams, budget=budget)
    certificate = home.certificate.read_text()
    signing = partial(sign, read_key(home.key))
    return Post(grid, signing, certificate, streams, proven=True, budget=budget)


def _owners(home: ServerHome) -> dict[int, int]:
    """Return the client of each of Flower's nodes, by the key with which Flower had it prove itself.

    None where nothing is proven, or the lists cannot be read.
    """
    with contextlib.suppress(FedloomError):
        if not home.serving().insecure:
            nodes, members = registered(home), enumerate(home.members().members)
            return {int(nodes[own.key]): number for number, own in members if own.key in nodes}
    return {}


def _open_streams(home: ServerHome, run: str, patience: float) -> Streams:
    return Streams(home.streams / run, patience)
