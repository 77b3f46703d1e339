"""How clients fare on rows of their own, by hand."""

from dataclasses import asdict
from types import SimpleNamespace

import pytest

from fedloom.accounting.costs import Cost
from fedloom.reports.sections.personalisation import ClientsArm, arm_of, best_round, gains


@pytest.mark.parametrize(("higher_is_better", "best"), [(True, 0.9), (False, 0.3)])
def test_the_best_round_is_one_after_training(higher_is_better, best):
    rounds = [
        {"round": round, "evaluation": {"clients": {"mean": {"m": value}}}}
        for round, value in enumerate((1.0, 0.9, 0.3, 0.6))
    ]
    rounds.append({"round": 4, "evaluation": {"clients": None}})
    metric = {"name": "m", "higher_is_better": higher_is_better}
    run = SimpleNamespace(evaluated=rounds, metric="m", run={"metric": metric})
    assert best_round(SimpleNamespace(run=run)) == best


def arm(method, values, clients, *, higher_is_better=True, **roles):
    return ClientsArm(
        scenario="one",
        name=method,
        method=method,
        metric="accuracy",
        higher_is_better=higher_is_better,
        values=values,
        best={seed: value + 0.1 * seed for seed, value in values.items()},
        newcomer=None,
        clients=clients,
        worst_decile=0.0,
        spread=0.0,
        fairness=0.0,
        apart={},
        sent=0.0,
        flops=0.0,
        **roles,
    )


def test_means_and_deviations_over_seeds_by_hand():
    """At its best 0.5 + 0, 0.6 + 0.1 and 0.7 + 0.2: mean 0.7, deviations -0.2, 0 and 0.2 over n - 1."""
    own = arm("ditto", {0: 0.5, 1: 0.6, 2: 0.7}, {0: 0.6})
    assert own.mean == pytest.approx(0.6) and own.best_mean == pytest.approx(0.7)
    assert own.best_deviation == pytest.approx(0.2)
    assert arm("ditto", {0: 0.5}, {0: 0.5}).best_deviation is None
    assert own.quality == own.mean
    assert arm("ditto", {0: 2.5}, {0: 2.5}, higher_is_better=False).quality == -2.5


def test_gains_by_hand():
    """Seeds 0 and 1 are shared: 0.1 and 0.3; clients gain 0.2, -0.1 and 0; client 9 has no counterpart."""
    alone = arm(
        "local_only", {0: 0.5, 1: 0.5}, {0: 0.5, 1: 0.5, 2: 0.5}, baseline=True, reference=True
    )
    own = arm("ditto", {0: 0.6, 1: 0.8, 2: 0.9}, {0: 0.7, 1: 0.4, 2: 0.5, 9: 0.9})
    found = gains(own, [alone, own])
    assert list(found) == ["local_only"] and gains(alone, [alone, own]) == {}
    assert found["local_only"]["difference"] == pytest.approx(0.2)
    assert (found["local_only"]["better"], found["local_only"]["clients"]) == (1, 3)
    assert found["local_only"]["over_clients"]["estimate"] == pytest.approx(0.1 / 3)
    assert found["local_only"]["over_seeds"]["estimate"] == pytest.approx(0.2)
    less = arm("ditto", {0: 0.6}, {0: 0.7, 1: 0.4}, higher_is_better=False)
    assert gains(less, [alone, less])["local_only"]["better"] == 1  # client 1: 0.4 is less than 0.5


def test_an_arm_is_the_mean_of_its_runs_by_hand():
    """Two seeds of two clients; a turn is a client in a round: 10 + 20 and 30 + 40 bytes, 5 and 7 FLOPs."""

    def cell(seed, mean, each, worst):
        apart = {"longer_accuracy": 0.2 + 0.2 * seed}
        over = {"mean": mean, "worst_decile": worst, "spread": 2 * worst, "fairness": 3 * worst}
        after = {name: {"accuracy": value} for name, value in over.items()}
        after["each"] = {c: {"accuracy": value, **apart} for c, value in each.items()}
        costs = [
            asdict(Cost(1, 0, "train", bytes_down=10, bytes_up=20, flops=5.0)),
            asdict(Cost(1, 1, "train", bytes_down=30, bytes_up=40, flops=7.0)),
            asdict(Cost(1, 1, "evaluate", bytes_down=1000, flops=1000.0)),
        ]
        run = {"method": "ditto", "metric": {"name": "accuracy", "higher_is_better": True}}
        judged = {"round": 1, "evaluation": {"clients": {"mean": {"accuracy": mean + 0.05}}}}
        return SimpleNamespace(
            seed=seed,
            role={},
            metrics={"accuracy": 0.4 + 0.2 * seed},
            summary={"clients_after": after},
            run=SimpleNamespace(metric="accuracy", run=run, costs=costs, evaluated=[judged]),
        )

    cells = [cell(0, 0.5, {"0": 0.4, "1": 0.6}, 0.1), cell(1, 0.7, {"0": 0.6, "1": 0.8}, 0.3)]
    found = arm_of("one", "ditto", cells)
    assert found.values == {0: 0.5, 1: 0.7} and found.best == pytest.approx({0: 0.55, 1: 0.75})
    assert found.clients == pytest.approx({0: 0.5, 1: 0.7}) and found.newcomer == pytest.approx(0.5)
    assert (found.worst_decile, found.spread) == (pytest.approx(0.2), pytest.approx(0.4))
    assert found.fairness == pytest.approx(0.6)
    assert found.apart == {"longer_accuracy": pytest.approx(0.3)}
    assert (found.sent, found.flops) == (50.0, 6.0)  # (30 + 70) / 2 and (5 + 7) / 2
