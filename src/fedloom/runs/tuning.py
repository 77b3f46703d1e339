"""Which settings that change speed alone are the fastest on this machine, by measuring.

One client's optimizer steps, with the experiment's own model, rows and objective, are timed under some
values of ``training.tokens_per_pass``, and then of ``training.threads``; and the steps of a round's
clients under some values of ``simulation.cohort``, where clients can be trained together. All values are
timed in one order and then in the other (A B B A), so that a machine that slows down slows all of them
alike; a value is better only where it was faster every time, by more than two timings of one value differ
by. Losses are compared first: a value that changes them is none of speed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch

from fedloom.accounting.cores import available_cores
from fedloom.accounting.ledger import peak_memory, reset_peak_memory
from fedloom.data.client_rows import TokenShare
from fedloom.errors import ModelError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.models.adapters import AdapterModel
from fedloom.objectives.base import Objective
from fedloom.runs.assembly import RunComponents, assemble
from fedloom.runs.cohort_tuning import COHORT, cohort_bench, cohort_candidates
from fedloom.runs.cost_estimate import require_rows_trained_on
from fedloom.runs.initial_adapter import find_start, with_adapter_settings
from fedloom.runs.partitioning import partition_data
from fedloom.tensors import Tensors
from fedloom.training.layout import budget_of, tokens_per_pass
from fedloom.training.memory import is_out_of_memory
from fedloom.training.passes import Layout
from fedloom.training.settings import TrainingSettings, Work
from fedloom.training.steps import local_loss, train_locally

TOKENS, THREADS = "tokens_per_pass", "threads"

FACTORS = (0.25, 0.5, 2, 4)
"""Candidates for the tokens of a pass, as multiples of what "auto" stands for."""

COHORT_NAME = "simulation.cohort"

SAME = 1e-3
"""Relative difference of losses that rounding makes, at most."""

LEAST_GAIN = 0.02
"""Share of time that is worth a line in a file, however little two timings of one value differ."""

REPEATS = 3
"""Times that all values are timed there and back, where the time suffices; two at least."""

LONGEST = 1.0
"""Seconds of one timing that are enough."""


@dataclass
class Candidate:
    """A value that was tried.

    Attributes:
        setting: Of ``[training]`` or ``[simulation]``.
        value: Its.
        tokens: Trained on in one timing.
        seconds: Of each timing, in pairs there and back.
        memory: Highest memory of a timing, in bytes: of the process, or allocated on the GPU.
        ratios: How many times as fast as the first candidate, for each there and back.
        problem: Why it cannot be taken, empty where it can.
    """

    setting: str
    value: int | str
    tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    memory: int = 0
    ratios: list[float] = field(default_factory=list)
    problem: str = ""

    @property
    def name(self) -> str:
        """The setting with its section."""
        return f"{_section_of(self.setting)}.{self.setting}"

    @property
    def speed(self) -> float:
        """Tokens a second, median over timings."""
        return self.tokens / median(self.seconds) if self.seconds else 0.0

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return median(self.ratios) if self.ratios else 0.0


@dataclass(frozen=True)
class Trial:
    """What was tried of one setting.

    Attributes:
        candidates: The present value first.
        noise: Relative difference by which two timings of one value differ, median.
        best: The candidate that is better than the present one by more than that, if any is.
    """

    candidates: tuple[Candidate, ...]
    noise: float
    best: Candidate | None


@dataclass(frozen=True)
class Tuning:
    """What was found.

    Attributes:
        headline: One line: what was measured.
        trials: By setting, those that were tried.
        changes: By ``section.key``, settings that are worth a change, with their values.
        untried: By ``section.key``, why a setting was not tried.
    """

    headline: str
    trials: tuple[Trial, ...]
    changes: dict[str, int]
    untried: dict[str, str] = field(default_factory=dict)


def _section_of(setting: str) -> str:
    """Return the section of a setting that is tuned."""
    return "simulation" if setting == COHORT else "training"


@dataclass
class _Bench:
    """One client's optimizer steps, ready to be timed."""

    model: AdapterModel
    initial: Tensors
    share: TokenShare
    objective: Objective
    training: TrainingSettings
    seed: int
    client: int
    steps: int = 1

    def run(self, settings: TrainingSettings) -> tuple[float, float, int]:
        """Return seconds, mean loss and tokens of the steps, from the experiment's start."""
        self.model.write(self.initial)
        _wait(self.model)
        began = time.perf_counter()
        result = train_locally(
            self.model, self.share, self.objective, settings,
            learning_rate=settings.learning_rate, seed=self.seed, client=self.client, round=1,
            work=Work(steps=self.steps),
        )  # fmt: skip
        _wait(self.model)
        return time.perf_counter() - began, result.metrics["loss"], result.tokens

    def loss(self, settings: TrainingSettings) -> float:
        """Return the mean loss of the start over the rows of the first step, without dropout."""
        self.model.write(self.initial)
        return local_loss(
            self.model, self.share, self.objective, settings,
            seed=self.seed, client=self.client, round=1, batches=1,
        )  # fmt: skip

    def passes(self, tokens: int) -> tuple[int, ...]:
        """Return the rows of each pass over all of the client's rows: candidates alike are one."""
        settings = _with(self.training, TOKENS, tokens)
        layout = Layout(self.model, self.share, budget_of(settings, self.model))
        return tuple(sum(map(len, own)) for own in layout.passes(np.arange(len(self.share))))


def tune(
    experiment: Experiment, limit: float, stage: Callable[[str], None] = lambda text: None
) -> Tuning:
    """Measure on this machine which values are the fastest; nothing is written.

    Args:
        experiment: Its settings; ``[training]`` counts tokens in a pass.
        limit: Seconds that the timings may take, from when model and rows are ready.
        stage: Told what is being done.

    Raises:
        SettingsError: The experiment counts examples in a pass or trains on generated answers, or the
            time does not suffice.
        ModelError: One step does not fit into memory.
    """
    require_rows_trained_on(experiment, "fedloom tune")
    _require_tokens_counted(experiment)
    start = find_start(experiment)
    experiment = with_adapter_settings(experiment, start)
    stage("reading data")
    parts = assemble(experiment, partition_data(experiment), stage=stage, start=start)
    bench = _bench(experiment, parts)
    auto = tokens_per_pass(experiment.training.model_copy(update={TOKENS: "auto"}), bench.model)
    if auto is None:
        raise SettingsError(
            [
                f"method.name = {experiment.method.name!r} reads whole batches: its clients' passes are "
                "not counted in tokens, and there is nothing to tune"
            ],
            "fedloom tune",
        )
    together = cohort_bench(experiment, parts)
    untried = {COHORT_NAME: together} if isinstance(together, str) else {}
    tried = _worth_timing(experiment, bench, auto)
    if not isinstance(together, str):
        tried.append((COHORT, together, cohort_candidates(experiment, parts)))
    changes: dict[str, int] = {}
    trials = []
    before = torch.get_num_threads()
    ends = time.perf_counter() + limit
    try:
        for place, (setting, own, values) in enumerate(tried):
            share = (ends - time.perf_counter()) / (len(tried) - place)
            stage(f"timing {_section_of(setting)}.{setting} = {', '.join(map(str, values))}")
            try:
                trial = _try(own, setting, values, share)
            except (SettingsError, ModelError) as error:
                if setting != COHORT:
                    raise
                problems = error.problems if isinstance(error, SettingsError) else (str(error),)
                untried[COHORT_NAME] = "; ".join(problems)  # what was found of others stays
                continue
            trials.append(trial)
            if trial.best is not None:
                changes[trial.best.name] = int(trial.best.value)
                own.training = _with(own.training, setting, trial.best.value)
    finally:
        torch.set_num_threads(before)
    return Tuning(_headline(bench, before), tuple(trials), changes, untried)


class _Timed(Protocol):
    """Steps that can be timed under settings of a section."""

    training: Any
    steps: int

    def run(self, settings: Any) -> tuple[float, float, int]:
        """Return seconds, mean loss and tokens of the steps."""
        ...

    def loss(self, settings: Any) -> float:
        """Return a loss that is the same under all values."""
        ...


def _worth_timing(
    experiment: Experiment, bench: _Bench, auto: int
) -> list[tuple[str, _Timed, list[int | str]]]:
    """Return the settings of ``[training]`` of which several values can differ, the present one first.

    Args:
        experiment: Its settings.
        bench: What is timed.
        auto: What "auto" stands for as tokens of a pass.
    """
    given, threads = experiment.training.tokens_per_pass, torch.get_num_threads()
    now, cores = auto if given == "auto" else given, available_cores()
    tokens = _distinct(bench, [now, auto, *(max(1, int(auto * factor)) for factor in FACTORS)])
    found: list[tuple[str, _Timed, list[int | str]]] = []
    if len(tokens) > 1:
        found.append((TOKENS, bench, tokens))
    if bench.model.device.type == "cpu" and cores > 1 and experiment.training.threads is None:
        found.append((THREADS, bench, [threads, cores if threads == 1 else 1]))
    return found


def _headline(bench: _Bench, threads: int) -> str:
    """Return what was timed, in words."""
    kind = type(bench.objective).__name__
    return (
        f"{kind} on client {bench.client} ({len(bench.share)} rows), {bench.steps} optimizer steps of "
        f"{bench.training.batch_size} a timing, {threads} thread{'s' * (threads > 1)}"
    )


def _require_tokens_counted(experiment: Experiment) -> None:
    """Check that there is something to tune.

    Raises:
        SettingsError: There is not.
    """
    training = experiment.training
    if not training.counts_examples:
        return
    name = "micro_batch_size" if training.micro_batch_size is not None else "accumulation"
    raise SettingsError(
        [
            f"training.{name} = {getattr(training, name)} says how many examples a pass has, so that "
            "training.tokens_per_pass is not read: take it out of the file to have that tuned"
        ],
        "fedloom tune",
    )


def _bench(experiment: Experiment, parts: RunComponents) -> _Bench:
    """Return the steps of the client that has the most rows, with its references."""
    engine = parts.local
    client = max(engine.shares, key=lambda own: (len(engine.shares[own]), -own))
    engine.add_reference(1, client)
    own = engine.resources[client]
    objective, seed = parts.objective, experiment.federation.seed
    share = engine.shares[client]
    return _Bench(own.model, own.initial, share, objective, experiment.training, seed, client)


def _with(training: Any, setting: str, value: int | str) -> Any:
    """Return settings with one of them changed; threads are the process's."""
    if setting == THREADS:
        torch.set_num_threads(int(value))
        return training
    return training.model_copy(update={setting: value})


def _distinct(bench: _Bench, values: Sequence[int]) -> list[int | str]:
    """Return the values that lay out the client's rows differently, the first of those alike."""
    found: dict[tuple[int, ...], int | str] = {}
    for value in values:
        found.setdefault(bench.passes(value), value)
    return list(found.values())


def _try(bench: _Timed, setting: str, values: Sequence[int | str], seconds: float) -> Trial:
    """Time values there and back, until the time is over; compare losses first.

    Raises:
        SettingsError: The time does not suffice for two times there and back.
        ModelError: The first value does not fit into memory.
    """
    ends = time.perf_counter() + seconds
    candidates = [Candidate(setting, value) for value in values]
    first = candidates[0]
    one = _longest_step(bench, setting, candidates)
    usable = [candidate for candidate in candidates if not candidate.problem]
    left = ends - time.perf_counter()
    timings = 2 * len(usable)
    if left < 2 * timings * one:
        needed = seconds + 2 * timings * one - left
        raise SettingsError(
            [
                f"--limit: {seconds:.0f} s do not suffice for {first.name}: one optimizer step "
                f"takes {one:.2g} s, and each of {len(usable)} values is timed four times; give about "
                f"{2 * needed:.0f}"
            ],
            "fedloom tune",
        )
    bench.steps = max(1, int(min(LONGEST, left / (timings * REPEATS)) / one))
    for repeat in range(REPEATS):
        if repeat >= 2 and ends - time.perf_counter() < timings * bench.steps * one:
            break
        for candidate in (*usable, *reversed(usable)):
            reset_peak_memory()
            took, _, candidate.tokens = bench.run(_with(bench.training, setting, candidate.value))
            candidate.seconds.append(took)
            candidate.memory = max(candidate.memory, peak_memory())
        for candidate in usable:
            candidate.ratios.append(sum(first.seconds[-2:]) / sum(candidate.seconds[-2:]))
    noise = max(LEAST_GAIN, _noise(usable))
    best = max(usable, key=lambda own: own.ratio)
    _with(bench.training, setting, first.value)
    better = best is not first and min(best.ratios) > 1 + noise
    return Trial(tuple(candidates), noise, best if better else None)


def _longest_step(bench: _Timed, setting: str, candidates: Sequence[Candidate]) -> float:
    """Return the seconds of one optimizer step with the slowest value that can be used.

    A value that does not fit into memory, or whose loss is not the first one's, is given its problem.

    Raises:
        ModelError: The first value does not fit into memory.
    """
    first, bench.steps = candidates[0], 1
    one, expected = 0.0, math.nan
    for candidate in candidates:
        try:
            settings = _with(bench.training, setting, candidate.value)
            bench.run(settings)  # the first time, memory is reserved
            took, loss = bench.run(settings)[0], bench.loss(settings)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            candidate.problem = "does not fit into memory"
            continue
        if candidate is first:
            expected = loss
        elif not abs(loss - expected) <= SAME * max(1.0, abs(expected)):
            candidate.problem = f"its loss is {loss:.6g}, not {expected:.6g}"
            continue
        one = max(one, took)
    if first.problem:
        raise ModelError(
            f"one optimizer step with {first.name} = {first.value} {first.problem}: set a smaller "
            "training.batch_size or data.max_length, or take a smaller model"
        )
    return one


def _noise(candidates: Sequence[Candidate]) -> float:
    """Return by what two timings of one value differ, as a share of their mean, median over all pairs."""
    return median(
        abs(there - back) / (there + back) * 2
        for own in candidates
        for there, back in zip(own.seconds[::2], own.seconds[1::2], strict=True)
    )


def _wait(model: AdapterModel) -> None:
    """Let a GPU finish what it was given."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
