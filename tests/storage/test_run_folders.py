"""Run folders that cannot lie: one writer at a time, records that are what was written, nothing begun unasked."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import fedloom
from fedloom.errors import AuditError, CheckpointError, Interrupted, OutputError
from fedloom.objectives.dpo import DPO
from fedloom.reports import record_marks
from fedloom.reports.doubts import doubts_of
from fedloom.reports.run_data import read_run
from fedloom.reports.run_page import write_report
from fedloom.runs.forget import forget_client
from fedloom.runs.observers import Silent
from fedloom.runs.run import resume_run
from fedloom.storage.run_folder import RunFolder
from observers import Heard


class Broken(Silent):
    """Ends a run after a round, as the user does."""

    def __init__(self, after):
        self.after = after

    def round_done(self, record):
        if record.round == self.after:
            raise KeyboardInterrupt


@pytest.fixture
def stopped(experiment, once, tmp_path_factory):
    """The folder of a run of four rounds that was stopped after two, and what came of a whole one."""

    def make():
        place = tmp_path_factory.mktemp("stopped")
        settings = {"federation": {"rounds": 4}, "evaluation": {"samples": 0}}
        outputs = ({"folder": str(place / name)} for name in ("whole", "run"))
        whole, broken = (experiment(**settings, output=own) for own in outputs)
        result = fedloom.run(whole)
        with pytest.raises(Interrupted):
            fedloom.run(broken, observer=Broken(2))
        return place / "run", result

    return once("stopped", make)


def lines(path):
    return path.read_text().splitlines(keepends=True)


def put(path, content):
    path.write_text("".join(content))


DAMAGES = {
    "costs: half a line": lambda run: put(
        run / "costs.jsonl", (run / "costs.jsonl").read_text()[:-9]
    ),
    "costs: a repeated line": lambda run: put(
        run / "costs.jsonl", [lines(run / "costs.jsonl")[0], *lines(run / "costs.jsonl")]
    ),
    "costs: a missing line": lambda run: put(run / "costs.jsonl", lines(run / "costs.jsonl")[1:]),
    "costs: missing": lambda run: (run / "costs.jsonl").unlink(),
    "rounds: half a line": lambda run: put(
        run / "rounds.jsonl", (run / "rounds.jsonl").read_text()[:-5]
    ),
    "rounds: a repeated line": lambda run: put(
        run / "rounds.jsonl", [lines(run / "rounds.jsonl")[1], *lines(run / "rounds.jsonl")[1:]]
    ),
    "rounds: another number": lambda run: put(
        run / "rounds.jsonl", (run / "rounds.jsonl").read_text().replace('"round": 1', '"round": 7')
    ),
    "rounds: missing": lambda run: (run / "rounds.jsonl").unlink(),
    "partition: changed": lambda run: put(
        run / "partition.json",
        (run / "partition.json").read_text().replace('"train": ', '"train": 1'),
    ),
    "partition: missing": lambda run: (run / "partition.json").unlink(),
    "run: half": lambda run: put(run / "run.json", (run / "run.json").read_text()[:200]),
    "audit: a changed line": lambda run: put(
        run / "audit.jsonl", (run / "audit.jsonl").read_text().replace('"after": -1', '"after": -2')
    ),
    "audit: its last lines missing": lambda run: put(
        run / "audit.jsonl", lines(run / "audit.jsonl")[:3]
    ),
    "audit: missing": lambda run: (run / "audit.jsonl").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_stops_a_resume_and_is_named(stopped, tmp_path, damage):
    run = shutil.copytree(stopped[0], tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    DAMAGES[damage](run)
    damaged = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert damaged != before
    with pytest.raises((CheckpointError, AuditError, OutputError)) as refused:
        resume_run(run)
    assert damage.partition(":")[0] + ".json" in str(refused.value)
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert {**after, ".lock": b""} == {**damaged, ".lock": b""}  # nothing was written


def test_lines_beyond_the_checkpoint_are_cut_off_and_the_totals_are_those_of_a_whole_run(
    stopped, tmp_path
):
    run, whole = shutil.copytree(stopped[0], tmp_path / "run"), stopped[1]
    for name in ("rounds.jsonl", "costs.jsonl"):
        last = lines(run / name)[-1].replace('"round": 2', '"round": 3')
        with (run / name).open("a") as file:
            file.write(last + last[:20])
    said = Heard()
    result = resume_run(run, observer=said)
    told = "cut off, as these rounds are run again: 2 lines of rounds.jsonl, 2 lines of costs.jsonl"
    assert told in said.stages and "continuing after round 2 of 4" in said.stages
    for name in ("bytes_up", "bytes_down", "flops", "examples", "tokens", "targets", "steps"):
        assert result.costs[name] == whole.costs[name]
    assert result.metrics == whole.metrics


def test_two_processes_do_not_write_into_one_folder(stopped, tmp_path, experiment):
    run = shutil.copytree(stopped[0], tmp_path / "run")
    code = (
        "import sys; from pathlib import Path; from fedloom.storage.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).locked(): print('there', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(run)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "there\n"
            said = rf"is being written by process {other.pid} on {socket.gethostname()}, since 20"
            with pytest.raises(OutputError, match=said):
                resume_run(run)
            with pytest.raises(OutputError, match=said):
                forget_client(run, 0)
        finally:
            other.kill()  # its lock is stale then, and stops nobody
    resume_run(run)


def test_two_runs_that_begin_at_once_have_two_folders(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    free = iter([tmp_path / "a", tmp_path / "b"])
    monkeypatch.setattr("fedloom.runs.new_folder.free_folder", lambda built: next(free))
    (tmp_path / "a").mkdir()  # by another run, between the look and the making
    assert fedloom.run(experiment(output={"folder": None})).folder == tmp_path / "b"


def test_a_folder_with_an_experiment_alone_is_no_run(experiment, tmp_path):
    (tmp_path / "experiment.toml").write_text(experiment().to_toml())
    with pytest.raises(
        OutputError, match=r"no run was begun in .*, it holds experiment\.toml alone"
    ):
        resume_run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["experiment.toml"]


def test_a_run_that_has_ended_says_so(experiment, stopped, tmp_path):
    run = shutil.copytree(stopped[1].folder, tmp_path / "run")
    said = Heard()
    resume_run(run, observer=said)
    assert "round 4 was the last: the final files are written again" in said.stages
    assert not any("continuing" in text for text in said.stages)


def test_whose_settings_count_is_said(stopped, tmp_path):
    run = shutil.copytree(stopped[1].folder, tmp_path / "run")
    other = shutil.copy(run / "experiment.toml", tmp_path / "other.toml")
    said = Heard()
    resume_run(run, other, observer=said)
    assert any(
        f"{other} has the same, but for its [output], which is not used" in s for s in said.stages
    )


def test_other_versions_are_told_and_recorded(stopped, tmp_path, monkeypatch):
    run = shutil.copytree(stopped[0], tmp_path / "run")
    real = fedloom.runs.run.versions()
    now = {**real, "torch": "9.9", "fedloom": "7"}
    monkeypatch.setattr("fedloom.runs.run.versions", lambda: now)
    monkeypatch.setattr("fedloom.runs.resume_checks.versions", lambda: now)
    said = Heard()
    resume_run(run, observer=said)
    [warning] = [text for text in said.warnings if "versions" in text]
    assert f"torch 9.9 (it was {real['torch']})" in warning
    assert f"fedloom 7 (it was {real['fedloom']})" in warning and "peft" not in warning
    began = [json.loads(line) for line in lines(run / "audit.jsonl") if '"began"' in line]
    assert [event["versions"]["torch"] for event in began] == [real["torch"], "9.9"]
    [shown] = [text for text in doubts_of(read_run(run)) if "versions" in text]
    assert shown.startswith(
        "this run was resumed with other versions than it was begun with: fedloom 7 ("
    )
    assert f"torch 9.9 (it was {real['torch']})" in shown
    assert doubts_of(read_run(stopped[1].folder)) == []
    (run / "audit.jsonl").rename(run / "audit-000000000009.jsonl")  # as a log that became large
    assert shown in doubts_of(read_run(run))


def test_a_resume_reads_run_json_once(stopped, tmp_path, monkeypatch):
    run, read, real = shutil.copytree(stopped[0], tmp_path / "run"), [], RunFolder.read_json
    monkeypatch.setattr(
        RunFolder, "read_json", lambda self, name: read.append(name) or real(self, name)
    )
    resume_run(run)
    assert read == ["run.json"]


@pytest.mark.slow
def test_changed_data_are_refused_before_there_is_a_checkpoint_too(experiment, rows_file, tmp_path):
    rows = [{"prompt": f"Q{i}?", "chosen": f"Yes {i}.", "rejected": f"No {i}."} for i in range(40)]
    file = Path(rows_file(rows))
    built = experiment(
        data={"source": str(file), "kind": "preference"}, output={"folder": str(tmp_path / "run")}
    )
    result = fedloom.run(built)
    shutil.rmtree(result.folder / "checkpoints")
    rows[3]["chosen"] = "Another."
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(CheckpointError, match="settings, data or reward models have changed since"):
        resume_run(result.folder)


class Harsh(DPO):
    """An objective of a user's own."""


def test_a_run_made_with_objects_is_resumed_with_the_same(experiment, tmp_path):
    built = experiment(output={"folder": str(tmp_path / "run")})
    result = fedloom.run(built, objective=Harsh())
    run = json.loads((result.folder / "run.json").read_text())
    own = run["made_with"]["objective"]
    assert own["class"].endswith("test_run_folders.Harsh") and len(own["sha256"]) == 64
    assert run["command"].startswith("fedloom.run(") and "Harsh(...)" in run["command"]
    with pytest.raises(CheckpointError, match=r"with fedloom\.resume\(.*, objective=\.\.\.\)"):
        resume_run(result.folder)
    with pytest.raises(CheckpointError, match=r"was begun with objective=.*Harsh .SHA-256"):
        fedloom.resume(result.folder, objective=DPO())
    assert fedloom.resume(result.folder, objective=Harsh()).metrics == result.metrics
    plain = fedloom.run(experiment(output={"folder": str(tmp_path / "plain")}))
    with pytest.raises(CheckpointError, match="was begun without objective="):
        fedloom.resume(plain.folder, objective=Harsh())


@pytest.mark.slow
def test_a_mixture_of_experts_is_not_doubted(experiment, tmp_path):
    """Its weights lie in a file of another name."""
    built = experiment(
        adapter={"kind": "experts", "rank": 2, "experts": 2},
        output={"folder": str(tmp_path / "run")},
    )
    assert record_marks.doubts(RunFolder(fedloom.run(built).folder)) == []


def test_an_object_whose_source_cannot_be_read_is_told_at_once(experiment, tmp_path):
    space = {"DPO": DPO, "__name__": "session"}
    exec("class Typed(DPO):\n    '''Typed into a session.'''", space)
    said = Heard()
    built = experiment(output={"folder": str(tmp_path / "run")})
    fedloom.run(built, objective=space["Typed"](), observer=said)
    assert any(
        "the source of session.Typed, the run's objective, cannot be read" in w
        for w in said.warnings
    )


def test_the_lock_is_empty_once_a_run_has_ended(stopped):
    assert (stopped[1].folder / ".lock").read_text() == ""
    assert RunFolder(stopped[1].folder).is_begun


@pytest.mark.parametrize(
    "damage", [d for d in DAMAGES if not d.startswith("audit") and d != "run: half"]
)
def test_figures_of_a_damaged_folder_are_doubted(stopped, tmp_path, damage):
    for name, folder in (("run", stopped[0]), ("whole", stopped[1].folder)):
        run = shutil.copytree(folder, tmp_path / name)
        assert record_marks.doubts(RunFolder(run)) == []
        DAMAGES[damage](run)
        said = "; ".join(record_marks.doubts(RunFolder(run)))
        assert f"{damage.partition(':')[0]}.json" in said


@pytest.mark.slow
def test_a_page_says_what_is_doubted(stopped, tmp_path):
    run = shutil.copytree(stopped[1].folder, tmp_path / "run")
    said = "not to be relied on, as its records are not what was written: costs.jsonl was changed"
    assert said not in write_report([run]).read_text()
    put(run / "costs.jsonl", (run / "costs.jsonl").read_text().replace('"round": 1', '"round": 3'))
    assert said in write_report([run]).read_text()
    log = (run / "audit.jsonl").read_text()
    (run / "audit.jsonl").write_text(log.replace('"python": "3', '"python": "2'))
    resumed = "This run was resumed with other versions than it was begun with: python 2"
    assert resumed in write_report([run]).read_text()
    both = write_report([run, stopped[1].folder], tmp_path / "both.html").read_text()
    assert f"The figures of run are {said}" in both and both.count(said) == 2


def test_another_adapter_is_doubted(stopped, tmp_path):
    run = shutil.copytree(stopped[1].folder, tmp_path / "run")
    weights = run / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert record_marks.doubts(RunFolder(run)) == [
        "adapter/adapter_model.safetensors is another than the run wrote"
    ]
    weights.unlink()
    assert record_marks.doubts(RunFolder(run)) == ["adapter/adapter_model.safetensors is missing"]
    (run / "rounds.jsonl").write_text(
        "".join([*lines(run / "rounds.jsonl"), *lines(run / "rounds.jsonl")[-1:]])
    )
    assert "rounds.jsonl has the rounds 0, 1, 2, 3, 4, 4, in this order" in record_marks.doubts(
        RunFolder(run)
    )
    summary = json.loads((run / "summary.json").read_text())
    del summary["records"]
    (run / "summary.json").write_text(json.dumps(summary))
    assert (
        "an earlier release wrote this run, without hashes of its records"
        in record_marks.doubts(RunFolder(run))
    )
