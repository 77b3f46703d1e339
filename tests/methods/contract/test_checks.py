"""What follows from a method's class attributes: each contradiction is one message, its neighbour none."""

from dataclasses import fields, replace

import pytest
from pydantic import BaseModel

from fedloom.errors import ModelError, SettingsError
from fedloom.experiment.experiment import Experiment, view_of
from fedloom.federation.participants import ClientsSettings
from fedloom.methods import METHODS
from fedloom.methods.contract.checks import (
    noise_of_each_round,
    optimizer_anew,
    require_linear_layers,
    tasks_only,
    whole_answers,
)
from fedloom.methods.contract.experiment_view import ExperimentView

SUMS = {
    "privacy": {"secure_aggregation": True},
    "evaluation": {"per_client": False},
    "federation": {"clients": 3},
}
TEXTS = {"objective": {"name": "sft"}, "data": {"source": "builtin:instructions"}}
FILES = {
    "data": {"source": ["a.jsonl", "b.jsonl"], "kind": "instruction", "test_source": "t.jsonl"},
    "partition": {"kind": "files"},
    "federation": {"clients": 2},
    "objective": {"name": "sft"},
}
PRIVATE = {
    "data": {"source": "clients", "kind": "instruction", "test_source": "t.jsonl"},
    "objective": {"name": "sft"},
}


def by(name, **settings):
    return {"method": {"name": name, **settings}}


def group(**own):
    return {"clients": {"groups": {"few": {"clients": [0], **own}}}}


def together(*tables):
    """Tables of sections put together, section by section."""
    whole = {}
    for table in tables:
        for name, section in table.items():
            whole[name] = {**whole.get(name, {}), **section}
    return whole


def in_a_round(**amounts):
    return {"training": {"amount_per": "round", **amounts}}


def start(**own):
    return {"adapter": {"start": "adapter", **own}}


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ((SUMS, by("appa")), "does not go with it: the server reads each answer by itself"),
        ((SUMS, by("local_only")), "has no model but each client's own"),
        ((SUMS, {"aggregation": {"rule": "median"}}), "'median' compares single updates"),
        ((SUMS, {"admission": {"max_change": 1.0}}), "admission.max_change bounds single updates"),
        ((SUMS, {"evaluation": {"per_client": True}}), "sends each client's own scores"),
        ((SUMS, {"simulation": {"devices": {}}}), "does not time its stages"),
        ((SUMS, {"federation": {"clients": 2}}), "a round has 2 clients, and a sum needs 3"),
        ((SUMS, {"federation": {"replacements": 1}}), "cannot join a sum that has begun"),
        # 2^32 / 2^24 = 256 weights' steps, 16 for each client at least
        (
            (SUMS, {"privacy": {"sum_bits": 24}, "federation": {"clients": 17}}),
            "weights of 17 clients, of which there may be 16: lower it",
        ),
        ((TEXTS, by("distillation"), {"admission": {"max_change": 1.0}}), "do not travel"),
        (
            ({"adapter": {"kind": "submixture"}},),
            "'fedavg' has one for all; use fedmoe or local_only",
        ),
        (
            (by("fedex_lora"), {"model": {"quantization": "int8"}}),
            "which a quantised one cannot take up",
        ),
        (
            (group(rank=4),),
            "flora, flexlora and hetlora allow different ranks, distillation, fed_et and local_only both",
        ),
        (
            (by("flexlora"), {"adapter": {"rank": 8}}, group(rank=8, model="other")),
            "clients.groups.few.model: method.name = 'flexlora' allows other ranks of one model",
        ),
        (
            (by("flexlora"), {"adapter": {"rank": 8}}, group(rank=9)),
            "clients.groups.few.rank = 9 is above adapter.rank = 8",
        ),
        (
            (by("fedsa_lora"), {"adapter": {"use_dora": True}}),
            "adapter.use_dora: method.name = 'fedsa_lora' works on the two factors of LoRA, and",
        ),
        (
            (TEXTS, by("split"), {"adapter": {"use_dora": True}}),
            "adapter.use_dora: method.name = 'split' gives clients a part of the model, and",
        ),
        (
            ({"aggregation": {"rule": "knots"}, "adapter": {"use_dora": True}},),
            "adapter.use_dora: aggregation.rule = 'knots' is of products of LoRA's factors, and",
        ),
        (
            (TEXTS, by("split"), {"adapter": {"modules_to_save": ["lm_head"]}}),
            "gives clients a part of the model, which may lack them",
        ),
        (
            (TEXTS, by("split"), {"training": {"neftune_noise_alpha": 5.0}}),
            "whose embeddings stay as they are",
        ),
        (
            (by("ditto"), {"evaluation": {"load_best_model_at_end": True}}),
            "evaluation.load_best_model_at_end: method.name = 'ditto' has models of clients' own",
        ),
        (
            (by("local_only"), {"evaluation": {"load_best_model_at_end": True}}),
            "method.name = 'local_only' has models of clients' own",
        ),
        ((by("centralised"), {"clients": {"newcomers": [2]}}), "'centralised' does not"),
        ((TEXTS, by("distillation"), {"clients": {"newcomers": [2]}}), "'distillation' does not"),
        ((by("flora"), start()), "adapter.start: method.name = 'flora' cannot: every round begins"),
        (
            (by("local_only"), start(), group(rank=4)),
            "adapter.start is of one rank, which method.name = 'local_only' does not change",
        ),
        ((by("local_only"), start(), group(model="other")), "adapter.start is of one model"),
        ((PRIVATE, by("centralised")), 'puts all rows together; data.source = "clients"'),
        ((PRIVATE, by("distillation")), 'data.source = "clients" are private: name public.source'),
        ((FILES, by("distillation")), "are the clients': name public.source"),
        (
            (by("ditto"), in_a_round(local_steps=1)),
            "'ditto', which makes 2 trainings in a round: give 2 at least (training.local_steps, or",
        ),
        (  # two trainings in round 1 alone, and in the last alone
            (by("fdlora"), {"federation": {"rounds": 3}}, in_a_round(local_steps=1)),
            "'fdlora', which makes 2 trainings in a round: give 2 at least",
        ),
        (
            (by("feddpa", variant="F"), {"federation": {"rounds": 3}}, in_a_round(local_steps=1)),
            "'feddpa', which makes 2 trainings in a round: give 2 at least",
        ),
        (
            (by("pfedme"), in_a_round(local_steps=4)),
            "'pfedme', which makes 5 optimizer steps on each batch: give 5 at least (training.local_steps",
        ),
        (  # pairs are two answers each
            (by("pfedme"), in_a_round(local_examples=9)),
            "examples: 9 a client and round is too little for method.name = 'pfedme', which makes 5 "
            "optimizer steps on each batch: give 10 at least (training.local_examples, or",
        ),
        ((TEXTS, by("pfedme"), in_a_round(local_examples=4)), "give 5 at least"),
        (
            (by("pfedme"), in_a_round(local_steps=13)),
            "optimizer steps: 13 a client and round do not part into batches for method.name = 'pfedme', "
            "which makes 5 optimizer steps on each batch: give 10 or 15 (",
        ),
    ],
)
def test_each_is_told_once(tables, words):
    with pytest.raises(SettingsError) as told:
        Experiment.from_table(together(*tables))
    (problem,) = told.value.problems
    assert words in problem


@pytest.mark.parametrize(
    "tables",
    [
        (SUMS,),
        (SUMS, {"federation": {"clients": 5, "clients_per_round": 3}}),
        (SUMS, {"privacy": {"sum_bits": 24}, "federation": {"clients": 16}}),
        ({"admission": {"max_change": 1.0}},),
        (by("flexlora"), {"adapter": {"rank": 8}}, group(rank=8)),
        (by("local_only"), {"adapter": {"rank": 8}}, group(rank=9)),
        (by("local_only"), {"adapter": {"kind": "submixture"}}),
        ({"model": {"quantization": "int8"}},),
        ({"adapter": {"use_dora": True}},),
        ({"adapter": {"modules_to_save": ["lm_head"]}}, TEXTS),
        ({"training": {"neftune_noise_alpha": 5.0}}, TEXTS),
        ({"evaluation": {"load_best_model_at_end": True}},),
        ({"objective": {"name": "reward_model"}},),
        ({"clients": {"newcomers": [2]}},),
        (start(),),
        (by("flexlora"), start(rank=8), group(rank=4)),
        (PRIVATE,),
        (PRIVATE, by("distillation"), {"public": {"source": "p.jsonl"}}),
        (FILES,),
        (FILES, by("distillation"), {"public": {"source": "p.jsonl"}}),
        (TEXTS, by("distillation")),
        (by("ditto"), in_a_round(local_steps=2)),
        (by("pfedme"), in_a_round(local_steps=5)),
        (by("pfedme"), in_a_round(local_steps=10)),
        (by("pfedme"), in_a_round(local_examples=10)),
        (TEXTS, by("pfedme"), in_a_round(local_examples=5)),
        (by("pfedme"), {"training": {"local_steps": 7}}),
        (by("apfl"), in_a_round(local_steps=2)),
    ],
)
def test_what_lies_beside_it_is_allowed(tables):
    Experiment.from_table(together(*tables))


def settings_of(name):
    return METHODS[name][0](name=name)


def test_sections_that_are_not_sound_are_passed_over():
    """Every method's checks say no more of a part of the sections than of all."""
    sections = {"start": {"adapter": {"rank": 8}}, "sums": {"evaluation": {"per_client": False}}}
    whole = view_of(Experiment.from_table(together(*sections.values())))
    sums = SUMS["privacy"]
    private = replace(whole, privacy=whole.privacy.model_copy(update=sums))
    optional = [own.name for own in fields(ExperimentView) if own.default is None]
    for name, (_, kind) in METHODS.items():
        view = replace(private, method=settings_of(name))
        told = set(kind.check(view))
        assert told <= set(kind.check(view)) and isinstance(view.method, BaseModel)
        alone = ExperimentView(method=view.method, methods=view.methods)
        assert list(kind.check(alone)) == []
        for section in optional:
            name_too = {"objective_name": ""} if section == "objective" else {}
            assert set(kind.check(replace(view, **{section: None}, **name_too))) <= told, section


def test_public_rows_hold_no_pairs():
    whole = view_of(Experiment.from_table({"objective": {"name": "reward_model"}}))
    view = replace(whole, method=settings_of("distillation"))
    told = [own for own in METHODS["distillation"][1].check(view) if "pairs" in own]
    assert (
        len(told) == 1
        and 'learns from pairs alone: use another method, such as "fedavg"' in told[0]
    )


def test_groups_whose_rewards_alone_differ_are_of_one_model_and_rank():
    rewards = {"clients": [0], "rewards": ["regex:."]}
    groups = {
        "strict": rewards,
        "few": {**rewards, "rank": 2},
        "large": {**rewards, "model": "large"},
        "plain": {"clients": [1]},
    }
    clients = ClientsSettings(groups=groups)
    view = ExperimentView(settings_of("fedavg"), {}, clients=clients)
    assert list(view.groups) == ["few", "large", "plain"]
    assert ExperimentView(settings_of("fedavg"), {}).groups == {}


def test_newcomers_are_judged_one_by_one():
    whole = view_of(Experiment.from_table(SUMS))
    clients = whole.clients.model_copy(update={"newcomers": [2]})
    told = list(METHODS["fedavg"][1].check(replace(whole, clients=clients)))
    assert len(told) == 1 and "clients.newcomers are judged one by one" in told[0]


@pytest.mark.parametrize(
    ("check", "tables"),
    [
        (lambda view: tasks_only(view), ()),
        (
            lambda view: optimizer_anew(view, "why"),
            ({"training": {"keep_optimizer_state": True}},),
        ),
        (lambda view: whole_answers(view, "why"), ({"admission": {"max_change": 1.0, "on_excess": "clip"}},)),
        (
            lambda view: noise_of_each_round(view, "why"),
            (
                {"privacy": {"unit": "client", "mechanism": "tree", "delta": 1e-3}},
                {"privacy": {"noise_multiplier": 1.0}},
            ),
        ),
    ],
)  # fmt: skip
def test_what_methods_add_is_told_where_it_holds(check, tables):
    """Each of the experiment above, of none by default, and of none without sections."""
    plain = view_of(Experiment.from_table(TEXTS))
    told = view_of(Experiment.from_table(together(*tables)))
    assert len(list(check(told))) == 1
    assert list(check(plain)) == []
    assert list(check(ExperimentView(method=plain.method, methods=plain.methods))) == []


def test_factors_of_a_stack_of_experts_are_refused():
    require_linear_layers(None, "why")
    with pytest.raises(ModelError, match=r"why: mlp\.experts has factors for a stack"):
        require_linear_layers("mlp.experts", "why")
