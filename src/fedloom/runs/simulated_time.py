"""The simulated clock of a run, and what can be checked of it before data and model are read."""

from __future__ import annotations

from fedloom.errors import SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.federation.clock import SimulatedClock
from fedloom.federation.devices import DevicesSettings, devices_of
from fedloom.federation.engine import RemoteEngine
from fedloom.methods import METHODS


def simulated_clock(
    experiment: Experiment, remote: RemoteEngine | None = None
) -> SimulatedClock | None:
    """Return the clock of a run from its start, ``None`` where clients have no simulated devices.

    An asynchronous method has one in any case, by default with devices that are all alike.

    Raises:
        DataError: The trace of devices is not there.
        SettingsError: It is no trace of these clients, or clients are other machines, whose devices are
            real.
    """
    settings, federation = experiment.simulation.devices, experiment.federation
    asynchronous = METHODS[experiment.method.name][1].asynchronous
    if remote is not None and (asynchronous or settings is not None):
        what = (
            f"method.name = {experiment.method.name!r} takes answers in the order of simulated time"
            if asynchronous
            else "[simulation.devices] is about clients in this process"
        )
        cure = "choose another method" if asynchronous else "leave the section out"
        raise SettingsError(
            [
                f"{what}, and with --engine {remote.name} clients are other machines: {cure}, or run it "
                "with --engine simulation"
            ],
            "the command",
        )
    if settings is None and not asynchronous:
        return None
    devices = devices_of(settings or DevicesSettings(), federation.clients, federation.seed)
    return SimulatedClock(devices, federation, asynchronous)
