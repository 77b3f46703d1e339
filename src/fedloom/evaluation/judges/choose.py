"""Judges by name: rules, a model's folder, a reward model's, an endpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedloom.errors import JudgeError, SettingsError
from fedloom.evaluation.judges.base import Judge
from fedloom.evaluation.judges.endpoint import KEY, EndpointJudge
from fedloom.evaluation.judges.model import ModelJudge
from fedloom.evaluation.judges.reward import RewardJudge
from fedloom.evaluation.judges.rules import RULES
from fedloom.evaluation.questions import Benchmark
from fedloom.evaluation.reward_models import is_reward_model
from fedloom.evaluation.verdicts import JudgingSettings
from fedloom.models.device import choose_device
from fedloom.settings.plugins import Choices, undefined
from fedloom.settings.suggestions import did_you_mean
from fedloom.storage.cache import cache_folder


def _lacks_of_judge(kind: type[Any]) -> list[str]:
    return undefined(kind, (name for name in vars(Judge) if not name.startswith("_")))


JUDGES: Choices[Any] = Choices("fedloom.judges", {}, object, _lacks_of_judge)
"""Judges of others; each is made with the settings of ``[judging]``."""


def make_judges(chosen: Sequence[str], settings: JudgingSettings) -> list[Judge]:
    """Return judges by name: a rule, a model's folder, or the address of an endpoint.

    Raises:
        JudgeError: A name is none of these.
        ModelError: A folder holds no model.
    """
    require_judges(chosen)
    judges: list[Judge] = []
    for name in chosen:
        if name in RULES:
            judges.append(RULES[name])
        elif _is_plugin(name):
            judges.append(JUDGES[name][1](settings))
        elif name.startswith(("http://", "https://")):
            cache = cache_folder() / "judge"
            judges.append(EndpointJudge(name, settings, os.environ.get(KEY), cache))
        elif is_reward_model(Path(name)):
            judges.append(RewardJudge(name, choose_device(settings.device)))
        else:
            judges.append(
                ModelJudge(
                    name,
                    temperature=settings.temperature,
                    reparse=settings.reparse,
                    device=choose_device(settings.device),
                )
            )
    return judges


def require_judges(chosen: Sequence[str]) -> None:
    """Check that every name stands for a judge.

    Raises:
        JudgeError: One does not.
    """
    for name in chosen:
        if _is_plugin(name):
            try:
                JUDGES.resolve(name)
            except SettingsError as error:
                raise JudgeError(f"judge {name!r}: {'; '.join(error.problems)}") from error
        elif not (name in RULES or name.startswith(("http://", "https://")) or Path(name).is_dir()):
            raise JudgeError(
                f"no judge {name!r}: {did_you_mean(name, RULES)}give {', '.join(RULES)}, a model's "
                "folder, an http address, or a class as package.module:Class"
            )


def _is_plugin(name: str) -> bool:
    return name not in RULES and not Path(name).is_dir() and JUDGES.is_foreign(name)


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
