"""An experiment: one section of settings for each part, checked together.

Each part owns its section; here they meet. Nothing is loaded and nothing runs in this file
(``runs/assembly.py`` builds the parts, ``runs/run.py`` runs them).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fedloom.aggregation.rules import AggregationSettings
from fedloom.data.partition import PartitionSettings
from fedloom.data.public import PublicSettings
from fedloom.data.sources import DataSettings
from fedloom.display.notebook import table
from fedloom.errors import SettingsError
from fedloom.evaluation.held_out import EvaluationSettings
from fedloom.experiment.aliases import with_own_names
from fedloom.experiment.client_privacy import client_privacy_contradictions
from fedloom.experiment.compression import compression_contradictions
from fedloom.experiment.generation import generation_contradictions
from fedloom.experiment.row_privacy import row_privacy_contradictions
from fedloom.experiment.selection import moved_selection, selection_contradictions
from fedloom.experiment.simulation import SimulationSettings
from fedloom.federation.admission import AdmissionSettings
from fedloom.federation.participants import ClientsSettings, FederationSettings
from fedloom.federation.selection import DEFAULT as UNIFORM
from fedloom.federation.selection import SELECTIONS, UniformSettings
from fedloom.methods import DEFAULT, METHODS
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.models.adapters import AdapterSettings
from fedloom.models.load import ModelSettings
from fedloom.objectives import OBJECTIVES
from fedloom.objectives.dpo import DPOSettings
from fedloom.privacy.settings import PrivacySettings
from fedloom.settings.plugins import Choices
from fedloom.settings.schema import NamedSettings, Settings, Table, parse
from fedloom.settings.suggestions import nearest
from fedloom.settings.toml import is_text, override, read_toml, require_section, write_toml
from fedloom.training.settings import TrainingSettings
from fedloom.wire.settings import WireSettings

COMPARE = "compare"
"""Section that makes an experiment file a comparison (``runs/comparison.py``)."""

Importable = Callable[[str, str], bool]
"""Whether the class that a section names may be imported."""

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class OutputSettings(Settings):
    """``[output]``: files of a run."""

    folder: str | None = None
    """The run folder (default: runs/NAME, with a number added while that exists)."""
    checkpoint_every: int = Field(default=1, ge=1)
    """Rounds between checkpoints; the last two are kept."""
    trackers: list[Tracker] = []
    """Also send settings and each round's figures to "tensorboard" (files in the run folder), "wandb",
    "mlflow" or "trackio"."""
    verify: bool = True
    """Whether the saved folders are loaded again at the end, by transformers and PEFT, and compared with
    the trained model; a difference is an error. It applies to clients too."""


@dataclass(frozen=True)
class Experiment:
    """What is trained, on what, by whom and how often; every section has usable defaults.

    Attributes:
        name: Names the run folder; the TOML file's name without its ending.
        objective: Settings of one of ``fedloom.objectives.OBJECTIVES``.
        method: Settings of one of ``fedloom.methods.METHODS``.
        selection: Settings of one of ``fedloom.federation.selection.SELECTIONS``.
        notes: On settings that were read under another name (``aliases.py``), for the user.
    """

    name: str = "experiment"
    model: ModelSettings = field(default_factory=ModelSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    data: DataSettings = field(default_factory=DataSettings)
    public: PublicSettings = field(default_factory=PublicSettings)
    clients: ClientsSettings = field(default_factory=ClientsSettings)
    partition: PartitionSettings = field(default_factory=PartitionSettings)
    objective: NamedSettings = field(default_factory=DPOSettings)
    method: NamedSettings = field(default_factory=METHODS[DEFAULT][0])
    federation: FederationSettings = field(default_factory=FederationSettings)
    selection: NamedSettings = field(default_factory=UniformSettings)
    aggregation: AggregationSettings = field(default_factory=AggregationSettings)
    admission: AdmissionSettings = field(default_factory=AdmissionSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    wire: WireSettings = field(default_factory=WireSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    simulation: SimulationSettings = field(default_factory=SimulationSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    output: OutputSettings = field(default_factory=OutputSettings)
    notes: tuple[str, ...] = field(default=(), compare=False, repr=False)

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
        cls,
        table: Mapping[str, Any],
        name: str = "experiment",
        source: str = "the experiment",
        importable: Importable = lambda section, name: True,
        aliases: bool = True,
    ) -> Experiment:
        """Check a table of sections; see :meth:`from_toml`.

        Args:
            table: Section to its settings.
            name: Names the run, where the table does not.
            source: Where it comes from, for messages.
            importable: Says of a section and a name in it that is not fedloom's whether its class may be
                imported; a table from another machine must not decide that.
            aliases: Whether settings may have the names that they have elsewhere.

        Raises:
            SettingsError: With every mistake found.
        """
        table, notes, problems = with_own_names(table) if aliases else (dict(table), [], [])
        name = str(table.pop("name", name))
        if not is_text(name):  # of a file whose name is not UTF-8
            problems.append(f"the name {name!r} cannot be written; rename the file, or set name")
            name = "experiment"
        if COMPARE in table:
            del table[COMPARE]
            problems.append(f"[{COMPARE}]: this is a comparison; run it with fedloom compare")
        for section in sorted(table.keys() - SECTIONS.keys()):
            problems.append(f"[{section}]: unknown section; {nearest(section, SECTIONS)}")
        table, told, complaints = moved_selection(table)
        notes, problems = [*notes, *told], [*problems, *complaints]
        parts: dict[str, Any] = {}
        for section in SECTIONS:
            settings, complaints = _parse_section(section, table.get(section, {}), importable)
            problems += complaints
            if settings is not None:
                parts[section] = settings
        problems += _contradictions(parts)
        if problems:
            raise SettingsError(problems, source)
        return cls(name=name, notes=tuple(notes), **parts)

    def __post_init__(self) -> None:
        """Refuse sections that contradict each other, however the experiment was made.

        Raises:
            SettingsError: With every contradiction.
        """
        problems = _contradictions({f.name: getattr(self, f.name) for f in fields(self)})
        if problems:
            raise SettingsError(problems)

    def to_table(self, *, defaults: bool = True) -> Table:
        """Return every setting, or those that are not at their default and what sections are named.

        Without defaults, a section that has nothing to say is left out: an older release may not know
        it.
        """
        table: Table = {"name": self.name}
        for section in SECTIONS:
            own = getattr(self, section)
            whole = defaults or getattr(own, "profile", None)  # which has defaults of its own
            table[section] = own.model_dump(exclude_defaults=not whole)
            if hasattr(own, "name") and (defaults or own != UniformSettings()):
                table[section]["name"] = own.name
            if not table[section] and not defaults:
                del table[section]
        return table

    def to_toml(self, *, defaults: bool = True) -> str:
        """Return the resolved experiment as TOML, with or without what is at its default."""
        return write_toml(self.to_table(defaults=defaults))

    def _repr_html_(self) -> str:
        """Return a table of the settings that are not at their default, as a notebook shows it."""
        rows = [
            (section, key, json.dumps(value, default=str, ensure_ascii=False))
            for section, own in self.to_table(defaults=False).items()
            if isinstance(own, Mapping)
            for key, value in own.items()
        ]
        notes = [("", "note", note) for note in self.notes]
        return table(f"Experiment {self.name}", ("section", "setting", "value"), [*rows, *notes])

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
    def compares(self) -> bool:
        """Whether pairs are read as questions which answer is better, in both orders."""
        return OBJECTIVES[self.objective.name][1].compares

    @property
    def scores_answers(self) -> bool:
        """Whether the model says one number of an answer, by which held-out pairs are judged."""
        return bool(OBJECTIVES[self.objective.name][1].outputs)

    @property
    def judges_clients(self) -> bool:
        """Whether clients are judged by rows of their own, for which they need the whole model."""
        return self.evaluation.per_client and METHODS[self.method.name][1].whole_at_clients


SECTIONS: dict[str, type[Settings] | Choices[Any]] = {
    "model": ModelSettings,
    "adapter": AdapterSettings,
    "data": DataSettings,
    "public": PublicSettings,
    "clients": ClientsSettings,
    "partition": PartitionSettings,
    "objective": OBJECTIVES,
    "method": METHODS,
    "federation": FederationSettings,
    "selection": SELECTIONS,
    "aggregation": AggregationSettings,
    "admission": AdmissionSettings,
    "privacy": PrivacySettings,
    "wire": WireSettings,
    "training": TrainingSettings,
    "simulation": SimulationSettings,
    "evaluation": EvaluationSettings,
    "output": OutputSettings,
}
"""Section to its settings, or to a choice of settings by name."""

DEFAULT_NAMES = {"objective": "dpo", "method": DEFAULT, "selection": UNIFORM}


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


def _parse_section(
    section: str, table: object, importable: Importable
) -> tuple[Settings | None, list[str]]:
    choice = SECTIONS[section]
    if isinstance(choice, type):
        return parse(choice, table, section)
    if not isinstance(table, Mapping):
        return None, [f"[{section}] must be a section, not {table!r}"]
    name = table.get("name", DEFAULT_NAMES[section])
    if name not in choice:
        return None, [f"{section}.name = {name!r}: {nearest(str(name), choice.names)}"]
    if choice.is_foreign(name) and not importable(section, name):
        if section == "selection":  # who is drawn is the server's affair
            return UniformSettings(), []
        return None, [
            f"{section}.name = {name!r} is a class that is not fedloom's own: nothing is imported that "
            f"policy.{section}s of this client's file does not name. Once its code has been read here, "
            f'{section}s = ["{name}"] in [policy] allows it and what else that line lists, no other'
        ]
    try:
        settings_class: type[Settings] = choice[name][0]
    except SettingsError as error:
        return None, [f"{section}.name = {name!r}: {text}" for text in error.problems]
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
    """Return contradictions between the sections that are valid on their own."""
    found: list[str] = []
    if "training" in parts:
        found += parts["training"].contradictions()
    if "admission" in parts:
        found += parts["admission"].contradictions()
    if "privacy" in parts:
        found += parts["privacy"].contradictions()
        found += row_privacy_contradictions(parts)
        found += client_privacy_contradictions(parts)
    found += selection_contradictions(parts)
    found += generation_contradictions(parts)
    if "wire" in parts:
        found += parts["wire"].contradictions()
        found += compression_contradictions(parts)
    if "federation" in parts:
        found += _federation_contradictions(parts)
    if "evaluation" in parts and "data" in parts:
        found += _judging_contradictions(parts["evaluation"], parts["data"])
    for section in ("adapter", "public"):
        if section in parts:
            found += parts[section].contradictions()
    if "adapter" in parts and "model" in parts:
        found += _quantization_contradictions(parts["adapter"].kind, parts["model"].quantization)
        found += _rounding_contradictions(parts)
    if "method" in parts:
        found += METHODS[parts["method"].name][1].check(_view(parts))
    if "adapter" in parts:
        found += _start_contradictions(parts)
        found += _pattern_contradictions(parts)
    if "clients" in parts and parts["clients"].newcomers:
        found += _unseen_client_contradictions(parts)
    if "data" in parts:
        found += _data_contradictions(parts)
    if parts.keys() >= {"simulation", "method"}:
        found += parts["simulation"].contradictions(parts["method"].name)
    return found


def _federation_contradictions(parts: Mapping[str, Any]) -> list[str]:
    """Return what does not go with how many clients, drawn and in all, and rounds there are."""
    federation: FederationSettings = parts["federation"]
    found: list[str] = []
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
    if "training" in parts:
        found += _warmup_contradictions(federation, parts["training"])
    if "simulation" in parts:
        found += _oversampling_contradictions(federation, parts["simulation"])
    return found


def _data_contradictions(parts: Mapping[str, Any]) -> list[str]:
    """Return what does not go with the rows, and where and how they are read."""
    data = parts["data"]
    found: list[str] = list(data.contradictions())
    if parts.keys() >= {"partition", "federation"}:
        found += _files_contradictions(parts)
    if data.is_private:
        found += _private_contradictions(parts)
    if "objective" in parts:
        found += _kind_contradictions(data, parts["objective"])
        found += _feedback_contradictions(parts)
    if data.streaming:
        found += _streaming_contradictions(parts)
    return found


def _warmup_contradictions(federation: FederationSettings, training: TrainingSettings) -> list[str]:
    if training.warmup_rounds < federation.rounds:
        return []
    return [
        f"training.warmup_rounds = {training.warmup_rounds} leaves none of {federation.rounds} rounds at "
        "the full learning rate; use fewer"
    ]


def _oversampling_contradictions(
    federation: FederationSettings, simulation: SimulationSettings
) -> list[str]:
    """Return why no more clients can be drawn than a round takes."""
    extra, size = federation.extra, federation.cohort_size
    if not extra:
        return []
    found = []
    if simulation.devices is None:
        found.append(
            f"federation.extra = {extra} draws clients of which the latest do not count, which the "
            "simulated clock decides: add [simulation.devices]"
        )
    if size + extra > federation.clients:
        found.append(
            f"federation.extra = {extra}: a round takes {size} of {federation.clients} clients, which "
            f"leaves {federation.clients - size}; lower federation.clients_per_round"
        )
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
    return found


def _pattern_contradictions(parts: Mapping[str, Any]) -> Iterator[str]:
    """Yield which models a regular expression for layers cannot be of, since it is matched once."""
    adapter: AdapterSettings = parts["adapter"]
    if adapter.pattern is None or "model" not in parts:
        return
    others: dict[str, str | None] = {}
    if "clients" in parts:
        groups = parts["clients"].groups.items()
        others |= {f"clients.groups.{name}.model": group.model for name, group in groups}
    if "method" in parts:
        own = METHODS[parts["method"].name][1].named_models
        others |= {f"method.{name}": getattr(parts["method"], name) for name in own}
    for place, path in others.items():
        if path not in (None, parts["model"].path):
            yield (
                f"adapter.targets = {adapter.pattern!r} is matched with layers of one model, and {place} "
                'is another model: give names of layers, such as ["q_proj", "v_proj"]'
            )


def _quantization_contradictions(adapter: str, quantization: str) -> list[str]:
    """Return what cannot be trained on a backbone in 8 or 4 bits: its own weights."""
    if quantization == "none" or adapter not in ("full", "submixture"):
        return []
    return [
        f"adapter.kind = {adapter!r} trains weights of the backbone itself, which model.quantization = "
        f'{quantization!r} keeps in few bits: use adapter.kind = "lora", or leave model.quantization out'
    ]


def _rounding_contradictions(parts: Mapping[str, Any]) -> Iterator[str]:
    """Yield why first factors cannot be cut out of frozen weights in few bits."""
    adapter: AdapterSettings = parts["adapter"]
    precision = parts["training"].precision if "training" in parts else "fp32"
    asked = {"model.quantization": parts["model"].quantization, "training.precision": precision}
    for setting, value in asked.items():
        if adapter.cuts and value not in ("none", "fp32"):
            yield (
                f'adapter.init_lora_weights = "{adapter.init_lora_weights}" cuts factors out of frozen '
                f"weights, whose rest {setting} = {value!r} would round: leave one of the two out"
            )


def _private_contradictions(parts: Mapping[str, Any]) -> list[str]:
    """Return what needs rows that the coordinator does not have."""
    found = []
    if "partition" in parts and parts["partition"].feedback == "spread":
        found.append('partition.feedback = "spread" redistributes rows; data.source = "clients"')
    return found


def _streaming_contradictions(parts: Mapping[str, Any]) -> list[str]:
    """Return what needs all rows in memory, with rows that stay in their files."""
    data, found, what = parts["data"], [], "data.streaming = true"
    if "partition" in parts and parts["partition"].kind == "files":
        found.append(
            f'{what}: partition.kind = "files" reads each client\'s file whole, as clients do'
        )
    if "objective" in parts:
        name = parts["objective"].name
        objective = OBJECTIVES[name][1]
        if objective.needs_mismatched:
            found.append(
                f"{what}: objective.name = {name!r} joins each prompt with the completion of another row"
            )
        elif objective.kind == "feedback" and data_kind(data) == "preference":
            found.append(f"{what}: objective.name = {name!r} makes two single answers of each pair")
    own_public = "public" in parts and parts["public"].source is not None
    method = parts.get("method")
    needed = method is not None and METHODS[method.name][1].public_rows_needed(method)
    if needed and not own_public:
        found.append(
            f"{what}: method.name = {parts['method'].name!r} draws its public rows from all rows; name "
            "others as public.source"
        )
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
        found.append(f'partition.feedback = "spread" redistributes rows; {what}')
    return found


def _unseen_client_contradictions(parts: Mapping[str, Any]) -> list[str]:
    """Return why there can be no unseen clients."""
    if "evaluation" in parts and not parts["evaluation"].per_client:
        return [
            "clients.newcomers are evaluated on their own rows: set evaluation.per_client = true"
        ]
    return []


def _view(parts: Mapping[str, Any]) -> ExperimentView:
    """Return the view of a method on the valid sections."""
    own = {name: part for name, part in parts.items() if name in _SEEN}
    kinds = {name: kind for name, (_, kind) in METHODS.items()}
    if "objective" in parts:
        name = parts["objective"].name
        own |= {"objective_name": name, "objective": OBJECTIVES[name][1]}
    return ExperimentView(methods=kinds, **own)


def view_of(experiment: Experiment) -> ExperimentView:
    """Return what a method sees of an experiment."""
    return _view({name: getattr(experiment, name) for name in SECTIONS})


_SEEN = {own.name for own in fields(ExperimentView)} - {"methods", "objective", "objective_name"}


def _judging_contradictions(evaluation: EvaluationSettings, data: DataSettings) -> list[str]:
    if evaluation.judged_by == "loss":
        return []
    said = f'evaluation.judged_by = "{evaluation.judged_by}"'
    if data.choices:
        return [f"{said}, but data.choices are judged by accuracy"]
    if data_kind(data) != "instruction":
        return [f"{said} is for instructions, not {data_kind(data)}"]
    return []


def _kind_contradictions(data: DataSettings, objective: NamedSettings) -> list[str]:
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
