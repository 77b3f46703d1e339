"""Clients in lockstep against one by one: equality first, then speed, by width, clients and row length.

    .venv/bin/python benchmarks/cohorts.py [--width 64 256 768] [--clients 4 32] [--length 32 256]

Each client trains a Llama of 4 blocks with LoRA of rank 8 by SFT, two steps of one row each, on one
thread. Sizes of a cohort that are tried: 1, 4, 8, 16, 32 where there are as many clients, and what
``simulation.cohort = "auto"`` chooses. All sizes are timed in one order and then in the other; the least
of ``--repeats`` counts. It is CPU time of the process, which other processes on the machine disturb less
than time on the clock. Before that, what each client ends with is compared with what it has by itself, in
plain SGD, as a share of how far it moved.
"""

import argparse
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.data.client_rows import TokenShare
from fedloom.data.token_set import TokenSet
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.objectives import SFT
from fedloom.training.cohort import cohort_size, tokens_together, train_together
from fedloom.training.settings import TrainingSettings, Work
from fedloom.training.steps import Training

VOCABULARY, STEPS, TOLERANCE = 2000, 2, 1e-4
SIZES = (1, 4, 8, 16, 32)


def make_model(width: int) -> AdapterModel:
    torch.manual_seed(0)
    heads = max(2, width // 64)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=int(2.7 * width),
        num_hidden_layers=4, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=1024, pad_token_id=0,
    )  # fmt: skip
    backbone = LlamaForCausalLM(config).requires_grad_(False)
    return AdapterModel(attach_adapter(backbone, AdapterSettings(rank=8)), 0)


def make_share(client: int, length: int) -> TokenShare:
    """Return rows of one length, of which all tokens but the first count."""
    rows, rng = STEPS, np.random.default_rng(client)
    trained = np.tile(np.arange(length) > 0, rows)
    return TokenShare(
        TokenSet(
            width=1, index=np.arange(rows), rows=np.arange(rows),
            tokens=rng.integers(1, VOCABULARY, rows * length).astype(np.int32), trained=trained,
            starts=np.arange(rows + 1) * length, prompts=np.ones(rows, np.int64),
            cut=np.zeros((rows, 2), np.int64), escaped=np.zeros(rows, bool),
            labels=np.full(rows, -1), dropped=(),
        )
    )  # fmt: skip


class Cell:
    """Clients of one width and length of rows."""

    def __init__(self, model: AdapterModel, clients: int, length: int) -> None:
        self.model, self.start = model, model.read()
        self.shares = [make_share(client, length) for client in range(clients)]
        self.auto = cohort_size("auto", model, self.shares, 1)

    def run(self, size: int, **settings) -> tuple[float, list]:
        """Return CPU seconds of all clients' trainings, and what each ends with."""
        settings = TrainingSettings(**{"batch_size": 1, **settings})
        began, ends = time.process_time(), []
        for first in range(0, len(self.shares), size):
            own = []
            for client, share in enumerate(self.shares[first : first + size], first):
                self.model.hold(self.model.parameters_of(self.start))
                options = {
                    "learning_rate": settings.learning_rate, "seed": 0, "client": client,
                    "round": 1, "work": Work(epochs=1),
                }  # fmt: skip
                training = Training(self.model, share, SFT(), settings, (), options)
                own.append((training, self.model.as_it_is()))
            if size == 1:
                own[0][0].alone()
            else:
                budget = tokens_together(self.model) if size == self.auto else None
                for outcome in train_together(*zip(*own, strict=True), budget):
                    assert outcome.error is None, outcome.error
            for _, put_back in own:
                put_back()
                ends.append(self.model.read())
        return time.process_time() - began, ends

    def difference(self, size: int) -> float:
        """Return by how much clients differ from one by one, as a share of how far they moved."""
        plain = {"optimizer": "sgd", "learning_rate": 0.1}
        worst = 0.0
        for one, other in zip(self.run(1, **plain)[1], self.run(size, **plain)[1], strict=True):
            moved = sum((one[n] - t).square().sum() for n, t in self.start.items())
            apart = sum((one[n] - other[n]).square().sum() for n in one)
            worst = max(worst, float((apart / moved).sqrt()))
        return worst

    def times(self, sizes: list[int], repeats: int) -> dict[int, float]:
        """Return the least CPU seconds of each size, after a first round that counts for nothing."""
        found = {size: [self.run(size)[0]] for size in sizes}
        for repeat in range(repeats):
            for size in sizes[:: -1 if repeat % 2 else 1]:
                found[size].append(self.run(size)[0])
        return {size: min(own[1:]) for size, own in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, nargs="+", default=[64, 256, 768])
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--length", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    columns = (
        "width, clients, tokens, difference, ms a step one by one, times as fast by size, best"
    )
    columns = [*columns.split(", "), "auto", "auto / best"]
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for width in asked.width:
        model = make_model(width)
        for clients in asked.clients:
            for length in asked.length:
                cell = Cell(model, clients, length)
                auto = min(cell.auto, clients)
                cell.auto = auto
                sizes = sorted({1, auto, *(size for size in asked.sizes if size <= clients)})
                apart = cell.difference(max(sizes))
                assert apart < TOLERANCE, f"clients differ by {apart:.1e} of what they moved"
                seconds = cell.times(sizes, asked.repeats)
                ratios = {size: seconds[1] / own for size, own in seconds.items()}
                best = max(ratios.values())
                each = ", ".join(f"{size}: {ratio:.2f}" for size, ratio in ratios.items())
                print(
                    f"| {width} | {clients} | {length} | {apart:.0e} | "
                    f"{1000 * seconds[1] / clients / STEPS:.1f} | {each} | {best:.2f} | {auto} | "
                    f"{ratios[auto] / best:.2f} |",
                    flush=True,
                )
                cell.model.write(cell.start)


if __name__ == "__main__":
    main()
