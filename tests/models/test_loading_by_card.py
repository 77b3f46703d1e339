"""A saved folder loads by the lines of its own card where there is no fedloom, and says what was trained."""

import json
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import fedloom
from fedloom.methods import METHODS
from fedloom.models.saved import kind_of, load
from fedloom.models.verify import outputs
from fedloom.runs import run as runner
from fedloom.runs.export import export
from fedloom.runs.verification import Verifier

ROOT = Path(__file__).parents[2]

BLOCKED = """
import sys
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fedloom":
            raise ImportError("fedloom is not here")
sys.meta_path.insert(0, Without())
"""

COLLEAGUE = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
try:
    import fedloom
except ImportError:
    print(json.dumps("no fedloom"), flush=True)
else:
    sys.exit("fedloom can be imported here")
import torch, transformers
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
for line in sys.stdin:
    folder, lines, rows = json.loads(line)
    os.chdir(folder)
    space = {}
    exec(lines, space)
    found = []
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            logits = space["model"](input_ids=ids).logits
        logps = logits.log_softmax(-1)[0]
        found.append(logps[:-1].gather(-1, ids[0, 1:, None])[:, 0] if logits.ndim == 3 else logps)
    config = space["model"].config
    assert space["tokenizer"]("Ada asks")["input_ids"]
    said = [list(map(float, row)) for row in found]
    print(json.dumps([said, {int(n): c for n, c in config.id2label.items()}]), flush=True)
"""

SUITED = {
    "fedamole": {"adapter": {"kind": "experts", "rank": 2, "experts": 4}},
    "fedlease": {"adapter": {"kind": "experts", "rank": 2, "experts": 4, "router": "linear"}},
    "fedmoe": {"adapter": {"kind": "submixture", "rank": 8}},
    "distillation": {
        "objective": {"name": "classification"},
        "data": {"source": "builtin:labelled"},
    },
    "split": {"objective": {"name": "classification"}, "data": {"source": "builtin:labelled"}},
    "fedgrpo": {
        "data": {"source": "builtin:sums"},
        "objective": {"name": "grpo", "group": 3, "max_new_tokens": 3},
        "public": {"rows": 8},
    },
    "hilora": {"federation": {"rounds": 3}},
    "classification": {"method": {"name": "fedavg"}, "objective": {"name": "classification"}},
    "ia3": {"method": {"name": "fedavg"}, "adapter": {"kind": "ia3", "rank": 8}},
}
SUITED["classification"]["data"] = {"source": "builtin:labelled"}
SUITED["distillation"]["public"] = {"rows": 8}
SUITED["split"]["public"] = {"rows": 8}
SUITED["fed_et"] = SUITED["feddm"] = SUITED["distillation"]


def lines_of(folder):
    (found,) = re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(found.splitlines()) <= 4
    return found


@contextmanager
def colleague(python, opening, place):
    """Start a process that loads folders by their cards; yield how it is asked."""
    place.mkdir()
    own = {"HF_MODULES_CACHE": str(place / "modules"), "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    with (place / "errors").open("w") as errors, subprocess.Popen(
        [str(python), "-c", opening + COLLEAGUE], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=errors, text=True, cwd=place, env={**os.environ, **own},
    ) as process:  # fmt: skip

        def answer():
            line = process.stdout.readline()
            assert line, (place / "errors").read_text()[-3000:]
            return json.loads(line)

        def ask(folder, rows):
            process.stdin.write(json.dumps([str(folder), lines_of(folder), rows]) + "\n")
            process.stdin.flush()
            said, names = answer()
            return [torch.tensor(row) for row in said], {int(n): name for n, name in names.items()}

        assert answer() == "no fedloom"
        yield ask
        process.stdin.close()


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Load by cards in a process of this environment in which fedloom cannot be imported."""
    with colleague(sys.executable, BLOCKED, tmp_path_factory.mktemp("here") / "colleague") as ask:
        yield ask


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Load by cards in a fresh virtual environment: transformers, peft and what they need."""
    place = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", str(place / "venv")], check=True)
    python = place / "venv" / "bin" / "python"
    words = ["-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([str(python), *words, "transformers", "peft"], check=True)
    with colleague(python, "", place / "colleague") as ask:
        yield ask


@pytest.fixture
def trained(experiment, monkeypatch, mixture_folder):
    """Run a small experiment; return its result and what its models said when they were saved."""

    def run(name):
        made = []

        def verifier(*given):
            made.append(Verifier(*given))
            return made[-1]

        monkeypatch.setattr(runner, "Verifier", verifier)
        sections = {"method": {"name": name}, **SUITED.get(name, {})}
        federation = {"rounds": 1, "clients": 2, **sections.pop("federation", {})}
        if name == "fedmoe":
            sections["model"] = {"path": str(mixture_folder)}
        if name == "split":
            sections["evaluation"] = {"per_client": False}
        result = fedloom.run(
            experiment(
                **sections, output={"verify": True}, federation=federation,
                training={"learning_rate": 1e-2, "local_steps": 2},
            )
        )  # fmt: skip
        return result, made[0].saved

    return run


def require_alike(ask, folder, one):
    said, names = ask(folder, one.rows.ids)
    for own, other in zip(one.said.rows, said, strict=True):
        assert torch.allclose(own, other, atol=1e-4)
    return names


@pytest.mark.slow
def test_an_adapter_and_an_export_load_by_their_cards(trained, here):
    result, (saved,) = trained("fedavg")
    require_alike(here, saved.folder, saved)
    require_alike(here, export(result.folder).folder, saved)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classification", "distillation", "fedpdpo", "fedmoe", "flora"])
def test_what_a_method_leaves_loads_by_its_card(trained, here, name):
    result, saved = trained(name)
    load_all(here, result.folder, saved)


@pytest.mark.full
@pytest.mark.parametrize("name", [*METHODS, "classification", "ia3"])
def test_in_a_fresh_environment(trained, elsewhere, name):
    result, saved = trained(name)
    load_all(elsewhere, result.folder, saved)


def load_all(ask, run, saved):
    """Load the global folder and the first client's; of one that needs fedloom, its export."""
    assert saved
    seen = set()
    for one in saved:
        kind = kind_of(one.folder)
        if one.client:  # clients are alike
            continue
        seen.add(kind)
        classes = json.loads((one.folder / "fedloom.json").read_text())["classes"]
        if kind == "own parts" and one.client is not None:
            assert "from fedloom" in lines_of(one.folder)
            require_alike(ask, export(run, one.client).folder, one)
        elif kind == "experts":
            assert "No other library than fedloom" in (one.folder / "README.md").read_text()
        else:
            names = require_alike(ask, one.folder, one)
            assert not classes or names == dict(enumerate(classes))
    assert seen


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedper", "fedamole"])
def test_what_needs_fedloom_loads_by_its_card_too(trained, monkeypatch, name):
    _, saved = trained(name)
    one = next(own for own in saved if own.client == 1)
    monkeypatch.chdir(one.folder)
    space = {}
    exec(lines_of(one.folder), space)
    found = outputs(space["model"], one.rows.ids, device=torch.device("cpu"))
    for own, other in zip(one.said.rows, found.rows, strict=True):
        assert torch.allclose(own, other, atol=1e-5)
    text = space["tokenizer"].decode(
        space["model"].generate(input_ids=torch.tensor([[1, 5]]), max_new_tokens=2)[0]
    )
    assert isinstance(text, str)
    assert load(one.folder)[0] is not space["model"]  # fedloom.json knows the base


def test_a_card_holds_facts_and_no_rows(experiment, rows_file):
    """Rows of the data are nowhere in a card or its facts, and PEFT's template is gone."""
    secret = [
        {"messages": [{"role": "user", "content": f"secret {n}"}, {"role": "assistant", "content": f"kept {n}"}]}
        for n in range(40)
    ]  # fmt: skip
    made = experiment(
        objective={"name": "sft"}, method={"name": "ditto"},
        data={"source": rows_file(secret), "kind": "instruction"},
        federation={"rounds": 1, "clients": 2}, training={"local_steps": 1},
    )  # fmt: skip
    folder = fedloom.run(made).folder
    cards = [*folder.glob("**/README.md"), *folder.glob("**/fedloom.json")]
    assert len(cards) == 6
    for path in cards:
        text = path.read_text()
        assert "secret" not in text and "kept" not in text
        assert "More Information Needed" not in text
    card = ModelCard.load(folder / "adapter" / "README.md")
    assert card.data.library_name == "peft" and "ditto" in card.data.tags
    assert "<s>user: {question}\nassistant:{answer}" in card.text
    summary = json.loads((folder / "summary.json").read_text())
    assert f"| {summary['before']:.4f} | {summary['after']:.4f} |" in card.text
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    facts = json.loads((folder / "adapter" / "fedloom.json").read_text())
    run = json.loads((folder / "run.json").read_text())
    assert config["base_model_name_or_path"] == facts["base"]["path"] == made.model.path
    assert facts["base"]["sha256"] == run["model"]["sha256"]
