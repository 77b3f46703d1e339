"""What decides the order of a run's answers, and its checks before data and model are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fedloom.errors import SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.federation.asynchronous import (
    Arrivals,
    ArrivalsByMachine,
    RecordedArrivals,
    recorded_arrivals,
)
from fedloom.federation.clock import SimulatedClock
from fedloom.federation.devices import DevicesSettings, devices_of
from fedloom.federation.engine import RemoteEngine
from fedloom.methods import METHODS
from fedloom.security.audit_log import SUBMITTED

Notify = Callable[[int, int, int, int], object]


def order_of_answers(
    experiment: Experiment,
    remote: RemoteEngine | None = None,
    notify: Notify = lambda round, client, done, of: None,
) -> Arrivals | None:
    """Return what decides the order of answers, ``None`` where rounds simply wait for all of them.

    In a simulation it is the simulated clock, which an asynchronous method has in any case, by default
    with devices that are all alike; or the records of a run between machines. There it is the order in
    which answers reach the server.

    Args:
        experiment: The run's.
        remote: Where the clients are, if not in this process.
        notify: Called with round, client, and as which of how many its answer came, between machines.

    Raises:
        DataError: The trace of devices is not there.
        SettingsError: It is no trace of these clients, or records are none of such a run, or clients are
            other machines and the section is about simulated ones.
    """
    settings, federation = experiment.simulation.devices, experiment.federation
    asynchronous = METHODS[experiment.method.name][1].asynchronous
    if remote is not None:
        _require_on_machines(experiment, remote)
        return ArrivalsByMachine(federation, engine=remote, notify=notify) if asynchronous else None
    if (path := experiment.simulation.replayed) is not None:
        stops_early = experiment.evaluation.early_stopping_patience is not None
        recorded = recorded_arrivals(path, federation, stops_early=stops_early)
        return RecordedArrivals(federation, recorded=recorded)
    if settings is None and not asynchronous:
        return None
    devices = devices_of(settings or DevicesSettings(), federation.clients, federation.seed)
    return SimulatedClock(devices, federation, asynchronous)


def not_taken(
    events: Iterable[Mapping[str, Any]], clock: Mapping[str, Any] | None
) -> list[Mapping[str, Any]]:
    """Return the events of messages whose answers do not count, of a run that goes on.

    They are those whose answers were refused, and those that asked for work that was in flight at the
    checkpoint: it is asked for once more, so that a client which had done it already begins from what it
    stored before.

    Args:
        events: Of the audit log, ``undone`` and ``submitted`` among them.
        clock: What the checkpoint holds of work in flight.
    """
    in_flight = {(own["client"], own["round"]) for own in (clock or {}).get("in_flight", [])}
    return [
        own
        for own in events
        if own["event"] == "undone"
        or (own["event"] == SUBMITTED and (own["client"], own["round"]) in in_flight)
    ]


def _require_on_machines(experiment: Experiment, remote: RemoteEngine) -> None:
    """Check that nothing is asked for that clients on other machines cannot have.

    Raises:
        SettingsError: Something is.
    """
    simulation, problem = experiment.simulation, ""
    if simulation.devices is not None:
        problem = "[simulation.devices] is about clients in this process"
        cure = "leave the section out, or run it with --engine simulation"
    elif simulation.replay is not None:
        problem = "simulation.replay repeats the order of other machines' answers in this process"
        cure = "leave it out, or run it with --engine simulation"
    if problem:
        raise SettingsError(
            [f"{problem}, and with --engine {remote.name} clients are other machines: {cure}"],
            "the command",
        )
