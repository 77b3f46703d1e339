"""The malformed updates that frameworks were measured with, one at a time among three honest clients.

Ours: all left out with a reason, and the global adapter is that of the honest clients alone. The same
fifteen are given to Flower's own FedAvg, for contrast: ``pytest -s`` shows both as a table. Two rows of the
list are not of one update: all weights zero is several clients', and a NaN in place of a header is in
``test_faults.py``.
"""

import json
import struct
import warnings

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load, save

from fedloom.wire.envelope import ReplyHeader
from loopback import of, resealed

HONEST, BAD = 3, 3


def opened(payload):
    """The parts of an encoded payload: one flat buffer, and its metadata."""
    (size,) = struct.unpack("<Q", payload[:8])
    return load(payload)["float32"], json.loads(payload[8 : 8 + size])["__metadata__"]


def tensors(change):
    """A change of the flat buffer of all tensors."""

    def make(payload):
        flat, metadata = opened(payload)
        return save({"float32": change(flat)}, metadata)

    return make


def weight(value):
    def make(payload):
        flat, metadata = opened(payload)
        return save({"float32": flat}, {**metadata, "numbers": json.dumps([value])})

    return make


def extra(payload):
    flat, metadata = opened(payload)
    return save({"float32": flat, "more": flat[:1].clone()}, metadata)


def renamed(payload):
    flat, metadata = opened(payload)
    return save({"float64": flat}, metadata)


def filled(value):
    def change(flat):
        flat = flat.clone()
        flat[5] = value
        return flat

    return change


OURS = {
    "NaN": tensors(filled(float("nan"))),
    "Inf": tensors(filled(float("inf"))),
    "1e30": tensors(filled(1e30)),
    "shape that broadcasts": tensors(lambda flat: flat[:8].clone()),
    "shape that does not": tensors(lambda flat: torch.cat([flat, flat[:8]])),
    "int8": tensors(lambda flat: flat.to(torch.int8)),
    "fp16": tensors(lambda flat: flat.to(torch.float16)),
    "complex64": tensors(lambda flat: flat.to(torch.complex64)),
    "extra key": extra,
    "missing key": renamed,
    "weight -9": weight(-9),
    "weight NaN": weight(float("nan")),
    "weight 1e18": weight(1e18),
    "stale round": None,
    "empty": lambda payload: b"",
}
FLOWERS = {
    "NaN": lambda a: (np.where(np.arange(32).reshape(4, 8) == 5, np.nan, a), 10),
    "Inf": lambda a: (np.where(np.arange(32).reshape(4, 8) == 5, np.inf, a), 10),
    "1e30": lambda a: (np.where(np.arange(32).reshape(4, 8) == 5, 1e30, a), 10),
    "shape that broadcasts": lambda a: (a[:1] * 5, 10),
    "shape that does not": lambda a: (np.ones((5, 8), np.float32), 10),
    "int8": lambda a: ((a * 5).astype(np.int8), 10),
    "fp16": lambda a: ((a * 5).astype(np.float16), 10),
    "complex64": lambda a: ((a * 5).astype(np.complex64), 10),
    "extra key": lambda a: ({"w": a, "more": a}, 10),
    "missing key": lambda a: ({"v": a}, 10),
    "weight -9": lambda a: (a * 5, -9),
    "weight NaN": lambda a: (a, float("nan")),
    "weight 1e18": lambda a: (a * 5, 10**18),
    "stale round": lambda a: (a * 5, 10),
    "empty": lambda a: ({}, 10),
}


def flower(case):
    """What Flower's FedAvg makes of three honest updates of ones and a bad one."""
    honest = np.ones((4, 8), np.float32)

    def message(arrays, weight):
        arrays = arrays if isinstance(arrays, dict) else {"w": arrays}
        content = RecordDict(
            {
                "arrays": ArrayRecord({k: _array(v) for k, v in arrays.items()}),
                "metrics": MetricRecord({"num-examples": weight}),
            }
        )
        return Message(content, dst_node_id=1, message_type="train")

    replies = [message(honest, 10) for _ in range(HONEST)]
    replies.append(message(*FLOWERS[case](honest)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            arrays, _ = FedAvg().aggregate_train(7, replies)
    except BaseException as error:  # it exits the app
        return f"the round is lost: {type(error).__name__}"
    made = arrays["w"].numpy()
    if np.array_equal(made, honest) and made.dtype == honest.dtype:
        return "as of the honest"
    return f"accepted: {made.dtype} with {made.flat[5]:.3g} in place of 1"


def _array(values):
    from flwr.app import Array

    return Array(values)


@pytest.fixture
def bad(deployed):
    """Play two rounds in which a client's second answer is malformed."""

    def play(case, folder):
        first = {}

        def break_(mail, federation):
            def tamper(node, envelope):
                header = envelope.read(ReplyHeader)
                if node == 100 + BAD and header.round == 1:
                    first["envelope"] = envelope
                if node != 100 + BAD or header.round != 2:
                    return envelope
                if OURS[case] is None:
                    return first["envelope"]
                return resealed(federation, BAD, header, OURS[case](envelope.payload))

            mail.tamper = tamper if case else lambda node, e: gone(node, e)

        def gone(node, envelope):
            header = envelope.read(ReplyHeader)
            return "gone" if node == 100 + BAD and header.round == 2 else envelope

        return deployed(clients=HONEST + 1, break_=break_, output={"folder": str(folder)})

    return play


@pytest.mark.slow
def test_fifteen_malformed_updates(bad, tmp_path):
    honest = bad(None, tmp_path / "honest").states
    lines = []
    for number, case in enumerate(OURS):
        found = bad(case, tmp_path / f"{number}")
        reason = of(found.rounds[1], BAD)
        assert reason is not None and found.states == honest, case
        assert found.rounds[0]["rejected"] == []
        (event,) = found.events("refused") or found.events("absent")
        assert event["client"] == BAD and event["reason"] == reason
        lines.append((case, f"left out: {reason}", flower(case)))
    print()
    for case, ours, flowers in lines:
        print(f"{case:22} fedloom: {ours[:96]:96} flwr: {flowers}")
    assert len(lines) == 15
    assert sum(flowers == "as of the honest" for *_, flowers in lines) == 0


def test_the_same_client_twice_counts_once(deployed, tmp_path):
    honest = deployed(output={"folder": str(tmp_path / "honest")})

    def twice(mail, federation):
        real = mail.pull_messages

        def pull(ids):
            replies = real(ids)
            return [*replies, *replies]

        mail.pull_messages = pull

    found = deployed(break_=twice, output={"folder": str(tmp_path / "twice")})
    assert found.states == honest.states
    assert all(record["rejected"] == [] for record in found.rounds)
