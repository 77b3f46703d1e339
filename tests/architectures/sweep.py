"""What becomes of one architecture: loaded, trained, saved, loaded elsewhere, merged, asked in a batch."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from fedloom.data.batch import Batch, Sequences
from fedloom.errors import ModelError
from fedloom.evaluation.generate import continue_tokens, load_encoder
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.architecture import is_linear, switch_dropout_off
from fedloom.models.backbone_delta import products
from fedloom.models.export import export_causal
from fedloom.models.flop_shape import block_of
from fedloom.models.heads import PersonalModules, attach_personal
from fedloom.models.load import load_backbone, load_tokenizer
from fedloom.objectives import OBJECTIVES
from fedloom.objectives.logps import completion_logps

LENGTHS = (40, 31, 27, 36)
"""Tokens of the rows; beyond the sliding windows of the small models."""

PROMPTS = (3, 12, 27)

NEW_TOKENS = 6

THEORY = {
    "dpo": log(2),
    "robust_dpo": log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "ipo": 25.0,
    "kto": 0.5,
    "bco": log(2),
    "pdpo": log(2),
    "pkto": 0.5,
}
"""Loss of each objective with a reference where policy and reference are one: -log sigmoid 0,
(1 / 2 beta)^2 at beta = 0.1, 1 - sigmoid 0."""


NAMES = (
    "_name_or_path", "architectures", "dtype", "tie_word_embeddings", "transformers_version", "use_cache",
)  # fmt: skip
"""Of a configuration, what names a file, a class, or the precision of the file; whether the ends are tied,
which transformers itself corrects (BigBird-Pegasus); and whether generation has a cache, which an export
switches on (MPT's was off)."""


@dataclass(frozen=True)
class Outcome:
    """What was measured; errors are largest absolute differences of a row's log-prob, in nats.

    Attributes:
        refused: What a user is told where the model is not taken; nothing else is measured then.
        tensors: Of the adapter.
        left_out: Ends of the names of linear layers in blocks that get no adapter.
        without_gradient: Those of them that no gradient reached in two steps.
        moved: By how much two steps changed the log-probs.
        padded: Rows in a batch against each alone, without padding, by plain transformers.
        ratios: Largest log-ratio to the reference before any step, exactly.
        losses: By objective with a reference, before any step.
        saved: The saved adapter in plain transformers and PEFT.
        moved_weights: With the factors' product in the frozen weights in place of beside them, as FLoRA,
            FedEx-LoRA and FlexLoRA have it: what the model says, the reference, and the saved folder in
            plain transformers and PEFT; ``None`` with factors of a stack of experts, where they are refused.
        merged: The merged export in plain transformers, or why there is none.
        configuration: Names by which the export's configuration differs from the checkpoint's.
        batched: Whether answers in a batch are those one by one.
    """

    refused: str = ""
    tensors: int = 0
    left_out: tuple[str, ...] = ()
    without_gradient: tuple[str, ...] = ()
    moved: float = 0.0
    padded: float = 0.0
    ratios: float = 0.0
    losses: dict[str, float] | None = None
    saved: float = 0.0
    moved_weights: float | None = 0.0
    merged: float | str = 0.0
    configuration: tuple[str, ...] = ()
    batched: bool = True


def swept(folder: Path, scratch: Path) -> Outcome:
    """Return what becomes of a checkpoint with the default adapter.

    Args:
        folder: With weights and tokenizer.
        scratch: An empty folder.
    """
    try:
        model = _adapted(folder)
    except ModelError as error:
        return Outcome(refused=str(error).replace(str(folder), "the model"))
    rows = sequences(LENGTHS)
    with model.evaluating():
        before = completion_logps(model, rows)
    padded = _apart(before, alone(_plain(folder), rows))
    losses, ratios = _before_any_step(folder, model, rows)
    without = _trained(model, rows)
    with model.evaluating():
        expected = completion_logps(model, rows)
    encoder = load_encoder(str(folder))
    prompts = [ids[:length].tolist() for ids, length in zip(rows.input_ids, PROMPTS, strict=False)]
    together = continue_tokens(model, encoder, prompts, NEW_TOKENS)
    one_by_one = [continue_tokens(model, encoder, [prompt], NEW_TOKENS)[0] for prompt in prompts]
    model.save(scratch / "adapter")
    loaded = peft.PeftModel.from_pretrained(_plain(folder), str(scratch / "adapter"))
    without_one = left_out(model)
    moved_weights = _moved_weights(folder, scratch / "moved", model, rows)
    merged = _merged(model, folder, scratch / "merged", rows, expected)
    return Outcome(
        tensors=len(model.parameters),
        left_out=without_one,
        without_gradient=without,
        moved=_apart(before, expected),
        padded=padded,
        ratios=ratios,
        losses=losses,
        saved=_apart(expected, alone(loaded, rows)),
        moved_weights=moved_weights,
        merged=merged,
        configuration=() if isinstance(merged, str) else _changed(folder, scratch / "merged"),
        batched=together == one_by_one,
    )


def left_out(model: AdapterModel) -> tuple[str, ...]:
    """Return the ends of the names of linear layers in blocks that have no adapter."""
    names = [name for name, module in model.model.named_modules() if is_linear(module)]
    plain = [n for n in names if block_of(n) is not None and not n.endswith(".base_layer")]
    return tuple(sorted({".".join(n.split(".")[-2:]) for n in plain if ".lora_" not in n}))


def sequences(lengths: tuple[int, ...], prompt: int = 3) -> Sequences:
    """Return rows of random tokens, padded on the right."""
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in lengths]
    width = max(lengths)
    mask = torch.tensor([[1] * n + [0] * (width - n) for n in lengths])
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    counted = mask.bool() & (torch.arange(width) >= prompt)
    return Sequences(tokens, mask, counted, prompt)


@torch.no_grad()
def alone(model: Any, rows: Sequences) -> torch.Tensor:
    """Return the log-probs of completions row by row without padding, by plain transformers."""
    found = []
    for ids, mask, counted in zip(
        rows.input_ids, rows.attention_mask, rows.completion_mask, strict=True
    ):
        length = int(mask.sum())
        output = model.eval()(input_ids=ids[None, :length], attention_mask=mask[None, :length])
        logps = output.logits[0, :-1].float().log_softmax(-1)
        picked = logps.gather(-1, ids[1:length, None])[:, 0]
        found.append(picked[counted[1:length]].sum())
    return torch.stack(found)


def _adapted(folder: Path) -> AdapterModel:
    backbone = load_backbone(str(folder), pad_token_id=0)
    switch_dropout_off(backbone)
    return AdapterModel(attach_adapter(backbone, AdapterSettings()), 0)


def _plain(folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.config.use_cache = False
    return model.eval()


def _before_any_step(
    folder: Path, model: AdapterModel, rows: Sequences
) -> tuple[dict[str, float], float]:
    """Return the losses of objectives with a reference, and the largest log-ratio."""
    with model.reference():
        reference = completion_logps(model, rows)
    model.model.train()
    with torch.no_grad():
        ratios = completion_logps(model, rows) - reference
        losses = {
            name: _loss(name, model, batch_of(rows, reference))
            for name in THEORY
            if not OBJECTIVES[name][1]().needs_reward
        }
        losses |= _losses_with_a_reward_head(folder, batch_of(rows, reference))
    return losses, float(ratios.abs().max())


def _losses_with_a_reward_head(folder: Path, batch: Batch) -> dict[str, float]:
    """Return the losses of the objectives that need one, none where a user is told that there is none."""
    peft_model = _adapted(folder).model
    try:
        attach_personal(peft_model, PersonalModules(reward=True, head_mode="lowrank"), 0)
    except ModelError:
        return {}
    model = AdapterModel(peft_model, 0)
    model.model.train()
    return {
        name: _loss(name, model, batch) for name in THEORY if OBJECTIVES[name][1]().needs_reward
    }


def _loss(name: str, model: AdapterModel, batch: Batch) -> float:
    objective = OBJECTIVES[name][1]()
    statistics = objective.statistics(model, [batch])
    return float(objective.loss(model, batch, statistics)[0])


def batch_of(rows: Sequences, reference: torch.Tensor) -> Batch:
    """Return rows as pairs, the first half chosen, and as single answers."""
    labels = torch.arange(len(reference)) % 2 == 0
    count = int(rows.completion_mask.sum())
    return Batch(
        (0, 1, 2, 3),
        rows,
        count,
        int(rows.attention_mask.sum()),
        labels=labels,
        reference_logps=reference,
        mismatched=(rows,),
        mismatched_reference_logps=reference,
    )


def _trained(model: AdapterModel, rows: Sequences) -> tuple[str, ...]:
    """Take a step of SFT and one of DPO; return the names of tensors that no gradient reached."""
    with model.reference():
        reference = completion_logps(model, rows)
    batch = batch_of(rows, reference)
    parameters = model.parameters
    optimizer = torch.optim.SGD(list(parameters.values()), lr=0.5)
    reached: set[str] = set()
    model.model.train()
    for name in ("sft", "dpo"):
        objective = OBJECTIVES[name][1]()
        loss, _ = objective.loss(model, batch, objective.statistics(model, [batch]))
        loss.backward()
        reached |= {n for n, p in parameters.items() if p.grad is not None and p.grad.any()}
        torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return tuple(sorted(parameters.keys() - reached))


def _moved_weights(
    folder: Path, target: Path, model: AdapterModel, rows: Sequences
) -> float | None:
    """Move the trained factors' product into the frozen weights and back; return the largest error."""
    if model.stacked:
        return None
    beside = model.read()
    changes = products(beside, model.scaling)
    nothing = {n: torch.zeros_like(t) if ".lora_B." in n else t for n, t in beside.items()}
    with model.evaluating():
        expected = completion_logps(model, rows)
        with model.reference():
            base = completion_logps(model, rows)
        model.write({**nothing, **changes})
        errors = [_apart(expected, completion_logps(model, rows))]
        with model.reference():
            errors.append(_apart(base, completion_logps(model, rows)))
    model.save(target)
    loaded = peft.PeftModel.from_pretrained(_plain(folder), str(target))
    errors.append(_apart(expected, alone(loaded, rows)))
    model.write(beside)
    with model.evaluating():
        errors.append(_apart(expected, completion_logps(model, rows)))
    return max(errors)


def _changed(folder: Path, export: Path) -> tuple[str, ...]:
    """Return the names in two configurations that are not the same, but for those of files and classes."""
    before, after = (
        transformers.AutoConfig.from_pretrained(own).to_dict() for own in (folder, export)
    )
    if before["model_type"] != after["model_type"]:  # the text part is saved by itself
        before = before["text_config"]
    first, second = _leaves(before), _leaves(after)
    names = first.keys() | second.keys()
    differ = {n for n in names if first.get(n) != second.get(n)}
    return tuple(sorted(n for n in differ if n.rpartition(".")[2] not in NAMES))


def _leaves(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Return the values of a configuration by the path to each."""
    found: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            found |= _leaves(value, f"{path}{name}.")
        else:
            found[path + str(name)] = value
    return found


def _merged(
    model: AdapterModel, folder: Path, target: Path, rows: Sequences, expected: torch.Tensor
) -> float | str:
    try:
        export_causal(model, load_tokenizer(str(folder)), target)
    except ModelError as error:
        return str(error)
    return _apart(expected, alone(_plain(target), rows))


def _apart(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())
