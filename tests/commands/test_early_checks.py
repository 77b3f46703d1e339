"""Refusals that need no model: in the words of the real check, without what computes, in a second."""

import os
import resource
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import fedloom
from fedloom.commands.early_checks import refuse_early
from fedloom.errors import FedloomError

OWN = {**os.environ, "PYTHONPATH": str(Path(fedloom.__file__).parents[1])}
"""These sources, whatever the folder is in which a process is started."""

ONE = """
import sys
from pathlib import Path
from fedloom.commands.early_checks import refuse_early
from fedloom.errors import FedloomError

def check():
    from fedloom.runs.new_folder import require_startable
    from fedloom.experiment.experiment import Experiment
    require_startable(Experiment.from_toml(sys.argv[1], sys.argv[2:]))

try:
    refuse_early(check)
except FedloomError as error:
    print(error)
    sys.exit(error.exit_code)
finally:
    heavy = {"torch", "transformers", "peft", "fedloom.experiment.experiment"} & sys.modules.keys()
    assert not heavy, heavy
"""


def early(*arguments):
    words = [sys.executable, "-c", ONE, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=OWN)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def file(experiment, tmp_path):
    path = tmp_path / "x.toml"
    path.write_text(experiment().to_toml())
    return path


def test_a_mistake_is_told_in_the_words_of_the_check_and_what_is_right_passes(file, call):
    wrong = (
        "--set",
        "federation.round=3",
        "--set",
        "objective.name=dop",
        "--set",
        "adapter.rank=0",
    )
    code, out = call("run", file, *wrong)
    found, text = early(file, *(word for word in wrong if word != "--set"))
    assert found == code == 2 and text.strip() == out.strip().removeprefix("fedloom: ")
    assert early(file) == (0, "")


OWN_METHOD = """
import torch
from fedloom.methods.fedavg import FedAvg
from fedloom.settings.schema import NamedSettings

class Own(FedAvg):
    reveals = FedAvg.reveals | set()
    taken = ("share",)

    class Settings(NamedSettings):
        share: float = 0.5
"""


def test_a_module_of_the_user_that_needs_what_is_absent_is_not_refused(file, tmp_path, monkeypatch):
    """Nor is one that is not there: what really happens, the command itself finds out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_light.py").write_text(OWN_METHOD)
    (tmp_path / "own_heavy.py").write_text(OWN_METHOD + "EPS = 1 + float(torch.ones(1).sum())\n")
    text = tomllib.loads(file.read_text())["method"]["name"]
    for module in ("own_light", "own_heavy", "own_gone"):
        named = file.read_text().replace(f'name = "{text}"', f'name = "{module}:Own"', 1)
        (tmp_path / f"{module}.toml").write_text(named)
        assert early(f"{module}.toml") == (0, "")
    code, said = early("own_light.toml", "method.shares=1")
    assert code == 2 and "method.shares" in said and "share" in said


def test_it_is_done_once_what_computes_is_there():
    """Here torch is imported, so that a check beforehand would only take time."""

    def check():
        raise FedloomError("never asked")

    refuse_early(check)


COMMANDS = [
    ("run", "gone.toml"),
    ("run", "{file}", "--set", "federation.round=3"),
    ("run", "{file}", "--set", "model.path=./gone"),
    ("run", "--resume", "gone"),
    ("demo", "--set", "a=b"),
    ("init", "{file}"),
    ("partition", "{file}", "--set", "data.source=./gone.csv"),
    ("data", "show", "gone.toml"),
    ("data", "stats", "gone.toml"),
    ("data", "check", "gone.toml"),
    ("data", "fingerprint", "gone.toml", "--key", "gone", "--output", "x"),
    ("data", "overlap", "gone", "gone"),
    ("evaluate", "gone"),
    ("compare", "{file}"),
    ("advise", "gone.toml"),
    ("export", "gone"),
    ("forget", "gone", "--client", "0"),
    ("report", "gone"),
    ("certs", "--host", ""),
    ("keys", "new", "{file}"),
    ("members", "list", "--home", "{file}"),
    ("members", "allow", "ben", "ben.pub", "--home", "gone"),
    ("members", "revoke", "ben", "--home", "gone"),
    ("members", "rename", "ben", "amy", "--home", "gone"),
    ("members", "rotate", "ben", "ben.pub", "--home", "gone"),
    ("members", "withdraw", "ben", "--home", "gone"),
    ("members", "remove", "ben", "--home", "gone"),
    ("server", "start", "--home", "gone"),
    ("server", "stop", "--home", "gone"),
    ("server", "backup", "x", "--home", "gone"),
    ("server", "restore", "gone"),
    ("client", "join", "--server", "x"),
    ("client", "check", "gone.toml"),
    ("client", "approve", "x", "--home", "."),
    ("client", "leave", "--home", "gone"),
    ("status", "--home", "gone"),
    ("stop", "--home", "gone"),
    ("follow", "--home", "gone"),
    ("audit", "verify", "gone"),
    ("audit", "match", "gone", "gone"),
]


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: " ".join(words[:2]))
def test_every_command_refuses_as_a_process_within_four_seconds_of_cpu(words, file, tmp_path):
    """On a quiet machine all take one to two; the bound leaves room for a loaded one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "fedloom", *(word.format(file=file) for word in words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=OWN,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode not in (0, None) and "Traceback" not in done.stdout + done.stderr
    assert (done.stdout + done.stderr).strip()
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 4.0


@pytest.mark.slow
def test_the_demo_says_what_it_does_within_two_seconds_of_cpu(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "fedloom", "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        env=OWN,
    )
    try:
        assert process.stdout.readline() == b"loading torch, transformers and peft\n"
        with open(f"/proc/{process.pid}/stat") as file:
            ticks = sum(map(int, file.read().rpartition(")")[2].split()[11:13]))
        assert ticks / os.sysconf("SC_CLK_TCK") < 2.0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_recipes_pass():
    """What is right is refused by no check beforehand."""
    recipes = sorted(Path(__file__).parents[2].glob("recipes/*.toml"))
    single = [path for path in recipes if "compare" not in tomllib.loads(path.read_text())]
    code = ONE.replace("require_startable(Experiment.from_toml(sys.argv[1], sys.argv[2:]))", (
        "[Experiment.from_toml(path) for path in sys.argv[1:]]"
    ))  # fmt: skip
    words = [sys.executable, "-c", code, *map(str, single)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=OWN)
    assert single and (done.returncode, done.stdout + done.stderr) == (0, "")
