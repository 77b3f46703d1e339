"""Time to the first step with a cold and a warm cache, and memory of rows that stay in their files.

    .venv/bin/python benchmarks/streaming.py [--rows FILE.jsonl.gz ... --count 20000] [--megabytes 2048]

``--rows`` are pairs (``chosen``, ``rejected`` with "Human:" turns), repeated to ``--count`` with a
number in the prompt; what is told is the CPU time of a process from its start to its first
optimizer step (SimPO, which needs no reference): loaded and with ``data.streaming``, each with an
empty cache and with the one that the run before has left. ``--megabytes`` makes JSON lines of
instructions of about 2 KB, trains on them with ``data.streaming``, and tells the most memory that
the process had (pages of mapped files count too). Every run is a process of its own with a cache of
its own; all of it is deleted.
"""

import argparse
import gzip
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

WORDS = 4000
ROW = 2000
"""Characters of an instruction and its answer."""

CHILD = """
import json, resource, sys
import fedloom
from fedloom.experiment.experiment import Experiment
from fedloom.training import steps

table, only_first = json.loads(sys.argv[1]), sys.argv[2] == "first"

class FirstStep(BaseException):
    pass

if only_first:
    def update(*args, **options):
        raise FirstStep
    steps.update = update
try:
    fedloom.run(Experiment.from_table(table))
except FirstStep:
    pass
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps({
    "seconds": sum(own.ru_utime + own.ru_stime for own in used),
    "megabytes": used[0].ru_maxrss / 1024,
}))
"""


def make_model(folder: Path, texts: list[str]) -> None:
    """Save a small random Llama with a BPE of 8,000 tokens that was trained on some texts."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=8000, special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(config).save_pretrained(folder)


def make_pairs(path: Path, files: list[Path], count: int) -> list[str]:
    """Write pairs repeated to a count, each with its number in the prompt; return some texts."""
    rows = []
    for file in files:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        rows += [json.loads(line) for line in content.splitlines()]
    turn = "\n\nHuman:"
    with path.open("w") as out:
        for number, row in zip(range(count), itertools.cycle(rows)):
            own = {k: row[k].replace(turn, f"{turn} ({number})", 1) for k in ("chosen", "rejected")}
            out.write(json.dumps(own) + "\n")
    return [row["chosen"] for row in rows]


def make_instructions(path: Path, megabytes: int) -> list[str]:
    """Write JSON lines of random words, of so many megabytes; return some texts."""
    rng = random.Random(0)
    letters = "etaoinshrdlu"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 9))) for _ in range(WORDS)]
    texts, size = [], 0
    with path.open("w") as out:
        for number in itertools.count():
            text = " ".join(rng.choices(words, k=ROW // 6))
            row = {"prompt": f"({number}) {text[: ROW // 2]}", "completion": text[ROW // 2 :]}
            size += out.write(json.dumps(row) + "\n")
            if len(texts) < 500:
                texts.append(text)
            if size >= megabytes * 2**20:
                break
    return texts


def measured(table: dict, cache: Path, *, first: bool) -> dict:
    """Return what one process took."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(table), "first" if first else "all"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "FEDLOOM_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def table_of(
    source: Path, model: Path, kind: str, objective: str, folder: Path, streaming: bool
) -> dict:
    return {
        "data": {
            "source": str(source),
            "kind": kind,
            "streaming": streaming,
            "max_length": 256,
            "test_fraction": 0.01,
        },
        "model": {"path": str(model)},
        "objective": {"name": objective},
        "federation": {"clients": 4, "rounds": 1},
        "training": {"local_steps": 1, "batch_size": 8},
        "evaluation": {"max_examples": 8, "client_max_examples": 4, "samples": 0},
        "output": {"folder": str(folder)},
    }


def first_steps(folder: Path, files: list[Path], count: int) -> None:
    source, model = folder / "pairs.jsonl", folder / "model"
    make_model(model, make_pairs(source, files, count))
    size = source.stat().st_size / 2**20
    print(f"{count:,} pairs, {size:.0f} MB: CPU seconds of a process to its first step")
    for streaming in (False, True):
        name = "data.streaming" if streaming else "loaded"
        for cache in ("cold", "warm"):
            table = table_of(
                source, model, "preference", "simpo", folder / f"{name}-{cache}", streaming
            )
            found = measured(table, folder / f"cache-{streaming}", first=True)
            print(f"  {name}, {cache}: {found['seconds']:.1f} s, {found['megabytes']:.0f} MB")


def memory(folder: Path, megabytes: int, *, streaming: bool = True) -> float:
    """Return the megabytes that a run on so many megabytes of rows had at most."""
    source, model = folder / "rows.jsonl", folder / "small"
    make_model(model, make_instructions(source, megabytes))
    table = table_of(source, model, "instruction", "sft", folder / f"run-{megabytes}", streaming)
    found = measured(table, folder / f"cache-{megabytes}", first=False)
    print(f"{megabytes} MB of rows: {found['megabytes']:.0f} MB, {found['seconds']:.0f} s of CPU")
    return found["megabytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, nargs="*", default=[])
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--megabytes", type=int, nargs="*", default=[])
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        if given.rows:
            first_steps(Path(temporary), sorted(given.rows), given.count)
        for size in given.megabytes:
            memory(Path(temporary), size)


if __name__ == "__main__":
    main()
