"""Reward models by hand and in runs: loss, margins, accuracy, PEFT's folder in plain transformers."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForSequenceClassification

import fedloom
from fedloom.data.batching import collate
from fedloom.data.examples import Preference
from fedloom.data.token_file import read_tokens, write_tokens
from fedloom.data.token_set import join
from fedloom.data.tokenize import tokenize
from fedloom.errors import DataError, ModelError, SettingsError
from fedloom.evaluation import rollouts
from fedloom.evaluation.generate import load_encoder
from fedloom.evaluation.judges.base import Case
from fedloom.evaluation.judges.choose import make_judges
from fedloom.evaluation.metrics import reward_metrics
from fedloom.evaluation.questions import Question
from fedloom.evaluation.reward_models import RewardScorer, load_reward_model
from fedloom.evaluation.rollouts import Drawn
from fedloom.evaluation.verdicts import JudgingSettings
from fedloom.experiment.experiment import Experiment
from fedloom.objectives.reward_model import reward_model_loss
from fedloom.runs.assembly import assemble
from fedloom.runs.code_digests import MadeWith
from fedloom.runs.partitioning import OwnRows, partition_data
from fedloom.runs.records import fingerprint
from fedloom.training.steps import Making

RUN = {
    "data": {"source": "builtin:preferences", "builtin_rows": 24},
    "objective": {"name": "reward_model"},
    "method": {"name": "fedavg"},
    "federation": {"rounds": 1, "clients": 2},
    "training": {"local_steps": 2, "batch_size": 4},
    "evaluation": {"samples": 0},
}


def test_hand_numbers():
    """Lead 2 - 0.5 - 1 = 0.5: -log sigmoid = log(1 + e^-0.5) = 0.4740769842; 0.01 (2 + 0.5)^2 = 0.0625."""
    rewards = torch.tensor([2.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    loss, metrics = reward_model_loss(*rewards, torch.tensor([1.0]), center=0.01)
    assert loss.item() == pytest.approx(0.4740769841801067 + 0.0625, abs=1e-12)
    assert metrics["reward_margin"].item() == 1.5 and metrics["reward_accuracy"].item() == 1
    assert reward_model_loss(*rewards)[0].item() == pytest.approx(math.log1p(math.exp(-1.5)))


def test_it_does_not_follow_a_shift_unless_rewards_are_centred():
    chosen, rejected = torch.randn(
        2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    plain = reward_model_loss(chosen, rejected)[0]
    torch.testing.assert_close(reward_model_loss(chosen + 3, rejected + 3)[0], plain)
    assert reward_model_loss(chosen + 3, rejected + 3, center=0.1)[0] > plain + 1


def test_held_out_pairs_by_hand():
    rewards = torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 0.0, 3.0])
    found = reward_metrics(*rewards, (torch.tensor([3, 4, 5]), torch.tensor([2, 4, 9])))
    assert found["reward_accuracy"] == 0.5 and found["longer_accuracy"] == 0.5
    assert found["reward_margin"] == 0
    losses = [math.log1p(math.exp(-1)), math.log(2), math.log1p(math.exp(1))]
    assert found["loss"] == pytest.approx(sum(losses) / 3)


def pairs(*margins):
    columns = [{} if own is None else {"margin": own} for own in margins]
    return [Preference(i, "ask: ", f"good {i}", f"bad {i}", own) for i, own in enumerate(columns)]


def test_margins_go_through_tokens_files_and_selections(model_folder, tmp_path):
    encoder = load_encoder(str(model_folder))
    whole = tokenize(pairs("0.5", None, "-2", "big", "1e9"), encoder, 64)
    assert whole.margins.tolist()[:3] == [0.5, 0, -2] and np.isnan(whole.margins[3:]).all()
    assert tokenize(pairs(None, None), encoder, 64).margins is None
    write_tokens(tmp_path / "tokens", [whole.part(0, 3)])
    assert read_tokens(tmp_path / "tokens").margins.tolist() == [0.5, 0, -2]
    assert whole.take(np.array([2, 0])).margins.tolist() == [-2, 0.5]
    plain = tokenize(pairs(None), encoder, 64)
    assert join([plain, whole.part(0, 1)], 2).margins.tolist() == [0, 0.5]


def rows(tmp_path, *margins):
    path = tmp_path / "pairs.jsonl"
    own = [
        {"prompt": "ask: ", "chosen": f"good {i}", "rejected": f"bad {i}", "margin": margins[i % len(margins)]}
        for i in range(24)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in own))
    return {"source": str(path), "kind": "preference"}


def client_text(own, ids):
    return load_encoder(own.model.path).tokenizer.decode(ids, skip_special_tokens=True)


def test_a_batch_has_the_margins_of_its_rows(experiment, tmp_path):
    own = experiment(**{**RUN, "data": rows(tmp_path, 0.5, 2)})
    client = assemble(own, partition_data(own), probe=False).local.client(0, 1)
    batch = collate(client.share, np.arange(3), 0, torch.device("cpu"))
    shown = [client.share.tokens.sequence(2 * i)[0].tolist() for i in range(3)]
    texts = [client_text(own, ids) for ids in shown]
    assert [
        0.5 if int(text.split()[-1]) % 2 == 0 else 2.0 for text in texts
    ] == batch.margins.tolist()


def test_margins_are_read_of_clients_own_rows_too(experiment, tmp_path):
    """A client's whole file, between machines and with partition.kind = "files", as one that is dealt."""
    test = tmp_path / "test.jsonl"
    test.write_text('{"prompt": "other: ", "chosen": "c", "rejected": "r"}\n')
    data = rows(tmp_path, 0.5, 2) | {"test_source": str(test)}
    apart = {**data, "source": [data["source"]]}
    table = {**RUN, "federation": {"rounds": 1, "clients": 1}}
    files = experiment(**{**table, "data": apart, "partition": {"kind": "files"}})
    dealt = experiment(**{**table, "data": data})
    whole = partition_data(dealt, own=OwnRows(0, dealt.data, None))
    found = [whole, partition_data(files), partition_data(dealt)]
    margins = [sorted(row.columns.get("margin") for row in own.train[0]) for own in found]
    assert margins[0] == margins[1] == margins[2] and set(map(float, margins[0])) == {0.5, 2}
    without = {"name": "reward_model", "margins": False}
    plain = experiment(
        **{**table, "data": apart, "partition": {"kind": "files"}, "objective": without}
    )
    assert not any(row.columns for row in partition_data(plain).train[0])


def test_a_reward_model_is_part_of_what_a_run_is(experiment, tmp_path):
    """Found: a run was resumed with other rewards, where a folder held another reward model."""
    folder = tmp_path / "rewards" / "adapter"
    folder.mkdir(parents=True)
    table = {"data": {"source": "builtin:sums", "builtin_rows": 20}}
    objective = {"name": "grpo", "rewards": ["exact_match"]}
    groups = {"own": {"clients": [1], "rewards": [f"reward_model:{folder.parent}"]}}
    own = experiment(**{**RUN, **table, "objective": objective, "clients": {"groups": groups}})
    division, found = partition_data(own), []
    for facts, weights in (("{}", b"1"), ("{}", b"1"), ("{ }", b"1"), ("{}", b"2")):
        (folder / "fedloom.json").write_text(facts)
        (folder / "adapter_model.safetensors").write_bytes(weights)
        found.append(fingerprint(own, division, MadeWith()))
    assert found[0] == found[1] and len(set(found)) == 3
    shutil.rmtree(folder)  # between machines it is where the client is
    assert fingerprint(own, division, MadeWith()) not in found


def test_flops_of_a_reward_model_are_counted_on_the_policys_device(experiment, monkeypatch):
    """Two passes, of 16 answers and of the rest, each as long as its longest text."""
    asked = []

    def load(path, device=None):
        asked.append((path, device))
        return scorer

    own = experiment(**RUN)
    client = assemble(own, partition_data(own), probe=False).local.client(0, 1)
    encoder = load_encoder(own.model.path)
    scorer = RewardScorer("own", encoder, client.model.model.eval(), chat=False)
    texts = [[5, 6, 7]] * 15 + [[5, 6, 7, 8], [5, 6]]
    with FlopCounterMode(display=False) as counter:
        scorer.of_tokens(texts)
    assert scorer.flops(texts) == pytest.approx(counter.get_total_flops(), rel=0.03)
    monkeypatch.setattr(rollouts, "load_reward_model", load)
    table = {
        "data": {"source": "builtin:instructions", "builtin_rows": 20},
        "objective": {"name": "grpo", "rewards": ["exact_match"], "group": 2, "max_new_tokens": 3},
        "training": {"local_steps": 1, "batch_size": 2},
    }
    counted = []
    for rewards in (["exact_match"], ["reward_model:own"]):
        table["objective"]["rewards"] = rewards
        own = experiment(**{**RUN, **table})
        client = assemble(own, partition_data(own), probe=False).local.client(0, 1)
        making = Making(client.seed, client.id, client.round, "", client.work, again=False)
        before = client.model.flops
        assert (
            len(list(client.maker.batches(client.model, client.share, client.training, making)))
            == 1
        )
        counted.append(client.model.flops - before)
    assert counted[1] > counted[0]
    assert asked and set(asked) == {("own", client.model.device)}


def test_a_margin_that_is_no_number_is_named_before_training(experiment, tmp_path):
    data = rows(tmp_path, "large")
    with pytest.raises(DataError, match=r"margin is no number .* objective\.margins = false"):
        fedloom.run(experiment(**{**RUN, "data": data}))
    without = {"name": "reward_model", "margins": False}
    own = experiment(**{**RUN, "data": data, "objective": without})
    assert assemble(own, partition_data(own), probe=False).local.shares


def test_public_rows_and_teachers_cannot_teach_it():
    for method in ({"name": "distillation"}, {"name": "feddat"}):
        with pytest.raises(SettingsError, match="reward_model"):
            Experiment.from_table({**RUN, "method": method})


@pytest.fixture
def trained(experiment, once):
    return once("run", lambda: fedloom.run(experiment(**RUN)))


@pytest.mark.slow
def test_a_run_travels_with_its_head_and_loads_in_plain_transformers(trained):
    """The head is PEFT's modules_to_save; scores of a fresh load are the scorer's."""
    folder = trained.folder / "adapter"
    facts = json.loads((folder / "fedloom.json").read_text())
    config = AutoConfig.from_pretrained(folder / "classifier.json")
    assert config.num_labels == 1
    base = AutoModelForSequenceClassification.from_pretrained(facts["base"]["path"], config=config)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    assert any(
        "score" in name
        for name in json.loads((folder / "adapter_config.json").read_text())["modules_to_save"]
    )
    scorer = load_reward_model(str(trained.folder))
    texts = [
        scorer.encoder.tokenizer(own)["input_ids"] for own in ("one two", "three four five six")
    ]
    expected = [model(input_ids=torch.tensor([own])).logits.item() for own in texts]
    assert scorer.of_tokens(texts) == pytest.approx(expected, abs=1e-5)
    assert set(trained.metrics) >= {"reward_accuracy", "longer_accuracy", "reward_margin", "loss"}


@pytest.mark.slow
def test_it_judges_and_rewards(trained, experiment):
    (judge,) = make_judges([str(trained.folder)], JudgingSettings(device="cpu"))
    question = Question("1", "one two ")
    (verdict,) = judge.rate([Case(question, ("three", "four"))])
    scorer = load_reward_model(str(trained.folder))
    assert list(verdict.scores) == scorer.of_answers("one two ", ["three", "four"])
    assert judge.costs() == {"requests": 1.0} and not judge.compares
    name = f"reward_model:{trained.folder}"
    table = {
        "data": {"source": "builtin:instructions", "builtin_rows": 20},
        "objective": {"name": "grpo", "rewards": [name], "group": 2, "max_new_tokens": 3},
        "evaluation": {"samples": 0},
        "training": {"local_steps": 1, "batch_size": 2},
    }
    own = experiment(**{**RUN, **table})
    client = assemble(own, partition_data(own), probe=False).local.client(0, 1)
    prompt, answers = [5, 6, 7], [[8], [9, 10]]
    found = client.maker.rewarded(client.model, Drawn(np.array([0]), [prompt], [[8]], answers))
    assert found.tolist() == [scorer.of_tokens([prompt + own for own in answers])]


def test_a_folder_without_a_reward_model_is_named(tmp_path):
    with pytest.raises(ModelError, match="is no reward model"):
        load_reward_model(str(tmp_path))
    for name in ("reward_model:", "reward_model: "):
        with pytest.raises(SettingsError, match="names no folder"):
            Experiment.from_table(
                {
                    "objective": {"name": "grpo", "rewards": [name]},
                    "data": {"source": "builtin:sums"},
                }
            )


def test_dropout_is_switched_off_of_a_model_with_one_output(experiment):
    """As row-level privacy asks: one number has no spread that a change could be weighed by."""
    own = experiment(**RUN, model={"path": experiment().model.path, "dropout": False})
    assert assemble(own, partition_data(own), probe=False).local.client(0, 1).model is not None
