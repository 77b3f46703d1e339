"""What may leave the server of a run in which drawing clients counts (``privacy.amplification``).

Amplification by sampling holds against those who do not know who was drawn. So a run with it has two
folders. Everything that it writes goes to the server's own, ``NAME.private``, which no page and no
command reads but those that go on with the run. The run folder is made of it once, when the run is
over, and of what is named here alone: a record that is not named stays inside. Nothing that is named
follows from who was drawn but by the noisy means. A number of clients, bytes or seconds of a round do
follow, and so do sums of them over the run; that a line is written when a round ends tells its seconds.

Observers are told the same while the run goes on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from fedloom.errors import FedloomError, OutputError, PrivacyError, RoundFailed
from fedloom.evaluation.metrics import METRICS
from fedloom.federation.records import Evaluation, RoundRecord
from fedloom.reports import record_marks
from fedloom.runs.observers import Plan, RunObserver
from fedloom.storage import run_folder as names
from fedloom.storage.run_folder import Record, RunFolder

KEPT = "withheld.txt"
"""In the server's own folder: what observers were not told."""

WITHHELD = (
    "Withheld, as who was drawn is secret (privacy.amplification): the clients of each round and their "
    "number, what rounds sent and cost, how long they took, and what single clients hold"
)
"""Said on pages in place of what they lack."""

Fields = Mapping[str, "Fields | None"]
"""Names of fields that may leave; ``None`` for all of a field, else those of the record that it holds."""

_METRICS: Fields = MappingProxyType({spec.name: None for own in METRICS.values() for spec in own})
"""Metrics on the global held-out set."""


def _whole(fields: str) -> dict[str, Fields | None]:
    return dict.fromkeys(fields.split())


_PRIVACY: Fields = MappingProxyType(
    _whole(
        "unit epsilon delta noise_multiplier clip sampling amplification steps accountant neighbours "
        "seeded drawn target_epsilon clip_quantile mechanism noise_to_signal not_covered sentences"
    )
)

RUN: Fields = MappingProxyType(
    {
        **_whole(
            "name id fedloom versions seed engine command made_with plugins threads device "
            "tokens_per_pass model classes method selection method_role traffic wire promise metric "
            "privacy_of_settings"
        ),
        "data": _whole("source kind max_length global_held_out held_out_rows"),
        "start": _whole("name run sha256 reference"),
        "privacy": _PRIVACY,
    }
)
"""Of ``run.json``. Rows of clients are not in it: neither how many there are nor a hash of them."""

ROUND: Fields = MappingProxyType(
    {
        **_whole("round learning_rate"),
        "evaluation": {"global": _METRICS, **_whole("interval rows")},
    }
)
"""Of a line of ``rounds.jsonl``."""

SUMMARY: Fields = MappingProxyType(
    {
        **_whole(
            "status rounds metric judged_on before after after_interval change adapter best_round"
        ),
        "before_metrics": _METRICS,
        "after_metrics": _METRICS,
        "privacy": _PRIVACY,
        "verified": _whole("left_out folders loaded_by rows rows_are difference allowed moved"),
    }
)
"""Of ``summary.json``."""

FOLDERS = ("adapter", "adapters")
"""Folders that are handed out as they are: what the noisy means have made, and their model cards."""


def of_schema(record: Mapping[str, Any], fields: Fields) -> Record:
    """Return of a record the fields that are named, and nothing of what it has beside them."""
    return {
        name: of_schema(record[name], own)
        if own is not None and record[name] is not None
        else record[name]
        for name, own in fields.items()
        if name in record
    }


def released_round(record: RoundRecord) -> RoundRecord:
    """Return what observers are told of a round: what :data:`ROUND` names."""
    found = record.evaluation
    if found is not None:
        found = Evaluation(of_schema(found.metrics, _METRICS), {}, found.sample, found.kept)
    return RoundRecord(record.round, learning_rate=record.learning_rate, evaluation=found)


def release(folder: RunFolder, summary: Record) -> Record:
    """Write the run folder of a run that is over.

    Args:
        folder: The server's own.
        summary: The content of its ``summary.json``.

    Returns:
        The content of that of the run folder.

    Raises:
        OutputError: It cannot be written.
    """
    assert folder.released is not None, "asked for where the records are kept apart"
    target = RunFolder(folder.released)
    try:
        target.path.mkdir(mode=0o700, exist_ok=True)
        for name in (names.SUMMARY, names.ROUNDS):  # of an earlier end of the same run
            (target.path / name).unlink(missing_ok=True)
        for name in FOLDERS:
            shutil.rmtree(target.path / name, ignore_errors=True)
            if (folder.path / name).is_dir():
                shutil.copytree(folder.path / name, target.path / name)
    except OSError as error:
        raise OutputError(f"cannot write {target.path}: {error.strerror or error}") from error
    run = of_schema(folder.read_record(names.RUN) or {}, RUN)
    target.write_json(names.RUN, {**run, "withheld": WITHHELD})
    rounds = [of_schema(line, ROUND) for line in folder.read_lines(names.ROUNDS)]
    target.append(names.ROUNDS, rounds)
    if (samples := folder.read_json(names.SAMPLES)) is not None:
        target.write_json(names.SAMPLES, samples)
    target.write_text(names.EXPERIMENT, folder.read_text(names.EXPERIMENT))
    found = of_schema(summary, SUMMARY)
    found["records"] = record_marks.Marks(target).now()
    target.write_json(names.SUMMARY, found)
    return found


class Withholding:
    """An observer that tells another what may leave the server, and writes the rest down there.

    From the beginning of the rounds to their end texts are withheld, whatever they say: they come as
    clients answer, and name them.
    """

    def __init__(self, observer: RunObserver, folder: RunFolder) -> None:
        """Take who is told, and the server's own folder."""
        self._observer, self._kept = observer, folder.path / KEPT
        self._rounds = False

    def stage(self, text: str) -> None:
        """Tell it, but while rounds are played."""
        if self._rounds:
            self._keep(text)
        else:
            self._observer.stage(text)

    def begin(self, plan: Plan) -> None:
        """Tell the plan without what is ahead of each round, and without a folder to watch."""
        self._rounds = True
        self._observer.begin(replace(plan, names={}, work=0.0, ahead=(), folder="", withheld=True))

    def client_done(self, round: int, client: int, done: int, of: int) -> None:
        """Tell nothing."""

    def round_done(self, record: RoundRecord) -> None:
        """Tell what may leave."""
        self._observer.round_done(released_round(record))

    def warning(self, text: str) -> None:
        """Tell it, but while rounds are played."""
        if self._rounds:
            self._keep(f"warning: {text}")
        else:
            self._observer.warning(text)

    def end(self) -> None:
        """Tell it."""
        self._rounds = False
        self._observer.end()

    def shown(self, error: BaseException) -> BaseException:
        """Return what is raised for an error of a round: one that names no client.

        Of what is wrong with disk or budget, nothing follows from who was drawn.
        """
        if isinstance(error, OutputError | PrivacyError) or not isinstance(error, FedloomError):
            return error
        self._keep(f"error: {error}")
        return RoundFailed(
            "a round could not be played, and the reason may name who was drawn (privacy.amplification): "
            f"read {self._kept} on the server, then go on with fedloom run --resume"
        )

    def _keep(self, text: str) -> None:
        with self._kept.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")
