"""Take a trained model out of a run folder, for those who use it elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedloom.assembly import load_saved
from fedloom.division import divide
from fedloom.errors import OutputError
from fedloom.experiment import Experiment
from fedloom.models.export import export_causal, export_reward
from fedloom.objectives import OBJECTIVES
from fedloom.report import run_folder as names
from fedloom.report.run_folder import RunFolder


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: Where.
        own_code: Whether loading it needs ``trust_remote_code=True``.
        reward: Whether it is a reward model.
        classification: Whether it is a classifier.
    """

    folder: Path
    own_code: bool
    reward: bool
    classification: bool

    @property
    def loading(self) -> str:
        """The line of Python that loads it."""
        task = "SequenceClassification" if self.reward or self.classification else "CausalLM"
        trust = ", trust_remote_code=True" if self.own_code else ""
        return f'AutoModelFor{task}.from_pretrained("{self.folder}"{trust})'


def export(
    run: Path, client: int | None = None, target: Path | None = None, *, reward: bool = False
) -> Exported:
    """Write the global model of a run, or a client's own, as a folder that ``transformers`` loads.

    Args:
        run: A run folder.
        client: Whose model (default: the global one).
        target: Where to (default: in the run folder).
        reward: Write the explicit reward head as a model that scores texts instead.

    Raises:
        OutputError: It is no run folder, has no such model, or the target is not empty.
        ModelError: The model cannot be had, or has no such head.
    """
    folder = RunFolder.existing(run)
    adapter = _adapter_of(folder, client)
    whose = "global" if client is None else f"client-{client:04d}"
    target = target or folder.path / "exported" / (f"{whose}-reward" if reward else whose)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"{target} is not empty; give another folder with --to")
    experiment = Experiment.from_toml(folder.path / names.EXPERIMENT)
    classification = OBJECTIVES[experiment.objective.name][1].head == "classification"
    classes = divide(experiment).classes if classification else ()
    encoder, model = load_saved(experiment, classes, adapter)
    tokenizer = encoder.tokenizer
    try:
        if reward:
            export_reward(model, tokenizer, target)
            return Exported(target, True, True, False)
        own_code = export_causal(model, tokenizer, target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    return Exported(target, own_code, False, classification)


def _adapter_of(folder: RunFolder, client: int | None) -> Path:
    path = folder.adapter if client is None else folder.client(client)
    if path.is_dir():
        return path
    there = sorted(p.name for p in (folder.path / "clients").glob("*") if p.is_dir())
    clients = f"; it has models of clients {', '.join(str(int(n)) for n in there)}" if there else ""
    missing = "no global adapter" if client is None else f"no model of client {client}'s own"
    raise OutputError(f"{folder.path} has {missing}{clients}")
