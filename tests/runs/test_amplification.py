"""Runs in which drawing clients counts: what leaves names nobody, and follows from no cohort."""

import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import uuid

import numpy as np
import pytest
from typer.testing import CliRunner

from fedloom.commands.main import app
from fedloom.commands.run import _check_run
from fedloom.commands.terminal import PlainConsole, Terminal
from fedloom.errors import OutputError, RoundFailed, SettingsError
from fedloom.federation.presence import Presence
from fedloom.federation.records import Evaluation, RoundRecord
from fedloom.privacy.accounting import Releases, epsilon
from fedloom.privacy.client_level import ClippedSum
from fedloom.privacy.noise import NoiseSource
from fedloom.privacy.private_mean import SERVER, PrivateMean
from fedloom.reports.choose import write_page_of
from fedloom.reports.live_run import LiveRun
from fedloom.runs import run as runs
from fedloom.runs.client_privacy import RUN, key_file, selection_of
from fedloom.runs.comparison import comparison_of
from fedloom.runs.export import export
from fedloom.runs.forget import forget_client
from fedloom.runs.observers import Plan, Silent
from fedloom.runs.privacy_estimate import privacy_advice
from fedloom.runs.released import ROUND, SUMMARY, Withholding, of_schema, released_round
from fedloom.runs.released import RUN as RUN_FIELDS
from fedloom.runs.run import resume_run, run_experiment
from fedloom.serving.locate import locate
from fedloom.storage.run_folder import RunFolder, own_folder_of

AMPLIFIED = {
    "unit": "client",
    "delta": 1e-2,
    "clip": 0.5,
    "noise_multiplier": 1.0,
    "accountant": "rdp",
    "amplification": True,
}
SMALL = {
    "data": {"builtin_rows": 40},
    "federation": {"clients": 4, "clients_per_round": 2, "rounds": 2},
    "training": {"local_steps": 1, "batch_size": 4},
    "evaluation": {"samples": 1, "max_examples": 4, "per_client": False},
}


@pytest.fixture
def amplified(experiment):
    def make(privacy=None, **sections):
        merged = {name: {**SMALL.get(name, {}), **own} for name, own in sections.items()}
        return experiment(**{**SMALL, **merged, "privacy": {**AMPLIFIED, **(privacy or {})}})

    return make


def read(folder, name):
    return json.loads((folder / name).read_text())


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def cohorts(folder):
    """Return who was drawn, which the server's own records alone say."""
    return [record["clients"] for record in lines(own_folder_of(folder), "rounds.jsonl")[1:]]


def shown(folder, experiment, forced, monkeypatch):
    """Run with forced cohorts, all changes of clients being zero; return all that leaves, as text."""
    output = io.StringIO()
    with monkeypatch.context() as patched:
        patched.setattr(runs.uuid, "uuid4", lambda: uuid.UUID(int=7))
        patched.setattr(ClippedSum, "add", lambda self, update: None)
        patched.setattr(
            PrivateMean,
            "coins",
            lambda self, round, n: np.array(
                [0.0 if c in forced[round - 1] else 0.9 for c in range(n)]
            ),
        )
        result = run_experiment(
            experiment,
            observer=Terminal(PlainConsole(file=output, width=500, force_terminal=False)),
        )
    write_page_of([folder], None, lambda text: None)
    write_page_of([folder, folder], folder / "two.html", lambda text: None)
    texts = {
        str(path.relative_to(folder)): path.read_bytes().decode("latin1")
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    texts["terminal"] = output.getvalue()
    texts["result"] = f"{result.summary_text} {result.costs} {result._repr_html_()}"
    return {name: text.replace(str(folder), "FOLDER") for name, text in texts.items()}


@pytest.mark.parametrize(
    "privacy",
    [{}, pytest.param({"clip_quantile": 0.5, "clip_count_noise": 2.0}, marks=pytest.mark.slow)],
)
def test_what_leaves_is_the_same_bytes_whoever_is_drawn(amplified, tmp_path, monkeypatch, privacy):
    """With the same noise and changes that are zero the models are alike, and so is all that is shown."""
    found = []
    for name, forced in (("a", [{0, 1, 2}, {3}]), ("b", [{3}, set()])):
        folder = tmp_path / name / "run"
        folder.parent.mkdir()
        monkeypatch.chdir(folder.parent)
        own = amplified(
            {"seeded": True, **privacy}, output={"folder": "run", "verify": bool(privacy)}
        )
        found.append(shown(folder, own, forced, monkeypatch))
        assert cohorts(folder) == [sorted(own) for own in forced]
        inside = own_folder_of(folder)
        assert len({line["client"] for line in lines(inside, "costs.jsonl")} & {0, 1, 2, 3}) == (
            4 if name == "a" else 1
        )
    assert found[0].keys() == found[1].keys() and {"report.html", "run.json"} < found[0].keys()
    for name in found[0]:
        assert found[0][name] == found[1][name], name
        assert not re.search(r"\bclient \d|\"client\": \d", found[0][name]), name
    assert "reproducible, therefore not private" in found[0]["report.html"]
    assert "who is drawn follows from the seed as well" in found[0]["report.html"]
    assert "secret: each client" not in found[0]["report.html"]
    files = {name for name in found[0] if "/" not in name}
    assert files - {"terminal", "result", "two.html", "report.html"} == {
        *("experiment.toml", "run.json", "rounds.jsonl", "samples.json", "summary.json")
    }


def fields_of(record, fields):
    """Yield what a record has beside the fields that may leave."""
    for name, value in record.items():
        if name not in fields:
            yield name
        elif fields[name] is not None and value is not None:
            yield from fields_of(value, fields[name])


def test_a_run_accounts_for_its_rate_and_leaves_what_the_schema_names(amplified, tmp_path):
    folder = tmp_path / "run"
    result = run_experiment(amplified(), observer=Silent())
    assert result.folder == folder and result.adapter_path == folder / "adapter"
    own = read(folder, "summary.json")["privacy"]
    assert own["epsilon"] == epsilon([Releases(1.0, 0.5, 2)], 1e-2, "rdp").epsilon
    assert own["epsilon"] < epsilon([Releases(1.0, 1, 2)], 1e-2, "rdp").epsilon
    assert own["sampling"] == own["drawn"] == 0.5 and own["steps"] == 2
    assert any("Who was drawn is secret" in sentence for sentence in own["sentences"])
    assert any("whoever learns who was drawn" in text for text in own["not_covered"])
    assert all(
        line["sampling"] == 0.5 for line in lines(own_folder_of(folder), "privacy.jsonl")[1:]
    )
    inside = own_folder_of(folder)
    assert stat.S_IMODE(inside.stat().st_mode) == 0o700
    assert "Hand out the folder beside" in (inside / "SERVER-ONLY.txt").read_text()
    for name, fields, more in (
        ("run.json", RUN_FIELDS, {"withheld"}),
        ("summary.json", SUMMARY, {"records"}),
    ):
        assert set(fields_of(read(folder, name), fields)) == more
        whole = set(fields_of(read(inside, name), fields))
        assert whole > ({"train", "fingerprint"} if name == "run.json" else {"totals"})
    for outside, whole in zip(
        lines(folder, "rounds.jsonl"), lines(inside, "rounds.jsonl"), strict=True
    ):
        assert not list(fields_of(outside, ROUND)) and outside == of_schema(whole, ROUND)
        assert {"clients", "bytes_up", "seconds", "tokens"} < set(fields_of(whole, ROUND))
    assert not key_file(RunFolder.existing(folder, server=True)).exists()
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def stopped_after(round, experiment, monkeypatch, moment):
    """Run until a round, and stop there as a kill would: after its noise, or after it is saved."""

    class Stop(BaseException):
        pass

    plain = runs._Run._finish_round

    def finish(self, record, state):
        if record.round == round and moment == "noise":
            raise Stop
        plain(self, record, state)
        if record.round == round:
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(runs._Run, "_finish_round", finish)
        patched.setattr(runs._Run, "_keep_last", lambda self: None)
        with pytest.raises(Stop):
            run_experiment(experiment, observer=Silent())


@pytest.mark.parametrize("moment", ["noise", pytest.param("saved", marks=pytest.mark.slow)])
def test_a_resume_draws_the_same_cohorts_which_follow_from_the_key_alone(
    amplified, tmp_path, monkeypatch, moment
):
    folder, more = tmp_path / "run", {"clients": 12, "clients_per_round": 4, "rounds": 3}
    own = amplified(federation=more, data={"builtin_rows": 80})
    stopped_after(2, own, monkeypatch, moment)
    assert list(folder.iterdir()) == []  # nothing leaves before the end
    with pytest.raises(OutputError, match="is written when its run is over"):
        write_page_of([folder], None, lambda text: None)
    with pytest.raises(OutputError, match="is written when its run is over"):
        LiveRun(folder)
    key = key_file(RunFolder.existing(folder, server=True))
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    source = NoiseSource.kept(key, RUN, create=False)
    resume_run(folder if moment == "noise" else own_folder_of(folder))
    expected = []
    for round in (1, 2, 3):
        coins = source.stream("cohort", round, SERVER).uniform(12)
        expected.append([client for client in range(12) if coins[client] < 4 / 12])
    assert cohorts(folder) == expected
    assert [line["round"] for line in lines(own_folder_of(folder), "privacy.jsonl")[1:]] == [
        1,
        2,
        3,
    ]
    assert read(folder, "summary.json")["privacy"]["steps"] == 3
    first = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    resume_run(folder)  # after its end the final files are written again
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == first


@pytest.mark.slow
def test_two_runs_of_one_experiment_draw_other_cohorts(amplified, tmp_path):
    """20 coins of 1/2 fall alike in two runs with probability 2^-40 over both rounds."""
    found = []
    for name in "ab":
        folder = tmp_path / name
        more = {"clients": 20, "clients_per_round": 10}
        run_experiment(
            amplified(federation=more, data={"builtin_rows": 120}, output={"folder": str(folder)}),
            observer=Silent(),
        )
        found.append(cohorts(folder))
    assert found[0] != found[1]


def test_nobody_is_drawn_before_the_run_has_its_key(amplified):
    selection = selection_of(amplified())
    with pytest.raises(RuntimeError, match="secret until the run draws"):
        selection.draw(Presence.of({0: 4, 1: 4}), 2, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("privacy", "sections", "words"),
    [
        ({"unit": "row"}, {}, 'goes with privacy.unit = "client" alone'),
        ({"mechanism": "tree"}, {}, "needs clients that are drawn by coins"),
        ({"mechanism": "banded"}, {}, "needs clients that are drawn by coins"),
        ({"min_separation": 2}, {}, "needs clients that are drawn by coins"),
        ({"secure_aggregation": True}, {}, "the server clips updates"),
        ({}, {"method": {"name": "fedbuff"}}, "method.name = 'fedbuff' cannot"),
        ({}, {"method": {"name": "ditto"}}, "each client keeps an adapter of its own"),
        ({}, {"evaluation": {"per_client": True}}, "set evaluation.per_client = false"),
        ({}, {"federation": {"clients_per_round": 4}}, "all 4 clients take part in every round"),
        ({}, {"output": {"trackers": ["tensorboard"]}}, "leave trackers out"),
        ({}, {"simulation": {"devices": {}}}, "with [simulation.devices] a round takes as long"),
        ({}, {"simulation": {"cohort": 2}}, "changes one's answer by who else was drawn"),
        ({}, {"selection": {"name": "oort"}}, "leave out selection.name = 'oort'"),
        ({}, {"federation": {"replacements": 1}}, "leave out federation.replacements = 1"),
    ],
)
def test_what_would_show_who_is_drawn_is_refused_with_its_reason(
    amplified, privacy, sections, words
):
    with pytest.raises(SettingsError) as told:
        amplified(privacy, **sections)
    assert [line for line in told.value.problems if words in line], told.value


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"remote": object()}, "between machines the traffic"),
        ({"ray": "local"}, "leave Ray out"),
        ({"on_step": lambda *own: None}, "on_step is told whose step it is"),
        ({"profile": True}, "leave --profile out"),
        ({"auditor": object()}, "attack the released adapter"),
    ],
)
def test_what_is_asked_for_beside_the_experiment_is_refused_before_a_folder_is_made(
    amplified, tmp_path, given, words
):
    with pytest.raises(SettingsError, match=words):
        run_experiment(amplified(), observer=Silent(), **given)
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_is_refused(amplified):
    table = amplified().to_table(defaults=False)
    del table["output"]
    with pytest.raises(SettingsError, match="the page of a comparison shows what rounds cost"):
        comparison_of(
            {
                **table,
                "compare": {
                    "budget": "steps",
                    "amount": 2,
                    "seeds": [0],
                    "objectives": ["dpo"],
                    "methods": ["fedavg"],
                },
            },
            "x",
            "y",
        )


def test_no_command_shows_the_servers_own_folder(amplified, tmp_path):
    folder, inside = tmp_path / "run", tmp_path / "run.private"
    run_experiment(amplified(), observer=Silent())
    refused = "names the clients of each round, which nothing shows"
    for call in (
        lambda: write_page_of([inside], None, print),
        lambda: LiveRun(inside),
        lambda: export(inside),
    ):
        with pytest.raises(OutputError, match=refused):
            call()
    for words in (
        ["verify", inside],
        ["match", inside, tmp_path],
        ["match", inside / "audit.jsonl", "x"],
    ):
        shown = CliRunner().invoke(app, ["audit", *map(str, words)])
        assert isinstance(shown.exception, OutputError) and refused in str(shown.exception)
    with pytest.raises(SettingsError, match="leave --live out"):
        _check_run(None, None, folder, live=True)
    with pytest.raises(OutputError, match="there is nothing to watch"):
        LiveRun(folder)
    with pytest.raises(OutputError, match="holds no store or model of client 3"):
        forget_client(folder, 3)


def test_a_run_that_cannot_begin_leaves_neither_folder(amplified, tmp_path):
    own = amplified({"noise_multiplier": None, "target_epsilon": 1e-9, "delta": 1e-12})
    with pytest.raises(SettingsError, match="cannot be met"):
        run_experiment(own, observer=Silent())
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_runs_records_is_not_written_to(amplified, tmp_path):
    (tmp_path / "run.private").mkdir()
    (tmp_path / "run.private" / "mine").write_text("")
    with pytest.raises(OutputError, match=r"run\.private' is not empty"):
        run_experiment(amplified(), observer=Silent())
    assert not (tmp_path / "run").exists()


class Told(Silent):
    def __init__(self):
        self.lines, self.rounds, self.plans = [], [], []

    def stage(self, text):
        self.lines.append(text)

    def warning(self, text):
        self.lines.append(text)

    def begin(self, plan):
        self.plans.append(plan)

    def client_done(self, round, client, done, of):
        raise AssertionError("a client is told of")

    def round_done(self, record):
        self.rounds.append(record)


def test_observers_are_told_what_may_leave_and_the_rest_is_written_down(tmp_path):
    told = Told()
    own = Withholding(told, RunFolder(tmp_path))
    own.warning("before")
    own.begin(Plan("head", "details", 2, "loss", False, {3: "client 3"}, 1.0, (1.0,), "folder"))
    own.client_done(1, 3, 1, 2)
    own.stage("client 3 comes")
    own.warning("client 3 left out")
    record = RoundRecord(
        1,
        (3,),
        {3: "late"},
        learning_rate=0.5,
        train={"loss": 1.0},
        client_train={3: {"loss": 1.0}},
        evaluation=Evaluation({"loss": 0.25, "clients_loss": 0.5}, {3: {"loss": 0.75}}),
        seconds=4.0,
        details={"clients": [3]},
    )
    own.round_done(record)
    assert isinstance(own.shown(RoundFailed("client 3 failed")), RoundFailed)
    assert "client 3" not in str(own.shown(RoundFailed("client 3 failed")))
    full = OutputError("the disk is full")
    assert own.shown(full) is full
    own.end()
    own.stage("after")
    assert told.lines == ["before", "after"]
    assert told.plans == [Plan("head", "details", 2, "loss", False, withheld=True)]
    assert (
        told.rounds
        == [RoundRecord(1, learning_rate=0.5, evaluation=Evaluation({"loss": 0.25}))]
        == [released_round(record)]
    )
    assert (tmp_path / "withheld.txt").read_text().splitlines() == [
        "client 3 comes",
        "warning: client 3 left out",
        "error: client 3 failed",
        "error: client 3 failed",
    ]


@pytest.mark.parametrize("target", [False, True])
def test_advise_gives_both(amplified, experiment, target):
    """2 rounds, q = 1/2: epsilon (or noise) with amplification beside that without."""
    own = {"noise_multiplier": None, "target_epsilon": 3.0} if target else {}
    found = []
    for given in (True, False):
        said = privacy_advice(amplified({**own, "amplification": given}))
        (line,) = [text for text in said if text.startswith("Amplification (derived)")]
        numbers = re.findall(
            r"counts as (\S+), and epsilon is (\S+) with a noise multiplier of ([\d.]*\d)", line
        )
        found.append(numbers)
        other = "false" if given else "true"
        assert f"; with privacy.amplification = {other} sampling counts as" in line
    assert found[0] == found[1][::-1] and [own[0] for own in found[0]] == ["0.5", "1"]
    (_, least, z), (_, most, more) = found[0]
    if target:
        assert float(least) <= 3.0 and float(most) <= 3.0 and float(z) < float(more)
    else:
        assert z == more == "1" and float(least) < float(most)
        assert float(least) == pytest.approx(
            epsilon([Releases(1.0, 0.5, 2)], 1e-2, "rdp").epsilon, rel=1e-3
        )


@pytest.mark.slow
def test_what_was_released_is_a_run_folder_for_all_that_reads_one(amplified, tmp_path):
    """Pages beside a run that withholds nothing, export, merging, another run's start, talking to it."""
    found = [tmp_path / name for name in "abc"]
    for folder, seed, given in zip(found, (0, 3, 5), (True, True, False), strict=True):
        own = amplified(
            {"amplification": given},
            federation={"seed": seed},
            output={"folder": str(folder), "verify": True},
        )
        run_experiment(own, observer=Silent())
    told = []
    page = write_page_of(found, tmp_path / "compared.html", told.append).read_text()
    cells = re.findall(r"<td>(?:-|[\d.]+ [kM]?B)</td>", page[: page.index("Side by side")])
    assert cells.count("<td>-</td>") >= 4 and told == []  # neither of the two says what it sent
    verified = read(found[0], "summary.json")["verified"]
    assert verified["rows_are"] == "held-out rows" and "seconds" not in verified
    assert (export(found[0], format="adapter").folder / "adapter_model.safetensors").is_file()
    assert locate(found[0]).folder == found[0] / "adapter"
    start = amplified(output={"folder": str(tmp_path / "d")}, adapter={"start": str(found[0])})
    run_experiment(start, observer=Silent())
    assert read(tmp_path / "d", "run.json")["start"]["run"] == read(found[0], "run.json")["id"]
    assert "clients" not in read(tmp_path / "d", "run.json")["start"]


@pytest.mark.slow
def test_a_killed_process_goes_on_with_the_same_coins_and_says_nothing_of_clients(
    amplified, tmp_path
):
    """Real processes: SIGKILL once round 2 is on the disk, then a resume; all that both printed is read."""
    folder, file, printed = tmp_path / "run", tmp_path / "x.toml", tmp_path / "printed"
    own = amplified(
        federation={"clients": 8, "clients_per_round": 3, "rounds": 8}, data={"builtin_rows": 80}
    )
    file.write_text(own.to_toml())
    inside = own_folder_of(folder)
    with printed.open("w") as output:
        words = [sys.executable, "-m", "fedloom", "run"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([*words, file], stdout=output, stderr=output, env=environment)
        deadline = time.monotonic() + 300
        while process.poll() is None and time.monotonic() < deadline:
            known = inside / "rounds.jsonl"
            if known.exists() and known.read_text().count("\n") >= 3:
                break
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        before = cohorts(folder)
        source = NoiseSource.kept(key_file(RunFolder(inside)), RUN, create=False)
        assert list(folder.iterdir()) == []
        subprocess.run(
            [*words, "--resume", folder], stdout=output, stderr=output, env=environment, check=True
        )
    expected = []
    for round in range(1, 9):
        coins = source.stream("cohort", round, SERVER).uniform(8)
        expected.append([client for client in range(8) if coins[client] < 3 / 8])
    assert cohorts(folder) == expected and before == expected[: len(before)]
    assert read(folder, "summary.json")["privacy"]["steps"] == 8
    text = printed.read_text()
    assert "8/8" in text and not re.search(r"\bclient \d|\bclients +\d+/|\bsent\b|\bleft\b", text)
