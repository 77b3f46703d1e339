"""What has been spent of a client's rows, in words, for `fedloom client budget`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime

from fedloom.deployment.folders import ClientFolder
from fedloom.deployment.policy import PrivacyPolicySettings
from fedloom.privacy.client_ledger import Budget, ChargedRun, ClientLedger

FOLDER = "privacy"
"""Folder in a client's: its ledger, and the keys of runs that are not over."""

LEAST_DELTA = 1e-5
"""delta of a client whose file names none, where its rows are no more than a tenth of its inverse."""


def ledger_of(client_folder: ClientFolder) -> ClientLedger:
    """Return the ledger of a client."""
    return ClientLedger(client_folder.path / FOLDER)


def budget_of(policy: PrivacyPolicySettings) -> Budget | None:
    """Return what a client's file lets all runs spend, ``None`` for any amount."""
    if policy.max_epsilon is None or policy.delta is None:
        return None
    return Budget(policy.max_epsilon, policy.delta, policy.column)


def budget_lines(client_folder: ClientFolder) -> list[str]:
    """Return what has been spent of the rows of each source, and in which runs.

    Raises:
        PrivacyError: The ledger is damaged.
        SettingsError: The client's file has mistakes, or dp-accounting is missing.
        OutputError: The ledger cannot be read.
    """
    ledger = ledger_of(client_folder)
    by_source: dict[tuple[str, ...], list[ChargedRun]] = {}
    for own in ledger.runs():
        by_source.setdefault(own.sources, []).append(own)
    if not by_source:
        return ["no run with row-level privacy has been let in here: nothing is spent"]
    budget = budget_of(client_folder.own_file().policy.privacy)
    found: list[str] = []
    for sources, runs in by_source.items():
        found += _of_source(ledger, sources, runs, budget)
    return found


def _of_source(
    ledger: ClientLedger, sources: tuple[str, ...], runs: list[ChargedRun], budget: Budget | None
) -> Iterator[str]:
    latest, given = runs[-1], budget
    if given is None:
        delta = min(LEAST_DELTA, 0.1 / max(own.units for own in runs))
        given = Budget(math.inf, delta, latest.column)
    rows = {own.rows: own for own in runs}.values()
    spent = max(ledger.spent(own, given) for own in rows)
    unit = "row" if given.column is None else f"value of {given.column!r}"
    of = f"of {given.max_epsilon:g}" if budget else "(policy.privacy.max_epsilon sets no bound)"
    yield f"{', '.join(sources)}: {latest.count} rows in the last run"
    yield f"  spent of any one {unit}: epsilon {spent:.4g} {of} at delta {given.delta:g}"
    yield f"  what that means: {_in_words(spent)}"
    for own in runs:
        when = datetime.fromtimestamp(own.begun, UTC)
        column = "" if own.column is None else f", unit {own.column!r}"
        yield (
            f"  run {own.run[:8]} of {own.server}, let in on {when:%Y-%m-%d}: {ledger.made(own)} of at "
            f"most {own.steps} noisy steps, noise multiplier {own.noise_multiplier:.4g}, sampling "
            f"{own.sampling:.4g}{column}"
        )


def _in_words(spent: float) -> str:
    if spent == 0:
        return "nothing has been released of these rows"
    if not math.isfinite(spent):
        return "nothing bounds what may be concluded of these rows"
    if spent > 50:
        return "hardly anything bounds what may be concluded of a row"
    return (
        "of one that was as likely trained on as not, whoever got all that was released can be sure with "
        f"odds of at most {math.exp(spent):.3g} to 1"
    )
