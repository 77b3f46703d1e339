"""What a run says of itself at its end."""

import math
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedloom.accounting.costs import REPEATED, SERVER, Cost
from fedloom.evaluation.metrics import PRIMARY_METRICS
from fedloom.federation.protocol import EVALUATE
from fedloom.methods.contract.unseen_clients import AFTER
from fedloom.runs.records import _evaluation_record, summary_text, totals, unseen_clients_record

TOTALS = {"bytes_down": 2_000_000, "bytes_up": 1_000_000, "flops": 3e9, "seconds": 4.0}


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        (0.25, 0.75, "before 0.2500  after 0.7500  (+0.5000)"),
        (None, 0.75, "before not measured  after 0.7500"),
        (None, None, "before not measured  after not measured"),
    ],
)
def test_a_change_is_shown_where_both_ends_were_measured(before, after, shown):
    values = {"before": before, "after": after, "before_metrics": {}, "after_metrics": {}}
    values |= {"judged_on": "global"}
    text = summary_text(values | {"totals": TOTALS}, PRIMARY_METRICS["preference"], Path("run"))
    assert text.splitlines()[0] == f"held-out {PRIMARY_METRICS['preference'].name} {shown}"
    assert "2 MB down, 1 MB up (measured)" in text


def judged(values, name):
    return SimpleNamespace(
        metrics={name: 0.5},
        clients={client: {name: value} for client, value in enumerate(values)},
        sample=None,
        kept=False,
    )


def over_clients(values, headline):
    """The figures over clients, in the record's order, each beside its name."""
    found = _evaluation_record(judged(values, headline.name), headline)["clients"]
    names = ("mean", "worst", "worst_decile", "spread", "fairness")
    return {name: found[name][headline.name] for name in names}


def test_figures_over_clients_by_hand():
    """0.2, 0.4 and 0.9: mean 0.5; squares 0.04 + 0.16 + 0.81 = 1.01; Jain's index 1.5^2 / (3 x 1.01)."""
    found = over_clients([0.4, 0.9, 0.2], PRIMARY_METRICS["preference"])
    assert found == pytest.approx(
        {
            "mean": 0.5,
            "worst": 0.2,
            "worst_decile": 0.2,  # the worst of three: at least one
            "spread": math.sqrt((0.09 + 0.01 + 0.16) / 3),  # of all clients there are, so over n
            "fairness": 2.25 / 3.03,
        }
    )
    of_losses = over_clients([0.4, 0.9, 0.2], PRIMARY_METRICS["instruction"])
    assert (of_losses["worst"], of_losses["worst_decile"]) == (0.9, 0.9)


@pytest.mark.parametrize(
    ("clients", "expected"),
    [
        (10, 0.01),  # one
        (11, 0.015),  # two: the tenth is rounded up
        (20, 0.015),
        (21, 0.02),  # three: 0.01, 0.02, 0.03
    ],
)
def test_the_worst_tenth_is_rounded_up(clients, expected):
    values = [number / 100 for number in range(clients, 0, -1)]
    found = over_clients(values, PRIMARY_METRICS["preference"])
    assert found["worst_decile"] == pytest.approx(expected)


def test_jains_index_at_its_ends():
    alike, one = ([0.3] * 4, [0.8, 0, 0, 0])
    assert over_clients(alike, PRIMARY_METRICS["preference"])["fairness"] == pytest.approx(1)
    assert over_clients(one, PRIMARY_METRICS["preference"])["fairness"] == pytest.approx(1 / 4)
    assert (
        over_clients([0.0, 0.0], PRIMARY_METRICS["preference"])["fairness"] == 1
    )  # all fare alike


def test_newcomers_means_by_hand():
    name = PRIMARY_METRICS["preference"].name
    joined = {3: {name: 0.5, AFTER + name: 0.7}, 5: {name: 0.6, AFTER + name: 0.9}}
    found = unseen_clients_record(joined, PRIMARY_METRICS["preference"])
    assert found["before"][name] == pytest.approx(0.55) and found["after"][name] == pytest.approx(
        0.8
    )


def cost(client, phase, **own):
    return asdict(Cost(1, client, phase, **own))


def test_totals_by_hand():
    """Clients' work, the server's and evaluation's are three sums; what is repeated is in none."""
    found = totals(
        [
            cost(
                0,
                "train",
                bytes_down=3,
                bytes_up=5,
                flops=7.0,
                seconds=11.0,
                steps=2,
                peak_memory=9,
            ),
            cost(1, "train", bytes_down=30, bytes_up=50, flops=70.0, seconds=1.0, steps=4),
            cost(SERVER, "aggregate", flops=13.0, seconds=17.0, peak_memory=40),
            cost(0, EVALUATE, bytes_down=100, bytes_up=23, flops=19.0, seconds=29.0, peak_memory=6),
            cost(SERVER, EVALUATE, flops=1.0, seconds=2.0),
            cost(0, REPEATED, bytes_up=1000, flops=1000.0, peak_memory=1000),
        ]
    )
    assert (found["bytes_down"], found["bytes_up"], found["flops"]) == (33, 55, 77)
    assert (found["seconds"], found["steps"], found["peak_memory"]) == (12, 6, 40)
    assert (found["server_flops"], found["server_seconds"]) == (13, 17)
    assert (found["evaluation_bytes"], found["evaluation_flops"]) == (123, 20)
    assert found["evaluation_seconds"] == 31
