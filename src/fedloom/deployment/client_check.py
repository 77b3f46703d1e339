"""The meaning of a client's file in words, for `fedloom client check` and `fedloom client approve`.

Everything is shown before anything is sent: the rows and how one of them is trained on, what the server
can learn and may request, and which settings of an experiment would be refused.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedloom.accounting.quantities import human_bytes, human_count, human_number, human_seconds
from fedloom.data.encode import TextEncoder
from fedloom.data.examples import Example, Feedback, Labelled, Preference, plain_text
from fedloom.data.loading import LoadedData, load_examples
from fedloom.data.sources import DataSettings
from fedloom.data.token_set import TokenSet
from fedloom.data.tokenize import tokenize
from fedloom.deployment.client_file import OwnData, OwnFile
from fedloom.deployment.consent import Approvals, Waiting
from fedloom.deployment.folders import ClientFolder
from fedloom.deployment.policy import REVEALING, PolicySettings, PrivacyPolicySettings
from fedloom.deployment.policy_enforcement import Examined, examine, fewest_steps, open_methods
from fedloom.deployment.rows import partitioned
from fedloom.display.untrusted_text import message, named, placed
from fedloom.errors import DataError, FedloomError, OutputError, PolicyError, first_line
from fedloom.evaluation.generate import load_encoder
from fedloom.experiment.experiment import Experiment
from fedloom.methods import METHODS, make_method
from fedloom.methods.contract.method import Reveal
from fedloom.models.load import context_of
from fedloom.objectives import OBJECTIVES
from fedloom.privacy.settings import PrivacySettings
from fedloom.privacy.statement import SUMS
from fedloom.randomness import generator
from fedloom.reports import row_account
from fedloom.runs.model_building import model_folder
from fedloom.runs.token_rows import longest
from fedloom.settings.plugins import Choices
from fedloom.settings.schema import descriptions


def _sending(what: Reveal) -> list[str]:
    return [name for name, (_, kind) in METHODS.items() if what in kind.reveals]


ALWAYS_SHOWN = {
    "numbers": "How many rows there are, mean losses and accuracies on them, and the time, memory and "
    "compute of the work.",
    "adapters": "The trained parameters, after each round. They depend on the rows, and traces of rows "
    "can be found in them.",
    "control_variates": f"With {' or '.join(_sending('control_variates'))}: how training here differs "
    "from the others'.",
}
"""What the server learns under every policy."""

SHOWN_PROBLEMS = 3
"""Number of malformed rows that are shown."""

LONGEST_SAMPLE = 600
"""Characters of each text of a sample row."""


@dataclass(frozen=True)
class Look:
    """Result of a check.

    Attributes:
        shown: The text to print.
        sound: Whether this client could take part: its rows can be read and nothing is refused.
    """

    shown: Group
    sound: bool


def check(path: Path, experiment: Path | None, client: int) -> Look:
    """Describe a client's file and whether the client could take part in an experiment.

    Args:
        path: The client's file.
        experiment: An experiment as the coordinator would submit it.
        client: The client's number.

    Raises:
        SettingsError: A file has mistakes.
        OutputError: The experiment cannot be read.
    """
    own = OwnFile.read(path)
    parts: list[RenderableType] = []
    examined, problems = None, _unknown_names(own.policy)
    if experiment is not None:
        try:
            text = experiment.read_text(encoding="utf-8")
            examined = examine(text, own, client, sent=False)
        except (OSError, UnicodeDecodeError) as error:
            raise OutputError(f"cannot read {experiment}: {first_line(error)}") from None
        except PolicyError as error:
            problems += [one.reason for one in error.refusals]
    asked = examined.experiment if examined is not None else None
    rows, problem, count = _rows(own, asked, client)
    parts += [_section("Rows", rows), *_what_may_be(own)]
    sound = not problem
    if examined is not None:
        verdict, accepted = _verdict(examined, own, count)
        parts.append(_section(f"The experiment {experiment}", verdict))
        sound = sound and accepted
    for text in problems:
        parts.append(Text(f"problem: {message(text)}", style="red"))
    return Look(Group(*parts), sound and not problems)


def waiting_table(client_folder: ClientFolder) -> RenderableType:
    """Return a table of the runs of a client's folder that wait for approval."""
    found = Approvals(client_folder).waiting()
    if not found:
        return Text("no run waits for approval")
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("run", "what", "first asked", "last asked"):
        table.add_column(name, no_wrap=name != "what")
    own = client_folder.own_file()
    for one in found:
        try:
            what = _words(examine(one.experiment, own, one.client, one.classes).asked)
        except PolicyError:
            what = "not an experiment that this client can take part in"
        table.add_row(one.run[:8], Text(what), _ago(one.first), _ago(one.last))
    return table


def waiting_run(client_folder: ClientFolder, waiting: Waiting) -> Look:
    """Return what would run if a run were approved: experiment, rows, protection."""
    own, registration = client_folder.own_file(), client_folder.registration()
    try:
        examined = examine(waiting.experiment, own, waiting.client, waiting.classes)
    except PolicyError as error:
        return Look(Group(Text(message(str(error)), style="red")), sound=False)
    rows, problem, count = _rows(own, examined.experiment, waiting.client)
    verdict, accepted = _verdict(examined, own, count)
    protection = _table(
        [
            (
                "connection",
                "TLS, and the server proves who it is" if registration.authority else "no TLS",
            ),
            *_protection(examined.asked, own),
        ]
    )
    parts = [
        _section(f"Run {waiting.run[:8]}", verdict),
        _section("Rows", rows),
        _section("What leaves this machine", _leaves(examined.asked)),
        _section("Protection", protection),
    ]
    return Look(Group(*parts), sound=accepted and not problem)


def _what_may_be(own: OwnFile) -> list[RenderableType]:
    """Return what the server can learn and may request."""
    shown = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    shown.add_column(no_wrap=True)
    shown.add_column(no_wrap=True)
    shown.add_column()
    policy = own.policy
    for name, text in ALWAYS_SHOWN.items():
        summed = policy.privacy.secure_aggregation and name != "numbers"
        said = f"In sums over clients alone. {text}" if summed else text
        shown.add_row(Text("yes", style="yellow"), name, said)
    for name in REVEALING:
        open_ = getattr(policy, name)
        mark = Text("yes", style="yellow") if open_ else Text("no", style="green")
        style = "" if open_ else "dim"
        shown.add_row(mark, Text(name, style), Text(_said(name), style))
    asked = _table(
        [
            ("methods", ", ".join(open_methods(own)) or "none"),
            ("objectives", ", ".join(policy.objectives or OBJECTIVES)),
            ("models", ", ".join(_models(own))),
            ("privacy", _demanded(policy.privacy)),
            ("sums", _sums(policy.privacy)),
            ("approval", "each run waits for approval here" if policy.approve else "not needed"),
        ]
    )
    bounds = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    bounds.add_column(no_wrap=True, style="cyan")
    bounds.add_column(no_wrap=True, justify="right")
    bounds.add_column(style="dim")
    for name in PolicySettings.model_fields:
        if name.startswith("max_"):
            first = re.split(r" \(|[:;.]", _said(name))[0]
            bounds.add_row(name, _amount(name, policy), first)
    return [
        _section("What the server will be able to learn", shown),
        _section("What the server may ask for", Group(asked, Text(), bounds)),
    ]


def _demanded(policy: PrivacyPolicySettings) -> str:
    """Return the privacy that a client's file demands, in words."""
    if policy.demands_rows:
        text = f"noise in this client's own steps must hide {_unit(policy.column)}"
        if policy.max_epsilon is not None:
            text += (
                f"; all runs on these rows may spend epsilon {policy.max_epsilon:g} at delta "
                f"{policy.delta:g} together"
            )
        return text
    if policy.require == "client":
        if policy.distributed_noise:
            return (
                "rows or clients must be hidden by noise, of which this client adds a share itself"
            )
        return "rows or clients must be hidden by noise, at least by the coordinator's word"
    return "none is demanded ([policy.privacy])"


def _sums(policy: PrivacyPolicySettings) -> str:
    """Return what a client's file says of secure aggregation, in words."""
    if policy.peers:
        whose = f"with clients of {len(set(policy.peers))} keys that this file names"
    elif policy.trust_first_use:
        whose = "with clients whose keys the coordinator tells first, by its word"
    else:
        return "this client takes part in no secure aggregation (policy.privacy.peers is empty)"
    text = f"under secure aggregation this client's update is summed {whose}"
    return f"{text}; other runs are refused" if policy.secure_aggregation else text


def _models(own: OwnFile) -> list[str]:
    if own.model is not None:
        return [f"{own.model.path} (whatever the experiment names)", *own.policy.models]
    return ["tiny", *own.policy.models]


def _unknown_names(policy: PolicySettings) -> list[str]:
    """Return warnings about unknown names in a policy, which allow nothing."""
    known: dict[str, Choices[Any]] = {"objectives": OBJECTIVES, "methods": METHODS}
    return [
        f"policy.{field}: there is no {name!r}; there are {', '.join(names.names)}"
        for field, names in known.items()
        for name in getattr(policy, field) or []
        if name not in names
    ]


def _rows(
    own: OwnFile, experiment: Experiment | None, client: int
) -> tuple[RenderableType, bool, int | None]:
    """Return rows in words with a sample, whether they cannot be used, and how many are trained on."""
    if own.data is None:
        nothing = Text(
            "This file has no [data]: no rows are offered, built-in ones neither.", style="red"
        )
        return nothing, True, None
    facts = _how_read(own.data)
    try:
        read = _read(own, experiment, client)
    except FedloomError as error:
        facts.append(("cannot be used", str(error)))
        return _table(facts, wrong="cannot be used"), True, None
    loaded = read.loaded
    facts += [("recognised", text) for text in loaded.layouts]
    facts.append(("rows", _counted(loaded, read.count)))
    facts += [("of which", text) for text in read.became]
    facts += [("malformed", str(bad)) for bad in loaded.bad_rows[:SHOWN_PROBLEMS]]
    shown: list[RenderableType] = [_table(facts)]
    if read.sample is not None:
        title, texts = _sample(read, read.sample, own, experiment)
        shown += [Text(), Text(message(title), style="dim"), _table(texts)]
    return Group(*shown), False, read.count


def _how_read(data: OwnData) -> list[tuple[str, str]]:
    """Return where rows come from and how they are read."""
    facts = []
    for name, part in data.parts.items():
        label = f"source {name}".strip()
        facts.append((label, ", ".join(part.sources)))
        named = [f"{ours} from column {theirs!r}" for ours, theirs in part.columns.items()]
        named += [f"prompt by the template {part.template!r}"] if part.template else []
        facts.append(("read as", ", ".join(named) or "by the layout of its columns"))
        facts += [
            (name, f"where the label is {' or '.join(map(str, values))}")
            for name, values in part.values.items()
        ]
        facts += [
            ("only where", f"{column} is {' or '.join(values)}")
            for column, values in part.only.items()
        ]
        facts += [(f"computed {own}", text) for own, text in part.map.items()]
        if part.filter:
            facts.append(("only where", part.filter))
        if part.max_rows:
            facts.append(("at most", f"{human_count(part.max_rows)} rows, drawn"))
    shares = {
        "own": "all of them are this client's",
        "experiment": "they are everybody's; the experiment's partition gives this client its share",
    }
    return [("kind", data.kind or str(data.builtin_kind)), *facts, ("whose", shares[data.share])]


@dataclass(frozen=True)
class _Read:
    """The rows of a client, as read.

    Attributes:
        loaded: All of them.
        count: Number of training rows of this client, where it is known.
        sample: One of these.
        place: Its file and row number.
        classes: Class names of labelled rows.
        became: Account of the rows.
    """

    loaded: LoadedData
    count: int | None
    sample: Example | None
    place: str
    classes: tuple[str, ...] = ()
    became: tuple[str, ...] = ()


def _read(own: OwnFile, experiment: Experiment | None, client: int) -> _Read:
    """Read the rows, as the worker does."""
    data = own.data
    assert data is not None, "the caller has checked"
    if experiment is None:
        said = data.model_dump(exclude={"share"}, exclude_unset=True)
        loaded = load_examples(DataSettings(**said), generator(0, "data"), hold_out=False)
        rows = [*loaded.train, *loaded.test]
        count = len(rows) if data.share == "own" else None
        return _Read(loaded, count, rows[0], placed(*loaded.place(rows[0].row)))
    if data.share == "experiment" and client >= experiment.federation.clients:
        raise DataError(
            f"there is no client {client} among {experiment.federation.clients}; give --client"
        )
    division = partitioned(experiment, own, client, None)
    trained = division.train[client]
    accounts = division.accounts
    became = row_account.sentence("here", accounts.clients[client].to_record()), *accounts.warnings
    sample = trained[0] if trained else None
    place = placed(*division.place(client, sample.row)) if sample else ""
    return _Read(division.loaded, len(trained), sample, place, division.classes, became)


def _counted(loaded: LoadedData, count: int | None) -> str:
    whole = len(loaded.train) + len(loaded.test)
    text = f"{human_count(whole)} can be used"
    if loaded.bad_rows:
        text += f", {human_count(len(loaded.bad_rows))} malformed"
    text += "".join(
        f", {human_count(number)} dropped ({why})" for why, number in loaded.dropped.items()
    )
    return text if count in (None, whole) else f"{text}; {human_count(count)} examples to train on"


def _sample(
    read: _Read, row: Example, own: OwnFile, experiment: Experiment | None
) -> tuple[str, list[tuple[str, str]]]:
    """Return a row as it is trained on: through the tokenizer where the model is there, else plainly."""
    model = (
        experiment.model if experiment else own.model
    )  # the file's model replaces the experiment's
    data = experiment.data if experiment else own.data
    if model is None or data is None:
        return f"{read.place}, as it is read", _plain(row)
    try:
        path = model_folder(model.path)
        encoder = load_encoder(
            path, model.revision, data, compares=experiment is not None and experiment.compares
        )
        length = longest(data.max_length, context_of(path, model.revision))
        tokens = tokenize([row], encoder, length, read.classes, keep_alike=data.ambiguous == "keep")
    except FedloomError as error:
        return f"{read.place}, without a tokenizer ({first_line(error)})", _plain(row)
    return f"{read.place}, as {model.path} reads it", _tokens(row, tokens, encoder)


def _tokens(row: Example, tokens: TokenSet, encoder: TextEncoder) -> list[tuple[str, str]]:
    """Return a row's prompt and, of each completion, what is trained on."""
    if not len(tokens):
        return [("dropped", ", ".join(lost.reason for lost in tokens.dropped)), *_plain(row)]
    names = ("chosen", "rejected") if isinstance(row, Preference) else ("completion",)
    found = []
    for number in range(tokens.width):
        sequence, prompt = tokens.sequence(number)
        if number == 0:
            text = encoder.tokenizer.decode(sequence[:prompt].tolist())
            found.append((f"prompt, {prompt} tokens", _short(text)))
        mask = tokens.mask(number)
        if mask.any():
            count, whole = int(mask.sum()), len(sequence) - prompt
            told = f"{count} tokens" if count == whole else f"{count} of {whole} tokens trained on"
            edges = np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)
            parts = [encoder.tokenizer.decode(sequence[a:b].tolist()) for a, b in edges]
            found.append(
                (f"{names[number]}, {told}", _short(" [...] ".join(map(str.strip, parts))))
            )
    return [*found, *_judgement(row)]


def _plain(row: Example) -> list[tuple[str, str]]:
    texts = {
        name: getattr(row, name, None)
        for name in ("text", "prompt", "completion", "chosen", "rejected")
    }
    found = [(name, _short(plain_text(text))) for name, text in texts.items() if text is not None]
    return [*found, *_judgement(row)]


def _judgement(row: Example) -> list[tuple[str, str]]:
    if isinstance(row, Labelled):
        return [("label", row.label)]
    return (
        [("label", "desirable" if row.desirable else "undesirable")]
        if isinstance(row, Feedback)
        else []
    )


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_SAMPLE else f"{text[:LONGEST_SAMPLE]} ..."


def _verdict(examined: Examined, own: OwnFile, rows: int | None) -> tuple[RenderableType, bool]:
    """Return whether this client could take part in an experiment, with every reason against it."""
    reasons = [(one.line, one.reason) for one in examined.refusals]
    if rows is not None:
        steps, most = (
            fewest_steps(examined.experiment or examined.asked, rows),
            own.policy.max_steps,
        )
        if steps > most:
            reasons.append(
                (
                    "policy.max_steps",
                    f"{human_count(steps)} batches in a request are above {human_count(most)}",
                )
            )
    what = Text(_words(examined.asked))
    if reasons:
        count = f"{len(reasons)} reason{'s' if len(reasons) > 1 else ''}"
        refused = Text(
            f"It would be refused, for {count}; the server is sent only the setting's name:", "red"
        )
        return Group(what, refused, _table(reasons)), False
    parts = [what, Text("This client could take part.", "green")]
    if examined.set_aside:
        parts.append(
            Text(f"This file decides, not the experiment: {', '.join(examined.set_aside)}", "dim")
        )
    return Group(*parts), True


def _words(experiment: Experiment) -> str:
    """Return a one-line description of an experiment."""
    federation, training = experiment.federation, experiment.training
    given = ("local_steps", "local_examples", "local_tokens", "total_epochs")
    work = [
        f"{getattr(training, name)} {name}" for name in given if getattr(training, name) is not None
    ]
    each = work[0] if work else f"{training.local_epochs or 1} local_epochs"
    text = (
        f"{experiment.objective.name} with {experiment.method.name} on {experiment.model.path}, "
        f"{human_count(federation.rounds)} rounds among {human_count(federation.clients)} clients, "
        f"{each} of batches of {training.batch_size}"
    )
    return message(named(text))


def _leaves(experiment: Experiment) -> RenderableType:
    reveals = make_method(experiment.method).reveals
    if experiment.privacy.secure_aggregation:
        what = ", ".join(name.replace("_", " ") for name in sorted(reveals))
        masked = (
            "in masked integers, of which the server reads the sum over clients and nothing else."
        )
        work = "How many rows there are, and the time, memory, tokens and compute of the work."
        beside = ", with noise," if experiment.privacy.distributes else ", losses and accuracies,"
        return _table([("numbers", work), ("masked", f"The {what}{beside} {masked}")])
    facts = [("numbers", ALWAYS_SHOWN["numbers"])]
    for name in sorted(reveals):
        said = ALWAYS_SHOWN.get(name) or (_said(name) if name in REVEALING else "")
        facts.append((name, said))
    return _table(facts)


def _protection(experiment: Experiment, own: OwnFile) -> Iterable[tuple[str, str]]:
    """Yield the protection of rows, and the bounds of the work."""
    noise = [
        f"{name} = {value}"
        for name, value in experiment.method.model_dump().items()
        if name.endswith("_noise") and value not in (0, "none")
    ]
    if noise:
        if "embedding_noise = gaussian" in noise:
            noise += [
                f"{name} = {getattr(experiment.method, name):g}" for name in ("epsilon", "delta")
            ]
        source = (
            "this client's key"
            if own.worker.secret_noise
            else "the experiment's seed, which all parties know"
        )
        yield "noise", f"{', '.join(noise)}, drawn from {source}"
    elif experiment.privacy.unit != "row" and not experiment.privacy.distributes:
        yield "noise", "none is added to what leaves this machine"
    if experiment.privacy.unit == "row":
        yield "privacy", _hidden(experiment.privacy)
    if experiment.privacy.distributes:
        yield "privacy", _shared(experiment.privacy)
    if experiment.privacy.secure_aggregation:
        yield "sums", f"{SUMS}; {_sums(own.policy.privacy)}"
    policy = own.policy
    yield (
        "bounds",
        (
            f"{human_count(policy.max_steps)} batches, {human_seconds(policy.max_seconds)} and "
            f"{human_bytes(policy.max_bytes)} a request; {human_count(policy.max_rounds_a_day)} "
            "rounds "
            f"and {human_count(policy.max_runs_a_day)} runs a day"
        ),
    )


def _hidden(asked: PrivacySettings) -> str:
    """Return how the steps of a client hide its rows, in words."""
    return f"noise in this client's own steps hides {_unit(asked.column)}: {_noise_of(asked)}"


def _shared(asked: PrivacySettings) -> str:
    """Return what a client adds to sums of updates, in words."""
    return (
        "this client clips its update and adds its share of the noise that hides each client in a sum, "
        f"even if {asked.colluding} of the others tell theirs: {_noise_of(asked)}"
    )


def _noise_of(asked: PrivacySettings) -> str:
    """Return how much noise there is, and where it comes from, in words."""
    noise = f"noise multiplier {asked.noise_multiplier}"
    if asked.target_epsilon is not None:
        noise = f"epsilon {asked.target_epsilon:g} at delta {asked.delta:g} for the whole run"
    source = "the experiment's seed: it hides nothing" if asked.seeded else "a key of this machine"
    return f"{noise}, drawn from {source}"


def _unit(column: str | None) -> str:
    return "each row" if column is None else f"each value of {column!r}"


def _said(name: str) -> str:
    """Return the description of a line of the policy."""
    return " ".join(descriptions(PolicySettings)[name].split())


def _amount(name: str, policy: PolicySettings) -> str:
    value = getattr(policy, name)
    if name == "max_bytes":
        return human_bytes(value)
    return human_seconds(value) if name == "max_seconds" else human_number(value)


def _ago(when: float) -> str:
    return f"{human_seconds(max(0.0, time.time() - when))} ago"


def _section(title: str, content: RenderableType) -> RenderableType:
    return Group(Text(title, style="bold"), Padding(content, (0, 0, 1, 2)))


def _table(facts: Iterable[tuple[str, str]], wrong: str = "") -> Table:
    """Return a table of names and texts, in which untrusted text has no markup or control characters."""
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True, style="cyan")
    table.add_column(overflow="fold")
    for name, text in facts:
        table.add_row(Text(name), Text(message(text), style="red" if name == wrong else ""))
    return table
