"""A run is killed at a thousand points, and each time goes on: the bits are those of one left alone."""

import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest

from fedloom.experiment.experiment import Experiment
from fedloom.runs.observers import Silent
from fedloom.runs.run import resume_run, run_experiment
from fedloom.security.audit_log import events, verify
from sampling import drawn, tries

SIDES = 2
WRITES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")


def play(path, folder, point, counted=None):
    """Begin a run or go on with it; killed before the file operation of that number, if there is one."""
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event in WRITES and any(str(folder) in str(argument) for argument in arguments):
            seen += 1
            if seen == point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        if (folder / "experiment.toml").exists():
            resume_run(folder, observer=Silent())
        else:
            run_experiment(Experiment.from_toml(path), observer=Silent())
    except BaseException:
        path.with_suffix(".error").write_text(traceback.format_exc())
        raise
    if counted is not None:
        counted.value = seen


def files(folder):
    """The adapter, and the state after each round."""
    states = {event["round"]: event["state"] for event in events(folder, "round")}
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), states


def killed_until_it_ends(context, path, folder, rng, whole, operations):
    """Kill a run at random moments and before random file operations until it ends; return how often."""
    kills = 0
    while True:
        at_file = rng.random() < 0.5
        point = rng.randint(1, operations) if at_file else 0
        child = context.Process(target=play, args=(path, folder, point))
        child.start()
        child.join(None if at_file else rng.uniform(0, whole))
        child.kill()
        child.join()
        if child.exitcode == 0:
            return kills
        error = path.with_suffix(".error")
        assert not error.exists(), error.read_text()
        kills += 1


@pytest.mark.serial
@pytest.mark.parametrize("enough", tries(8, 1000))
def test_a_thousand_kills(experiment, tmp_path, enough):
    """Half of them at random moments, half before random file operations, of which a run has hundreds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_kill_points", "fedloom.runs.assembly"])

    def made(name):
        table = {
            "method": {"name": "scaffold"},
            "federation": {"clients": 2, "rounds": 6},
            "training": {"local_steps": 1},
            "evaluation": {"samples": 0, "max_examples": 2},
            "output": {"folder": str(tmp_path / name)},
        }
        path = tmp_path / f"{name}.toml"
        path.write_text(experiment(**table).to_toml())
        return path, tmp_path / name

    counted = context.Value("i", 0)
    for name in ("first", "quiet"):  # the first loads what others find loaded
        start = time.perf_counter()
        child = context.Process(target=play, args=(*made(name), 0, counted))
        child.start()
        child.join()
        whole = time.perf_counter() - start
    expected, runs = files(tmp_path / "quiet"), []

    def side(number):
        rng, kills = drawn("kill points", number), 0
        while kills < enough // SIDES:
            path, folder = made(f"{number}-{kills}")
            kills += killed_until_it_ends(context, path, folder, rng, whole, counted.value)
            assert files(folder) == expected, folder
            verify(folder)
            runs.append(folder)
            shutil.rmtree(folder)
        return kills

    with ThreadPoolExecutor(SIDES) as pool:
        kills = sum(pool.map(side, range(SIDES)))
    print(f"{kills} kills in {len(runs)} runs of {whole:.1f} s and {counted.value} file operations")
