"""``[simulation]``: clients of this process: what their devices are like, how they are worked on."""

from __future__ import annotations

from typing import Literal

from pydantic import field_validator

from fedloom.federation.devices import DevicesSettings
from fedloom.settings.schema import Settings


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

    @field_validator("cohort", mode="before")
    @classmethod
    def _cohort(cls, value: object) -> object:
        if value != "auto" and (type(value) is not int or value < 1):
            raise ValueError('give "auto", or a number of clients from 1')
        return value
