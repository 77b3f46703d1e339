"""The server's machine is killed again and again: the run ends with the bits of one that was left alone."""

import re
import time

import pytest

import fedloom
from fedloom.security.audit_log import events
from machines import machines
from sampling import drawn, tries


def states(folder):
    return {event["round"]: event["state"] for event in events(folder, "round")}


def rounds(folder):
    path = folder / "rounds.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.serial
@pytest.mark.parametrize("kills", tries(3, 20))
@pytest.mark.parametrize("method", ["fedpdpo", "scaffold"])
def test_killed_at_random_moments(experiment, tmp_path, method, kills):
    """Personal parts and control variates are on the clients' disks, in versions of several stretches."""
    ends = 2 * kills
    settings = experiment(
        method={"name": method},
        federation={"clients": 2, "rounds": ends, "patience": 120, "quorum": 1.0},
        training={"local_steps": 20},
        output={"folder": str(tmp_path / "here"), "checkpoint_every": 2},
    )
    fedloom.run(settings)
    rng, waits = drawn("kills", method), []
    with machines(2) as own:
        own.start_all()
        path, folder = own.folder / "run.toml", own.folder / "run"
        path.write_text(settings.to_toml())
        own.offer(models=[settings.model.path])
        words = ["run", path, "--set", f"output.folder={folder}"]
        for kill in range(kills + 1):
            known, start = rounds(folder), time.monotonic()
            log = own.start("run", *words, "--engine", "flower", "--home", own.server)
            if kill == kills:
                break
            own.wait(log, "waiting for clients", 120)
            if kill == 0 or rng.random() < 0.7:  # else while it meets them
                while rounds(folder) <= min(known, ends - 1):
                    assert own.processes["run"].poll() is None, log.read_text()
                    time.sleep(0.02)
                waits.append(time.monotonic() - start)
            time.sleep(rng.uniform(0, 1.0))
            own.kill("run")
            own.kill("server")
            if (folder / "experiment.toml").exists():
                words = ["run", "--resume", folder]
            own.start_server()
        assert own.processes["run"].wait(300) == 0, log.read_text()
        here, there = states(tmp_path / "here"), states(folder)
        assert there == here
        began = [event["after"] for event in events(folder, "began")]
        assert began == sorted(began) and len(began) > kills / 3
        assert re.search("are intact", own.call("audit", "verify", folder).stdout)
        for client in range(2):
            own.call("audit", "match", folder, own.folder / f"c{client}")
    print(
        f"{method}: went on after rounds {began}; to the next round {[round(x) for x in waits]} s"
    )
