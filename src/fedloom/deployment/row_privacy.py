"""Row-level privacy at a client of its own: its noise's key, its ledger and its budget lie in its folder.

The key is 32 bytes of this machine's entropy, drawn for one run and deleted when the server says that it
is over. Noise is drawn under the key and the terms of the run, so that a server which changes the noise
multiplier or the clip gets other noise, which is charged beside the first. So it does with another
request of the same round, or the same one to a client that has stored something else meanwhile: batches
are drawn anew for each, as the accountant takes for granted. A key that is lost costs no privacy either:
all releases under the next one are others.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from fedloom.accounting.costs import Cost
from fedloom.data.splits import row_keys
from fedloom.deployment.client_file import OwnFile
from fedloom.deployment.error_report import ReportedError, Sentence
from fedloom.deployment.folders import ClientFolder
from fedloom.deployment.privacy_budget import FOLDER, budget_of, ledger_of
from fedloom.errors import CheckpointError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.privacy.client_ledger import ChargedRun, digest_of_rows
from fedloom.privacy.noise import NoiseSource
from fedloom.runs.assembly import RunComponents
from fedloom.runs.initial_adapter import digest_of_tensors
from fedloom.security.audit_log import digest_of
from fedloom.storage.client_store import ClientStore
from fedloom.storage.files import make_private
from fedloom.training.row_privacy import RowPrivacy, expected_batch
from fedloom.wire.envelope import PrivateWork, RequestHeader, WorkDone

UNUSED = 30 * 86_400.0
"""Seconds after which the key of a run that nobody asks for is deleted."""


class ClientPrivacy:
    """How a run hides the rows of the client that it is on the machine of."""

    def __init__(
        self,
        client_folder: ClientFolder,
        header: RequestHeader,
        experiment: Experiment,
        own: OwnFile,
    ) -> None:
        """Keep what is asked; nothing is drawn yet."""
        self._folder, self._run = client_folder, header.run
        self._text = digest_of((header.experiment or "").encode())
        self._experiment, self._own = experiment, own
        self._hiding: tuple[RowPrivacy, NoiseSource, str] | None = None
        self._last = ""

    @property
    def noise(self) -> NoiseSource | None:
        """What stands for the noise until the run is let in; ``None`` where this client draws none.

        Raises:
            SettingsError: The package ``cryptography`` is missing.
        """
        return NoiseSource.fresh(self._run) if self._experiment.privacy.draws_in_steps else None

    @contextlib.contextmanager
    def failing(self) -> Iterator[None]:
        """Report rows that cannot be hidden as the experiment asks.

        Raises:
            ReportedError: They cannot; details are in the client's log.
        """
        try:
            yield
        except SettingsError as error:
            if self._experiment.privacy.unit is None:
                raise
            raise ReportedError(Sentence.HIDING) from error

    def begin_request(
        self, header: RequestHeader, store: ClientStore, client: int, *, going_on: bool
    ) -> None:
        """Draw coins and noise for one request alone, and for one that is repeated whole the same again.

        Args:
            header: Of the request, with the hash of its payload.
            store: What this client has stored in earlier rounds.
            client: Its number in the run.
            going_on: Whether it continues the work of the request before.
        """
        if self._hiding is None:
            return
        own, noise, terms = self._hiding
        stored = digest_of_tensors(store.flat().get(client, {}))
        before = self._last if going_on else ""
        asked = (
            header.action,
            str(header.round),
            header.payload,
            stored,
            before,
        )
        self._last = digest_of("\n".join(asked).encode())
        own.noise = noise.of(f"{terms} {self._last}")

    def keep_ledger(self, parts: RunComponents, client: int, server: str) -> None:
        """Have each noisy step be written down in this client's ledger before its noise is drawn.

        Args:
            parts: The run, made ready.
            client: This client's number in it.
            server: HOST:PORT of the coordinator's gateway.

        Raises:
            PolicyError: The budget of the client's file does not suffice for the run.
            PrivacyError: The ledger is damaged.
            OutputError: It cannot be written.
        """
        own, settings = parts.row_privacies.get(client), self._experiment.privacy
        if own is None or settings.seeded or not own.noise_multiplier:
            return  # nothing is promised
        rows = row_keys(parts.division.train[client]).tolist()
        assert self._own.data is not None, "a client without rows is refused"
        charged = ChargedRun(
            self._run,
            server,
            tuple(sorted(self._own.data.all_sources)),
            digest_of_rows(rows),
            len(rows),
            own.count,
            int(np.bincount(own.units).max()),
            settings.column,
            settings.clip,
            own.noise_multiplier,
            expected_batch(own.count, self._experiment.training.batch_size) / own.count,
            own.steps,
        )
        ledger, budget = ledger_of(self._folder), budget_of(self._own.policy.privacy)
        own.ledger = ledger.begin(charged, rows, budget)
        noise = _kept(_key(self._folder, self._run), self._run)
        self._hiding = own, noise, f"{self._run} {charged.name} {self._text}"


def private_work(own: RowPrivacy | None) -> PrivateWork | None:
    """Return what the server is told of a client's private steps."""
    if own is None:
        return None
    return PrivateWork(units=own.count, noise_multiplier=own.noise_multiplier, steps=own.steps)


def costs_to_report(costs: Iterable[Cost], experiment: Experiment) -> list[WorkDone]:
    """Return what the server is told of work.

    Tokens, operations and memory follow from which rows are in a batch, so that with row-level privacy
    the number of steps and expected examples are told, and the time, which the server sees anyway.
    """
    found = [
        WorkDone(**{name: getattr(cost, name) for name in WorkDone.model_fields}) for cost in costs
    ]
    if experiment.privacy.unit != "row":
        return found
    hidden = {"flops": 0.0, "peak_memory": 0, "tokens": 0, "targets": 0}
    return [own.model_copy(update=hidden) for own in found]


def forget_key(client_folder: ClientFolder, run: str) -> None:
    """Delete the key of a run that is over."""
    _key(client_folder, run).unlink(missing_ok=True)


def _key(client_folder: ClientFolder, run: str) -> Path:
    return client_folder.path / FOLDER / "keys" / run


def _kept(path: Path, run: str) -> NoiseSource:
    """Return the source whose key is at ``path``; one that is not there, or damaged, is drawn anew.

    Keys that no server has asked for in a long time go: their runs were given up.

    Raises:
        OutputError: It cannot be written.
    """
    for own in (path.parent.parent, path.parent):
        make_private(own)
    with contextlib.suppress(OSError):
        os.utime(path)
    for other in path.parent.iterdir():
        if other.stat().st_mtime < time.time() - UNUSED:
            other.unlink(missing_ok=True)
    if path.exists():
        with contextlib.suppress(CheckpointError):
            return NoiseSource.kept(path, run, create=False)
        path.unlink(missing_ok=True)
    return NoiseSource.kept(path, run, create=True)
