"""Every example runs as its first lines say, and shows what it promises."""

import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fedloom.commands import main
from sampling import drawn

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
FILES = sorted(p.name for p in EXAMPLES.iterdir() if p.suffix in {".py", ".sh", ".toml"})
BY_HAND = {
    "fedavg_by_hand.py": "test_by_hand.py",
    "activation_inversion.py": "test_activation_inversion.py",
}
"""Examples that have a test file of their own."""

QUICK = ("csv_columns.py", "own_source.py", "partition_picture.toml", "three_sites.py")
"""Of which two are tried with every commit: under two seconds each once torch is there."""

DEFAULT = set(drawn("examples").sample(QUICK, 2))

SLOW = set(drawn("slow examples").sample(FILES, 8))
"""Examples that the slow suite runs; the full one runs all."""


def record(folder, name="summary.json"):
    return json.loads(Path(folder, name).read_text())


def improved(own):
    assert own["result"].metrics["loss"] < own["result"].metrics_before["loss"] - 1


def classified(own):
    assert record("runs/classification")["after"] > 0.2  # eight classes: 0.125 by chance


def preferred(folder):
    summary = record(folder)
    assert summary["before"] == 0.5
    assert summary["after"] > 0.55


def unrolled(own):
    results = list(own["results"].values())
    assert results[0].metrics["feedback_auc"] > 0.55
    assert all(r.metrics["preference_accuracy"] > 0.5 for r in results[1:])
    assert results[1].metrics != results[2].metrics  # spread is not together


def aligned(own):
    assert own["sft"].metrics["loss"] < own["sft"].metrics_before["loss"]
    assert own["before"] == 0.5 and own["after"] > 0.6


def compared(own):
    results = own["done"].results
    assert [(arm["objective"], arm["runs"]) for arm in results["arms"]] == [("dpo", 3), ("ipo", 3)]
    dpo, ipo = (arm["mean"] for arm in results["arms"])
    assert own["pair"]["difference"] == pytest.approx(ipo - dpo) and own["pair"]["units"] == 3
    assert own["done"].page.is_file()


def stopped(own):
    ended = len(own["losses"]) - 1
    assert 0 < ended < 6 and own["losses"][-1] > min(own["losses"])
    assert own["played"] == [*range(ended + 1, 7)]


def personal(own):
    def worst(method):
        return min(own["judged"][method].values())

    assert worst("fedpdpo") > worst("fedavg") + 0.15
    assert (own["folders"]["fedpdpo"] / "clients" / "0001" / "personal.safetensors").is_file()


def travelled(own):
    costs = own["costs"]
    sent = [costs[name]["bytes_up"] for name in ("logits", "adapters", "activations")]
    assert sent == sorted(sent) and sent[0] * 20 < sent[1]
    assert costs["activations"]["flops"] < costs["adapters"]["flops"] < costs["logits"]["flops"]


def mixed(own):
    assert sorted(p.name for p in Path("runs/mixture_of_experts/clients").iterdir()) == [
        "0000",
        "0001",
        "0002",
        "0003",
    ]


def scores(folder):
    (judge,) = record(f"{folder}/judged", "evaluation.json")["judges"]
    assert judge["models"]["base"]["mean"] < judge["models"]["experiment"]["mean"] == 1


def further(own):
    losses = own["losses"]
    assert losses[1.5] < losses[1.0] < losses[0.5]


def likelier(own):
    assert own["after"] > own["before"] + 0.1


def drawn_up(own):
    assert "</svg>" in Path("partition.svg").read_text()


def hidden(own):
    assert own["said"]["no noise"] is None
    assert 0 < own["said"]["epsilon 8"]["epsilon"] <= 8
    assert own["accuracy"]["no noise"] > 0.55


PROMISES = {
    "classification.toml": classified,
    "communication.py": travelled,
    "compare_seeds.py": compared,
    "csv_columns.py": improved,
    "early_stopping.py": stopped,
    "feedback_kto.py": unrolled,
    "merged_model.sh": lambda said: said.index("merged: Ada asks in the kitchen"),
    "mixture_of_experts.toml": mixed,
    "own_benchmark.sh": lambda said: scores("own_benchmark"),
    "own_judge.sh": lambda said: scores("own_judge"),
    "own_method.py": further,
    "own_objective.py": likelier,
    "own_source.py": improved,
    "partition_picture.toml": drawn_up,
    "personal_parts.py": personal,
    "plain_peft.py": lambda own: own["answer"].index("it is"),
    "preferences_dpo.toml": lambda own: preferred("runs/preferences_dpo"),
    "row_privacy.py": hidden,
    "report_of_runs.sh": lambda said: Path("report_of_runs/ranks.html").read_text().index("rank-8"),
    "sft_then_dpo.py": aligned,
    "three_sites.py": improved,
    "two_machines.sh": lambda said: said.index("lines are intact: 2 clients, 0 messages refused"),
}


def marked(name):
    if name in DEFAULT:
        return pytest.param(name)
    marks = [pytest.mark.full, *[pytest.mark.slow] * (name in SLOW)]
    marks += [pytest.mark.serial] * (name == "two_machines.sh")
    return pytest.param(name, marks=marks)


def test_every_example_has_a_test_and_a_line_in_the_table():
    assert len(FILES) >= 20
    assert sorted([*PROMISES, *BY_HAND]) == FILES
    listed = re.findall(r"^\| \[(\S+?)\]\((\S+?)\) \|", (EXAMPLES / "README.md").read_text(), re.M)
    assert sorted(link for _, link in listed) == FILES
    assert all(name == link for name, link in listed)
    for name, test in BY_HAND.items():
        assert name.removesuffix(".py") in (ROOT / "tests" / test).read_text()


def begun(name):
    """Return the line that the file says it is begun with."""
    first = [line.strip("# ") for line in (EXAMPLES / name).read_text().splitlines()[:4]]
    (line,) = [line for line in first if f"examples/{name}" in line]
    return line


@pytest.mark.parametrize("name", [marked(name) for name in PROMISES])
def test_example(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(EXAMPLES)
    line = begun(name)
    if name.endswith(".py"):
        assert line == f"python examples/{name}"
        monkeypatch.syspath_prepend(EXAMPLES)
        shown = runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        sys.modules.pop(name.removesuffix(".py"), None)
    elif name.endswith(".toml"):
        monkeypatch.setattr(sys, "argv", line.split())
        with pytest.raises(SystemExit) as ended:
            main.main()
        assert ended.value.code == 0, capsys.readouterr().err
        shown = None
    else:
        shown = in_a_shell(line)
    PROMISES[name](shown)


def in_a_shell(line):
    """Run a script by the fedloom and the Python of this one; return what it shows."""
    folder = Path(sys.executable).parent
    assert shutil.which("fedloom", path=str(folder))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    own = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "PORT": str(port)}
    done = subprocess.run(
        line.split(), env={**os.environ, **own}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
