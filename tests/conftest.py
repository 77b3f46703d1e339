"""One thread, no network, a private cache, and a random model small enough for every test."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import numpy as np
import pytest
import torch

from fedloom.data.builtin import pretraining_texts
from fedloom.experiment import Experiment
from fedloom.models.tiny import TinyRecipe, make_tiny_model

pytest_plugins = ["federation", "judge_server", "loopback", "machines"]
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    os.environ["FEDLOOM_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A Llama-shaped model of 2 layers that was hardly trained, with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    texts = pretraining_texts(np.random.default_rng(0), 200)
    recipe = TinyRecipe(vocabulary=320, hidden=32, intermediate=64, layers=2, heads=2, steps=2)
    make_tiny_model(folder, texts, recipe)
    return folder


@pytest.fixture(scope="session")
def mixture_folder(model_folder, tmp_path_factory):
    """A Mixtral-shaped model of 2 blocks with 6 experts each, not trained, with the same tokenizer."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("mixture")
    tokenizer = AutoTokenizer.from_pretrained(str(model_folder))
    tokenizer.save_pretrained(str(folder))
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=6,
        num_experts_per_tok=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(str(folder))
    return folder


@pytest.fixture
def table(model_folder, tmp_path):
    """A small experiment as a table: 3 clients, 2 rounds, 60 pairs."""
    return {
        "model": {"path": str(model_folder)},
        "adapter": {"rank": 2},
        "data": {"source": "builtin:preferences", "builtin_rows": 60},
        "federation": {"rounds": 2, "clients": 3},
        "training": {"learning_rate": 1e-3, "batch_size": 8},
        "evaluation": {"samples": 2, "max_new_tokens": 4},
        "output": {"folder": str(tmp_path / "run")},
    }


@pytest.fixture
def experiment(table):
    """Make an experiment from the small table with some sections changed."""

    def make(**sections):
        changed = {name: {**table.get(name, {}), **section} for name, section in sections.items()}
        return Experiment.from_table({**table, **changed})

    return make


@pytest.fixture
def rows_file(tmp_path):
    """Write rows as JSONL and return the path."""

    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def benchmarks(tmp_path):
    """The public layout of the three benchmarks, with questions of our own."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    turns = [["Write a poem.", "Again."], ["What is 2 + 2?", "And 3 + 3?"]]
    rows = [
        {"question_id": 81 + i, "category": category, "turns": turns[i]}
        for i, category in enumerate(("writing", "math"))
    ]
    write("mt_bench/question.jsonl", rows)
    reference = {"question_id": 82, "choices": [{"index": 0, "turns": ["It is 4.", "6"]}]}
    write("mt_bench/reference_answer_gpt-4.jsonl", [reference, {"question_id": 83}])
    write(
        "vicuna_bench/question.jsonl",
        [{"question_id": 1, "category": "generic", "turns": ["How?"]}],
    )
    (tmp_path / "advbench").mkdir()
    (tmp_path / "advbench/advbench_prompts.csv").write_text("goal\nDo a bad thing\nDo another\n")
    return tmp_path
