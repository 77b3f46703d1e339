"""``[simulation]``: clients of this process: what their devices are like, how they are worked on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import field_validator

from fedloom.federation.devices import DevicesSettings
from fedloom.methods import METHODS
from fedloom.settings.schema import Settings
from fedloom.storage.run_folder import ROUNDS


class SimulationSettings(Settings):
    """``[simulation]``: clients in this process; not read between machines."""

    devices: DevicesSettings | None = None
    """Devices and links; with them each round has a simulated time (default: none)."""

    cohort: Literal["auto"] | int = 1
    """Clients that are trained in lockstep, in passes over the rows of all of them: many small clients of
    a small model train several times faster so. Results differ from those of one by one by rounding,
    and are the same bits whenever the experiment is repeated. auto: by the model's width, the rows of a
    step and the kind of device; 1: one client after another. Clients whose work cannot be stacked are
    trained one by one, and the run says why. Only LoRA's factors can be stacked."""

    replay: str | None = None
    """Of an asynchronous method: the folder of a run between machines. Answers are taken in the order of
    its records, so that the result has the same bits (default: the order of simulated time)."""

    @property
    def replayed(self) -> Path | None:
        """The records of the run that is repeated, if one is."""
        return None if self.replay is None else Path(self.replay) / ROUNDS

    def contradictions(self, method: str) -> list[str]:
        """Return what in these settings cannot be meant, with a method of that name."""
        if self.replay is None:
            return []
        found = []
        if not METHODS[method][1].asynchronous:
            found.append(
                f"simulation.replay repeats in which order answers came, and method.name = {method!r} "
                "waits for all of a round: leave it out"
            )
        if self.devices is not None:
            found.append(
                "simulation.replay and [simulation.devices] both decide in which order answers come: "
                "leave out one of the two"
            )
        return found

    @field_validator("cohort", mode="before")
    @classmethod
    def _cohort(cls, value: object) -> object:
        if value != "auto" and (type(value) is not int or value < 1):
            raise ValueError('give "auto", or a number of clients from 1')
        return value
