"""Every method gives the same bits, bytes and metrics in one process and between machines."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fedloom
from fedloom.experiment.experiment import Experiment
from fedloom.methods import METHODS
from fedloom.runs.observers import Silent
from fedloom.runs.run import run_experiment
from fedloom.security.audit_log import events
from fedloom.security.keys import secret_number
from fedloom.wire.envelope import Envelope, RequestHeader
from loopback import client_file

QUICK = ["fedavg", "split"]
ASYNCHRONOUS = {
    name for name, (_, kind) in METHODS.items() if kind.asynchronous
}  # in an order of their own
OTHERS = sorted(METHODS.keys() - {"centralised", *QUICK, *ASYNCHRONOUS})

MORE_ROUNDS = {
    "fedbiscuit": {
        "federation": {"rounds": 3, "clients": 3},
        "method": {"name": "fedbiscuit", "selectors": 2},
    }
}
"""With one selector no client has a model of its own."""


def rounds(folder):
    kept = []
    for line in (Path(folder) / "rounds.jsonl").read_text().splitlines():
        record = json.loads(line)
        del record["seconds"], record["flops"]  # costs() has the latter by phase
        kept.append(record)
    return kept


def costs(folder):
    """Costs that are counted, not measured.

    In one process clients whose models are still alike are judged once for all of them.
    """
    found, measured = {}, ("seconds", "peak_memory")
    for line in (Path(folder) / "costs.jsonl").read_text().splitlines():
        cost = json.loads(line)
        where = cost["round"], cost["client"], cost["phase"]
        shared = ("flops",) if cost["phase"] == "evaluate" else ()
        found[where] = {k: v for k, v in cost.items() if v and k not in (*measured, *shared)}
    return found


def states(folder):
    return [event["state"] for event in events(folder, "round")]


@pytest.mark.parametrize(
    "method", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_simulation_and_machines_give_the_same(suited, loopback, tmp_path, method):
    table = {**suited(method), **MORE_ROUNDS.get(method, {})}
    here = Experiment.from_table({**table, "output": {"folder": str(tmp_path / "here")}})
    there = Experiment.from_table({**table, "output": {"folder": str(tmp_path / "there")}})
    fedloom.run(here)
    federation = loopback(3)
    engine = federation.engine(there)
    run_experiment(there, observer=Silent(), remote=engine)
    one, two = tmp_path / "here", tmp_path / "there"
    assert states(one) == states(two)
    assert rounds(one) == rounds(two)
    assert costs(one) == costs(two)
    own = sorted(path.name for path in one.glob("clients/*"))
    for name in own:
        path = federation.home(int(name)).path / "runs"
        (model,) = path.glob("*/model")
        for file in (one / "clients" / name).glob("*.safetensors"):
            left, right = load_file(file), load_file(model / file.name)
            assert all(torch.equal(left[key], right[key]) for key in left.keys() | right.keys())
    assert bool(own) == (METHODS[method][1].own_models or METHODS[method][1].personal)


@pytest.mark.slow
def test_variants_of_lora_and_of_its_training_are_the_same_between_machines(
    suited, loopback, tmp_path
):
    table = suited("fedavg")
    table |= {
        "adapter": {
            "rank": 2,
            "use_dora": True,
            "init_lora_weights": "pissa",
            "targets": r".*\.(q|up)_proj",
            "modules_to_save": ["model.norm"],
        },
        "training": {
            **table["training"],
            "loraplus_lr_ratio": 4.0,
            "neftune_noise_alpha": 5.0,
            "data_seed": 7,
        },
        "evaluation": {**table.get("evaluation", {}), "load_best_model_at_end": True},
    }
    here = Experiment.from_table({**table, "output": {"folder": str(tmp_path / "here")}})
    there = Experiment.from_table({**table, "output": {"folder": str(tmp_path / "there")}})
    one = fedloom.run(here)
    two = run_experiment(there, observer=Silent(), remote=loopback(3).engine(there))
    assert states(tmp_path / "here") == states(tmp_path / "there")
    assert rounds(tmp_path / "here") == rounds(tmp_path / "there")
    files = [own.adapter_path / "adapter_model.safetensors" for own in (one, two)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "feedback"), [("fedavg", "classic"), ("fedavg", "ef21"), ("scaffold", "classic")]
)
def test_compressed_rounds_are_the_same_between_machines(
    suited, loopback, tmp_path, method, feedback
):
    """With clients that are away for some rounds, and what each side remembers of them."""
    wire = {"up": ["ternary:nearest", "zstd"], "down": "int4", "error_feedback": feedback}
    drawn = {"federation": {"rounds": 4, "clients": 3, "clients_per_round": 2}}
    table = {**suited(method), **drawn, "wire": {**wire, "keep_plain_below": 0}}
    here = Experiment.from_table({**table, "output": {"folder": str(tmp_path / "here")}})
    there = Experiment.from_table({**table, "output": {"folder": str(tmp_path / "there")}})
    fedloom.run(here)
    run_experiment(there, observer=Silent(), remote=loopback(3).engine(there))
    one, two = tmp_path / "here", tmp_path / "there"
    assert states(one) == states(two) and len(set(states(one))) == 5
    assert rounds(one) == rounds(two)
    assert costs(one) == costs(two)


@pytest.mark.slow
def test_generated_answers_and_their_rewards_are_the_same_between_machines(
    suited, loopback, tmp_path
):
    """GRPO with a divergence, batches that are used twice, and a client with a reward of its own."""
    table = {
        **suited("fedavg"),
        "data": {"source": "builtin:instructions", "builtin_rows": 60},
        "objective": {
            "name": "grpo",
            "rewards": ["regex:[a-m]", "exact_match"],
            "group": 3,
            "max_new_tokens": 5,
            "iterations": 2,
            "beta": 0.1,
        },
        "clients": {"groups": {"own": {"clients": [1], "rewards": ["regex:[n-z]"]}}},
        "federation": {"rounds": 2, "clients": 3},
        "training": {"learning_rate": 1e-2, "batch_size": 4, "local_steps": 4},
    }
    here = Experiment.from_table({**table, "output": {"folder": str(tmp_path / "here")}})
    there = Experiment.from_table({**table, "output": {"folder": str(tmp_path / "there")}})
    fedloom.run(here)
    federation = loopback(3)
    mail = federation.mail(source=table["data"]["source"])
    run_experiment(there, observer=Silent(), remote=federation.engine(there, mail))
    one, two = tmp_path / "here", tmp_path / "there"
    assert states(one) == states(two) and len(set(states(one))) == 3
    assert rounds(one) == rounds(two)
    assert costs(one) == costs(two)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "objective", "source"),
    [
        ({"name": "fedavg"}, {"name": "reward_model"}, "preferences"),
        (
            {"name": "appa", "most": 0.9},
            {"name": "rejection_sampling", "group": 2, "max_new_tokens": 3},
            "instructions",
        ),
    ],
)
def test_reward_models_and_best_answers_are_the_same_between_machines(
    suited, loopback, tmp_path, method, objective, source
):
    table = {
        **suited("fedavg"),
        "method": method,
        "data": {"source": f"builtin:{source}", "builtin_rows": 30},
        "objective": objective,
        "federation": {"rounds": 1, "clients": 2},
        "training": {"learning_rate": 1e-2, "batch_size": 4, "local_steps": 2},
    }
    here = Experiment.from_table({**table, "output": {"folder": str(tmp_path / "here")}})
    there = Experiment.from_table({**table, "output": {"folder": str(tmp_path / "there")}})
    fedloom.run(here)
    federation = loopback(2)
    mail = federation.mail(source=table["data"]["source"])
    run_experiment(there, observer=Silent(), remote=federation.engine(there, mail))
    one, two = tmp_path / "here", tmp_path / "there"
    assert states(one) == states(two) and len(set(states(one))) == 2
    assert rounds(one) == rounds(two)
    assert costs(one) == costs(two)


@pytest.mark.parametrize(
    ("method", "noise"),
    [
        pytest.param("fedamole", {"embedding_noise": "gaussian"}, marks=pytest.mark.slow),
        ("split", {"activation_noise": 0.1}),
    ],
)
@pytest.mark.slow
def test_noise_that_hides_rows_is_a_secret_of_the_client(
    suited, loopback, tmp_path, monkeypatch, method, noise
):
    table = suited(method)
    table["method"] |= noise
    models = (table["model"]["path"],)
    known = client_file(
        tmp_path / "known.toml", table["data"]["source"], models, worker={"secret_noise": False}
    )
    own = dict.fromkeys(range(3), known)
    drawn, replies = [], []

    def secret(key, *words):
        drawn.append(words)
        return secret_number(key, *words)

    def overheard(node, reply):
        replies.append((node, reply))
        return reply

    def made(name):
        return Experiment.from_table({**table, "output": {"folder": str(tmp_path / name)}})

    def played(name, federation, **changes):
        mail = federation.mail(source=table["data"]["source"], **changes)
        run_experiment(made(name), observer=Silent(), remote=federation.engine(made(name), mail))
        return states(tmp_path / name)[-1], mail.pushed

    fedloom.run(made("here"))
    simulated = states(tmp_path / "here")[-1]
    assert played("known", loopback(3), own=own)[0] == simulated
    monkeypatch.setattr("fedloom.deployment.worker.secret_number", secret)
    federation = loopback(3)
    hidden, pushed = played("hidden", federation, tamper=overheard)
    assert hidden != simulated
    asked = [envelope for node, envelope in pushed if node == 100]
    headers = [envelope.read(RequestHeader) for envelope in asked]
    expected = {(h.run, h.payload) for h in headers if h.kind == "exchange"}
    assert expected <= set(drawn) and len(expected) > 2  # other noise for every other message
    again = federation.worker(0, source=table["data"]["source"])  # as after a start of its machine
    answers = [reply for node, reply in replies if node == 100]
    for envelope, header, answer in zip(asked, headers, answers, strict=True):
        if header.kind != "end":
            repeated = Envelope.unpack(again.answer(envelope.pack(), streamed=False))
            assert repeated.payload == answer.payload
