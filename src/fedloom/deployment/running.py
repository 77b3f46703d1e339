"""What the commands of a federation between machines do."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from fedloom.deployment import client, server
from fedloom.deployment.children import flwr
from fedloom.deployment.homes import ClientHome, ServerHome
from fedloom.deployment.orders import Order
from fedloom.errors import ConnectionFailed, OutputError
from fedloom.experiment import Experiment
from fedloom.files import write_whole
from fedloom.runner import RunObserver, free_folder


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
    own = ServerHome(home)
    own.serving()
    if resume is not None:
        folder = resume.resolve()
        order = Order(home=str(home.resolve()), folder=str(folder), from_round=from_round)
    else:
        assert experiment is not None, "the command line asks for one or the other"
        folder = free_folder(experiment).resolve()
        output = experiment.output.model_copy(update={"folder": str(folder)})
        file = own.requests / f"{experiment.name}-{os.getpid()}.toml"
        write_whole(file, replace(experiment, output=output).to_toml().encode())
        order = Order(home=str(home.resolve()), folder=str(folder), experiment=str(file.resolve()))
    observer.stage("asking Flower to start the run")
    path, number = server.submit(own, order)
    return server.follow(own, path, number, observer)


def allow(home: Path, name: str, public: Path) -> int:
    """Let a client in; return its number.

    Raises:
        OutputError: The file cannot be read.
        IdentityError: It holds no key, or the name is taken.
    """
    try:
        line = public.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise OutputError(f"cannot read {public}: {error}") from None
    return ServerHome(home).members().allow(name, line)


def serve(
    home: Path, host: str, port: int, door: int, *, insecure: bool, say: Callable[[str], object]
) -> None:
    """Serve until told to stop, and say when clients can join."""
    own = ServerHome(home)
    server.require_stopped(own)
    if insecure:
        say(
            "warning: no TLS and no authentication: everybody on the network can read and take part"
        )

    def ready(serving: object) -> None:
        say(f"clients can join at port {door}; Flower listens at port {port}; folder {home}")

    server.start(own, host=host, port=port, door=door, insecure=insecure, ready=ready)


def stop_server(home: Path) -> int:
    """Tell the server in a folder to stop; return its process."""
    return _end(ServerHome(home).serving().pid)


def take_part(
    home: Path,
    address: str,
    key: Path,
    authority: Path | None,
    own: Path | None,
    say: Callable[[str], object],
) -> None:
    """Take part in a federation until told to stop, and say under which number."""
    if authority is None:
        say("warning: no TLS: everybody on the network can read along")

    def ready(joining: object) -> None:
        say(f"joined {address} as client {getattr(joining, 'number', '?')}; folder {home}")

    client.join(ClientHome(home), address, key=key, authority=authority, own=own, ready=ready)


def leave(home: Path) -> int:
    """Tell the client in a folder to stop; return its process.

    Raises:
        ConnectionFailed: None runs there.
    """
    try:
        return _end(int((home / client.PID).read_text()))
    except (OSError, ValueError):
        raise ConnectionFailed(f"no client runs in {home}") from None


def stop_runs(home: Path) -> list[str]:
    """Stop all runs under way; return Flower's numbers of them."""
    own = ServerHome(home)
    own.serving()
    running = server.under_way(own)
    for number in running:
        server.stop_run(own, number)
    return running


def status(home: Path) -> Table:
    """Return the server, its clients and the runs under way as a table."""
    own = ServerHome(home)
    serving = own.serving()
    states = {}
    for node in flwr(own.flower, "supernode", "ls", server.LINK)["nodes"]:
        states[str(node["node-id"])] = str(node["status"])
    running = server.under_way(own)
    table = Table(
        title=f"server in {home}: process {serving.pid}, ports {serving.port} and {serving.door}, "
        f"{'no TLS' if serving.insecure else 'TLS'}, {len(running)} runs under way",
        box=None,
    )
    table.add_column("client", justify="right")
    table.add_column("name")
    table.add_column("state")
    nodes = server.registered(own)
    for number, member in enumerate(own.members().members):
        state = states.get(nodes.get(member.key, ""), "not seen")
        table.add_row(str(number), member.name, "revoked" if member.revoked else state)
    return table


def _end(process: int) -> int:
    try:
        os.kill(process, signal.SIGTERM)
    except ProcessLookupError:
        raise ConnectionFailed(f"process {process} is gone already") from None
    return process
