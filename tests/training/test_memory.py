"""Derived memory of a client's training against a process that trains."""

import subprocess
import sys
import textwrap

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

SCRIPT = """
    import re, sys
    from pathlib import Path
    import numpy as np, torch
    from fedloom.data.client_rows import TokenShare
    from fedloom.data.token_set import TokenSet
    from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
    from fedloom.models.load import load_backbone
    from fedloom.objectives import SFT
    from fedloom.training.steps import train_locally
    from fedloom.training.memory import client_memory
    from fedloom.training.settings import TrainingSettings, Work

    def peak():
        return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    def train(folder, rows, length):
        tokens = TokenSet(
            1, np.arange(rows), np.arange(rows), np.ones(rows * length, np.int32),
            np.arange(rows * length) % length > 0, np.arange(0, rows * length + 1, length),
            np.full(rows, 1), np.zeros((rows, 2), np.int64), np.zeros(rows, bool),
            np.full(rows, -1), (),
        )
        share, settings = TokenShare(tokens), TrainingSettings(batch_size=rows)
        model = AdapterModel(attach_adapter(load_backbone(folder, pad_token_id=0), AdapterSettings()), 0)
        train_locally(
            model, share, SFT(), settings, learning_rate=1e-3, seed=0, client=0, round=1, work=Work(steps=2)
        )
        return client_memory(model, share, settings, "none")

    torch.set_num_threads(1)
    train(sys.argv[2], 2, 8)  # what any training needs once
    before = peak()
    derived = train(sys.argv[1], 8, 128)
    print(derived, peak() - before)
"""


@pytest.mark.slow
def test_the_estimate_is_of_the_right_size(model_folder, tmp_path):
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(tmp_path), str(model_folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    derived, measured = map(float, done.stdout.split()[-2:])
    assert derived == pytest.approx(measured, rel=0.4), (derived, measured)


STEP = """
    import re
    from pathlib import Path
    import numpy as np, torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from fedloom.data.client_rows import TokenShare
    from fedloom.data.token_set import TokenSet
    from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
    from fedloom.objectives import DPO
    from fedloom.training.layout import Budget
    from fedloom.training.references import add_reference_logps
    from fedloom.training.steps import train_locally
    from fedloom.training.settings import TrainingSettings, Work

    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=128256, hidden_size=256, intermediate_size=688, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, use_cache=False,
    )
    backbone = LlamaForCausalLM(config).requires_grad_(False)
    model = AdapterModel(attach_adapter(backbone, AdapterSettings()), 0)
    drawn = np.random.default_rng(0)
    tokens = drawn.integers(3, 128000, (4, 512)).astype(np.int32)
    tokens[1::2, :16] = tokens[::2, :16]
    tokens = TokenSet(
        2, np.arange(2), np.arange(2), tokens.reshape(-1), np.arange(2048) % 512 >= 16,
        np.arange(0, 2049, 512), np.full(4, 16), np.zeros((4, 2), np.int64), np.zeros(2, bool),
        np.full(2, -1), (),
    )
    share = add_reference_logps(model, TokenShare(tokens), Budget(2))
    settings = TrainingSettings(batch_size=2, micro_batch_size=2)
    train_locally(
        model, share, DPO(), settings, learning_rate=1e-3, seed=0, client=0, round=1, work=Work(steps=1)
    )
    print(int(re.search(r"VmHWM:\\\\s+(\\\\d+)", Path("/proc/self/status").read_text())[1]) / 1e6)
"""


@pytest.mark.slow
def test_a_large_vocabulary_takes_little_memory():
    """Two pairs of 512 tokens, 1984 positions that count, whose logits alone would be 1 GB, thrice held."""
    command = [sys.executable, "-c", textwrap.dedent(STEP).replace("\\\\", "\\")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (
        float(done.stdout.split()[-1]) < 1.6
    )  # GB, of which 0.75 are what is imported and weights
