"""The view of a method on an experiment, for its checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fedloom.data.partition import PartitionSettings
from fedloom.data.public import PublicSettings
from fedloom.data.sources import DataSettings
from fedloom.methods.contract.traits import MethodTraits
from fedloom.models.adapters import AdapterSettings
from fedloom.models.load import ModelSettings
from fedloom.objectives.base import Objective
from fedloom.privacy.settings import PrivacySettings
from fedloom.training.settings import TrainingSettings

if TYPE_CHECKING:
    from fedloom.aggregation.rules import AggregationSettings


class Group(Protocol):
    """``[clients.groups.NAME]``."""

    @property
    def model(self) -> str | None:
        """Its clients' backbone."""

    @property
    def rank(self) -> int | None:
        """Their LoRA rank."""

    @property
    def rewards(self) -> list[str] | None:
        """What their answers are rewarded for."""


class Clients(Protocol):
    """``[clients]``."""

    @property
    def groups(self) -> Mapping[str, Group]:
        """Groups by name."""

    @property
    def newcomers(self) -> list[int]:
        """Unseen clients."""


class Federation(Protocol):
    """``[federation]``."""

    @property
    def clients(self) -> int:
        """Number of clients."""

    @property
    def rounds(self) -> int:
        """Rounds in all."""

    @property
    def cohort_size(self) -> int:
        """Clients of a round."""

    @property
    def extra(self) -> int:
        """Clients drawn for a round beyond those whose answers count."""

    @property
    def replacements(self) -> int:
        """Most replacements drawn in a round."""


class Admission(Protocol):
    """``[admission]``."""

    @property
    def max_change(self) -> float | None:
        """Largest norm of what a client changed."""

    @property
    def on_excess(self) -> Literal["reject", "clip"]:
        """What becomes of an answer that changed more."""


class Simulation(Protocol):
    """``[simulation]``."""

    @property
    def devices(self) -> object | None:
        """Simulated devices."""


class Evaluation(Protocol):
    """``[evaluation]``."""

    @property
    def per_client(self) -> bool:
        """Whether clients are evaluated on their own rows."""

    @property
    def best_round_by(self) -> str | None:
        """The setting by which the best round's adapter is kept."""


@dataclass(frozen=True)
class ExperimentView:
    """The valid sections of an experiment; ``None`` for any other.

    Attributes:
        method: Settings of the method that is asked.
        methods: Every method by its name, for texts that say which others could be used.
        objective_name: Name in ``[objective]``, "" where the section is not sound.
        objective: Its class.
    """

    method: Any
    methods: Mapping[str, type[MethodTraits]]
    objective_name: str = ""
    objective: type[Objective] | None = None
    model: ModelSettings | None = None
    adapter: AdapterSettings | None = None
    data: DataSettings | None = None
    public: PublicSettings | None = None
    clients: Clients | None = None
    partition: PartitionSettings | None = None
    federation: Federation | None = None
    aggregation: AggregationSettings | None = None
    admission: Admission | None = None
    training: TrainingSettings | None = None
    evaluation: Evaluation | None = None
    privacy: PrivacySettings | None = None
    simulation: Simulation | None = None

    @property
    def name(self) -> str:
        """The method's name in ``[method]``."""
        return str(self.method.name)

    @property
    def groups(self) -> Mapping[str, Group]:
        """Groups of clients by name, but for those whose rewards alone differ; none where not sound."""
        return {
            name: group
            for name, group in (self.clients.groups.items() if self.clients is not None else ())
            if group.rewards is None or group.model is not None or group.rank is not None
        }

    def names_of(
        self,
        attribute: Literal["mixed_ranks", "mixed_models", "submixtures", "takes_merged_products"],
    ) -> list[str]:
        """Return the names of the methods whose class says so."""
        return [name for name, kind in self.methods.items() if getattr(kind, attribute)]
