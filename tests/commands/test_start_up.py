"""What ``fedloom run`` does before its first step: nothing that only other paths need is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedloom
from fedloom.commands.starter_experiment import starting_file
from fedloom.models.peft_backends import BITSANDBYTES, TORCHAO, without

OTHERS = {
    "bitsandbytes": "models that it has quantised",
    "datasets": "rows from the Hub",
    "flwr": "federations between machines",
    "matplotlib": "pages",
    "networkx": "torch's compiler",
    "pandas": "nothing of ours",
    "pyarrow": "Parquet",
    "scipy": "intervals of means, noise",
    "sklearn": "nothing of ours",
    "torch._inductor.compile_fx": "torch's compiler",
    "torchao": "models that it has quantised",
    "trl": "tests",
}
"""Modules that a run of a plain experiment does without, and what needs them."""

TO_THE_FIRST_STEP = f"""
import builtins, os, sys
from fedloom.commands.main import main

def first_step(*given, **options):
    print("loaded:", *sorted({set(OTHERS)} & sys.modules.keys()), flush=True)
    from transformers.loss.loss_for_object_detection import linear_sum_assignment
    print("assigned:", *linear_sum_assignment([[1, 0], [0, 1]])[1], "by", "scipy" in sys.modules, flush=True)
    os._exit(0)

def importing(*given, **options):
    module = before(*given, **options)
    steps = sys.modules.get("fedloom.training.steps")
    if hasattr(steps, "clip"):  # the whole file has run
        steps.update = first_step
    return module

before, builtins.__import__ = builtins.__import__, importing
main()
"""
"""``fedloom`` itself, which leaves as it would make its first optimizer step."""


@pytest.mark.slow
def test_a_run_imports_nothing_before_its_first_step_that_only_others_need(model_folder, tmp_path):
    path = {**os.environ, "PYTHONPATH": str(Path(fedloom.__file__).parents[1])}
    changes = (f"output.folder={tmp_path / 'run'}", f"model.path={model_folder}", "data.builtin_rows=60",
               "partition.kind=iid", "federation.clients=2")  # fmt: skip
    run = ["run", str(starting_file()), *(w for change in changes for w in ("--set", change))]
    done = subprocess.run(
        [sys.executable, "-c", TO_THE_FIRST_STEP, *run],
        capture_output=True,
        text=True,
        check=False,
        env=path,
    )
    assert "loaded:\nassigned: 1 0 by True\n" in done.stdout, (
        done.stdout[-2000:] + done.stderr[-2000:]
    )


@pytest.mark.parametrize(
    ("name", "asked"), [(BITSANDBYTES, "is_bnb_available"), (TORCHAO, "is_torchao_available")]
)
def test_peft_asks_again_for_what_was_hidden(monkeypatch, name, asked):
    from peft import import_utils

    is_available = getattr(import_utils, asked)
    there = is_available()
    monkeypatch.delitem(sys.modules, name, raising=False)
    with without(name):
        assert not is_available()
        with without(BITSANDBYTES, TORCHAO):  # it is one who hides it that shows it
            assert not is_available()
        assert not is_available()
    assert is_available() == there and name not in sys.modules


@pytest.mark.parametrize("name", [BITSANDBYTES, TORCHAO])
def test_nothing_is_hidden_once_a_model_may_be_of_it(monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, sys)
    with without(name):
        assert sys.modules[name] is sys
