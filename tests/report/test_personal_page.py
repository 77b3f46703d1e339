"""The best round of a run beside its last."""

from types import SimpleNamespace

import pytest

from fedloom.report.personal_page import _best_round


@pytest.mark.parametrize(("higher_is_better", "best"), [(True, 0.9), (False, 0.3)])
def test_the_best_round_is_one_after_training(higher_is_better, best):
    rounds = [
        {"round": round, "evaluation": {"clients": {"mean": {"m": value}}}}
        for round, value in enumerate((1.0, 0.9, 0.3, 0.6))
    ]
    rounds.append({"round": 4, "evaluation": {"clients": None}})
    metric = {"name": "m", "higher_is_better": higher_is_better}
    run = SimpleNamespace(evaluated=rounds, metric="m", run={"metric": metric})
    assert _best_round(SimpleNamespace(run=run)) == best
