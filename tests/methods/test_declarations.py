"""What methods say of themselves: facts that agree with how they work, and every contradiction at once."""

import dataclasses

import pytest

from fedloom.errors import SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.methods import METHODS
from fedloom.methods.declaration import Claim


@pytest.mark.parametrize("name", METHODS)
def test_a_method_declares_what_it_is(name):
    settings, kind = METHODS[name]
    own = kind.__dict__["declares"]  # its own, not that of another that it builds on
    assert (own.framework == "FedLLM") == kind.shares_parameters
    claims = [getattr(own, field.name) for field in dataclasses.fields(own)]
    claims = [claim for claim in claims if isinstance(claim, Claim)]
    assert len(claims) == 5 and all(claim.why for claim in claims)
    assert own.absence.away and own.title and own.travels and own.keeps
    assert bool(own.paper) == (own.fidelity != "own" or name == "fedavg_ft")
    fields = settings.model_fields.keys() - {"name"}
    said = [*kind.taken, *kind.bounded, *kind.named_models]
    assert sorted(said) == sorted(fields)
    assert kind.least.keys() <= fields


@pytest.mark.parametrize("name", METHODS)
def test_row_privacy_is_declared_of_steps_on_batches_drawn_anew(name):
    settings, kind = METHODS[name]
    claim = kind.declares.row_privacy
    if kind(settings()).repeats > 1:
        assert not claim.holds or "with method.steps = 1 alone" in claim.why


MEANS = (
    "fedavg fedprox moon fedptr fedavgm fedbis fedavg_ft fedpdpo fedper fedrep ditto pfedme apfl fedala "
    "feddat feddpa fdlora fedsa_lora ffa_lora fedsvd rolora fedrot_lora fed_sb ravan random_projection"
)
"""Whose server takes a mean that another rule can replace; SCAFFOLD's, for one, moves c with it."""

FACTORS = (
    "regmean lora_fair feddat feddpa fedsa_lora ffa_lora fedsvd rolora fedrot_lora hilora lora_a2 fedspallm "
    "fed_sb ravan flora fedex_lora fedmomentum flexlora hetlora"
)
"""Which treat A and B of LoRA unlike each other, or multiply them."""

OWN = (
    "fedbiscuit fedavg_ft fedpdpo fedper fedrep ditto pfedme apfl fedala fedmap feddat feddpa fdlora "
    "fedsa_lora hilora"
)
"""Whose clients predict with something that they keep beside what they are sent."""


@pytest.mark.parametrize(
    ("trait", "value", "names"),
    [
        ("averages", True, MEANS),
        ("two_factors", True, FACTORS),
        ("personal", True, OWN),
        ("pools_data", True, "centralised"),
        ("own_models", True, "fedamole fedlease fedmoe distillation fed_et local_only"),
        ("needs_public", True, "distillation fed_et fedgrpo"),
        ("mixed_ranks", True, "flora flexlora hetlora"),
        ("mixed_models", True, "distillation fed_et local_only"),
        ("shares_parameters", False, "distillation fed_et fedgrpo split"),
        ("submixtures", True, "fedmoe local_only"),
        ("whole_at_clients", False, "split"),
        ("changes_backbone", True, "flora fedex_lora fedmomentum"),
        ("takes_merged_products", True, "fedavg fedprox fedavg_ft fedpdpo fedper fedrep"),
        (
            "by_rows",
            False,
            "feddyn fedadagrad fedadam fedyogi fedbuff pfedme feddat fdlora fedspallm",
        ),
        ("asynchronous", True, "fedbuff"),
    ],
)
def test_which_methods_are_unlike_fedavg_in_what(trait, value, names):
    found = {name for name, (own, kind) in METHODS.items() if getattr(kind(own()), trait) == value}
    assert found == set(names.split())


def test_how_often_a_client_goes_over_a_round_s_work():
    """In one request at most, on each batch, and in all requests of the four rounds of a run."""
    expected = {
        "fedavg_ft": (1, 1, [1, 1, 1, 2]),
        "fedrep": (2, 1, [2, 2, 2, 2]),
        "ditto": (2, 1, [2, 2, 2, 2]),
        "pfedme": (5, 5, [1, 1, 1, 1]),
        "apfl": (2, 2, [1, 1, 1, 1]),
        "fedala": (12, 1, [1, 2, 2, 2]),
        "feddat": (2, 2, [1, 1, 1, 1]),
        "feddpa": (2, 1, [2, 2, 2, 2]),
        "fdlora": (1, 1, [2, 1, 1, 1]),
        "hilora": (1, 1, [1, 1, 1, 2]),
        "lora_a2": (2, 1, [2, 2, 2, 2]),
        "fedlease": (1, 1, [1, 1, 1, 2]),
        "distillation": (1, 1, [2, 2, 2, 2]),
        "fed_et": (1, 1, [2, 2, 2, 2]),
    }
    for name, (own, kind) in METHODS.items():
        method = kind(own())
        rounds = [method.trainings_of(number, 4) for number in (1, 2, 3, 4)]
        assert (method.trainings, method.repeats, rounds) == expected.get(name, (1, 1, [1] * 4))


@pytest.mark.parametrize(
    ("name", "settings", "trainings", "last"),
    [
        ("fedavg_ft", {"passes": 3}, 3, 4),
        ("pfedme", {"steps": 3}, 3, 1),
        ("fedala", {"first_passes": 5}, 6, 2),
        ("feddpa", {"variant": "F"}, 1, 2),
        ("fedpdpo", {"schedule": "alternating"}, 2, 2),
        ("fedpdpo", {"schedule": "joint"}, 1, 1),
        ("lora_a2", {"choice": "random"}, 1, 1),
    ],
)
def test_how_often_follows_from_the_settings(name, settings, trainings, last):
    own, kind = METHODS[name]
    method = kind(own(**settings))
    assert (method.trainings, method.trainings_of(4, 4)) == (trainings, last)


def test_a_method_that_cannot_hide_a_row_is_refused_once(experiment):
    with pytest.raises(SettingsError) as caught:
        experiment(method={"name": "apfl"}, privacy={"unit": "row", "target_epsilon": 5.0})
    told = [text for text in caught.value.problems if "method.name = 'apfl'" in text]
    assert len(told) == 1 and "two steps on each batch" in told[0]


def test_only_who_can_lose_nobody_is_bound_to_one_client():
    assert [n for n, (_, kind) in METHODS.items() if not kind.declares.absence.tolerated] == [
        "centralised"
    ]
    assert [n for n, (_, kind) in METHODS.items() if kind.declares.role == "baseline"] == [
        "centralised",
        "local_only",
    ]
    assert [n for n, (_, kind) in METHODS.items() if kind.declares.reference] == [
        "fedavg",
        "local_only",
    ]


def test_all_contradictions_are_told_at_once():
    table = {
        "method": {"name": "split"},
        "adapter": {"kind": "prompt"},
        "training": {
            "accumulation": 2,
            "keep_optimizer_state": True,
            "gradient_checkpointing": True,
        },
        "admission": {"max_change": 1.0},
        "aggregation": {"rule": "median"},
        "clients": {"newcomers": [1]},
    }
    with pytest.raises(SettingsError) as caught:
        Experiment.from_table(table)
    told = caught.value.problems
    for words in (
        "admission.max_change bounds changes of parameters; those of method.name = 'split' do not",
        "method.name = 'split' works with objective.name = sft or classification, not with 'dpo'",
        "method split sends an optimizer batch at a time",
        "method split makes its optimizers anew in every round",
        "method split keeps activations on both sides",
        'adapter.kind = "prompt" puts its tokens before the first block',
        "aggregation.rule = 'median': method.name = 'split' puts updates together in a way of its own",
        "clients.newcomers go with methods that share parameters; 'split' does not",
    ):
        assert len([text for text in told if text.startswith(words)]) == 1, words


CLASSES = {"objective": {"name": "classification"}, "data": {"source": "builtin:labelled"}}
SUITED = {
    "fedamole": {"adapter": {"kind": "experts"}},
    "fedlease": {"adapter": {"kind": "experts", "router": "linear"}},
    "fedmoe": {"adapter": {"kind": "submixture"}},
    "distillation": CLASSES,
    "fed_et": CLASSES,
    "feddm": CLASSES,
    "split": CLASSES,
    "fedgrpo": {"objective": {"name": "grpo"}, "data": {"source": "builtin:sums"}},
}
"""What methods need that do not go with pairs or with LoRA."""


@pytest.mark.parametrize("name", METHODS)
def test_what_suits_a_method_is_allowed_by_default(name):
    own = {"adapter": {"rank": 12}, **SUITED.get(name, {})}
    assert Experiment.from_table({"method": {"name": name}, **own}).method.name == name


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"method": {"name": "moon"}, "adapter": {"kind": "experts"}},
            "adapter.kind = 'experts': method.name = 'moon' adds a term to the loss where mixtures",
        ),
        (
            {
                "method": {"name": "fedptr", "projection": "synthetic"},
                "adapter": {"kind": "prompt"},
            },
            "adapter.kind = 'prompt': method.name = 'fedptr' trains on synthetic embeddings",
        ),
        (
            {
                "method": {"name": "fedptr", "projection": "synthetic"},
                "training": {"gradient_checkpointing": True},
            },
            "training.gradient_checkpointing: method.name = 'fedptr' needs gradients of gradients",
        ),
        (
            {"method": {"name": "feddat"}, "objective": {"name": "reward_model"}},
            "method.name = 'feddat' teaches by probabilities",
        ),
        (
            {"method": {"name": "fedrot_lora", "share": 0.25}},
            'method.share = 0.25 is of method.rotation = "part"',
        ),
        (
            {"method": {"name": "scaffold"}, "training": {"head_learning_rate": 1e-4}},
            "training.head_learning_rate: method.name = 'scaffold' divides by one learning rate",
        ),
        (
            {"method": {"name": "fedpdpo"}, **CLASSES},
            "method.name = 'fedpdpo' gives clients heads over a vocabulary",
        ),
        (
            {"method": {"name": "hilora"}, "adapter": {"rank": 2}},
            "adapter.rank = 2 is that of three parts",
        ),
    ],
)
def test_what_a_method_does_not_go_with_is_told(sections, words):
    with pytest.raises(SettingsError) as caught:
        Experiment.from_table(sections)
    assert len([text for text in caught.value.problems if text.startswith(words)]) == 1


@pytest.mark.parametrize(
    "sections",
    [
        {"method": {"name": "fedptr"}, "adapter": {"kind": "prompt"}},
        {"method": {"name": "fedptr", "projection": "synthetic"}, "adapter": {"kind": "ia3"}},
        {"method": {"name": "fedptr"}, "training": {"gradient_checkpointing": True}},
        {"method": {"name": "fedrot_lora", "rotation": "part", "share": 0.25}},
        {"method": {"name": "hilora"}, "adapter": {"rank": 3}, "federation": {"rounds": 3}},
    ],
)
def test_what_lies_beside_that_is_allowed(sections):
    Experiment.from_table(sections)


@pytest.mark.parametrize(
    ("name", "kind"), [("fedamole", "experts"), ("fedmoe", "submixture"), ("fedavg", "lora")]
)
def test_clients_that_average_have_one_model_and_rank(name, kind):
    table = {
        "method": {"name": name},
        "adapter": {"kind": kind},
        "clients": {"groups": {"small": {"clients": [1], "rank": 2}}},
    }
    words = (
        "same model and rank; flora, flexlora and hetlora allow different ranks, distillation, "
        "fed_et and local_only both"
    )
    with pytest.raises(SettingsError, match=words):
        Experiment.from_table(table)
