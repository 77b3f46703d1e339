"""The simulated clock of a run, and what can be checked of it before data and model are read."""

from __future__ import annotations

from fedloom.errors import SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.federation.clock import SimulatedClock
from fedloom.federation.devices import devices_of
from fedloom.federation.engine import RemoteEngine
from fedloom.methods import METHODS


def simulated_clock(
    experiment: Experiment, remote: RemoteEngine | None = None
) -> SimulatedClock | None:
    """Return the clock of a run from its start, ``None`` where clients have no simulated devices.

    Raises:
        DataError: The trace of devices is not there.
        SettingsError: It is no trace of these clients, or clients are other machines, whose devices are
            real.
    """
    settings, federation = experiment.simulation.devices, experiment.federation
    if settings is None:
        return None
    asynchronous = METHODS[experiment.method.name][1].asynchronous
    if remote is not None:
        alone = f"method.name = {experiment.method.name!r} is for simulations, and "
        raise SettingsError(
            [
                f"{alone * asynchronous}[simulation.devices] is about clients in this process; with "
                f"--engine {remote.name} they are other machines: leave the engine or the section out"
            ],
            "the command",
        )
    devices = devices_of(settings, federation.clients, federation.seed)
    return SimulatedClock(devices, federation, asynchronous)
