"""Paths given to ``fedloom evaluate``: the adapter, its run, and the form of the run's prompts.

A run folder, the ``adapter`` in it, and ``clients/0003`` in it are all adapters of that run. A PEFT
folder elsewhere is an adapter without a run: on which rows it was trained, and in which form, is not
known of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedloom.data.examples import Text
from fedloom.data.templates import TEMPLATES, alpaca
from fedloom.errors import DataError, ModelError
from fedloom.experiment.experiment import Experiment
from fedloom.runs.partitioning import partition_data
from fedloom.runs.records import prompt_of
from fedloom.storage.run_folder import EXPERIMENT

CONFIG = "adapter_config.json"
ALPACA = str(alpaca("")).partition("\n")[0]
"""The sentence that prompts in Alpaca's form begin with."""

ASKED = 100
"""Training rows whose prompts are looked at."""


def adapter_folder(path: Path) -> Path:
    """Return the PEFT folder that a path stands for.

    Args:
        path: A PEFT folder, or the folder of a run that has a global adapter.

    Raises:
        ModelError: It is neither, or the run has none.
    """
    if path.is_file():
        what = "an experiment" if path.suffix == ".toml" else "a file"
        raise ModelError(
            f'{path} is {what}, not an adapter: give PEFT folders, run folders or "base" there'
        )
    if (path / CONFIG).is_file():
        return path
    if (path / "adapter" / CONFIG).is_file():
        return path / "adapter"
    if (path / EXPERIMENT).is_file():
        own = sorted((path / "clients").glob(f"*/{CONFIG}"))
        raise ModelError(
            f"{path} has no global adapter: "
            + (
                f"its clients have models of their own, such as {own[0].parent}"
                if own
                else f"its run has not ended; go on with fedloom run --resume {path}"
            )
        )
    raise ModelError(f"{path} is not an adapter: it has no {CONFIG}")


def run_of(path: Path) -> Path | None:
    """Return the folder of the run that an adapter is from, or ``None`` where it lies in none."""
    folder = Path(os.path.abspath(path))
    places = [folder]
    if folder.name == "adapter":
        places.append(folder.parent)
    if folder.parent.name == "clients":
        places.append(folder.parent.parent)
    return next((place for place in places if (place / EXPERIMENT).is_file()), None)


@dataclass(frozen=True)
class Form:
    """How a model is asked a question.

    Attributes:
        name: For the record: a template's name, or the template itself.
        wrap: Question to prompt.
    """

    name: str
    wrap: Callable[[str], Text]


def named_form(name: str) -> Form:
    """Return a template by its name."""
    return Form(name, TEMPLATES[name])


def trained_form(adapter: Path | None) -> Form | None:
    """Return the form in which an adapter's run asked in training, ``None`` where that is not known."""
    run = run_of(adapter) if adapter is not None else None
    if run is None:
        return None
    experiment = Experiment.from_toml(run / EXPERIMENT)
    template = experiment.data.template
    if template is not None and template.count("{") == 1:
        before, _, after = template.partition("{")
        ending = after.partition("}")[2]
        return Form(template, lambda question: f"{before}{question}{ending}")
    try:
        train = partition_data(experiment).loaded.train
    except DataError:  # its files are elsewhere
        return None
    return form_of([prompt_of(example) for example in train[:ASKED]])


def form_of(prompts: Sequence[Text]) -> Form | None:
    """Return the form that all prompts have: chat, Alpaca's, or plain; ``None`` where they have none.

    A plain prompt ends as those do: in a blank, a new line, or nothing of the kind.
    """
    if not any(prompts):
        return None
    if not all(isinstance(prompt, str) for prompt in prompts):
        return named_form("chat") if not any(isinstance(p, str) for p in prompts) else None
    texts = [str(prompt) for prompt in prompts]
    if all(text.startswith(ALPACA) for text in texts):
        return named_form("alpaca")
    (ending, *others) = {text[len(text.rstrip()) :] for text in texts}
    if others or not ending:
        return named_form("plain")
    return Form("plain", lambda question: question.rstrip() + ending)
