"""Settings by the names that they have elsewhere mean the same, are noted, and come from the user alone."""

import tomllib
from pathlib import Path

import pytest

from fedloom.errors import SettingsError
from fedloom.experiment.aliases import ALIASES
from fedloom.experiment.experiment import SECTIONS, Experiment
from fedloom.runs.comparison import comparison_of
from fedloom.runs.run import run_experiment
from observers import Heard

PAGE = Path(__file__).parents[2] / "docs" / "other_tools.md"


def every_key(section):
    choice = SECTIONS[section]
    if isinstance(choice, type):
        return set(choice.model_fields)
    return {key for settings, _ in choice.values() for key in settings.model_fields}


def test_no_name_is_a_setting_of_ours_and_each_is_of_one():
    for name, alias in ALIASES.items():
        section, key = name.split(".")
        place, ours = alias.ours.split(".")
        assert key not in every_key(section), name
        assert ours in every_key(place) | {"name"}, alias


def test_the_page_has_an_experiment_that_is_read_as_it_says():
    text = PAGE.read_text(encoding="utf-8").partition("```toml\n")[2].partition("```")[0]
    found = Experiment.from_table(tomllib.loads(text))
    assert found == Experiment.from_table(
        {
            "adapter": {"rank": 16, "alpha": 32.0, "targets": ["q_proj", "v_proj"]},
            "objective": {"name": "apo_zero"},
            "federation": {"clients": 4, "rounds": 2},
            "training": {
                "batch_size": 8,
                "micro_batch_size": 2,
                "schedule": "cosine",
                "local_steps": 4,
            },
        }
    )
    assert len(found.notes) == 9
    assert "adapter.r is read as adapter.rank = 16" in found.notes
    assert any(
        "lr_scheduler_type is read as training.schedule = 'cosine' (it falls over the rounds"
        in note
        for note in found.notes
    )


@pytest.mark.parametrize("name", ["packing", "padding_free", "neat_packing", "sample_packing"])
def test_packing_is_what_passes_are_in_any_case_and_loses_no_row(name):
    plain = Experiment.from_table({})
    for asked in (True, False):
        found = Experiment.from_table({"training": {name: asked}})
        assert found == plain
        assert [name in note and "none is cut or joined" in note for note in found.notes] == [
            True
        ] * asked
    with pytest.raises(SettingsError, match=f"training.{name} = 'yes': it is true or false"):
        Experiment.from_table({"training": {name: "yes"}})


def test_values_are_ours():
    found = Experiment.from_table(
        {
            "training": {
                "bf16": True,
                "fp16": False,
                "optim": "adamw_torch",
                "num_train_epochs": 2.0,
                "seed": 3,
            },
            "objective": {"loss_type": "sigmoid", "rpo_alpha": 0.5},
            "output": {"output_dir": "here"},
        }
    )
    assert (found.training.precision, found.training.optimizer) == ("bf16", "adamw")
    assert (found.training.local_epochs, found.federation.seed) == (2, 3)
    assert (found.objective.name, found.objective.sft_weight) == ("dpo", 0.5)
    assert found.output.folder == "here"


def test_a_whole_lora_config_and_switches_are_read():
    """What is copied out of a script of TRL, with settings at their defaults."""
    found = Experiment.from_table(
        {
            "model": {"dtype": "bfloat16", "load_in_4bit": False, "load_in_8bit": True},
            "adapter": {
                "r": 4,
                "bias": "none",
                "task_type": "CAUSAL_LM",
                "fan_in_fan_out": False,
                "inference_mode": False,
                "lora_target_linear": True,
                "finetuning_type": "lora",
            },
            "data": {"source": "builtin:instructions", "mask_history": True},
            "objective": {"name": "grpo", "loss_type": "bnpo"},
            "training": {"use_cpu": True, "report_to": "tensorboard", "output_dir": "here"},
        }
    )
    assert (found.training.precision, found.model.quantization) == ("bf16", "int8")
    assert (found.adapter.rank, found.adapter.kind, found.adapter.targets) == (
        4,
        "lora",
        "all-linear",
    )
    assert found.data.train_on == "last_answer"
    assert (found.objective.name, found.objective.averaging) == ("grpo", "dapo")
    assert (found.training.device, found.output.folder) == ("cpu", "here")
    assert found.output.trackers == ["tensorboard"]
    assert "objective.loss_type is read as objective.averaging = 'dapo'" in found.notes


@pytest.mark.parametrize(
    ("table", "section", "key", "value"),
    [
        ({"model": {"quantization_bit": 4}}, "model", "quantization", "int4"),
        ({"adapter": {"adapter": "lora"}}, "adapter", "kind", "lora"),
        ({"adapter": {"pissa_init": True}}, "adapter", "init_lora_weights", "pissa"),
        ({"adapter": {"pissa_init": False}}, "adapter", "init_lora_weights", "default"),
        ({"data": {"mask_history": False}}, "data", "train_on", "all_answers"),
        ({"objective": {"loss_type": "ipo"}}, "objective", "name", "ipo"),
        ({"training": {"use_cpu": False}}, "training", "device", "auto"),
        ({"training": {"report_to": "none"}}, "output", "trackers", []),
        ({"training": {"report_to": ["none"]}}, "output", "trackers", []),
        (
            {"training": {"report_to": ["wandb", "mlflow"]}},
            "output",
            "trackers",
            ["wandb", "mlflow"],
        ),
        ({"training": {"eval_batch_size": 3}}, "evaluation", "batch_size", 3),
        ({"training": {"early_stopping_steps": 2}}, "evaluation", "early_stopping_patience", 2),
    ],
)
def test_values_that_ask_for_one_setting(table, section, key, value):
    assert getattr(getattr(Experiment.from_table(table), section), key) == value


def test_a_reference_that_is_computed_once_is_what_there_is():
    found = Experiment.from_table({"objective": {"precompute_ref_log_probs": True}})
    assert found == Experiment.from_table({})
    [note] = found.notes
    assert note.startswith(
        "objective.precompute_ref_log_probs (TRL) changes nothing: the reference"
    )


@pytest.mark.parametrize(
    ("table", "line"),
    [
        (
            {"adapter": {"r": 4, "rank": 8}},
            "adapter.r is PEFT's name of adapter.rank, which is given too",
        ),
        (
            {"training": {"num_train_epochs": 0.5}},
            "training.num_train_epochs = 0.5: a client passes its rows whole times in a round; see local_steps",
        ),
        (
            {"training": {"lr_scheduler_type": ["linear"]}},
            "training.lr_scheduler_type = ['linear']: of its values 'constant', 'linear', 'cosine' are read",
        ),
        ({"training": {"bf16": [1]}}, "training.bf16 = [1]: it is true or false"),
        (
            {"training": {"fp16": True}},
            'training.fp16 = True: float16 is not offered; use training.precision = "bf16"',
        ),
        (
            {"training": {"lr_scheduler_type": "polynomial"}},
            "training.lr_scheduler_type = 'polynomial': of its values 'constant', 'linear', 'cosine' are read",
        ),
        (
            {"training": {"gradient_accumulation_steps": 4}},
            "training.gradient_accumulation_steps needs training.per_device_train_batch_size beside it, "
            "or use batch_size",
        ),
        (
            {"training": {"per_device_train_batch_size": 4, "batch_size": 8}},
            "training.per_device_train_batch_size and gradient_accumulation_steps say what "
            "training.batch_size says, which is given too",
        ),
        (
            {"training": {"per_device_train_batch_size": "4"}},
            "training.per_device_train_batch_size and gradient_accumulation_steps: '4' and 1 must be 1 or more",
        ),
        ({"model": {"quantization_bit": 3}}, "model.quantization_bit = 3: it is 4 or 8"),
        ({"model": {"load_in_8bit": 1}}, "model.load_in_8bit = 1: it is true or false"),
        (
            {"model": {"dtype": "float16"}},
            "model.dtype = 'float16': of its values 'bfloat16', 'float32' are read",
        ),
        (
            {"adapter": {"bias": "all"}},
            "adapter.bias = 'all': of PEFT's values there is 'none' alone; leave it out",
        ),
        (
            {"adapter": {"fan_in_fan_out": 0}},
            "adapter.fan_in_fan_out = 0: of PEFT's values there is False alone; leave it out",
        ),
        (
            {
                "data": {"source": "builtin:instructions"},
                "objective": {"name": "grpo", "loss_type": "dapo", "averaging": "grpo"},
            },
            "objective.loss_type is TRL's name of objective.averaging, which is given too",
        ),
        (
            {"adapter": {"lora_rank": "big"}},
            "adapter.rank = 'big': must be a valid integer",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_line(table, line):
    with pytest.raises(SettingsError) as caught:
        Experiment.from_table(table)
    assert caught.value.problems == (line,)


def test_what_a_server_sends_has_no_other_names():
    with pytest.raises(SettingsError, match=r"training\.seed: unknown key"):
        Experiment.from_table({"training": {"seed": 3}}, aliases=False)


def test_a_run_says_as_what_each_was_read(table, tmp_path):
    table["adapter"] = {"r": 2}
    table["federation"] = {"num_rounds": 1, "clients": 2}
    heard = Heard()
    result = run_experiment(Experiment.from_table(table), observer=heard)
    assert [text for text in heard.warnings if "is read as" in text] == [
        "adapter.r is read as adapter.rank = 2",
        "federation.num_rounds is read as federation.rounds = 1",
    ]
    written = tomllib.loads((result.folder / "experiment.toml").read_text(encoding="utf-8"))
    assert written["adapter"]["rank"] == 2 and "r" not in written["adapter"]


def test_in_a_comparison_a_configuration_may_change_what_the_base_has_under_another_name():
    found = comparison_of(
        {
            "adapter": {"lora_rank": 4},
            "compare": {
                "objectives": {"small": {"adapter": {"r": 2}}, "large": {"adapter": {"rank": 16}}},
                "seeds": [0],
                "amount": 2,
            },
        },
        "ranks",
        "here",
    )
    assert [own.experiment.adapter.rank for own in found.grid_runs] == [2, 16]
    assert found.notes == (
        "adapter.lora_rank is read as adapter.rank = 4",
        "adapter.r is read as adapter.rank = 2",
    )
