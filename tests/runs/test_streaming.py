"""A run whose rows stay in their files ends in the adapter of one that has them in memory."""

import json
import random
import runpy
from pathlib import Path

import pytest

import fedloom
from fedloom.experiment.experiment import Experiment
from sampling import sampled, tries

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "streaming.py"


def rows_of(kind, count=48):
    rng = random.Random(3)
    words = ["yes", "no", "maybe", "here", "there", "Ada"]

    def text(least):
        return " " + " ".join(rng.choices(words, k=rng.randint(least, 9)))

    for i in range(count):
        asked = {"prompt": f"Question {i}:{text(2)}?", "site": f"s{i % 3}"}
        if kind == "preference":
            yield {**asked, "chosen": text(1), "rejected": text(1) + " not"}
        elif kind == "labelled":
            yield {"text": asked["prompt"], "label": f"c{i % 2}", "site": asked["site"]}
        else:
            yield {
                **asked,
                "completion": text(1),
                **({"label": i % 2 == 0} if kind == "feedback" else {}),
            }


def write(folder, kind, ending):
    path, rows = folder / f"rows.{ending}", list(rows_of(kind))
    if ending == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\nbroken\n")
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=11)
    return path


def adapters(tmp_path, monkeypatch, model_folder, kind, objective, ending, partition, **sections):
    """The adapter's SHA-256 and the account of rows, loaded and streamed, each with an empty cache."""
    path, found = write(tmp_path, kind, ending), []
    for streaming in (False, True):
        monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / f"cache-{streaming}"))
        table = {
            "data": {"source": str(path), "kind": kind, "streaming": streaming, "max_length": 24},
            "model": {"path": str(model_folder)},
            "objective": {"name": objective},
            "partition": partition,
            "federation": {"clients": 2, "rounds": 2},
            "training": {"local_steps": 2, "batch_size": 4},
            "evaluation": {"max_examples": 6, "client_max_examples": 3},
            "output": {"folder": str(tmp_path / f"run-{streaming}")},
            **sections,
        }
        result = fedloom.run(Experiment.from_table(table))
        read = [
            json.loads((result.folder / name).read_text()) for name in ("summary.json", "run.json")
        ]
        found.append((read[0]["adapter"]["sha256"], result.metrics, read[1]["data"]["account"]))
    return found


def test_an_adapter_is_that_of_rows_in_memory(tmp_path, monkeypatch, model_folder):
    loaded, streamed = adapters(
        tmp_path, monkeypatch, model_folder, "preference", "dpo", "jsonl", {"kind": "iid"}
    )
    assert streamed == loaded


CASES = [
    (kind, objective, ending, partition)
    for kind, objectives in {
        "preference": ("dpo", "simpo"),
        "instruction": ("sft",),
        "feedback": ("bco",),
        "labelled": ("classification",),
    }.items()
    for objective in objectives
    for ending in ("jsonl", "parquet")
    for partition in (
        {"kind": "iid"},
        {"kind": "dirichlet", "column": "site"},
        {"kind": "column", "column": "site"},
        {"kind": "size", "sizes": [1.0, 3.0]},
    )
]


@pytest.mark.parametrize("case", sampled(CASES, 2), ids=str)
def test_every_partition_kind_and_file_ends_in_the_same_adapter(
    tmp_path, monkeypatch, model_folder, case
):
    loaded, streamed = adapters(tmp_path, monkeypatch, model_folder, *case)
    assert streamed == loaded


@pytest.mark.parametrize("megabytes", tries(slow=16, full=200))
def test_memory_is_bounded(tmp_path, megabytes):
    """Most memory of a process over that of one with 4 MB of rows: an index, no rows and no tokens."""
    memory = runpy.run_path(str(BENCHMARK))["memory"]
    small, large = memory(tmp_path, 4), memory(tmp_path, megabytes)
    assert large - small < 40 + 0.25 * megabytes
