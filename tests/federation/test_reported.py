"""Metrics have declared names and ranges: all that honest clients report fits, and none of it is left out."""

import pytest
import torch

import fedloom
from fedloom.federation import client_link
from fedloom.objectives import OBJECTIVES
from fedloom.objectives.apo import apo_down_loss, apo_zero_loss
from fedloom.objectives.base import Objective
from fedloom.objectives.bco import bco_loss, reward_shift
from fedloom.objectives.classification import classification_loss
from fedloom.objectives.cpo import cpo_loss
from fedloom.objectives.distillation import Distillation, distillation_loss
from fedloom.objectives.dpo import DPO, dpo_loss
from fedloom.objectives.ipo import ipo_loss
from fedloom.objectives.kto import kl_estimate, kto_loss
from fedloom.objectives.orpo import orpo_loss
from fedloom.objectives.pdpo import pdpo_loss
from fedloom.objectives.reward_model import reward_model_loss
from fedloom.objectives.robust_dpo import robust_dpo_loss
from fedloom.objectives.selector import selector_loss
from fedloom.objectives.simpo import simpo_loss
from fedloom.wire.messages import decode, encode
from fedloom.wire.schema import NumberSpec, score

MIXTURE = {"adapter": {"kind": "experts", "rank": 2, "experts": 6}}
PAIRS = {"data": {"source": "builtin:preferences"}}
FEEDBACK = {"data": {"source": "builtin:feedback"}}
TEXTS = {"data": {"source": "builtin:instructions"}, "objective": {"name": "sft"}}
LABELLED = {"data": {"source": "builtin:labelled"}, "objective": {"name": "classification"}}
OWN = {"method": {"name": "fedpdpo", "bottleneck": 4}}
RUNS = {
    "sft": TEXTS,
    "classification": LABELLED,
    "dpo": {**PAIRS, "objective": {"name": "dpo", "sft_weight": 0.5, "label_smoothing": 0.1}},
    **{name: {**PAIRS, "objective": {"name": name}} for name in ("robust_dpo", "apo_zero", "apo_down", "cpo", "ipo", "simpo", "orpo", "selector", "rpo", "reward_model")},
    **{name: {**FEEDBACK, "objective": {"name": name}} for name in ("kto", "bco")},
    "pdpo": {**PAIRS, **OWN, "objective": {"name": "pdpo", "sft_weight": 0.5}},
    "pkto": {**FEEDBACK, **OWN, "objective": {"name": "pkto"}},
    "grpo": {**TEXTS, "objective": {"name": "grpo", "beta": 0.1, "group": 2, "max_new_tokens": 3}},
    "rejection_sampling": {**TEXTS, "objective": {"name": "rejection_sampling", "group": 2, "max_new_tokens": 3}},
    "balance": {**PAIRS, **MIXTURE, "method": {"name": "fedavg"}},
    "distil": {**LABELLED, "method": {"name": "distillation"}, "public": {"source": "builtin:labelled", "rows": 12}},
    "mix": {**PAIRS, "method": {"name": "fdlora"}},
    "alone": {**TEXTS, "method": {"name": "local_only"}},
    "split": {**LABELLED, "method": {"name": "split", "cut": 1}},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_all_that_honest_clients_report_is_declared_and_let_in(
    experiment, federate, monkeypatch, name
):
    seen = set()

    def watched(payload, schema, rng=None):
        data = encode(payload, schema, rng)
        assert decode(data, schema).metrics == dict(payload.metrics)
        seen.update(payload.metrics)
        return data

    monkeypatch.setattr(client_link, "encode", watched)
    sections = {**RUNS[name]}
    sections["data"] = {"builtin_rows": 60, **sections["data"]}
    own = experiment(
        **sections,
        training={"local_steps": 1},
        federation={"rounds": 1, "clients": 3},
    )
    found = federate(own, evaluate=True)
    assert not any(record.rejected for record in found.records)
    objective = found.parts.objective
    expected = {spec.name for spec in objective.reported} - {"chosen_cross_entropy"}
    if name not in ("split", "pkto"):
        assert expected <= seen
    extra = {
        "balance": {"balance"},
        "distil": {"distil_loss", "distil_divergence", "distil_agreement", "common.accuracy"},
        "mix": {"shared_weight", "private_weight"},
        "alone": {"common.loss"},
        "dpo": {"chosen_cross_entropy"},
    }
    assert extra.get(name, set()) <= seen


def test_every_objective_is_among_these():
    assert OBJECTIVES.keys() <= RUNS.keys()


def logps(seed, rows=64):
    """Summed log-probs of texts: most are ordinary, some are of a model that has lost its mind."""
    rng = torch.Generator().manual_seed(seed)
    size = 10 ** (torch.rand(rows, generator=rng) * 7 - 1)
    return -size * torch.rand(rows, generator=rng)


def signs(seed, rows=64):
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed)) < 0.5


def losses(seed):
    a, b, c, d = (logps(seed + n) for n in range(4))
    good = signs(seed)
    kl = kl_estimate(a, b)
    yield "dpo", dpo_loss(a, b, c, d, beta=0.1, label_smoothing=0.3)
    yield "robust_dpo", robust_dpo_loss(a - c, b - d, beta=0.1, flip_rate=0.4)
    yield "apo_zero", apo_zero_loss(a - c, b - d, beta=0.1)
    yield "apo_down", apo_down_loss(a - c, b - d, beta=0.1)
    yield "cpo", cpo_loss(a, b, torch.full((64,), 7.0), beta=0.1, sft_weight=1.0)
    yield "ipo", ipo_loss((a - c) / 7, (b - d) / 7, beta=1e-3)
    yield "simpo", simpo_loss(a / 7, b / 7, beta=10.0, gamma=5.0)
    yield "orpo", orpo_loss(a / 7, b / 7, beta=2.0)
    yield "kto", kto_loss(a, b, good, kl, beta=0.5, desirable_weight=900.0)
    yield "bco", bco_loss(0.5 * (a - b), good, reward_shift(0.5 * (a - b), good))
    for separate in (False, True):
        yield (
            "pdpo",
            pdpo_loss(
                (a - c, b - d),
                (a / 9, b / 9),
                beta=0.1,
                gamma=1.0,
                separate=separate,
                label_smoothing=0.1,
            ),
        )
    yield "selector", selector_loss(a - b)
    yield "reward_model", reward_model_loss(a / 9, b / 9, c / 9, center=0.01)
    yield "classification", classification_loss(a.view(8, 8), torch.arange(8))


def test_the_ranges_are_what_the_losses_can_give():
    """Log-probs from -0.1 to minus a million: a thousand times what a text of ours has."""
    for seed in range(0, 200, 4):
        for name, (loss, metrics) in losses(seed):
            specs = {spec.name: spec for spec in OBJECTIVES[name][1].reported}
            for metric, value in {"loss": loss, **metrics}.items():
                assert specs[metric].holds(float(value)), (name, metric, float(value))


def test_of_equal_answers_rounding_may_take_the_divergence_below_zero():
    specs = {spec.name: spec for spec in Distillation.reported}
    found = []
    for seed in range(300):
        logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(seed)) * 20
        found.append(float(distillation_loss(logits, logits.log_softmax(-1), 3.0)))
    assert min(found) < 0 and all(specs["divergence"].holds(value) for value in found)


class Odd(DPO):
    """One that reports what it has not declared."""

    def loss(self, model, batch, statistics):
        loss, metrics = super().loss(model, batch, statistics)
        return loss, {**metrics, "oddness": loss.detach()}


class Declared(Odd):
    reported = (*DPO.reported, NumberSpec("oddness", -1.0, 5.0))


def test_an_objective_of_ones_own_declares_what_it_reports(experiment):
    result = fedloom.run(experiment(federation={"rounds": 1}), objective=Declared())
    assert result.metrics["loss"] > 0
    assert '"oddness": 0.69' in (result.folder / "rounds.jsonl").read_text()
    with pytest.raises(fedloom.errors.RoundFailed, match=r"metrics \['oddness'\] are not declared"):
        fedloom.run(
            experiment(federation={"rounds": 1}, output={"folder": str(result.folder) + "-2"}),
            objective=Odd(),
        )
    assert Objective.reported == (score("loss"),)
