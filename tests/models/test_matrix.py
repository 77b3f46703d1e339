"""Adapters by heads, precisions and quantised bases: each trains and loads elsewhere as it was, or is refused.

Each case is a model as a run builds it. Log-ratios are 0 before any step, one step gives every trained
tensor a gradient, what is trained is float32, and what is saved is, in plain transformers and PEFT (or as
the kind documents), the model that was trained.
"""

import itertools

import peft
import pytest
import torch
import transformers

from fedloom.data.batch import Sequences
from fedloom.errors import ModelError, SettingsError
from fedloom.models.load import load_backbone
from fedloom.objectives.logps import completion_logps
from fedloom.runs.assembly import assemble
from fedloom.runs.partitioning import partition_data
from fedloom.runs.saved_models import load_saved
from sampling import sampled

ADAPTERS = {
    "lora": {"rank": 2, "dropout": 0.2},
    "full": {"kind": "full", "layers": 1},
    "ia3": {"kind": "ia3"},
    "prompt": {"kind": "prompt", "virtual_tokens": 3},
    "ptuning": {"kind": "ptuning", "virtual_tokens": 3, "encoder_width": 16},
    "experts": {"kind": "experts", "rank": 2, "experts": 4, "dropout": 0.2},
    "submixture": {"kind": "submixture"},
}
HEADS = {
    "sft": {
        "objective": {"name": "sft"},
        "data": {"source": "builtin:instructions"},
    },
    "dpo": {"objective": {"name": "dpo"}},
    "classification": {
        "objective": {"name": "classification"},
        "data": {"source": "builtin:labelled"},
    },
    "personal": {"objective": {"name": "dpo"}, "method": {"name": "fedpdpo"}},
}
PRECISIONS = ("fp32", "bf16")
BASES = ("none", "int8")
METHODS = {"submixture": "fedmoe"}
WITHIN = {"fp32": 1e-4, "bf16": 5e-3}
"""Largest difference of a row's log-prob, a sum over 8 tokens, and of a logit; 2.4e-3 was seen."""

CASES = list(itertools.product(ADAPTERS, HEADS, PRECISIONS, BASES))
QUICK = {
    ("lora", "dpo", "fp32", "none"),
    ("full", "classification", "bf16", "none"),
    ("lora", "personal", "fp32", "none"),
    ("submixture", "dpo", "fp32", "none"),
    ("prompt", "classification", "fp32", "none"),
}


def refused(adapter, head, precision, base):
    """Return part of the message by which a case is refused, ``None`` where it trains."""
    if base == "int8" and adapter in ("full", "submixture"):
        return "keeps in few bits"
    if adapter == "submixture" and head == "personal":
        return "use fedmoe or local_only"
    if adapter in ("experts", "submixture") and head in ("classification", "personal"):
        return "goes with causal objectives"
    if head == "classification" and adapter in ("prompt", "ptuning"):
        return "needs a causal objective"
    return None


def rows():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 300, (2, 12), generator=generator)
    mask = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    ids = ids * mask
    counted = mask.bool() & (torch.arange(12) >= 4)
    return Sequences(ids, mask, counted, 4)


def seen(model, sequences):
    """Log-probs of completions by a model of any library, or a classifier's logits."""
    with torch.no_grad():
        output = model(input_ids=sequences.input_ids, attention_mask=sequences.attention_mask)
    logits = output.logits.float()
    if logits.ndim == 2:
        return logits
    logps = logits[:, :-1].log_softmax(-1)
    picked = logps.gather(-1, sequences.input_ids[:, 1:, None])[..., 0]
    return (picked * sequences.completion_mask[:, 1:]).sum(-1)


def step(model, sequences, classification, reference):
    """Train three steps; every trained tensor has a gradient in each."""
    optimizer = torch.optim.SGD(list(model.parameters.values()), lr=0.2)
    for _ in range(3):
        if classification:
            output = model(input_ids=sequences.input_ids, attention_mask=sequences.attention_mask)
            loss = torch.nn.functional.cross_entropy(output.logits.float(), torch.tensor([0, 1]))
        else:
            ratios = completion_logps(model, sequences) - reference
            loss = -torch.nn.functional.logsigmoid(ratios[0] - ratios[1])
        loss.backward()
        without = [name for name, own in model.parameters.items() if own.grad is None]
        assert without == []
        torch.nn.utils.clip_grad_norm_(list(model.parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def elsewhere(built, adapter, base, folder, classes, pad):
    """Load what was saved without the run that saved it."""
    if adapter == "experts" or built.method.name == "fedpdpo":
        return load_saved(built, classes, folder)[1].model.eval()  # their own formats
    dtype = torch.bfloat16 if built.training.precision == "bf16" else torch.float32
    kind = "SequenceClassification" if classes else "CausalLM"
    factory = getattr(transformers, f"AutoModelFor{kind}")
    if adapter == "submixture":
        return factory.from_pretrained(folder, dtype=dtype).eval()
    if base == "none":
        options = {"num_labels": len(classes)} if classes else {}
        model = factory.from_pretrained(built.model.path, dtype=dtype, **options)
        model.config.pad_token_id = pad
    else:
        model = load_backbone(
            built.model.path, pad_token_id=pad, classes=classes, dtype=dtype, quantization=base
        )
    return peft.PeftModel.from_pretrained(model, str(folder)).eval()


def some(cases):
    quick = [pytest.param(*case, id="-".join(case)) for case in cases if case in QUICK]
    return quick + [
        pytest.param(*own.values[0], id="-".join(own.values[0]), marks=own.marks)
        for own in sampled([case for case in cases if case not in QUICK], 3)
    ]


@pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # of torchao and PEFT, about what is not done here
@pytest.mark.parametrize(("adapter", "head", "precision", "base"), some(CASES))
def test_each_trains_and_loads_as_it_was_or_is_refused(
    experiment, model_folder, mixture_folder, tmp_path, adapter, head, precision, base
):
    if base == "int8":
        pytest.importorskip("torchao")
    folder = mixture_folder if adapter == "submixture" else model_folder
    sections = {
        "model": {"path": str(folder), "quantization": base},
        "adapter": {**ADAPTERS[adapter], **({} if "rank" in ADAPTERS[adapter] else {"rank": 8})},
        "training": {"precision": precision},
        **HEADS[head],
    }
    if adapter in METHODS and "method" not in sections:
        sections["method"] = {"name": METHODS[adapter]}
    why = refused(adapter, head, precision, base)

    def made():
        built = experiment(**sections)
        division = partition_data(built)
        return built, division.classes, assemble(built, division)

    if why:
        with pytest.raises((ModelError, SettingsError)) as told:
            made()
        assert why in str(told.value)
        return
    built, classes, parts = made()
    model, pad = parts.model, parts.encoder.tokenizer.pad_token_id
    sequences, within = rows(), WITHIN[precision]
    assert {own.dtype for own in model.parameters.values()} == {torch.float32}
    reference = None
    if not classes:
        with model.reference():
            reference = completion_logps(model, sequences)
        if adapter not in ("prompt", "ptuning"):  # which change the model at once
            with torch.no_grad():  # in training: dropout of the backbone is off, the adapter adds 0
                ratios = completion_logps(model, sequences) - reference
            assert ratios.tolist() == [0.0, 0.0]
    with model.evaluating():
        before = seen(model, sequences)
    step(model, sequences, bool(classes), reference)
    if reference is not None:
        model.model.train()
        with model.reference():
            assert torch.equal(completion_logps(model, sequences), reference)
    model.model.eval()
    expected = seen(model, sequences)
    assert (expected - before).abs().max() > within
    model.save(tmp_path / "saved")
    loaded = elsewhere(built, adapter, base, tmp_path / "saved", classes, pad)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        found = seen(loaded, sequences)
    assert (found - expected).abs().max() <= within
