"""Codecs that no experiment names: a budget that is kept, a preset that is measured and kept."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

import fedloom
from federation import Sent
from fedloom.accounting.traffic import Done, ParameterTraffic
from fedloom.errors import Interrupted, MessageError, SettingsError
from fedloom.federation.codec_choice import BitBudget, PresetChoice, loss_costs, require_budget
from fedloom.federation.compressed_traffic import compressed as compressed_form
from fedloom.federation.compression_messages import SQUARES
from fedloom.methods.contract.closed_forms import answers as answers_of
from fedloom.methods.contract.closed_forms import compressed_traffic
from fedloom.reports.run_page import write_report
from fedloom.runs.assembly import assemble
from fedloom.runs.partitioning import partition_data
from fedloom.runs.run import resume_run
from fedloom.security.audit_log import events
from fedloom.tensors import part_of, tensor_bytes
from fedloom.training.results import reported
from fedloom.wire.messages import Exchange, Payload, Reply
from fedloom.wire.schema import Schema, TensorSpec
from fedloom.wire.settings import WireSettings
from runs.test_run import Stop


def states(folder):
    """The digest of the state after each round."""
    return {event["round"]: event["state"] for event in events(folder, "round")}


def answers(found):
    """The bytes of clients' answers to requests for training."""
    costs = [cost for record in found.records for cost in record.costs]
    return [cost.bytes_up for cost in costs if cost.phase == "train"]


@pytest.mark.parametrize(
    "feedback", ["none", "ef21", pytest.param("classic", marks=pytest.mark.slow)]
)
def test_no_answer_is_above_the_budget_and_bits_go_where_changes_are(
    compressed,
    federate,
    feedback,
):
    sent = Sent()
    wire = {"budget": "2500B", "error_feedback": feedback}
    found = federate(compressed(wire, adapter={"rank": 4}), sent.watch)
    assert 0 < max(answers(found)) <= 2500
    first, last = (
        {s.name: s.codec for s in sent.exchanges[r].reply_schema.tensors} for r in (1, 3)
    )
    assert first != last and len(set(last.values()) - {""}) > 1
    for record in found.records:
        own = record.wire["budget"]
        assert own["most_bytes"] <= 2500 and sum(own["tensors"].values()) == len(found.adapter)


def test_a_tensor_of_which_nothing_is_sent_comes_once_its_change_has_grown(compressed, federate):
    """Error feedback keeps it; with the residual its mean square grows, and it gets bits."""
    sent = Sent()
    wire = {"budget": "1200B", "error_feedback": "classic", "absence_decay": 1.0}
    found = federate(compressed(wire, federation={"rounds": 6}), sent.watch)
    without = {
        round: {s.name for s in asked.reply_schema.tensors if s.codec == "nothing"}
        for round, asked in sent.exchanges.items()
    }
    later = [without[round] for round in range(2, 7)]
    assert all(later) and any(one - two for one, two in itertools.pairwise(later))
    residual = found.parts.local.store.slots(0)["[wire] residual train"]
    for name in found.adapter:
        changed = sum(own[name].double() for (_, who), own in sent.changed.items() if who == 0)
        read = sum(own[name].double() for (_, who), own in sent.read.items() if who == 0)
        assert torch.allclose(read + residual[name].double(), changed, atol=1e-5)


def test_what_one_client_says_of_its_changes_does_not_decide():
    settings = WireSettings(budget="1MB", keep_plain_below=0)
    reply = Schema(tuple(TensorSpec(name, (8, 8), torch.float32) for name in "ab"))
    budget = BitBudget(settings)
    schema = budget.coded("train", reply)
    assert schema.tensors[-1] == TensorSpec(SQUARES, (2,), torch.float32)
    for client, said in enumerate(([1.0, 2.0], [1.5, 2.0], [2.0**100, 0.0])):
        budget.read(client, schema, torch.tensor(said))
    budget.settle("train", [0, 1, 2])
    assert budget.saved() == {"squares": {"train": {"a": 1.5, "b": 2.0}}}
    for wrong in (-1.0, float("nan"), float("inf"), 2e30):
        with pytest.raises(MessageError, match="mean squares of tensors are"):
            budget.read(0, schema, torch.tensor([1.0, wrong]))


def test_squares_of_tensors_that_other_rounds_send_are_kept():
    budget = BitBudget(WireSettings(budget="1MB", keep_plain_below=0))
    saved = []
    for names, said in (("ah", [1e-4, 2e-4]), ("bh", [3e-4, 4e-4])):
        schema = budget.coded(
            "train", Schema(tuple(TensorSpec(n, (8, 8), torch.float32) for n in names))
        )
        budget.read(0, schema, torch.tensor(said))
        budget.settle("train", [0])
        saved.append(budget.saved()["squares"]["train"])
    assert saved[0] == pytest.approx({"a": 1e-4, "h": 2e-4})
    assert saved[1] == pytest.approx({"a": 1e-4, "h": 4e-4, "b": 3e-4})


@pytest.mark.parametrize("name", ["rolora", "ffa_lora", "fedsa_lora"])
def test_a_budget_is_of_what_a_method_sends_of_the_adapter(compressed, federate, name):
    """The smallest budget is of those tensors, suffices in each round, and bounds the closed form."""

    def made(budget):
        return compressed(
            {"budget": budget},
            method={"name": name},
            federation={"rounds": 2, "clients": 2},
            adapter={"rank": 4},
        )

    parts = assemble(made("1B"), partition_data(made("1B")))
    method, shapes = parts.method, answers_of(parts.method, parts.initial)
    with pytest.raises(SettingsError, match="the smallest budget is") as raised:
        require_budget(made("1B").wire, shapes, reported(parts.objective))
    least = raised.value.problems[0].split('smallest budget is "')[1].split('"')[0]
    require_budget(made(least).wire, shapes, reported(parts.objective))
    sent = Sent()
    found = federate(made(least), sent.watch_requests)
    assert 0 < max(answers(found)) <= int(least.removesuffix("B"))
    for round, asked in sent.exchanges.items():
        own = {spec.name: spec.shape for spec in asked.plain.reply_schema.tensors}
        assert own == {n: tuple(t.shape) for n, t in shapes[round - 1].items()}
        known = {spec.name for spec in asked.plain.request_schema.tensors}
        assert known == method.received_shapes(parts.initial).keys()
    for budget in (int(least.removesuffix("B")), 20_000):
        form = compressed_traffic(method, parts.initial, made(f"{budget}B").wire)
        for round in (1, 2):
            assert 0 < form.of_round(Done(1, 1, 1, 1), round).up <= budget


def test_the_closed_form_of_a_budget_is_within_it():
    own = {f"w{i}": torch.zeros(64, 64) for i in range(8)}
    plain = ParameterTraffic(tensor_bytes(own), tensor_bytes(own))
    for budget in (
        10_000,
        14_000,
        20_000,
    ):  # ternary, int3 and int4, of which int3 has 4 bits before zstd
        settings = WireSettings(budget=f"{budget}B", keep_plain_below=0)
        up = compressed_form(plain, own, settings).of_round(Done(1, 1, 1, 1)).up
        assert budget - 2500 < up <= budget


def test_a_budget_suffices_for_every_kind_of_round():
    """The half of fewer numbers may take more bytes, where its tensors are too small for codecs."""
    settings = WireSettings(budget="3000B", keep_plain_below=1024)
    large, small = ({"w": torch.zeros(40, 64)}, {f"w{i}": torch.zeros(8, 30) for i in range(10)})
    require_budget(settings, [large], ())
    both = [large, {**small, "v": torch.zeros(16, 16)}]
    for shapes in (both, both[::-1]):
        with pytest.raises(SettingsError, match="the smallest budget is"):
            require_budget(settings, shapes, ())


def test_a_budget_that_cannot_be_met_is_one_error_with_the_smallest_that_can(experiment, tmp_path):
    """Before anything is made; a budget of the number that is said is met."""

    def run(budget):
        wire = {"budget": budget, "keep_plain_below": 0}
        return fedloom.run(
            experiment(
                wire=wire,
                output={"folder": str(tmp_path / budget), "verify": False},
                federation={"rounds": 1},
                evaluation={"per_client": False},
            )
        )

    with pytest.raises(SettingsError, match="the smallest budget is") as raised:
        run("100B")
    assert not (tmp_path / "100B").exists() and len(raised.value.problems) == 1
    least = raised.value.problems[0].split('smallest budget is "')[1].split('"')[0]
    result = run(least)
    costs = [json.loads(line) for line in (result.folder / "costs.jsonl").read_text().splitlines()]
    up = [cost["bytes_up"] for cost in costs if cost["phase"] == "train"]
    assert 0 < max(up) <= int(least.removesuffix("B"))
    wire = json.loads((result.folder / "summary.json").read_text())["wire"]
    assert wire["budget"] == least and wire["dealt"]["most_bytes"] <= int(least.removesuffix("B"))
    assert f"by a budget of {least}" in write_report([result.folder]).read_text()


@pytest.mark.parametrize(
    "wire",
    [
        {"up": "auto", "down": "auto"},
        pytest.param(
            {"budget": "2500B", "error_feedback": "ef21", "down": "auto"}, marks=pytest.mark.slow
        ),
    ],
    ids=["auto", "budget"],
)
def test_a_run_that_is_stopped_and_resumed_chooses_the_same(compressed, tmp_path, wire):
    settings = {"federation": {"rounds": 4, "clients_per_round": 2}, "adapter": {"rank": 4}}
    whole = fedloom.run(compressed(wire, **settings))
    broken = tmp_path / "broken"
    with pytest.raises(Interrupted):
        fedloom.run(compressed(wire, **settings, output={"folder": str(broken)}), observer=Stop(5))
    resumed = resume_run(broken)
    assert states(whole.folder) == states(resumed.folder) and len(states(whole.folder)) == 5
    one, two = (
        json.loads((own.folder / "summary.json").read_text())["wire"] for own in (whole, resumed)
    )
    assert one == two and one["auto"]["chosen"]
    errors = one["auto"]["errors"]["down"]
    assert errors["int8"] < errors["int4"] and len(errors["int8"]) == 2
    losses = one["auto"]["losses"]
    assert all(len(own) == 2 for way in losses.values() for own in way.values())
    first = json.loads((whole.folder / "rounds.jsonl").read_text().splitlines()[1])
    after = first["evaluation"]["global"]["loss"]
    assert losses["mean"]["as it is"][0] == pytest.approx(after, rel=1e-5)
    page = write_report([resumed.folder]).read_text()
    assert "was chosen" in page and "Error of the mean in each preset, down" in page


def test_the_strongest_preset_within_the_error_is_chosen_and_kept(compressed, federate):
    sent = Sent()
    wire = {"up": "auto", "down": "auto", "auto_rounds": 1, "auto_error": 0.05}
    found = federate(compressed(wire, federation={"rounds": 4}), sent.watch)
    own = found.records[-1].wire["auto"]
    for way in ("up", "down"):
        small = [name for name, errors in own["errors"][way].items() if errors[0] <= 0.05]
        assert own["chosen"][way] == small[-1]
    assert found.records[1].wire == {"auto": own}
    assert sent.exchanges[1].plain is None
    codec = {s.codec for s in sent.exchanges[2].reply_schema.tensors}
    assert codec == {PresetChoice(WireSettings(up="auto"), 0, chosen=own["chosen"]).codec("up")}
    sizes = [len(next(iter(sent.exchanges[round].requests.values()))) for round in (2, 3, 4)]
    assert sizes[1] < sizes[0] / 2 and sizes[2] < sizes[0] / 2  # the whole once, then changes


def test_the_error_of_the_mean_is_measured_by_hand():
    """Two clients of 1 and 3 rows change one number of a block by 1 and by 2: the mean is 1.75, and codes
    at the largest magnitude are exact. Two more of 0.5 and 1: the mean is 0.875; nothing is lost of the
    halves that int4 rounds to 4 of 7 but 1/14 of the first and 2/14 of the second, down."""
    settings = WireSettings(up="auto", down="auto", keep_plain_below=0)
    choice = PresetChoice(settings, 0)
    schema = Schema((TensorSpec("w", (1, 2), torch.float32),))
    exchange = Exchange.broadcast(
        "train", 1, (0, 1), Payload({"w": torch.zeros(1, 2)}), schema, schema
    )
    changes = {0: (torch.tensor([[1.0, 0.5]]), 1.0), 1: (torch.tensor([[2.0, 1.0]]), 3.0)}
    replies = [
        Reply(c, Payload({"w": change}, {"examples": rows}))
        for c, (change, rows) in changes.items()
    ]
    choice.measure(exchange, replies)
    backwards = PresetChoice(settings, 0)
    backwards.measure(exchange, replies[::-1])
    assert choice.errors == backwards.errors
    assert list(choice.errors["up"]) == ["int8", "int4", "small"]  # signs are biased
    # signs: the mean magnitude of (1, 1/2) is 3/4, of (2, 1) 3/2: (1/4)^2 + (1/4)^2 over 1 + 1/4, so 0.1
    assert choice.errors["down"]["smallest"] == [pytest.approx(0.1, rel=0.02)]
    assert choice.errors["up"]["int8"][0] < 1e-4 and not choice.chosen
    choice.measure(exchange, replies)  # of a round once
    assert len(choice.errors["up"]["int8"]) == 1


LOSSES = {
    "before": {"as it is": [1.0, 0.8]},
    "mean": {"as it is": [0.8, 0.7]},
    "up": {"int8": [0.8, 0.7], "int4": [0.81, 0.71], "small": [0.85, 0.74]},
    "down": {"int8": [0.79, 0.7], "int4": [0.9, 0.9], "smallest": [0.8, 0.71]},
}
"""Two rounds took 0.2 and 0.1 off the loss: of 0.3 int4 costs 0.02 up, 1/15, and small 0.09, 0.3. Down,
int8 helped by 0.01, int4 costs all and more, smallest 1/30."""


def test_the_preset_of_fewest_bits_that_keeps_the_loss_by_hand():
    up, down = (loss_costs(LOSSES, way) for way in ("up", "down"))
    assert up == pytest.approx({"int8": 0, "int4": 1 / 15, "small": 0.3})
    assert down == pytest.approx({"int8": -1 / 30, "int4": 1, "smallest": 1 / 30})
    lossy = {"int8": [0.9, 0.9], "int4": [0.1, 0.1], "small": [0.9, 0.9], "smallest": [0.9, 0.9]}
    settings = WireSettings(up="auto", down="auto")
    choice = PresetChoice(settings, 0, errors={"up": lossy, "down": lossy}, losses=LOSSES)
    assert [choice._best(way) for way in ("up", "down")] == ["int4", "smallest"]
    risen = {**LOSSES, "mean": {"as it is": [1.0, 0.8]}}
    assert loss_costs(risen, "up") == {}  # nothing was taken off: errors decide
    choice = PresetChoice(settings, 0, errors={"up": lossy, "down": lossy}, losses=risen)
    assert choice._best("up") == "int4" and choice._best("down") == "int4"


def test_the_loss_is_of_what_was_sent_moved_by_what_is_read():
    """A loss that is the square of what is held: the mean moves 2, 1 to 0, 0, int4 rounds the halves."""
    settings, seen = WireSettings(up="auto", down="auto", keep_plain_below=0, auto_rounds=1), []

    def loss(tensors, round):
        seen.append((round, tensors["w"].clone()))
        return float(tensors["w"].square().sum())

    choice = PresetChoice(settings, 0, loss)
    schema = Schema((TensorSpec("adapter/w", (1, 2), torch.float32),))
    payload = Payload({"adapter/w": torch.tensor([[2.0, 1.0]])})
    exchange = Exchange.broadcast("train", 1, (0,), payload, schema, schema)
    choice.measure(
        exchange, [Reply(0, Payload({"adapter/w": torch.zeros(1, 2)}, {"examples": 1.0}))]
    )
    assert choice.losses["before"]["as it is"] == [5.0] and choice.losses["mean"]["as it is"] == [
        0.0
    ]
    assert torch.equal(seen[0][1], torch.tensor([[2.0, 1.0]])) and seen[0][0] == 1
    # signs: -3/2 for both, which leaves 1/2 and -1/2, so 0.1 of the loss
    assert choice.losses["down"]["smallest"] == [pytest.approx(0.5, rel=0.02)]
    assert (
        choice.chosen["down"] in ("small", "smallest", "int4") and choice.record()["auto"]["costs"]
    )
    again = PresetChoice(settings, 0, loss)
    again.restore(choice.saved())
    assert (again.losses, again.chosen) == (choice.losses, choice.chosen)


def test_where_the_loss_cannot_be_measured_errors_decide():
    settings = WireSettings(up="auto", keep_plain_below=0, auto_rounds=1)
    choice = PresetChoice(settings, 0, lambda tensors, round: None)
    schema = Schema((TensorSpec("w", (1, 2), torch.float32),))
    payload = Payload({"w": torch.zeros(1, 2)})
    exchange = Exchange.broadcast("train", 1, (0,), payload, schema, schema)
    choice.measure(exchange, [Reply(0, Payload({"w": torch.ones(1, 2)}, {"examples": 1.0}))])
    assert choice.chosen == {"up": "small"} and not choice.losses
    assert "costs" not in choice.record()["auto"]


def test_changes_are_measured_as_they_are_replied():
    """As FedNova's: what was sent is not taken off again."""
    schema, found = Schema((TensorSpec("w", (1, 2), torch.float32),)), []
    for sent in (0.0, 3.0):
        choice = PresetChoice(WireSettings(up="auto", down="auto", keep_plain_below=0), 0)
        payload = Payload({"w": torch.full((1, 2), sent)})
        exchange = Exchange.broadcast("train", 1, (0,), payload, schema, schema)
        reply = Reply(0, Payload({"w": torch.tensor([[1.0, 0.5]])}, {"examples": 1.0}))
        choice.measure(replace(exchange, replies_are_changes=True), [reply])
        found.append(choice.errors)
    assert found[0] == found[1]


def test_parts_have_codecs_of_their_own(compressed, federate):
    """N c stays the sum of all c_k, whichever codec their changes have."""
    sent = Sent()
    wire = {"up": "small", "parts": {"control": "int8"}}
    own = {"method": {"name": "scaffold"}, "federation": {"rounds": 2, "clients_per_round": 2}}
    found = federate(compressed(wire, **own), sent.watch_requests)
    codecs = {}
    for spec in sent.exchanges[1].reply_schema.tensors:
        codecs.setdefault(spec.name.partition("/")[0], set()).add(spec.codec.partition(":")[0])
    assert codecs["adapter"] == {"ternary"} and codecs["control"] == {"int8"}
    store = found.parts.local.store
    kept = [store.slots(c)["control"] for c in range(3) if "control" in store.slots(c)]
    for name, c in part_of(found.state.tensors, "control").items():
        assert torch.allclose(
            3 * c, sum(one[name] for one in kept), atol=1e-4 * float(c.abs().max())
        )


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ({"wire": {"budget": "2MB", "up": "int8"}}, "leave one of them out"),
        ({"wire": {"budget": "2 sheep"}}, "is not a quantity"),
        ({"wire": {"budget": "2MB"}, "method": {"name": "flora"}}, "needs 8 bits of each number"),
        (
            {"wire": {"up": "auto", "auto_rounds": 1}, "method": {"name": "flora"}},
            "needs 8 bits of each number",
        ),
        (
            {"wire": {"up": "auto", "auto_rounds": 1, "error_feedback": "classic"}},
            "chooses among presets",
        ),
        (
            {"wire": {"up": "auto"}},
            'wire.up = "auto" chooses after wire.auto_rounds = 2 rounds, and federation.rounds = 2',
        ),
        (
            {"wire": {"budget": "2MB", "down": "auto", "auto_rounds": 7}},
            'wire.down = "auto" chooses after wire.auto_rounds = 7 rounds, and federation.rounds = 2',
        ),
        ({"wire": {"up": ["nothing"]}}, "hardly change"),
        ({"wire": {"parts": {"control": "int8"}}}, "has no parts: leave wire.parts out"),
        (
            {"wire": {"parts": {"prototypes": "int8"}}, "method": {"name": "scaffold"}},
            "has the parts adapter, control: name one of them",
        ),
        (
            {
                "wire": {"down": "auto", "auto_rounds": 1},
                "privacy": {"unit": "client", "noise_multiplier": 1.0},
            },
            "no part of the privacy account",
        ),
        (
            {
                "wire": {"parts": {"adapter": "int4"}, "error_feedback": "classic"},
                "method": {"name": "scaffold"},
            },
            "wire.parts.adapter = 'int4' rounds at random",
        ),
    ],
)
def test_what_cannot_be_is_one_error(experiment, sections, text):
    with pytest.raises(SettingsError, match=text) as raised:
        experiment(**sections)
    assert sum("wire" in problem for problem in raised.value.problems) == 1


@pytest.mark.parametrize("wire", [{"budget": "1MB"}, {"up": "auto"}], ids=["budget", "auto"])
def test_answers_of_no_fixed_size_are_refused_before_anything_is_trained(
    compressed,
    federate,
    wire,
):
    groups = {"groups": {"small": {"clients": [0], "rank": 4}}}
    own = {"method": {"name": "hetlora"}, "adapter": {"rank": 8}, "clients": groups}
    with pytest.raises(SettingsError, match="has no fixed size"):
        federate(compressed(wire, **own))
