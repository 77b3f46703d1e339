"""Mixtures of LoRA experts: against a plain loop, their limits, folders, FLOPs."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from fedloom.errors import ModelError
from fedloom.models.adapters import AdapterSettings
from fedloom.models.experts import (
    CONFIG,
    FILE,
    ExpertModel,
    attach_experts,
    by_layer,
    load_experts,
)
from fedloom.models.load import load_backbone

SETTINGS = AdapterSettings(kind="experts", rank=4, alpha=8.0, experts=5, top_k=2, balance=0.01)
IDS = torch.tensor([[5, 9, 2, 7, 11, 4], [8, 3, 6, 1, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


def build(folder, **settings):
    own = SETTINGS.model_copy(update=settings)
    return ExpertModel(attach_experts(load_backbone(str(folder), pad_token_id=0), own), own, 0)


def shaken(model, seed=1, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    return {
        n: t + scale * torch.randn(t.shape, generator=generator) for n, t in model.read().items()
    }


def logits(model):
    with model.evaluating():
        return model(input_ids=IDS, attention_mask=MASK).logits


def looped(x, base, parts, ids, settings=SETTINGS):
    """One token and one expert after the other, as the formulas stand."""
    scale = settings.alpha / settings.rank
    rows = []
    for token in x:
        t = parts["projection"] @ token
        ups = {e: parts[f"experts.{e}.A"] @ token for e in ids}
        scores = torch.stack([ups[e] @ t / math.sqrt(settings.rank) for e in ids])
        chances = torch.softmax(scores, 0)
        best = sorted(range(len(ids)), key=lambda i: -float(chances[i].detach()))[: settings.top_k]
        whole = sum(chances[i] for i in best)
        y = base(token) + scale * parts["shared.B"] @ (parts["shared.A"] @ token)
        for i in best:
            y = y + chances[i] / whole * scale * parts[f"experts.{ids[i]}.B"] @ ups[ids[i]]
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("ids", [(0, 1, 2, 3, 4), (1, 4), (3,), (0, 2, 3)])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_stacked_layer_is_the_loop_forward_and_backward(model_folder, ids, top_k):
    settings = {"top_k": top_k}
    model = build(model_folder, **settings)
    whole = shaken(model)
    held = {n: t for n, t in whole.items() if "experts." not in n or int(n.split(".")[-2]) in ids}
    model.write(held)
    name, layer = next(iter(model.layers.items()))
    parts = {n: t.clone().requires_grad_() for n, t in by_layer(held, model.layers)[name].items()}
    x = 0.3 * torch.randn(7, layer.inputs, generator=torch.Generator().manual_seed(3))
    expected = looped(x, layer.base_layer, parts, ids, SETTINGS.model_copy(update=settings))
    found = layer(x[None])[0]
    assert torch.allclose(found, expected, atol=1e-6)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(4))
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    rank = SETTINGS.rank
    down, up = layer.down.grad.split(rank), layer.up.grad.split(rank, 1)
    close = {"atol": 1e-6, "rtol": 1e-5}
    zero = torch.zeros(1)
    token = parts["projection"].grad
    assert torch.allclose(down[0], zero if token is None else token, **close)
    assert torch.allclose(down[1], parts["shared.A"].grad, **close)
    assert torch.allclose(up[0], parts["shared.B"].grad, **close)
    for place, e in enumerate(ids):
        for factor, own in (("A", down[2 + place]), ("B", up[1 + place])):
            theirs = parts[f"experts.{e}.{factor}"].grad
            assert torch.allclose(own, torch.zeros(1) if theirs is None else theirs, **close)
    if len(ids) > 1 and top_k > 1:
        assert parts["projection"].grad.abs().max() > 0  # the router learns from the loss


def test_one_expert_is_the_closed_form(model_folder):
    model = build(model_folder, experts=1)
    model.write(shaken(model))
    name, layer = next(iter(model.layers.items()))
    parts = by_layer(model.read(), model.layers)[name]
    x = torch.randn(2, 5, layer.inputs)
    expected = layer.base_layer(x)
    for b, a in (("shared.B", "shared.A"), ("experts.0.B", "experts.0.A")):
        expected = expected + 2.0 * F.linear(F.linear(x, parts[a]), parts[b])
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_ids_are_all_that_tells_experts_apart(model_folder):
    """Renumbered experts lie in another order and do the same."""
    model = build(model_folder)
    tensors = shaken(model)
    model.write(tensors)
    before = logits(model)
    order = {0: 3, 1: 0, 2: 4, 3: 2, 4: 1}
    renamed = {}
    for name, tensor in tensors.items():
        if ".experts." in name:
            layer, _, rest = name.partition(".experts.")
            number, factor = rest.split(".")
            name = f"{layer}.experts.{order[int(number)]}.{factor}"
        renamed[name] = tensor
    model.write(dict(sorted(renamed.items(), reverse=True)))
    assert torch.allclose(logits(model), before, atol=1e-6)


def test_the_start_and_the_reference_are_the_base_model(model_folder):
    model = build(model_folder)
    base = load_backbone(str(model_folder), pad_token_id=0)
    with torch.no_grad():
        expected = base(input_ids=IDS, attention_mask=MASK).logits
    assert torch.equal(logits(model), expected)
    model.write(shaken(model))
    assert not torch.allclose(logits(model), expected, atol=1e-3)
    with model.reference():
        assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(model), expected, atol=1e-3)


def test_reading_gives_what_was_written_and_layers_may_hold_different_experts(model_folder):
    model = build(model_folder)
    whole = shaken(model)
    first = next(iter(model.layers))
    some = {
        n: t
        for n, t in whole.items()
        if ".experts." not in n
        or int(n.split(".")[-2]) in ((0, 2) if n.startswith(f"{first}.") else (1, 3, 4))
    }
    model.write(some)
    again = model.read()
    assert again.keys() == some.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in some.items())
    assert model.layers[first].ids == (0, 2)
    trained = sum(p.numel() for p in model.parameters.values())
    assert trained == sum(t.numel() for t in some.values())
    digest = model.digest()
    model.write(whole)
    assert model.digest() != digest


def test_the_balance_term_is_a_mean_over_sequences_without_padding(model_folder):
    model = build(model_folder)
    model.write(shaken(model, scale=0.5))

    def penalty(ids, mask):
        model(input_ids=ids, attention_mask=mask)
        return float(model.penalty().detach())

    both = penalty(IDS, MASK)
    single = [penalty(IDS[:1], MASK[:1]), penalty(IDS[1:, :4], MASK[1:, :4])]
    assert both == pytest.approx(sum(single) / 2, abs=1e-6)
    assert model.penalty() is None
    # At least 1 for each layer where chances and hits agree; k where all are used alike.
    assert both / SETTINGS.balance / len(model.layers) >= 1.0


def test_the_balance_term_by_hand(model_folder):
    model = build(model_folder)
    model.write(shaken(model, scale=0.5))
    name, layer = next(iter(model.layers.items()))
    x = torch.randn(1, 6, layer.inputs, generator=torch.Generator().manual_seed(0))
    layer(x)
    (term,) = layer.routing.terms
    layer.routing.terms = []
    parts = by_layer(model.read(), model.layers)[name]
    chances, hits = torch.zeros(5), torch.zeros(5)
    for token in x[0]:
        t = parts["projection"] @ token
        scores = torch.stack([parts[f"experts.{e}.A"] @ token @ t / 2.0 for e in range(5)])
        own = torch.softmax(scores, 0)
        chances += own / 6
        hits[own.topk(2).indices] += 1 / 6
    assert float(term.detach()) == pytest.approx(float(5 * (chances * hits).sum()), abs=1e-5)


def test_what_is_watched_are_sums_over_the_real_tokens_of_each_sequence(model_folder):
    model = build(model_folder)
    model.write(shaken(model))
    with model.evaluating(), model.watching() as seen:
        model(input_ids=IDS, attention_mask=MASK)
    name = next(iter(model.layers))
    own = seen[name]
    assert own.tokens.tolist() == [6, 4] and own.routed_tokens.sum(1).tolist() == [12, 8]
    assert own.experts.shape == (2, 5, 4)
    for row, length in enumerate((6, 4)):
        with model.evaluating(), model.watching() as apart:
            model(
                input_ids=IDS[row : row + 1, :length], attention_mask=MASK[row : row + 1, :length]
            )
        for part in ("token", "experts", "routed_tokens"):
            alone, together = getattr(apart[name], part)[0], getattr(own, part)[row]
            assert torch.allclose(alone, together, atol=1e-4)
    with model.evaluating():
        model(input_ids=IDS, attention_mask=MASK)
    assert model.routing.seen is None


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_flops_are_those_that_torch_counts(model_folder, dropout):
    model = build(model_folder, dropout=dropout)
    model.write({n: t for n, t in shaken(model).items() if ".experts.3." not in n})
    model.model.train()
    with FlopCounterMode(display=False) as counter:
        output = model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
        output.logits.square().mean().backward()
    assert model.flops == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_folder_loads_to_the_same_model(model_folder, tmp_path, kind):
    folder = model_folder
    if kind == "gpt2":
        folder = tmp_path / "gpt2"
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2)
        GPT2LMHeadModel(config).save_pretrained(folder)
    model = build(folder)
    model.write({n: t for n, t in shaken(model).items() if ".experts.2." not in n})
    model.save(tmp_path / "out")
    loaded, settings = load_experts(load_backbone(str(folder), pad_token_id=0), tmp_path / "out")
    again = ExpertModel(loaded, settings, 0)
    assert torch.equal(logits(again), logits(model))
    assert settings.top_k == 2 and settings.balance == 0.01


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (lambda t: t.pop(next(n for n in t if ".experts.1.A" in n)), "lacks .*experts.1.A"),
        (
            lambda t: t.update({next(iter(t)).split(".self_attn")[0] + ".self_attn.q_proj.experts.9.A": torch.ones(1)}),
            "holds .*experts.9.A, which it does not name",
        ),
        (
            lambda t: t.update({n: x[:, :3] for n, x in list(t.items())[:1]}),
            "does not fit this model: .* there, .* here",
        ),
    ],
)  # fmt: skip
def test_missing_extra_and_foreign_experts_are_named(model_folder, tmp_path, break_, message):
    model = build(model_folder)
    model.save(tmp_path)
    tensors = load_file(tmp_path / FILE)
    break_(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / FILE)
    with pytest.raises(ModelError, match=message):
        load_experts(load_backbone(str(model_folder), pad_token_id=0), tmp_path)


def test_a_damaged_folder_is_one_message(model_folder, tmp_path):
    build(model_folder).save(tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps({"rank": 4}))
    with pytest.raises(ModelError, match="is not a folder of experts, or damaged"):
        load_experts(load_backbone(str(model_folder), pad_token_id=0), tmp_path)


def test_the_base_model_counts_the_same_whichever_experts_are_in_place(model_folder):
    """Beside no experts: what torch counts of the backbone, whoever was there before."""
    model = build(model_folder)
    few = {n: t for n, t in model.read().items() if "experts." not in n or ".experts.1." in n}
    counted = []
    for held in (model.read(), few):
        model.write(held)
        before, shape = model.flops, model.shape
        with model.reference(), FlopCounterMode(display=False) as counter:
            model(input_ids=IDS, attention_mask=MASK)
        counted.append(model.flops - before)
        assert model.shape is shape
    attention = 12 * 4 * 6 * 64  # of each token to six, 64 wide, which torch does not see here
    assert counted[0] == counted[1] == counter.get_total_flops() + attention
    model(input_ids=IDS, attention_mask=MASK)
    assert model.flops - before > counted[1] * 2


def test_a_reference_pass_that_fails_leaves_the_experts_as_they_were(model_folder):
    model = build(model_folder)
    start = model.read()
    model.write({n: t for n, t in start.items() if "experts." not in n or ".experts.1." in n})
    held, said = {name: layer.ids for name, layer in model.layers.items()}, logits(model)

    def run_out():
        with model.reference(start):
            raise MemoryError

    with pytest.raises(MemoryError):
        run_out()
    assert {name: layer.ids for name, layer in model.layers.items()} == held
    assert torch.equal(logits(model), said)
