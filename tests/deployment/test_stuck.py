"""A server that goes away while a client is asked must not leave a client that is never there again."""

import time

import pytest

from machines import machines
from sampling import drawn, tries


@pytest.mark.parametrize("kills", tries(1, 20))
def test_a_client_is_there_after_a_server_was_killed_while_it_was_asked(experiment, kills):
    """Killed between what a message holds and the answer to it, and a while around that."""
    settings = experiment(
        method={"name": "scaffold"},
        federation={"clients": 2, "rounds": 2, "patience": 60, "quorum": 1.0},
        training={"local_steps": 1},
    )
    rng, waits = drawn("stuck"), []
    with machines(2) as own:
        own.start_all()
        path = own.folder / "run.toml"
        path.write_text(settings.to_toml())
        own.offer(models=[settings.model.path])
        words = ["run", path, "--engine", "flower", "--home", own.server, "--set"]
        for kill in range(kills):
            said = own.folder / f"c{rng.randrange(2)}" / "worker.log"
            before = said.stat().st_size
            log = own.start("run", *words, f"output.folder={own.folder}/cut-{kill}")
            while b"ready after" not in said.read_bytes()[before:]:
                assert own.processes["run"].poll() is None, log.read_text()
                time.sleep(0.001)
            time.sleep(rng.uniform(0.0, 0.1))
            own.kill("server")
            own.kill("run")
            time.sleep(2)
            own.start_server()
            start = time.monotonic()
            own.call(*words, f"output.folder={own.folder}/whole-{kill}")
            waits.append(time.monotonic() - start)
    print(f"runs after: {[round(wait) for wait in waits]} s")
