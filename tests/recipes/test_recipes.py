"""Every recipe loads, says its command, and runs a round on a random model and data of its layout."""

from pathlib import Path

import pytest

import fedloom
from fedloom.experiment import Experiment

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("recipes/**/*.toml"))

FILLERS = {
    "labelled": ("text", "label"),
    "preference": ("prompt", "chosen", "rejected"),
    "instruction": ("completion",),
}


def test_there_are_recipes():
    assert len(RECIPES) >= 4


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path, rows_file, model_folder, tmp_path):
    command = path.read_text().splitlines()[0]
    assert command == f"# fedloom run {path.relative_to(ROOT)}"
    recipe = Experiment.from_toml(path)
    names = {ours: recipe.data.columns.get(ours, ours) for ours in FILLERS[recipe.kind]}
    rows = [
        {
            **{theirs: f"{ours} {i % 8}" for ours, theirs in names.items()},
            **dict.fromkeys(("instruction", "context"), f"do {i}"),
            "category": f"kind {i % 8}",
        }
        for i in range(400)
    ]
    changes = {
        "model.path": model_folder,
        "data.source": rows_file(rows),
        "federation.rounds": 1,
        "evaluation.samples": 1,
        "evaluation.max_new_tokens": 3,
        "output.folder": tmp_path / "run",
    }
    experiment = Experiment.from_toml(path, [f"{key}={value}" for key, value in changes.items()])
    result = fedloom.run(experiment)
    assert result.metrics and result.adapter_path.is_dir()
