"""A client's steps against TRL's: equality first, then speed, in the order A B B A.

    .venv/bin/python benchmarks/local_training.py PAIRS.jsonl [--objective dpo] [--width 256] [--steps 4]

Both sides train a randomly initialised Llama with LoRA of rank 8 on the same pairs (columns ``prompt``,
``chosen``, ``rejected``; those that fit 512 tokens), on one thread. TRL runs with its defaults, with its
references precomputed, and as fast as its documentation allows: one row a pass (two for KTO), gradients
accumulated, references precomputed. SFT trains on the chosen answers; TRL runs with its defaults, one
row a pass, and with packing (one epoch of the same rows in sequences of 512 tokens, whose rows see
each other on a CPU). What is timed is all that a side does once it has the model and the rows:
tokenising, references, steps. It is CPU time of the process, which other
processes on the machine disturb less than time on the clock. Before that, the loss of a second step on
one batch is compared: it depends on the references, the gradients and the optimizer.
"""

import argparse
import contextlib
import copy
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from fedloom.data.client_rows import TokenShare, mismatch
from fedloom.data.examples import Example, Feedback, Instruction, Preference
from fedloom.data.tokenize import tokenize
from fedloom.evaluation.generate import load_encoder
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.objectives import OBJECTIVES
from fedloom.training.layout import scoring_budget
from fedloom.training.references import add_reference_logps
from fedloom.training.settings import TrainingSettings, Work
from fedloom.training.steps import train_locally

LENGTH, RATE = 512, 1e-4
SMOLLM2 = 576
"""The width at which the model has the shape of SmolLM2-135M; else it has 4 blocks."""

TRAINERS = {
    "dpo": (DPOConfig, DPOTrainer),
    "kto": (KTOConfig, KTOTrainer),
    "sft": (SFTConfig, SFTTrainer),
}
PRECOMPUTED = {"precompute_ref_log_probs": True}
PREFERENCES = {"default": {}, "precomputed": PRECOMPUTED, "best": {**PRECOMPUTED, "smallest": True}}
SIDES = {
    "dpo": PREFERENCES,
    "kto": PREFERENCES,
    "sft": {
        "default": {},
        "best": {"smallest": True},
        "packing": {"packing": True, "smallest": True},
    },
}


@dataclass(frozen=True)
class Setup:
    """What both sides have.

    Attributes:
        objective: "dpo", "kto" or "sft".
        batch: Rows of an optimizer step.
        steps: Optimizer steps.
        folder: Of the tokenizer.
        tokenizer: The same, loaded.
        model: Under a new adapter.
    """

    objective: str
    batch: int
    steps: int
    folder: Path
    tokenizer: PreTrainedTokenizerFast
    model: torch.nn.Module


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
    shape = {
        "vocab_size": len(tokenizer), "intermediate_size": int(2.6875 * width), "num_hidden_layers": 4,
        "num_attention_heads": width // 64, "num_key_value_heads": max(1, width // 128),
    }  # fmt: skip
    if width == SMOLLM2:
        shape = {
            "vocab_size": 49152, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
        }  # fmt: skip
    config = LlamaConfig(
        hidden_size=width, max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        use_cache=False, **shape,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)
    backbone = LlamaForCausalLM(config).requires_grad_(False)
    return tokenizer, attach_adapter(backbone, AdapterSettings(rank=8))


def examples(objective: str, rows: list[dict]) -> list[Example]:
    """Return rows as fedloom reads them."""
    if objective == "dpo":
        return [Preference(i, **row) for i, row in enumerate(rows)]
    if objective == "kto":
        return [Feedback(i, *row.values()) for i, row in enumerate(rows)]
    return [Instruction(i, **row) for i, row in enumerate(rows)]


def ours(setup: Setup, rows: list[dict], steps: int) -> tuple[float, float]:
    """CPU seconds, and the mean loss of all steps."""
    adapted = AdapterModel(copy.deepcopy(setup.model), 0)
    start = time.process_time()
    encoder = load_encoder(str(setup.folder))
    loss = OBJECTIVES[setup.objective][1]()
    tokens = tokenize(examples(setup.objective, rows), encoder, LENGTH)
    share = TokenShare(tokens)
    if setup.objective == "kto":
        share = TokenShare(tokens, mismatch(tokens, np.random.default_rng(0), LENGTH, 1))
    settings = TrainingSettings(learning_rate=RATE, batch_size=setup.batch)
    if setup.objective != "sft":
        share = add_reference_logps(adapted, share, scoring_budget(settings, adapted))
    result = train_locally(
        adapted, share, loss, settings, learning_rate=RATE, seed=0, client=0, round=1,
        work=Work(steps=steps),
    )  # fmt: skip
    return time.process_time() - start, result.metrics["loss"]


def theirs(setup: Setup, rows: list[dict], steps: int, side: str) -> tuple[float, float]:
    """CPU seconds, and the mean loss of all steps."""
    options, size = dict(SIDES[setup.objective][side]), setup.batch
    if options.pop("smallest", False):
        size = 2 if setup.objective == "kto" else 1
    length = {"max_steps": steps}
    if options.get("packing"):
        length = {"num_train_epochs": 1}
    settings, trainer = TRAINERS[setup.objective]
    own = copy.deepcopy(setup.model)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        arguments = settings(
            output_dir=folder, per_device_train_batch_size=size, learning_rate=RATE,
            gradient_accumulation_steps=setup.batch // size, report_to=[], save_strategy="no",
            logging_steps=1, use_cpu=True, max_length=LENGTH, gradient_checkpointing=False, bf16=False,
            disable_tqdm=True, lr_scheduler_type="constant", **length, **options,
        )  # fmt: skip
        start = time.process_time()
        made = trainer(
            own,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=setup.tokenizer,
        )
        made.train()
        spent = time.process_time() - start
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return spent, statistics.mean(losses)


def rows_of(objective: str, pairs: list[dict]) -> list[dict]:
    """Return rows as TRL reads them: pairs, each answer with its prompt, or the chosen ones."""
    if objective == "dpo":
        return pairs
    if objective == "sft":
        return [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    return [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair in pairs
        for name in ("chosen", "rejected")
    ]


def check_equal(setup: Setup, rows: list[dict]) -> None:
    """Check that the two sides have the same mean loss of two steps on one batch."""
    if setup.objective == "kto":
        return  # its reference point is drawn on either side
    batch = rows[: setup.batch]
    expected, found = theirs(setup, batch, 2, "best")[1], ours(setup, batch, 2)[1]
    print(f"mean loss of two steps on one batch: {expected:.6f} (TRL), {found:.6f}")
    assert abs(found - expected) < 2e-4 * expected, "the two do not train alike"


def measure(setup: Setup, rows: list[dict], sides: list[str], repeats: int) -> None:
    """Time both in the order A B B A, and print medians and ratios."""
    ratios: dict[str, list[float]] = {side: [] for side in sides}
    seconds: dict[str, list[float]] = {side: [] for side in ("fedloom", *sides)}
    for _ in range(repeats):
        for side in ("fedloom", *sides, *reversed(sides), "fedloom"):
            if side == "fedloom":
                seconds[side].append(ours(setup, rows, setup.steps)[0])
            else:
                seconds[side].append(theirs(setup, rows, setup.steps, side)[0])
        mine = statistics.mean(seconds["fedloom"][-2:])
        for side in sides:
            ratios[side].append(statistics.mean(seconds[side][-2:]) / mine)
    for side, spent in seconds.items():
        ratio = ""
        if side in ratios:
            own = sorted(ratios[side])
            ratio = f", {statistics.median(own):.2f} times ours ({own[0]:.2f} to {own[-1]:.2f})"
        print(f"  {side}: {statistics.median(spent):.2f} s{ratio}", flush=True)


def main() -> None:
    """Compare, measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--objective", choices=list(SIDES), default="dpo")
    parser.add_argument("--width", type=int, default=256, help=f"{SMOLLM2}: SmolLM2-135M's shape")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sides", nargs="+", help="of TRL's (default: all)")
    given = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    pairs = [json.loads(line) for line in given.pairs.read_text().splitlines()]
    with tempfile.TemporaryDirectory() as name:
        tokenizer, model = make_model(Path(name), pairs, given.width)
        setup = Setup(given.objective, given.batch, given.steps, Path(name), tokenizer, model)

        def short(pair: dict) -> bool:
            answers = (pair["chosen"], pair["rejected"])
            sizes = [len(tokenizer(pair["prompt"] + own).input_ids) for own in answers]
            return max(sizes) < LENGTH - 2

        fitting = [pair for pair in pairs if short(pair)]
        rows = rows_of(given.objective, fitting)[: given.batch * given.steps]
        check_equal(setup, rows)
        weights = sum(parameter.numel() for parameter in model.parameters())
        print(
            f"{given.objective}, {weights / 1e6:.1f} M parameters, {given.steps} steps of {given.batch}"
            f", load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        measure(setup, rows, given.sides or list(SIDES[given.objective]), given.repeats)


if __name__ == "__main__":
    main()
