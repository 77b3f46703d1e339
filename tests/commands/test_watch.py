"""``fedloom watch`` and ``--live``: a page beside a run, which stays the run that it would be without."""

import json
import re
import signal
import subprocess
import sys
import urllib.request
from types import SimpleNamespace

import pytest

from fedloom.commands import watch
from fedloom.experiment.experiment import Experiment
from fedloom.settings.toml import write_toml
from live_records import append, begin
from machines import heed_interrupts

ADDRESS = re.compile(r"live page: (http://127\.0\.0\.1:\d+/[\w-]+/)")


def state(address):
    with urllib.request.urlopen(address + "state?from=0", timeout=10) as answer:
        return json.load(answer)


def test_what_is_no_run_folder_is_one_error(call, tmp_path):
    for folder, said in (
        (tmp_path / "nowhere", "no run folder at"),
        (tmp_path, "is not a run folder"),
    ):
        code, printed = call("watch", folder)
        assert code == 1 and said in printed


def test_the_page_of_a_folder_answers_until_the_command_is_ended(call, tmp_path, monkeypatch):
    """Ctrl-C is what ``wait`` raises here; what is asked before that is answered at the address."""
    folder = begin(tmp_path / "run")
    append(folder, 0, {0: 0.5})
    seen, said = [], []

    def ask_and_end(self, timeout=None):
        seen.append(state(ADDRESS.match(said[-1])[1]))
        raise KeyboardInterrupt

    ended = type("Ended", (), {"wait": ask_and_end, "set": lambda self: None})
    monkeypatch.setattr(watch, "say", said.append)
    monkeypatch.setattr(watch, "threading", SimpleNamespace(Event=ended))
    code, printed = call("watch", folder.path, "--port", 0)
    assert (code, printed) == (0, "")
    assert [row["value"] for row in seen[0]["rows"]] == [0.5]
    with pytest.raises(OSError, match="refused"):
        state(ADDRESS.match(said[-1])[1])


@pytest.mark.slow
def test_a_run_of_another_process_is_shown_until_the_command_is_stopped(tmp_path):
    folder = begin(tmp_path / "run")
    append(folder, 0, {0: 0.5})
    words = [sys.executable, "-m", "fedloom", "watch", str(folder.path)]
    for sign in (signal.SIGINT, signal.SIGTERM):
        own = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=heed_interrupts,
        )
        try:
            address = ADDRESS.match(own.stdout.readline())[1]
            assert len(state(address)["rows"]) >= 1
            append(folder, 1, {0: 0.6})
            own.send_signal(sign)
            out, error = own.communicate(timeout=60)
        finally:
            own.kill()
        assert (own.returncode, error) == (0, ""), out


@pytest.mark.slow
def test_a_run_with_its_page_is_the_run_without(call, table, tmp_path, monkeypatch):
    seen = []
    opened = watch._Live.begin

    def begin_and_ask(self, plan):
        opened(self, plan)
        seen.append(plan.folder)

    monkeypatch.setattr(watch._Live, "begin", begin_and_ask)
    own = {**table, "federation": {"rounds": 1, "clients": 2}}
    digests = []
    for name, more in (("with", ["--live"]), ("without", [])):
        file = tmp_path / f"{name}.toml"
        file.write_text(
            write_toml({**own, "output": {**own["output"], "folder": str(tmp_path / name)}})
        )
        assert Experiment.from_toml(file).output.folder == str(tmp_path / name)
        code, printed = call("run", file, *more)
        assert code == 0, printed
        assert bool(ADDRESS.search(printed)) is bool(more)
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        digests.append(summary["adapter"]["sha256"])
    assert seen == [str(tmp_path / "with")]
    assert digests[0] == digests[1]
