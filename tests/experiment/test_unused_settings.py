"""Settings that do nothing are told, once each and with the reason; those that do something are not."""

import re
import tomllib
from pathlib import Path

import pytest

from fedloom.commands.starter_experiment import starting_file
from fedloom.errors import SettingsError
from fedloom.experiment.experiment import COMPARE, SECTIONS, Experiment
from fedloom.experiment.unused_settings import unread_in_all, unread_settings
from fedloom.runs.comparison import compare, read_comparison
from fedloom.runs.observers import Silent
from fedloom.runs.run import run_experiment
from fedloom.settings.schema import Of
from fedloom.settings.toml import read_toml
from observers import HeardOfComparison

ROOT = Path(__file__).parents[2]
LABELLED = {"data": {"source": "builtin:labelled"}, "objective": {"name": "classification"}}
SUMS = {"source": "builtin:sums"}
ALTERNATELY = {"method": {"name": "fedrep"}}

LION = dict.fromkeys(("beta1", "beta2"), " or 'lion'")

HIDDEN = {"unit": "client", "delta": 1e-3, "noise_multiplier": 1.0}
WORST = {"name": "appa", "combine": "worst"}

GRADED = {"data": SUMS, "objective": {"name": "grpo"}, "public": {"rows": 200, "labelled": True}}

CASES = {
    **{
        f"method.{key}": (
            {**GRADED, "method": {"name": "fedgrpo", key: value}},
            f"method.{key} = {told} does nothing: it is read where method.choose is 'competence', which is "
            "'random'",
            {**GRADED, "method": {"name": "fedgrpo", "choose": "competence", key: value}},
        )
        for key, value, told in (
            ("auxiliary", 40, "40"), ("nearest", 5, "5"), ("right", "number", "'number'"),
            ("weighting", "competence", "'competence'"),
        )
    },
    **{
        f"method.{key}": (
            {"method": {**WORST, key: value}},
            f"method.{key} = {value} does nothing: it is read where method.combine is {of!r}, which is "
            "'worst'",
            {"method": {"name": "appa", "combine": of, key: value}},
        )
        for key, value, of in (
            ("temperature", 0.2, "appa"), ("fair", 0.9, "appa"), ("rate", 0.3, "group_dro")
        )
    },
    **{
        f"method.{key}": (
            {"method": {"name": "appa", "combine": "mean", key: value}},
            f"method.{key} = {value} does nothing: it is read where method.combine is 'appa' or 'worst' or "
            "'group_dro', which is 'mean'",
            {"method": {"name": "appa", key: value}},
        )
        for key, value in (("most", 0.4), ("lowest", -1.0), ("highest", 1.0))
    },
    "training.loraplus_lr_ratio": (
        {"adapter": {"kind": "ia3"}, "training": {"loraplus_lr_ratio": 4.0}},
        "training.loraplus_lr_ratio = 4.0 does nothing: it is read where adapter.kind is 'lora', which is "
        "'ia3'",
        {"adapter": {"kind": "lora"}, "training": {"loraplus_lr_ratio": 4.0}},
    ),
    "objective.reference": (
        {"data": SUMS, "objective": {"name": "grpo", "reference": "base"}},
        "objective.reference = 'base' does nothing: objective.beta is 0",
        {"data": SUMS, "objective": {"name": "grpo", "reference": "base", "beta": 0.1}},
    ),
    "evaluation.metric_for_best_model": (
        {"evaluation": {"metric_for_best_model": "loss"}},
        "evaluation.metric_for_best_model = 'loss' does nothing: evaluation.load_best_model_at_end is not "
        "set",
        {"evaluation": {"metric_for_best_model": "loss", "early_stopping_patience": 2}},
    ),
    "evaluation.early_stopping_threshold": (
        {"evaluation": {"early_stopping_threshold": 0.1, "load_best_model_at_end": True}},
        "evaluation.early_stopping_threshold = 0.1 does nothing: evaluation.early_stopping_patience is not "
        "set",
        {"evaluation": {"early_stopping_threshold": 0.1, "early_stopping_patience": 2}},
    ),
    "training.head_learning_rate": (
        {"training": {"head_learning_rate": 0.01}},
        "training.head_learning_rate = 0.01 does nothing: no head is trained, by this objective and method",
        ALTERNATELY,
    ),
    "training.min_learning_rate": (
        {"training": {"min_learning_rate": 1e-4}},
        "training.min_learning_rate = 0.0001 does nothing: it is read where training.schedule is 'cosine' "
        "or 'linear', which is 'constant'",
        {"training": {"schedule": "linear", "min_learning_rate": 1e-4}},
    ),
    **{
        f"training.{name}": (
            {"training": {"optimizer": "sgd", name: 0.5}},
            f"training.{name} = 0.5 does nothing: it is read where training.optimizer is 'adam' or 'adamw' "
            "or 'adamw_8bit'" + LION.get(name, "") + ", which is 'sgd'",
            {"training": {"optimizer": "adam", name: 0.5}},
        )
        for name in ("beta1", "beta2", "epsilon")
    },
    "aggregation.density": (
        {"aggregation": {"density": 0.5}},
        "aggregation.density = 0.5 does nothing: it is read where aggregation.rule is 'ties' or 'dare' or "
        "'knots', which is 'mean'",
        {"aggregation": {"density": 0.5, "rule": "ties"}},
    ),
    "aggregation.scale": (
        {"aggregation": {"scale": 2.0, "rule": "median"}},
        "aggregation.scale = 2.0 does nothing: it is read where aggregation.rule is 'task_arithmetic' or "
        "'ties' or 'dare' or 'knots', which is 'median'",
        {"aggregation": {"scale": 2.0, "rule": "dare"}},
    ),
    "aggregation.space": (
        {"aggregation": {"space": "product", "rule": "knots"}},
        "aggregation.space = 'product' does nothing: it is read where aggregation.rule is "
        "'task_arithmetic' or 'ties' or 'dare', which is 'knots'",
        {"aggregation": {"space": "product", "rule": "ties"}},
    ),
    "wire.keep_plain_below": (
        {"wire": {"keep_plain_below": 5}},
        "wire.keep_plain_below = 5 does nothing: [wire] gives neither up, down, budget nor parts, so that "
        "tensors are sent as they are",
        {"wire": {"keep_plain_below": 5, "up": "int8"}},
    ),
    **{
        f"wire.{name}": (
            {"wire": {name: value, "up": "int8"}},
            f'wire.{name} = {value} does nothing: neither wire.up nor wire.down is "auto"',
            {"wire": {name: value, "down": "auto"}, "federation": {"rounds": 6}},
        )
        for name, value in (("auto_rounds", 5), ("auto_loss", 0.5), ("auto_error", 0.5))
    },
    **{
        f"wire.{name}": (
            {"wire": {name: value, "up": "int8"}},
            f"wire.{name} = {value} does nothing: it is read where wire.error_feedback is 'classic', which "
            "is 'none'",
            {"wire": {name: value, "up": ["int4:nearest"], "error_feedback": "classic"}},
        )
        for name, value in (("absence_decay", 0.5), ("absence_limit", 5))
    },
    "training.amount_per": (
        {"training": {"amount_per": "round", "local_steps": 4}},
        "training.amount_per = 'round' does nothing: this method trains one model once in a round",
        ALTERNATELY,
    ),
    "method.head_mode": (
        {**LABELLED, "method": {"name": "fedper", "head_mode": "lowrank"}},
        "method.head_mode = 'lowrank' does nothing: the head of this objective is its classifier",
        {"data": {"source": "builtin:preferences"}, "objective": {"name": "dpo"}},
    ),
    "method.head_rank": (
        {"method": {"name": "fedpdpo", "head_rank": 4}},
        "method.head_rank = 4 does nothing: it is read where method.head_mode is 'lowrank', which is 'full'",
        {"method": {"name": "fedpdpo", "head_rank": 4, "head_mode": "lowrank"}},
    ),
    "method.teacher_share": (
        {**LABELLED, "method": {"name": "distillation", "teacher_share": 0.7}},
        "method.teacher_share = 0.7 does nothing: it is read where public.labelled is True, which is False",
        {"public": {"labelled": True}},
    ),
    "method.client_epochs": (
        {
            **LABELLED,
            "method": {"name": "distillation", "client_epochs": 2},
            "training": {"amount_per": "round", "local_steps": 4},
        },
        "method.client_epochs = 2 does nothing: it is read where training.amount_per is 'model', which is "
        "'round'",
        {"training": {}},
    ),
    "objective.gamma": (
        {"objective": {"name": "pdpo", "reward_mode": "implicit", "gamma": 0.5}},
        "objective.gamma = 0.5 does nothing: it is read where objective.reward_mode is 'combined' or "
        "'separate', which is 'implicit'",
        {"objective": {"name": "pdpo", "reward_mode": "combined", "gamma": 0.5}},
    ),
    "partition.alpha": (
        {"partition": {"alpha": 0.1}},
        "partition.alpha = 0.1 does nothing: it is read where partition.kind is 'dirichlet', which is 'iid'",
        {"partition": {"alpha": 0.1, "kind": "dirichlet", "column": "topic"}},
    ),
    "evaluation.client_max_examples": (
        {"evaluation": {"client_max_examples": 9, "per_client": False}},
        "evaluation.client_max_examples = 9 does nothing: no client is judged by rows of its own",
        {"evaluation": {"client_max_examples": 9}},
    ),
    "evaluation.samples": (
        {**LABELLED, "evaluation": {"samples": 3}},
        "evaluation.samples = 3 does nothing: a classifier answers no prompts",
        {"data": {}, "objective": {}},
    ),
    "evaluation.max_new_tokens": (
        {"evaluation": {"samples": 0, "max_new_tokens": 9}},
        "evaluation.max_new_tokens = 9 does nothing: nothing is generated",
        {"evaluation": {"max_new_tokens": 9}},
    ),
    "clients.newcomer_steps": (
        {"clients": {"newcomer_steps": 5}},
        "clients.newcomer_steps = 5 does nothing: clients.newcomers is empty",
        {"clients": {"newcomer_steps": 5, "newcomers": [2]}},
    ),
    "selection.name": (
        {"selection": {"name": "rows"}},
        "selection.name = 'rows' does nothing: all clients take part in every round",
        {"federation": {"clients": 4, "clients_per_round": 2}, "selection": {"name": "rows"}},
    ),
    "selection.rows": (
        {
            "federation": {"clients": 4, "clients_per_round": 2},
            "selection": {"name": "oort", "rows": 9, "losses": "training"},
        },
        "selection.rows = 9 does nothing: it is read where selection.losses is 'rows', which is 'training'",
        {"selection": {"name": "oort", "rows": 9}},
    ),
    **{
        f"privacy.{name}": (
            {"privacy": {name: value}},
            f"privacy.{name} = {value!r} does nothing: it is read where privacy.secure_aggregation is True, "
            "which is False",
            {
                "privacy": {name: value, "secure_aggregation": True},
                "federation": {"clients": 3},
                "evaluation": {"per_client": False},
            },
        )
        for name, value in (("sum_bits", 20), ("sum_bound", 0.5), ("sum_rounding", "nearest"))
    },
    "privacy.bands": (
        {"privacy": {**HIDDEN, "mechanism": "tree", "bands": 3}},
        "privacy.bands = 3 does nothing: it is read where privacy.mechanism is 'banded', which is 'tree'",
        {"privacy": {**HIDDEN, "mechanism": "banded", "bands": 3}},
    ),
    "privacy.colluding": (
        {"privacy": {**HIDDEN, "colluding": 0}},
        "privacy.colluding = 0 does nothing: it is read where privacy.noise is 'distributed', which is "
        "'central'",
        {
            "privacy": {**HIDDEN, "colluding": 0, "noise": "distributed", "secure_aggregation": True},
            "federation": {"clients": 3},
            "evaluation": {"per_client": False},
        },
    ),
    "public.rows": (
        {"public": {"rows": 8}},
        "public.rows = 8 does nothing: this method has no public rows",
        {**LABELLED, "method": {"name": "distillation"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_does_nothing_is_told_and_what_does_something_is_not(name):
    sections, message, other = CASES[name]
    assert unread_settings(Experiment.from_table(sections)) == {name: message}
    assert name not in unread_settings(Experiment.from_table({**sections, **other}))


def test_every_setting_that_is_declared_has_a_case():
    declared = set()
    for section, choice in SECTIONS.items():
        kinds = [choice] if isinstance(choice, type) else [kind for kind, _ in choice.values()]
        declared |= {
            f"{section}.{key}"
            for kind in kinds
            for key, field in kind.model_fields.items()
            if any(isinstance(one, Of) for one in field.metadata)
        }
    declared.add("selection.name")  # of the section, whatever it chooses
    assert {name for name in declared if not name.startswith("public.")} == {
        name for name in CASES if not name.startswith("public.")
    }


@pytest.mark.parametrize(
    "path", [*sorted(ROOT.glob("recipes/**/*.toml")), starting_file()], ids=lambda path: path.name
)
def test_no_recipe_has_a_setting_that_does_nothing(path):
    if COMPARE in read_toml(path):
        experiments = [cell.experiment for cell in read_comparison(path).grid_runs]
    else:
        experiments = [Experiment.from_toml(path)]
    assert unread_in_all(experiments) == []


def fragments():
    """Experiments in the documentation, as far as a fragment is one by itself."""
    found = []
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        for text in re.findall(r"```toml\n(.*?)```", path.read_text(), re.DOTALL):
            try:
                found.append((path.name, Experiment.from_table(tomllib.loads(text))))
            except (SettingsError, tomllib.TOMLDecodeError):
                continue  # part of another file, or a comparison's
    return found


def test_no_experiment_of_the_documentation_has_one():
    experiments = fragments()
    assert len(experiments) >= 5
    told = [(name, unread_settings(experiment)) for name, experiment in experiments]
    assert [one for one in told if one[1]] == []


def test_a_run_warns_before_it_trains(experiment, monkeypatch):
    told = []
    monkeypatch.setattr(Silent, "warning", lambda self, text: told.append(text))
    monkeypatch.setattr("fedloom.runs.run._Run.prepare", lambda self, done: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_experiment(experiment(training={"min_learning_rate": 1e-4}), observer=Silent())
    assert CASES["training.min_learning_rate"][1] in told


def test_a_comparison_tells_what_none_of_its_arms_reads(table, tmp_path, monkeypatch):
    import tomli_w

    del table["output"]
    table["training"] |= {"beta1": 0.5, "min_learning_rate": 1e-4}
    table["compare"] = {
        "amount": 1,
        "seeds": [0],
        "objectives": {"a": {}, "b": {"training": {"optimizer": "sgd"}}},
    }
    path = tmp_path / "small.toml"
    path.write_text(tomli_w.dumps(table))
    monkeypatch.setattr("fedloom.runs.comparison._outcomes", lambda *a, **k: iter(()))
    told = HeardOfComparison()
    compare(read_comparison(path), tmp_path / "out", workers=1, observer=told)
    assert told.warnings == [CASES["training.min_learning_rate"][1]]
