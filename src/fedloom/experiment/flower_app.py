"""The settings of a FlowerTune app as an experiment, with a note for every key that is taken or not.

Keys are those of Flower's template for language models (FlowerTune of flwr 1.42, and the apps of its
leaderboard): ``[tool.flwr.app.config]`` of ``pyproject.toml``, and the number of simulated clients in
``[tool.flwr.federations]``. What the template has in its code and not in its settings is said, not set.
Nothing of the app is imported or run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedloom.display.untrusted_text import named, quoted
from fedloom.errors import SettingsError
from fedloom.experiment.aliases import PASSES, PER_PASS, with_own_names
from fedloom.settings.schema import Table
from fedloom.settings.toml import read_toml, write_toml

FILE = "pyproject.toml"
ARGUMENTS = "train.training-arguments."
SUPERNODES = "options.num-supernodes"
LEAST_SAMPLED = 2
"""``min_train_nodes`` of Flower's FedAvg, where an app does not say another."""


@dataclass(frozen=True)
class Key:
    """What a key of an app is here.

    Attributes:
        ours: ``section.key``.
        value: Theirs to ours; ``None`` where theirs has none.
        remark: What differs.
    """

    ours: str
    value: Callable[[Any], Any] = lambda value: value
    remark: str = ""


def _names(theirs: Any) -> Any:
    """Return names of layers that commas part as a list; PEFT's ``all-linear`` is the same here."""
    if not isinstance(theirs, str):
        return theirs
    names = [own.strip() for own in theirs.split(",")]
    return "all-linear" if names == ["all-linear"] else names


_BITS = {4: "int4", 8: "int8", 0: "none", "4": "int4", "8": "int8", "none": "none"}


def _quantization(bits: Any) -> str | None:
    return _BITS.get(bits) if isinstance(bits, int | str) else None


KEYS = {
    "model.name": Key("model.path"),
    "model.quantization": Key("model.quantization", _quantization, "int4: on a GPU"),
    "model.gradient-checkpointing": Key("training.gradient_checkpointing"),
    "model.lora.peft-lora-r": Key("adapter.rank"),
    "model.lora.peft-lora-alpha": Key("adapter.alpha"),
    "model.lora.peft-lora-dropout": Key("adapter.dropout"),
    "model.lora.peft-target-modules": Key("adapter.targets", _names),
    "model.lora.peft-use-dora": Key("adapter.use_dora"),
    "train.learning-rate-max": Key("training.learning_rate"),
    "train.learning-rate-min": Key(
        "training.min_learning_rate",
        remark="cosine over the rounds; the template reaches it in the last round, here the one after",
    ),
    "train.seq-length": Key("data.max_length"),
    "train.save-every-round": Key("output.checkpoint_every", remark="the last two are kept"),
    "dataset.name": Key("data.source"),
    "static.dataset.name": Key("data.source"),
    "num-server-rounds": Key("federation.rounds"),
    "strategy.fraction-evaluate": Key(
        "evaluation.per_client",
        lambda share: share > 0 if isinstance(share, int | float) else None,
        "all clients, or none",
    ),
}
"""Key of an app, without ``[tool.flwr.app.config]``, to the setting here."""

LEFT = {
    r"strategy\.proximal-mu": "set method.name to one with a proximal term, and its mu",
    r"strategy\.min-.*": "see federation.require and federation.quorum",
    r"options\.backend\..*": "see `fedloom run --workers`",
    rf"{ARGUMENTS}learning-rate": "the template sets it from learning-rate-max and learning-rate-min",
    rf"{ARGUMENTS}lr-scheduler-type": "a round has one rate; training.schedule is over rounds",
    rf"{ARGUMENTS}warmup-.*": "see training.warmup_rounds: the rate rises over rounds",
    rf"{ARGUMENTS}output-dir": "see output.folder",
    rf"{ARGUMENTS}(logging|log|eval|save|report|dataloader|ddp|hub|push)-.*": (
        "rounds are recorded, saved and evaluated as [output] and [evaluation] say"
    ),
    rf"{ARGUMENTS}(remove-unused-columns|group-by-length|disable-tqdm|run-name)": "nothing to set",
    r"(save|data)-path": "see output.folder and FEDLOOM_CACHE",
}
"""Keys with nothing to take, as regular expressions, and why."""

UNSAID = (
    "LoRA has a dropout of 0.075 (adapter.dropout), and the layers that PEFT chooses for an architecture "
    '(of Llama ["q_proj", "v_proj"]; here adapter.targets = "all-linear" by default)',
    'weights are in bfloat16 (training.precision = "bf16")',
    "the strategy is FedAvg with every change of a round averaged by rows, as here by default",
    "prompts are Alpaca's, put around the column instruction (data.template)",
    "all rows are trained on; here data.test_fraction of them are held out",
)
"""What the template has in its code."""


@dataclass
class Translation:
    """An app's settings as an experiment.

    Attributes:
        table: Section to its settings, with fedloom's names.
        origins: ``section.key`` to what it was made of.
        notes: A line for each key of the app: as what it was taken, or why it was not.
        unknown: Keys that are neither the template's nor transformers'.
    """

    table: Table = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def take(self, ours: str, value: Any, theirs: str, remark: str = "") -> None:
        """Set a setting, and note what it was made of; where two keys differ, the first counts."""
        section, key = ours.split(".")
        if self.table.get(section, {}).get(key, value) != value:
            self.leave(theirs, value, f"{self.origins[ours]} says otherwise")
            return
        self.table.setdefault(section, {})[key] = value
        self.origins[ours] = theirs + (f": {remark}" if remark else "")
        said = f" ({remark})" if remark else ""
        self.notes.append(f"{theirs} is taken as {ours} = {quoted(value, 60)}{said}")

    def leave(self, theirs: str, value: Any, why: str) -> None:
        """Note that a key is not taken."""
        self.notes.append(f"{theirs} = {quoted(value, 60)} is not taken: {why}")


def translated(path: Path) -> Translation:
    """Return the settings of an app as an experiment.

    Args:
        path: The app's ``pyproject.toml``, or its folder.

    Raises:
        SettingsError: There is no such file, it is no TOML, or no Flower app.
    """
    path = path / FILE if path.is_dir() else path
    keys = dict(_keys_of(read_toml(path), path))
    found = Translation({"objective": {"name": "sft"}})
    arguments = {name: keys.pop(name) for name in list(keys) if name.startswith(ARGUMENTS)}
    _take_clients(found, keys)
    for name, value in keys.items():
        _take(found, name, value)
    _take_arguments(found, {name.removeprefix(ARGUMENTS): own for name, own in arguments.items()})
    if "source" in found.table.get("data", {}):
        found.table["data"]["kind"] = "instruction"
    if "min_learning_rate" in found.table.get("training", {}):
        found.table["training"]["schedule"] = "cosine"
    return found


def _keys_of(table: Table, path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the app's keys with dots between, and those of the federation that it runs in."""
    flower = _inner(table, "tool", "flwr")
    config = _inner(flower, "app", "config")
    if not config:
        raise SettingsError(
            [
                "it has no [tool.flwr.app.config], so it is no Flower app with settings: give its file"
            ],
            named(path),
        )
    yield from _flat(config, "")
    federations = _inner(flower, "federations")
    chosen = _inner(federations, str(federations.get("default")))
    yield from _flat({"options": chosen.get("options", {})}, "")


def _inner(table: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    for name in names:
        own = table.get(name)
        table = own if isinstance(own, Mapping) else {}
    return table


def _flat(table: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _take(found: Translation, name: str, value: Any) -> None:
    key = KEYS.get(name)
    why = next((why for pattern, why in LEFT.items() if re.fullmatch(pattern, name)), "")
    if value == "":
        found.leave(name, value, "it is empty")
    elif key is None and why:
        found.leave(name, value, why)
    elif key is None:
        found.unknown.append(name)
        found.leave(
            name, value, "no key of the template; what the app does with it is not known here"
        )
    elif key.value(value) is None:
        found.leave(name, value, f"no value of {key.ours}")
    else:
        found.take(key.ours, key.value(value), name, key.remark)


def _take_clients(found: Translation, keys: dict[str, Any]) -> None:
    """Take the number of clients, and of those of a round, which Flower has as a share."""
    clients = keys.pop(SUPERNODES, None)
    if clients is None:
        found.notes.append(
            f"{SUPERNODES} is not in the file: set federation.clients, here 8 (in newer releases of "
            "Flower it is in the configuration of the user)"
        )
    else:
        found.take("federation.clients", clients, SUPERNODES)
    for name in ("strategy.fraction-train", "strategy.fraction-fit"):
        if name not in keys:
            continue
        share = keys.pop(name)
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            found.leave(name, share, "it is a share from 0 to 1")
        elif not isinstance(clients, int):
            found.leave(name, share, "it is a share of clients; set federation.clients_per_round")
        else:
            drawn = min(max(int(clients * share), LEAST_SAMPLED), clients)
            remark = f"of {clients} clients, {LEAST_SAMPLED} at least, as Flower's FedAvg draws"
            found.take("federation.clients_per_round", drawn, name, remark)


def _take_arguments(found: Translation, arguments: dict[str, Any]) -> None:
    """Take ``transformers.TrainingArguments``, whose names have hyphens there."""
    _take_batches(found, arguments)
    steps = arguments.get("max-steps")
    if isinstance(steps, int) and steps > 0 and "num-train-epochs" in arguments:
        epochs = arguments.pop("num-train-epochs")
        found.leave(f"{ARGUMENTS}num-train-epochs", epochs, "max-steps comes before it")
    elif isinstance(steps, int) and steps <= 0:
        found.leave(f"{ARGUMENTS}max-steps", arguments.pop("max-steps"), "it asks for nothing")
    for key, value in arguments.items():
        theirs, ours = f"{ARGUMENTS}{key}", key.replace("-", "_")
        if value == "" or any(re.fullmatch(pattern, theirs) for pattern in LEFT):
            _take(found, theirs, value)
            continue
        table, notes, problems = with_own_names({"training": {ours: value}})
        if problems:
            found.leave(theirs, value, problems[0].partition(": ")[2] or problems[0])
        elif notes or ours in SAME:
            for section, own in table.items():
                for name, read in own.items():
                    found.take(f"{section}.{name}", read, theirs)
        elif not table.get("training"):
            found.leave(theirs, value, "it is so in any case")
        else:
            _take(found, theirs, value)


def _take_batches(found: Translation, arguments: dict[str, Any]) -> None:
    """Take rows of a pass and passes of a step: here a batch is all rows of a step."""
    rows, passes = PER_PASS.replace("_", "-"), PASSES.replace("_", "-")
    per_pass, times = arguments.get(rows), arguments.get(passes, 1)
    if isinstance(per_pass, int) and isinstance(times, int):
        theirs = f"{ARGUMENTS}{rows}"
        both = f"{theirs} times {ARGUMENTS}{passes}" if passes in arguments else theirs
        found.take("training.batch_size", per_pass * times, both)
        found.take("training.micro_batch_size", per_pass, theirs)
        arguments.pop(rows)
        arguments.pop(passes, None)


SAME = (
    "weight_decay",
    "max_grad_norm",
    "gradient_checkpointing",
    "neftune_noise_alpha",
    "data_seed",
)
"""Arguments that have the same name here."""


def as_toml(found: Translation, source: str) -> str:
    """Return an experiment file with what each setting was made of, and what was not taken."""
    lines = [f"# Made of the settings of {named(source)} by fedloom init --from-flower.", ""]
    for section, own in found.table.items():
        lines.append(f"[{section}]")
        for key, value in own.items():
            origin = found.origins.get(f"{section}.{key}", "as the template's code has it")
            line = write_toml({key: value}).strip()
            lines += (
                [f"# {named(origin)}", line] if "\n" in line else [f"{line}  # {named(origin)}"]
            )
        lines.append("")
    left = [note for note in found.notes if " is taken as " not in note]
    lines += ["# Also:", *(f"# - {named(note)}" for note in left), ""]
    lines += ["# What the template has in its code, and your app may have too:"]
    lines += [f"# - {text}" for text in UNSAID]
    return "\n".join(lines) + "\n"
