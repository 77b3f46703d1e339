"""Which settings of a server's experiment a client adopts, and which its own file refuses.

The client's experiment is rebuilt from an allow-list. Every setting of an experiment is in one of four
tables here: taken as it is (it can neither choose rows nor cost much), taken where it is not a larger
than a line of the client's ``[policy]``, decided by a function of this file, or left (the server's own
affair, or this machine's). A setting in no table is not adopted, and a test fails for it.

Nothing is read and nothing is loaded in this file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedloom.accounting.cores import available_cores
from fedloom.data.public import PublicSettings
from fedloom.data.sources import BUILTIN_PREFIX, LONGEST_SEQUENCE, DataSettings
from fedloom.deployment.client_file import OwnFile
from fedloom.deployment.policy import REVEALING
from fedloom.errors import PolicyError, Refusal, SettingsError
from fedloom.experiment.experiment import SECTIONS, Experiment, data_kind
from fedloom.federation.participants import ClientGroup, ClientsSettings
from fedloom.methods import METHODS, make_method
from fedloom.methods.contract.method import Method
from fedloom.models.adapters import AdapterSettings
from fedloom.models.load import MADE, ModelSettings
from fedloom.objectives import OBJECTIVES
from fedloom.privacy.settings import PrivacySettings
from fedloom.rewards.functions import REGEX, is_harmless
from fedloom.runs.initial_adapter import SENT
from fedloom.settings.schema import Settings
from fedloom.settings.toml import parse_toml
from fedloom.training.settings import Work

DEEPEST = 50
"""Most dots in a key: a parser would take hours for one of many thousands."""

PART = r"""(?:[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*')"""
DEEP_KEY = re.compile(rf"(?<![A-Za-z0-9_-])(?:{PART}[ \t]*\.[ \t]*){{{DEEPEST + 1}}}")
"""A key of more dots, wherever in the text it stands."""

LONGEST = 256 << 10
"""Characters of an experiment's text: a share for each of ten thousand clients takes a third of that."""

ALWAYS = frozenset({"adapters", "control_variates"})
"""Contents of replies that need no line in the policy."""


def _names(fields: Mapping[str, str]) -> frozenset[str]:
    """Return the whole names of settings that are given by section."""
    return frozenset(
        f"{section}.{name}" for section, names in fields.items() for name in names.split()
    )


TAKEN = _names(
    {
        "model": "quantization dropout",
        "adapter": "kind alpha dropout layers initial_text top_k balance router use_dora use_rslora "
        "init_lora_weights modules_to_save",
        "public": "labelled",
        "clients": "newcomers",
        "clients.groups.*": "clients rewards",
        "partition": "client_test_fraction",
        "objective.dpo": "reference beta label_smoothing sft_weight length_normalised",
        "objective.robust_dpo": "reference beta flip_rate",
        "objective.rpo": "reference beta sft_weight label_smoothing",
        "objective.reward_model": "center_rewards_coefficient margins",
        "objective.apo_zero": "reference beta",
        "objective.apo_down": "reference beta",
        "objective.cpo": "beta sft_weight",
        "objective.ipo": "reference beta",
        "objective.orpo": "beta",
        "objective.simpo": "beta gamma",
        "objective.kto": "reference beta weights desirable_weight undesirable_weight z0",
        "objective.bco": "reference beta",
        "objective.pdpo": "reference beta gamma reward_mode label_smoothing sft_weight",
        "objective.grpo": "reference beta clip clip_high importance_sampling_level averaging scale "
        "temperature rewards reward_weights",
        "objective.rejection_sampling": "minimum temperature rewards reward_weights",
        "objective.pkto": "reference beta weights desirable_weight undesirable_weight z0 gamma",
        "federation": "rounds clients_per_round seed",
        "training": "optimizer learning_rate schedule warmup_rounds decay head_learning_rate "
        "loraplus_lr_ratio neftune_noise_alpha data_seed "
        "min_learning_rate weight_decay beta1 beta2 epsilon momentum max_grad_norm micro_batch_size "
        "accumulation tokens_per_pass local_epochs local_steps local_examples local_tokens total_epochs "
        "amount_per "
        "keep_optimizer_state precision gradient_checkpointing",
        "evaluation": "every max_examples per_client client_max_examples judged_by "
        "load_best_model_at_end metric_for_best_model early_stopping_patience early_stopping_threshold",
        "output": "verify",
        "wire": "up down budget parts auto_rounds auto_loss auto_error error_feedback absence_decay "
        "absence_limit keep_plain_below",
    }
)
"""Settings that are taken as they are, beside the names of objective and method. How much is trained is
bounded once the rows are known (:func:`require_steps`) and meanwhile (``models/request_limits.py``)."""

MOST = {
    "adapter.rank": "max_rank",
    "objective.grpo.group": "max_batch",
    "objective.grpo.max_new_tokens": "max_tokens",
    "objective.grpo.iterations": "max_steps",
    "objective.rejection_sampling.group": "max_batch",
    "objective.rejection_sampling.max_new_tokens": "max_tokens",
    "adapter.virtual_tokens": "max_width",
    "adapter.encoder_width": "max_width",
    "adapter.experts": "max_experts",
    "clients.groups.*.rank": "max_rank",
    "federation.clients": "max_clients",
    "training.batch_size": "max_batch",
    "evaluation.batch_size": "max_batch",
    "evaluation.max_length": "max_tokens",
    "evaluation.max_new_tokens": "max_tokens",
    "output.checkpoint_every": "max_checkpoint_every",
    "public.rows": "max_rows",
    "public.max_length": "max_tokens",
    "data.builtin_rows": "max_rows",
    "data.max_length": "max_tokens",
}
"""Settings that are taken where they are no larger than a line of ``[policy]``."""

PRIVATE = "unit delta clip noise_multiplier target_epsilon accountant column seeded"
"""Of ``[privacy]``, what a client's own steps hide its rows by."""

SHARED = (
    "unit delta clip noise_multiplier target_epsilon seeded noise colluding min_separation "
    "max_participations sum_bits sum_rounding"
)
"""Of ``[privacy]``, what a client's share of the noise on a sum follows from."""

DECIDED = _names(
    {
        "model": "path revision",
        "adapter": "start targets",
        "clients": "groups newcomer_steps",
        "clients.groups.*": "model",
        "data": "source kind choices test_fraction train_on template_date ambiguous",
        "public": "source kind ambiguous control_tokens",
        "partition": "kind column alpha minimum sizes feedback",
        "training": "device threads",
        "privacy": f"{PRIVATE} secure_aggregation noise colluding min_separation max_participations "
        "sum_bits sum_rounding",
    }
)
"""Settings that the functions of this file compare with the client's file, or take in some cases
alone."""

EVERYBODYS = ("train_on", "template_date")
"""Of ``[data]``, what is trained on of a row: it chooses none and shows nothing, and must be the same for
all. A client's file that says it otherwise refuses."""

ALIKE = ("ambiguous", "control_tokens", "max_length")
"""Of ``[data]``, what public rows are read by, which is the client's to say of its own rows alone."""

METHODS_OWN = {
    f"method.{name}.{own}": kind.bounded.get(own, "")
    for name, (_, kind) in METHODS.items()
    for own in (*kind.taken, *kind.bounded, *kind.named_models)
}
"""Settings of which our methods' classes say how they are taken, each with the line that bounds it."""

LEFT = _names(
    {
        "data": "subset data_dir split columns template only answers_between continuations "
        "control_tokens max_rows test_source test_split test_kind incomplete_pairs max_bad_share "
        "domains group near_duplicates values min_margin streaming revision map filter weight "
        "stopping_strategy deduplicate decontaminate decontamination_words benchmarks",
        "public": "columns template",
        "federation": "members require quorum replacements extra deadline streams "
        "reconnect patience",
        "selection.availability": "prefer",
        "selection.power_of_choice": "losses rows largest candidates by",
        "selection.oort": "losses rows largest explore explore_decay explore_least cut_off speed "
        "percentile penalty pace_rounds pace_step",
        "selection.flash": "losses rows largest ridge width speed",
        "aggregation": "rule bad max_norm density scale space",
        "admission": "max_value max_change on_excess max_examples offences pause",
        "privacy": "profile clip_quantile clip_learning_rate clip_count_noise mechanism "
        "bands amplification units_per_pass sum_bound",
        "evaluation": "samples",
        "output": "folder trackers",
        "simulation": "devices cohort replay",
    }
)
"""Settings that are never taken: how rows are read is the client's to say, the others concern the
server."""


@dataclass(frozen=True)
class Examined:
    """Result of checking an experiment against a client's file.

    Attributes:
        asked: The experiment as the server sent it.
        refusals: Everything that the file does not allow; where there is none, ``experiment`` is there.
        experiment: The experiment as this client would take part in it.
    """

    asked: Experiment
    refusals: tuple[Refusal, ...]
    experiment: Experiment | None

    @property
    def set_aside(self) -> list[str]:
        """Settings about this client's rows, model and machine that its own file decides otherwise."""
        if self.experiment is None:
            return []
        asked, own = dict(leaves(self.asked.to_table())), dict(leaves(self.experiment.to_table()))
        return sorted(
            {
                ".".join(name.split(".")[:2])
                for name in asked.keys() | own.keys()
                if asked.get(name) != own.get(name)
                and not _is_servers(name)
                and name not in {f"public.{field}" for field in ALIKE}  # as asked, but said
            }
        )


def permitted(text: str, own: OwnFile, client: int, classes: int) -> Experiment:
    """Return a server's experiment as this client takes part in it.

    Args:
        text: The experiment as it was sent.
        own: The client's file.
        client: The client's number.
        classes: Number of classes according to the server.

    Raises:
        PolicyError: It is not an experiment, or the file does not allow it; with every reason.
    """
    examined = examine(text, own, client, classes)
    if examined.experiment is None:
        raise PolicyError(*examined.refusals)
    return examined.experiment


def examine(
    text: str, own: OwnFile, client: int, classes: int = 0, *, sent: bool = True
) -> Examined:
    """Check an experiment against a client's file; see :func:`permitted`.

    Args are those of :func:`permitted`, but for:
        sent: Whether a server sent it, and it is not one that a server would be asked to run.

    Raises:
        PolicyError: It is not an experiment.
    """
    if len(text) > LONGEST:
        reason = f"its text has {len(text)} characters, {LONGEST} are read"
        raise PolicyError(Refusal("experiment", reason))
    if DEEP_KEY.search(text):
        raise PolicyError(Refusal("experiment", f"a key has more than {DEEPEST} dots"))
    try:
        source = "the experiment that the server sent"
        table = parse_toml(text, source)
        asked = Experiment.from_table(
            table, source=source, importable=own.policy.names, aliases=False
        )
    except (SettingsError, RecursionError) as error:
        raise PolicyError(Refusal("experiment", str(error))) from None
    return _Examiner(asked, own, client, sent=sent).examined(classes)


def require_steps(experiment: Experiment, own: OwnFile, rows: int) -> None:
    """Check that no request takes more batches than the policy allows, on so many rows.

    Raises:
        PolicyError: It does, however they are counted.
    """
    steps, most = fewest_steps(experiment, rows), own.policy.max_steps
    if steps > most:
        raise PolicyError(Refusal("policy.max_steps", f"{steps} batches, {most} are allowed"))


def fewest_steps(experiment: Experiment, rows: int) -> int:
    """Return how many batches the largest request takes on so many rows, at least.

    Where work is counted in examples or tokens, this is with every batch as full as it can be.
    """
    method = make_method(experiment.method)
    federation, training = experiment.federation, experiment.training
    members = max(1, federation.clients - len(set(experiment.clients.newcomers)))
    participations = federation.participations(members)
    work = training.work(rows, participations)
    longest = experiment.data.max_length or LONGEST_SEQUENCE
    trainings = method.trainings if training.amount_per == "model" else 1
    again = getattr(experiment.objective, "iterations", 1)
    return trainings * _fewest(work, rows, training.batch_size, longest, again)


def _fewest(work: Work, rows: int, batch: int, longest: int, again: int) -> int:
    """Return the fewest batches of a training; each drawn one is learnt from ``again`` times."""
    sequences = 2 * batch  # a pair has two
    bounds = []
    if work.steps is not None:
        bounds.append(work.steps)
    if work.examples is not None:
        bounds.append(math.ceil(work.examples / sequences))
    if work.tokens is not None:
        bounds.append(math.ceil(work.tokens / (sequences * longest)))
    if work.epochs is not None:
        bounds.append(work.epochs * math.ceil(rows / batch) * again)
    return min(bounds)


def open_methods(own: OwnFile) -> list[str]:
    """Return the methods that a client's file allows with some settings of theirs.

    Those that are not fedloom's are allowed by being listed, and are not imported here.
    """
    listed = [name for name in own.policy.methods or () if METHODS.is_foreign(name)]
    return listed + [
        name
        for name, (settings, kind) in METHODS.items()
        if (own.policy.methods is None or name in own.policy.methods)
        and any(
            not _closed(kind(settings.model_validate(form)), own) for form in ({}, dict(kind.least))
        )
    ]


def _closed(method: Method, own: OwnFile) -> list[str]:
    """Return the contents of a method's replies that a client's file does not allow."""
    needed = sorted(method.reveals - ALWAYS)
    return [what for what in needed if what not in REVEALING or not getattr(own.policy, what)]


class _Examiner:
    """Builds a client's experiment section by section, and collects refusals."""

    def __init__(self, asked: Experiment, own: OwnFile, client: int, *, sent: bool) -> None:
        self.asked, self.own, self.client, self.sent = asked, own, client, sent
        self.policy = own.policy
        self.method = METHODS[asked.method.name][1]
        self.refusals: list[Refusal] = []
        self.shared = own.data is not None and own.data.share == "experiment"

    def examined(self, classes: int) -> Examined:
        """Return the result."""
        self._bounded("the classes", classes, "max_width")
        self._require_method()
        self._require_privacy()
        self._require_sums()
        data = self._data()
        sections: dict[str, Any] = {
            "model": self._model(),
            "adapter": self._adapter(),
            "public": self._public(),
            "clients": self._clients(),
            "method": self._method(),
            "partition": self._partition(),
            "training": self._training(),
            "privacy": self._privacy(),
        }
        apart = {"data", "selection", *sections}  # who is drawn is the server's affair
        for name in SECTIONS.keys() - apart:
            sections[name] = self._section(name)
        experiment = None
        if data is not None and not self.refusals:
            try:
                experiment = Experiment(data=data, **sections)
            except SettingsError as error:
                self.refuse("experiment", str(error))
        return Examined(self.asked, tuple(self.refusals), experiment)

    def refuse(self, line: str, reason: str) -> None:
        """Record a refusal."""
        self.refusals.append(Refusal(line, reason))

    def _section(self, name: str) -> Settings:
        asked: Settings = getattr(self.asked, name)
        return type(asked)(**self._taken(name, asked))

    def _taken(self, section: str, asked: Settings, place: str | None = None) -> dict[str, Any]:
        """Return the settings of a section that are taken; refuse those above their bounds."""
        if section == "method":
            return self._of_method(asked)
        if not isinstance(SECTIONS.get(section, Settings), type):  # of one objective
            name = getattr(asked, "name")  # noqa: B009 (a field of each of them)
            if OBJECTIVES.is_foreign(name):  # who lists a class trusts it with its settings
                return asked.model_dump()
            section = f"{section}.{name}"
        taken = {}
        for field in type(asked).model_fields:
            rule, value = f"{section}.{field}", getattr(asked, field)
            if rule in MOST:
                self._bounded(f"{place or section}.{field}", value, MOST[rule])
            if rule in TAKEN or rule in MOST or field == "name":
                taken[field] = value
        return taken

    def _of_method(self, asked: Settings) -> dict[str, Any]:
        """Return the settings of a method that are taken, as its class here says."""
        kind = self.method
        for field, line in kind.bounded.items():
            self._bounded(f"method.{self.asked.method.name}.{field}", getattr(asked, field), line)
        return {name: getattr(asked, name) for name in ("name", *kind.taken, *kind.bounded)}

    def _bounded(self, what: str, value: float | None, line: str) -> None:
        most = getattr(self.policy, line)
        if value is not None and value > most:
            self.refuse(f"policy.{line}", f"{what} = {value} is above {most}")

    def _require_method(self) -> None:
        """Refuse objectives and methods that are not open to the server."""
        method, objective = self.asked.method, self.asked.objective.name
        if self.policy.objectives is not None and objective not in self.policy.objectives:
            reason = f"objective.name = {objective!r} is none of {self.policy.objectives}"
            self.refuse("policy.objectives", reason)
        if self.policy.methods is not None and method.name not in self.policy.methods:
            reason = f"method.name = {method.name!r} is none of {self.policy.methods}"
            self.refuse("policy.methods", reason)
        group = getattr(self.asked.objective, "group", 1)
        answers, batch = group * self.asked.training.batch_size, self.asked.training.batch_size
        if group > 1 and max(group, batch) <= self.policy.max_batch:  # else that is refused itself
            self._bounded("objective.group x training.batch_size", answers, "max_batch")
        questions = getattr(method, "questions", 0)  # whose answers are graded in one request
        if max(group, questions) <= self.policy.max_batch:
            what = "method.questions x objective.group"
            self._bounded(what, questions * group, "max_batch")
        self._require_rewards("objective.rewards", getattr(self.asked.objective, "rewards", ()))
        for what in _closed(make_method(method), self.own):
            line = f"policy.{what}" if what in REVEALING else "policy.methods"
            self.refuse(line, f"method.name = {method.name!r} sends {what.replace('_', ' ')}")

    def _require_rewards(self, where: str, names: Sequence[str]) -> None:
        """Refuse rewards that this client's file does not allow; nothing is imported."""
        allowed = self.policy.rewards
        for name in names:
            if name in allowed if allowed is not None else is_harmless(name):
                continue
            if allowed is not None and REGEX in allowed and name.startswith(REGEX):
                continue
            here = "none that runs code" if allowed is None else f"one of {allowed}"
            self.refuse("policy.rewards", f"{where} has {name!r}, and here it must be {here}")

    def _require_privacy(self) -> None:
        """Refuse what hides less of the rows than this client demands."""
        demanded, asked = self.policy.privacy, self.asked.privacy
        line = "policy.privacy.require"
        if not demanded.demands_rows:
            if demanded.require == "client" and asked.unit is None:
                self.refuse(line, "privacy.unit is missing: the experiment adds no noise at all")
            if demanded.distributed_noise and asked.unit == "client" and not asked.distributes:
                reason = (
                    'privacy.noise is "central": the server would see this client\'s update before it '
                    'adds noise, and here it must be "distributed"'
                )
                self.refuse("policy.privacy.distributed_noise", reason)
            if demanded.require is None:
                return
        elif asked.unit != "row":
            unit = "missing" if asked.unit is None else repr(asked.unit)
            self.refuse(line, f'privacy.unit is {unit}, here it must be "row"')
        elif asked.column != demanded.column:
            here = "no column" if demanded.column is None else repr(demanded.column)
            reason = f"privacy.column = {asked.column!r} is requested, here it is {here}"
            self.refuse("policy.privacy.column", reason)
        if asked.seeded:
            self.refuse(
                line, "privacy.seeded = true: whoever has the experiment subtracts the noise"
            )
        if asked.noise_multiplier == 0:
            self.refuse(line, "privacy.noise_multiplier = 0 adds no noise")
        if demanded.demands_rows and self.asked.judges_clients:
            what = "evaluation.per_client = true"
            self.refuse(line, f"{what} sends exact scores on this client's own held-out rows")

    def _require_sums(self) -> None:
        """Refuse to show this client's update by itself, and sums with clients that nobody here knows."""
        demanded, asked = self.policy.privacy, self.asked.privacy
        if demanded.secure_aggregation and not asked.secure_aggregation:
            reason = (
                "privacy.secure_aggregation is false: the server would see this client's update"
            )
            self.refuse("policy.privacy.secure_aggregation", reason)
        if asked.secure_aggregation and not (demanded.peers or demanded.trust_first_use):
            reason = (
                "it names no key of another client, so that nobody here could check who is summed"
            )
            self.refuse("policy.privacy.peers", reason)

    def _privacy(self) -> PrivacySettings:
        """Return what this client hides by: its own steps, or its share of a sum's noise.

        Noise elsewhere is the server's affair.
        """
        asked = self.asked.privacy
        names = PRIVATE.split() if asked.unit == "row" else []
        names += SHARED.split() if asked.distributes else []
        names += ["secure_aggregation"] * asked.secure_aggregation
        return PrivacySettings(**{name: getattr(asked, name) for name in names})

    def _model(self) -> ModelSettings:
        """Return the backbone: the client's own file's, or the experiment's where it may be loaded."""
        own, asked = self.own.model, self.asked.model
        if own is not None:
            path, revision = own.path, own.revision
        else:
            path, revision = asked.path, asked.revision
            self._require_model("model.path", path, revision)
        taken = self._taken("model", asked)
        return ModelSettings(path=path, revision=revision, **taken)

    def _adapter(self) -> AdapterSettings:
        """Return the adapter; it starts from what the server sends, and from no path or Hub name."""
        asked = self.asked.adapter
        if self.sent and asked.start is not None and SENT.fullmatch(asked.start) is None:
            reason = f"adapter.start = {asked.start!r} is not something that a server sends"
            self.refuse("experiment", reason)
        if self.sent and asked.pattern is not None:  # one can be made to take for ever
            reason = f"adapter.targets = {asked.pattern!r}: a server sends the names of layers"
            self.refuse("experiment", reason)
        taken = self._taken("adapter", asked)
        return AdapterSettings(**taken, start=asked.start, targets=asked.targets)

    def _require_model(self, where: str, path: str, revision: str | None) -> None:
        name = f"{path}@{revision}" if revision and path not in MADE else path
        allowed = {*MADE, *self.policy.models, *([self.own.model.path] if self.own.model else [])}
        if name not in allowed:
            self.refuse("policy.models", f"{where} = {name!r} is none of {sorted(allowed)}")

    def _data(self) -> DataSettings | None:
        """Return how rows are read: by the client's own file, but for what chooses none of them."""
        own, asked = self.own.data, self.asked.data
        if own is None:
            self.refuse("data", "this client's file has no [data]: it offers no rows")
            return None
        if data_kind(asked) != data_kind(own):
            self.refuse(
                "data.kind", f"{data_kind(asked)!r} is requested, here it is {data_kind(own)!r}"
            )
        if asked.choices != own.choices:
            self.refuse(
                "data.choices", f"{asked.choices} are requested, here they are {own.choices}"
            )
        if self.shared and own.is_builtin and asked.sources != own.sources:
            self.refuse("data.source", f"{asked.source!r} is requested, here it is {own.source!r}")
        for name in EVERYBODYS:
            here, there = getattr(own, name), getattr(asked, name)
            if name in own.model_fields_set and here != there:
                self.refuse(
                    f"data.{name}", f"{str(there)!r} is requested, here it is {str(here)!r}"
                )
        taken: dict[str, Any] = {"max_length": asked.max_length}
        taken |= {name: getattr(asked, name) for name in EVERYBODYS}
        self._bounded("data.max_length", asked.max_length, MOST["data.max_length"])
        if self.shared:
            shared = ("builtin_rows", "test_fraction", "ambiguous")
            taken |= {name: getattr(asked, name) for name in shared}
            self._bounded("data.builtin_rows", asked.builtin_rows, MOST["data.builtin_rows"])
        # of rows of its own none are in a global held-out set, whatever share its file names
        aside = {"share"} if self.shared else {"share", "test_fraction"}
        said = own.model_dump(exclude=aside, exclude_unset=True)
        return DataSettings(**{**taken, **said})

    def _public(self) -> PublicSettings:
        """Return which rows are public: those that the client's file names, or built-in ones."""
        asked, own = self.asked.public, self.own.public
        if not self.method.public_rows_needed(self.asked.method):
            return PublicSettings()
        taken = {**self._taken("public", asked), **self._read_alike()}
        if own is not None and self.policy.public_rows:
            return PublicSettings(**own.model_dump(), **taken)
        sources = [asked.source] if isinstance(asked.source, str) else asked.source or []
        builtin = all(source.startswith(BUILTIN_PREFIX) for source in sources)
        if self.shared and self.own.data and self.own.data.is_builtin and builtin:
            return PublicSettings(source=asked.source, **taken)
        reason = "[public] is missing" if self.policy.public_rows else "they are not allowed"
        self.refuse("policy.public_rows", f"the method needs public rows: {reason}")
        return PublicSettings(**taken)

    def _read_alike(self) -> dict[str, Any]:
        """Return what public rows are read by, so that all parties have the same tokens of them."""
        asked, data, own = self.asked.public, self.asked.data, self.own.data
        found = {}
        for name in ALIKE:
            there, default = getattr(asked, name), getattr(data, name)
            if there is not None:
                found[name] = there
            elif own is not None and getattr(own, name) not in (None, default):
                found[name] = default or LONGEST_SEQUENCE
        if asked.source is None:  # they are partitioned and read with the others
            found.pop("ambiguous", None)
        return found

    def _clients(self) -> ClientsSettings:
        """Return what clients differ in: of the groups, those whose models are loaded here."""
        asked = self.asked.clients
        every = self.method.public_rows_needed(self.asked.method)  # all models read the public rows
        groups = {}
        for name, group in asked.groups.items():
            if not every and self.client not in group.clients:
                continue
            place = f"clients.groups.{name}"
            self._require_rewards(f"{place}.rewards", group.rewards or ())
            taken = self._taken("clients.groups.*", group, place)
            groups[name] = ClientGroup(**taken, model=group.model)
            if group.model is not None:
                self._require_model(f"{place}.model", group.model, self._revision)
        if self.client in asked.newcomers:
            self._bounded("clients.newcomer_steps", asked.newcomer_steps, "max_steps")
        taken = self._taken("clients", asked)
        return ClientsSettings(groups=groups, newcomer_steps=asked.newcomer_steps, **taken)

    def _method(self) -> Settings:
        """Return the method; a server's model of its own reads the public rows here too."""
        asked = self.asked.method
        taken = self._taken("method", asked)
        for name in self.method.named_models:
            path = getattr(asked, name)
            if path is not None:
                self._require_model(f"method.{name}", path, self._revision)
                taken[name] = path
        return type(asked)(**taken)

    @property
    def _revision(self) -> str | None:
        """The revision that all models are loaded of."""
        return self.own.model.revision if self.own.model else self.asked.model.revision

    def _partition(self) -> Settings:
        """Return the partition: none, unless the rows belong to all clients."""
        asked = self.asked.partition
        if self.shared:
            return asked
        return self._section("partition")

    def _training(self) -> Settings:
        """Return how this client trains; on which device and with how many threads is its own to say."""
        own, asked = self.own.training, self.asked.training
        threads = own.threads
        if threads is None and asked.threads is not None:  # the same bits need as many
            threads = min(asked.threads, available_cores())
        device = own.device or ("cpu" if asked.device == "cpu" else "auto")
        taken = self._taken("training", asked)
        return type(asked)(**taken, device=device, threads=threads)


def leaves(table: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of a table of tables, under its whole name."""
    for key, value in table.items():
        name = f"{above}.{key}" if above else key
        if isinstance(value, Mapping) and value:
            yield from leaves(value, name)
        else:
            yield name, value


def _is_servers(name: str) -> bool:
    """Return whether a setting concerns the server alone."""
    section = name.partition(".")[0]
    # of privacy that of rows is taken whole
    own = ("federation", "selection", "aggregation", "admission", "output", "privacy")
    return section in own or name in ("name", "evaluation.samples")
