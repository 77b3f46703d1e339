"""The live page's state: from records alone, each line once, and all again where they were cut back."""

import json

import pytest

from fedloom.errors import OutputError
from fedloom.reports import live_run
from fedloom.reports.live_run import LiveRun, Tail
from live_records import append, begin, record


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(live_run, "PAUSE", 0.0)


def test_of_a_growing_file_only_whole_new_lines_are_read(tmp_path):
    path = tmp_path / "lines.jsonl"
    tail = Tail(path)
    assert tail.read() == [] and tail.is_same()  # not there yet
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert tail.read() == [{"a": 1}, {"a": 2}]
    assert tail.read() == []  # the last line is not whole
    with path.open("a") as file:
        file.write(": 3}\n")
    assert tail.is_same() and tail.read() == [{"a": 3}]
    path.write_text('{"a": 1}\n{"a": 5}\n{"a": 3}\n')  # as long as before, another line
    assert not tail.is_same()
    path.write_text('{"a": 1}\n')
    assert not tail.is_same()


@pytest.mark.parametrize("line", ["not json", "[1]", "[" * 100_000, '"\\ud800"'])
def test_a_line_that_is_no_record_is_told(tmp_path, line):
    folder = begin(tmp_path / "run")
    (folder.path / "rounds.jsonl").write_text(line + "\n")
    state = LiveRun(folder.path).state()
    assert "rounds.jsonl has a line that is no record" in state["problem"]
    assert state["rows"] == []


def test_a_record_that_lacks_something_is_told_and_no_traceback(tmp_path):
    folder = begin(tmp_path / "run")
    folder.append("rounds.jsonl", [{"round": 0}])
    assert "a record is not what a run writes" in LiveRun(folder.path).state()["problem"]


def test_what_follows_such_a_record_is_not_shown_and_the_problem_stays(tmp_path):
    folder = begin(tmp_path / "run")
    append(folder, 0, {0: 0.5})
    folder.append("rounds.jsonl", [{"round": 1}, record(2, {0: 0.7})])
    live = LiveRun(folder.path)
    first = live.state()
    append(folder, 3, {0: 0.8})
    for state in (first, live.state()):
        assert "'absent'" in state["problem"] and "nothing after it" in state["problem"]
        assert [row["round"] for row in state["rows"]] == [0]
    (folder.path / "rounds.jsonl").write_text("")  # the run is begun anew
    append(folder, 0, {0: 0.6})
    state = live.state()
    assert (state["problem"], [row["value"] for row in state["rows"]]) == ("", [0.6])


@pytest.mark.parametrize(
    "changed", [{"metric": None}, {"metric": "accuracy"}, {"model": {}}, {"model": "tiny"}]
)
def test_a_run_that_does_not_say_what_it_is_is_told(tmp_path, changed):
    folder = begin(tmp_path / "run")
    append(folder, 0, {0: 0.5})
    folder.write_json("run.json", {**folder.read_json("run.json"), **changed})
    live = LiveRun(folder.path)
    for _ in range(2):
        state = live.state()
        assert "a record is not what a run writes" in state["problem"] and "rows" not in state
    folder.write_json("run.json", {})
    assert "KeyError('metric')" in live.state()["problem"]


def test_totals_and_clients_are_those_of_the_records(tmp_path):
    folder = begin(tmp_path / "run", clients=3, members=[{"client": 1, "name": "north\x1b[31m"}])
    append(folder, 0, {0: 0.5, 1: 0.5, 2: 0.5})
    append(folder, 1, {0: 0.4, 1: 0.6, 2: 0.8})
    live = LiveRun(folder.path)
    state = live.state()
    assert (state["status"], state["round"], state["rounds"]) == ("stopped", 1, 10)
    assert (state["before"], state["now"], state["seconds"]) == (0.5, pytest.approx(0.6), 4.0)
    assert (state["down"], state["up"]) == (300, 30)  # three clients, 100 down and 10 up each
    assert state["left"] is None  # nobody is working on it
    row = state["rows"][1]
    # of 0.4, 0.6, 0.8: the lower tenth lies 0.2 of the way from 0.4 to 0.6
    assert row["clients"] == pytest.approx([0.4, 0.44, 0.6, 0.76, 0.8])
    assert (row["low"], row["high"]) == (pytest.approx(0.5), pytest.approx(0.7))
    assert row["worst_tenth"] == 0.4 and row["loss"] == pytest.approx(0.4)
    assert state["clients"][1][:4] == [1, "north\\x1b[31m", "present", 1]
    assert state["clients"][1][4:7] == [0.6, pytest.approx(0.4), 110]
    assert live.curves([2, 2, 99]) == {
        "2": {"metric": [(0, 0.5), (1, 0.8)], "loss": [(1, pytest.approx(0.2))]}
    }


def test_while_a_run_is_written_the_time_left_is_that_of_its_rounds(tmp_path):
    folder = begin(tmp_path / "run", rounds=10)
    append(folder, 0, {0: 0.5}, seconds=50.0)
    append(folder, 1, {0: 0.5}, seconds=2.0)
    append(folder, 2, {0: 0.5}, seconds=4.0)
    with folder.locked():
        state = LiveRun(folder.path).state()
    assert state["status"] == "running"
    assert state["left"] == 3.0 * 8  # the mean of trained rounds, for rounds 3 to 10
    folder.write_json("summary.json", {})
    assert LiveRun(folder.path).state()["status"] == "finished"


def test_a_page_gets_only_what_it_has_not(tmp_path):
    folder = begin(tmp_path / "run")
    append(folder, 0, {0: 0.5})
    live = LiveRun(folder.path)
    first = live.state()
    again = live.state(first["generation"], 1)
    assert (again["from"], again["rows"]) == (1, []) and "clients" not in again
    append(folder, 1, {0: 0.6})
    new = live.state(first["generation"], 1)
    assert [row["round"] for row in new["rows"]] == [1] and "clients" in new
    for generation, start in (("another", 1), (first["generation"], 99)):
        assert [row["round"] for row in live.state(generation, start)["rows"]] == [0, 1]


def test_after_a_cut_back_a_page_begins_anew(tmp_path):
    """A run is killed after round 2 was recorded, and resumed from the checkpoint of round 1."""
    folder = begin(tmp_path / "run")
    for number in range(3):
        append(folder, number, {0: 0.5 + number / 10})
    live = LiveRun(folder.path)
    before = live.state()
    for name, kept in (("rounds.jsonl", 2), ("costs.jsonl", 1)):
        lines = (folder.path / name).read_text().splitlines(keepends=True)
        (folder.path / name).write_text("".join(lines[:kept]))
    append(folder, 2, {0: 0.9})
    after = live.state(before["generation"], 3)
    assert after["generation"] != before["generation"]
    assert (after["from"], [row["value"] for row in after["rows"]]) == (0, [0.5, 0.6, 0.9])
    assert after["up"] == before["up"] == 20  # nothing counts twice


def test_who_is_missing_or_refused_is_there_with_the_reason(tmp_path):
    folder = begin(tmp_path / "run", clients=4)
    why = "<script>alert(1)</script>\n" + "x" * 500
    gone = {"client": 1, "name": "client 1", "since": "2026-01-01", "reason": "no connection"}
    append(folder, 0, {0: 0.5})
    append(
        folder,
        1,
        {0: 0.5, 2: 0.5},
        rejected=[{"client": 2, "name": "client 2", "reason": why}],
        offences=[{"client": 2, "kind": "not_finite", "reason": "NaN", "count": 1}],
        absent=[gone],
    )
    append(folder, 2, {0: 0.5}, absent=[gone], paused={"2": 3})
    state = LiveRun(folder.path).state()
    assert state["counts"] == {"present": 2, "absent": 1, "in quarantine": 1}
    assert state["refused"] == 1
    found = [(event["round"], event["client"], event["what"]) for event in state["events"]]
    assert found == [  # the newest first, and who stays away once
        (2, 2, "in quarantine"),
        (1, 2, "violation: not finite"),
        (1, 2, "answer left out"),
        (1, 1, "absent"),
    ]
    reason = state["events"][2]["reason"]
    assert reason.startswith("<script>alert(1)</script> x") and len(reason) <= live_run.LONGEST
    assert state["clients"][1][2] == "absent" and state["clients"][1][8] == "no connection"
    assert json.loads(json.dumps(state, allow_nan=False)) == state


def test_of_many_refusals_the_newest_are_listed_and_the_others_counted(tmp_path):
    folder = begin(tmp_path / "run", clients=1)
    left_out = [{"client": 0, "name": "", "reason": str(number)} for number in range(250)]
    folder.append("rounds.jsonl", [record(1, {0: 0.5}, rejected=left_out)])
    state = LiveRun(folder.path).state()
    assert [event["reason"] for event in state["events"]][:2] == ["249", "248"]
    assert (len(state["events"]), state["more_events"], state["refused"]) == (200, 50, 250)


def test_a_run_that_has_written_nothing_yet_is_waited_for(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "experiment.toml").write_text("[federation]\nrounds = 1\n")
    live = LiveRun(path)
    assert "rows" not in live.state()
    begin(tmp_path / "other")
    (tmp_path / "other/run.json").rename(path / "run.json")
    assert live.state()["rows"] == []


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(OutputError, match="is not a run folder"):
        LiveRun(tmp_path)
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(OutputError, match="watch one of its runs"):
        LiveRun(tmp_path)
