"""Split-FedLLM: a whole run equals training the whole model; what travels; what a bad peer can do."""

import dataclasses
import re
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import fedloom
from fedloom.data.batch import Batch, Sequences
from fedloom.errors import MessageError, ModelError, RoundFailed, SettingsError
from fedloom.federation.admission import AdmissionSettings
from fedloom.methods import METHODS
from fedloom.methods.contract.experiment_view import ExperimentView
from fedloom.methods.split import (
    Split,
    SplitSettings,
    SplitWire,
    _check_gradient,
    _mean_with,
    pack_gradient,
    unpack_gradient,
)
from fedloom.models.split_model import ClientPart
from fedloom.runs.run import resume_run
from fedloom.wire.messages import Payload, decode, encode
from unchecked import encode_anything

KINDS = {
    "sft": {
        "data": {"source": "builtin:instructions", "builtin_rows": 40},
        "objective": {"name": "sft"},
    },
    "classification": {
        "data": {"source": "builtin:labelled", "builtin_rows": 60},
        "objective": {"name": "classification"},
    },
}
TRAINING = {"learning_rate": 1e-2, "batch_size": 8, "local_steps": 3, "max_grad_norm": 0.0}


@pytest.fixture
def split(experiment):
    def make(kind="classification", clients=1, training=None, **method):
        return experiment(
            **KINDS[kind],
            training={**TRAINING, **(training or {})},
            federation={"rounds": 2, "clients": clients},
            evaluation={"per_client": False},  # or what it is compared with holds rows out
            method={"name": "split", **method} if "name" not in method else method,
        )

    return make


@pytest.mark.parametrize("clipped", [0.0, 0.05], ids="clipped to {}".format)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "method",
    [
        {},
        {"server": "parallel"},
        {"labels": "client"},
        {"labels": "client", "server": "parallel"},
        {"average_every": 2},
        {"average_every": 1, "server": "parallel", "labels": "client"},
    ],
    ids=str,
)
def test_one_client_is_centralised_training_bit_for_bit(
    federate, split, once, kind, method, clipped
):
    """Gradients are some .2 long: each step is clipped, by the norm of both halves."""
    training = {"max_grad_norm": clipped}
    name = f"{kind} {clipped}"
    whole = once(name, lambda: federate(split(kind, name="centralised", training=training)))
    found = federate(split(kind, training=training, **method))
    if clipped:
        free = once(kind, lambda: federate(split(kind, name="centralised")))
        assert any(not torch.equal(free.adapter[n], whole.adapter[n]) for n in whole.adapter)
    assert whole.adapter.keys() == found.adapter.keys()
    assert all(torch.equal(found.adapter[n], whole.adapter[n]) for n in whole.adapter)
    loss = found.records[-1].train["loss"]
    assert loss == pytest.approx(whole.records[-1].train["loss"], rel=1e-5)


def test_the_server_in_turn_learns_from_every_client(federate, split):
    """Sequential: one back half makes all clients' steps; parallel: each copy its own, then the mean."""
    moved = {}
    for server in ("sequential", "parallel"):
        found = federate(split(clients=3, server=server))
        start = found.parts.initial
        back = [n for n in start if n in found.parts.method.back.parameters]
        moved[server] = sum(float((found.adapter[n] - start[n]).norm()) for n in back)
    assert moved["sequential"] > 1.2 * moved["parallel"] > 0


def test_the_parallel_mean_is_the_mean_of_training_alone(federate, split):
    """With plain SGD and one step, averaged halves are the step along the mean gradient of the clients."""
    training = {"optimizer": "sgd", "local_steps": 1, "learning_rate": 0.5}
    found = federate(split(clients=3, training=training, server="parallel"))
    wanted = federate(split(clients=3, training=training, name="fedavg"))
    for name, tensor in wanted.adapter.items():
        assert torch.allclose(found.adapter[name], tensor, atol=1e-6), name


def test_the_same_bits_again(federate, split):
    twice = [federate(split(clients=2, training={"local_steps": 2})).adapter for _ in range(2)]
    assert all(torch.equal(twice[0][n], twice[1][n]) for n in twice[0])
    noisy = [federate(split(clients=2, activation_noise=0.1)).adapter for _ in range(2)]
    assert all(torch.equal(noisy[0][n], noisy[1][n]) for n in noisy[0])
    assert any(not torch.equal(noisy[0][n], twice[0][n]) for n in twice[0])


@pytest.mark.slow
def test_a_run_that_is_resumed_ends_with_the_same_bits(split, tmp_path):
    def at(name):
        experiment = split(clients=3, server="parallel", labels="client")
        output = experiment.output.model_copy(update={"folder": str(tmp_path / name)})
        federation = experiment.federation.model_copy(update={"rounds": 3})
        return dataclasses.replace(experiment, output=output, federation=federation)

    runs = [fedloom.run(at("once")), fedloom.run(at("again"))]
    runs.append(resume_run(tmp_path / "again", from_round=2))
    files = {(r.adapter_path / "adapter_model.safetensors").read_bytes() for r in runs}
    assert len(files) == 1


def test_dropout_is_each_partys_own_and_repeatable(federate, experiment):
    def run():
        return federate(
            experiment(
                **KINDS["sft"], adapter={"rank": 2, "dropout": 0.3}, training=TRAINING,
                federation={"rounds": 1, "clients": 3}, method={"name": "split", "server": "parallel"},
            )
        ).adapter  # fmt: skip

    before = torch.get_rng_state()
    first, second = run(), run()
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert torch.equal(torch.get_rng_state(), before)  # nobody else's random numbers were touched


@pytest.mark.parametrize("encoding", ["bf16", "fp16", "int8"])
def test_every_encoding_learns_nearly_the_same(federate, split, once, encoding):
    training = {"optimizer": "sgd", "learning_rate": 0.1}
    plain = once("plain", lambda: federate(split(training=training)).adapter)
    found = federate(split(training=training, activations=encoding, gradients=encoding)).adapter
    still = {**training, "learning_rate": 1e-12}
    start = once("start", lambda: federate(split(training=still)).adapter)
    way = sum(float((plain[n] - start[n]).norm()) ** 2 for n in plain) ** 0.5
    error = sum(float((plain[n] - found[n]).norm()) ** 2 for n in plain) ** 0.5
    assert 0 < error < 0.05 * way


def test_a_gradient_fits_any_encoding_and_fp32_loses_no_bit():
    gradient = torch.randn(5, 8, generator=torch.Generator().manual_seed(0)) * 1e-9
    packed, exponent = pack_gradient(gradient, "fp32")
    assert torch.equal(packed["gradient"] * 2.0**exponent, gradient)
    packed, exponent = pack_gradient(gradient, "fp16")
    assert packed["gradient"].abs().max() >= 0.5  # plain fp16 would round all of this to zero
    assert torch.allclose(packed["gradient"].float() * 2.0**exponent, gradient, rtol=1e-3)
    assert pack_gradient(torch.zeros(0, 8), "int8")[1] == 0
    assert pack_gradient(torch.zeros(2, 8), "int8")[1] == 0


def test_labels_stay_home_in_u_shape(federate, split):
    """What goes up: activations, lengths, gradients, a loss. No label, and no token's id."""
    seen = []

    def watch(parts):
        exchange = parts.engine.exchange

        def watched(question):
            seen.append(question)
            return exchange(question)

        parts.engine.exchange = watched

    federate(split("sft", labels="client"), watch)
    up = {spec.name for question in seen for spec in question.reply_schema.tensors}
    assert {name for name in up if "lora" not in name} == {"activations", "rows", "gradient"}
    assert {
        spec.shape[1:] for q in seen for spec in q.reply_schema.tensors if spec.name == "rows"
    } == {(1,)}
    seen.clear()
    federate(split("sft"), watch)
    assert "targets" in {spec.name for question in seen for spec in question.reply_schema.tensors}


def test_clients_hold_front_halves_and_the_adapter_is_whole_in_the_end(federate, split):
    found = federate(split(clients=2))
    front = found.parts.engine.resources[0].model
    assert isinstance(front, ClientPart)
    assert not any("layers.1." in name for name, _ in front.model.named_parameters())
    assert found.adapter.keys() == found.parts.model.parameters.keys()


def failing(client, action, times, answer):
    """Break one client's answers to ``action`` from the ``times``-th on."""

    def break_(parts):
        exchange, count = parts.engine.exchange, {"n": 0}

        def broken(question):
            for one in exchange(question):
                if one.client == client and question.action == action:
                    count["n"] += 1
                    if count["n"] >= times:
                        yield answer(one, question)
                        continue
                yield one

        parts.engine.exchange = broken

    return break_


@pytest.mark.parametrize(
    ("first", "targets", "sound"),
    [
        ((1, 1), (0, 4, 2), True),  # a prompt of one token, completions of two and one
        ((2, 1), (0, 4), True),
        ((0, 1), (0, 4, 2, 1), False),
        ((3, 1), (0,), False),  # no completion
        ((1, 1), (0, 4), False),
    ],
)
def test_prompts_and_completions_that_fill_their_sequences_are_let_in(first, targets, sound):
    settings, sft = SplitSettings(), SimpleNamespace(head="language model")
    wire = SplitWire(settings, sft, rows=2, max_length=4, hidden=2, width=5)
    rows = torch.tensor([[3, first[0]], [2, first[1]]])
    tensors = {"activations": torch.zeros(5, 2), "rows": rows, "targets": torch.tensor(targets)}
    step = Payload(tensors, {"waiting": 1.0, "squared_norm": 0.0})
    with nullcontext() if sound else pytest.raises(MessageError, match="do not add up"):
        wire.check(step)


def wire_of(head="classification", **settings):
    """Two sequences of four tokens at most, activations of two numbers, five classes or tokens."""
    own = SimpleNamespace(head=head)
    return SplitWire(SplitSettings(**settings), own, rows=2, max_length=4, hidden=2, width=5)


def step(rows, tokens, waiting=1.0, **tensors):
    facts = torch.tensor(rows or [[0, 0, 0]])[: len(rows)]
    own = {"activations": torch.zeros(tokens, 2), "rows": facts, **tensors}
    return Payload(own, {"waiting": waiting, "squared_norm": 0.0})


@pytest.mark.parametrize(
    ("rows", "tokens", "words"),
    [
        ([[3, 2, 4], [2, 0, 0]], 5, None),
        ([[4, 3, 1], [1, 0, 2]], 5, None),
        ([[3, 3, 4], [2, 0, 0]], 5, "lies outside its sequence"),
        ([[3, 2, 4], [2, -1, 0]], 5, "lies outside its sequence"),
        ([[3, 2, 5], [2, 0, 0]], 5, "not among the 5 classes"),
        ([[3, 2, 4], [2, 0, -1]], 5, "not among the 5 classes"),
        ([[5, 2, 4], [2, 0, 0]], 7, "must have 1 to 4 tokens"),
        ([[3, 2, 4], [0, 0, 0]], 3, "must have 1 to 4 tokens"),
        ([[3, 2, 4], [2, 0, 0]], 4, "4 activations for sequences of 5 tokens"),
    ],
)
def test_facts_of_classified_sequences_are_within_their_bounds(rows, tokens, words):
    with nullcontext() if words is None else pytest.raises(MessageError, match=words):
        wire_of().check(step(rows, tokens))


@pytest.mark.parametrize(("last", "sound"), [(0, True), (4, True), (5, False), (-1, False)])
def test_targets_are_tokens_of_the_vocabulary(last, sound):
    own = step([[3, 1], [2, 1]], 5, targets=torch.tensor([1, 2, last]))
    with nullcontext() if sound else pytest.raises(MessageError, match="not among the 5 tokens"):
        wire_of("causal").check(own)


@pytest.mark.parametrize(
    ("tokens", "waiting", "pause", "sound"),
    [(0, 0.0, False, True), (0, 1.0, True, True), (0, 1.0, False, False), (1, 0.0, False, False)],
)
def test_nothing_is_sent_by_who_is_done_or_pauses(tokens, waiting, pause, sound):
    words = "or none where a step is due"
    with nullcontext() if sound else pytest.raises(MessageError, match=words):
        wire_of().check(step([], tokens, waiting), pause=pause)


def two_sequences(head):
    """Prompts of two tokens and of one, completions of one; 0 is padding."""
    ids = torch.tensor([[1, 2, 3], [4, 2, 0]])
    completion = torch.tensor([[False, False, True], [False, True, False]])
    labels = torch.tensor([4, 0]) if head == "classification" else None
    return Batch((7, 8), Sequences(ids, (ids > 0).long(), completion, 1), 2, 5, labels)


@pytest.mark.parametrize("encoding", ["fp32", "int8"])
@pytest.mark.parametrize("head", ["classification", "causal"])
def test_a_step_is_read_as_it_was_written(head, encoding):
    wire, given = wire_of(head, activations=encoding), two_sequences(head)
    tokens, mask = torch.arange(10.0).view(5, 2), given.sequences.attention_mask
    payload = wire.step(tokens, given, 0, 2.5)
    wire.check(payload)
    assert payload.numbers == {"waiting": 1.0, "squared_norm": 2.5}
    facts = [[3, 2, 4], [2, 1, 0]] if head == "classification" else [[3, 2], [2, 1]]
    assert payload.tensors["rows"].tolist() == facts
    activations, batch, last = wire.batch(payload.tensors)
    assert torch.allclose(activations[mask.bool()], tokens, atol=0.05)
    assert torch.equal(batch.sequences.attention_mask, mask) and batch.tokens == 5
    assert len(batch.rows) == 2 and not activations[~mask.bool()].any()
    if head == "classification":
        assert batch.labels.tolist() == [4, 0] and last.tolist() == [2, 1]
        assert batch.completion_tokens == 0 and batch.sequences.first_completion == 1
        return
    completion = given.sequences.completion_mask
    assert torch.equal(batch.sequences.completion_mask, completion) and last is None
    assert batch.sequences.input_ids[completion].tolist() == [3, 2]
    assert batch.completion_tokens == 2 and batch.sequences.first_completion == 1
    assert payload.tensors["targets"].tolist() == [3, 2]


@pytest.mark.parametrize("head", ["classification", "causal"])
def test_in_u_shape_lengths_alone_are_told(head):
    wire = wire_of(head, labels="client")
    payload = wire.step(torch.zeros(5, 2), two_sequences(head), 0, 0.0)
    wire.check(payload)
    assert payload.tensors.keys() == {"activations", "rows"}
    assert payload.tensors["rows"].tolist() == [[3], [2]]
    _, batch, last = wire.batch(payload.tensors)
    assert batch.labels is None and last is None and not batch.sequences.completion_mask.any()


@pytest.mark.parametrize(
    ("head", "labels", "fields", "targets"),
    [
        ("classification", "server", 3, False),
        ("causal", "server", 2, True),
        ("classification", "client", 1, False),
        ("causal", "client", 1, False),
    ],
)
def test_what_the_server_is_told_of_a_sequence(head, labels, fields, targets):
    """Its length; the prompt's, or the last token and the class; the completion's tokens."""
    wire = wire_of(head, labels=labels)
    specs = {spec.name: spec for spec in wire.step_schema.tensors}
    assert specs["rows"].shape == (2, fields) and specs["rows"].ragged
    assert specs["activations"].shape == (8, 2) and specs["activations"].ragged
    assert wire.gradient[0].ragged and wire.entered[0].ragged
    assert ("targets" in specs) is targets
    assert not targets or (specs["targets"].shape == (8,) and specs["targets"].ragged)
    for waiting in (False, True):
        none = wire.nothing(1.5, waiting=waiting)
        assert none.tensors["rows"].shape == (0, fields) and ("targets" in none.tensors) is targets
        assert all(len(tensor) == 0 for tensor in none.tensors.values())
        assert none.tensors["activations"].shape == (0, 2)
        assert none.numbers == {"waiting": float(waiting), "squared_norm": 1.5}


def test_traffic_counts_what_the_server_is_told():
    adapter = {"front": torch.zeros(3), "back": torch.zeros(5)}
    forms = {}
    for head in ("classification", "causal"):
        for labels in ("server", "client"):
            method = Split(SplitSettings(labels=labels))
            method.back = SimpleNamespace(parameters={"back": None})
            config = SimpleNamespace(hidden_size=16)
            method.server = SimpleNamespace(
                model=SimpleNamespace(model=SimpleNamespace(config=config)), width=5, max_length=4,
                objective=SimpleNamespace(head=head), training=SimpleNamespace(batch_size=2),
            )  # fmt: skip
            form = method.traffic(adapter)
            assert (form.front, form.hidden, form.average_every) == (12, 16, 0)
            forms[head, labels] = form.facts, form.targets, form.u_shape
    assert forms == {
        ("classification", "server"): (12, False, False),
        ("causal", "server"): (8, True, False),
        ("classification", "client"): (4, False, True),
        ("causal", "client"): (4, False, True),
    }


@pytest.mark.parametrize(("exponent", "sound"), [(126, True), (-126, True), (127, False), (-127, False)])  # fmt: skip
def test_a_gradient_s_power_of_two_is_within_that_of_float32(exponent, sound):
    own = Payload({"gradient": torch.full((1, 1), 0.5)}, {"exponent": float(exponent)})
    with nullcontext() if sound else pytest.raises(MessageError, match="beyond 126"):
        assert unpack_gradient(own, "fp32").item() == 0.5 * 2.0**exponent


def test_the_largest_number_of_a_gradient_travels_as_a_half_to_one():
    for largest, exponent in ((6.0, 3), (0.25, -1), (1.0, 1)):
        packed, found = pack_gradient(torch.tensor([[largest, -0.125]]), "fp32")
        assert found == exponent and packed["gradient"][0, 0] == largest / 2.0**exponent


def test_gradients_that_come_back_are_finite_and_of_each_token():
    _check_gradient(torch.ones(3, 2), 3)
    with pytest.raises(MessageError, match="of 3 tokens came back for 2"):
        _check_gradient(torch.ones(3, 2), 2)
    with pytest.raises(MessageError, match="NaN or infinity"):
        _check_gradient(torch.tensor([[1.0, float("inf")]]), 1)


def test_who_finished_earlier_counts_in_a_mean_with_what_was_averaged_then():
    """(1 x 2 + 3 x 6) / 4 = 5; with 4 rows that stand by 1: (20 + 4) / 8 = 3."""
    own = [{"w": torch.tensor([2.0])}, {"w": torch.tensor([6.0])}]
    before = {"w": torch.tensor([1.0])}
    assert _mean_with(own, [1.0, 3.0], before, 0.0)["w"].item() == 5
    assert _mean_with(own, [1.0, 3.0], before, 4.0)["w"].item() == 3


def test_noise_is_a_share_of_the_activations_root_mean_square():
    """Numbers of 3 and 4 have the root mean square 12.5^.5."""
    tokens = torch.tensor([3.0, -4.0]).repeat(500, 40)
    plain = Split(SplitSettings())._noisy(tokens, torch.Generator())
    assert torch.equal(plain, tokens)
    noisy = Split(SplitSettings(activation_noise=0.1))
    found = noisy._noisy(tokens, torch.Generator().manual_seed(0)) - tokens
    assert float(found.std()) == pytest.approx(0.1 * 12.5**0.5, rel=0.02)
    assert abs(float(found.mean())) < 0.01


def test_one_client_at_a_time_is_answered_where_one_back_half_waits_for_it():
    replies = ["one", "other"]

    def groups(clip, **settings):
        method = Split(SplitSettings(**settings))
        method.server = SimpleNamespace(training=SimpleNamespace(max_grad_norm=clip))
        return method._groups(replies)

    alone, together = [["one"], ["other"]], [["one", "other"]]
    assert groups(1.0) == groups(0.0, labels="client") == alone
    assert groups(0.0) == groups(1.0, server="parallel") == together
    assert groups(1.0, server="parallel", labels="client") == together


def test_advice_counts_it_as_it_is_set_and_in_8_bits():
    names = {name: kind for name, (_, kind) in METHODS.items()}

    def names_of(own, objective):
        view = ExperimentView(SplitSettings(), names, objective)
        return [one.name for one in Split.variants(own, view)]

    assert names_of(None, "dpo") == []
    assert names_of(None, "sft") == ["Split-FedLLM, cut 1, fp32", "Split-FedLLM, cut 1, int8"]
    own = SplitSettings(cut=2, activations="int8")
    assert names_of(own, "classification") == ["Split-FedLLM, cut 2, int8"]


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("server", ["sequential", "parallel"])
def test_a_client_lost_in_the_middle_of_a_round(federate, split, labels, server):
    lost = failing(
        1, "step", 2, lambda one, question: dataclasses.replace(one, data=None, error="gone")
    )
    experiment = split(clients=3, labels=labels, server=server)
    found = federate(experiment, lost)
    for record in found.records:
        assert record.rejected == {1: "gone"}
    assert all(torch.isfinite(t).all() for t in found.adapter.values())
    moved = [n for n in found.adapter if not torch.equal(found.adapter[n], found.parts.initial[n])]
    assert moved


def test_too_many_lost_clients_end_the_run_with_their_reasons(federate, split):
    lost = failing(
        1, "step", 2, lambda one, question: dataclasses.replace(one, data=None, error="gone")
    )
    experiment = split(clients=2)
    strict = experiment.federation.model_copy(update={"quorum": 1.0})
    with pytest.raises(RoundFailed, match=r"1 of 2 clients gave a usable answer.*client 1: gone"):
        federate(dataclasses.replace(experiment, federation=strict), lost)


def changed(change):
    """An answer whose payload was changed and encoded again."""

    def answer(one, question):
        payload = decode(one.data, question.reply_schema)
        tensors, numbers = dict(payload.tensors), dict(payload.numbers)
        change(tensors, numbers)
        return dataclasses.replace(
            one, data=encode_anything(Payload(tensors, numbers), question.reply_schema)
        )

    return answer


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("classification", lambda t, n: t["activations"].fill_(float("nan")), "NaN or infinity"),
        ("classification", lambda t, n: t["rows"][:, 0].add_(1), "activations for sequences of"),
        ("classification", lambda t, n: t["rows"][:, 1].fill_(-1), "lies outside its sequence"),
        ("classification", lambda t, n: t["rows"][:, 2].fill_(99), "not among the 8 classes"),
        ("classification", lambda t, n: t.update(rows=t["rows"][:0]), "without their lengths"),
        ("sft", lambda t, n: t["targets"].fill_(10**6), "not among the"),
        ("sft", lambda t, n: t["rows"][:, 1].fill_(0), "do not add up"),
        ("sft", lambda t, n: t.update(targets=t["targets"][1:]), "do not add up"),
    ],
)
def test_a_bad_step_leaves_its_client_out(federate, split, kind, change, reason):
    found = federate(split(kind, clients=3), failing(2, "start", 1, changed(change)))
    assert all(reason in record.rejected[2] for record in found.records)
    assert all(record.rejected.keys() == {2} for record in found.records)


@pytest.mark.parametrize("labels", ["server", "client"])
@pytest.mark.parametrize("server", ["sequential", "parallel"])
def test_activations_that_blow_the_server_up_leave_their_client_out(
    federate, split, labels, server
):
    """Finite on arrival, not in the loss: the back half must not take any of it."""

    def blow(tensors, numbers):
        tensors["activations"].fill_(3e38)

    anything = AdmissionSettings(max_value=1e39)
    experiment = replace(split(clients=3, labels=labels, server=server), admission=anything)
    found = federate(experiment, failing(1, "start", 1, changed(blow)))
    assert not any("admission" in record.rejected[1] for record in found.records)
    assert all(list(record.rejected) == [1] for record in found.records)
    assert all(torch.isfinite(t).all() for t in found.adapter.values())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t, n: n.update(exponent=127.0), "number exponent is 127, it must be -126 to 126"),
        (lambda t, n: (t["gradient"].fill_(3e38), n.update(exponent=126.0)), "NaN or infinity"),
        (lambda t, n: t["gradient"].fill_(3e38), "admission.max_value allows"),
        (lambda t, n: (t["gradient"].fill_(9e5), n.update(exponent=105.0)), "no finite gradient"),
        (lambda t, n: n.update(loss=1e299), r"number loss is 1e\+299, it must be 0 to 1e\+09"),
        (lambda t, n: n.update(loss=1e9), None),
        (lambda t, n: t.update(gradient=t["gradient"][1:]), "came back for"),
    ],
)
def test_gradients_that_blow_the_server_up_leave_their_client_out(federate, split, change, reason):
    found = federate(split(clients=3, labels="client"), failing(1, "loss", 1, changed(change)))
    if reason is not None:
        assert all(re.search(reason, record.rejected[1]) for record in found.records)
    assert all(torch.isfinite(t).all() for t in found.adapter.values())


def test_a_client_that_never_ends_its_round_is_left_out(federate, split):
    def on(tensors, numbers):
        if not numbers["waiting"]:
            numbers["waiting"] = 1.0
            tensors["rows"] = torch.tensor([[1, 0, 0]], dtype=torch.int32)
            tensors["activations"] = torch.zeros(1, 32)

    found = federate(split(clients=3), failing(2, "step", 1, changed(on)))
    assert all("all the steps its rows make" in record.rejected[2] for record in found.records)


@pytest.mark.parametrize("bad", ["shape", "nan"])
def test_a_client_refuses_a_bad_gradient_and_keeps_its_last_good_adapter(federate, split, bad):
    """The server's second gradient for client 0 is spoilt on the way: the first step stands."""
    kept = {}

    def spoil(parts):
        exchange, count = parts.engine.exchange, {"n": 0}

        def spoilt(question):
            if question.action == "step" and 0 in question.requests:
                count["n"] += 1
                if count["n"] == 1:
                    yield from exchange(question)
                    session = parts.engine._sessions[0]["parameters"]
                    kept.update({n: p.detach().clone() for n, p in session.items()})
                    return
                if count["n"] == 2:
                    payload = decode(question.requests[0], question.request_schema)
                    gradient = payload.tensors["gradient"]
                    gradient = gradient[:-1] if bad == "shape" else gradient * float("nan")
                    data = encode(
                        Payload({"gradient": gradient}, payload.numbers), question.request_schema
                    )
                    question = dataclasses.replace(
                        question, requests={**question.requests, 0: data}
                    )
            yield from exchange(question)
            if count["n"] == 2:
                session = parts.engine._sessions[0]["parameters"]
                assert all(torch.equal(kept[n], p) for n, p in session.items())
                kept["seen"] = True

        parts.engine.exchange = spoilt

    experiment = split(clients=3)
    once = experiment.federation.model_copy(update={"rounds": 1})
    found = federate(dataclasses.replace(experiment, federation=once), spoil)
    (record,) = found.records
    words = "came back for" if bad == "shape" else "NaN or infinity"
    assert words in record.rejected[0] and kept["seen"]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"objective": {"name": "dpo"}, "data": {"source": "builtin:preferences"}},
            "sft or classification",
        ),
        ({"training": {"micro_batch_size": 4}}, "an optimizer batch at a time"),
        ({"training": {"keep_optimizer_state": True}}, "optimizers anew"),
        ({"training": {"gradient_checkpointing": True}}, "activations on both sides"),
        ({"adapter": {"kind": "prompt", "rank": 8}}, "before the first block"),
        ({"method": {"name": "split", "cut": 0}}, "greater than or equal to 1"),
    ],
)
def test_what_cannot_be_split_is_said_before_anything_is_loaded(experiment, sections, words):
    with pytest.raises(SettingsError, match=words):
        experiment(**{**KINDS["sft"], "method": {"name": "split"}, **sections})


def test_a_cut_beyond_the_model(federate, split):
    with pytest.raises(ModelError, match=r"method.cut = 2: this model has 2 blocks.*after 1 to 1"):
        federate(split(cut=2))


def test_a_client_without_an_adapter_in_its_blocks(federate, experiment):
    with pytest.raises(ModelError, match="leaves the client no block with an adapter"):
        federate(
            experiment(**KINDS["sft"], method={"name": "split"}, adapter={"rank": 2, "layers": [1]})
        )


def test_settings_name_the_papers_defaults():
    settings = SplitSettings()
    assert (settings.cut, settings.labels, settings.server) == (1, "server", "sequential")
