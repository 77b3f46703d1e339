"""What may be asked of a server that runs: who is let in, who is there, what is under way."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fedloom.deployment.children import LINK, flwr
from fedloom.deployment.homes import ServerHome
from fedloom.deployment.offences import FILE as OFFENCES
from fedloom.deployment.offences import OffenceSummaries, read_offences
from fedloom.deployment.server import registered, stop_run, under_way
from fedloom.errors import FedloomError, OutputError
from fedloom.offences import one_line


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


def is_running(home: ServerHome, number: str) -> bool:
    """Return whether Flower says that a run is not over; also while it cannot be asked."""
    try:
        runs = flwr(home.flower, "ls", LINK, "--run-id", number)["runs"]
    except FedloomError:
        return True
    return any(not str(run["status"]).startswith("finished") for run in runs)


def stop_runs(home: Path) -> list[str]:
    """Stop all runs under way; return Flower's numbers of them."""
    own = ServerHome(home)
    own.serving()
    running = under_way(own)
    for number in running:
        stop_run(own, number)
    return running


def status(home: Path) -> Group:
    """Return the server, its clients and the runs under way as a table."""
    own = ServerHome(home)
    serving = own.serving()
    states = {}
    for node in flwr(own.flower, "supernode", "ls", LINK)["nodes"]:
        states[str(node["node-id"])] = str(node["status"])
    running = under_way(own)
    secrecy = "no TLS" if serving.insecure else "TLS"
    line = (
        f"server in {home}: process {serving.pid}, port {serving.port}, {secrecy}, "
        f"{len(running)} run{'s' if len(running) != 1 else ''} under way"
    )
    nodes, rows = registered(own), []
    for number, member in enumerate(own.members().members):
        state = states.get(nodes.get(member.key, ""), "not seen")
        rows.append((number, member.name, "revoked" if member.revoked else state))
    known = read_offences(own.path / OFFENCES)
    return Group(Text(line), clients_table(rows, known, playing=bool(running)))


def clients_table(
    clients: Iterable[tuple[int, str, str]], known: OffenceSummaries, *, playing: bool
) -> Table:
    """Return clients as a table, with what is known of their offences where there are any.

    Args:
        clients: Number, name and state of each.
        known: What the log of offences says.
        playing: Whether a run is under way: quarantine is of a run, and ends with it.
    """
    table = Table(box=None)
    table.add_column("client", justify="right")
    for column in ("name", "state", *(("offences", "quarantine", "last") if known.clients else ())):
        table.add_column(column)
    for number, name, state in clients:
        cells, own = [str(number), name, state], known.clients.get(number)
        if own is not None:
            cells.append(", ".join(f"{kind} {count}" for kind, count in sorted(own.kinds.items())))
            here = playing and own.until is not None and own.run == known.run
            cells.append(f"until round {own.until} of run {str(own.run)[:8]}" if here else "no")
            cells.append(one_line(f"{own.time} {own.kind}: {own.reason}"))
        table.add_row(*map(Text, cells))  # what a stranger said is no markup
    return table
