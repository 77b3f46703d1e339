"""An experiment: one section of settings for each part, checked together.

Each part owns its section; here they meet. Nothing is loaded and nothing runs in this file
(``assembly.py`` builds the parts, ``runner.py`` runs them).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from fedloom.admission import AdmissionSettings
from fedloom.data.partition import PartitionSettings
from fedloom.data.public import PublicSettings
from fedloom.data.sources import DataSettings
from fedloom.errors import SettingsError
from fedloom.evaluation.held_out import EvaluationSettings
from fedloom.methods import METHODS, MethodSettings, make_method
from fedloom.methods.base import TASKS, AggregationSettings
from fedloom.methods.distillation import DistillationSettings
from fedloom.methods.fedamole import FedAMoLESettings
from fedloom.methods.fedavg import FedAvgSettings
from fedloom.methods.split import SplitSettings
from fedloom.models.adapters import PROMPTS, AdapterSettings
from fedloom.models.load import ModelSettings
from fedloom.objectives import OBJECTIVES, ObjectiveSettings
from fedloom.objectives.dpo import DPOSettings
from fedloom.server import FederationSettings
from fedloom.settings import (
    Of,
    Settings,
    Table,
    is_text,
    nearest,
    override,
    parse,
    read_toml,
    require_section,
    write_toml,
)
from fedloom.training.optimizers import TrainingSettings

COMPARE = "compare"
"""Section that makes an experiment file a comparison (``comparison.py``)."""

Tracker = Literal["tensorboard", "wandb", "mlflow"]


class OutputSettings(Settings):
    """``[output]``: what a run leaves behind."""

    folder: str | None = None
    """The run folder (default: runs/NAME, with a number added while that exists)."""
    checkpoint_every: int = Field(default=1, ge=1)
    """Rounds between checkpoints; the last two are kept."""
    trackers: list[Tracker] = []
    """Also send figures to "tensorboard" (files in the run folder), "wandb" or "mlflow"."""
    verify: bool = True
    """Whether what was saved is loaded afresh at the end, by transformers and PEFT, and compared with the
    model that was trained; a difference is an error. At clients too."""


class ClientGroup(Settings):
    """``[clients.groups.NAME]``: clients that compute with something else than the others."""

    clients: list[int] = Field(min_length=1)
    """Their ids."""
    model: str | None = None
    """Their backbone (default: model.path)."""
    rank: int | None = Field(default=None, ge=1)
    """Their LoRA rank (default: adapter.rank)."""


class ClientsSettings(Settings):
    """``[clients]``: what clients differ in beside their data."""

    groups: dict[str, ClientGroup] = {}
    """Groups by name; clients in none have what [model] and [adapter] say."""
    newcomers: list[int] = []
    """Clients that join when training is over: given what is shared, they make newcomer_steps on their
    own rows and are judged before and after."""
    newcomer_steps: Annotated[int, Of("joins", (True,), "clients.newcomers names nobody")] = Field(
        default=20, ge=1
    )
    """Optimizer steps that each of them makes."""

    def contradictions(self, clients: int) -> list[str]:
        """Return what in these settings cannot both be meant."""
        found = [
            f"clients.newcomers: there is no client {client} (0 to {clients - 1})"
            for client in self.newcomers
            if not 0 <= client < clients
        ]
        if len(set(self.newcomers)) >= clients:
            found.append("clients.newcomers: nobody is left to train")
        homes: dict[int, str] = {}
        for name, group in self.groups.items():
            for client in group.clients:
                if not 0 <= client < clients:
                    found.append(
                        f"clients.groups.{name}: there is no client {client} (0 to {clients - 1})"
                    )
                if client in homes:
                    found.append(
                        f"clients.groups: client {client} is in {homes[client]} and in {name}"
                    )
                homes[client] = name
        return found


@dataclass(frozen=True)
class Experiment:
    """What is trained, on what, by whom and how often; every section has usable defaults.

    Attributes:
        name: Names the run folder; the TOML file's name without its ending.
        objective: Settings of one of ``fedloom.objectives.OBJECTIVES``.
        method: Settings of one of ``fedloom.methods.METHODS``.
    """

    name: str = "experiment"
    model: ModelSettings = field(default_factory=ModelSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    data: DataSettings = field(default_factory=DataSettings)
    public: PublicSettings = field(default_factory=PublicSettings)
    clients: ClientsSettings = field(default_factory=ClientsSettings)
    partition: PartitionSettings = field(default_factory=PartitionSettings)
    objective: ObjectiveSettings = field(default_factory=DPOSettings)
    method: MethodSettings = field(default_factory=FedAvgSettings)
    federation: FederationSettings = field(default_factory=FederationSettings)
    aggregation: AggregationSettings = field(default_factory=AggregationSettings)
    admission: AdmissionSettings = field(default_factory=AdmissionSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    output: OutputSettings = field(default_factory=OutputSettings)

    @classmethod
    def from_toml(
        cls, path: str | Path, assignments: Iterable[str] = (), name: str | None = None
    ) -> Experiment:
        """Read an experiment file and apply ``section.key=value`` assignments.

        Args:
            path: The file.
            assignments: As after ``--set``.
            name: Names the run (default: the file's name without its ending).

        Raises:
            SettingsError: With every mistake found in the file.
        """
        path = Path(path)
        table = read_toml(path)
        require_section(table, str(path))
        table = override(table, assignments)
        return cls.from_table(table, name=name or path.stem, source=str(path))

    @classmethod
    def from_table(
        cls, table: Mapping[str, Any], name: str = "experiment", source: str = "the experiment"
    ) -> Experiment:
        """Check a table of sections; see :meth:`from_toml`."""
        table = dict(table)
        problems: list[str] = []
        name = str(table.pop("name", name))
        if not is_text(name):  # of a file whose name is no UTF-8
            problems.append(f"the name {name!r} cannot be written; rename the file, or set name")
            name = "experiment"
        if COMPARE in table:
            del table[COMPARE]
            problems.append(f"[{COMPARE}]: this is a comparison; run it with fedloom compare")
        for section in sorted(table.keys() - SECTIONS.keys()):
            problems.append(f"[{section}]: unknown section; {nearest(section, SECTIONS)}")
        parts: dict[str, Any] = {}
        for section in SECTIONS:
            settings, complaints = _parse_section(section, table.get(section, {}))
            problems += complaints
            if settings is not None:
                parts[section] = settings
        problems += _contradictions(parts)
        if problems:
            raise SettingsError(problems, source)
        return cls(name=name, **parts)

    def __post_init__(self) -> None:
        """Refuse sections that contradict each other, however the experiment was made.

        Raises:
            SettingsError: With every contradiction.
        """
        problems = _contradictions({f.name: getattr(self, f.name) for f in fields(self)})
        if problems:
            raise SettingsError(problems)

    def to_table(self, *, defaults: bool = True) -> Table:
        """Return every setting, or those that are not at their default and what sections are named."""
        table: Table = {"name": self.name}
        for section in SECTIONS:
            own = getattr(self, section)
            table[section] = own.model_dump(exclude_defaults=not defaults)
            if hasattr(own, "name"):
                table[section]["name"] = own.name
        return table

    def to_toml(self, *, defaults: bool = True) -> str:
        """Return the resolved experiment as TOML, with or without what is at its default."""
        return write_toml(self.to_table(defaults=defaults))

    @property
    def kind(self) -> str:
        """Kind of example the data holds."""
        return data_kind(self.data)

    @property
    def reference(self) -> Literal["start", "base"]:
        """Which model is the reference: as set, or what the run starts from, or the base model."""
        chosen = getattr(self.objective, "reference", None)
        return chosen or ("base" if self.adapter.start is None else "start")

    @property
    def judges_clients(self) -> bool:
        """Whether clients are judged by rows of their own; no client of a split model has all of it."""
        return self.evaluation.per_client and not isinstance(self.method, SplitSettings)


SECTIONS: dict[str, type[Settings] | Mapping[str, Any]] = {
    "model": ModelSettings,
    "adapter": AdapterSettings,
    "data": DataSettings,
    "public": PublicSettings,
    "clients": ClientsSettings,
    "partition": PartitionSettings,
    "objective": OBJECTIVES,
    "method": METHODS,
    "federation": FederationSettings,
    "aggregation": AggregationSettings,
    "admission": AdmissionSettings,
    "training": TrainingSettings,
    "evaluation": EvaluationSettings,
    "output": OutputSettings,
}
"""Section to its settings, or to a choice of settings by name."""

DEFAULT_NAMES = {"objective": "dpo", "method": "fedavg"}


def keys_of(section: str, table: Mapping[str, Any]) -> Iterable[str]:
    """Return the keys that a section may have, as a table names the objective or the method."""
    choice = SECTIONS[section]
    if isinstance(choice, type):
        return choice.model_fields
    own = table.get(section, {})
    name = str(own.get("name")) if isinstance(own, Mapping) else ""
    settings_class: type[Settings] = choice[name if name in choice else DEFAULT_NAMES[section]][0]
    return settings_class.model_fields


def data_kind(settings: DataSettings) -> str:
    """Return the kind of example a source holds: as set, or as built in."""
    return settings.kind or settings.builtin_kind or ""


def _parse_section(section: str, table: object) -> tuple[Settings | None, list[str]]:
    choice = SECTIONS[section]
    if isinstance(choice, type):
        return parse(choice, table, section)
    if not isinstance(table, Mapping):
        return None, [f"[{section}] must be a section, not {table!r}"]
    name = table.get("name", DEFAULT_NAMES[section])
    if name not in choice:
        return None, [f"{section}.name = {name!r}: {nearest(str(name), choice)}"]
    settings_class: type[Settings] = choice[name][0]
    foreign = _foreign(section, choice, name, table)
    own = {key: value for key, value in table.items() if key not in foreign}
    settings, problems = parse(settings_class, own, section)
    return (None if foreign else settings), [*foreign.values(), *problems]


def _foreign(
    section: str, choice: Mapping[str, Any], name: str, table: Mapping[str, Any]
) -> dict[str, str]:
    """Return, for each key that another choice owns and this one does not, what to say about it."""
    found = {}
    for key in table.keys() - choice[name][0].model_fields.keys():
        owners = [other for other, (settings, _) in choice.items() if key in settings.model_fields]
        if owners:
            found[key] = (
                f"{section}.{key} is a setting of {' and '.join(owners)}; {section}.name is {name!r}"
            )
    return dict(sorted(found.items()))


def _contradictions(parts: Mapping[str, Any]) -> list[str]:
    """Return what cannot both be meant, among the sections that are sound by themselves."""
    found: list[str] = []
    if "training" in parts:
        found += parts["training"].contradictions()
    if "admission" in parts:
        found += parts["admission"].contradictions()
        method = parts["method"].name if "method" in parts else ""
        if parts["admission"].max_change is not None and method in ("distillation", "split"):
            found.append(
                f"admission.max_change bounds changes of parameters; those of method.name = {method!r} "
                "do not travel"
            )
    if "federation" in parts:
        federation: FederationSettings = parts["federation"]
        if federation.cohort_size > federation.clients:
            found.append(
                f"federation.clients_per_round = {federation.clients_per_round} is above "
                f"federation.clients = {federation.clients}"
            )
        found += federation.contradictions()
        if "aggregation" in parts:
            found += parts["aggregation"].contradictions(federation.cohort_size)
        if "partition" in parts:
            found += parts["partition"].contradictions(federation.clients)
        if "clients" in parts:
            found += parts["clients"].contradictions(federation.clients)
    if "evaluation" in parts and "data" in parts:
        found += _judging_contradictions(parts["evaluation"], parts["data"])
    for section in ("adapter", "public"):
        if section in parts:
            found += parts[section].contradictions()
    if "adapter" in parts and "model" in parts:
        found += _quantization_contradictions(parts["adapter"].kind, parts["model"].quantization)
    if "method" in parts and "objective" in parts:
        found += _framework_contradictions(parts)
        found += _parameter_contradictions(parts)
        found += _amount_contradictions(parts)
    if "adapter" in parts:
        found += _start_contradictions(parts)
    if "method" in parts and "clients" in parts and parts["clients"].newcomers:
        found += _newcomer_contradictions(parts)
    if "data" in parts:
        found += parts["data"].contradictions()
    if parts.keys() >= {"data", "method", "partition", "federation"}:
        found += _files_contradictions(parts)
    if "data" in parts and "method" in parts and parts["data"].is_private:
        found += _private_contradictions(parts)
    if "data" in parts and "objective" in parts:
        found += _kind_contradictions(parts["data"], parts["objective"])
        found += _feedback_contradictions(parts)
    return found


def _start_contradictions(parts: Mapping[str, Any]) -> list[str]:
    """Return what cannot start from an adapter that exists, or needs one."""
    adapter: AdapterSettings = parts["adapter"]
    if adapter.start is None:
        if getattr(parts.get("objective"), "reference", None) == "start":
            return [
                'objective.reference = "start" is the model that adapter.start gives: set that too'
            ]
        return []
    found = []
    if adapter.kind == "submixture":
        found.append(
            'adapter.start: adapter.kind = "submixture" trains the model\'s own experts; give a trained '
            "model as model.path"
        )
    if "method" not in parts:
        return found
    method: Any = parts["method"]
    kind = METHODS[method.name][1]
    if kind.no_start:
        found.append(f"adapter.start: method.name = {method.name!r} cannot: {kind.no_start}")
    for name in ("server_model", "server_rank"):
        if getattr(method, name, None) is not None:
            found.append(f"adapter.start is of one model and rank: leave method.{name} out")
    groups = parts["clients"].groups if "clients" in parts else {}
    for name, group in groups.items():
        if group.model is not None:
            found.append(f"adapter.start is of one model: leave clients.groups.{name}.model out")
        if group.rank is not None and not kind.mixed_ranks:
            found.append(
                f"adapter.start is of one rank, which method.name = {method.name!r} does not change: "
                f"leave clients.groups.{name}.rank out"
            )
    return found


def _quantization_contradictions(adapter: str, quantization: str) -> list[str]:
    """Return what cannot be trained on a backbone in 8 or 4 bits: its own weights."""
    if quantization == "none" or adapter not in ("full", "submixture"):
        return []
    return [
        f"adapter.kind = {adapter!r} trains weights of the backbone itself, which model.quantization = "
        f'{quantization!r} keeps in few bits: use adapter.kind = "lora", or leave model.quantization out'
    ]


def _private_contradictions(parts: Mapping[str, Any]) -> list[str]:
    """Return what needs rows that the coordinator does not have."""
    found, method = [], parts["method"].name
    if method == "centralised":
        found.append('method.name = "centralised" puts all rows together; data.source = "clients"')
    if METHODS[method][1].needs_public and "public" in parts and parts["public"].source is None:
        found.append(
            f'method.name = {method!r} needs public rows, and data.source = "clients" are private: name '
            "public.source"
        )
    if "partition" in parts and parts["partition"].feedback == "spread":
        found.append('partition.feedback = "spread" deals rows anew; data.source = "clients"')
    return found


def _files_contradictions(parts: Mapping[str, Any]) -> list[str]:
    """Return what does not go with a file for each client."""
    data, federation, found = parts["data"], parts["federation"], []
    if parts["partition"].kind != "files":
        return []
    what = 'partition.kind = "files"'
    if data.is_builtin or data.is_private or data.domains:
        return [f"{what} needs data.source = [...], a file for each client"]
    if len(data.sources) != federation.clients:
        found.append(
            f"{what}: data.source names {len(data.sources)} files, federation.clients is "
            f"{federation.clients}"
        )
    if data.test_source is None:
        found.append(f"{what}: all rows are the clients'; name a held-out set, data.test_source")
    if parts["partition"].feedback == "spread":
        found.append(f'partition.feedback = "spread" deals rows anew; {what}')
    needs_public = METHODS[parts["method"].name][1].needs_public
    if needs_public and "public" in parts and parts["public"].source is None:
        found.append(
            f"method.name = {parts['method'].name!r} needs public rows, and with {what} all are the "
            "clients': name public.source"
        )
    return found


def _newcomer_contradictions(parts: Mapping[str, Any]) -> list[str]:
    """Return why nobody can join at the end."""
    name, found = parts["method"].name, []
    if name in ("centralised", "split", "distillation"):
        found.append(f"clients.newcomers go with methods that share parameters; {name!r} does not")
    if "evaluation" in parts and not parts["evaluation"].per_client:
        found.append("clients.newcomers are judged by rows of their own: evaluation.per_client")
    return found


def _framework_contradictions(parts: Mapping[str, Any]) -> list[str]:
    """Return what the frameworks beyond parameter exchange cannot do, or need."""
    found = []
    method: Any = parts["method"]
    if method.name in ("distillation", "split") and parts["objective"].name not in TASKS:
        found.append(
            f"method.name = {method.name!r} works with objective.name = {' or '.join(TASKS)}, not with "
            f"{parts['objective'].name!r}"
        )
    groups = "clients" in parts and parts["clients"].groups
    if isinstance(method, DistillationSettings):
        labelled = "public" in parts and parts["public"].labelled
        if method.rule == "lowest_loss" and not labelled:
            found.append('method.rule = "lowest_loss" needs public.labelled = true')
        if "adapter" in parts and parts["adapter"].kind != "lora":
            ranks = [name for name, group in (groups or {}).items() if group.rank]
            found += [f"clients.groups.{name}.rank is a setting of lora" for name in ranks]
            if method.server_rank:
                found.append("method.server_rank is a setting of lora")
    if isinstance(method, SplitSettings):
        training = parts.get("training")
        if training and (training.micro_batch_size or training.accumulation):
            found.append(
                "method split sends an optimizer batch at a time: leave training.micro_batch_size and "
                "training.accumulation out"
            )
        if training and training.keep_optimizer_state:
            found.append(
                "method split makes its optimizers anew in every round: leave "
                "training.keep_optimizer_state out"
            )
        if training and training.gradient_checkpointing:
            found.append(
                "method split keeps activations on both sides: leave "
                "training.gradient_checkpointing out"
            )
        if "adapter" in parts and parts["adapter"].kind in PROMPTS:
            found.append(
                f'adapter.kind = "{parts["adapter"].kind}" puts its tokens before the first block; '
                'method split needs "lora", "ia3" or "full"'
            )
    return found


def _judging_contradictions(evaluation: EvaluationSettings, data: DataSettings) -> list[str]:
    if evaluation.judged_by == "loss":
        return []
    if data.choices:
        return ['evaluation.judged_by = "rouge_l", but data.choices are judged by accuracy']
    if data_kind(data) != "instruction":
        return [f'evaluation.judged_by = "rouge_l" is for instructions, not {data_kind(data)}']
    return []


def _parameter_contradictions(parts: Mapping[str, Any]) -> list[str]:
    """Return what methods that share parameters cannot do with these adapters, heads and clients."""
    found = []
    method: Any = parts["method"]
    kind = METHODS[method.name][1]
    factors = method.name in ("fedsa_lora", "ffa_lora", "feddpa") or kind.mixed_ranks
    factors = factors or kind.moves_backbone
    if factors and "adapter" in parts and parts["adapter"].kind != "lora":
        found.append(
            f"method.name = {method.name!r} treats the two factors of LoRA apart: use adapter.kind = "
            '"lora"'
        )
    if (
        isinstance(method, FedAMoLESettings)
        and {"adapter", "clients", "federation"} <= parts.keys()
    ):
        found += _expert_contradictions(parts, method)
    if "aggregation" in parts and parts["aggregation"].rule != "mean" and not kind.averages:
        found.append(
            f"aggregation.rule = {parts['aggregation'].rule!r}: method.name = {method.name!r} puts "
            "updates together in a way of its own"
        )
    if "adapter" in parts:
        found += _submixture_contradictions(parts["adapter"].kind, method.name)
    if method.name == "fedpdpo" and OBJECTIVES[parts["objective"].name][1].head != "causal":
        found.append(
            "method.name = 'fedpdpo' gives clients heads over a vocabulary, and objective.name = "
            f"{parts['objective'].name!r} has one over classes; fedper and fedrep keep that one"
        )
    if method.name == "scaffold" and "training" in parts and parts["training"].head_learning_rate:
        found.append(
            "training.head_learning_rate: method.name = 'scaffold' divides by one learning rate for all "
            "tensors"
        )
    if method.name == "flora" and "training" in parts and parts["training"].keep_optimizer_state:
        found.append(
            "training.keep_optimizer_state: method.name = 'flora' begins every round with fresh factors, "
            "of which an optimizer knows nothing"
        )
    if kind.moves_backbone and "model" in parts and parts["model"].quantization != "none":
        found.append(
            f"model.quantization: method.name = {method.name!r} adds to the backbone's weights, which "
            "a quantised one cannot take up"
        )
    groups = "clients" in parts and parts["clients"].groups
    if groups and kind.mixed_ranks and "adapter" in parts:
        found += _rank_contradictions(groups, parts["adapter"].rank, method.name)
    elif groups and not kind.own_models:
        found.append(
            f"clients.groups: method.name = {method.name!r} averages parameters, so all clients need the "
            "same model and rank; flora, flexlora and hetlora allow different ranks, distillation and "
            "local_only both"
        )
    return found


def _amount_contradictions(parts: Mapping[str, Any]) -> list[str]:
    """Return why what a client does in a round cannot be shared by the trainings of its method."""
    if not {"training", "federation"} <= parts.keys() or parts["training"].amount_per == "model":
        return []
    training: TrainingSettings = parts["training"]
    name, rounds = parts["method"].name, parts["federation"].rounds
    method = make_method(parts["method"])
    most = max(method.trainings_of(round, rounds) for round in {1, rounds})
    width = 2 if OBJECTIVES[parts["objective"].name][1].kind == "preference" else 1
    why = " and ".join(
        [f"{most} trainings in a round"] * (most > 1)
        + [f"{method.repeats} optimizer steps on each batch"] * (method.repeats > 1)
    )
    found = []
    for amount, key, least in (
        (training.local_steps, "optimizer steps", most * method.repeats),
        (training.local_examples, "examples", most * method.repeats * width),
    ):
        if amount is not None and amount < least:
            found.append(
                f"{key}: {amount} a client and round is too little for method.name = {name!r}, which "
                f"makes {why}: give {least} at least (training.local_{key.split()[-1]}, or "
                "compare.amount)"
            )
    steps, repeats = training.local_steps, method.repeats
    if steps is not None and steps >= most * repeats and steps % repeats:
        found.append(
            f"optimizer steps: {steps} a client and round do not part into batches for method.name = "
            f"{name!r}, which makes {why}: give {steps // repeats * repeats} or "
            f"{(steps // repeats + 1) * repeats} (training.local_steps, or compare.amount)"
        )
    return found


def _submixture_contradictions(adapter: str, method: str) -> list[str]:
    if adapter == "submixture" and method not in ("fedmoe", "local_only"):
        return [
            "adapter.kind = 'submixture': each client keeps a model of its own, and method.name = "
            f"{method!r} has one for all; use fedmoe or local_only"
        ]
    if method == "fedmoe" and adapter != "submixture":
        return [
            "method.name = 'fedmoe' trains the experts that a backbone has itself: use adapter.kind = "
            f'"submixture", not {adapter!r}'
        ]
    return []


def _expert_contradictions(parts: Mapping[str, Any], method: FedAMoLESettings) -> list[str]:
    """Return what a mixture of experts for each client does not go with."""
    found = []
    if parts["adapter"].kind != "experts":
        found.append(
            "method.name = 'fedamole' assigns experts: use adapter.kind = \"experts\", not "
            f"{parts['adapter'].kind!r}"
        )
    training = parts["federation"].clients - len(parts["clients"].newcomers)
    found += method.contradictions(parts["adapter"].experts, training)
    objective = OBJECTIVES[parts["objective"].name][1] if "objective" in parts else None
    if method.embedding_noise == "gaussian" and objective and objective.needs_mismatched:
        found.append(
            "method.embedding_noise = 'gaussian' promises something of rows that are not trained on, and "
            f"objective.name = {parts['objective'].name!r} compares rows with completions of other rows"
        )
    if "training" in parts and parts["training"].keep_optimizer_state:
        found.append(
            "training.keep_optimizer_state: a client of method.name = 'fedamole' may hold other experts "
            "in the next round"
        )
    return found


def _rank_contradictions(groups: Mapping[str, ClientGroup], largest: int, name: str) -> list[str]:
    """Return what clients of different ranks that share parameters cannot differ in."""
    found = []
    for group, own in groups.items():
        if own.model is not None:
            found.append(
                f"clients.groups.{group}.model: method.name = {name!r} allows other ranks of one model"
            )
        if own.rank is not None and own.rank > largest:
            found.append(
                f"clients.groups.{group}.rank = {own.rank} is above adapter.rank = {largest}, which the "
                f"server's adapter has under method.name = {name!r}: raise adapter.rank"
            )
    return found


def _kind_contradictions(data: DataSettings, objective: ObjectiveSettings) -> list[str]:
    kind, needed = data_kind(data), OBJECTIVES[objective.name][1].accepts
    if not kind or kind in needed:
        return []
    fitting = [name for name, (_, other) in OBJECTIVES.items() if kind in other.accepts]
    return [
        f"objective.name = {objective.name!r} needs {' or '.join(needed)} data and data.source = "
        f"{data.source!r} holds {kind} data; for it use objective.name = {' or '.join(fitting)}"
    ]


def _feedback_contradictions(parts: Mapping[str, Any]) -> list[str]:
    """Return what the settings about single answers ask of an objective or of data without them."""
    found = []
    data: DataSettings = parts["data"]
    single = OBJECTIVES[parts["objective"].name][1].kind == "feedback"
    if data.incomplete_pairs == "feedback" and not single:
        found.append(
            'data.incomplete_pairs = "feedback" makes single answers of pairs, which '
            f"objective.name = {parts['objective'].name!r} cannot train on"
        )
    if "partition" in parts and parts["partition"].feedback == "spread":
        if not single:
            found.append(
                f'partition.feedback = "spread" parts the answers of a pair, and objective.name = '
                f"{parts['objective'].name!r} needs them together; use {' or '.join(_single())}"
            )
        elif data_kind(data) == "feedback":
            found.append(
                'partition.feedback = "spread" is for pairs; the data holds single answers'
            )
    return found


def _single() -> list[str]:
    return [name for name, (_, objective) in OBJECTIVES.items() if objective.kind == "feedback"]
