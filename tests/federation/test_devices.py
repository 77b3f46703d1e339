"""Devices of simulated clients: what is drawn, what a trace says, and every mistake in one."""

import json

import numpy as np
import pytest

from fedloom.accounting.network import Link
from fedloom.errors import DataError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.federation.devices import (
    Availability,
    DevicesSettings,
    Distribution,
    devices_of,
    trace_digest,
)


def settings(**own):
    return DevicesSettings(**own)


def test_a_number_or_a_text_is_the_same_for_all():
    found = devices_of(settings(flops="2GFLOP", up="8Mbit", down=1e7, latency="40ms"), 3, seed=0)
    assert {own.link for own in found.values()} == {Link(8e6, 1e7, 0.04, 2e9)}
    assert {own.dropout for own in found.values()} == {0.0}


def test_draws_are_by_seed_and_client_alone():
    drawn = settings(flops={"kind": "lognormal", "median": 1e9, "sigma": 1.0})
    few, many = devices_of(drawn, 3, seed=1), devices_of(drawn, 300, seed=1)
    assert all(few[client] == many[client] for client in few)
    assert few != devices_of(drawn, 3, seed=2)
    speeds = np.log([own.link.speed for own in many.values()])
    assert speeds.mean() == pytest.approx(np.log(1e9), abs=0.2)
    assert speeds.std() == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("kind", ["uniform", "loguniform"])
def test_bounded_distributions_stay_in_their_bounds(kind):
    rng, own = np.random.default_rng(0), Distribution(kind=kind, low=10.0, high=1000.0)
    drawn = [own.draw(rng) for _ in range(2000)]
    assert 10 <= min(drawn) < 20 and 900 < max(drawn) <= 1000
    assert np.median(drawn) == pytest.approx(505 if kind == "uniform" else 100, rel=0.15)


def test_windows_of_a_share_begin_anywhere_and_return():
    found = devices_of(settings(available={"period": 100.0, "share": 0.25}), 40, seed=0)
    for own in found.values():
        there = [own.available.until(t) > t for t in np.arange(1000, 1400, 1.0)]
        assert sum(there) == pytest.approx(100, abs=4)
    begins = sorted(own.available.next(own.available.until(1000.0)) % 100 for own in found.values())
    assert begins[0] < 20 and begins[-1] > 80


def test_times_of_a_window_by_hand():
    own = Availability(((20.0, 30.0), (80.0, 115.0)), 100.0)  # the second goes on after the period
    assert [own.until(t) for t in (20, 29, 30, 79, 85, 105, 115)] == [30, 30, 30, 79, 115, 115, 115]
    assert [own.next(t) for t in (0, 25, 30, 115, 125)] == [0, 25, 80, 120, 125]
    once = Availability(((10.0, 30.0),))
    assert [once.next(t) for t in (0, 20, 30)] == [10, 20, None]
    assert Availability().next(5.0) == 5.0


def test_a_trace_says_what_it_has_columns_for(tmp_path):
    path = tmp_path / "devices.csv"
    path.write_text("client,flops,available\n1,2e9,0-50 60-90\n0,1e9,0-100\n")
    found = devices_of(settings(trace=str(path), up="8Mbit"), 2, seed=0)
    assert [found[client].link.speed for client in (0, 1)] == [1e9, 2e9]
    assert found[1].available.windows == ((0, 50), (60, 90)) and found[1].link.uplink == 8e6
    same = tmp_path / "devices.jsonl"
    rows = [
        {"client": 0, "flops": 1e9, "available": [[0, 100]]},
        {"client": 1, "flops": 2e9, "available": [[0, 50], [60, 90]]},
    ]
    same.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert devices_of(settings(trace=str(same), up="8Mbit"), 2, seed=0) == found
    assert trace_digest(settings(trace=str(path))) != trace_digest(settings(trace=str(same)))


def test_all_mistakes_of_a_trace_are_told_at_once_with_line_and_value(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text(
        "client,flops,up,dropout,available\n"
        "0,1e9,-5,0,0-10\n"
        "1,,1e6,0,0-10\n"
        "9,1e9,1e6,2,0-10\n"
        "0,fast,1e6,0,10-5\n"
        "2,1e9,nan,0,5-20 10-30\n"
        "3,1e9\n"
    )
    with pytest.raises(SettingsError) as caught:
        devices_of(settings(trace=str(path)), 3, seed=0)
    assert caught.value.problems == (
        "line 2: up = '-5': must be above 0",
        "line 3: flops is missing, and the trace has a column flops: give it a value",
        "line 4: dropout = '2': must be at least 0 and at most 1",
        "line 4: client = 9: there are 3 clients, 0 to 2",
        "line 5: flops = 'fast' is no number",
        "line 5: available = '10-5': windows begin at 0 or later and end after they begin",
        "line 5: client = 0 stands in line 2 already",
        "line 6: up = 'nan': must be above 0",
        "line 6: available = '5-20 10-30': windows must be ascending and must not overlap",
        "line 7: 2 cells, the header has 5",
    )
    assert "bad.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"client": 0}\n{"client": 2}\n', "1 of 3 clients have no line: 1"),
        ('{"client": 0, "up": 1}\n{"client": 1}\n', "line 2: up is missing"),
        ('{"client": 0, "upp": 1}\n', "line 1: column 'upp': did you mean 'up'"),
        ('{"client": true}\n', "line 1: client = True"),
        ("[1]\n", "line 1: must be an object"),
        ("{\n", "line 1: no JSON"),
        ('{"client": 0, "period": 5}\n', "the column period needs a column available"),
        (
            '{"client": 0, "available": [[0, 9]], "period": 5}\n',
            "period = 5: its windows take longer, up to 9",
        ),
        ('{"client": 0, "available": "morning"}\n', "are no windows in seconds"),
    ],
)
def test_gaps_and_what_is_no_trace(tmp_path, text, words):
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(SettingsError) as caught:
        devices_of(settings(trace=str(path)), 3, seed=0)
    assert any(words in problem for problem in caught.value.problems), caught.value.problems


def test_a_trace_that_is_not_there_or_no_file(tmp_path):
    with pytest.raises(DataError, match="not found"):
        devices_of(settings(trace=str(tmp_path / "none.csv")), 3, seed=0)
    with pytest.raises(SettingsError, match="is a folder"):
        devices_of(settings(trace=str(tmp_path)), 3, seed=0)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (
            {"flops": -1.0},
            "simulation.devices.flops.value = -1.0: must be greater than or equal to 0",
        ),
        ({"up": 0}, "simulation.devices.up = 0: a rate must be above 0"),
        ({"up": "fast"}, "'fast' is not a quantity above 0 in bit; write it like 10Mbit"),
        ({"flops": {"kind": "uniform", "low": 1.0}}, 'kind = "uniform" takes low and high'),
        ({"flops": {"kind": "uniform", "low": 2.0, "high": 1.0}}, "low = 2 is above high = 1"),
        ({"flops": {"kind": "normal"}}, "simulation.devices.flops.kind = 'normal'"),
        ({"dropout": 1.5}, "must be a probability from 0 to 1"),
        ({"available": {"share": 0}}, "simulation.devices.available.share = 0"),
        ({"wind": 1}, "simulation.devices.wind: unknown key"),
    ],
)
def test_settings_that_make_no_sense_are_one_line_each(own, words):
    with pytest.raises(SettingsError) as caught:
        Experiment.from_table({"simulation": {"devices": own}})
    assert len(caught.value.problems) == 1 and words in caught.value.problems[0], caught.value


def test_what_needs_a_clock_says_so():
    with pytest.raises(SettingsError, match=r"federation.extra = 2 .* add \[simulation.devices\]"):
        Experiment.from_table({"federation": {"extra": 2, "clients_per_round": 3}})
    with pytest.raises(SettingsError, match="a round takes 8 of 8 clients, which leaves 0"):
        Experiment.from_table({"federation": {"extra": 2}, "simulation": {"devices": {}}})


def test_it_is_written_back_as_it_was_read():
    table = {"simulation": {"devices": {"up": "8Mbit", "available": {"share": 0.5}}}}
    own = Experiment.from_table(table)
    import tomllib

    assert Experiment.from_table(tomllib.loads(own.to_toml())) == own
    assert Experiment.from_table(tomllib.loads(own.to_toml(defaults=False))) == own
