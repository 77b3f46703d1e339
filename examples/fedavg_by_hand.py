"""FedAvg of a LoRA adapter with nothing but torch, transformers and peft, on one page.

What `fedloom run` does for SFT under FedAvg, without its classes: a test checks that both give the same
adapter. Read it beside McMahan et al. 2017, algorithm 1.

    python examples/fedavg_by_hand.py MODEL_FOLDER
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedloom.randomness import derive_seed, generator

Rows = list[tuple[str, str]]  # a client's prompts and completions


def encode(rows: Rows, tokenizer) -> list[tuple[list[int], int]]:
    """Tokens of prompt and completion together, and how many of them are prompt."""
    encoded = []
    for prompt, completion in rows:
        tokens = tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]
        encoded.append((tokens, len(tokenizer(prompt)["input_ids"])))
    return encoded


def batch_loss(model, batch: list[tuple[list[int], int]], pad: int) -> torch.Tensor:
    """Mean cross-entropy over the completion tokens of a batch."""
    length = max(len(tokens) for tokens, _ in batch)
    ids = torch.tensor([tokens + [pad] * (length - len(tokens)) for tokens, _ in batch])
    mask = torch.tensor([[int(i < len(t)) for i in range(length)] for t, _ in batch])
    completion = torch.tensor([[p <= i < len(t) for i in range(length)] for t, p in batch])
    logits = model(input_ids=ids, attention_mask=mask).logits
    wanted = completion[:, 1:]
    return F.cross_entropy(logits[:, :-1][wanted], ids[:, 1:][wanted])


def fedavg(
    model_folder: str,
    clients: list[Rows],
    *,
    rounds: int,
    rank: int,
    learning_rate: float,
    batch_size: int,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Return the trained tensors after some rounds in which every client takes part."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder, trust_remote_code=False)
    backbone = AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=False)
    backbone.requires_grad_(False)
    torch.manual_seed(derive_seed(seed, "adapter"))
    config = LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(backbone, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    data = [encode(rows, tokenizer) for rows in clients]
    shared = {name: p.detach().clone() for name, p in trained.items()}
    for round in range(1, rounds + 1):
        updates = []
        for client, rows in enumerate(data):  # on each client, by itself:
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(shared[name])
            optimizer = torch.optim.AdamW(trained.values(), learning_rate, weight_decay=0)
            model.train()
            order = generator(seed, "batches", client, round).permutation(len(rows))
            for start in range(0, len(rows), batch_size):
                batch = [rows[i] for i in order[start : start + batch_size]]
                batch_loss(model, batch, tokenizer.pad_token_id).backward()
                torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            updates.append({name: p.detach().clone() for name, p in trained.items()})
        total = sum(len(rows) for rows in data)  # on the server: the mean, weighted by rows
        shared = {
            name: sum(u[name] * (len(rows) / total) for u, rows in zip(updates, data, strict=True))
            for name in shared
        }
    return shared


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    words = ("red", "blue", "green")
    three = [[(f"Sky {rng.integers(99)} is", f" {word}") for _ in range(12)] for word in words]
    adapter = fedavg(sys.argv[1], three, rounds=3, rank=4, learning_rate=1e-3, batch_size=4)
    print({name: round(float(tensor.norm()), 4) for name, tensor in list(adapter.items())[:4]})
