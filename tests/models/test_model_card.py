"""What a model card says, of hand-made facts and of folders that name their licence and origin."""

import ast
import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from fedloom.models.model_card import base_facts, card_text, licence_of, loading

FACTS = {
    "experiment": "run",
    "client": None,
    "base": {
        "path": "acme/base", "name": "acme/base", "hub": True, "revision": "abc1",
        "sha256": "5f", "licence": "apache-2.0",
    },
    "objective": "dpo", "method": "fedavg", "adapter": "lora", "rounds": 3, "clients": 5,
    "precision": "fp32", "quantization": "none", "dtype": "float32", "task": "causal",
    "own_code": False, "tokenizer_of_base": True, "classes": [], "versions": {"peft": "0.21.2"},
    "prompt": {"format": "plain", "example": "Q: {question}\nA:{answer}", "template": None},
    "evaluation": {"metric": "loss", "before": 2.0, "after": None, "rows": "9 held-out rows"},
}  # fmt: skip


def test_the_hub_reads_the_front_matter():
    data = ModelCard(card_text(FACTS, "peft")).data
    assert data.base_model == "acme/base" and data.license == "apache-2.0"
    assert data.library_name == "peft" and data.pipeline_tag == "text-generation"
    assert data.tags == ["fedloom", "federated-learning", "dpo", "fedavg", "lora"]


def test_a_folder_of_this_machine_is_no_model_of_the_hub():
    base = {**FACTS["base"], "hub": False, "path": "/a b/base", "licence": "A licence: ours"}
    text = card_text({**FACTS, "base": base}, "peft")
    data = ModelCard(text).data
    assert data.base_model is None and data.license == "other"
    assert data.license_name == "A licence: ours"
    assert "in place of its path that of a folder with the SHA-256 below" in text and "`5f`" in text


def test_all_that_is_known_is_said():
    text = card_text(FACTS, "peft")
    for part in (
        "An adapter (lora, in PEFT's format), trained with the objective `dpo` by the federated method "
        "`fedavg`: 3 rounds, 5 clients, precision fp32.",
        "`acme/base` on the Hub, revision `abc1`. SHA-256 of weights, configuration and tokenizer: `5f`. "
        "Licence of the base: `apache-2.0`.",
        "```\nQ: {question}\nA:{answer}\n```",
        "On 9 held-out rows, measured by fedloom:",
        "| loss | 2.0000 | not measured |",
        "peft 0.21.2.",
    ):
        assert part in text


def test_four_lines_at_most_load_it():
    classes = {**FACTS, "task": "classification", "classes": ["no", "yes"], "dtype": "bfloat16"}
    assert loading(classes, "peft").splitlines() == [
        "from peft import PeftModel",
        "from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer",
        'base = AutoModelForSequenceClassification.from_pretrained("acme/base", revision="abc1", '
        'dtype="bfloat16", config=AutoConfig.from_pretrained("classifier.json"))',
        'model, tokenizer = PeftModel.from_pretrained(base, "."), '
        'AutoTokenizer.from_pretrained("acme/base", revision="abc1")',
    ]
    own = loading({**FACTS, "client": 3}, "own parts")
    assert own.splitlines()[-1] == 'model, tokenizer = load(".", base="acme/base")'
    assert "trust_remote_code=True" in loading({**FACTS, "own_code": True}, "model")
    for kind in ("model", "peft", "own parts", "experts"):
        assert len(loading(FACTS, kind).splitlines()) <= 4


def test_no_text_of_the_facts_ends_a_string_of_the_code():
    bad = 'x"); __import__("os").system("id"); ("\\'
    facts = {**FACTS, "base": {**FACTS["base"], "path": bad, "revision": bad}, "dtype": bad}
    for kind, client in (("model", None), ("peft", None), ("own parts", 3), ("experts", None)):
        tree = ast.parse(loading({**facts, "client": client}, kind))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert "__import__" not in names
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert bad in texts


def test_names_are_no_markup():
    """Classes and templates hold what somebody wrote, code fences too."""
    prompt = {**FACTS["prompt"], "example": "````\n# no heading"}
    classes = ["```", "</script>", "a\nb"]
    text = card_text(
        {**FACTS, "experiment": "a*b\n# c", "prompt": prompt, "classes": classes}, "peft"
    )
    assert "# a\\*b\\\\n\\# c" in text and "\n`````\n````\n# no heading\n`````\n" in text
    block = text.split("````json\n")[1].split("\n````")[0]
    assert json.loads(block) == classes


def test_a_licence_is_what_the_files_say(tmp_path):
    assert licence_of(tmp_path) is None
    (tmp_path / "LICENSE.txt").write_text("\n  Our Model Licence 2.0\nYou may\n")
    assert licence_of(tmp_path) == "Our Model Licence 2.0"
    (tmp_path / "README.md").write_text("# no front matter\nlicense: mit\n---\n---\n")
    assert licence_of(tmp_path) == "Our Model Licence 2.0"
    (tmp_path / "README.md").write_text('---\ntags:\n- a\nlicense: "llama3.1"\n---\n# Model\n')
    assert licence_of(tmp_path) == "llama3.1"


def test_a_model_of_the_hubs_cache_has_its_name_and_commit(model_folder, tmp_path):
    folder = tmp_path / "models--acme--tiny-model" / "snapshots" / "0123abcd"
    shutil.copytree(model_folder, folder)
    found = base_facts(str(folder), None)
    assert (found["name"], found["path"]) == ("acme/tiny-model", "acme/tiny-model")
    assert found["hub"] and found["revision"] == "0123abcd" and len(found["sha256"]) == 64


@pytest.mark.parametrize("revision", [None, "main"])
def test_a_name_that_is_nowhere_here_is_the_hubs(revision):
    found = base_facts("acme/not-here", revision)
    assert found["hub"] and found["revision"] == revision
    assert found["sha256"] is None and found["licence"] is None


def test_a_folder_is_found_from_anywhere(model_folder, monkeypatch):
    monkeypatch.chdir(model_folder.parent)
    found = base_facts(model_folder.name, None)
    assert Path(found["path"]) == model_folder.resolve() and not found["hub"]
    assert found == base_facts(str(model_folder), "main", found["sha256"])
