"""The glossary holds every metric that the code reports, with its range, and the documents are its print."""

from pathlib import Path

import pytest

from fedloom.evaluation.metrics import METRICS, PRIMARY_METRICS
from fedloom.objectives import OBJECTIVES
from fedloom.objectives.distillation import Distillation
from fedloom.reports import glossary
from fedloom.training.results import BALANCE

DOCS = Path(__file__).parents[2] / "docs"
TRAINED = [spec for _, objective in OBJECTIVES.values() for spec in objective.reported]


REPORTED = {
    spec.name: spec
    for own in (*METRICS.values(), TRAINED, Distillation.reported, [BALANCE])
    for spec in own
    if spec.name != "loss"  # an objective's may be below 0, held-out ones are not
}


@pytest.mark.parametrize("spec", REPORTED.values(), ids=REPORTED)
def test_every_reported_metric_has_one_definition(spec):
    own = glossary.entry(spec.name)
    assert own is not None, f"{spec.name} is not in reports/glossary.py"
    assert (spec.lowest, spec.highest) == (0, 1) or own.highest is None
    assert (own.highest == 1) == (spec.highest == 1)
    assert (own.lowest is None) == (spec.lowest < 0)


def test_names_are_defined_once_and_pages_find_them():
    groups = (
        glossary.HELD_OUT,
        glossary.TRAINING,
        glossary.CLIENTS,
        glossary.JUDGES,
        glossary.COSTS,
    )
    assert sum(map(len, groups)) == len(glossary.GLOSSARY)
    assert all(glossary.entry(headline.name) for headline in PRIMARY_METRICS.values())
    found = glossary.entries(["clients_accuracy", "accuracy", "loss", "nobody"])
    assert [own.name for own in found] == ["loss", "accuracy"]
    assert [own.name for own in glossary.GLOSSARY.values() if own.counted] == [
        "accuracy", "preference_accuracy", "implicit_accuracy", "explicit_accuracy",
        "likelihood_accuracy", "normalised_accuracy", "longer_accuracy", "selection_accuracy",
        "reward_accuracy",
        "token_reward_accuracy",
    ]  # fmt: skip


def test_the_document_is_the_glossary():
    assert (DOCS / "metrics.md").read_text(encoding="utf-8") == glossary.markdown(), (
        "python -m fedloom.reports.glossary > docs/metrics.md"
    )
