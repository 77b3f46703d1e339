"""Derived FLOPs against torch's own counter, forward and backward, for each kind of target."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.load import load_backbone


@pytest.mark.parametrize("classes", [(), ("a", "b", "c")], ids=["causal", "classification"])
@pytest.mark.parametrize(
    ("targets", "tolerance"),
    [
        ("all-linear", 0.0),
        (["o_proj"], 0.0),
        (["gate_proj"], 0.0),
        # Autograd skips the keys' share of the lowest block's attention, which we count.
        (["q_proj", "v_proj"], 0.03),
    ],
)
def test_against_torch(model_folder, targets, tolerance, classes):
    backbone = load_backbone(str(model_folder), pad_token_id=0, classes=classes)
    backbone.set_attn_implementation("eager")  # the counter sees its two products apart
    settings = AdapterSettings(rank=4, targets=targets)
    model = AdapterModel(attach_adapter(backbone, settings, classification=bool(classes)), pad=0)
    ids = torch.randint(3, 100, (3, 40))
    options = {} if classes else {"logits_to_keep": 9}
    with FlopCounterMode(display=False) as counter:
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        forward = counter.get_total_flops()
        output.logits.sum().backward()
    derived = model.flops
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert model.flops - derived == forward
    assert derived == pytest.approx(counter.get_total_flops(), rel=tolerance)


def test_checkpointing_adds_a_forward_pass(model_folder):
    def count(checkpointed):
        backbone = load_backbone(str(model_folder), pad_token_id=0)
        model = AdapterModel(
            attach_adapter(backbone, AdapterSettings()), 0, checkpointed=checkpointed
        )
        ids = torch.ones(1, 8, dtype=torch.long)
        model(input_ids=ids, attention_mask=ids)
        plain = model.flops
        with torch.no_grad():
            model(input_ids=ids, attention_mask=ids)
        return plain, model.flops - plain

    (plain, forward), (repeated, _) = count(False), count(True)
    assert repeated == plain + forward
