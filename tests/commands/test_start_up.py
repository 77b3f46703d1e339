"""What ``fedloom run`` does before its first step: nothing that only other paths need is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fedloom
from fedloom.commands.starter_experiment import starting_file
from fedloom.models.peft_backends import NAME, without_bitsandbytes

OTHERS = {
    "bitsandbytes": "models that it has quantised",
    "datasets": "rows from the Hub",
    "flwr": "federations between machines",
    "matplotlib": "pages",
    "networkx": "torch's compiler",
    "pandas": "nothing of ours",
    "pyarrow": "Parquet",
    "scipy.stats": "nothing of ours",
    "sklearn": "nothing of ours",
    "torch._inductor.compile_fx": "torch's compiler",
    "trl": "tests",
}
"""Modules that a run of a plain experiment does without, and what needs them."""

TO_THE_FIRST_STEP = f"""
import builtins, os, sys
from fedloom.commands.main import main

def first_step(*given, **options):
    print("loaded:", *sorted({set(OTHERS)} & sys.modules.keys()), flush=True)
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
    assert "loaded:\n" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]


def test_peft_asks_again_for_bitsandbytes_where_it_was_hidden():
    from peft.import_utils import is_bnb_available

    there = is_bnb_available()
    kept = sys.modules.pop(NAME, None)
    try:
        with without_bitsandbytes():
            assert not is_bnb_available()
            with without_bitsandbytes():  # it is one who hides it that shows it
                assert not is_bnb_available()
            assert not is_bnb_available()
        assert is_bnb_available() == there and NAME not in sys.modules
    finally:
        if kept is not None:
            sys.modules[NAME] = kept


def test_bitsandbytes_is_not_hidden_once_a_model_may_be_of_it(monkeypatch):
    monkeypatch.setitem(sys.modules, NAME, sys)
    with without_bitsandbytes():
        assert sys.modules[NAME] is sys
    assert sys.modules[NAME] is sys
