"""The guides: their files are right, and who follows them gets what they promise."""

import json
import re
import shutil
import socket
import subprocess
import time

import numpy as np
import pytest

from fedloom.data.builtin import builtin_examples
from fedloom.deployment.client_file import OwnFile
from fedloom.experiment.experiment import Experiment
from fedloom.runs.comparison import read_comparison
from pages import blocks, environment, file_name, play, shell
from sampling import tries

GUIDES = ("guide-private-deployment.md", "guide-research.md", "reproducibility.md")

READERS = {
    "my.toml": OwnFile.read,
    "experiment.toml": Experiment.from_toml,
    "kto_vs_dpo.toml": read_comparison,
    "baselines.toml": read_comparison,
}
"""What reads each file of a guide; a mistake in it is an error."""


@pytest.mark.parametrize("page", GUIDES)
def test_files_of_a_guide_are_what_their_names_say(page, tmp_path):
    files = [(file_name(code), code) for language, code in blocks(page) if language == "toml"]
    assert files
    for name, code in files:
        (tmp_path / name).write_text(code)
        READERS[name](tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "seeds"), tries(([("seeds = [0, 1, 2, 3, 4]", "seeds = [0, 1]")], 2), ([], 5))
)
def test_the_guide_of_research(tmp_path, changes, seeds):
    play("guide-research.md", tmp_path, changes)
    folder = tmp_path / "comparisons" / "kto_vs_dpo"
    results = json.loads((folder / "results.json").read_text())
    runs = [(arm["objective"], arm["runs"]) for arm in results["arms"]]
    assert runs == [("dpo", seeds), ("kto", seeds)]
    assert results["paired"][0]["units"] == seeds and (folder / "report.html").is_file()
    # What the page says can be published holds no text of a row.
    (row, *_) = builtin_examples("preferences", 1, np.random.default_rng(0))
    assert "asks in the" in row.prompt
    for name in ("experiment.toml", "run.json", "rounds.jsonl", "costs.jsonl"):
        assert "asks in the" not in (folder / "runs/dpo-fedavg-s0" / name).read_text()
    baselines = json.loads((tmp_path / "comparisons/baselines/results.json").read_text())
    assert [arm["name"] for arm in baselines["arms"]] == ["local", "fedavg", "prox"]


@pytest.mark.slow
def test_the_page_of_reproducibility(tmp_path):
    said = play("reproducibility.md", tmp_path)
    assert any("3 states, the first that differs: none" in text for text in said)
    first = json.loads((tmp_path / "first/summary.json").read_text())
    scores = json.loads((tmp_path / "evaluations/experiment/held_out.json").read_text())
    assert scores["evaluated"][0]["metrics"]["preference_accuracy"] == first["after"]


SITES = ("north", "south", "east")


class Federation:
    """The folders of a coordinator and three sites on this machine, and what runs in them."""

    def __init__(self, folder, model):
        self.folder, self.kept, self.runs = folder, [], None
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.changes = {
            "fed.example.org": "localhost",
            "9092": str(self.port),
            "server start": f"server start --host 127.0.0.1 --port {self.port}",
            "HuggingFaceTB/SmolLM2-135M": str(model),
            "/models/SmolLM2-135M": str(model),
            "max_length = 512": "max_length = 64",
            "rounds = 20": "rounds = 2",
        }
        for name in ("coordinator", *SITES):
            (folder / name).mkdir()

    def adapted(self, code):
        for before, after in self.changes.items():
            code = code.replace(before, after)
        return code

    def begin(self, line, place):
        """Start a command that goes on, in its place; its words are in NAME.log."""
        with (place / f"{line.split()[1]}.log").open("w") as log:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {line}"],
                cwd=place,
                env=environment(),
                stdout=log,
                stderr=log,
            )
        self.kept.append(process)
        return process

    def hand_over(self):
        """What parties send each other: public keys, the authority's certificate, the run's log."""
        home = self.folder / "coordinator"
        for name in SITES:
            site = self.folder / name
            if (site / "client.pub").is_file():
                shutil.copy(site / "client.pub", home / f"{name}.pub")
            if (home / "fedloom-server/ca.pem").is_file():
                shutil.copy(home / "fedloom-server/ca.pem", site / "ca.pem")
            if (home / "runs/experiment/summary.json").is_file():
                shutil.copytree(
                    home / "runs/experiment", site / "runs/experiment", dirs_exist_ok=True
                )

    def until(self, condition):
        ends = time.monotonic() + 600
        while not (found := condition()):
            assert time.monotonic() < ends
            time.sleep(0.5)
        return found

    def command(self, line, place):
        if line.startswith("fedloom server start"):
            self.begin(line, place)
            self.until(lambda: "clients can join" in (place / "server.log").read_text())
        elif line.startswith("fedloom client join"):
            client = self.begin(line, place)
            self.until(lambda: (place / "fedloom-client").is_dir() or client.poll() is not None)
            assert client.poll() is None, (place / "client.log").read_text()
        elif line.startswith("fedloom run"):
            self.runs = self.begin(line, place)
        elif line.startswith("fedloom client approve 3f2a"):
            run = self.until(lambda: self.waiting(place))
            assert "is approved" in shell(f"fedloom client approve {run}", place, input="y\n")
        else:
            if line.startswith("fedloom audit verify"):
                assert self.runs.wait(600) == 0, (place / "run.log").read_text()
                self.hand_over()
            shell(line, place)

    def waiting(self, place):
        found = re.search(r"^ *([0-9a-f]{8})\b", shell("fedloom client approve", place), re.M)
        return found and found[1]


@pytest.mark.slow
@pytest.mark.serial
def test_the_guide_of_a_private_deployment(tmp_path, model_folder):
    page = blocks("guide-private-deployment.md")
    (sample,) = [json.loads(code) for language, code in page if language == "json"]
    assert sample.keys() == {"prompt", "completion"}
    federation = Federation(tmp_path, model_folder)
    home = tmp_path / "coordinator"
    for place in (*(tmp_path / name for name in SITES), home):
        rows = [
            {"prompt": f"{place.name} {n}?", "completion": f" box {n} is here"} for n in range(20)
        ]
        name = "held_out.jsonl" if place == home else "rows.jsonl"
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        for language, code in page:
            code = federation.adapted(code)
            if language == "toml":
                role = "coordinator" if file_name(code) == "experiment.toml" else "site"
                for place in [home] if role == "coordinator" else [tmp_path / s for s in SITES]:
                    (place / file_name(code)).write_text(code)
            elif language == "python":
                (home / file_name(code)).write_text(code)
                shell(f"python {file_name(code)}", home)
            elif language == "sh":
                first, *lines = code.splitlines()
                federation.hand_over()
                places = {"# coordinator": [home], "# site": [tmp_path / s for s in SITES]}[first]
                for place in places:
                    for line in lines:
                        federation.command(line.partition(" #")[0].strip(), place)
        for process in federation.kept:
            process.wait(120)
    finally:
        for process in federation.kept:
            process.kill()
            process.wait()
    assert (home / "merged/model.safetensors").is_file()
    lines = (home / "runs/experiment/rounds.jsonl").read_text().splitlines()
    assert [json.loads(line).get("rejected", []) for line in lines] == [[], [], []]
    # No text of a site's rows is in what the coordinator holds.
    texts = [path for path in home.rglob("*.json*") if path.name != "held_out.jsonl"]
    assert len(texts) > 5
    for path in texts:
        assert not any(f"{name} 7?" in path.read_text() for name in SITES), path
