"""Twenty optimizer steps of TRL's KTO trainer and of our local loop, on the same batches.

TRL pairs each prompt with the completion before it within fixed, sequential batches. Our loop gets
the same batches and the same mismatched completions; everything else is its own.
"""

import copy
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from trl import KTOConfig, KTOTrainer

from fedloom.data.builtin import builtin_examples
from fedloom.data.client_rows import TokenShare
from fedloom.data.encode import TextEncoder
from fedloom.data.tokenize import tokenize
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.load import load_backbone, load_tokenizer
from fedloom.objectives.kto import KTO, KTOSettings
from fedloom.training import steps
from fedloom.training.layout import Budget
from fedloom.training.references import add_reference_logps
from fedloom.training.settings import TrainingSettings, Work
from fedloom.training.steps import train_locally

BATCH, STEPS, RATE = 8, 20, 2e-3


def rotated(tokens):
    """Each row's prompt with the completion of the row before it in its batch, the first's with the last's."""
    parts, masks, prompts = [], [], []
    for i in range(len(tokens)):
        first = i - i % BATCH
        donor = i - 1 if i > first else first + BATCH - 1
        own, prompt = tokens.sequence(i)
        other, start = tokens.sequence(donor)
        parts.append(np.concatenate([own[:prompt], other[start:]]))
        masks.append(np.arange(len(parts[-1])) >= prompt)
        prompts.append(prompt)
    starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    return replace(
        tokens,
        tokens=np.concatenate(parts),
        trained=np.concatenate(masks),
        starts=starts,
        prompts=np.array(prompts),
    )


@pytest.mark.slow
def test_twenty_steps(model_folder, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(str(model_folder))
    rows = builtin_examples("feedback", BATCH * STEPS, np.random.default_rng(5))
    assert 0.3 < np.mean([row.desirable for row in rows]) < 0.7
    backbone = load_backbone(str(model_folder), pad_token_id=tokenizer.pad_token_id)
    model = attach_adapter(backbone, AdapterSettings(rank=4))
    theirs = copy.deepcopy(model)

    settings = KTOConfig(
        str(tmp_path), per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=RATE,
        lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, max_grad_norm=1.0, beta=0.1,
        desirable_weight=1.3, undesirable_weight=0.8, max_length=256, logging_steps=1, report_to=[],
        train_sampling_strategy="sequential", use_cpu=True, bf16=False, save_strategy="no",
        disable_tqdm=True, activation_checkpointing=False, dataloader_pin_memory=False,
    )  # fmt: skip
    data = datasets.Dataset.from_list(
        [{"prompt": r.prompt, "completion": r.completion, "label": r.desirable} for r in rows]
    )
    trainer = KTOTrainer(theirs, args=settings, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    expected_kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]

    ours = AdapterModel(model, tokenizer.pad_token_id)
    tokens = tokenize(rows, TextEncoder(tokenizer), 256)
    assert len(tokens) == len(rows)
    share = add_reference_logps(ours, TokenShare(tokens, rotated(tokens)), Budget(BATCH))
    blocks = [np.arange(i, i + BATCH) for i in range(0, len(rows), BATCH)]
    monkeypatch.setattr(steps, "epoch_batches", lambda *_, **__: iter(blocks))
    losses, kls, accumulate = [], [], steps.accumulate_gradients

    def record(model, objective, parts, totals, graphs):
        kls.append(float(objective.statistics(model, parts)))
        found = accumulate(model, objective, parts, totals, graphs)
        losses.append(found.loss)
        return found

    monkeypatch.setattr(steps, "accumulate_gradients", record)
    train_locally(
        ours,
        share,
        KTO(KTOSettings(beta=0.1, desirable_weight=1.3, undesirable_weight=0.8)),
        TrainingSettings(batch_size=BATCH),
        learning_rate=RATE,
        seed=0,
        client=0,
        round=1,
        work=Work(epochs=1),
    )
    assert len(losses) == len(expected) == STEPS
    assert losses == pytest.approx(expected, abs=1e-5)
    assert kls == pytest.approx(expected_kl, abs=1e-4) and kls[0] == pytest.approx(0, abs=1e-5)
    assert (
        max(kls) > 0.01 and abs(losses[-1] - losses[0]) > 1e-3
    )  # it moved: equality means something
    trained = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    for (name, mine), other in zip(sorted(ours.parameters.items()), [trained[n] for n in sorted(trained)], strict=True):  # fmt: skip
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5, msg=name)
