"""Merging finished adapters: what PEFT makes of the result, whose rows weigh, and what is refused."""

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import fedloom
from fedloom.aggregation.merging import Merging
from fedloom.errors import ModelError, OutputError
from fedloom.models.load import fingerprint
from fedloom.runs import merge as merging
from fedloom.runs.adapter_scores import evaluate_adapter
from fedloom.runs.merge import merge_adapters

MEAN = Merging("task_arithmetic", space="product")
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def site(model_folder, tmp_path_factory):
    """Write an adapter with random factors, as PEFT saves it."""

    def write(name, rank=2, alpha=4.0, targets=("q_proj", "down_proj"), **settings):
        folder = tmp_path_factory.mktemp("sites") / name
        torch.manual_seed(sum(name.encode()))
        base = AutoModelForCausalLM.from_pretrained(model_folder)
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=list(targets),
            task_type="CAUSAL_LM",
            **settings,
        )
        model = peft.get_peft_model(base, config)
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="module")
def three(site):
    """Three sites with other ranks and scales, the last with a scale by the rank's root."""
    return [site("a"), site("b", rank=3, alpha=3.0), site("c", rank=1, alpha=8)]


def changes(folder, model_folder):
    """What PEFT adds to each layer's weights."""
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = peft.PeftModel.from_pretrained(base, folder)
    return {
        name: module.get_delta_weight("default")
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def test_peft_adds_the_weighted_mean_of_what_the_sites_add(three, model_folder, tmp_path):
    found = merge_adapters(three, tmp_path / "merged", MEAN, [1, 2, 1], rank=6)
    own = [changes(folder, model_folder) for folder in three]
    merged = changes(tmp_path / "merged", model_folder)
    assert found.rank_error < 1e-6 and merged.keys() == own[0].keys()
    for name, tensor in merged.items():
        whole = own[0][name] / 4 + own[1][name] / 2 + own[2][name] / 4
        assert torch.allclose(tensor, whole, atol=1e-6)


def test_a_smaller_rank_loses_what_is_said(three, model_folder, tmp_path):
    found = merge_adapters(three, tmp_path / "merged", MEAN, [1, 1, 1])
    assert found.inputs.rank == 3
    own = [changes(folder, model_folder) for folder in three]
    merged = changes(tmp_path / "merged", model_folder)
    lost = whole = 0.0
    for name, tensor in merged.items():
        mean = sum(change[name] for change in own) / 3
        lost += float((tensor - mean).square().sum())
        whole += float(mean.square().sum())
    assert found.rank_error == pytest.approx((lost / whole) ** 0.5, rel=1e-3)
    assert (
        json.loads((tmp_path / "merged" / "merge.json").read_text())["rank_error"]
        == found.rank_error
    )


def test_its_card_says_that_it_was_merged(three, tmp_path):
    merge_adapters(three, tmp_path / "merged", MEAN, [1, 1, 1])
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "merged by `task_arithmetic` from 3 adapters" in card and "0 rounds" not in card


def test_scales_by_the_root_of_the_rank(site, model_folder, tmp_path):
    folders = [
        site(name, alpha=2.0, use_rslora=True, rank=rank) for name, rank in (("d", 4), ("e", 2))
    ]
    merge_adapters(folders, tmp_path / "merged", MEAN, [1, 1], rank=6)
    own = [changes(folder, model_folder) for folder in folders]
    for name, tensor in changes(tmp_path / "merged", model_folder).items():
        assert torch.allclose(tensor, (own[0][name] + own[1][name]) / 2, atol=1e-6)


def test_the_same_bits_again_and_for_dare_by_the_seed(three, tmp_path):
    rule = Merging("dare", 0.5, space="product")
    found = [
        merge_adapters(three, tmp_path / name, rule, [1, 1, 1], seed=seed).folder
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    ]
    one, again, other = ((own / "adapter_model.safetensors").read_bytes() for own in found)
    assert one == again != other


@pytest.mark.slow
def test_runs_weigh_by_their_rows_and_the_result_is_evaluated(experiment, tmp_path):
    runs = [
        fedloom.run(
            experiment(
                federation={"clients": 1, "rounds": 1}, method={"name": "centralised"},
                data={"builtin_rows": rows}, output={"folder": str(tmp_path / f"site{rows}"), "verify": False},
                training={"local_steps": 1}, evaluation={"samples": 0},
            )
        )
        for rows in (30, 60)
    ]  # fmt: skip
    folders = [run.adapter_path.parent for run in runs]
    found = merge_adapters(folders, tmp_path / "merged", Merging("ties", 0.5, space="product"))
    rows = [
        json.loads((folder / "partition.json").read_text())["clients"][0]["train"]
        for folder in folders
    ]
    assert found.inputs.weights == tuple(map(float, rows)) and rows[0] < rows[1]
    scores = evaluate_adapter(experiment(), found.folder, lambda *_: lambda *_: None)
    assert 0 <= scores.metrics["preference_accuracy"] <= 1
    # a PEFT folder outside a run has no rows
    found = merge_adapters([found.folder, folders[0]], tmp_path / "again", MEAN)
    assert found.inputs.weights == (1.0, 1.0)
    assert "all adapters weigh alike" in found.inputs.doubts[0]


def changed(folder, target, **record):
    """Copy an adapter with another configuration."""
    target.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | record))
    save_file(load_file(folder / "adapter_model.safetensors"), target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"base_model_name_or_path": "other/model"}, "different base models: .*'other/model'"),
        ({"peft_type": "IA3"}, "its peft_type is 'IA3', and merging is of LORA"),
        ({"use_dora": True}, "made with use_dora = True: it is more than a product"),
        ({"bias": "all"}, "made with other settings: bias is 'none' and 'all'"),
        ({"r": 7}, "not those of factors of rank 7"),
        ({"r": "2"}, "r = '2' is no rank of LoRA"),
        ({"lora_alpha": -1}, "lora_alpha = -1 is not above 0"),
        ({"lora_alpha": 10**400}, "is not above 0 and at most 1e"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan is not above 0"),
        ({"lora_alpha": True}, "lora_alpha = True is not above 0"),
        ({"revision": 'x"); print(("'}, "is none of the Hub"),
        ({"base_model_name_or_path": "a\ud800"}, "is no name of a model"),
        ({"init_lora_weights": "pissa"}, "changes the frozen weights"),
    ],
)
def test_what_does_not_fit_is_refused(three, tmp_path, record, words):
    other = changed(three[0], tmp_path / "other", **record)
    with pytest.raises(ModelError, match=words):
        merge_adapters([three[0], other], tmp_path / "merged", MEAN)
    assert not (tmp_path / "merged").exists()


def test_tensors_that_do_not_fit_are_refused(site, three, tmp_path):
    with pytest.raises(ModelError, match=r"not on the same layers: .*q_proj"):
        merge_adapters([site("f", targets=["down_proj"]), three[0]], tmp_path / "merged", MEAN)
    other = changed(three[0], tmp_path / "other")
    tensors = load_file(other / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] * float("nan")}, other / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="not finite"):
        merge_adapters([three[0], other], tmp_path / "merged", MEAN)
    (other / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match="is damaged"):
        merge_adapters([three[0], other], tmp_path / "merged", MEAN)
    with pytest.raises(ModelError, match="--space factors needs adapters of one rank"):
        merge_adapters(three, tmp_path / "merged", Merging("task_arithmetic"))
    with pytest.raises(ModelError, match="would drop entries of the A"):
        merge_adapters(three, tmp_path / "merged", Merging("ties"))
    with pytest.raises(ModelError, match="given twice"):
        merge_adapters([three[0], three[0]], tmp_path / "merged", MEAN)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError, match="is not empty"):
        merge_adapters(three, tmp_path / "full", MEAN)


def test_the_command(call, three, tmp_path):
    code, said = call("merge", *three, "--rule", "knots", "--output", "merged", "--density", "0.5")
    assert code == 0 and "weight 0.3333" in said and "% of their norm" in said
    assert (tmp_path / "merged" / "adapter_model.safetensors").is_file()
    for arguments, words in (
        (["--rule", "tise"], "it is one of task_arithmetic, ties, dare, knots"),
        (["--rule", "ties", "--density", "2"], "above 0 and at most 1"),
        (["--density", "0.5"], "task_arithmetic keeps all"),
        (["--rule", "knots", "--space", "factors"], "knots has products alone"),
        (["--rule", "ties", "--space", "factors"], "would drop entries of the A"),
        (["--rule", "dare", "--space", "factors"], "would drop entries of the A"),
        (["--weights", "1,2"], "2 numbers for 3 adapters"),
        (["--weights", "1,nan,1"], "weights are from 0 to"),
        (["--weights", "a"], "give numbers with commas"),
        (["--scale", "0"], "above 0 and at most 100"),
    ):
        code, said = call("merge", *three, "--output", "other", *arguments)
        assert code == 2 or words in said, said
        assert words in " ".join(said.replace("│", " ").split()), said
        assert "Traceback" not in said and not (tmp_path / "other").exists()
    code, said = call("merge", three[0], "nothing", "--output", "other")
    assert code != 0 and "nothing is not an adapter" in said


PROMISE = "Privacy: nobody learns more than (epsilon, delta) = (2, 1e-05) allows"

TOLD = {
    "base": {
        "path": "acme/base", "name": "acme/base", "hub": True, "revision": None, "sha256": None,
        "licence": "mit",
    },
    "objective": "dpo", "adapter": "lora", "precision": "fp32", "quantization": "none",
    "dtype": "float32", "task": "causal", "classes": [], "clients": 3,
    "prompt": {"format": "plain", "example": "{prompt}", "template": None},
}  # fmt: skip


def tiny(folder, facts=None, base=None, **record):
    """Write an adapter of one layer without PEFT; ``facts`` are changes of what fedloom would tell."""
    folder.mkdir(parents=True)
    own = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2.0}
    own |= {"base_model_name_or_path": "acme/base", "revision": None, **record}
    (folder / "adapter_config.json").write_text(json.dumps(own))
    torch.manual_seed(sum(folder.name.encode()))
    tensors = {
        f"{LAYER}.lora_A.weight": torch.randn(2, 4),
        f"{LAYER}.lora_B.weight": torch.randn(3, 2),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    if facts is not None:
        told = {**TOLD, **facts, "base": {**TOLD["base"], **(base or {})}}
        told = {key: value for key, value in told.items() if value is not None}
        (folder / "fedloom.json").write_text(json.dumps(told))
    return folder


def merged_card(folders, target):
    merge_adapters(folders, target, MEAN, [1.0] * len(folders))
    return (target / "README.md").read_text()


INJECTED = 'x"); __import__("os").system("id"); ("'


@pytest.mark.parametrize(
    ("facts", "base", "words"),
    [
        ({}, {"revision": INJECTED}, "base is .* none that fedloom writes"),
        ({}, {"path": 5}, "base is"),
        ({}, {"path": "other", "name": "other"}, "says that its base model is 'other'"),
        ({}, {"revision": "abc"}, "'acme/base' at abc, and .* that it is 'acme/base'"),
        ({}, {"licence": "a\nb"}, "base is"),
        ({}, {"sha256": "5f"}, "base is"),
        ({"base": None, "dtype": INJECTED}, None, "dtype is"),
        ({"clients": "many"}, None, "clients is 'many'"),
        ({"clients": -1}, None, "clients is -1"),
        ({"privacy": 5}, None, "privacy is 5"),
        ({"privacy": ["a\n# b"]}, None, "privacy is"),
        ({"objective": "`dpo`"}, None, "objective is"),
        ({"objectives": [[]]}, None, "objectives is"),
        ({"prompt": {"format": "chat"}}, None, "prompt is"),
        ({"quantization": []}, None, "quantization is"),
        ({"classes": ["\ud800"]}, None, "classes is"),
        ({"task": "classification"}, None, "says that its task is classification"),
        ({"precision": None}, None, "precision is None"),
    ],
)
def test_facts_that_fedloom_does_not_write_are_refused(tmp_path, facts, base, words):
    bad = tiny(tmp_path / "bad", facts, base)
    with pytest.raises(ModelError, match=words):
        merge_adapters([bad, tiny(tmp_path / "good")], tmp_path / "merged", MEAN)
    (bad / "fedloom.json").write_text("{}")
    with pytest.raises(ModelError, match="base is None"):
        merge_adapters([tmp_path / "good", bad], tmp_path / "merged", MEAN)
    assert {path.name for path in tmp_path.iterdir()} == {"bad", "good"}


def test_a_base_that_is_elsewhere_is_known_by_the_digest_that_is_computed(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    own = {"path": "/gone/base", "name": "base", "hub": False, "sha256": fingerprint(str(base))}
    one, two = (
        tiny(tmp_path / name, {}, own, base_model_name_or_path=str(base)) for name in ("one", "two")
    )
    merge_adapters([one, two], tmp_path / "merged", MEAN, [1, 1])
    for name in ("fedloom.json", "adapter_config.json"):
        text = (tmp_path / "merged" / name).read_text()
        assert str(base) in text and "/gone" not in text
    (base / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="says that its base model is '/gone/base'"):
        merge_adapters([one, two], tmp_path / "again", MEAN, [1, 1])


def test_names_of_one_base_by_digest_are_said(tmp_path):
    own = {"hub": False, "sha256": "5" * 64}
    sites = [
        tiny(tmp_path / name, {}, {**own, "path": f"/{name}/base", "name": "base"},
             base_model_name_or_path=f"/{name}/base")
        for name in ("one", "two")
    ]  # fmt: skip
    found = merge_adapters(sites, tmp_path / "merged", MEAN, [1, 1])
    assert "taken for one by the SHA-256" in found.inputs.doubts[0]
    assert "the result names '/one/base'" in found.inputs.doubts[0]


def test_a_base_on_another_machine_is_merged_without_facts(tmp_path):
    sites = [tiny(tmp_path / name, base_model_name_or_path="/gone/to/base") for name in ("a", "b")]
    card = merged_card(sites, tmp_path / "merged")
    assert "A local folder, `base`." in card and "base_model:" not in card


def test_every_pair_is_compared(tmp_path):
    """The first says nothing of classes, and its digest is not known; the others differ."""
    first = tiny(tmp_path / "first")
    two = tiny(tmp_path / "two", {}, {"sha256": "2" * 64})
    three = tiny(tmp_path / "three", {}, {"sha256": "3" * 64})
    with pytest.raises(ModelError, match=r"two and .*three are of different base models"):
        merge_adapters([first, two, three], tmp_path / "merged", MEAN, [1, 1, 1])
    four = tiny(tmp_path / "four", {"classes": ["a"]})
    with pytest.raises(ModelError, match="differ in their classes"):
        merge_adapters([first, two, four], tmp_path / "merged", MEAN, [1, 1, 1])


NOTHING = "No privacy is promised: not all merged adapters have a promise."


def test_privacy_is_promised_only_where_all_adapters_promise_it(tmp_path):
    one, two = (
        tiny(tmp_path / run / "adapter", {"privacy": [PROMISE]}) for run in ("site-a", "site-b")
    )
    card = merged_card([one, two], tmp_path / "merged")
    assert f"\nsite-a: {PROMISE}.\n" in card and f"\nsite-b: {PROMISE}.\n" in card
    assert "the epsilons add up" in card and str(tmp_path) not in card
    again = merged_card([tmp_path / "merged", one], tmp_path / "again")
    assert f"\nmerged: site-a: {PROMISE}.\n" in again
    for place, said in enumerate(
        (
            None,
            ["Privacy: changes are clipped and get no noise, so that nothing is promised"],
            ["Privacy: reproducible, therefore not private. Noise is drawn from a seed", PROMISE],
        )
    ):
        other = tiny(tmp_path / f"other{place}", {"privacy": said})
        card = merged_card([one, other], tmp_path / f"none{place}")
        assert f"## Privacy\n\n{NOTHING}\n" in card and PROMISE not in card
        more = merged_card([tmp_path / f"none{place}", two], tmp_path / f"more{place}")
        assert NOTHING in more and PROMISE not in more


def test_the_card_says_what_all_have_in_common(tmp_path):
    chat = {"format": "chat", "example": "x", "template": None}
    one = tiny(tmp_path / "one", {})
    two = tiny(tmp_path / "two", {"objective": "sft", "prompt": chat, "quantization": "int4"})
    card = merged_card([one, two, tiny(tmp_path / "three")], tmp_path / "merged")
    assert "with the objectives `dpo`, `sft`, `unknown`, with no round" in card
    assert "## Evaluation\n\nNot scored yet.\n" in card and "summary.json" not in card
    assert "prompts of several forms, or of one not known" in card
    assert "quantised in training (int4)" in card
    card = merged_card([one, tiny(tmp_path / "four", {})], tmp_path / "alike")
    assert "with the objective `dpo`, with no round" in card and "several forms" not in card
    again = merged_card([tmp_path / "merged", one], tmp_path / "again")
    assert "with the objectives `dpo`, `sft`, `unknown`" in again


def run_folder(folder, rows):
    """Write what of a run says its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.toml").touch()
    clients = [{"client": k, "train": count} for k, count in rows.items()]
    (folder / "partition.json").write_text(json.dumps({"clients": clients}))


def test_runs_in_a_folder_called_clients_weigh_by_all_their_rows(tmp_path):
    runs = [tmp_path / "clients" / name for name in ("site-a", "3")]
    for run, rows in zip(runs, ({0: 5, 3: 7}, {0: 20, 3: 1}), strict=True):
        tiny(run / "adapter")
        run_folder(run, rows)
    found = merge_adapters(runs, tmp_path / "merged", MEAN)
    assert found.inputs.weights == (12, 21) and found.inputs.weighed_by == "rows"
    own = tiny(runs[1] / "clients" / "0003"), tiny(runs[1] / "clients" / "mine")
    found = merge_adapters([runs[0], own[0]], tmp_path / "two", MEAN)
    assert found.inputs.weights == (12, 1)
    found = merge_adapters([runs[0], own[1]], tmp_path / "three", MEAN)
    assert found.inputs.weighed_by == "alike" and "no record of rows" in found.inputs.doubts[0]
    (runs[0] / "partition.json").write_text('{"clients": [{"client": "0"}]}')
    with pytest.raises(ModelError, match=r"partition.json has no rows of clients"):
        merge_adapters(runs, tmp_path / "four", MEAN)


def test_the_folder_that_one_is_in_is_filled_and_no_folder_of_the_user_is_lost(
    tmp_path, monkeypatch
):
    sites = [tiny(tmp_path / name) for name in ("a", "b")]
    (tmp_path / "here").mkdir()
    (tmp_path / "here.part").mkdir()
    (tmp_path / "here.part" / "notes").touch()
    monkeypatch.chdir(tmp_path / "here")
    folder = merge_adapters(sites, Path("."), MEAN, [1, 1]).folder
    left = {path.name for path in (tmp_path / "here").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "merge.json"} <= left
    assert not any("part" in name for name in left) and (folder / "README.md").is_file()
    assert "# here\n" in (folder / "README.md").read_text()
    assert (tmp_path / "here.part" / "notes").is_file()

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "describe", stopped)
    with pytest.raises(KeyboardInterrupt):
        merge_adapters(sites, tmp_path / "merged", MEAN, [1, 1])
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "here", "here.part"}


def test_the_scale_is_once_in_products_of_factors(tmp_path):
    sites = [tiny(tmp_path / name) for name in ("a", "b")]
    for scale in (1.0, 3.0):
        merge_adapters(
            sites, tmp_path / f"{scale}", Merging("task_arithmetic", scale=scale), [1, 1]
        )
    one, three = (load_file(tmp_path / f"{s}" / "adapter_model.safetensors") for s in (1.0, 3.0))
    assert torch.allclose(three[f"{LAYER}.lora_A.weight"], one[f"{LAYER}.lora_A.weight"])
    assert torch.allclose(three[f"{LAYER}.lora_B.weight"], 3 * one[f"{LAYER}.lora_B.weight"])
