"""Clients of earlier releases at the server of today: they take part, or are told what to install."""

import os
import subprocess
import tomllib
from pathlib import Path

import pytest

import machines as other_machines
from fedloom.commands.starter_experiment import starting_file
from fedloom.experiment.experiment import Experiment
from fedloom.settings.toml import write_toml
from machines import machines

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ENVELOPES = "src/fedloom/wire/envelope.py", "src/fedloom/envelope.py"
"""Where the protocol's number stands now, and where it stood in earlier releases."""


def git(*words):
    done = subprocess.run(
        ["git", "-C", ROOT, *words], capture_output=True, text=True, check=False, timeout=60
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def source_of(commit, folder):
    """Write the package as it was; return where Python finds it."""
    whole = subprocess.run(
        ["git", "-C", ROOT, "archive", commit, "src"], capture_output=True, check=True, timeout=60
    )
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", folder], input=whole.stdout, check=True, timeout=60)
    return folder / "src"


@pytest.fixture
def client_of(monkeypatch):
    """Let processes that are started from now on be of another release, or of this one again."""

    def use(source):
        paths = [str(own) for own in (source, os.environ.get("PYTHONPATH")) if own]
        monkeypatch.setitem(other_machines.ENVIRONMENT, "PYTHONPATH", os.pathsep.join(paths))

    return use


def without_new_lines(file, source):
    """Leave out of a client's file the lines of ``[policy]`` that its release does not know."""
    known = "".join(own.read_text() for own in source.rglob("policy.py"))
    table = tomllib.loads(file.read_text())
    table["policy"] = {key: own for key, own in table["policy"].items() if f"    {key}: " in known}
    file.write_text(write_toml(table))


def experiment():
    settings = ["clients=2", "rounds=2"]
    return Experiment.from_toml(
        starting_file(),
        [
            *(f"federation.{own}" for own in settings),
            "evaluation.samples=0",
            "data.builtin_rows=60",
        ],
        name="released",
    )


def test_a_client_of_the_release_before(tmp_path, client_of, monkeypatch):
    """The last tag or, before there is one, the first commit that speaks today's protocol."""
    tag = git("describe", "--tags", "--abbrev=0")
    commit = tag or git("log", "-1", "--format=%H", "-G", "^PROTOCOL = ", "--", *ENVELOPES)
    if not commit:
        pytest.skip("no history of the project is here")
    source = source_of(commit, tmp_path / "old")
    places = [source.parent / own for own in ENVELOPES]
    ours = (ROOT / ENVELOPES[0]).read_text().partition("PROTOCOL = ")[2].split()[0]
    same = f"PROTOCOL = {ours}\n" in next(own.read_text() for own in places if own.is_file())
    with machines(2) as own:
        own.start_server()
        own.start_client(0)
        client_of(source)
        offer = own.offer

        def offered(*words):
            offer(*words)
            without_new_lines(own.folder / "c1.toml", source)

        monkeypatch.setattr(own, "offer", offered)
        own.offer()
        if same:
            own.start_client(1)
            client_of(None)
            folder = own.run(experiment(), "old")
            assert (folder / "rounds.jsonl").read_text().count('"rejected": []') == 3
            return
        done = own.call(*own.joining(1), check=False)
        assert done.returncode == 5 and "install the server's version here" in done.stderr


def test_a_client_of_another_protocol_is_told_what_to_install(tmp_path, client_of):
    changed = git("log", "-1", "--format=%H", "-G", "^PROTOCOL = ", "--", *ENVELOPES)
    before = changed and git("rev-parse", f"{changed}^")
    if not before:
        pytest.skip("no history of the project is here")
    with machines(1) as own:
        own.start_server()
        source = source_of(before, tmp_path / "older")
        client_of(source)
        without_new_lines(own.folder / "c0.toml", source)
        done = own.call(*own.joining(0), check=False)
        assert done.returncode != 0
        assert "a newer fedloom than this client" in done.stderr
        assert "install the server's version here" in done.stderr
