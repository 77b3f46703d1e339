"""FedMoE: who holds what, means over holders, bytes, absent clients, resuming."""

import re

import pytest
import torch

import fedloom
from fedloom.engines.in_process import SimulationEngine
from fedloom.errors import Interrupted, ModelError, SettingsError
from fedloom.methods.bases.parameter_averaging import ADAPTER
from fedloom.methods.fedmoe import EXPERTS, USED
from fedloom.models.submixture import block_number
from fedloom.runs.observers import Silent
from fedloom.runs.run import resume_run
from fedloom.tensors import by_client, part_of
from fedloom.wire.messages import Answer, decode, encode


@pytest.fixture
def mixture(experiment, mixture_folder, tmp_path):
    def make(**sections):
        own = {
            "model": {"path": str(mixture_folder)},
            "adapter": {"kind": "submixture"},
            "method": {"name": "fedmoe", "experts_per_client": 3},
            "federation": {"clients": 3, "rounds": 2},
            **sections,
        }
        table = experiment().to_table()
        table = {name: value for name, value in table.items() if name not in ("adapter", "method")}
        for name, section in own.items():
            table[name] = {**table.get(name, {}), **section}
        return fedloom.Experiment.from_table(table)

    return make


@pytest.fixture
def messages(monkeypatch):
    seen = []
    plain = SimulationEngine.answer

    def answer(self, exchange, client):
        found = plain(self, exchange, client)
        request = decode(exchange.requests[client], exchange.request_schema)
        reply = decode(found.data, exchange.reply_schema)
        seen.append((exchange.action, exchange.round, client, request, reply))
        return found

    monkeypatch.setattr(SimulationEngine, "answer", answer)
    return seen


def test_a_client_holds_what_its_rows_use_most_and_keeps_it(mixture, federate, messages):
    found = federate(mixture())
    held = by_client(found.state.tensors, EXPERTS)
    probes = [(client, reply) for action, _, client, _, reply in messages if action == "probe"]
    assert [client for client, _ in probes] == [0, 1, 2]  # once, in the first round
    for client, reply in probes:
        used = reply.tensors[USED]
        rows = found.parts.engine.shares[client].tokens
        assert (used.sum(1) == 2 * len(rows.tokens)).all()  # two experts a token
        for block in range(2):
            chosen = held[client][block].tolist()
            others = [e for e in range(6) if e not in chosen]
            assert len(chosen) == 3 and chosen == sorted(chosen)
            assert used[block, chosen].min() >= used[block, others].max()


def test_experts_are_means_over_their_holders_and_others_stay(mixture, federate, messages):
    found = federate(mixture(federation={"clients": 3, "rounds": 1}))
    held, blocks = by_client(found.state.tensors, EXPERTS), found.parts.method.blocks
    final, start = part_of(found.state.tensors, ADAPTER), found.parts.initial
    replies = {c: reply for action, _, c, _, reply in messages if action == "train"}
    stayed = 0
    for name, tensor in final.items():
        block = block_number(name, blocks)
        for expert in range(6):
            rows, total = [], 0.0
            for client, reply in replies.items():
                where = (held[client][block] == expert).nonzero()
                if len(where):
                    weight = reply.numbers["examples"]
                    rows.append(weight * reply.tensors[name][int(where)])
                    total += weight
            wanted = sum(rows) / total if rows else start[name][expert]
            stayed += not rows
            assert torch.allclose(tensor[expert], wanted, atol=1e-6)
    assert stayed < 6 * len(final)


def test_bytes_are_the_held_experts_both_ways(mixture, federate):
    found = federate(mixture())
    size = sum(t.numel() * 4 for t in found.parts.initial.values()) // 2  # three of six
    for client in range(3):
        cost = next(c for c in found.costs(client) if c.phase == "train")
        assert 0 <= cost.bytes_down - size < 1000 and 0 <= cost.bytes_up - size < 1000


@pytest.mark.parametrize("value", [-1, (1 << 40) + 1])
def test_counts_that_cannot_be_ones_leave_their_client_out(mixture, federate, monkeypatch, value):
    plain = SimulationEngine.answer

    def answer(self, exchange, client):
        found = plain(self, exchange, client)
        if exchange.action != "probe" or client != 1:
            return found
        payload = decode(found.data, exchange.reply_schema)
        payload.tensors["used"][0, 0] = value
        return Answer(client, encode(payload, exchange.reply_schema))

    monkeypatch.setattr(SimulationEngine, "answer", answer)
    (record,) = federate(mixture(federation={"clients": 3, "rounds": 1})).records
    assert record.rejected == {1: "counts of tokens must be 0 to 1099511627776"}
    assert [(o.client, o.kind) for o in record.offences] == [(1, "out_of_range")]


def test_absent_clients_probe_when_they_first_come(mixture, federate, messages):
    found = federate(mixture(federation={"clients": 3, "rounds": 3, "clients_per_round": 1}))
    probed = [(round, client) for action, round, client, _, _ in messages if action == "probe"]
    trained = [(round, client) for action, round, client, _, _ in messages if action == "train"]
    assert len({client for _, client in probed}) == len(probed)
    assert {client for _, client in probed} == {client for _, client in trained}
    assert list(by_client(found.state.tensors, EXPERTS)) == sorted(c for _, c in probed)


@pytest.mark.slow
def test_own_models_load_in_transformers_and_a_resumed_run_is_the_same(mixture, tmp_path):
    from transformers import AutoModelForCausalLM

    class Stop(Silent):
        def round_done(self, record):
            if record.round == 1:
                raise KeyboardInterrupt

    whole = fedloom.run(mixture(output={"folder": str(tmp_path / "whole")}))
    with pytest.raises(Interrupted):
        fedloom.run(mixture(output={"folder": str(tmp_path / "cut")}), observer=Stop())
    resume_run(tmp_path / "cut")
    for client in range(3):
        left, right = (tmp_path / f / f"clients/{client:04d}" for f in ("whole", "cut"))
        for name in ("model.safetensors", "config.json"):
            assert (left / name).read_bytes() == (right / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(str(whole.folder / "clients/0001"))
    assert model.config.num_local_experts == 3


def test_mixed_precision_trains_experts_in_float32(mixture, federate):
    found = federate(
        mixture(training={"precision": "bf16"}, federation={"clients": 3, "rounds": 1})
    )
    final, start = part_of(found.state.tensors, ADAPTER), found.parts.initial
    assert {t.dtype for t in final.values()} == {torch.float32}
    assert any(not torch.equal(final[name], start[name]) for name in start)


@pytest.mark.parametrize(("count", "ok"), [(1, False), (2, True), (6, True), (7, False)])
def test_how_many_experts_a_client_may_hold(mixture, federate, count, ok):
    own = mixture(
        method={"name": "fedmoe", "experts_per_client": count},
        federation={"clients": 3, "rounds": 1},
    )
    if ok:
        federate(own)
        return
    with pytest.raises(ModelError, match=r"has 6 experts in a block and a token passes 2"):
        federate(own)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"method": {"name": "fedavg"}}, "use fedmoe or local_only"),
        ({"adapter": {"kind": "lora"}}, "use adapter.kind = \"submixture\", not 'lora'"),
        ({"adapter": {"kind": "submixture", "rank": 4}}, "adapter.rank is a setting of lora"),
        ({"adapter": {"kind": "submixture", "layers": 1}}, "submixture chooses no layers"),
    ],
)
def test_what_does_not_go_together(mixture, sections, words):
    table = mixture().to_table() | sections
    with pytest.raises(SettingsError, match=re.escape(words)):
        fedloom.Experiment.from_table(table)


def test_a_backbone_without_experts_is_refused(mixture, federate, model_folder):
    with pytest.raises(ModelError, match="this model is 'llama' and has none"):
        federate(mixture(model={"path": str(model_folder)}))
