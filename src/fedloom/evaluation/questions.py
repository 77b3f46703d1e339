"""Question sets in their public layouts: MT-Bench-1, Vicuna, AdvBench, or a file of one's own.

Sources: MT-Bench and Vicuna-bench, Zheng et al. 2023, https://arxiv.org/abs/2306.05685 (FastChat's
``question.jsonl``, beside it the reference answers); AdvBench, Zou et al. 2023,
https://arxiv.org/abs/2307.15043 (a CSV with a column ``goal``). Temperatures and lengths are those of
2502.14187's evaluation: MT-Bench-1 is the first turn of each question. Questions are never trained on.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from fedloom.data.files import read_file
from fedloom.errors import DataError
from fedloom.settings.suggestions import did_you_mean

FOLDER = "FEDLOOM_BENCHMARKS"
"""Environment variable: a folder with mt_bench, vicuna_bench and advbench in it."""

MT_BENCH = {
    "writing": 0.7,
    "roleplay": 0.7,
    "stem": 0.1,
    "humanities": 0.1,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
}

VICUNA = dict.fromkeys(("math", "coding"), 0.0)

TEXTS = ("turns", "question", "prompt", "instruction", "goal", "input", "text")
"""Columns that may hold the question; the first that is there is taken."""

REFERENCES = ("reference", "answer", "output", "target")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: As its file numbers it, or its row.
        text: What the model is asked.
        category: For temperatures and for the report; may be empty.
        reference: The right answer, where there is one.
        temperature: At which it is answered.
    """

    id: str
    text: str
    category: str = ""
    reference: str | None = None
    temperature: float = 0.0


@dataclass(frozen=True)
class Benchmark:
    """A question set and how it is answered.

    Attributes:
        name: Name of the profile or of the file.
        questions: In the order of the file.
        max_new_tokens: Length of an answer.
        refusal_is_right: Whether a good answer is a refusal (AdvBench).
        bad_rows: What was wrong with rows that were left out.
    """

    name: str
    questions: tuple[Question, ...]
    max_new_tokens: int
    refusal_is_right: bool = False
    bad_rows: tuple[str, ...] = ()

    def first(self, count: int | None) -> Benchmark:
        """Return the set with its first ``count`` questions only."""
        return self if count is None else replace(self, questions=self.questions[:count])


@dataclass(frozen=True)
class _Profile:
    places: tuple[str, ...]
    max_new_tokens: int
    temperatures: Mapping[str, float]
    temperature: float = 0.0
    refusal_is_right: bool = False


PROFILES = {
    "mt-bench-1": _Profile(("mt_bench/question.jsonl",), 1024, MT_BENCH, 0.7),
    # The study gives no temperatures for Vicuna; these are FastChat's (0.7 but for exact answers).
    "vicuna": _Profile(("vicuna_bench/question.jsonl",), 2048, VICUNA, 0.7),
    "advbench": _Profile(
        (
            "advbench/advbench_prompts.csv",
            "advbench/advbench.csv",
            "advbench/harmful_behaviors.csv",
        ),
        1024,
        {},
        refusal_is_right=True,
    ),
}
"""Benchmarks known by name, with the places of their files in a benchmarks folder."""

OWN = _Profile((), 512, {})


def load_benchmark(name: str, questions: Path | None = None) -> Benchmark:
    """Read a question set.

    Args:
        name: mt-bench-1, vicuna, advbench, or a file (.jsonl, .json or .csv).
        questions: Where a named benchmark's file lies, or a folder with all of them (default: the
            folder in FEDLOOM_BENCHMARKS).

    Raises:
        DataError: There is no such benchmark or file, or no usable question in it.
    """
    profile = PROFILES.get(name)
    if profile is None:
        path = Path(name)
        if not path.suffix:
            raise DataError(
                f"no benchmark {name!r}; {did_you_mean(name, PROFILES)}there are {', '.join(PROFILES)}, "
                "or give a file"
            )
        return _read(path.stem, path, OWN)
    return _read(name, _place(name, profile, questions), profile)


def _place(name: str, profile: _Profile, given: Path | None) -> Path:
    """Return a named benchmark's file."""
    folder = given or (Path(os.environ[FOLDER]) if os.environ.get(FOLDER) else None)
    if folder is not None and folder.is_file():
        return folder
    for place in profile.places if folder is not None else ():
        for candidate in (folder / place, folder / Path(place).name):  # type: ignore[operator]
            if candidate.is_file():
                return candidate
    where = f"{folder} has no {profile.places[0]}" if folder else "its questions are not shipped"
    raise DataError(
        f"benchmark {name}: {where}. Give the file in its public layout with --questions FILE, or set "
        f"{FOLDER} to a folder that holds {profile.places[0]}"
    )


def _read(name: str, path: Path, profile: _Profile) -> Benchmark:
    references = _references(path)
    found: list[Question] = []
    bad: list[str] = []
    seen: set[str] = set()
    for number, row in read_file(path):
        try:
            question = _question(number, row, profile, references)
        except ValueError as error:
            bad.append(f"{path.name} row {number}: {error}")
            continue
        if question.id in seen:
            bad.append(f"{path.name} row {number}: question {question.id} is there twice")
            continue
        seen.add(question.id)
        found.append(question)
    if not found:
        raise DataError(f"{path} holds no usable question; {'; '.join(bad[:3]) or 'it is empty'}")
    return Benchmark(
        name, tuple(found), profile.max_new_tokens, profile.refusal_is_right, tuple(bad)
    )


def _question(
    number: int, row: object, profile: _Profile, references: Mapping[str, str]
) -> Question:
    if isinstance(row, Exception):
        raise ValueError(str(row))
    if not isinstance(row, dict):
        raise ValueError(f"must be an object with columns, got {type(row).__name__}")
    column = next((name for name in TEXTS if row.get(name) is not None), None)
    if column is None:
        raise ValueError(f"has none of the columns {', '.join(TEXTS)}")
    text = row[column][0] if isinstance(row[column], list) and row[column] else row[column]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{column} must be text, got {text!r:.60}")
    identity = str(row.get("question_id", row.get("id", number)))
    category = str(row.get("category", row.get("type", "")) or "")
    own = next((row[n] for n in REFERENCES if isinstance(row.get(n), str) and row[n].strip()), None)
    temperature = profile.temperatures.get(category, profile.temperature)
    return Question(identity, text, category, references.get(identity, own), temperature)


def _references(path: Path) -> dict[str, str]:
    """Return the first turns of reference answers that lie beside a question file, by question."""
    found = {}
    for beside in sorted(path.parent.glob("reference_answer*.jsonl")):
        for _, row in read_file(beside):
            try:
                found[str(row["question_id"])] = str(row["choices"][0]["turns"][0])
            except (KeyError, IndexError, TypeError):
                continue  # a reference that is not there leaves its question without one
    return found
