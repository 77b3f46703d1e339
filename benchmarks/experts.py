"""A mixture of LoRA experts against one LoRA of the same active rank: a training step of the same batch.

    .venv/bin/python benchmarks/experts.py [MODEL]

A token passes the shared expert and two of the domain experts, so the LoRA has three times the rank. Both
sides do a forward pass, a backward pass and a step of AdamW on 8 sequences of 128 tokens, on one
thread, in turns; medians. The mixture also computes its balance term. MODEL is a folder (default: the
tiny model), or a width such as 512: two blocks of it with random weights. Width matters: a mixture's
products are as many as its experts, beside backbone products that grow with the square of the width.
"""

import statistics
import sys
import time

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from fedloom.experiment.experiment import Experiment
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.experts import ExpertModel, attach_experts
from fedloom.runs.model_building import prepare_model

RANK, TOP_K, STEPS, WARM = 8, 2, 60, 5


def backbone(path: str) -> torch.nn.Module:
    """Return the frozen model."""
    if path.isdigit():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=1024,
            hidden_size=int(path),
            intermediate_size=int(path) * 11 // 4,
            num_hidden_layers=2,
            num_attention_heads=max(1, int(path) // 64),
        )
        return LlamaForCausalLM(config).requires_grad_(False)
    experiment = Experiment.from_table({"model": {"path": path}})
    return prepare_model(experiment, (), lambda text: None)[2]


def step(model: AdapterModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """Seconds of one step."""
    start = time.perf_counter()
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    penalty = model.penalty()
    (loss if penalty is None else loss + penalty).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    """Print a line for each number of domain experts that a client holds."""
    path = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    torch.set_num_threads(1)
    ids = torch.randint(3, 300, (8, 128), generator=torch.Generator().manual_seed(0))
    one = AdapterSettings(rank=RANK * (1 + TOP_K), alpha=2.0 * RANK * (1 + TOP_K))
    for experts in (4, 6, 8):
        mixture = AdapterSettings(kind="experts", rank=RANK, experts=experts, top_k=TOP_K)
        models = [
            AdapterModel(attach_adapter(backbone(path), one), 0),
            ExpertModel(attach_experts(backbone(path), mixture), mixture, 0),
        ]
        sides = [(m, torch.optim.AdamW(m.parameters.values(), 1e-4, fused=True)) for m in models]
        times = [[step(*side, ids) for side in sides] for _ in range(WARM + STEPS)][WARM:]
        lora, mixed = (statistics.median(side) * 1e3 for side in zip(*times, strict=True))
        print(
            f"{experts} domain experts of rank {RANK}: {mixed:.1f} ms a step; one LoRA of rank "
            f"{one.rank}: {lora:.1f} ms; ratio {mixed / lora:.2f}"
        )


if __name__ == "__main__":
    main()
