"""Evaluation with judges: adapters answer a benchmark and judges score the answers.

It writes a folder with answers, verdicts and a summary, from which the page is made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field

from fedloom.data.builtin import pretraining_texts
from fedloom.data.templates import Template
from fedloom.errors import ModelError, OutputError, SettingsError
from fedloom.evaluation.generate import Ask, generate, load_encoder
from fedloom.evaluation.judge_statistics import agreement, model_scores
from fedloom.evaluation.judges.base import Judge
from fedloom.evaluation.judges.choose import JUDGES
from fedloom.evaluation.judges.validation import AuditResult, audit, read_audit_sets
from fedloom.evaluation.questions import Benchmark
from fedloom.evaluation.verdicts import (
    JudgingSettings,
    Outcome,
    ask_judge,
    judge_record,
    suspicious_answers,
)
from fedloom.models.adapters import load_adapter
from fedloom.models.consistency import require_tokens
from fedloom.models.device import choose_device
from fedloom.models.load import TINY, ModelSettings, fingerprint, load_backbone
from fedloom.models.quantize import Quantization
from fedloom.models.tiny import tiny_model
from fedloom.randomness import derive_seed, generator
from fedloom.runs.adapter_paths import Form, adapter_folder, named_form, trained_form
from fedloom.runs.model_building import TINY_TEXTS
from fedloom.settings.schema import Settings, parse
from fedloom.settings.suggestions import nearest
from fedloom.settings.toml import override
from fedloom.storage import run_folder as names
from fedloom.storage.cache import cache_folder
from fedloom.storage.run_folder import RunFolder

BASE = "base"
"""Stands for the base model itself among the adapters."""


class GenerationSettings(Settings):
    """``generation``: settings of the models' answers."""

    template: Template | None = None
    """What is put around a question: "alpaca" (2502.14187), the model's own "chat" template, or
    "plain" (default: what the run asked with that the adapter is from; "alpaca" where there is none)."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Length of an answer (default: the benchmark's: 1024, Vicuna 2048, a file 512)."""
    temperature: float | None = Field(default=None, ge=0)
    """For all questions (default: the benchmark's, by category)."""
    batch_size: int = Field(default=16, ge=1)
    """Questions that are answered at once."""
    seed: int = Field(default=0, ge=0)
    """Every question draws from it and its own id."""
    device: str = "auto"
    """Of the models that answer."""


@dataclass(frozen=True)
class EvaluateSettings:
    """Everything ``--set`` can change in an evaluation with judges.

    Attributes:
        model: Which base model, where the adapters do not say.
        generation: How it answers.
        judging: How answers are judged.
    """

    model: ModelSettings
    generation: GenerationSettings
    judging: JudgingSettings

    @classmethod
    def read(cls, assignments: Iterable[str]) -> EvaluateSettings:
        """Return the defaults with ``section.key=value`` assignments applied.

        Raises:
            SettingsError: With every mistake.
        """
        table = override({}, assignments)
        sections: dict[str, type[Settings]] = {
            "model": ModelSettings,
            "generation": GenerationSettings,
            "judging": JudgingSettings,
        }
        problems = [
            f"[{s}]: unknown section; {nearest(s, sections)}" for s in table.keys() - sections
        ]
        parts: dict[str, Any] = {}
        for name, settings_class in sections.items():
            parts[name], complaints = parse(settings_class, table.get(name, {}), name)
            problems += complaints
        if problems:
            raise SettingsError(problems, "the command")
        return cls(**parts)


class Progress(Protocol):
    """Observer of an evaluation."""

    def begin(self, text: str, total: int) -> Callable[[int], None]:
        """Start work of ``total`` parts; return a function that is called with the parts done."""
        ...


@dataclass(frozen=True)
class Candidate:
    """A model whose answers are judged.

    Attributes:
        label: Its name in tables.
        adapter: Its PEFT folder, ``None`` for the base model.
        model: Folder or Hub name of the base model.
        form: Form of its prompts in training, where known.
    """

    label: str
    adapter: Path | None
    model: str
    form: Form | None = None


def _begin(progress: Progress | None, text: str, total: int) -> Callable[[int], None]:
    return progress.begin(text, total) if progress is not None else lambda count: None


def find_candidates(
    given: Sequence[Path],
    settings: ModelSettings,
    assigned: bool,
    *,
    asked_as_trained: bool = False,
) -> list[Candidate]:
    """Return the candidates of the paths on the command line, each once.

    Args:
        given: PEFT folders, run folders with an ``adapter`` in them, or ``base``.
        settings: The base model, where it is ``assigned``.
        assigned: Whether the user named the base model.
        asked_as_trained: Whether to look up in which form its run asked each adapter.

    Raises:
        ModelError: A path is none of these, or the base model cannot be told.
    """
    found: list[Candidate] = []
    for path in dict.fromkeys(given):
        if str(path) != BASE:
            folder = adapter_folder(path)
            if any(own.adapter and own.adapter.resolve() == folder.resolve() for own in found):
                continue
            model = settings.path if assigned else _base_of(folder)
            label = path.resolve().parent.name if path.name == "adapter" else path.resolve().name
            form = trained_form(folder) if asked_as_trained else None
            found.append(Candidate(_free(label, found), folder, model, form))
    if any(str(path) == BASE for path in given):
        model = settings.path if assigned or not found else found[0].model
        form = found[0].form if found else None  # asked as the first of those it is compared with
        found.insert(0, Candidate(BASE, None, model, form))
    if not found:
        raise ModelError('no model to evaluate: give adapter folders, run folders or "base"')
    return found


def evaluate_benchmark(
    candidates: Sequence[Candidate],
    benchmark: Benchmark,
    judges: Sequence[Judge],
    settings: EvaluateSettings,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Let every candidate answer and every judge score; return the folder of the results.

    Raises:
        ModelError: A model cannot be loaded.
        JudgeError: A judge cannot be used.
        OutputError: The folder is not empty, is locked by another process, or cannot be written.
    """
    for judge in judges:
        judge.check()
    digest = _digest(candidates, benchmark, settings)
    target = _folder(folder, benchmark.name, digest)
    with target.locked():
        answers = _kept_answers(target, digest)
        if answers is None:
            answers = _answers(candidates, benchmark, settings, progress)
            _write_answers(target, benchmark, answers, digest)
        outcomes: list[Outcome] = []
        for judge in judges:
            begin = partial(_begin, progress, f"{judge.name} judges")
            outcomes.append(ask_judge(judge, benchmark, answers, settings.judging, begin))
        lines = [json.dumps(record) for outcome in outcomes for record in outcome.records]
        target.write_text(names.JUDGEMENTS, "".join(f"{line}\n" for line in lines))
        target.write_json(
            names.EVALUATION,
            {
                "benchmark": benchmark.name,
                "questions": len(benchmark.questions),
                "bad_rows": list(benchmark.bad_rows),
                "models": [{"label": c.label, "model": c.model} for c in candidates],
                "generation": settings.generation.model_dump()
                | {
                    "max_new_tokens": _length(benchmark, settings.generation),
                    "template": _forms_in_words(candidates, settings.generation),
                },
                "judging": settings.judging.model_dump(),
                "answers": _answer_records(answers),
                "judges": [
                    judge_record(o, list(answers), benchmark, settings.judging) for o in outcomes
                ],
                "agreement": agreement(
                    [model_scores(o.ratings) for o in outcomes if o.judge.compares]
                ),
                "plugins": {
                    judge.name: own.to_record()
                    for judge in judges
                    if (own := JUDGES.of_class(type(judge))) is not None
                },
                "suspicious": suspicious_answers(benchmark, answers, outcomes),
            },
        )
    return target.path


def _answers(
    candidates: Sequence[Candidate],
    benchmark: Benchmark,
    settings: EvaluateSettings,
    progress: Progress | None,
) -> dict[str, list[str]]:
    found = {}
    for candidate in candidates:
        advance = _begin(progress, f"{candidate.label} answers", len(benchmark.questions))
        found[candidate.label] = answer(
            candidate, benchmark, settings.generation, settings.model.quantization, advance
        )
    return found


def answer(
    candidate: Candidate,
    benchmark: Benchmark,
    settings: GenerationSettings,
    quantization: Quantization = "none",
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Return one answer to each question, seeded by the question's id."""
    path = model_path(candidate.model)
    encoder = load_encoder(path)
    model: torch.nn.Module = load_backbone(
        path,
        pad_token_id=encoder.tokenizer.pad_token_id,
        quantization=quantization,
        device=choose_device(settings.device),
    )
    require_tokens(model, encoder.tokenizer, path)
    if candidate.adapter is not None:
        model = load_adapter(model, candidate.adapter)
    model.eval()
    form = form_for(candidate, settings)
    asks = [
        Ask(
            tuple(encoder.prompt(form.wrap(question.text))),
            question.temperature if settings.temperature is None else settings.temperature,
            derive_seed(settings.seed, f"answer {question.id}"),
        )
        for question in benchmark.questions
    ]
    return generate(
        model, encoder, asks, _length(benchmark, settings), settings.batch_size, advance
    )


def form_for(candidate: Candidate, settings: GenerationSettings) -> Form:
    """Return how a model is asked: as set, as it was in training, or in Alpaca's form."""
    if settings.template is not None:
        return named_form(settings.template)
    return candidate.form or named_form("alpaca")


def _forms_in_words(candidates: Sequence[Candidate], settings: GenerationSettings) -> str:
    """Return the form of all models, or each model's where they differ."""
    forms = {candidate.label: form_for(candidate, settings).name for candidate in candidates}
    if len(set(forms.values())) == 1:
        return next(iter(forms.values()))
    return ", ".join(f"{form} ({label})" for label, form in forms.items())


def model_path(model: str) -> str:
    """Return a base model's folder or Hub name; the tiny model is made if it is not connected."""
    if model != TINY:
        return model
    return str(tiny_model(cache_folder(), pretraining_texts(generator(0, "tiny"), TINY_TEXTS)))


def audit_judges(
    path: Path,
    judges: Sequence[Judge],
    seed: int,
    limit: int | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Judge, list[AuditResult]]]:
    """Measure judges one by one on pairs that people have judged; see ``judges/validation.py``."""
    sets = read_audit_sets(path, limit)
    for judge in judges:
        begins = [partial(_begin, progress, f"{judge.name} judges {one.name}") for one in sets]
        yield (
            judge,
            [audit(judge, one, seed, begin) for one, begin in zip(sets, begins, strict=True)],
        )


def _answer_records(answers: Mapping[str, list[str]]) -> dict[str, dict[str, float]]:
    """Return, for each model, the mean length of its answers in words and how many are empty."""
    return {
        model: {
            "words": sum(len(text.split()) for text in own) / max(1, len(own)),
            "empty": sum(not text.strip() for text in own),
        }
        for model, own in answers.items()
    }


def _length(benchmark: Benchmark, settings: GenerationSettings) -> int:
    return settings.max_new_tokens or benchmark.max_new_tokens


def _write_answers(
    target: RunFolder, benchmark: Benchmark, answers: Mapping[str, list[str]], digest: str
) -> None:
    """Write the answers, and last what they are answers to: without it they are not used again."""
    records = (
        {
            "question": question.id,
            "category": question.category,
            "text": question.text,
            "answers": {model: own[place] for model, own in answers.items()},
        }
        for place, question in enumerate(benchmark.questions)
    )
    target.write_text(names.ANSWERS, "".join(f"{json.dumps(record)}\n" for record in records))
    target.write_json(names.ANSWERED, {"digest": digest})


def _kept_answers(target: RunFolder, digest: str) -> dict[str, list[str]] | None:
    """Return the answers of an evaluation that was stopped after them, or had other judges."""
    record = target.read_record(names.ANSWERED)
    if record is None or record.get("digest") != digest:
        return None
    lines = target.read_lines(names.ANSWERS)
    return {model: [line["answers"][model] for line in lines] for model in lines[0]["answers"]}


def _digest(
    candidates: Sequence[Candidate], benchmark: Benchmark, settings: EvaluateSettings
) -> str:
    """SHA-256 over everything that the answers depend on."""
    models = [
        (c.label, fingerprint(c.model), fingerprint(str(c.adapter)) if c.adapter else "")
        for c in candidates
    ]
    asked = [(q.id, q.text, q.temperature) for q in benchmark.questions]
    generation = settings.generation.model_dump(exclude={"batch_size"})
    generation["template"] = [form_for(c, settings.generation).name for c in candidates]
    parts = [models, asked, generation, benchmark.max_new_tokens, settings.model.quantization]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _folder(chosen: Path | None, name: str, digest: str) -> RunFolder:
    """Return a new folder, or one that holds these very answers.

    Raises:
        OutputError: The chosen one holds something else, or cannot be made.
    """
    path = chosen or Path("evaluations") / name
    number = 2
    while chosen is None and path.exists() and not _holds(path, digest):
        path, number = Path("evaluations") / f"{name}-{number}", number + 1
    if path.exists() and not _holds(path, digest):
        raise OutputError(f"{path} is not empty: choose another folder with --to")
    _make(path)
    return RunFolder(path)


def new_folder(chosen: Path | None, name: str, *, make: bool = True) -> RunFolder:
    """Return an empty folder, as chosen or a new one in ``evaluations``.

    Raises:
        OutputError: The chosen one holds something, or it cannot be made.
    """
    path, number = chosen or Path("evaluations") / name, 2
    while chosen is None and path.exists():
        path, number = Path("evaluations") / f"{name}-{number}", number + 1
    if path.exists() and not (path.is_dir() and _is_empty(path)):
        raise OutputError(f"{path} is not empty: choose another folder with --to")
    if make:
        _make(path)
    return RunFolder(path)


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {path}: {error.strerror}; choose another --to") from error


def _is_empty(path: Path) -> bool:
    """Return whether nothing is in a folder but what a process that writes there holds."""
    return all(own.name == names.LOCK for own in path.iterdir())


def _holds(path: Path, digest: str) -> bool:
    """Return whether a folder is empty or holds the answers with this digest."""
    if not path.is_dir():
        return False
    return _is_empty(path) or _kept_answers(RunFolder(path), digest) is not None


def _base_of(folder: Path) -> str:
    """Return the base model that a PEFT folder names."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} is not an adapter: it has no adapter_config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{folder}/adapter_config.json cannot be read: {error}") from None
    model = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(model, str) or not model:
        raise ModelError(f"{folder} does not name its base model; give --set model.path=FOLDER")
    return model


def _free(label: str, found: Sequence[Candidate]) -> str:
    taken, number, free = {candidate.label for candidate in found}, 2, label
    while free in taken or free == BASE:
        free, number = f"{label}-{number}", number + 1
    return free
