"""DoRA, rsLoRA and PiSSA through three rounds of FedAvg are a hand-written loop in plain PEFT."""

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedloom
from fedloom.errors import SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.methods import METHODS
from fedloom.models.cut_factors import CUT
from fedloom.randomness import derive_seed, generator
from fedloom.runs.partitioning import partition_data

ROUNDS, RATE, RANK, BATCH = 3, 1e-3, 4, 8

VARIANTS = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "norm whole": {"modules_to_save": ["model.norm"]},
}

ASKED = ("dora", "rslora", "pissa")
"""The others are tried in the full suite."""


def fedavg_in_plain_peft(folder, clients, ratio, **variant):
    """Return the model after the rounds, and a token's row to ask it about; SFT, all clients in all rounds."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    backbone = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    torch.manual_seed(derive_seed(0, "adapter"))
    config = peft.LoraConfig(
        r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **variant
    )
    model = peft.get_peft_model(backbone, config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    shared = {name: p.detach().clone() for name, p in trained.items()}
    rows = [[encoded(tokenizer, *row) for row in own] for own in clients]
    for round in range(1, ROUNDS + 1):
        updates = []
        for client, own in enumerate(rows):
            with torch.no_grad():
                for name, parameter in trained.items():
                    parameter.copy_(shared[name])
            groups = [
                {"params": [p for n, p in trained.items() if "lora_B" not in n]},
                {"params": [p for n, p in trained.items() if "lora_B" in n], "lr": ratio * RATE},
            ]
            optimizer = torch.optim.AdamW(groups, RATE, weight_decay=0)
            model.train()
            order = generator(0, "batches", client, round).permutation(len(own))
            for start in range(0, len(own), BATCH):
                loss(model, [own[i] for i in order[start : start + BATCH]]).backward()
                torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            updates.append({name: p.detach().clone() for name, p in trained.items()})
        total = sum(map(len, rows))
        with torch.no_grad():
            for name, parameter in trained.items():
                parts = [u[name] * (len(own) / total) for u, own in zip(updates, rows, strict=True)]
                parameter.copy_(sum(parts))
                shared[name] = parameter.detach().clone()
    return model.eval(), torch.tensor([rows[0][0][0]])


def encoded(tokenizer, prompt, completion):
    tokens = tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]
    return tokens, len(tokenizer(prompt)["input_ids"])


def loss(model, batch):
    """Mean cross-entropy over completion tokens, each row read by itself."""
    losses = []
    for tokens, prompt in batch:
        ids = torch.tensor([tokens])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        losses.append(F.cross_entropy(logits[prompt - 1 : -1], ids[0, prompt:], reduction="none"))
    return torch.cat(losses).mean()


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ASKED else pytest.mark.full)
        for name in VARIANTS
    ],
)
def test_three_rounds_are_those_of_a_loop_in_plain_peft(experiment, variant, tmp_path):
    ratio = 4.0 if variant == "rslora" else 1.0  # LoRA+ beside it
    built = experiment(
        objective={"name": "sft"},
        data={"source": "builtin:instructions", "builtin_rows": 24},
        adapter={"rank": RANK, **VARIANTS[variant]},
        federation={"clients": 2, "rounds": ROUNDS},
        training={"learning_rate": RATE, "batch_size": BATCH, "loraplus_lr_ratio": ratio},
        evaluation={"samples": 0},
    )
    clients = [
        [(e.prompt, e.completion) for e in rows] for rows in partition_data(built).train.values()
    ]
    result = fedloom.run(built)
    theirs, ids = fedavg_in_plain_peft(built.model.path, clients, ratio, **VARIANTS[variant])
    base = AutoModelForCausalLM.from_pretrained(built.model.path)
    with torch.no_grad():
        start = base(input_ids=ids).logits
    ours = peft.PeftModel.from_pretrained(base, str(result.adapter_path)).eval()
    with torch.no_grad():
        mine, other = ours(input_ids=ids).logits, theirs(input_ids=ids).logits
    torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)
    assert (mine - start).abs().max() > 1e-2  # the tolerance is far below what was learnt
    saved = load_file(result.adapter_path / "adapter_model.safetensors")
    cut = VARIANTS[variant].get("init_lora_weights") in CUT
    for name, tensor in theirs.named_parameters():
        if tensor.requires_grad:
            name = name.replace("magnitude_vector.default.weight", "magnitude_vector")
            own = saved[name.replace(".modules_to_save.default", "").replace(".default", "")]
            if cut:  # the first factors are beside those that were trained
                own = own[:RANK] if ".lora_A." in name else own[:, :RANK]
            torch.testing.assert_close(own, tensor.detach(), rtol=0, atol=5e-5)


@pytest.mark.full
@pytest.mark.parametrize("variant", ["pissa", "dora"])
def test_clients_trained_together_give_what_they_give_alone(experiment, federate, variant):
    """With PiSSA factors of several clients are stacked; with DoRA clients are trained one by one."""
    sections = {
        "adapter": {"rank": RANK, "use_rslora": True, **VARIANTS[variant]},
        "training": {"local_steps": 2, "loraplus_lr_ratio": 4.0, "optimizer": "sgd"},
    }
    alone, together = (
        federate(experiment(**sections, simulation={"cohort": cohort})) for cohort in (1, 2)
    )
    start = alone.parts.initial
    apart = sum((own - together.adapter[n]).square().sum() for n, own in alone.adapter.items())
    moved = sum((own - start[n]).square().sum() for n, own in alone.adapter.items())
    assert moved > 0 and float((apart / moved).sqrt()) < 1e-4
    assert (together.parts.model.stackable == "") == (variant == "pissa")


@pytest.mark.parametrize("setting", ["use_dora", "init_lora_weights"])
@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name][1].two_factors])
def test_methods_of_two_factors_refuse_by_name_what_is_no_product(method, setting):
    adapter = {"use_dora": True} if setting == "use_dora" else {"init_lora_weights": "pissa"}
    with pytest.raises(SettingsError, match=rf"adapter.{setting}.*method.name = '{method}'"):
        Experiment.from_table({"adapter": adapter, "method": {"name": method}})


def test_weights_in_few_bits_have_no_factors_cut_out():
    for section, setting in (("model", "quantization"), ("training", "precision")):
        value = "int8" if section == "model" else "bf16"
        table = {"adapter": {"init_lora_weights": "olora"}, section: {setting: value}}
        with pytest.raises(SettingsError, match=f"whose rest {section}.{setting} = '{value}'"):
            Experiment.from_table(table)


def test_rules_of_products_and_parts_of_a_model_refuse_it_too():
    table = {"adapter": {"use_dora": True}, "aggregation": {"rule": "knots"}}
    with pytest.raises(SettingsError, match=r"adapter.use_dora: aggregation.rule = 'knots'"):
        Experiment.from_table(table)
    table = {
        "adapter": {"use_dora": True, "modules_to_save": ["norm"]},
        "method": {"name": "split"},
        "objective": {"name": "sft"},
        "data": {"source": "builtin:instructions"},
    }
    with pytest.raises(
        SettingsError, match=r"adapter.use_dora: .*(?s:.*)adapter.modules_to_save: "
    ):
        Experiment.from_table(table)


def test_a_pattern_is_of_one_model(table):
    pattern = r".*\.(q|v)_proj"
    other = {"groups": {"large": {"clients": [1], "model": "other"}}}
    place = r"clients\.groups\.large\.model"
    refused = {
        place: {"method": {"name": "local_only"}, "clients": other},
        r"method\.server_model": {
            "method": {"name": "distillation", "server_model": "other"},
            "objective": {"name": "sft"},
            "data": {"source": "builtin:instructions"},
            "public": {"rows": 4},
        },
    }
    for where, sections in refused.items():
        given = {**table, **sections, "adapter": {"targets": pattern}}
        with pytest.raises(
            SettingsError, match=rf"adapter.targets .* {where} is another model: give"
        ):
            Experiment.from_table(given)
        Experiment.from_table({**given, "adapter": {"targets": ["q_proj"]}})
    same = {"groups": {"large": {"clients": [1], "model": table["model"]["path"], "rank": 4}}}
    Experiment.from_table(
        {**table, **refused[place], "clients": same, "adapter": {"targets": pattern}}
    )


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dora", "pissa"])
@pytest.mark.parametrize(
    ("own", "tolerance"),
    [
        ({"privacy": {"secure_aggregation": True}}, 0.02),  # of fixed point
        ({"wire": {"up": "int4", "keep_plain_below": 0}}, 0.2),
    ],
    ids=["secure sums", "int4"],
)
def test_sums_and_codecs_keep_what_a_variant_learns(experiment, federate, variant, own, tolerance):
    """Of magnitudes too, which are far larger than their changes."""
    sections = {
        "adapter": {"rank": RANK, **VARIANTS[variant]},
        "federation": {"rounds": 1, "clients": 3},
        "training": {"learning_rate": RATE, "local_steps": 3},
        "evaluation": {"samples": 0, "per_client": False},
    }
    plain, other = (federate(experiment(**sections, **more)) for more in ({}, own))
    first, mine, theirs = plain.parts.initial, plain.adapter, other.adapter
    for kind in {name.split(".lora_")[1].split(".")[0] for name in first}:
        names = [name for name in first if f".lora_{kind}" in name]
        moved = sum(float((mine[n] - first[n]).square().sum()) for n in names)
        apart = sum(float((theirs[n] - mine[n]).square().sum()) for n in names)
        assert moved > 0 and (apart / moved) ** 0.5 < tolerance, kind
