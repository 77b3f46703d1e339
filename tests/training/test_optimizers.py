"""Optimizers beyond Adam, LoRA+ rates, noise on embeddings, the seed of the order of rows."""

import builtins
import math

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import Trainer, TrainingArguments

from fedloom.errors import ModelError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.models.adapters import AdapterSettings, attach_adapter
from fedloom.models.embedding_noise import EmbeddingNoise
from fedloom.models.load import load_backbone
from fedloom.training.optimizers import make_optimizer, optimizer_state, require_optimizer
from fedloom.training.settings import TrainingSettings

A, B = "x.lora_A.weight", "x.lora_B.weight"


def parameters(shape=(2, 2)):
    found = {A: nn.Parameter(torch.ones(shape)), B: nn.Parameter(torch.ones(shape))}
    for own in found.values():
        own.grad = torch.full(shape, 2.0)
    return found


def test_lora_plus_steps_b_by_its_ratio():
    own = parameters()
    settings = TrainingSettings(optimizer="sgd", loraplus_lr_ratio=16.0)
    make_optimizer(own, settings, 0.01).step()
    # 1 - 0.01 * 2 and 1 - 16 * 0.01 * 2
    torch.testing.assert_close(own[A].data, torch.full((2, 2), 0.98))
    torch.testing.assert_close(own[B].data, torch.full((2, 2), 0.68))


def test_rates_of_lora_plus_are_those_of_peft(model_folder):
    backbone = load_backbone(str(model_folder), pad_token_id=0)
    settings = AdapterSettings(rank=2, use_dora=True, modules_to_save=["model.norm"])
    model = attach_adapter(backbone, settings)
    own = {n: p for n, p in model.named_parameters() if p.requires_grad}
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16.0)
    ours = make_optimizer(own, TrainingSettings(loraplus_lr_ratio=16.0), 0.01)
    found, expected = (
        {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
        for made in (ours, theirs)
    )
    assert found == expected
    rates = {n: expected[id(p)] for n, p in own.items()}
    assert {rate for n, rate in rates.items() if "magnitude" in n or "norm" in n} == {0.16}
    assert {rate for n, rate in rates.items() if ".lora_A." in n} == {0.01}


def test_a_head_has_its_own_rate_beside_lora_plus():
    own = parameters() | {"base.score.weight": nn.Parameter(torch.ones(2))}
    own["base.score.weight"].grad = torch.ones(2)
    settings = TrainingSettings(
        optimizer="sgd", loraplus_lr_ratio=2.0, learning_rate=0.1, head_learning_rate=0.01
    )
    make_optimizer(own, settings, 0.05).step()  # half of the first rate, of heads too
    assert own["base.score.weight"][0].item() == pytest.approx(0.995)
    assert own[B][0, 0].item() == pytest.approx(0.8)


def test_lion_by_hand():
    own = parameters()
    settings = TrainingSettings(optimizer="lion", beta2=0.99, weight_decay=0.5)
    make_optimizer(own, settings, 0.1).step()
    # 1 (1 - 0.1 * 0.5) - 0.1 sign(0.1 * 2)
    torch.testing.assert_close(own[A].data, torch.full((2, 2), 0.85))


def test_adamw_of_8_bits_is_adamw_by_its_rounding():
    torch.manual_seed(0)
    start, gradient = torch.randn(64, 128), torch.randn(64, 128)  # above 4,096 numbers
    found = {}
    for name in ("adamw", "adamw_8bit"):
        own = {A: nn.Parameter(start.clone())}
        optimizer = make_optimizer(own, TrainingSettings(optimizer=name), 0.01)
        for k in range(3):
            own[A].grad = gradient * (k + 1)
            optimizer.step()
        found[name] = own[A].data - start
        states = optimizer.state[own[A]].values()
        if name == "adamw_8bit":
            assert any(s.dtype == torch.uint8 for s in states if isinstance(s, torch.Tensor))
    difference = (found["adamw"] - found["adamw_8bit"]).norm() / found["adamw"].norm()
    assert 0 < difference < 0.05


def test_adafactor_takes_a_first_step_of_the_rate_whatever_the_size_of_a_tensor():
    own = parameters() | {"m": nn.Parameter(torch.zeros(3))}
    own[B].data.zero_()
    own["m"].grad = torch.tensor([1.0, -2.0, 3.0])
    make_optimizer(own, TrainingSettings(optimizer="adafactor"), 1e-3).step()
    torch.testing.assert_close(own[A].data, torch.full((2, 2), 0.999))
    torch.testing.assert_close(own[B].data, torch.full((2, 2), -1e-3))
    torch.testing.assert_close(own["m"].data, torch.tensor([-1e-3, 1e-3, -1e-3]))


@pytest.mark.parametrize("optimizer", ["adafactor", "muon"])
def test_those_of_others_are_theirs_and_go_on_with_their_state(optimizer, tmp_path):
    settings = TrainingSettings(optimizer=optimizer, weight_decay=0.1)
    kind, options = torch.optim.Muon, {"lr": 0.01}
    if optimizer == "adafactor":
        theirs = TrainingArguments(
            str(tmp_path), optim="adafactor", learning_rate=0.01, report_to="none", use_cpu=True
        )
        kind, options = Trainer.get_optimizer_cls_and_kwargs(theirs)
    ours, theirs = parameters(), parameters()
    kept = kind(list(theirs.values()), **options, weight_decay=0.1)
    state = None
    for k in range(3):  # made anew between the steps, with its state
        made = make_optimizer(ours, settings, 0.01, state)
        for own in (*ours.values(), *theirs.values()):
            own.grad = torch.tensor([[1.0, 0.5], [0.0, 2.0]]) * (k + 1)
        made.step()
        kept.step()
        state = optimizer_state(ours, made)
        assert all(isinstance(own, torch.Tensor) for own in state.values())
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_muon_is_of_matrices_alone():
    own = parameters() | {"x.lora_magnitude_vector": nn.Parameter(torch.ones(3))}
    with pytest.raises(ModelError, match=r"magnitude_vector is none \(1 of 3 tensors\)"):
        require_optimizer(own, TrainingSettings(optimizer="muon"))
    require_optimizer(own, TrainingSettings(optimizer="adafactor"))


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **options):
        if name.startswith("bitsandbytes"):
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(SettingsError, match=r'pip install "fedloom\[quantization\]"'):
        require_optimizer(parameters(), TrainingSettings(optimizer="lion"))


class Embedded(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.Embedding(5, 4)

    def get_input_embeddings(self):
        return self.own


def test_noise_is_uniform_up_to_alpha_over_the_root_of_the_size():
    model = Embedded().train()
    noise = EmbeddingNoise(model, 5.0)
    ids = torch.zeros(2, 200, dtype=torch.long)
    noise.lengths = torch.tensor([200, 50])
    plain = model.own.weight[0].detach()
    torch.manual_seed(0)
    added = (model.own(ids) - plain).detach()
    for row, tokens in enumerate((200, 50)):
        widest = 5 / math.sqrt(tokens * 4)
        assert 0.98 * widest < added[row].abs().max() <= widest
        assert added[row].var() == pytest.approx(widest**2 / 3, rel=0.1)  # of uniform numbers
    torch.manual_seed(0)
    assert torch.equal((model.own(ids) - plain).detach(), added)
    with torch.no_grad():
        assert torch.equal(model.own(ids), plain.expand(2, 200, 4))
    model.eval()
    assert torch.equal(model.own(ids), plain.expand(2, 200, 4))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            {"training": {"loraplus_lr_ratio": 4.0}, "method": {"name": "scaffold"}},
            "training.loraplus_lr_ratio: method.name = 'scaffold' divides by one",
        ),
        (
            {"training": {"neftune_noise_alpha": 5.0}, "method": {"name": "fedkseed"}},
            "training.neftune_noise_alpha: method.name = 'fedkseed'",
        ),
        (
            {"training": {"neftune_noise_alpha": 5.0}, "privacy": {"unit": "row"}},
            "training.neftune_noise_alpha draws from one stream",
        ),
        (
            {"training": {"keep_optimizer_state": True, "optimizer": "lion"}},
            "lion keeps more than tensors",
        ),
        ({"training": {"optimizer": "lionn"}}, "training.optimizer"),
        ({"training": {"momentum": 0.9, "optimizer": "muon"}}, "muon has its own"),
    ],
)
def test_what_cannot_be_is_one_error_before_anything_is_trained(table, message):
    with pytest.raises(SettingsError, match=message):
        Experiment.from_table(table)


@pytest.mark.full
def test_noise_and_order_come_from_their_seeds_alone(experiment, federate):
    sections = {
        "objective": {"name": "sft"},
        "data": {"source": "builtin:instructions", "builtin_rows": 40},
        "federation": {"clients": 2, "rounds": 1},
    }

    def adapter(**training):
        training = {"local_steps": 1, "batch_size": 4, **training}
        found = federate(experiment(**sections, training=training)).adapter
        return torch.cat([tensor.flatten() for tensor in found.values()])

    plain, noisy = adapter(), adapter(neftune_noise_alpha=5.0)
    assert not torch.equal(noisy, plain)
    assert torch.equal(noisy, adapter(neftune_noise_alpha=5.0))
    assert torch.equal(adapter(data_seed=0), plain)
    assert not torch.equal(adapter(data_seed=1), plain)
