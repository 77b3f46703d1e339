"""A client's steps against TRL's: equality first, then speed, in the order A B B A.

    .venv/bin/python benchmarks/local_training.py PAIRS.jsonl [--objective dpo] [--width 256] [--steps 4]

Both sides train a randomly initialised Llama of 4 blocks with LoRA of rank 8 on the same pairs (columns
``prompt``, ``chosen``, ``rejected``; those that fit 512 tokens), batch 8, on one thread. TRL runs with
its defaults, with its references precomputed, and as fast as its documentation allows: one row a pass
(two for KTO), gradients accumulated, references precomputed. What is timed is all that a side does once
it has the model and the rows: tokenising, references, steps. It is CPU time of the process, which other
processes on the machine disturb less than time on the clock. Before that, the loss of a second step on
one batch is compared: it depends on the references, the gradients and the optimizer.
"""

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from fedloom.data.client_rows import TokenShare, mismatch
from fedloom.data.examples import Feedback, Preference
from fedloom.data.tokenize import tokenize
from fedloom.evaluation.generate import load_encoder
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.objectives import OBJECTIVES
from fedloom.training.layout import scoring_budget
from fedloom.training.references import add_reference_logps
from fedloom.training.settings import TrainingSettings, Work
from fedloom.training.steps import train_locally

BATCH, LENGTH, RATE = 8, 512, 1e-4
SIDES = {
    "default": {},
    "precomputed": {"precompute_ref_log_probs": True},
    "best": {"precompute_ref_log_probs": True, "smallest": True},
}


def make_model(folder: Path, pairs: list[dict], width: int):
    """Save a tokenizer and a model, and return the model under a new adapter."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = (pair["prompt"] + pair["chosen"] for pair in pairs)
    special = ["<pad>", "<s>", "</s>"]
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=8000, special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=int(2.6875 * width),
        num_hidden_layers=4, num_attention_heads=width // 64, num_key_value_heads=max(1, width // 128),
        max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2, use_cache=False,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    backbone = LlamaForCausalLM(config).requires_grad_(False)
    return tokenizer, attach_adapter(backbone, AdapterSettings(rank=8))


def ours(model, folder: Path, objective: str, rows: list[dict], steps: int) -> tuple[float, float]:
    """CPU seconds, and the mean loss of all steps."""
    adapted = AdapterModel(copy.deepcopy(model), 0)
    start = time.process_time()
    encoder = load_encoder(str(folder))
    loss = OBJECTIVES[objective][1]()
    if objective == "dpo":
        examples = [Preference(i, **row) for i, row in enumerate(rows)]
    else:
        examples = [
            Feedback(i, row["prompt"], row["completion"], row["label"])
            for i, row in enumerate(rows)
        ]
    tokens = tokenize(examples, encoder, LENGTH)
    mixed = mismatch(tokens, np.random.default_rng(0), LENGTH, 1) if objective == "kto" else None
    settings = TrainingSettings(learning_rate=RATE, batch_size=BATCH)
    share = add_reference_logps(
        adapted, TokenShare(tokens, mixed), scoring_budget(settings, adapted)
    )
    result = train_locally(
        adapted, share, loss, settings, learning_rate=RATE, seed=0, client=0, round=1,
        work=Work(steps=steps),
    )  # fmt: skip
    return time.process_time() - start, result.metrics["loss"]


def theirs(
    model, tokenizer, objective: str, rows: list[dict], steps: int, side: str
) -> tuple[float, float]:
    """CPU seconds, and the mean loss of all steps."""
    options = dict(SIDES[side])
    size = BATCH
    if options.pop("smallest", False):
        size = 1 if objective == "dpo" else 2
    settings, trainer = (DPOConfig, DPOTrainer) if objective == "dpo" else (KTOConfig, KTOTrainer)
    own = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        arguments = settings(
            output_dir=folder, per_device_train_batch_size=size, max_steps=steps, learning_rate=RATE,
            gradient_accumulation_steps=BATCH // size, report_to=[], save_strategy="no", logging_steps=1,
            use_cpu=True, max_length=LENGTH, gradient_checkpointing=False, bf16=False, disable_tqdm=True,
            lr_scheduler_type="constant", **options,
        )  # fmt: skip
        start = time.process_time()
        made = trainer(
            own, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )
        made.train()
        spent = time.process_time() - start
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return spent, statistics.mean(losses)


def unrolled(pairs: list[dict]) -> list[dict]:
    """Each answer with its prompt, as KTO reads them."""
    return [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair in pairs
        for name in ("chosen", "rejected")
    ]


def main() -> None:
    """Compare, measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--objective", choices=["dpo", "kto"], default="dpo")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    given = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    pairs = [json.loads(line) for line in given.pairs.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer, model = make_model(folder, pairs, given.width)

        def short(pair: dict) -> bool:
            answers = (pair["chosen"], pair["rejected"])
            sizes = [len(tokenizer(pair["prompt"] + own).input_ids) for own in answers]
            return max(sizes) < LENGTH - 2

        count = BATCH * given.steps // (1 if given.objective == "dpo" else 2)
        pairs = [pair for pair in pairs if short(pair)][:count]
        rows = pairs if given.objective == "dpo" else unrolled(pairs)
        batch = rows[:BATCH]
        if given.objective == "dpo":  # KTO's reference point is drawn on either side
            expected = theirs(model, tokenizer, given.objective, batch, 2, "best")[1]
            found = ours(model, folder, given.objective, batch, 2)[1]
            print(f"mean loss of two steps on one batch: {expected:.6f} (TRL), {found:.6f}")
            assert abs(found - expected) < 2e-4 * expected, "the two do not train alike"
        ratios: dict[str, list[float]] = {side: [] for side in given.sides}
        seconds: dict[str, list[float]] = {side: [] for side in ("fedloom", *given.sides)}

        def measure(side: str) -> None:
            spent = (
                ours(model, folder, given.objective, rows, given.steps)
                if side == "fedloom"
                else theirs(model, tokenizer, given.objective, rows, given.steps, side)
            )[0]
            seconds[side].append(spent)

        for _ in range(given.repeats):
            for side in ("fedloom", *given.sides, *reversed(given.sides), "fedloom"):
                measure(side)
            mine = statistics.mean(seconds["fedloom"][-2:])
            for side in given.sides:
                ratios[side].append(statistics.mean(seconds[side][-2:]) / mine)
        load = os.getloadavg()[0]
        print(
            f"{given.objective}, width {given.width}, {given.steps} steps of {BATCH}, load {load:.1f}"
        )
        for side, spent in seconds.items():
            ratio = ""
            if side in ratios:
                own = sorted(ratios[side])
                ratio = f", {statistics.median(own):.2f} times ours ({own[0]:.2f} to {own[-1]:.2f})"
            print(f"  {side}: {statistics.median(spent):.2f} s{ratio}")


if __name__ == "__main__":
    main()
