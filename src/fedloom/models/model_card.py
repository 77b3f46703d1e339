"""The model card of a saved folder, and the facts it is made of.

Facts are one JSON object, kept beside the weights (``fedloom.json``); the card, ``README.md``, is made of
them alone. Its front matter is what the Hub reads. Nothing in either is a row's text.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedloom.display.untrusted_text import named, short
from fedloom.models.experts import CONFIG as EXPERTS
from fedloom.models.load import fingerprint
from fedloom.models.saved import CLASSIFIER, FACTS, FolderKind, kind_of

Facts = dict[str, Any]
"""What is known of a saved folder, as JSON."""

CARD = "README.md"

LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,60}")
"""A licence as the Hub names it."""

LONGEST_NAME = 100
"""Characters of a licence that a file names in words."""

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""``dtype`` of what was trained in a precision."""

PROMPT_FORMATS = ("chat", "plain", "text", "unknown")
"""``format`` of ``prompt``."""

LIBRARIES = ("transformers", "peft", "torch", "fedloom")

SNAPSHOT = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]+)/?$")
"""How a model's folder in the cache of the Hub ends: owner, name and commit."""


def base_facts(path: str, revision: str | None, digest: str | None = None) -> Facts:
    """Return how a colleague finds a base model.

    Args:
        path: Folder or Hub name, as it was loaded.
        revision: Branch, tag or commit on the Hub.
        digest: The fingerprint of a folder, if it is known already.

    Returns:
        ``path``: the Hub name, or the whole path of a folder, which may be another machine's; ``name``:
        the Hub name, or the folder's;
        ``hub``: whether it is from the Hub; ``revision``: its commit, where the cache knows it;
        ``sha256`` of weights, configuration and tokenizer where the files are known, and ``licence``
        where they name one; null otherwise.
    """
    folder, here = Path(path), os.path.isdir(path)
    found = _of_cache(folder) if here else None
    if not here and not _is_hub_name(path):
        known = {"hub": False, "revision": None, "sha256": digest, "licence": None}
        return {"path": path, "name": folder.name, **known}
    if here and found is None:
        whole = folder.resolve()
        return {
            "path": str(whole),
            "name": whole.name,
            "hub": False,
            "revision": None,
            "sha256": digest or fingerprint(path),
            "licence": licence_of(whole),
        }
    files: Path | None = folder
    name, commit = found if found is not None else (path, revision)
    if found is None:
        files = _cached(path, revision)
        own = _of_cache(files) if files is not None else None
        commit = own[1] if own is not None else revision
    return {
        "path": name,
        "name": name,
        "hub": True,
        "revision": commit,
        "sha256": fingerprint(str(files)) if files is not None else None,
        "licence": licence_of(files) if files is not None else None,
    }


def _is_hub_name(path: str) -> bool:
    import huggingface_hub

    hub: Any = huggingface_hub
    try:
        hub.utils.validate_repo_id(path)
    except hub.errors.HFValidationError:
        return False
    return True


def _of_cache(folder: Path) -> tuple[str, str] | None:
    """Return Hub name and commit of a folder in the Hub's cache."""
    match = SNAPSHOT.search(str(folder.absolute()))
    return (f"{match[1]}/{match[2]}", match[3]) if match else None


def _cached(name: str, revision: str | None) -> Path | None:
    """Return the folder of a Hub model in the cache, without asking the Hub."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def licence_of(folder: Path) -> str | None:
    """Return the licence that a model's files name: in its card, or else the first line of LICENSE."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    front = text.split("---", 2)[1] if text.startswith("---") and text.count("---") > 1 else ""
    for line in front.splitlines():
        key, _, value = line.partition(":")
        if key == "license" and LICENCE.fullmatch(value.strip(" \"'")):
            return value.strip(" \"'")
    for path in sorted(folder.glob("LICEN[SC]E*")):
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            continue
        for line in lines:
            if line.strip():
                return short(line, LONGEST_NAME)
    return None


def versions() -> dict[str, str]:
    """Return the versions of the libraries that a saved folder depends on."""
    return {name: version(name) for name in LIBRARIES}


def describe(folder: Path, facts: Facts, *, classifier: Any = None) -> None:
    """Write the card of a saved folder and its facts, and have PEFT's configuration name the base.

    Args:
        folder: What was saved.
        facts: See :func:`card_text`.
        classifier: Configuration of a classifier's base, with the names of its classes.

    Raises:
        OSError: A file cannot be written.
    """
    base = facts["base"]
    config = folder / "adapter_config.json"
    if config.is_file():
        content = json.loads(config.read_text(encoding="utf-8"))
        content |= {"base_model_name_or_path": base["path"], "revision": base["revision"]}
        if content.get("tokenizer_name_or_path"):
            content["tokenizer_name_or_path"] = base["path"]
        config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    experts = folder / EXPERTS
    if experts.is_file():
        content = json.loads(experts.read_text(encoding="utf-8"))
        content["base_model"] = base["path"]
        experts.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    kind = kind_of(folder)
    if classifier is not None and kind not in ("model", "gguf"):
        content = classifier.to_dict() | {"use_cache": True}
        content.pop("_name_or_path", None)
        written = json.dumps(content, indent=1, sort_keys=True, default=str) + "\n"
        (folder / CLASSIFIER).write_text(written, encoding="utf-8")
    text = json.dumps(facts, indent=1, allow_nan=False) + "\n"
    (folder / FACTS).write_text(text, encoding="utf-8")
    (folder / CARD).write_text(card_text(facts, kind), encoding="utf-8")


def loading(facts: Facts, kind: FolderKind) -> str:
    """Return four lines of Python, or fewer, that load a folder when it is the current one.

    Afterwards ``model`` and ``tokenizer`` are there. Texts in it are JSON, which is Python.
    """
    base = facts["base"]
    where = _literal(base["path"])
    pinned = f", revision={_literal(base['revision'])}" if base["revision"] else ""
    dtype = _literal(facts["dtype"])
    task = "CausalLM" if facts["task"] == "causal" else "SequenceClassification"
    words = f"AutoTokenizer.from_pretrained({where}{pinned})"
    if kind == "experts" or (kind == "own parts" and facts["client"] is not None):
        return f'from fedloom.models.saved import load\nmodel, tokenizer = load(".", base={where})'
    if kind == "gguf":
        return "llama-cli -m *.gguf     # or llama-server -m *.gguf, which speaks OpenAI's HTTP API"
    if kind == "model":
        code = ", trust_remote_code=True" if facts.get("own_code") else ""
        words = words if facts.get("tokenizer_of_base") else 'AutoTokenizer.from_pretrained(".")'
        return (
            f"from transformers import AutoModelFor{task}, AutoTokenizer\n"
            f'model = AutoModelFor{task}.from_pretrained(".", dtype={dtype}{code})\n'
            f"tokenizer = {words}"
        )
    classes = ', config=AutoConfig.from_pretrained("classifier.json")' if facts["classes"] else ""
    imported = f"{'AutoConfig, ' if classes else ''}AutoModelFor{task}, AutoTokenizer, PeftModel"
    names = imported.removesuffix(", PeftModel")
    return (
        f"from peft import PeftModel\nfrom transformers import {names}\n"
        f"base = AutoModelFor{task}.from_pretrained({where}{pinned}, dtype={dtype}{classes})\n"
        f'model, tokenizer = PeftModel.from_pretrained(base, "."), {words}'
    )


def _literal(text: str) -> str:
    """Return a text as Python has it; nothing in it ends the string."""
    return json.dumps(text, ensure_ascii=False)


def card_text(facts: Facts, kind: FolderKind) -> str:
    """Return a model card.

    Args:
        facts: ``base`` (:func:`base_facts`), ``experiment``, ``client`` (whose it is, or null),
            ``objective``, ``method``, ``adapter``, ``rounds``, ``clients``, ``precision``,
            ``quantization``, ``dtype`` to load it in, ``task`` (causal, classification or reward),
            ``prompt`` (``format``, ``example``, ``template``), ``classes``, ``versions``, ``data``
            (``kind``, ``sources`` if all are built in, ``partition``; not of a run from before),
            ``evaluation`` (``metric``, ``before``, ``after``, ``rows``; null where there was none),
            ``privacy`` (sentences, where something is promised of it), ``merged`` (how many adapters
            it was merged from, if it was) and with it ``objectives`` (theirs), and of a whole model
            ``own_code`` and ``tokenizer_of_base``.
        kind: What the folder holds.
    """
    beside = f" and before `{CLASSIFIER}`" if facts["classes"] and kind != "model" else ""
    parts = [
        _front_matter(facts, kind),
        f"# {_plain(_title(facts))}",
        _what(facts, kind),
        "## How to load it",
        f"Within this folder; elsewhere, with its path in place of `.`{beside}:",
        _fenced(loading(facts, kind), "sh" if kind == "gguf" else "python"),
        *_remarks(facts, kind),
        "## Base model",
        _base(facts),
        "## Prompt format",
        *_prompt(facts),
        *_data(facts),
    ]
    if len(facts["classes"]) == 1:
        parts += [
            "## Output",
            "One number, the reward of a prompt with its answer: higher is better.",
        ]
    elif facts["classes"]:
        parts += ["## Classes", "In the order of their ids, from 0:"]
        parts.append(_fenced(json.dumps(facts["classes"], ensure_ascii=False, indent=0), "json"))
    parts += ["## Evaluation", _evaluation(facts)]
    if facts.get("merged"):
        parts += ["## Privacy", *_merged_privacy(facts["privacy"])]
    elif facts.get("privacy"):
        parts += ["## Privacy", *(f"{sentence}." for sentence in facts["privacy"])]
    listed = ", ".join(f"{name} {own}" for name, own in facts["versions"].items())
    parts += ["## Versions", f"{listed}.", ""]
    return "\n\n".join(parts).rstrip("\n") + "\n"


def _front_matter(facts: Facts, kind: FolderKind) -> str:
    """Return what the Hub reads; texts in it are JSON, which is YAML."""
    base, task = facts["base"], facts["task"]
    lines = []
    if base["hub"]:
        lines.append(f"base_model: {json.dumps(base['name'])}")
    if kind != "experts":
        libraries = {"model": "transformers", "gguf": "gguf"}
        lines.append(f"library_name: {libraries.get(kind, 'peft')}")
    if base["licence"]:
        known = (
            bool(LICENCE.fullmatch(base["licence"])) and base["licence"] == base["licence"].lower()
        )
        lines.append(f"license: {json.dumps(base['licence'] if known else 'other')}")
        if not known:
            lines.append(f"license_name: {json.dumps(base['licence'], ensure_ascii=False)}")
    generation = task == "causal"
    lines.append(f"pipeline_tag: {'text-generation' if generation else 'text-classification'}")
    lines.append("tags:")
    objectives = facts.get("objectives") or [facts["objective"]]
    tags = ("fedloom", "federated-learning", *objectives, facts["method"], facts["adapter"])
    lines += [f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags)]
    return "\n".join(["---", *lines, "---"])


def _title(facts: Facts) -> str:
    whose = "" if facts["client"] is None else f", client {facts['client']}"
    return f"{facts['experiment']}{whose}"


def _what(facts: Facts, kind: FolderKind) -> str:
    what = {
        "model": "A model",
        "gguf": "A model in llama.cpp's format, GGUF",
        "peft": f"An adapter ({facts['adapter']}, in PEFT's format)",
        "own parts": f"An adapter ({facts['adapter']}, in PEFT's format) and parts at the output layer",
        "experts": "A mixture of LoRA experts",
    }[kind]
    whose = "" if facts["client"] is None else f" of client {facts['client']} alone"
    clients = f"{facts['clients']} client{'s' if facts['clients'] != 1 else ''}"
    rounds = f"{facts['rounds']} round{'s' if facts['rounds'] != 1 else ''}"
    if facts.get("merged"):
        objectives = facts.get("objectives") or [facts["objective"]]
        several = f"objective{'s' if len(objectives) > 1 else ''}"
        listed = ", ".join(f"`{objective}`" for objective in objectives)
        return (
            f"{what}, merged by `{facts['method']}` from {facts['merged']} adapters that were trained "
            f"with the {several} {listed}, with no round; `merge.json` says how."
        )
    return (
        f"{what}{whose}, trained with the objective `{facts['objective']}` by the federated method "
        f"`{facts['method']}`: {rounds}, {clients}, precision {facts['precision']}."
    )


def _remarks(facts: Facts, kind: FolderKind) -> list[str]:
    found = []
    whole = kind in ("model", "gguf")
    if not facts["base"]["hub"] and not (whole and not facts.get("tokenizer_of_base")):
        found.append(
            "The base is a folder of the machine that trained it, and none of the Hub; elsewhere, write "
            "in place of its path that of a folder with the SHA-256 below."
        )
    own = kind == "own parts" and facts["client"] is not None
    if own:
        found.append(
            "PEFT alone loads the adapter without this client's own parts at the output layer "
            "(`personal.safetensors`), which is another model. `fedloom export RUN --client N` writes a "
            "folder for transformers alone."
        )
    elif kind == "own parts":
        found.append(
            "`personal.safetensors` is what clients' own parts at the output layer begin with; of the "
            "log-probabilities it changes nothing."
        )
    if kind == "experts":
        found.append("No other library than fedloom knows such a mixture.")
    if facts["quantization"] != "none" and not whole:
        found.append(
            f"The base was quantised in training ({facts['quantization']}); loaded whole, as here, its "
            "log-probabilities differ by what quantisation rounds away."
        )
    return found


def _base(facts: Facts) -> str:
    base = facts["base"]
    if base["hub"]:
        at = f", revision {_code(base['revision'])}" if base["revision"] else ""
        text = f"{_code(base['name'])} on the Hub{at}."
    else:
        text = f"A local folder, {_code(base['name'])}."
    if base["sha256"]:
        text += f" SHA-256 of weights, configuration and tokenizer: `{base['sha256']}`."
    licence = _code(base["licence"]) if base["licence"] else None
    said = f"Licence of the base: {licence}." if licence else "Its files name no licence."
    return f"{text} {said}"


def _prompt(facts: Facts) -> list[str]:
    prompt = facts["prompt"]
    if prompt["format"] == "unknown":
        why = "Rows were on clients' machines"
        if facts.get("merged"):
            why = (
                "The merged adapters were trained on prompts of several forms, or of one not known"
            )
        return [
            f"{why}: conversations are rendered with the chat template of the "
            "tokenizer, and plain texts are continued as they stand."
        ]
    told = {
        "chat": "Conversations, rendered with this chat template; an example with placeholders:",
        "plain": "Plain text that the model continues, without a chat template:",
        "text": "The text alone, without anything around it:",
    }[prompt["format"]]
    parts = [told, _fenced(prompt["example"])]
    if prompt.get("template"):
        parts += [
            "This is the template, where the base's tokenizer has none of its own:",
            _fenced(prompt["template"], "jinja"),
        ]
    return parts


def _data(facts: Facts) -> list[str]:
    """Return what is said of the rows, which are with their clients: none of them, and no path."""
    data = facts.get("data")
    if not data:
        return []
    named_sets = ", ".join(_code(name) for name in data["sources"])
    where = f"from {named_sets}" if named_sets else "of sources that are not named here"
    divided = f" Divided between clients by `{data['partition']}`." if data["partition"] else ""
    kind = f"{data['kind']} rows" if data["kind"] else "Rows"
    return ["## Data", f"{kind[0].upper()}{kind[1:]}, {where}.{divided}"]


def _merged_privacy(promises: Sequence[str]) -> list[str]:
    """Return what is said of privacy, of the promises of all adapters that were merged."""
    if not promises:
        return ["No privacy is promised: not all merged adapters have a promise."]
    return [
        "This is promised of each merged adapter for the rows that it was trained on; of rows that "
        "several of them were trained on the epsilons add up:",
        *(f"{_plain(sentence)}." for sentence in promises),
    ]


def _evaluation(facts: Facts) -> str:
    found = facts["evaluation"]
    if found is None and facts.get("merged"):
        return "Not scored yet."
    if found is None:
        return "Not part of this folder: the run's `summary.json` has what was measured."
    cells = [_number(found["before"]), _number(found["after"])]
    return (
        f"On {found['rows']}, measured by fedloom:\n\n| metric | before training | after |\n"
        f"| --- | ---: | ---: |\n| {found['metric']} | {cells[0]} | {cells[1]} |"
    )


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _fenced(text: str, language: str = "") -> str:
    """Return a block of code; its fence is longer than any in the text."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _code(text: str) -> str:
    """Return a name as code in a line."""
    return f"`{named(text).replace('`', chr(39))}`"


def _plain(text: str) -> str:
    """Return a name in a heading, without markup."""
    return re.sub(r"([\\`*_\[\]<>#|])", r"\\\1", named(text))
