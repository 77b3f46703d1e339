"""Adapters answer a benchmark and judges score the answers: from folders to a folder.

The folder that is left (answers, every single verdict, and a summary) is what the page is made from.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field

from fedloom.assembly import TINY_TEXTS, cache_folder, choose_device
from fedloom.data.builtin import pretraining_texts
from fedloom.data.templates import TEMPLATES, Template
from fedloom.errors import JudgeError, ModelError, OutputError, SettingsError
from fedloom.evaluation.agreement import (
    Estimate,
    Rating,
    agreement,
    bootstrap,
    consistency,
    first_preference,
    length_preference,
    model_scores,
    orders,
    position_bias,
    tied_share,
)
from fedloom.evaluation.audit import AuditResult, audit, read_audit_sets
from fedloom.evaluation.generate import Ask, generate
from fedloom.evaluation.judges.base import Case, Judge, Verdict
from fedloom.evaluation.judges.endpoint import KEY, EndpointJudge, EndpointSettings
from fedloom.evaluation.judges.model import ModelJudge
from fedloom.evaluation.judges.prompts import talks_to_judge
from fedloom.evaluation.judges.rules import RULES
from fedloom.evaluation.questions import Benchmark, Question
from fedloom.models.load import (
    TINY,
    ModelSettings,
    fingerprint,
    load_backbone,
    load_tokenizer,
)
from fedloom.models.lora import load_lora
from fedloom.models.quantize import Quantization
from fedloom.models.tiny import tiny_model
from fedloom.randomness import derive_seed, generator
from fedloom.report import run_folder as names
from fedloom.report.run_folder import RunFolder
from fedloom.settings import Settings, nearest, override, parse

BASE = "base"
"""Stands for the base model itself among the adapters."""


CHUNK = 64
"""Cases given to a judge at once, so that progress can be shown."""


class GenerationSettings(Settings):
    """``generation``: how the models answer."""

    template: Template = "alpaca"
    """What is put around a question: "alpaca" (2502.14187), the model's own "chat" template, or
    "plain"."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Length of an answer (default: the benchmark's: 1024, Vicuna 2048, a file 512)."""
    temperature: float | None = Field(default=None, ge=0)
    """For all questions (default: the benchmark's, by category)."""
    batch_size: int = Field(default=16, ge=1)
    seed: int = Field(default=0, ge=0)
    """Every question draws from it and its own id."""
    device: str = "auto"


class JudgingSettings(EndpointSettings):
    """``judging``: how answers are shown to judges."""

    orders: int = Field(default=8, ge=1)
    """Orders in which more than three answers are shown, in whole rotations; of up to three, every
    order is."""
    one_by_one: bool = False
    """Whether judges see one answer at a time: no order to be biased by, and nothing to compare with."""
    seed: int = Field(default=0, ge=0)
    device: str = "auto"
    """Of a local judge."""


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
    """Who watches an evaluation."""

    def begin(self, text: str, total: int) -> Callable[[int], None]:
        """Some work of ``total`` parts begins; return what is to be called with the parts done."""
        ...


@dataclass(frozen=True)
class Candidate:
    """A model whose answers are judged.

    Attributes:
        label: What it is called in tables.
        adapter: Its PEFT folder, ``None`` for the base model.
        model: Folder or Hub name of the base model.
    """

    label: str
    adapter: Path | None
    model: str


def _begin(progress: Progress | None, text: str, total: int) -> Callable[[int], None]:
    return progress.begin(text, total) if progress is not None else lambda count: None


def find_candidates(
    given: Sequence[Path], settings: ModelSettings, assigned: bool
) -> list[Candidate]:
    """Return what the paths on the command line stand for.

    Args:
        given: PEFT folders, run folders with an ``adapter`` in them, or ``base``.
        settings: The base model, where it is ``assigned``.
        assigned: Whether the user named the base model.

    Raises:
        ModelError: A path is none of these, or the base model cannot be told.
    """
    found: list[Candidate] = []
    for path in given:
        if str(path) != BASE:
            folder = path / "adapter" if (path / "adapter").is_dir() else path
            model = settings.path if assigned else _base_of(folder)
            label = path.resolve().parent.name if path.name == "adapter" else path.resolve().name
            found.append(Candidate(_free(label, found), folder, model))
    if any(str(path) == BASE for path in given):
        model = settings.path if assigned or not found else found[0].model
        found.insert(0, Candidate(BASE, None, model))
    if not found:
        raise ModelError('no model to evaluate: give adapter folders, run folders or "base"')
    return found


def make_judges(chosen: Sequence[str], settings: JudgingSettings) -> list[Judge]:
    """Return judges by name: a rule, a model's folder, or the address of an endpoint.

    Raises:
        JudgeError: A name is none of these.
        ModelError: A folder holds no model.
    """
    judges: list[Judge] = []
    for name in chosen:
        if name in RULES:
            judges.append(RULES[name])
        elif name.startswith(("http://", "https://")):
            cache = cache_folder() / "judge"
            judges.append(EndpointJudge(name, settings, os.environ.get(KEY), cache))
        elif Path(name).is_dir():
            judges.append(
                ModelJudge(
                    name,
                    temperature=settings.temperature,
                    reparse=settings.reparse,
                    device=choose_device(settings.device),
                )
            )
        else:
            raise JudgeError(
                f"no judge {name!r}: give {', '.join(RULES)}, a model's folder, or an http address"
            )
    return judges


def evaluate_benchmark(
    candidates: Sequence[Candidate],
    benchmark: Benchmark,
    judges: Sequence[Judge],
    settings: EvaluateSettings,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Let every candidate answer and every judge score; return the folder with all of it.

    Raises:
        ModelError: A model cannot be loaded.
        JudgeError: A judge cannot work at all.
        OutputError: The folder holds something already, or cannot be written.
    """
    for judge in judges:
        judge.check()
    digest = _digest(candidates, benchmark, settings)
    target = _folder(folder, benchmark.name, digest)
    answers = _kept_answers(target, digest)
    if answers is None:
        answers = _answers(candidates, benchmark, settings, progress)
        _write_answers(target, benchmark, answers, digest)
    outcomes = [_judge(judge, benchmark, answers, settings.judging, progress) for judge in judges]
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
            | {"max_new_tokens": _length(benchmark, settings.generation)},
            "judging": settings.judging.model_dump(),
            "answers": _answer_records(answers),
            "judges": [
                _judge_record(o, list(answers), benchmark, settings.judging) for o in outcomes
            ],
            "agreement": agreement([model_scores(o.ratings) for o in outcomes if o.judge.compares]),
            "suspicious": _suspicious(benchmark, answers, outcomes),
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
    tokenizer = load_tokenizer(path)
    model: torch.nn.Module = load_backbone(
        path,
        pad_token_id=tokenizer.pad_token_id,
        quantization=quantization,
        device=choose_device(settings.device),
    )
    if candidate.adapter is not None:
        model = load_lora(model, candidate.adapter)
    model.eval()
    template = TEMPLATES[settings.template]
    asks = [
        Ask(
            template(question.text, tokenizer),
            question.temperature if settings.temperature is None else settings.temperature,
            derive_seed(settings.seed, f"answer {question.id}"),
        )
        for question in benchmark.questions
    ]
    return generate(
        model, tokenizer, asks, _length(benchmark, settings), settings.batch_size, advance
    )


def model_path(model: str) -> str:
    """Return a base model's folder or Hub name; the tiny model is made if it is not there."""
    if model != TINY:
        return model
    return str(tiny_model(cache_folder(), pretraining_texts(generator(0, "tiny"), TINY_TEXTS)))


def audit_judges(
    path: Path, judges: Sequence[Judge], seed: int, limit: int | None = None
) -> Iterator[tuple[Judge, list[AuditResult]]]:
    """Measure judges one by one on pairs that people have judged; see ``evaluation/audit.py``."""
    sets = read_audit_sets(path, limit)
    for judge in judges:
        yield judge, [audit(judge, one, seed) for one in sets]


def default_judges(benchmark: Benchmark) -> list[str]:
    """Return the judges that need nothing: refusals for AdvBench, references where there are some.

    Raises:
        JudgeError: The benchmark has neither.
    """
    if benchmark.refusal_is_right:
        return ["refusal"]
    if any(question.reference for question in benchmark.questions):
        return ["reference"]
    raise JudgeError(
        f"benchmark {benchmark.name} needs a judge: --judge http://HOST/v1, --judge MODEL_FOLDER, or "
        f"a rule ({', '.join(RULES)})"
    )


@dataclass(frozen=True)
class _Outcome:
    """Everything one judge said."""

    judge: Judge
    ratings: list[Rating]
    records: list[dict[str, Any]]
    reasons: Counter[str]
    asked: int


def _judge(
    judge: Judge,
    benchmark: Benchmark,
    answers: Mapping[str, list[str]],
    settings: JudgingSettings,
    progress: Progress | None,
) -> _Outcome:
    shown = _showings(judge, benchmark, list(answers), settings)
    cases = [
        Case(
            question,
            tuple(answers[model][place] for model in models),
            derive_seed(settings.seed, f"judge {question.id}", showing),
        )
        for place, question, showing, models in shown
    ]
    advance = _begin(progress, f"{judge.name} judges", len(cases))
    verdicts: list[Verdict] = []
    for start in range(0, len(cases), CHUNK):
        chunk = cases[start : start + CHUNK]
        verdicts += judge.rate(chunk)
        advance(len(chunk))
    ratings: list[Rating] = []
    records: list[dict[str, Any]] = []
    for (_, question, showing, models), case, verdict in zip(shown, cases, verdicts, strict=True):
        records.append(_verdict_record(judge, question, models, verdict))
        for place, score in enumerate(verdict.scores or ()):
            written = len(case.answers[place])
            ratings.append(Rating(question.id, showing, models[place], place, score, written))
    reasons = Counter(verdict.reason for verdict in verdicts if verdict.scores is None)
    return _Outcome(judge, ratings, records, reasons, len(cases))


Showing = tuple[int, Question, int, tuple[str, ...]]
"""Place of the question, the question, number of the showing, and the models in the order shown."""


def _showings(
    judge: Judge, benchmark: Benchmark, models: list[str], settings: JudgingSettings
) -> list[Showing]:
    found: list[Showing] = []
    for place, question in enumerate(benchmark.questions):
        if not judge.compares or settings.one_by_one:
            found += [(place, question, i, (model,)) for i, model in enumerate(models)]
            continue
        rng = generator(settings.seed, f"orders {question.id}")
        for showing, order in enumerate(orders(len(models), settings.orders, rng)):
            found.append((place, question, showing, tuple(models[i] for i in order)))
    return found


def _verdict_record(
    judge: Judge, question: Question, models: tuple[str, ...], verdict: Verdict
) -> dict[str, Any]:
    return {
        "judge": judge.name,
        "question": question.id,
        "shown": list(models),
        "scores": list(verdict.scores) if verdict.scores is not None else None,
        "reason": verdict.reason,
        "raw": verdict.raw,
    }


def _judge_record(
    outcome: _Outcome, models: list[str], benchmark: Benchmark, settings: JudgingSettings
) -> dict[str, Any]:
    """Return what one judge found, and what there is to say about the judge itself."""

    def rng() -> Any:
        return generator(settings.seed, "bootstrap")

    scores = model_scores(outcome.ratings)
    comparing = outcome.judge.compares and len(models) > 1 and not settings.one_by_one
    categories = {question.id: question.category for question in benchmark.questions}
    return {
        "name": outcome.judge.name,
        "scale": list(outcome.judge.scale),
        "asked": outcome.asked,
        "usable": outcome.asked - outcome.reasons.total(),
        "reasons": dict(sorted(outcome.reasons.items())),
        "costs": outcome.judge.costs(),
        "models": {
            model: asdict(bootstrap(list(scores.get(model, {}).values()), rng()))
            for model in models
        },
        "categories": _by_category(scores, categories),
        "differences": _differences(scores, models, rng),
        "bias": _bias_record(outcome.ratings, rng) if comparing and outcome.ratings else None,
    }


def _by_category(
    scores: Mapping[str, Mapping[str, float]], categories: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for category in sorted({c for c in categories.values() if c}):
        found[category] = {}
        for model, own in scores.items():
            values = [score for question, score in own.items() if categories[question] == category]
            if values:
                found[category][model] = sum(values) / len(values)
    return found


def _differences(
    scores: Mapping[str, Mapping[str, float]], models: list[str], rng: Callable[[], Any]
) -> list[dict[str, Any]]:
    """Return how each two models differ on the questions that both have scores for."""
    rows = []
    for i, left in enumerate(models):
        for right in models[i + 1 :]:
            both = scores.get(left, {}).keys() & scores.get(right, {}).keys()
            gaps = [scores[right][question] - scores[left][question] for question in sorted(both)]
            if gaps:
                rows.append(
                    {
                        "left": left,
                        "right": right,
                        **asdict(bootstrap(gaps, rng())),
                        "right_wins": sum(gap > 0 for gap in gaps),
                        "ties": sum(gap == 0 for gap in gaps),
                    }
                )
    return rows


def _bias_record(ratings: list[Rating], rng: Callable[[], Any]) -> dict[str, Any]:
    places = position_bias(ratings, rng())
    longer, first = length_preference(ratings, rng()), first_preference(ratings, rng())
    tied = tied_share(ratings)
    flags = []
    if any(_excludes(place, 0.0) for place in places) or _excludes(first, 0.5):
        flags.append("position")
    if longer.count and longer.low > 0.5 and longer.mean >= 0.7:
        flags.append("length")
    if tied > 0.5:
        flags.append("saturated")
    return {
        "places": [asdict(place) for place in places],
        "first_preferred": asdict(first),
        "longer_preferred": asdict(longer),
        "consistent": consistency(ratings),
        "tied": tied,
        "flags": flags,
    }


def _excludes(estimate: Estimate, value: float) -> bool:
    """Return whether an interval lies beside ``value``, rounding aside."""
    return estimate.count > 0 and not estimate.low - 1e-9 <= value <= estimate.high + 1e-9


def _suspicious(
    benchmark: Benchmark, answers: Mapping[str, list[str]], outcomes: Sequence[_Outcome]
) -> list[dict[str, Any]]:
    """Return the answers that talk to the judge, with what the judges gave them and the others."""
    rows = []
    for model, own in answers.items():
        for question, text in zip(benchmark.questions, own, strict=True):
            if talks_to_judge(text):
                rows.append(
                    {
                        "model": model,
                        "question": question.id,
                        "excerpt": text[:300],
                        "scores": {o.judge.name: _got(o, question.id, model) for o in outcomes},
                    }
                )
    return rows


def _got(outcome: _Outcome, question: str, model: str) -> dict[str, float | None]:
    """Return the mean score of a model on a question and that of the other models on it."""
    scores = model_scores(r for r in outcome.ratings if r.question == question)
    others = [own[question] for other, own in scores.items() if other != model]
    return {
        "own": scores.get(model, {}).get(question),
        "others": sum(others) / len(others) if others else None,
    }


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
    record = target.read_json(names.ANSWERED)
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
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make {path}: {error.strerror}; choose another --to") from error
    return RunFolder(path)


def _holds(path: Path, digest: str) -> bool:
    """Return whether a folder is empty or holds the answers with this digest."""
    if not path.is_dir():
        return False
    return not any(path.iterdir()) or _kept_answers(RunFolder(path), digest) is not None


def _base_of(folder: Path) -> str:
    """Return the base model that a PEFT folder names."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} is no adapter: it has no adapter_config.json") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}/adapter_config.json cannot be read: {error}") from None
    model = config.get("base_model_name_or_path")
    if not isinstance(model, str) or not model:
        raise ModelError(f"{folder} does not name its base model; say --set model.path=FOLDER")
    return model


def _free(label: str, found: Sequence[Candidate]) -> str:
    taken, number, free = {candidate.label for candidate in found}, 2, label
    while free in taken or free == BASE:
        free, number = f"{label}-{number}", number + 1
    return free
