"""Derived FLOPs by hand, and against torch's own counter, forward and backward, for each kind of target."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fedloom.accounting.flops import LinearShape, ModelShape, backward_flops, forward_flops
from fedloom.aggregation.lora import stacked
from fedloom.models.adapters import PROMPTS, AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.load import load_backbone
from fedloom.models.split_model import ClientPart, ServerPart

ONE = LinearShape(1, 1)
"""2 forward and 2 backward for one token: a frozen layer, whose input has a gradient."""


@pytest.mark.parametrize(
    ("linear", "forward", "backward"),
    [
        (LinearShape(3, 5), 30, 30),
        (LinearShape(3, 5, input_gradient=False), 30, 0),
        (LinearShape(3, 5, trained=True), 30, 60),
        (LinearShape(3, 5, reached=False), 30, 0),
        (LinearShape(3, 5, rank=2), 30 + 4 * 8, 30 + 4 * (2 * 5 + 2 * 3)),
        (LinearShape(3, 5, rank=2, input_gradient=False), 30 + 4 * 8, 4 * (2 * 5 + 3)),
        (LinearShape(3, 5, rank=2, down_trained=False), 30 + 4 * 8, 30 + 4 * (2 * 5 + 3)),
        (LinearShape(3, 5, rank=2, up_trained=False), 30 + 4 * 8, 30 + 4 * (5 + 2 * 3)),
        (
            LinearShape(3, 5, rank=2, down_trained=False, input_gradient=False),
            30 + 4 * 8,
            4 * 5,
        ),
        (LinearShape(3, 5, router=7), 30 + 2 * 7 * 3, 30 + 2 * 2 * 7 * 3),
        (LinearShape(3, 5, router=7, input_gradient=False), 30 + 2 * 7 * 3, 2 * 7 * 3),
    ],
)
def test_a_linear_layer_by_hand(linear, forward, backward):
    """2 in out forward, the same for the gradient of its input and of its weight; rank r: 2 r (in + out)."""
    shape = ModelShape((linear,), LinearShape(0, 0), 0, 0)
    assert forward_flops(shape, 1, 1, 1.0) == forward
    assert backward_flops(shape, 1, 1, 1.0) == backward
    # the same layer for 2 rows of 3 tokens, and as what is passed once a pass, or by a head's positions
    assert forward_flops(shape, 2, 3, 1.0) == 6 * forward
    assert backward_flops(shape, 2, 3, 1.0) == 6 * backward
    once = ModelShape((), LinearShape(0, 0), 0, 0, once=(linear,))
    assert forward_flops(once, 2, 3, 1.0) == forward
    assert backward_flops(once, 2, 3, 1.0) == backward
    head = ModelShape((), linear, 0, 0)
    assert forward_flops(head, 2, 3, 1.5) == 2 * 1.5 * forward
    assert backward_flops(head, 2, 3, 1.5) == 2 * 1.5 * backward


@pytest.mark.parametrize(("pooled", "positions"), [(False, 4.5), (True, 1)])
def test_the_parts_of_a_model_by_hand(pooled, positions):
    """Rows of 7 tokens, 3 of them: 21; the head, and what is before it, at 4.5 positions or at one."""
    shape = ModelShape(
        (ONE, ONE), ONE, 10, 6,
        before_head=(ONE,), reward=LinearShape(1, 2), encoder=(LinearShape(1, 3),), encoded=5,
        pooled=pooled, once=(LinearShape(1, 4),), again=(LinearShape(1, 5),),
    )  # fmt: skip
    others = 3 * (positions * 4 + 4) + 5 * 6 + 8
    assert forward_flops(shape, 3, 7, 4.5) == 21 * (4 + 4 * 7 * 10) + others
    assert backward_flops(shape, 3, 7, 4.5) == 21 * (4 + 10 + 10 + 8 * 7 * 6) + others
    bare = ModelShape((), ONE, 0, 0)
    assert (bare.encoded, bare.pooled) == (0, False)
    assert forward_flops(bare, 3, 7, 4.5) == backward_flops(bare, 3, 7, 4.5) == 3 * 4.5 * 2


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


KINDS = {
    "lora in the last block": {"rank": 4, "layers": 1},
    "full": {"kind": "full", "layers": [1]},
    "full everywhere": {"kind": "full"},
    "ia3": {"kind": "ia3"},
    "prompt": {"kind": "prompt", "virtual_tokens": 5},
    "ptuning": {"kind": "ptuning", "virtual_tokens": 5, "encoder_width": 24},
}


@pytest.mark.parametrize("classes", [(), ("a", "b", "c")], ids=["causal", "classification"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_against_torch(model_folder, kind, classes):
    if classes and kind in PROMPTS:
        pytest.skip("virtual tokens are for causal models")
    backbone = load_backbone(str(model_folder), pad_token_id=0, classes=classes)
    backbone.set_attn_implementation("eager")
    settings = AdapterSettings(**KINDS[kind])
    model = AdapterModel(attach_adapter(backbone, settings, classification=bool(classes)), pad=0)
    ids = torch.randint(3, 100, (3, 40))
    options = {} if classes else {"logits_to_keep": 9}
    with FlopCounterMode(display=False) as counter:
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        output.logits.sum().backward()
    # As above: without a gradient into the queries of the lowest block, autograd skips their share.
    tolerance = 0.03 if kind == "ia3" else 0.0
    assert model.flops == pytest.approx(counter.get_total_flops(), rel=tolerance)


@pytest.mark.parametrize("tail", [False, True], ids=["labels at the server", "U-shape"])
@pytest.mark.parametrize("classes", [(), ("a", "b", "c")], ids=["causal", "classification"])
def test_halves_against_torch(model_folder, classes, tail):
    """Either half counts what it computes, and both together what the whole model would."""

    def whole(blocks=None):
        backbone = load_backbone(str(model_folder), pad_token_id=0, classes=classes, blocks=blocks)
        backbone.set_attn_implementation("eager")
        return attach_adapter(backbone, AdapterSettings(rank=4), classification=bool(classes))

    front = ClientPart(whole(1), 0, tail=tail)
    back = ServerPart(AdapterModel(whole(), 0), 1, tail=tail)
    back.blocks.config._attn_implementation = "eager"
    ids = torch.randint(3, 100, (3, 40))
    mask = torch.ones_like(ids)
    ending = front.ending if tail else back.ending
    with FlopCounterMode(display=False) as counter:
        sent = front(input_ids=ids, attention_mask=mask)
        client = counter.get_total_flops()
        entered = sent.detach().requires_grad_()
        hidden = back(input_ids=entered, attention_mask=mask)
        left = hidden.detach().requires_grad_() if tail else hidden
        ending.hidden, ending.last = left, torch.full((3,), 39) if classes else None
        before = counter.get_total_flops()
        options = {} if classes else {"logits_to_keep": 9}
        ending(input_ids=ids, attention_mask=mask, **options).logits.sum().backward()
        own_loss = counter.get_total_flops() - before
        if tail:
            hidden.backward(left.grad)
        before = counter.get_total_flops()
        sent.backward(entered.grad)
        client += counter.get_total_flops() - before + (own_loss if tail else 0)
        everything = counter.get_total_flops()
    assert front.flops == pytest.approx(client, rel=1e-6)
    assert back.flops == pytest.approx(everything - client, rel=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 4},
        {"rank": 4, "use_dora": True},
        {"kind": "ia3"},
        {"kind": "prompt", "virtual_tokens": 5},
        {"kind": "ptuning", "virtual_tokens": 5, "encoder_width": 24},
    ],
    ids=["lora", "dora", "ia3", "prompt", "ptuning"],
)
def test_a_reference_without_an_adapter_against_torch(model_folder, settings):
    """What the adapter would compute is not counted, whatever rank it had last."""
    backbone = load_backbone(str(model_folder), pad_token_id=0)
    backbone.set_attn_implementation("eager")
    model = AdapterModel(attach_adapter(backbone, AdapterSettings(**settings)), pad=0)
    ids = torch.randint(3, 100, (3, 40))

    def count():
        before = model.flops
        with FlopCounterMode(display=False) as counter, model.reference():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=9)
        assert model.flops - before == counter.get_total_flops() > 0
        return model.flops - before

    first, shape = count(), model.shape
    if settings == {"rank": 4}:
        own = model.read()
        model.write(stacked([own, own], [0.5, 0.5]))
        assert count() == first
        model.write(own)
    assert model.shape == shape
