"""KD-FedLLM: what travels, what each setting changes, who learns from whom, and what a bad client can do."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fedloom
from fedloom.aggregation.soft_labels import likeliest
from fedloom.data.builtin import pretraining_texts
from fedloom.data.public import PublicRows
from fedloom.errors import DataError, MessageError, ModelError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.methods import METHODS
from fedloom.methods.bases.logit_wire import (
    SoftLabelWire,
    answers,
    index_dtype,
    texts_of,
    true_entries,
)
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.contract.method import ModelSpec
from fedloom.methods.distillation import DistillationMethod, DistillationSettings
from fedloom.models.tiny import TinyRecipe, make_tiny_model
from fedloom.runs.adapter_scores import evaluate_adapter
from fedloom.runs.assembly import assemble
from fedloom.runs.partitioning import partition_data
from fedloom.runs.run import resume_run
from fedloom.training.settings import Part, Work
from fedloom.wire.messages import Payload, decode, encode

KINDS = {
    "sft": {
        "data": {"source": "builtin:instructions", "builtin_rows": 60},
        "objective": {"name": "sft"},
    },
    "classification": {
        "data": {"source": "builtin:labelled", "builtin_rows": 100},
        "objective": {"name": "classification"},
    },
}


@pytest.fixture
def distil(experiment):
    def make(kind="classification", public=None, clients=3, groups=None, rounds=2, **method):
        return experiment(
            **KINDS[kind],
            public={"rows": 12, **(public or {})},
            clients={"groups": groups or {}},
            training={"learning_rate": 3e-3, "batch_size": 8},
            federation={"rounds": rounds, "clients": clients},
            method={"name": "distillation", "server_epochs": 1, "client_epochs": 1, **method},
        )

    return make


def watching(seen):
    def watch(parts):
        exchange = parts.engine.exchange

        def watched(question):
            seen.append(question)
            return exchange(question)

        parts.engine.exchange = watched

    return watch


@pytest.mark.parametrize(("kind", "kept"), [("sft", {"top_k": 7}), ("sft", {"top_mass": 0.4}), ("classification", {})])  # fmt: skip
def test_answers_stand_in_the_order_of_the_rows_however_they_are_read(
    distil, kind, kept, monkeypatch
):
    built = distil(kind)
    parts = assemble(built, partition_data(built))
    resources, head = parts.local.resources[0], parts.local.objective.head
    model, public = resources.model, resources.public
    settings = DistillationSettings(**kept)
    own = parts.local.training
    assert len(set(public.share.tokens.lengths.tolist())) > 3  # passes go from long to short

    def said(**changed):
        found = answers(model, public, head, settings, own.model_copy(update=changed))
        return found.dense()

    together = said(tokens_per_pass=10_000)
    assert together.shape == (int(public.share.positions[-1]), public.width)
    apart = said(tokens_per_pass=1)
    assert not torch.equal(together, together[0].expand_as(together))
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-5)
    monkeypatch.setattr(
        "fedloom.objectives.logps.CHUNK", 5 * public.width
    )  # five positions at a time
    torch.testing.assert_close(said(tokens_per_pass=10_000), together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "method",
    [{}, {"top_k": 3}, {"top_mass": 0.8}, {"top_k": 4, "top_mass": 0.9, "encoding": "int8"}],
    ids=str,
)
def test_no_parameter_travels(federate, distil, kind, method):
    seen = []
    found = federate(distil(kind, **method), watching(seen))
    assert {question.action for question in seen} == {"train", "distil"}
    names = {
        spec.name
        for question in seen
        for schema in (question.request_schema, question.reply_schema)
        for spec in schema.tensors
    }
    assert names <= {"values", "values_scale", "indices", "counts"}
    assert not names & set(found.parts.initial)
    assert any(not torch.equal(t, found.parts.initial[n]) for n, t in found.adapter.items())


def test_all_logits_equal_the_k_likeliest_of_all(federate, distil):
    whole = federate(distil(encoding="fp32"))
    kept = federate(distil(encoding="fp32", top_k=8))
    assert all(torch.equal(whole.adapter[n], kept.adapter[n]) for n in whole.adapter)


RULES = ["mean", "mean_prob", "entropy", "confidence", "lowest_loss"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.slow
def test_every_rule_trains_server_and_clients(federate, distil, rule):
    method = {"rule": rule, "top_k": 5, "server_epochs": 4, "client_epochs": 2}
    found = federate(distil("sft", public={"labelled": True}, rounds=3, **method), evaluate=True)
    first, last = (record.evaluation.metrics for record in (found.records[0], found.records[-1]))
    assert last["loss"] < first["loss"]
    assert last["clients_loss"] < first["clients_loss"]


def test_every_rule_is_another(federate, distil):
    public = {"labelled": True}
    adapters = [federate(distil(rule=rule, public=public, rounds=1)).adapter for rule in RULES]
    heads = {tuple(a["base_model.model.score.weight"].flatten().tolist()) for a in adapters}
    assert len(heads) == len(RULES)


@pytest.mark.slow
def test_the_same_bits_again_and_after_a_resume(distil, tmp_path):
    experiment = distil(rounds=3, rows_per_round=5, top_k=3)

    def at(name, rounds):
        return dataclasses.replace(
            experiment,
            federation=experiment.federation.model_copy(update={"rounds": rounds}),
            output=experiment.output.model_copy(update={"folder": str(tmp_path / name)}),
        )

    once = fedloom.run(at("once", 3))
    again = fedloom.run(at("again", 3))
    resumed = resume_run(tmp_path / "again", from_round=2)
    for name in ("adapter", "clients/0000", "clients/0002"):
        files = [r.folder / name / "adapter_model.safetensors" for r in (once, again, resumed)]
        assert len({file.read_bytes() for file in files}) == 1


def test_clients_keep_their_adapters_and_differ(federate, distil):
    found = federate(distil())
    own = [found.parts.engine.store.slots(client)["adapter"] for client in range(3)]
    name = next(iter(own[0]))
    assert not torch.equal(own[0][name], own[1][name])


def test_rows_of_a_round_are_drawn_anew_and_known_to_all(distil, federate):
    experiment = distil(rows_per_round=4)
    found = federate(experiment)
    method, public = found.parts.method, found.parts.engine.resources[0].public
    drawn = [method.rows_of_round(public, 0, round).share.tokens.rows.tolist() for round in (1, 2)]
    assert drawn[0] != drawn[1] and all(len(rows) == 4 for rows in drawn)
    server = method.rows_of_round(method.server.public, 0, 1).share.tokens.rows.tolist()
    assert server == drawn[0]


@pytest.mark.slow
def test_clients_of_other_ranks_and_backbones_take_part(federate, distil, tmp_path):
    other = tmp_path / "other"
    recipe = TinyRecipe(vocabulary=290, hidden=48, intermediate=64, layers=3, heads=2, steps=2)
    make_tiny_model(other, pretraining_texts(np.random.default_rng(5), 200), recipe)
    groups = {"wide": {"clients": [1], "rank": 6}, "deep": {"clients": [2], "model": str(other)}}
    own = distil(groups=groups, server_rank=4, server_model=str(other))
    scored = evaluate_adapter(own, fedloom.run(own).adapter_path).metrics
    assert 0 <= scored["accuracy"] <= 1  # the adapter is of the server's model, and loads there
    found = federate(distil(groups=groups, server_rank=4), evaluate=True)
    models = [found.parts.engine.resources[client].model for client in range(3)]
    assert len({id(model) for model in models}) == 3
    assert models[2].model.config.num_hidden_layers == 3
    ranks = {tensor.shape[0] for name, tensor in found.adapter.items() if "lora_A" in name}
    assert ranks == {4}
    assert not any(record.rejected for record in found.records)


@pytest.mark.slow
def test_mixed_clients_know_more_than_each_by_itself(federate, experiment, tmp_path):
    """Two ranks, two backbones, clients with few of the classes: with logits they learn the others'."""
    small = TinyRecipe(hidden=48, intermediate=128, layers=2)
    make_tiny_model(tmp_path / "small", pretraining_texts(np.random.default_rng(0), 4000), small)
    groups = {
        "low": {"clients": [1], "rank": 2},
        "small": {"clients": [2, 3], "model": str(tmp_path / "small")},
    }

    def play(method):
        own = experiment(
            model={"path": "tiny"}, adapter={"rank": 8}, clients={"groups": groups},
            data={"source": "builtin:labelled", "builtin_rows": 1200}, public={"rows": 200},
            objective={"name": "classification"}, method=method,
            partition={"kind": "dirichlet", "column": "label", "alpha": 0.1, "minimum": 10},
            federation={"rounds": 4, "clients": 4},
            training={"learning_rate": 3e-3, "batch_size": 16},
            evaluation={"per_client": False, "every": 4},
        )  # fmt: skip
        return federate(own, evaluate=True).records[-1].evaluation.metrics

    together = play({"name": "distillation", "rule": "mean_prob", "down": "consensus"})
    alone = play({"name": "local_only"})
    assert together["clients_accuracy"] > alone["accuracy"] + 0.02, (together, alone)


def test_over_tokens_all_models_need_one_vocabulary(federate, distil, tmp_path):
    recipe = TinyRecipe(vocabulary=290, hidden=32, intermediate=64, layers=2, heads=2, steps=2)
    make_tiny_model(tmp_path / "other", pretraining_texts(np.random.default_rng(5), 200), recipe)
    with pytest.raises(ModelError, match=r"different vocabularies \(320 and 290 tokens"):
        federate(distil("sft", groups={"odd": {"clients": [1], "model": str(tmp_path / "other")}}))


def changed(change):
    def break_(parts):
        exchange = parts.engine.exchange

        def broken(question):
            for one in exchange(question):
                if one.client == 1 and question.action == "train":
                    payload = decode(one.data, question.reply_schema)
                    tensors = {name: t.clone() for name, t in payload.tensors.items()}
                    change(tensors)
                    data = encode(
                        Payload(tensors, payload.numbers, payload.metrics), question.reply_schema
                    )
                    one = dataclasses.replace(one, data=data)
                yield one

        parts.engine.exchange = broken

    return break_


def swap(tensors):
    tensors["indices"] = tensors["indices"].flip(-1)


def beyond(tensors):
    tensors["indices"][0, -1] = 200


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t["values"].fill_(float("nan")), "NaN or infinity"),
        (lambda t: t["values"].fill_(-6e4), "is not between -10000 and 0"),
        (lambda t: t["values"].fill_(2.0), "is not between -10000 and 0"),
        (swap, "must rise and occur once"),
        (beyond, "index 200 is not below the width of 8"),
    ],
)
def test_bad_logits_leave_their_client_out_and_the_round_goes_on(federate, distil, change, reason):
    found = federate(distil(top_k=3), changed(change))
    for record in found.records:
        assert list(record.rejected) == [1] and reason in record.rejected[1]
    assert all(torch.isfinite(t).all() for t in found.adapter.values())


def counts_lie(tensors):
    tensors["counts"][0] += 1


def too_few_indices(tensors):
    tensors["indices"] = tensors["indices"][1:]


@pytest.mark.parametrize("change", [counts_lie, too_few_indices])
def test_counts_that_do_not_add_up_leave_their_client_out(federate, distil, change):
    found = federate(distil(top_mass=0.9), changed(change))
    assert all(list(record.rejected) == [1] for record in found.records)


def test_the_wire_gives_back_what_it_was_given():
    logps = torch.randn(30, 9, generator=torch.Generator().manual_seed(0)).log_softmax(-1)

    class Rows:
        positions = [30]

    for settings in ({}, {"top_k": 4}, {"top_mass": 0.7}, {"top_k": 5, "top_mass": 0.8}):
        for encoding, tolerance in (("fp32", 1e-6), ("fp16", 3e-3), ("bf16", 3e-2), ("int8", 6e-2)):
            chosen = DistillationSettings(encoding=encoding, **settings)
            wire = SoftLabelWire(chosen, PublicRows(Rows(), labelled=False, width=9))
            known = likeliest(logps, chosen.top_k, chosen.top_mass)
            packed = wire.pack(known)
            wire.check(packed)
            found = wire.unpack(packed)
            assert torch.allclose(found.dense(), known.dense(), atol=tolerance), (
                settings,
                encoding,
            )


def test_the_smallest_integers_that_hold_an_index():
    assert [index_dtype(width).itemsize for width in (2, 256, 257, 65536, 65537)] == [1, 1, 2, 2, 4]


def test_a_client_that_gets_bad_knowledge_keeps_what_it_has(federate, distil):
    """The server's answer is spoilt on the way to client 0: it stays with its private adapter."""

    def break_(parts):
        exchange = parts.engine.exchange

        def broken(question):
            if question.action == "distil":
                payload = decode(question.requests[0], question.request_schema)
                tensors = {**payload.tensors, "indices": payload.tensors["indices"].flip(-1)}
                data = encode(Payload(tensors, payload.numbers), question.request_schema)
                question = dataclasses.replace(question, requests={**question.requests, 0: data})
            yield from exchange(question)

        parts.engine.exchange = broken

    found = federate(distil(top_k=3, rounds=1), break_)
    alone = federate(distil(top_k=3, rounds=1))
    assert "must rise" in found.records[0].rejected[0]
    own, distilled = (f.parts.engine.store.slots(0)["adapter"] for f in (found, alone))
    assert any(not torch.equal(own[name], distilled[name]) for name in own)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"objective": {"name": "kto"}, "data": {"source": "builtin:feedback"}},
            "sft or classification",
        ),
        (
            {"method": {"name": "distillation", "rule": "lowest_loss"}},
            "needs public.labelled = true",
        ),
        (
            {"clients": {"groups": {"a": {"clients": [0]}, "b": {"clients": [0]}}}},
            "client 0 is in a and in b",
        ),
        ({"clients": {"groups": {"a": {"clients": [7]}}}}, "there is no client 7"),
        (
            {
                "method": {"name": "fedavg"},
                "clients": {"groups": {"a": {"clients": [0], "rank": 2}}},
            },
            "averages parameters",
        ),
        ({"public": {"columns": {"text": "body"}}}, "public.columns is of public.source"),
        ({"public": {"rows": 0}}, "public.rows = 0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(experiment, sections, words):
    with pytest.raises(SettingsError, match=words):
        experiment(**{**KINDS["classification"], "method": {"name": "distillation"}, **sections})


def test_a_public_set_that_takes_all_rows(federate, distil):
    with pytest.raises(DataError, match=r"public.rows = 80: there are \d+ training rows"):
        federate(distil(public={"rows": 80}))


def wire_of(positions, width=9, **settings):
    rows = type("Rows", (), {"positions": [positions]})()
    chosen = DistillationSettings(encoding="fp32", **settings)
    return SoftLabelWire(chosen, PublicRows(rows, labelled=False, width=width))


@pytest.mark.parametrize(
    ("settings", "sparse", "kept"),
    [({}, False, 9), ({"top_k": 9}, False, 9), ({"top_k": 20}, False, 9), ({"top_k": 8}, True, 8),
     ({"top_mass": 0.5}, True, 9)],
)  # fmt: skip
def test_indices_travel_where_some_entries_do_not(settings, sparse, kept):
    wire = wire_of(3, **settings)
    assert (wire.sparse, wire.k, wire.adaptive) == (sparse, kept, "top_mass" in settings)
    shapes = {spec.name: (spec.shape, spec.ragged) for spec in wire.specs}
    if "top_mass" in settings:
        flat = ((27,), True)
        assert shapes == {"values": flat, "indices": flat, "counts": ((3,), False)}
        return
    whole = {"values": ((3, kept), False)}
    assert shapes == whole | ({"indices": ((3, kept), False)} if sparse else {})


@pytest.mark.parametrize(
    ("values", "indices", "words"),
    [
        ([0.0, -1.0], [0, 8], None),
        ([0.0009, -9999.0], [0, 8], None),
        ([0.0011, -1.0], [0, 8], "not between -10000 and 0"),
        ([0.0, -10001.0], [0, 8], "not between -10000 and 0"),
        ([0.0, -1.0], [0, 9], "index 9 is not below the width of 9"),
        ([0.0, -1.0], [8, 0], "must rise"),
        ([0.0, -1.0], [4, 4], "must rise"),
    ],
)
def test_log_probabilities_and_their_indices_are_within_their_bounds(values, indices, words):
    tensors = {
        "values": torch.tensor([values]),
        "indices": torch.tensor([indices], dtype=torch.uint8),
    }
    with nullcontext() if words is None else pytest.raises(MessageError, match=words):
        wire_of(1, top_k=2).check(tensors)


@pytest.mark.parametrize(
    ("counts", "entries", "indices", "words"),
    [
        ([1, 2], 3, 3, None),
        ([2, 1], 3, 3, None),
        ([0, 2], 2, 2, "counts must be 1 to 2"),
        ([1, 3], 4, 4, "counts must be 1 to 2"),
        ([1, 2], 4, 4, "add up to the 4 values"),
        ([1, 2], 3, 2, "2 indices for 3 values"),
    ],
)
def test_counts_are_of_what_is_sent(counts, entries, indices, words):
    """Of two at most; entries of each position rise, and begin anew with the next."""
    rising = {1: [[5], [1, 7]], 2: [[1, 7], [5]]}.get(counts[0], [[0, 1], [2, 3]])
    flat = [own for row in rising for own in row]
    tensors = {
        "values": torch.full((entries,), -1.0),
        "indices": torch.tensor((flat * 2)[:indices], dtype=torch.uint8),
        "counts": torch.tensor(counts, dtype=torch.int32),
    }
    wire = wire_of(2, top_k=2, top_mass=0.9)
    with nullcontext() if words is None else pytest.raises(MessageError, match=words):
        wire.check(tensors)
    if words is None:
        present = wire.unpack(tensors).present
        assert present.sum(1).tolist() == counts


def test_positions_are_of_their_texts_and_what_is_true_of_them():
    tokens = SimpleNamespace(
        labels=np.array([2, 0]),
        tokens=np.array([5, 6, 7, 8], np.uint16),
        trained=np.array([False, True, False, True]),
    )
    share = SimpleNamespace(tokens=tokens, positions=np.array([0, 3, 4]))
    assert texts_of(share).tolist() == [0, 0, 0, 1]
    rows = PublicRows(share, labelled=True, width=9)
    assert true_entries(rows, "classification").tolist() == [2, 0]
    assert true_entries(rows, "causal").tolist() == [6, 8]
    assert true_entries(dataclasses.replace(rows, labelled=False), "causal") is None


def test_all_public_rows_are_a_round_s_where_no_fewer_are_asked_for():
    taken = type("Share", (), {"__len__": lambda own: 6, "take": lambda own, rows: rows.tolist()})()
    public = PublicRows(taken, labelled=False, width=9)

    def drawn(round, **settings):
        own = DistillationMethod(DistillationSettings(**settings))
        return own.rows_of_round(public, 0, round)

    assert drawn(1) is public and drawn(1, rows_per_round=6) is public
    some = drawn(1, rows_per_round=5).share
    assert len(set(some)) == 5 and some == sorted(some) and set(some) < set(range(6))


def test_the_server_may_have_a_model_and_a_rank_of_its_own():
    def of(**settings):
        own = DistillationMethod(DistillationSettings(**settings))
        return tuple(own.server_model(ModelSpec("small", 4)))

    assert of() == ("small", 4)
    assert of(server_model="large", server_rank=8) == ("large", 8)


def test_how_much_a_client_distils():
    """What is left of the round's steps, or passes over the public rows."""
    method = DistillationMethod(DistillationSettings(client_epochs=3))
    due = {"due": lambda part: part}
    for per, work in (("round", Part(1, 2)), ("model", Work(epochs=3))):
        client = SimpleNamespace(training=SimpleNamespace(amount_per=per), **due)
        assert method._distilling(client) == work


def test_advice_counts_all_logits_of_classes_and_32_of_tokens():
    kinds = {name: kind for name, (_, kind) in METHODS.items()}

    def names(own, objective):
        view = ExperimentView(DistillationSettings(), kinds, objective)
        return [one.name for one in DistillationMethod.variants(own, view)]

    assert names(None, "dpo") == []
    assert names(None, "sft") == ["KD-FedLLM, top 32 logits, fp16"]
    assert names(None, "classification") == ["KD-FedLLM, all logits, fp16"]
    own = DistillationSettings(top_k=5, encoding="int8")
    assert names(own, "classification") == ["KD-FedLLM, top 5 logits, int8"]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"method": {"server_rank": 4}, "adapter": {"kind": "ia3"}}, ["method.server_rank is a setting of lora"]),
        (
            {"adapter": {"kind": "ia3"}, "clients": {"groups": {"a": {"clients": [0], "rank": 2}}}},
            ["clients.groups.a.rank is a setting of lora"],
        ),
        (
            {"method": {"server_rank": 4}, "adapter": {"start": "adapter"}},
            ["adapter.start is of one model and rank: leave method.server_rank out"],
        ),
        ({"adapter": {"start": "adapter"}}, []),
        ({"method": {"server_rank": 4}}, []),
    ],
)  # fmt: skip
def test_ranks_and_models_of_the_server_that_cannot_be(sections, words):
    method = {"name": "distillation", **sections.get("method", {})}
    table = {**KINDS["classification"], **sections, "method": method}
    if not words:
        Experiment.from_table(table)
        return
    with pytest.raises(SettingsError) as told:
        Experiment.from_table(table)
    assert list(told.value.problems) == words


def test_numbers_are_refused_by_name():
    wire = SoftLabelWire(
        DistillationSettings(top_k=2),
        PublicRows(type("Rows", (), {"positions": [1]})(), labelled=False, width=9),
    )
    tensors = {"values": torch.zeros(1, 2), "indices": torch.tensor([[3, 3]], dtype=torch.uint8)}
    with pytest.raises(MessageError, match="rise and occur once"):
        wire.check(tensors)
