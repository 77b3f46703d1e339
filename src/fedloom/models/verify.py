"""Whether what was saved is what was trained: log-probs of some rows, before saving and after loading.

What was saved is loaded into a fresh model as its card says (``saved.py``): the base by ``transformers``
alone, the adapter by PEFT alone. Rows of one length are passed together and others apart, so that no
padding enters, in the precision and on the device of the training: what is compared are weights and how
they are put together, not two ways of rounding. A pass of few tokens costs as much as reading all
weights: eight rows of eight tokens take a third of the time in one pass.

What may differ. A log-prob is a logit less the logarithm of a sum of exponentials, so an error of at
most e in every logit is one of at most 2 e in a log-prob. A logit l that is written with unit roundoff u
(2^-24 of float32, 2^-8 of bfloat16) is off by at most u |l| in either model: e is 2 u |l|. So 4 u max |l|
is allowed, and 1e-4 at least, for the sums of the layers before, which float32 rounds in another
order where a weight was merged.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedloom.accounting.flops import ModelShape, forward_flops
from fedloom.errors import ModelError, VerificationError, first_line
from fedloom.models.export import CODE
from fedloom.models.heads import PersonalHead
from fedloom.models.load import silence_transformers
from fedloom.models.quantize import Quantization, loading_options, quantize_loaded
from fedloom.models.saved import CLASSIFIER

ROWS = 8
"""Rows that are compared."""

LONGEST, SHORTEST = 256, 4
"""Tokens of a row that are compared at most and at least, where it has as many: its logits are so many
times the vocabulary."""

SHARE = 0.01
"""Of the FLOPs of a run's passes, what is spent on comparing; loading the folders comes on top of it."""

FREE = 1e11
"""FLOPs that are spent whatever the run has cost: two to five seconds of one core."""

LEAST = 1e-4
"""Nats by which log-probs may differ in any precision."""


@dataclass(frozen=True)
class Outputs:
    """What a model says of some rows.

    Attributes:
        rows: Of each row a ``(numbers,)`` float32 tensor: the log-prob of each token after the first; of
            a classifier the log-prob of each class; of a model with one output that output.
        rewards: Of each row the explicit reward, where the model has a reward head.
        largest: The largest absolute logit.
    """

    rows: tuple[Tensor, ...]
    rewards: tuple[Tensor, ...]
    largest: float


@dataclass(frozen=True)
class Compared:
    """The outcome of a comparison.

    Attributes:
        difference: Nats by which log-probs differ at most.
        allowed: Nats by which they may.
    """

    difference: float
    allowed: float


def allowed(dtype: torch.dtype, largest: float) -> float:
    """Return the nats by which a log-prob may differ between two models that are the same.

    Args:
        dtype: That logits are computed in.
        largest: The largest absolute logit.
    """
    roundoff = torch.finfo(dtype).eps / 2
    return max(LEAST, 4 * roundoff * largest)


def shortened(row: Sequence[int], length: int) -> list[int]:
    """Return at most so many tokens of a row, two at least: the first and the last ones.

    The first is what some models start from, the last what some classifiers read (BART). Rows differ in
    their answers; a prompt's first tokens are those of the template, the same in all rows.
    """
    return list(row) if len(row) <= length else [row[0], *row[len(row) - length + 1 :]]


def affordable(shape: ModelShape, spent: float, folders: int) -> int:
    """Return how many tokens of a row are compared, so that it costs little beside a run.

    Args:
        shape: Of the model.
        spent: FLOPs of the run's passes.
        folders: That are compared, two passes over every row for each and one beside.
    """
    token = forward_flops(shape, 1, LONGEST, LONGEST) / LONGEST
    tokens = max(FREE, SHARE * spent) / (token * ROWS * (2 * folders + 1))
    return max(SHORTEST, min(LONGEST, int(tokens)))


@torch.no_grad()
def outputs(
    model: nn.Module,
    rows: Sequence[Sequence[int]],
    *,
    device: torch.device,
    autocast: torch.dtype | None = None,
) -> Outputs:
    """Return what a model says of rows, with dropout off.

    Args:
        model: With an LM head or a classification head.
        rows: Token ids, two or more in each.
        device: Where the model is.
        autocast: Dtype of mixed precision, ``None`` for none.
    """
    was_training = model.training
    model.eval()
    heads = [m for m in model.modules() if isinstance(m, PersonalHead) and m.reward is not None]
    said: dict[int, Tensor] = {}
    rewards: dict[int, Tensor] = {}
    largest = 0.0
    mixed: AbstractContextManager[Any] = nullcontext()
    if autocast is not None:
        mixed = torch.autocast(device.type, autocast)
    cut = [shortened(row, LONGEST) for row in rows]
    for places in together([len(row) for row in cut]):
        ids = torch.tensor([cut[place] for place in places], device=device)
        mask = torch.ones_like(ids)
        with mixed:
            logits = model(input_ids=ids, attention_mask=mask).logits.float()
        for head in heads:
            if head.states is not None:  # else it stands aside
                rewards |= zip(places, head.rewards(mask).cpu()[:, None], strict=True)
        largest = max(largest, float(logits.abs().max()))
        said |= zip(places, _said(logits, ids).cpu(), strict=True)
    model.train(was_training)
    return Outputs(_in_order(said), _in_order(rewards), largest)


def together(lengths: Sequence[int]) -> list[list[int]]:
    """Return which rows are passed together: of one length, and no more logits than the longest row has.

    Args:
        lengths: Tokens of each row.
    """
    passes: list[list[int]] = []
    for length in dict.fromkeys(lengths):
        places = [place for place, own in enumerate(lengths) if own == length]
        count = max(1, LONGEST // length)
        passes += [places[start : start + count] for start in range(0, len(places), count)]
    return passes


def _in_order(of_places: dict[int, Tensor]) -> tuple[Tensor, ...]:
    return tuple(of_places[place] for place in sorted(of_places))


def _said(logits: Tensor, ids: Tensor) -> Tensor:
    """Return ``(rows, numbers)``, which are compared, of ``(rows, length)`` token ids."""
    if logits.ndim == 2:
        return logits if logits.shape[1] == 1 else logits.log_softmax(-1)
    logits = logits[:, -ids.shape[1] :]  # virtual tokens come first
    whole = logits[:, :-1]
    return whole.gather(-1, ids[:, 1:, None])[..., 0] - whole.logsumexp(-1)


def compare(
    expected: Outputs, found: Outputs, *, dtype: torch.dtype, name: str, places: Sequence[str]
) -> Compared:
    """Compare what a saved model says with what the trained one said.

    Args:
        expected: Of the trained model.
        found: Of the saved one; its rewards are compared where it has some.
        dtype: That logits were computed in.
        name: What was saved, for the message.
        places: What each row is called in the message.

    Raises:
        VerificationError: They differ by more than is allowed, or are no numbers in one of the two alone;
            the row with the largest difference is named.
    """
    most = allowed(dtype, max(expected.largest, found.largest))
    pairs = [("log-probs", expected.rows, found.rows)]
    if found.rewards:
        pairs.append(("rewards", expected.rewards, found.rewards))
    worst, what, where = 0.0, "", ""
    for kind, before, after in pairs:
        for place, own, other in zip(places, before, after, strict=True):
            if own.shape != other.shape:
                raise VerificationError(
                    f"{name} is not the model that was trained: of {place} it gives "
                    f"{other.numel()} numbers, the trained model {own.numel()}. {NEXT}"
                )
            apart = _apart(own, other)
            if apart > worst:
                worst, what, where = apart, kind, place
    if worst > most:
        raise VerificationError(
            f"{name} is not the model that was trained: its {what} of {where} differ by {worst:.3g} "
            f"nats from those before it was saved ({most:.1g} is allowed). {NEXT}"
        )
    return Compared(worst, most)


def _apart(own: Tensor, other: Tensor) -> float:
    """Return by how much numbers differ at most; infinity where one alone is not a number."""
    alike = (own == other) | (own.isnan() & other.isnan())
    return float((own - other).abs().masked_fill(alike, 0.0).nan_to_num(torch.inf, torch.inf).max())


def distance(left: Outputs, right: Outputs) -> float:
    """Return the nats by which log-probs of two models differ at most."""
    pairs = zip(left.rows, right.rows, strict=True)
    return max(_apart(own, other) for own, other in pairs)


NEXT = (
    "The folder is kept, but do not use it: tell the makers of fedloom which model and adapter that is; "
    "output.verify = false leaves this check out"
)
"""What to do about a difference."""


def fresh_base(
    path: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    quantization: Quantization = "none",
    device: torch.device,
    classifier: Path | None = None,
) -> nn.Module:
    """Load a base by ``transformers`` alone, as a model card says.

    Args:
        path: Folder or Hub name.
        revision: Branch, tag or commit on the Hub.
        dtype: Of the weights.
        quantization: Of its linear layers.
        device: Where it goes.
        classifier: Folder of a classifier, whose configuration it is loaded with.

    Raises:
        ModelError: It cannot be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    silence_transformers()
    factory: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    options: dict[str, Any] = {"revision": revision, "dtype": dtype, "use_safetensors": True}
    options |= loading_options(quantization, device)
    with torch.random.fork_rng(devices=[]):  # of a head that is new: what is loaded fills it
        try:
            if classifier is not None:
                options["config"] = AutoConfig.from_pretrained(
                    str(classifier / CLASSIFIER), trust_remote_code=False
                )
            model: nn.Module = factory.from_pretrained(path, trust_remote_code=False, **options)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"cannot load {path} once more: {first_line(error)}") from error
    model = quantize_loaded(model.requires_grad_(False), quantization, device)
    return (model if "device_map" in options else model.to(device)).eval()


def fresh_copy(base: nn.Module) -> nn.Module:
    """Return a model of modules of its own that shares all its tensors with ``base``.

    What is put on it, in place of its modules, is not on ``base``.
    """
    tensors = (*base.parameters(), *base.buffers())
    return copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})


def load_whole(
    folder: Path, *, dtype: torch.dtype, device: torch.device, sequence: bool = False
) -> nn.Module:
    """Load a folder that is a whole model by ``transformers`` alone, with its own code if it has some.

    Args:
        folder: An export, or a sub-mixture; this process has just written it.
        dtype: Of the weights.
        device: Where it goes.
        sequence: Whether it is a model for sequence classification.

    Raises:
        VerificationError: It cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    silence_transformers()
    factory: Any = AutoModelForSequenceClassification if sequence else AutoModelForCausalLM
    if (
        folder / CODE
    ).is_file():  # as trust_remote_code would, but without a copy in the user's cache
        spec = spec_from_file_location("fedloom_exported", folder / CODE)
        assert spec is not None and spec.loader is not None, "a Python file has both"
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        task = "SequenceClassification" if sequence else "CausalLM"
        factory = getattr(module, f"PersonalFor{task}")
    try:
        model: nn.Module = factory.from_pretrained(
            str(folder), dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise VerificationError(f"{folder} does not load: {first_line(error)}. {NEXT}") from error
    return model.to(device).eval()
