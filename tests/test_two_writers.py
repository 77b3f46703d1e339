"""Two processes on one folder at random moments: exactly one writes, and what is left is whole."""

import json
import multiprocessing
import time
import traceback

import pytest
import tomli_w

from fedloom.errors import OutputError
from fedloom.experiment.experiment import Experiment
from fedloom.reports import record_marks
from fedloom.runs.comparison import compare, read_comparison
from fedloom.runs.observers import Silent
from fedloom.runs.run import resume_run, run_experiment
from fedloom.security.audit_log import events, verify
from fedloom.storage.run_folder import RunFolder
from sampling import drawn, tries

TOTALS = ("bytes_up", "bytes_down", "flops", "examples", "tokens", "targets", "steps")
"""Of a run, what is counted and not measured."""

REFUSED = ("is being written by process", "is not empty", "no run was begun", "no run folder")
"""What who comes second is told."""


def play(path, folder, kind, told):
    """Begin a run in a folder, or go on with the one in it; send what came of it."""
    try:
        if kind == "resume":
            resume_run(folder, observer=Silent())
        elif kind == "run":
            run_experiment(Experiment.from_toml(path), observer=Silent())
        else:
            compare(read_comparison(path), folder, workers=1)
        told.send("ended")
    except OutputError as error:
        told.send(str(error))
    except BaseException:
        told.send(traceback.format_exc())


@pytest.fixture
def begin():
    """Start a process that plays; what is returned is it and how it is heard."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_two_writers", "fedloom.runs.assembly"])
    started = []

    def make(path, folder, kind):
        hears, tells = context.Pipe(duplex=False)
        child = context.Process(target=play, args=(path, folder, kind, tells))
        child.start()
        tells.close()
        started.append(child)
        return child, hears

    yield make
    for child in started:
        child.kill()
        child.join()


def heard(child, hears):
    """What came of a process: its words, or "killed"."""
    try:
        said = hears.recv()
    except EOFError:
        said = "killed"
    child.join()
    hears.close()
    return said


def left(folder):
    """What must be the same however a run came about."""
    summary = json.loads((folder / "summary.json").read_text())
    states = {event["round"]: event["state"] for event in events(folder, "round")}
    totals = {name: summary["totals"][name] for name in TOTALS}
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    weights = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    return weights, states, totals, [json.loads(line)["round"] for line in lines]


@pytest.mark.parametrize("count", tries(2, 20))
def test_two_processes_on_one_folder_at_random_moments(experiment, begin, tmp_path, count):
    """Starts, resumes and kills; who is refused says so, and the totals are those of a run left alone."""

    def made(name):
        table = {
            "method": {"name": "scaffold"},
            "federation": {"clients": 2, "rounds": 4},
            "training": {"local_steps": 1},
            "evaluation": {"samples": 0, "max_examples": 2},
            "output": {"folder": str(tmp_path / name)},
        }
        path = tmp_path / f"{name}.toml"
        path.write_text(experiment(**table).to_toml())
        return path, tmp_path / name

    for name in ("first", "quiet"):  # the first loads what others find loaded
        start = time.perf_counter()
        assert heard(*begin(*made(name), "run")) == "ended"
        whole = time.perf_counter() - start
    expected, rng, told = left(tmp_path / "quiet"), drawn("two writers"), []
    for number in range(count):
        path, folder = made(str(number))
        ended = []
        while "ended" not in ended:
            pair = []
            for _ in range(2):
                kind = "resume" if (folder / "experiment.toml").exists() else "run"
                pair.append(begin(path, folder, kind))
                time.sleep(rng.uniform(0, whole / 2))
            if rng.random() < 0.4:
                rng.choice(pair)[0].kill()
            ended = [heard(*own) for own in pair]
            told += ended
            others = [said for said in ended if said not in ("ended", "killed")]
            assert all(any(word in said for word in REFUSED) for said in others), others
            assert len(others) < 2, others  # one of two writes, whatever becomes of it
        assert left(folder) == expected, folder
        assert record_marks.doubts(RunFolder(folder)) == []
        verify(folder)
    print(f"{count} folders: {told.count('ended')} ended, {told.count('killed')} killed, "
          f"{sum('is being written' in said for said in told)} refused at work, of {len(told)}")  # fmt: skip


@pytest.mark.parametrize("count", tries(1, 5))
def test_two_comparisons_in_one_folder_at_random_moments(table, begin, tmp_path, count):
    table["data"]["builtin_rows"] = 30
    table |= {"evaluation": {"samples": 0, "per_client": False}, "output": {}}
    table["compare"] = {"budget": "steps", "amount": 1, "seeds": [0, 1], "objectives": ["dpo"]}
    path, rng = tmp_path / "two.toml", drawn("two comparisons")
    path.write_text(tomli_w.dumps(table))
    for number in range(count):
        folder = tmp_path / str(number)
        pair = []
        for _ in range(2):
            pair.append(begin(path, folder, "compare"))
            time.sleep(rng.uniform(0, 1.0))
        said = sorted(heard(*own) for own in pair)
        written = [path.stat().st_mtime_ns for path in sorted(folder.glob("runs/*/summary.json"))]
        assert len(written) == 2
        if said != ["ended", "ended"]:  # the second came after the first had ended, and did nothing
            assert said[0] == "ended" or "is being written by" in said[0], said
            assert "ended" in said, "; ".join(said)
        for run in folder.glob("runs/*"):
            assert record_marks.doubts(RunFolder(run)) == []
            assert [event["after"] for event in events(run, "began")] == [-1]
