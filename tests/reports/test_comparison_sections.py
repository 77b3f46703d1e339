"""Which sections a comparison's page takes: those that its kind and its runs ask for."""

import json
import shutil
from dataclasses import asdict

import pytest

import fedloom
from fedloom.accounting.traffic import LogitTraffic
from fedloom.commands.terminal import results_table
from fedloom.reports.comparison_page import write_comparison
from fedloom.reports.run_page import write_report
from fedloom.storage.run_folder import RunFolder


@pytest.fixture
def folder(experiment, once):
    return once("run", lambda: fedloom.run(experiment(federation={"rounds": 1})).folder)


@pytest.fixture
def grid(folder, tmp_path):
    """Write a comparison of copies of one run: methods by name with changes of their run.json, and seeds."""

    def write(methods, seeds=(0,), rounds=None, **record):
        cells = []
        for method, changes in methods.items():
            for seed in seeds:
                name = f"a-{method}-s{seed}"
                own = shutil.copytree(folder, tmp_path / "grid/runs" / name, dirs_exist_ok=True)
                files = RunFolder(own)
                text = (own / "experiment.toml").read_text().replace("seed = 0", f"seed = {seed}")
                files.write_text("experiment.toml", text.replace("fedavg", method))
                run, summary = files.read_json("run.json"), files.read_json("summary.json")
                run |= {"seed": seed, "method": method, **changes}
                summary["adapter"]["sha256"] = name  # a training of its own, not the same run twice
                summary["after"] += 0.01 * seed
                if rounds is not None:
                    written = [
                        json.dumps(own) for own in rounds(seed, files.read_lines("rounds.jsonl"))
                    ]
                    (own / "rounds.jsonl").write_text("\n".join(written) + "\n")
                files.write_json("run.json", {k: v for k, v in run.items() if v is not None})
                files.write_json("summary.json", summary)
                cells.append({"name": name, "objective": "a", "method": method, "seed": seed})
        record = {"name": "grid", "budget": "as_set", "amount": None, "seeds": [*seeds], **record}
        record |= {"objectives": ["a"], "methods": [*methods], "cells": cells}
        files = RunFolder(tmp_path / "grid")
        files.write_json("comparison.json", record)
        return write_comparison(files.path).read_text(), files.read_json("results.json")

    return write


def role(title, **own):
    return {"method_role": {"title": title, "kind": "method", "reference": False, **own}}


PERSONAL = "<th>worst decile</th>"
COSTS = "Where each framework wins"
OUTCOMES = "Every configuration</h2>"


def test_methods_of_one_framework_without_personal_models_have_neither(grid):
    page, found = grid({"one": role("One", reference=True), "two": role("Two")}, kind="objectives")
    assert OUTCOMES in page and COSTS not in page and PERSONAL not in page
    assert not {"costs", "personalisation"} & found.keys()
    assert "Do the methods differ?" in page and "Do the objectives differ?" not in page
    assert [(r["of"], r["left"], r["right"]) for r in found["paired"]] == [
        ("methods", "one", "two")
    ] * 2


def test_runs_say_which_sections_there_are_beside_the_one_that_was_asked_for(grid):
    logits = asdict(LogitTraffic(9, 4, "fp32", 0, adaptive=False))
    methods = {
        "one": role("One", reference=True),
        "two": {**role("Two", personal=True), "traffic": logits},
    }
    page, found = grid(methods, kind="objectives")
    assert page.index(OUTCOMES) < page.index(COSTS) < page.index(PERSONAL)
    assert [row["framework"] for row in found["costs"]["frameworks"]] == ["FedLLM", "KD-FedLLM"]
    assert [arm["name"] for arm in found["personalisation"]["arms"]] == ["one", "two"]
    assert found["arms"][0]["objective"] == "a" and "held_out_rows" in found
    page, found = grid(methods, kind="scenarios")
    assert page.index(COSTS) < page.index(PERSONAL) and OUTCOMES not in page
    assert found["arms"][1]["framework"] == "KD-FedLLM" and "costs" not in found
    page, found = grid(methods, kind="personal")
    assert page.index(PERSONAL) < page.index(COSTS) and "gains" in found["arms"][0]


@pytest.mark.parametrize("kind", [None, "scenarios", "personal"])
def test_folders_of_earlier_releases_open_with_what_can_be_told_from_them(grid, tmp_path, kind):
    lost = dict.fromkeys(("method_role", "sections", "traffic", "client_memory"))
    page, found = grid({"one": lost, "two": lost}, **({"kind": kind} if kind else {}))
    assert len(found["arms"]) == 2 and "</html>" in page
    assert results_table(tmp_path / "grid").row_count >= 2
    if kind == "scenarios":
        assert (
            found["arms"][0]["framework"] == "not recorded" and found["arms"][0]["expected"] is None
        )
        assert "needs the least client memory" not in page


def moved(seed, rounds):
    """As if the metric after the last round, and a figure of the method's own, differed by seed."""
    last = rounds[-1]
    last["evaluation"]["global"]["preference_accuracy"] += 0.01 * seed
    last["details"] = {"own": 1.0 + seed}
    return rounds


OWN = [{"kind": "line_chart", "title": "Mine", "text": "My own.", "key": "own"}]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        (
            2,
            "the band goes from the lowest to the highest seed, as 95 % over seeds needs at least 5.",
        ),
        (5, "the band is of 95 % over seeds."),
    ],
)
def test_curves_of_several_seeds_have_a_band_and_say_which(grid, tmp_path, seeds, words):
    page, _ = grid({"one": {"sections": OWN}}, range(seeds), moved, kind="objectives")
    assert f"Mean over seeds; {words} All charts share one scale." in page
    own = page[page.index("What a, one shows of its rounds") :]
    assert "<h2>Mine</h2>" in own and "My own." in own and f"Mean over seeds; {words}" in own
    runs = sorted((tmp_path / "grid/runs").iterdir())
    several = write_report(runs, tmp_path / "all.html").read_text()
    for what in ("Held-out preference accuracy", "Held-out loss", "Training loss"):
        assert f"{what} by round, mean over seeds; {words[:-1]}</figcaption>" in several


def test_runs_that_ended_at_other_rounds_are_compared_at_those_that_all_have(grid):
    def shorter(seed, rounds):
        return [*rounds, {**rounds[-1], "round": 2}] if seed else rounds

    page, found = grid({"one": {}}, (0, 1), shorter, kind="objectives")
    assert "by round</h2>" in page and found["arms"][0]["runs"] == 2
