"""Backbone and tokenizer from a local folder or the Hub; the one file that loads weights.

Weights are read from safetensors only: a pickled checkpoint could run code. Code that comes with a model
is never run: every loader is told so, and a model that names code of its own is refused before anything
of it is loaded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedloom.errors import ModelError, first_line
from fedloom.models.architecture import head_parts, positions, reads_padding, require_causal
from fedloom.models.configuration import context, keep_blocks, text_part
from fedloom.models.quantize import (
    Quantization,
    check_quantization,
    loading_options,
    quantize_loaded,
)
from fedloom.models.remote_code import AUTO_MAP, asks_to_run_code, needs_code, require_no_code
from fedloom.randomness import derive_seed
from fedloom.settings.schema import Settings
from fedloom.settings.suggestions import did_you_mean

TINY = "tiny"
"""Name of the model that the package makes itself."""

TINY_SUMS = "tiny:sums"
"""Name of another one, which has read sums of two-digit numbers and half knows them."""

MADE = (TINY, TINY_SUMS)

START = "{{ bos_token }}"

PLAIN_CHAT = START + (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""For tokenizers without a chat template of their own: one line a message, after its role, behind the
start token where the tokenizer writes one."""

SAMPLED_ABOVE = 256 * 1024**2
"""Files above this many bytes enter a fingerprint by size, first and last mebibyte."""


class ModelSettings(Settings):
    """``[model]``: the backbone."""

    path: str = TINY
    """Folder, Hub name, or "tiny": a small model that is made on the spot without a network."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    quantization: Quantization = "none"
    """"int8" or "int4": the frozen backbone in 8 bits (GPU or CPU) or 4 bits (GPU); the adapter is
    trained in full precision on it."""
    dropout: bool | None = None
    """Whether dropout of the backbone's own configuration acts in training (default: only where the
    objective has no reference model, of which it would make another model; as TRL has it). The adapter's
    own is adapter.dropout."""


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """Load a tokenizer that can pad.

    Raises:
        ModelError: The folder is missing or holds no tokenizer.
    """
    from transformers import AutoTokenizer

    silence_transformers()
    _check_folder(path)
    if Path(path).is_dir() and not any(
        (Path(path) / name).is_file()
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
    ):
        raise ModelError(
            f"no tokenizer in {path}: it needs tokenizer.json (or tokenizer.model); save one there "
            "with AutoTokenizer.from_pretrained(...).save_pretrained(folder)"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        if asks_to_run_code(error):
            raise needs_code(path) from None
        hint = f"; {_near(path)}".rstrip("; ")
        raise ModelError(
            f"cannot load the tokenizer of {path}: {first_line(error)}{hint}"
        ) from error
    if tokenizer.chat_template is None:
        begins = tokenizer.bos_token_id in tokenizer("x")["input_ids"][:1]
        tokenizer.chat_template = PLAIN_CHAT if begins else PLAIN_CHAT.removeprefix(START)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _padding(tokenizer, path, revision)
    return tokenizer


def _padding(tokenizer: Any, path: str, revision: str | None) -> str:
    """Return what to pad with if a tokenizer does not say: as the model's configuration does, or its end.

    Raises:
        ModelError: There is neither.
    """
    try:
        number = getattr(text_part(_configuration(path, revision)), "pad_token_id", None)
    except (OSError, ValueError, KeyError):  # for the model's loader to complain about
        number = None
    if isinstance(number, int) and number >= 0:
        found = tokenizer.convert_ids_to_tokens(number)
        if isinstance(found, str):
            return found
    if tokenizer.eos_token is None:
        raise ModelError(f"the tokenizer of {path} has neither a padding nor an end token")
    return str(tokenizer.eos_token)


def stop_tokens(path: str, revision: str | None = None) -> tuple[int, ...]:
    """Return the tokens at which a model's generation stops, as its files say; empty where they do not.

    Args:
        path: Folder or Hub name.
        revision: Branch, tag or commit on the Hub.

    Raises:
        ModelError: There is no configuration, or it names code of its own.
    """
    from transformers import GenerationConfig

    silence_transformers()
    _check_folder(path)
    try:
        own: Any = GenerationConfig
        whole = own.from_pretrained(path, revision=revision, trust_remote_code=False)
        found = whole.eos_token_id
    except (OSError, ValueError):  # most base models have none
        found = None
    if found is None:
        found = getattr(text_part(configuration_of(path, revision)), "eos_token_id", None)
    several = found if isinstance(found, list | tuple) else [found]
    return tuple(token for token in several if isinstance(token, int))


def load_backbone(
    path: str,
    *,
    revision: str | None = None,
    classes: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    pad_token_id: int,
    seed: int = 0,
    quantization: Quantization = "none",
    device: torch.device | None = None,
    blocks: int | None = None,
) -> nn.Module:
    """Load the backbone with an LM head or, when there are ``classes``, a new classification head.

    Args:
        path: Folder or Hub name.
        revision: Branch, tag or commit on the Hub.
        classes: Class names in the order of their ids; empty for a causal LM.
        dtype: Of the weights.
        pad_token_id: Stored in the configuration of a classifier that pools before padding. A causal
            model's stays as it is: some make other embeddings of it when they are loaded again (RoBERTa
            and XGLM their positions, Youtu a row of zeros).
        seed: Initialises the classification head.
        quantization: Of its linear layers.
        device: Where it goes (default: CPU).
        blocks: Load so many first blocks only, and none of the weights of the others (default: all).

    Raises:
        ModelError: The folder is missing, has no weights, its architecture is not known, or it cannot
            be quantised on this device.
    """
    silence_transformers()
    device = device or torch.device("cpu")
    check_quantization(quantization, device)
    _check_weights(path)
    options: dict[str, Any] = {"revision": revision, "dtype": dtype, "use_safetensors": True}
    options |= loading_options(quantization, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "classification head"))
        try:
            model, report, other_classes = _from_checkpoint(path, classes, blocks, options)
        except ModelError:
            raise
        except Exception as error:  # transformers raises whatever its architectures raise
            raise ModelError(f"cannot load the model {path}: {first_line(error)}") from error
        _require_whole(path, model, report, begins=head_parts(model) if classes else [])
        if other_classes:
            _begin_head(model)  # the checkpoint's own is for other classes
    config: Any = model.config
    config.use_cache = False
    model = quantize_loaded(model.requires_grad_(False), quantization, device)
    model = model if "device_map" in options else model.to(device)
    if classes and reads_padding(model):
        _set_padding(config, pad_token_id)
    if not classes and blocks is None:
        require_causal(model, path)
    return model


def _from_checkpoint(
    path: str, classes: tuple[str, ...], blocks: int | None, options: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any], bool]:
    """Load a model with the head that is needed; weights that the checkpoint lacks are random.

    Args:
        path: Folder or Hub name.
        classes: See :func:`load_backbone`.
        blocks: Likewise.
        options: Of the loader of transformers; ``revision`` among them.

    Returns:
        The model, what transformers reports of its weights, and whether the checkpoint's own
        classification head is for other classes.

    Raises:
        ModelError: transformers has no such model, or the checkpoint's classes have no one order.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    factory: Any = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    shape = _configuration(path, options["revision"])
    _require_known(path, shape, factory)
    has_head = any("Classification" in name for name in shape.architectures or ())
    known = tuple(own for _, own in sorted((shape.id2label or {}).items()))
    if has_head and known == classes:
        _require_one_order(path, shape)
    _set_classes(shape, classes)
    if blocks is not None:
        keep_blocks(shape, range(blocks))
    loaded: tuple[nn.Module, dict[str, Any]] = factory.from_pretrained(
        path,
        config=shape,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # which would be random: the caller looks at the report
        output_loading_info=True,
        **options,
    )
    return *loaded, bool(classes) and has_head and known != classes


def _require_known(path: str, config: Any, factory: Any) -> None:
    """Check that transformers has a model with the head that is asked for of a configuration's kind.

    Raises:
        ModelError: It has not.
    """
    if type(config) not in factory._model_mapping:
        head = "classifier" if "Classification" in factory.__name__ else "causal language model"
        raise ModelError(
            f"{path} is a {config.model_type!r}, of which transformers has no {head} "
            f"({factory.__name__}); take another model"
        )


def _require_whole(
    path: str, model: nn.Module, report: dict[str, Any], begins: Sequence[str]
) -> None:
    """Check that a checkpoint has all of a model's weights: others would be random.

    Args:
        path: Its name in the message.
        model: As loaded.
        report: What transformers says of loading it.
        begins: Modules that may start again.

    Raises:
        ModelError: Some are not there, or of another size.
    """

    def needed(names: Iterable[str]) -> list[str]:
        own = tuple(f"{name}." for name in begins)
        return sorted(name for name in names if not name.startswith(own))

    sizes = {name: (there, here) for name, there, here in report["mismatched_keys"]}
    if missing := needed(report["missing_keys"]):
        raise ModelError(
            f"the weights of {path} lack {len(missing)} of {type(model).__name__}'s tensors, such as "
            f"{missing[0]}: they would be random; take a whole checkpoint of this kind of model"
        )
    if other := needed(sizes):
        there, here = (" x ".join(map(str, size)) for size in sizes[other[0]])
        raise ModelError(
            f"the weights of {path} do not fit its config.json: {other[0]} is {there} in the file and "
            f"{here} by the configuration ({len(other)} such tensors)"
        )


def _require_one_order(path: str, config: Any) -> None:
    """Check that a classifier's two tables of classes are the same, where its head is kept.

    Raises:
        ModelError: They number a class differently.
    """
    numbers = config.label2id or {}
    for number, name in (config.id2label or {}).items():
        if numbers.get(name, number) != number:
            raise ModelError(
                f"the classes of {path} have two orders: id2label says {number} is {name!r}, label2id "
                f"that {name!r} is {numbers[name]}; mend its config.json as its classifier was trained"
            )


def _begin_head(model: Any) -> None:
    """Initialise what a model has beside its backbone, as transformers does a head that is new."""
    spread = float(getattr(model.config, "initializer_range", None) or 0.02)
    backbone = f"{model.base_model_prefix}."
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not f"{name}.".startswith(backbone):
            nn.init.normal_(module.weight, std=spread)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _set_classes(config: Any, classes: tuple[str, ...]) -> None:
    if classes:
        config.num_labels = len(classes)
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: number for number, name in enumerate(classes)}
        single = len(classes) == 1  # a reward, which transformers has for a regression
        config.problem_type = "regression" if single else "single_label_classification"


def _set_padding(config: Any, pad_token_id: int) -> None:
    """Name what rows are padded with, in the section that a classifier reads too (Gemma 3)."""
    config.pad_token_id = pad_token_id
    config.get_text_config().pad_token_id = pad_token_id


def empty_backbone(
    path: str,
    *,
    revision: str | None = None,
    classes: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
    pad_token_id: int,
    blocks: int | None = None,
) -> nn.Module:
    """Return the backbone's structure without any weights (on the device ``meta``), to count by.

    Args are those of :func:`load_backbone`.

    Raises:
        ModelError: There is no configuration, or its architecture is not known.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    silence_transformers()
    _check_folder(path)
    factory: Any = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    try:
        config = _configuration(path, revision)
        _require_known(path, config, factory)
        _set_classes(config, classes)
        if classes:
            _set_padding(config, pad_token_id)
        if blocks is not None:
            keep_blocks(config, range(blocks))
        with torch.device("meta"):
            model: nn.Module = factory.from_config(config, dtype=dtype, trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # transformers raises whatever its architectures raise
        raise ModelError(f"cannot read the model {path}: {first_line(error)}") from error
    return model.requires_grad_(False)


def context_length(model: nn.Module) -> int:
    """Return how many tokens of a text the model reads at most.

    Its embeddings of positions may be fewer than its configuration says; virtual tokens take places.
    """
    config: Any = model.config
    adapter = getattr(model, "active_peft_config", None)
    virtual = int(getattr(adapter, "num_virtual_tokens", None) or 0)
    named, table = context(config), positions(model)
    return (named if table is None else min(named, table)) - virtual


def configuration_of(path: str, revision: str | None = None) -> Any:
    """Return a model's configuration as its files have it.

    Raises:
        ModelError: There is none, or it names code of its own.
    """
    _check_folder(path)
    try:
        return _configuration(path, revision)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot read the model {path}: {first_line(error)}") from error


def context_of(path: str, revision: str | None = None) -> int:
    """Return how many tokens a model reads at most, by its configuration alone.

    Raises:
        ModelError: There is no configuration, or it names code of its own.
    """
    return context(configuration_of(path, revision))


def fingerprint(path: str) -> str:
    """Return SHA-256 over a folder's weights, configuration and tokenizer; of the name otherwise."""
    digest = hashlib.sha256()
    folder = Path(path)
    if not folder.is_dir():
        return hashlib.sha256(path.encode()).hexdigest()
    for file in sorted(folder.iterdir()):
        if file.suffix in {".safetensors", ".json", ".model"}:
            digest.update(f"{file.name}|{file.stat().st_size}|".encode())
            _digest_file(digest, file)
    return digest.hexdigest()


def silence_transformers() -> None:
    """Keep transformers' bars and load reports off the terminal; errors still come through."""
    from transformers.utils import logging as module

    logging: Any = module
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _digest_file(digest: Any, file: Path) -> None:
    with file.open("rb") as stream:
        if file.stat().st_size <= SAMPLED_ABOVE:
            while block := stream.read(1 << 20):
                digest.update(block)
            return
        digest.update(stream.read(1 << 20))
        stream.seek(-(1 << 20), 2)
        digest.update(stream.read())


def _is_local(path: str) -> bool:
    return Path(path).is_dir() or path.startswith(("/", ".", "~")) or path.count("/") > 1


def _near(path: str) -> str:
    """Return a hint at a model that is there, with a blank behind it: a folder beside it, or "tiny"."""
    beside = Path(path).parent
    folders = [
        str(beside / own.name) for own in beside.glob("*/") if os.path.isfile(own / "config.json")
    ]
    return did_you_mean(str(Path(path)), ["tiny", *folders])


def _check_folder(path: str) -> None:
    if _is_local(path) and not (Path(path) / "config.json").is_file():
        state = "has no config.json" if Path(path).is_dir() else "is not a folder"
        raise ModelError(
            f"model.path {path!r} {state}; {_near(path)}"
            'give a folder in Hugging Face layout, a Hub name, or "tiny"'
        )
    require_no_code(path)


def _configuration(path: str, revision: str | None) -> Any:
    """Load a model's configuration.

    Raises:
        ModelError: It names code of its own.
        OSError: There is none.
        ValueError: It is not right.
    """
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except OSError:
        raise
    except Exception as error:  # a configuration's own checks raise what they like
        if asks_to_run_code(error):
            raise needs_code(path) from None
        raise ValueError(first_line(error)) from error
    if getattr(config, AUTO_MAP, None):  # of a Hub name, whose files were not here to be looked at
        raise needs_code(path)
    return config


def _check_weights(path: str) -> None:
    _check_folder(path)
    folder = Path(path)
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        pickled = [file.name for file in folder.glob("*.bin")]
        hint = f"; {pickled[0]} is pickled and is not read, convert it" if pickled else ""
        raise ModelError(f"no weights in {path}: it needs model.safetensors{hint}")


def require_reachable(path: str) -> None:
    """Check, before anything is loaded, that a model which is meant to lie in a folder does.

    Raises:
        ModelError: It does not, or brings code of its own.
    """
    if path not in MADE:
        _check_folder(path)
