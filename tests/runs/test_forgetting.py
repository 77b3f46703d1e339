"""What a checkpoint keeps of a client is deleted, and the run goes on with it as with a new one."""

import json

import pytest
from safetensors.torch import load_file

from absent import CLIENTS
from fedloom.errors import Interrupted
from fedloom.experiment.experiment import Experiment
from fedloom.methods import METHODS
from fedloom.runs.forget import forget_client
from fedloom.runs.observers import Silent
from fedloom.runs.run import resume_run, run_experiment
from fedloom.tensors import is_of_client
from sampling import sampled

QUICK = "fedawa"


class Stop(Silent):
    """Ends a run when its third round is over."""

    def round_done(self, record):
        if record.round == 3:
            raise KeyboardInterrupt


def names(checkpoint):
    """Names of all that a checkpoint keeps, and of its files."""
    facts = json.loads((checkpoint / "state.json").read_text())
    own = [*facts["order"], *facts["numbers"], *facts.get("best", {}).get("numbers", {})]
    files = ("state.safetensors", "best.safetensors")
    own += [n for f in files if (checkpoint / f).is_file() for n in load_file(checkpoint / f)]
    in_flight = checkpoint / "in_flight.safetensors"
    if in_flight.is_file():
        own += [n for n in load_file(in_flight) if n.startswith("answer/")]
    return own


@pytest.fixture
def stopped(suited, tmp_path):
    """Stop a method's run after three of five rounds; return its folder."""

    def run(method):
        table = suited(method)
        table["federation"] |= {"clients": CLIENTS, "rounds": 5}
        if method == "fedbuff":
            table["federation"]["clients_per_round"] = 2
        if method == "hetlora":
            table["method"]["pruning"] = 0.5
        table["training"]["local_steps"] = 1
        table["data"]["builtin_rows"] = 40
        table["evaluation"] = {"samples": 0, "per_client": False}
        if method == QUICK:
            table["evaluation"]["load_best_model_at_end"] = True
        with pytest.raises(Interrupted):
            run_experiment(Experiment.from_table(table), observer=Stop())
        return tmp_path / "run"

    return run


def require_forgotten(folder):
    """Require that nothing is named by client 1, and that the run goes on with it."""
    for checkpoint in (folder / "checkpoints").glob("round-*"):
        assert not [name for name in names(checkpoint) if is_of_client(name, 1)]
        assert not (checkpoint / "client-0001.safetensors").is_file()
    resume_run(folder)
    records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [0, 1, 2, 3, 4, 5]
    return records


def test_weights_that_are_kept_by_client_go_with_it(stopped):
    folder = stopped(QUICK)
    (newest,) = [own for own in (folder / "checkpoints").iterdir() if own.name == "round-0003"]
    assert names(newest).count("logit/000001") == 2  # of the last round, and of the best
    others = [name for name in names(newest) if not is_of_client(name, 1)]
    assert forget_client(folder, 1) == 2  # checkpoints
    assert names(newest) == others
    records = require_forgotten(folder)
    assert not any(record["rejected"] for record in records)


@pytest.mark.parametrize("method", sampled(sorted(METHODS.keys() - {"centralised", QUICK}), 2))
def test_any_method_goes_on_without_what_was_known_of_a_client(stopped, method):
    folder = stopped(method)
    kept = {name for own in (folder / "checkpoints").iterdir() for name in names(own)}
    stores = [*(folder / "checkpoints").glob("*/client-0001.safetensors")]
    if stores or any(is_of_client(name, 1) for name in kept):
        assert forget_client(folder, 1) > 0
    require_forgotten(folder)
