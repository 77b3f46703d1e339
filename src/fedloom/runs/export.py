"""Export a trained model from a run folder."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedloom.errors import ModelError, OutputError
from fedloom.experiment.experiment import Experiment
from fedloom.models.export import export_causal, export_reward
from fedloom.models.gguf_export import OutType, require_convertible, write_gguf
from fedloom.models.model_card import Facts, base_facts, describe
from fedloom.models.saved import FACTS
from fedloom.objectives import OBJECTIVES
from fedloom.runs.model_building import client_base, model_folder, of_server
from fedloom.runs.model_cards import (
    UNKNOWN_PROMPT,
    evaluation_facts,
    facts_of,
    public_sources,
)
from fedloom.runs.partitioning import partition_data
from fedloom.runs.records import verified_sentence
from fedloom.runs.saved_models import load_saved
from fedloom.runs.verification import ExportCheck
from fedloom.storage import run_folder as names
from fedloom.storage.run_folder import RunFolder

Format = Literal["merged", "adapter", "gguf"]
"""A whole model for transformers; the adapter as it was saved, for PEFT; a whole model for llama.cpp."""


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where.
        own_code: Whether loading it needs ``trust_remote_code=True``.
        reward: Whether it is a reward model.
        classification: Whether it is a classifier.
        verified: What came of comparing it with the model that was merged, in one line.
        format: As what it was written.
    """

    folder: Path
    own_code: bool
    reward: bool
    classification: bool
    verified: str = ""
    format: Format = "merged"

    @property
    def loading(self) -> str:
        """The line that loads it: of Python, or of a shell."""
        if self.format == "gguf":
            return f"llama-cli -m {next(self.folder.glob('*.gguf'))}"
        if self.format == "adapter":
            return f"as {self.folder / 'README.md'} says"
        task = "SequenceClassification" if self.reward or self.classification else "CausalLM"
        trust = ", trust_remote_code=True" if self.own_code else ""
        return f'AutoModelFor{task}.from_pretrained("{self.folder}"{trust})'


def export(
    run: Path,
    client: int | None = None,
    target: Path | None = None,
    *,
    reward: bool = False,
    format: Format = "merged",
    out_type: OutType = "f16",
    published: bool = False,
) -> Exported:
    """Write the global model of a run, or a client's own, as a folder.

    Args:
        run: A run folder.
        client: Whose model (default: the global one).
        target: Where to (default: in the run folder).
        reward: Write the explicit reward head as a model that scores texts instead.
        format: See :data:`Format`.
        out_type: Of the matrices of a GGUF file.
        published: Whether others will read it: it then names no folder of this machine and no data of
            the Hub, and a local base as ``./NAME``, which is no name of the Hub's.

    Raises:
        OutputError: It is not a run folder, has no such model, or the target is not empty.
        ModelError: The model cannot be had, has no such head, or cannot be written in this format.
        VerificationError: What was written, loaded again, is not the model that was merged.
    """
    adapter, target = places_of(run, client, target, reward=reward, format=format)
    folder = RunFolder(run)
    experiment = Experiment.from_toml(folder.path / names.EXPERIMENT)
    classification = OBJECTIVES[experiment.objective.name][1].head == "classification"
    classes = _classes(folder, experiment) if classification else ()
    facts = _facts(folder, adapter, experiment, client, classes, reward)
    if published:
        facts = _for_others(facts)
    try:
        target.parent.mkdir(exist_ok=True)
        if format == "adapter":
            shutil.copytree(adapter, target, dirs_exist_ok=True)
            describe(target, facts)
            return Exported(target, False, False, classification, format=format)
        if format == "merged":
            return _merged(experiment, adapter, target, facts, classes, reward=reward)
        if classes:
            raise ModelError(
                "GGUF is written of models that answer in words, and this is a classifier"
            )
        require_convertible(_base_path(experiment, client), experiment.model.revision)
        return _converted(experiment, adapter, target, facts, classes, out_type)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error


def _merged(
    experiment: Experiment,
    adapter: Path,
    target: Path,
    facts: Facts,
    classes: tuple[str, ...],
    *,
    reward: bool = False,
) -> Exported:
    """Write a whole model for transformers, and compare it with the one that was merged."""
    encoder, model = load_saved(experiment, classes, adapter)
    tokenizer = encoder.tokenizer
    check = ExportCheck(experiment, model, reward=reward) if experiment.output.verify else None
    if reward:
        export_reward(model, tokenizer, target)
        own_code = True
    else:
        own_code = export_causal(model, tokenizer, target)
    describe(target, {**facts, "own_code": own_code, "tokenizer_of_base": False})
    del model  # it is merged, and of no more use
    outcome: dict[str, Any] = {"left_out": "output.verify = false"}
    if check is not None:
        del check.model
        outcome = check.verify(target, sequence=reward or bool(classes))
    return Exported(target, own_code, reward, bool(classes), verified_sentence(outcome))


def _converted(
    experiment: Experiment,
    adapter: Path,
    target: Path,
    facts: Facts,
    classes: tuple[str, ...],
    out_type: OutType,
) -> Exported:
    """Write a whole model for llama.cpp, by way of one for transformers that is deleted again."""
    with tempfile.TemporaryDirectory(prefix=".merged-", dir=target.parent) as place:
        merged = _merged(experiment, adapter, Path(place) / "merged", facts, classes)
        if merged.own_code:
            raise ModelError(
                "a client's bottleneck adapter is part of no architecture that llama.cpp knows: export "
                "it with --format merged"
            )
        target.mkdir(exist_ok=True)
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", experiment.name).strip("-.") or "model"
        write_gguf(merged.folder, target / f"{stem}-{out_type}.gguf", out_type, experiment.name)
    describe(target, {**facts, "own_code": False, "tokenizer_of_base": False})
    return Exported(target, False, False, bool(classes), merged.verified, "gguf")


def _classes(folder: RunFolder, experiment: Experiment) -> tuple[str, ...]:
    """Return the classes of a run as it recorded them; its rows may be gone by now."""
    recorded = (folder.read_record(names.RUN) or {}).get("classes")
    return tuple(recorded) if recorded else partition_data(experiment).classes


def _facts(
    folder: RunFolder,
    adapter: Path,
    experiment: Experiment,
    client: int | None,
    classes: tuple[str, ...],
    reward: bool,
) -> Facts:
    """Return the facts of an export: those of the adapter, or what a run from before has of them."""
    known = RunFolder(adapter).read_record(FACTS)
    if known is None:
        path = _base_path(experiment, client)
        base = base_facts(path, experiment.model.revision)
        known = facts_of(experiment, client, base, UNKNOWN_PROMPT, classes)
        test = (folder.read_record(names.RUN) or {}).get("data", {}).get("global_held_out", 0)
        known["evaluation"] = evaluation_facts(client, folder.read_record(names.SUMMARY), test)
    task = "reward" if reward else known["task"]
    return {**known, "task": task}


def _for_others(facts: Facts) -> Facts:
    """Return facts without paths of this machine, and without sets of data that may be private."""
    base, data = facts["base"], facts.get("data")
    if not base["hub"]:
        facts = {**facts, "base": {**base, "path": f"./{base['name']}"}}
    if data:  # those of a run from before may have names of the Hub
        facts = {**facts, "data": {**data, "sources": public_sources(data["sources"])}}
    return facts


def _base_path(experiment: Experiment, client: int | None) -> str:
    """Return folder or Hub name of the base model of a client, or of the global model."""
    own = of_server(experiment).model.path if client is None else client_base(experiment, client)
    return model_folder(own)


def places_of(
    run: Path,
    client: int | None,
    target: Path | None,
    *,
    reward: bool,
    format: Format = "merged",
) -> tuple[Path, Path]:
    """Return the adapter that is meant, and the folder that the model goes to; see :func:`export`.

    Raises:
        OutputError: It is not a run folder, has no such model, or the target is not empty.
    """
    folder = RunFolder.existing(run)
    adapter = adapter_of(folder, client)
    if reward and format != "merged":
        raise OutputError(
            f"--format {format} is not for --reward, which is a whole model: leave one out"
        )
    whose = "global" if client is None else f"client-{client:04d}"
    kind = "reward" if reward else format
    name = whose if kind == "merged" else f"{whose}-{kind}"
    target = target or folder.path / "exported" / name
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} is not empty; give another folder with --to, in Python to=")
    return adapter, target


def adapter_of(folder: RunFolder, client: int | None) -> Path:
    """Return where a run's global adapter is, or a client's own model.

    Raises:
        OutputError: There is none.
    """
    path = folder.adapter if client is None else folder.client(client)
    if path.is_dir():
        return path
    there = sorted(p.name for p in (folder.path / "clients").glob("*") if p.is_dir())
    clients = f"; it has models of clients {', '.join(str(int(n)) for n in there)}" if there else ""
    missing = "no global adapter" if client is None else f"no model of client {client}'s own"
    raise OutputError(f"{folder.path} has {missing}{clients}")
