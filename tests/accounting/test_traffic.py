"""Measured bytes against the closed form: three frameworks, every encoding, to 0.1 % and a kilobyte."""

import pytest

from fedloom.accounting.traffic import (
    ActivationTraffic,
    Done,
    LogitTraffic,
    ParameterTraffic,
    from_record,
    row_bytes,
    to_record,
)
from fedloom.reports.client_rounds import turns

KINDS = {
    "sft": {
        "data": {"source": "builtin:instructions", "builtin_rows": 60},
        "objective": {"name": "sft"},
    },
    "classification": {
        "data": {"source": "builtin:labelled", "builtin_rows": 90},
        "objective": {"name": "classification"},
    },
}
METHODS = [
    {"name": "fedavg"},
    {"name": "scaffold"},
    {"name": "fedptr"},
    {"name": "fednova"},
    {"name": "fedadam"},
    {"name": "local_only"},
    {"name": "fedsa_lora"},
    {"name": "flora"},
    {"name": "fedex_lora"},
    {"name": "flexlora"},
    {"name": "fed_sb"},
    {"name": "random_projection"},
    {"name": "regmean"},
    {"name": "fedmap"},
    {"name": "feddat"},
    {"name": "fedspallm"},
    {"name": "fed_et", "encoding": "fp16", "top_k": 3},
    {"name": "fedkseed", "candidates": 500},
    {"name": "fedkseed", "candidates": 500, "sampling": "weighted"},
    *({"name": "distillation", "encoding": e} for e in ("fp32", "bf16", "fp16", "int8")),
    *({"name": "distillation", "encoding": e, "top_k": 3} for e in ("fp32", "fp16", "int8")),
    *(
        {"name": "split", "activations": e, "gradients": e}
        for e in ("fp32", "bf16", "fp16", "int8")
    ),
    *(
        {"name": "split", "labels": "client", "activations": e, "gradients": e}
        for e in ("fp32", "int8")
    ),
    {"name": "split", "activations": "int8", "gradients": "fp16", "average_every": 2},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(map(str, m.values())))
def test_measured_is_the_closed_form(federate, experiment, kind, method):
    found = federate(
        experiment(
            **KINDS[kind], method=method, public={"rows": 12},
            training={"batch_size": 8, "local_steps": 5}, federation={"rounds": 1, "clients": 2},
        )
    )  # fmt: skip
    traffic = found.parts.method.traffic(found.parts.initial)
    assert from_record(to_record(traffic)) == traffic
    costs = [cost.__dict__ for cost in found.records[-1].costs]
    seen = turns({"traffic": to_record(traffic)}, costs)
    assert len(seen) == 2
    for turn in seen:
        assert turn.sent.exchanges == turn.expected.exchanges
        for way in ("down", "up"):
            measured, closed = getattr(turn.sent, way), getattr(turn.expected, way)
            assert abs(measured - closed) <= 0.001 * measured + 1024, (way, measured, closed)
            assert abs(measured - closed) < 1000  # all of it headers


def test_an_adaptive_number_of_logits_is_bounded_by_the_form(federate, experiment):
    found = federate(
        experiment(
            **KINDS["classification"], public={"rows": 30},
            method={"name": "distillation", "top_mass": 0.5}, federation={"rounds": 1, "clients": 2},
        )
    )  # fmt: skip
    expected = found.parts.method.traffic(found.parts.initial).of_round(Done(0, 0, 0, 0))
    up = sum(cost.bytes_up for cost in found.costs(0))
    assert up < expected.up + 200


def test_the_examples_of_the_specification():
    """GPT-2 small: LoRA r=8 on c_attn; 1,000 public samples of 77 classes; 1,000 samples of 32 tokens."""
    assert ParameterTraffic(4 * 294_912, 4 * 294_912).of_round(
        Done(0, 0, 0, 0)
    ).up == pytest.approx(1.18e6, rel=0.002)
    logits = LogitTraffic(1000, 77, "fp32", 0, adaptive=False).of_round(Done(0, 0, 0, 0))
    assert logits.up == pytest.approx(0.308e6, rel=0.002)
    top = LogitTraffic(1000, 10, "fp16", 1, adaptive=False).of_round(Done(0, 0, 0, 0))
    assert top.up == pytest.approx(30_000, rel=0.02)
    done = Done(63, 1000, 32_000, 1000)
    split = ActivationTraffic(0, 768, "fp32", "fp32", 12, False, False, 0).of_round(done)
    assert split.up + split.down == pytest.approx(197e6, rel=0.002)
    assert row_bytes(768, "int8") == 772


def test_a_round_of_parameters_by_hand():
    """Headers: 144 and 144 down; 56 + 3 x 64 + 24 + 68 with three buffers up, and 80 of the second reply."""
    traffic = ParameterTraffic(100, 80, also_down=40, up_a_step=6, up_even=50)
    sent = [traffic.of_round(Done(3, 9, 99, 9), round) for round in (1, 2, 3, 4, 6)]
    assert [(own.down, own.up, own.exchanges) for own in sent] == [
        (428, 518, 2),
        (428, 488, 2),
        (428, 518, 2),
        (428, 488, 2),
        (428, 488, 2),
    ]
    nothing = ParameterTraffic(0, 0).of_round(Done(3, 9, 99, 9))
    assert (nothing.down, nothing.up, nothing.exchanges) == (80, 148, 1)


def test_a_round_of_logits_by_hand():
    """Ten positions of 3 + 4 + 3 x 2 bytes and a count of 4, in four buffers."""
    sent = LogitTraffic(10, 3, "int8", 2, adaptive=True).of_round(Done(3, 9, 99, 9))
    assert (sent.down, sent.up, sent.exchanges) == (170 + 336 + 80, 170 + 404 + 180, 2)


@pytest.mark.parametrize(
    ("u_shape", "down", "up", "exchanges"), [(False, 4840, 6636, 11), (True, 5920, 7726, 16)]
)
def test_a_round_of_activations_by_hand(u_shape, down, up, exchanges):
    """Five steps in three segments: 20 tokens of 4 int8 numbers and a scale up, of 4 floats down."""
    traffic = ActivationTraffic(1000, 4, "int8", "fp32", 16, True, u_shape, 2)
    sent = traffic.of_round(Done(5, 3, 20, 7))
    assert (sent.down, sent.up, sent.exchanges) == (down, up, exchanges)
    if not u_shape:
        traffic = ActivationTraffic(1000, 4, "fp32", "int8", 16, True, u_shape, 2)
        sent = traffic.of_round(Done(5, 3, 20, 7))
        assert (sent.down, sent.up) == (5000, 6284)


def test_bytes_of_a_row_by_encoding():
    assert {own: row_bytes(3, own) for own in ("fp32", "bf16", "fp16", "int8")} == {
        "fp32": 12,
        "bf16": 6,
        "fp16": 6,
        "int8": 3 + 4,
    }


def test_a_round_is_an_odd_one_by_default_and_even_ones_are_alike():
    done = Done(3, 9, 99, 9)
    alike, others = ParameterTraffic(100, 80), ParameterTraffic(100, 80, up_even=50)
    assert alike.of_round(done) == alike.of_round(done, 1) == alike.of_round(done, 2)
    assert others.of_round(done) == others.of_round(done, 1) == alike.of_round(done)
    assert others.of_round(done, 2).up == alike.of_round(done).up - 30


@pytest.mark.parametrize(("index", "down", "up"), [(0, 344, 512), (1, 438, 606)])
def test_a_round_of_whole_and_of_some_logits_by_hand(index, down, up):
    """Ten positions of 3 x 4 bytes, with an index 3 x 5 and one buffer more; headers 144 + 80 or 208 + 80 down, 68 and 180 - 80 more up."""
    sent = LogitTraffic(10, 3, "fp32", index, adaptive=False).of_round(Done(3, 9, 99, 9))
    assert (sent.down, sent.up, sent.exchanges) == (down, up, 2)


def test_a_round_of_activations_with_one_average_and_no_targets_by_hand():
    """Down 1000 + 200, 320 and 5 x 184; up 1000 + 184, 320, 3 x 16 and 6 x 228."""
    traffic = ActivationTraffic(1000, 4, "fp32", "fp32", 16, False, False, 0)
    sent = traffic.of_round(Done(5, 3, 20, 7))
    assert (sent.down, sent.up, sent.exchanges) == (2440, 2920, 7)


@pytest.mark.parametrize(
    "traffic",
    [
        ParameterTraffic(3, 4, also_down=5),
        LogitTraffic(1, 2, "fp16", 1, True),
        ActivationTraffic(1, 2, "fp32", "int8", 3, True, False, 4),
    ],
    ids=lambda own: own.framework,
)
def test_records_come_back(traffic):
    assert from_record(to_record(traffic)) == traffic
    assert to_record(traffic)["framework"] == traffic.framework
