"""Runs with the clients of a federation: asked for here, played by the process that Flower starts."""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path

from fedloom.deployment.children import LINK, flwr
from fedloom.deployment.control import is_running
from fedloom.deployment.homes import ServerHome
from fedloom.deployment.orders import Order, go_on, read_news, show
from fedloom.deployment.server import stop_run
from fedloom.errors import Interrupted
from fedloom.experiment import Experiment
from fedloom.files import write_whole
from fedloom.runner import RunObserver, free_folder
from fedloom.settings import write_toml

APP = Path(__file__).with_name("app")
"""The Flower app."""


def run_deployed(
    home: Path,
    experiment: Experiment | None,
    resume: Path | None,
    from_round: int | None,
    observer: RunObserver,
) -> str:
    """Run an experiment with the clients of a federation, or continue one; return its summary.

    Raises:
        FedloomError: See ``fedloom.errors`` for the tree.
    """
    own, file = ServerHome(home), None
    own.serving()
    if resume is not None:
        folder = str(resume.resolve())
    else:
        assert experiment is not None, "the command line asks for one or the other"
        folder = str(free_folder(experiment).resolve())
        output = experiment.output.model_copy(update={"folder": folder})
        file = own.requests / f"{experiment.name}-{os.getpid()}.toml"
        write_whole(file, replace(experiment, output=output).to_toml().encode())
    order = Order(
        home=str(home.resolve()),
        folder=folder,
        cwd=str(Path.cwd()),
        experiment=str(file.resolve()) if file is not None else None,
        from_round=from_round,
    )
    observer.stage("asking Flower to start the run")
    path, number = submit(own, order)
    return follow(own, path, number, observer)


def submit(home: ServerHome, order: Order) -> tuple[Path, str]:
    """Have Flower start a run; return the file of its order and Flower's number for it.

    Raises:
        SettingsError: No server was started here.
        FedloomError: Flower refuses.
    """
    home.serving()
    path = home.requests / f"{time.time_ns():x}.toml"
    order.write(path)
    config = path.with_suffix(".config.toml")
    write_whole(config, write_toml({"order": str(path)}).encode())
    found = flwr(home.flower, "run", str(APP), LINK, "--run-config", str(config))
    return path, str(found["run-id"])


def follow(home: ServerHome, order: Path, number: str, observer: RunObserver) -> str:
    """Show a run until it is over; return its summary.

    Raises:
        FedloomError: It failed.
        Interrupted: The user stopped it.
    """
    folder = Order.read(order).folder
    try:
        news = read_news(order.with_suffix(".jsonl"), lambda: is_running(home, number))
        return show(news, observer, folder)
    except KeyboardInterrupt:
        stop_run(home, number)
        raise Interrupted(f"stopped; {go_on(folder)}") from None
    finally:
        with contextlib.suppress(Exception):
            observer.end()
