"""What frameworks cost: fronts and wins by hand, and a real small grid to its page."""

import json

import pytest

from fedloom.errors import SettingsError
from fedloom.reports.comparison_data import on_front
from fedloom.reports.comparison_page import write_comparison
from fedloom.reports.sections.costs import CostArm, _marks, verdicts
from fedloom.runs.comparison import compare, read_comparison
from fedloom.settings.toml import write_toml
from fedloom.statistics.intervals import Interval


def arm(name, framework, accuracy, sent, flops, scenario="one", memory=1.0, higher=True):
    sure = Interval(accuracy, None, None, 1, "seeds")
    return CostArm(
        scenario=scenario,
        name=name,
        higher_is_better=higher,
        values={0: accuracy},
        sent=sent,
        flops=flops,
        baseline=framework == "Local only",
        framework=framework,
        over_rows=sure,
        over_seeds=sure,
        clients=None,
        down=sent,
        up=0.0,
        expected=sent,
        deviation=0.0,
        server_flops=0.0,
        memory=memory,
        process=0.0,
        seconds={"slow": sent},
    )


ARMS = [
    arm("lora", "FedLLM", 0.8, 100, 50),
    arm("lora small", "FedLLM", 0.7, 40, 45),
    arm("logits", "KD-FedLLM", 0.6, 10, 90),
    arm("split", "Split-FedLLM", 0.75, 900, 10),
    arm("split costly", "Split-FedLLM", 0.74, 950, 11),
    arm("alone", "Local only", 0.9, 0, 1),
]


def test_the_front_is_what_nobody_beats_in_both():
    marks = {a.name: _marks(a, ARMS) for a in ARMS}
    by_bytes = [name for name, own in marks.items() if own["front_bytes"]]
    assert by_bytes == ["lora", "lora small", "logits"]
    by_flops = [name for name, own in marks.items() if own["front_flops"]]
    assert by_flops == ["lora", "split"]  # the baseline is better and cheaper, and is no rival


def test_who_is_better_for_the_same_cost_is_on_the_front_alone():
    low, high = arm("a", "FedLLM", 0.6, 10, 1), arm("b", "FedLLM", 0.7, 10, 1)
    assert [on_front(a, [low, high], lambda x: x.sent) for a in (low, high)] == [False, True]
    elsewhere = arm("c", "FedLLM", 0.9, 1, 1, scenario="two")
    assert on_front(high, [low, high, elsewhere], lambda x: x.sent)


def test_wins_are_counted_at_the_most_accurate_arm():
    rows = {row["framework"]: row for row in verdicts(ARMS)}
    assert rows.keys() == {"FedLLM", "KD-FedLLM", "Split-FedLLM"}
    assert rows["FedLLM"]["wins"]["has the best mean"] == 1
    assert rows["KD-FedLLM"]["wins"]["sends the least"] == 1
    assert rows["KD-FedLLM"]["wins"]["has the shortest round on slow"] == 1
    assert rows["Split-FedLLM"]["wins"]["computes the least on clients"] == 1
    assert "Of 1 scenario, it has the best mean in 1; " in rows["FedLLM"]["text"]


def test_a_loss_is_better_where_it_is_lower():
    low, high = (arm("a", "FedLLM", value, 10, 1, higher=False) for value in (0.2, 0.7))
    assert on_front(low, [low, high], lambda x: x.sent)
    assert not on_front(high, [low, high], lambda x: x.sent)


@pytest.fixture
def comparison_file(table, tmp_path):
    def write(compare=None, **sections):
        own = {k: v for k, v in table.items() if k != "output"}
        own |= {
            "data": {"source": "builtin:labelled", "builtin_rows": 90},
            "objective": {"name": "classification"},
            "public": {"rows": 12},
            "evaluation": {"per_client": False},
            "compare": {
                "budget": "as_set",
                "seeds": [0, 1],
                "scenarios": {
                    "few": {"federation": {"clients": 2}},
                    "more": {"federation": {"clients": 3}},
                },
                "methods": {
                    "lora": {"method": {"name": "fedavg"}},
                    "logits": {"method": {"name": "distillation"}},
                    "split": {"method": {"name": "split"}},
                    "alone": {"method": {"name": "local_only"}},
                },
                "links": {"slow": {"uplink": "1Mbit"}},
                **(compare or {}),
            },
            **sections,
        }
        path = tmp_path / "frameworks.toml"
        path.write_text(write_toml(own))
        return path

    return write


@pytest.mark.slow
def test_a_grid_to_its_page(comparison_file, tmp_path):
    comparison = read_comparison(comparison_file())
    assert len(comparison.grid_runs) == 16
    folder = compare(comparison, tmp_path / "out", workers=1)
    page = write_comparison(folder).read_text()
    found = json.loads((folder / "results.json").read_text())
    assert len(found["arms"]) == 8 and found["metric"] == "accuracy"
    for row in found["arms"]:
        assert len(row["values"]) == 2
        assert abs(row["down"] + row["up"] - row["expected"]) <= 0.001 * row["expected"] + 1024
        assert row["seconds"]["slow"] > 0 and row["memory"] > 0 and row["process"] > row["memory"]
        frameworks = {
            "lora": "FedLLM",
            "logits": "KD-FedLLM",
            "split": "Split-FedLLM",
            "alone": "Local only",
        }
        assert row["framework"] == frameworks[row["name"]]
        assert (row["clients"] is not None) == (row["name"] == "logits")
    split, lora = (next(r for r in found["arms"] if r["name"] == n) for n in ("split", "lora"))
    assert split["flops"] < lora["flops"] and split["memory"] < lora["memory"]
    assert split["server_flops"] > 0 and lora["server_flops"] == 0
    for text in ("KD-FedLLM", "Where each framework wins", "closed form", "1 Mbit/s", "<svg"):
        assert text in page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scenarios": {}}, "needs objectives or scenarios"),
        ({"objectives": {"a": {}}}, "one of the two"),
        (
            {"links": {"x": {"uplink": "quick"}}},
            "compare.links.x.uplink: 'quick' is not a quantity",
        ),
        ({"links": {"x": {"speed": "3MB"}}}, "compare.links.x.speed"),
    ],
)
def test_what_cannot_be_compared_is_said(comparison_file, change, words):
    with pytest.raises(SettingsError, match=words):
        read_comparison(comparison_file(change))
