"""Which model types read a prompt once: ``PYTHONPATH=tests python -m architectures.shared_prompts FOLDER``.

FOLDER has the tokenizer that the small models are given. The table goes to
``benchmarks/results/shared-prompts.md``.
"""

import sys
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers

from architectures.zoo import MODEL_TYPES, make_folder
from fedloom.data.client_rows import TokenShare
from fedloom.data.tokenize import TokenSet
from fedloom.errors import ModelError
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.architecture import switch_dropout_off
from fedloom.models.load import load_backbone
from fedloom.objectives import OBJECTIVES
from fedloom.training.layout import Budget
from fedloom.training.references import add_reference_logps
from fedloom.training.shared_prompts import reason_against
from one_step import gradients

TABLE = Path(__file__).parents[2] / "benchmarks" / "results" / "shared-prompts.md"

HEADER = "| model type | prompts | loss | gradient |"

PROMPTS = ((0, 6), (1, 4), (0, 6), (2, 20))
"""Of each row: which prompt it follows, and how many tokens that has; the last is beyond the sliding windows
of the small models."""

ANSWERS = ((5, 3), (4, 6), (2, 5), (7, 4))
"""Tokens of the answers to each."""

TRIED = ("dpo", "kto", "sft")


@dataclass(frozen=True)
class Reading:
    """What was measured.

    Attributes:
        refused: What a user is told where the model is not taken; nothing else is measured then.
        reason: Why each sequence is read by itself; empty where prompts are read once.
        loss: Largest difference of an objective's loss, laid out in passes against one padded batch, over
            the loss.
        gradient: The same of gradients, over their norm.
    """

    refused: str = ""
    reason: str = ""
    loss: float = 0.0
    gradient: float = 0.0


def read(folder: Path) -> Reading:
    """Return how a checkpoint with the default adapter reads prompts, and what difference it makes."""
    try:
        backbone = load_backbone(str(folder), pad_token_id=0)
        switch_dropout_off(backbone)
        model = AdapterModel(attach_adapter(backbone, AdapterSettings()), 0)
    except ModelError as error:
        return Reading(refused=str(error).replace(str(folder), "the model"))
    drawn = torch.Generator().manual_seed(1)  # factors at 0 would hide gradients of the others
    with torch.no_grad():
        for parameter in model.parameters.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=drawn))
    reason, losses, slopes = reason_against(model), [0.0], [0.0]
    for name in TRIED:
        objective, own = OBJECTIVES[name][1](), rows(width=2 if name == "dpo" else 1)
        share = TokenShare(own)
        if objective.needs_mismatched:
            turned = np.roll(np.arange(len(own)), 1)
            share = replace(share, mismatched=_with_prompts(own.take(turned), own))
        if objective.needs_reference:
            share = add_reference_logps(model, share, Budget(8))
        found, reported = gradients(objective, model, share, tokens_per_pass=48)
        kept, model.shared_prompts = model.shared_prompts, False
        expected, plain = gradients(objective, model, share, micro_batch_size=len(share))
        model.shared_prompts = kept
        loss, one = reported.metrics["loss"], plain.metrics["loss"]
        losses.append(abs(loss - one) / abs(one))
        slopes.append(float((found - expected).norm() / expected.norm()))
    return Reading(reason=reason, loss=max(losses), gradient=max(slopes))


def rows(width: int) -> TokenSet:
    """Return pairs of answers, or the same as single ones."""
    drawn = np.random.default_rng(5).integers(3, 250, 400)
    parts, prompts, masks = [], [], []
    for row, ((prompt, length), answers) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        opening = drawn[40 * prompt : 40 * prompt + length]
        for place, answer in enumerate(answers):
            start = 200 + 40 * row + 15 * place
            parts.append(np.concatenate([opening, drawn[start : start + answer]]).astype(np.int32))
            prompts.append(length)
            masks.append(np.arange(length + answer) >= length)
    count = len(parts) // width
    labels = np.full(count, -1) if width == 2 else np.arange(count) % 2
    return TokenSet(
        width,
        np.arange(count),
        np.arange(count),
        np.concatenate(parts),
        np.concatenate(masks),
        np.concatenate([[0], np.cumsum([len(part) for part in parts])]),
        np.array(prompts),
        np.zeros((len(parts), 2), np.int64),
        np.zeros(count, bool),
        labels,
        (),
    )


def _with_prompts(tokens: TokenSet, others: TokenSet) -> TokenSet:
    """Return each row's completion behind the prompt of the row of others in its place."""
    parts, masks, prompts = [], [], []
    for row in range(len(tokens)):
        (own, start), (other, prompt) = tokens.sequence(row), others.sequence(row)
        parts.append(np.concatenate([other[:prompt], own[start:]]))
        masks.append(np.arange(len(parts[-1])) >= prompt)
        prompts.append(prompt)
    return replace(
        others,
        tokens=np.concatenate(parts),
        trained=np.concatenate(masks),
        starts=np.concatenate([[0], np.cumsum([len(part) for part in parts])]),
        prompts=np.array(prompts),
    )


def line(model_type: str, reading: Reading) -> str:
    """Return a model type's row of the table."""
    if reading.refused:
        return f"| {model_type} | not taken | | |"
    how = f"each sequence: {reading.reason.replace('|', '/')}" if reading.reason else "once"
    return f"| {model_type} | {how} | {reading.loss:.0e} | {reading.gradient:.0e} |"


def written(readings: Mapping[str, Reading]) -> str:
    """Return the table."""
    taken = [reading for reading in readings.values() if not reading.refused]
    once = sum(not reading.reason for reading in taken)
    heading = (
        "Which causal model types read a prompt once for all answers to it, and how far the loss and the\n"
        "gradient of a step (DPO, KTO and SFT, the largest) are from those of one padded batch, over the loss\n"
        "and over the norm. float32, small random weights, LoRA.\n\n"
        f"{len(readings)} model types, of which {len(taken)} are taken and {once} read prompts once.\n\n"
    )
    rows = [line(model_type, readings[model_type]) for model_type in sorted(readings)]
    return heading + "\n".join([HEADER, "| --- | --- | --- | --- |", *rows]) + "\n"


def main() -> None:
    """Go over all model types and write the table."""
    warnings.simplefilter("ignore")
    tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
    readings = {}
    for model_type in MODEL_TYPES:
        with tempfile.TemporaryDirectory() as name:
            make_folder(model_type, Path(name), tokenizer)
            readings[model_type] = read(Path(name))
        print(line(model_type, readings[model_type]), flush=True)
    TABLE.write_text(written(readings), encoding="utf-8")


if __name__ == "__main__":
    main()
