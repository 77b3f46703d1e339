"""The trace of a run: fields that Perfetto reads, spans that nest, bounded size, and the same results."""

import json

import fedloom
from fedloom.runs import profiling
from fedloom.runs.observers import Silent
from fedloom.runs.profiling import CLIENTS, SERVER, Profile
from fedloom.runs.run import resume_run, run_experiment


def spans(trace, track):
    """Spans of ours on one track, in the order in which they begin, longest first."""
    own = [event for event in trace["traceEvents"] if event.get("cat") == "fedloom"]
    return sorted((e for e in own if e["tid"] == track), key=lambda e: (e["ts"], -e["dur"]))


def within(events):
    """Whether each event lies in the one before it that is not over, to a rounding of the clock."""
    open_ = []
    for event in events:
        while open_ and open_[-1] <= event["ts"] + 1e-3:
            open_.pop()
        end = event["ts"] + event["dur"]
        if open_ and end > open_[-1] + 1e-3:
            return False
        open_.append(end)
    return True


def test_a_profiled_run_leaves_a_trace_and_the_same_adapter(experiment, tmp_path):
    def weights(folder):
        return (folder / "adapter/adapter_model.safetensors").read_bytes()

    plain = fedloom.run(experiment(output={"folder": str(tmp_path / "plain")}))
    run = run_experiment(experiment(), observer=Silent(), profile=True)
    assert weights(run.folder) == weights(plain.folder)
    assert not list(plain.folder.glob("trace*"))
    trace = json.loads((run.folder / "trace-0000.json").read_text())
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str) and "pid" in event
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0 and "tid" in event
    server, clients = spans(trace, SERVER), spans(trace, CLIENTS)
    assert within(server) and within(clients)
    names = [event["name"] for event in server]
    assert [n for n in names if n.startswith("round")] == ["round 1", "round 2"]
    assert names.count("evaluation") == names.count("records") == 3
    assert names.count("checkpoint") == 3 and names.count("aggregation") == 2
    assert [e["name"] for e in clients if e["args"].get("action") == "train"] == [
        f"client {client}" for client in (0, 1, 2) * 2
    ]
    steps = [event for event in clients if event["name"] == "step"]
    costs = [json.loads(line) for line in (run.folder / "costs.jsonl").read_text().splitlines()]
    assert len(steps) == sum(cost["steps"] for cost in costs) == trace["otherData"]["steps"]
    operators = [e for e in trace["traceEvents"] if e.get("cat") == "cpu_op"]
    assert trace["otherData"]["steps_by_operator"] == profiling.OPERATORS_OF
    assert any(event["name"] == "aten::mm" for event in operators)
    before, last = (
        steps[profiling.WARM_UP - 1],
        steps[profiling.WARM_UP + profiling.OPERATORS_OF - 1],
    )
    near = 5_000  # microseconds by which two clocks are put together
    begin, end = (step["ts"] + step["dur"] for step in (before, last))
    assert all(begin - near < event["ts"] < end + near for event in operators)


def test_a_resumed_run_has_a_trace_of_its_own(experiment, tmp_path):
    path = fedloom.run(experiment()).folder
    resume_run(path, from_round=1, profile=True)
    trace = json.loads((path / "trace-0002.json").read_text())
    assert [e["name"] for e in spans(trace, SERVER) if e["name"][:5] == "round"] == ["round 2"]


def test_a_trace_is_bounded_and_counts_what_it_leaves_out(monkeypatch, tmp_path):
    monkeypatch.setattr(profiling, "MOST_SPANS", 2)
    profile = Profile(tmp_path / "trace.json")
    for number in range(5):
        with profile.span("round", round=number):
            pass
    trace = profile.trace()
    assert len(spans(trace, SERVER)) == 2 and trace["otherData"]["spans_left_out"] == 3


def test_between_machines_there_is_no_profile(call):
    code, said = call("run", "x.toml", "--engine", "flower", "--profile")
    assert code == 2 and "--profile is of a simulation" in said
