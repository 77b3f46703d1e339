"""Methods, objectives, sources and judges of others: the page's own code, what is refused, and what a client imports."""

import json
import re
import shutil
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

import fedloom
from fedloom.commands.main import main
from fedloom.deployment.client_file import OwnData, OwnFile
from fedloom.deployment.policy import PolicySettings
from fedloom.deployment.policy_enforcement import examine, open_methods
from fedloom.errors import (
    CheckpointError,
    JudgeError,
    MessageError,
    OutputError,
    PluginError,
    PolicyError,
    RoundFailed,
    SettingsError,
)
from fedloom.evaluation.judges.choose import JUDGES, make_judges
from fedloom.evaluation.verdicts import JudgingSettings
from fedloom.experiment.experiment import Experiment
from fedloom.methods import METHODS
from fedloom.objectives import OBJECTIVES
from fedloom.objectives.dpo import DPO, DPOSettings
from fedloom.runs.observers import Silent
from fedloom.runs.partitioning import SOURCES, partition_data
from fedloom.runs.run import resume_run, run_experiment
from fedloom.settings import plugins
from fedloom.tensors import part_of
from loopback import builtin, client_file

PAGE = (Path(__file__).parents[2] / "docs" / "write_a_method.md").read_text(encoding="utf-8")
METHOD, BY_HAND = re.findall(r"```python\n(.*?)```", PAGE, re.S)
EXPERIMENT = re.search(r"```toml\n(.*?)```", PAGE, re.S)[1]
NAME = "feddyn:FedDyn"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder outside the package with the page's file, which is the current one."""
    own = tmp_path / "mine"
    own.mkdir()
    (own / "feddyn.py").write_text(METHOD)
    monkeypatch.chdir(own)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield own
    forget()


def forget():
    """Let another process begin."""
    sys.modules.pop("feddyn", None)
    for choice in (METHODS, OBJECTIVES, SOURCES, JUDGES):
        choice._found.clear()


def test_the_page_s_experiment_is_one(folder):
    (folder / "mine.toml").write_text(EXPERIMENT)
    own = Experiment.from_toml("mine.toml").method
    assert (own.name, own.alpha) == (NAME, 0.2)
    assert Experiment.from_toml("mine.toml", [f"method.name={NAME}"]).to_table()["method"] == {
        "name": NAME,
        "alpha": 0.2,
    }


def test_the_page_s_round_by_hand(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    exec(compile(BY_HAND, "by hand", "exec"), {})  # it asserts


def test_the_page_s_method_does_what_its_paper_says(folder, play):
    """One coordinate and step by step: client k steps w -= .1 (w - t_k - g_k + alpha (w - w_t))."""
    settings, kind = METHODS[NAME]
    found = play(kind(settings(name=NAME, alpha=0.5)), rounds=3)
    w, h, slopes, targets = 0.0, 0.0, [0.0, 0.0], (1.0, 3.0)
    for adapter in found.adapters:
        trained = []
        for k, target in enumerate(targets):
            own = w
            for _ in range(2):
                own -= 0.1 * (own - target - slopes[k] + 0.5 * (own - w))
            slopes[k] -= 0.5 * (own - w)
            trained.append(own)
        h -= 0.5 / 2 * sum(own - w for own in trained)
        w = sum(trained) / 2 - h / 0.5
        assert adapter[0] == pytest.approx(w)


def test_the_page_s_method_with_a_client_that_is_away(folder, play):
    """Three clients, two rounds, the second of them away in the first: m stays 3, its g stays 0."""
    settings, kind = METHODS[NAME]
    rows, absent = {0: 1, 1: 3, 2: 2}, {1: {1}}
    found = play(
        kind(settings(name=NAME, alpha=0.5)), 2, (0, 1, 2), steps=1, rows=rows, absent=absent
    )
    # Targets 1, 3 and -2, one step of rate 0.1 on w - t - g + 0.5 (w - w_t), the last of which is 0.
    # Round 1 from w = 0, clients 0 and 2: w_0 = 0.1, w_2 = -0.2, so g_0 = -0.05 and g_2 = 0.1;
    # h = -0.5 / 3 (0.1 - 0.2) = 1/60, w = -0.05 - (1/60) / 0.5 = -1/12.
    # Round 2, all three: w_k - w = -0.1 (w - t_k - g_k), which is 1/120 + 0.1 (t_k + g_k):
    # 1/120 + 0.095, 1/120 + 0.3 and 1/120 - 0.19, in all 0.23;
    # h = 1/60 - 0.5 / 3 * 0.23 = -13/600, w = -1/12 + 0.23 / 3 + (13/600) / 0.5 = 11/300.
    first, second = (adapter[0] for adapter in found.adapters)
    assert first == pytest.approx(-1 / 12) and second == pytest.approx(11 / 300)
    slopes = [float(found.kept[k]["slope"]["lora_w"][0]) for k in range(3)]
    moved = [1 / 120 + 0.095, 1 / 120 + 0.3, 1 / 120 - 0.19]
    before = [-0.05, 0.0, 0.1]
    assert slopes == pytest.approx([g - 0.5 * d for g, d in zip(before, moved, strict=True)])
    drift = float(part_of(found.states[-1].tensors, "drift")["lora_w"][0])
    assert drift == pytest.approx(-13 / 600) and drift == pytest.approx(sum(slopes) / 3)


def test_it_runs_and_a_resume_with_another_file_is_refused(folder, table):
    run = fedloom.run(Experiment.from_table({**table, "method": {"name": NAME}}))
    record = json.loads((run.folder / "run.json").read_text())
    assert record["method"] == NAME and record["method_role"]["title"] == "FedDyn"
    assert [own["key"] for own in record["sections"]] == ["drift", "distance"]
    (own,) = record["plugins"].values()
    assert (own["module"], own["name"], own["file"]) == (
        "feddyn",
        "FedDyn",
        str(folder / "feddyn.py"),
    )
    fedloom.resume(run.folder)  # it is done, and the same
    forget()  # a report imports nothing
    page = fedloom.report(run.folder, to=run.folder / "own.html").read_text()
    assert "feddyn" not in sys.modules
    rounds = [json.loads(line) for line in (run.folder / "rounds.jsonl").read_text().splitlines()]
    went = [own["details"]["distance"]["0"] for own in rounds[1:]]
    cells = "".join(f"<td>{value:.4g}</td>" for value in went)
    assert f"<tr><td>0</td>{cells}</tr>" in page and "How far clients went</h2>" in page
    assert "What the server keeps</h2>" in page and "Norm of h." in page
    assert all(own["details"]["drift"] > 0 for own in rounds[1:])
    forget()
    (folder / "feddyn.py").write_text(METHOD + "# changed\n")
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    words = r"was begun with another method.name = 'feddyn:FedDyn': its file had SHA-256"
    with pytest.raises(CheckpointError, match=words):
        resume_run(run.folder)
    forget()
    (folder / "feddyn.py").unlink()
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    with pytest.raises(
        SettingsError, match="there is no module feddyn here: install it, or start fedloom in"
    ):
        resume_run(run.folder)


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("gone_module:X", None, "there is no module gone_module here"),
        ("feddyn:FedDin", METHOD, "module feddyn has no class 'FedDin'; did you mean 'FedDyn'?"),
        (
            "feddyn:zeros",
            METHOD,
            "feddyn:zeros is not a subclass of fedloom.methods.contract.method.Method",
        ),
        (NAME, "1 / 0", "its module feddyn cannot be imported: ZeroDivisionError: division by zero"),
        (NAME, METHOD.replace('taken = ("alpha",)', ""), "method.alpha is in none of its taken, bounded and named_models"),
        (NAME, METHOD.replace("reveals = ADAPTERS_ALONE", ""), "it must define reveals"),
        (NAME, METHOD.replace("= ADAPTERS_ALONE", "= {'gradients'}"), "its reveals must be a set of some of activations, adapters"),
        (NAME, METHOD.replace("= ADAPTERS_ALONE", "= 'adapters'"), "its reveals must be a set of some of"),
        (NAME, METHOD.replace("declares = Declaration(", "declares = dict("), "its declares must be a fedloom.methods.declaration.Declaration"),
        (NAME, METHOD.replace('taken = ("alpha",)', 'taken = ("alpha")'), "its taken is a text: it must be a tuple of names"),
        (NAME, METHOD.replace('taken = ("alpha",)', 'taken = ("alpha", "alfa")'), "'alfa' in its taken, bounded or named_models is none of its settings: did you mean 'alpha'? allowed: alpha"),
        (NAME, METHOD.replace("def round(", "def rounds("), "it must define round"),
        (NAME, METHOD.replace('("line_chart"', '("pie"'), "its section 'What the server keeps' is of kind 'pie'; allowed: line_chart, client_table, client_draws"),
        (NAME, METHOD.replace('key="drift"', 'key=""'), "must have a title, and the key of the rounds' details it shows"),
        (NAME, METHOD.replace("    sections = (", "    sections = [1]\n    other = ("), "its sections must be a tuple of SectionSpec(kind, title, text, key), got [1]"),
        (NAME, METHOD.replace("def handlers(", "def handler("), "it must define handlers"),
        (NAME, METHOD.replace("Settings = FedDynSettings", "Settings = dict"), "its Settings must subclass NamedSettings"),
        ("mydyn", METHOD, "allowed: apfl, appa, centralised"),
    ],
)  # fmt: skip
def test_a_class_that_cannot_be_used_is_one_clear_line(folder, name, code, words):
    (folder / "feddyn.py").write_text(code or "")
    with pytest.raises(SettingsError) as caught:
        Experiment.from_table({"method": {"name": name}})
    (problem,) = caught.value.problems
    assert problem.startswith(f"method.name = {name!r}: ") and words in problem
    assert "\n" not in problem


def test_figures_that_json_has_no_form_for_are_one_clear_line(folder, table):
    wrong = METHOD.replace("= norm(drift)", "= drift")
    (folder / "feddyn.py").write_text(wrong)
    with pytest.raises(OutputError) as caught:
        fedloom.run(Experiment.from_table({**table, "method": {"name": NAME}}))
    assert "rounds.jsonl: Object of type Tensor is not JSON serializable; records" in str(
        caught.value
    )
    assert str(caught.value).endswith("give the .tolist() of a tensor")


def test_its_settings_are_checked_like_ours(folder):
    with pytest.raises(SettingsError) as caught:
        Experiment.from_table({"method": {"name": NAME, "alpha": 0, "flavour": 1, "mu": 1}})
    told = " ".join(caught.value.problems)
    assert "method.alpha = 0" in told and "method.flavour: unknown key" in told
    assert (
        "method.mu is a setting of fedprox and fednova and moon; method.name is 'feddyn:FedDyn'"
        in told
    )
    with pytest.raises(SettingsError, match="puts updates together in a way of its own"):
        Experiment.from_table({"method": {"name": NAME}, "aggregation": {"rule": "median"}})


def test_an_entry_point_has_a_short_name(folder, monkeypatch):
    points = [EntryPoint("mydyn", NAME, METHODS.group), EntryPoint("fedavg", NAME, METHODS.group)]
    monkeypatch.setattr(
        plugins, "entry_points", lambda group: EntryPoints(p for p in points if p.group == group)
    )
    experiment = Experiment.from_table({"method": {"name": "mydyn"}})
    assert type(experiment.method).__name__ == "FedDynSettings"
    assert (
        type(Experiment.from_table({"method": {"name": "fedavg"}}).method).__name__
        == "FedAvgSettings"
    )  # ours first
    with pytest.raises(SettingsError, match=r"allowed: .*mydyn"):
        Experiment.from_table({"method": {"name": "mydin"}})
    points.append(EntryPoint("mydyn", "other:FedDyn", METHODS.group))
    METHODS._found.clear()
    with pytest.raises(SettingsError, match="both install it: name the class"):
        Experiment.from_table({"method": {"name": "mydyn"}})


def own_file(**policy):
    data = OwnData(source="rows.jsonl", kind="preference")
    return OwnFile(data=data, policy=PolicySettings(models=["tiny"], **policy))


@pytest.mark.parametrize("section", ["method", "objective"])
def test_a_server_makes_no_client_import_what_its_file_does_not_name(folder, section):
    (folder / "feddyn.py").write_text("import pathlib\npathlib.Path('imported').touch()\n")
    text = f'[{section}]\nname = "feddyn:FedDyn"\n[data]\nsource = "a.jsonl"\nkind = "preference"\n'
    for policy in ({}, {f"{section}s": ["fedavg", "dpo", "feddyn:Other", "feddyn"]}):
        own = own_file(**policy)
        with pytest.raises(
            PolicyError,
            match=f"nothing is imported that policy.{section}s of this client's file does not name. Once "
            rf'its code has been read here, {section}s = \["feddyn:FedDyn"\] in \[policy\] allows it',
        ):
            examine(text, own, 0)
        assert "feddyn" not in sys.modules and not (folder / "imported").exists()
    assert NAME not in open_methods(own_file())
    assert open_methods(own_file(methods=["fedavg", NAME])) == [NAME, "fedavg"]
    assert "feddyn" not in sys.modules
    assert PolicySettings(methods=[NAME]).names("method", NAME)


def test_a_client_takes_over_what_its_file_names(folder):
    text = (
        f'[method]\nname = "{NAME}"\nalpha = 0.7\n[data]\nsource = "a.jsonl"\nkind = "preference"\n'
    )
    own = own_file(methods=[NAME])
    found = examine(text, own, 0)
    assert not found.refusals and found.experiment.method.alpha == 0.7
    (folder / "feddyn.py").unlink()
    forget()
    with pytest.raises(PolicyError, match="there is no module feddyn here"):
        examine(text, own, 0)


def test_an_objective_of_others(folder, table):
    (folder / "feddyn.py").write_text(
        "from fedloom.objectives.dpo import DPO, DPOSettings\n"
        "from fedloom.settings.schema import NamedSettings\n"
        "class MineSettings(DPOSettings):\n    name: str = ''\n    beta: float = 0.3\n"
        "class Mine(DPO):\n    Settings = MineSettings\n"
        "from fedloom.objectives.base import Objective\nclass Nothing(Objective):\n    pass\n"
    )
    experiment = Experiment.from_table({**table, "objective": {"name": "feddyn:Mine"}})
    assert experiment.objective.beta == 0.3 and issubclass(OBJECTIVES["feddyn:Mine"][1], DPO)
    assert issubclass(type(experiment.objective), DPOSettings)
    with pytest.raises(SettingsError, match=r"'feddyn:Nothing': .*: it must define loss"):
        Experiment.from_table({"objective": {"name": "feddyn:Nothing"}})
    with pytest.raises(
        SettingsError, match=r"objective.name = 'feddyn:Mine' needs preference data"
    ):
        Experiment.from_table(
            {"objective": {"name": "feddyn:Mine"}, "data": {"source": "builtin:labelled"}}
        )


FIGURE = METHOD.replace("result.metrics)", '{**result.metrics, "slope_norm": 2.0})')
NUMBER = 'metrics=(NumberSpec("slope_norm", 0.0, 9.0),)'


def test_a_figure_of_clients_is_declared_where_it_is_asked_for(folder, play):
    (folder / "feddyn.py").write_text(FIGURE)
    settings, kind = METHODS[NAME]
    with pytest.raises(
        MessageError, match=r"\['slope_norm'\] are not declared: .*metrics=\(NumberSpec"
    ):
        play(kind(settings(name=NAME)), rounds=1)
    forget()
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    declared = FIGURE.replace("(cohort, start)", f"(cohort, start, {NUMBER})")
    (folder / "feddyn.py").write_text(f"from fedloom.wire.schema import NumberSpec\n{declared}")
    settings, kind = METHODS[NAME]
    assert len(play(kind(settings(name=NAME)), rounds=1).states) == 1


SLIPS = {
    "a settings' name": ("self.alpha = settings.alpha", "self.alpha = settings.alfa", PluginError, "feddyn:FedDyn failed: AttributeError: .*feddyn.py, line {}, in __init__"),
    "the server's step": ("share = len(trained)", "share = 1 / 0", PluginError, "feddyn:FedDyn failed: ZeroDivisionError: division by zero .*feddyn.py, line {}, in round"),
    "the client's step": ("client.model.write(start)", 'start["gone"]', RoundFailed, r"client 0, client 1, client 2: KeyError: 'gone' \(.*feddyn.py, line {}, in _train\)"),
    "no settings taken": ("def __init__(self, settings: FedDynSettings) -> None:", "def __init__(self, *, settings=FedDynSettings(name='x')) -> None:", PluginError, "feddyn:FedDyn: too many positional arguments: it must define __init__"),
    "no payload": ("return Payload(trained,", "return (trained,", RoundFailed, "client 0, client 1, client 2: the handler of 'train' returned a tuple: it must return Payload"),
    "a number kept": ("client.store[SLOPE] = {", 'client.store["n"] = 1.0; client.store[SLOPE] = {', RoundFailed, "in client.store\\['n'\\], there is a float where there must be a dictionary"),
    "a slot's name": ("client.store[SLOPE] = {", 'client.store["a|b"] = {}; client.store[SLOPE] = {', RoundFailed, "the name of a slot holds no '|'"),
    "other names": ("return Payload(trained,", 'return Payload({"x." + n: t for n, t in trained.items()},', RoundFailed, "a payload lacks the tensors .* and has 'x.base_model"),
    "other action": ('{"train": self', '{"fit": self', RoundFailed, "there is no action 'train': the method's handlers.. has evaluate, fit, "),
    "not finite": ("adapter = {n: t - drift[n] / self.alpha", "adapter = {n: t / 0", RoundFailed, "FedDyn: round.* made NaN or infinity of the answers"),
    "nothing returned": ("return State(join_parts(adapter=adapter, drift=drift))", "pass", PluginError, "round.* returned nothing: it must return State"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_in_a_class_is_one_error_that_says_where(folder, table, slip):
    old, new, kind, words = SLIPS[slip]
    code = METHOD.replace(old, new)
    assert code != METHOD
    (folder / "feddyn.py").write_text(code)
    line = next(n for n, text in enumerate(code.splitlines(), 1) if new.splitlines()[0] in text)
    with pytest.raises(kind, match=words.replace("{}", str(line))) as caught:
        fedloom.run(Experiment.from_table({**table, "method": {"name": NAME}}))
    assert "\n" not in str(caught.value)
    if kind is PluginError and "failed" in words:
        assert caught.value.__cause__ is not None


def test_a_check_that_fails_is_no_traceback_on_the_command_line(folder, monkeypatch, capsys):
    broken = METHOD.replace(
        "    def __init__",
        "    @classmethod\n    def check(cls, view):\n        return 1 / 0\n\n    def __init__",
    )
    (folder / "feddyn.py").write_text(broken)
    (folder / "mine.toml").write_text(EXPERIMENT)
    monkeypatch.setattr(sys, "argv", ["fedloom", "run", "mine.toml"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith("fedloom: feddyn:FedDyn failed: ZeroDivisionError: division by zero (")
    assert told.endswith("in check): correct it there")


@pytest.mark.slow
def test_between_machines_it_gives_the_same_bits(folder, suited, loopback, tmp_path):
    shared = {**suited("fedavg"), "method": {"name": NAME}}
    here = Experiment.from_table({**shared, "output": {"folder": str(tmp_path / "here")}})
    there = Experiment.from_table({**shared, "output": {"folder": str(tmp_path / "there")}})
    fedloom.run(here)
    federation = loopback(3)
    policy = {"methods": [NAME]}
    own = {
        n: client_file(tmp_path / f"{n}.toml", builtin(there), federation.models, policy)
        for n in range(3)
    }
    run_experiment(there, observer=Silent(), remote=federation.engine(there, federation.mail(own)))
    one, two = (
        tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("here", "there")
    )
    assert one.read_bytes() == two.read_bytes()


SOURCE = """
import hashlib
from fedloom.data.examples import Preference
from fedloom.data.loading import LoadedData

class Rows:
    def __init__(self, settings):
        self.count = settings.max_rows
    def load(self, rng):
        rows = [Preference(i, f"question {i}", f"good {i}", f"bad {i}") for i in range(self.count)]
        return LoadedData(rows[8:], rows[:8], "preference", hashlib.sha256(repr(rows).encode()).hexdigest())

class Nothing:
    pass
"""


def test_a_source_of_others(folder, table):
    (folder / "feddyn.py").write_text(SOURCE)
    data = {"source": "feddyn:Rows", "kind": "preference", "max_rows": 48}
    run = fedloom.run(Experiment.from_table({**table, "data": data}))
    record = json.loads((run.folder / "run.json").read_text())
    assert record["data"]["global_held_out"] == 8 and record["plugins"]["data"]["name"] == "Rows"
    forget()
    (folder / "feddyn.py").write_text(SOURCE + "# changed\n")
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    with pytest.raises(
        CheckpointError, match=r"was begun with another data.source = 'feddyn:Rows'"
    ):
        resume_run(run.folder)
    with pytest.raises(
        SettingsError,
        match=r"data.source = 'feddyn:Nothing': feddyn:Nothing: it must define load\(rng\)",
    ):
        partition_data(Experiment.from_table({"data": {**data, "source": "feddyn:Nothing"}}))


JUDGE = """
from fedloom.evaluation.judges.base import Verdict

class Short:
    name, compares, scale = "short", False, (0.0, 1.0)
    def __init__(self, settings):
        self.seed = settings.seed
    def check(self):
        pass
    def costs(self):
        return {}
    def rate(self, cases):
        return [Verdict(tuple(float(len(a) < 9) for a in case.answers)) for case in cases]

class Silent:
    name = "silent"
"""


def test_a_judge_of_others(folder):
    (folder / "feddyn.py").write_text(JUDGE)
    (judge,) = make_judges(["feddyn:Short"], JudgingSettings(seed=3))
    assert judge.seed == 3 and JUDGES.of_class(type(judge)).module == "feddyn"
    with pytest.raises(
        JudgeError,
        match="judge 'feddyn:Silent': feddyn:Silent: it must define compares and scale and check and rate and costs",
    ):
        make_judges(["feddyn:Silent"], JudgingSettings())
    with pytest.raises(
        JudgeError, match="judge 'gone_module:X': there is no module gone_module here"
    ):
        make_judges(["gone_module:X"], JudgingSettings())
