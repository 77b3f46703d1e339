"""Many small clients: `fedloom run` against Flower's simulation on Ray, equal results first.

    .venv/bin/python benchmarks/flower_simulation.py [--clients 100] [--sampled 100] [--rounds 2]

Both train a Llama of 4 blocks (``--width 128``: 2.6M parameters; 576: 23M) with LoRA of rank 8 on all
linear layers by SFT, two steps of four rows a client, with the same rows in the same order from the same
adapter; the mean is weighted by rows. Before AdamW is timed, both end with the same adapter but for
rounding by SGD.

Flower has its best settings for this machine: one actor a core, a model that each actor loads once, one
thread each. fedloom is run one client after another (``--ways one``), with two workers (``workers``) and
in lockstep (``cohort``), and with both (``both``). Rounds are timed from the start of the first to the
last aggregation, the whole from the start of the process to its end, in the order A B B A.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS, BATCH, RANK = 2, 4, 8
ROWS = STEPS * BATCH
RATES = {"adamw": 1e-3, "sgd": 0.1}
TOLERANCE = 1e-4
"""Largest difference of two adapters trained by SGD, as a share of how far they moved. (Adam divides
gradients near 0 by their own size, so that rounding alone moves two apart by some hundredths.)"""

WAYS = ["one", "workers", "cohort", "both"]

COMMANDS = Path(sys.executable).parent

INPUTS = """
import json, sys
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedloom.data.builtin import builtin_examples
from fedloom.experiment.experiment import Experiment
from fedloom.randomness import generator
from fedloom.runs.assembly import assemble
from fedloom.runs.partitioning import partition_data
from fedloom.data.batching import epoch_batches
import numpy as np

table, rows, rounds, steps, batch, width = json.loads(sys.argv[1])
texts = builtin_examples("instructions", rows, np.random.default_rng(0))
with open("rows.jsonl", "w") as file:
    for own in texts:
        file.write(json.dumps({"prompt": own.prompt, "completion": own.completion}) + "\\n")
core = Tokenizer(models.BPE())
core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
special = ["<pad>", "<s>", "</s>"]
core.train_from_iterator(
    (own.prompt + own.completion for own in texts),
    trainers.BpeTrainer(vocab_size=8000, special_tokens=special),
)
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
)
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=8000, hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=4,
    num_attention_heads=width // 64,
    num_key_value_heads=1, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)
LlamaForCausalLM(config).save_pretrained("backbone")
tokenizer.save_pretrained("backbone")
experiment = Experiment.from_table(table)
parts = assemble(experiment, partition_data(experiment))
save_file({name: tensor.contiguous() for name, tensor in parts.initial.items()}, "start.safetensors")
found = {"rows": {}}
for client, share in parts.engine.shares.items():
    tokens = share.tokens
    each = []
    for i in range(len(share)):
        first, last = tokens.starts[i], tokens.starts[i + 1]
        ids = tokens.tokens[first:last]
        each.append([ids.tolist(), np.where(tokens.trained[first:last], ids, -100).tolist()])
    found["rows"][client] = len(share)
    found[client] = []
    for round in range(1, rounds + 1):
        order = generator(experiment.federation.seed, "batches", client, round)
        drawn = epoch_batches(len(share), batch, order, steps=steps)
        found[client].append([[each[i] for i in own] for own in drawn])
json.dump(found, open("batches.json", "w"))
"""

APP = """
import json, os, time
from functools import lru_cache
import torch
torch.set_num_threads(1)
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

FOLDER = os.environ["COMPARED"]
CLIENTS, SAMPLED, ROUNDS, OPTIMIZER, RATE, RANK = json.loads(os.environ["GIVEN"])

@lru_cache(1)
def model():
    backbone = AutoModelForCausalLM.from_pretrained(FOLDER + "/backbone", dtype=torch.float32)
    return get_peft_model(backbone, LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear"))

@lru_cache(1)
def batches():
    return json.load(open(FOLDER + "/batches.json"))

def train(own, given):
    trained = [p for p in own.parameters() if p.requires_grad]
    if OPTIMIZER == "sgd":
        optimizer = torch.optim.SGD(trained, RATE)
    else:
        optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.0, foreach=True)
    own.train()
    for batch in given:
        pad = lambda part, fill: torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row[part]) for row in batch], batch_first=True, padding_value=fill)
        ids, labels = pad(0, 0), pad(1, -100)
        lengths = torch.tensor([len(row[0]) for row in batch])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        own(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

client = ClientApp()

@client.train()
def _(message, context):
    own = model()
    set_peft_model_state_dict(own, message.content["arrays"].to_torch_state_dict())
    round = message.content["config"]["server-round"]
    number = str(context.node_config["partition-id"])
    train(own, batches()[number][round - 1])
    content = RecordDict({
        "arrays": ArrayRecord(get_peft_model_state_dict(own)),
        "metrics": MetricRecord({"num-examples": batches()["rows"][number]}),
    })
    return Message(content=content, reply_to=message)

server = ServerApp()

@server.main()
def _(grid, context):
    start = ArrayRecord(load_file(FOLDER + "/start.safetensors"))
    share = SAMPLED / CLIENTS
    strategy = FedAvg(
        fraction_train=share, fraction_evaluate=0.0, min_train_nodes=SAMPLED, min_available_nodes=CLIENTS
    )
    began = time.perf_counter()
    result = strategy.start(grid=grid, initial_arrays=start, num_rounds=ROUNDS)
    seconds = time.perf_counter() - began
    save_file(result.arrays.to_torch_state_dict(), FOLDER + "/flower.safetensors")
    json.dump(seconds, open(FOLDER + "/flower.json", "w"))
"""

FLOWER = """
import os
from flwr.simulation import run_simulation
import compared_app
cores = len(os.sched_getaffinity(0))
run_simulation(
    compared_app.server, compared_app.client, compared_app.CLIENTS,
    backend_config={
        "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
        "init_args": {"num_cpus": cores, "address": "local", "include_dashboard": False},
    },
)
"""


class Comparison:
    """Inputs in a folder, and both sides run on them."""

    def __init__(self, folder: Path, given: argparse.Namespace) -> None:
        self.folder, self.given = folder, given
        self.table = {
            "model": {"path": str(folder / "backbone")},
            "adapter": {"rank": RANK, "alpha": 16.0},
            "data": {
                "source": str(folder / "rows.jsonl"), "kind": "instruction",
                "test_fraction": 10 / (ROWS * given.clients + 10),
            },
            "partition": {"kind": "iid", "minimum": 1, "client_test_fraction": 0.0},
            "objective": {"name": "sft"},
            "federation": {
                "rounds": given.rounds, "clients": given.clients, "clients_per_round": given.sampled,
            },
            "training": {
                "local_steps": STEPS, "batch_size": BATCH, "max_grad_norm": 0.0,
            },
            "evaluation": {
                "every": given.rounds, "per_client": False, "max_examples": 8, "samples": 0,
            },
            "output": {"verify": False},
        }  # fmt: skip
        rows = ROWS * given.clients + 10
        self._python(
            INPUTS, json.dumps([self.table, rows, given.rounds, STEPS, BATCH, given.width])
        )
        (folder / "compared_app.py").write_text(APP)
        (folder / "experiment.json").write_text(json.dumps(self.table))

    def _python(self, code: str, *arguments: str, optimizer: str = "adamw") -> None:
        given = self.given
        own = [given.clients, given.sampled, given.rounds, optimizer, RATES[optimizer], RANK]
        settings = {
            **os.environ, "OMP_NUM_THREADS": "1",
            "COMPARED": str(self.folder), "GIVEN": json.dumps(own),
            "PYTHONPATH": f"{self.folder}:{os.environ.get('PYTHONPATH', '')}",
            "TOKENIZERS_PARALLELISM": "false", "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=self.folder, env=settings, capture_output=True, text=True, timeout=given.limit,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])

    def flower(self, optimizer: str = "adamw") -> tuple[float, float, dict]:
        """Return seconds of rounds, seconds in all and the adapter."""
        from safetensors.torch import load_file

        began = time.perf_counter()
        self._python(FLOWER, optimizer=optimizer)
        whole = time.perf_counter() - began
        rounds = json.loads((self.folder / "flower.json").read_text())
        return rounds, whole, load_file(self.folder / "flower.safetensors")

    def ours(self, way: str, optimizer: str = "adamw") -> tuple[float, float, dict]:
        """The same of fedloom; the evaluation after the last round is not in its rounds' seconds."""
        from safetensors.torch import load_file

        number = sum(1 for _ in self.folder.glob("run-*"))
        run = self.folder / f"run-{number}"
        changes = "workers=2" if way in ("workers", "both") else ""
        table = {**self.table, "output": {"folder": str(run), "verify": False}}
        own = {"optimizer": optimizer, "learning_rate": RATES[optimizer]}
        table["training"] = {**self.table["training"], **own}
        if way in ("cohort", "both"):
            table["simulation"] = {"cohort": "auto"}
        text = json.dumps(json.dumps(table))
        code = f"import json, fedloom\nfedloom.run(json.loads({text}), {changes})"
        began = time.perf_counter()
        self._python(code)
        whole = time.perf_counter() - began
        records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
        judged = sum(
            cost["seconds"] for own in records[1:] for cost in own["costs"] if cost["phase"] == "evaluate"
        ) if "costs" in records[0] else 0.0  # fmt: skip
        rounds = sum(own["seconds"] for own in records[1:]) - judged
        return rounds, whole, load_file(run / "adapter" / "adapter_model.safetensors")

    def difference(self, one: dict, other: dict) -> float:
        """Return by how much two adapters differ, as a share of how far they moved from the start."""
        from safetensors.torch import load_file

        start = load_file(self.folder / "start.safetensors")
        assert one.keys() == other.keys() == start.keys(), "the adapters have other tensors"
        moved = sum((one[n] - t).square().sum() for n, t in start.items())
        apart = sum((one[n] - other[n]).square().sum() for n in one)
        return float((apart / moved).sqrt())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--sampled", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 64")
    parser.add_argument("--limit", type=float, default=900, help="seconds of one side's run")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compared = Comparison(Path(folder), given)
        if given.sampled == given.clients:  # else each draws others
            flower = compared.flower("sgd")[2]
            for way in given.ways:
                apart = compared.difference(flower, compared.ours(way, "sgd")[2])
                assert apart < TOLERANCE, (
                    f"{way}: the adapters differ by {apart:.1e} of what they moved"
                )
                print(
                    f"{way}: the same adapter as Flower's but for {apart:.1e} of what it moved",
                    flush=True,
                )
        print("| way | rounds, s | Flower | ratio | whole, s | Flower | ratio |\n|" + " --- |" * 7)
        for way in given.ways:
            sides = {"ours": [], "flower": []}
            for side in ("ours", "flower", "flower", "ours"):
                found = compared.ours(way) if side == "ours" else compared.flower()
                sides[side].append(found[:2])
            ours, theirs = (
                [statistics.mean(own[part] for own in sides[side]) for part in (0, 1)]
                for side in ("ours", "flower")
            )
            print(
                f"| {way} | {ours[0]:.2f} | {theirs[0]:.2f} | {theirs[0] / ours[0]:.1f} "
                f"| {ours[1]:.1f} | {theirs[1]:.1f} | {theirs[1] / ours[1]:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
