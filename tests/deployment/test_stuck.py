"""A server that goes away while a message is on its way must not leave a client that is never there again."""

import time
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import start_client_internal

from fedloom.deployment.client import STUCK
from machines import machines
from sampling import drawn, tries


@pytest.mark.parametrize("error", [RunNotRunningException(), ConnectionError("gone")])
def test_flower_says_so_when_it_did_not_receive_a_message_whole(error, monkeypatch):
    """By then something may be at work on that message, and answers it."""
    said, state = [], MagicMock()
    monkeypatch.setattr(
        start_client_internal, "log", lambda level, text, *own: said.append(text % own)
    )
    metadata = SimpleNamespace(run_id=1, message_id="ab", message_type="query", group_id="")
    message = SimpleNamespace(metadata=metadata)
    monkeypatch.setattr(start_client_internal, "pull_objects", lambda ids, pull_object_fn: {})
    taken = start_client_internal._pull_and_store_message(
        state=state, object_store=MagicMock(), node_config={}, receive=lambda: (message, None),
        get_run=None, get_fab=None, pull_object=None, trusted_entities=None,
        confirm_message_received=MagicMock(side_effect=error),
    )  # fmt: skip
    assert taken is None and state.create_task.called
    assert STUCK.search(said[-1].encode()) and not any(STUCK.search(s.encode()) for s in said[:-1])


@pytest.mark.serial
@pytest.mark.parametrize(("enough", "most"), tries((3, 14), (20, 60)))
def test_a_client_is_there_after_a_server_was_killed_while_it_was_asked(experiment, enough, most):
    """Killed between what a message holds and the word that it came, which is some milliseconds.

    ``enough`` kills are to come in time, and so many at ``most`` are tried for them.
    """
    settings = experiment(
        method={"name": "scaffold"},
        federation={"clients": 2, "rounds": 2, "patience": 60, "quorum": 1.0},
        training={"local_steps": 1},
    )
    rng, waits, hits = drawn("stuck"), [], 0
    with machines(2) as own:
        own.start_all()
        path = own.folder / "run.toml"
        path.write_text(settings.to_toml())
        words = ["run", path, "--engine", "flower", "--home", own.server, "--set"]
        for kill in range(most):
            said = own.folder / f"c{rng.randrange(2)}" / "logs" / "supernode.out"
            before = said.stat().st_size
            log = own.start("run", *words, f"output.folder={own.folder}/cut-{kill}")
            while b"Receiving" not in said.read_bytes()[before:]:
                assert own.processes["run"].poll() is None, log.read_text()
                time.sleep(0.001)
            time.sleep(rng.uniform(0.02, 0.07))
            own.kill("server")
            own.kill("run")
            time.sleep(2)
            own.start_server()
            start = time.monotonic()
            own.call(*words, f"output.folder={own.folder}/whole-{kill}")
            waits.append(time.monotonic() - start)
            hits += STUCK.search(said.read_bytes()[before:]) is not None
            if hits == enough:
                break
    assert hits
    print(f"{hits} kills came in time; runs after: {[round(wait) for wait in waits]} s")
