"""Federation tax: 8 clients x 4 rounds in simulation against the same optimizer steps in a bare loop.

    .venv/bin/python benchmarks/federation_tax.py [--repeats 5] [--hidden 64] [--rows 640] [--trl]

Both sides train a small Llama with DPO on the same passes in the same order. The bare loop has its
batches ready as tensors and does nothing but forward, backward, clipping and step, from the mean of the
round before. The simulation includes everything a round needs: laying out passes, dropout's streams,
encoding, decoding, checks, averaging, records and a checkpoint on disk. Start-up, reference log-probs and
evaluation are on neither side. Equality of the result is checked before speed is reported. One thread,
order A B B A, CPU time of the process (its writes to disk too), which others on the machine disturb less
than the clock; median of the ratios. With ``--trl`` the difference of the two sides, for each client and
round, is compared with making TRL's ``DPOTrainer`` anew for a client (model and rows at hand); few rows
(``--rows 100``) tell it best.
"""

import argparse
import contextlib
import copy
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from fedloom.accounting.ledger import Ledger
from fedloom.aggregation.means import weighted_mean
from fedloom.data.batching import epoch_batches
from fedloom.data.builtin import pretraining_texts
from fedloom.experiment.experiment import Experiment
from fedloom.federation.rounds import Server
from fedloom.models.tiny import TinyRecipe, make_tiny_model
from fedloom.randomness import generator
from fedloom.runs.assembly import assemble
from fedloom.runs.partitioning import partition_data
from fedloom.runs.run import Silent
from fedloom.storage import checkpoint
from fedloom.storage.checkpoint import Checkpoint
from fedloom.training.layout import budget_of
from fedloom.training.optimizers import make_optimizer
from fedloom.training.passes import Layout
from fedloom.training.results import reported
from fedloom.training.steps import WITHOUT_GRAPHS, step_losses, update

ROUNDS, CLIENTS, RATE = 4, 8, 1e-3


def make_experiment(folder: Path, hidden: int, rows: int) -> Experiment:
    """Return the experiment, on a model of 4 blocks that was hardly trained."""
    texts = pretraining_texts(np.random.default_rng(0), 200)
    size = {"hidden": hidden, "intermediate": 2 * hidden, "layers": 4, "heads": hidden // 16}
    folder.mkdir()
    make_tiny_model(folder, texts, TinyRecipe(vocabulary=512, steps=1, **size))
    return Experiment.from_table(
        {
            "model": {"path": str(folder)},
            "data": {"source": "builtin:preferences", "builtin_rows": rows},
            "federation": {"rounds": ROUNDS, "clients": CLIENTS},
            "training": {"learning_rate": RATE, "batch_size": 8, "threads": 1},
            "evaluation": {"per_client": False},
        }
    )


def simulate(parts, experiment, folder: Path) -> tuple[float, dict]:
    """CPU seconds and result of the package's rounds."""

    def finish(record, state):
        parts.engine.store.finish_round()
        with (folder / "rounds.jsonl").open("a") as file:
            file.write(json.dumps({"round": record.round, **record.train}) + "\n")
        checkpoint.save(folder, Checkpoint(record.round, state, {}, "benchmark"), set())

    parts.engine.ledger = ledger = Ledger()
    server = Server(
        parts.method, parts.engine, experiment.federation, lambda round: RATE,
        lambda state, round: None, finish, ledger, Silent(), reported=reported(parts.objective),
    )  # fmt: skip
    start = time.process_time()
    state = server.run(parts.method.initial_state(parts.initial), 0)
    return time.process_time() - start, state.tensors


def bare_loop(parts, experiment, batches) -> tuple[float, dict]:
    """CPU seconds and result of the same steps without a federation around them."""
    model, shared, settings = parts.model, parts.initial, experiment.training
    sizes = parts.engine.sizes()
    start = time.process_time()
    for round in range(1, ROUNDS + 1):
        updates = []
        for client in sizes:
            model.write(shared)
            model.model.train()
            optimizer = make_optimizer(model.parameters, settings, RATE)
            for passes in batches[round, client]:
                for _, loss, _ in step_losses(model, parts.objective, passes, WITHOUT_GRAPHS):
                    loss.backward()
                update(model.parameters, optimizer, settings)
            updates.append(model.read())
        shared = weighted_mean(updates, list(sizes.values()))
    return time.process_time() - start, shared


def all_batches(parts, experiment) -> dict:
    """Return the passes of every step, by round and client."""
    settings, found = experiment.training, {}
    for client, share in parts.engine.shares.items():
        layout = Layout(parts.model, share, budget_of(settings, parts.model))
        for round in range(1, ROUNDS + 1):
            order = generator(experiment.federation.seed, "batches", client, round)
            drawn = epoch_batches(len(share), settings.batch_size, order, epochs=1)
            found[round, client] = [layout.batches(indices) for indices in drawn]
    return found


def trainer_seconds(experiment, parts, rows: list) -> float:
    """CPU seconds of making TRL's trainer for a client with these rows; the least of five."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(experiment.model.path)
    columns = [{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in rows]
    found = []
    for _ in range(5):
        model, data = copy.deepcopy(parts.model.model), Dataset.from_list(columns)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            settings = DPOConfig(
                output_dir=folder, per_device_train_batch_size=8, report_to=[], use_cpu=True, bf16=False,
                gradient_checkpointing=False, disable_tqdm=True,
            )  # fmt: skip
            start = time.process_time()
            DPOTrainer(model, args=settings, train_dataset=data, processing_class=tokenizer)
            found.append(time.process_time() - start)
    return min(found)


def main() -> None:
    """Compare, measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--trl", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        experiment = make_experiment(Path(name) / "model", given.hidden, given.rows)
        data = partition_data(experiment)
        parts = assemble(experiment, data)
        for client in parts.engine.sizes():
            parts.engine.add_reference(0, client)
        batches = all_batches(parts, experiment)
        steps = sum(map(len, batches.values()))
        print(f"{CLIENTS} clients, {ROUNDS} rounds, {steps} steps, width {given.hidden}")
        ratios, fixed = [], []
        for repeat in range(given.repeats):
            times = {"bare": [], "simulation": []}
            for place, side in enumerate(("bare", "simulation", "simulation", "bare")):
                if side == "bare":
                    seconds, bare = bare_loop(parts, experiment, batches)
                else:
                    folder = Path(name) / f"{repeat}-{place}"
                    folder.mkdir()
                    seconds, ours = simulate(parts, experiment, folder)
                times[side].append(seconds)
            assert all(torch.equal(bare[name], ours[name]) for name in bare), "results differ"
            ratios.append(sum(times["simulation"]) / sum(times["bare"]))
            extra = (sum(times["simulation"]) - sum(times["bare"])) / 2
            fixed.append(extra / (CLIENTS * ROUNDS))
            print(f"  repeat {repeat + 1}: bare {sum(times['bare']) / 2:.3f} s, simulation "
                  f"{sum(times['simulation']) / 2:.3f} s of CPU, ratio {ratios[-1]:.3f}")  # fmt: skip
        if given.trl:
            made = trainer_seconds(experiment, parts, list(data.train[0]))
            own = statistics.median(fixed)
            print(f"a client and round beyond its steps: {1000 * own:.1f} ms; making DPOTrainer for "
                  f"{len(data.train[0])} rows: {1000 * made:.0f} ms, {made / own:.0f} times")  # fmt: skip
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"federation tax {statistics.median(ratios):.3f} ({spread}); results equal bit for bit")


if __name__ == "__main__":
    main()
