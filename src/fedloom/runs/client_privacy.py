"""Client-level privacy of a run: its key, its ledger, who is drawn, and what it may say in the end.

The key of the noise is in a file beside the run folder, which its owner alone can read, and is removed
when the run is over. The ledger is in the folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedloom.errors import PrivacyError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.federation.selection import Poisson, Selection, Separated, make_selection
from fedloom.methods import METHODS
from fedloom.privacy.distributed_mean import DistributedMean
from fedloom.privacy.ledger import PrivacyLedger
from fedloom.privacy.noise import Floats, NoiseSource
from fedloom.privacy.private_mean import (
    AccountedMean,
    ClientLevelPlan,
    PrivateMean,
    participation_of,
)
from fedloom.privacy.settings import PrivacySettings
from fedloom.privacy.statement import sentences
from fedloom.storage.run_folder import RunFolder
from fedloom.wire.messages import AddedNoise

LEDGER = "privacy.jsonl"
"""The ledger in the run folder."""

SUMS = "released"
"""Folder in the run folder: sums that clients' noise is in, until a checkpoint has them."""

RUN = "client-level"
"""Names the run in its key's derivations: each run has a key of its own."""


def selection_of(experiment: Experiment, private: AccountedMean | None = None) -> Selection:
    """Return what draws the clients of each round: under client-level privacy what is accounted for.

    Args:
        experiment: The run's.
        private: Where secret coins are from; without it what needs them draws nobody, and raises.
    """
    if experiment.privacy.unit != "client":
        return make_selection(experiment.selection)
    federation, members = experiment.federation, _members(experiment)
    if experiment.privacy.distributes and not experiment.privacy.separates:
        return make_selection(experiment.selection)  # of fixed size: a sum needs enough clients
    if not experiment.privacy.separates:
        rate = min(1.0, federation.cohort_size / members)
        if not experiment.privacy.amplification:
            return Poisson(rate)
        return Poisson(rate, private.coins if isinstance(private, PrivateMean) else _no_coins)
    return Separated(
        participation_of(experiment.privacy, members, federation.cohort_size, federation.rounds)
    )


def _no_coins(round: int, n: int) -> Floats:
    """Draw nobody: secret coins are those of a run that has begun.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError("who is drawn is secret until the run draws")


class RunPrivacy:
    """Client-level privacy of one run.

    Attributes:
        plan: Its numbers.
    """

    def __init__(self, experiment: Experiment) -> None:
        """Solve for the numbers of an experiment with ``privacy.unit = "client"``.

        Raises:
            SettingsError: The budget cannot be met, or a package is missing.
        """
        self._experiment = experiment
        self.plan = self._planned(experiment.privacy)
        self.plan.require_room(1)

    def _planned(self, privacy: PrivacySettings) -> ClientLevelPlan:
        federation, members = self._experiment.federation, _members(self._experiment)
        cohort = min(federation.cohort_size, members)
        return ClientLevelPlan.of(privacy, members, cohort, federation.rounds)

    def otherwise(self) -> ClientLevelPlan | None:
        """Return the plan with ``privacy.amplification`` the other way.

        ``None`` where it would say nothing: clients are not drawn by coins, all are drawn, there is no
        noise, or the numbers cannot be met.
        """
        own, privacy = self.plan, self._experiment.privacy
        if (
            privacy.distributes
            or own.correlation is not None
            or own.rate == 1
            or own.noise_multiplier == 0
        ):
            return None
        try:
            return self._planned(
                privacy.model_copy(update={"amplification": not privacy.amplification})
            )
        except SettingsError:
            return None

    @classmethod
    def of(cls, experiment: Experiment, stage: Callable[[str], None]) -> RunPrivacy | None:
        """Return that of an experiment, and say what it promises; ``None`` where there is none.

        Raises:
            SettingsError: See :meth:`__init__`.
        """
        if experiment.privacy.unit != "client":
            return None
        own = cls(experiment)
        for sentence in own.promise()["sentences"]:
            stage(sentence)
        return own

    def mean(self, folder: RunFolder, done: int) -> PrivateMean | DistributedMean:
        """Return what takes the means of the run in a folder, with its key and its ledger.

        Args:
            folder: The run folder. Where it has no ledger yet, a key beside it is of an earlier run.
            done: The last finished round, -1 where there is none. After the last round the key is not
                needed.

        Raises:
            CheckpointError: Releases were made, and their key is gone.
            PrivacyError: The ledger was changed, or is gone.
            OutputError: Key or ledger cannot be written.
        """
        own, path = self._experiment, folder.path / LEDGER
        if done >= 0 and not path.exists():
            raise PrivacyError(
                f"{path}: the privacy ledger of this run is gone, and rounds were finished: what was "
                "spent is not known; put it back, or start a new run"
            )
        if own.privacy.distributes:
            ledger = PrivacyLedger(path, self._facts(), self.plan.compose)
            return DistributedMean(self.plan, ledger, folder.path / SUMS, seeded=own.privacy.seeded)
        return self._with_noise(path, key_file(folder), done)

    def _with_noise(self, path: Path, key: Path, done: int) -> PrivateMean:
        """Return a mean whose noise is drawn here; see :meth:`mean`."""
        own = self._experiment
        if own.privacy.seeded:
            source = NoiseSource.seeded(own.federation.seed, RUN)
        elif done == own.federation.rounds and not key.exists():
            ledger = PrivacyLedger(path, compose=self.plan.compose)
            return PrivateMean(self.plan, NoiseSource.fresh(RUN), ledger)
        else:
            if not path.exists():
                key.unlink(missing_ok=True)
            source = NoiseSource.kept(key, RUN, create=not path.exists())
        facts = self._facts(commitment=source.commitment)
        return PrivateMean(self.plan, source, PrivacyLedger(path, facts, self.plan.compose))

    def _facts(self, **more: Any) -> dict[str, Any]:
        """Return what the ledger's first line says."""
        return {
            "unit": "client",
            "delta": self.plan.delta,
            "target_epsilon": self.plan.target_epsilon,
            "clip": self.plan.clip,
            "members": self.plan.members,
            "neighbours": self.plan.neighbours,
            "seeded": self._experiment.privacy.seeded,
            **more,
            **self.plan.facts,
        }

    def promise(self, private: AccountedMean | None = None, numbers: int = 0) -> dict[str, Any]:
        """Return the record of ``run.json`` and ``summary.json``.

        Args:
            private: What took the means of a run that is over (default: what is planned).
            numbers: d, how many numbers a client sends.

        Raises:
            SettingsError: Clients are to add noise that does not fit a sum's numbers.
        """
        plan = self.plan
        plan.require_room(numbers)
        once, _ = plan.noise_of_rounds
        spent = private.spent() if private is not None else plan.promised
        record: dict[str, Any] = {
            "unit": "client",
            "epsilon": spent.epsilon if math.isfinite(spent.epsilon) else None,
            "delta": plan.delta,
            "noise_multiplier": plan.noise_multiplier,
            "clip": private.clip if private is not None else plan.clip,
            "sampling": plan.sampling,
            "amplification": self._experiment.privacy.amplification,
            "steps": len(private.ledger.entries) if private is not None else plan.rounds,
            "accountant": spent.accountant,
            "neighbours": plan.neighbours,
            "seeded": self._experiment.privacy.seeded,
            "drawn": plan.rate,
            "target_epsilon": plan.target_epsilon,
            "clip_quantile": plan.quantile,
            "mechanism": plan.mechanism,
            **plan.facts,
            "noise_to_signal": once * plan.noise_multiplier * math.sqrt(numbers) / plan.expected,
            "not_covered": _not_covered(self._experiment),
        }
        if private is not None and plan.correlation is not None:
            rounds = (entry["round"] for entry in private.ledger.entries)
            record["sensitivity"] = plan.correlation.total(rounds)
        return {**record, "sentences": sentences(record)}


def added_noise(experiment: Experiment) -> AddedNoise | None:
    """Return what each client adds by an experiment, ``None`` where it adds nothing.

    Raises:
        SettingsError: The budget cannot be met, or a package is missing.
    """
    return RunPrivacy(experiment).plan.added_noise if experiment.privacy.distributes else None


def restore(private: AccountedMean, saved: Mapping[str, Any]) -> None:
    """Go on from the records of a checkpoint.

    Raises:
        PrivacyError: They hold nothing of it, or more than the ledger.
    """
    if "privacy" not in saved:
        raise PrivacyError(
            "the checkpoint was made without client-level privacy: what its rounds released had no "
            "noise; start a new run"
        )
    private.restore(saved["privacy"])


def key_file(folder: RunFolder) -> Path:
    """Return where the key of a run's noise is kept: beside its folder."""
    path = folder.path.resolve()
    return path.parent / f".{path.name}.noise-key"


def noise_warning(record: dict[str, Any]) -> str | None:
    """Return that noise drowns the signal, if it is longer than the longest mean change can be."""
    ratio = record["noise_to_signal"]
    if ratio <= 1:
        return None
    return (
        f"the noise on each round's mean is {ratio:.3g} times as long as the longest mean change can be: "
        "fewer trained numbers, more clients a round or a larger epsilon make it shorter"
    )


def _members(experiment: Experiment) -> int:
    """Return N, the clients that can be drawn."""
    return experiment.federation.clients - len(set(experiment.clients.newcomers))


def _not_covered(experiment: Experiment) -> list[str]:
    """Return what client-level privacy of the model says nothing of."""
    coordinator = "the coordinator, which sees each client's update before it is clipped and noised"
    if experiment.privacy.distributes:
        coordinator = (
            f"anything from more than {experiment.privacy.colluding} clients that tell the coordinator "
            "their noise, or from a coordinator that deviates from the protocol with clients that help it"
        )
    beside = (
        "the run folder beside the model (who took part, rows and costs of each client, audit log)"
    )
    if experiment.privacy.amplification:
        beside = (
            "whoever learns who was drawn: by the server's own folder (.private), by its traffic or its "
            "machine, by how long rounds take, or the client itself, which knows when it is asked"
        )
    found = [
        coordinator,
        beside,
        "a person with rows at several clients (their epsilons add up)",
        "other runs on the same rows",
    ]
    keeps = METHODS[experiment.method.name][1].declares.keeps
    if keeps != "nothing":
        found.append(
            f"what each client keeps ({keeps}), which a simulation saves in its run folder"
        )
    if experiment.judges_clients:
        found.append("held-out metrics of each client on its own rows (evaluation.per_client)")
    return found
