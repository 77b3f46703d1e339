"""The status of a running server as JSON, and its view on a terminal."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedloom.accounting.quantities import human_seconds
from fedloom.deployment.folders import ServerFolder, ServerStatus
from fedloom.deployment.violations import FILE as VIOLATIONS
from fedloom.deployment.violations import ViolationSummaries, ViolationSummary, read_violations
from fedloom.federation.violations import one_line
from fedloom.security.client_registry import Member

if TYPE_CHECKING:  # showing a status needs no imports of the server
    from fedloom.deployment.gateway import Gateway
    from fedloom.deployment.health import Health
    from fedloom.deployment.run_queue import RunQueue

STATES = {"allowed": "", "revoked": "revoked", "withdrawn": "withdrawn"}


def server_status(
    server_folder: ServerFolder,
    serving: ServerStatus,
    gateway: Gateway,
    queue: RunQueue,
    health: Health,
) -> dict[str, Any]:
    """Return the status of the server, its members and the requested runs."""
    runs, known = queue.listed(), read_violations(server_folder.path / VIOLATIONS)
    playing = any(run["state"] in ("starting", "playing") for run in runs)
    here, (clients, unproven) = gateway.presence(), gateway.open_connections()
    return {
        "server": {
            "folder": str(server_folder.path.resolve()),
            "process": serving.pid,
            "port": serving.port,
            "tls": not serving.insecure,
            "since": serving.since,
            "metrics": serving.metrics,
            "connections": {"clients": clients, "unproven": unproven},
            "problems": health.problems(),
            "warnings": health.warnings(),
        },
        "members": [
            _member(member, here.get(member.number), known, playing=playing, since=serving.since)
            for member in server_folder.members().members
        ],
        "runs": runs,
    }


def _member(
    member: Member,
    presence: tuple[bool, float] | None,
    known: ViolationSummaries,
    *,
    playing: bool,
    since: float,
) -> dict[str, Any]:
    """Return the status of a member.

    Args:
        member: As it is allowed.
        presence: Whether it is connected, and since when.
        known: Summary of the log of violations.
        playing: Whether a run is under way: quarantine belongs to a run, and ends with it.
        since: Start of the server.
    """
    connected, moment = presence or (False, since)
    reason = ""
    if member.state != "allowed":
        reason = f"{member.state} since {member.since}" if member.since else member.state
    elif presence is None:
        reason = "not seen since the server was started"
    elif not connected:
        reason = "not connected: its machine, its network or `fedloom client join` is down"
    return {
        "number": member.number,
        "name": member.name,
        "state": member.state,
        "connected": connected and member.state == "allowed",
        "since": moment,
        "reason": reason,
        "offences": _violations(known.clients.get(member.number), known.run, playing=playing),
    }


def _violations(
    own: ViolationSummary | None, run: str | None, *, playing: bool
) -> dict[str, Any] | None:
    if own is None:
        return None
    here = playing and own.until is not None and own.run == run
    return {
        "kinds": own.kinds,
        "last": {"time": own.time, "kind": own.kind, "reason": one_line(own.reason)},
        "quarantine": {"until": own.until, "run": own.run} if here else None,
    }


def shown(status: Mapping[str, Any]) -> RenderableType:
    """Return a server's status as it is shown on a terminal."""
    server, runs = status["server"], status["runs"]
    secrecy = "TLS" if server["tls"] else "no TLS"
    lines: list[RenderableType] = [
        Text(
            f"server in {server['folder']}: process {server['process']}, port {server['port']}, "
            f"{secrecy}, for {_for(server['since'])}"
        ),
        *(Text(f"problem: {text}", style="red") for text in server["problems"]),
        *(Text(f"warning: {text}", style="yellow") for text in server["warnings"]),
        members_table(status["members"]),
    ]
    if not runs:
        lines.append(Text("no run is under way"))
    for run in runs:
        lines += _run(run)
    return Group(*lines)


def members_table(members: list[dict[str, Any]]) -> Table:
    """Return members as a table, with columns for violations where there are any."""
    violated = any(member["offences"] for member in members)
    table = Table(box=None)
    table.add_column("member", justify="right")
    for column in ("name", "state", "since", "why"):
        table.add_column(column)
    for column in ("offences", "quarantine", "last") if violated else ():
        table.add_column(column)
    for member in members:
        state = STATES[member["state"]] or ("connected" if member["connected"] else "away")
        cells = [str(member["number"]), member["name"], state, _for(member["since"])]
        cells.append(member["reason"])
        if (own := member["offences"]) is not None:
            kinds, last, quarantine = own["kinds"], own["last"], own["quarantine"]
            cells.append(", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
            cells.append(
                f"until round {quarantine['until']} of run {str(quarantine['run'])[:8]}"
                if quarantine
                else "no"
            )
            cells.append(one_line(f"{last['time']} {last['kind']}: {last['reason']}"))
        table.add_row(*map(Text, cells))  # untrusted text is not markup
    return table


def _run(run: Mapping[str, Any]) -> list[RenderableType]:
    """Return lines about a run and its missing clients."""
    where = f" in {run['folder']}" if run["folder"] else ""
    progress = ""
    if run["rounds"] is not None:
        progress = f", round {run['round'] or 0} of {run['rounds']} done"
    state = f"{run['state']} for {_for(run['since'])}{progress}{where}"
    lines: list[RenderableType] = [Text(f"run {run['name']} ({run['id'][:8]}): {state}")]
    lines += [Text(f"  {sentence}") for sentence in run.get("privacy", ())]
    for own in run["attendance"]:
        if own["reason"]:
            away = f"for {_for(own['since'])}" if own["since"] else ""
            text = f"  {own['name']} (client {own['client']}) is missing {away}: {own['reason']}"
            lines.append(Text(text, style="yellow"))
    for own in run["left_out"]:
        text = f"  {own['name']} (client {own['client']}) was left out of round {own['round']}: "
        lines.append(Text(text + own["reason"], style="yellow"))
    if run["warning"]:
        lines.append(Text(f"  {run['warning']}", style="yellow"))
    return lines


def _for(since: float) -> str:
    return human_seconds(max(0.0, time.time() - since))
