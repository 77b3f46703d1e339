"""One file, one algorithm: settings, server side and client side, and the paper it comes from."""

from __future__ import annotations

from typing import Any

from fedloom.methods.base import Method
from fedloom.methods.centralised import Centralised, CentralisedSettings
from fedloom.methods.fedavg import FedAvg, FedAvgSettings
from fedloom.methods.local_only import LocalOnly, LocalOnlySettings

MethodSettings = FedAvgSettings | CentralisedSettings | LocalOnlySettings

METHODS: dict[str, tuple[type[MethodSettings], Any]] = {
    "fedavg": (FedAvgSettings, FedAvg),
    "centralised": (CentralisedSettings, Centralised),
    "local_only": (LocalOnlySettings, LocalOnly),
}
"""Name in ``[method]`` to its settings and its class."""


def make_method(settings: MethodSettings) -> Method:
    """Return the method that ``settings`` describe."""
    method: Method = METHODS[settings.name][1](settings)
    return method
