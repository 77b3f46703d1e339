"""Settings of a FlowerTune app become an experiment; each of its keys is taken, or said not to be."""

import tomllib

import pytest

from fedloom.experiment.experiment import Experiment
from fedloom.experiment.flower_app import KEYS, as_toml, translated

APP = """
[project]
name = "an-app"

[tool.flwr.app.config]
model.name = "HuggingFaceTB/SmolLM2-135M"
model.quantization = 8
model.gradient-checkpointing = true
model.lora.peft-lora-r = 32
model.lora.peft-lora-alpha = 64
train.save-every-round = 5
train.learning-rate-max = 5e-5
train.learning-rate-min = 1e-6
train.seq-length = 512
train.training-arguments.output-dir = ""
train.training-arguments.learning-rate = ""
train.training-arguments.per-device-train-batch-size = 16
train.training-arguments.gradient-accumulation-steps = 2
train.training-arguments.logging-steps = 10
train.training-arguments.num-train-epochs = 3
train.training-arguments.max-steps = 10
train.training-arguments.save-total-limit = 10
train.training-arguments.gradient-checkpointing = true
train.training-arguments.lr-scheduler-type = "constant"
train.training-arguments.optim = "adamw_torch"
train.training-arguments.weight-decay = 0.01
strategy.fraction-fit = 0.15
strategy.fraction-evaluate = 0.0
num-server-rounds = 100

[tool.flwr.app.config.static]
dataset.name = "vicgalle/alpaca-gpt4"

[tool.flwr.federations]
default = "local-simulation"

[tool.flwr.federations.local-simulation]
options.num-supernodes = 20
options.backend.client-resources.num-cpus = 6
"""


@pytest.fixture
def app(tmp_path):
    def write(text=APP, **changed):
        for name, value in changed.items():
            key = name.replace("__", ".").replace("_", "-")
            lines = [
                f"{key} = {value}" if f"{own} ".startswith(f"{key} ") else own
                for own in text.split("\n")
            ]
            text = "\n".join(lines)
        (tmp_path / "pyproject.toml").write_text(text)
        return translated(tmp_path)

    return write


def test_the_template_is_this_experiment(app):
    found = app()
    assert Experiment.from_table(found.table) == Experiment.from_table(
        {
            "model": {"path": "HuggingFaceTB/SmolLM2-135M", "quantization": "int8"},
            "adapter": {"rank": 32, "alpha": 64.0},
            "data": {"source": "vicgalle/alpaca-gpt4", "kind": "instruction", "max_length": 512},
            "objective": {"name": "sft"},
            "federation": {"rounds": 100, "clients": 20, "clients_per_round": 3},
            "training": {
                "learning_rate": 5e-5,
                "min_learning_rate": 1e-6,
                "schedule": "cosine",
                "batch_size": 32,
                "micro_batch_size": 16,
                "local_steps": 10,
                "gradient_checkpointing": True,
                "optimizer": "adamw",
                "weight_decay": 0.01,
            },
            "evaluation": {"per_client": False},
            "output": {"checkpoint_every": 5},
        }
    )
    assert found.unknown == []


def test_every_key_has_a_note_and_the_file_says_the_same(app):
    found = app()
    keys = [line.partition(" = ")[0] for line in APP.split("\n") if " = " in line][1:]
    keys.remove("default")
    assert len(keys) > 24
    assert [key for key in keys if not any(key in note for note in found.notes)] == []
    text = as_toml(found, "app")
    assert tomllib.loads(text) == found.table
    assert "rank = 32  # model.lora.peft-lora-r" in text
    assert (
        "# - train.training-arguments.num-train-epochs = 3 is not taken: max-steps comes before"
        in text
    )


def test_tables_and_dotted_keys_are_the_same(app):
    nested = APP.replace("model.lora.peft-lora-r = 32\n", "").replace(
        "[tool.flwr.app.config.static]",
        "[tool.flwr.app.config.model.lora]\npeft-lora-r = 32\n[tool.flwr.app.config.static]",
    )
    nested = nested.replace("model.lora.peft-lora-alpha = 64\n", "")
    assert app(nested).table["adapter"] == {"rank": 32}


def test_what_is_not_known_is_named_and_left_out(app):
    more = 'my-own.key = [1, 2]\n"odd\\nkey" = 3\nnum-server-rounds'
    found = app(APP.replace("num-server-rounds", more))
    assert found.unknown == ["my-own.key", "odd\nkey"]
    assert tomllib.loads(as_toml(found, "an\napp")) == found.table == app().table


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ('"all-linear"', "all-linear"),
        ('"q_proj, v_proj"', ["q_proj", "v_proj"]),
        ('["q_proj"]', ["q_proj"]),
    ],
)
def test_layers(app, theirs, ours):
    found = app(
        APP.replace(
            "num-server-rounds", f"model.lora.peft-target-modules = {theirs}\nnum-server-rounds"
        )
    )
    assert found.table["adapter"]["targets"] == ours


@pytest.mark.parametrize(
    ("changed", "setting", "value"),
    [
        ({"model__quantization": 0}, "model.quantization", "none"),
        ({"model__quantization": 3}, "model.quantization", None),
        ({"model__quantization": "[4]"}, "model.quantization", None),
        ({"strategy__fraction_fit": 0.01}, "federation.clients_per_round", 2),
        ({"strategy__fraction_fit": 1}, "federation.clients_per_round", 20),
        ({"strategy__fraction_fit": 2.0}, "federation.clients_per_round", None),
        ({"options__num_supernodes": 1}, "federation.clients_per_round", 1),
        ({"train__training_arguments__max_steps": -1}, "training.local_epochs", 3),
        ({"train__training_arguments__optim": '"sophia"'}, "training.optimizer", None),
        ({"train__training_arguments__gradient_checkpointing": "false"}, "training.gradient_checkpointing", True),
        ({"strategy__fraction_evaluate": 0.5}, "evaluation.per_client", True),
    ],
)  # fmt: skip
def test_values(app, changed, setting, value):
    found = app(**changed)
    section, key = setting.split(".")
    assert found.table.get(section, {}).get(key) == value
    assert [
        note
        for note in found.notes
        if next(iter(changed)).split("__")[-1].replace("_", "-") in note
    ]


def test_keys_are_of_settings_that_there_are():
    table = Experiment().to_table()
    assert [
        key.ours
        for key in KEYS.values()
        if key.ours.split(".")[1] not in table[key.ours.split(".")[0]]
    ] == []


def test_a_command_writes_it(call, tmp_path):
    (tmp_path / "pyproject.toml").write_text(APP)
    code, out = call("init", "mine.toml", "--from-flower", ".")
    assert code == 0 and "train.seq-length is taken as data.max_length = 512" in out
    assert Experiment.from_toml(tmp_path / "mine.toml").federation.clients_per_round == 3
    (tmp_path / "pyproject.toml").write_text(
        APP.replace("peft-lora-r = 32", 'peft-lora-r = "many"')
    )
    code, out = call("init", "other.toml", "--from-flower", "pyproject.toml")
    assert code == 2 and "adapter.rank = 'many'" in out and not (tmp_path / "other.toml").exists()
