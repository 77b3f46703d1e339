"""What secure aggregation costs: seconds of CPU at a client and at the server, bytes, and a whole round.

``python benchmarks/secure_aggregation.py`` plays one sum of 20 clients with 13.5 million numbers each (a
LoRA of rank 16 on a model of 3B parameters), in which two drop out after the masks are agreed on, checks
that it is exact, and prints the cost of each part beside its limit. One client is masked in full; of the
others it is the same work, and their vectors take part in the sum as well.

``--round`` adds the critical path of a round, in which clients work side by side and the server works
alone: the longest client's seconds of CPU (its 8 local steps, its answer, and its part in the sum) and
the server's, over those of the round in which the same answers arrive plain and are averaged. A real
client trains a Llama with random weights whose LoRA has as many numbers: 8 blocks of width 512 with rank
172, where a LoRA of that size in use sits on a backbone of billions; SFT in place of pairs; 8 rows of 256
tokens a step. All of that makes steps cheaper than they are in use, and so the share of the sum larger.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.aggregation.means import weighted_mean
from fedloom.data.builtin import builtin_examples, pretraining_texts
from fedloom.data.client_rows import TokenShare
from fedloom.data.tokenize import tokenize
from fedloom.evaluation.generate import load_encoder
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.tiny import TinyRecipe, make_tiny_model
from fedloom.objectives import OBJECTIVES
from fedloom.privacy.secure_aggregation import primitives
from fedloom.privacy.secure_aggregation import protocol_messages as messages
from fedloom.privacy.secure_aggregation.client import ClientSession
from fedloom.privacy.secure_aggregation.masks import packed, packed_bytes, unpacked
from fedloom.privacy.secure_aggregation.primitives import Context
from fedloom.privacy.secure_aggregation.quantisation import Grid
from fedloom.privacy.secure_aggregation.server import ServerSession
from fedloom.tensors import Tensors
from fedloom.training.settings import TrainingSettings, Work
from fedloom.training.steps import train_locally
from fedloom.wire.messages import Payload, decode, encode
from fedloom.wire.schema import Schema, TensorSpec

STEPS, BATCH, LENGTH = 8, 8, 256
"""Local steps of the round, rows of each, and tokens of a row."""

LIMITS = {
    "client, seconds of CPU": 3.0,
    "server, seconds of CPU a self mask": 0.1,
    "server, seconds of CPU a dropped neighbour": 0.1,
    "bytes up over those of float32": 1.1,
    "critical path over the plain round's": 1.3,
}

Found = TypeVar("Found")


def timed(work: Callable[[], Found], into: list[float]) -> Found:
    """Return what ``work`` returns, and note its seconds of CPU."""
    began = time.process_time()
    found = work()
    into.append(time.process_time() - began)
    return found


def measure(clients: int, numbers: int, rows: int, dropped: int) -> dict[str, float]:
    """Play a sum and return its costs; the last clients drop out after the shares."""
    context, model = Context("benchmark", 1, 0), hashlib.sha256(b"model").digest()
    grid = Grid(16, 1.0, clients, rows)
    identities = [os.urandom(32) for _ in range(clients)]
    registry = {c: primitives.identity_of(key) for c, key in enumerate(identities)}
    players = [
        ClientSession(context, c, key, registry, os.urandom(32)) for c, key in enumerate(identities)
    ]
    server = ServerSession(context, numbers, registry)
    spent: list[list[float]] = [[] for _ in players]
    sent = [messages.KEYS_BYTES + primitives.SIGNATURE_BYTES] * clients
    beside, taking = (
        list[float](),
        list[float](),
    )  # what the server does but for answers, and with them
    for c, own in enumerate(players):
        signed = timed(own.advertise, spent[c])
        timed(lambda c=c, signed=signed: server.take_keys(c, signed), beside)  # type: ignore[misc]
    keys = timed(server.keys, beside)
    for c, own in enumerate(players):
        shares = timed(lambda own=own: own.share(keys), spent[c])  # type: ignore[misc]
        timed(lambda c=c, shares=shares: server.take_shares(c, shares), beside)  # type: ignore[misc]
        sent[c] += len(shares)
    passed, right = timed(server.shares, beside), np.zeros(numbers, dtype=np.uint32)
    there = range(clients - dropped)
    spec = TensorSpec("masked", (packed_bytes(numbers, grid.width),), torch.uint8)
    schema = Schema((spec,))
    for c in there:
        values = np.random.default_rng(c).normal(0, 0.01, numbers).astype(np.float32)
        plain = np.zeros(numbers, dtype=np.uint32)

        def masked(c: int = c, values: np.ndarray = values, plain: np.ndarray = plain) -> bytes:
            grid.put(values, rows, plain, np.random.default_rng(c))
            words = plain.copy()
            players[c].mask(passed[c], model, words)
            words &= np.uint32(2**grid.width - 1)
            return encode(Payload({"masked": torch.from_numpy(packed(words, grid.width))}), schema)

        def take(c: int, data: bytes) -> None:
            words = decode(data, schema).tensors["masked"].numpy()
            server.take_masked(c, unpacked(words, numbers, grid.width))

        data = timed(masked, spent[c])
        right += plain
        sent[c] += len(data)
        timed(lambda c=c, data=data: take(c, data), taking)  # type: ignore[misc]
    listed = server.survivors_list()
    for c in there:
        signature = timed(lambda c=c: players[c].confirm(listed), spent[c])  # type: ignore[misc]
        timed(lambda c=c, own=signature: server.take_signature(c, own), beside)  # type: ignore[misc]
    signatures = server.signatures()
    for c in there:
        revealed = timed(lambda c=c: players[c].reveal(signatures), spent[c])  # type: ignore[misc]
        timed(lambda c=c, own=revealed: server.take_revealed(c, own), beside)  # type: ignore[misc]
        sent[c] += len(revealed)
    ending = list[float]()
    total = timed(lambda: server.unmasked(model), ending)
    mask = np.uint32(2**grid.width - 1)
    assert np.array_equal(total & mask, right & mask), "the sum is not exact"
    each = ending[0] / (len(there) + dropped * len(there))
    return {
        "client, seconds of CPU": max(sum(spent[c]) for c in there),
        "server, seconds of CPU to take an answer": sum(taking) / len(taking),
        "server, seconds of CPU a self mask": each,
        "server, seconds of CPU a dropped neighbour": each,
        "server, seconds of CPU in all": sum(beside) + sum(taking) + ending[0],
        "bytes up over those of float32": max(sent) / (4 * numbers),
        "bits of a number": grid.width,
    }


def setup(rank: int) -> tuple[AdapterModel, TokenShare]:
    """Return a client's model, with random weights, and its rows of :data:`LENGTH` tokens."""
    with tempfile.TemporaryDirectory() as folder:
        texts = pretraining_texts(np.random.default_rng(0), 200)
        recipe = TinyRecipe(vocabulary=2000, hidden=32, intermediate=64, layers=1, heads=2, steps=1)
        make_tiny_model(Path(folder) / "tiny", texts, recipe)
        encoder = load_encoder(str(Path(folder) / "tiny"))
    config = LlamaConfig(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=LENGTH,
    )  # fmt: skip
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(config).requires_grad_(requires_grad=False)
    drawn = builtin_examples("instructions", STEPS * BATCH, np.random.default_rng(0))
    long = " ".join(own.completion for own in drawn)
    rows = [replace(own, completion=f"{own.completion} {long}") for own in drawn]
    tokens = tokenize(rows, encoder, LENGTH)
    assert (tokens.lengths == LENGTH).all(), "the rows are not as long as is said"
    adapter = AdapterSettings(rank=rank)
    return AdapterModel(attach_adapter(backbone, adapter), 0), TokenShare(tokens)


def plain_round(rank: int, answers: int) -> tuple[float, float, float, int]:
    """Return the CPU seconds of a client's steps and answer, and of the server; and the numbers."""
    model, share = setup(rank)
    settings = TrainingSettings(learning_rate=1e-4, batch_size=BATCH)
    steps, answering, serving = list[float](), list[float](), list[float]()

    def train() -> None:
        result = train_locally(
            model, share, OBJECTIVES["sft"][1](), settings, learning_rate=1e-4, seed=0, client=0,
            round=1, work=Work(steps=STEPS),
        )  # fmt: skip
        assert result.steps == STEPS, "it made other steps"

    timed(train, steps)
    update = model.read()
    schema = Schema.of(update, ())
    data = timed(lambda: encode(Payload(update), schema), answering)

    def averaged() -> Tensors:
        updates = [decode(data, schema).tensors for _ in range(answers)]
        return weighted_mean(updates, [1.0] * answers, updates[0])

    timed(averaged, serving)
    numbers = sum(tensor.numel() for tensor in update.values())
    return steps[0], answering[0], serving[0], numbers


def critical_path(rank: int, clients: int, rows: int, dropped: int) -> dict[str, float]:
    """Return the costs of a round whose client trains, with a sum and plain."""
    steps, answering, serving, numbers = plain_round(rank, clients - dropped)
    found = measure(clients, numbers, rows, dropped)
    plain = steps + answering + serving
    path = steps + found["client, seconds of CPU"] + found["server, seconds of CPU in all"]
    return {
        "numbers of the adapter": numbers,
        **found,
        "client, seconds of CPU of 8 steps": steps,
        "plain: client's answer, seconds of CPU": answering,
        "plain: server, seconds of CPU in all": serving,
        "critical path, seconds of CPU": path,
        "critical path of the plain round": plain,
        "critical path over the plain round's": path / plain,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--numbers", type=int, default=13_500_000)
    parser.add_argument("--rows", type=int, default=1000, help="of the largest client")
    parser.add_argument("--dropped", type=int, default=2)
    parser.add_argument("--round", action="store_true", help="the critical path, with real steps")
    parser.add_argument("--rank", type=int, default=172, help="of --round: 13.56 million numbers")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.round:
        found = critical_path(given.rank, given.clients, given.rows, given.dropped)
    else:
        found = measure(given.clients, given.numbers, given.rows, given.dropped)
    for what, value in found.items():
        limit = LIMITS.get(what)
        print(f"{what:45} {value:12.4f}" + (f"  at most {limit}" if limit is not None else ""))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
