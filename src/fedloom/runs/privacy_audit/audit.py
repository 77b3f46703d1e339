"""Attacks on a run: which are made, with what they find, and which cannot be.

Of an experiment a run is made with planted rows, what its clients send is intercepted, and the adapter
that it releases is attacked. Of a run folder there is the released adapter alone, and the rows to
attack it with are those that their owner names: which were trained on is not taken from anywhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedloom.data.examples import Example
from fedloom.data.loading import LoadedData
from fedloom.data.partition import LabelDistribution
from fedloom.data.reader import Read, Reader
from fedloom.errors import DataError, ModelError, OutputError
from fedloom.evaluation.privacy_audit.canaries import Guessed, guess, shared_confidence
from fedloom.evaluation.privacy_audit.membership import Membership, infer_membership
from fedloom.experiment.experiment import Experiment
from fedloom.models.load import fingerprint
from fedloom.randomness import generator
from fedloom.runs.adapter_paths import adapter_folder
from fedloom.runs.model_building import model_folder, of_server
from fedloom.runs.observers import RunObserver
from fedloom.runs.partitioning import PartitionedData
from fedloom.runs.privacy_audit.inversion import inversion_record
from fedloom.runs.privacy_audit.planting import Canary
from fedloom.runs.privacy_audit.rows import rows_record
from fedloom.runs.privacy_audit.scores import RowScores, Scorer
from fedloom.runs.privacy_audit.tokens import PlantedRun, tokens_record
from fedloom.runs.records import versions
from fedloom.runs.run import run_experiment
from fedloom.storage import run_folder as names
from fedloom.storage.run_folder import Record, RunFolder

DELTA = 1e-5
"""For which the lower bound holds where the run states none."""

MOST_ROWS = 256
"""Members of a client, and rows that are none, that are scored."""

MEMBER, CLIENT = "member", "client"
"""Columns of the owner's rows."""

NOT_COVERED = (
    "metrics, numbers of rows and steps, and who takes part: the server sees them as they are",
    "gradient inversion by other searches (LAMP, TIGER, UTR), and of other objectives than sft",
    "rows of many local steps put together: what the second block reads changes from step to step",
    "attacks that see the adapters of all rounds, or many of them",
    "a server that changes the model or the cohort to single a client out",
    "rows that the model writes out when it is asked for them (verbatim extraction)",
)
"""What no attack here measures."""


def audit_experiment(
    experiment: Experiment,
    *,
    rounds: int | None,
    canaries: int,
    observer: RunObserver,
    inversions: int = 0,
) -> RunFolder:
    """Run an experiment with planted rows, attack it, and leave ``audit.json`` in its run folder.

    Args:
        experiment: Of which a shorter run is made.
        rounds: At most so many; ``None`` for all.
        canaries: Of each kind; 0 for none.
        observer: Watches the run.
        inversions: Updates of which rows are looked for by gradient inversion.
    """
    experiment = _shortened(experiment, rounds)
    planted = PlantedRun(experiment, canaries)
    result = run_experiment(experiment, observer=observer, auditor=planted)
    assert planted.rows is not None and planted.parts is not None and planted.engine is not None
    folder = RunFolder(result.folder)
    observer.stage("reading tokens from what clients sent")
    record = _record(experiment, folder, "experiment")
    record["tokens"] = tokens_record(planted)
    record["sequences"] = rows_record(planted, record["tokens"])
    if inversions:
        observer.stage("looking for rows by gradient inversion")
    record["inversion"] = inversion_record(planted, inversions)
    why = "the method releases no global adapter: what clients keep is attacked by nobody else"
    if result.adapter_path is None:
        record["membership"] = record["canaries"] = {"made": False, "why": why}
    else:
        observer.stage("scoring rows under the released adapter")
        scorer = Scorer(experiment, planted.parts.division, result.adapter_path)
        costs = folder.read_lines(names.COSTS)
        there = {cost["client"] for cost in costs if cost["steps"]}  # others' rows are no members
        record["clients_that_trained"] = len(there)
        record["membership"] = _membership(
            experiment,
            scorer,
            {own: rows for own, rows in planted.rows.members.items() if own in there},
            planted.rows.withheld,
        )
        coins = [own for own in planted.rows.canaries if own.client in there]
        record["canaries"] = _canary_record(experiment, scorer, coins, record)
    folder.write_json(names.AUDIT, record)
    return folder


def _shortened(experiment: Experiment, rounds: int | None) -> Experiment:
    """Return what is run: shorter, client after client, and without what an audit does not read."""
    federation, evaluation, output = experiment.federation, experiment.evaluation, experiment.output
    fewer = min(federation.rounds, rounds or federation.rounds)
    return replace(
        experiment,
        name=f"{experiment.name}-audit",
        federation=federation.model_copy(update={"rounds": fewer}),
        simulation=experiment.simulation.model_copy(update={"cohort": 1}),
        evaluation=evaluation.model_copy(update={"samples": 0, "every": fewer}),
        output=output.model_copy(update={"verify": False, "trackers": []}),
    )


def _record(experiment: Experiment, folder: RunFolder, of: str) -> Record:
    """Return what an audit's record begins with."""
    summary = folder.read_record(names.SUMMARY) or {}
    privacy = experiment.privacy
    return {
        "fedloom": versions()["fedloom"],
        "name": experiment.name,
        "of": of,
        "run": str(folder.path),
        "model": of_server(experiment).model.path,
        "method": experiment.method.name,
        "objective": experiment.objective.name,
        "clients": experiment.federation.clients,
        "rounds": experiment.federation.rounds,
        "rank": experiment.adapter.rank,
        "optimizer": experiment.training.optimizer,
        "privacy": privacy.model_dump(exclude_defaults=True),
        "stated": summary.get("privacy"),
        "not_covered": list(NOT_COVERED),
    }


def _membership(
    experiment: Experiment,
    scorer: Scorer,
    members: Mapping[int, Sequence[Example]],
    others: Mapping[int, Sequence[Example]],
) -> Record:
    """Return how well members are told from other rows of the same clients."""
    clients = [own for own in sorted(members) if members[own] and others.get(own)]
    if not clients:
        why = "no client has enough rows to withhold some of them"
        return {"made": False, "why": why}
    inside = _scored(experiment, scorer, {own: members[own] for own in clients})
    outside = _scored(experiment, scorer, {own: others[own] for own in clients})
    scores: Record = {}
    for name in next(iter(inside.values())):
        rng = generator(experiment.federation.seed, f"audit bootstrap {name}")
        found = infer_membership(
            {own: kinds[name] for own, kinds in inside.items()},
            {own: kinds[name] for own, kinds in outside.items()},
            rng,
        )
        scores[name] = _membership_record(found)
    leak = any(own["auc"]["low"] > 0.5 for own in scores.values())
    return {"made": True, "clients": len(clients), "scores": scores, "leak": leak}


def _membership_record(found: Membership) -> Record:
    record = asdict(found)
    record["true_positives"] = [
        {"rate": rate, **own} for rate, own in record["true_positives"].items()
    ]
    record["curve"] = [list(axis) for axis in found.curve]
    record["band"] = [list(axis) for axis in found.band]
    return record


def _scored(
    experiment: Experiment, scorer: Scorer, rows: Mapping[int, Sequence[Example]]
) -> dict[int, dict[str, NDArray[np.float64]]]:
    """Return the scores of each client's rows, of a sample where there are many."""
    found = {}
    for client, own in rows.items():
        if len(own) > MOST_ROWS:
            rng = generator(experiment.federation.seed, "audit sample", client)
            own = [own[i] for i in np.sort(rng.choice(len(own), MOST_ROWS, replace=False))]
        found[client] = scorer.score(own).scores
    return found


def _canary_record(
    experiment: Experiment, scorer: Scorer, canaries: Sequence[Canary], record: Record
) -> Record:
    """Return what the coins of canaries prove, for each kind of them.

    The verdict is about all kinds: their bounds hold together at 95 %, each at more.
    """
    if not canaries:
        return {
            "made": False,
            "why": "no canaries were planted at clients that trained (--canaries 0)",
        }
    stated = record["stated"] or {}
    delta = stated.get("delta") or experiment.privacy.delta or DELTA
    kinds, found = {}, list(dict.fromkeys(own.kind for own in canaries))
    confidence = shared_confidence(len(found))
    for kind in found:
        own = [one for one in canaries if one.kind == kind]
        scores, coins = _by_unit(own, scorer.score([one.row for one in own]))
        kinds[kind] = _bound_record(kind, guess(scores, coins, delta, confidence), stated)
    return {
        "made": True,
        "unit": experiment.privacy.unit or "row",
        "delta": delta,
        "confidence_of_each": confidence,
        "kinds": kinds,
        "leak": any(own["epsilon"] > 0 for own in kinds.values()),
        "holds": None
        if stated.get("epsilon") is None
        else all(own["holds"] for own in kinds.values()),
    }


def _by_unit(
    canaries: Sequence[Canary], scored: RowScores
) -> tuple[NDArray[np.float64], list[bool]]:
    """Return the score and the coin of each unit: the mean over its canaries."""
    scores = next(iter(scored.scores.values()))
    units: dict[int, list[float]] = {}
    for position, score in zip(scored.rows.tolist(), scores.tolist(), strict=True):
        units.setdefault(canaries[position].unit, []).append(score)
    coins = {own.unit: own.coin for own in canaries}
    return np.array([fmean(own) for own in units.values()]), [coins[unit] for unit in units]


def _bound_record(kind: str, own: Guessed, stated: Mapping[str, Any]) -> Record:
    """Return a bound beside what is stated.

    To flip a label is to take a row out and put another in: epsilon-privacy of adding or removing a row
    is 2 epsilon-privacy of flipping one, so that half of the bound is one on epsilon. So it is where
    the unit is a client: its coin decides what else it has, not whether it takes part. A backdoor is one
    row, there or not.
    """
    replaced = kind == "label_flip" or stated.get("unit") == "client"
    halved = replaced and "replace" not in str(stated.get("neighbours", ""))
    share = 0.5 if halved else 1.0
    epsilon = stated.get("epsilon")
    return {
        "canaries": own.canaries,
        "guesses": own.guesses,
        "right": own.right,
        "epsilon": own.epsilon * share,
        "ceiling": own.ceiling * share,
        "halved": halved,
        "holds": None if epsilon is None else own.epsilon * share <= epsilon,
        "exposure": sorted(own.exposure, reverse=True),
        "most_exposure": float(np.log2(own.canaries - len(own.exposure) + 1)),
    }


def audit_run(run: Path, rows: Path, observer: RunObserver) -> RunFolder:
    """Attack the adapter that a run released with rows that their owner names.

    Args:
        run: A run folder with a global adapter.
        rows: JSONL in a layout of the run's kind, each row with ``"member": true`` where it was trained
            on and false where not, and with ``"client"`` where rows are of several.
        observer: Told of stages.

    Raises:
        OutputError: ``run`` is no run folder, or its ``run.json`` is not what a run writes.
        ModelError: It has no global adapter, or its model is not the one that it was trained on.
        DataError: The rows cannot be read, do not say who is a member, or are all of one side.
    """
    folder = RunFolder.existing(run)
    adapter = adapter_folder(run)
    experiment = Experiment.from_toml(run / names.EXPERIMENT)
    known = _run_record(folder)
    observer.stage(f"reading {rows}")
    members, others = owners_rows(experiment, rows)
    _require_model(experiment, known, observer)
    classes = tuple(known.get("classes") or ())
    division = PartitionedData(
        LoadedData([], [], experiment.kind, ""),
        {},
        {},
        [],
        classes,
        LabelDistribution(None, (), ()),
    )
    observer.stage("scoring rows under the released adapter")
    record = _record(experiment, folder, "run")
    record["rows"] = str(rows)
    sent = "what clients sent is not in a run folder: give the experiment, and a run is made for it"
    planted = "no canaries were planted in this run: give the experiment instead"
    record["tokens"] = record["sequences"] = record["inversion"] = {"made": False, "why": sent}
    record["canaries"] = {"made": False, "why": planted}
    scorer = Scorer(experiment, division, adapter)
    record["membership"] = _membership(experiment, scorer, members, others)
    folder.write_json(names.AUDIT, record)
    return folder


def _run_record(folder: RunFolder) -> Record:
    """Return what is read of ``run.json``, which older runs may lack.

    Raises:
        OutputError: It is not what a run writes.
    """
    known = folder.read_record(names.RUN) or {}
    fits = isinstance(known.get("model", {}), dict)
    if not fits or not isinstance(known.get("classes") or [], list):
        raise OutputError(f"{folder.path / names.RUN} is not what a run wrote: put it back")
    return known


def _require_model(experiment: Experiment, known: Record, observer: RunObserver) -> None:
    """Check that the backbone is the one that the run's adapter was trained on.

    Raises:
        ModelError: It is another.
    """
    path = model_folder(of_server(experiment).model.path, observer.stage)
    was, now = known.get("model", {}).get("sha256"), fingerprint(path)
    if was is not None and was != now:
        raise ModelError(
            f"{path} is not the model of this run (SHA-256 {was[:12]}, now {now[:12]}): put that one "
            "back, as its adapter means nothing on another"
        )


Rows = dict[int, list[Example]]


def owners_rows(experiment: Experiment, path: Path) -> tuple[Rows, Rows]:
    """Return members and other rows by client, from the file that their owner names.

    Raises:
        DataError: It cannot be read, a row does not say whether it is a member, or one side is empty.
    """
    if not path.is_file():
        raise DataError(
            f"there are no rows at {path}: --rows names a JSONL file of the rows' owner"
        )
    settings = experiment.data.model_copy(update={"source": str(path), "max_rows": None})
    found = Reader(settings, settings, experiment.kind, Read()).read(str(path), "train")
    sides: dict[bool, Rows] = {True: {}, False: {}}
    for row in found:
        said = row.columns.get(MEMBER, "").lower()
        if said not in ("true", "false"):
            raise DataError(
                f'{path} row {row.row + 1}: "{MEMBER}" is {said!r}; give true for a row that was trained '
                "on, and false for one that was not"
            )
        client = row.columns.get(CLIENT, "0")
        if not client.isdigit():
            raise DataError(f'{path} row {row.row + 1}: "{CLIENT}" is {client!r}, not a number')
        sides[said == "true"].setdefault(int(client), []).append(row)
    if not set(sides[True]) & set(sides[False]):
        raise DataError(
            f"{path} has {sum(map(len, sides[True].values()))} members and "
            f"{sum(map(len, sides[False].values()))} other rows, and no client with both: they are "
            "compared within a client"
        )
    return sides[True], sides[False]
