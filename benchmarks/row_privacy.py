"""A step with row-level privacy against a plain one and Opacus's gradients, in the order A B C C B A.

    .venv/bin/python benchmarks/row_privacy.py [--objective dpo] [--width 256] [--rank 8] [--steps 6]

A randomly initialised Llama of 4 blocks with LoRA on all linear layers trains on built-in rows, several
joined to one of ordinary length, on one thread. Private steps draw batches by coins, so what is compared
is CPU time for a thousand tokens. Opacus's side has the same passes, its per-sample gradients by hooks,
and clipping and noise as its optimizer makes them (floating-point, from torch's generator); the time of
its noise is therefore not that of ours, which is exact and from a secret.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from opacus import GradSampleModule
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.data.batch import Batch
from fedloom.data.builtin import builtin_examples, pretraining_texts
from fedloom.data.client_rows import TokenShare
from fedloom.data.tokenize import tokenize
from fedloom.evaluation.generate import load_encoder
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.tiny import TinyRecipe, make_tiny_model
from fedloom.objectives import OBJECTIVES
from fedloom.privacy.noise import NoiseSource
from fedloom.training.layout import Budget
from fedloom.training.references import add_reference_logps
from fedloom.training.results import Gradients, Totals
from fedloom.training.row_gradients import reason_for_one_by_one
from fedloom.training.row_privacy import PrivateSteps, RowPrivacy, units_of
from fedloom.training.settings import TrainingSettings, Work
from fedloom.training.steps import Training

SOURCES = {"dpo": "preferences", "sft": "instructions", "kto": "feedback"}
JOINED = 4
"""Built-in rows that make a row of the benchmark."""


def rows_of(objective: str, count: int) -> list[object]:
    """Return built-in rows, several joined to one."""
    drawn = builtin_examples(SOURCES[objective], count * JOINED, np.random.default_rng(0))
    texts = ("prompt", "completion", "chosen", "rejected")
    found = []
    for start in range(0, len(drawn), JOINED):
        own = drawn[start : start + JOINED]
        joined = {n: " ".join(getattr(one, n) for one in own) for n in texts if hasattr(own[0], n)}
        found.append(replace(own[0], **joined))
    return found


def setup(objective: str, width: int, rank: int, rows: int) -> tuple[AdapterModel, TokenShare]:
    """Return the model and its rows."""
    with tempfile.TemporaryDirectory() as folder:
        texts = pretraining_texts(np.random.default_rng(0), 200)
        recipe = TinyRecipe(vocabulary=2000, hidden=32, intermediate=64, layers=1, heads=2, steps=1)
        make_tiny_model(Path(folder) / "tiny", texts, recipe)
        encoder = load_encoder(str(Path(folder) / "tiny"))
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=4,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    backbone = LlamaForCausalLM(config).requires_grad_(requires_grad=False)
    model = AdapterModel(attach_adapter(backbone, AdapterSettings(rank=rank)), 0)
    share = TokenShare(tokenize(rows_of(objective, rows), encoder, 512))
    if OBJECTIVES[objective][1].needs_reference:
        share = add_reference_logps(model, share, Budget(8))
    return model, share


def opacus_step(self: PrivateSteps, parts: list[Batch], totals: Totals) -> Gradients:
    """Make a step with Opacus's per-sample gradients and floating-point noise."""
    sums = {name: torch.zeros_like(p) for name, p in self.model.parameters.items()}
    for part in parts:
        totals.add(part, {}, 0.0, {})
        loss, _ = self.objective.loss(
            self.model, part, self.objective.statistics(self.model, [part])
        )
        (loss * len(part)).backward()
        each = {}
        for name, parameter in self.model.parameters.items():
            each[name] = parameter.grad_sample.view(-1, len(part), *parameter.shape).sum(0)
            parameter.grad_sample = parameter.grad = None
        norms = torch.stack([own.flatten(1).norm(dim=1) for own in each.values()]).norm(dim=0)
        factors = (self.privacy.clip / norms).clamp(max=1)
        for name, own in each.items():
            sums[name] += torch.einsum("i,i...", factors, own)
    for name, parameter in self.model.parameters.items():
        noise = torch.randn_like(sums[name]) * self.privacy.noise_multiplier * self.privacy.clip
        parameter.grad = (sums[name] + noise) / self.expected
    return Gradients(0.0)


def main() -> None:
    """Time the three sides in turns."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--objective", choices=SOURCES, default="dpo")
    options.add_argument("--width", type=int, default=256)
    options.add_argument("--rank", type=int, default=8)
    options.add_argument("--steps", type=int, default=6)
    options.add_argument("--rows", type=int, default=64)
    given = options.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Full backward hook is firing")
    model, share = setup(given.objective, given.width, given.rank, given.rows)
    objective = OBJECTIVES[given.objective][1]().for_rows()
    settings = TrainingSettings(batch_size=8)
    privacy = RowPrivacy(1.0, 1.0, NoiseSource.fresh("benchmark"), units_of(share))
    everything = sum(p.numel() for p in model.model.parameters())
    trained = sum(p.numel() for p in model.parameters.values())
    length = len(share.tokens.tokens) / len(share.tokens.prompts)
    print(f"{everything:,} parameters, {trained:,} trained; {length:.0f} tokens a sequence")
    print("gradients by", reason_for_one_by_one(model) or "hooks in one pass")
    start, seconds = model.read(), {"plain": [], "private": [], "opacus": []}

    def measure(side: str, round: int) -> None:
        model.write(start)
        options = {
            "learning_rate": 1e-4, "seed": 0, "client": 0, "round": round,
            "work": Work(steps=given.steps),
        }  # fmt: skip
        driver = None if side == "plain" else privacy
        own = Training(model, share, objective, settings, (), options, driver)
        steps = PrivateSteps._found
        hooked = (
            GradSampleModule(model.model, strict=False, loss_reduction="sum")
            if side == "opacus"
            else None
        )
        if hooked is not None:
            PrivateSteps._found = opacus_step
        began = time.process_time()
        result = own.alone()
        taken = time.process_time() - began
        PrivateSteps._found = steps
        if hooked is not None:
            hooked._close()
        seconds[side].append(taken / result.tokens * 1000)
        print(f"{side:8} {taken:7.2f} s, {result.tokens} tokens", flush=True)

    for side in seconds:
        measure(side, 99)  # warm
        seconds[side].clear()
    for round, side in enumerate([*seconds, *reversed(seconds)]):
        measure(side, round)
    plain = statistics.mean(seconds["plain"])
    for side, own in seconds.items():
        mean = statistics.mean(own)
        print(f"{side:8} {mean:.3f} s of CPU for a thousand tokens, {mean / plain:.2f} of plain")


if __name__ == "__main__":
    main()
