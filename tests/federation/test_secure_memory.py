"""The memory of a process that plays the server, read from outside: no client's update is in it."""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedloom.federation.presence import Presence
from fedloom.federation.protocol import Cohort
from fedloom.runs.assembly import assemble
from fedloom.runs.partitioning import partition_data
from fedloom.training.results import reported

SERVER = """
import sys, time
from pathlib import Path
import fedloom
from fedloom.engines.workers import WorkersEngine

folder, carried = Path(sys.argv[1]), WorkersEngine.exchange

def exchange(self, asked):
    yield from carried(self, asked)
    if asked.action == "train":
        (folder / "ready").touch()
        while not (folder / "done").exists():
            time.sleep(0.05)

WorkersEngine.exchange = exchange
if __name__ == "__main__":
    fedloom.run(folder / "experiment.toml", workers=2)
"""


def pieces(experiment):
    """Bytes of each client's trained adapter, and of its change, as a client of this process has them."""
    parts = assemble(experiment, partition_data(experiment))
    engine, found, train = parts.engine, {}, parts.engine.handlers["train"]

    def trained(client, payload):
        reply = yield from train(client, payload)
        name = next(name for name in reply.tensors if "lora_B" in name)
        both = reply.tensors[name], reply.tensors[name] - payload.tensors[name]
        found[client.id] = [own.flatten().numpy().tobytes()[16:80] for own in both]
        return reply

    engine.handlers["train"] = trained
    steps = parts.method.round(parts.method.initial_state(parts.initial), cohort_of(parts))
    assert all(answer.error is None for answer in engine.exchange(next(steps)))
    return found


def cohort_of(parts):
    presence = Presence.of(parts.engine.sizes())
    return Cohort(
        1, presence.members, presence, 1e-3, last=True, reported=reported(parts.objective)
    )


def memory(process):
    """Yield the parts of a process's memory that it can write to."""
    maps = Path(f"/proc/{process}/maps").read_text()
    with Path(f"/proc/{process}/mem").open("rb") as file:
        for start, end in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) rw", maps, re.MULTILINE):
            try:
                file.seek(int(start, 16))
                yield file.read(int(end, 16) - int(start, 16))
            except (OSError, ValueError, OverflowError):
                continue  # not mapped any more, or the kernel's own


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="memory is read as on Linux")
@pytest.mark.parametrize("secure", [False, True])
def test_a_servers_memory_holds_no_update_of_a_client(experiment, tmp_path, secure):
    """Without secure aggregation it holds all of them: the search finds what is there."""
    settings = experiment(
        federation={"rounds": 1, "clients": 4},
        evaluation={"per_client": False, "samples": 0},
        training={"local_steps": 2},
        privacy={"secure_aggregation": secure},
        output={"folder": str(tmp_path / "run"), "verify": False},
    )
    (tmp_path / "experiment.toml").write_text(settings.to_toml())
    (tmp_path / "server.py").write_text(SERVER)
    looked_for = pieces(settings)
    assert sorted(looked_for) == [0, 1, 2, 3]
    words = [sys.executable, str(tmp_path / "server.py"), str(tmp_path)]
    with subprocess.Popen(words) as process:
        try:
            deadline = time.monotonic() + 240
            while not (tmp_path / "ready").exists():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
            found = set()
            for part in memory(process.pid):
                found |= {c for c, own in looked_for.items() if any(each in part for each in own)}
        finally:
            (tmp_path / "done").touch()
        assert process.wait(120) == 0
    assert found == (set() if secure else {0, 1, 2, 3})
