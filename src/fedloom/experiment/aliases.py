"""Settings by the names that they have in other tools: ``num_train_epochs`` for ``local_epochs``.

Names of transformers' ``TrainingArguments``, PEFT's ``LoraConfig``, TRL's configurations, LLaMA-Factory,
axolotl, OpenFedLLM and Flower are read where they mean the same, each with a note that says as what. They
are read from files and tables of the user; what a server sends has fedloom's own names alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedloom.display.untrusted_text import quoted
from fedloom.errors import SettingsError
from fedloom.settings.schema import Table


class _NotReadError(ValueError):
    """A value of another name that has none here; the message says what to do."""


@dataclass(frozen=True)
class Alias:
    """Another name of a setting.

    Attributes:
        ours: ``section.key``, or several of them with their values for each value of theirs.
        origin: Whose name it is.
        value: Their value to ours; it raises an error that says what to do where there is none.
        remark: What differs, for the note.
    """

    ours: str
    origin: str
    value: Callable[[Any], Any] = lambda value: value
    remark: str = ""


def _one_of(values: Mapping[str, str]) -> Callable[[Any], Any]:
    def value(theirs: Any) -> Any:
        if not isinstance(theirs, str) or theirs not in values:
            raise _NotReadError(f"of its values {', '.join(map(repr, values))} are read")
        return values[theirs]

    return value


def _whole(theirs: Any) -> Any:
    if isinstance(theirs, float) and theirs.is_integer():
        return int(theirs)
    if isinstance(theirs, float):
        raise _NotReadError("a client passes its rows whole times in a round; see local_steps")
    return theirs


def _precision(theirs: Any) -> Any:
    if not isinstance(theirs, bool):
        raise _NotReadError("it is true or false")
    return "bf16" if theirs else "fp32"


_NOTHING = object()
"""A value that asks for nothing."""


def _not_half(theirs: Any) -> Any:
    if theirs is not False:
        raise _NotReadError('float16 is not offered; use training.precision = "bf16"')
    return _NOTHING


def _first_factors(theirs: Any) -> Any:
    return "default" if theirs is True else theirs


@dataclass(frozen=True)
class _Elsewhere:
    """A value that is of another setting than its name's others: ``section.key`` and the value there."""

    ours: str
    value: Any


def _if_true(value: Any) -> Callable[[Any], Any]:
    """Return what reads a switch that asks for a value where it is on, and else for nothing."""

    def read(theirs: Any) -> Any:
        if not isinstance(theirs, bool):
            raise _NotReadError("it is true or false")
        return value if theirs else _NOTHING

    return read


def _bits(theirs: Any) -> Any:
    if isinstance(theirs, bool) or theirs not in (4, 8):
        raise _NotReadError("it is 4 or 8")
    return f"int{theirs}"


def _loss(theirs: Any) -> Any:
    if isinstance(theirs, str) and theirs in _AVERAGES:
        return _Elsewhere("objective.averaging", _AVERAGES[theirs])
    return _LOSSES(theirs)


def _trackers(theirs: Any) -> Any:
    if theirs == "none" or theirs == ["none"]:
        return _NOTHING
    return _listed(theirs)


def _listed(theirs: Any) -> Any:
    return [name.strip() for name in theirs.split(",")] if isinstance(theirs, str) else theirs


_BETWEEN = "it falls over the rounds and is constant within one"
_OF_A_ROUND = "of one round at a client"

_SCHEDULES = _one_of({name: name for name in ("constant", "linear", "cosine")})

_OPTIMIZERS = _one_of(
    {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "adamw": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
        "adamw_8bit": "adamw_8bit",
        "adafactor": "adafactor",
        "lion_32bit": "lion",
        "muon": "muon",
        "sgd": "sgd",
    }
)

_MIXTURES = _one_of({"interleave_under": "first_exhausted", "interleave_over": "all_exhausted"})
_LOSSES = _one_of(
    {
        "sigmoid": "dpo",
        "robust": "robust_dpo",
        "ipo": "ipo",
        "apo_zero": "apo_zero",
        "apo_down": "apo_down",
        "simpo": "simpo",
        "orpo": "orpo",
        "kto": "kto",
        "bco": "bco",
    }
)

_AVERAGES = {"grpo": "grpo", "bnpo": "dapo", "dapo": "dapo", "dr_grpo": "dr_grpo"}
"""Losses of TRL's GRPO to how tokens are averaged; a batch is normalised whole here, so bnpo is dapo."""

_PRECISIONS = _one_of({"bfloat16": "bf16", "float32": "fp32"})

HF, PEFT, TRL = "transformers", "PEFT", "TRL"
FACTORY, AXOLOTL = "LLaMA-Factory", "axolotl"
FEDLLM, FLOWER = "OpenFedLLM", "Flower"

ALIASES: dict[str, Alias] = {
    "model.model_name_or_path": Alias("model.path", HF),
    "model.base_model": Alias("model.path", AXOLOTL),
    "model.model_revision": Alias("model.revision", TRL),
    "model.load_in_4bit": Alias("model.quantization", TRL, _if_true("int4")),
    "model.load_in_8bit": Alias("model.quantization", TRL, _if_true("int8")),
    "model.quantization_bit": Alias("model.quantization", FACTORY, _bits),
    "model.dtype": Alias("training.precision", TRL, _PRECISIONS),
    "model.torch_dtype": Alias("training.precision", HF, _PRECISIONS),
    "adapter.adapter": Alias("adapter.kind", AXOLOTL, _one_of({"lora": "lora"})),
    "adapter.finetuning_type": Alias("adapter.kind", FACTORY, _one_of({"lora": "lora"})),
    "adapter.r": Alias("adapter.rank", PEFT),
    "adapter.lora_r": Alias("adapter.rank", AXOLOTL),
    "adapter.lora_rank": Alias("adapter.rank", FACTORY),
    "adapter.peft_lora_r": Alias("adapter.rank", FEDLLM),
    "adapter.peft_lora_alpha": Alias("adapter.alpha", FEDLLM),
    "adapter.lora_alpha": Alias("adapter.alpha", PEFT),
    "adapter.lora_dropout": Alias("adapter.dropout", PEFT),
    "adapter.target_modules": Alias("adapter.targets", PEFT),
    "adapter.lora_target": Alias("adapter.targets", FACTORY),
    "adapter.lora_target_modules": Alias("adapter.targets", AXOLOTL),
    "adapter.lora_target_linear": Alias("adapter.targets", AXOLOTL, _if_true("all-linear")),
    "adapter.layers_to_transform": Alias("adapter.layers", PEFT),
    "adapter.peft_use_dora": Alias("adapter.use_dora", AXOLOTL),
    "adapter.peft_use_rslora": Alias("adapter.use_rslora", AXOLOTL),
    "adapter.peft_init_lora_weights": Alias("adapter.init_lora_weights", AXOLOTL, _first_factors),
    "adapter.pissa_init": Alias("adapter.init_lora_weights", FACTORY, _if_true("pissa")),
    "adapter.lora_modules_to_save": Alias("adapter.modules_to_save", TRL),
    "adapter.additional_target": Alias("adapter.modules_to_save", FACTORY, _listed),
    "data.dataset_name": Alias("data.source", TRL),
    "data.dataset_config": Alias("data.subset", TRL),
    "data.dataset_train_split": Alias("data.split", TRL),
    "data.dataset_test_split": Alias("data.test_split", TRL),
    "data.mask_history": Alias("data.train_on", FACTORY, _if_true("last_answer")),
    "data.mix_strategy": Alias("data.stopping_strategy", FACTORY, _MIXTURES),
    "data.max_seq_length": Alias("data.max_length", TRL),
    "data.cutoff_len": Alias("data.max_length", FACTORY),
    "data.sequence_len": Alias("data.max_length", AXOLOTL),
    "data.seq_length": Alias("data.max_length", FEDLLM),
    "data.max_samples": Alias("data.max_rows", FACTORY),
    "data.dataset_sample": Alias("data.max_rows", FEDLLM),
    "data.val_size": Alias("data.test_fraction", FACTORY),
    "data.val_set_size": Alias("data.test_fraction", AXOLOTL),
    "objective.loss_type": Alias("objective.name", TRL, _loss),
    "objective.rpo_alpha": Alias("objective.sft_weight", TRL),
    "objective.cpo_alpha": Alias("objective.sft_weight", TRL),
    "objective.simpo_gamma": Alias("objective.gamma", TRL),
    "objective.num_generations": Alias("objective.group", TRL),
    "objective.max_completion_length": Alias("objective.max_new_tokens", TRL),
    "objective.reward_funcs": Alias("objective.rewards", TRL),
    "objective.scale_rewards": Alias("objective.scale", TRL),
    "objective.num_iterations": Alias("objective.iterations", TRL),
    "objective.epsilon": Alias("objective.clip", TRL),
    "objective.epsilon_high": Alias("objective.clip_high", TRL),
    "objective.pref_loss": Alias("objective.name", FACTORY, _LOSSES),
    "objective.pref_beta": Alias("objective.beta", FACTORY),
    "objective.rl_beta": Alias("objective.beta", AXOLOTL),
    "objective.dpo_beta": Alias("objective.beta", FEDLLM),
    "objective.pref_ftx": Alias("objective.sft_weight", FACTORY),
    "objective.dpo_label_smoothing": Alias("objective.label_smoothing", FACTORY),
    "objective.kto_chosen_weight": Alias("objective.desirable_weight", FACTORY),
    "objective.kto_rejected_weight": Alias("objective.undesirable_weight", FACTORY),
    "objective.kto_desirable_weight": Alias("objective.desirable_weight", AXOLOTL),
    "objective.kto_undesirable_weight": Alias("objective.undesirable_weight", AXOLOTL),
    "method.fed_alg": Alias("method.name", FEDLLM),
    "method.prox_mu": Alias("method.mu", FEDLLM),
    "method.proximal_mu": Alias("method.mu", FLOWER),
    "method.fedopt_tau": Alias("method.tau", FEDLLM),
    "method.fedopt_eta": Alias("method.eta", FEDLLM),
    "method.fedopt_beta1": Alias("method.beta1", FEDLLM),
    "method.fedopt_beta2": Alias("method.beta2", FEDLLM),
    "federation.num_rounds": Alias("federation.rounds", FEDLLM),
    "federation.num_server_rounds": Alias("federation.rounds", FLOWER),
    "federation.num_clients": Alias("federation.clients", FEDLLM),
    "federation.num_supernodes": Alias("federation.clients", FLOWER),
    "partition.split_strategy": Alias("partition.kind", FEDLLM, _one_of({"iid": "iid"})),
    "federation.sample_clients": Alias("federation.clients_per_round", FEDLLM),
    "training.num_train_epochs": Alias("training.local_epochs", HF, _whole, _OF_A_ROUND),
    "training.num_epochs": Alias("training.local_epochs", AXOLOTL, _whole, _OF_A_ROUND),
    "training.max_steps": Alias("training.local_steps", HF, remark=_OF_A_ROUND),
    "training.lr": Alias("training.learning_rate", AXOLOTL),
    "training.lr_scheduler_type": Alias("training.schedule", HF, _SCHEDULES, _BETWEEN),
    "training.lr_scheduler": Alias("training.schedule", AXOLOTL, _SCHEDULES, _BETWEEN),
    "training.optim": Alias("training.optimizer", HF, _OPTIMIZERS),
    "training.adam_beta1": Alias("training.beta1", HF),
    "training.adam_beta2": Alias("training.beta2", HF),
    "training.adam_epsilon": Alias("training.epsilon", HF),
    "training.load_best_model_at_end": Alias("evaluation.load_best_model_at_end", HF),
    "training.metric_for_best_model": Alias("evaluation.metric_for_best_model", HF),
    "training.early_stopping_patience": Alias("evaluation.early_stopping_patience", AXOLOTL),
    "training.early_stopping_steps": Alias("evaluation.early_stopping_patience", FACTORY),
    "training.max_length": Alias("data.max_length", TRL),
    "training.bf16": Alias("training.precision", HF, _precision),
    "training.fp16": Alias("training.precision", HF, _not_half),
    "training.seed": Alias("federation.seed", HF),
    "training.use_cpu": Alias("training.device", HF, _if_true("cpu")),
    "training.per_device_eval_batch_size": Alias("evaluation.batch_size", HF),
    "training.eval_batch_size": Alias("evaluation.batch_size", AXOLOTL),
    "training.output_dir": Alias("output.folder", HF),
    "training.report_to": Alias("output.trackers", HF, _trackers),
    "output.output_dir": Alias("output.folder", HF),
}
"""``section.name`` as it is elsewhere, to the setting here."""

_PACKED = (
    "rows are read together already, as many as fit training.tokens_per_pass and with little padding; "
    "none is cut or joined to another, and a step has training.batch_size rows, not packs of "
    "data.max_length tokens"
)

ALREADY = {
    "training.packing": (TRL, _PACKED),
    "training.padding_free": (TRL, _PACKED),
    "training.neat_packing": (FACTORY, _PACKED),
    "training.sample_packing": (AXOLOTL, _PACKED),
    "objective.precompute_ref_log_probs": (
        TRL,
        "the reference's log-probabilities are computed once in any case, and kept in the cache folder",
    ),
}
"""``section.name`` of what is done in any case, to whose name it is and what is done."""

ONLY = {
    "adapter.bias": (PEFT, "none"),
    "adapter.task_type": (PEFT, "CAUSAL_LM"),
    "adapter.fan_in_fan_out": (PEFT, False),
    "adapter.inference_mode": (PEFT, False),
}
"""``section.name`` of settings that are often written down at their default, to whose name it is and that
value, which is the one that there is here."""

PER_PASS, PASSES = "per_device_train_batch_size", "gradient_accumulation_steps"
"""Of transformers' ``TrainingArguments``: their product is ``training.batch_size``."""


def with_own_names(table: Mapping[str, Any]) -> tuple[Table, list[str], list[str]]:
    """Return a table in which settings have fedloom's names.

    Args:
        table: Section to its settings; what is no section is left as it is.

    Returns:
        The table, a note on each setting that was read under another name, and a line for each that
        cannot be: its setting here is given too, or its value has none here.
    """
    found: Table = {
        section: dict(own) if isinstance(own, Mapping) else own for section, own in table.items()
    }
    notes: list[str] = []
    problems: list[str] = []
    _read_batches(found, notes, problems)
    _read_what_is_done(found, notes, problems)
    _read_defaults(found, problems)
    for name, alias in ALIASES.items():
        section, key = name.split(".")
        own = found.get(section)
        if not isinstance(own, dict) or key not in own:
            continue
        theirs = own.pop(key)
        setting = alias.ours
        try:
            value = alias.value(theirs)
        except _NotReadError as error:
            problems.append(f"{name} = {quoted(theirs, 60)}: {error}")
            continue
        if value is _NOTHING:
            continue
        if isinstance(value, _Elsewhere):
            setting, value = value.ours, value.value
        place, ours = setting.split(".")
        target = found.setdefault(place, {})
        if not own and place != section:
            del found[section]
        if not isinstance(target, dict) or ours in target:
            problems.append(f"{name} is {alias.origin}'s name of {setting}, which is given too")
            continue
        target[ours] = value
        remark = f" ({alias.remark})" if alias.remark else ""
        notes.append(f"{name} is read as {setting} = {quoted(value, 60)}{remark}")
    return found, notes, problems


def _read_what_is_done(table: Table, notes: list[str], problems: list[str]) -> None:
    """Take out switches of what is done in any case, with a note on each that asks for it."""
    for name, (origin, done) in ALREADY.items():
        section, key = name.split(".")
        own = table.get(section)
        if not isinstance(own, dict) or key not in own:
            continue
        asked = own.pop(key)
        if not isinstance(asked, bool):
            problems.append(f"{name} = {quoted(asked, 60)}: it is true or false")
        elif asked:
            notes.append(f"{name} ({origin}) changes nothing: {done}")


def _read_defaults(table: Table, problems: list[str]) -> None:
    """Take out settings at the one value that there is here; any other is a problem."""
    for name, (origin, default) in ONLY.items():
        section, key = name.split(".")
        own = table.get(section)
        if not isinstance(own, dict) or key not in own:
            continue
        asked = own.pop(key)
        if type(asked) is not type(default) or asked != default:
            problems.append(
                f"{name} = {quoted(asked, 60)}: of {origin}'s values there is {quoted(default, 20)} "
                "alone; leave it out"
            )


def require_own_names(table: Mapping[str, Any], place: str) -> tuple[Table, list[str]]:
    """Return a table in which settings have fedloom's names, and the notes; see :func:`with_own_names`.

    Raises:
        SettingsError: A setting cannot be read.
    """
    found, notes, problems = with_own_names(table)
    if problems:
        raise SettingsError(problems, place)
    return found, notes


def _read_batches(table: Table, notes: list[str], problems: list[str]) -> None:
    """Read rows per device and passes that are accumulated: here a batch is all rows of a step."""
    own = table.get("training")
    if not isinstance(own, dict) or not {PER_PASS, PASSES} & own.keys():
        return
    theirs = f"training.{PER_PASS} and {PASSES}"
    if PER_PASS not in own:
        problems.append(f"training.{PASSES} needs training.{PER_PASS} beside it, or use batch_size")
        del own[PASSES]
        return
    rows, passes = own.pop(PER_PASS), own.pop(PASSES, 1)
    taken = {"batch_size", "micro_batch_size", "accumulation"} & own.keys()
    if taken:
        problems.append(f"{theirs} say what training.{min(taken)} says, which is given too")
    elif not all(isinstance(value, int) and value > 0 for value in (rows, passes)):
        problems.append(f"{theirs}: {quoted(rows, 20)} and {quoted(passes, 20)} must be 1 or more")
    else:
        own |= {"batch_size": rows * passes, "micro_batch_size": rows}
        notes.append(
            f"{theirs} are read as training.batch_size = {rows * passes}, the rows of an optimizer step, "
            f"and micro_batch_size = {rows}, those of a pass"
        )
