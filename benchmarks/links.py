"""Time that a round spends on its messages, by link and preset of ``[wire]``.

    python benchmarks/links.py [--tensors 412] [--clients 10] [--out benchmarks/results/links.md]

Two rounds are played by the code that a run plays: the server makes requests, one client opens its own,
answers with a change as AdamW makes it (kurtosis 1.7), and the server reads the answer. Nothing is
trained. Of the second round, in which the change since the first is sent, bytes and seconds of CPU on one
core are measured, the least of some turns, and with them

    time = making + down + opening + answering + up + clients x reading

where the server makes a request and reads answers, a client opens and answers, and down and up are 8
bytes / link. Clients work and send at the same time, each on a link of its own,
the server reads one answer after the other; latency and training are left out, which no codec changes.
Each tensor is 16 x 2048, 131 kB in float32; 412 of them are the LoRA of a model of 3 billion parameters.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from fedloom.accounting.quantities import human_bytes
from fedloom.federation.client_link import ClientLink
from fedloom.federation.compressed_exchange import Compression
from fedloom.tensors import Tensors
from fedloom.wire.messages import Exchange, Payload, Reply
from fedloom.wire.schema import Schema
from fedloom.wire.settings import WireSettings

SHAPE = 16, 2048
LINKS = 1, 10, 100, 1000
TURNS = 3

PRESETS: dict[str, dict[str, str]] = {
    "as it is": {},
    "int8": {"up": "int8", "down": "int8"},
    "int4": {"up": "int4", "down": "int4"},
    "small, int4 down": {"up": "small", "down": "int4"},
    "smallest, int4 down": {"up": "smallest", "down": "int4"},
}

Found = TypeVar("Found")


@dataclass(frozen=True)
class Measured:
    """What the messages of one client take in a round.

    Attributes:
        down: Bytes of the request.
        up: Bytes of the answer.
        making: Seconds in which the server makes the request, once for all.
        opening: Seconds in which a client opens it.
        answering: Seconds in which it codes its answer.
        reading: Seconds in which the server reads one answer.
    """

    down: int
    up: int
    making: float
    opening: float
    answering: float
    reading: float

    def seconds(self, megabits: float, clients: int) -> float:
        """Return the time of a round on such links."""
        sent = 8 * (self.down + self.up) / (1e6 * megabits)
        return self.making + self.opening + self.answering + sent + clients * self.reading


def changes(tensors: int, seed: int) -> Tensors:
    """Return numbers whose magnitudes are alike."""
    rng, found = np.random.default_rng(seed), {}
    for i in range(tensors):
        own = rng.standard_normal(SHAPE, np.float32) * 0.4 + rng.choice([-1, 1], SHAPE)
        found[f"layer.{i}"] = torch.from_numpy(np.clip(own, -2, 2).astype(np.float32) * 1e-4)
    return found


def timed(work: Callable[[], Found]) -> tuple[Found, float]:
    """Return what a function returns, and its seconds of CPU."""
    began = time.process_time()
    found = work()
    return found, time.process_time() - began


def turn(settings: WireSettings, initial: Tensors, move: Tensors, reply: Tensors) -> Measured:
    """Play two rounds; return what the messages of the second took."""
    schema = Schema.of(initial)
    server = Compression(settings, 0, initial)
    slots: dict[str, Tensors] = {}
    state, found = initial, Measured(0, 0, 0, 0, 0, 0)
    for round in (1, 2):

        def carried(state: Tensors = state, round: int = round) -> Exchange:
            own = Exchange.broadcast("train", round, (0,), Payload(state), schema, schema)
            return server.carried(own)

        def opened(exchange: Exchange, slots: dict[str, Tensors] = slots) -> ClientLink:
            return ClientLink.opened(exchange, 0, settings, 0, slots, initial)

        exchange, making = timed(carried)
        link, opening = timed(lambda exchange=exchange: opened(exchange))
        received = link.payload.tensors
        own = Payload({name: received[name] + change for name, change in reply.items()})
        data, answering = timed(lambda link=link, own=own: link.encoded(own))
        read, reading = timed(lambda exchange=exchange, data=data: exchange.read_reply(0, data))
        slots = link.stored({})
        server.settle(exchange, [Reply(0, read)])
        state = {name: own + move[name] for name, own in state.items()}
        found = Measured(exchange.bytes_down(0), len(data), making, opening, answering, reading)
    return found


def measured(wire: dict[str, str], tensors: int) -> Measured:
    """Return the least of some turns."""
    settings = WireSettings.model_validate(wire)
    initial = {name: 100 * own for name, own in changes(tensors, 1).items()}
    move, reply = changes(tensors, 2), changes(tensors, 3)
    turns = [turn(settings, initial, move, reply) for _ in range(TURNS)]
    least = (min(getattr(own, key) for own in turns) for key in TIMES)
    return Measured(turns[0].down, turns[0].up, *least)


TIMES = "making", "opening", "answering", "reading"


def table(found: dict[str, Measured], clients: int) -> list[str]:
    """Return the rows of the table; what is fastest on a link is bold."""
    links = [f"{own:,} Mbit" for own in LINKS]
    head = ["up and down", "up", "down", "client", "server", *links]
    rows = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    best = [min(own.seconds(link, clients) for own in found.values()) for link in LINKS]
    for name, own in found.items():
        cells = [
            name,
            human_bytes(own.up),
            human_bytes(own.down),
            f"{own.opening + own.answering:.2f} s",
            f"{own.making + clients * own.reading:.2f} s",
        ]
        for link, least in zip(LINKS, best, strict=True):
            seconds = own.seconds(link, clients)
            text = f"{seconds:.3g} s"
            cells.append(f"**{text}**" if seconds == least else text)
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensors", type=int, default=40, help="of 131 kB; 412 are 54 MB")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, wire in PRESETS.items():
        found[name] = measured(wire, given.tensors)
        print(name, found[name], flush=True)
    size = human_bytes(4 * given.tensors * SHAPE[0] * SHAPE[1])
    lines = [
        "# Links",
        "",
        f"Time that a round of {given.clients} clients spends on its messages, {size} of float32 each "
        "way; seconds of CPU of one core, and simulated links. What is counted: the docstring of "
        "`benchmarks/links.py`. The fastest on a link is bold.",
        "",
        *table(found, given.clients),
    ]
    print("\n".join(lines))
    if given.out is not None:
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
