"""The package as a script or notebook uses it, with nothing but its public names."""

import asyncio
import json
import math
from collections import Counter

import pytest

import fedloom
from fedloom.data.examples import Instruction
from fedloom.data.loading import LoadedData

TABLE = {
    "data": {"source": "builtin:preferences", "builtin_rows": 60, "test_fraction": 0.2},
    "partition": {"kind": "iid"},
    "objective": {"name": "dpo"},
    "federation": {"clients": 2, "rounds": 2},
    "training": {"local_steps": 1, "batch_size": 4},
}


@pytest.fixture(scope="module", autouse=True)
def model(model_folder):
    """The model of TABLE; the built-in one would have to be trained first."""
    TABLE["model"] = {"path": str(model_folder)}


@pytest.fixture(scope="module")
def result(tmp_path_factory, model):
    folder = tmp_path_factory.mktemp("api") / "run"
    rounds, evaluations, steps = [], [], []
    result = fedloom.run(
        TABLE,
        output={"folder": str(folder)},
        on_round=lambda record: rounds.append(record.round),
        on_evaluation=lambda round, evaluation: evaluations.append((round, evaluation.metrics)),
        on_step=steps.append,
    )
    return result, rounds, evaluations, steps


def costs(folder):
    """What each client did in each round, but for scoring."""
    found = [json.loads(line) for line in (folder / "costs.jsonl").read_text().splitlines()]
    return [own for own in found if own["client"] >= 0 and own["steps"]]


def test_functions_are_called_with_rounds_and_evaluations(result):
    result, rounds, evaluations, _ = result
    assert isinstance(result, fedloom.Result) and rounds == [0, 1, 2]
    assert evaluations[0] == (0, result.metrics_before)
    assert evaluations[-1] == (2, result.metrics)


class Enough(Exception):
    pass


def after_round_one(record):
    if record.round == 1:
        raise Enough


def in_round_two(step):
    if (step.round, step.client) == (2, 1):
        raise Enough


def weights(run):
    return (run.adapter_path / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "stop", [{"on_round": after_round_one}, {"on_step": in_round_two}], ids=["round", "step"]
)
def test_what_a_function_raises_ends_a_run_that_goes_on(tmp_path, result, stop):
    """Also in the middle of a round, where what fails at a client leaves out that client alone.

    Neither the break nor ``on_step``, which the other run had and this one has not, moves a bit.
    """
    folder, again = tmp_path / "run", []
    with pytest.raises(Enough):
        fedloom.run(TABLE, output={"folder": str(folder)}, **stop)
    resumed = fedloom.resume(folder, on_round=lambda record: again.append(record.round))
    assert again == [2] and resumed.metrics == result[0].metrics
    assert weights(resumed) == weights(result[0])


def test_a_function_is_called_with_every_step(result):
    """A batch of four pairs of each client and round; the first has the loss of the reference, log 2."""
    done, _, _, steps = result
    found = [(own.round, own.client, own.step, own.examples) for own in steps]
    assert found == [(1, 0, 1, 4), (1, 1, 1, 4), (2, 0, 1, 4), (2, 1, 1, 4)]
    assert steps[0].loss == pytest.approx(math.log(2)) and steps[0].training == ""
    assert steps[3].loss != steps[0].loss and steps[0].learning_rate == 1e-3
    spent = [(own["round"], own["client"], own["tokens"]) for own in costs(done.folder)]
    assert [(own.round, own.client, own.tokens) for own in steps] == spent


SFT = {"data": {"source": "builtin:instructions", "builtin_rows": 60}, "objective": {"name": "sft"}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        {"name": "distillation", "server_epochs": 1, "client_epochs": 1},
        {"name": "split"},
        {"name": "fdlora"},
    ],
    ids=lambda own: own["name"],
)
def test_the_steps_of_methods_that_train_in_ways_of_their_own_are_told(method, tmp_path):
    """As many of each client and round as the run's costs have; those of the server are none."""
    steps, folder = [], tmp_path / "run"
    public = {"public": {"rows": 8}} if method["name"] == "distillation" else {}
    fedloom.run(
        {**TABLE, **SFT, **public, "method": method},
        training={"local_steps": 2, "batch_size": 4},
        output={"folder": str(folder), "verify": False},
        evaluation={"per_client": False} if method["name"] == "split" else {},
        on_step=steps.append,
    )
    spent = Counter()
    for cost in costs(folder):
        spent[cost["round"], cost["client"]] += cost["steps"]
    assert Counter((own.round, own.client) for own in steps) == spent
    assert sum(spent.values()) >= 8


def test_a_run_is_scored_and_shown(result, tmp_path):
    folder = result[0].folder
    scores = fedloom.evaluate(folder)
    assert scores.metrics["loss"] == pytest.approx(result[0].metrics["loss"], abs=1e-6)
    before = fedloom.evaluate(folder, adapter="base")
    assert before.metrics["loss"] == pytest.approx(result[0].metrics_before["loss"], abs=1e-6)


def test_a_table_is_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = {**TABLE, "name": "two", "compare": {"objectives": ["dpo"], "seeds": [0], "amount": 1}}
    done = fedloom.compare(table, workers=1, rounds=1, compare={"methods": ["fedavg", "fedprox"]})
    assert done.folder.resolve() == tmp_path / "comparisons/two" and done.page.is_file()
    assert [arm["method"] for arm in done.results["arms"]] == ["fedavg", "fedprox"]
    with pytest.raises(fedloom.FedloomError, match=r"\[compare\] is missing"):
        fedloom.compare(TABLE)


def test_progress_is_shown_when_asked_for(tmp_path, capsys, result):
    """Here where an event loop runs, as in a notebook; what is shown moves no bit."""

    async def cell():
        return fedloom.run(TABLE, output={"folder": str(tmp_path / "run")}, progress=True)

    shown = asyncio.run(cell())
    assert "round 2/2" in capsys.readouterr().out
    assert weights(shown) == weights(result[0])


def test_who_would_hold_what_is_returned(result, tmp_path):
    picture = tmp_path / "who.svg"
    found = fedloom.partition(TABLE, picture=picture)
    assert found == json.loads((result[0].folder / "partition.json").read_text())
    assert [own["client"] for own in found["clients"]] == [0, 1]
    assert (
        sum(own["train"] + own["held_out"] for own in found["clients"]) == 48
    )  # of 60, less a fifth
    assert "<svg" in picture.read_text()
    assert fedloom.partition(TABLE, clients=3)["clients"][2]["client"] == 2
    with pytest.raises(fedloom.FedloomError, match=r"there is no folder .*gone .*picture="):
        fedloom.partition(TABLE, picture=tmp_path / "gone" / "who.svg")


def test_a_model_is_exported(result, tmp_path):
    written = fedloom.export(result[0].folder, to=tmp_path / "model")
    assert written.folder == tmp_path / "model" and (written.folder / "config.json").is_file()
    assert written.loading.startswith("AutoModelForCausalLM.from_pretrained(")
    assert written.verified.startswith("verified: ")
    with pytest.raises(fedloom.FedloomError, match=r"is not empty; .* in Python to="):
        fedloom.export(result[0].folder, to=tmp_path / "model")
    with pytest.raises(fedloom.FedloomError, match=r"there is no folder .*gone .*to="):
        fedloom.export(result[0].folder, to=tmp_path / "gone" / "model")
    with pytest.raises(fedloom.FedloomError, match="no model of client 1's own"):
        fedloom.export(result[0].folder, client=1)


class Numbers:
    """Instructions that say their kind."""

    kind = "instruction"

    def load(self, rng):
        rows = [Instruction(n, f"What follows {n}?", f" {n + 1}.") for n in range(60)]
        order = [rows[place] for place in rng.permutation(60)]
        return LoadedData(order[12:], order[:12], "instruction", "1")


class Unsaid(Numbers):
    """The same, of which nobody knows what they are before they are read."""

    kind = None


class Wrong(Numbers):
    """They are said to be what they are not."""

    kind = "labelled"


def test_an_object_says_which_kind_its_rows_are(tmp_path):
    folder, table = tmp_path / "run", {k: v for k, v in TABLE.items() if k != "data"}
    sft = {**table, "objective": {"name": "sft"}}
    output = {"folder": str(folder), "verify": False}
    with pytest.raises(Enough):
        fedloom.run(sft, data=Numbers(), on_round=after_round_one, output=output)
    done = fedloom.resume(folder, data=Numbers())
    assert done.metrics["loss"] < done.metrics_before["loss"]
    named = f'source = "object {__name__}.Numbers"'
    assert named in (folder / "experiment.toml").read_text()
    assert fedloom.partition(sft, data=Numbers())["clients"][0]["train"] > 0
    with pytest.raises(fedloom.FedloomError, match=r"sft' needs instruction .* labelled data"):
        fedloom.run(sft, data=Wrong())
    with pytest.raises(
        fedloom.FedloomError, match=r"Unsaid returned instruction .* kind = 'instruct"
    ):
        fedloom.run(table, data=Unsaid())
    classified = {**table, "objective": {"name": "classification"}}
    with pytest.raises(fedloom.FedloomError, match=r"Wrong returned instruction .* be 'labelled'"):
        fedloom.run(classified, data=Wrong())


def test_a_page_is_made_of_a_run(result, tmp_path):
    folder = result[0].folder
    assert fedloom.report(folder) == folder / "report.html"
    several = fedloom.report(folder, str(folder), to=tmp_path / "both.html")
    assert several == tmp_path / "both.html" and "<html" in several.read_text()
    with pytest.raises(fedloom.FedloomError, match="give a run folder"):
        fedloom.report()
