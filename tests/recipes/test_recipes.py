"""Every recipe loads, says its command, and runs a round on a random model and data of its layout."""

import dataclasses
import json
from pathlib import Path

import pytest

import fedloom
from fedloom.data.row_parsing import template_columns
from fedloom.experiment.experiment import Experiment
from fedloom.methods import METHODS
from fedloom.reports.comparison_page import write_comparison
from fedloom.runs.comparison import compare, read_comparison
from fedloom.runs.partitioning import judged_kind

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("recipes/**/*.toml"))
COMPARISONS = [path for path in FILES if "[compare]" in path.read_text()]
RECIPES = [path for path in FILES if path not in COMPARISONS]

FILLERS = {
    "labelled": ("text", "label"),
    "preference": ("prompt", "chosen", "rejected"),
    "instruction": ("completion",),
}


def test_there_are_recipes():
    assert len(RECIPES) >= 4 and len(COMPARISONS) >= 3


def filler(recipe):
    """Rows in the layout that a recipe's data has, more than it makes public."""
    count = 400 + recipe.public.rows
    names = {ours: recipe.data.columns.get(ours, ours) for ours in FILLERS[recipe.kind]}
    return [
        {
            **{
                theirs: f"{ours} {i if ours == 'text' else i % 8}" for ours, theirs in names.items()
            },
            **dict.fromkeys(("instruction", "context"), f"do {i}"),
            **dict.fromkeys(("category", "domain"), f"kind {i % 8}"),
            "client": f"user {i % 20}",
        }
        for i in range(count)
    ]


def held_out(recipe):
    """Other rows in that layout."""
    return [
        {name: f"held out {value}" if name == "text" else value for name, value in row.items()}
        for row in filler(recipe)
    ]


@pytest.fixture
def ran(rows_file, model_folder, tmp_path):
    """Run a round of a recipe on a random model, after the one that it starts from."""

    def run(path):
        recipe = Experiment.from_toml(path)
        changes = {
            "model.path": model_folder,
            "data.source": rows_file(filler(recipe), f"{path.stem}.jsonl"),
            "data.kind": recipe.kind,
            "federation.rounds": 1,
            "evaluation.samples": 1,
            "evaluation.max_new_tokens": 3,
            "output.folder": tmp_path / path.stem,
        }
        if recipe.data.test_split or recipe.data.test_source:
            changes["data.test_source"] = rows_file(held_out(recipe), "test.jsonl")
        if recipe.adapter.start:
            before = path.with_name(f"{Path(recipe.adapter.start).name}.toml")
            changes["adapter.start"] = run(before).folder
        settings = [f"{key}={value}" for key, value in changes.items()]
        return fedloom.run(Experiment.from_toml(path, settings))

    return run


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path, ran):
    command = path.read_text().splitlines()[0]
    assert command == f"# fedloom run {path.relative_to(ROOT)}"
    result = ran(path)
    assert result.metrics and result.adapter_path.is_dir()


@pytest.mark.slow
def test_two_commands_align_what_was_tuned(ran):
    result = ran(ROOT / "recipes" / "sft_then_dpo_dpo.toml")
    assert result.metrics_before["reward_margin"] == 0
    assert (result.folder / "start" / "adapter" / "adapter_model.safetensors").is_file()


PERSONAL = [path for path in COMPARISONS if "judged_by" in path.read_text()]
FRAMEWORKS = [
    path
    for path in COMPARISONS
    if "[compare.scenarios" in path.read_text() and path not in PERSONAL
]


def layout(source, kind, choices, column):
    """Rows with the columns that a source is read by and its scenario divides by."""
    rows = []
    for i in range(120):
        row = dict.fromkeys(("Category", "vul_type"), "abcd"[i % 4])
        row |= {name: allowed[i % len(allowed)] for name, allowed in source.only.items()}
        row |= {"statement": f"say {i}", "Question": f"why {i}"}
        if kind == "instruction":
            row |= {name: f"{name} {i}" for name in template_columns(source.template)}
            answer = choices[i % len(choices)] if choices else [f"answer {i % 5}", "none"]
            rows.append({column: "abcd"[i % 4], source.columns["completion"]: answer, **row})
            continue
        if source.continuations:
            row |= {"text": f"word{i} " * 100, "label": ("pos", "neg")[i % 2]}
        else:
            names = {ours: source.columns.get(ours, ours) for ours in ("chosen", "rejected")}
            start = "" if source.template else f"\n\nHuman: {i}\n\nAssistant:"
            row |= {theirs: f"{start} {ours} {i % 8}; {i}" for ours, theirs in names.items()}
        rows.append(row)
    return rows


LONG = {
    "experts_builtin",
    "experts_paper",
    "experts_real",
    "frameworks",
    "kto_vs_dpo_7b",
    "kto_vs_dpo_small_published_budget",
    "opposed_builtin",
    "preferences_more",
    "preferences_real",
}
"""Comparisons of which a round of every configuration takes three seconds and more."""


def quick_or_slow(paths):
    """Mark recipes that take seconds."""
    return [pytest.param(p, marks=pytest.mark.slow) if p.stem in LONG else p for p in paths]


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_a_comparison_is_read(path):
    found = read_comparison(path)
    assert len({(cell.name, cell.experiment.federation.seed) for cell in found.grid_runs}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("path", quick_or_slow(PERSONAL), ids=lambda path: path.stem)
def test_comparison_of_personal_models(path, model_folder, mixture_folder, rows_file, tmp_path):
    """Every configuration is run once, for a round, and every scenario by one configuration, to the page."""
    assert path.read_text().splitlines()[0] == f"# fedloom compare {path.relative_to(ROOT)}"
    changes = {"model.path": model_folder, "federation.rounds": 1, "compare.seeds": [0]}
    changes |= {"data.builtin_rows": 160, "evaluation.client_max_examples": 10}
    changes |= {"training.local_steps": 1, "adapter.layers": 1}
    changes |= {"evaluation.max_new_tokens": 3, "evaluation.max_examples": 10}
    if "submixture" in path.read_text():
        changes |= {
            "model.path": mixture_folder,
            "compare.methods.fedmoe.method.experts_per_client": 3,
        }
    for cell in {c.objective: c for c in read_comparison(path).grid_runs}.values():
        data, column = cell.experiment.data, cell.experiment.partition.column
        for domain, source in data.parts.items():
            if not source.is_builtin:
                place = f"compare.scenarios.{cell.objective}.data"
                place += f".domains.{domain}" if domain else ""
                files = [
                    rows_file(
                        layout(source, data.kind, data.choices, column),
                        f"{cell.objective}{domain}{i}.jsonl",
                    )
                    for i, _ in enumerate(source.sources)
                ]
                changes[f"{place}.source"] = json.dumps(files)
                changes[f"compare.scenarios.{cell.objective}.partition.minimum"] = 8
    whole = read_comparison(path, [f"{key}={value}" for key, value in changes.items()])
    first, once = whole.grid_runs[0].objective, {c.objective: c for c in whole.grid_runs}
    cells = [c for c in whole.grid_runs if c.objective == first or c is once[c.objective]]
    small = dataclasses.replace(whole, grid_runs=tuple(cells))
    folder = compare(small, tmp_path / "out", workers=1)
    page = write_comparison(folder).read_text()
    assert "<th>gain over</th><th>local_only</th>" in page and "<th>fedavg</th>" in page
    for cell in once.values():
        judged = {"choice": "Accuracy: share of held-out rows", "answer": "Rouge l: mean ROUGE-L"}
        kind = judged_kind(cell.experiment, cell.experiment.kind)
        assert judged.get(kind, "Preference accuracy: ") in page or kind == "instruction"
    for cell in small.grid_runs:
        assert cell.method in page


@pytest.mark.slow
@pytest.mark.parametrize("path", quick_or_slow(FRAMEWORKS), ids=lambda path: path.stem)
def test_comparison_of_frameworks(path, rows_file, model_folder, tmp_path):
    """Every cell is sound; every configuration is run once, in the first scenario, to the page."""
    assert path.read_text().splitlines()[0] == f"# fedloom compare {path.relative_to(ROOT)}"
    recipe = read_comparison(path).grid_runs[0].experiment
    changes = {
        "model.path": model_folder,
        "data.source": rows_file(filler(recipe)),
        "data.test_source": rows_file(held_out(recipe), "test.jsonl"),
        "data.kind": "labelled",
        "public.rows": 20,
        "partition.minimum": 1,
        "federation.rounds": 1,
        "evaluation.every": 1,
        "evaluation.max_examples": 10,
        "compare.methods.split_deep.method.cut": 1,  # the model has two blocks
    }
    if "split_deep" not in path.read_text():
        del changes["compare.methods.split_deep.method.cut"]
    whole = read_comparison(path, [f"{key}={value}" for key, value in changes.items()])
    first = {cell.method: cell for cell in reversed(whole.grid_runs)}
    assert {cell.experiment.method.name for cell in first.values()} >= {
        "fedavg",
        "distillation",
        "split",
    }
    folder = compare(
        dataclasses.replace(whole, grid_runs=tuple(first.values())), tmp_path / "out", workers=1
    )
    assert "Where each framework wins" in write_comparison(folder).read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    quick_or_slow(p for p in COMPARISONS if p not in FRAMEWORKS + PERSONAL),
    ids=lambda path: path.stem,
)
def test_comparison(path, rows_file, model_folder, tmp_path):
    """Every cell of the grid is sound; one run of every objective is done, at the recipe's own work."""
    assert path.read_text().splitlines()[0] == f"# fedloom compare {path.relative_to(ROOT)}"
    whole = read_comparison(path)
    recipe = whole.grid_runs[0].experiment
    changes = {
        "model.path": model_folder,
        "data.source": rows_file(filler(recipe)),
        "data.max_rows": 200,
        "partition.minimum": 1,
        "federation.rounds": 1,
        "federation.clients": 12,
        "federation.clients_per_round": 2,
        "compare.seeds": [0],
        "evaluation.max_examples": 10,
    }
    first = whole.grid_runs[0].method
    if first in METHODS:
        changes["compare.methods"] = f'["{first}"]'
    comparison = read_comparison(path, [f"{key}={value}" for key, value in changes.items()])
    runs = tuple(cell for cell in comparison.grid_runs if cell.method == first)
    comparison = dataclasses.replace(comparison, grid_runs=runs)
    folder = compare(comparison, tmp_path / "out", workers=1)
    assert len(list(folder.glob("runs/*/summary.json"))) == len(whole.settings.objectives)
