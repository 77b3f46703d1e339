"""Rows that lie with the clients, and a coordinator that has a held-out set and nothing else."""

import json

import pytest

from fedloom.errors import RoundFailed, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.runs.observers import Silent
from fedloom.runs.run import run_experiment
from fedloom.security.audit_log import events
from loopback import OPEN, client_file


@pytest.fixture
def private(table, loopback, rows_file, tmp_path):
    """Run an experiment over clients with these rows; returns the run's folder and the federation."""

    def run(kind, rows, held_out, **sections):
        federation, own = loopback(len(rows)), {}
        public = sections.get("public", {}).get("source")
        shared = {"public": {"source": public, "kind": kind}} if public else {}
        for client, lines in enumerate(rows):
            own[client] = client_file(
                tmp_path / f"own-{client}.toml", models=federation.models, policy=OPEN,
                data={"source": rows_file(lines, f"own-{client}.jsonl"), "kind": kind}, **shared,
            )  # fmt: skip
        data = {
            "source": "clients", "kind": kind, "test_source": rows_file(held_out, "test.jsonl"), }  # fmt: skip
        settings = {
            **table, "data": data, "partition": {"client_test_fraction": 0.3}, "federation": {"clients": len(rows), "rounds": 2, "patience": 0.5},
            "evaluation": {**table["evaluation"], "per_client": True, "samples": 0},
            "training": {**table["training"], "local_steps": 1}, **sections,
        }  # fmt: skip
        engine = federation.engine(
            experiment := Experiment.from_table(settings), federation.mail(own=own)
        )
        return run_experiment(experiment, observer=Silent(), remote=engine), federation

    return run


def pairs(start, count):
    return [
        {"prompt": f"Q{i}?", "chosen": f"Yes, {i}.", "rejected": f"No, {i}."}
        for i in range(start, start + count)
    ]


def test_clients_with_models_of_their_own_are_judged_on_their_own_rows(private, mixture_folder):
    """Found: nobody was judged, and the run ended with a TypeError after all rounds."""
    result, federation = private(
        "preference", [pairs(0, 12), pairs(100, 16)], pairs(900, 6),
        method={"name": "fedamole"}, model={"path": str(mixture_folder)},
        adapter={"kind": "experts", "rank": 2, "experts": 4},
    )  # fmt: skip
    rounds = [json.loads(x) for x in (result.folder / "rounds.jsonl").read_text().splitlines()]
    for record in rounds:
        assert not record["rejected"]
        assert set(record["evaluation"]["clients"]["each"]) == {"0", "1"}
    partition = json.loads((result.folder / "partition.json").read_text())
    assert [(own["train"], own["held_out"]) for own in partition["clients"]] == [(8, 4), (11, 5)]
    assert (
        result.folder / "summary.json"
    ).exists() and "on clients' own rows (mean)" in result.summary_text
    for client in range(2):
        (model,) = federation.home(client).path.glob("runs/*/model/expert_model.safetensors")
        assert model.stat().st_size


@pytest.mark.parametrize("method", ["split", "fedavg"])
def test_a_class_that_the_coordinator_does_not_have_is_told_before_training(private, method):
    """Found: an AssertionError."""
    texts = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(20)]
    strange = [{"text": f"text {i}", "label": "abc"[i % 3]} for i in range(20)]
    sections = {"method": {"name": method}, "objective": {"name": "classification"}}
    with pytest.raises(RoundFailed) as failed:
        private("labelled", [texts, strange], texts[:8], **sections)
    assert "client-1 (client 1): its rows cannot be used as the experiment asks" in str(
        failed.value
    )
    assert "client-0" not in str(failed.value)


LABELLED = {"objective": {"name": "classification"}}
METHODS = {
    "fedavg": {},
    "scaffold": {},
    "fedpdpo": {},
    "fedamole": {"adapter": {"kind": "experts", "rank": 2, "experts": 4}},
    "distillation": LABELLED,
    "split": LABELLED,
}


def texts(start, count):
    return [
        {"text": f"text {i} {['good', 'bad', 'fine', 'poor'][i % 4]}", "label": "ab"[i % 2]}
        for i in range(start, start + count)
    ]


@pytest.mark.parametrize(
    "method",
    [
        name if name in ("fedavg", "split") else pytest.param(name, marks=pytest.mark.slow)
        for name in METHODS
    ],
)
def test_a_simulation_of_a_file_for_each_client_has_the_bits_of_clients_with_rows_of_their_own(
    private, table, rows_file, tmp_path, mixture_folder, method
):
    """Found: no simulation had them, so nothing told whether a run between machines was right."""
    sections = {"method": {"name": method}, "admission": {"max_examples": "any"}, **METHODS[method]}
    if method == "fedamole":
        sections["model"] = {"path": str(mixture_folder)}
    if method == "distillation":
        sections["public"] = {"source": rows_file(texts(500, 20), "public.jsonl"), "rows": 12}
    kind = "labelled" if "objective" in sections else "preference"
    make = texts if kind == "labelled" else pairs
    rows, test = [make(0, 13), make(100, 17), make(200, 9)], make(900, 8)
    there, _ = private(kind, rows, test, **sections)
    data = {
        "source": [rows_file(own, f"here-{n}.jsonl") for n, own in enumerate(rows)],
        "kind": kind, "test_source": rows_file(test, "here-test.jsonl"),
    }  # fmt: skip
    here = run_experiment(
        Experiment.from_table(
            {
                **table, "data": data, "partition": {"kind": "files", "client_test_fraction": 0.3},
                "federation": {"clients": 3, "rounds": 2},
                "evaluation": {**table["evaluation"], "per_client": True, "samples": 0},
                "training": {**table["training"], "local_steps": 1}, **sections,
                "output": {"folder": str(tmp_path / "here")},
            }
        ),
        observer=Silent(),
    )  # fmt: skip
    states = [[event["state"] for event in events(own.folder, "round")] for own in (here, there)]
    assert states[0] == states[1] and len(states[0]) == 3
    judged = [
        [
            json.loads(line)["evaluation"]
            for line in (own.folder / "rounds.jsonl").read_text().splitlines()
        ]
        for own in (here, there)
    ]
    assert all(record["clients"] for record in judged[0]) or method == "split"
    assert [own["clients"] for own in judged[0]] == [own["clients"] for own in judged[1]]
    for one, two in zip(*judged, strict=True):  # clients there do not have the coordinator's set
        assert two["global"].items() <= one["global"].items()


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"data": {"source": "builtin:preferences"}},
            r"needs data\.source = \[\.\.\.\], a file for each",
        ),
        (
            {"data": {"source": ["a.jsonl"], "kind": "preference", "test_source": "t.jsonl"}},
            "names 1 files",
        ),
        ({"data": {"source": ["a.jsonl", "b.jsonl"], "kind": "preference"}}, "name a held-out set"),
    ],
)
def test_what_does_not_go_with_a_file_for_each_client(table, sections, words):
    settings = {**table, "federation": {"clients": 2}, "partition": {"kind": "files"}, **sections}
    with pytest.raises(SettingsError, match=words):
        Experiment.from_table(settings)
