"""Code that comes with a model or a data set is never run: every loader is told so, and a model that needs
it is refused before anything of it is imported."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import transformers

import fedloom
from fedloom.data.hub import hub_rows
from fedloom.errors import DataError, ModelError
from fedloom.models.load import empty_backbone, load_backbone, load_tokenizer

LOADERS = {"from_pretrained", "from_config", "load_dataset", "HFLM"}
OF_PEFT = {"peft.PeftConfig", "peft.PeftModel"}
"""Read JSON and safetensors; they import nothing that an adapter's folder names."""

EVIL = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).write_text("run")
class OwnConfig(LlamaConfig):
    model_type = "{type}"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
REFUSED = "needs code of its own, which is never run"


def calls():
    examples = Path(__file__).parents[2] / "examples"
    for path in (*Path(fedloom.__file__).parent.rglob("*.py"), *examples.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr in LOADERS and ast.unparse(node.func.value) not in OF_PEFT:
                yield path.name, node


def test_every_call_of_a_loader_says_so():
    found = list(calls())
    assert {name for name, _ in found} == {
        "load.py",
        "verify.py",
        "hub.py",
        "harness.py",
        "fedavg_by_hand.py",
        "plain_peft.py",
    }
    for name, call in found:
        said = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert said.get("trust_remote_code") == "False", f"{name}: {ast.unparse(call)}"


def test_every_loader_is_told_so(model_folder, monkeypatch):
    import datasets

    told = []

    def watch(owner, name):
        real = getattr(owner, name)

        def watched(*arguments, **options):
            told.append((getattr(owner, "__name__", ""), options["trust_remote_code"]))
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    causal, classes = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
    for name in ("AutoConfig", "AutoTokenizer", causal, classes):
        watch(getattr(transformers, name), "from_pretrained")
    for name in (causal, classes):
        watch(getattr(transformers, name), "from_config")
    watch(datasets, "load_dataset")
    path = str(model_folder)
    load_tokenizer(path)
    for names in ((), ("a", "b")):
        load_backbone(path, pad_token_id=0, classes=names)
        empty_backbone(path, pad_token_id=0, classes=names)
    with pytest.raises(DataError):
        hub_rows("nobody/nothing", "train")
    assert {value for _, value in told} == {False}
    assert {name for name, _ in told} == {
        "AutoConfig",
        "AutoTokenizer",
        causal,
        classes,
        "datasets",
    }


@pytest.mark.slow
def test_the_harness_is_told_so(model_folder, monkeypatch):
    import lm_eval.models.huggingface

    from fedloom.evaluation.harness import run_harness

    class Told(Exception):
        pass

    def model(**options):
        raise Told(options["trust_remote_code"])

    monkeypatch.setattr(lm_eval.models.huggingface, "HFLM", model)
    monkeypatch.setattr("fedloom.evaluation.harness._check_known", lambda names, known: None)
    with pytest.raises(Told, match="False"):
        run_harness(None, str(model_folder), ["arc_easy"])


@pytest.fixture
def own_code(model_folder, tmp_path, monkeypatch):
    """A sound model whose configuration names code that leaves a mark when it is run."""
    modules = tmp_path / "modules"
    for name in ("transformers.dynamic_module_utils", "transformers.utils.hub"):
        monkeypatch.setattr(f"{name}.HF_MODULES_CACHE", str(modules), raising=False)

    def make(where, type="llama"):
        folder, marker = tmp_path / "own", tmp_path / "marker"
        shutil.copytree(model_folder, folder)
        (folder / "own.py").write_text(EVIL.format(marker=str(marker), type=type))
        path = folder / where
        content = json.loads(path.read_text())
        content["auto_map"] = {
            "AutoConfig": "own.OwnConfig",
            "AutoModelForCausalLM": "own.OwnModel",
            "AutoTokenizer": ["own.OwnModel", None],
        }
        if where == "config.json":
            content["model_type"] = type
        path.write_text(json.dumps(content))
        return folder, marker

    return make


@pytest.mark.parametrize(
    ("where", "type"),
    [("config.json", "llama"), ("config.json", "own"), ("tokenizer_config.json", "llama")],
)
def test_a_model_with_code_of_its_own_is_refused_and_nothing_of_it_is_run(own_code, where, type):
    folder, marker = own_code(where, type)
    loaders = (
        lambda: load_tokenizer(str(folder)),
        lambda: load_backbone(str(folder), pad_token_id=0),
        lambda: empty_backbone(str(folder), pad_token_id=0),
    )
    for load in loaders:
        with pytest.raises(ModelError, match=REFUSED):
            load()
    assert not marker.exists()


def test_the_code_would_run_if_it_were_let(own_code):
    folder, marker = own_code("config.json", "own")
    transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=True)
    assert marker.read_text() == "run"


@pytest.mark.parametrize("kind", ["says that it asks for it", "loads without"])
def test_a_model_on_the_hub_that_names_code_is_refused(monkeypatch, kind):
    config = transformers.LlamaConfig()
    config.auto_map = {"AutoConfig": "own.OwnConfig"}

    def load(*_, **options):
        if kind == "loads without":
            return config
        raise ValueError("please pass the argument `trust_remote_code=True` to allow custom code")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", load)
    with pytest.raises(ModelError, match=REFUSED):
        load_backbone("someone/something", pad_token_id=0)
