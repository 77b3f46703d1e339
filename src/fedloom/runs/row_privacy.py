"""Row-level privacy of a run: what each client's steps spend, and the noise that keeps them within it.

A row lies at one client, so the run's epsilon is the largest of its clients' (parallel composition). A
client's follows from its own numbers: the probability that a unit is in a batch, q = batch_size / units,
and the steps of all rounds. Small clients have the largest q and would pay most; with ``target_epsilon``
each has a noise multiplier of its own, so that each spends the target at most, in however many rounds it
takes part. What a finished run states are the steps that were made. How many units a client has is taken
to be known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedloom.data.client_rows import Indices, TokenShare
from fedloom.data.partition import column_values
from fedloom.errors import DataError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.methods.contract.method import Method
from fedloom.privacy.accounting import NEIGHBOURS, Releases, epsilon, solve_noise_multiplier
from fedloom.privacy.noise import NoiseSource
from fedloom.privacy.row_ledger import RowLedger
from fedloom.privacy.settings import PrivacySettings
from fedloom.privacy.statement import sentences
from fedloom.runs.client_privacy import key_file
from fedloom.runs.partitioning import PartitionedData
from fedloom.storage.run_folder import RunFolder
from fedloom.training.row_privacy import RowPrivacy, expected_batch, private_steps, units_of
from fedloom.training.settings import Work
from fedloom.wire.envelope import PrivateWork

EACH_BY_ITSELF = 3
"""Clients with different sampling or steps up to which noise is solved for each, which takes a while."""

ALIKE = 1.15
"""Beyond that, clients with numbers of units that differ by this factor at most are solved for together:
as if each had as few as the fewest, and made as many steps as the most, so that each has noise enough."""


@dataclass(frozen=True)
class RowPlan:
    """What one client's steps are to be.

    Attributes:
        units: How many it has: rows, pairs, or values of ``privacy.column``.
        sampling: q, the probability that a unit is in a batch.
        steps: Of the whole run at most: as if it took part in every round.
    """

    units: int
    sampling: float
    steps: int


FEW_ELSEWHERE = 20
"""As many clients on other machines, each of which has solved its noise by itself."""

MOST_ROUNDS = 1 << 20
"""Rounds of a run at most, whose steps are added up one by one."""

LEDGERS = "privacy"
"""Folder in a run folder: a ledger for each client."""

RUN = "row-level"
"""Names the run in its key's derivations: each run has a key of its own."""


def new_noise(experiment: Experiment, folder: RunFolder, *, elsewhere: bool) -> NoiseSource | None:
    """Return the noise of a run that begins, ``None`` for one without row-level privacy or from the seed.

    Args:
        experiment: The run's.
        folder: Its folder.
        elsewhere: Whether clients are on other machines, where each draws its own.

    Raises:
        OutputError: Its key cannot be written.
    """
    if elsewhere or not experiment.privacy.draws_in_steps:
        return None
    key_file(folder).unlink(missing_ok=True)  # of a run that was deleted
    return NoiseSource.kept(key_file(folder), RUN, create=True)


def kept_noise(
    experiment: Experiment, folder: RunFolder, *, finished: bool, elsewhere: bool
) -> NoiseSource | None:
    """Return the noise of a run that is continued; see :func:`new_noise`.

    Args:
        experiment: The run's.
        folder: Its folder.
        finished: Whether nothing is trained any more, so that any noise will do.
        elsewhere: Whether clients are on other machines, where each has its own.

    Raises:
        CheckpointError: The key is missing or damaged.
    """
    if elsewhere or not experiment.privacy.draws_in_steps:
        return None
    if finished:
        return NoiseSource.fresh(RUN)
    return NoiseSource.kept(key_file(folder), RUN, create=False)


def seeded_noise(experiment: Experiment) -> NoiseSource:
    """Return the source of noise that follows from the seed, where the experiment says so.

    Raises:
        SettingsError: It does not.
    """
    if not experiment.privacy.seeded:
        raise SettingsError(
            [
                'privacy.unit = "row": there is no secret for the noise here; fedloom run draws one, and '
                "privacy.seeded = true does without (reproducible, therefore not private)"
            ]
        )
    return NoiseSource.seeded(experiment.federation.seed, RUN)


def row_privacies(
    experiment: Experiment,
    division: PartitionedData,
    method: Method,
    shares: Mapping[int, TokenShare],
    participations: float,
    noise: NoiseSource,
) -> dict[int, RowPrivacy]:
    """Return how each client's steps hide its units.

    Args:
        experiment: With ``privacy.unit = "row"``.
        division: The rows themselves, for ``privacy.column``.
        method: Which says how often a client trains in a round.
        shares: Each client's token rows.
        participations: Rounds that a client takes part in on average.
        noise: Where coins and noise come from.

    Raises:
        DataError: A row has no value in ``privacy.column``.
        SettingsError: The number of steps would depend on rows, or delta is not below 1 / units.
    """
    own = experiment.privacy
    units = {
        client: units_of(share, _values(experiment, division, client, pooled=method.pools_data))
        for client, share in shares.items()
    }
    plans = {
        client: _plan(experiment, method, client, share, units[client], participations)
        for client, share in shares.items()
    }
    multipliers = noise_multipliers(plans, own)
    return {
        client: RowPrivacy(
            own.clip,
            multipliers[client],
            noise,
            units[client],
            plan.steps,
            units_per_pass=own.units_per_pass,
        )
        for client, plan in plans.items()
    }


def _plan(
    experiment: Experiment,
    method: Method,
    client: int,
    share: TokenShare,
    units: Indices,
    participations: float,
) -> RowPlan:
    """Return what a client's steps are to be.

    Raises:
        SettingsError: The number of steps would depend on rows, or delta is not below 1 / units.
    """
    delta, count = experiment.privacy.delta, int(units.max(initial=-1)) + 1
    if delta is None or delta >= 1 / count:
        raise SettingsError(
            [
                f"privacy.delta = {delta} is not below 1 / {count}, one over the units of client "
                f"{client}: a mechanism may then show a unit whole; give {0.1 / count:.0e} or less"
            ]
        )
    steps = _steps(experiment, method, client, share, count, participations)
    return RowPlan(count, expected_batch(count, experiment.training.batch_size) / count, steps)


def noise_multipliers(plans: Mapping[int, RowPlan], privacy: PrivacySettings) -> dict[int, float]:
    """Return each client's noise multiplier: as given, or so that it spends the target epsilon at most.

    Args:
        plans: Of each client.
        privacy: With one of both.
    """
    if privacy.noise_multiplier is not None:
        return dict.fromkeys(plans, privacy.noise_multiplier)
    target, delta, accountant = privacy.target_epsilon, privacy.delta, privacy.accountant
    assert target is not None and delta is not None, "one of both is given, and delta with it"
    alike: dict[object, list[int]] = {}
    each = len({(own.sampling, own.steps) for own in plans.values()}) <= EACH_BY_ITSELF
    for client, plan in plans.items():
        step = math.floor(math.log(plan.units, ALIKE))
        alike.setdefault((plan.sampling, plan.steps) if each else step, []).append(client)
    if accountant == "auto" and not each:
        accountant = "rdp"  # asks for some more noise than PLD, in a tenth of the time
    found: dict[int, float] = {}
    for clients in alike.values():
        sampling = max(plans[client].sampling for client in clients)
        steps = max(plans[client].steps for client in clients)
        z = solve_noise_multiplier(target, delta, sampling, steps, accountant)
        found |= dict.fromkeys(clients, z)
    return found


def _steps(
    experiment: Experiment,
    method: Method,
    client: int,
    share: TokenShare,
    units: int,
    participations: float,
) -> int:
    """Return the steps of a client in all rounds at most."""
    training, rounds = experiment.training, experiment.federation.rounds
    if rounds > MOST_ROUNDS:
        raise SettingsError(
            [
                f'privacy.unit = "row": federation.rounds = {rounds}, and at most {MOST_ROUNDS} are '
                "accounted for"
            ]
        )
    if client in experiment.clients.newcomers:
        work = Work(steps=experiment.clients.newcomer_steps)
        return private_steps(work, units, training.batch_size, share.tokens.width)
    work = training.work(len(share), participations)
    each = private_steps(work, units, training.batch_size, share.tokens.width)
    trainings = [method.trainings_of(round, rounds) for round in range(1, rounds + 1)]
    if (
        training.amount_per == "round"
    ):  # all of a round's trainings share it, each has a step at least
        return sum(max(each, own) for own in trainings)
    return sum(each * own for own in trainings)


def _values(
    experiment: Experiment, division: PartitionedData, client: int, *, pooled: bool
) -> dict[int, str] | None:
    """Return what makes rows one unit by their number, ``None`` where each is one.

    Raises:
        DataError: A row has no value there.
    """
    column = experiment.privacy.column
    if column is None:
        return None
    clients = division.train if pooled else [client]
    rows = [row for own in clients for row in division.train[own]]
    try:
        return dict(zip([row.row for row in rows], column_values(rows, column), strict=True))
    except DataError as error:
        raise DataError(f"privacy.column = {column!r}: {error}") from error


def keep_ledgers(
    privacies: Mapping[int, RowPrivacy], experiment: Experiment, folder: RunFolder
) -> None:
    """Have each client's releases be written down in the run folder, before their noise is drawn."""
    for client, own in privacies.items():
        allowed = own.steps if experiment.privacy.target_epsilon is not None else None
        own.ledger = RowLedger(folder.path / LEDGERS / f"{client:06d}.txt", allowed)


@dataclass(frozen=True)
class ClientSteps:
    """The private steps of one client, from which its epsilon follows.

    Attributes:
        units: How many it has.
        noise_multiplier: z.
        sampling: q.
        steps: Made so far, or planned at most.
    """

    units: int
    noise_multiplier: float
    sampling: float
    steps: int


def own_steps(
    experiment: Experiment, privacies: Mapping[int, RowPrivacy], *, made: bool = False
) -> dict[int, ClientSteps]:
    """Return the private steps of clients of this machine.

    Args:
        experiment: With ``privacy.unit = "row"``.
        privacies: How each client's steps hide its units.
        made: Whether the run is over, and what counts is what the ledgers hold; else as many steps as are
            planned at most.
    """
    found = {}
    for client, own in sorted(privacies.items()):
        steps = len(own.ledger) if made and own.ledger is not None else own.steps
        sampling = expected_batch(own.count, experiment.training.batch_size) / own.count
        found[client] = ClientSteps(own.count, own.noise_multiplier, sampling, steps)
    return found


def reported_steps(
    experiment: Experiment, reported: Mapping[int, PrivateWork]
) -> dict[int, ClientSteps]:
    """Return the private steps of clients on other machines, each by its own word: those planned."""
    batch = experiment.training.batch_size
    return {
        client: ClientSteps(
            own.units, own.noise_multiplier, expected_batch(own.units, batch) / own.units, own.steps
        )
        for client, own in sorted(reported.items())
    }


def row_statement(
    experiment: Experiment, clients: Mapping[int, ClientSteps], *, elsewhere: bool = False
) -> dict[str, Any]:
    """Return what a run promises each unit, for ``run.json`` and ``summary.json``.

    Args:
        experiment: With ``privacy.unit = "row"``.
        clients: The private steps of each, at least one.
        elsewhere: Whether they are on other machines, and keep their ledgers themselves.

    Returns:
        The largest epsilon of all clients, with its noise, sampling and steps; and ``clients``: each
        one's own, ``None`` for an epsilon that is not bounded.
    """
    own = experiment.privacy
    assert own.delta is not None, "the section asks for it with a unit"
    releases = {
        client: Releases(of.noise_multiplier, of.sampling, of.steps)
        for client, of in clients.items()
    }
    few = FEW_ELSEWHERE if elsewhere else EACH_BY_ITSELF
    several = own.accountant == "auto" and len(set(releases.values())) > few
    accountant = "rdp" if several else own.accountant
    known = {one: epsilon([one], own.delta, accountant) for one in set(releases.values())}
    each: dict[str, dict[str, Any]] = {}
    for client, one in releases.items():
        spent = known[one]
        each[str(client)] = {
            "epsilon": spent.epsilon if math.isfinite(spent.epsilon) else None,
            "noise_multiplier": one.noise_multiplier,
            "sampling": one.sampling,
            "steps": one.steps,
            "units": clients[client].units,
            "accountant": spent.accountant,
        }
    worst = max(
        each.values(), key=lambda one: math.inf if one["epsilon"] is None else one["epsilon"]
    )
    record = {
        "unit": "row",
        "column": own.column,
        "epsilon": worst["epsilon"],
        "delta": own.delta,
        "noise_multiplier": worst["noise_multiplier"],
        "clip": own.clip,
        "sampling": worst["sampling"],
        "steps": worst["steps"],
        "accountant": worst["accountant"],
        "neighbours": NEIGHBOURS,
        "seeded": own.seeded,
        "target_epsilon": own.target_epsilon,
        "not_covered": _not_covered(experiment, elsewhere=elsewhere),
        "clients": each,
    }
    of = "row" if own.column is None else f"value of {own.column!r} at a client, with all its rows,"
    return {**record, "sentences": sentences({**record, "unit": of})}


def _not_covered(experiment: Experiment, *, elsewhere: bool) -> list[str]:
    """Return what row-level privacy of the steps says nothing of."""
    told = "(tokens, operations, seconds)"
    if elsewhere:
        told = "in seconds"
    found = [
        f"how many rows each client has, and what its work cost {told}, from which may be guessed which "
        "rows a step drew",
        "the run folder beside the model (label counts, digests and accounts of rows)",
        "a person with several units, or rows at several clients (their epsilons add up)",
        "other runs on the same rows",
    ]
    if elsewhere:
        found[1] = (
            "each client's word for its units, its noise and its steps, which nobody else can check"
        )
        found[-1] = "other runs on the same rows, of which each client's own ledger knows"
    if experiment.privacy.units_per_pass > 1:
        found.append(
            "what rounding lets units of one pass tell of each other (privacy.units_per_pass), which an "
            "adapter of very large numbers makes large"
        )
    if experiment.evaluation.per_client:
        found.append("the held-out rows of clients (evaluation.per_client)")
    return found
