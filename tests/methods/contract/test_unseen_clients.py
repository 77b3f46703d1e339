"""Clients that join at the end: they were in no round, and are judged before and after their own steps."""

import json

import pytest

import fedloom
from fedloom.errors import SettingsError
from fedloom.federation.admission import Admission

PEOPLE = {
    "data": {"source": "builtin:opposed", "builtin_rows": 60},
    "partition": {"kind": "column", "column": "side", "client_test_fraction": 0.2},
    "federation": {"clients": 4, "rounds": 2},
    "clients": {"newcomers": [1, 3], "newcomer_steps": 3},
    "training": {"learning_rate": 1e-2},
}


@pytest.mark.parametrize(
    "method",
    ["fedpdpo", "fedavg", "ditto", "ffa_lora", "fedavg_ft", "local_only", "flora", "fedex_lora"],
)
def test_they_are_in_no_round_and_judged_twice(experiment, method):
    result = fedloom.run(experiment(method={"name": method}, **PEOPLE))
    summary = json.loads((result.folder / "summary.json").read_text())
    lines = (result.folder / "rounds.jsonl").read_text().splitlines()
    rounds = [json.loads(line) for line in lines]
    assert {c for record in rounds for c in record["clients"]} == {0, 2}
    assert set(rounds[-1]["evaluation"]["clients"]["each"]) == {"0", "2"}
    joined = summary["newcomers"]
    assert set(joined["each"]) == {"1", "3"}
    for metrics in joined["each"].values():
        assert metrics["after.loss"] != metrics["loss"]
    assert not (result.folder / "clients" / "0001").exists()


def test_only_a_newcomers_own_parts_are_fitted(experiment, federate):
    found = federate(experiment(method={"name": "fedpdpo", "bottleneck": 4}, **PEOPLE))
    parts, trained = found.parts, []
    client = parts.engine.client

    def watching(number, round, link=None):
        own = client(number, round, link)
        train = own.train

        def noted(rate, **options):
            trained.append(set(own.model.parameters) - set(options["frozen"]))
            return train(rate, **options)

        own.train = noted
        return own

    parts.engine.client = watching
    parts.unseen.evaluate_all(found.state, 2, parts.engine, Admission())
    assert len(trained) == 2
    assert all(name.startswith("own.") for names in trained for name in names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clients": {"newcomers": [9]}}, "there is no client 9"),
        ({"clients": {"newcomers": [0, 1, 2, 3]}}, "no client is left to train"),
        ({"method": {"name": "centralised"}}, "go with methods that share parameters"),
        ({"evaluation": {"per_client": False}}, "evaluated on their own rows"),
    ],
)
def test_what_cannot_be_is_said(experiment, change, message):
    with pytest.raises(SettingsError, match=message):
        experiment(**{**PEOPLE, **change})
