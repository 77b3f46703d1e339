"""The start of a run: an earlier run's adapters, a PEFT folder, or an adapter from the Hub.

The settings of the adapter are the folder's; settings in the experiment must be equal. A copy of it is in
the run folder (``start/``), so that a run that is resumed depends on nothing else.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fedloom.aggregation.lora import factor_pairs, rank_of, resized
from fedloom.errors import CheckpointError, ModelError, OutputError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.methods import METHODS
from fedloom.models.adapters import AdapterModel, AdapterSettings
from fedloom.models.heads import is_own
from fedloom.models.load import fingerprint
from fedloom.models.saved_adapter import (
    FILES,
    fitted,
    holds_adapter,
    hub_folder,
    read_adapter,
    read_part,
    read_tensors,
)
from fedloom.settings.schema import parse
from fedloom.settings.toml import read_toml
from fedloom.storage import run_folder as names
from fedloom.storage.run_folder import Record, RunFolder
from fedloom.tensors import Tensors

FOLDER = "start"
"""In a run folder: the copy."""

CLIENTS = "clients/"
"""Before the number of a client, in a run folder and in the copy."""

SAME = (
    *("kind", "rank", "alpha", "virtual_tokens", "experts", "top_k", "router"),
    *("use_dora", "use_rslora"),
)
"""Settings that an experiment may not say otherwise than the adapter: the rest are seen by its tensors,
or are how it is trained."""

SENT = re.compile(r"sha256:([0-9a-f]{64})(?:@([0-9a-f]{32}))?")
"""Sent to clients on other machines in place of a path: the SHA-256 of the tensors, and their run."""


@dataclass(frozen=True)
class Start:
    """The start of a run.

    Attributes:
        name: Its name in the experiment.
        shared: The global adapter: its folder, or its tensors where they were sent; ``None`` where every
            client has its own.
        clients: Folders of clients' own models.
        run: The run that it is of, if any.
        record: Content of ``run.json`` of that run.
    """

    name: str
    shared: Path | Tensors | None
    clients: Mapping[int, Path] = field(default_factory=dict)
    run: str | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self, model: AdapterModel, *, any_rank: bool = False) -> Tensors | None:
        """Return the shared adapter as tensors of ``model``, which is as its settings made it.

        Args:
            model: What is to be written.
            any_rank: Whether factors are cut, or filled up with zeros, to the model's rank.

        Raises:
            ModelError: It does not fit.
        """
        fit = _resized if any_rank else _as_they_are
        if self.shared is None:
            return None
        if isinstance(self.shared, Path):
            return read_tensors(read_adapter(self.shared, self.name), model, fit)
        fresh = model.read()
        return fitted(fit(self.shared, fresh), fresh, self.name)

    def part(self, model: AdapterModel) -> Tensors:
        """Return what of the shared adapter is in a part of its model.

        Raises:
            ModelError: It does not fit.
        """
        whole, fresh = self.shared, model.read()
        if isinstance(whole, Path):
            whole = read_part(read_adapter(whole, self.name), fresh)
        held = {name: tensor for name, tensor in (whole or {}).items() if name in fresh}
        return fitted(held, fresh, self.name)

    def own(self, client: int, model: AdapterModel) -> Tensors | None:
        """Return a client's own model of the earlier run, ``None`` where it had none.

        Raises:
            ModelError: It does not fit.
        """
        folder = self.clients.get(client)
        if folder is None:
            return None
        try:
            return read_tensors(read_adapter(folder, f"{self.name}, client {client}"), model)
        except ModelError as error:
            raise ModelError(
                f"{error} (the global adapter alone, {self.name}/adapter, leaves clients' own models out)"
            ) from error

    def digests(self) -> dict[str, str]:
        """Return a SHA-256 over all files that are read of each adapter, by where that is."""
        found = {}
        for place, folder in self._folders().items():
            whole = hashlib.sha256()
            for file in FILES:
                if (folder / file).is_file():
                    whole.update(f"{file}|{(folder / file).stat().st_size}|".encode())
                    with (folder / file).open("rb") as stream:
                        whole.update(hashlib.file_digest(stream, "sha256").digest())
            found[place] = whole.hexdigest()
        return found

    def kept_in(self, folder: RunFolder) -> Start:
        """Copy what is read of it into a run folder; return the copy.

        Raises:
            OutputError: It cannot be copied.
        """
        target = folder.path / FOLDER
        part = target.with_name(f".{FOLDER}.{os.getpid()}")
        try:
            for place, source in self._folders().items():
                (part / place).mkdir(parents=True)
                for file in FILES:
                    if (source / file).is_file():
                        shutil.copyfile(source / file, part / place / file)
            part.rename(target)
        except OSError as error:
            shutil.rmtree(part, ignore_errors=True)
            raise OutputError(
                f"cannot copy adapter.start = {self.name!r} to {target}: {error.strerror or error}; make "
                "room or choose another output.folder"
            ) from error
        return replace(_of_run(target, self.name), run=self.run, record=self.record)

    def _folders(self) -> dict[str, Path]:
        found = {f"{CLIENTS}{client:04d}": path for client, path in sorted(self.clients.items())}
        return found | ({"adapter": self.shared} if isinstance(self.shared, Path) else {})


def find_start(experiment: Experiment) -> Start | None:
    """Return the start of an experiment, or ``None``.

    Raises:
        ModelError: There is no such folder, it holds no adapter, or it cannot be had from the Hub.
    """
    name = experiment.adapter.start
    if name is None:
        return None
    path = Path(name).expanduser()
    if (path / names.EXPERIMENT).is_file():
        found = _of_run(path, name)
        record = RunFolder(path).read_record(names.RUN) or {}
        found = replace(found, run=record.get("id"), record=record)
        if found.shared is None and not found.clients:
            raise ModelError(
                f"adapter.start = {name!r}: this run has left no adapter yet; let it end (fedloom run "
                f"--resume {name}) or start from another"
            )
        return _suited(found, experiment)
    if path.is_dir():
        read_adapter(path, name)  # says what is missing
        return Start(name, path)
    folder = hub_folder(name)
    if folder is None:
        raise ModelError(
            f"adapter.start = {name!r} is not a folder: give a run folder, a PEFT folder (with "
            "adapter_config.json), or a Hub name as OWNER/NAME"
        )
    return Start(name, folder)


def kept_start(experiment: Experiment, folder: RunFolder, run: Record | None) -> Start | None:
    """Return the copy that a run which is resumed started from; it is made where the run had not begun.

    Args:
        experiment: Names what it starts from.
        folder: The run's.
        run: What ``run.json`` holds, ``None`` where there is none.

    Raises:
        CheckpointError: The copy is gone, or is not what the run started from.
        ModelError: See :func:`find_start`.
    """
    name = experiment.adapter.start
    if name is None:
        return None
    known = (run or {}).get("start")
    copy = folder.path / FOLDER
    if known is None:
        shutil.rmtree(copy, ignore_errors=True)  # of a run that was killed before it began
        found = find_start(experiment)
        return None if found is None else found.kept_in(folder)
    start = replace(_of_run(copy, name), run=known.get("run"))
    digests = start.digests()
    for place in sorted(known["sha256"].keys() | digests.keys()):
        wanted, now = known["sha256"].get(place), digests.get(place)
        if now is None and place.startswith(CLIENTS):
            continue  # what a client had of its own was forgotten: it starts as all do
        if now != wanted:
            raise CheckpointError(
                f"{copy / place}, which this run started from, {'has changed' if now else 'is gone'} "
                f"(SHA-256 {_short(wanted)}, now {_short(now)}); start a new run"
            )
    return start


def with_adapter_settings(experiment: Experiment, start: Start | None) -> Experiment:
    """Return an experiment with the settings of the adapter that it starts from.

    Raises:
        ModelError: The folder cannot be read.
        SettingsError: The experiment says otherwise, or its method cannot start from this adapter.
    """
    if start is None:
        return experiment
    folder = start.shared if isinstance(start.shared, Path) else min(start.clients.items())[1]
    theirs = dict(read_adapter(folder, start.name).settings)
    theirs |= _of_experiment(folder, theirs)
    asked, problems = experiment.adapter, []
    for key in SAME:
        mine = getattr(asked, key)
        if key in theirs and key in asked.model_fields_set and mine != theirs[key]:
            problems.append(
                f"adapter.start = {start.name!r} has {key} = {theirs[key]!r} and adapter.{key} is "
                f"{mine!r}: set adapter.{key} = {_toml(theirs[key])}, or leave it out to take its own"
            )
    if problems:
        raise SettingsError(problems)
    taken = {key: value for key, value in theirs.items() if key not in asked.model_fields_set}
    return replace(experiment, adapter=asked.model_copy(update=taken))


def check_base(experiment: Experiment, start: Start, path: str) -> str | None:
    """Check that an adapter is of this base model; return a doubt where that cannot be known.

    Args:
        experiment: Names the model.
        start: What it starts from.
        path: Where the model is.

    Raises:
        ModelError: It is of another.
    """
    model = experiment.model.path
    known = start.record.get("model")
    if isinstance(known, dict):
        made_for, digest = known.get("name"), known.get("sha256")
        if digest == fingerprint(path):
            return None
        comparable = Path(path).is_dir() == Path(str(made_for)).is_dir()
    else:
        folder = start.shared
        if not isinstance(folder, Path) or start.record:
            return None
        made_for = read_adapter(folder, start.name).base
        if made_for is None or made_for in (path, model):
            return None
        here, there = Path(path).is_dir(), Path(made_for).is_dir()
        if here and there and fingerprint(path) == fingerprint(made_for):
            return None
        comparable = (here and there) or not (here or there or made_for.startswith(("/", ".", "~")))
    said = f"adapter.start = {start.name!r} was made for the model {made_for!r}, model.path is {model!r}"
    if comparable:
        raise ModelError(
            f"{said}, which is another: set model.path to that one, or start from an adapter that was "
            "made for this one"
        )
    return f"{said}: it is right only if both are the same weights"


def travels(experiment: Experiment) -> bool:
    """Return whether clients are sent what a run starts from: halves of a model travel in each round."""
    return (
        experiment.adapter.start is not None and METHODS[experiment.method.name][1].whole_at_clients
    )


def sent(start: Start | None, initial: Tensors) -> Tensors:
    """Return the tensors of the start that every client is sent, given the initial adapter.

    Personal parts are not sent: they are at their client.
    """
    if start is None or start.shared is None:
        return {}
    return {name: tensor for name, tensor in initial.items() if not is_own(name)}


def told(experiment: Experiment, start: Start | None, tensors: Tensors) -> Experiment:
    """Return an experiment as sent to clients: the start by its SHA-256, without a path."""
    if start is None:
        return experiment
    name = None
    if travels(experiment):
        run = f"@{start.run}" if start.run is not None else ""
        name = f"sha256:{digest_of_tensors(tensors)}{run}"
    objective = experiment.objective
    if name is None and getattr(objective, "reference", None) is not None:
        objective = objective.model_copy(update={"reference": None})
    adapter = experiment.adapter.model_copy(update={"start": name})
    return replace(experiment, adapter=adapter, objective=objective)


def digest_of_tensors(tensors: Tensors) -> str:
    """Return a SHA-256 over tensors with their names, shapes and dtypes."""
    whole = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        whole.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        whole.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def own_models(experiment: Experiment) -> bool:
    """Return whether a client starts from its own model of an earlier run, where it has one."""
    method = METHODS[experiment.method.name][1]
    return bool(method.personal or method.own_models)


def _suited(start: Start, experiment: Experiment) -> Start:
    """Return what of a run the experiment's method uses.

    Raises:
        ModelError: The run has no global adapter and the method needs one.
    """
    method = METHODS[experiment.method.name][1]
    if not own_models(experiment):
        start = replace(start, clients={})
    clients = range(experiment.federation.clients)
    start = replace(start, clients={c: p for c, p in start.clients.items() if c in clients})
    if start.shared is None and not (method.own_models and len(start.clients) == len(clients)):
        raise ModelError(
            f"adapter.start = {start.name!r} has no global adapter, its method leaves each client its "
            f"own: name one of them, such as {start.name}/clients/0000, or take a method with models of "
            "clients' own, for as many clients"
        )
    return start


def _of_run(path: Path, name: str) -> Start:
    """Return what a run folder, or a copy of what one started from, holds."""
    shared = path / "adapter"
    found = {
        int(own.name): own
        for own in sorted((path / "clients").glob("[0-9][0-9][0-9][0-9]*"))
        if own.name.isdecimal() and holds_adapter(own)
    }
    return Start(name, shared if holds_adapter(shared) else None, found)


def _of_experiment(folder: Path, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the run that a folder is of named the layers, where its adapter is of the same kind."""
    for place in (folder.parent, folder.parent.parent):
        file = place / names.EXPERIMENT
        if not file.is_file():
            continue
        try:
            table = read_toml(file).get("adapter", {})
            table = {k: v for k, v in table.items() if k in AdapterSettings.model_fields}
        except (SettingsError, AttributeError):
            return {}
        settings, _ = parse(AdapterSettings, table, "adapter")
        if settings is None or settings.kind != theirs["kind"]:
            return {}  # what moved the frozen weights is saved as whole layers
        return {name: getattr(settings, name) for name in ("targets", "layers")}
    return {}


def _as_they_are(held: Tensors, fresh: Tensors) -> Tensors:
    return held


def _resized(held: Tensors, fresh: Tensors) -> Tensors:
    adapter = {name: tensor for name, tensor in fresh.items() if not is_own(name)}
    pairs = factor_pairs(adapter)
    return resized(held, rank_of(adapter)) if pairs and pairs == factor_pairs(held) else held


def _short(digest: str | None) -> str:
    return digest[:12] if digest else "none"


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
