"""Facts for the model cards of a run's models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from fedloom.data.encode import TextEncoder
from fedloom.data.examples import Choice, Example, Feedback, Instruction, Labelled, Preference, Text
from fedloom.data.sources import BUILTIN_PREFIX
from fedloom.errors import DataError, OutputError
from fedloom.evaluation.generate import load_encoder
from fedloom.experiment.experiment import Experiment
from fedloom.models.adapters import AdapterModel
from fedloom.models.load import PLAIN_CHAT, START
from fedloom.models.model_card import Facts, base_facts, describe, versions
from fedloom.objectives.base import Objective
from fedloom.runs.assembly import RunComponents
from fedloom.runs.model_building import client_base, model_folder, of_server

QUESTION, ANSWER = "{question}", "{answer}"
"""Placeholders in a rendered example: no row's text is in a card."""


@dataclass
class ModelCards:
    """Writes the cards of one run's folders.

    Attributes:
        experiment: The run's settings.
        parts: What it was built of.
        objective: A user's own objective, if there is one.
    """

    experiment: Experiment
    parts: RunComponents
    objective: Objective | None = None
    _bases: dict[str, Facts] = field(default_factory=dict)
    _prompts: dict[str, Facts] = field(default_factory=dict)

    def write(
        self,
        folder: Path,
        model: AdapterModel,
        client: int | None = None,
        summary: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the card of a saved folder, and the facts it is made of, into it.

        Args:
            folder: What was saved.
            model: That it was saved from.
            client: Whose it is, if not everybody's.
            summary: Content of ``summary.json``, where it is known.

        Raises:
            OutputError: A file cannot be written.
        """
        own: Any = model.model
        config = own.config if self.parts.division.classes else None
        try:
            describe(folder, self.facts(client, summary), classifier=config)
        except OSError as error:
            raise OutputError(f"cannot write the card of {folder}: {error.strerror}") from error

    def facts(self, client: int | None, summary: Mapping[str, Any] | None) -> Facts:
        """Return the facts of the folder of a client, or of the global one."""
        parts = self.parts
        path = of_server(self.experiment).model.path
        if client is not None:
            path = client_base(self.experiment, client)
        found = facts_of(
            self.experiment, client, self._base(path), self._prompt(path), parts.division.classes
        )
        found["evaluation"] = evaluation_facts(client, summary, len(parts.division.test))
        if client is None and summary is not None and "privacy" in summary:
            found["privacy"] = summary["privacy"]["sentences"]
        if self.objective is not None:
            found["objective"] = type(self.objective).__name__
        return found

    def _base(self, path: str) -> Facts:
        if path not in self._bases:
            folder = model_folder(path)
            known = self.parts.model_digest if folder == self.parts.model_path else None
            self._bases[path] = base_facts(folder, self.experiment.model.revision, known)
        return self._bases[path]

    def _prompt(self, path: str) -> Facts:
        if path not in self._prompts:
            folder, encoder = model_folder(path), self.parts.encoder
            if folder != self.parts.model_path:
                encoder = load_encoder(
                    folder,
                    self.experiment.model.revision,
                    self.experiment.data,
                    compares=self.experiment.compares,
                )
            template = self.experiment.data.template
            self._prompts[path] = prompt_facts(encoder, _examples(self.parts), template)
        return self._prompts[path]


def facts_of(
    experiment: Experiment,
    client: int | None,
    base: Facts,
    prompt: Facts,
    classes: tuple[str, ...],
) -> Facts:
    """Return what a model card (``models/model_card.py``) says of a folder, without an evaluation.

    Args:
        experiment: Its settings.
        client: Whose folder, if not the global one.
        base: See ``base_facts``.
        prompt: See :func:`prompt_facts`.
        classes: Names of the classes in the order of their ids.
    """
    whole = experiment.adapter.kind == "submixture"  # trained in float32 whatever the precision
    precise = whole or experiment.training.precision != "bf16"
    return {
        "experiment": experiment.name,
        "client": client,
        "base": base,
        "objective": experiment.objective.name,
        "method": experiment.method.name,
        "adapter": experiment.adapter.kind,
        "rounds": experiment.federation.rounds,
        "clients": experiment.federation.clients,
        "precision": experiment.training.precision,
        "quantization": experiment.model.quantization,
        "dtype": "float32" if precise else "bfloat16",
        "task": "classification" if classes else "causal",
        "own_code": False,
        "tokenizer_of_base": True,
        "prompt": prompt,
        "classes": list(classes),
        "data": data_facts(experiment),
        "versions": versions(),
        "evaluation": None,
    }


def data_facts(experiment: Experiment) -> Facts:
    """Return what is told of the rows: their kind, built-in sets by name, and how they were divided.

    No other source is named: files, clients' own, and sets of the Hub, which may be private. How many
    rows there are is not said.
    """
    data = experiment.data
    sources = [source for part in data.parts.values() for source in part.sources]
    return {
        "kind": data.kind or data.builtin_kind,
        "sources": public_sources(sources),
        "partition": None if data.is_private else experiment.partition.kind,
    }


def public_sources(sources: Sequence[str]) -> list[str]:
    """Return sources if all of them are of the package, and none of them otherwise."""
    return list(sources) if all(own.startswith(BUILTIN_PREFIX) for own in sources) else []


UNKNOWN_PROMPT: Facts = {"format": "unknown", "example": "", "template": None}
"""Of rows that are elsewhere."""


def prompt_facts(encoder: TextEncoder, examples: Iterator[Example], template: str | None) -> Facts:
    """Return how prompts are written: ``format``, an ``example`` of placeholders, the ``template``.

    Args:
        encoder: How the model reads texts.
        examples: Rows, of which it is asked alone of what form they are.
        template: ``data.template``, of which prompts are made.
    """
    row = next(examples, None)
    if row is None:
        return UNKNOWN_PROMPT
    if isinstance(row, Labelled):
        return {"format": "text", "example": "{text}", "template": None}
    if all(_is_plain(own) for own in chain([row], examples)):
        return {"format": "plain", "example": (template or "{prompt}") + ANSWER, "template": None}
    try:
        text = encoder.prompt_text(({"role": "user", "content": QUESTION},))
    except DataError:  # a template that wants more than a question
        text = QUESTION
    own = encoder.tokenizer.chat_template
    given = own in (PLAIN_CHAT, PLAIN_CHAT.removeprefix(START))
    return {"format": "chat", "example": text + ANSWER, "template": own if given else None}


def _examples(parts: RunComponents) -> Iterator[Example]:
    """Yield the rows there are here, one of each client and of each set."""
    division = parts.division
    for rows in (division.test, *division.train.values(), division.public):
        yield from rows[:1]


def _is_plain(example: Example) -> bool:
    texts: list[Text] = []
    match example:
        case Preference(prompt=prompt, chosen=chosen, rejected=rejected):
            texts = [prompt, chosen, rejected]
        case Choice(prompt=prompt):
            texts = [prompt]
        case Instruction(prompt=prompt, completion=own) | Feedback(prompt=prompt, completion=own):
            texts = [prompt, own]
        case Labelled():
            pass
    return all(isinstance(text, str) or not text for text in texts)


def evaluation_facts(
    client: int | None, summary: Mapping[str, Any] | None, rows: int
) -> Facts | None:
    """Return what was measured of the global model, or of a client's own on its own rows."""
    if summary is None:
        return None
    metric = summary["metric"]
    if client is None:
        whole = summary["judged_on"] == "global"
        return {
            "metric": metric,
            "before": summary["before"],
            "after": summary["after"],
            "rows": f"{rows} held-out rows" if whole else "the clients' own held-out rows (mean)",
        }
    found = []
    for when in ("clients_before", "clients_after"):
        each = (summary[when] or {}).get("each", {})
        found.append(each.get(str(client), {}).get(metric))
    if found == [None, None]:
        return None
    rows_of = "the client's own held-out rows"
    return {"metric": metric, "before": found[0], "after": found[1], "rows": rows_of}
