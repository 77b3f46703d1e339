"""Federation tax: a 20-client simulation against the same optimisation steps in a bare loop.

    .venv/bin/python benchmarks/federation_tax.py

Both sides train the tiny model with DPO on the same batches in the same order; the bare loop has its
batches ready as tensors and does nothing but forward, backward and step. The simulation includes
everything a round needs: encoding, decoding, checks, averaging, records and a checkpoint on disk.
Start-up, reference log-probs and evaluation are on neither side. Equality of the result is checked
before speed is reported. One thread, order A B B A, median of the ratios.
"""

import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from fedloom.accounting.ledger import Ledger
from fedloom.aggregation.means import weighted_mean
from fedloom.data.batching import collate, epoch_batches
from fedloom.experiment.experiment import Experiment
from fedloom.federation.rounds import Server
from fedloom.objectives.dpo import dpo_loss
from fedloom.objectives.logps import completion_logps
from fedloom.randomness import generator
from fedloom.runs.assembly import assemble
from fedloom.runs.division import partition_data
from fedloom.runs.run import Silent
from fedloom.storage import checkpoint
from fedloom.storage.checkpoint import Checkpoint

ROUNDS, CLIENTS, REPEATS = 2, 20, 5

EXPERIMENT = Experiment.from_table(
    {
        "data": {"source": "builtin:preferences", "builtin_rows": 1600},
        "federation": {"rounds": ROUNDS, "clients": CLIENTS},
        "training": {"learning_rate": 1e-3, "batch_size": 8},
        "evaluation": {"per_client": False},
    }
)


def simulate(parts, folder: Path) -> tuple[float, dict]:
    """Seconds and result of the package's rounds."""

    def finish(record, state):
        parts.engine.store.finish_round()
        with (folder / "rounds.jsonl").open("a") as file:
            file.write(json.dumps({"round": record.round, **record.train}) + "\n")
        checkpoint.save(folder, Checkpoint(record.round, state, {}, "benchmark"), set())

    parts.engine.ledger = ledger = Ledger()
    server = Server(
        parts.method, parts.engine, EXPERIMENT.federation, lambda round: 1e-3,
        lambda state, round: None, finish, ledger, Silent(),
    )  # fmt: skip
    start = time.perf_counter()
    state = server.run(parts.method.initial_state(parts.initial), 0)
    return time.perf_counter() - start, state.tensors


def bare_loop(parts, batches) -> tuple[float, dict]:
    """Seconds and result of the same steps without a federation around them."""
    model, shared = parts.model, parts.initial
    sizes = parts.engine.sizes()
    start = time.perf_counter()
    for round in range(1, ROUNDS + 1):
        updates = []
        for client in sizes:
            model.write(shared)
            model.model.train()
            optimizer = torch.optim.AdamW(
                model.parameters.values(), 1e-3, weight_decay=0, fused=True
            )
            for batch in batches[round, client]:
                policy = completion_logps(model.model, batch.sequences).chunk(2)
                loss, _ = dpo_loss(*policy, *batch.reference_logps.chunk(2), beta=0.1)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            updates.append(model.read())
        shared = weighted_mean(updates, list(sizes.values()))
    return time.perf_counter() - start, shared


def main() -> None:
    parts = assemble(EXPERIMENT, partition_data(EXPERIMENT))
    for client in parts.engine.sizes():
        parts.engine.add_reference(0, client)
    cpu = torch.device("cpu")
    batches = {
        (round, client): [
            collate(share, indices, parts.model.pad, cpu)
            for indices in epoch_batches(
                len(share), 8, generator(0, "batches", client, round), epochs=1, steps=None
            )
        ]
        for round in range(1, ROUNDS + 1)
        for client, share in parts.engine.shares.items()
    }
    steps = sum(map(len, batches.values()))
    print(f"{CLIENTS} clients, {ROUNDS} rounds, {steps} steps, {torch.get_num_threads()} thread")
    ratios = []
    for repeat in range(REPEATS):
        times = {"bare": [], "simulation": []}
        for side in ("bare", "simulation", "simulation", "bare"):
            if side == "bare":
                seconds, bare = bare_loop(parts, batches)
            else:
                with tempfile.TemporaryDirectory() as folder:
                    seconds, ours = simulate(parts, Path(folder))
            times[side].append(seconds)
        assert all(torch.equal(bare[name], ours[name]) for name in bare), "results differ"
        ratios.append(sum(times["simulation"]) / sum(times["bare"]))
        print(f"  repeat {repeat + 1}: bare {sum(times['bare']) / 2:.3f} s, "
              f"simulation {sum(times['simulation']) / 2:.3f} s, ratio {ratios[-1]:.3f}")  # fmt: skip
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"federation tax {statistics.median(ratios):.3f} ({spread}); results equal bit for bit")


if __name__ == "__main__":
    main()
