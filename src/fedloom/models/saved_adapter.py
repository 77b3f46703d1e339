"""A saved adapter that training goes on from: what its folder says of it, and its tensors.

Nothing in a folder is trusted. Its configuration is read as plain JSON and makes no object of PEFT; its
tensors are read from safetensors, and only once their names and shapes are those of the adapter that the
settings make. Whatever PEFT knows that would make another function of the same tensors is compared too.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from fedloom.display.untrusted_text import quoted
from fedloom.errors import ModelError, first_line
from fedloom.models import experts
from fedloom.models.adapters import AdapterModel, AdapterSettings
from fedloom.models.heads import FILE as PERSONAL
from fedloom.models.heads import OWN, is_own
from fedloom.settings.schema import parse
from fedloom.tensors import Tensors

CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

WEIGHTS = (PEFT_WEIGHTS, experts.FILE)
"""Where an adapter's tensors are: in PEFT's folders, and in those of experts."""

FILES = (CONFIG, experts.CONFIG, *WEIGHTS, PERSONAL)
"""What is read of a folder, and kept of it."""

LARGEST_CONFIG = 1 << 20
"""Bytes of a configuration; one that names every layer of a large model has some ten thousands."""

LARGEST_WEIGHTS = 16 << 30
"""Bytes of weights that are had from the Hub: factors of rank 256 for a 70B model take 13 GB."""

MOST_TIMES = 64
"""Times as many numbers as the model's own tensor that one may have to be read: ranks may differ."""

Fit = Callable[[Tensors, Tensors], Tensors]
"""Makes of the tensors of a folder, and of the model's, those of the folder in the model's shapes."""

HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?")

KINDS = {"LORA": "lora", "IA3": "ia3", "LN_TUNING": "full", "PROMPT_TUNING": "prompt"}
"""What PEFT calls adapters that can be trained on."""

RENAMED = {"prompt_embeddings": "prompt_encoder.embedding.weight"}
"""Tensors that PEFT saves under another name than it trains them."""

HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""How factors may have been initialised; by any other way the frozen weights were changed as well."""

NO_FUNCTION = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "feedforward_modules",
        "inference_mode",
        "init_ia3_weights",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "loftq_config",
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "num_attention_heads",
        "num_layers",
        "num_virtual_tokens",
        "peft_type",
        "peft_version",
        "prompt_tuning_init",
        "prompt_tuning_init_state_dict",
        "prompt_tuning_init_text",
        "qalora_group_size",
        "r",
        "revision",
        "runtime_config",
        "target_modules",
        "tokenizer_kwargs",
        "tokenizer_name_or_path",
    }
)
"""What of PEFT's configurations does not change what the tensors do, or is seen by their names and
shapes, or is compared by itself."""


@dataclass(frozen=True)
class SavedAdapter:
    """A folder, and what it says of its adapter.

    Attributes:
        name: What messages call it.
        folder: Where it is.
        settings: Those of ``[adapter]`` that it was made with.
        record: Its configuration.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    record: Mapping[str, Any]

    @property
    def base(self) -> str | None:
        """Folder or Hub name of the model it was made for, where it says so."""
        named = self.record.get("base_model_name_or_path") or self.record.get("base_model")
        return named if isinstance(named, str) else None


def holds_adapter(folder: Path) -> bool:
    """Return whether a folder is one of PEFT's, or one of experts."""
    return (folder / CONFIG).is_file() or (folder / experts.CONFIG).is_file()


def read_adapter(folder: Path, name: str) -> SavedAdapter:
    """Read what a folder says of its adapter.

    Args:
        folder: As PEFT or ``fedloom`` writes one.
        name: What messages call it.

    Raises:
        ModelError: There is none, its weights are pickled, or it is of a kind that cannot be trained on.
    """
    if (folder / experts.CONFIG).is_file():
        record = _config(folder / experts.CONFIG, name)
        found = {own: record.get(own) for own in experts.KEPT_SETTINGS}
        layers = record.get("layers")
        found |= {"router": record.get("router", "relevance")}
        found |= {"kind": "experts", "targets": list(layers) if isinstance(layers, dict) else None}
        return SavedAdapter(name, folder, _checked(found, name), record)
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"adapter.start = {name!r}: {folder} has no {CONFIG}, so it is not an adapter"
        )
    record = _config(folder / CONFIG, name)
    if not (folder / PEFT_WEIGHTS).is_file():
        raise ModelError(
            f"adapter.start = {name!r}: {folder} has no {PEFT_WEIGHTS}; pickled weights are not read: "
            "save it with PEFT's save_pretrained(folder)"
        )
    kind = record.get("peft_type")
    if kind == "P_TUNING":
        raise ModelError(
            f"adapter.start = {name!r}: of p-tuning a folder holds the embeddings alone, not the MLP "
            'that makes them; start from one of adapter.kind = "prompt"'
        )
    if kind not in KINDS:
        raise ModelError(
            f"adapter.start = {name!r}: its peft_type is {quoted(kind, 60)}; a run can start from "
            f"{', '.join(KINDS)}"
        )
    return SavedAdapter(name, folder, _checked(_settings(record, folder), name), record)


def read_tensors(
    saved: SavedAdapter, model: AdapterModel, fit: Fit = lambda held, fresh: held
) -> Tensors:
    """Return what ``model`` is written to be the saved one, float32; own parts that it lacks stay fresh.

    Args:
        saved: Of the same kind as the model's adapter.
        model: As its settings made it.
        fit: Makes of the tensors held, and of the model's, those held in shapes of the model's.

    Raises:
        ModelError: It is on other layers, of other shapes, makes another function of its tensors, holds
            numbers that are not finite, or is damaged.
    """
    fresh = model.read()
    if isinstance(model, experts.ExpertModel):
        held = _read(saved, experts.FILE, fresh)
    else:
        _require_same_function(saved, model)
        held = _read(saved, PEFT_WEIGHTS, fresh)
    if (saved.folder / PERSONAL).is_file() and any(map(is_own, fresh)):
        held |= _read(saved, PERSONAL, fresh, OWN)
    return fitted(fit(held, fresh), fresh, saved.name)


def read_part(saved: SavedAdapter, fresh: Tensors) -> Tensors:
    """Return the tensors of a folder that have a place in ``fresh``, float32.

    Raises:
        ModelError: The folder is damaged, or one is of another shape.
    """
    return _read(saved, PEFT_WEIGHTS, fresh, all_of_it=False)


def fitted(held: Tensors, fresh: Tensors, name: str) -> Tensors:
    """Return ``fresh`` with all that is held in its place; only own parts may be missing.

    Raises:
        ModelError: Names or shapes differ, or numbers are not finite; ``name`` is what messages call it.
    """
    missing = sorted(own for own in fresh.keys() - held.keys() if not is_own(own))
    if missing:
        raise _unlike(name, f"it lacks {missing[0]} ({len(missing)} in all)")
    for own, tensor in held.items():
        _require_known(own, fresh, name)
        if tensor.shape != fresh[own].shape:
            raise ModelError(
                f"adapter.start = {name!r} does not fit: {own} is {_size(tensor.shape)} there, "
                f"{_size(fresh[own].shape)} with these settings and this model"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"adapter.start = {name!r}: {own} holds numbers that are not finite; its training had "
                "diverged, take an earlier one"
            )
    return {own: held.get(own, tensor).to(tensor.dtype) for own, tensor in fresh.items()}


def _require_known(own: str, fresh: Tensors, name: str) -> None:
    if own not in fresh:
        raise _unlike(name, f"it has {own}, which is not here")


def _unlike(name: str, what: str) -> ModelError:
    return ModelError(
        f"adapter.start = {name!r} does not fit: {what}; leave adapter.targets and adapter.layers out to "
        "take the adapter's own, or name the model that it was made for"
    )


def hub_folder(name: str) -> Path | None:
    """Return where an adapter from the Hub lies on this machine, once it does; ``None`` for no Hub name.

    Args:
        name: OWNER/NAME or OWNER/NAME@REVISION.

    Raises:
        ModelError: It cannot be had, or its weights are pickled.
    """
    match = HUB_NAME.fullmatch(name)
    if match is None:
        return None
    import huggingface_hub

    path, revision = match.groups()
    found: Any = None
    try:
        for file in (CONFIG, PEFT_WEIGHTS):  # no other is asked for, pickled ones least of all
            found = huggingface_hub.try_to_load_from_cache(path, file, revision=revision)
            if not isinstance(found, str):
                url = huggingface_hub.hf_hub_url(path, file, revision=revision)
                size = huggingface_hub.get_hf_file_metadata(url).size or 0
                if size > (LARGEST_CONFIG if file == CONFIG else LARGEST_WEIGHTS):
                    raise ValueError(f"{file} has {size} bytes")
                found = huggingface_hub.hf_hub_download(path, file, revision=revision)
    except Exception as error:  # whatever the network or the Hub raises
        raise ModelError(
            f"adapter.start = {name!r} is not a folder here and cannot be had from the Hub: "
            f"{first_line(error)}"
        ) from error
    return Path(found).parent


def _settings(record: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the settings of ``[adapter]`` by a configuration of PEFT; not checked yet."""
    kind = KINDS[str(record["peft_type"])]
    if kind == "prompt":
        return {"kind": kind, "virtual_tokens": record.get("num_virtual_tokens")}
    if kind == "ia3":
        return {"kind": kind}
    found: dict[str, Any] = {"kind": kind, "targets": _layers(record, folder)}
    if kind == "lora":
        alpha = record.get("lora_alpha")
        found |= {"rank": record.get("r"), "dropout": record.get("lora_dropout") or 0.0}
        found["alpha"] = float(alpha) if isinstance(alpha, int) else alpha
        found |= {name: bool(record.get(name)) for name in ("use_dora", "use_rslora")}
        whole = record.get("modules_to_save")
        if record.get("task_type") != "SEQ_CLS" and whole:  # of classifiers PEFT lists the heads
            found["modules_to_save"] = whole
    return found


def _layers(record: Mapping[str, Any], folder: Path) -> Any:
    """Return the layers that an adapter is on, as ``adapter.targets`` names them."""
    named = record.get("target_modules")
    if named == "all-linear" or record.get("target_parameters"):
        return "all-linear"  # stacks of experts are named by no target
    narrowed = record.get("layers_to_transform") is not None or record.get("exclude_modules")
    if isinstance(named, list) and not narrowed:
        return sorted(map(str, named))
    inside = re.compile(r"base_model\.model\.(.+)\.(?:lora_A|ln_tuning_layers)\.weight")
    found = (inside.fullmatch(name) for name in _names(folder / PEFT_WEIGHTS))
    return sorted(match[1] for match in found if match)


def _checked(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Return settings, checked as those of ``[adapter]``.

    Raises:
        ModelError: They are none that an adapter can have.
    """
    settings, problems = parse(AdapterSettings, found, "adapter")
    if settings is None:
        raise ModelError(f"adapter.start = {name!r}: its configuration says {'; '.join(problems)}")
    return found


def _require_same_function(saved: SavedAdapter, model: AdapterModel) -> None:
    """Check that PEFT would make of the saved tensors what the model makes of them.

    Raises:
        ModelError: Something in the configuration says otherwise; it is named.
    """
    config: Any = model.model.peft_config["default"]
    built, record = config.to_dict(), saved.record
    begun = record.get("init_lora_weights", True)
    if begun not in HARMLESS_STARTS:
        raise ModelError(
            f"adapter.start = {saved.name!r} was initialised by {quoted(begun, 60)}, which changes the "
            "frozen weights: save it with PEFT's path_initial_model_for_weight_conversion"
        )
    for key in sorted(record.keys() - NO_FUNCTION):
        there, here = _plain(record[key]), _plain(built.get(key))
        if key == "task_type" and there is None:
            continue
        if there != here and (there or here):
            raise ModelError(
                f"adapter.start = {saved.name!r} was made with {key} = {quoted(there, 60)}, here it is "
                f"{quoted(here, 60)}: merge it into its model (PEFT's merge_and_unload) and give that as "
                "model.path"
            )


def _read(
    saved: SavedAdapter, file: str, fresh: Tensors, before: str = "", *, all_of_it: bool = True
) -> Tensors:
    """Return the tensors of a file in float32, under ``before`` and their names there.

    None is read that has no place in ``fresh``, or is many times as large.

    Raises:
        ModelError: The file is damaged, or holds other tensors (if ``all_of_it`` is asked for).
    """
    path, found, name = saved.folder / file, {}, saved.name
    try:
        with safe_open(path, "pt") as content:
            for key in content.keys():  # noqa: SIM118 (no mapping)
                own = before + RENAMED.get(key, key)
                if own not in fresh and not all_of_it:
                    continue
                _require_known(own, fresh, name)
                shape = content.get_slice(key).get_shape()
                if math.prod(shape) > MOST_TIMES * fresh[own].numel():
                    raise _unlike(
                        name, f"{own} is {_size(shape)}, and not {_size(fresh[own].shape)}"
                    )
                tensor = content.get_tensor(key)
                if not tensor.is_floating_point():
                    raise ModelError(
                        f"adapter.start = {name!r}: {own} is {tensor.dtype}, as no adapter's tensor is"
                    )
                found[own] = tensor.float()
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(
            f"adapter.start = {name!r}: {path} is damaged: {first_line(error)}"
        ) from error
    return found


def _names(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as content:
            return list(content.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} is damaged: {first_line(error)}") from error


def _config(path: Path, name: str) -> dict[str, Any]:
    said = f"adapter.start = {name!r}: {path} is not a configuration of an adapter"
    return read_object(path, said)


def read_object(path: Path, said: str) -> dict[str, Any]:
    """Return the JSON object in a file of at most :data:`LARGEST_CONFIG` bytes.

    Args:
        path: The file.
        said: How the message begins where it is none.

    Raises:
        ModelError: It is none, is larger, or cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_CONFIG + 1)
        if len(content) > LARGEST_CONFIG:
            raise ValueError(f"it has more than {LARGEST_CONFIG} bytes")
        record = json.loads(content)
        if not isinstance(record, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{said}: {first_line(error)}") from error
    return record


def _plain(value: Any) -> Any:
    """Return a value of a configuration as JSON has it, sets and lists in order."""
    if isinstance(value, set | list | tuple):
        return sorted(map(str, value))
    if isinstance(value, Mapping):
        return {str(key): _plain(own) for key, own in value.items()}
    return str(value.value) if hasattr(value, "value") else value


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
