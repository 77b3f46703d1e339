"""A client whose own log is damaged: its operator and the coordinator are told why it is not
connected."""

import pytest

from fedloom.deployment import client
from fedloom.deployment.folders import ClientFolder
from fedloom.errors import AuditError
from fedloom.experiment.experiment import Experiment
from fedloom.runs.observers import Silent
from fedloom.runs.run import run_experiment
from fedloom.security.audit_log import AuditLog, events
from fedloom.security.keys import make_key


def damaged(path):
    log = AuditLog(path)
    for number in range(3):
        log.record("asked", round=number)
    path.write_text(path.read_text().replace('"round": 1', '"round": 7'))


def test_the_operator_is_told_before_the_client_joins(tmp_path):
    home, key = ClientFolder(tmp_path / "home"), tmp_path / "a.key"
    home.path.mkdir()
    make_key(key)
    damaged(home.path / "audit.jsonl")
    with pytest.raises(
        AuditError, match=r"line 2: it was changed.* Move that file to another folder"
    ):
        client.join(home, "localhost:9", key=key, authority=None)


def test_the_coordinator_is_told_and_the_run_goes_on(table, loopback, tmp_path):
    own = {
        **table,
        "federation": {"clients": 3, "rounds": 1, "patience": 0.5, "quorum": 0.3, "require": 2},
        "evaluation": {"per_client": False, "samples": 0},
        "training": {**table["training"], "local_steps": 1},
    }
    experiment = Experiment.from_table(own)
    federation = loopback(3)
    home = federation.home(1).path
    home.mkdir()
    damaged(home / "audit.jsonl")
    before = (home / "audit.jsonl").read_bytes()
    run_experiment(experiment, observer=Silent(), remote=federation.engine(experiment))
    refused = [event["reason"] for event in events(tmp_path / "run", "refused_join")]
    assert refused
    assert set(refused) == {"its own audit log is damaged; worker.log on its machine says why"}
    answered = {event["client"] for event in events(tmp_path / "run", "accepted")}
    assert answered == {0, 2}
    assert (home / "audit.jsonl").read_bytes() == before
