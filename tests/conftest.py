"""One thread, no network, a private cache, and a random model small enough for every test."""

import gc
import json
import os
import shutil
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
from filelock import FileLock

from fedloom.accounting.garbage import without_collection
from tiers import sort_into_tiers, spread_over_workers

PLUGINS = ("federation", "judge_server", "loopback", "machines")


def pytest_configure(config):
    """Load torch and the fixtures, but not in the process that only hands tests to workers."""
    if config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput"):
        return
    with without_collection():
        import torch

        torch.set_num_threads(1)
        for name in PLUGINS:
            config.pluginmanager.import_plugin(name)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """Look for no garbage in what is imported and collected, which stays: neither now nor during tests."""
    with without_collection():
        outcome = yield
    gc.freeze()
    return outcome


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Put tests that take long into the tier of their time, before any are deselected."""
    sort_into_tiers(items)
    spread_over_workers(items)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder of this session, the same one in all workers."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def made_once(folder, make):
    """Return a folder that one of the workers makes for all."""
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            part = folder.with_suffix(".part")
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir()
            make(part)
            part.rename(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(shared_folder):
    folder = shared_folder / "cache"
    folder.mkdir(exist_ok=True)
    os.environ["FEDLOOM_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(shared_folder):
    """A Llama-shaped model of 2 layers that was hardly trained, with its tokenizer."""
    import numpy as np

    from fedloom.data.builtin import pretraining_texts
    from fedloom.models.tiny import TinyRecipe, make_tiny_model

    texts = pretraining_texts(np.random.default_rng(0), 200)
    recipe = TinyRecipe(vocabulary=320, hidden=32, intermediate=64, layers=2, heads=2, steps=2)
    return made_once(shared_folder / "model", lambda own: make_tiny_model(own, texts, recipe))


@pytest.fixture(scope="session")
def mixture_folder(model_folder, shared_folder):
    """A Mixtral-shaped model of 2 blocks with 6 experts each, not trained, with the same tokenizer."""
    return made_once(shared_folder / "mixture", lambda own: make_mixture(own, model_folder))


def make_mixture(folder, model_folder):
    import torch
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

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


@pytest.fixture(scope="module")
def once():
    """Do by name what several tests of a module need, the first time alone, and return what came of it."""
    done = {}

    def do(name, make):
        if name not in done:
            done[name] = make()
        return done[name]

    return do


@pytest.fixture
def table(model_folder, tmp_path):
    """A small experiment as a table: 3 clients, 2 rounds, 60 pairs."""
    return {
        "model": {"path": str(model_folder)},
        "adapter": {"rank": 2},
        "data": {"source": "builtin:preferences", "builtin_rows": 60},
        "federation": {"rounds": 2, "clients": 3},
        "training": {"learning_rate": 1e-3, "batch_size": 8},
        "evaluation": {"samples": 0},  # answers take a fifth of a small run
        "output": {"folder": str(tmp_path / "run"), "verify": False},  # test_verifying.py does
    }


RANKS = {"ravan": 4, "hilora": 3}
"""Of methods that divide a rank: one that can be divided."""


def few_selectors(rounds):
    """How many FedBiscuit can warm up in so many rounds, and one with groups; two at most."""
    return max(1, min(2, rounds - 1))


@pytest.fixture
def experiment(table):
    """Make an experiment from the small table with some sections changed."""
    from fedloom.experiment.experiment import Experiment

    def make(**sections):
        rank = RANKS.get(sections.get("method", {}).get("name", ""))
        if rank:
            sections["adapter"] = {"rank": rank, **sections.get("adapter", {})}
        changed = {name: {**table.get(name, {}), **section} for name, section in sections.items()}
        if changed.get("method", {}).get("name") == "fedbiscuit":
            rounds = {**table, **changed}["federation"]["rounds"]
            changed["method"] = {"selectors": few_selectors(rounds), **changed["method"]}
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


@pytest.fixture
def call(capsys, monkeypatch, tmp_path):
    """Run the command in this process, in the test's folder; return exit code and what it printed."""

    from fedloom.commands import main

    monkeypatch.chdir(tmp_path)  # what commands leave there is not left among the sources

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["fedloom", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out + captured.err

    return run
